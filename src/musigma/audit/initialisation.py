"""Layers that set themselves from their first batch: rightly, and once?

What the first call leaves is told from a second one: if the answer to other data depends on which
batch came first, the first was used. Then it is repeated on shifted, unevenly scaled data, and the
layer whose first output is a shift and a scale of each channel must have standardised it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError
from musigma.audit.ground import Ground, apart

__all__ = ["initialisation"]


def initialisation(ground: Ground) -> None:
    """Whether the first call set anything; if it did, whether rightly, and whether it lasts."""
    if not ground.guest.modules and not ground.guest.holders:
        return
    if ground.turned:
        ground.unchecked.append(
            "data-dependent initialisation, if there is any: it was handed in in training mode"
        )
        return
    after_first = ground.guest.snapshot()
    other = ground.drawn(len(ground.x), 4)
    ours = ground.map.forward(other.clone()).flat.detach()
    ground.before_first()
    with suppress(AuditError):
        theirs = ground.map.forward(other.clone()).flat.detach()
        again = ground.map.forward(ground.x.clone()).flat.detach()
        after_first()
        mine = ground.map.forward(ground.x.clone()).flat.detach()
        depends = max(apart(ours, theirs), apart(again, mine)) > 10 * ground.fine
        if depends and not _running(ground):
            ground.checked.append("the first call initialises from its batch")
            _standardises(ground)
            _reloads(ground)
    after_first()
    _settle(ground)


def _running(ground: Ground) -> bool:
    """Whether each call moves the answer of the next: running statistics, no initialisation."""
    kept = ground.guest.snapshot()
    first = ground.map.forward(ground.x.clone()).flat.detach()
    for seed in range(3):
        ground.map.forward(3 * ground.drawn(len(ground.x), 20 + seed))
    last = ground.map.forward(ground.x.clone()).flat.detach()
    kept()
    return apart(first, last) > ground.fine


def _settle(ground: Ground) -> None:
    """A first call, if there has to be one."""
    ground.map.forward(ground.x.clone())


def _standardises(ground: Ground) -> None:
    """Judge the layers that are a shift and a scale of each channel, on uneven data.

    Twice: with all else as it is, and at random. Networks that start at zero look like no network,
    and a gain that is learned besides is no mistake: what is wrong is wrong both times.
    """
    own = _standardised(ground, 0.0)
    other = _standardised(ground, 0.3) if own else {}
    both = [name for name in own if name in other]
    if not both:
        ground.unchecked.append("what the data-dependent initialisation sets: no layer shows it")
        return
    ground.checked.append(
        "data-dependent initialisation: each channel's mean and std after the first batch, on "
        "shifted and unevenly scaled data"
    )
    for name in both:
        (mean, std), (mean2, std2) = own[name], other[name]
        if min(_far(mean, std), _far(mean2, std2)) < 0.05:
            continue
        common = float(std.median())  # some scale to another constant, all channels alike
        alike = float((std / common - 1).abs().max()) < 0.05
        alike &= float(mean.abs().max()) < 0.05 * max(1.0, common)
        ground.find(
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


def _far(mean: Tensor, std: Tensor) -> float:
    return max(float(mean.abs().max()), float((std - 1).abs().max()))


def _standardised(ground: Ground, noise: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and stds of every layer's first output that is a shift and a scale of its input."""
    shape = ground.example.shape[1:]
    channels = shape[0]
    n = max(16, 512 // max(1, ground.example[0].numel() // channels))
    spread = torch.logspace(-0.7, 0.7, channels) if channels > 1 else torch.tensor([3.0])
    centre = torch.linspace(2.0, -3.0, channels)
    form = (1, channels, *(1,) * (len(shape) - 1))
    draws = torch.randn(n, *shape, generator=torch.Generator().manual_seed(3))
    uneven = (draws * spread.reshape(form) + centre.reshape(form)).to(ground.example)
    names = {m: k for root in ground.guest.modules for k, m in root.named_modules()}
    for data in (uneven, ground.drawn(n, 5)):
        ground.before_first()
        if noise:
            ground.step(noise)
        given: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        before = {m: _own(m) for m in names}
        hooks = [m.register_forward_hook(_keep(given)) for m in names]
        try:
            image = ground.map.forward(data.clone())
        except AuditError:
            continue
        finally:
            for hook in hooks:
                hook.remove()
        if not image.flat.isfinite().all():
            continue
        owners = [m for m in given if not _alike(before[m], _own(m))]  # what the call has set
        pairs = [(names[m] or type(m).__name__, *given[m]) for m in owners]
        found = {name: _moments(x, z) for name, x, z in pairs or [("forward", data, image.flat)]}
        if any(found.values()):
            return {name: moments for name, moments in found.items() if moments}
    return {}


def _own(module: nn.Module) -> list[Tensor]:
    """The numbers that a module itself holds."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    held += [t for t in vars(module).values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in held if t.is_floating_point()]


def _alike(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def _moments(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Means and stds by channel, if z is a shift and a scale of each channel of x; not of none."""
    if x.numel() != z.numel() or x.ndim < 2 or x.numel() < 512 * x.shape[1]:
        return None
    z = z.detach().double().reshape(x.shape).transpose(0, 1).flatten(1)
    x = x.detach().double().transpose(0, 1).flatten(1)
    centred, out = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    if (centred.square().mean(1) == 0).any():
        return None
    slope = (centred * out).mean(1) / centred.square().mean(1)
    left = (out - slope[:, None] * centred).abs().amax()
    if left > 1e-4 * out.abs().amax().clamp(min=1e-12):
        return None
    if (slope - 1).abs().max() < 1e-6 and (z.mean(1) - x.mean(1)).abs().max() < 1e-6:
        return None  # this call did not set it
    return z.mean(1), z.std(1, correction=0)


def _reloads(ground: Ground) -> None:
    """Save after the first batch, load into what has seen none, and give it another."""
    modules = _stateful(ground)
    if not modules:
        ground.unchecked.append("saving and loading: no module has the state")
        return
    ground.before_first()
    ground.map.forward(ground.x.clone())
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    other = 0.5 * ground.x + 0.5 * ground.drawn(len(ground.x), 6)
    truth = ground.map.forward(other.clone()).flat.detach()
    ground.before_first()
    try:
        for module, saved in zip(modules, kept, strict=True):
            module.load_state_dict(saved)
    except (RuntimeError, KeyError) as error:
        ground.unchecked.append(f"loading a saved state: {str(error).splitlines()[0][:120]}")
        return
    again = ground.map.forward(other.clone()).flat.detach()
    off = apart(truth, again)
    if off > 10 * ground.fine:
        ground.find(
            "ddi_reinit",
            "bug",
            "saved after its first batch and loaded again, it initialises itself anew: the "
            f"same input gives another z, by {off:.2g}",
            "make the flag a buffer: ground.register_buffer('initialised', torch.tensor(False))",
            difference=off,
        )
    else:
        ground.checked.append("what was initialised survives state_dict")


def _stateful(ground: Ground) -> list[nn.Module]:
    if isinstance(ground.state, nn.Module):
        return [ground.state]
    return [m for m in ground.guest.modules if m.state_dict()]


def _keep(given: dict[nn.Module, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        z = out[0] if isinstance(out, (tuple, list)) and out else out
        if args and isinstance(args[0], Tensor) and isinstance(z, Tensor):
            given.setdefault(module, (args[0].detach(), z.detach()))

    return hook
