"""How far the columns of two tables, and their pairs, are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musigma.schema import Column, Schema

__all__ = ["Marginal", "Pairs", "associations", "marginal", "pairs"]

MOST_PAIRED = 100
"""Columns whose pairs are compared."""

MOST_BARS = 10
INTERVALS = 30

KOLMOGOROV_MEAN = 0.868731  # sqrt(pi / 2) log 2: the mean of Kolmogorov's distribution


@dataclass(frozen=True)
class Marginal:
    """One column of synthetic rows beside that of real rows.

    Attributes:
        column: Its name.
        kind: Its kind.
        distance: Kolmogorov-Smirnov distance of numbers, total variation of levels: the largest
            difference of the probabilities of a range, or of a set of levels, from 0 to 1; 1 if
            all values of one table are missing.
        chance: The distance that is expected of two samples of one distribution of these sizes.
        missing_real: Share of real rows in which it is missing.
        missing_synthetic: Share of synthetic rows.
        outside: Share of the synthetic values that lie outside the range of the real ones.
        off_grid: Share of the synthetic values that are no multiples of the unit that all real
            values are multiples of.
        invented: Levels that no real row has, with the number of synthetic rows.
        lost: Levels that no synthetic row has, with the number of real rows.
        bins: Edges of intervals (B + 1,), or names of the most frequent levels (B,): for pictures.
        real: Share of the real values in each (B,); values beyond the first and the last edge
            count with the intervals at the ends.
        synthetic: Share of the synthetic values.
    """

    column: str
    kind: str
    distance: float
    chance: float
    missing_real: float
    missing_synthetic: float
    outside: float
    off_grid: float
    invented: dict[str, int]
    lost: dict[str, int]
    bins: tuple[float, ...] | tuple[str, ...]
    real: tuple[float, ...]
    synthetic: tuple[float, ...]


def marginal(
    real: np.ndarray,
    synthetic: np.ndarray,
    column: Column,
    reference: np.ndarray | None = None,
) -> Marginal:
    """Compare one column of real and synthetic rows.

    Args:
        real: Its values (N,), NaN where missing.
        synthetic: Its values in synthetic rows (M,).
        column: What the values mean.
        reference: Further real values (K,), which ranges and levels may come from.

    Example:
        >>> color = Column("color", "category", ("blue", "red", "mauve"))
        >>> found = marginal(np.array([0.0, 0, 0, 1]), np.array([0.0, 2, 0, 2]), color)
        >>> found.distance, found.invented, found.lost
        (0.5, {'mauve': 2}, {'red': 1})
    """
    known = real if reference is None else np.concatenate([real, reference])
    known = known[~np.isnan(known)]
    a, b = real[~np.isnan(real)], synthetic[~np.isnan(synthetic)]
    distance = float(bool(len(a)) != bool(len(b)))  # 1 if it is missing in all rows of one only
    chance = outside = off_grid = 0.0
    invented: dict[str, int] = {}
    lost: dict[str, int] = {}
    bins: tuple[tuple, tuple, tuple] = ((), (), ())
    if column.has_levels:
        names = (*column.levels, "(unknown)")
        p, q, seen = (np.bincount(v.astype(int), minlength=len(names)) for v in (a, b, known))
        invented = {names[k]: int(q[k]) for k in np.flatnonzero((seen == 0) & (q > 0))}
        lost = {names[k]: int(p[k]) for k in np.flatnonzero((p > 0) & (q == 0))}
        if len(a) and len(b):
            distance, chance = _total_variation(p, q)
            outside = sum(invented.values()) / len(b)
            bins = _frequent(names, p / len(a), q / len(b))
    elif len(a) and len(b):
        distance = _kolmogorov_smirnov(a, b)
        chance = KOLMOGOROV_MEAN * np.sqrt(1 / len(a) + 1 / len(b))
        outside = float(((b < known.min()) | (b > known.max())).mean())
        if column.step:
            off_grid = float((np.abs(b / column.step - np.rint(b / column.step)) > 1e-6).mean())
        bins = _histograms(a, b, column.step)
    return Marginal(
        column.name,
        column.kind,
        distance,
        float(min(chance, 1.0)),
        float(np.isnan(real).mean()),
        float(np.isnan(synthetic).mean()),
        outside,
        off_grid,
        invented,
        lost,
        *bins,
    )


def _frequent(names: tuple[str, ...], p: np.ndarray, q: np.ndarray) -> tuple[tuple, tuple, tuple]:
    """The levels that are frequent in either, in their order, and their shares."""
    at = np.sort(np.argsort(-(p + q), kind="stable")[:MOST_BARS])
    at = at[p[at] + q[at] > 0]
    return tuple(names[k] for k in at), tuple(p[at].tolist()), tuple(q[at].tolist())


def _histograms(a: np.ndarray, b: np.ndarray, step: float | None) -> tuple[tuple, tuple, tuple]:
    """Intervals between quantiles of both, wider than the step, and their shares."""
    both = np.concatenate([a, b])
    low, high = np.quantile(both, [0.005, 0.995])
    if not low < high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / INTERVALS
    if step:
        width = np.ceil(width / step) * step
        low, high = low - step / 2, high + step / 2
    edges = low + width * np.arange(max(1, int(np.ceil((high - low) / width - 1e-9))) + 1)
    shares = [np.histogram(v.clip(edges[0], edges[-1]), edges)[0] / len(v) for v in (a, b)]
    return tuple(edges.tolist()), tuple(shares[0].tolist()), tuple(shares[1].tolist())


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    shares = (np.searchsorted(v, at, side="right") / len(v) for v in (a, b))
    return float(np.abs(next(shares) - next(shares)).max())


def _total_variation(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """The total variation of two counts, and its mean between samples of one distribution."""
    n, m = p.sum(), q.sum()
    both = (p + q) / (n + m)
    spread = np.sqrt(both * (1 - both) * (1 / n + 1 / m))
    return float(np.abs(p / n - q / m).sum() / 2), float(np.sqrt(2 / np.pi) * spread.sum() / 2)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Associations of all pairs of columns of real and of synthetic rows.

    Attributes:
        names: The columns, D of them.
        real: Associations of real rows (D, D).
        synthetic: Associations of synthetic rows (D, D).
        half: Associations of one half of the real rows less those of the other (D, D): what
            chance does at that size.
        rows: Rows of both; a half has half of them.
    """

    names: tuple[str, ...]
    real: np.ndarray
    synthetic: np.ndarray
    half: np.ndarray
    rows: int

    @property
    def mean(self) -> float:
        """The mean absolute difference over pairs."""
        return self._mean(self.synthetic - self.real)

    @property
    def chance(self) -> float:
        """The same between halves of the real rows."""
        return self._mean(self.half)

    def _mean(self, difference: np.ndarray) -> float:
        upper = np.triu_indices(len(self.names), 1)
        return float(np.abs(difference[upper]).mean()) if len(upper[0]) else 0.0

    def worst(self, most: int = 10) -> list[tuple[str, str, float, float]]:
        """The pairs that differ most: two names, and their association in real and synthetic."""
        i, j = np.triu_indices(len(self.names), 1)
        order = np.argsort(-np.abs(self.synthetic - self.real)[i, j], kind="stable")[:most]
        return [
            (
                self.names[i[k]],
                self.names[j[k]],
                float(self.real[i[k], j[k]]),
                float(self.synthetic[i[k], j[k]]),
            )
            for k in order
        ]


