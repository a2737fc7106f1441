"""A flow layer by layer: which one is wrong, also where the whole has too many elements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.ground import Ground, Look, apart
from musigma.audit.judging import explained
from musigma.audit.maps import Visit, flatten, log_det_of, visits
from musigma.audit.volume import DENSE, Volume, volume

__all__ = ["layers"]


def layers(ground: Ground, given: Look) -> None:
    """Which layer is wrong; and, of flows of many elements, whether any is."""
    roots = ground.guest.modules
    if not roots:
        return
    ground.before_inverse()
    conditions: dict[str, float] = {}
    judged = 0
    doubtful: list[str] = []
    states = (ground.scale, 0.0) if ground.scale and not ground.slow else (ground.scale,)
    for std in states:
        ground.before_inverse()
        if std:
            ground.step(std)
        try:
            seen = visits(ground.map, roots, ground.some(ground.x))
        except AuditError:
            continue
        if not seen or (len(seen) == 1 and given.volume is not None):
            break
        for visit in seen:
            if ground.time_left() < 0:
                doubtful.append("layers beyond the time limit")
                break
            verdict = None
            with suppress(AuditError, RuntimeError):
                verdict = _layer(ground, visit, std)
            if verdict is None:
                doubtful.append(visit.name)
                continue
            judged += 1
            if std == 0.0 and verdict > 0:
                conditions[visit.name] = verdict
        _adds_up(ground, seen, given)
        _which_inverse(ground, seen)
    if judged:
        ground.checked.append(f"{judged} log-determinants, layer by layer")
    if conditions:
        ground.details["conditions"] = conditions
    elif given.volume is None and given.stated is not None and not judged:
        doubtful.append("the whole")
    if doubtful and given.volume is None:
        names = ", ".join(dict.fromkeys(doubtful))
        ground.unchecked.append(f"log-determinant, for its many elements, of: {names[:200]}")
    ground.before_inverse()


def _layer(ground: Ground, visit: Visit, std: float) -> float | None:
    """Compare a layer's log-determinant with its volume: its condition; None if it cannot be."""

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        return ground.guest.call(visit.name, visit, x)

    def function(x: Tensor) -> Tensor:
        return flatten(call(x)[0])

    x = visit.x if visit.x[0].numel() <= DENSE else visit.x[:1]
    found = _small_volume(function, x)
    raw = call(x.clone())[1]
    whole = found is not None
    if found is None:
        x = _crop(visit, function)
        if x is None:
            return _dense(ground, visit, function, std)
        with suppress(RuntimeError, AuditError, ValueError, IndexError):
            found = volume(function, x)
            raw = ground.guest.call(visit.name, visit, x.clone())[1]
    if found is None or raw is None or not found.log_det.isfinite().all():
        return None
    stated, kind = log_det_of(raw, len(x))
    off = float(((stated - found.log_det).abs() / (1 + 0.01 * found.log_det.abs())).max())
    if off > ground.wrong and kind in ("example", "number"):
        if not whole:
            return _dense(ground, visit, function, std)
        _blame(ground, visit, stated, found, off, std)
    condition = float(found.condition.max())
    return condition if math.isfinite(condition) else 0.0


def _which_inverse(ground: Ground, seen: list[Visit]) -> None:
    """Name the layer whose own round trip fails, where the whole's does."""
    whole = ground.findings.get("inverse_mismatch")
    if whole is None or "layer" in whole.numbers:
        return
    for visit in seen:
        if visit.back is None:
            continue
        with suppress(AuditError, RuntimeError):
            answer = ground.guest.call(visit.name, visit.back, visit.z.clone())
            back = answer[0] if isinstance(answer, (tuple, list)) else answer
            if apart(back.reshape(visit.x.shape), visit.x) > ground.wrong:
                ground.findings["inverse_mismatch"] = replace(
                    whole,
                    message=f"{whole.message}; it is {visit.name} that does not invert itself",
                    numbers={**whole.numbers, "layer": visit.name},
                )
                return


