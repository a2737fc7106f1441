"""A flow layer by layer: which layer is wrong, also where the whole has too many elements."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.bijection import FLAGS, Image, inverse_of, log_det_of, read
from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_faults import log_det_fault
from musigma.audit.flow_measurement import FlowAudit, Measurement, log_det_error
from musigma.audit.jacobian import DENSE, volume
from musigma.audit.sandbox import first, forward_hooks

__all__ = ["check_layers"]

MOST = 4096  # elements up to which the whole Jacobian is computed if there is time
FAILURES = (RuntimeError, AuditError, ValueError, IndexError)


def check_layers(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Compare every layer's log-determinant with its Jacobian's."""
    if not audit.sandbox.modules:
        return
    whole = unperturbed.volume is not None
    conditions: dict[str, float] = {}
    compared, unclear, adds_up = 0, [], False
    for std in dict.fromkeys([audit.perturbation, *[0.0] * (not audit.slow)]):
        audit.reset(std)
        try:
            seen = _layers(audit)
        except AuditError:
            continue
        if not seen or (len(seen) == 1 and whole):
            break
        for layer in seen:
            if audit.time_left() < 0:
                unclear.append("layers beyond the time limit")
                break
            condition = _check_layer(layer, std)
            if condition is None:
                unclear.append(layer.name)
                continue
            compared += 1
            if std == 0.0 and condition > 0:
                conditions[layer.name] = condition
        if not whole and not audit.noisy_log_det:
            adds_up |= _check_sum(audit, seen)
        _name_wrong_inverse(audit, seen)
    if compared:
        audit.checked.append(f"{compared} log-determinants, layer by layer")
        audit.compared |= adds_up and not unclear
    if conditions:
        audit.details["conditions"] = conditions
    if unclear and not whole:
        names = ", ".join(dict.fromkeys(unclear))[:200]
        audit.why_not = f"there are many elements, and no known structure in {names}"


class _Layer:
    """A call of a layer inside a flow: its input x (B, ...), its output z, its log-determinant.

    It is called as a function of x to z (B, D), without what was accumulated before it.
    """

    def __init__(self, audit: FlowAudit, name: str, module: nn.Module, args: tuple, kwargs: dict):
        self.audit, self.name, self.module = audit, f"{name} ({type(module).__name__})", module
        self.x, self.args, self.kwargs = args[0].detach(), args[1:], kwargs
        self.z, self.log_det = self.x, torch.zeros(())

    def is_total(self, value: Any) -> bool:
        """Whether an argument is a log-determinant that was accumulated before the layer."""
        return isinstance(value, Tensor) and value.shape in ((), (len(self.x),))

    def call(self, x: Tensor, **flags: Any) -> Image:
        """The layer's (z, log_det); with a flag that inverts it, its (x, log_det)."""
        rest = [torch.zeros_like(a) if self.is_total(a) else a for a in self.args]
        named = {k: torch.zeros_like(a) if self.is_total(a) else a for k, a in self.kwargs.items()}
        call = partial(self.module, **named | flags)
        return read(self.audit.sandbox.call(self.name, call, x, *rest), x, self.name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x).flat

    def round_trip_error(self) -> float:
        """How far its inverse is from x; zero if it takes more than z and what was accumulated."""
        inverse = inverse_of(self.module)
        values = [*self.args, *(v for k, v in self.kwargs.items() if k not in FLAGS)]
        if inverse is None or not all(map(self.is_total, values)):
            return 0.0
        if isinstance(inverse, partial) and inverse.func is self.module:
            back = self.call(self.z.clone(), **inverse.keywords).tree
        elif values:
            return 0.0
        else:
            back = first(self.audit.sandbox.call(self.name, inverse, self.z.clone()))
        return distance(back.reshape(self.x.shape), self.x)


def _layers(audit: FlowAudit) -> list[_Layer]:
    """The innermost layers that return (z, log_det) in a call of the flow, in their order."""
    seen: list[_Layer] = []
    names = {m: name for root in audit.sandbox.modules for name, m in root.named_modules()}

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        pair = isinstance(out, (tuple, list)) and len(out) == 2
        if not pair or not args or not all(isinstance(t, Tensor) for t in (args[0], *out)):
            return
        given, (z, raw) = args[0], out
        if len(given) != len(audit.few) or z.numel() != given.numel():
            return
        if raw.numel() not in (1, len(given)) or (raw.shape == z.shape and len(given) > 1):
            return
        inside = set(module.modules())
        if any(layer.module in inside and layer.module is not module for layer in seen):
            return  # its parts were seen
        layer = _Layer(audit, names.get(module) or "flow", module, args, kwargs)
        before = [a.detach() for a in (*args[1:], *kwargs.values()) if layer.is_total(a)]
        layer.z, layer.log_det = z.detach(), raw.detach() - (before[0] if before else 0.0)
        seen.append(layer)

    with forward_hooks(names, hook, with_kwargs=True):
        audit.flow.forward(audit.few)
    return seen


