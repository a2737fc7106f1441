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

from musigma.audit.graph import Graph, Node
from musigma.audit.latents import Latent
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
    "sampled_scale",
    "terms",
]

EXACT = 1e-6  # relative error of gradients up to which two formulas are one
NEAR = 1e-3  # up to which they differ by a floor or an offset


@dataclass
class Fit:
    """The coefficients of a loss by entries of the heads that move means, and that move scales.

    `mean` holds A and B (2, m), `scale` C and D (2, s). `residual` is relative to the largest
    gradient, `size` that gradient; `copies` counts the draws of each mean.
    """

    mean: Tensor
    scale: Tensor
    residual: float
    size: float
    copies: float = 1.0

    def __neg__(self) -> Fit:
        """The coefficients of the negative."""
        return replace(self, mean=-self.mean, scale=-self.scale)

    @property
    def typical(self) -> tuple[float, float, float]:
        """Median A, C and D."""
        a, c, d = (float(t.nanmedian()) for t in (self.mean[0], self.scale[0], self.scale[1]))
        return a, c, d

    @property
    def weight(self) -> float:
        """The weight of log sigma, per latent of one example."""
        weights = -self.scale[1] if self.scale.numel() else self.mean[0]
        counted = weights[weights.abs() > _zero(weights)]  # a padding is not
        return self.copies * float(counted.nanmedian()) if counted.numel() else math.nan

    @property
    def is_kl(self) -> bool:
        """Whether it is a KL divergence to Gaussians."""
        if self.residual > NEAR or not self.mean.numel():
            return False
        a, c, d = self.mean[0], self.scale[0], -self.scale[1]
        if not self.scale.numel():  # sigma is a constant
            return bool((a > 0).all()) and _same(a, a[0])
        masked = (c.abs() <= _zero(c)) & (d.abs() <= _zero(d))
        if not bool(a.isfinite().any()):  # it says nothing of the means
            a = c
        elif bool(masked.any()):
            a = a[~(a.abs() <= _zero(a))]
        a, c, d = a[a.isfinite()], c[~masked], d[~masked & d.isfinite()]
        if not (a.numel() and d.numel()) or not (
            min(float(a.min()), float(c.min()), float(d.min())) > 0
        ):
            return False
        if len(a) == len(c) and not _same(a.sort().values, c.sort().values):
            return False
        return _same(a.min(), c.min()) and _same(a.max(), c.max())

    @property
    def of_diagonal(self) -> bool:
        """Whether it is a KL in the entries of a factor L that move log det L, without others."""
        others = self.scale[1].isnan() & (self.scale[0].abs() <= _zero(self.scale[0]))
        return bool(others.any()) and replace(self, scale=self.scale[:, ~others]).is_kl

    @property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Means, and standard deviations, of the prior, by entry."""
        known = self.scale[:, -self.scale[1] > _zero(self.scale[1])]
        means = self.mean[:, self.mean[0] > _zero(self.mean[0])]
        return -means[1] / means[0], (-known[1] / known[0]).clamp(min=0).sqrt()

    @property
    def is_standard(self) -> bool:
        """Whether the prior is N(0, 1)."""
        mean, std = self.prior
        known = std.numel() or not self.scale.numel()
        return bool(known) and bool((mean.abs() < NEAR).all() and ((std - 1).abs() < NEAR).all())


def _zero(t: Tensor) -> Tensor:
    """What counts as zero among some coefficients."""
    return 1e-9 * t.nan_to_num().abs().amax().clamp(min=1e-300) if t.numel() else t.new_zeros(())


# --- reading the gradients ----------------------------------------------------------------------


def _same(a: Tensor, b: Tensor, tolerance: float = NEAR) -> bool:
    return bool(((a - b).abs() <= tolerance * (a.abs() + b.abs())).all())


def fit_moments(p: Probes, copies: float = 1.0) -> Fit:
    """The coefficients of a loss by entry of the heads."""
    means, scales = p.moving
    size, worst = float(p.loss.abs().max()), 0.0
    parts: dict[str, list[Tensor]] = {"mean": [], "scale": []}
    for at, rows in (
        (means & ~scales, {"mean": (0, 1)}),
        (scales & ~means, {"scale": (2, 3)}),
        (means & scales, {"mean": (0, 1), "scale": (2, 3)}),
    ):
        columns = [k for pair in rows.values() for k in pair]
        found, error = _solve(p.moments[columns][:, :, at], p.loss[:, at])
        for n, name in enumerate(rows):
            parts[name].append(found[2 * n : 2 * n + 2])
        worst = max(worst, error)
    others = p.loss[:, ~(means | scales)].abs()
    worst = max(worst, float(others.max()) if others.numel() else 0.0)
    mean, scale = (torch.cat(parts[name], 1) for name in ("mean", "scale"))
    fixed = (p.moments[0].abs() <= 1e-12).all(0)  # means whose squares have a constant sum
    order = [torch.cat([torch.arange(len(means))[at] for at in rows]) for rows in (
        (means & ~scales, means & scales), (scales & ~means, means & scales))]  # fmt: skip
    none = 1e-11 * float(p.moments[3].abs().max())
    lone = (p.moments[3].abs() <= none).all(0)[order[1]]  # no part in log sigma
    scale = torch.stack([scale[0], torch.where(lone, math.nan, scale[1])])
    mean = torch.stack([torch.where(fixed[order[0]], math.nan, mean[0]), mean[1]])
    return Fit(mean, scale, worst / max(size, 1e-300), size, copies)


def _solve(rows: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Coefficients (k, n) of rows (k, T, n) in y (T, n) by entry, and the largest residual."""
    if y.shape[1] == 0:
        return rows.new_zeros(len(rows), 0), 0.0
    a = rows.permute(2, 1, 0)
    size = a.abs().amax(1, keepdim=True).clamp(min=1e-300)
    found = torch.linalg.lstsq(a / size, y.T[..., None], driver="gelsd").solution
    error = float((a / size @ found - y.T[..., None]).abs().max())
    return (found / size.mT)[..., 0].T, error