def pairs(
    real: np.ndarray,
    synthetic: np.ndarray,
    schema: Schema,
    *,
    most: int = 20_000,
    seed: int = 0,
) -> Pairs:
    """Compare the associations of all pairs of the first 100 columns, from equal numbers of rows.

    Args:
        real: Rows (N, D) of typed columns.
        synthetic: Rows (M, D).
        schema: The columns.
        most: Largest number of rows of each.
        seed: Random seed of the rows that are drawn.
    """
    random = np.random.default_rng(seed)
    columns = Schema(schema.columns[:MOST_PAIRED])
    n = min(len(real), len(synthetic), most)
    a, b = (rows[random.permutation(len(rows))[:n], : len(columns)] for rows in (real, synthetic))
    halves = [associations(half, columns) for half in (a[: n // 2], a[n // 2 :])]
    first, second = (associations(rows, columns) for rows in (a, b))
    return Pairs(columns.names, first, second, halves[0] - halves[1], n)


def associations(rows: np.ndarray, schema: Schema) -> np.ndarray:
    """The association of every pair of columns.

    Of two columns with an order (numbers, dates, ordinals, booleans) it is Spearman's rank
    correlation, from -1 to 1; of two categories, Cramér's V; of a category and a column with an
    order, the correlation ratio of the ranks; both from 0 to 1, with the part that chance has in
    them taken out. Only rows in which both are present count; 0 if either is constant.

    Args:
        rows: Rows (N, D) of typed columns.
        schema: The columns.

    Returns:
        float64 (D, D), symmetric, with ones on the diagonal.

    Sources: Spearman, "The proof and measurement of association between two things", 1904;
    Bergsma, "A bias-correction for Cramér's V and Tschuprow's T", 2013; Kelley, "An unbiased
    correlation ratio measure", 1935.

    Example:
        >>> x = np.random.default_rng(0).normal(size=500)
        >>> rows = np.stack([x, -(x**3), x > 0], 1)
        >>> schema = Schema([Column("a"), Column("b"), Column("c", "category", ("no", "yes"))])
        >>> associations(rows, schema).round(2)
        array([[ 1.  , -1.  ,  0.86],
               [-1.  ,  1.  ,  0.86],
               [ 0.86,  0.86,  1.  ]])
    """
    nominal = [column.kind == "category" for column in schema.columns]
    whole = [not np.isnan(values).any() for values in rows.T]
    ready = rows.astype(np.float64)
    for j in range(len(schema)):
        if whole[j] and not nominal[j]:
            ready[:, j] = _ranks(rows[:, j])
    found = np.eye(len(schema))
    for j in range(len(schema)):
        for i in range(j):
            a, b = ready[:, i], ready[:, j]
            if not (whole[i] and whole[j]):
                both = ~np.isnan(a) & ~np.isnan(b)
                if both.sum() < 3:
                    continue
                a, b = (
                    v[both] if is_nominal else _ranks(v[both])
                    for v, is_nominal in ((a, nominal[i]), (b, nominal[j]))
                )
            if nominal[i] and nominal[j]:
                value = _cramer(a, b)
            elif nominal[i] or nominal[j]:
                value = _correlation_ratio(*((a, b) if nominal[i] else (b, a)))
            else:
                value = float(a @ b) / len(a)
            found[i, j] = found[j, i] = value
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of mean 0 and variance 1; zeros if all values are equal."""
    from scipy.stats import rankdata

    ranks = rankdata(values) - (len(values) + 1) / 2
    return ranks / (ranks.std() or 1.0)


def _cramer(a: np.ndarray, b: np.ndarray) -> float:
    """Cramér's V of levels, with Bergsma's correction."""
    n = len(a)
    (_, u), (_, v) = (np.unique(x, return_inverse=True) for x in (a, b))
    r, c = int(u.max()) + 1, int(v.max()) + 1
    if r == 1 or c == 1:
        return 0.0
    cell, times = np.unique(u * c + v, return_counts=True)
    expected = np.bincount(u)[cell // c] * np.bincount(v)[cell % c] / n
    square = float((times**2 / expected).sum() - n) / n  # chi^2 / n; empty cells add to n
    square = max(0.0, square - (r - 1) * (c - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return float(np.sqrt(min(1.0, square / least))) if least > 0 else 0.0


def _correlation_ratio(levels: np.ndarray, ranks: np.ndarray) -> float:
    """The root of the share of the variance (1) that lies between levels, without bias."""
    _, at = np.unique(levels, return_inverse=True)
    times, n = np.bincount(at), len(levels)
    if len(times) == 1 or len(times) == n:
        return 0.0
    between = float((np.bincount(at, ranks) ** 2 / times).sum() / n)
    if not ranks.any():
        return 0.0
    return float(np.sqrt(max(0.0, 1 - (1 - between) * (n - 1) / (n - len(times)))))
