r"""Memory modes: what runs of bijections keep for the backward pass.

| mode         | kept of n layers          | time of a step | gradients                          |
|--------------|---------------------------|----------------|------------------------------------|
| `store`      | all activations           | 1              | autograd's                         |
| `checkpoint` | the input of each segment | about 4/3      | the same, recomputed               |
| `reversible` | both ends of the run      | about 4/3      | the same, from inverted activations |

(Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
arXiv:1604.06174; Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", 2017,
arXiv:1707.04585.)

Inverted activations are only as good as the inverse. Every reversible backward pass therefore
compares its results with the forward pass: the input of the run, and the log-determinant of each
layer. Where they differ, the gradients are discarded and recomputed from the input, and from then
on that run is checkpointed; `fallbacks` lists such runs, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "MemoryMode",
    "Runner",
    "fallbacks",
    "recomputed",
    "set_fallbacks",
    "set_memory",
]

MemoryMode = Literal["store", "checkpoint", "reversible"]
Layers = Sequence[Any]
"""Bijections: modules with ``forward``, ``inverse`` and ``retrace``."""

MAX_ERROR = 40
"""Largest error of a round trip, in units in the last place; 48 accurate layers reach 10."""


def set_memory(model: nn.Module, mode: MemoryMode) -> None:
    """Choose what a model keeps for its backward pass. Outputs and gradients do not change.

    Under `reversible`, runs of bijections are reversible, and residual blocks of other networks
    are recomputed.

    Raises:
        ValueError: For an unknown mode, or one that does nothing for this model.

    Example:
        >>> import musigma
        >>> model = musigma.build("glow", (1, 8, 8), depth=2, hidden=8)
        >>> set_memory(model, "reversible")
        >>> model(torch.zeros(2, 1, 8, 8)).elbo.sum().backward()
    """
    runs = any(True for _ in _runners(model))
    blocks = runs or any(hasattr(module, "recompute") for module in model.modules())
    useful = {"store": True, "checkpoint": blocks, "reversible": runs}
    if mode not in useful:
        raise ValueError(f"memory: expected {', '.join(useful)}; got {mode!r}")
    if not useful[mode]:
        raise ValueError(
            f"memory: {mode!r} does nothing for this {type(model).__name__}, which has "
            f"{'no run of bijections' if blocks else 'no bijections and no residual blocks'}; "
            f"use {'checkpoint or ' if blocks else ''}store"
        )
    recomputed_with_parent: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(runner := getattr(module, "runner", None), Runner):
            runner.mode = mode
        elif hasattr(module, "recompute") and module not in recomputed_with_parent:
            module.recompute = mode != "store"  # pyright: ignore[reportArgumentType]
            recomputed_with_parent.update(module.modules())


def _runners(model: nn.Module) -> Iterator[tuple[str, Runner]]:
    for name, module in model.named_modules():
        if isinstance(runner := getattr(module, "runner", None), Runner):
            yield name, runner


def fallbacks(model: nn.Module) -> dict[str, str]:
    """The runs that are no longer reversible, by the name of their first layer, and why."""
    return {
        f"{name}.layers.{start}".lstrip("."): reason
        for name, runner in _runners(model)
        for start, reason in runner.fallbacks.items()
    }


def set_fallbacks(model: nn.Module, runs: Mapping[str, str]) -> None:
    """Restore what `fallbacks` returned."""
    for name, runner in _runners(model):
        prefix = f"{name}.layers.".lstrip(".")
        starts = {r.removeprefix(prefix): why for r, why in runs.items() if r.startswith(prefix)}
        runner.fallbacks = {int(i): why for i, why in starts.items() if i.isdecimal()}


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate the `forward` of a module, whose attribute `recompute` tells what is kept.

    If it is true, the backward pass computes the module again, and only its inputs are kept.
    """

    @functools.wraps(forward)
    def run(module: nn.Module, *inputs: Any, **named: Any) -> Tensor:
        if not module.recompute or not torch.is_grad_enabled():
            return forward(module, *inputs, **named)
        return checkpoint(forward, module, *inputs, use_reentrant=False, **named)  # pyright: ignore

    return run


