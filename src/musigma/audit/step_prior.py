"""The prior in a KL divergence whose mean and scale are computed, and the constants of a KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import REDUCTIONS, Latent, frontier
from musigma.audit.probes import Over, Prober, gradient
from musigma.audit.scales import READINGS
from musigma.audit.step_kl import LINEAR, Divergence, fit_moments, terms

__all__ = ["kl_offset", "log_normalizer", "prior_error"]


@dataclass(frozen=True)
class PriorError:
    """How a loss differs from a KL when the heads of its prior are moved.

    Args:
        size: Relative to the change of the loss.
        of_width: The difference is the weighted sum of the log widths of the prior, or half of it.
    """

    size: float
    of_width: bool


def prior_error(graph: Graph, latent: Latent, loss: int, d: Divergence) -> PriorError | None:
    r"""How far the loss is from a KL to the prior when the heads of the prior are moved.

    The loss as a function of the heads of q has shown the prior's mean c and scale p. With other
    values for the prior's own heads, these become c' and p', and the loss must change by
    KL(q | N(c', p')) - KL(q | N(c, p)): a loss without log p, say, does not.

    Returns:
        None if the prior has no heads, or if more than the prior changes.
    """
    heads, found = _to_priors(graph, latent, loss, d, 2)
    if len(found) < 3:
        return None
    first, *moved = found
    losses = torch.stack([kl.losses - first.losses for kl in moved])
    expected = torch.stack([kl.values - first.values for kl in moved])
    off = losses - expected
    size = float(expected.abs().max() + losses.abs().max())
    changes = torch.tensor([kl.log_widths - first.log_widths for kl in moved])[:, None]
    of_width = any(
        bool((off.abs() - k * changes.abs()).abs().max() < 1e-4 * size) for k in (0.5, 1.0)
    )
    if float(changes.abs().max()) < 1e-6 * float(first.weights.sum()):
        of_width = _has_bare_logarithms(graph, loss, d, heads, found)
    return PriorError(float(off.abs().max()) / size if size > 1e-9 else 0.0, of_width)


def _has_bare_logarithms(
    graph: Graph, loss: int, d: Divergence, heads: list[dict[int, Tensor]], found: list[_ToPrior]
) -> bool:
    """Whether the loss has log widths of a prior, by entries of its heads that do nothing else.

    The slopes in such entries do not depend on the heads of q.
    """
    rows = []
    for fixed, kl in zip(heads, found, strict=True):
        leaves = {i: t.clone().requires_grad_() for i, t in fixed.items()}
        runs = [graph.run({**d.held, **p, **leaves}, [loss])[loss].sum() for p in kl.places[:2]]
        slopes = torch.stack([gradient(f, leaves) for f in runs])
        rows.append((torch.cat([t.reshape(-1) for t in fixed.values()]), slopes))
    slopes = torch.stack([s for _, s in rows], 1)
    least = 1e-6 * slopes.abs().max()
    alone = ((slopes[0] - slopes[1]).abs() < least).all(0) & (slopes[0].abs() > least).all(0)
    expected = float(found[0].weights.sum())
    for reading in READINGS.values():
        sums = []
        for b, (slope, _) in rows:
            b = b[alone].requires_grad_()
            of_log = gradient(reading.sigma(b).log().sum(), {0: b})
            sums.append(float((slope[alone] / of_log).sum()))
        if any(all(abs(t / expected - k) < 1e-3 for t in sums) for k in (0.5, 1.0)):
            return True
    return False


def _to_priors(
    graph: Graph, latent: Latent, loss: int, d: Divergence, times: int
) -> tuple[list[dict[int, Tensor]], list[_ToPrior]]:
    """The heads of the prior as they were, and moved a few times; and what is seen then.

    Nothing is seen if the prior has no heads, or if more than the prior changes.
    """
    own = _prior_heads(graph, latent, loss, d)
    heads = [{i: graph.get(i) for i in own}]
    generator = torch.Generator().manual_seed(29)
    for _ in range(times if own else 0):
        noise = {i: torch.rand(graph[i].shape, generator=generator).double() for i in own}
        heads.append({i: graph.get(i) + 0.6 * u for i, u in noise.items()})
    found: list[_ToPrior] = []
    for fixed in heads:
        prober = Prober(graph, latent, d.heads, fixed)
        kl = _ToPrior.of(prober, loss, d) if latent.diagonal and prober.usable else None
        if kl is None or not torch.allclose((found or [kl])[0].weights, kl.weights, rtol=1e-4):
            return heads, []
        found.append(kl)
    return heads, found


def _readings(heads: list[dict[int, Tensor]], i: int, kl: _ToPrior) -> list[Tensor]:
    """The changes of the weighted sum of the log widths, if a head is read as a width."""
    weight = float(kl.weights.sum()) / heads[0][i].numel()
    found = []
    for reading in READINGS.values():
        sums = [float(reading.sigma(each[i]).log().sum()) for each in heads]
        found.append(weight * torch.tensor([s - sums[0] for s in sums[1:]]))
    return found


@dataclass
class _ToPrior:
    """The losses (T,) at T places of the heads of q, and the KL to the prior that is seen there.

    `places` hold all heads; `weights` (n,) are those of the latents, `log_widths` is their
    weighted sum of log p.
    """

    places: list[dict[int, Tensor]]
    losses: Tensor
    values: Tensor
    weights: Tensor
    log_widths: float

    @classmethod
    def of(cls, prober: Prober, loss: int, d: Divergence) -> _ToPrior | None:
        """From the gradients of a loss; None if it is no KL."""
        probes = prober.measure(loss, d.held, d.by_draws)
        fit = fit_moments(probes, d.fit.copies) if probes is not None and d.fit else None
        if probes is None or fit is None or not fit.is_kl:
            return None
        means, scales = probes.moving
        entries = prober.latents().round().long()
        n, both = prober.graph[prober.latent.z].numel, means & scales
        rows = [
            _by_latent(coefficients, torch.cat([entries[own & ~both], entries[both]]), n)
            for coefficients, own in ((fit.mean, means), (fit.scale, scales))
        ]
        if rows[0] is None or rows[1] is None:
            return None
        (a, b), (c, d_) = rows[0], rows[1]
        weights = torch.where(-d_ > 1e-9 * -d_.min(), -d_, 0.0)
        there = weights > 0
        centre = torch.where(there, -b / a, 0.0)
        width = torch.where(there, (-d_ / c).sqrt(), 1.0)
        values = []
        for place in prober.places:
            with torch.no_grad():
                mean, sigma = prober.latent.moments(prober.graph, {**prober.fixed, **place})
            mean, sigma = mean.reshape(-1), sigma.abs().reshape(-1)
            square = (sigma**2 + (mean - centre) ** 2) / (2 * width**2)
            values.append((weights * (square + (width / sigma).log() - 0.5)).sum())
        return cls(
            [{**prober.fixed, **{i: t.detach() for i, t in p.items()}} for p in prober.places],
            torch.tensor(probes.values), torch.stack(values), weights,
            float((weights * width.log()).sum()),
        )  # fmt: skip


def _by_latent(coefficients: Tensor, entries: Tensor, n: int) -> Tensor | None:
    """Coefficients by latent, from those by entry of the heads; None if they do not agree."""
    if len(entries.unique()) != n:
        return None
    found = coefficients.new_zeros(len(coefficients), n)
    found[:, entries] = coefficients
    return found if torch.allclose(found[:, entries], coefficients, rtol=1e-3) else None


def _prior_heads(graph: Graph, latent: Latent, loss: int, d: Divergence) -> list[int]:
    """The values by layers, or parameters, that meet the heads of q entry by entry.

    Not those that the heads of q are computed from: they belong to the latents before it.
    """
    live = graph.upstream([loss], stop=d.held)
    own = {latent.z, *d.heads}
    before = own | graph.upstream(d.heads)
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
    found = [i for i in frontier(graph, sides, stops=own | set(d.held)) if i not in before]
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


def kl_offset(graph: Graph, latent: Latent, loss: int, d: Divergence) -> float | None:
    """What is left of the KL where q is the prior, in nats by latent; None if it is not known."""
    if d.fit is None or d.by_draws:
        return None
    heads, found = _to_priors(graph, latent, loss, d, 1)
    after = graph.downstream([latent.z, *d.heads, *heads[0]], stop=d.held)
    parts = _subtotals(graph, latent, loss, after, d.held)
    others = graph.upstream(parts, stop={latent.z, *d.heads, *heads[0], *d.held})
    others -= {latent.z, *d.heads, *heads[0]}
    if not found or not parts or any(graph[i].kind == "parameter" for i in others):
        return None  # or there is more in it, such as the KL of another latent
    leaves = {i: graph.get(i).double().clone().requires_grad_() for i in parts}
    value = graph.run({**d.held, **leaves}, [loss])[loss]
    if not value.requires_grad:
        return None
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    if any(s is None for s in slopes):
        return None
    offsets = []
    for kl in found:
        now = graph.run({**d.held, **kl.places[0]}, parts)
        got = sum(float((s * now[i]).sum()) for s, i in zip(slopes, parts, strict=True))
        offsets.append((got - float(kl.values[0])) / float(kl.weights.sum()))
    return offsets[0] if max(offsets) - min(offsets) < 1e-4 else None


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
