r"""What a run of bijections keeps for its backward pass: everything, its joints, or its ends.

| mode         | kept of n layers       | time of a step | gradients                          |
|--------------|------------------------|----------------|------------------------------------|
| `store`      | all activations        | 1              | autograd's                         |
| `checkpoint` | the input of each part | about 4/3      | the same, recomputed               |
| `reversible` | both ends of the run   | about 4/3      | the same, from inputs computed back |

(Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
arXiv:1604.06174; Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017,
arXiv:1707.04585.)

Computing backwards is only as good as the inverse is. So every reversible backward pass compares
what it arrives at with what was there: the input of the run, and the log-determinant of every
layer. Where they differ the gradients are thrown away and recomputed from the input, by parts, and
that run is done so from then on; `fallen` tells which, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Keep", "Keeper", "fallen", "keep", "recall", "recomputed", "refuse"]

Keep = Literal["store", "checkpoint", "reversible"]
Layers = Sequence[Any]
"""Bijections: modules with ``forward``, ``inverse`` and ``retrace``."""

ULPS = 40
"""How many units in the last place a round trip may be off; of 48 sound steps it is 10."""


def keep(model: nn.Module, mode: Keep) -> None:
    """Choose what a model keeps for its backward pass; figures and gradients stay what they are.

    Under `reversible` the runs of bijections are reversible, and residual blocks of networks
    outside of them are recomputed.

    Raises:
        ValueError: For an unknown mode, or one that has nothing to work on in this model.

    Example:
        >>> import musigma
        >>> model = musigma.build("glow", (1, 8, 8), depth=2, hidden=8)
        >>> keep(model, "reversible")
        >>> model(torch.zeros(2, 1, 8, 8)).elbo.sum().backward()
    """
    refuse(model, mode)
    inside: set[nn.Module] = set()  # of what is recomputed as a whole
    for module in model.modules():
        if isinstance(keeper := getattr(module, "keeper", None), Keeper):
            keeper.mode = mode
        elif hasattr(module, "recompute") and module not in inside:
            module.recompute = mode != "store"  # pyright: ignore[reportArgumentType]
            inside.update(module.modules())


def refuse(model: nn.Module, mode: Keep) -> None:
    """Refuse what `keep` refuses.

    Raises:
        ValueError: As `keep` says.
    """
    if mode not in get_args(Keep):
        raise ValueError(f"memory: expected {', '.join(get_args(Keep))}; got {mode!r}")
    found: set[str] = set()
    for module in model.modules():
        if isinstance(getattr(module, "keeper", None), Keeper):
            found |= {"checkpoint", "reversible"}
        elif hasattr(module, "recompute"):
            found.add("checkpoint")
    if mode != "store" and mode not in found:
        raise ValueError(
            f"memory: this {type(model).__name__} has nothing that {mode!r} could work on "
            f"({'no run of bijections' if found else 'no bijections and no residual blocks'}); "
            f"use {'checkpoint or ' if found else ''}store"
        )


def _keepers(model: nn.Module) -> Iterator[tuple[str, Keeper]]:
    for name, module in model.named_modules():
        if isinstance(keeper := getattr(module, "keeper", None), Keeper):
            yield name, keeper


def fallen(model: nn.Module) -> dict[str, str]:
    """The runs that are no longer done reversibly, by their first layers' names, and why."""
    return {
        f"{name}.layers.{start}".lstrip("."): reason
        for name, keeper in _keepers(model)
        for start, reason in keeper.fallen.items()
    }


def recall(model: nn.Module, runs: Mapping[str, str]) -> None:
    """Do as `fallen` once told."""
    for name, keeper in _keepers(model):
        under = f"{name}.layers.".lstrip(".")
        own = {run.removeprefix(under): why for run, why in runs.items() if run.startswith(under)}
        keeper.fallen = {int(start): why for start, why in own.items() if start.isdecimal()}


