"""Figures with intervals: shares, areas under ROC curves, and averages of rows.

Every interval holds the true value in 95 % of samples, as the number of rows grows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Interval",
    "Z",
    "area",
    "auc",
    "average_precision",
    "exact_share",
    "normal",
    "plain",
    "share",
]

Z = 1.959963984540054
"""The normal quantile of 0.975."""


class Interval(NamedTuple):
    """A figure and the two ends of its interval.

    >>> print(Interval(0.5, 0.4271, 0.5712))
    0.500 (0.427 to 0.571)
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def plain(result: Any) -> dict[str, Any]:
    """The fields of a result as plain data, for JSON; without those that are arrays.

    An interval becomes an object of value, low and high.

    >>> from types import SimpleNamespace
    >>> plain(SimpleNamespace(n=3, share=Interval(0.5, 0.4, 0.6), rows=np.zeros(3)))
    {'n': 3, 'share': {'value': 0.5, 'low': 0.4, 'high': 0.6}}
    """

    def of(value: Any) -> Any:
        if isinstance(value, Interval):
            return value._asdict()
        return {k: of(v) for k, v in value.items()} if isinstance(value, dict) else value

    values = vars(result).items()
    return {name: of(value) for name, value in values if not isinstance(value, np.ndarray)}


def share(count: float, total: float) -> Interval:
    """A share of independent rows, with the score interval of a binomial proportion.

    Args:
        count: Rows that are counted; a fraction where ties are divided.
        total: All rows; fewer of them, and in proportion of `count`, widen the interval.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Example:
        >>> print(share(5, 100))
        0.050 (0.022 to 0.112)
    """
    p, pseudo = float(count / total), Z**2 / total
    middle = (p + pseudo / 2) / (1 + pseudo)
    half = Z * np.sqrt(p * (1 - p) / total + pseudo / (4 * total)) / (1 + pseudo)
    low, high = float(middle - half), float(middle + half)
    return Interval(p, low if count else 0.0, high if count < total else 1.0)


def exact_share(count: int, total: int) -> Interval:
    """A share of independent rows, with an interval that holds the true share at least as often.

    Source: Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of
    the binomial", 1934.

    Example:
        >>> print(exact_share(5, 100))
        0.050 (0.016 to 0.113)
    """
    from scipy.special import betaincinv

    low = float(betaincinv(count, total - count + 1, 0.025)) if count else 0.0
    high = float(betaincinv(count + 1, total - count, 0.975)) if count < total else 1.0
    return Interval(count / total, low, high)


def normal(
    value: float,
    variance: float,
    low: float = -np.inf,
    high: float = np.inf,
    degrees: float = np.inf,
) -> Interval:
    """A figure that is normally distributed, with its variance; the ends stay in a range.

    Args:
        value: The figure.
        variance: Its variance.
        low: Smallest value that is possible.
        high: Largest one.
        degrees: Degrees of freedom of the variance, if it is an estimate from few values; the
            interval is then that of Student's t.

    Example:
        >>> print(normal(0.5, 0.01), normal(0.5, 0.01, degrees=9))
        0.500 (0.304 to 0.696) 0.500 (0.274 to 0.726)
    """
    from scipy.special import stdtrit

    quantile = Z if np.isinf(degrees) else float(stdtrit(degrees, 0.975))
    half = quantile * np.sqrt(variance)
    return Interval(float(value), float(max(low, value - half)), float(min(high, value + half)))


def area(positive: np.ndarray, negative: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The area under the ROC curve, and the part of every row in it.

    Args:
        positive: Scores (P,) of rows that should have the higher ones.
        negative: Scores (N,) of the others.

    Returns:
        A = P(positive > negative) + P(equal) / 2; for every positive the share of negatives below
        it (P,); for every negative the share of positives above it (N,); ties count one half.
        Both have the mean A, and A has the variance var / P + var / N.

    Raises:
        ValueError: If there are no scores of one kind, or a score is not a number.

    Source: DeLong, DeLong & Clarke-Pearson, "Comparing the areas under two or more correlated
    receiver operating characteristic curves", 1988.
    """
    from scipy.stats import rankdata

    for name, scores in (("positive", positive), ("negative", negative)):
        if not len(scores) or np.isnan(scores).any():
            raise ValueError(
                f"{name}: expected at least one score, and numbers; got {len(scores)} scores, "
                f"{int(np.isnan(scores).sum())} of them NaN"
            )
    p, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    below = (ranks[:p] - rankdata(positive)) / n
    above = 1 - (ranks[p:] - rankdata(negative)) / p
    return float(below.mean()), below, above


def auc(positive: np.ndarray, negative: np.ndarray) -> Interval:
    """The area under the ROC curve, with its interval.

    The variance is DeLong's (see `area`). Where all positives are above all negatives, or below
    them, it is 0; the interval is then that of a share of which all the rarer rows, or none, are
    counted.

    Args:
        positive: Scores (P,) of rows that should have the higher ones.
        negative: Scores (N,) of the others.

    Raises:
        ValueError: As `area`.

    Example:
        >>> print(auc(np.array([2.0, 3.0, 5.0, 6.0]), np.array([1.0, 2.0, 4.0, 0.0])))
        0.844 (0.548 to 1.000)
    """
    value, below, above = area(positive, negative)
    if value in (0.0, 1.0) or min(len(below), len(above)) < 2:
        rarer = min(len(below), len(above))
        return share(value * rarer, rarer)
    variance = below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)
    return normal(value, variance, 0.0, 1.0)


def average_precision(
    positive: np.ndarray, negative: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    r"""Average precision, with a bootstrap interval.

    .. math:: AP = \sum_t (R_t - R_{t-1}) P_t

    over thresholds t, with recall R and precision P, as scikit-learn defines it. It depends on the
    share of positives. The ends are percentiles over samples in which both kinds are drawn again,
    each by itself.

    Args:
        positive: Scores (P,) of rows that should have the higher ones.
        negative: Scores (N,) of the others.
        resamples: Number of bootstrap samples.
        seed: Random seed of the bootstrap.

    Example:
        >>> positive, negative = np.array([2.0, 3.0, 5.0, 6.0]), np.array([1.0, 2.0, 4.0, 0.0])
        >>> print(average_precision(positive, negative))
        0.854 (0.619 to 1.000)
    """
    values, at = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    kinds = np.split(at, [len(positive)])

    def of(rows: list[np.ndarray]) -> float:
        hits, misses = (np.bincount(r, minlength=len(values))[::-1].cumsum() for r in rows)
        precision = hits / np.maximum(hits + misses, 1)
        return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])

    random = np.random.default_rng(seed)
    draws = [
        of([kind[random.integers(len(kind), size=len(kind))] for kind in kinds])
        for _ in range(resamples)
    ]
    return Interval(of(kinds), *map(float, np.quantile(draws, [0.025, 0.975])))
