"""The prior in a KL divergence whose mean and scale are computed, and the constants of a KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import REDUCTIONS, Latent, frontier
from musigma.audit.probes import Over, Prober, Probes
from musigma.audit.step_kl import LINEAR, Divergence, Fit, fit_moments, terms

__all__ = ["kl_offset", "log_normalizer", "prior_error"]


def prior_error(graph: Graph, latent: Latent, loss: int, d: Divergence) -> float | None:
    r"""How far the loss is from a KL to the prior when the heads of the prior are moved.

    The loss as a function of the heads of q has shown the prior's mean c and scale p. With other
    values for the prior's own heads, these become c' and p', and the loss must change by
    KL(q | N(c', p')) - KL(q | N(c, p)): a loss without log p, say, does not.

    Returns:
        The error relative to the change; None if the prior has no heads, or if more than the
        prior changes.
    """
    if d.fit is None or not latent.diagonal:
        return None
    own = _prior_heads(graph, latent, loss, d)
    if not own:
        return None
    generator = torch.Generator().manual_seed(29)
    moved = {
        i: graph.get(i) + 0.6 * torch.rand(graph[i].shape, generator=generator).double()
        for i in own
    }
    found = []
    for fixed in ({i: graph.get(i) for i in own}, moved):
        prober = Prober(graph, latent, d.heads, fixed)
        probes = prober.measure(loss, d.held, d.by_draws) if prober.usable else None
        if probes is None:
            return None
        fit = fit_moments(probes, d.fit.copies)
        if not fit.is_kl:
            return None
        found.append((prober, probes, fit))
    weights = [-fit.scale[1] for _, _, fit in found]
    if not torch.allclose(weights[0], weights[1], rtol=1e-4):
        return None
    values = [_divergences(*each) for each in found]
    if values[0] is None or values[1] is None:
        return None
    losses = [torch.tensor(probes.values) for _, probes, _ in found]
    expected = values[1] - values[0]
    error = (losses[1] - losses[0] - expected).abs().max()
    size = expected.abs().max() + (losses[1] - losses[0]).abs().max()
    return float(error / size) if float(size) > 1e-9 else 0.0


def _prior_heads(graph: Graph, latent: Latent, loss: int, d: Divergence) -> list[int]:
    """The values by layers, or parameters, that meet the heads of q entry by entry."""
    live = graph.upstream([loss], stop=d.held)
    own = {latent.z, *latent.heads}
    region, todo = set(own), list(own)
    sides: list[int] = []
    met: list[int] = []
    after = graph.downstream(own, stop=d.held) - set(d.held)
    while todo:
        i = todo.pop()
        for node in graph[i].users:
            outs = [o for o in node.outs if o in live and o not in d.held]
            if not outs or not (node.pointwise or node.view) or node.name in REDUCTIONS:
                continue
            beside = [k for k in node.ins if k not in after]
            sides += beside
            met += outs if beside else []
            todo += [o for o in outs if o not in region]
            region.update(outs)
    sides = [i for i in dict.fromkeys(sides) if graph[i].origin & Origin.PARAMETERS]
    found = [i for i in frontier(graph, sides, stops=own | set(d.held)) if i not in own]
    return [i for i in found if _meets(graph, d, i, met)]


def _meets(graph: Graph, d: Divergence, i: int, met: list[int]) -> bool:
    """Whether a value moves an entry of some values that the heads of q move as well."""
    moved = {h: graph.get(h) + 0.37 for h in d.heads}
    for o in met:
        base = graph.get(o)
        by_heads, by_it = (graph.value({**d.held, **over}, o) != base
                           for over in (moved, {i: graph.get(i) + 0.37}))  # fmt: skip
        if bool((by_heads & by_it).any()):
            return True
    return False


def _divergences(prober: Prober, probes: Probes, fit: Fit) -> Tensor | None:
    """The weighted KL at each place, by the prior that the fit has found."""
    entries = prober.latents().round().long()
    means, scales = probes.moving
    order = [entries[means & ~scales], entries[scales & ~means]]
    if (means & scales).any() or not all(len(o) for o in order):
        return None
    c, p = fit.prior
    values = []
    for place in prober.places:
        over: Over = {**prober.fixed, **place}
        with torch.no_grad():
            mean, sigma = prober.latent.moments(prober.graph, over)
        mean, sigma = mean.reshape(-1), sigma.abs().reshape(-1)
        n = mean.numel()
        centre, width, weight = mean.new_zeros(n), mean.new_ones(n), mean.new_zeros(n)
        if max(len(o) for o in order) != n or len(order[0]) != len(order[1]):
            return None
        centre[order[0]], width[order[1]], weight[order[1]] = c, p, -fit.scale[1]
        square = (sigma**2 + (mean - centre) ** 2) / (2 * width**2)
        values.append((weight * (square + (width / sigma).log() - 0.5)).sum())
    return torch.stack(values)


def kl_offset(graph: Graph, latent: Latent, loss: int, d: Divergence) -> float | None:
    """What is left of the KL where q is the prior, in nats; None if it is not known.

    The prior is the one normal distribution of all latents that the coefficients are of.
    """
    if d.fit is None or not latent.diagonal or d.by_draws:
        return None
    centre, width = d.fit.prior
    if not (centre.numel() and width.numel()):
        return None
    if any(float(t.max() - t.min()) > 1e-6 for t in (centre, width)):
        return None
    after = graph.downstream([latent.z, *d.heads], stop=d.held)
    parts = _subtotals(graph, latent, loss, after, d.held)
    if not parts:
        return None
    leaves = {i: graph.get(i).double().clone().requires_grad_() for i in parts}
    value = graph.run({**d.held, **leaves}, [loss])[loss]
    if not value.requires_grad:
        return None
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    if any(s is None for s in slopes):
        return None
    prober = Prober(graph, latent, d.heads)
    place = prober.places[0]
    now = graph.run({**d.held, **{i: t.detach() for i, t in place.items()}}, parts)
    got = sum(float((s * now[i]).sum()) for s, i in zip(slopes, parts, strict=True))
    with torch.no_grad():
        mean, sigma = latent.moments(graph, place)
    weight = -float(d.fit.scale[1].nanmedian())
    if float((-d.fit.scale[1] - weight).abs().max()) > 1e-6 * weight:
        return None
    c, p = centre[0], width[0]
    kl = 0.5 * ((mean - c) ** 2 + sigma**2) / p**2 - 0.5 - (sigma.abs() / p).log()
    return (got - weight * float(kl.sum())) / weight


def _subtotals(graph: Graph, latent: Latent, loss: int, after: set[int], held: Over) -> list[int]:
    """The largest sums in a loss whose terms all depend on the heads, with the decoder held."""
    found: list[int] = []
    todo = [loss]
    stop = {*latent.heads, latent.z, *held}
    mixed = {i for i in held if i in graph.downstream([latent.z])}
    while todo:
        i = todo.pop()
        parts = [t for t in terms(graph, i, stop) if graph[t].origin or graph[t].draws]
        own = [t for t in parts if t in after and t not in held]
        if any(mixed.intersection(graph.upstream([t], stop=stop)) for t in own):
            return []  # a product with what is decoded
        if not own:
            continue
        node = graph[i].node
        if len(own) == len(parts):
            found.append(i)
        elif node is not None and (node.name in LINEAR or node.name in ("mul", "div")):
            todo += [j for j in node.ins if graph[j].floating]
        else:
            return []
    return list(dict.fromkeys(found))


def log_normalizer(
    graph: Graph, latent: Latent, loss: int, d: Divergence, drawn: bool
) -> float | None:
    r"""The logarithm of the integral of the prior in a KL by draws: by latent, or by example.

    With the heads held, the loss is :math:`w (\log q(z) - \log p(z))`. If the prior is a product
    over latents, the slopes of :math:`\log p` along a grid give its shape, and the value of the
    loss its height; if it is a log-sum-exp of Gaussians, their slopes and values do.

    Returns:
        Zero for a density; infinity if it does not fall off; None if it is not known, as of a
        prior that stands in a sum with other terms.
    """
    if d.fit is None or (latent.siblings and not drawn):
        return None
    kl = _Held.of(graph, latent, loss, d, drawn)
    if kl is None:
        return None
    if kl.is_product():
        return _by_grid(kl)
    return _by_components(kl)


@dataclass
class _Held:
    """A KL by draws as a function of z alone, with the heads held.

    `parts` are values of which the loss contains the sum, with `slopes`.
    """

    graph: Graph
    latent: Latent
    over: dict[int, Tensor]
    parts: list[int]
    slopes: tuple[Tensor, ...]
    weight: float
    drawn: bool

    @classmethod
    def of(
        cls, graph: Graph, latent: Latent, loss: int, d: Divergence, drawn: bool
    ) -> _Held | None:
        """From the loss; None if the KL cannot be told from its other terms."""
        own = [latent.z, *latent.heads, *latent.draws, *_prior_heads(graph, latent, loss, d)]
        own += [i for pair in latent.siblings for i in pair]
        parts = _subtotals(graph, latent, loss, graph.downstream(own, stop=d.held), d.held)
        if not parts or d.fit is None:
            return None
        leaves = {i: graph.get(i).double().clone().requires_grad_() for i in parts}
        value = graph.run({**d.held, **leaves}, [loss])[loss].sum()
        if not value.requires_grad:
            return None
        slopes = torch.autograd.grad(value, list(leaves.values()))
        over = {**d.held, **{i: graph.get(i) for i in latent.heads}}
        return cls(graph, latent, over, parts, slopes, d.weight / d.fit.copies, drawn)

    def total(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """w (log q - log p), summed."""
        e = {} if noise is None else {i: noise for i in self.latent.draws}
        zs = dict.fromkeys((self.latent.z, *(i for _, i in self.latent.siblings)), z)
        now = self.graph.run({**self.over, **e, **zs}, self.parts)
        rows = [(s * now[i]).sum() for s, i in zip(self.slopes, self.parts, strict=True)]
        return torch.stack(rows).sum()

    def log_q(self, z: Tensor) -> float:
        """The sum of log q(z), in the form that the loss has it in."""
        mean, sigma = (t.detach() for t in self.latent.moments(self.graph, {}))
        e = self.graph.get(self.latent.draws[0])
        if self.drawn:
            square = ((z - mean) / sigma) ** 2
        elif float((self.total(z, 0 * e) - self.total(z)).abs().detach()) > 1e-9:
            square = e**2
        else:
            square = torch.ones_like(mean)
        return float((-0.5 * square - sigma.abs().log() - 0.5 * math.log(2 * math.pi)).sum())

    def log_p(self, z: Tensor) -> float:
        """The sum of log p(z)."""
        return self.log_q(z) - float(self.total(z).detach()) / self.weight

    def slope(self, z: Tensor) -> Tensor:
        """The slope of log p by latent."""
        mean, sigma = (t.detach() for t in self.latent.moments(self.graph, {}))
        z = z.clone().requires_grad_()
        f = self.total(z)
        g = torch.autograd.grad(f, z)[0] if f.requires_grad else torch.zeros_like(z)
        of_q = (z.detach() - mean) / sigma**2 if self.drawn else 0.0
        return -g / self.weight - of_q

    def is_product(self) -> bool:
        """Whether log p is a sum over latents."""
        generator = torch.Generator().manual_seed(47)
        shape = self.graph[self.latent.z].shape
        z = torch.randn(shape, generator=generator).double()
        kept = torch.rand(shape, generator=generator) < 0.5
        at = self.slope(z)
        change = (at - self.slope(torch.where(kept, z, z + 0.7)))[kept].abs()
        return not kept.any() or float(change.max()) <= 1e-6 * float(at.abs().max() + 1e-12)


def _by_grid(kl: _Held) -> float | None:
    like = torch.zeros_like(kl.graph.get(kl.latent.z))
    t = torch.linspace(-10, 10, 1201, dtype=torch.float64)
    grid = 30 * t.sinh() / math.sinh(10)  # dense at zero
    slopes = torch.stack([kl.slope(like + x).reshape(-1) for x in grid])
    if not slopes.isfinite().all():
        return None
    heights = []
    for step in (1, 2):
        x, y = grid[::step], slopes[::step]
        shape = torch.cumulative_trapezoid(y, x, dim=0)
        shape = torch.cat([torch.zeros_like(shape[:1]), shape])
        ends = torch.maximum(shape[0], shape[-1]) - shape.max(0).values
        if bool((ends > -5).any()):
            return math.inf
        widths = torch.cat([x.diff(), x.new_zeros(1)]) + torch.cat([x.new_zeros(1), x.diff()])
        integrals = torch.logsumexp(shape + (0.5 * widths).log()[:, None], 0)
        heights.append(integrals - shape[len(x) // 2])
    if float((heights[0] - heights[1]).abs().max()) > 2e-3:
        return None  # too narrow for the grid
    return (kl.log_p(like) + float(heights[0].sum())) / like.numel()


def _by_components(kl: _Held) -> float | None:
    """By the Gaussians that a log-sum-exp of the step is taken of, for each example."""
    graph, z = kl.graph, kl.latent.z
    after = graph.downstream([z])
    rows = graph[z].shape[0]
    for node in graph.nodes:
        if node.name != "logsumexp" or node.ins[0] not in after:
            continue
        shape = graph[node.ins[0]].shape
        axes = node.flat[1:-1] if isinstance(node.flat[-1], bool) else node.flat[1:]
        axis = axes[0] if axes and isinstance(axes[0], int) else -1
        axis %= len(shape)
        if len(shape) != 2 or shape[1 - axis] != rows or shape[axis] > 512:
            continue
        weights = _component_weights(graph, z, node.ins[0], axis, rows)
        if weights is None:
            continue
        base = graph.get(z)
        (out,) = node.outs
        told = float(graph.value({z: base}, out).sum())
        each = torch.logsumexp(weights, 0) + (kl.log_p(base) - told) / rows
        return float(each[each.abs().argmax()])
    return None


def _component_weights(graph: Graph, z: int, given: int, axis: int, rows: int) -> Tensor | None:
    """The log weights (K, rows) of Gaussian components; None if they are not Gaussian."""

    def components(t: Tensor) -> tuple[Tensor, Tensor]:
        """Their values (K, rows), and slopes (K, rows, n)."""
        t = t.clone().requires_grad_()
        values = graph.run({z: t}, [given])[given].movedim(axis, 0)
        slopes = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in values]
        return values.detach(), torch.stack(slopes).reshape(len(values), rows, -1)

    zero = torch.zeros_like(graph.get(z))
    value, start = components(zero)
    ends = [components(zero + e)[1] for e in (1.0, 2.0)]
    curvature = ends[0] - start
    bent = (ends[1] - ends[0] - curvature).abs().max()
    if bent > 1e-6 * curvature.abs().max() or not bool((curvature < 0).all()):
        return None
    variance, mean = -1 / curvature, -start / curvature
    height = -0.5 * (mean**2 / variance + variance.log() + math.log(2 * math.pi))
    return value - height.sum(-1)
