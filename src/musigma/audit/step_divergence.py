"""What a loss may have of a latent's divergence; each kind reports itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musigma.audit.graph import Graph
from musigma.audit.latents import Latent, find_latents, holds, meetings
from musigma.audit.probes import Prober, gradient
from musigma.audit.runs import at
from musigma.audit.scales import READINGS
from musigma.audit.step_kl import NEAR, View, sampled_scale, terms
from musigma.audit.step_posterior_flow import (
    judge_dequantized_flow,
    judge_posterior_flow,
    layers_before_prior,
)
from musigma.audit.step_prior import (
    is_stopped_in_part,
    kl_offset,
    log_normalizer,
    prior_error,
    prior_heads,
)
from musigma.audit.step_weight import (
    effective_beta,
    mixed_examples,
    reconstruction_slopes,
    slope_in_log_weights,
)

if TYPE_CHECKING:
    from musigma.audit.step import StepAudit

__all__ = [
    "KL",
    "Absent",
    "Constant",
    "Divergence",
    "FunctionOfKL",
    "KLInLogWeights",
    "MutedKL",
    "Negative",
    "OtherPrior",
    "Subject",
    "Unknown",
    "Wrong",
]


SLIPS = tuple(0.5 - 0.5 * math.log(d) - 0.5 / d for d in (0.5, 2.0))  # log sigma times d


@dataclass
class Subject:
    """A latent of a step, and the report on it."""

    audit: StepAudit
    latent: Latent
    latents: list[Latent]
    find: Callable[[Graph, Latent, list[Latent], int], Divergence]
    reading: str | None = None  # of the second head by the sampler

    @property
    def graph(self) -> Graph:
        """The recorded step."""
        return self.audit.graph

    @property
    def loss(self) -> int:
        """The number of the loss."""
        return self.audit.loss

    def missing(self, what: str, where: str, why: str) -> None:
        """Say that an essential part was not examined."""
        self.audit.missing.append(f"{what}{at(where)}: {why}")


@dataclass
class Divergence:
    """What a loss has of a latent's divergence, as it is seen in a view.

    `weight` is that of the KL in the loss, per latent of one example; NaN if it is not known.
    """

    view: View
    weight: float = math.nan

    def __post_init__(self) -> None:
        self.weight = self.view.fit.weight if math.isnan(self.weight) else self.weight

    @property
    def where(self) -> str:
        """The line of the KL."""
        return self.view.where

    def report(self, on: Subject) -> None:
        """Say what it is."""
        raise NotImplementedError

    def stopped(self, on: Subject, prober: Prober) -> Tensor:
        """The entries of the heads that its gradient should reach, and does not."""
        return torch.zeros(prober.moments[0].shape[1], dtype=torch.bool)


class KL(Divergence):
    """A KL divergence to Gaussians."""

    def report(self, on: Subject) -> None:
        audit, latent, fit = on.audit, on.latent, self.view.fit
        if _tied(on.graph, latent):
            audit.bug("heads_tied", "step", where=latent.where)
            return
        if latent.uniform:
            audit.bug("noise_not_gaussian", "step", where=latent.where)
            return
        audit.read_as = audit.read_as or on.reading
        if layers_before_prior(on.graph, latent, on.latents, on.loss):
            if not judge_posterior_flow(audit, latent, on.latents, self.view):
                on.missing("the prior of z", latent.where, "the loss depends on z by layers, but "
                           "not by what is compared with data; this is not the log-determinant of "
                           "a flow that is understood")  # fmt: skip
            return
        if not fit.scale.numel() and (read := self._reading_unused(on)):
            audit.bug("kl_mismatch", "step unused", where=self.where, read=read)
            return
        offset = kl_offset(on.graph, latent, self.view)
        steady = _steady(*fit.prior)
        prior = "N(0, 1)" if fit.is_standard else _name_of_prior(*fit.prior)
        if self._is_slip(offset):
            std = float(fit.prior[1][0])
            audit.bug("kl_mismatch", "step factor", where=self.where, std=std, variance=std**2)
            return
        if offset is not None and not steady and min(abs(offset - o) for o in SLIPS) < 1e-5:
            audit.bug("kl_mismatch", "step logarithm", where=self.where)
            return
        error = None
        if not fit.is_standard:
            error = prior_error(on.graph, latent, self.view.target, self.view)
        if error is not None and error.size > NEAR and error.of_width:
            audit.bug("kl_mismatch", "step width", where=self.where)
            return
        if error is not None and error.size > NEAR:
            on.missing("the prior of the KL", self.where, "when its own mean and scale are moved, "
                       f"the loss is off by {error.size:.2g} of the change of a KL: the prior may "
                       "be a mixture, or be used elsewhere too")  # fmt: skip
            return
        if audit.differentiable and is_stopped_in_part(on.graph, latent, self.view):
            on.missing("the gradient of the KL", self.where, "a part of it does not reach the "
                       "prior's own mean and width; a stop that is meant, or a fault")  # fmt: skip
        moved = "" if error is None else ", in which the loss is that KL as well"
        how = "by draws" if self.view.by_draws else "in closed form"
        audit.checked.append(
            f"KL ({how}) of what is sampled to {prior}{moved}{at(self.where)}{self.of_what}"
        )
        self.compare_value(on, offset)
        self.compare_weight(on)

    of_what = ""

    def _reading_unused(self, on: Subject) -> str | None:
        """The reading of an output that no draw uses, where sigma is a constant."""
        view = self.view
        for i in prior_heads(on.graph, on.latent, on.loss, view):
            unused = not any(latent.z in on.graph.downstream([i]) for latent in on.latents)
            prober = Prober(on.graph, on.latent, (*view.heads, i))
            if unused and prober.usable:
                read = replace(view, prober=prober).reading()
                if read is not None:
                    return read
        return None

    def _is_slip(self, offset: float | None) -> bool:
        """Whether the prior is one that nobody writes: N(0, 2) or N(0, 1/2)."""
        means, stds = self.view.fit.prior
        return (
            _steady(means, stds)
            and not self.view.fit.is_standard
            and abs(float(means[0])) < 1e-6
            and min(abs(float(stds[0]) ** 2 - r) for r in (2.0, 0.5)) < 1e-6
            and (offset is None or abs(offset) > NEAR)
        )

    def compare_value(self, on: Subject, offset: float | None) -> None:
        if offset is None or abs(offset) <= NEAR:
            return
        if self.view.passes("abs"):
            on.audit.warn("kl_capacity", "step", where=self.where)
        elif not (self.view.by_draws and _normalized(on, self, gaussian=True)):
            on.audit.warn("kl_offset", "step", where=self.where, offset=offset)

    def compare_weight(self, on: Subject) -> None:
        _weigh(on, self)

    def stopped(self, on: Subject, prober: Prober) -> Tensor:
        return prober.stopped(on.loss, self.view.held, torch.sum, self.view.by_draws)


class KLInLogWeights(KL):
    """A KL in the log weights of an importance-weighted bound."""

    of_what = ", in the log weights of an importance-weighted bound"

    def compare_value(self, on: Subject, offset: float | None) -> None:
        fault = mixed_examples(on.graph, on.latents, on.loss)
        if fault is not None:
            on.missing("the importance weights", fault,
                       "their log-sum-exp is over the examples as well")  # fmt: skip

    def compare_weight(self, on: Subject) -> None:
        log_w = self.view.target
        if not on.audit.differentiable or on.graph[log_w].numel == 1:
            return
        slope = slope_in_log_weights(on.graph, on.latent, on.loss, log_w)
        if slope == "undetached":
            on.audit.bug("iw_gradient", "step", where=self.where)
        elif slope is None:
            on.missing("the importance weights", self.where, "the gradient that reaches the "
                       "decoder is not that of an importance-weighted bound")  # fmt: skip

    def stopped(self, on: Subject, prober: Prober) -> Tensor:
        return _cut_off(on, self, prober)


class MutedKL(KL):
    """A KL that is multiplied with zero."""

    def compare_weight(self, on: Subject) -> None:
        on.audit.warn("reduction_imbalance", "step muted", where=self.where, beta=0.0)


@dataclass
class FunctionOfKL(KL):
    """A function of a KL, by the `form` of its slope."""

    form: str = "other"
    of_what = ", of which the loss is a function"

    def compare_value(self, on: Subject, offset: float | None) -> None:
        pass  # the function may shift it

    def compare_weight(self, on: Subject) -> None:
        if self.form == "capacity":
            on.audit.warn("kl_capacity", "step", where=self.where)
        elif self.form == "capped":
            on.audit.bug("kl_constant", "step above", where=self.where)
        elif self.form == "free bits":
            on.audit.warn("free_bits", "step", where=self.where)
        else:
            on.audit.warn("kl_capacity", "function", where=self.where)


class Constant(Divergence):
    """The loss does not depend on the heads, though a term of it was computed from them."""

    def report(self, on: Subject) -> None:
        on.audit.bug("kl_constant", "step", where=self.where)


class Absent(Divergence):
    """The loss does not depend on the heads, but by the decoder."""

    def report(self, on: Subject) -> None:
        on.missing("the KL: the loss depends on mean and sigma of z", on.latent.where,
                   "only by what is decoded from z")  # fmt: skip


class OtherPrior(Divergence):
    """The entropy of q is right, and the prior is no Gaussian."""

    def report(self, on: Subject) -> None:
        audit, latent = on.audit, on.latent
        audit.read_as = audit.read_as or on.reading
        audit.checked.append(f"log q(z) in the loss is that of what is sampled{at(self.where)}")
        known = (
            judge_posterior_flow(audit, latent, on.latents, self.view)
            or judge_dequantized_flow(audit, latent, self.weight / self.view.fit.copies)
            or _normalized(on, self)
        )
        if not known:
            on.missing("the prior of z", latent.where, "a function of z that is neither Gaussian, "
                       "nor a product over latents, nor a mixture that is understood")  # fmt: skip

    def stopped(self, on: Subject, prober: Prober) -> Tensor:
        return _cut_off(on, self, prober)


@dataclass
class Wrong(Divergence):
    """No KL divergence of what is sampled; perhaps one of the second head read otherwise."""

    read_as: str | None = None

    def report(self, on: Subject) -> None:
        audit, where, fit = on.audit, self.where, self.view.fit
        if judge_posterior_flow(audit, on.latent, on.latents, self.view):
            return
        if on.latent.uniform:
            audit.bug("noise_not_gaussian", "step", where=on.latent.where)
            return
        audit.read_as = self.read_as
        curve = sampled_scale(on.graph, on.latent)
        if self.read_as is not None and self.read_as != on.reading:
            self._report_readings(on, on.reading or "unnamed")
        elif self.read_as is not None and curve is not None and curve.is_bounded:
            audit.warn("kl_mismatch", "bounds", where=where, curve=curve.text)
        elif self.read_as is not None:
            audit.bug("kl_mismatch", "step noise", where=where, read=self.read_as,
                      sampled=curve.text if curve is not None else "another function")  # fmt: skip
        elif fit.of_diagonal:
            audit.bug("kl_mismatch", "step diagonal", where=where)
        elif fit.residual < NEAR and fit.mean.numel() and fit.scale.numel():
            a, c, d = fit.typical
            audit.bug("kl_mismatch", "step coefficients", where=where, a=a, c=c, d=d)
        else:
            audit.bug("kl_mismatch", "step", where=where, residual=fit.residual)

    def _report_readings(self, on: Subject, sampled: str) -> None:
        """Report a KL that reads the second output otherwise than the sampler does."""
        a, b = READINGS.get(sampled), READINGS.get(self.read_as or "")
        report = functools.partial(on.audit.bug, "kl_mismatch", where=self.where)
        if a is None or b is None or not (a.variance and b.variance):
            report("step reading", sampled=sampled, read=self.read_as)
            return
        words = {f"sampler_{key}": value for key, value in a._asdict().items() if key != "sigma"}
        words |= {f"kl_{key}": value for key, value in b._asdict().items() if key != "sigma"}
        report("step variance", read_as=self.read_as, **words)


class Negative(Divergence):
    """A KL with a negative weight."""

    def report(self, on: Subject) -> None:
        audit, where = on.audit, self.where
        beta = effective_beta(on.graph, on.latents, on.latent, on.loss, self.weight)
        if beta is None or not beta.negated:
            audit.bug("kl_negative", "step", where=where, weight=self.weight)
            return
        audit.assumed.append("the step returns a bound to be maximized: its negative is audited")
        audit.checked.append(f"KL of what is sampled to N(0, 1){at(where)}")
        audit.read_as = audit.read_as or on.reading


@dataclass
class Unknown(Divergence):
    """What is not understood."""

    why: str = ""

    def report(self, on: Subject) -> None:
        if not judge_posterior_flow(on.audit, on.latent, on.latents, self.view):
            on.missing("the KL of z", on.latent.where, self.why)


# --- its prior, its weight and its gradient -----------------------------------------------------


def _steady(means: Tensor, stds: Tensor) -> bool:
    """Whether all entries have one prior."""
    return all(t.numel() and float(t.max() - t.min()) < 1e-6 for t in (means, stds))


def _name_of_prior(means: Tensor, stds: Tensor) -> str:
    if _steady(means, stds):
        return f"N({float(means[0]):.4g}, {float(stds[0]):.4g}^2)"
    return "a Gaussian whose mean and scale vary: a learned or conditional prior"


def _normalized(on: Subject, d: Divergence, gaussian: bool = False) -> bool:
    """Examine the prior of a KL by draws; False if that cannot be done."""
    graph, latent = on.graph, on.latent
    found = log_normalizer(graph, latent, d.view)
    if found is None:
        return False
    log, accuracy = found
    held = graph.downstream([latent.z]).intersection(d.view.held)
    if math.isinf(log) and (gaussian or not held.issubset(holds(graph, latent))):
        return False  # another part of it may be held
    if math.isinf(log) and judge_dequantized_flow(on.audit, latent, d.weight / d.view.fit.copies):
        return True
    if math.isinf(log):
        on.audit.bug("kl_mismatch", "step improper", where=d.where)
    elif abs(log) > accuracy:
        on.audit.warn("kl_offset", "step prior", where=d.where, offset=log)
    else:
        near = "" if accuracy <= NEAR else f", to within {accuracy:.0%}"
        on.audit.checked.append(f"the prior of z{at(on.latent.where)} integrates to one{near}")
    return True


def _weigh(on: Subject, d: Divergence) -> None:
    """Compare the weight of the KL with that of the reconstruction."""
    audit, graph, latent = on.audit, on.graph, on.latent
    if all(graph[i].kind == "parameter" for i in latent.heads):
        return  # weights of a Bayesian network
    if latent.z not in graph.connected([on.loss]):
        return  # no reconstruction, but its score
    beta = effective_beta(graph, on.latents, latent, on.loss, d.weight)
    if beta is not None and beta.opposed:
        audit.bug("kl_negative", "step reconstruction", where=d.where)
        return
    if (beta is None or not beta.is_one) and not audit.missing:
        half = _half_batch(on, d.weight)
        if half is not None and abs(half[2] - 1) > 0.01:
            n, m, times = half
            audit.bug("reduction_imbalance", "step batch", where=d.where, n=n, m=m, times=times)
            return
    if beta is None:
        audit.unchecked.append(
            f"the weight of the KL{at(d.where)}: no known likelihood belongs to it alone; the "
            f"KL of one latent has the weight {d.weight:.4g}"
        )
        return
    audit.details.setdefault("beta", beta.value)
    if beta.is_one:
        audit.checked.append(f"the KL has the weight {beta.text}")
    else:
        audit.warn("reduction_imbalance", "step", where=d.where, beta=beta.value,
                   text=beta.text, explained=beta.explained)  # fmt: skip


def _half_batch(on: Subject, weight: float) -> tuple[int, int, float] | None:
    """The examples of the step, half of them, and what their beta is multiplied with.

    None if the step does not run with half a batch.
    """
    graph, latents = on.graph, on.latents
    met = meetings(graph, latents, on.loss)
    shape = graph[met[0][1]].shape if met else ()
    rows = shape[0] if shape else 0
    tensors = [
        v.source
        for v in graph.values
        if v.kind == "data" and v.source is not None and v.shape[:1] == (rows,)
    ]
    if any(t.layout != torch.strided for t in tensors):
        return None
    before = reconstruction_slopes(graph, latents, on.loss)
    if rows < 2 or not tensors or not any(before) or any(t.requires_grad for t in tensors):
        return None
    whole = [(t, t.data) for t in tensors]
    try:
        for t in tensors:
            t.data = t.data[: rows // 2]
        again = on.audit.runner.again()
    finally:
        for t, data in whole:
            t.data = data
    if again is None:
        return None
    others = find_latents(again.graph, again.loss)
    place = latents.index(on.latent)
    if len(others) != len(latents):
        return None
    d = on.find(again.graph, others[place], others, again.loss)
    after = reconstruction_slopes(again.graph, others, again.loss)
    if len(after) != len(before) or not isinstance(d, KL):
        return None
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a and b]
    times = [(d.weight / weight) / (b / a) for a, b in pairs]
    if not times or max(times) > 1.01 * min(times):
        return None  # several terms, reduced in different ways
    powers = [(rows // 2 / rows) ** k for k in (-2, -1, 1, 2)]
    if min(abs(times[0] / p - 1) for p in (1.0, *powers)) > 0.01:
        return None  # not by the number of examples
    return rows, rows // 2, times[0]


def _tied(graph: Graph, latent: Latent) -> bool:
    """Whether the heads of mean and sigma hold the same numbers."""
    prober = Prober(graph, latent)
    if not latent.diagonal or not prober.usable:
        return False
    movers = prober.movers
    if all(len(ids) == 1 for ids in movers) and movers[0] != movers[1]:
        a, b = (graph.get(ids[0]).reshape(-1) for ids in movers)
        return a.numel() == b.numel() > 1 and torch.equal(a, b) and bool((a != a[0]).any())
    place = prober.places[0]
    mean, sigma = (t.reshape(-1) for t in latent.moments(graph, {**prober.fixed, **place}))
    chosen = torch.randperm(mean.numel(), generator=torch.Generator().manual_seed(43))[:6]
    for k in chosen.tolist():
        rows = [gradient(t[k], place) for t in (mean, sigma.abs().log())]
        sizes = [row.norm() for row in rows]
        if min(sizes) < 1e-12 or float(abs(rows[0] @ rows[1])) < 0.999999 * float(
            sizes[0] * sizes[1]
        ):
            return False
    return True


def _cut_off(on: Subject, d: Divergence, prober: Prober) -> Tensor:
    """All entries of the heads, if none of the terms of the KL sends a gradient; else none."""
    graph, latent = on.graph, on.latent
    after = graph.downstream([latent.z, *latent.heads], stop=d.view.held)
    own = terms(graph, on.loss, {latent.z, *latent.heads})
    joined = graph.connected([on.loss], stop=own)
    own = [t for t in own if t in after and t not in d.view.held]
    cut = bool(own) and not joined.intersection(own)
    return torch.full((prober.moments[0].shape[1],), cut)
