"""The audit of an aggregate posterior's covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder
from musigma.audit.sandbox import Sandbox, by_float_type
from musigma.audit.statistics import covariance_differs

__all__ = ["audit_aggregate"]


DRAWS = 40_000


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
    claimed, z = by_float_type(lambda dtype: _both(covariance, sample, dtype))
    z = z.flatten(1) if z.ndim > 1 else z[:, None]
    d = z.shape[1]
    if claimed.ndim == 1 and len(claimed) == d:
        claimed = torch.diag(claimed)
    if claimed.shape != (d, d):
        raise AuditError(
            f"covariance: expected shape ({d}, {d}), as sample returns {d} numbers a draw; got "
            f"{tuple(claimed.shape)}"
        )
    report = ReportBuilder("aggregate posterior")
    if not (z.isfinite().all() and claimed.isfinite().all()):
        report.bug(
            "not_finite",
            "covariance or sample returns NaN or infinity",
            "find out which of the two does, and for which x",
        )
        return report.build()
    excess = min(covariance_differs(half, claimed)[0] for half in z.tensor_split(2))
    sampled = covariance_differs(z, claimed)[1]
    scale = (sampled.diag()[:, None] * sampled.diag()[None]).sqrt()
    error = float(((sampled - claimed).abs() / scale.clamp(min=1e-300)).max())
    report.checked.append(
        f"covariance of {len(z)} draws: off by at most {error:.3g}, as a correlation"
    )
    if excess > 1:
        report.bug(
            "aggregate_cov",
            f"the claimed covariance differs from that of {len(z)} draws by {error:.3g}, as a "
            "correlation",
            "the covariance of the aggregate is E[S(x)] + Cov[mean(x)]: add both parts",
            sampled=sampled.tolist(),
            claimed=claimed.tolist(),
            off=error,
            over_limit=excess,
        )
    return report.build()


def _both(covariance: Any, sample: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The claimed covariance, and draws."""
    with Sandbox(covariance, sample) as sandbox, torch.no_grad():
        sandbox.use_dtype(dtype)
        claimed = sandbox.call("covariance", covariance) if callable(covariance) else covariance
        z = sandbox.call("sample", sample, DRAWS) if callable(sample) else sample
        return sandbox.as_tensor("covariance", claimed), sandbox.as_tensor("sample", z)
