"""From what a flow audit measured to findings: each is a function of numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musigma.audit import flow_measurement as limits
from musigma.audit.bijection import log_det_of
from musigma.audit.findings import AuditError, Severity
from musigma.audit.flow_measurement import FlowAudit, Measurement
from musigma.audit.sandbox import TooSlowError, about_types

__all__ = ["log_det_fault", "report", "report_raising_inverse"]

# From which error of a round trip on there is a finding, and from which it is a bug. A formula
# is exact in float64: an error is that of a constant that one direction lacks. Errors up to 1e-3
# may be those of an eps of float32, which does little harm.
LIMITS = {
    "": (limits.EXACT, limits.BUG),
    limits.ITERATES: (limits.TOLERANCE, limits.BUG),
    limits.SINGLE: (limits.TOLERANCE_32, limits.BUG_32),
    limits.ROUNDED: (limits.BUG, limits.BUG),
}


class Fault(NamedTuple):
    """The arguments of `ReportBuilder.find`."""

    code: str
    severity: Severity
    variant: str
    numbers: dict[str, Any]


def report(audit: FlowAudit, measured: Measurement, when: str) -> None:
    """Add a finding for every error, and a line for everything that is right."""
    why = f" ({measured.why})" if measured.why else ""
    for name, error, limit in (
        ("log-determinant against autograd", measured.log_det, audit.tolerance),
        (f"round trip{why}", measured.round_trip, LIMITS[measured.why][0]),
        ("log-determinants of both directions", measured.back_sum, audit.tolerance),
    ):
        if error <= limit:
            audit.checked.append(f"{name}, {when}: off by {error:.1g}")
    audit.compared |= not math.isnan(measured.log_det)
    faults: list[Fault] = []
    if measured.nan_log_det:
        faults.append(Fault("logdet_nan", "bug", "", {"when": when}))
    if audit.flow.invertible:
        faults += _round_trip_faults(measured, audit.square)
        if not audit.noisy_log_det:
            faults += _inverse_log_det_faults(measured, audit.tolerance, audit.bug_error)
    shape = list(_shape_faults(measured, audit.tolerance, audit.bug_error))
    faults += shape
    stated, truth = measured.stated, measured.truth
    if stated is not None and truth is not None and not math.isnan(measured.log_det):
        known = any(fault.severity == "bug" for fault in shape)
        if audit.noisy_log_det:
            faults += _estimate_faults(audit, truth)
        elif measured.log_det > audit.tolerance and not known:
            if audit.flow.fixed_draws and float((stated - truth).std()) > 1e-6:
                audit.compared = False
                audit.why_not = (
                    "it is not log |det J| at given noise, and may count the noise's density"
                )
            else:
                severity = "bug" if measured.log_det > audit.bug_error else "warning"
                faults.append(log_det_fault("forward", audit.x, stated, truth, severity, when))
    for code, severity, variant, numbers in faults:
        audit.find(code, severity, variant, **{"when": when, **numbers})


def report_raising_inverse(audit: FlowAudit, error: AuditError) -> None:
    """Add a finding for an inverse that raises, unless another float type may do.

    Raises:
        AuditError: If it is slow, or about types.
    """
    cause, double = error.__cause__, audit.sandbox.dtype == torch.float64
    if isinstance(error, TooSlowError) or (double and cause is not None and about_types(error)):
        raise error
    if isinstance(cause, NotImplementedError):
        audit.unchecked.append("the inverse: it is not implemented")
    else:
        code = "inverse_mismatch" if cause is None else "inverse_raises"
        audit.bug(code, "shape" if cause is None else "", reason=str(error))
    audit.flow.invertible = False


def _round_trip_faults(m: Measurement, square: bool) -> Iterator[Fault]:
    least, bug = LIMITS[m.why]
    if m.round_trip > least:
        severity = "bug" if m.round_trip > bug else "warning"
        variant = "" if severity == "bug" else "iteration" if m.why == limits.ITERATES else "small"
        numbers = {"error": m.round_trip}
        yield Fault("inverse_mismatch", severity, variant if square else "split", numbers)


def _inverse_log_det_faults(m: Measurement, tolerance: float, bug: float) -> Iterator[Fault]:
    if m.back_sum > tolerance:
        numbers = {"difference": m.back_sum}
        severity = "bug" if m.back_sum > bug else "warning"
        if m.back_same <= tolerance:
            yield Fault("inverse_logdet_sign", "bug", "", numbers)
        else:
            yield Fault("inverse_logdet_mismatch", severity, "", numbers)


def _shape_faults(m: Measurement, tolerance: float, bug: float) -> Iterator[Fault]:
    """Whether a chain of layers would add the log-determinant wrongly."""
    if m.kind == "outer":
        yield Fault("logdet_shape", "bug", "outer", {})
    if m.stated is None or m.truth is None or m.kind in ("example", "literal", "outer"):
        return
    if m.kind in ("elements", "column"):
        if m.log_det <= tolerance:
            yield Fault("logdet_shape", "warning", m.kind, {})
        return
    one, spread = float(m.stated[0]), bug * (1 + 0.01 * float(m.truth.abs().max()))
    if m.kind == "number" and float((m.truth - one).abs().max()) <= spread:
        if m.log_det <= tolerance:
            yield Fault("logdet_shape", "warning", "number", {})
        return
    numbers = {"stated": one, "per_example": m.truth.tolist()}
    for reduction, value in {"sum": float(m.truth.sum()), "mean": float(m.truth.mean())}.items():
        if len(m.truth) > 1 and abs(one - value) <= 1e-4 * (1 + abs(value)):
            yield Fault("logdet_shape", "bug", "reduced", {"reduction": reduction, **numbers})
            return
    if m.kind == "other":
        yield Fault("logdet_shape", "bug", "other", numbers)


def _estimate_faults(audit: FlowAudit, truth: Tensor) -> Iterator[Fault]:
    """A log-determinant that is estimated from draws: whether it is right on average."""
    images = [audit.flow.forward(audit.few) for _ in range(200)]
    draws = torch.stack([log_det_of(image.raw, len(audit.few))[0] for image in images])
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    spread = float(draws.std(0).mean())
    if spread > 1e-3:
        yield Fault("stochastic", "warning", "estimate", {"std": spread})
    else:
        audit.checked.append(f"the log-determinant is an estimate, to {spread:.1g} nats")
    if ((mean - truth).abs() > 8 * error + 0.05 * (1 + truth.abs())).any():
        numbers = {"stated": mean[:4].tolist(), "log_det": truth[:4].tolist()}
        yield Fault("logdet_mismatch", "bug", "estimate", numbers)


def log_det_fault(
    what: str,
    x: Tensor,
    stated: Tensor,
    truth: Tensor,
    severity: Severity,
    when: str,
    **numbers: Any,
) -> Fault:
    """A wrong log-determinant, with its likely mistake."""
    variant, fields = _likely_mistake(stated, truth, x)
    numbers |= {"stated": stated[:4].tolist(), "log_det": truth[:4].tolist()}
    error = float((stated - truth).abs().max())
    fields |= {"what": what, "when": when, **numbers, "error": error}
    return Fault("logdet_mismatch", severity, variant, fields)


def _likely_mistake(stated: Tensor, truth: Tensor, x: Tensor) -> tuple[str, dict[str, Any]]:
    """The variant of the message, and its fields."""

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= 1e-5 * (1 + float(b.abs().max()))

    if near(stated, -truth):
        return "sign", {}
    if len(truth) > 1 and near(stated, truth.sum().expand_as(truth)):
        return "batch", {}
    if near(stated, torch.zeros_like(stated)):
        return "zero", {}
    factors = {"the number of elements": x[0].numel(), "two": 2}
    if x.ndim > 2:
        image = {"the number of pixels": x[0, 0].numel(), "the number of channels": x.shape[1]}
        factors = image | {f"a side of {side}": side for side in x.shape[2:]} | factors
    for meaning, factor in factors.items():
        fields = {"factor": factor, "meaning": meaning}
        if near(stated * factor, truth):
            return "missing factor", fields
        if near(stated, truth * factor):
            return "extra factor", fields
    return "", {}
