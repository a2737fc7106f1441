"""What a flow audit measures of one batch, and the faults that follow from it.

`measure` runs a batch through a flow and back. `judge` compares: the log-determinant with that of
the Jacobian, the inverse's output with the batch, and the log-determinants of both directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from musigma.audit.bijection import FlowAdapter, Image, called_layers
from musigma.audit.findings import (
    AuditError,
    Finding,
    Outcome,
    Passed,
    Severity,
    bug,
    distance,
    has,
    warning,
)
from musigma.audit.jacobian import DENSE, Volume, by_differences, volume

__all__ = ["LOG_DET", "SINGLE", "Measurement", "faults_of", "judge", "log_det_error", "measure"]

# The errors from which on there is a warning, and from which on it is a bug. A formula's inverse
# is exact in float64, so a small error is that of a constant that one direction lacks.
ROUND_TRIP, LOG_DET, SINGLE = (1e-8, 1e-3), (3e-4, 1e-3), (2e-3, 2e-2)  # SINGLE: in float32
DIFFERENCES = 128  # elements up to which a Jacobian is also computed by differences


@dataclass(frozen=True)
class Measurement:
    """A batch through a flow and back.

    Args:
        flow: The flow.
        x: The batch (B, ...).
        image: z and the log-determinant, as forward returned them.
        end: The CPU time of the process until which a Jacobian without structure may take.
        known: The volume of the Jacobian at the first examples; None if it is not known.
        unknown: Why it is not known.
        conditions: The largest condition numbers by layer, of the layers that were looked at.
        back: x and the log-determinant, as the inverse returned them; None without an inverse.
        failure: What the inverse raised.
    """

    flow: FlowAdapter
    x: Tensor
    image: Image
    end: float
    known: Volume | None = None
    unknown: str = "it was not compared"
    conditions: dict[str, float] = field(default_factory=dict)
    back: Image | None = None
    failure: AuditError | None = None

    @property
    def is_square(self) -> bool:
        """Whether z has as many numbers as x."""
        return self.image.flat.shape[1] == self.x[0].numel()

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The log-determinant and that of the Jacobian, where both are finite numbers."""
        if self.image.log_det is None or self.known is None:
            return None
        pair = self.image.log_det[: len(self.known.log_det)], self.known.log_det
        return pair if all(t.isfinite().all() for t in pair) else None

    @property
    def error(self) -> float:
        """The error of the log-determinant; infinite if it cannot be compared."""
        return math.inf if self.pair is None else log_det_error(*self.pair)


def log_det_error(stated: Tensor, truth: Tensor) -> float:
    """The error of a log-determinant in nats; in percent where it is large."""
    return float(((stated - truth).abs() / (1 + 0.01 * truth.abs())).max())


def measure(flow: FlowAdapter, x: Tensor, end: float) -> Measurement:
    """Run a batch through a flow and back; the arguments are those of `Measurement`.

    The inverse is called twice, after forward was called with the examples in another order, so
    that values cached by forward do not help.
    """
    found = Measurement(flow, x, flow.forward(x), end)
    if found.image.raw is None:
        found = replace(found, unknown="forward returns none")
    elif not found.is_square:
        why = "z has another number of elements than x; return what is factored out as well"
        found = replace(found, unknown=why)
    elif found.image.log_det is not None:
        with suppress(RuntimeError, AuditError):
            found = _of_few(found) if x[0].numel() <= DENSE else _of_many(found)
    off = torch.sub(*found.pair) if flow.fixed_draws and found.pair else torch.zeros(1)
    if found.error > LOG_DET[0] and off.max() - off.min() > 1e-6:
        why = "it is not log |det J| at given noise; it may count its density"
        found = replace(found, known=None, unknown=why)
    if flow.invertible:
        with suppress(AuditError):
            flow.forward(x.flip(0))
        try:
            found = replace(found, back=flow.inverse(found.image.tree, x))
            flow.inverse(found.image.tree, x)
        except AuditError as error:
            found = replace(found, back=None, failure=error)
    return found


def _of_few(found: Measurement) -> Measurement:
    """With the volume at every example; by differences where autograd may have been cut off."""
    flow, x = found.flow, found.x
    with suppress(RuntimeError, AuditError):
        found = replace(found, known=volume(flow.latents, x))
    unsure = found.known is None or LOG_DET[0] < found.error < math.inf
    if unsure and x[0].numel() <= DIFFERENCES and x.dtype == torch.float64:
        with suppress(RuntimeError, AuditError):
            other = replace(found, known=by_differences(flow.latents, x))
            found = min(found, other, key=lambda one: one.error)
    if found.known is None:
        return found
    unknown = "J is singular or not finite at the example"
    return replace(found, conditions={"the flow": found.known.worst}, unknown=unknown)


