"""What a flow audit measures of one batch, and the faults that follow from it.

`measure` runs a batch through a flow and back. `judge` compares: the log-determinant with that of
the Jacobian, the inverse's output with the batch, and the log-determinants of both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.audit.bijection import FlowAdapter, Image, per_example
from musigma.audit.findings import (
    AuditError,
    Finding,
    Outcome,
    Passed,
    Severity,
    bug,
    distance,
    warning,
)
from musigma.audit.jacobian import DENSE, Volume, by_differences, volume

__all__ = ["LOG_DET", "SINGLE", "Measurement", "faults_of", "judge", "measure"]

# The errors from which on there is a warning, and from which on it is a bug. A formula's inverse
# is exact in float64, so a small error is that of a constant that one direction lacks.
ROUND_TRIP, LOG_DET, SINGLE = (1e-8, 1e-3), (3e-4, 1e-3), (2e-3, 2e-2)  # SINGLE: in float32
VolumeOf = Callable[[FlowAdapter, Tensor], Volume | None]
DIFFERENCES = 128  # elements up to which a Jacobian is also computed by differences


class Measurement(NamedTuple):
    """A batch through a flow and back.

    Args:
        flow: The flow.
        x: The batch (B, ...).
        image: z and the log-determinant, as forward returned them.
        stated: The log-determinant (B,); None if there is none, or its shape does not fit.
        known: That of the Jacobian for the first examples; None if it is not known.
        back: x and the log-determinant, as the inverse returned them; None without an inverse.
        failure: What the inverse raised.
    """

    flow: FlowAdapter
    x: Tensor
    image: Image
    stated: Tensor | None = None
    known: Volume | None = None
    back: Image | None = None
    failure: AuditError | None = None

    @property
    def is_square(self) -> bool:
        """Whether z has as many numbers as x."""
        return self.image.flat.shape[1] == self.x[0].numel()

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The log-determinant and that of the Jacobian, where both are finite numbers."""
        if self.stated is None or self.known is None:
            return None
        pair = self.stated[: len(self.known.log_det)], self.known.log_det
        return pair if all(t.isfinite().all() for t in pair) else None

    @property
    def error(self) -> float:
        """The error of the log-determinant; infinite if it cannot be compared."""
        return math.inf if self.pair is None else log_det_error(*self.pair)


def log_det_error(stated: Tensor, truth: Tensor) -> float:
    """The error of a log-determinant in nats; in percent where it is large."""
    return float(((stated - truth).abs() / (1 + 0.01 * truth.abs())).max())


def measure(flow: FlowAdapter, x: Tensor, large: VolumeOf) -> Measurement:
    """Run a batch through a flow and back.

    The inverse is called twice, after forward was called with the examples in another order, so
    that values cached by forward do not help.

    Args:
        flow: The flow.
        x: The batch (B, ...).
        large: What gives the volume at the first example where there are many elements.
    """
    image = flow.forward(x)
    found = Measurement(flow, x, image)
    if not image.flat.isfinite().all():
        return found
    found = found._replace(stated=per_example(image.raw, len(x)))
    if found.is_square and found.stated is not None:
        d = x[0].numel()
        with suppress(RuntimeError, AuditError):
            known = volume(flow.latents, x) if d <= DENSE else large(flow, x[:1])
            found = found._replace(known=known)
        unsure = found.known is None or (found.pair is not None and found.error > LOG_DET[0])
        if unsure and d <= DIFFERENCES and x.dtype == torch.float64:
            with suppress(RuntimeError, AuditError):  # autograd may have been cut off somewhere
                other = found._replace(known=by_differences(flow.latents, x))
                found = min(found, other, key=lambda one: one.error)
    if flow.invertible:
        with suppress(AuditError):
            flow.forward(x.flip(0))
        try:
            found = found._replace(back=flow.inverse(image.tree, x))
            flow.inverse(image.tree, x)
        except AuditError as error:
            found = found._replace(back=None, failure=error)
    return found


def judge(
    found: Measurement, when: str, what: str = "forward", *, estimated: bool = False
) -> Iterator[Finding | Passed]:
    """The faults of a measurement, and what is right.

    Args:
        found: The measurement.
        when: With which parameters it was made.
        what: The name of the flow or the layer.
        estimated: Whether the log-determinant is an estimate from draws.
    """
    stated, raw = found.stated, found.image.raw
    if stated is None and raw is not None:
        yield bug("logdet_shape", shape=tuple(torch.as_tensor(raw).shape), when=when)
    elif stated is not None and not stated.isfinite().all():
        yield bug("logdet_nan", when=when)
    elif found.pair is not None:
        judged = _judge_estimate(found, when) if estimated else _judge_log_det(found, when, what)
        yield from judged
    if found.back is not None:
        yield _judge_inverse(found, when, what, found.back)
        if not estimated:
            yield from _judge_inverse_log_det(found, when, found.back)


def faults_of(outcomes: Iterable[Outcome]) -> dict[str, Finding]:
    """The findings among what `judge` yields, by code."""
    return {o.code: o for o in outcomes if isinstance(o, Finding)}


def _severity(error: float, limits: tuple[float, float], x: Tensor) -> Severity | None:
    least, bug = limits if x.dtype == torch.float64 else SINGLE
    return "bug" if error > bug else "warning" if error > least else None


def _judge_log_det(found: Measurement, when: str, what: str) -> Iterator[Finding | Passed]:
    """Compare the log-determinant with that of the Jacobian, and name the likely mistake."""
    assert found.pair is not None
    (stated, truth), x, raw = found.pair, found.x, found.image.raw
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
    truth, raws = found.known.log_det, [found.flow.forward(found.x).raw for _ in range(200)]
    draws = torch.stack([t for raw in raws if (t := per_example(raw, len(found.x))) is not None])
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
    log_det = per_example(back.raw, len(found.x))
    if log_det is None or found.stated is None or not found.stated.isfinite().all():
        return
    pairs = [(log_det[: len(t)], t) for t in (found.stated, *(found.pair or ()))]
    off, same = (min(log_det_error(s * t, e) for t, e in pairs) for s in (-1, 1))
    severity = _severity(off, LOG_DET, found.x)
    if severity is None:
        yield Passed(f"log-determinants of both directions: off by {off:.1g}, {when}")
    elif _severity(same, LOG_DET, found.x) is None:
        yield bug("inverse_logdet_sign", difference=off, when=when)
    else:
        yield Finding.of("inverse_logdet_mismatch", severity, difference=off, when=when)
