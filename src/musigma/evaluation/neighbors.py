"""Nearest neighbors of features, and the balls that they span; by blocks, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from musigma.evaluation.intervals import Interval, normal, share

__all__ = ["checked_features", "nearest", "prdc", "squared_distances"]

BLOCK = 2**22
"""Distances that are held at once."""
LEAST = 100
"""Rows of a set of features, below which nothing is measured."""
GROUPS = 10
"""Groups of rows that are left out in turn."""


def squared_distances(rows: np.ndarray, base: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances between all rows of two sets, some rows at a time.

    Args:
        rows: Rows (N, D), float64.
        base: Rows (M, D).

    Yields:
        Which rows these are, and their distances (n, M). They are |x|² + |y|² - 2 x·y, so those of
        equal rows are 0 only up to rounding, and may be negative.

    Example:
        >>> for at, square in squared_distances(np.array([[0.0], [2.0]]), np.array([[3.0]])):
        ...     print(at.start, square.tolist())
        0 [[9.0], [1.0]]
    """
    size, lengths = max(1, BLOCK // len(base)), (base**2).sum(1)
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        x = rows[at]
        yield at, (x**2).sum(1)[:, None] + lengths - 2 * x @ base.T


def nearest(
    rows: np.ndarray, base: np.ndarray, k: int = 1, *, same: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of a base, for each of some rows.

    Args:
        rows: Rows (N, D), float64.
        base: Rows (M, D).
        k: Number of neighbors, at most M; M - 1 if the sets are the same.
        same: Whether the two sets are the same; a row is then no neighbor of itself.

    Returns:
        Distances (N, k) in increasing order, and the numbers of these neighbors (N, k).

    Example:
        >>> distances, which = nearest(np.array([[0.0], [5.0]]), np.array([[4.0], [1.0]]))
        >>> distances.tolist(), which.tolist()
        ([[1.0], [1.0]], [[1], [0]])
    """
    distances, which = np.empty((len(rows), k)), np.empty((len(rows), k), np.intp)
    for at, square in squared_distances(rows, base):
        if same:
            i = np.arange(len(square))
            square[i, i + at.start] = np.inf
        found = np.argpartition(square, k - 1, 1)[:, :k]
        values = np.take_along_axis(square, found, 1)
        order = np.argsort(values, 1)
        which[at] = np.take_along_axis(found, order, 1)
        distances[at] = np.sqrt(np.maximum(np.take_along_axis(values, order, 1), 0.0))
    return distances, which


def checked_features(**sets: np.ndarray) -> list[np.ndarray]:
    """Sets of features in float64.

    Raises:
        ValueError: Naming every set that cannot be used.
    """
    found = {name: np.asarray(rows, np.float64) for name, rows in sets.items()}
    first, faults = next(iter(found)), []
    for name, rows in found.items():
        if rows.ndim != 2 or not rows.size:
            faults.append(f"{name}: expected features of shape (n, F); got {rows.shape}")
        elif rows.shape[1:] != found[first].shape[1:]:
            faults.append(
                f"{name}: expected as many features as {first} has, {found[first].shape[-1]}; got "
                f"{rows.shape[1]}"
            )
        elif len(rows) < LEAST:
            faults.append(
                f"{name}: expected at least {LEAST} rows; got {len(rows)}: give more of them"
            )
        elif len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
            faults.append(
                f"{name}: expected finite features; {len(bad):,} of {len(rows):,} rows are not, "
                f"the first of them row {bad[0]} (from 0)"
            )
    if faults:
        raise ValueError("\n".join(faults))
    return list(found.values())


def prdc(
    real: np.ndarray, generated: np.ndarray, *, k: int = 5, seed: int = 0
) -> dict[str, Interval]:
    r"""Precision, recall, density and coverage by balls of nearest neighbors.

    The ball of a row reaches to its k-th nearest neighbor in its own set; its surface belongs to
    it.

    - precision: the share of the samples that lie in a ball of a real row;
    - recall: the share of the real rows that lie in a ball of a sample;
    - density: the mean number of balls of real rows that a sample lies in, over k;
    - coverage: the share of the balls of real rows that hold a sample.

    All depend on N and M. If both sets have one distribution, the expected density is 1, and the
    expected coverage 1 - (N - 1)...(N - k) / ((N + M - 1)...(N + M - k)), which is about
    1 - 2^-k for N = M. Precision and recall then depend on the distribution, and are below 1.

    The variance is that of the jackknife: a tenth of both sets is left out, in ten ways. On
    average it is no smaller than the variance (Efron & Stein, 1981). Intervals of shares also hold
    that of as many independent rows (Wilson, 1927).

    Args:
        real: Features (N, F).
        generated: Features (M, F).
        k: Number of neighbors, 5 as in Naeem et al.; Kynkäänniemi et al. take 3.
        seed: Random seed of the tenths.

    Returns:
        `precision`, `recall`, `density` and `coverage`.

    Raises:
        ValueError: As `sample_quality`, and if k is below 1 or above a fifth of the rows of a set.

    Sources: Kynkäänniemi, Karras, Laine, Lehtinen & Aila, "Improved precision and recall metric
    for assessing generative models", 2019, arXiv:1904.06991; Naeem, Oh, Uh, Choi & Yoo, "Reliable
    fidelity and diversity metrics for generative models", 2020, arXiv:2002.09797.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 400, 3))
        >>> print(prdc(x, y)["coverage"])
        0.968 (0.911 to 1.000)
    """
    sets = checked_features(real=real, generated=generated)
    most = min(map(len, sets)) // 5
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most}, a fifth of the rows; got {k}")
    center, random = sets[0].mean(0), np.random.default_rng(seed)
    sets = [rows - center for rows in sets]  # distances by |x|² - 2 x·y + |y|² then round less
    groups = [random.permutation(len(rows)) % GROUPS for rows in sets]
    (x, y), (of_x, of_y) = sets, groups
    inside, density, held = _in_balls(x, y, of_x, of_y, k)
    recalled, _, _ = _in_balls(y, x, of_y, of_x, k)
    n, m = len(x), len(y)
    return {
        "precision": _jackknife(inside, m),
        "recall": _jackknife(recalled, n),
        "density": _jackknife(density),
        "coverage": _jackknife(held, n),
    }


def _in_balls(
    centers: np.ndarray,
    points: np.ndarray,
    center_groups: np.ndarray,
    point_groups: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of points in balls, mean number of balls of a point over k, share of balls with any.

    Each (GROUPS + 1,): of all rows, and without each group of both.
    """
    more = min(len(centers) - 1, 2 * k + 10)  # so that k remain if a group is left out
    distances, which = nearest(centers, centers, more, same=True)
    rounding = 1e-12 * (centers**2).sum(1).max()
    squares, kept = [distances[:, k - 1] ** 2 + rounding], [np.ones(len(points), bool)]
    for group in range(GROUPS):
        others = np.sort(np.where(center_groups[which] == group, np.inf, distances), 1)[:, k - 1]
        others = np.minimum(others, distances[:, -1]) ** 2 + rounding
        squares.append(np.where(center_groups == group, -np.inf, others))
        kept.append(point_groups != group)
    inside, pairs = np.zeros(GROUPS + 1), np.zeros(GROUPS + 1)
    held = np.zeros((GROUPS + 1, len(centers)), bool)
    for at, square in squared_distances(points, centers):
        for i in range(GROUPS + 1):
            is_in = square[kept[i][at]] <= squares[i]
            inside[i] += is_in.any(1).sum()
            pairs[i] += is_in.sum()
            held[i] |= is_in.any(0)
    m, n = (np.array([rows.sum() for rows in sets]) for sets in (kept, np.isfinite(squares)))
    return inside / m, pairs / (k * m), held.sum(1) / n


def _jackknife(values: np.ndarray, rows: int | None = None) -> Interval:
    """The first of some values, with its interval by those without each group; a share of rows."""
    whole, without = float(values[0]), values[1:]
    variance = (GROUPS - 1) / GROUPS * float(((without - without.mean()) ** 2).sum())
    high = np.inf if rows is None else 1.0
    found = normal(whole, variance, 0.0, high, degrees=GROUPS - 1)
    if rows is None:
        return found
    least = share(whole * rows, rows)
    return Interval(whole, min(found.low, least.low), max(found.high, least.high))
