"""How far samples of a model are from real examples, by features that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from musigma.evaluation.intervals import Interval, normal, plain
from musigma.evaluation.neighbors import checked_features, prdc

__all__ = [
    "SampleQuality",
    "frechet_distance",
    "frechet_limit",
    "kernel_distance",
    "sample_quality",
]

FEWEST_BLOCKS, LARGEST_BLOCK = 10, 1000
"""Blocks of the kernel distance, and rows of a set in each."""
SPLITS = 4
"""Splits into halves by which the Fréchet distance is extrapolated."""
FEW = 1000
"""Rows, below which neighborhoods are too few to compare with other numbers of rows."""


@dataclass(frozen=True)
class SampleQuality:
    """How far samples are from real examples, in a space of features.

    Attributes:
        real: Number of real rows.
        generated: Number of samples.
        features: Number of features.
        frechet: `frechet_distance` of these rows. It is too large, by about a/N + b/M.
        frechet_limit: `frechet_limit`, what remains as N and M grow; None with fewer than 2 F + 2
            rows in a set.
        kernel: `kernel_distance`; unbiased.
        precision: Share of the samples that lie among real rows; see `prdc` for these four.
        recall: Share of the real rows that lie among samples.
        density: Number of real neighborhoods that a sample is in, over its mean for real rows.
        coverage: Share of the real rows with a sample in their neighborhood.
        k: Neighbors that define a neighborhood.
        warnings: Sentences about numbers that are too small to rely on.
    """

    real: int
    generated: int
    features: int
    frechet: float
    frechet_limit: Interval | None
    kernel: Interval
    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval
    k: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an interval is an object of value, low and high."""
        return plain(self)


def sample_quality(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = 5,
    seed: int = 0,
    step: Callable[[str], None] = lambda note: None,
) -> SampleQuality:
    """Fréchet and kernel distance, precision, recall, density and coverage of samples.

    Args:
        real: Features of real examples (N, F), which the model was not trained on.
        generated: Features of samples (M, F). Compare figures only at equal N and M.
        k: Neighbors that define a neighborhood.
        seed: Random seed of groups, blocks and halves.
        step: Called with a note before each part.

    Raises:
        ValueError: If there are fewer than 100 rows in a set, numbers of features differ, or a
            feature is not finite.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 400, 3))
        >>> found = sample_quality(x, y)
        >>> found.frechet_limit.low < 0 < found.frechet_limit.high, found.coverage.value > 0.9
        (True, True)
    """
    real, generated = checked_features(real=real, generated=generated)
    n, features = min(len(real), len(generated)), real.shape[1]
    warnings, limit = [], None
    step("Fréchet distance")
    if n > 2 * features + 1:
        distance, limit = _extrapolated(real, generated, SPLITS, seed)
    else:
        distance = _frechet(real, generated)
        warnings.append(
            f"{n:,} rows with {features:,} features: the Fréchet distance depends mostly on the "
            f"number of rows, and it is not extrapolated; give more than {2 * features + 1:,} rows"
        )
    step("kernel distance")
    kernel = kernel_distance(real, generated, seed=seed)
    step("neighbors")
    shares = prdc(real, generated, k=k, seed=seed)
    if n < FEW:
        warnings.append(
            f"{n:,} rows: precision, recall, density and coverage change with the number of rows; "
            "compare them only at equal numbers"
        )
    return SampleQuality(
        len(real),
        len(generated),
        features,
        distance,
        limit,
        kernel,
        **shares,
        k=k,
        warnings=tuple(warnings),
    )


# --- the Fréchet distance ------------------------------------------------------------------------


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    r"""The Fréchet distance of two Gaussians with the moments of two sets; FID, for Inception.

    .. math:: |\mu - \nu|^2 + \mathrm{tr}\,\big(S + T - 2 (S T)^{1/2}\big)

    With S = A'A and T = B'B, A and B triangular factors of the centered rows, the trace of the
    square root is the sum of the singular values of A B'. No covariance is formed, and singular
    ones are no exception.

    Args:
        real: Features (N, F).
        generated: Features (M, F).

    Raises:
        ValueError: As `sample_quality`.

    Source: Heusel, Ramsauer, Unterthiner, Nessler & Hochreiter, "GANs trained by a two time-scale
    update rule converge to a local Nash equilibrium", 2017, arXiv:1706.08500.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> x = (x - x.mean(0)) / x.std(0)
        >>> round(frechet_distance(x, x + [3, 4]), 6)
        25.0
    """
    real, generated = checked_features(real=real, generated=generated)
    return _frechet(real, generated)


def _frechet(real: np.ndarray, generated: np.ndarray) -> float:
    moments = []
    for rows in (real, generated):
        mean = rows.mean(0)
        moments.append((mean, np.linalg.qr(rows - mean, "r") / np.sqrt(len(rows) - 1)))
    (mu, a), (nu, b) = moments
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mu - nu) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)


