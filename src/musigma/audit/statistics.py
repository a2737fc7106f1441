"""Hypothesis tests with a stated false-alarm rate.

Every decision from random numbers is made here, at the level `LEVEL` = 1e-7 for a whole check of
any number of comparisons (Bonferroni). A difference must also be large enough to matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Cauchy, Exponential, Laplace

__all__ = ["LEVEL", "correlated", "covariance_differs", "moments_differ", "noise_name", "quantile"]

LEVEL = 1e-7  # probability of a false alarm, for one check


def quantile(comparisons: int = 1) -> float:
    """The number of standard errors that one of several comparisons may be off, two-sided.

    Example:
        >>> round(quantile(), 2), round(quantile(100), 2)
        (5.33, 6.11)
    """
    return NormalDist().inv_cdf(1 - LEVEL / (2 * max(1, comparisons)))


def _student4(p: Tensor) -> Tensor:  # closed form: Shaw, Sampling Student's t distribution (2006)
    alpha = (4 * p * (1 - p)).sqrt()
    q = torch.cos(torch.arccos(alpha.clamp(max=1)) / 3) / alpha
    return (p - 0.5).sign() * 2 * (q - 1).clamp(min=0).sqrt()


TAIL = NormalDist().cdf(-2.0)  # what a normal distribution that is truncated at 2 lacks

QUANTILES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": torch.special.ndtri,
    "uniform": torch.clone,
    "Laplace": Laplace(0.0, 1.0).icdf,
    "logistic": torch.logit,
    "Cauchy": Cauchy(0.0, 1.0).icdf,
    "Student-t": _student4,
    "exponential": Exponential(1.0).icdf,
    "truncated normal": lambda p: torch.special.ndtri(TAIL + p * (1 - 2 * TAIL)),
}


def noise_name(e: Tensor) -> tuple[str, dict[str, Any]]:
    r"""The distribution of independent numbers: normal, or another family.

    They are normal unless their standardized empirical distribution function F violates the bound
    of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant,

        sup |F - Phi|  >  sqrt(log(2 / LEVEL) / (2 n)),

    or their skewness or excess kurtosis exceeds 8 standard errors, sqrt(6 / n) and sqrt(24 / n).
    The bound is for a known mean and variance; estimated ones only bring F nearer to Phi.

    The result is "normal" or the family with the nearest quantiles, and the numbers.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise_name(torch.rand(10_000, generator=generator, dtype=torch.float64))[0]
        'uniform'
    """
    e = e.flatten().double().sort().values
    n = len(e)
    unit = (e - e.mean()) / e.std().clamp(min=1e-300)
    skewness, kurtosis = float((unit**3).mean()), float((unit**4).mean() - 3)
    p = torch.special.ndtr(unit)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = float(torch.maximum((p - steps).abs(), (p - steps - 1 / n).abs()).max())
    limit = math.sqrt(math.log(2 / LEVEL) / (2 * n))
    numbers = {
        "skewness": skewness,
        "excess_kurtosis": kurtosis,
        "distance": distance,
        "limit": limit,
        "draws": n,
    }
    unlike = abs(skewness) > 8 * math.sqrt(6 / n) or abs(kurtosis) > 8 * math.sqrt(24 / n)
    if distance <= limit and not unlike:
        return "normal", numbers
    if len(torch.unique(e)) < n / 10:
        return "discrete", numbers
    levels = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    measured = e[(levels * n).long().clamp(max=n - 1)]
    off = {}
    for name, family in QUANTILES.items():
        known = family(levels) - family(levels).mean()
        centered = measured - measured.mean()
        slope = (known * centered).sum() / known.square().sum()
        off[name] = float((centered - slope * known).abs().max())
    nearest = min(off, key=lambda name: off[name])
    if nearest == "logistic" and kurtosis > 2.5:  # of a logistic distribution: 1.2
        nearest = "Student-t"
    if nearest == "normal":
        nearest = "heavier tails than normal" if kurtosis > 0 else "lighter tails than normal"
    return nearest, numbers


def correlated(e: Tensor, smallest: float = 0.1) -> tuple[float, float]:
    """The largest correlation between columns, and its limit for independent columns.

    Rows (n, D) are independent; at most 64 columns are compared. Correlations below `smallest` do
    not matter.
    """
    n, columns = e.shape
    if columns > 64:
        e = e[:, torch.linspace(0, columns - 1, 64).long()]
        columns = 64
    if columns < 2:
        return 0.0, 1.0
    unit = (e - e.mean(0)) / e.std(0).clamp(min=1e-300)
    r = (unit.T @ unit / (n - 1)).fill_diagonal_(0)
    limit = max(smallest, quantile(columns * (columns - 1) // 2) * 1.2 / math.sqrt(n))
    return float(r.flatten()[r.abs().argmax()]), limit


def moments_differ(
    z: Tensor, mean: Tensor, std: Tensor, smallest: float = 0.02
) -> dict[str, Any] | None:
    """The figures of draws (n, D) with an unexpected mean or std (D,); None if there are none.

    `smallest` is the smallest difference that matters, in units of `std`.
    """
    n, columns = z.shape
    errors = quantile(2 * columns) * 1.2
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


def covariance_differs(z: Tensor, claimed: Tensor, smallest: float = 0.02) -> tuple[float, Tensor]:
    """How far the covariance of draws (n, D) is from a claimed one, and the draws' covariance.

    The first is the largest ratio of a difference to its limit: above 1 they differ. The standard
    error of an entry is valid for any distribution with four moments; differences below
    `smallest`, as a correlation, do not matter.
    """
    n, d = z.shape
    centered = z - z.mean(0)
    sampled = centered.T @ centered / (n - 1)
    fourth = (centered**2).T @ (centered**2) / n
    error = ((fourth - sampled**2).clamp(min=0) / n).sqrt()
    scale = (sampled.diag()[:, None] * sampled.diag()[None]).sqrt()
    limit = torch.maximum(1.3 * quantile(d * (d + 1) // 2) * error, smallest * scale)
    return float(((sampled - claimed).abs() / limit.clamp(min=1e-300)).max()), sampled