class Runner:
    """Computes the runs of bijections of one chain. It is not part of the chain's state.

    Attributes:
        mode: What is kept for the backward pass.
        fallbacks: Index of the first layer of each run that is no longer reversible, and why.
    """

    def __init__(self) -> None:
        self.mode: MemoryMode = "store"
        self.fallbacks: dict[int, str] = {}

    def __call__(
        self, layers: Layers, x: Tensor, context: Tensor | None, start: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The output of a run of layers, and the log-determinant (B,) of each."""
        if self.mode == "store" or not torch.is_grad_enabled():
            return _stored(layers, x, context)
        if self.mode == "reversible" and isinstance(context, Mapping):
            self.fallbacks[start] = "its context is a mapping; embed it in a tensor (Conditional)"
        if self.mode == "checkpoint" or start in self.fallbacks or torch.compiler.is_compiling():
            return _checkpointed(layers, x, context)
        return self._reversible(layers, x, context, start)

    def _reversible(
        self, layers: Layers, x: Tensor, context: Tensor | None, start: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        log_dets: list[Tensor] = []
        while layers and not (x.requires_grad or _parameters(layers[:1])):
            x, log_det = layers[0](x, context)  # nothing to keep: no gradient is needed
            log_dets.append(log_det)
            layers = layers[1:]
        if layers:
            parameters = _parameters(layers)
            x, rest = _Reversible.apply(self, start, layers, context, x, *parameters)  # pyright: ignore[reportGeneralTypeIssues]
            log_dets += rest.unbind()
        return x, log_dets


def _stored(layers: Layers, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Layer by layer; autograd keeps all activations."""
    log_dets = []
    for layer in layers:
        x, log_det = layer(x, context)
        log_dets.append(log_det)
    return x, log_dets


def _checkpointed(
    layers: Layers, x: Tensor, context: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """In segments, which are computed twice; each ends with a layer that has a network."""
    log_dets: list[Tensor] = []
    segment: list[Any] = []
    for i, layer in enumerate(layers):
        segment.append(layer)
        if any(layer.children()) or i == len(layers) - 1:
            x, new = checkpoint(_stored, segment, x, context, use_reentrant=False)
            log_dets += new
            segment = []
    return x, log_dets


def _parameters(layers: Layers) -> list[nn.Parameter]:
    found = {p: None for layer in layers for p in layer.parameters() if p.requires_grad}
    return list(found)


class _Reversible(torch.autograd.Function):
    """A run of bijections that keeps its two ends."""

    @staticmethod
    def forward(ctx: Any, runner: Runner, start: int, layers: Layers, context, x, *parameters):
        device = x.device.type
        ctx.runner, ctx.start, ctx.layers, ctx.parameters = runner, start, layers, parameters
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        with _cast(ctx):
            y, log_dets = _stored(layers, x, context)
        log_dets = torch.stack(log_dets)
        ctx.save_for_backward(x, y, log_dets, context)
        return y, log_dets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x, y, log_dets, context = ctx.saved_tensors
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[3])
        x = x.detach().requires_grad_(ctx.needs_input_grad[4])
        grads, reason = _inverted_gradients(ctx, x, y.detach(), log_dets, context, gradients)
        if reason:
            ctx.runner.fallbacks[ctx.start] = reason
            grads = _recomputed_gradients(ctx, x, context, gradients)
        given = None if context is None else grads.get(context)
        return None, None, None, given, *(grads.get(t) for t in (x, *ctx.parameters))


def _cast(ctx: Any) -> AbstractContextManager[Any]:
    """The autocast of the forward pass, without its cache of tensors without gradients."""
    device, dtype, enabled = ctx.cast
    if not enabled:
        return nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)


def _inverted_gradients(ctx, x, y, log_dets, context, gradients):
    """Gradients from inverted activations, and the reason if those are not accurate enough."""
    found: dict[Tensor, Tensor] = {}
    g, g_log_dets = gradients
    worst = log_dets.new_zeros(())
    layers = zip(ctx.layers, log_dets.unbind(), g_log_dets.unbind(), strict=True)
    for layer, log_det, g_log_det in reversed(list(layers)):
        with torch.enable_grad(), _cast(ctx):
            layer_input, output, new_log_det = layer.retrace(y, context)
        leaves = [*_leaves(context), *_parameters([layer])]
        new = _gradients([(output, g), (new_log_det, g_log_det)], [layer_input, *leaves])
        g = new.pop(layer_input, None)
        g = torch.zeros_like(layer_input) if g is None else g
        for leaf, grad in new.items():
            found[leaf] = found[leaf] + grad if leaf in found else grad
        worst = torch.maximum(worst, _relative_error(new_log_det.detach(), log_det))
        y = layer_input.detach()
    found |= dict.fromkeys(_leaves(x), g)
    errors = torch.stack([worst, _relative_error(y, x)]).tolist()
    limit = MAX_ERROR * torch.finfo(x.dtype).eps
    if ctx.cast[2]:  # networks round far more coarsely
        limit = max(limit, torch.finfo(ctx.cast[1]).eps / 2)
    reason = None
    if not max(errors) <= limit:
        what = ("log-determinants", "the input")[errors[1] >= errors[0]]
        reason = f"inverted, {what} differed by {max(errors):.2g}, more than {limit:.0e}"
    return found, reason


def _relative_error(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of a - b, relative to that of b, or to 1 if b is smaller."""
    return (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1)


def _recomputed_gradients(ctx, x, context, gradients):
    """Gradients by checkpointed segments, from the true input."""
    with torch.enable_grad(), _cast(ctx):
        y, log_dets = _checkpointed(ctx.layers, x, context)
        log_dets = torch.stack(log_dets)
    leaves = [*_leaves(context), *_leaves(x), *ctx.parameters]
    return _gradients(zip((y, log_dets), gradients, strict=True), leaves)


def _leaves(t: Tensor | None) -> list[Tensor]:
    return [t] if t is not None and t.requires_grad else []


def _gradients(
    outputs: Iterable[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """The gradient of each leaf that has one, from those of outputs that have a graph."""
    live = [(out, grad) for out, grad in outputs if out.requires_grad]
    ends, given = zip(*live, strict=True)
    grads = torch.autograd.grad(ends, leaves, given, allow_unused=True)
    return {leaf: g for leaf, g in zip(leaves, grads, strict=True) if g is not None}
