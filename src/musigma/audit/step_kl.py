r"""The divergence in a loss: how it depends on the Gaussian that a step draws its latent from.

The heads of one latent are moved at random, with the decoder held. Then the gradient of the loss
in them is compared with those of the moments of z = mean + sigma * noise, both by autograd on the
replayed graph:

.. math::
    F = \sum_i A_i \tfrac12 \mu_i^2 + B_i \mu_i + C_i \tfrac12 \sigma_i^2 + D_i \log \sigma_i,

which is a KL divergence to N(-B / A, -D / C), of weight -D, if and only if A = C > 0 > D. A KL by
draws is averaged over noise first, exactly, as it is of second degree in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node, Origin
from musigma.audit.latents import PRODUCTS, Latent, frontier, own_values
from musigma.audit.probes import OfLatent, Over, Prober, Probes, each, gradient
from musigma.audit.scales import READINGS, Curve, name_curve

__all__ = [
    "EXACT",
    "NEAR",
    "UNKNOWN",
    "Fit",
    "LogQ",
    "View",
    "data_terms",
    "fit_moments",
    "inner_values",
    "is_linear",
    "log_weights",
    "move_together",
    "penalized_heads",
    "sampled_scale",
    "terms",
]

EXACT = 1e-6  # relative error of gradients up to which two formulas are one
NEAR = 1e-3  # up to which they differ by a floor or an offset


@dataclass
class Fit:
    """The coefficients of a loss, by entry of the heads.

    Args:
        coefficients: A, B, C and D (4, n); NaN where they are not known.
        means: The entries (n,) that move means.
        scales: Those that move scales.
        residual: The largest error, relative to `size`.
        size: The largest gradient.
        copies: The draws of each mean.
    """

    coefficients: Tensor
    means: Tensor
    scales: Tensor
    residual: float
    size: float
    copies: float = 1.0

    @property
    def of_means(self) -> Tensor:
        """A and B, of the entries that move means."""
        return self.coefficients[:2, self.means]

    @property
    def of_scales(self) -> Tensor:
        """C and D, of the entries that move scales."""
        return self.coefficients[2:, self.scales]

    @property
    def typical(self) -> tuple[float, float, float]:
        """Median A, C and D."""
        found = [float(t.nanmedian()) for t in (self.of_means[0], *self.of_scales)]
        a, c, d = (v if abs(v) > 1e-9 * max(map(abs, found)) else 0.0 for v in found)
        return a, c, d

    @property
    def weight(self) -> float:
        """The weight of log sigma, per latent of one example."""
        weights = -self.of_scales[1] if self.scales.any() else self.of_means[0]
        counted = weights[weights.abs() > _zero(weights)]  # a padding is not
        return self.copies * float(counted.nanmedian()) if counted.numel() else math.nan

    @property
    def is_kl(self) -> bool:
        """Whether it is a KL divergence to Gaussians."""
        if self.residual > NEAR or not self.means.any():
            return False
        a, c, d = self.of_means[0], self.of_scales[0], -self.of_scales[1]
        if not c.numel():  # sigma is a constant
            return bool((a > 0).all()) and _same(a, a[0])
        masked = (c.abs() <= _zero(c)) & (d.abs() <= _zero(d))
        if not bool(a.isfinite().any()):  # it says nothing of the means
            a = c
        elif bool(masked.any()):
            a = a[~(a.abs() <= _zero(a))]
        a, c, d = a[a.isfinite()], c[~masked & c.isfinite()], d[~masked & d.isfinite()]
        if not (a.numel() and d.numel()) or not all((t > 0).all() for t in (a, c, d)):
            return False
        if len(a) == len(c):
            return _same(a.sort().values, c.sort().values)
        return _same(a.min(), c.min()) and _same(a.max(), c.max())

    @property
    def of_diagonal(self) -> bool:
        """Whether it is a KL in the entries of a factor L that move log det L, without others."""
        _, _, c, d = self.coefficients
        others = self.scales & d.isnan() & (c.abs() <= _zero(self.of_scales[0]))
        return bool(others.any()) and replace(self, scales=self.scales & ~others).is_kl

    @property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Means, and standard deviations, of the prior, by entry."""
        (a, b), (c, d) = self.of_means, self.of_scales
        means, stds = -b / a, (-d / c).clamp(min=0).sqrt()
        return means[a > _zero(a)], stds[-d > _zero(d)]

    @property
    def common_prior(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the prior, if they are the same for all entries."""
        if not all(t.numel() and float(t.max() - t.min()) < 1e-6 for t in self.prior):
            return None
        mean, std = (float(t[0]) for t in self.prior)
        return mean, std

    @property
    def is_standard(self) -> bool:
        """Whether the prior is N(0, 1)."""
        mean, std = self.prior
        known = bool(std.numel()) or not self.scales.any()
        return known and bool((mean.abs() < NEAR).all() and ((std - 1).abs() < NEAR).all())


def _zero(t: Tensor) -> Tensor:
    """What counts as zero among some coefficients."""
    return 1e-9 * t.nan_to_num().abs().amax().clamp(min=1e-300) if t.numel() else t.new_zeros(())


def _same(a: Tensor, b: Tensor | float) -> bool:
    return bool(((a - b).abs() <= NEAR * (a.abs() + abs(b))).all())


# --- reading the gradients ----------------------------------------------------------------------


def fit_moments(p: Probes, copies: float = 1.0) -> Fit:
    """The coefficients of a loss by entry of the heads."""
    means, scales = p.moving
    uses = torch.stack([means, means, scales, scales])
    found, error = _solve(p.moments * uses[:, None], p.loss)
    size = float(p.loss.abs().max())
    squares, logs = p.moments[0].abs().amax(0), p.moments[3].abs().amax(0)
    uses[0] &= squares > 1e-12  # where the squares of means have a constant sum, A is not known
    uses[3] &= logs > 1e-11 * logs.max()
    active = (p.moments.abs() > 1e-14).any(0).sum(0)  # places: a ReLU may be off at most of them
    found = torch.where(uses & (active >= uses.sum(0)), found, math.nan)
    return Fit(found, means, scales, error / max(size, 1e-300), size, copies)


def _solve(rows: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Coefficients (k, n) of rows (k, T, n) in y (T, n) by entry, and the largest residual."""
    if y.shape[1] == 0:
        return rows.new_zeros(len(rows), 0), 0.0
    a = rows.permute(2, 1, 0)
    size = a.abs().amax(1, keepdim=True).clamp(min=1e-300)
    found = torch.linalg.lstsq(a / size, y.T[..., None], driver="gelsd").solution
    error = float((a / size @ found - y.T[..., None]).abs().max())
    return (found / size.mT)[..., 0].T, error


NONE = torch.zeros(0, dtype=torch.bool)
UNKNOWN = Fit(torch.zeros(4, 0), NONE, NONE, math.inf, math.nan)


class LogQ(NamedTuple):
    """The log-density of the posterior in a loss.

    `weight` is that of one latent, and `each` has the shape of z. If not `drawn`, it is the mean
    of log q over draws.
    """

    weight: float
    drawn: bool
    each: Tensor


@dataclass
class View(OfLatent):
    """A value as a function of the heads of a latent, with other values held.

    Args:
        prober: Moves the heads.
        target: The value, such as the loss.
        held: The values that are held, such as the results of the decoder's first layers.
    """

    target: int
    held: dict[int, Tensor]

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads that are moved."""
        return self.prober.heads

    def at(self, over: Over) -> Tensor:
        """The value, with other values replaced as well."""
        return self.graph.run({**self.held, **over}, [self.target])[self.target]

    @cached_property
    def by_draws(self) -> bool:
        """Whether it depends on the noise as well."""
        return self.target in self.graph.downstream(self.latent.noise, stop=self.held)

    @cached_property
    def probes(self) -> Probes | None:
        """Its gradients in the heads; None if they are not finite."""
        if not self.prober.usable:
            return None
        return self.prober.measure(self.target, self.held, self.by_draws)

    @cached_property
    def fit(self) -> Fit:
        """Its coefficients."""
        if self.probes is None:
            return UNKNOWN
        sizes = [self.graph[i].numel for i in self.heads]
        moved = zip(self.heads, self.probes.moving[0].split(sizes), strict=True)
        each = [row.view(self.graph[i].shape) for i, row in moved]
        # a ReLU may be off for some examples
        means = sum(len(t) * int(t.any(0).sum()) if t.ndim > 1 else int(t.sum()) for t in each)
        copies = self.graph[self.latent.z].numel / max(1, means)
        return fit_moments(self.probes, max(copies, 1.0))

    @property
    def flat(self) -> bool:
        """Whether it does not depend on the heads."""
        if self.probes is None:
            return False
        return self.fit.size <= 1e-9 * (1 + max(abs(v) for v in self.probes.values))

    @cached_property
    def way(self) -> set[int]:
        """The values between the heads, or z, and the target."""
        after = self.graph.downstream([*self.heads, self.latent.z], stop=self.held)
        return after & self.graph.upstream([self.target], stop=self.held)

    def passes(self, *names: str) -> bool:
        """Whether there is an operation of one of these names on the way."""
        nodes = (n for n in self.graph.nodes if self.way.intersection(n.outs))
        return any(n.name.rstrip("_") in names for n in nodes)

    @property
    def clamped(self) -> bool:
        """Whether the way goes through a clamp."""
        return self.passes("clamp", "clamp_min", "clamp_max", "minimum", "maximum", "min", "max",
                           "threshold", "relu", "where", "hardtanh", "floor", "round",
                           "sign")  # fmt: skip

    @property
    def where(self) -> str:
        """The line of the first operation on the heads that is no part of z."""
        own = self.way - self.graph.upstream([self.latent.z]) - set(self.held)
        from_heads = self.way | {self.latent.z}
        for node in self.graph.nodes:
            if node.where and own.intersection(node.outs) and from_heads.intersection(node.ins):
                return node.where
        return ""

    @cached_property
    def log_q(self) -> LogQ | None:
        """What it has of log q(z), with z held.

        None if it depends on the heads otherwise than by log q(z), or by the entropy of q.
        """
        prober, graph, latent = self.prober, self.graph, self.latent
        if not latent.diagonal or not prober.usable:
            return None
        rows, features = [], []
        generator = torch.Generator().manual_seed(13)
        live = graph.upstream([self.target], stop=self.held)
        draws = {latent.z: latent.draws[0], **{z: d for d, z in latent.siblings}}
        draws = {z: d for z, d in draws.items() if z in live} or draws  # those that are scored
        count = sum(graph[z].numel for z in draws) / graph[latent.z].numel
        for place in prober.places:
            over = {**prober.fixed, **place}
            fixed = {}
            for z, draw in draws.items():
                noise = torch.rand(graph[draw].shape, generator=generator).double() - 0.5
                fixed[z] = graph.value({**over, draw: noise}, z)
            rows.append(gradient(self.at({**over, **fixed}).sum(), place))
            mean, sigma = latent.moments(graph, over)
            squares = [(0.5 * ((z - mean) / sigma) ** 2).sum() for z in fixed.values()]
            pair = torch.stack(squares).sum(), count * sigma.abs().log().sum()
            features.append(torch.stack([gradient(t, place) for t in pair]))
        y, x = torch.stack(rows), torch.stack(features, 1)
        size = float(y.abs().max())
        found, error = _solve(x, y)
        moved = (x.abs() > 1e-14).any(0).any(0)
        if size == 0 or not y.isfinite().all() or error > NEAR * size or not moved.any():
            return None
        scales = (x[1].abs() > 1e-14).any(0)
        square, weights = -found[0], -found[1][scales]
        if not bool((weights > 0).all()):
            return None
        drawn = _same(square[scales], weights) and bool((square[moved] > 0).all())
        if not drawn and float(square[moved].abs().max()) > EXACT * float(weights.max()):
            return None
        each = prober.by_latent(torch.where(scales, -found[1], 0.0))
        return LogQ(float(weights.median()) * count, drawn, each * count)

    @property
    def wider(self) -> bool:
        """Whether it depends on entries of the heads that z is not drawn with."""
        p = self.probes
        others = p.loss[:, ~(p.moving[0] | p.moving[1])] if p is not None else torch.zeros(0)
        return bool((others.abs() > NEAR * self.fit.size).any())

    @property
    def misscored(self) -> bool:
        """Whether z is scored by some density of each latent, which is not that of its draw."""
        zs = {i: self.graph.get(i) for i in self.latent.zs}
        scored = replace(self, held={**self.held, **zs})
        mixture = scored.passes("logsumexp", "_softmax", "_log_softmax")
        if not self.by_draws or self.log_q is not None or mixture:
            return False
        return scored.additive and not scored.flat and not scored.fit.is_kl

    def reading(self) -> str | None:
        """The reading of the second head, which may move nothing, of which it is the KL."""
        p = self.probes
        if p is None or (p.moving[1].any() and self.wider):
            return None
        means, scales = p.moving
        scales = scales if scales.any() else ~means
        means, scales = means & ~scales, scales & ~means
        if not (means.any() and scales.any()):
            return None
        near = NEAR * self.fit.size
        squares, error = _solve(p.moments[:2][:, :, means], p.loss[:, means])
        weight = float(squares[0].median())
        if error > near or weight <= 0 or not _same(squares[0], weight):
            return None
        for name, reading in READINGS.items():
            b = p.heads[:, scales].clone().requires_grad_()
            s = reading.sigma(b)
            if name == "unit variance" or not bool((s > 0).all() and s.isfinite().all()):
                continue
            rows = [gradient(t.sum(), {0: b}).view_as(b) for t in (0.5 * s**2, s.log())]
            (c, d), error = _solve(torch.stack(rows), p.loss[:, scales])
            if error <= near and _same(c, weight) and _same(-d, weight):
                return name
        return None

    @property
    def additive(self) -> bool:
        """Whether the gradient in the heads of one latent does not depend on those of others."""
        prober, p = self.prober, self.probes
        if p is None or not prober.latent.diagonal:
            return False
        entries = prober.latents()
        size = prober.graph[prober.latent.z].numel
        chosen = torch.rand(size + 1, generator=torch.Generator().manual_seed(17)) < 0.5
        chosen[size] = False  # of entries that move no latent
        kept = chosen[entries.clamp(-1, size)]
        if not kept.any() or kept.all():
            return False
        sizes = [t.numel() for t in prober.places[0].values()]
        place = {
            i: torch.where(keep.view(t.shape), t, prober.places[1][i]).detach().requires_grad_()
            for (i, t), keep in zip(prober.places[0].items(), kept.split(sizes), strict=True)
        }
        now = prober.measure(self.target, self.held, self.by_draws, [place])
        if now is None:
            return False
        change = (now.loss[0] - p.loss[0])[kept].abs().max()
        return float(change) <= EXACT * self.fit.size


# --- where to look ------------------------------------------------------------------------------

LINEAR = {"add", "add_", "sub", "sub_", "rsub", "neg", "neg_", "sum", "mean", "_to_copy", "stack",
          "cat", "view", "_unsafe_view", "squeeze", "unsqueeze", "expand", "select", "t",
          "transpose", "permute", "clone", "lift_fresh", "copy_"}  # fmt: skip
SCALED = {"mul", "mul_", "div", "div_"}


def terms(graph: Graph, loss: int, stop: Collection[int] = ()) -> list[int]:
    """The values that a loss is a linear combination of, none beyond those in `stop`."""
    found, seen, todo = [], set(), [loss]
    while todo:
        i = todo.pop()
        if i not in seen:
            seen.add(i)
            summands = _summands(graph, graph[i].node) if i not in stop else []
            todo += summands
            found += [] if summands else [i]
    return found


def _summands(graph: Graph, node: Node | None) -> list[int]:
    """The values of which the result of an operation is a linear combination."""
    inputs = [j for j in node.ins if graph[j].floating] if node is not None else []
    if node is None or node.name not in SCALED:
        return inputs if node is not None and node.name in LINEAR else []
    moving = [j for j in node.ins if graph[j].origin or graph[j].draws]
    moving = [j for j in moving if graph[j].floating or graph[j].numel > 1]
    counts = [j for j in moving if graph[j].numel == 1 and graph[j].origin == Origin.DATA]
    moving = [j for j in moving if j not in counts or graph[j].draws]  # as of a mask
    is_scaled = len(moving) == 1 and (node.name[:3] != "div" or moving[0] == inputs[0])
    return moving if is_scaled else []


def data_terms(graph: Graph, latents: list[Latent], loss: int) -> list[int]:
    """The terms of a loss in which data take part that do not come by the latents."""
    stop = own_values(latents)
    return [
        t
        for t in terms(graph, loss, stop)
        if t not in stop
        and any(
            graph[i].kind in ("data", "random") and graph[i].node is None
            for i in graph.upstream([t], stop=stop)
        )
    ]


def penalized_heads(graph: Graph, loss: int, latents: list[Latent]) -> list[int]:
    """The outputs of layers, of data, that reach a loss by several terms of their own alone.

    In these, nothing is compared with data, and nothing is drawn: the log variance and its
    exponential, say, in the KL of a latent whose noise was forgotten.
    """
    own = own_values(latents)
    after = graph.downstream(own)
    found = terms(graph, loss, own)
    alone: dict[int, list[int]] = {}
    for t in found:
        heads = frontier(graph, [t], own)
        beside = graph.upstream([t], stop=heads) - set(heads)
        if not after.intersection(heads) and all(graph[i].kind != "data" for i in beside):
            alone[t] = [] if any(graph[i].draws for i in beside) else heads
    outputs = {i: n for heads in alone.values() for i in heads if (n := graph[i].node)}
    reached = {
        i: graph.downstream([i]).intersection(found)
        for i, node in outputs.items()
        if node.name in (*PRODUCTS, "add") and graph[i].origin & Origin.DATA
    }
    return [i for i, own in reached.items() if len(own) > 1 and alone.keys() >= own]


def log_weights(graph: Graph, latent: Latent, loss: int, decoder: Over) -> list[int]:
    """The log weights of an importance-weighted bound.

    They are what is exponentiated, or given to a softmax, and depends both on what is decoded and
    on the latent otherwise.
    """
    after = graph.downstream([latent.z, *latent.heads], stop=decoder) - set(decoder)
    both = after & graph.downstream(decoder) & graph.upstream([loss])
    found: list[int] = []
    for node in graph.nodes:
        if node.name not in ("logsumexp", "_softmax", "_log_softmax", "exp", "exp_"):
            continue
        if any(graph[n.outs[0]].numel == graph[n.ins[0]].numel for n in _sums(graph, node)):
            continue  # of a single weight
        given, cut = node.ins[0], graph[node.ins[0]].node
        if cut is not None and cut.name == "sub" and given in both:  # the largest is subtracted
            whole, *largest = cut.ins
            alone = graph.upstream(largest, stop=[whole]) & (after | graph.downstream(decoder))
            given = whole if alone <= {whole, *largest} else given
        found += [given] if given in both and both.intersection(node.outs) else []
    found = [i for i in dict.fromkeys(found) if i not in latent.heads]
    return [i for i in found if move_together(graph, i, decoder, latent.heads, decoder)]


def _sums(graph: Graph, node: Node) -> list[Node]:
    """The operations that sum exponentials."""
    if node.name == "logsumexp":
        return [node]
    return [n for o in node.outs for n in graph[o].users if n.name in ("sum", "mean")]


def move_together(graph: Graph, i: int, held: Over, *groups: Collection[int]) -> bool:
    """Whether each of some groups of values moves a common entry of a value."""
    moved = ({**held, **{k: graph.get(k) + 0.37 for k in ids}} for ids in groups)
    return bool(torch.stack([graph.value(over, i) != graph.get(i) for over in moved]).all(0).any())


def inner_values(view: View, most: int = 12) -> list[int]:
    """The values between the heads and the target of which it is no linear function.

    The last are first.
    """
    graph = view.graph
    inside = view.way - graph.upstream([view.latent.z]) - set(view.held)
    found: list[int] = []
    for node in reversed(graph.nodes):
        moving = [i for i in dict.fromkeys(node.ins) if i in inside and graph[i].floating]
        outs = [o for o in node.outs if o in inside and graph[o].floating]
        if outs and moving and not is_linear(graph, node, moving):
            found += moving
    return list(dict.fromkeys(found))[:most]


def is_linear(graph: Graph, node: Node, moving: list[int]) -> bool:
    """Whether the result of an operation is affine in some arguments, and depends on them."""
    base = {i: graph.get(i) for i in moving}
    out = next(o for o in node.outs if graph[o].floating)
    zero, one, two, minus = (
        graph.value({i: k * t for i, t in base.items()}, out) for k in (0.0, 1.0, 2.0, -1.0)
    )
    size = 1e-9 * (one.abs() + zero.abs())
    straight = (two - 2 * one + zero).abs() <= size, (minus + one - 2 * zero).abs() <= size
    return bool(straight[0].all() and straight[1].all()) and not torch.equal(one, zero)


# --- what is sampled ----------------------------------------------------------------------------


def sampled_scale(prober: Prober) -> Curve | None:
    """The name of sigma as a function of the head that moves it; None if no one head does."""
    graph, latent = prober.graph, prober.latent
    if not latent.diagonal or not prober.usable:
        return None
    means, scales = prober.moving
    scales = scales & ~means
    if not scales.any():
        return None
    b = torch.linspace(-60, 60, 121, dtype=torch.float64)
    masks = scales.split([graph[i].numel for i in prober.heads])
    (draw,) = latent.draws
    place = {i: t.detach() for i, t in prober.places[0].items()}
    none = torch.zeros_like(graph.get(draw))
    graph.value({**place, draw: none}, latent.z)  # what does not depend on these is known then

    def of(x: Tensor) -> Tensor:
        """Sigma, as the derivative of z in its noise: exact beside a large mean."""
        over = {
            i: torch.where(mask.view(graph[i].shape), x, place[i])
            for i, mask in zip(prober.heads, masks, strict=True)
        }
        z = lambda e: graph.run({**over, draw: e}, [latent.z])[latent.z].sum()  # noqa: E731
        return torch.func.grad(z)(none).reshape(-1)

    sigma = each(of, b)
    spread = (sigma.amax(0) - sigma.amin(0)).nan_to_num(0.0)
    column = sigma[:, int(spread.argmax())].abs()
    usable = column.isfinite()
    return name_curve(b[usable], column[usable], 1e-6) if usable.any() else None
