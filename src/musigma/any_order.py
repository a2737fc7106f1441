"""An exact density of rows of typed columns that can be asked in any order of the columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.distributions import Binning
from musigma.gaussian import EventDistribution
from musigma.model import Model
from musigma.nets.vectors import residual_branch
from musigma.schema import Schema
from musigma.trace import Trace

__all__ = ["AnyOrder", "Known", "RowDistribution", "orders_of"]


BLOCK = 2560
"""Number of conditionals that are computed at a time."""


def orders_of(columns: int, n: int) -> list[list[int]]:
    """Orders of columns: the natural one for n = 1, otherwise n that look random, always the same.

    >>> orders_of(3, 1), orders_of(3, 2)
    ([[0, 1, 2]], [[1, 2, 0], [0, 2, 1]])
    """
    natural = list(range(columns))
    return [natural] if n == 1 else [Random(i).sample(natural, columns) for i in range(n)]


def blocks(x: Tensor, context: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows and their context, some at a time."""
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], None if context is None else context[part]


class AnyOrder(Model):
    r"""An autoregressive density of rows, whose factors are known for every order of the columns.

    .. math:: \log p_o(x) = \sum_k \log p(x_{o_k} | x_{o_1}, \dots, x_{o_{k-1}})

    One network computes the distribution of each column given any subset of the others, which are
    masked in its first layer (Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator",
    2014, arXiv:1310.1757). Each factor is a categorical distribution over the cells of the column
    (`musigma.schema.Cells`), times the density inside the cell; a discrete column has
    probabilities, so nats of rows of both kinds add.

    In training mode the log density is an unbiased estimate of its average over all orders, from
    one subset per row. In evaluation mode it is exact, for the order that `orders` holds; for
    several orders it is that of their mixture, log (1/R) Σ p_o(x), which is itself normalized.

    Every factor is (1 - s) softmax + s marginal: no training value has a probability of zero.
    Values outside all cells have a total probability of 1 / (n + 2) at each end of a column, and
    so have all unknown levels, where n is the number of training rows: the probability that a new
    value is larger than n exchangeable ones.

    Args:
        schema: The columns, measured on the training rows.
        hidden: Width of the network.
        blocks: Number of residual blocks, of two layers each.
        embedding: Number of features of a cell in the input.
        frequencies: Number of sines and cosines of the rank of a value in the input, each of
            twice the frequency of the one before.
        cosines: Number of cosines over the rank that the logits of a column of numbers consist of
            (`Binning.basis`).
        smoothness: The exponent s with which functions of k times the frequency are divided by
            k^s, in the input and in the logits, so that detail is learned later; by default from
            1 for up to 500 training rows to 1/4 for 50,000, linear in the logarithm.
        subsets: Random subsets with which `estimate` sees each row.
        context: Number of features of the context.
        smoothing: Weight s of the marginal distribution.

    Attributes:
        orders: The orders of columns whose mixture is scored and sampled.

    Example:
        >>> import numpy as np
        >>> from musigma.schema import Column
        >>> rows = np.random.default_rng(0).normal(size=(500, 2)).round(1)
        >>> schema = Schema([Column("a"), Column("b", step=0.1)]).measure(rows)
        >>> model = AnyOrder(schema, hidden=16).eval()
        >>> model.log_prob(torch.tensor(rows[:4])).shape, model.sample(3).shape
        (torch.Size([4]), torch.Size([3, 2]))
    """

    exact = True
    no_latents = (
        "a `table` model has no latents; train a flow or a VAE of the same columns (musigma train "
        "nsf DATA --schema infer)"
    )
    starts: Tensor
    log_marginal: Tensor
    log_outside: Tensor
    log_inside: Tensor

    def __init__(
        self,
        schema: Schema,
        *,
        hidden: int = 256,
        blocks: int = 3,
        embedding: int = 24,
        frequencies: int = 8,
        cosines: int = 48,
        smoothness: float | None = None,
        subsets: int = 1,
        context: int = 0,
        smoothing: float = 1e-3,
    ):
        super().__init__()
        self.schema, self.binning, self.smoothing = schema, Binning(schema), smoothing
        self.frequencies, self.subsets, d = frequencies, subsets, len(schema)
        self.orders: list[list[int]] = orders_of(d, 1)
        sizes = self.binning.sizes
        inputs = embedding + 2 * frequencies + 3
        self.embed = nn.Embedding(sum(sizes) + 3 * d, embedding)
        self.seen = nn.Parameter(torch.randn(d, inputs, hidden) / math.sqrt(inputs))
        self.unseen = nn.Parameter(torch.randn(d, hidden) / 2)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        self.blocks = nn.ModuleList(residual_branch(hidden) for _ in range(blocks))
        rows = torch.tensor([column.measured.rows for column in schema.columns])
        if smoothness is None:
            smoothness = min(1.0, max(0.25, 1 - 0.375 * math.log10(max(rows.tolist()) / 500)))
        self.smoothness = smoothness
        bases = [self.binning.basis(j, cosines, smoothness) for j in range(d)]
        self.outputs = [
            size if basis is None else len(basis) for size, basis in zip(sizes, bases, strict=True)
        ]
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, sum(self.outputs), bias=False)
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))
        for j, basis in enumerate(bases):
            self.register_buffer(f"basis_{j}", basis, persistent=False)
        marginals = self.binning.marginals()
        ends = torch.tensor([1.0 if column.has_levels else 2.0 for column in schema.columns])
        empty = [not len(c.measured) and not c.missing for c in schema.columns]
        outside = -torch.where(torch.tensor(empty), ends, rows + 2).log()
        for name, value in (
            ("starts", torch.tensor([0, *sizes]).cumsum(0)[:-1]),
            ("log_marginal", marginals),
            ("log_outside", outside),
            ("log_inside", torch.log1p(-ends * outside.exp())),
        ):
            self.register_buffer(name, value, persistent=False)
        with torch.no_grad():
            self.head.weight.zero_()
            self.bias.copy_(marginals)
            self.embed.weight[: sum(sizes)][self.binning.ordinary()] = 0

    # -- the network

    def features(self, x: Tensor, code: Tensor, j: int | None = None) -> Tensor:
        """The input of the network for each value that is seen, (B, D, F).

        Args:
            x: Rows (B, D), or the values (B, 1) of column j.
            code: Their codes.
            j: Number of the column, if there is only one.
        """
        which = slice(None) if j is None else slice(j, j + 1)
        binning = self.binning if j is None else self.binning.column(j)
        d = torch.arange(len(self.starts), device=x.device)[which]
        beyond = len(self.log_marginal) + 3 * d - 1
        cell = self.embed(torch.where(code >= 0, self.starts[which] + code, beyond - code))
        rank = binning.rank(x, code)[..., None].to(cell)
        double = 2.0 ** torch.arange(self.frequencies, device=x.device)
        waves = torch.cat([(math.pi * rank * double).sin(), (math.pi * rank * double).cos()], -1)
        waves = waves / double.repeat(2) ** self.smoothness
        return torch.cat([cell, rank, binning.quantile(rank), waves, torch.ones_like(rank)], -1)

    def _given(self, context: Tensor | None) -> Tensor:
        return self.unseen.new_zeros(1) if self.context is None else self.context(context)

    def trunk(self, h: Tensor) -> Tensor:
        """The last hidden layer from the first one."""
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)

    def state(self, x: Tensor, seen: Tensor, context: Tensor | None = None) -> Tensor:
        """The last hidden layer given the values that are seen, (B, H).

        Args:
            x: Rows (B, D); values that are not seen are ignored.
            seen: Mask (B, D).
            context: Context (B, F), if the model has one.
        """
        code = self.binning.locate(x)
        known = seen & (code != self.binning.absent)
        return self._masked(self.features(x, code), known, self._given(context))

    def _masked(self, features: Tensor, seen: Tensor, given: Tensor) -> Tensor:
        inputs = (features * seen[..., None]).flatten(-2)
        h = inputs @ self.seen.flatten(0, 1) + (~seen).to(inputs) @ self.unseen
        return self.trunk(h + given)

    def start(self, context: Tensor | None) -> Tensor:
        """The first layer if nothing is seen, (B, H); without a context (1, H)."""
        return self.unseen.sum(0) + torch.atleast_2d(self._given(context))

    def parts(self, x: Tensor, j: int | None = None) -> Tensor:
        """What each value changes in the first layer if it is seen, (D, B, H).

        Args:
            x: As in `features`.
            j: As in `features`.
        """
        which = slice(None) if j is None else slice(j, j + 1)
        code = (self.binning if j is None else self.binning.column(j)).locate(x)
        first = torch.einsum("bdf,dfh->dbh", self.features(x, code, j), self.seen[which])
        known = (code != self.binning.absent).T[..., None]
        return (first - self.unseen[which, None]) * known

    def others(self, x: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """For each column, the last hidden layer given all the other values of a row, (B, H)."""
        parts = self.parts(x)
        return list(self.trunk(self.start(context) + parts.sum(0) - parts))

    def logits(self, state: Tensor, j: int) -> Tensor:
        """Logits of the cells of column j, (B, cells), from a state."""
        start = sum(self.outputs[:j])
        part = F.linear(state, self.head.weight[start : start + self.outputs[j]])
        return self._over_cells(part, j)

    def _over_cells(self, outputs: Tensor, j: int) -> Tensor:
        """Logits of the cells of column j from the outputs of the network for it."""
        basis: Tensor | None = getattr(self, f"basis_{j}")
        bias = self.bias[int(self.starts[j]) :][: self.binning.sizes[j]]
        return (outputs if basis is None else outputs @ basis.to(outputs)).float() + bias

    def log_cells(self, state: Tensor, j: int) -> Tensor:
        """Log probabilities of the cells of column j given what is seen, (B, cells)."""
        part = slice(int(self.starts[j]), int(self.starts[j]) + self.binning.sizes[j])
        return self._smoothed(self.logits(state, j).log_softmax(1), self.log_marginal[part])

    def _smoothed(self, log: Tensor, marginal: Tensor) -> Tensor:
        return torch.logaddexp(
            log + math.log1p(-self.smoothing), marginal + math.log(self.smoothing)
        )

    def _log_density(self, logits: Sequence[Tensor], x: Tensor, code: Tensor) -> Tensor:
        """Log density of each value from the logits of its column, nats (B, D)."""
        inside = code >= 0
        at = torch.where(inside, code, 0)
        chosen = [
            -F.cross_entropy(part.expand(len(x), -1), at[:, j], reduction="none")
            for j, part in enumerate(logits)
        ]
        log = self._smoothed(torch.stack(chosen, 1), self.log_marginal[self.starts + at])
        log = torch.where(inside, log + self.log_inside, self.log_outside)
        nats = log + self.binning.log_density(x, code)
        return torch.where(code == self.binning.absent, 0.0, nats)

    def log_values(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """Log density of each value of rows x from the state of its column, nats (B, D).

        Args:
            states: For each column a state, (B, H), or (1, H) for all rows.
            x: Rows (B, D).
        """
        logits = [self.logits(state, j) for j, state in enumerate(states)]
        return self._log_density(logits, x, self.binning.locate(x))

    # -- densities

    def estimate(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """An unbiased estimate of the mean of log p over all orders, nats (B,).

        For a subset of t of the D known values of a row, drawn uniformly after t is, the
        conditionals of the others given the subset add up, times D / (D - t); this is averaged
        over `subsets` draws. As in `conditionals`, some missing values are not known.
        """
        n, k = len(x), self.subsets
        code = self.binning.locate(x)
        absent = code == self.binning.absent
        d = (~absent).sum(1, keepdim=True).clamp(min=1)
        count = (torch.rand(k, n, 1, device=x.device) * d).long().clamp(max=d - 1)
        place = torch.rand(k, *x.shape, device=x.device).masked_fill(absent, 2)
        seen = place.argsort(2).argsort(2) < count
        state = self._masked(self.features(x, code), seen, self._given(context))
        outputs = self.head(state.flatten(0, 1)).split(self.outputs, 1)
        logits = [self._over_cells(part, j) for j, part in enumerate(outputs)]
        nats = self._log_density(logits, x.repeat(k, 1), code.repeat(k, 1)).unflatten(0, (k, n))
        return (torch.where(seen, 0.0, nats).sum(2) * (d / (d - count))[..., 0]).mean(0)

    def conditionals(
        self, x: Tensor, order: Sequence[int], context: Tensor | None = None
    ) -> Tensor:
        """log p(x_j | the columns before j in an order), nats (B, D), in the order of columns.

        A missing value of a column that has no probability of missing values (`Column.missing`)
        is integrated out: no other column is conditioned on it, and its term is 0.
        """
        size = max(16, BLOCK // len(order))
        if len(x) > size:  # blocks stay in the cache of a processor
            parts = blocks(x, context, size)
            return torch.cat([self.conditionals(rows, order, by) for rows, by in parts])
        start = self.start(context)
        before = start + self.parts(x)[list(order[:-1])].cumsum(0)
        states = dict(zip(order, [self.trunk(start), *self.trunk(before)], strict=True))
        return self.log_values([states[j] for j in range(len(order))], x)

    def log_prob_orders(
        self, x: Tensor, orders: Sequence[Sequence[int]], context: Tensor | None = None
    ) -> Tensor:
        """log p(x) in each of several orders, nats (B, R)."""
        return torch.stack([self.conditionals(x, o, context).sum(1) for o in orders], 1)

    def log_prob_each(self, x: Tensor, context: Any = None) -> Tensor | None:
        """log p(x) in each of the model's orders, nats (B, R); None for a single one."""
        return self.log_prob_orders(x, self.orders, context) if len(self.orders) > 1 else None

    def fill(
        self,
        x: Tensor,
        seen: Tensor,
        order: Sequence[int] | None = None,
        context: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        missing: Collection[int] | None = None,
    ) -> Tensor:
        """Draw the values that are not seen, one column after another, (B, D).

        At temperature 0 each value is the middle of its most probable cell. Cells are drawn
        without the smoothing of the density, and values outside all cells never.

        Args:
            x: Rows (B, D); values that are not seen are ignored.
            seen: Mask (B, D).
            order: The columns in the order in which they are drawn; by default one row after
                another takes the next of the model's `orders`.
            context: Context (B, F), if the model has one.
            temperature: Divides the logits; a number, or one for each row (B,).
            missing: Columns in which a missing value may be drawn; by default all in which values
                may be missing.
        """
        x = x.clone()

        def heat(rows: Tensor | slice) -> float | Tensor:
            if isinstance(temperature, Tensor):
                return temperature.expand(len(x))[rows]
            return temperature

        if order is None:
            for i, one in enumerate(self.orders):
                rows = slice(i, None, len(self.orders))
                by, t = None if context is None else context[rows], heat(rows)
                x[rows] = self.fill(x[rows], seen[rows], one, by, temperature=t, missing=missing)
            return x
        known = Known(self, len(x), context)
        for j in range(len(order)):
            rows = seen[:, j].nonzero()[:, 0]
            known.see(j, x[rows, j], rows)
        for j in order:
            rows = (~seen[:, j]).nonzero()[:, 0]
            if len(rows):
                logits = self.logits(known.state(rows), j)
                if missing is not None and j not in missing:
                    logits = logits[:, : len(self.schema.columns[j].measured)]
                x[rows, j] = self.binning.draw(j, logits, heat(rows))
                known.see(j, x[rows, j], rows)
        return x

    # -- a model

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Score x under p."""
        trace.p(self, RowDistribution(self, context, len(x)), x)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Draw x from p."""
        n = trace.n if context is None else len(context)
        if n is None:
            raise ValueError("n: expected the number of rows to generate; got none")
        return trace.p(self, RowDistribution(self, context, n))

    def variables(self) -> Iterator[nn.Module]:
        """This module itself."""
        yield self

    latents = variables


class Known:
    """What an `AnyOrder` model has seen of some rows, one column after another.

    Args:
        model: The model.
        n: Number of rows.
        context: Context (n, F), if the model has one.
    """

    def __init__(self, model: AnyOrder, n: int, context: Tensor | None = None):
        self.model = model
        self.first = model.start(context).expand(n, -1).clone()

    def state(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The last hidden layer given what has been seen of some rows, (B, H)."""
        return self.model.trunk(self.first[rows])

    def see(self, j: int, x: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Condition some rows on their values (B,) of column j."""
        self.first[rows] += self.model.parts(x[:, None], j)[0]


class RowDistribution(EventDistribution):
    """The distribution of n rows under an `AnyOrder` model."""

    has_rsample = False

    def __init__(self, model: AnyOrder, context: Tensor | None, n: int):
        self.model, self.context = model, context
        super().__init__([n], [len(model.schema)])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, shape (B,): an estimate if the model is in training mode."""
        if self.model.training:
            return self.model.estimate(value, self.context)
        each = self.model.log_prob_orders(value, self.model.orders, self.context)
        return each.logsumexp(1) - math.log(each.shape[1])

    def sample(self, sample_shape: Any = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw rows, float64 (B, D), one after another in the next of the model's orders."""
        n, d = self.batch_shape[0], self.event_shape[0]
        x = torch.zeros(n, d, dtype=torch.float64, device=self.model.starts.device)
        seen = torch.zeros_like(x, dtype=torch.bool)
        return self.model.fill(x, seen, context=self.context, temperature=temperature)

    @property
    def mean(self) -> Tensor:
        """The most probable value of each column, given those before it, (B, D)."""
        return self.sample(temperature=0.0)
