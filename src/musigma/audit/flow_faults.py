"""From what a flow audit measured to findings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from musigma.audit.bijection import log_det_of
from musigma.audit.findings import AuditError, Severity
from musigma.audit.flow_measurement import EXACT, ITERATES, ROUNDED, SINGLE, FlowAudit, Measurement
from musigma.audit.sandbox import TooSlowError, about_types

__all__ = ["log_det_fault", "report", "report_raising_inverse"]

Fault = tuple[str, Severity, str, dict[str, Any]]  # code, severity, variant, numbers

# The error of a round trip from which on there is a finding, and from which on it is a bug. A
# formula is exact in float64, so a small error is that of a constant that one direction lacks.
# Fixed points, bisection and ODEs stop at about 1e-5; mistakes are a thousand times larger.
LIMITS = {"": (EXACT, 1e-3), ITERATES: (3e-4, 1e-3), SINGLE: (2e-3, 2e-2), ROUNDED: (1e-3, 1e-3)}
ODE_LIMITS = (1e-2, 5e-2)  # the same of log-determinants that are integrated numerically


def report(audit: FlowAudit, measured: Measurement, when: str) -> None:
    """Add a finding for every error, and a line for everything that is right."""
    # the Jacobian of a discretized ODE is not exactly that of its solution
    limits = ODE_LIMITS if measured.iterates else (audit.tolerance, audit.bug_error)
    solved = measured.why == ITERATES and measured.round_trip <= LIMITS[ITERATES][1]
    back_limits = ODE_LIMITS if solved else limits
    iterates = f" ({ITERATES})" if measured.iterates else ""
    why = f" ({measured.why})" if measured.why else ""
    for name, error, limit in (
        (f"log-determinant against autograd{iterates}", measured.log_det, limits[0]),
        (f"round trip{why}", measured.round_trip, LIMITS[measured.why][0]),
        ("log-determinants of both directions", measured.back_sum, back_limits[0]),
    ):
        if error <= limit:
            audit.checked.append(f"{name}, {when}: off by {error:.1g}")
    faults = list(_shape_faults(measured, *limits))
    stated, truth = measured.stated, measured.truth
    if stated is not None and truth is not None and not math.isnan(measured.log_det):
        audit.compared = True
        if audit.noisy_log_det:
            faults += _estimate_faults(audit, truth)
        elif measured.log_det > limits[0] and all(fault[1] != "bug" for fault in faults):
            if audit.flow.fixed_draws and float((stated - truth).std()) > 1e-6:
                audit.compared = False
                audit.why_not = "it is not log |det J| at given noise; it may count its density"
            else:
                severity = "bug" if measured.log_det > limits[1] else "warning"
                faults.append(log_det_fault("forward", audit.x, stated, truth, severity))
    if measured.nan_log_det:
        faults.append(("logdet_nan", "bug", "", {}))
    if audit.flow.invertible:
        faults += _round_trip_faults(measured, audit.square)
        if not audit.noisy_log_det:
            faults += _inverse_log_det_faults(measured, *back_limits)
    for code, severity, variant, numbers in faults:
        audit.find(code, severity, variant, when=when, **numbers)


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
    elif cause is None:
        audit.bug("inverse_mismatch", "shape", reason=str(error))
    else:
        audit.bug("inverse_raises", reason=str(error))
    audit.flow.invertible = False


def _round_trip_faults(m: Measurement, square: bool) -> Iterator[Fault]:
    least, bug = LIMITS[m.why]
    if m.round_trip > bug:
        yield "inverse_mismatch", "bug", "" if square else "split", {"error": m.round_trip}
    elif m.round_trip > least:
        variant = "iteration" if m.why == ITERATES else "small"
        yield "inverse_mismatch", "warning", variant, {"error": m.round_trip}


def _inverse_log_det_faults(m: Measurement, tolerance: float, bug: float) -> Iterator[Fault]:
    if m.back_sum > tolerance >= m.back_same:
        yield "inverse_logdet_sign", "bug", "", {"difference": m.back_sum}
    elif m.back_sum > tolerance:
        severity = "bug" if m.back_sum > bug else "warning"
        yield "inverse_logdet_mismatch", severity, "", {"difference": m.back_sum}


def _shape_faults(m: Measurement, tolerance: float, bug: float) -> Iterator[Fault]:
    """Whether a chain of layers would add the log-determinant wrongly."""
    if m.stated is None or m.truth is None or m.kind in ("example", "literal"):
        return
    one, truth = float(m.stated[0]), m.truth
    same = float((truth - one).abs().max()) <= bug * (1 + 0.01 * float(truth.abs().max()))
    if m.kind in ("elements", "column") or (m.kind == "number" and same):
        if m.log_det <= tolerance:
            yield "logdet_shape", "warning", m.kind, {}
        return
    numbers = {"stated": one, "per_example": truth.tolist()}
    for reduction, value in {"sum": float(truth.sum()), "mean": float(truth.mean())}.items():
        near = len(truth) > 1 and abs(one - value) <= 1e-4 * (1 + abs(value))
        if near and m.kind != "outer":
            yield "logdet_shape", "bug", "reduced", {"reduction": reduction, **numbers}
            return
    if m.kind in ("outer", "other"):
        yield "logdet_shape", "bug", m.kind, numbers


def _estimate_faults(audit: FlowAudit, truth: Tensor) -> Iterator[Fault]:
    """A log-determinant that is estimated from draws: whether it is right on average."""
    images = [audit.flow.forward(audit.few) for _ in range(200)]
    draws = torch.stack([log_det_of(image.raw, len(audit.few))[0] for image in images])
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    spread = float(draws.std(0).mean())
    if spread > 1e-3:
        yield "stochastic", "warning", "estimate", {"std": spread}
    else:
        audit.checked.append(f"the log-determinant is an estimate, to {spread:.1g} nats")
    if ((mean - truth).abs() > 8 * error + 0.05 * (1 + truth.abs())).any():
        numbers = {"stated": mean[:4].tolist(), "log_det": truth[:4].tolist()}
        yield "logdet_mismatch", "bug", "estimate", numbers


def log_det_fault(
    what: str, x: Tensor, stated: Tensor, truth: Tensor, severity: Severity
) -> Fault:
    """A wrong log-determinant, with its likely mistake."""

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= 1e-5 * (1 + float(b.abs().max()))

    def likely_mistake() -> tuple[str, dict[str, Any]]:
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
            if near(stated * factor, truth):
                return "missing factor", {"factor": factor, "meaning": meaning}
            if near(stated, truth * factor):
                return "extra factor", {"factor": factor, "meaning": meaning}
        return "", {}

    variant, fields = likely_mistake()
    numbers = {"stated": stated[:4].tolist(), "log_det": truth[:4].tolist()}
    error = float((stated - truth).abs().max())
    return (
        "logdet_mismatch",
        severity,
        variant,
        {"what": what, **fields, **numbers, "error": error},
    )
