"""The context of a model: one tensor of B rows, or a mapping from names to such tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Context", "apply", "chunks", "conditioned", "length", "lerp", "repeat", "rows"]

Context: TypeAlias = Tensor | Mapping[str, Tensor] | None


def apply(function: Callable[..., Tensor], *contexts: Context) -> Context:
    """Apply ``function`` to the corresponding tensors of contexts; None if the first is None.

    Example:
        >>> apply(lambda a, b: a + b, {"x": torch.ones(2)}, {"x": torch.ones(2)})
        {'x': tensor([2., 2.])}
    """
    first = contexts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*contexts)
    return {name: function(*(c[name] for c in contexts)) for name in first}  # pyright: ignore


def length(context: Context) -> int | None:
    """Number of rows; None if there is no context."""
    if context is None or isinstance(context, Tensor):
        return None if context is None else len(context)
    return next((len(t) for t in context.values()), None)


def rows(context: Context, which: Tensor | slice) -> Context:
    """Select rows by a slice, indices or a mask."""
    return apply(lambda t: t[which], context)


def repeat(context: Context, k: int) -> Context:
    """Repeat every row k times, as `torch.Tensor.repeat_interleave` does."""
    return apply(lambda t: t.repeat_interleave(k, 0), context)


def chunks(context: Context, size: int, n: int) -> Iterator[Context]:
    """The rows of n examples, `size` at a time."""
    for start in range(0, n, size):
        yield rows(context, slice(start, start + size))


def lerp(a: Context, b: Context, t: float) -> Context:
    """(1 - t) a + t b."""
    return apply(lambda a, b: torch.lerp(a, b, t), a, b)


def conditioned(net: nn.Module, *given: Any) -> Any:
    """``net(*given)``, without the last argument, the context, if it is None or net has none."""
    *inputs, context = given
    if context is None or not takes_context(type(net), len(given)):
        return net(*inputs)
    return net(*inputs, context)


@functools.cache
def takes_context(kind: type[nn.Module], n: int) -> bool:
    """Whether the forward method of a module type takes n positional arguments."""
    parameters = inspect.signature(kind.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > n or any(p.kind is p.VAR_POSITIONAL for p in parameters)
