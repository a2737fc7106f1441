"""A flow layer by layer: which layer is wrong, also where the whole has too many elements."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_adapter import Visit, flatten, log_det_of, visits
from musigma.audit.flow_findings import explain_log_det
from musigma.audit.flow_state import FlowAudit, Measurement
from musigma.audit.sandbox import first
from musigma.audit.volume import DENSE, Volume, volume

__all__ = ["check_layers"]

FAILURES = (RuntimeError, AuditError, ValueError, IndexError)


def check_layers(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Compare every layer's log-determinant with its Jacobian's."""
    roots = audit.sandbox.modules
    if not roots:
        return
    audit.restore()
    conditions: dict[str, float] = {}
    compared, unclear = 0, []
    states = [audit.perturbation]
    if audit.perturbation and not audit.slow:
        states.append(0.0)
    for std in states:
        audit.restore()
        if std:
            audit.perturb(std)
        try:
            seen = visits(audit.flow, roots, audit.few(audit.x))
        except AuditError:
            continue
        if not seen or (len(seen) == 1 and unperturbed.volume is not None):
            break
        for visit in seen:
            if audit.time_left() < 0:
                unclear.append("layers beyond the time limit")
                break
            condition = None
            with suppress(AuditError, RuntimeError):
                condition = _check_layer(audit, visit, std)
            if condition is None:
                unclear.append(visit.name)
                continue
            compared += 1
            if std == 0.0 and condition > 0:
                conditions[visit.name] = condition
        _check_sum(audit, seen, unperturbed)
        _name_wrong_inverse(audit, seen)
    if compared:
        audit.checked.append(f"{compared} log-determinants, layer by layer")
    if conditions:
        audit.details["conditions"] = conditions
    elif unperturbed.volume is None and unperturbed.stated is not None and not compared:
        unclear.append("the whole")
    if unclear and unperturbed.volume is None:
        names = ", ".join(dict.fromkeys(unclear))[:200]
        audit.unchecked.append(f"log-determinant, because of the many elements, of: {names}")
    audit.restore()


class _Layer:
    """A layer as a function for `volume`, and the log-determinant that it states."""

    def __init__(self, audit: FlowAudit, visit: Visit):
        self.audit, self.visit = audit, visit

    def __call__(self, x: Tensor) -> Tensor:
        return flatten(self.audit.sandbox.call(self.visit.name, self.visit, x)[0])

    def stated(self, x: Tensor) -> Tensor | None:
        return self.audit.sandbox.call(self.visit.name, self.visit, x.clone())[1]


def _check_layer(audit: FlowAudit, visit: Visit, std: float) -> float | None:
    """The condition number of a layer; None if its log-determinant cannot be compared."""
    layer = _Layer(audit, visit)
    x = visit.x if visit.x[0].numel() <= DENSE else visit.x[:1]
    jacobian = None
    with suppress(RuntimeError, AuditError):
        jacobian = volume(layer, x)
    raw, whole = layer.stated(x), jacobian is not None
    if jacobian is None:
        x = _crop(visit, layer)
        if x is None:
            return _check_whole_jacobian(audit, layer, std)
        with suppress(*FAILURES):
            jacobian = volume(layer, x)
            raw = layer.stated(x)
    if jacobian is None or raw is None or not jacobian.log_det.isfinite().all():
        return None
    stated, kind = log_det_of(raw, len(x))
    error = _error(stated, jacobian.log_det)
    if error > audit.bug_error and kind in ("example", "number"):
        if not whole:
            return _check_whole_jacobian(audit, layer, std)
        _report(audit, visit, stated, jacobian, error, std)
    condition = float(jacobian.condition.max())
    return condition if math.isfinite(condition) else 0.0


def _error(stated: Tensor, log_det: Tensor) -> float:
    return float(((stated - log_det).abs() / (1 + 0.01 * log_det.abs())).max())


def _check_whole_jacobian(audit: FlowAudit, layer: _Layer, std: float) -> float | None:
    """As `_check_layer`, by the whole Jacobian of one example, if there is time for it."""
    x = layer.visit.x[:1]
    d = x.numel()
    if d > 4096 or audit.time_left() < 4 or "logdet_mismatch" in audit.findings:
        return None
    began = time.process_time()
    with suppress(*FAILURES):
        with torch.enable_grad():
            layer(x.clone().requires_grad_()).sum().backward()
        if (time.process_time() - began) * d > audit.time_left():
            return None
        jacobian, raw = volume(layer, x, dense=d), layer.stated(x)
        if jacobian is not None and raw is not None:
            stated, _ = log_det_of(raw, 1)
            error = _error(stated, jacobian.log_det)
            if error > audit.bug_error:
                _report(audit, layer.visit, stated, jacobian, error, std)
            return float(jacobian.condition.max())
    return None


