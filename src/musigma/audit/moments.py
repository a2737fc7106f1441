"""Moments of draws against claimed ones, with a stated false-alarm rate.

Every decision is made at the level `LEVEL` for a whole check of any number of comparisons
(Bonferroni). A difference must also be large enough to matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, Outcome, Passed, bug
from musigma.audit.sandbox import FLOATS, Sandbox, first_form

__all__ = ["audit_aggregate", "moments_differ"]

DRAWS = 40_000  # of the aggregate posterior
LEVEL = 1e-7  # probability of a false alarm, for one check


def _quantile(comparisons: int = 1) -> float:
    """The number of standard errors that one of several comparisons may be off, two-sided.

    Example:
        >>> round(_quantile(), 2), round(_quantile(100), 2)
        (5.33, 6.11)
    """
    return NormalDist().inv_cdf(1 - LEVEL / (2 * max(1, comparisons)))


def moments_differ(
    z: Tensor, mean: Tensor, std: Tensor, smallest: float = 0.02
) -> dict[str, Any] | None:
    """The figures of draws (n, D) with an unexpected mean or std (D,); None if there are none.

    `smallest` is the smallest difference that matters, in units of `std`.
    """
    n, columns = z.shape
    errors = _quantile(2 * columns) * 1.2
    off = (z.mean(0) - mean) / std
    ratio = z.std(0) / std
    wrong_mean = off.abs() > max(smallest, errors / math.sqrt(n))
    kurtosis = (((z - z.mean(0)) / z.std(0)) ** 4).mean(0).clamp(min=3)  # 3 of normal draws
    wrong_std = (ratio - 1).abs() > (errors * ((kurtosis - 1) / (4 * n)).sqrt()).clamp(smallest)
    if not (wrong_mean | wrong_std).any():
        return None
    i = int((off.abs() + (ratio - 1).abs()).argmax())
    return {
        "mean": float(z[:, i].mean()),
        "std": float(z[:, i].std()),
        "expected_mean": float(mean[i]),
        "expected_std": float(std[i]),
        "draws": n,
    }


def audit_aggregate(
    covariance: Tensor | Callable[[], Tensor], sample: Tensor | Callable[[int], Tensor]
) -> AuditReport:
    r"""Whether a claimed covariance of the aggregate posterior is that of its draws.

    By the law of total variance, with encoder mean mu(x) and variance S(x),

        Cov[z] = E[S(x)] + Cov[mu(x)].

    Args:
        covariance: The claimed matrix (D, D), or a callable that returns it.
        sample: ``sample(n)``: draws of the aggregate posterior (n, D); or the draws themselves.

    Raises:
        AuditError: If shapes do not fit, or a callable raises.

    Example:
        >>> torch.manual_seed(0) and None
        >>> report = audit_aggregate(torch.eye(2), lambda n: 2 * torch.randn(n, 2))
        >>> report.verdict, report.codes
        ('bug', ('aggregate_cov',))
    """

    def called(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with Sandbox(covariance, sample) as sandbox, torch.no_grad():
            sandbox.use_dtype(dtype)
            matrix = sandbox.call("covariance", covariance) if callable(covariance) else covariance
            draws = sandbox.call("sample", sample, DRAWS) if callable(sample) else sample
            return sandbox.as_tensor("covariance", matrix), sandbox.as_tensor("sample", draws)

    _, (claimed, z) = first_form(product(FLOATS), called)
    z = z.flatten(1) if z.ndim > 1 else z[:, None]
    d = z.shape[1]
    if claimed.ndim == 1 and len(claimed) == d:
        claimed = torch.diag(claimed)
    if claimed.shape != (d, d):
        raise AuditError(
            f"covariance: expected shape ({d}, {d}), as sample returns {d} numbers a draw; got "
            f"{tuple(claimed.shape)}"
        )
    return AuditReport.of("aggregate posterior", _check_covariance(z, claimed))


def _check_covariance(z: Tensor, claimed: Tensor) -> Iterator[Outcome]:
    """Compare the covariance of draws (n, D) with a claimed one (D, D)."""
    if not (z.isfinite().all() and claimed.isfinite().all()):
        yield bug("not_finite", "aggregate")
        return
    excess = min(_excess(half, claimed) for half in z.tensor_split(2))
    sampled, std, n = z.T.cov().view_as(claimed), z.std(0), len(z)
    off = float(((sampled - claimed).abs() / torch.outer(std, std).clamp(min=1e-300)).max())
    yield Passed(f"covariance of {n} draws: off by at most {off:.3g}, as a correlation")
    if excess > 1:
        both: Any = {"sampled": sampled.tolist(), "claimed": claimed.tolist()}
        yield bug("aggregate_cov", draws=n, off=off, over_limit=excess, **both)


def _excess(z: Tensor, claimed: Tensor, smallest: float = 0.02) -> float:
    """The largest ratio of an error of a claimed covariance (D, D) of draws (n, D) to its limit.

    The standard error of an entry is valid for any distribution with four moments; differences
    below `smallest`, as a correlation, do not matter.
    """
    (n, d), centered, std = z.shape, z - z.mean(0), z.std(0)
    sampled = centered.T @ centered / (n - 1)
    fourth = (centered**2).T @ (centered**2) / n
    error = ((fourth - sampled**2).clamp(min=0) / n).sqrt()
    limit = (1.3 * _quantile(d * (d + 1) // 2) * error).maximum(smallest * torch.outer(std, std))
    return float(((sampled - claimed).abs() / limit.clamp(min=1e-300)).max())