def frechet_limit(
    real: np.ndarray, generated: np.ndarray, *, splits: int = SPLITS, seed: int = 0
) -> Interval:
    """The Fréchet distance extrapolated to infinite numbers of rows, with its interval.

    The expected distance of N and M rows is that of the distributions plus a/N + b/M. Halves have
    twice the excess; so the result is twice the distance of all rows, minus the mean distance of
    halves, averaged over random splits. It may be negative where the truth is near 0; an interval
    below 0 says that the sets are not independent, such as copies of each other.

    The variance is that of the influence of every row on the distance (the delta method), plus
    that of the mean over splits. For a row x of the first set, and P the map that transports
    its Gaussian to the other, the influence is 2 (mu - nu)·x + x'x - x'P x, for centered x.

    Args:
        real: Features (N, F), with N > 2 F + 1.
        generated: Features (M, F), with M > 2 F + 1.
        splits: Number of splits into halves, from 2.
        seed: Random seed of the halves.

    Raises:
        ValueError: As `sample_quality`, and if there are too few rows for so many features.

    Sources: Chong & Forsyth, "Effectively unbiased FID and Inception Score", 2020,
    arXiv:1911.07023, who vary M alone; Rippl, Munk & Sturm, "Limit laws of the empirical
    Wasserstein distance: Gaussian distributions", 2016, arXiv:1507.04090.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 500, 10))
        >>> limit = frechet_limit(x, y)
        >>> frechet_distance(x, y) > limit.high > 0 > limit.low
        True
    """
    real, generated = checked_features(real=real, generated=generated)
    n, features = min(len(real), len(generated)), real.shape[1]
    if splits < 2:
        raise ValueError(f"splits: expected 2 or more; got {splits}")
    if n <= 2 * features + 1:
        raise ValueError(
            f"real, generated: expected more than 2 F + 1 = {2 * features + 1:,} rows in each; "
            f"got {n:,}: give more rows, or fewer features"
        )
    return _extrapolated(real, generated, splits, seed)[1]


def _extrapolated(
    real: np.ndarray, generated: np.ndarray, splits: int, seed: int
) -> tuple[float, Interval]:
    """The Fréchet distance, and what it is extrapolated to."""
    random, halves = np.random.default_rng(seed), []
    for _ in range(splits):
        parts = [np.array_split(random.permutation(rows), 2) for rows in (real, generated)]
        halves.append(np.mean([_frechet(*pair) for pair in zip(*parts, strict=True)]))
    value, variance = _influenced(real, generated)
    variance += float(np.var(halves, ddof=1)) / splits
    return value, normal(2 * value - float(np.mean(halves)), variance)


def _influenced(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """The Fréchet distance, and its variance by the influence of every row."""
    shift, factors = real.mean(0) - generated.mean(0), []
    centered = [rows - rows.mean(0) for rows in (real, generated)]
    for rows in centered:
        q, r = np.linalg.qr(rows)
        factors.append((q, r / np.sqrt(len(rows) - 1)))
    (_, a), (_, b) = factors
    u, roots, v = np.linalg.svd(a @ b.T, full_matrices=False)
    value, variance = float((shift**2).sum() - 2 * roots.sum()), 0.0
    for rows, (q, r), sign, w in zip(centered, factors, (2, -2), (u, v.T), strict=True):
        moved = (
            (len(rows) - 1) * (q @ w) ** 2 @ roots
        )  # x'P x, since P = r^-1 w diag(roots) w' r^-T
        influence = sign * rows @ shift + (rows**2).sum(1) - moved
        variance += float(influence.var(ddof=1)) / len(rows)
        value += float((r**2).sum())
    return value, variance


# --- the kernel distance -------------------------------------------------------------------------


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, *, blocks: int | None = None, seed: int = 0
) -> Interval:
    r"""The squared maximum mean discrepancy of the kernel (x·y / F + 1)³; KID, for Inception.

    Both sets are divided at random into as many disjoint blocks. The estimate of each block is
    unbiased; the result is their mean, with the interval of Student's t for a mean of blocks. It
    may be negative.

    Args:
        real: Features (N, F).
        generated: Features (M, F).
        blocks: Number of blocks, from 2; by default 10, or more so that none has more than 1,000
            rows of a set.
        seed: Random seed of the blocks.

    Raises:
        ValueError: As `sample_quality`, and if there are too many or too few blocks.

    Sources: Bińkowski, Sutherland, Arbel & Gretton, "Demystifying MMD GANs", 2018,
    arXiv:1801.01401; Zaremba, Gretton & Blaschko, "B-tests: low variance kernel two-sample tests",
    2013, arXiv:1307.1954.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 400, 3))
        >>> print(kernel_distance(x, y + 1))
        10.623 (6.929 to 14.318)
    """
    sets = checked_features(real=real, generated=generated)
    small, large = sorted(map(len, sets))
    blocks = max(FEWEST_BLOCKS, -(-large // LARGEST_BLOCK)) if blocks is None else blocks
    if not 2 <= blocks <= small // 2:
        raise ValueError(
            f"blocks: expected 2 to {small // 2}, so that each has 2 rows or more; got {blocks}"
        )
    random = np.random.default_rng(seed)
    parts = [np.array_split(random.permutation(rows), blocks) for rows in sets]
    values = [_discrepancy(x, y) for x, y in zip(*parts, strict=True)]
    return normal(float(np.mean(values)), np.var(values, ddof=1) / blocks, degrees=blocks - 1)


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy."""

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / u.shape[1] + 1) ** 3

    within = 0.0
    for rows in (x, y):
        values, n = kernel(rows, rows), len(rows)
        within += (values.sum() - np.trace(values)) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())
