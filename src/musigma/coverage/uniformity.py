"""Are numbers in (0, 1) uniform? An exact test, its simultaneous band, and its power.

The test compares the share of the numbers up to each point of a grid with the point itself, by the
binomial distribution of their count, and takes the least likely point. The counts at successive
points are a Markov chain, so the probability that all of them stay within bounds is a finite sum.

Source: Säilynoja, Bürkner, Vehtari, "Graphical test for discrete uniformity and its applications
in goodness-of-fit evaluation and multiple sample comparison", 2022, arXiv:2103.10522.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import special, stats

__all__ = ["GRID", "band", "curve", "detectable", "p_value", "power"]

GRID = np.arange(1, 100) / 100
"""The points z at which the share of numbers up to z is compared with z."""

TINY = 1e-9  # below it, 1 - P has lost its digits


def curve(u: np.ndarray) -> np.ndarray:
    """The share of numbers (N,) up to each point of `GRID`: their distribution function (99,)."""
    return np.searchsorted(np.sort(u), GRID, "right") / len(u)


def p_value(u: np.ndarray) -> float:
    """P-value of the hypothesis that numbers (N,) are independent and uniform on (0, 1).

    It is exact: P(p <= a) <= a, and close to a, for every number of them.

    Example:
        >>> u = np.random.default_rng(0).uniform(size=500)
        >>> p_value(u) > 0.05, p_value(u**1.5) < 0.001
        (True, True)
    """
    n, counts = len(u), np.searchsorted(np.sort(u), GRID, "right")
    below = stats.binom.cdf(counts, n, GRID)
    above = stats.binom.sf(counts - 1, n, GRID)
    least = float(2 * np.minimum(below, above).min())
    if len(GRID) * least < TINY:  # the sum over points is as good a bound
        return len(GRID) * least
    return 1 - _within(n, *_bounds(n, least * (1 + 1e-9)))  # equal ones are as extreme


@lru_cache(maxsize=64)
def _threshold(n: int, level: float) -> float:
    """The largest pointwise level at which all points together err with at most `level`."""
    low, high = np.log(level / (2 * len(GRID))), np.log(level)
    for _ in range(18):
        middle = (low + high) / 2
        inside = _within(n, *_bounds(n, float(np.exp(middle))))
        low, high = (middle, high) if 1 - inside <= level else (low, middle)
    return float(np.exp(low))


def band(n: int, level: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """The band that holds the whole `curve` of n uniform numbers, in a share 1 - level of cases.

    Returns:
        Lower and upper shares at the points of `GRID`, each (99,).

    Example:
        >>> low, high = band(1000)
        >>> float(low[49]), float(high[49])
        (0.453, 0.547)
    """
    low, high = _bounds(n, _threshold(n, level))
    return low / n, high / n


def power(n: int, shares: np.ndarray, level: float = 0.05) -> float:
    """Probability that the test at a level rejects n numbers of another distribution.

    Args:
        n: How many numbers.
        shares: Their distribution function at the points of `GRID`.
        level: Level of the test.

    Example:
        >>> round(power(1000, GRID), 2), round(power(1000, GRID**1.2), 2)
        (0.05, 1.0)
    """
    return 1 - _within(n, *_bounds(n, _threshold(n, level)), shares)


@lru_cache(maxsize=64)
def detectable(n: int, level: float = 0.05, wanted: float = 0.8) -> float:
    r"""The smallest deviation of coverage that n pairs detect with a given power.

    The deviation is the largest difference of coverage from its level, over all levels, of normal
    intervals that are too narrow by one factor s:

    .. math:: \delta = \max_c \; c - [2 \Phi(s\, \Phi^{-1}((1 + c) / 2)) - 1]

    Args:
        n: Number of pairs.
        level: Level of the test, adjusted for the number of tests.
        wanted: The power.

    Example:
        >>> round(detectable(1000), 3), round(detectable(250), 3)
        (0.037, 0.073)
    """
    low, high = 0.0, 1.0  # s: never detected, always
    for _ in range(14):
        s = (low + high) / 2
        low, high = (s, high) if power(n, _narrow(s), level) >= wanted else (low, s)
    return float((GRID - _narrow(low)).max())


def _narrow(s: float) -> np.ndarray:
    """Coverage, at the points of `GRID`, of normal intervals that are s times as wide as due."""
    return 2 * stats.norm.cdf(s * stats.norm.ppf((1 + GRID) / 2)) - 1


def _bounds(n: int, pointwise: float) -> tuple[np.ndarray, np.ndarray]:
    """The counts at each point that a two-sided binomial test at a pointwise level accepts."""
    low, above = (stats.binom.ppf(pointwise / 2, n, z).clip(0) for z in (GRID, 1 - GRID))
    return low.astype(int), n - above.astype(int)


def _within(n: int, low: np.ndarray, high: np.ndarray, shares: np.ndarray = GRID) -> float:
    """Probability that the counts of n numbers up to each point all lie in low .. high.

    The counts are those of a Poisson process, given that it has n events.
    """
    if (low > high).any():
        return 0.0
    rates = n * np.diff(shares, prepend=0.0, append=1.0)
    factorials = special.gammaln(np.arange(1, n + 2))

    def poisson(counts: np.ndarray, rate: float) -> np.ndarray:
        return np.exp(special.xlogy(counts, rate) - rate - factorials[counts])

    state, start = np.ones(1), 0  # probabilities of the counts start, start + 1, ...
    for k, rate in enumerate(rates[:-1]):
        steps = poisson(np.arange(high[k] - start + 1), rate)
        state = np.convolve(state, steps)[low[k] - start : high[k] - start + 1]
        start = int(low[k])
    rest = poisson(n - np.arange(start, start + len(state)), rates[-1])
    return float(np.clip(state @ rest / poisson(np.array(n), n), 0, 1))