def _check_layer(layer: _Layer, std: float) -> float | None:
    """The condition number of a layer; None if its log-determinant cannot be compared.

    By its structure, else by a corner of an image; where the corner differs, or there is none, by
    the whole Jacobian of one example.
    """
    audit = layer.audit
    for x, dense in _parts(layer):
        with suppress(*FAILURES):
            known, raw = volume(layer, x, dense), layer.call(x.clone()).raw
            if known is None:
                continue
            if raw is None or not known.log_det.isfinite().all():
                return None
            stated, kind = log_det_of(raw, len(x))
            error = log_det_error(stated, known.log_det)
            if error > audit.bug_error and kind in ("example", "column", "number"):
                if x.shape[1:] != layer.x.shape[1:]:
                    continue
                whole = audit.findings.get("logdet_mismatch")
                known_already = whole is not None and "layer" in whole.numbers
                if not (known_already or audit.noisy_log_det or "logdet_shape" in audit.findings):
                    audit.findings.pop("logdet_mismatch", None)
                    fault = log_det_fault(layer.name, x, stated, known.log_det, "bug")
                    code, severity, variant, numbers = fault
                    when = f"with random parameters (moved by {std:g})"
                    numbers |= {"when": when if std else "with its own parameters"}
                    audit.find(code, severity, variant, layer=layer.name, **numbers)
            condition = float(known.condition.max())
            return condition if math.isfinite(condition) else 0.0
    return None


def _parts(layer: _Layer) -> Iterator[tuple[Tensor, int]]:
    """Inputs of a layer to compare it at, and the elements up to which J is wholly computed."""
    x = layer.x
    yield (x if x[0].numel() <= DENSE else x[:1]), DENSE
    corner = _corner(layer)
    if corner is not None:
        yield corner, DENSE
    if _has_time(layer, x[:1]):
        yield x[:1], MOST


def _corner(layer: _Layer) -> Tensor | None:
    """A corner of an image that the layer takes as well."""
    x = layer.x[:1]
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


def _name_wrong_inverse(audit: FlowAudit, seen: list[_Layer]) -> None:
    """Name the layer whose own round trip fails, where the whole flow's fails."""
    whole = audit.findings.get("inverse_mismatch")
    if whole is None or whole.severity != "bug" or "layer" in whole.numbers:
        return
    for layer in seen:
        with suppress(AuditError, RuntimeError):
            if layer.round_trip_error() > audit.bug_error and "error" in whole.numbers:
                del audit.findings["inverse_mismatch"]
                audit.bug("inverse_mismatch", "layer", **whole.numbers, layer=layer.name)
                return


def _check_sum(audit: FlowAudit, seen: list[_Layer]) -> bool:
    """Whether the whole flow returns the sum of its layers; False if more changes the volume."""
    image = audit.flow.forward(audit.few)
    if image.raw is None:
        return False
    rows = len(audit.few)
    outputs = [audit.few, *(layer.z for layer in seen)]
    inputs = [*(layer.x for layer in seen), image.flat.detach()]
    names = [*(f"the input of {layer.name}" for layer in seen), "z"]
    for name, before, after in zip(names, outputs, inputs, strict=True):
        if not _reordered(before.reshape(rows, -1), after.reshape(rows, -1)):
            audit.why_not = f"there are many elements, and {name} is not the output of a layer"
            return False
    total = torch.stack([log_det_of(layer.log_det, rows)[0] for layer in seen]).sum(0)
    stated, _ = log_det_of(image.raw, rows)
    if log_det_error(stated, total) > audit.bug_error:
        audit.bug(
            "logdet_mismatch", "layers", stated=stated[:4].tolist(), log_det=total[:4].tolist()
        )
    elif not any("add up" in line for line in audit.checked):
        audit.checked.append(
            f"the log-determinants of {len(seen)} layers add up to that of the whole flow"
        )
    return True


def _reordered(a: Tensor, b: Tensor) -> bool:
    """Whether two batches hold the same numbers, example by example."""
    return a.shape == b.shape and bool((a.sort(1).values == b.sort(1).values).all())
