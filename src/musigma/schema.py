"""The columns of a table: their names, types and units, and the cells that their values fall in.

A row is a vector of float64, one element per column: a number in its own units; the position of
a category among its levels; days since 1970 for a date, seconds for a time; NaN where a value is
missing. A `Schema` gives these numbers their meaning. It is plain data, stored in the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

__all__ = ["Cells", "Column", "Kind", "Schema", "fraction"]

Kind = Literal["continuous", "count", "ordinal", "category", "boolean", "date", "datetime"]

NUMERIC = ("continuous", "count")
LEVELLED = ("ordinal", "category", "boolean")
DISCRETE = ("count", "date", *LEVELLED)

STORAGE = {
    "continuous": "float64",
    "count": "int64",
    "date": "date32[day]",
    "datetime": "timestamp[us]",
}
LEAST_SPIKE = 10  # rows that share a value of a continuous column before it is an atom
SPIKE = 0.002  # and the share of all rows
SHRINK = 0.25  # of the rows beyond it, the largest share in a cell of a tail
FEWEST = 2  # rows in the cells at both ends


@dataclass(frozen=True)
class Cells:
    """A division of the values of one column, and the number of training rows in each cell.

    A cell is the interval from one edge to the next. An edge that stands twice is an atom: a
    single value that many rows share, whose cell has no width. Values beyond the first and the
    last edge are outside.

    Attributes:
        edges: In increasing order; one more than there are cells, of which there are none if all
            values are missing.
        counts: Training rows in each cell.
        missing: Training rows in which the value is missing.
        left: Typical distance, beyond the first edge, of values outside.
        right: The same beyond the last edge.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    missing: float = 0.0
    left: float = 1.0
    right: float = 1.0

    def __post_init__(self):
        for name in ("edges", "counts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def rows(self) -> float:
        """Number of training rows."""
        return sum(self.counts) + self.missing


def fraction(grid: float) -> tuple[float, float]:
    """A grid as a quotient of whole numbers, if they are short: 0.01 is 1 / 100."""
    exact = Fraction(repr(float(grid)))
    if max(exact.numerator, exact.denominator) < 2**40:
        return float(exact.numerator), float(exact.denominator)
    return float(grid), 1.0


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: Its name.
        kind: `continuous` (real numbers), `count` (whole numbers), `ordinal` (levels with an
            order), `category`, `boolean`, `date` (whole days) or `datetime` (seconds).
        levels: The levels of an ordinal, a category or a boolean, as they are written.
        missing: Whether values may be missing, with a probability of their own.
        step: Unit in the last place of a continuous column, if all values are multiples of it.
        rounded: Whether a continuous column is scored as a count of steps, by probabilities in
            place of densities.
        low: Smallest value seen; samples lie between `low` and `high`.
        high: Largest value seen.
        storage: How values are written: `int64`, `float64`, `string`, ... as Arrow names types.
            By default as is usual for the kind.
        format: How dates are written as text, for `datetime.strptime`: `%d.%m.%Y`.
        cells: The division of its values, once it has been measured on training rows.

    Raises:
        ValueError: If these disagree.
    """

    name: str
    kind: Kind = "continuous"
    levels: tuple[str, ...] = ()
    missing: bool = False
    step: float | None = None
    rounded: bool = False
    low: float = -math.inf
    high: float = math.inf
    storage: str = ""
    format: str | None = None
    cells: Cells | None = None

    def __post_init__(self):
        set_ = object.__setattr__
        set_(self, "levels", tuple(self.levels))
        set_(self, "storage", self.storage or STORAGE.get(self.kind, "string"))
        if isinstance(self.cells, Mapping):
            set_(self, "cells", Cells(**self.cells))
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"column {self.name!r}: kind: expected one of {', '.join(get_args(Kind))}; got "
                f"{self.kind!r}"
            )
        if self.kind in ("count", "date"):
            set_(self, "step", 1.0)
        if self.rounded and not self.step:
            raise ValueError(
                f"column {self.name!r}: rounded: give the step that its values are multiples of "
                "(step = 0.01)"
            )
        if len(set(self.levels)) < len(self.levels):
            raise ValueError(f"column {self.name!r}: levels: a level occurs twice")

    @property
    def has_levels(self) -> bool:
        """Whether values are levels, stored by their positions."""
        return self.kind in LEVELLED

    @property
    def is_numeric(self) -> bool:
        """Whether values are numbers: no dates, and no levels."""
        return self.kind in NUMERIC

    @property
    def is_discrete(self) -> bool:
        """Whether it is scored by probabilities, not densities."""
        return self.rounded or self.kind in DISCRETE

    @property
    def grid(self) -> float | None:
        """The distance between neighboring values, if there is one."""
        return 1.0 if self.has_levels else self.step

    @property
    def measured(self) -> Cells:
        """The cells.

        Raises:
            ValueError: If they have not been measured.
        """
        if self.cells is None:
            raise ValueError(f"column {self.name!r}: it has no cells; use Schema.measure(rows)")
        return self.cells

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """The nearest values on the grid: those of 0.01 are the numbers that 2 decimals write."""
        if self.step is None:
            return values
        numerator, denominator = fraction(self.step)
        return np.rint(values / self.step) * numerator / denominator

    def measure(
        self, values: np.ndarray, most: int | None = None, *, atoms: bool = True
    ) -> Column:
        """This column with cells for training values (N,), NaN where missing.

        Most intervals hold equal shares of the rows; towards both ends the shares shrink, so that
        the tails are resolved. Values that many rows share are atoms, or on a grid have a cell of
        their own, unless `atoms` is false.

        Args:
            values: The training values.
            most: About the largest number of intervals; by default the square root of the number
                of rows, from 16 to 128.
            atoms: Whether a value that many rows share is apart from others.
        """
        if most is None:
            most = min(128, max(16, math.isqrt(len(values))))
        present = np.sort(values[~np.isnan(values)])
        if self.has_levels:
            counts = np.bincount(present.astype(np.int64), minlength=len(self.levels))
            edges = np.arange(len(self.levels) + 1) - 0.5
        else:
            edges, counts = _intervals(present, self.step, most, atoms)
        left = right = 1.0
        if len(edges) > 1:
            k, least = len(present) // 100, self.step or 1e-3 * (edges[-1] - edges[0]) or 1.0
            left = float(max(present[k] - present[0], least))
            right = float(max(present[-1] - present[-1 - k], least))
        low, high = (present[0], present[-1]) if len(present) else (math.nan, math.nan)
        missing = float(len(values) - len(present))
        cells = Cells(edges.tolist(), counts.astype(float).tolist(), missing, left, right)
        return replace(self, cells=cells, low=float(low), high=float(high))

    def to_json(self) -> dict[str, Any]:
        """A plain dict without fields at their defaults; ``Column(**plain)`` reads it."""
        plain = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or value != field.default:
                plain[field.name] = list(value) if isinstance(value, tuple) else value
        if self.cells is not None:
            plain["cells"] = {
                k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.cells).items()
            }
        return plain


def _intervals(
    present: np.ndarray, step: float | None, most: int, atoms: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of the cells of values in increasing order.

    Edges lie halfway between neighboring values, or half a step beside them; an atom is its own
    cell, and so is a gap between values on a grid that is wider than both its neighbors.
    """
    values, times = np.unique(present, return_counts=True)
    if not len(values):
        return np.array([-(step or 0) / 2]), np.empty(0)
    least = len(present) / most if step else max(LEAST_SPIKE, SPIKE * len(present))
    alone = (times >= least) & atoms
    atom = alone & (step is None)
    starts = _starts(times, alone, most)
    first, last = values[starts], values[np.append(starts[1:], len(values)) - 1]
    single = atom[starts]
    usual = np.median(np.diff(values)) if len(values) > 1 else abs(values[0]) * 1e-6 or 1e-6
    half = np.where(single, 0, (step or usual) / 2)
    low, high = first - half, last + half
    if not single[-1]:  # the largest value is below the last edge, however large it is
        high[-1] = max(high[-1], np.nextafter(last[-1], np.inf))
    gap = low[1:] - high[:-1]
    beside = np.maximum((high - low)[1:], (high - low)[:-1])
    closed = (gap <= beside + 1e-6 * step) if step else ~(single[1:] & single[:-1])
    share = np.where(single[1:], gap, np.where(single[:-1], 0, gap / 2))
    if step:
        share = np.floor(share / step + 1e-6) * step
    middle = high[:-1] + share
    if not step:  # as exactly as the numbers are, so that no value is on the wrong side
        half_way = last[:-1] / 2 + first[1:] / 2
        half_way = np.where(half_way > last[:-1], half_way, first[1:])
        middle = np.where(single[1:] | single[:-1], middle, half_way)
    high[:-1], low[1:] = np.where(closed, middle, high[:-1]), np.where(closed, middle, low[1:])
    open_ = np.append(~closed, False)
    edges = np.append(
        low[0],
        np.stack([high, np.append(low[1:], 0)], 1)[np.stack([np.ones(len(high), bool), open_], 1)],
    )
    counts = np.add.reduceat(times, starts)
    counts = np.stack([counts, 0 * counts], 1)[np.stack([np.ones(len(high), bool), open_], 1)]
    return edges, counts


def _starts(times: np.ndarray, alone: np.ndarray, most: int) -> np.ndarray:
    """The first value of each cell: equal shares of the rows, smaller ones in the tails.

    A value that is alone is a cell.
    """
    if len(times) <= most:
        return np.arange(len(times))
    total, below = times.sum(), (np.cumsum(times) - times).astype(np.float64)
    apart = np.flatnonzero(alone)
    starts, at = [], 0
    while at < len(times):
        starts.append(at)
        tail = min(below[at], total - below[at])
        wanted = max(FEWEST, min(total / most, SHRINK * tail))
        end = max(at + 1, int(np.searchsorted(below, below[at] + wanted)))
        if alone[at]:
            end = at + 1
        elif (i := np.searchsorted(apart, at)) < len(apart):
            end = min(end, int(apart[i]))
        at = end
    return np.array(starts)


@dataclass(frozen=True)
class Schema:
    """The columns of a table, in order.

    Args:
        columns: `Column` objects, or the dicts that `Column.to_json` makes.

    Example:
        >>> schema = Schema([Column("age", "count"), Column("sex", "category", ("f", "m"))])
        >>> schema.names, Schema.from_json(schema.to_json()) == schema
        (('age', 'sex'), True)
    """

    columns: tuple[Column, ...]

    def __post_init__(self):
        columns = tuple(c if isinstance(c, Column) else Column(**c) for c in self.columns)
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    def index(self, name: str) -> int:
        """The position of a column.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.names:
            raise ValueError(f"column: expected one of {', '.join(self.names)}; got {name!r}")
        return self.names.index(name)

    def measure(self, rows: np.ndarray, most: int | None = None, *, atoms: bool = True) -> Schema:
        """The schema with cells for training rows, float64 (N, D)."""
        return Schema(
            tuple(c.measure(rows[:, j], most, atoms=atoms) for j, c in enumerate(self.columns))
        )

    def to_json(self) -> list[dict[str, Any]]:
        """A list of plain dicts."""
        return [column.to_json() for column in self.columns]

    @classmethod
    def from_json(cls, plain: Sequence[Mapping[str, Any]]) -> Schema:
        """Read what `to_json` made."""
        return cls(tuple(Column(**each) for each in plain))
