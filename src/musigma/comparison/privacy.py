"""Whether synthetic rows are too close to the rows that a synthesizer was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from musigma.comparison.boosting import sample
from musigma.evaluation.intervals import Interval, auc, share
from musigma.evaluation.neighbors import squared_distances
from musigma.schema import Schema

__all__ = ["Privacy", "Space", "privacy"]


@dataclass(frozen=True)
class Privacy:
    """Distances of synthetic rows to training rows, beside those of rows that were held out.

    Attributes:
        reference: What "held-out" and "training" are: `held-out rows`; or, if these are not
            there, halves of the real rows, or of the training rows. A leak then shows in about
            half of the rows that it concerns.
        copies: Share of synthetic rows that equal a training row.
        chance_copies: Share of held-out rows that equal a training row.
        closer: P(a synthetic row is closer to its nearest training row than a held-out row is).
        percentiles: Share of the synthetic rows that are closer than the 1st and the 5th
            percentile of the held-out rows; 0.01 and 0.05 if nothing leaks.
        membership: AUC of the distance to the nearest synthetic row as a score that separates
            training rows from held-out rows; None if there is no such test.
        why: Why there is no membership test.
        distances: Distances of synthetic rows and of held-out rows, in increasing order.
        rows: Numbers of rows: `synthetic`, `held-out` and `training`.
    """

    reference: str
    copies: Interval
    chance_copies: Interval
    closer: Interval
    percentiles: dict[str, Interval]
    membership: Interval | None
    why: str
    rows: dict[str, int]
    distances: dict[str, np.ndarray] = field(repr=False)


def privacy(
    real: np.ndarray,
    synthetic: np.ndarray,
    schema: Schema,
    train: np.ndarray | None = None,
    *,
    most: int = 5_000,
    seed: int = 0,
    step: Callable[[str], None] = lambda note: None,
) -> Privacy:
    """Nearest-record distances and a membership test.

    The distance of two rows is sqrt(sum over columns of d²). Of numbers, dates and ordinals, d is
    the difference of their ranks among the rows that are searched, scaled to variance 1; a
    category that differs, and a value that is missing in only one of the two, count d² = 2, which
    is the mean of d² between two random values of a number.

    Args:
        real: Real rows (N, D) that the synthesizer has not seen, if `train` is given; otherwise
            all real rows.
        synthetic: Synthetic rows (M, D).
        schema: The columns.
        train: The rows that the synthesizer was trained on (K, D).
        most: Largest number of synthetic and of held-out rows whose distances are measured, and a
            quarter of that of training rows. Copies are counted among all rows.
        seed: Random seed of the rows that are drawn, and of the halves.
        step: Called with a note before each part.

    Example:
        >>> from musigma.schema import Column
        >>> schema = Schema([Column("a"), Column("b")])
        >>> train, held_out = np.random.default_rng(0).normal(size=(2, 300, 2))
        >>> found = privacy(held_out, train[:150], schema, train)
        >>> found.copies.value, found.membership.low > 0.6
        (1.0, True)
    """
    random = np.random.default_rng(seed)
    reference, why = "held-out rows", ""
    held_out, base = real, real if train is None else train
    if train is None:
        reference = "half of the real rows"
        why = "it needs the training rows, and real rows that were held out from training"
    elif (again := _overlap(real, train)) > 0.5:
        reference = "half of the training rows"
        why = f"{again:.0%} of the real rows are training rows, and none may be"
    if why:
        mixed = sample(base, len(base), random)
        held_out, base = mixed[: len(base) // 2], mixed[len(base) // 2 :]
    copies, chance = (_copies(rows, base) for rows in (synthetic, held_out))
    queries = {
        "synthetic": sample(synthetic, most, random),
        "held-out": sample(held_out, most, random),
    }
    base = sample(base, 4 * most, random)
    space = Space(base, schema)
    distances = {}
    for name, rows in queries.items():
        step(f"distances of {name} rows")
        distances[name] = np.sort(space.nearest(rows, base))
    near, far = distances["synthetic"], distances["held-out"]
    membership = None
    if not why:
        step("membership")
        members = sample(base, len(queries["held-out"]), random)
        others = queries["held-out"][: len(members)]
        drawn = sample(synthetic, 4 * most, random)
        space = Space(drawn, schema)  # ranks among training rows would favor these
        membership = auc(*(-space.nearest(rows, drawn) for rows in (members, others)))
    return Privacy(
        reference,
        copies,
        chance,
        auc(-near, -far),
        {f"{100 * p:.0f}": _closer(near, far, p) for p in (0.01, 0.05)},
        membership,
        why,
        {name: len(rows) for name, rows in queries.items()} | {"training": len(base)},
        distances,
    )


def _keys(rows: np.ndarray) -> np.ndarray:
    """One value for each row, equal for equal rows; missing values are equal."""
    plain = np.ascontiguousarray(np.where(np.isnan(rows), np.nan, rows) + 0.0)  # no -0
    return plain.view(np.dtype((np.void, plain.itemsize * plain.shape[1])))[:, 0]


def _copies(rows: np.ndarray, base: np.ndarray) -> Interval:
    return share(int(np.isin(_keys(rows), _keys(base)).sum()), len(rows))


def _overlap(held_out: np.ndarray, base: np.ndarray) -> float:
    """The share of the held-out rows that are in the base, beyond what its own rows repeat."""
    _, times = np.unique(_keys(base), return_counts=True)
    repeated = times[times > 1].sum() / len(base)
    return _copies(held_out, base).value - float(repeated)


def _closer(near: np.ndarray, far: np.ndarray, p: float) -> Interval:
    """The share of distances below the p-quantile of others; ties are divided in proportion."""
    at = np.quantile(far, p, method="inverted_cdf")
    below, equal = (far < at).mean(), (far == at).mean()
    count = float((near < at).sum() + (near == at).sum() * (p - below) / equal)
    effective = 1 / (1 + len(near) / len(far))  # the percentile is itself estimated
    return share(count * effective, len(near) * effective)


class Space:
    """Typed rows as points whose distances compare columns in units of their spread.

    Args:
        base: Rows (N, D) that numbers are ranked among.
        schema: The columns.
    """

    def __init__(self, base: np.ndarray, schema: Schema):
        self.nominal = np.array([column.kind == "category" for column in schema.columns], bool)
        self.sorted = [np.sort(v[~np.isnan(v)]) for v in base[:, ~self.nominal].T]

    def _points(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks of numbers (N, A); whether they are missing (N, A); and levels (N, C)."""
        numbers = rows[:, ~self.nominal]
        missing = np.isnan(numbers)
        points = np.zeros_like(numbers)
        for j, known in enumerate(self.sorted):
            if not len(known):
                continue
            below, upto = (
                np.searchsorted(known, numbers[:, j], side=s) for s in ("left", "right")
            )
            points[:, j] = ((below + upto) / (2 * len(known)) - 0.5) * np.sqrt(12)
            between = (below == upto) & (below > 0) & (below < len(known))
            low, high = (known[np.clip(below - k, 0, len(known) - 1)] for k in (1, 0))
            with np.errstate(invalid="ignore"):
                part = (numbers[:, j] - low) / np.where(high > low, high - low, 1.0) - 0.5
            points[:, j] += np.where(between, part, 0.0) / len(known) * np.sqrt(12)
        return (
            np.where(missing, 0.0, points),
            missing,
            np.nan_to_num(rows[:, self.nominal], nan=-1),
        )

    def nearest(self, rows: np.ndarray, base: np.ndarray) -> np.ndarray:
        """The distance of each row (N, D) to the nearest of the base (M, D), shape (N,)."""
        x, x_missing, x_levels = self._points(rows)
        y, y_missing, y_levels = self._points(base)
        holes = bool(x_missing.any() or y_missing.any())
        found = np.empty(len(rows))
        for at, square in squared_distances(x, y):
            if holes:  # where one is missing, take out its number; where one alone is, add 2
                square += self._holes(x[at], x_missing[at], y, y_missing)
            for u, v in zip(x_levels[at].T, y_levels.T, strict=True):
                square += 2.0 * (u[:, None] != v)
            found[at] = np.sqrt(np.maximum(square.min(1), 0.0))
        return np.where(found < 1e-6, 0.0, found)

    @staticmethod
    def _holes(
        x: np.ndarray, x_missing: np.ndarray, y: np.ndarray, y_missing: np.ndarray
    ) -> np.ndarray:
        u, v = x_missing.astype(float), y_missing.astype(float)
        one = u.sum(1)[:, None] + v.sum(1) - 2 * u @ v.T
        return 2 * one - (x**2) @ v.T - u @ (y**2).T
