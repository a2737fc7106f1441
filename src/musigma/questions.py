"""What can be asked of a density of rows: scores, reasons, conditional samples, missing values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.any_order import AnyOrder, blocks, orders_of
from musigma.schema import Column

__all__ = ["Explanation", "Scores", "explain", "orders", "score", "surprise", "written"]

EXPECTED = 0.9
"""Probability of the range of values that is expected."""
BLOCK = 256
"""Rows that are explained at a time."""


# --- scores ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Log densities of rows in several orders of the columns.

    Attributes:
        each: Nats (N, R).
        orders: The R orders.
    """

    each: np.ndarray
    orders: tuple[tuple[int, ...], ...]

    @property
    def mean(self) -> np.ndarray:
        """The mean of log p over the orders, nats (N,)."""
        return self.each.mean(1)

    @property
    def mixture(self) -> np.ndarray:
        """log (1/R) Σ p over the orders, itself a normalized density, nats (N,)."""
        return np.logaddexp.reduce(self.each, axis=1) - math.log(self.each.shape[1])

    @property
    def spread(self) -> np.ndarray:
        """The standard deviation of log p over the orders, nats (N,); 0 for one order."""
        return self.each.std(1, ddof=1) if self.each.shape[1] > 1 else 0 * self.each[:, 0]


def orders(model: AnyOrder, n: int) -> list[list[int]]:
    """The orders of a model, followed by others, n in all; fewer if the columns have no more."""
    if n < 1:
        raise ValueError(f"orders: expected 1 or more; got {n}")
    chosen = list(model.orders)
    for order in orders_of(len(model.schema), 4 * n):
        if order not in chosen:
            chosen.append(order)
    return chosen[:n]


@torch.no_grad()
def score(
    model: AnyOrder,
    rows: Any,
    orders: Sequence[Sequence[int]] | None = None,
    context: Tensor | None = None,
) -> Scores:
    """Log densities of rows in several orders of the columns.

    A missing value of a column that has no probability of missing values is integrated out.

    Args:
        model: A model in evaluation mode.
        rows: Rows (N, D).
        orders: Orders of the columns; by default those of the model. See `orders`.
        context: Context (N, F), if the model has one.
    """
    chosen = model.orders if orders is None else orders
    nats = model.log_prob_orders(_rows(model, rows), chosen, context)
    return Scores(nats.double().numpy(force=True), tuple(map(tuple, chosen)))


def _rows(model: AnyOrder, rows: Any) -> Tensor:
    """Rows as the model takes them."""
    x = torch.as_tensor(rows, dtype=torch.float64)
    if x.ndim != 2 or x.shape[1] != len(model.schema):
        raise ValueError(
            f"rows: expected an array (N, {len(model.schema)}), one element for each of "
            f"{', '.join(model.schema.names)}; got shape {tuple(x.shape)}"
        )
    return x.to(model.starts.device)


