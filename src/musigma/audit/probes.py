"""Moving the heads of a latent: gradients of a loss beside those of what is sampled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg import hadamard
from torch import Tensor

from musigma.audit.graph import Graph
from musigma.audit.latents import Latent

__all__ = [
    "OfLatent", "Over", "Prober", "Probes", "each", "gradient", "moments", "packing", "patterns",
]  # fmt: skip

TRIALS = 7
MOST_COLUMNS = 64  # of a covariance

Over = Mapping[int, Tensor]


def moments(graph: Graph, latent: Latent, over: Over) -> list[Tensor] | None:
    """The sums of mean^2 / 2, mean, sigma^2 / 2 and log sigma; of matrices, in their terms."""
    if latent.diagonal:
        mean, sigma = latent.moments(graph, over)
        scale = 0.5 * (sigma**2).sum(), sigma.abs().log().sum()
    else:
        mean = latent.at(graph, over, 0.0)
        factor = _factor(graph, latent, over, mean)
        if factor is None:
            return None
        covariance = factor @ factor.mT
        scale = 0.5 * (factor**2).sum(), 0.5 * torch.linalg.slogdet(covariance)[1].sum()
    return [0.5 * (mean**2).sum(), mean.sum(), *scale]


def _common(z: tuple[int, ...], noise: tuple[int, ...]) -> int:
    """The number of leading dimensions by which z and its noise are batches."""
    most = min(len(z), len(noise)) - 1
    return next((k for k in range(most) if z[k] != noise[k]), most)


def _factor(graph: Graph, latent: Latent, over: Over, mean: Tensor) -> Tensor | None:
    """L (..., D, K) of z = mean + L e; None if rows of z share noise."""
    columns = []
    for d in latent.draws:
        e = torch.zeros_like(graph.get(d))
        lead = _common(tuple(mean.shape), tuple(e.shape))
        width = e.shape[lead:].numel()
        if lead == 0 or width > MOST_COLUMNS:
            return None
        for k in range(width):
            unit = e.clone().flatten(lead)
            unit[..., k] = 1
            noise = {
                i: unit.view(e.shape) if i == d else torch.zeros_like(graph.get(i))
                for i in latent.draws
            }
            z = graph.run({**over, **noise}, [latent.z])[latent.z]
            columns.append((z - mean).reshape(mean.shape[:lead].numel(), -1))
    if len({c.shape for c in columns}) > 1:
        return None
    return torch.stack(columns, -1)


def patterns(graph: Graph, latent: Latent) -> list[dict[int, Tensor]]:
    """Noise of which mean and covariance over the patterns are exactly those of N(0, 1)."""
    noise = {d: torch.ones_like(graph.get(d)) for d in latent.draws}
    if latent.diagonal:
        noise |= {d: torch.ones_like(graph.get(d)) for d, _ in latent.siblings}
        return [noise, {d: -e for d, e in noise.items()}]
    leads = [_common(graph[latent.z].shape, graph[d].shape) for d in latent.draws]
    events = [graph[d].shape[k:] for d, k in zip(latent.draws, leads, strict=True)]
    widths = [math.prod(event) for event in events]
    n = 2 ** math.ceil(math.log2(sum(widths) + 1))
    signs = torch.as_tensor(hadamard(n), dtype=torch.float64)[:, 1 : 1 + sum(widths)]
    rows = signs.split(widths, 1)
    return [
        {
            d: noise[d] * row[k].view(event)
            for d, row, event in zip(latent.draws, rows, events, strict=True)
        }
        for k in range(n)
    ]


def _moving(moments: Tensor) -> tuple[Tensor, Tensor]:
    moves = (moments.abs() > 1e-14).any(1)
    return moves[1], moves[2] | moves[3]


@dataclass
class Probes:
    """Gradients (T, n) at T random places: of the loss, and (4, T, n) of the moments of z."""

    loss: Tensor
    moments: Tensor
    heads: Tensor
    values: list[float]

    @property
    def moving(self) -> tuple[Tensor, Tensor]:
        """The entries of the heads that move means, and those that move scales."""
        return _moving(self.moments)


class Prober:
    """Moves the heads of a latent at random, and gives gradients in them.

    Args:
        graph: The recorded step.
        latent: The latent.
        heads: The heads that are moved; by default all. One place is near zero, where heads
            usually give N(0, 1), and one far out.
        fixed: Further values that are replaced.
    """

    def __init__(
        self, graph: Graph, latent: Latent, heads: Sequence[int] = (), fixed: Over | None = None
    ):
        self.graph, self.latent, self.fixed = graph, latent, dict(fixed or {})
        self.heads = tuple(heads) or latent.heads
        above = graph.upstream([latent.z], stop=self.heads) & graph.downstream(self.heads)
        self.fixed |= {i: graph.get(i) for i in above if not graph[i].floating}  # branches
        self.places: list[dict[int, Tensor]] = []
        rows: list[Tensor] = []
        generator = torch.Generator().manual_seed(11)
        for size in (0.5, 1.0, 1.5, 2.0, -0.1, 1.5, 3.0, *(0.7,) * 12):
            if len(self.places) == TRIALS:
                break
            place = self._place(size, generator, relative=False)
            gradients = self._moments(place)
            if gradients is None:
                place = self._place(0.5, generator, relative=True)
                gradients = self._moments(place)
            if gradients is not None:
                self.places.append(place)
                rows.append(gradients)
        self.moments = torch.stack(rows, 1) if rows else torch.zeros(4, 0, 0)

    @property
    def usable(self) -> bool:
        """Whether the moments could be measured."""
        return len(self.places) == TRIALS

    @property
    def moving(self) -> tuple[Tensor, Tensor]:
        """The entries of the heads that move means, and those that move scales."""
        return _moving(self.moments)

    @property
    def movers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The heads that move means, and those that move scales."""
        sizes = [self.graph[i].numel for i in self.heads]
        means, scales = (
            tuple(i for i, p in zip(self.heads, row.split(sizes), strict=True) if p.any())
            for row in self.moving
        )
        return means, scales

    def stopped(
        self,
        target: int,
        held: Over,
        value: Callable[[Tensor], Tensor],
        by_draws: bool = False,
        place: Over | None = None,
    ) -> Tensor:
        """The entries of the heads in which the step stops a part of a value's gradient.

        By draws, the gradient is averaged: log q may be taken of stopped parameters. With
        `place`, they are the entries of these values.
        """
        place = self.places[0] if place is None else place
        whole, left = (self._averaged(target, held, by_draws, place, value, stops)[0]
                       for stops in (False, True))  # fmt: skip
        size = float(whole.abs().max())
        moved = whole.abs() > 1e-9 * size
        ratio = (left / torch.where(moved, whole, 1.0))[moved]
        if moved.any() and float(ratio.min()) > 0 and float(ratio.max() - ratio.min()) < 1e-3:
            return torch.zeros_like(moved)  # a gradient of another size, as in KL balancing
        return (left - whole).abs() > 1e-3 * whole.abs() + 1e-9 * size

    @cached_property
    def originals(self) -> Tensor:
        """For each entry of z, the first one with the same mean and scale: of several draws."""
        with torch.no_grad():
            seen = [
                t.reshape(-1)
                for place in self.places
                for t in self.latent.moments(self.graph, {**self.fixed, **place})
            ]
        _, alike = torch.stack(seen).unique(dim=1, return_inverse=True)
        entries = torch.arange(len(alike))
        return entries.scatter_reduce(0, alike, entries, "amin", include_self=False)[alike]

    def latents(self) -> Tensor:
        """For each entry of the heads, the entry of z whose mean or scale it moves; else -1.

        Of several draws, it is that of the first.
        """
        means, scales = self.moving
        found = -torch.ones(self.moments.shape[2], dtype=torch.float64)
        order = 1 + self.originals.double()
        for place in self.places:  # a ReLU may be off at some
            if bool((found >= 0)[means | scales].all()):
                break
            mean, sigma = self.latent.moments(self.graph, {**self.fixed, **place})
            for t in (mean, sigma.abs().log()):
                plain, ordered = (
                    gradient(v.sum(), place) for v in (t, order.reshape(t.shape) * t)
                )
                moved = (plain.abs() > 1e-14) & (found < 0)
                found = torch.where(moved, ordered / torch.where(moved, plain, 1.0) - 1, found)
        return found.round().long()

    def by_latent(self, values: Tensor) -> Tensor:
        """For each entry of z, the value of the entry of the heads that moves its scale."""
        place = self.places[0]
        log_sigma = self.latent.moments(self.graph, {**self.fixed, **place})[1].abs().log()
        v = torch.ones_like(log_sigma).requires_grad_()
        slopes = torch.autograd.grad(
            (v * log_sigma).sum(), list(place.values()), create_graph=True, materialize_grads=True
        )
        row = torch.cat([g.reshape(-1) for g in slopes])
        found = [torch.autograd.grad((row * t).sum(), v, retain_graph=True)[0]
                 for t in (values, torch.ones_like(values))]  # fmt: skip
        return found[0] / found[1]

    def _place(self, size: float, generator: torch.Generator, relative: bool) -> dict[int, Tensor]:
        place = {}
        for i in self.heads:
            base = self.graph.get(i)
            u = 2 * torch.rand(base.shape, generator=generator, dtype=torch.float64) - 1
            moved = base * (size * u).exp() if relative else (base if size > 0 else 0.0) + size * u
            place[i] = moved.detach().contiguous().requires_grad_()
        return place

    def _moments(self, place: dict[int, Tensor]) -> Tensor | None:
        values = moments(self.graph, self.latent, {**self.fixed, **place})
        if values is None or not all(v.isfinite() for v in values):
            return None
        if self.latent.diagonal:
            with torch.no_grad():
                sigma = self.latent.moments(self.graph, {**self.fixed, **place})[1]
                base = self.latent.moments(self.graph, {})[1]
            if not (sigma.sign() == base.sign()).all():
                return None
        rows = torch.stack([gradient(v, place) for v in values])
        return rows if rows.isfinite().all() else None

    def measure(
        self,
        target: int,
        held: Over,
        by_draws: bool,
        places: Sequence[dict[int, Tensor]] | None = None,
    ) -> Probes | None:
        """The gradients of a value, summed, with some values held; None if they are not finite."""
        places = self.places if places is None else places
        found = [self._averaged(target, held, by_draws, place) for place in places]
        loss = torch.stack([row for row, _ in found])
        if not loss.isfinite().all():
            return None
        flat = [torch.cat([t.detach().reshape(-1) for t in p.values()]) for p in places]
        values = [value for _, value in found]
        return Probes(loss, self.moments, torch.stack(flat), values)

    def _averaged(
        self,
        target: int,
        held: Over,
        by_draws: bool,
        place: Over,
        value: Callable[[Tensor], Tensor] = torch.sum,
        stops: bool = False,
    ) -> tuple[Tensor, float]:
        """The gradient of a value of a target at a place, and the value, averaged over draws."""
        noises = patterns(self.graph, self.latent) if by_draws else [{}]
        row, mean = torch.tensor(0.0), 0.0
        for noise in noises:
            over = {**held, **self.fixed, **noise, **place}
            f = value(self.graph.run(over, [target], stops)[target].double())
            row = row + gradient(f, place) / len(noises)
            mean += float(f.detach()) / len(noises)
        return row, mean


