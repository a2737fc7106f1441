"""What a loss may have of a latent's divergence, and the checks of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musigma.audit.findings import Assumed, Facts, Finding, Outcome, Passed, Skipped, bug, warning
from musigma.audit.latents import Latent, find_latents, holds, meetings
from musigma.audit.probes import OfLatent, Prober, gradient
from musigma.audit.runs import Run, Runner, at, unexamined
from musigma.audit.scales import READINGS, Curve
from musigma.audit.step_flow import (
    check_dequantized_flow,
    check_posterior_flow,
    layers_before_prior,
)
from musigma.audit.step_kl import NEAR, View, terms
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

__all__ = [
    "KL",
    "Absent",
    "Constant",
    "Divergence",
    "FunctionOfKL",
    "KLInLogWeights",
    "Negative",
    "OtherPrior",
    "Subject",
    "Unknown",
    "Wrong",
]


SLIPS = tuple(0.5 - 0.5 * math.log(d) - 0.5 / d for d in (0.5, 2.0))  # log sigma times d


@dataclass
class Subject(OfLatent):
    """A latent of a step.

    Args:
        prober: Moves the heads of the latent.
        latents: All latents of the step.
        run: The recorded step.
        runner: Runs it again.
        is_sure: Another run of it was the same but for its draws.
        find: Finds the divergence of a latent in a loss.
        curve: Sigma of what is sampled, as a function of a head.
    """

    latents: list[Latent]
    run: Run
    runner: Runner
    is_sure: bool
    find: Callable[[Prober, list[Latent], int], Divergence]
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

    def flow(self, view: View) -> list[Outcome]:
        """What is said of a flow between the draw and the prior; nothing if there is none."""
        return check_posterior_flow(self.prober, self.loss) if self.is_alone else []

    @property
    def is_alone(self) -> bool:
        """Whether the step has no other latent."""
        return len(self.latents) == 1


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

    def check(self, on: Subject) -> Iterator[Outcome]:
        """Compare it with what the loss should have."""
        raise NotImplementedError

    def stopped(self, on: Subject) -> Tensor:
        """The entries of the heads that its gradient should reach, and does not."""
        return torch.zeros(on.prober.moments[0].shape[1], dtype=torch.bool)


class KL(Divergence):
    """A KL divergence to Gaussians."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        latent, fit = on.latent, self.view.fit
        if _tied(on.prober):
            yield bug("heads_tied", "step", where=latent.where)
            return
        if latent.uniform:
            yield bug("noise_not_gaussian", "step", where=latent.where)
            return
        yield Facts(read_as=on.reading)
        if on.is_alone and layers_before_prior(on.prober, on.loss):
            yield from on.flow(self.view) or [
                unexamined("the prior of z", latent.where, "the loss depends on z by layers, but "
                           "not by what is compared with data; this is not the log-determinant of "
                           "a flow that is understood")
            ]  # fmt: skip
            return
        if not fit.scale.numel() and (read := self._reading_unused(on)):
            yield bug("kl_mismatch", "step unused", where=self.where, read=read)
            return
        offset = kl_offset(self.view)
        steady = _steady(*fit.prior)
        prior = "N(0, 1)" if fit.is_standard else _name_of_prior(*fit.prior)
        if self._is_slip(offset):
            std = float(fit.prior[1][0])
            yield bug("kl_mismatch", "step factor", where=self.where, std=std, variance=std**2)
            return
        if offset is not None and not steady and min(abs(offset - o) for o in SLIPS) < 1e-5:
            yield bug("kl_mismatch", "step logarithm", where=self.where)
            return
        error = None if fit.is_standard else prior_error(self.view)
        if error is not None and error.size > NEAR and error.of_width:
            yield bug("kl_mismatch", "step width", where=self.where)
            return
        if error is not None and error.size > NEAR:
            yield unexamined("the prior of the KL", self.where, "when its own mean and scale are "
                             f"moved, the loss is off by {error.size:.2g} of the change of a KL: "
                             "the prior may be a mixture, or be used elsewhere too")  # fmt: skip
            return
        if on.run.differentiable and is_stopped_in_part(self.view):
            yield unexamined("the gradient of the KL", self.where, "a part of it does not reach "
                             "the prior's own mean and width; a stop that is meant, or a "
                             "fault")  # fmt: skip
        moved = "" if error is None else ", in which the loss is that KL as well"
        how = "by draws" if self.view.by_draws else "in closed form"
        yield Passed(
            f"KL ({how}) of what is sampled to {prior}{moved}{at(self.where)}{self.of_what}"
        )
        yield from self.check_value(on, offset)
        yield from self.check_weight(on)

    of_what = ""

    def _reading_unused(self, on: Subject) -> str | None:
        """The reading of an output that no draw uses, where sigma is a constant."""
        view = self.view
        for i in prior_heads(view):
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

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        """Compare its value where the posterior is the prior with zero."""
        if offset is None or abs(offset) <= NEAR:
            return
        if self.view.passes("abs"):
            yield warning("kl_capacity", "step", where=self.where)
        else:
            found = _check_normalizer(on, self, gaussian=True) if self.view.by_draws else []
            yield from found or [warning("kl_offset", "step", where=self.where, offset=offset)]

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        """Compare its weight with that of the reconstruction."""
        return _check_weight(on, self)

    def stopped(self, on: Subject) -> Tensor:
        return on.prober.stopped(on.loss, self.view.held, torch.sum, self.view.by_draws)


