"""The prior in a KL divergence whose mean and scale are computed, and the constants of a KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from musigma.audit.graph import Origin
from musigma.audit.integral import integrate
from musigma.audit.latents import REDUCTIONS, frontier
from musigma.audit.probes import Over, Prober, each, gradient, moments, patterns
from musigma.audit.scales import READINGS
from musigma.audit.step_kl import NEAR, View, fit_moments, is_linear, move_together

__all__ = ["PriorOfKL", "log_integral", "log_normalizer", "prior_heads"]

MOST_DIMENSIONS = 32  # of an integral
MOST_PRIORS = (64, 8)  # of different latents, and of different examples, that are integrated
FAR = 1e4  # a density that is not small there is improper


class PriorOfKL:
    r"""The prior in a KL, seen by what the value does when the prior's own heads are moved.

    The value as a function of the heads of q shows the prior's mean c and scale p. With other
    values for the prior's own heads these become c' and p', and the value must change by
    KL(q | N(c', p')) - KL(q | N(c, p)): one without log p, say, does not.
    """

    def __init__(self, view: View):
        self.view, self.heads = view, prior_heads(view)
        self.moved = [{i: view.graph.get(i) for i in self.heads}]
        generator = torch.Generator().manual_seed(29)
        for _ in range(2 if self.heads else 0):
            noise = [torch.rand(t.shape, generator=generator) for t in self.moved[0].values()]
            pairs = zip(self.moved[0].items(), noise, strict=True)
            self.moved.append({i: t + 0.6 * u.double() for (i, t), u in pairs})

    @cached_property
    def seen(self) -> list[_Seen]:
        """What is seen with the heads as they were, and moved; nothing if more changes."""
        found: list[_Seen] = []
        for fixed in self.moved:
            kl = _Seen.of(self.view, fixed)
            if kl is None or not torch.allclose((found or [kl])[0].weights, kl.weights, rtol=1e-4):
                return []
            found.append(kl)
        return found

    @cached_property
    def changes(self) -> tuple[Tensor, Tensor]:
        """The changes of the value, and of the KL (moves, T), when the heads are moved."""
        first, *moved = self.seen
        losses = torch.stack([kl.losses - first.losses for kl in moved])
        return losses, torch.stack([kl.values - first.values for kl in moved])

    @property
    def error(self) -> float | None:
        """How far the changes are from each other, relative to them; None without heads."""
        if len(self.seen) < 2:
            return None
        losses, expected = self.changes
        size = float(expected.abs().max() + losses.abs().max())
        return float((losses - expected).abs().max()) / size if size > 1e-9 else 0.0

    @property
    def is_off_by_width(self) -> bool:
        """Whether the error is the weighted sum of the log widths of the prior, or half of it."""
        first, *moved = self.seen
        losses, expected = self.changes
        near = 1e-4 * (expected.abs().max() + losses.abs().max())
        widths = torch.tensor([kl.log_widths - first.log_widths for kl in moved]).abs()[:, None]
        if float(widths.max()) < 1e-6 * float(first.weights.sum()):
            return self._has_bare_logarithms
        off = (losses - expected).abs()
        return any(bool((off - k * widths).abs().max() < near) for k in (0.5, 1.0))

    @property
    def _has_bare_logarithms(self) -> bool:
        """Whether the value has log widths of a prior, by entries of its heads that do no more.

        The slopes in such entries do not depend on the heads of q.
        """
        rows = []
        for fixed, kl in zip(self.moved, self.seen, strict=True):
            leaves = {i: t.clone().requires_grad_() for i, t in fixed.items()}
            runs = [self.view.at({**place, **leaves}).sum() for place in kl.places[:2]]
            rows.append(torch.stack([gradient(f, leaves) for f in runs]))
        slopes = torch.stack(rows, 1)
        least = 1e-6 * slopes.abs().max()
        alone = ((slopes[0] - slopes[1]).abs() < least).all(0) & (slopes[0].abs() > least).all(0)
        expected = float(self.seen[0].weights.sum())
        for reading in READINGS.values():
            sums = []
            for fixed, slope in zip(self.moved, slopes[0], strict=True):
                b = torch.cat([t.reshape(-1) for t in fixed.values()])[alone].requires_grad_()
                of_log = gradient(reading.sigma(b).log().sum(), {0: b})
                sums.append(float((slope[alone] / of_log).sum()) / expected)
            if any(all(abs(t - k) < 1e-3 for t in sums) for k in (0.5, 1.0)):
                return True
        return False

    @cached_property
    def offset(self) -> float | None:
        """What is left of the KL where q is the prior, in nats by latent; None if not known."""
        view, graph, latent = self.view, self.view.graph, self.view.latent
        known = {latent.z, *view.heads, *self.heads}
        own = _Own.of(view, known)
        if own is None or any(graph[i].kind == "parameter" for i in own.beside(known)):
            return None  # or there is more in it, such as the KL of another latent
        noises = patterns(graph, latent) if view.by_draws else [{}]
        seen = [(kl.places[0], float(kl.values[0]), float(kl.weights.sum())) for kl in self.seen]
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
        return offsets[0] if offsets and max(offsets) - min(offsets) <= 1e-4 else None

    @property
    def is_slip(self) -> bool:
        """Whether the logarithms of the KL seem to have a factor d of 2 or 1/2.

        The closed form to N(m, s^2) is then d times that to N(m, d s^2), up to a constant.
        """
        fit, offset = self.view.fit, self.offset
        (mean, std), factors = fit.common_prior or (math.nan, math.nan), (0.5, 2.0)
        if math.isnan(std):
            offsets = [0.5 - 0.5 * math.log(d) - 0.5 / d for d in factors]
            return offset is not None and min(abs(offset - o) for o in offsets) < 1e-5
        near = abs(mean) < 1e-6 and min(abs(std**2 - d) for d in factors) < 1e-6
        return near and (offset is None or abs(offset) > NEAR)

    @property
    def name(self) -> str:
        """It in words."""
        common = self.view.fit.common_prior
        if self.view.fit.is_standard:
            return "N(0, 1)"
        if common is not None:
            return "N({:.4g}, {:.4g}^2)".format(*common)
        return "a Gaussian whose mean and scale vary: a learned or conditional prior"

    @property
    def is_stopped_in_part(self) -> bool:
        """Whether the step stops a part of the gradient in heads that get another."""
        view = self.view
        own = view.graph.connected([view.target]).intersection(self.heads)
        place = {i: view.graph.get(i).clone().requires_grad_() for i in sorted(own)}
        if not place:
            return False
        stopped = view.prober.stopped(view.target, view.held, torch.sum, view.by_draws, place)
        return bool(stopped.any())


@dataclass
class _Seen:
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
    def of(cls, view: View, fixed: Over) -> _Seen | None:
        """With the heads of the prior at some values; None if there is no KL by latents."""
        graph, latent = view.graph, view.latent
        prober = Prober(graph, latent, view.heads, fixed)
        if not (latent.diagonal and prober.usable):
            return None
        probes = prober.measure(view.target, view.held, view.by_draws)
        fit = fit_moments(probes, view.fit.copies) if probes is not None else None
        if probes is None or fit is None or not fit.is_kl:
            return None
        entries, originals = prober.latents(), prober.originals
        of_means = _by_latent(fit.of_means, entries[fit.means], originals)
        of_scales = _by_latent(fit.of_scales, entries[fit.scales], originals)
        if of_means is None or of_scales is None:
            return None
        (a, b), (c, d) = of_means, of_scales
        weights = torch.where(-d > 1e-9 * -d.min(), -d, 0.0)
        there = weights > 0
        centre = torch.where(there, -b / a, 0.0)
        width = torch.where(there, (-d / c).sqrt(), 1.0)
        places = [{**prober.fixed, **{i: t.detach() for i, t in p.items()}} for p in prober.places]
        values = []
        for place in places:
            mean, sigma = (t.reshape(-1) for t in latent.moments(graph, place))
            square = (sigma**2 + (mean - centre) ** 2) / (2 * width**2)
            values.append((weights * (square + (width / sigma.abs()).log() - 0.5)).sum())
        log_widths = float((weights * width.log()).sum())
        return cls(places, torch.tensor(probes.values), torch.stack(values), weights, log_widths)


def _by_latent(coefficients: Tensor, entries: Tensor, originals: Tensor) -> Tensor | None:
    """Coefficients by latent, from those by entry of the heads; None if they do not agree."""
    if not torch.equal(entries.unique(), originals.unique()):
        return None
    found = coefficients.new_zeros(len(coefficients), len(originals))
    found[:, entries] = coefficients
    is_one = torch.allclose(found[:, entries], coefficients, rtol=1e-3)
    return found[:, originals] if is_one else None


def prior_heads(view: View) -> list[int]:
    """The values by layers, or parameters, that meet the heads of q entry by entry.

    Not those that the heads of q are computed from: they belong to the latents before it.
    """
    graph, held = view.graph, view.held
    live = graph.upstream([view.target], stop=held)
    own = {view.latent.z, *view.heads}
    before = own | graph.upstream(view.heads)
    after = graph.downstream(own, stop=held) - set(held)
    region, sides, met = set(own), [], []
    for node in graph.nodes:
        outs = [o for o in node.outs if o in live and o not in held]
        by_entry = (node.pointwise or node.view) and node.name not in REDUCTIONS
        if outs and by_entry and region.intersection(node.ins):
            beside = [k for k in node.ins if k not in after]
            sides += beside
            met += outs if beside else []
            region.update(outs)
    sides = [i for i in dict.fromkeys(sides) if graph[i].origin & Origin.PARAMETERS]
    found = frontier(graph, sides, stops=own | set(held))
    while sums := {i: n for i in found if (n := graph[i].node) and n.name in REDUCTIONS}:
        given = [j for n in sums.values() for j in n.ins]  # of weights, say, that sum to one
        found = [*(set(found) - set(sums)), *frontier(graph, given, own | set(held))]
    found = [i for i in dict.fromkeys(found) if i not in before]
    return [i for i in found if any(move_together(graph, o, held, view.heads, [i]) for o in met)]


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
    def of(cls, view: View, own: Collection[int]) -> _Own | None:
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
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
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


# --- the integral of a prior --------------------------------------------------------------------


@dataclass
class _Prior:
    """The log-density of a prior, summed over all latents with the weight of each."""

    log_p: Callable[[Tensor], Tensor]
    weight: Tensor  # of the shape of z

    def is_of_parts(self, axes: int) -> bool:
        """Whether log p is a sum over the first axes of z."""
        shape = self.weight.shape
        kept = (torch.arange(math.prod(shape[:axes])) % 2 == 0).view(shape[:axes])
        kept = kept.view(*shape[:axes], *(1,) * (len(shape) - axes)).expand(shape)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(47)).double()
        slopes = each(torch.func.grad(self.log_p), torch.stack([z, torch.where(kept, z, z + 0.7)]))
        slopes = slopes / self.weight
        change = (slopes[1] - slopes[0])[kept].abs().max()
        return float(change) <= 1e-6 * float(slopes.abs().max() + 1e-12)

    def log_integral(self, axes: int) -> float | None:
        """The mean logarithm of the integrals over the parts that the first axes count."""
        shape = self.weight.shape
        rows, dim = math.prod(shape[:axes]), math.prod(shape[axes:])
        weights = self.weight.reshape(rows, dim)[:, 0]
        base = self.log_p(torch.zeros(shape, dtype=torch.float64))

        def of_row(r: int, points: Tensor) -> Tensor:
            """Log p of one part, if the others are at zero and all parts are alike there."""
            at = (torch.arange(rows) == r).double()[:, None]
            change = each(lambda a: self.log_p((at * a).view(shape)) - base, points)
            return change / weights[r] + base / weights.sum()

        generator = torch.Generator().manual_seed(5)
        probes = torch.randn(2, dim, generator=generator).double()
        places = torch.stack([p.expand(rows, dim).reshape(shape) for p in probes])
        slopes = each(torch.func.grad(self.log_p), places).view(2, rows, dim) / weights[:, None]
        marks = (1e6 * slopes / slopes.abs().max().clamp(min=1e-300)).round()
        _, alike = marks.transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        groups = [(alike == k).nonzero().flatten() for k in range(int(alike.max()) + 1)]
        if len(groups) > MOST_PRIORS[dim > 1] or dim > MOST_DIMENSIONS:
            return None
        total = 0.0
        for group in groups:
            r = int(group[0])
            if dim == 1 and self._is_improper(lambda x, r=r: of_row(r, x)):
                return math.inf

            def density(x: np.ndarray, r: int = r) -> np.ndarray:
                found = np.full(len(x), -np.inf)  # far out, log q in it cancels inexactly
                near = (np.abs(x) < FAR).all(1)
                if near.any():
                    y = of_row(r, torch.from_numpy(x[near]))
                    found[near] = y.nan_to_num(-math.inf).numpy()
                return found

            value, error, sure = integrate(density, dim, draws=12_000)
            if not sure or error > 0.02 * value:
                return None
            total += float(weights[group].sum()) * math.log(value)
        return total / float(weights.sum())

    @staticmethod
    def _is_improper(log_p: Callable[[Tensor], Tensor]) -> bool:
        """Whether a density of one dimension does not fall off."""
        grid = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
        y = log_p((grid * math.asinh(FAR)).sinh())
        return bool(torch.maximum(y[0], y[-1]) > y.nan_to_num(-math.inf).max() - 5)


def log_normalizer(view: View) -> tuple[float, float] | None:
    r"""The logarithm of the integral of the prior in a KL by draws, and its accuracy.

    In :math:`w (\log q(z) - \log p(z))`, the heads of q are held, those of the prior are moved,
    as they may be where a fault is hidden, and z is moved by itself.

    It is that of one latent if the prior is a product over latents, else that of one example.
    Zero for a density; infinity if it does not fall off; None if it is not known, as of a prior
    that stands in a sum with other terms.
    """
    graph, latent, log_q = view.graph, view.latent, view.log_q
    if log_q is None or (latent.siblings and not log_q.drawn):
        return None
    heads = prior_heads(view)
    terms = _Own.of(view, [*latent.zs, *latent.noise, *latent.heads, *heads])
    if terms is None:
        return None
    random = torch.Generator().manual_seed(29)
    over = {i: graph.get(i) + 0.6 * torch.rand(graph[i].shape, generator=random) for i in heads}
    over |= {i: graph.get(i) for i in latent.heads}
    above = graph.upstream(terms.parts, stop={*view.held, *latent.zs})
    noises = patterns(graph, latent) if above.intersection(latent.noise) else [{}]
    mean, sigma = (t.detach() for t in latent.moments(graph, {}))

    def log_p(z: Tensor) -> Tensor:
        square = ((z - mean) / sigma) ** 2 if log_q.drawn else torch.ones_like(z)
        of_q = -0.5 * square - sigma.abs().log() - 0.5 * math.log(2 * math.pi)
        at = {i: z.expand(graph[i].shape) for i in latent.zs}
        values = [terms.value({**over, **noise, **at}) for noise in noises]
        return (log_q.each * of_q).sum() - torch.stack(values).mean()

    return log_integral(log_p, log_q.each)


def log_integral(log_p: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[float, float] | None:
    """As `log_normalizer`, of a log-density that is summed with the weight of each entry of z."""
    prior = _Prior(log_p, weight)
    for axes in range(weight.ndim, 0, -1):
        if prior.is_of_parts(axes):
            found = prior.log_integral(axes)
            return None if found is None else (found, NEAR if axes == weight.ndim else 0.05)
    return None