def _dense(
    ground: Ground, visit: Visit, function: Callable[[Tensor], Tensor], std: float
) -> float | None:
    """The whole Jacobian of one example of a layer, if the time allows it."""
    d = visit.x[0].numel()
    if d > 4096 or ground.time_left() < 4 or "logdet_mismatch" in ground.findings:
        return None
    began = time.process_time()
    x = visit.x[:1]
    with suppress(RuntimeError, AuditError, ValueError, IndexError):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            function(leaf).sum().backward()
        each = time.process_time() - began
        if each * d > ground.time_left():
            return None
        found = volume(function, x, dense=d)
        raw = ground.guest.call(visit.name, visit, x.clone())[1]
        if found is not None and raw is not None:
            stated, _ = log_det_of(raw, 1)
            off = float((stated - found.log_det).abs() / (1 + 0.01 * found.log_det.abs()))
            if off > ground.wrong:
                _blame(ground, visit, stated, found, off, std)
            return float(found.condition.max())
    return None


def _blame(
    ground: Ground, visit: Visit, stated: Tensor, found: Volume, off: float, std: float
) -> None:
    known = ground.findings.get("logdet_mismatch")
    if (known is not None and "layer" in known.numbers) or ground.noisy_log_det:
        return
    if "logdet_shape" in ground.findings:
        return
    hint, repair = explained(stated, found.log_det, visit.x)
    when = f" with random parameters (moved by {std:g})" if std else ""
    ground.findings.pop("logdet_mismatch", None)
    ground.find(
        "logdet_mismatch",
        "bug",
        f"{visit.name} states {float(stated[0]):.6g} nats, and log |det J| is "
        f"{float(found.log_det[0]):.6g}{when}{hint}",
        repair,
        layer=visit.name,
        stated=stated[:4].tolist(),
        log_det=found.log_det[:4].tolist(),
        error=off,
    )


def _adds_up(ground: Ground, seen: list[Visit], given: Look) -> None:
    """Whether the whole states the sum of its layers, where nothing else happens to volume."""
    if given.volume is not None or ground.noisy_log_det:
        return
    x = ground.some(ground.x)
    image = ground.map.forward(x.clone())
    if image.raw is None:
        return
    at, total = x.reshape(len(x), -1), torch.zeros(len(x), dtype=torch.float64)
    for visit in seen:
        if not _reordered(at, visit.x.reshape(len(x), -1)):
            ground.unchecked.append(
                f"the sum of log-determinants: {visit.name} is given what no layer returned"
            )
            return
        at = visit.z.reshape(len(x), -1)
        total = total + log_det_of(visit.log_det, len(x))[0]
    if not _reordered(at, image.flat.detach()):
        ground.unchecked.append("the sum of log-determinants: z is what no layer returned")
        return
    stated, _ = log_det_of(image.raw, len(x))
    off = float(((stated - total).abs() / (1 + 0.01 * total.abs())).max())
    if off > ground.wrong:
        ground.find(
            "logdet_mismatch",
            "bug",
            f"the whole states {float(stated[0]):.6g} nats, and its layers together "
            f"{float(total[0]):.6g}",
            "add up the log-determinants of all layers, each once",
            stated=stated[:4].tolist(),
            log_det=total[:4].tolist(),
        )
    elif not any("add up" in line for line in ground.checked):
        ground.checked.append(f"the log-determinants of {len(seen)} layers add up to the whole's")


def _small_volume(function: Callable[[Tensor], Tensor], x: Tensor) -> Volume | None:
    try:
        return volume(function, x)
    except (RuntimeError, AuditError):
        return None


def _crop(visit: Visit, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A corner of an image that the layer takes as well."""
    x = visit.x[:1]
    if x.ndim != 4:
        return None
    for side in (4, 2):
        if x.shape[1] * side * side <= 256 and min(x.shape[2:]) > side:
            part = x[:, :, :side, :side].contiguous()
            with suppress(Exception):  # whatever a layer says of a size that it was not made for
                if function(part).shape == (1, part[0].numel()):
                    return part
    return None


def _reordered(a: Tensor, b: Tensor) -> bool:
    """Whether two batches hold the same numbers, example by example."""
    return a.shape == b.shape and bool((a.sort(1).values == b.sort(1).values).all())