class KLInLogWeights(KL):
    """A KL in the log weights of an importance-weighted bound."""

    of_what = ", in the log weights of an importance-weighted bound"

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        fault = mixed_examples(on.graph, on.latents, on.loss)
        if fault is not None:
            why = "their log-sum-exp is over the examples as well"
            yield unexamined("the importance weights", fault, why)

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        log_w = self.view.target
        if not on.run.differentiable or on.graph[log_w].numel == 1:
            return
        slope = slope_in_log_weights(on.graph, on.latent, on.loss, log_w)
        if slope == "undetached":
            yield bug("iw_gradient", "step", where=self.where)
        elif slope is None:
            yield unexamined("the importance weights", self.where, "the gradient that reaches the "
                             "decoder is not that of an importance-weighted bound")  # fmt: skip

    def stopped(self, on: Subject) -> Tensor:
        return _cut_off(on, self)


@dataclass
class FunctionOfKL(KL):
    """A function of a KL, such as zero times it, and the finding that says which."""

    finding: Finding | None = None
    of_what = ", of which the loss is a function"

    def check_value(self, on: Subject, offset: float | None) -> Iterator[Outcome]:
        yield from ()  # the function may shift it

    def check_weight(self, on: Subject) -> Iterator[Outcome]:
        yield from [self.finding] if self.finding is not None else []


class Constant(Divergence):
    """The loss does not depend on the heads, though a term of it was computed from them."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        yield bug("kl_constant", "step", where=self.where)


class Absent(Divergence):
    """The loss does not depend on the heads, but by the decoder."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        yield unexamined("the KL: the loss depends on mean and sigma of z", on.latent.where,
                         "only by what is decoded from z")  # fmt: skip