# --- reasons -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """How surprising each value of each row is.

    Attributes:
        surprise: Nats by which each value is less probable than is typical (N, D).
        because: For each row, the columns of the largest surprises, the largest first, with the
            value and what was expected; only surprises above 0.
        columns: The numbers of these columns.
    """

    surprise: np.ndarray
    because: list[list[str]]
    columns: list[list[int]]


@torch.no_grad()
def surprise(model: AnyOrder, rows: Any, context: Tensor | None = None) -> np.ndarray:
    """-log p(x_j | all the other columns) of each value, nats (N, D).

    It depends on the units of the columns, as any density does; that of `explain` does not.
    """
    x = _rows(model, rows)
    nats = [model.log_values(model.others(x, c), x) for x, c in blocks(x, context, BLOCK)]
    return -torch.cat([torch.zeros(0, len(model.schema)), *nats]).double().numpy(force=True)


@torch.no_grad()
def explain(
    model: AnyOrder,
    rows: Any,
    k: int = 3,
    context: Tensor | None = None,
) -> Explanation:
    r"""Name the columns that make rows improbable.

    The surprise of a value is the information in it that the rest of its row does not explain,
    less what the model expects of that information:

    .. math:: s_j = -\log p(x_j | x_{-j}) - H(x_j | x_{-j})

    Its mean over rows of the model is 0. H is the entropy; in a column that has densities as well
    as probabilities (of spikes, or of missing values), it is that of which of both applies, and of
    the part that does. Units therefore cancel, and surprises in different columns compare.

    Args:
        model: A model in evaluation mode.
        rows: Rows (N, D).
        k: Largest number of columns to name in each row.
        context: Context (N, F), if the model has one.

    Example:
        >>> from musigma.schema import Column, Schema
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)).round(1)
        >>> schema = Schema([Column("a", step=0.1), Column("b", step=0.1)]).measure(x)
        >>> explain(AnyOrder(schema).eval(), [[0.0, 9.0]], 1).because
        [['b = 9.0 (expected -1.7 to 1.6)']]
    """
    x, d = _rows(model, rows), len(model.schema)
    excess, columns, because = [np.empty((0, d))], [], []
    for part, given in blocks(x, context, BLOCK):
        states, start = model.others(part, given), len(columns)
        nats = -model.log_values(states, part) - _entropies(model, states, part)
        excess.append(nats.double().numpy(force=True))
        ranks = np.argsort(-excess[-1], axis=1)[:, :k]
        named = np.take_along_axis(excess[-1], ranks, 1) > 0
        columns += [row[keep].tolist() for row, keep in zip(ranks, named, strict=True)]
        texts = {}
        for j in np.unique(ranks[named]).tolist():
            at = np.flatnonzero(((ranks == j) & named).any(1))
            expected = _expected(model, states[j][at], j)
            for i, text in zip(at.tolist(), expected, strict=True):
                value = written(model.schema.columns[j], float(x[start + i, j]))
                texts[start + i, j] = f"{model.schema.names[j]} = {value} (expected {text})"
        because += [[texts[i, j] for j in columns[i]] for i in range(start, len(columns))]
    return Explanation(np.concatenate(excess), because, columns)


def _entropies(model: AnyOrder, states: Sequence[Tensor], x: Tensor) -> Tensor:
    """What is expected of -log p(x_j | x_-j), nats (B, D); 0 for a value that is not told."""
    binning, each = model.binning, []
    code, t = binning.locate(x), binning.on(x.device)
    for j, state in enumerate(states):
        log = model.log_cells(state, j).double()
        width = log.new_zeros(log.shape[1])
        n = len(model.schema.columns[j].measured)
        width[:n] = t["log_width"][j, :n]
        wide = torch.zeros_like(width, dtype=torch.bool)  # where there is a density
        wide[:n] = (t["width"][j, :n] > 0) & ~t["discrete"][j]
        at = code[:, j].clamp(max=len(wide) - 1)
        dense = torch.where(at >= 0, wide[at.clamp(min=0)], wide.any())
        total = log.new_zeros(len(log))
        for kind in (True, False):
            part = wide == kind
            if part.any():
                share = log[:, part].logsumexp(1)
                within = log[:, part] - share[:, None]
                inside = (within.exp() * (width[part] - within)).sum(1)
                total += torch.where(dense == kind, inside, 0.0) - share.exp() * share
        each.append(torch.where(code[:, j] == binning.absent, 0.0, total))
    return torch.stack(each, 1)


def _expected(model: AnyOrder, state: Tensor, j: int) -> list[str]:
    """What is expected of column j in each state, in words."""
    column, p = model.schema.columns[j], model.log_cells(state, j).exp().double()
    n = len(column.measured)
    missing = p[:, n:].sum(1) > 0.5
    p = p[:, :n] / p[:, :n].sum(1, keepdim=True)
    if column.has_levels:
        some, order = p.sort(1, descending=True)
        wanted = ((some.cumsum(1) - some) < EXPECTED).sum(1)
        names = [[column.levels[int(i)] for i in row[:3]] for row in order]
        texts = [
            ", ".join(row[:w]) + (", ..." if w > 3 else "")
            for row, w in zip(names, wanted.tolist(), strict=True)
        ]
    else:
        low, high = (quantile(model, j, p, q) for q in ((1 - EXPECTED) / 2, (1 + EXPECTED) / 2))
        ends = zip(low.tolist(), high.tolist(), strict=True)
        pairs = [(written(column, a), written(column, b)) for a, b in ends]
        texts = [a if a == b else f"{a} to {b}" for a, b in pairs]
    return ["missing" if m else t for t, m in zip(texts, missing.tolist(), strict=True)]


def quantile(model: AnyOrder, j: int, p: Tensor, q: float) -> Tensor:
    """The quantile of column j with probabilities of its cells, (B,).

    Args:
        model: The model.
        j: Number of a column that is not of levels.
        p: Probabilities (B, cells), float64.
        q: From 0 to 1.
    """
    below = p.cumsum(1)
    code = (below < q).sum(1).clamp(max=p.shape[1] - 1)
    mass, after = (t.gather(1, code[:, None])[:, 0] for t in (p, below))
    place = ((q - after) / mass.clamp(min=1e-300) + 1).clamp(0, 1)
    return model.binning.values(j, code, place)


def written(column: Column, value: float) -> str:
    """A value of a column as text.

    >>> written(Column("day", "date"), 0.0), written(Column("carat", step=0.01), 0.3)
    ('1970-01-01', '0.30')
    """
    if math.isnan(value):
        return "missing"
    if column.has_levels:
        known = 0 <= value < len(column.levels)
        return column.levels[int(value)] if known else "an unknown level"
    if column.kind in ("date", "datetime"):
        seconds = value * (86400 if column.kind == "date" else 1)
        moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)
        return moment.strftime("%Y-%m-%d" if column.kind == "date" else "%Y-%m-%dT%H:%M:%S")
    if column.step:
        digits = -int(Decimal(repr(column.step)).normalize().as_tuple().exponent)
        return f"{value:.{max(0, digits)}f}"
    return f"{value:.6g}"