def recomputed(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``forward(*inputs)``, of which only the inputs are kept."""
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


class Keeper:
    """How the runs of one chain are computed; no part of its state.

    Attributes:
        mode: One of `Keep`.
        fallen: Index of the first layer of each run that fell back, and why.
    """

    def __init__(self) -> None:
        self.mode: Keep = "store"
        self.fallen: dict[int, str] = {}

    def __call__(
        self, layers: Layers, x: Tensor, context: Tensor | None, start: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The output of a run of layers, and each one's log-determinant (B,)."""
        if self.mode == "store" or not torch.is_grad_enabled():
            return stored(layers, x, context)
        if self.mode == "checkpoint" or start in self.fallen or torch.compiler.is_compiling():
            return checkpointed(layers, x, context)
        return self._reversible(layers, x, context, start)

    def _reversible(
        self, layers: Layers, x: Tensor, context: Tensor | None, start: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        log_dets: list[Tensor] = []
        while layers and not (x.requires_grad or list(_parameters(layers[:1]))):
            x, log_det = layers[0](x, context)  # nothing to keep: no gradient goes this way
            log_dets.append(log_det)
            layers = layers[1:]
        if layers:
            parameters = list(_parameters(layers))
            x, rest = _Reversible.apply(self, start, layers, context, x, *parameters)  # pyright: ignore[reportGeneralTypeIssues]
            log_dets.extend(rest.unbind())
        return x, log_dets


def stored(layers: Layers, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Layer by layer, as autograd does it."""
    log_dets = []
    for layer in layers:
        x, log_det = layer(x, context)
        log_dets.append(log_det)
    return x, log_dets


def checkpointed(layers: Layers, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """In parts that end with a layer that has a network; each part is computed twice."""
    log_dets: list[Tensor] = []
    part: list[Any] = []
    for i, layer in enumerate(layers):
        part.append(layer)
        if any(layer.children()) or i == len(layers) - 1:
            x, new = checkpoint(stored, part, x, context, use_reentrant=False)
            log_dets += new
            part = []
    return x, log_dets


def _parameters(layers: Layers) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for layer in layers:
        for p in layer.parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                yield p


class _Reversible(torch.autograd.Function):
    """A run of bijections that keeps its two ends."""

    @staticmethod
    def forward(ctx: Any, keeper: Keeper, start: int, layers: Layers, context, x, *parameters):
        device = x.device.type
        ctx.keeper, ctx.start, ctx.layers, ctx.parameters = keeper, start, layers, parameters
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        with _cast(ctx):
            y, log_dets = stored(layers, x, context)
        log_dets = torch.stack(log_dets)
        ctx.save_for_backward(x, y, log_dets, context)
        return y, log_dets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x, y, log_dets, context = ctx.saved_tensors
        needs = (context is not None and ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        grads, reason = _backwards(ctx, x, y, log_dets, context, gradients, needs)
        if reason:
            ctx.keeper.fallen[ctx.start] = reason
            grads = _forwards(ctx, x, context, gradients, needs)
        return None, None, None, *grads


def _cast(ctx: Any) -> AbstractContextManager[Any]:
    """The autocast of the forward pass; nothing that is cast without a gradient is kept."""
    device, dtype, enabled = ctx.cast
    if not enabled:
        return nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)


def _backwards(ctx, x, y, log_dets, context, gradients, needs):
    """Gradients from inputs that are computed back, and what is wrong with those, if anything."""
    sums: dict[int, Tensor] = {}
    y = y.detach()  # it is this function's own output, and leads back to it
    g, g_log_dets = gradients
    given = context.detach().requires_grad_() if needs[0] else context
    worst = log_dets.new_zeros(())
    layers = zip(ctx.layers, log_dets.unbind(), g_log_dets.unbind(), strict=True)
    for layer, log_det, g_log_det in reversed(list(layers)):
        own = list(_parameters([layer]))
        with torch.enable_grad(), _cast(ctx):
            back, again, found = layer.retrace(y, given)
        wanted = [back, *own, *([given] if needs[0] else [])]
        new = _gradients([(again, g), (found, g_log_det)], wanted)
        g = torch.zeros_like(back) if new[0] is None else new[0]
        for key, grad in zip([*map(id, own), 0][: len(new) - 1], new[1:], strict=True):
            if grad is not None:
                sums[key] = sums[key] + grad if key in sums else grad
        worst = torch.maximum(worst, _off(found.detach(), log_det))
        y = back.detach()
    values = torch.stack([worst, _off(y, x)]).tolist()
    limit = ULPS * torch.finfo(x.dtype).eps
    if ctx.cast[2]:  # networks round by far more than this themselves
        limit = max(limit, torch.finfo(ctx.cast[1]).eps / 2)
    reason = None
    if not max(values) <= limit:
        what = ("log-determinants", "the input")[values[1] >= values[0]]
        reason = f"computed back, {what} differed by {max(values):.2g}, more than {limit:.0e}"
    grads = [sums.get(0), g if needs[1] else None, *(sums.get(id(p)) for p in ctx.parameters)]
    return grads, reason


def _off(a: Tensor, b: Tensor) -> Tensor:
    """The root mean square of a difference, relative to the values, or to 1 if they are small."""
    return (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1)


def _forwards(ctx, x, context, gradients, needs):
    """Gradients by parts, from the true input."""
    x = x.detach().requires_grad_(needs[1])
    given = context.detach().requires_grad_() if needs[0] else context
    with torch.enable_grad(), _cast(ctx):
        y, log_dets = checkpointed(ctx.layers, x, given)
        log_dets = torch.stack(log_dets)
    wanted = [*([given] if needs[0] else []), *([x] if needs[1] else []), *ctx.parameters]
    new = _gradients(zip((y, log_dets), gradients, strict=True), wanted)
    first = new.pop(0) if needs[0] else None
    second = new.pop(0) if needs[1] else None
    return [first, second, *new]


def _gradients(
    outputs: Iterable[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of those outputs, with their own gradients, that depend on anything."""
    live = [(out, grad) for out, grad in outputs if out.requires_grad]
    ends, grads = zip(*live, strict=True)
    return list(torch.autograd.grad(ends, wanted, grads, allow_unused=True))
