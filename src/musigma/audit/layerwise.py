"""A flow layer by layer: which layer is wrong, also where the whole has too many elements."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_adapter import Visit, flatten, log_det_of, visits
from musigma.audit.flow_state import FlowAudit, Measurement, explain_log_det, log_det_error
from musigma.audit.sandbox import first
from musigma.audit.volume import DENSE, Volume, volume

__all__ = ["check_layers"]

MOST = 4096  # elements up to which the whole Jacobian is computed if there is time
FAILURES = (RuntimeError, AuditError, ValueError, IndexError)


def check_layers(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Compare every layer's log-determinant with its Jacobian's."""
    roots, whole = audit.sandbox.modules, unperturbed.volume is not None
    if not roots:
        return
    conditions: dict[str, float] = {}
    compared, unclear = 0, []
    for std in dict.fromkeys([audit.perturbation, *[0.0] * (not audit.slow)]):
        audit.restore()
        if std:
            audit.perturb(std)
        try:
            seen = visits(audit.flow, roots, audit.few)
        except AuditError:
            continue
        if not seen or (len(seen) == 1 and whole):
            break
        for visit in seen:
            if audit.time_left() < 0:
                unclear.append("layers beyond the time limit")
                break
            condition = _check_layer(audit, visit, std)
            if condition is None:
                unclear.append(visit.name)
                continue
            compared += 1
            if std == 0.0 and condition > 0:
                conditions[visit.name] = condition
        if not whole and not audit.noisy_log_det:
            _check_sum(audit, seen)
        _name_wrong_inverse(audit, seen)
    if compared:
        audit.checked.append(f"{compared} log-determinants, layer by layer")
    if conditions:
        audit.details["conditions"] = conditions
    elif unperturbed.stated is not None and not compared:
        unclear.append("the whole")
    if unclear and not whole:
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
    """The condition number of a layer; None if its log-determinant cannot be compared.

    By its structure, else by a corner of an image; where the corner differs, or there is none, by
    the whole Jacobian of one example.
    """
    layer = _Layer(audit, visit)
    x = visit.x if visit.x[0].numel() <= DENSE else visit.x[:1]
    for part, dense in (
        (lambda: x, DENSE),
        (lambda: _corner(layer), DENSE),
        (lambda: x[:1], MOST),
    ):
        given = part()
        if given is None or (dense == MOST and not _has_time(layer, given)):
            continue
        with suppress(*FAILURES):
            known, raw = volume(layer, given, dense), layer.stated(given)
            if known is None:
                continue
            if raw is None or not known.log_det.isfinite().all():
                return None
            stated, kind = log_det_of(raw, len(x))
            error = log_det_error(stated, known.log_det)
            if error > audit.bug_error and kind in ("example", "number"):
                if x.shape[1:] != visit.x.shape[1:]:
                    continue
                _report(audit, visit, stated, known, error, std)
            condition = float(known.condition.max())
            return condition if math.isfinite(condition) else 0.0
    return None


def _parts(layer: _Layer) -> Iterator[tuple[Tensor, int]]:
    """Inputs of a layer to compare it at, and the elements up to which J is wholly computed."""
    x = layer.visit.x
    yield (x if x[0].numel() <= DENSE else x[:1]), DENSE
    corner = _corner(layer)
    if corner is not None:
        yield corner, DENSE
    if _has_time(layer, x[:1]):
        yield x[:1], MOST


def _corner(layer: _Layer) -> Tensor | None:
    """A corner of an image that the layer takes as well."""
    x = layer.visit.x[:1]
    for side in (4, 2) if x.ndim == 4 else ():
        if x.shape[1] * side * side <= 256 and min(x.shape[2:]) > side:
            part = x[:, :, :side, :side].contiguous()
            with suppress(Exception):  # whatever a layer raises at a size it was not made for
                if layer(part).shape == (1, part[0].numel()):
                    return part
    return None


def _has_time(layer: _Layer, x: Tensor) -> bool:
    """Whether there is time for the whole Jacobian of one example, if a fault is not known yet."""
    audit = layer.audit
    if x.numel() > MOST or audit.time_left() < 4 or "logdet_mismatch" in audit.findings:
        return False
    began = time.process_time()
    with suppress(*FAILURES), torch.enable_grad():
        layer(x.clone().requires_grad_()).sum().backward()
        return (time.process_time() - began) * x.numel() < audit.time_left()
    return False


def _report(
    audit: FlowAudit, visit: Visit, stated: Tensor, known: Volume, error: float, std: float
) -> None:
    whole = audit.findings.get("logdet_mismatch")
    if whole is not None and "layer" in whole.numbers:
        return
    if audit.noisy_log_det or "logdet_shape" in audit.findings:
        return
    hint, repair = explain_log_det(stated, known.log_det, visit.x)
    when = f" with random parameters (moved by {std:g})" if std else ""
    audit.findings.pop("logdet_mismatch", None)
    audit.bug(
        "logdet_mismatch",
        f"{visit.name} states {float(stated[0]):.6g} nats, and log |det J| is "
        f"{float(known.log_det[0]):.6g}{when}{hint}",
        repair,
        layer=visit.name,
        stated=stated[:4].tolist(),
        log_det=known.log_det[:4].tolist(),
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


def _check_sum(audit: FlowAudit, seen: list[Visit]) -> None:
    """Whether the whole states the sum of its layers, where these alone change the volume."""
    image = audit.flow.forward(audit.few)
    if image.raw is None:
        return
    rows = len(audit.few)
    outputs = [audit.few, *(visit.z for visit in seen)]
    inputs = [*(visit.x for visit in seen), image.flat.detach()]
    names = [*(f"the input of {visit.name}" for visit in seen), "z"]
    for name, before, after in zip(names, outputs, inputs, strict=True):
        if not _reordered(before.reshape(rows, -1), after.reshape(rows, -1)):
            audit.unchecked.append(f"the sum of log-determinants: {name} is no layer's output")
            return
    total = torch.stack([log_det_of(visit.log_det, rows)[0] for visit in seen]).sum(0)
    stated, _ = log_det_of(image.raw, rows)
    if log_det_error(stated, total) > audit.bug_error:
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


def _reordered(a: Tensor, b: Tensor) -> bool:
    """Whether two batches hold the same numbers, example by example."""
    return a.shape == b.shape and bool((a.sort(1).values == b.sort(1).values).all())