def _of_many(found: Measurement) -> Measurement:
    """With the volume at the first example: the sum of those of layers in a row."""

    def volume_of(part: FlowAdapter, x: Tensor) -> Volume | None:
        return volume(part.latents, x, (found.end - time.process_time()) / 2)

    x, layers, volumes = found.x[:1], called_layers(found.flow, found.x[:1]), dict[str, Volume]()
    inside = [t for layer in layers for t in (layer.x, layer.z)]
    passed = [t.flatten().sort().values for t in (x, *inside, found.flow.latents(x))]
    unknown = "there are many elements, and not only layers change them"
    if layers and all(map(torch.equal, passed[::2], passed[1::2])):
        for layer in layers:
            if (known := volume_of(layer.flow, layer.x)) is None:
                unknown = f"there are many elements, and no known structure in {layer.name}"
                break
            volumes[layer.name] = known
        else:
            total = torch.stack([v.log_det for v in volumes.values()]).sum(0)
            conditions = {name: v.worst for name, v in volumes.items()}
            known = Volume(total, total * math.nan, total * math.nan)
            return replace(found, known=known, conditions=conditions)
    return replace(found, known=volume_of(found.flow, x), unknown=unknown)


def judge(found: Measurement, when: str) -> list[Finding | Passed]:
    """The faults of a measurement, each of the first layer that has it, and what is right.

    `when` says with which parameters it was made.
    """
    results = list(_judge(found, when, "forward"))
    unnamed = faults_of(results).keys() & {"logdet_mismatch", "inverse_mismatch"}
    for layer in called_layers(found.flow, found.x) if unnamed else ():
        with suppress(AuditError):
            own = faults_of(_judge(measure(layer.flow, layer.x, found.end), when, layer.name))
            for code in [c for c in own if c in unnamed and own[c].severity == "bug"]:
                unnamed.remove(code)
                fault = replace(own[code], numbers={**own[code].numbers, "layer": layer.name})
                results = [fault if has([o], code) else o for o in results]
    return results


def faults_of(outcomes: Iterable[Outcome]) -> dict[str, Finding]:
    """The findings among some outcomes, by code."""
    return {o.code: o for o in outcomes if isinstance(o, Finding)}


def _judge(found: Measurement, when: str, what: str) -> Iterator[Finding | Passed]:
    """The faults of a measurement of a flow or a layer, by name, and what is right."""
    log_det, raw = found.image.log_det, found.image.raw
    if log_det is None and raw is not None:
        yield bug("logdet_shape", shape=tuple(torch.as_tensor(raw).shape), when=when)
    elif log_det is not None and not log_det.isfinite().all():
        yield bug("logdet_nan", when=when)
    elif found.pair is not None:
        if found.flow.estimates:
            yield from _judge_estimate(found, when)
        else:
            yield from _judge_log_det(found, when, what, *found.pair)
    if found.back is not None:
        yield _judge_inverse(found, when, what, found.back)
        if not found.flow.estimates:
            yield from _judge_inverse_log_det(found, when, found.back)


def _severity(error: float, limits: tuple[float, float], x: Tensor) -> Severity | None:
    least, bug = limits if x.dtype == torch.float64 else SINGLE
    return "bug" if error > bug else "warning" if error > least else None


