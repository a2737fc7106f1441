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

__all__ = ["Columns"]

POINTS = 121
"""Values of a column of numbers."""

DRAWS = 64
"""Draws for each value, if the model has only a bound of log p."""

RANGE = 2000
"""Examples from which the range of a column without a schema is known."""


@dataclass(frozen=True)
class Axis:
    """The values of a column at which it is looked at.

    Attributes:
        column: The column; how its values are written.
        low: The first value.
        high: The last one.
        n: Their number.
        atoms: Values with a probability of their own; NaN for a missing value.
        discrete: Whether all values have probabilities.
    """

    column: Column
    low: float
    high: float
    n: int = POINTS
    atoms: tuple[float, ...] = ()
    discrete: bool = False

    @classmethod
    def of(cls, column: Column, low: float, high: float, value: float) -> Axis:
        """The axis from a low to a high value, and to that of the row."""
        atoms = (math.nan,) if column.missing else ()
        if column.has_levels:
            n = len(column.levels)
            return cls(column, 0.0, n - 1.0, n, atoms, True)
        low, high = np.nanmin([low, value]).item(), np.nanmax([high, value]).item()
        if column.is_discrete:
            unit = column.grid or 1.0
            steps = round((high - low) / unit)
            by = max(1, math.ceil(steps / (POINTS - 1)))
            n = math.ceil(steps / by) + 1
            return cls(column, low, low + (n - 1) * by * unit, n, atoms, by == 1)
        if column.cells is not None:
            edges = column.cells.edges
            atoms += tuple(a for a, b in itertools.pairwise(edges) if a == b)
        margin = 0.05 * (high - low) or 1.0
        return cls(column, low - margin, high + margin, atoms=atoms)

    @property
    def values(self) -> np.ndarray:
        """The values of the span (n,)."""
        return np.linspace(self.low, self.high, self.n)

    def shown(self, value: float, log_p: np.ndarray, normalized: bool) -> dict[str, Any]:
        """What is drawn.

        Args:
            value: That of the row.
            log_p: Nats of the values of the span, then of the atoms.
            normalized: Whether they add up to 1; otherwise they are divided by their sum.
        """
        width = (self.high - self.low) / max(self.n - 1, 1)
        if self.column.is_discrete:  # in steps of its grid
            width = max(1.0, width / (self.column.grid or 1.0))
        top = 0.0 if normalized else log_p[np.isfinite(log_p)].max(initial=-1e9)
        p = np.nan_to_num(np.exp(log_p - top))
        if not normalized:
            p = p / max(p[: self.n].sum() * width + p[self.n :].sum(), 1e-300)
        along, alone = p[: self.n], p[self.n :]
        names = [written(self.column, t) for t in (*self.values, *self.atoms)]
        masses = [[name, float(q)] for name, q in zip(names[self.n :], alone, strict=True)]
        own = written(self.column, value)
        answer: dict[str, Any] = {"name": self.column.name, "value": own, "masses": masses}
        if self.column.has_levels:
            levels = [[name, float(q)] for name, q in zip(names, along, strict=False)]
            masses = [*levels, *masses]
            answer |= {"masses": sorted(masses, key=lambda pair: -pair[1]), "curve": None}
        else:
            answer["curve"] = {
                "low": self.low, "high": self.high, "p": along.tolist(), "bars": self.discrete,
                "at": None if math.isnan(value) else value,
                "ticks": [[t, written(self.column, t)] for t in _ticks(self)],
            }  # fmt: skip
        known = dict(answer["masses"])
        if self.discrete:
            known |= dict(zip(names, along.tolist(), strict=False))
        if own in known:
            answer["probability"] = known[own]
        elif not self.column.has_levels:
            here = np.interp(value, self.values, along)
            answer["less"] = float((along[along < here]).sum() * width)
        return answer


def _ticks(axis: Axis) -> list[float]:
    """Three values that an axis names."""
    return axis.values[sorted({0, axis.n // 2, axis.n - 1})].tolist()


class Columns:
    """The distribution of each column of a row given all the others.

    A density whose factors are known in any order has these distributions. For others, the row
    with other values of one column is scored, and divided by the sum: a slice of their density.

    Args:
        model: The model.
        examples: Its data.

    Attributes:
        how: `conditional`, `slice`, or `bound` for a slice of a bound of log p; empty if the data
            are not rows.
    """

    def __init__(self, model: Model, examples: Examples):
        self.model, self.examples, spec = model, examples, examples.spec
        inner = getattr(model, "model", model)
        self.how = "conditional" if isinstance(inner, AnyOrder) else "slice"
        if self.how == "slice" and not model.exact:
            self.how = "bound"
        if len(spec.shape) != 1 or spec.dims < 2 or spec.bits is not None:
            self.how = ""
            return
        schema = spec.schema
        self.columns = [Column(name) for name in examples.columns]
        if schema is not None:
            self.columns = list(schema.columns)
        rows = examples.sample(RANGE)
        self.low, self.high = np.nanmin(rows, 0), np.nanmax(rows, 0)

    def axes(self, x: Tensor) -> dict[int, Axis]:
        """The axis of each column that is shown, for a row (1, D)."""
        return {
            j: Axis.of(self.columns[j], float(self.low[j]), float(self.high[j]), float(x[0, j]))
            for j in range(min(COLUMNS, len(self.columns)))
        }

    def __call__(self, x: Tensor, context: Context) -> tuple[list[dict[str, Any]], list[Any]]:
        """What is drawn for a row (1, D), and the lines that compute it."""
        axes = self.axes(x)
        arguments = {
            "spans": {j: (a.low, a.high, a.n) for j, a in axes.items()},
            "atoms": {j: list(a.atoms) for j, a in axes.items()},
        }
        values, column, rows = answers.candidates(x, **arguments)
        if self.how == "conditional":
            parts: list[Any] = [(answers.candidates, arguments), (answers.conditional, {})]
            log_p = answers.conditional(self.model, context, column, rows)
        else:
            count = 1 if self.model.exact else DRAWS
            parts = [(answers.candidates, arguments), (answers.sliced, {"count": count})]
            log_p = answers.sliced(self.model, context, rows, count)
        each = torch.split(log_p.double().cpu(), [len(v) for v in values])
        shown = [
            axis.shown(float(x[0, j]), nats.numpy(), self.how == "conditional")
            for (j, axis), nats in zip(axes.items(), each, strict=True)
        ]
        return shown, parts
