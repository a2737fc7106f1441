"""One latent of a step: what is drawn, its divergence in the loss, and their gradients.

The loss is looked at in one way after another. The first that explains how it depends on the
posterior gives a `Divergence`, which has its checks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from musigma.audit.findings import Facts, Outcome, Passed, bug, warning
from musigma.audit.latents import Latent, holds
from musigma.audit.probes import OfLatent, Prober, packing
from musigma.audit.runs import at, unexamined
from musigma.audit.step_divergence import (
    KL,
    Absent,
    Constant,
    Divergence,
    FunctionOfKL,
    KLInLogWeights,
    Negative,
    OtherPrior,
    Subject,
    Unknown,
    Wrong,
)
from musigma.audit.step_kl import (
    NEAR,
    View,
    data_terms,
    inner_values,
    log_weights,
    sampled_scale,
)

__all__ = ["check_latent", "find_divergence"]

NARROW = 0.9  # a smallest sigma above this is a bug, beside a prior of standard deviation 1


def check_latent(on: Subject) -> Iterator[Outcome]:
    """Examine the posterior, the KL and the gradients of one latent."""
    graph, latent = on.graph, on.latent
    divergence = find_divergence(on.prober, on.latents, on.loss)
    curve = sampled_scale(divergence.view.prober) or sampled_scale(on.prober)
    on = replace(on, curve=curve)
    details = {} if curve is None else {"convention": curve.to_dict()}
    yield Facts(convention=on.reading, layout=packing(on.prober), details=details)
    place, shape = at(latent.where), graph[latent.z].shape
    text = curve.text if curve is not None and curve.named else "a function without a name"
    yield Passed(
        f"z of shape {tuple(shape)}{place}: mean + sigma * noise, with sigma = {text}"
        if latent.diagonal
        else f"z of shape {tuple(shape)}{place}: mean + L noise, a full or low-rank covariance"
    )
    if latent.shared:
        noise = tuple(latent.noise_shape)
        yield bug("noise_shared", "step", where=latent.where, noise=noise, shape=tuple(shape))
    if curve is not None and curve.name != "unit variance" and curve.smallest >= NARROW:
        yield warning("sigma_range_restricted", where=latent.where, smallest=curve.smallest)
    yield from divergence.check(on)
    if on.run.differentiable:
        yield from _check_gradient(on, divergence)


def _check_gradient(on: Subject, d: Divergence) -> Iterator[Outcome]:
    """Whether the gradients of the decoder and of the KL reach the heads."""
    graph, latent, loss = on.graph, on.latent, on.loss
    prober = on.prober
    if not prober.usable:
        return
    entries = dict(zip(("mean", "standard deviation"), prober.moving, strict=True))

    def lost(stopped: Tensor) -> str:
        return " and the ".join(name for name, own in entries.items() if (own & stopped).any())

    order = torch.linspace(0.5, 1.5, graph[latent.z].numel, dtype=torch.float64)
    stopped = prober.stopped(latent.z, {}, lambda z: (order * z.reshape(-1)).sum())
    data = graph.connected([loss])
    decoder = holds(graph, latent)
    decoded = graph.downstream(decoder)
    scored = data.intersection(data_terms(graph, on.latents, loss)).intersection(decoded)
    scored = {t for t in scored if not graph.connected([t]).intersection(decoder)}
    by_score = graph.connected(scored, stop=[latent.z])
    used = len(graph.downstream([latent.z]) & graph.upstream([loss])) > 1
    if latent.z not in data:
        stopped |= True
    if used and not by_score.intersection(latent.heads) and (head := lost(stopped)):
        yield bug("no_gradient", where=latent.where, head=head)
    elif latent.z in data and (head := lost(d.stopped(on))):
        if on.is_alone:
            yield bug("no_gradient", "kl", where=d.where, head=head)
        else:
            yield unexamined("the gradient of the KL", d.where, f"it does not reach the {head} of "
                             "z; a stop that is meant, or a fault")  # fmt: skip


# --- the attempts to explain the loss -----------------------------------------------------------


@dataclass
class Search(OfLatent):
    """The ways of looking at the divergence of a latent in a value: the loss, or log weights."""

    latents: list[Latent]
    target: int
    sign: float = 1.0

    @cached_property
    def decoder(self) -> dict[int, Tensor]:
        """Where the decoder begins."""
        return holds(self.graph, self.latent)

    @cached_property
    def mixed(self) -> dict[int, Tensor]:
        """Values of z together with what is decoded from another latent, entry by entry."""
        graph, latent = self.graph, self.latent
        after = graph.downstream([latent.z])
        others = graph.downstream([o.z for o in self.latents if o is not latent]) - after
        return {
            o: graph.get(o)
            for n in graph.nodes
            if n.pointwise and after.intersection(n.ins) and others.intersection(n.ins)
            for o in n.outs
            if graph[o].floating
        }

    @cached_property
    def data(self) -> dict[int, Tensor]:
        """The terms in which data take part that do not come by the latents."""
        found = data_terms(self.graph, self.latents, self.target)
        return {t: self.graph.get(t) for t in found}

    @cached_property
    def views(self) -> list[View]:
        """Views of the target with more and more values held."""
        held = [self.decoder, self.decoder | self.mixed, self.decoder | self.data,
                self.decoder | self.data | self.mixed]  # fmt: skip
        held = [h for k, h in enumerate(held) if h.keys() not in [w.keys() for w in held[:k]]]
        return [self.view(h) for h in held]

    def view(self, held: dict[int, Tensor], prober: Prober | None = None) -> View:
        """The target as a function of the heads, with some values held."""
        return View(prober or self.prober, self.target, held, self.sign)

    @cached_property
    def last(self) -> View:
        """The view with most values held in which the target depends on the heads."""
        views = self.views
        return views[0] if views[-1].flat and not views[0].flat else views[-1]


def find_divergence(prober: Prober, latents: list[Latent], loss: int) -> Divergence:
    """The divergence of a latent in a loss, by the first attempt that explains it."""
    search, graph, latent = Search(prober, latents, loss), prober.graph, prober.latent
    weights = log_weights(graph, latent, loss, search.decoder)
    if not weights:
        return next(filter(None, (attempt(search) for attempt in ATTEMPTS)))
    target = weights[0]
    if len(weights) > 1:
        target = graph.derive(lambda *t: torch.stack([p.sum() for p in t]).sum(), weights, "sum")
    rest = View(search.prober, loss, search.decoder | {i: graph.get(i) for i in weights})
    if not (rest.flat or rest.fit.is_kl):
        return Unknown(rest, why="it stands in weights of the draws, and in other terms")
    search = replace(search, target=target, sign=-1.0)
    found = next(filter(None, (attempt(search) for attempt in ATTEMPTS)))
    return KLInLogWeights(found.view) if type(found) is KL else found


def _kl(search: Search) -> Divergence | None:
    return next((KL(view) for view in search.views if view.fit.is_kl), None)


def _function_of_kl(search: Search) -> Divergence | None:
    """Where heads enter the loss by a value that is a KL, and by no linear function of it."""
    for view in search.views:
        for i in inner_values(view):
            inner = View(view.prober, i, view.held)
            if (-inner.fit).is_kl:
                inner = replace(inner, sign=-1.0)
            if not inner.fit.is_kl:
                continue
            rest = replace(view, held={**view.held, i: search.graph.get(i)})
            if rest.flat:
                return _by_slopes(view, inner)
    return None


SHIFTS = (-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def _by_slopes(view: View, inner: View) -> Divergence:
    """The form of a function of the KL, by its slopes where the KL is larger and smaller."""
    graph, i = view.graph, inner.target
    base = graph.get(i)
    own = (graph.value({**view.held, **inner.prober.places[0]}, i) != base).double()
    rows = []
    for shift in SHIFTS:
        t = (base + inner.sign * shift * own).requires_grad_()
        value = view.at({i: t}).sum()
        slope = torch.autograd.grad(value, t)[0] if value.requires_grad else torch.zeros_like(t)
        rows.append(inner.sign * view.sign * slope[own > 0])
    slopes = torch.stack(rows)
    size, where = float(slopes.abs().max()), inner.where
    zero = slopes.abs() <= 1e-4 * size
    steady = ((slopes.abs() - slopes.abs().amax(0)).abs() <= 1e-4 * size) | zero
    falls, rises = bool((slopes < 0).any()), bool((slopes > 0).any())
    if size <= 1e-12:
        if not all(n.name.rstrip("_") in ("mul", "div") for n in graph[i].users):
            return Constant(view)
        finding, size = warning("reduction_imbalance", "step muted", where=where, beta=0.0), 0.0
    elif falls and rises:
        finding = warning("kl_capacity", "step", where=where)
    elif falls or not bool(steady.all()):
        finding = warning("kl_capacity", "function", where=where)
    elif bool((zero[-1] & ~zero.all(0)).any()):
        finding = bug("kl_constant", "step above", where=where)
    else:
        finding = warning("free_bits", "step", where=where)
    return FunctionOfKL(inner, size * inner.fit.weight, finding)


def _of_some_heads(search: Search) -> Divergence | None:
    """A KL in a pair of heads, of more that z is computed from."""
    latent, prober = search.latent, search.prober
    if len(latent.heads) == 1 or not prober.usable or math.prod(map(len, prober.movers)) > 36:
        return None
    pairs = ((m,) if m == s else (m, s) for m, s in itertools.product(*prober.movers))
    for heads in dict.fromkeys(pairs):
        if set(heads) == set(latent.heads):
            continue
        part = Prober(search.graph, latent, heads)
        for view in search.views if part.usable else []:
            if (seen := search.view(view.held, part)).fit.is_kl:
                return KL(seen)
    return None


def _not_measured(search: Search) -> Divergence | None:
    if not search.prober.usable:
        return Unknown(search.views[0], why="its heads could not be moved")
    if search.views[-1].probes is None:
        return Unknown(search.views[-1], why="the loss is not finite where the heads are moved")
    return None


def _other_prior(search: Search) -> Divergence | None:
    """A KL by draws to a prior that is not Gaussian: log q is right, the rest a function of z."""
    for view in search.views:
        if view.by_draws and view.log_q is not None:
            return OtherPrior(view, view.log_q.weight * view.fit.copies)
    return None


def _flat(search: Search) -> Divergence | None:
    view = search.last
    if not view.flat:
        return None
    return Constant(view) if view.clamped else Absent(view)


def _misread(search: Search) -> Divergence | None:
    reading = search.last.reading()
    return Wrong(search.last, read_as=reading) if reading is not None else None


def _not_judged(search: Search) -> Divergence | None:
    """What may be right, and is not understood."""
    graph, latent, view = search.graph, search.latent, search.last
    above, below = graph.upstream(latent.heads), graph.downstream(latent.heads)
    beside = [
        o
        for o in search.latents
        if o is not latent
        and o.z not in graph.downstream([latent.z])
        and latent.z not in graph.downstream([o.z])
    ]
    means, scales = view.probes.moving if view.probes is not None else (torch.zeros(0) > 0,) * 2
    exact = view.fit.residual <= NEAR
    reasons: dict[str, Callable[[], bool]] = {
        "its heads are those of another latent as well":
            lambda: any({*above, *below}.intersection(o.heads) for o in beside),
        "it depends on outputs that z is not drawn with: the posterior may be a mixture":
            lambda: view.wider,
        "one head moves both its mean and its sigma":
            lambda: not latent.uniform and bool((means & scales).any()),
        "it is decoded together with another latent":
            lambda: not exact and bool(graph.upstream(search.data).intersection(search.mixed)),
        "a part of it is clamped": lambda: view.by_draws and view.clamped,
        "no function of the entries of mean and sigma by themselves":
            lambda: not (view.additive or view.misscored or view.fit.of_diagonal),
    }  # fmt: skip
    why = next((text for text, holds_true in reasons.items() if holds_true()), None)
    return Unknown(view, why=why) if why is not None else None


def _negative(search: Search) -> Divergence | None:
    a, c, d = search.last.fit.typical
    if search.last.fit.residual <= NEAR and a < 0 and c < 0 < d and abs(a - c) <= NEAR * abs(a):
        return Negative(search.last)
    return None


def _wrong(search: Search) -> Divergence:
    return Wrong(search.last)


ATTEMPTS: tuple[Callable[[Search], Divergence | None], ...] = (
    _kl, _function_of_kl, _of_some_heads, _not_measured, _other_prior, _flat, _misread,
    _not_judged, _negative, _wrong,
)  # fmt: skip