UNKNOWN = Fit(torch.zeros(2, 0), torch.zeros(2, 0), math.inf, math.nan)


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
        sign: -1 for a value that contains the negative of a KL, such as a log weight.
    """

    target: int
    held: dict[int, Tensor]
    sign: float = 1.0

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
        draws = [*self.latent.draws, *(d for d, _ in self.latent.siblings)]
        return self.target in self.graph.downstream(draws, stop=self.held)

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
        means = int(self.probes.moving[0].sum())
        copies = self.graph[self.latent.z].numel / max(1, means)
        fit = fit_moments(self.probes, copies if copies >= 1 else 1.0)
        return fit if self.sign > 0 else -fit

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
            f = self.sign * self.at({**over, **fixed})
            rows.append(gradient(f.sum(), place))
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
        zs = {i: self.graph.get(i) for i in (self.latent.z, *(z for _, z in self.latent.siblings))}
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
        near, loss = NEAR * self.fit.size, self.sign * p.loss
        squares, error = _solve(p.moments[:2][:, :, means], loss[:, means])
        if not (means.any() and scales.any()) or error > near:
            return None
        weight = float(squares[0].median())
        if weight <= 0 or not _same(squares[0], squares[0].median()):
            return None
        for name, reading in READINGS.items():
            b = p.heads[:, scales].clone().requires_grad_()
            s = reading.sigma(b)
            if name == "unit variance" or not s.isfinite().all() or not (s > 0).all():
                continue
            parts = (0.5 * s**2, s.log())
            rows = [torch.autograd.grad(t.sum(), b, retain_graph=True)[0] for t in parts]
            found, error = _solve(torch.stack(rows), loss[:, scales])
            fits = error <= near and _same(found[0], torch.tensor(weight))
            if fits and _same(-found[1], torch.tensor(weight)):
                return name
        return None

    @property
    def additive(self) -> bool:
        """Whether the gradient in the heads of one latent does not depend on those of others."""
        prober, p = self.prober, self.probes
        if p is None or not prober.latent.diagonal:
            return False
        entries = prober.latents().round().long()
        size = prober.graph[prober.latent.z].numel
        chosen = torch.rand(size, generator=torch.Generator().manual_seed(17)) < 0.5
        kept = chosen[entries.clamp(0, size - 1)] & (entries >= 0) & (entries < size)
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
    found, seen = [], set()
    todo = [loss]
    while todo:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        node = graph[i].node if i not in stop else None
        inputs = [j for j in node.ins if graph[j].floating] if node is not None else []
        if node is not None and node.name in LINEAR:
            todo += inputs
        elif node is not None and node.name in SCALED:
            moving = [j for j in node.ins if graph[j].origin or graph[j].draws]
            moving = [j for j in moving if graph[j].floating or graph[j].numel > 1]
            scaled = len(moving) == 1 and (node.name[:3] != "div" or moving[0] == inputs[0])
            todo += moving if scaled else []
            found += [] if scaled else [i]
        else:
            found.append(i)
    return found


def data_terms(graph: Graph, latents: list[Latent], loss: int) -> list[int]:
    """The terms of a loss in which data take part that do not come by the latents."""
    stop = {i for latent in latents for i in (latent.z, *latent.heads)}
    return [
        t
        for t in terms(graph, loss, stop)
        if t not in stop
        and any(
            graph[i].kind in ("data", "random") and graph[i].node is None
            for i in graph.upstream([t], stop=stop)
        )
    ]


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
        given, cut = node.ins[0], graph[node.ins[0]].node
        if cut is not None and cut.name == "sub" and given in both:  # the largest is subtracted
            whole, *largest = cut.ins
            alone = graph.upstream(largest, stop=[whole]) & (after | graph.downstream(decoder))
            given = whole if alone <= {whole, *largest} else given
        found += [given] if given in both and both.intersection(node.outs) else []
    heads, held = ({i: graph.get(i) + 0.3 for i in ids} for ids in (latent.heads, decoder))

    def is_weight(i: int) -> bool:
        by_heads, by_decoder = (
            graph.value({**decoder, **over}, i) != graph.get(i) for over in (heads, held)
        )
        return bool((by_heads & by_decoder).any())

    return [i for i in dict.fromkeys(found) if i not in latent.heads and is_weight(i)]


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
