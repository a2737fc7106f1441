"""Layers that initialise themselves from their first batch: correctly, and only once?

If the answer to other data depends on which batch came first, the first call initialises. It is
then repeated on shifted, unevenly scaled data: a layer whose first output is a shift and a scale
of each channel must have standardised it.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_state import FlowAudit
from musigma.audit.sandbox import first, forward_hooks

__all__ = ["check_initialisation"]

Moments = tuple[Tensor, Tensor]


def check_initialisation(audit: FlowAudit) -> None:
    """Whether the first call initialises anything, and if so correctly and for good."""
    if not audit.sandbox.modules and not audit.sandbox.holders:
        return
    if audit.was_training:
        audit.unchecked.append(
            "data-dependent initialisation: the flow was handed in in training mode"
        )
        return
    restore_after_first = audit.sandbox.snapshot()
    other = audit.draw_examples(len(audit.x), 4)
    second = _z(audit, other)
    audit.restore_first()
    with suppress(AuditError):
        other_first, example_second = _z(audit, other), _z(audit, audit.x)
        restore_after_first()
        example_again = _z(audit, audit.x)
        changes = distance(second, other_first), distance(example_second, example_again)
        if max(changes) > 10 * audit.tolerance and not _has_running_statistics(audit):
            audit.checked.append("the first call initialises from its batch")
            _check_standardisation(audit)
            _check_reload(audit)
    restore_after_first()
    audit.flow.forward(audit.x)  # initialises, if nothing has


def _z(audit: FlowAudit, x: Tensor) -> Tensor:
    return audit.flow.forward(x).flat.detach()


def _has_running_statistics(audit: FlowAudit) -> bool:
    """Whether each call changes the answer of the next, which is no initialisation."""
    restore = audit.sandbox.snapshot()
    before = _z(audit, audit.x)
    for seed in range(3):
        audit.flow.forward(3 * audit.draw_examples(len(audit.x), 20 + seed))
    after = _z(audit, audit.x)
    restore()
    return distance(before, after) > audit.tolerance


def _check_standardisation(audit: FlowAudit) -> None:
    """Check the layers that are a shift and a scale of each channel, on uneven data.

    Once with the other parameters as they are and once at random: networks that start at zero
    hide faults, and a learned gain looks like one. A fault shows both times.
    """
    unperturbed = _standardised(audit, 0.0)
    perturbed = _standardised(audit, 0.3) if unperturbed else {}
    both = [name for name in unperturbed if name in perturbed]
    if not both:
        audit.unchecked.append("what the data-dependent initialisation sets: no layer shows it")
        return
    audit.checked.append(
        "data-dependent initialisation: each channel's mean and std after the first batch, on "
        "shifted and unevenly scaled data"
    )
    for name in both:
        if min(_error(*unperturbed[name]), _error(*perturbed[name])) < 0.05:
            continue
        mean, std = unperturbed[name]
        common = float(std.median())  # some layers scale all channels to another constant
        alike = float((std / common - 1).abs().max()) < 0.05
        alike &= float(mean.abs().max()) < 0.05 * max(1.0, common)
        audit.find(
            "ddi_wrong",
            "warning" if alike else "bug",
            f"after its first batch, {name} has channel means up to {float(mean.abs().max()):.3g} "
            f"from zero and standard deviations from {float(std.min()):.3g} to "
            f"{float(std.max()):.3g}",
            "set the shift to -mean and the scale to 1 / std of the batch, over all axes but "
            "the channels, in the order in which forward applies them",
            means=mean[:16].tolist(),
            stds=std[:16].tolist(),
        )


def _error(mean: Tensor, std: Tensor) -> float:
    return max(float(mean.abs().max()), float((std - 1).abs().max()))


def _standardised(audit: FlowAudit, noise: float) -> dict[str, Moments]:
    """Mean and std by channel of every first output that shifts and scales its input."""
    channels, *sides = audit.example.shape[1:]
    n = max(16, 512 // math.prod(sides))
    spread = torch.logspace(-0.7, 0.7, channels) if channels > 1 else torch.tensor([3.0])
    draws = torch.randn(n, *sides, channels, generator=torch.Generator().manual_seed(3))
    uneven = (draws * spread + torch.linspace(2.0, -3.0, channels)).movedim(-1, 1).contiguous()
    names = {m: k for root in audit.sandbox.modules for k, m in root.named_modules()}
    for x in (uneven.to(audit.example), audit.draw_examples(n, 5)):
        audit.restore_first()
        if noise:
            audit.perturb(noise)
        calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def hook(module: nn.Module, args: tuple, out: Any, calls: dict = calls) -> None:
            z = first(out)
            if args and isinstance(args[0], Tensor) and isinstance(z, Tensor):
                calls.setdefault(module, (args[0].detach(), z.detach()))

        before = {m: _numbers_of(m) for m in names}
        try:
            with forward_hooks(names, hook):
                z = _z(audit, x)
        except AuditError:
            continue
        if not z.isfinite().all():
            continue
        initialised = [m for m in calls if not torch.equal(before[m], _numbers_of(m))]
        pairs = [(names[m] or type(m).__name__, *calls[m]) for m in initialised]
        pairs = pairs or [("forward", x, z)]
        found = {name: moments for name, *pair in pairs if (moments := _moments(*pair))}
        if found:
            return found
    return {}


def _numbers_of(module: nn.Module) -> Tensor:
    """Copies of the numbers that a module itself holds, in a row."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    tensors += [t for t in vars(module).values() if isinstance(t, Tensor)]
    parts = [t.detach().double().flatten() for t in tensors if t.is_floating_point()]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def _moments(x: Tensor, z: Tensor) -> Moments | None:
    """Mean and std of z by channel, if z shifts and scales each channel of x; else None."""
    if x.numel() != z.numel() or x.ndim < 2 or x.numel() < 512 * x.shape[1]:
        return None
    z = z.double().reshape(x.shape).transpose(0, 1).flatten(1)
    x = x.double().transpose(0, 1).flatten(1)
    centered, out = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    slope = (centered * out).mean(1) / centered.square().mean(1)
    left = (out - slope[:, None] * centered).abs().amax()
    if not left <= 1e-4 * out.abs().amax().clamp(min=1e-12):  # NaN where a channel is constant
        return None
    if (slope - 1).abs().max() < 1e-6 and (z.mean(1) - x.mean(1)).abs().max() < 1e-6:
        return None  # this call did not set it
    return z.mean(1), z.std(1, correction=0)


def _check_reload(audit: FlowAudit) -> None:
    """Save after the first batch, load into a fresh copy, and call that on another batch."""
    modules = [m for m in audit.sandbox.modules if m.state_dict()]
    if isinstance(audit.state, nn.Module):
        modules = [audit.state]
    if not modules:
        audit.unchecked.append("saving and loading: no module has the state")
        return
    audit.restore_first()
    audit.flow.forward(audit.x)
    saved = [copy.deepcopy(m.state_dict()) for m in modules]
    other = 0.5 * audit.x + 0.5 * audit.draw_examples(len(audit.x), 6)
    expected = _z(audit, other)
    audit.restore_first()
    try:
        for module, state in zip(modules, saved, strict=True):
            module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        audit.unchecked.append(f"loading a saved state: {str(error).splitlines()[0][:120]}")
        return
    difference = distance(expected, _z(audit, other))
    if difference > 10 * audit.tolerance:
        audit.bug(
            "ddi_reinit",
            "saved after its first batch and loaded again, it initialises itself anew: the "
            f"same input gives another z, by {difference:.2g}",
            "make the flag a buffer: self.register_buffer('initialised', torch.tensor(False))",
            difference=difference,
        )
    else:
        audit.checked.append("the initialised state survives state_dict")
