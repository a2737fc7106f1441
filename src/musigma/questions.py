"""What can be asked of a density of rows: scores, reasons, conditional samples, missing values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.any_order import AnyOrder, Known, blocks, orders_of
from musigma.conditions import Condition, as_number, written
from musigma.distributions import Binning, multiples
from musigma.imputation import Imputation
from musigma.schema import Column, Schema

__all__ = [
    "Conditional",
    "Explanation",
    "Imputation",
    "Marginal",
    "Scores",
    "complete",
    "explain",
    "impute",
    "log_prob_given",
    "marginal",
    "orders",
    "sample_where",
    "score",
    "surprise",
]

EXPECTED = 0.9
"""Probability of the range of values that is expected."""
BLOCK = 256
"""Rows that are explained at a time."""
DRAWN = 4096
"""Rows that are drawn at a time."""
LEAST = 1000
"""Least number of candidates, from which the probability of a condition is estimated."""
ORDERS = 6
"""Largest number of orders of the columns of a condition."""
MOST = 20
"""Largest number of candidates for each row that is wanted."""


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
    parts = blocks(x, context, BLOCK)
    nats = [
        x.new_zeros(0, x.shape[1]),
        *(model.log_values(model.others(y, c), y) for y, c in parts),
    ]
    return -torch.cat(nats).double().numpy(force=True)


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
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)).round()
        >>> schema = Schema([Column("a", "count"), Column("b", "count")]).measure(x)
        >>> explain(AnyOrder(schema).eval(), [[0.0, 9.0]], 1).because
        [['b = 9 (expected -2 to 2)']]
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
    """What is expected of -log p(x_j | x_-j), nats (B, D); 0 for one that is integrated out."""
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
    if not n:
        return ["missing"] * len(p)
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
        low, high = (
            _quantile(model.binning, j, p, q) for q in ((1 - EXPECTED) / 2, (1 + EXPECTED) / 2)
        )
        ends = zip(low.tolist(), high.tolist(), strict=True)
        pairs = [(written(column, a), written(column, b)) for a, b in ends]
        texts = [a if a == b else f"{a} to {b}" for a, b in pairs]
    return ["missing" if m else t for t, m in zip(texts, missing.tolist(), strict=True)]


def _quantile(binning: Binning, j: int, p: Tensor, q: float) -> Tensor:
    """The quantile of column j with probabilities of its cells (B, C), float64 (B,)."""
    below = p.cumsum(1)
    code = (below < q).sum(1).clamp(max=p.shape[1] - 1)
    mass, after = (t.gather(1, code[:, None])[:, 0] for t in (p, below))
    place = ((q - after) / mass.clamp(min=1e-300) + 1).clamp(0, 1)
    return binning.values(j, code, place)


# --- samples under conditions ------------------------------------------------------------------


@dataclass(frozen=True)
class Conditional:
    """Rows that satisfy a condition.

    Attributes:
        rows: Rows, float64 (n, D).
        probability: An estimate of the probability of the condition under the model.
        standard_error: Of the estimate; 0 if it is exact.
        effective: The number of independent rows that the rows are worth: n, unless they were
            resampled by unequal weights.
        how: How they were drawn, in words.
    """

    rows: np.ndarray
    probability: float
    standard_error: float
    effective: float
    how: str


@torch.no_grad()
def sample_where(
    model: AnyOrder, where: Condition | str, n: int, context: Tensor | None = None
) -> Conditional:
    r"""Draw rows that satisfy a condition, without rejection.

    The columns of the condition come first in the order. The distribution of each over its cells
    is cut to the allowed values A, and has the probability :math:`P(A_k | x_{<k})`. The product w
    of these is the weight of a row; its mean is the probability of the condition. If the condition
    has one column, w is the same for all rows. Otherwise the orders of its columns (up to six) are
    mixed, and more rows are drawn than are wanted, until their effective sample size
    :math:`(\sum w)^2 / \sum w^2` is n, or 20 n are drawn. The wanted ones are resampled from
    them, and the other columns are drawn after that.

    Args:
        model: A model in evaluation mode.
        where: The condition, or its text.
        n: Number of rows.
        context: Context (1, F), if the model has one.

    Raises:
        ValueError: If the condition cannot be read, or no value satisfies it.

    Example:
        >>> from musigma.schema import Column, Schema
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)).round(1)
        >>> schema = Schema([Column("a", step=0.1), Column("b", step=0.1)]).measure(x)
        >>> found = sample_where(AnyOrder(schema).eval(), "a > 1 and b > 1", 5)
        >>> bool((found.rows > 1).all()), round(found.probability, 2)
        (True, 0.02)
    """
    if n < 1:
        raise ValueError(f"n: expected 1 or more rows; got {n}")
    condition = Condition.parse(where, model.schema) if isinstance(where, str) else where
    orders = _cut_orders([_Cut(model, condition, j) for j in condition.allowed])
    even = len(orders) == 1  # all rows have the same weight
    m = math.ceil((n if even else max(n, LEAST)) / len(orders))
    drawn: list[list[tuple[Tensor, Tensor]]] = [[] for _ in orders]
    while True:
        for order, parts in zip(orders, drawn, strict=True):
            for start in range(0, m, DRAWN):
                parts.append(_candidates(model, order, min(DRAWN, m - start), context))
        log_w = torch.stack([torch.cat([log for _, log in parts]) for parts in drawn]).double()
        w = (log_w - log_w.max()).exp()
        effective = float(w.sum() ** 2 / w.square().sum())
        if effective >= n * (1 - 1e-9) or w.numel() >= MOST * n:
            break
    error = (w.var(1).sum() / w.shape[1]).sqrt() / len(w) if not even else w.new_zeros(())
    x = torch.cat([rows for parts in drawn for rows, _ in parts])
    if not even:  # systematic resampling, in random order
        at = (torch.arange(n, device=w.device) + torch.rand((), device=w.device)) * (w.sum() / n)
        chosen = torch.searchsorted(w.flatten().cumsum(0), at).clamp(max=w.numel() - 1)
        x = x[chosen[torch.randperm(n, device=w.device)]]
    seen = torch.zeros(len(model.schema), dtype=torch.bool, device=x.device)
    seen[list(condition.allowed)] = True
    rest = [
        model.fill(part, seen.expand_as(part), context=given)
        for part, given in blocks(x[:n], _repeated(context, n), DRAWN)
    ]
    names = ", ".join(cut.column.name for cut in orders[0])
    how = f"{names} first, drawn from the allowed values; all rows have the same weight"
    if not even:
        how = (
            f"{names} first, drawn from the allowed values in {len(orders)} "
            f"order{'s' * (len(orders) > 1)}; {w.numel():,} candidates, resampled by P(allowed | "
            f"columns before): effective sample size {effective:,.0f}"
        )
    scale = float(log_w.max().exp())
    return Conditional(
        torch.cat(rest).numpy(force=True),
        scale * float(w.mean()),
        scale * float(error),
        min(float(n), effective),
        how,
    )


class _Cut:
    """The allowed values of one column of a condition."""

    def __init__(self, model: AnyOrder, condition: Condition, j: int):
        home, found = model.starts.device, condition.pieces(j)
        self.model, self.j, self.column = model, j, model.schema.columns[j]
        self.cell = torch.tensor(found.cell, device=home)
        self.log_share = torch.tensor(found.share, device=home).log().float()
        self.start, self.stop = (torch.tensor(t, device=home) for t in found[2:])

    def draw(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """A draw from the allowed values in each state (B,), and their log probability."""
        log = self.model.log_cells(state, self.j)[:, self.cell] + self.log_share
        piece = torch.multinomial(log.softmax(1), 1)[:, 0]
        start, stop = self.start[piece], self.stop[piece]
        u = torch.rand(start.shape, dtype=torch.float64, device=start.device)
        if grid := self.column.grid:
            x = multiples(torch.minimum(start + (u * (stop - start + 1)).floor(), stop), grid)
        else:
            x = torch.minimum(start + u * (stop - start), stop)
            x = x.clamp(self.column.low, self.column.high)
        missing = self.cell[piece] == len(self.column.measured)
        return torch.where(missing, math.nan, x), log.logsumexp(1)


def _cut_orders(cuts: Sequence[_Cut]) -> list[list[_Cut]]:
    """The orders in which the columns of a condition are drawn: all of them, or several."""
    k = len(cuts)
    few = math.factorial(k) <= ORDERS
    chosen = itertools.permutations(range(k)) if few else orders_of(k, ORDERS)
    return [[cuts[i] for i in order] for order in chosen]


def _candidates(
    model: AnyOrder, order: Sequence[_Cut], m: int, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows (m, D) with the columns of a condition alone, and their log weights (m,)."""
    known = Known(model, m, context)
    x = model.log_marginal.new_full((m, len(model.schema)), math.nan, dtype=torch.float64)
    log_w = x.new_zeros(m)
    for cut in order:
        x[:, cut.j], log_p = cut.draw(known.state())
        log_w += log_p
        known.see(cut.j, x[:, cut.j])
    return x, log_w


