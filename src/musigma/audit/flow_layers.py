"""A flow layer by layer: which layer is wrong, also where the whole has too many elements."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from musigma.audit.bijection import FLAGS, FlowAdapter, inverse_of, log_det_of
from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_faults import log_det_fault
from musigma.audit.flow_measurement import FlowAudit, Measurement, log_det_error
from musigma.audit.jacobian import DENSE, volume
from musigma.audit.sandbox import forward_hooks

__all__ = ["check_layers"]

MOST = 4096  # elements up to which the whole Jacobian is computed if there is time
FAILURES = (RuntimeError, AuditError, ValueError, IndexError)


class Layer(NamedTuple):
    """A layer, and a call of it inside a flow: its input x (B, ...), its output z."""

    name: str
    flow: FlowAdapter
    x: Tensor
    z: Tensor
    log_det: Tensor  # of the layer alone


def check_layers(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Compare every layer's log-determinant with its Jacobian's."""
    whole = unperturbed.volume is not None
    conditions: dict[str, float] = {}
    compared, unclear, adds_up = 0, [], False
    for std in dict.fromkeys([audit.perturbation, *[0.0] * (not audit.slow)]):
        audit.reset(std)
        seen: list[Layer] = []
        with suppress(AuditError):
            seen = _layers(audit)
        if not seen or (len(seen) == 1 and whole):
            break
        for layer in seen:
            condition = _check_layer(audit, layer, std) if audit.time_left() > 0 else None
            compared += condition is not None
            if condition is None:
                unclear.append(layer.name)
            elif std == 0.0 and condition > 0:
                conditions[layer.name] = condition
        if not whole and not audit.noisy_log_det:
            adds_up |= _check_sum(audit, seen)
        _name_wrong_inverse(audit, seen)
    if compared:
        audit.checked.append(f"{compared} log-determinants, layer by layer")
        audit.compared |= adds_up and not unclear
    if conditions:
        audit.details["conditions"] = conditions
    audit.reset()
    known = whole or audit.compared or "logdet_mismatch" in audit.findings
    if not known and unperturbed.stated is not None:
        flow = Layer("forward", audit.flow, audit.few, audit.few, torch.zeros(()))
        audit.compared = _check_layer(audit, flow, 0.0) is not None
    if unclear and not whole:
        names = ", ".join(dict.fromkeys(unclear))[:200]
        audit.why_not = f"there are many elements, and no known structure or no time in {names}"


def _layers(audit: FlowAudit) -> list[Layer]:
    """The innermost layers that return (z, log_det) in a call of the flow, in their order."""
    seen: list[tuple[nn.Module, Layer]] = []
    names = {m: name for root in audit.sandbox.modules for name, m in root.named_modules()}
    rows = len(audit.few)

    def is_total(value: Any) -> bool:  # accumulated before the layer
        return isinstance(value, Tensor) and value.shape in ((), (rows,))

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        pair = isinstance(out, (tuple, list)) and len(out) == 2
        if not pair or not args or not all(isinstance(t, Tensor) for t in (args[0], *out)):
            return
        x, (z, raw) = args[0].detach(), out
        if len(x) != rows or z.numel() != x.numel() or raw.numel() not in (1, rows):
            return
        inside = set(module.modules())
        if raw.shape == z.shape or any(m in inside and m is not module for m, _ in seen):
            return  # its parts were seen
        rest, named = tree_map_only(
            Tensor, lambda t: torch.zeros_like(t) if is_total(t) else t, (args[1:], kwargs)
        )
        inverse = inverse_of(module)
        if isinstance(inverse, partial) and inverse.func is module:
            inverse = partial(_call, module, rest, named | inverse.keywords)
        if not all(map(is_total, [*args[1:], *(v for k, v in named.items() if k not in FLAGS)])):
            inverse = None
        flow = FlowAdapter(audit.sandbox, partial(_call, module, rest, named), inverse)
        before = [t.detach() for t in tree_leaves((args[1:], kwargs)) if is_total(t)]
        log_det = raw.detach() - (before[0] if before else 0.0)
        name = f"{names.get(module) or 'flow'} ({type(module).__name__})"
        seen.append((module, Layer(name, flow, x, z.detach(), log_det)))

    with forward_hooks(names, hook, with_kwargs=True):
        audit.flow.forward(audit.few)
    return [layer for _, layer in seen]