class OtherPrior(Divergence):
    """The entropy of q is right, and the prior is no Gaussian."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        weight = self.weight / self.view.fit.copies
        yield Facts(read_as=on.reading)
        yield Passed(f"log q(z) in the loss is that of what is sampled{at(self.where)}")
        yield from (
            on.flow(self.view)
            or check_dequantized_flow(on.graph, on.loss, on.latent, weight)
            or _check_normalizer(on, self)
            or [unexamined("the prior of z", on.latent.where, "a function of z that is neither "
                           "Gaussian, nor a product over latents, nor a mixture that is "
                           "understood")]
        )  # fmt: skip

    def stopped(self, on: Subject) -> Tensor:
        return _cut_off(on, self)


@dataclass
class Wrong(Divergence):
    """No KL divergence of what is sampled; perhaps one of the second head read otherwise."""

    read_as: str | None = None

    def check(self, on: Subject) -> Iterator[Outcome]:
        where, fit, read = self.where, self.view.fit, self.read_as
        if flow := on.flow(self.view):
            yield from flow
            return
        if on.latent.uniform:
            yield bug("noise_not_gaussian", "step", where=on.latent.where)
            return
        yield Facts(read_as=read)
        curve = on.curve
        if read is not None and read != on.reading:
            yield self._of_readings(on.reading or "unnamed", read)
        elif read is not None and curve is not None and curve.is_bounded:
            yield warning("kl_mismatch", "bounds", where=where, curve=curve.text)
        elif read is not None:
            sampled = curve.text if curve is not None else "another function"
            yield bug("kl_mismatch", "step noise", where=where, read=read, sampled=sampled)
        elif fit.of_diagonal:
            yield bug("kl_mismatch", "step diagonal", where=where)
        elif fit.residual < NEAR and fit.mean.numel() and fit.scale.numel():
            a, c, d = fit.typical
            yield bug("kl_mismatch", "step coefficients", where=where, a=a, c=c, d=d)
        else:
            yield bug("kl_mismatch", "step", where=where, residual=fit.residual)

    def _of_readings(self, sampled: str, read: str) -> Finding:
        """The bug of a KL that reads the second output otherwise than the sampler does."""
        a, b = READINGS.get(sampled), READINGS.get(read)
        if a is None or b is None or not (a.variance and b.variance):
            return bug("kl_mismatch", "step reading", where=self.where, sampled=sampled, read=read)
        words = {f"sampler_{key}": value for key, value in a._asdict().items() if key != "sigma"}
        words |= {f"kl_{key}": value for key, value in b._asdict().items() if key != "sigma"}
        return bug("kl_mismatch", "step variance", where=self.where, read_as=read, **words)


class Negative(Divergence):
    """A KL with a negative weight."""

    def check(self, on: Subject) -> Iterator[Outcome]:
        beta = effective_beta(self.view, on.latents, on.loss, self.weight)
        if beta is None or not beta.negated:
            yield bug("kl_negative", "step", where=self.where, weight=self.weight)
            return
        yield Assumed("the step returns a bound to be maximized: its negative is audited")
        yield Passed(f"KL of what is sampled to N(0, 1){at(self.where)}")
        yield Facts(read_as=on.reading)


@dataclass
class Unknown(Divergence):
    """What is not understood."""

    why: str = ""

    def check(self, on: Subject) -> Iterator[Outcome]:
        unknown = unexamined("the KL of z", on.latent.where, self.why)
        yield from on.flow(self.view) or [unknown]


# --- its prior, its weight and its gradient -----------------------------------------------------


def _steady(means: Tensor, stds: Tensor) -> bool:
    """Whether all entries have one prior."""
    return all(t.numel() and float(t.max() - t.min()) < 1e-6 for t in (means, stds))


def _name_of_prior(means: Tensor, stds: Tensor) -> str:
    if _steady(means, stds):
        return f"N({float(means[0]):.4g}, {float(stds[0]):.4g}^2)"
    return "a Gaussian whose mean and scale vary: a learned or conditional prior"


def _check_normalizer(on: Subject, d: Divergence, gaussian: bool = False) -> list[Outcome]:
    """Whether the prior of a KL by draws integrates to one; nothing if that is not known."""
    graph, latent = on.graph, on.latent
    found = log_normalizer(d.view)
    if found is None:
        return []
    log, accuracy = found
    held = graph.downstream([latent.z]).intersection(d.view.held)
    if math.isinf(log) and (gaussian or not held.issubset(holds(graph, latent))):
        return []  # another part of it may be held
    if math.isinf(log):
        weight = d.weight / d.view.fit.copies
        flow = check_dequantized_flow(graph, on.loss, latent, weight)
        return flow or [bug("kl_mismatch", "step improper", where=d.where)]
    if abs(log) > accuracy:
        return [warning("kl_offset", "step prior", where=d.where, offset=log)]
    near = "" if accuracy <= NEAR else f", to within {accuracy:.0%}"
    return [Passed(f"the prior of z{at(on.latent.where)} integrates to one{near}")]


def _check_weight(on: Subject, d: KL) -> Iterator[Outcome]:
    """Compare the weight of the KL with that of the reconstruction."""
    graph, latent = on.graph, on.latent
    if all(graph[i].kind == "parameter" for i in latent.heads):
        return  # weights of a Bayesian network
    if latent.z not in graph.connected([on.loss]):
        return  # no reconstruction, but its score
    beta = effective_beta(d.view, on.latents, on.loss, d.weight)
    if beta is not None and beta.opposed:
        yield bug("kl_negative", "step reconstruction", where=d.where)
        return
    if (beta is None or not beta.is_one) and on.is_sure:
        half = _half_batch(on, d.weight)
        if half is not None and abs(half[2] - 1) > 0.01:
            n, m, times = half
            yield bug("reduction_imbalance", "step batch", where=d.where, n=n, m=m, times=times)
            return
    if beta is None:
        yield Skipped(
            f"the weight of the KL{at(d.where)}: no known likelihood belongs to it alone; the "
            f"KL of one latent has the weight {d.weight:.4g}"
        )
        return
    yield Facts(details={"beta": beta.value})
    if beta.is_one:
        yield Passed(f"the KL has the weight {beta.text}")
    else:
        yield warning("reduction_imbalance", "step", where=d.where, beta=beta.value,
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
        again = on.runner.again()
    finally:
        for t, data in whole:
            t.data = data
    if again is None:
        return None
    others = find_latents(again.graph, again.loss)
    place = latents.index(on.latent)
    if len(others) != len(latents):
        return None
    d = on.find(Prober(again.graph, others[place]), others, again.loss)
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


def _tied(prober: Prober) -> bool:
    """Whether the heads of mean and sigma hold the same numbers."""
    graph, latent = prober.graph, prober.latent
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


def _cut_off(on: Subject, d: Divergence) -> Tensor:
    """All entries of the heads, if none of the terms of the KL sends a gradient; else none."""
    graph, latent = on.graph, on.latent
    after = graph.downstream([latent.z, *latent.heads], stop=d.view.held)
    own = terms(graph, on.loss, {latent.z, *latent.heads})
    joined = graph.connected([on.loss], stop=own)
    own = [t for t in own if t in after and t not in d.view.held]
    cut = bool(own) and not joined.intersection(own)
    return torch.full((on.prober.moments[0].shape[1],), cut)