def _repeated(context: Tensor | None, n: int) -> Tensor | None:
    return None if context is None else context.expand(n, -1)


# --- missing values ----------------------------------------------------------------------------


@torch.no_grad()
def complete(
    model: AnyOrder,
    rows: Any,
    order: Sequence[int] | None = None,
    context: Tensor | None = None,
    *,
    missing: Collection[int] = (),
) -> np.ndarray:
    """Draw every missing value of rows given the values that are known, float64 (N, D).

    Args:
        model: A model in evaluation mode.
        rows: Rows (N, D); NaN where a value is missing.
        order: The order in which columns are drawn; by default one row after another takes the
            next of the model's orders.
        context: Context (N, F), if the model has one.
        missing: Columns in which a missing value may be drawn, as in the training rows.

    Raises:
        ValueError: If no value was present in training in a column that is to be drawn.
    """
    x = _rows(model, rows)
    holes = x.isnan()
    for j, column in enumerate(model.schema.columns):
        if not len(column.measured) and j not in missing and holes[:, j].any():
            raise ValueError(
                f"column {column.name!r}: its values were all missing in training, so none can "
                "be drawn; leave the column out"
            )
    filled, some = x.clone(), holes.any(1).nonzero()[:, 0]
    for at in some.split(DRAWN):
        given = None if context is None else context[at]
        filled[at] = model.fill(x[at], ~holes[at], order, given, missing=missing)
    return filled.numpy(force=True)