def each(fn: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """A function of one point, at each of several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that vmap does one by one
        try:
            return torch.vmap(fn, chunk_size=1024)(points).detach()
        except (RuntimeError, NotImplementedError):  # an operation that vmap does not know
            return torch.stack([fn(p).detach() for p in points])


@dataclass
class OfLatent:
    """What is looked at with a latent whose heads are moved."""

    prober: Prober

    @property
    def graph(self) -> Graph:
        """The recorded step."""
        return self.prober.graph

    @property
    def latent(self) -> Latent:
        """The latent."""
        return self.prober.latent


def gradient(value: Tensor, place: Over) -> Tensor:
    """The gradient in all heads, as one row."""
    leaves = list(place.values())
    if not value.requires_grad:
        return torch.zeros(sum(t.numel() for t in leaves), dtype=torch.float64)
    found = torch.autograd.grad(value, leaves, materialize_grads=True, retain_graph=True)
    return torch.cat([g.reshape(-1).double() for g in found])


def packing(prober: Prober) -> str | None:
    """The layout of an output that holds means and scales, such as "halves, mean first"."""
    graph, latent = prober.graph, prober.latent
    if len(latent.heads) != 1 or not latent.diagonal or not prober.usable:
        return None
    shape, (means, scales) = graph[latent.heads[0]].shape, prober.moving
    if len(shape) < 2 or bool((means == scales).any()):
        return None
    means = means.view(shape)[0]
    for dim, size in enumerate(means.shape):
        along = means.movedim(dim, 0).reshape(size, -1)
        first = along[:, 0]
        if size % 2 or not (along == first[:, None]).all():
            continue
        order = "mean first" if first[0] else "scale first"
        where = f" of dimension {dim + 1}" if dim else ""
        if (first[: size // 2] == first[0]).all() and (first[size // 2 :] != first[0]).all():
            return f"halves{where}, {order}"
        if (first[::2] == first[0]).all() and (first[1::2] != first[0]).all():
            return f"interleaved{where}, {order}"
    return None