def _call(module: nn.Module, rest: tuple, named: dict, x: Tensor) -> Any:
    return module(x, *rest, **named)


def _check_layer(audit: FlowAudit, layer: Layer, std: float) -> float | None:
    """The condition number of a layer; None if its log-determinant cannot be compared.

    By its structure, else by a corner of an image; where the corner differs, or there is none, by
    the whole Jacobian of one example.
    """
    for x, dense in _parts(audit, layer):
        with suppress(*FAILURES):
            known, raw = volume(layer.flow.latents, x, dense), layer.flow.forward(x).raw
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
                    numbers |= {"when": audit.when(std), "layer": layer.name}
                    audit.find(code, severity, variant, **numbers)
            condition = float(known.condition.max())
            return condition if math.isfinite(condition) else 0.0
    return None


def _parts(audit: FlowAudit, layer: Layer) -> Iterator[tuple[Tensor, int]]:
    """Inputs of a layer to compare it at, and the elements up to which J is wholly computed."""
    x = layer.x
    yield (x if x[0].numel() <= DENSE else x[:1]), DENSE
    x = x[:1]
    for side in (4, 2) if x.ndim == 4 else ():
        if x.shape[1] * side * side <= 256 and min(x.shape[2:]) > side:
            corner = x[:, :, :side, :side].contiguous()
            with suppress(Exception):  # whatever a layer raises at a size it was not made for
                if layer.flow.latents(corner).numel() == corner.numel():
                    yield corner, DENSE
                    break
    if x.numel() <= MOST and audit.time_left() > 4 and "logdet_mismatch" not in audit.findings:
        seconds = math.inf
        with suppress(*FAILURES), torch.enable_grad():
            z = layer.flow.latents(leaf := x.clone().requires_grad_())
            began = time.process_time()
            torch.autograd.grad(z, leaf, torch.ones(16, *z.shape), is_grads_batched=True)
            seconds = (time.process_time() - began) / 16
        if seconds * x.numel() < audit.time_left():
            yield x, MOST


def _name_wrong_inverse(audit: FlowAudit, seen: list[Layer]) -> None:
    """Name the layer whose own round trip fails, where the whole flow's fails."""
    whole = audit.findings.get("inverse_mismatch")
    if whole is None or whole.severity != "bug" or "error" not in whole.numbers:
        return
    for layer in seen if "layer" not in whole.numbers else ():
        with suppress(*FAILURES):
            x = layer.flow.inverse(layer.z, layer.x)[0] if layer.flow.invertible else layer.x
            if distance(x, layer.x) > audit.bug_error:
                del audit.findings["inverse_mismatch"]
                audit.bug("inverse_mismatch", "layer", **whole.numbers, layer=layer.name)
                return


def _check_sum(audit: FlowAudit, seen: list[Layer]) -> bool:
    """Whether the whole flow returns the sum of its layers; False if more changes the volume."""
    image, rows = audit.flow.forward(audit.few), len(audit.few)
    if image.raw is None:
        return False
    outputs = [audit.few, *(layer.z for layer in seen)]
    inputs = [*(layer.x for layer in seen), image.flat.detach()]
    names = [*(f"the input of {layer.name}" for layer in seen), "z"]
    for name, *pair in zip(names, outputs, inputs, strict=True):
        before, after = (t.reshape(rows, -1).sort(1).values for t in pair)
        if before.shape != after.shape or not (before == after).all():
            audit.why_not = f"there are many elements, and {name} is not the output of a layer"
            return False
    total = torch.stack([log_det_of(layer.log_det, rows)[0] for layer in seen]).sum(0)
    stated, _ = log_det_of(image.raw, rows)
    if log_det_error(stated, total) > audit.bug_error:
        stated, total = stated[:4].tolist(), total[:4].tolist()
        audit.bug("logdet_mismatch", "layers", stated=stated, log_det=total)
    elif not any("add up" in line for line in audit.checked):
        audit.checked.append(
            f"the log-determinants of {len(seen)} layers add up to that of the whole flow"
        )
    return True
