"""From measured errors of a flow to findings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from musigma.audit.findings import Severity
from musigma.audit.flow_adapter import log_det_of
from musigma.audit.flow_state import FlowAudit, Measurement

__all__ = ["explain_log_det", "report_errors"]


def report_errors(audit: FlowAudit, measured: Measurement, when: str) -> None:
    """Add a finding for every error of a measurement, and a line for everything that is right."""
    if not measured.finite:
        return
    for name, error in (
        ("log-determinant against autograd", measured.log_det),
        ("round trip", measured.round_trip),
        ("log-determinants of both directions", measured.back_sum),
    ):
        if error <= audit.tolerance:
            audit.checked.append(f"{name}, {when}: off by {error:.1g}")
    if measured.nan_log_det:
        audit.bug(
            "logdet_nan",
            f"the log-determinant is NaN or infinite {when}, where z is finite",
            "take log |det|: torch.linalg.slogdet(W)[1], and abs() before log",
        )
    if audit.flow.invertible:
        _report_inverse(audit, measured, when)
    stated, truth = measured.stated, measured.truth
    if stated is None or measured.nan_log_det:
        return
    if truth is not None:
        _report_shape(audit, measured, stated, truth)
    if math.isnan(measured.log_det) or truth is None:
        return
    if audit.noisy_log_det:
        _report_estimate(audit, truth)
    elif measured.log_det > audit.tolerance and "logdet_shape" not in audit.findings:
        hint, repair = explain_log_det(stated, truth, audit.x)
        audit.find(
            "logdet_mismatch",
            _severity(audit, measured.log_det),
            f"forward states {float(stated[0]):.6g} nats, and log |det J| is "
            f"{float(truth[0]):.6g} {when}{hint}",
            repair,
            stated=stated[:4].tolist(),
            log_det=truth[:4].tolist(),
            error=measured.log_det,
        )


def _severity(audit: FlowAudit, error: float) -> Severity:
    return "bug" if error > audit.bug_error else "warning"


def _report_inverse(audit: FlowAudit, measured: Measurement, when: str) -> None:
    if measured.round_trip > audit.tolerance:
        severity = _severity(audit, measured.round_trip)
        if not audit.square:
            repair = "return what is split off, and take it back: drawing it anew is sampling"
        elif severity == "bug":
            repair = "invert forward's operations in reverse order, with the same constants"
        else:
            repair = "the inverse is approximate, or lacks a constant of forward (an eps)"
        audit.find(
            "inverse_mismatch",
            severity,
            f"inverse(forward(x)) differs from x by {measured.round_trip:.3g} {when}",
            repair,
            error=measured.round_trip,
        )
    if not measured.back_sum > audit.tolerance or audit.noisy_log_det:
        return
    if measured.back_same <= audit.tolerance:
        audit.bug(
            "inverse_logdet_sign",
            "the inverse returns the log-determinant of forward, with the same sign",
            "return the negative: log |det dx/dz| = -log |det dz/dx|",
            difference=measured.back_sum,
        )
    else:
        audit.find(
            "inverse_logdet_mismatch",
            _severity(audit, measured.back_sum),
            f"the log-determinants of both directions add up to {measured.back_sum:.3g}, not zero",
            "return minus what forward returns at the same x",
            difference=measured.back_sum,
        )


def _report_shape(audit: FlowAudit, measured: Measurement, stated: Tensor, truth: Tensor) -> None:
    if measured.kind in ("example", "literal"):
        return
    right = measured.log_det <= audit.tolerance
    scale = 1 + 0.01 * float(truth.abs().max())
    if measured.kind == "elements":
        if right and not audit.flow.elementwise:
            audit.warn(
                "logdet_shape",
                "the log-determinant has several numbers for each example; their sum is right",
                "sum over all axes but the first: log_det.flatten(1).sum(1)",
            )
        return
    if measured.kind == "number" and float((stated - truth).abs().max()) <= (
        audit.bug_error * scale
    ):
        if right:
            audit.warn(
                "logdet_shape",
                "the log-determinant is one number for the whole batch; it is right for each "
                "example",
                "expand it to one number per example: log_det.expand(len(x))",
            )
        return
    for reduction, value in (("sum", truth.sum()), ("mean", truth.mean())):
        error = float((stated[0] - value).abs())
        if len(truth) > 1 and error <= 1e-4 * (1 + abs(float(value))):
            audit.bug(
                "logdet_shape",
                f"the log-determinant is one number: the {reduction} over the batch",
                "sum over all axes but the first: log_det.flatten(1).sum(1)",
                stated=float(stated[0]),
                per_example=truth.tolist(),
            )
            return
    if measured.kind == "other":
        audit.bug(
            "logdet_shape",
            "the log-determinant has a shape that does not fit the batch",
            "return one number per example, shape (B,)",
        )


def _report_estimate(audit: FlowAudit, truth: Tensor) -> None:
    """A log-determinant that is estimated from draws: whether it is right on average."""
    x = audit.few(audit.x)
    draws = torch.stack(
        [log_det_of(audit.flow.forward(x.clone()).raw, len(x))[0] for _ in range(200)]
    )
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    spread = float(draws.std(0).mean())
    if spread > 1e-3:
        audit.warn(
            "stochastic",
            f"the log-determinant is an estimate with a standard deviation of {spread:.2g} nats",
            "average several draws when likelihoods are reported",
            std=spread,
        )
    else:
        audit.checked.append(f"the log-determinant is an estimate, to {spread:.1g} nats")
    if bool(((mean - truth).abs() > 8 * error + 0.05 * (1 + truth.abs())).any()):
        audit.bug(
            "logdet_mismatch",
            f"the estimate is {float(mean[0]):.4g} nats on average, and log |det J| is "
            f"{float(truth[0]):.4g}",
            "the estimator is biased: use more terms, or an unbiased number of them",
            stated=mean[:4].tolist(),
            log_det=truth[:4].tolist(),
        )


def explain_log_det(stated: Tensor, truth: Tensor, x: Tensor) -> tuple[str, str]:
    """The likely mistake in a wrong log-determinant, and its repair."""

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= 1e-5 * (1 + float(b.abs().max()))

    if near(stated, -truth):
        return ": it has the wrong sign", "negate it"
    if len(truth) > 1 and near(stated, truth.sum().expand_as(truth)):
        return ": it is summed over the batch", "sum over all axes but the first"
    if near(stated, torch.zeros_like(stated)):
        return ": none is stated", "add the logarithms of the slopes of what forward does"
    factors: list[tuple[float, str]] = []
    if x.ndim > 2:
        factors = [
            (x[0, 0].numel(), "the number of pixels"),
            (x.shape[1], "the number of channels"),
        ]
        factors += [(side, f"a side of {side}") for side in dict.fromkeys(x.shape[2:])]
    for factor, what in [*factors, (x[0].numel(), "the number of elements"), (2, "two")]:
        if near(stated * factor, truth):
            return f": a factor of {factor:g} ({what}) is missing", f"multiply it by {factor:g}"
        if near(stated, truth * factor):
            return f": a factor of {factor:g} ({what}) is too much", f"divide it by {factor:g}"
    return "", "sum the logarithms of the absolute slopes of this forward over all elements"