def impute(model: AnyOrder, rows: Any, n: int = 20, context: Tensor | None = None) -> Imputation:
    """Draw every missing value of rows n times, given all the known values of its row.

    The missing values of one row are drawn together, so each filled row is a draw as a whole.
    The draws are shared among up to five orders of the columns, which mixes these.

    Args:
        model: A model in evaluation mode.
        rows: Rows (N, D); NaN where a value is missing. It is drawn as a value, also in a column
            whose missing values the model gives a probability: as if they were missing at random.
        n: Number of draws.
        context: Context (N, F), if the model has one.

    Raises:
        ValueError: As `complete`.

    Example:
        >>> from musigma.schema import Column, Schema
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)).round(1)
        >>> schema = Schema([Column("a", step=0.1), Column("b", step=0.1)]).measure(x)
        >>> found = impute(AnyOrder(schema).eval(), [[0.5, np.nan], [0.1, 0.2]], 100)
        >>> found.cells.tolist(), found.draws.shape, abs(found.center()[0, 1]) < 0.4
        ([[0, 1]], (1, 100), np.True_)
    """
    if n < 1:
        raise ValueError(f"n: expected 1 or more draws; got {n}")
    x = _rows(model, rows).numpy(force=True)
    holes = np.isnan(x)
    cells, chosen = np.argwhere(holes), orders(model, min(n, 5))
    some = np.flatnonzero(holes.any(1))
    draws, size = [np.empty((0, n))], max(1, DRAWN * len(chosen) // n)
    for start in range(0, len(some), size):
        at, each = some[start : start + size], []
        for order in range(len(chosen)):
            k = len(range(order, n, len(chosen)))
            given = None if context is None else context[torch.from_numpy(at.repeat(k))]
            filled = complete(model, x[at].repeat(k, 0), chosen[order], given)
            each.append(filled.reshape(len(at), k, -1).swapaxes(1, 2)[holes[at]])
        draws.append(np.concatenate(each, 1))
    return Imputation(model.schema, x, cells, np.concatenate(draws))


@torch.no_grad()
def log_prob_given(
    model: AnyOrder, rows: Any, seen: Any, context: Tensor | None = None
) -> np.ndarray:
    """log p(x_j | the values that are seen) of each value that is not seen, nats (N, D).

    It is exact for each value by itself; values that are seen have 0.

    Args:
        model: A model in evaluation mode.
        rows: Rows (N, D).
        seen: Mask (N, D).
        context: Context (N, F), if the model has one.
    """
    x = _rows(model, rows)
    mask = torch.as_tensor(seen, dtype=torch.bool, device=x.device)
    nats = [x.new_zeros(0, x.shape[1])]
    for at in torch.arange(len(x), device=x.device).split(DRAWN):
        state = model.state(x[at], mask[at], None if context is None else context[at])
        log = model.log_values([state] * x.shape[1], x[at])
        nats.append(torch.where(mask[at], 0.0, log.double()))
    return torch.cat(nats).numpy(force=True)


# --- one column --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marginal:
    """The distribution of one column under a model, given values of others or none.

    Attributes:
        column: The column; its cells have the edges.
        probabilities: Of its cells, which for a column of levels are the levels, (C,).
        missing: Probability of a missing value.
    """

    column: Column
    probabilities: np.ndarray
    missing: float

    def probability(self, where: str) -> float:
        """The probability of a condition on this column, such as ``18 <= age < 65``."""
        condition = Condition.parse(where, Schema((self.column,)))
        found = condition.pieces(0)
        return float((np.append(self.probabilities, self.missing)[found.cell] * found.share).sum())

    def quantile(self, q: float) -> float:
        """The value that a share q of the values that are not missing lie below.

        Raises:
            ValueError: For a category, which has no order; or if no value was present in training.
        """
        if self.column.kind == "category":
            raise ValueError(f"quantile: {self.column.name!r} is a category, which has no order")
        if not len(self.probabilities):
            raise ValueError(f"quantile: {self.column.name!r} was missing in all training rows")
        p = torch.from_numpy(self.probabilities / self.probabilities.sum())[None]
        return float(_quantile(Binning(Schema((self.column,))), 0, p, q))


@torch.no_grad()
def marginal(
    model: AnyOrder,
    column: str,
    given: Mapping[str, str | float | bool | None] | None = None,
    context: Tensor | None = None,
) -> Marginal:
    """The exact distribution of a column given values of any others, from one pass.

    Args:
        model: A model in evaluation mode.
        column: Name of the column.
        given: Values by the names of their columns: numbers, levels, dates as ISO text, None for
            a missing value. By default there are none.
        context: Context (1, F), if the model has one.

    Raises:
        ValueError: If there is no such column, or a value does not fit its column.

    Example:
        >>> from musigma.schema import Column, Schema
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)).round(1)
        >>> schema = Schema([Column("a", step=0.1), Column("b", step=0.1)]).measure(x)
        >>> found = marginal(AnyOrder(schema).eval(), "b", {"a": 0.5})
        >>> abs(found.quantile(0.5)) < 0.1, round(found.probability("b > 1"), 1)
        (True, 0.1)
    """
    schema, known = model.schema, Known(model, 1, context)
    j, c = schema.index(column), schema.columns[schema.index(column)]
    for name, value in (given or {}).items():
        i = schema.index(name)
        if i == j:
            raise ValueError(f"given: {name!r} is the column that is asked for; leave it out")
        number = as_number(schema.columns[i], value)
        known.see(i, torch.tensor([number], dtype=torch.float64, device=model.starts.device))
    p = model.log_cells(known.state(), j)[0].double().exp().numpy(force=True)
    n = len(c.measured)
    return Marginal(c, p[:n], float(p[n:].sum()))
