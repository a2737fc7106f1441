"""How probable the values of a row are, each given all the others."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.any_order import AnyOrder
from musigma.conditions import written
from musigma.context import Context
from musigma.explore import answers
from musigma.explore.examples import COLUMNS, Examples
from musigma.model import Model
from musigma.schema import Column

__all__ = ["DRAWS", "Columns"]

POINTS = 121
"""Values of a column of numbers that has no cells."""

DRAWS = 64
"""Draws for each value, if the model has only a bound of log p."""

RANGE = 2000
"""Examples from which the range of a column without a schema is known."""


@dataclass(frozen=True)
class Axis:
    """The values at which a column is looked at.

    Attributes:
        column: The column; how its values are written.
        values: The values (n,); NaN for a missing one.
        widths: What each stands for (n,), in its unit or in steps of its grid; 0 for a value with
            a probability of its own.
        steps: Whether the density is the same over each width.
    """

    column: Column
    values: np.ndarray
    widths: np.ndarray
    steps: bool = False

    @classmethod
    def of_cells(cls, column: Column, values: np.ndarray) -> Axis:
        """The axis of the cells of a column, from their middles."""
        widths = np.diff(column.measured.edges)
        if column.is_discrete:
            widths = np.round(widths / (column.grid or 1.0))
        widths = np.append(widths, [0.0] * (len(values) - len(widths)))
        return cls(column, values, widths * (not column.has_levels), steps=True)

    @classmethod
    def of_grid(cls, column: Column, values: np.ndarray, n: int) -> Axis:
        """The axis of n evenly spaced values, and of others with a probability of their own."""
        width = (values[n - 1] - values[0]) / max(n - 1, 1)
        if column.is_discrete:
            width = max(1.0, round(width / (column.grid or 1.0)))
        widths = np.append(np.full(n, width), np.zeros(len(values) - n))
        return cls(column, values, widths * (not column.has_levels))

    def shown(self, value: float, log_p: np.ndarray, normalized: bool) -> dict[str, Any]:
        """What is drawn.

        Args:
            value: That of the row.
            log_p: Nats of the values.
            normalized: Whether they add up to 1; otherwise they are divided by their sum.
        """
        top = 0.0 if normalized else log_p[np.isfinite(log_p)].max(initial=-1e9)
        p = np.nan_to_num(np.exp(log_p - top))
        mass = np.where(self.widths > 0, p * self.widths, p)
        if not normalized:
            total = max(mass.sum(), 1e-300)
            p, mass = p / total, mass / total
        names = [written(self.column, t) for t in self.values]
        alone = self.widths == 0
        masses = [[names[i], float(mass[i])] for i in np.flatnonzero(alone)]
        if self.column.has_levels:
            masses.sort(key=lambda pair: -pair[1])
        own = written(self.column, value)
        answer = {"name": self.column.name, "value": own, "masses": masses, "curve": None}
        single = self.column.is_discrete and bool((self.widths[~alone] == 1).all())
        known = dict(zip(names, mass.tolist(), strict=True)) if single else dict(masses)
        if own in known:
            answer["probability"] = known[own]
        if not alone.all():
            x, y = self._line(p, ~alone, single)
            answer["curve"] = {
                "x": x.tolist(), "p": y.tolist(), "bars": single,
                "at": None if math.isnan(value) else value,
                "ticks": self._ticks(self.values[~alone]),
            }  # fmt: skip
            if own not in known and not math.isnan(value):
                here = np.interp(value, x, y, 0.0, 0.0)
                answer["less"] = float(mass[~alone & (p < here * (1 - 1e-9))].sum())
        return answer

    def _ticks(self, values: np.ndarray) -> list[list[Any]]:
        """The first value, the middle, and the last one, as they are written."""
        middle = values[0] + (values[-1] - values[0]) / 2
        places = [t.item() for t in (values[0], middle, values[-1])]
        return [[t, written(self.column, t)] for t in places]

    def _line(self, p: np.ndarray, along: np.ndarray, single: bool) -> tuple[np.ndarray, ...]:
        """The corners of the density over the values that have a width."""
        x, y = self.values[along], p[along]
        if single or not self.steps:
            return x, y
        half = (
            self.widths[along] / 2 * ((self.column.grid or 1.0) if self.column.is_discrete else 1)
        )
        return np.stack([x - half, x + half], 1).flatten(), y.repeat(2)


class Columns:
    """The distribution of each column of a row given all the others.

    A density whose factors are known in any order has these distributions. For others, the row
    with other values of one column is scored, and divided by the sum: a slice of their density.

    Args:
        model: The model.
        examples: Its data.

    Attributes:
        how: `conditional`, `slice`, or `bound` for a slice of a bound of log p; empty if the data
            are not rows of two columns or more.
    """

    def __init__(self, model: Model, examples: Examples):
        self.model, spec = model, examples.spec
        inner = getattr(model, "model", model)
        self.how = "slice" if model.exact else "bound"
        if isinstance(inner, AnyOrder):
            self.how = "conditional"
        if len(spec.shape) != 1 or spec.dims < 2 or spec.bits is not None:
            self.how = ""
            return
        columns = spec.schema.columns if spec.schema else map(Column, examples.columns)
        self.columns = list(columns)[:COLUMNS]
        rows = examples.sample(RANGE)
        self.low, self.high = np.nanmin(rows, 0), np.nanmax(rows, 0)

    def __call__(self, x: Tensor, context: Context) -> tuple[list[dict[str, Any]], list[Any]]:
        """What is drawn for a row (1, D), and the lines that compute it."""
        own = x[0].tolist()
        if self.how == "conditional":
            count = {"count": len(self.columns)}
            values = answers.cells(self.model, **count)
            column, rows = answers.variants(x, values)
            log_p = answers.conditional(self.model, context, column, rows)
            parts: list[Any] = [(answers.cells, count)]
            last = answers.conditional, {}
            pairs = zip(self.columns, values, strict=True)
            axes = [Axis.of_cells(c, np.array(v)) for c, v in pairs]
        else:
            spans = [self._span(j, own[j]) for j in range(len(self.columns))]
            arguments = {"spans": spans, "atoms": [_atoms(c) for c in self.columns]}
            draws = {"count": 1 if self.model.exact else DRAWS}
            values = answers.grids(**arguments)
            _, rows = answers.variants(x, values)
            log_p = answers.sliced(self.model, context, rows, **draws)
            parts = [(answers.grids, arguments)]
            last = answers.sliced, draws
            pairs = zip(self.columns, values, spans, strict=True)
            axes = [Axis.of_grid(c, np.array(v), n) for c, v, (_, _, n) in pairs]
        each = torch.split(log_p.double().cpu(), [len(v) for v in values])
        shown = [
            axis.shown(own[j], nats.numpy(), self.how == "conditional")
            for j, (axis, nats) in enumerate(zip(axes, each, strict=True))
        ]
        return shown, [*parts, (answers.variants, {}), last]

    def _span(self, j: int, value: float) -> tuple[float, float, int]:
        """First and last value of a column, and their number; that of the row is between them."""
        column = self.columns[j]
        if column.has_levels:
            return 0.0, len(column.levels) - 1.0, len(column.levels)
        low, high = np.nanmin([self.low[j], value]).item(), np.nanmax([self.high[j], value]).item()
        if column.is_discrete:
            unit = column.grid or 1.0
            steps = round((high - low) / unit)
            by = max(1, math.ceil(steps / (POINTS - 1)))
            n = math.ceil(steps / by) + 1
            return low, low + (n - 1) * by * unit, n
        margin = 0.05 * (high - low) or 1.0
        return low - margin, high + margin, POINTS


def _atoms(column: Column) -> list[float]:
    """Values of a column that have a probability of their own."""
    missing = [math.nan] * column.missing
    if column.has_levels or column.is_discrete or column.cells is None:
        return missing
    edges = column.cells.edges
    return [a for a, b in itertools.pairwise(edges) if a == b] + missing
