"""The prior in a KL divergence whose mean and scale are computed, and the constants of a KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from musigma.audit.density import integral
from musigma.audit.graph import Origin
from musigma.audit.latents import REDUCTIONS, Latent, frontier
from musigma.audit.probes import Over, Prober, each, gradient, moments, patterns
from musigma.audit.scales import READINGS
from musigma.audit.step_kl import NEAR, View, fit_moments, is_linear

__all__ = ["is_stopped_in_part", "kl_offset", "log_normalizer", "prior_error", "prior_heads"]

MOST_DIMENSIONS = 32  # of an integral
MOST_EXAMPLES = 8  # of which each has a prior of its own


@dataclass(frozen=True)
class PriorError:
    """How a loss differs from a KL when the heads of its prior are moved.

    Args:
        size: Relative to the change of the loss.
        of_width: The difference is the weighted sum of the log widths of the prior, or half of it.
    """

    size: float
    of_width: bool


def prior_error(view: View) -> PriorError | None:
    r"""How far a value is from a KL to the prior when the heads of the prior are moved.

    The value as a function of the heads of q has shown the prior's mean c and scale p. With other
    values for the prior's own heads, these become c' and p', and the value must change by
    KL(q | N(c', p')) - KL(q | N(c, p)): one without log p, say, does not.

    Returns:
        None if the prior has no heads, or if more than the prior changes.
    """
    heads, found = _to_priors(view, 2)
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
        of_width = _has_bare_logarithms(view, heads, found)
    return PriorError(float(off.abs().max()) / size if size > 1e-9 else 0.0, of_width)


def _has_bare_logarithms(
    view: View, heads: list[dict[int, Tensor]], found: list[_ToPrior]
) -> bool:
    """Whether a value has log widths of a prior, by entries of its heads that do nothing else.

    The slopes in such entries do not depend on the heads of q.
    """
    rows = []
    for fixed, kl in zip(heads, found, strict=True):
        leaves = {i: t.clone().requires_grad_() for i, t in fixed.items()}
        runs = [view.at({**p, **leaves}).sum() for p in kl.places[:2]]
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


def _to_priors(view: View, times: int) -> tuple[list[dict[int, Tensor]], list[_ToPrior]]:
    """The heads of the prior as they were, and moved a few times; and what is seen then.

    Nothing is seen if the prior has no heads, or if more than the prior changes.
    """
    graph, latent = view.graph, view.latent
    own = prior_heads(view)
    heads = [{i: graph.get(i) for i in own}]
    generator = torch.Generator().manual_seed(29)
    for _ in range(times if own else 0):
        noise = {i: torch.rand(graph[i].shape, generator=generator).double() for i in own}
        heads.append({i: graph.get(i) + 0.6 * u for i, u in noise.items()})
    found: list[_ToPrior] = []
    for fixed in heads:
        prober = Prober(graph, latent, view.heads, fixed)
        kl = _ToPrior.of(prober, view) if latent.diagonal and prober.usable else None
        if kl is None or not torch.allclose((found or [kl])[0].weights, kl.weights, rtol=1e-4):
            return heads, []
        found.append(kl)
    return heads, found


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
    def of(cls, prober: Prober, view: View) -> _ToPrior | None:
        """From the gradients of a value; None if it is no KL."""
        probes = prober.measure(view.target, view.held, view.by_draws)
        fit = fit_moments(probes, view.fit.copies) if probes is not None else None
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


def prior_heads(view: View) -> list[int]:
    """The values by layers, or parameters, that meet the heads of q entry by entry.

    Not those that the heads of q are computed from: they belong to the latents before it.
    """
    graph, held = view.graph, view.held
    live = graph.upstream([view.target], stop=held)
    own = {view.latent.z, *view.heads}
    before = own | graph.upstream(view.heads)
    region, todo = set(own), list(own)
    sides: list[int] = []
    met: list[int] = []
    after = graph.downstream(own, stop=held) - set(held)
    while todo:
        i = todo.pop()
        for node in graph[i].users:
            outs = [o for o in node.outs if o in live and o not in held]
            if not outs or not (node.pointwise or node.view) or node.name in REDUCTIONS:
                continue
            beside = [k for k in node.ins if k not in after]
            sides += beside
            met += outs if beside else []
            todo += [o for o in outs if o not in region]
            region.update(outs)
    sides = [i for i in dict.fromkeys(sides) if graph[i].origin & Origin.PARAMETERS]
    found = frontier(graph, sides, stops=own | set(held))
    while sums := {i: n for i in found if (n := graph[i].node) and n.name in REDUCTIONS}:
        given = [j for n in sums.values() for j in n.ins]  # of weights, say, that sum to one
        found = [*(set(found) - set(sums)), *frontier(graph, given, own | set(held))]
    found = [i for i in dict.fromkeys(found) if i not in before]
    return [i for i in found if _meets(view, i, met)]


def _meets(view: View, i: int, met: list[int]) -> bool:
    """Whether a value moves an entry of some values that the heads of q move as well."""
    graph = view.graph
    moved = {h: graph.get(h) + 0.37 for h in view.heads}
    for o in met:
        base = graph.get(o)
        by_heads, by_it = (graph.value({**view.held, **over}, o) != base
                           for over in (moved, {i: graph.get(i) + 0.37}))  # fmt: skip
        if bool((by_heads & by_it).any()):
            return True
    return False


# --- the value of a KL --------------------------------------------------------------------------


@dataclass
class _Own:
    """The terms that a value has of a KL, whatever else is added to it.

    `parts` are values of which it contains the sum, with `slopes`.
    """

    view: View
    parts: list[int]
    slopes: tuple[Tensor, ...]

    @classmethod
    def of(cls, view: View, own: list[int]) -> _Own | None:
        """The largest sums whose terms all depend on `own`; None if they cannot be told apart."""
        graph = view.graph
        after = graph.downstream(own, stop=view.held) - set(view.held)
        decoded = graph.downstream([view.latent.z]).intersection(view.held)
        found: list[int] = []

        def is_whole(i: int) -> bool:
            """Whether all terms of a value are of the KL; if not, those that are, are found."""
            if i not in after:
                return not (graph[i].origin or graph[i].draws)
            node = graph[i].node
            terms = [j for j in node.ins if graph[j].floating] if node is not None else []
            terms = [j for j in dict.fromkeys(terms) if graph[j].origin or graph[j].draws]
            if i in own or node is None or not is_linear(graph, node, terms):
                return True
            whole = {j: is_whole(j) for j in terms}
            if not all(whole.values()):
                found.extend(j for j in terms if j in after and whole[j])
            return all(whole.values())

        if is_whole(view.target):
            found = [view.target]
        if not found or decoded.intersection(graph.upstream(found, stop=view.held)):
            return None  # there is none, or it is a product with what is decoded
        leaves = {i: graph.get(i).double().clone().requires_grad_() for i in found}
        value = view.at(leaves).sum()
        slopes = torch.autograd.grad(view.sign * value, list(leaves.values()), allow_unused=True)
        used = {i: s for i, s in zip(found, slopes, strict=True) if s is not None}
        return cls(view, list(used), tuple(used.values()))

    def beside(self, known: set[int]) -> set[int]:
        """What else they are computed from."""
        stop = known | set(self.view.held)
        return self.view.graph.upstream(self.parts, stop=stop) - known

    def value(self, over: Over) -> Tensor:
        """Their sum, with some values replaced."""
        now = self.view.graph.run({**self.view.held, **over}, self.parts)
        rows = [(s * now[i]).sum() for s, i in zip(self.slopes, self.parts, strict=True)]
        return torch.stack(rows).sum()


def kl_offset(view: View) -> float | None:
    """What is left of the KL where q is the prior, in nats by latent; None if it is not known."""
    graph, latent = view.graph, view.latent
    heads, found = _to_priors(view, 1)
    known = {latent.z, *view.heads, *heads[0]}
    own = _Own.of(view, list(known))
    if own is None or any(graph[i].kind == "parameter" for i in own.beside(known)):
        return None  # or there is more in it, such as the KL of another latent
    noises = patterns(graph, latent) if view.by_draws else [{}]
    seen = [(kl.places[0], float(kl.values[0]), float(kl.weights.sum())) for kl in found]
    if not latent.diagonal and view.fit.is_standard and not view.by_draws:
        place = {**view.prober.fixed, **view.prober.places[0]}
        with torch.no_grad():
            square, _, variance, log = moments(graph, latent, place) or [math.nan] * 4
        n, w = graph[latent.z].numel, view.fit.weight / view.fit.copies
        seen = [(place, w * float(square + variance - log - n / 2), w * n)]
    offsets = []
    for place, value, weight in seen:
        got = [float(own.value({**place, **noise}).detach()) for noise in noises]
        offsets.append((sum(got) / len(got) - value) / weight)
    if not offsets or max(offsets) - min(offsets) > 1e-4:
        return None
    return offsets[0]


def is_stopped_in_part(view: View) -> bool:
    """Whether the step stops a part of the gradient in heads of the prior that get another."""
    graph = view.graph
    own = graph.connected([view.target]).intersection(prior_heads(view))
    place = {i: graph.get(i).clone().requires_grad_() for i in sorted(own)}
    if not place:
        return False
    stopped = view.prober.stopped(view.target, view.held, torch.sum, view.by_draws, place)
    return bool(stopped.any())


# --- the integral of a prior --------------------------------------------------------------------


@dataclass
class _Prior:
    r"""The prior in a KL by draws, :math:`w (\log q(z) - \log p(z))`, as a function of z alone.

    The heads of q are held. Those of the prior are moved, as they may be where a fault is hidden.
    """

    own: _Own
    over: dict[int, Tensor]
    weight: Tensor  # of each latent of each example
    drawn: bool

    @property
    def latent(self) -> Latent:
        """The latent."""
        return self.own.view.latent

    def log_p(self, z: Tensor) -> Tensor:
        """The weighted sum of log p(z)."""
        latent, graph = self.latent, self.own.view.graph
        zs = {i: z.expand(graph[i].shape) for i in (latent.z, *(i for _, i in latent.siblings))}
        mean, sigma = self._moments
        square = ((z - mean) / sigma) ** 2 if self.drawn else self._square_of_noise
        log_q = -0.5 * square - sigma.abs().log() - 0.5 * math.log(2 * math.pi)
        return (self.weight * log_q).sum() - self.own.value({**self.over, **zs})

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, sigma = self.latent.moments(self.own.view.graph, {})
        return mean.detach(), sigma.detach()

    @cached_property
    def _square_of_noise(self) -> Tensor:
        """The square of the noise, if log q is written with it; else its mean."""
        graph, latent = self.own.view.graph, self.latent
        z = {latent.z: graph.get(latent.z)}
        none = {i: torch.zeros_like(graph.get(i)) for i in latent.draws}
        a, b = (float(self.own.value({**self.over, **z, **e}).detach()) for e in ({}, none))
        e = graph.get(latent.draws[0])
        return e**2 if abs(a - b) > 1e-9 else torch.ones_like(e)

    def slopes(self, zs: Tensor) -> Tensor:
        """The slopes of log p by latent, at some z's."""
        return each(torch.func.grad(self.log_p), zs) / self.weight

    def is_of_parts(self, axes: int) -> bool:
        """Whether log p is a sum over the first axes of z."""
        shape = self.weight.shape
        kept = (torch.arange(math.prod(shape[:axes])) % 2 == 0).view(shape[:axes])
        kept = kept.view(*shape[:axes], *(1,) * (len(shape) - axes)).expand(shape)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(47)).double()
        both = self.slopes(torch.stack([z, torch.where(kept, z, z + 0.7)]))
        change = (both[1] - both[0])[kept].abs().max()
        return float(change) <= 1e-6 * float(both.abs().max() + 1e-12)

    def by_latent(self) -> float | None:
        """The logarithm of the integral, by the slopes along a grid."""
        size = self.weight.numel()
        some = torch.randperm(size, generator=torch.Generator().manual_seed(3))[:64]
        grid = 1e-3 * torch.linspace(-17, 17, 2401, dtype=torch.float64).sinh()  # dense at zero
        zero = torch.zeros_like(self.weight)
        steps = [self.slopes(torch.stack([zero + x for x in part])) for part in grid.split(64)]
        slopes = torch.cat([s.reshape(len(s), size)[:, some] for s in steps])
        finite = slopes.isfinite().all(1)
        finite = (finite & finite.flip(0))[len(grid) // 2 :].double().cumprod(0)
        reach = int(finite.sum() - 1) // 2 * 2  # beyond, exp(log p) is zero to the computer
        if reach < 100:
            return None
        inside = slice(len(grid) // 2 - reach, len(grid) // 2 + reach + 1)
        grid, slopes = grid[inside], slopes[inside]
        heights = []
        for step in (1, 2):
            x, y = grid[::step], slopes[::step]
            shape = torch.cumulative_trapezoid(y, x, dim=0)
            shape = torch.cat([torch.zeros_like(shape[:1]), shape])
            ends = torch.maximum(shape[0], shape[-1]) - shape.max(0).values
            if bool((ends > -5).any()):
                return math.inf if reach > 1000 else None
            widths = torch.cat([x.diff(), x.new_zeros(1)]) + torch.cat([x.new_zeros(1), x.diff()])
            integrals = torch.logsumexp(shape + (0.5 * widths).log()[:, None], 0)
            heights.append(integrals - shape[len(x) // 2])
        if float((heights[0] - heights[1]).abs().max()) > 2e-3:
            return None  # too narrow for the grid
        if size > len(some) and float(heights[0].max() - heights[0].min()) > 1e-6:
            return None
        mean = (self.weight.view(-1)[some] * heights[0]).sum() / self.weight.view(-1)[some].sum()
        return float(self.log_p(zero) / self.weight.sum() + mean)

    def by_example(self, axes: int) -> float | None:
        """The logarithm of the integral over one example, by importance weights."""
        shape = self.weight.shape
        rows, dim = math.prod(shape[:axes]), math.prod(shape[axes:])
        zero = torch.zeros(rows, dim, dtype=torch.float64)
        weights = self.weight.reshape(rows, dim)
        base = self.log_p(zero.view(shape))
        probe = torch.randn(dim, generator=torch.Generator().manual_seed(5)).double()

        def of_row(r: int, points: Tensor) -> Tensor:
            """log p of one example, relative to that at zero."""
            at = (torch.arange(rows) == r).double()[:, None]
            return each(lambda a: self.log_p((at * a).view(shape)) - base, points) / weights[r, 0]

        change = torch.cat([of_row(r, probe[None]) for r in range(min(rows, MOST_EXAMPLES + 1))])
        alike = float((change - change[0]).abs().max()) <= 1e-6 * float(change.abs().max())
        if dim > MOST_DIMENSIONS or (not alike and rows > MOST_EXAMPLES):
            return None
        logs, total = [], 0.0
        for r in range(1 if alike else rows):
            value, error, sure, _ = integral(partial(of_row, r), dim)
            if not sure or error > 0.02 * value:
                return None
            logs.append(float(weights[r, 0]) * math.log(value))
            total += float(weights[r, 0])
        return float(base) / float(weights[:, 0].sum()) + sum(logs) / total


def log_normalizer(view: View) -> tuple[float, float] | None:
    """The logarithm of the integral of the prior in a KL by draws, and its accuracy.

    It is that of one latent if the prior is a product over latents, else that of one example.
    Zero for a density; infinity if it does not fall off; None if it is not known, as of a prior
    that stands in a sum with other terms.
    """
    graph, latent, log_q = view.graph, view.latent, view.log_q
    if log_q is None or (latent.siblings and not log_q.drawn):
        return None
    heads = prior_heads(view)
    own = [latent.z, *latent.heads, *latent.draws, *heads]
    own += [i for pair in latent.siblings for i in pair]
    terms = _Own.of(view, own)
    if terms is None:
        return None
    random = torch.Generator().manual_seed(29)
    moved = {i: graph.get(i) + 0.6 * torch.rand(graph[i].shape, generator=random) for i in heads}
    over = moved | {i: graph.get(i) for i in latent.heads}
    prior = _Prior(terms, over, log_q.each, log_q.drawn)
    for axes in range(log_q.each.ndim, 0, -1):
        if prior.is_of_parts(axes):
            whole = axes == log_q.each.ndim
            found = prior.by_latent() if whole else prior.by_example(axes)
            return None if found is None else (found, NEAR if whole else 0.05)
    return None