def _judge_log_det(
    found: Measurement, when: str, what: str, stated: Tensor, truth: Tensor
) -> Iterator[Finding | Passed]:
    """Compare the log-determinant with that of the Jacobian, and name the likely mistake."""
    x, raw = found.x, found.image.raw
    severity = _severity(found.error, LOG_DET, x)
    if severity is None:
        yield Passed(f"log-determinant against autograd: off by {found.error:.1g}, {when}")
        if isinstance(raw, Tensor) and raw.shape != x.shape[:1]:
            yield warning("logdet_shape", "right", shape=tuple(raw.shape), when=when)
        return
    factors = {2: "two", x[0].numel(): "the number of elements"}
    if x.ndim > 2:
        factors |= dict.fromkeys(x.shape[2:], "a side of the image")
        factors |= {x.shape[1]: "the number of channels", x[0, 0].numel(): "the number of pixels"}
    mistakes = [
        ("logdet_shape", "reduced", {"reduction": "sum"}, truth.sum().expand_as(truth)),
        ("logdet_shape", "reduced", {"reduction": "mean"}, truth.mean().expand_as(truth)),
        ("logdet_mismatch", "sign", {}, -truth),
    ]
    for n, meaning in factors.items():
        for factor, value in {f"{n}": truth / n, f"1/{n}": truth * n}.items():
            fields = {"factor": factor, "meaning": meaning}
            mistakes.append(("logdet_mismatch", "factor", fields, value))
    numbers = {"what": what, "when": when, "stated": stated[:4].tolist()}
    numbers |= {"log_det": truth[:4].tolist(), "error": found.error}
    for code, variant, fields, value in [*mistakes, ("logdet_mismatch", "", {}, stated)]:
        if float((stated - value).abs().max()) <= 1e-5 * (1 + float(value.abs().max())):
            yield Finding.of(code, severity, variant, **numbers, **fields)
            return


def _judge_estimate(found: Measurement, when: str) -> Iterator[Finding | Passed]:
    """Whether a log-determinant that is estimated from draws is right on average."""
    assert found.known is not None
    truth, images = found.known.log_det, [found.flow.forward(found.x) for _ in range(200)]
    draws = torch.stack([t for image in images if (t := image.log_det) is not None])
    mean, spread = (t[: len(truth)] for t in (draws.mean(0), draws.std(0)))
    if spread.mean() > 1e-3:
        yield warning("stochastic", "estimate", std=spread.mean(), when=when)
    else:
        off = float(spread.mean())
        yield Passed(f"the log-determinant is an estimate, to {off:.1g} nats, {when}")
    allowed = 8 * spread / math.sqrt(len(draws)) + 0.05 * (1 + truth.abs())
    if ((mean - truth).abs() > allowed).any():
        stated, true = mean[:4].tolist(), truth[:4].tolist()
        yield bug("logdet_mismatch", "estimate", stated=stated, log_det=true, when=when)


def _judge_inverse(found: Measurement, when: str, what: str, back: Image) -> Finding | Passed:
    error = distance(back.tree, found.x) if back.tree.isfinite().all() else math.inf
    severity = _severity(error, ROUND_TRIP, found.x)
    if severity is None or (error < 1 and _is_rounding(found, error)):
        why = "" if severity is None else ", by rounding"
        return Passed(f"round trip: off by {error:.1g}{why}, {when}")
    variant = "small" if severity == "warning" else "" if found.is_square else "split"
    return Finding.of("inverse_mismatch", severity, variant, what=what, error=error, when=when)


def _is_rounding(found: Measurement, error: float) -> bool:
    """Whether an error of a round trip is rounding, of its numbers or of stored constants.

    Where x and all constants change in the last digits of float32, the error of a formula changes
    as little, relative to itself, and rounding has another error.
    """
    sandbox, generator = found.flow.sandbox, torch.Generator().manual_seed(0)
    undo = sandbox.snapshot()

    def nudged(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator).to(t)
        return t * (1 + torch.finfo(torch.float32).eps * noise)

    x, errors = found.x, []
    with suppress(AuditError), torch.no_grad():
        for _ in range(2):
            sandbox.reseed()
            errors.append(found.flow.round_trip(x) - x)
            x = nudged(x)
            for t in filter(torch.is_floating_point, sandbox.leaves()):
                t.data = nudged(t.data)
    undo()
    return len(errors) == 2 and error < 10 * distance(*errors)


def _judge_inverse_log_det(
    found: Measurement, when: str, back: Image
) -> Iterator[Finding | Passed]:
    """Compare with either of forward's log-determinant and the Jacobian's."""
    log_det, stated = back.log_det, found.image.log_det
    if log_det is None or stated is None or not stated.isfinite().all():
        return
    pairs = [(log_det[: len(t)], t) for t in (stated, *(found.pair or ()))]
    off, same = (min(log_det_error(s * t, e) for t, e in pairs) for s in (-1, 1))
    severity = _severity(off, LOG_DET, found.x)
    if severity is None:
        yield Passed(f"log-determinants of both directions: off by {off:.1g}, {when}")
    elif _severity(same, LOG_DET, found.x) is None:
        yield bug("inverse_logdet_sign", difference=off, when=when)
    else:
        yield Finding.of("inverse_logdet_mismatch", severity, difference=off, when=when)
