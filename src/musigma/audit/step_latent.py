"""One latent of a step: what is drawn, its divergence in the loss, and their gradients.

The loss is looked at in one way after another. The first that explains how it depends on the
posterior gives a `Divergence`, which has its checks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from musigma.audit.findings import Assumed, Facts, Finding, Outcome, Passed, Skipped, bug, warning
from musigma.audit.latents import Latent, find_latents, holds
from musigma.audit.probes import OfLatent, Prober, gradient, packing
from musigma.audit.runs import Run, Runner, at, unexamined
from musigma.audit.scales import READINGS, Curve
from musigma.audit.step_flow import (
    check_dequantized_flow,
    check_posterior_flow,
    layers_before_prior,
)
from musigma.audit.step_kl import (
    NEAR,
    View,
    data_terms,
    inner_values,
    log_weights,
    sampled_scale,
    terms,
)
from musigma.audit.step_prior import PriorOfKL, log_normalizer, prior_heads
from musigma.audit.step_weight import (
    Beta,
    effective_beta,
    mixed_examples,
    run_of_half,
    slope_in_log_weights,
)

__all__ = ["Subject", "check_latent"]

NARROW = 0.9  # a smallest sigma above this is a bug, beside a prior of standard deviation 1
MOST_PAIRS = 36  # of a head that moves means and one that moves scales
SHIFTS = (-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass
class Subject(OfLatent):
    """A latent of a step.

    Args:
        prober: Moves the heads of the latent.
        latents: All latents of the step.
        run: The recorded step.
        runner: Runs it again.
        is_sure: Another run of it was the same but for its draws.
        curve: Sigma of what is sampled, as a function of a head.
    """

    latents: list[Latent]
    run: Run
    runner: Runner
    is_sure: bool
    curve: Curve | None = None

    @property
    def loss(self) -> int:
        """The number of the loss."""
        return self.run.loss

    @property
    def reading(self) -> str | None:
        """How the sampler reads the second head; None if it has no name."""
        if not self.latent.diagonal:
            return "full covariance"
        return self.curve.name if self.curve is not None and self.curve.named else None

    @property
    def is_alone(self) -> bool:
        """Whether the step has no other latent."""
        return len(self.latents) == 1

    def is_data(self, view: View) -> bool:
        """Whether a loss sends z no gradient, and trains its encoder by another draw."""
        graph, trained = self.graph, self.graph.connected([self.loss])
        above = graph.upstream(self.latent.heads)
        layers = {i for i in above if graph[i].kind == "parameter"}
        own = {self.latent.z, *self.latent.heads}
        return view.flat and not trained & own and layers <= trained

    def flow(self) -> list[Outcome]:
        """What is said of a flow between the draw and the prior; nothing if there is none."""
        found = check_posterior_flow(self.prober, self.loss) if self.is_alone else []
        constants = Skipped("the constants of the KL: there is a flow between z and its prior")
        return [*found, constants] if found else []


def check_latent(on: Subject) -> Iterator[Outcome]:
    """Examine the posterior, the KL and the gradients of one latent."""
    latent, shape = on.latent, on.graph[on.latent.z].shape
    divergence = find_divergence(on.prober, on.latents, on.loss)
    if on.is_data(divergence.view):
        yield Skipped(f"z{at(latent.where)}: detached, as data of an adversary")
        return
    curve = sampled_scale(divergence.view.prober) or sampled_scale(on.prober)
    on = replace(on, curve=curve)
    details = {} if curve is None else {"convention": curve.to_dict()}
    yield Facts(convention=on.reading, layout=packing(on.prober), details=details)
    text = curve.text if curve is not None and curve.named else "a function without a name"
    how = (
        f"sigma * noise, with sigma = {text}"
        if latent.diagonal
        else "L noise, a full or low-rank covariance"
    )
    yield Passed(f"z of shape {tuple(shape)}{at(latent.where)}: mean + {how}")
    if latent.shared:
        noise = tuple(latent.noise_shape)
        yield bug("noise_shared", "step", where=latent.where, noise=noise, shape=tuple(shape))
    if curve is not None and curve.name != "unit variance" and curve.smallest >= NARROW:
        yield warning("sigma_range_restricted", where=latent.where, smallest=curve.smallest)
    yield from divergence.check(on)
    if on.run.differentiable and on.prober.usable:
        yield from _check_gradient(on, divergence)


def _check_gradient(on: Subject, d: Divergence) -> Iterator[Outcome]:
    """Whether the gradients of the decoder and of the KL reach the heads."""
    graph, latent, prober = on.graph, on.latent, on.prober
    entries = dict(zip(("mean", "standard deviation"), prober.moving, strict=True))

    def lost(stopped: Tensor) -> str:
        return " and the ".join(name for name, own in entries.items() if (own & stopped).any())

    order = torch.linspace(0.5, 1.5, graph[latent.z].numel, dtype=torch.float64)
    stopped = prober.stopped(latent.z, {}, lambda z: (order * z.reshape(-1)).sum())
    data = graph.connected([on.loss])
    decoder = holds(graph, latent)
    scored = data.intersection(data_terms(graph, on.latents, on.loss), graph.downstream(decoder))
    scored = {t for t in scored if not graph.connected([t]).intersection(decoder)}
    by_score = graph.connected(scored, stop=[latent.z])
    used = len(graph.downstream([latent.z]) & graph.upstream([on.loss])) > 1
    if latent.z not in data:
        stopped |= True
    if used and not by_score.intersection(latent.heads) and (head := lost(stopped)):
        yield bug("no_gradient", where=latent.where, head=head)
    elif latent.z in data and (head := lost(d.stopped(on))):
        if on.is_alone:
            yield bug("no_gradient", "kl", where=d.view.where, head=head)
        else:
            why = f"it does not reach the {head} of z; a stop that is meant, or a fault"
            yield unexamined("the gradient of the KL", d.view.where, why)


# --- what a loss may have of the divergence -----------------------------------------------------


@dataclass
class Divergence:
    """What a loss has of a latent's divergence, as it is seen in a view."""

    view: View

    @property
    def weight(self) -> float:
        """Its weight in the loss, per latent of one example; NaN if it is not known."""
        return self.view.fit.weight if self.view.fit.is_kl else math.nan

    def check(self, on: Subject) -> Iterator[Outcome]:
        """Compare it with what the loss should have."""
        raise NotImplementedError

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        """Compare its weight with that of the reconstruction."""
        graph, latent, where, weight = on.graph, on.latent, self.view.where, self.weight
        if all(graph[i].kind == "parameter" for i in latent.heads):
            return  # weights of a Bayesian network
        if latent.z not in graph.connected([on.loss]):
            return  # no reconstruction, but its score
        beta = effective_beta(self.view, on.latents, on.loss, weight)
        if beta is not None and beta.opposed:
            yield bug("kl_negative", "step reconstruction", where=where)
        elif beta is None:
            yield Skipped(
                f"the weight of the KL{at(where)}: no known likelihood belongs to it alone; the "
                f"KL of one latent has the weight {weight:.4g}"
            )
        elif not beta.is_one and (found := self._half_batch(on, beta)):
            n, times = found
            yield bug("reduction_imbalance", "step batch", where=where, n=n, m=n // 2, times=times)
        else:
            yield Facts(details={"beta": beta.value})
            numbers = {"beta": beta.value, "text": beta.text, "explained": beta.explained}
            imbalance = warning("reduction_imbalance", "step", where=where, **numbers)
            yield Passed(f"the KL has the weight {beta.text}") if beta.is_one else imbalance

    def _half_batch(self, on: Subject, beta: Beta) -> tuple[int, float] | None:
        """The examples of the step, and what its beta is multiplied with by half of them.

        None if it is the same, or if the step does not run with half a batch.
        """
        found = run_of_half(on.runner, on.graph, on.latents, on.loss) if on.is_sure else None
        if found is None:
            return None
        rows, again = found
        others = find_latents(again.graph, again.loss)
        if len(others) != len(on.latents):
            return None
        prober = Prober(again.graph, others[on.latents.index(on.latent)])
        other = find_divergence(prober, others, again.loss)
        half = effective_beta(other.view, others, again.loss, other.weight)
        times = half.value / beta.value if half is not None else math.nan
        powers = [(rows // 2 / rows) ** k for k in (-2, -1, 1, 2)]  # of the number of examples
        return (rows, times) if any(abs(times / p - 1) <= 0.01 for p in powers) else None

    def stopped(self, on: Subject) -> Tensor:
        """The entries of the heads that its gradient should reach, and does not."""
        return torch.zeros(on.prober.moments[0].shape[1], dtype=torch.bool)


class KL(Divergence):
    """A KL divergence to Gaussians."""

    of_what = ""

    def check(self, on: Subject) -> Iterator[Outcome]:
        view, latent, where = self.view, on.latent, self.view.where
        if _tied(on.prober):
            yield bug("heads_tied", "step", where=latent.where)
            return
        if latent.uniform:
            yield bug("noise_not_gaussian", "step", where=latent.where)
            return
        yield Facts(read_as=on.reading)
        if on.is_alone and layers_before_prior(on.prober, on.loss):
            why = ("the loss depends on z by layers, but not by what is compared with data; this "
                   "is not the log-determinant of a flow that is understood")  # fmt: skip
            yield from on.flow() or [unexamined("the prior of z", latent.where, why)]
            return
        if not view.fit.scales.any() and (read := self._reading_unused(on)):
            yield bug("kl_mismatch", "step unused", where=where, read=read)
            return
        prior = PriorOfKL(view)
        if prior.is_slip:
            yield bug("kl_mismatch", "step factor", where=where)
            return
        error = None if view.fit.is_standard else prior.error
        if error is not None and error > NEAR:
            if prior.is_off_by_width:
                yield bug("kl_mismatch", "step width", where=where)
                return
            yield unexamined("the prior of the KL", where, "when its own mean and scale are "
                             f"moved, the loss is off by {error:.2g} of the change of a KL: the "
                             "prior may be a mixture, or be used elsewhere too")  # fmt: skip
            return
        if on.run.differentiable and prior.is_stopped_in_part:
            why = ("a part of it does not reach the prior's own mean and width; a stop that is "
                   "meant, or a fault")  # fmt: skip
            yield unexamined("the gradient of the KL", where, why)
        moved = "" if error is None else ", in which the loss is that KL as well"
        how = "by draws" if view.by_draws else "in closed form"
        to = prior.name
        yield Passed(f"KL ({how}) of what is sampled to {to}{moved}{at(where)}{self.of_what}")
        yield from self.check_value(on, prior.offset)
        yield from self.check_weight(on)

    def _reading_unused(self, on: Subject) -> str | None:
        """The reading of an output that no draw uses, where sigma is a constant."""
        for i in prior_heads(self.view):
            unused = not any(latent.z in on.graph.downstream([i]) for latent in on.latents)
            prober = Prober(on.graph, on.latent, (*self.view.heads, i))
            if unused and prober.usable and (read := replace(self.view, prober=prober).reading()):
                return read
        return None

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        """Compare its value where the posterior is the prior with zero."""
        where = self.view.where
        if offset is None:
            yield Skipped(f"the constants of the KL{at(where)}: other terms stand beside it")
        elif abs(offset) <= NEAR:
            return
        elif self.view.passes("abs"):
            yield warning("kl_capacity", "step", where=where)
        else:
            found = _check_normalizer(on, self.view) if self.view.by_draws else []
            yield from found or [warning("kl_offset", "step", where=where, offset=offset)]

    def stopped(self, on: Subject) -> Tensor:
        return on.prober.stopped(on.loss, self.view.held, torch.sum, self.view.by_draws)


class KLInLogWeights(KL):
    """A KL in the log weights of an importance-weighted bound."""

    of_what = ", in the log weights of an importance-weighted bound"

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        yield from super().check_value(on, offset)
        fault = mixed_examples(on.graph, on.latents, on.loss)
        if fault is not None:
            why = "their log-sum-exp is over the examples as well"
            yield unexamined("the importance weights", fault, why)

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        graph, where = on.graph, self.view.where
        node = graph[self.view.target].node
        log_w = node.ins if node is not None else []
        if not on.run.differentiable or len(log_w) != 1 or graph[log_w[0]].numel == 1:
            return
        slope = slope_in_log_weights(graph, on.latent, on.loss, log_w[0])
        if slope == "undetached":
            yield bug("iw_gradient", "step", where=where)
        elif slope is None:
            why = (
                "the gradient that reaches the decoder is not that of an importance-weighted bound"
            )
            yield unexamined("the importance weights", where, why)
        elif not self.view.by_draws:
            yield bug("iw_value", "step", where=where)

    def stopped(self, on: Subject) -> Tensor:
        return _cut_off(on, self.view)


@dataclass
class FunctionOfKL(KL):
    """A function of a KL, such as zero times it, and the finding that says which."""

    finding: Finding
    of_what = ", of which the loss is a function"

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        yield from ()  # the function may shift it

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        yield self.finding


class OtherPrior(Divergence):
    """The entropy of q is right, and the prior is no Gaussian."""

    @property
    def weight(self) -> float:
        return self.view.log_q.weight if self.view.log_q is not None else math.nan

    def check(self, on: Subject) -> Iterator[Outcome]:
        view = self.view
        yield Facts(read_as=on.reading)
        yield Passed(f"log q(z) in the loss is that of what is sampled{at(view.where)}")
        yield from (
            on.flow()
            or check_dequantized_flow(on.graph, on.loss, on.latent, self.weight)
            or self._check_density(on)
        )

    def _check_density(self, on: Subject) -> Iterator[Outcome]:
        """Whether a prior of a known form is a density; and its weight."""
        found = _check_normalizer(on, self.view)
        if not found:
            why = "a function of z that is neither Gaussian, nor a product over latents, nor a "
            yield unexamined("the prior of z", on.latent.where, f"{why}mixture that is understood")
        yield from found
        if all(isinstance(outcome, Passed) for outcome in found):
            yield from self.check_weight(on)

    def stopped(self, on: Subject) -> Tensor:
        scored = on.graph.upstream([on.loss]).intersection(on.latent.zs)
        if not scored <= on.graph.connected([on.loss]):
            return torch.ones(on.prober.moments.shape[2], dtype=torch.bool)
        return _cut_off(on, self.view)


@dataclass
class Wrong(Divergence):
    """No KL divergence of what is sampled; perhaps one of the second head read otherwise."""

    read_as: str | None = None

    def check(self, on: Subject) -> Iterator[Outcome]:
        if flow := on.flow():
            yield from flow
        elif on.latent.uniform:
            yield bug("noise_not_gaussian", "step", where=on.latent.where)
        else:
            yield Facts(read_as=self.read_as)
            yield self._mismatch(on)

    def _mismatch(self, on: Subject) -> Finding:
        """What is wrong, as far as it can be told."""
        where, fit, read, curve = self.view.where, self.view.fit, self.read_as, on.curve
        if read is not None and read != on.reading:
            return _mismatch_of_readings(where, on.reading or "unnamed", read)
        if read is not None and curve is not None and curve.is_bounded:
            return warning("kl_mismatch", "bounds", where=where, curve=curve.text)
        if read is not None:
            sampled = curve.text if curve is not None else "another function"
            return bug("kl_mismatch", "step noise", where=where, read=read, sampled=sampled)
        if fit.of_diagonal:
            return bug("kl_mismatch", "step diagonal", where=where)
        if fit.residual < NEAR and fit.means.any() and fit.scales.any():
            a, c, d = fit.typical
            return bug("kl_mismatch", "step coefficients", where=where, a=a, c=c, d=d)
        return bug("kl_mismatch", "step", where=where, residual=fit.residual)


def _mismatch_of_readings(where: str, sampled: str, read: str) -> Finding:
    """The bug of a KL that reads the second output otherwise than the sampler does."""
    a, b = READINGS.get(sampled), READINGS.get(read)
    if a is None or b is None or not (a.variance and b.variance):
        return bug("kl_mismatch", "step reading", where=where, sampled=sampled, read=read)
    pairs = (("sampler", a), ("kl", b))
    words = {f"{who}_{k}": v for who, r in pairs for k, v in r._asdict().items() if k != "sigma"}
    return bug("kl_mismatch", "step variance", where=where, read_as=read, **words)


class Negative(Divergence):
    """A KL with a negative weight."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        weight, where = self.view.fit.weight, self.view.where
        beta = effective_beta(self.view, on.latents, on.loss, weight)
        if beta is None or not beta.negated:
            yield bug("kl_negative", "step", where=where, weight=weight)
            return
        yield Assumed("the step returns a bound to be maximized: its negative is audited")
        yield Passed(f"KL of what is sampled to N(0, 1){at(where)}")
        yield Facts(read_as=on.reading)


@dataclass
class Other(Divergence):
    """What has no KL, or is not understood, and what is said of it if there is no flow."""

    said: Outcome

    def check(self, on: Subject) -> Iterator[Outcome]:
        yield from on.flow() or [self.said]


# --- parts of the checks ------------------------------------------------------------------------


def _check_normalizer(on: Subject, view: View) -> list[Outcome]:
    """Whether the prior of a KL by draws integrates to one; nothing if that is not known."""
    found = log_normalizer(view)
    if found is None:
        return []
    log, accuracy = found
    if math.isinf(log):
        held = on.graph.downstream([on.latent.z]).intersection(view.held)
        another = view.fit.is_kl or not held.issubset(holds(on.graph, on.latent))
        return [] if another else [bug("kl_mismatch", "step improper", where=view.where)]
    if abs(log) > accuracy:
        return [warning("kl_offset", "step prior", where=view.where, offset=log)]
    near = "" if accuracy <= NEAR else f", to within {accuracy:.0%}"
    return [Passed(f"the prior of z{at(on.latent.where)} integrates to one{near}")]


def _tied(prober: Prober) -> bool:
    """Whether the heads of mean and sigma hold the same numbers."""
    graph, latent = prober.graph, prober.latent
    if not latent.diagonal or not prober.usable:
        return False
    place = prober.places[0]
    mean, sigma = (t.reshape(-1) for t in latent.moments(graph, {**prober.fixed, **place}))
    chosen = torch.randperm(mean.numel(), generator=torch.Generator().manual_seed(43))[:6]
    for k in chosen.tolist():
        a, b = (gradient(t[k], place) for t in (mean, sigma.abs().log()))
        sizes = a.norm(), b.norm()
        if min(sizes) < 1e-12 or float(abs(a @ b)) < 0.999999 * float(sizes[0] * sizes[1]):
            return False
    return True


def _cut_off(on: Subject, view: View) -> Tensor:
    """All entries of the heads, if none of the terms of the KL sends a gradient; else none."""
    graph, latent = on.graph, on.latent
    after = graph.downstream([latent.z, *latent.heads], stop=view.held)
    own = terms(graph, on.loss, {latent.z, *latent.heads})
    joined = graph.connected([on.loss], stop=own)
    own = [t for t in own if t in after and t not in view.held]
    cut = bool(own) and not joined.intersection(own)
    return torch.full((on.prober.moments[0].shape[1],), cut)


# --- the ways of looking at a loss --------------------------------------------------------------


def find_divergence(prober: Prober, latents: list[Latent], loss: int) -> Divergence:
    """The divergence of a latent in a loss, by the first explanation that fits."""
    graph, latent = prober.graph, prober.latent
    decoder = holds(graph, latent)
    weights = log_weights(graph, latent, loss, decoder)
    if not weights:
        return next(_explanations(Search(prober, latents, loss)))
    rest = View(prober, loss, decoder | {i: graph.get(i) for i in weights})
    if not (rest.flat or rest.fit.is_kl):
        return _unknown(rest, "it stands in weights of the draws, and in other terms")
    negative = graph.derive(lambda *t: -torch.stack([p.sum() for p in t]).sum(), weights, "sub")
    found = next(_explanations(Search(prober, latents, negative)))
    return KLInLogWeights(found.view) if type(found) is KL else found


def _unknown(view: View, why: str) -> Divergence:
    return Other(view, unexamined("the KL of z", view.latent.where, why))


@dataclass
class Search(OfLatent):
    """What is looked at in search of the divergence of a latent: the loss, or log weights."""

    latents: list[Latent]
    target: int

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
        """The target as a function of the heads, with more and more values held."""
        decoder = holds(self.graph, self.latent)
        held = (decoder | h for h in ({}, self.mixed, self.data, self.data | self.mixed))
        unlike = {frozenset(h): h for h in held}
        return [View(self.prober, self.target, h) for h in unlike.values()]

    @cached_property
    def last(self) -> View:
        """The view with most values held in which the target depends on the heads."""
        first, last = self.views[0], self.views[-1]
        return first if last.flat and not first.flat else last


def _explanations(search: Search) -> Iterator[Divergence]:
    """How a loss may depend on the posterior, likely ways first."""
    for view in search.views:
        if view.fit.is_kl:
            yield KL(view)
    yield from _functions_of_kl(search)
    yield from _kls_of_some_heads(search)
    if not search.prober.usable:
        yield _unknown(search.last, "its heads could not be moved")
    if search.last.probes is None:
        yield _unknown(search.last, "the loss is not finite where the heads are moved")
    for view in search.views:
        if view.by_draws and view.log_q is not None:
            yield OtherPrior(view)
    last, where = search.last, search.latent.where
    if last.flat and last.clamped:
        yield Other(last, bug("kl_constant", "step", where=last.where))
    elif last.flat:
        what = "the KL: the loss depends on mean and sigma of z"
        yield Other(last, unexamined(what, where, "only by what is decoded from z"))
    if (reading := last.reading()) is not None:
        yield Wrong(last, reading)
    for why in _doubts(search):
        yield _unknown(last, why)
    a, c, d = last.fit.typical
    if last.fit.residual <= NEAR and a < 0 and c < 0 < d and abs(a - c) <= NEAR * abs(a):
        yield Negative(last)
    yield Wrong(last)


def _functions_of_kl(search: Search) -> Iterator[Divergence]:
    """Where heads enter the loss by a value that is a KL, and by no linear function of it."""
    graph = search.graph
    for view in search.views:
        for i in inner_values(view):
            inner = View(view.prober, i, view.held)
            sign = -1.0 if inner.fit.weight < 0 else 1.0
            if sign < 0:
                inner = replace(inner, target=graph.derive(torch.neg, [i], "neg"))
            if inner.fit.is_kl and replace(view, held={**view.held, i: graph.get(i)}).flat:
                yield _by_slopes(view, inner, i, sign)


def _by_slopes(view: View, inner: View, i: int, sign: float) -> Divergence:
    """The form of a function of a KL, by its slopes where the KL is larger and smaller."""
    graph, base = view.graph, view.graph.get(i)
    own = (graph.value({**view.held, **inner.prober.places[0]}, i) != base).double()
    rows = []
    for shift in SHIFTS:
        t = (base + sign * shift * own).requires_grad_()
        rows.append(sign * gradient(view.at({i: t}).sum(), {i: t})[own.flatten() > 0])
    slopes = torch.stack(rows)
    size, where = float(slopes.abs().max()), inner.where
    zero = slopes.abs() <= 1e-4 * size
    steady = ((slopes.abs() - slopes.abs().amax(0)).abs() <= 1e-4 * size) | zero
    falls, rises = bool((slopes < 0).any()), bool((slopes > 0).any())
    if size <= 1e-12:
        if not all(n.name.rstrip("_") in ("mul", "div", "neg") for n in graph[i].users):
            return Other(view, bug("kl_constant", "step", where=view.where))
        finding = warning("reduction_imbalance", "step muted", where=where, beta=0.0)
    elif falls and rises:
        finding = warning("kl_capacity", "step", where=where)
    elif falls or not bool(steady.all()):
        finding = warning("kl_capacity", "function", where=where)
    elif bool((zero[-1] & ~zero.all(0)).any()):
        finding = bug("kl_constant", "step above", where=where)
    else:
        finding = warning("free_bits", "step", where=where)
    return FunctionOfKL(inner, finding)


def _kls_of_some_heads(search: Search) -> Iterator[Divergence]:
    """A KL in a pair of heads, of more that z is computed from."""
    heads, prober = search.latent.heads, search.prober
    if len(heads) == 1 or not prober.usable or math.prod(map(len, prober.movers)) > MOST_PAIRS:
        return
    pairs = ((m,) if m == s else (m, s) for m, s in itertools.product(*prober.movers))
    for pair in dict.fromkeys(pairs):
        part = Prober(search.graph, search.latent, pair) if set(pair) != set(heads) else prober
        for view in search.views if part is not prober and part.usable else []:
            if (seen := replace(view, prober=part)).fit.is_kl:
                yield KL(seen)


def _doubts(search: Search) -> Iterator[str]:
    """Why what is not understood may be right."""
    graph, latent, view = search.graph, search.latent, search.last
    means, scales = view.probes.moving if view.probes is not None else (torch.zeros(0) > 0,) * 2
    near = graph.upstream(latent.heads) | graph.downstream(latent.heads)
    path = graph.upstream([latent.z]) | graph.downstream([latent.z])
    if any(near.intersection(o.heads) for o in search.latents if o.z not in path):
        yield "its heads are those of another latent as well"
    if view.wider:
        yield "it depends on outputs that z is not drawn with: the posterior may be a mixture"
    if not latent.uniform and bool((means & scales).any()):
        yield "one head moves both its mean and its sigma"
    together = bool(graph.upstream(search.data).intersection(search.mixed))
    if view.fit.residual > NEAR and together:
        yield "it is decoded together with another latent"
    if view.by_draws and view.clamped:
        yield "a part of it is clamped"
    if not (view.additive or view.misscored or view.fit.of_diagonal):
        yield "no function of the entries of mean and sigma by themselves"