def _report(
    audit: FlowAudit, visit: Visit, stated: Tensor, jacobian: Volume, error: float, std: float
) -> None:
    known = audit.findings.get("logdet_mismatch")
    if (known is not None and "layer" in known.numbers) or audit.noisy_log_det:
        return
    if "logdet_shape" in audit.findings:
        return
    hint, repair = explain_log_det(stated, jacobian.log_det, visit.x)
    when = f" with random parameters (moved by {std:g})" if std else ""
    audit.findings.pop("logdet_mismatch", None)
    audit.bug(
        "logdet_mismatch",
        f"{visit.name} states {float(stated[0]):.6g} nats, and log |det J| is "
        f"{float(jacobian.log_det[0]):.6g}{when}{hint}",
        repair,
        layer=visit.name,
        stated=stated[:4].tolist(),
        log_det=jacobian.log_det[:4].tolist(),
        error=error,
    )


def _name_wrong_inverse(audit: FlowAudit, seen: list[Visit]) -> None:
    """Name the layer whose own round trip fails, where the whole flow's fails."""
    whole = audit.findings.get("inverse_mismatch")
    if whole is None or "layer" in whole.numbers:
        return
    for visit in seen:
        if visit.back is None:
            continue
        with suppress(AuditError, RuntimeError):
            back = first(audit.sandbox.call(visit.name, visit.back, visit.z.clone()))
            if distance(back.reshape(visit.x.shape), visit.x) > audit.bug_error:
                audit.findings["inverse_mismatch"] = replace(
                    whole,
                    message=f"{whole.message}; {visit.name} does not invert itself",
                    numbers={**whole.numbers, "layer": visit.name},
                )
                return


def _check_sum(audit: FlowAudit, seen: list[Visit], unperturbed: Measurement) -> None:
    """Whether the whole states the sum of its layers, where these alone change the volume."""
    if unperturbed.volume is not None or audit.noisy_log_det:
        return
    x = audit.few(audit.x)
    image = audit.flow.forward(x.clone())
    if image.raw is None:
        return
    z, total = x.reshape(len(x), -1), torch.zeros(len(x), dtype=torch.float64)
    for visit in seen:
        if not _reordered(z, visit.x.reshape(len(x), -1)):
            audit.unchecked.append(
                f"the sum of log-determinants: the input of {visit.name} is no layer's output"
            )
            return
        z = visit.z.reshape(len(x), -1)
        total = total + log_det_of(visit.log_det, len(x))[0]
    if not _reordered(z, image.flat.detach()):
        audit.unchecked.append("the sum of log-determinants: z is no layer's output")
        return
    stated, _ = log_det_of(image.raw, len(x))
    if _error(stated, total) > audit.bug_error:
        audit.bug(
            "logdet_mismatch",
            f"the whole states {float(stated[0]):.6g} nats, and its layers together "
            f"{float(total[0]):.6g}",
            "add up the log-determinants of all layers, each once",
            stated=stated[:4].tolist(),
            log_det=total[:4].tolist(),
        )
    elif not any("add up" in line for line in audit.checked):
        audit.checked.append(f"the log-determinants of {len(seen)} layers add up to the whole's")


def _crop(visit: Visit, layer: _Layer) -> Tensor | None:
    """A corner of an image that the layer takes as well."""
    x = visit.x[:1]
    if x.ndim != 4:
        return None
    for side in (4, 2):
        if x.shape[1] * side * side <= 256 and min(x.shape[2:]) > side:
            part = x[:, :, :side, :side].contiguous()
            with suppress(Exception):  # whatever a layer raises at a size it was not made for
                if layer(part).shape == (1, part[0].numel()):
                    return part
    return None


def _reordered(a: Tensor, b: Tensor) -> bool:
    """Whether two batches hold the same numbers, example by example."""
    return a.shape == b.shape and bool((a.sort(1).values == b.sort(1).values).all())
