"""The context of a model: one tensor of B rows, or a mapping from names to such tensors.

Networks take one tensor, a vector (B, F) or a map (B, F, H, W), which `join` concatenates to their
input.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.tensors import concatenated

__all__ = [
    "Context",
    "apply",
    "check",
    "conditioned",
    "in_parts",
    "join",
    "length",
    "lerp",
    "one_row",
    "pooled",
    "repeat",
    "rows",
]

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
    if context is None or isinstance(context, Mapping):
        return apply(lambda t: t[which], context)
    return context[which]


def repeat(context: Context, k: int) -> Context:
    """Repeat every row k times, as `torch.Tensor.repeat_interleave` does."""
    return apply(lambda t: t.repeat_interleave(k, 0), context)


def in_parts(x: Tensor, context: Context, size: int = 64) -> Iterator[tuple[Tensor, Any]]:
    """A few examples at a time, with their context, to limit the memory of networks."""
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], rows(context, part)


def one_row(context: Tensor | None) -> Tensor | None:
    """The first row of a vector context (1, F) that `torch.Tensor.expand` repeats; None otherwise.

    What depends on the context alone is then computed once.
    """
    if context is None or context.ndim != 2 or len(context) < 2 or context.stride(0):
        return None
    return context[:1]


def lerp(a: Context, b: Context, t: float) -> Context:
    """(1 - t) a + t b."""
    return apply(lambda a, b: torch.lerp(a, b, t), a, b)


def check(spec: Any, context: Context, n: int | None = None) -> None:
    """Refuse a context that a model of this spec would ignore or misread, or one without n rows.

    Raises:
        ValueError: If the context is no tensor and no mapping from names to tensors; the spec has
            no context; a variable of real numbers is given as integers (codes of classes, for
            instance), or one of classes as codes, both by name; or the number of rows is not n.
    """
    if context is None:
        return
    if not isinstance(context, Tensor | Mapping):
        raise ValueError(
            "context: expected a tensor, or a mapping from names to tensors with n rows each; "
            f"got {type(context).__name__}"
        )
    tensors = {} if isinstance(context, Tensor) else context
    if other := [name for name, t in tensors.items() if not isinstance(t, Tensor)]:
        got = type(tensors[other[0]]).__name__
        raise ValueError(f"context: {other[0]!r}: expected a tensor (torch.as_tensor); got {got}")
    if spec is not None and not spec.context:
        raise ValueError(
            "context: this model is not conditioned on anything, so it would ignore the one "
            "given; leave it out, or build a model for it (build(..., context=features), or a "
            "Spec with a context)"
        )
    if spec is not None and (wrong := list(_misread(spec.context, context))):
        raise ValueError(f"context: {'; '.join(wrong)}")
    counts = {name: len(t) for name, t in tensors.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{rows} of {name}" for name, rows in counts.items())
        raise ValueError(f"context: the numbers of rows differ, {listed}: make them equal")
    if n is not None and length(context) != n:
        raise ValueError(f"context: expected {n} rows, one for each sample; got {length(context)}")


def _misread(variables: Sequence[Any], context: Context) -> Iterator[str]:
    """Faults of variables that are given in the form of another kind."""
    if isinstance(context, Tensor):
        if len(variables) != 1:
            return  # which the embedding refuses
        context = {variables[0].name: context}
    for variable in variables:
        t = (context or {}).get(variable.name)
        if t is None or variable.name == "context":  # a vector of which nothing else is known
            continue
        got = f"got {str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}"
        one_hot = t.ndim == 2 and t.shape[1] == variable.classes
        if variable.classes and not one_hot:
            yield (
                f"{variable.name!r} has classes: expected one-hot rows (n, {variable.classes}); "
                f"{got} (torch.nn.functional.one_hot makes them of codes)"
            )
        elif not variable.classes and variable.levels is None and not t.is_floating_point():
            yield f"{variable.name!r} is real: expected floats, not classes; {got}"


def conditioned(net: nn.Module, *given: Any) -> Any:
    """``net(*given)``, without the last argument, the context, if it is None or net has none."""
    *inputs, context = given
    way = None if context is None else takes_context(type(_unwrapped(net)), len(given))
    if way is None:
        return net(*inputs)
    return net(*inputs, context) if way == "position" else net(*inputs, context=context)


def _unwrapped(net: nn.Module) -> nn.Module:
    """The module within those of `torch.compile` and of data parallelism, which take anything."""
    while (inner := getattr(net, "_orig_mod", None)) is not None or (
        isinstance(inner := getattr(net, "module", None), nn.Module)
        and type(net).__module__.startswith("torch.")
    ):
        net = inner
    return net


@functools.cache
def takes_context(kind: type[nn.Module], n: int) -> Literal["position", "keyword"] | None:
    """How the forward method of a module type takes a context as the last of n arguments.

    By position or keyword if a parameter is called `context`. Otherwise by position, if it has an
    n-th parameter that is required or None by default, or takes any number of them.
    """
    signature = inspect.signature(kind.forward).parameters
    parameters = list(signature.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    last = positional[n] if len(positional) > n else None  # the first is self
    if "context" in signature:
        return "position" if last is signature["context"] else "keyword"
    fits = last is not None and (last.default is None or last.default is last.empty)
    return "position" if fits or any(p.kind is p.VAR_POSITIONAL for p in parameters) else None


def join(x: Tensor, context: Tensor | None, features: int) -> Tensor:
    """Concatenate a context to x (B, C, ...) on axis 1; x itself if `features` is 0.

    Args:
        x: A vector (B, C) or an image (B, C, H, W).
        context: One row per example: a vector (B, features), which is repeated at every pixel, or
            a map (B, features, H', W'), which is resized to x, or averaged if x is a vector.
        features: Number of features that the network was built for.

    Raises:
        ValueError: If a context is needed and missing, or has another shape.
    """
    if not features:
        return x
    if context is None or context.ndim not in (2, 4) or context.shape[:2] != (len(x), features):
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(
            f"context: this network was built for {features} features per example, shape "
            f"({len(x)}, {features}) or ({len(x)}, {features}, height, width); got {got}"
        )
    return concatenated([x, _at_size(context.to(x.dtype), x.shape[2:])])


def _at_size(context: Tensor, size: torch.Size) -> Tensor:
    """A context (B, F) or (B, F, H', W') as (B, F, *size)."""
    if not size:
        return pooled(context)
    if context.ndim == 2:
        return context.reshape(*context.shape, *(1,) * len(size)).expand(*context.shape, *size)
    height, width = size
    return (
        context if context.shape[2:] == size else F.adaptive_avg_pool2d(context, (height, width))
    )


def pooled(context: Tensor) -> Tensor:
    """A vector (B, F): a map is averaged over its positions."""
    return context if context.ndim == 2 else context.flatten(2).mean(2)
