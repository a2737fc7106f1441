"""Batches: copies of them, their parts, and the arguments of functions that are made of them."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import math
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox

__all__ = [
    "Arguments", "arguments", "constant", "examples", "fresh", "input_of", "is_input",
    "is_target", "keywords_of", "member", "named_parts", "required", "signature_of", "with_input",
]  # fmt: skip

INPUT = re.compile(
    r"x|xs|x_?(true|in|orig|real|data|input)|(true|orig|real)_x|inputs?|data|images?|imgs?|batch|"
    r"samples?|features?|obs|original|real|pixel_values|seq|sequences?|minibatch|x_?batch",
    re.IGNORECASE,
)
WHOLE = re.compile(r"(mini_?)?batch|data|inputs?|samples?|item|xy|graph|example", re.IGNORECASE)
TARGET = re.compile(r"y|y_?true|targets?|x_?target|labels?|gt|tgt", re.IGNORECASE)
POSITION = re.compile(
    r"i|idx|index|((batch|data|optimizer|dataloader|loader)_?)(i|idx|index|nb|id)", re.IGNORECASE
)
COUNT = re.compile(
    r"(.*_)?(epochs?|steps?|iters?|iteration|it|num_samples|n_samples|k|n_batches)", re.IGNORECASE
)
LOOP = re.compile(r"opt(im)?(izer)?|(lr_)?scheduler|writer|logger", re.IGNORECASE)
LOADER = re.compile(r"(\w+_)?(data_?)?(loader|iterator)", re.IGNORECASE)
SIZE = re.compile(r"batch_?size|bs|bsz|n_?batch", re.IGNORECASE)
WEIGHT = re.compile(
    r".*(beta|weight|gamma|alpha|lambda|lambd|anneal|coeff?|temperature).*|M_N|lam|tau|kl_?w",
    re.IGNORECASE,
)


# --- batches ------------------------------------------------------------------------------------


def fresh(batch: Any, depth: int = 5) -> Any:
    """A copy of a batch, in which tensors are copied, and arrays become tensors."""
    if isinstance(batch, Tensor):
        return batch.detach().clone()
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch.copy()) if batch.dtype.kind in "biufc" else batch.copy()
    if not depth or isinstance(batch, (type, types.ModuleType, nn.Module)) or callable(batch):
        return batch
    if isinstance(batch, (list, tuple)):
        parts = [fresh(part, depth - 1) for part in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*parts)
        return tuple(parts) if isinstance(batch, tuple) else parts
    if isinstance(batch, MutableMapping):
        twin = copy.copy(batch)
        for key, part in batch.items():
            twin[key] = fresh(part, depth - 1)
        return twin
    if hasattr(batch, "__dict__"):
        twin = copy.copy(batch)
        for name, part in vars(batch).items():
            object.__setattr__(twin, name, fresh(part, depth - 1))
        return twin
    return batch


def named_parts(value: Any) -> dict[str, Any]:
    """The parts of a batch, or of what a function returned, by their names or positions."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))  # pyright: ignore
    if isinstance(value, (tuple, list)):
        return {str(i): part for i, part in enumerate(value)}
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Tensor) or value is None or not hasattr(value, "__dict__"):
        return {"0": value}
    named = value.to_dict() if callable(getattr(value, "to_dict", None)) else vars(value)
    return {str(key): part for key, part in named.items() if not str(key).startswith("_")}


def is_input(name: str) -> bool:
    """Whether a parameter or a part of this name is the data."""
    return INPUT.fullmatch(name) is not None


def is_target(name: str) -> bool:
    """Whether a parameter of this name is what the data are compared with."""
    return TARGET.fullmatch(name) is not None


def _input_key(batch: Any) -> str | None:
    """The name of the part of a batch that is the data; None if the batch is one tensor."""
    if isinstance(batch, Tensor):
        return None
    tensors = {k: v for k, v in named_parts(batch).items() if isinstance(v, Tensor)}
    named = [key for key in tensors if is_input(key)]
    return next(iter([*named, *tensors]), None)


def input_of(batch: Any) -> Any:
    """The data of a batch: the tensor itself, the part with such a name, or the first tensor."""
    key = _input_key(batch)
    return batch if key is None else named_parts(batch)[key]


def with_input(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch with other data; its other parts stay."""
    batch, key = fresh(batch), _input_key(batch)
    if key is None:
        return change(batch) if isinstance(batch, Tensor) else batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return batch._replace(**{key: change(getattr(batch, key))})  # pyright: ignore
    if isinstance(batch, (tuple, list)):
        at = int(key)
        return type(batch)([*batch[:at], change(batch[at]), *batch[at + 1 :]])
    if isinstance(batch, Mapping):
        batch[key] = change(batch[key])  # pyright: ignore[reportIndexIssue]
    else:
        setattr(batch, key, change(getattr(batch, key)))
    return batch


def examples(obj: Any, example: Any, shape: tuple[int, ...] | None) -> Iterator[Any]:
    """A copy of the batch that is given; else batches that an object may take.

    Raises:
        AuditError: If the batch is empty, or has numbers that are not finite.
    """
    given = member(obj, "example")
    if example is None and shape is None and isinstance(given, Tensor):
        example = given
    if example is not None:
        if isinstance(example, DataLoader):
            example = next(iter(example))
        batch = fresh(example)
        x = input_of(batch)
        if isinstance(x, Tensor) and not x.numel():
            raise AuditError(f"example: expected some numbers; got the shape {tuple(x.shape)}")
        dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
        if dense and not x.isfinite().all():
            raise AuditError("example: expected finite numbers; there are NaN or infinite ones")
        yield batch
        return
    generator = torch.Generator().manual_seed(0)
    for event in [shape] if shape is not None else _events(obj):
        yield torch.rand(4, *event, generator=generator)


def _events(obj: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that a network may take, by its first layer, to which couplings give half."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    modules = Sandbox(obj).layers()
    layer = next((m for m in modules if isinstance(m, kinds)), None)
    if isinstance(layer, nn.Linear):
        n = layer.in_features
        sides = [(channels, math.isqrt(n // channels)) for channels in (1, 3)]
        images = [(c, side, side) for c, side in sides if c * side * side == n and side > 3]
        yield from [(n,), *images, (2 * n,), (2 * n + 1,)]
    elif isinstance(layer, nn.Conv1d):
        yield layer.in_channels, 32
    elif isinstance(layer, nn.Conv2d):
        for channels in (layer.in_channels, 2 * layer.in_channels, layer.in_channels // 2):
            for side in (28, 32, 64, 16, 8) if channels else ():
                yield channels, side, side
    yield from [(6,), (4, 8, 8), (3, 8, 8), (12, 4, 4)]


def member(obj: Any, name: str) -> Any:
    """An attribute; None if there is none, or if a property raises."""
    with contextlib.suppress(Exception):
        return getattr(obj, name)
    return None


# --- arguments ----------------------------------------------------------------------------------


def signature_of(fn: Any) -> list[inspect.Parameter]:
    """The parameters of a callable; of a module, those of its forward (in Keras: its call)."""
    if isinstance(fn, nn.Module):
        fn = getattr(fn, "call", fn.forward)
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return []


def required(fn: Any) -> list[str]:
    """The names of the arguments that a callable needs."""
    bare = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in signature_of(fn) if p.kind not in bare and p.default is p.empty]


def keywords_of(fn: Any) -> list[str]:
    """The keywords that a function reads from its ``**kwargs`` without a default."""
    bags = [p.name for p in signature_of(fn) if p.kind is p.VAR_KEYWORD]
    return _keys_read(fn, bags[0]) if bags else []


def _keys_read(fn: Any, parameter: str) -> list[str]:
    """The keys of a parameter that a function reads without a default, by its source."""
    fn = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError):
        return []
    read: dict[str, None] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key)))
                | ast.Call(
                    func=ast.Attribute(value=ast.Name(id=name), attr="pop"),
                    args=[ast.Constant(value=str(key))],
                )
            ) if name == parameter:
                read[key] = None
    return list(read)


class Stub(int):
    """Stands for an optimizer, a trainer or a logger: the number 1, and so is all that it has."""

    def __getattr__(self, name: str) -> Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **how: Any) -> Stub:
        return self

    def __getitem__(self, key: Any) -> Stub:
        return self


class _Loader(list[Any]):
    """A data loader of one batch."""

    @property
    def dataset(self) -> _Loader:
        return self


def constant(name: str, batch: Any) -> Any:
    """What stands for an argument that is no part of a batch: a position, a count, a weight."""
    if SIZE.fullmatch(name) and isinstance(x := input_of(batch), Tensor) and x.ndim:
        return len(x)
    if POSITION.fullmatch(name):
        return 0
    if COUNT.fullmatch(name):
        return 1
    if name == "device":
        return torch.device("cpu")
    if LOOP.fullmatch(name):
        return Stub(1)
    return 1.0 if WEIGHT.fullmatch(name) else None


class Arguments(NamedTuple):
    """One way to call a function with a batch: `of` makes its arguments, `notes` say how."""

    of: Callable[[Any], tuple[list[Any], dict[str, Any]]]
    notes: tuple[str, ...] = ()


def arguments(fn: Any, batch: Any, given: Mapping[str, Any] | None = None) -> Iterator[Arguments]:
    """The ways to call a function with a batch, the likeliest first.

    Args:
        fn: A function, a method or a module.
        batch: The batch; only its form is used.
        given: Arguments that are known already, by their names.
    """
    parameters, parts, needed = signature_of(fn), named_parts(batch), required(fn)
    fixed, notes = dict(given or {}), []
    keywords = keywords_of(fn)
    for name in [*needed, *keywords]:
        value = constant(name, batch)
        if name not in fixed and name not in parts and (value is not None or name in keywords):
            fixed[name] = 1.0 if value is None else value
            notes.append(f"{name} is {fixed[name]}")
    open_ = [name for name in needed if name not in fixed]

    def way(picks: Mapping[str, Callable[[Any], Any]], *more: str) -> Arguments:
        def of(batch: Any) -> tuple[list[Any], dict[str, Any]]:
            values = fixed | {name: pick(batch) for name, pick in picks.items()}
            args: list[Any] = []
            for p in parameters:
                if p.name not in values or p.kind is p.KEYWORD_ONLY:
                    break
                args.append(values.pop(p.name))
            return args, values

        return Arguments(of, (*notes, *more))

    def part(key: str) -> Callable[[Any], Any]:
        return lambda batch: named_parts(batch)[key]

    whole = isinstance(batch, Tensor)
    optional = [p.name for p in parameters if p.default is not p.empty and p.name not in fixed]
    if not whole and parts and set(open_) <= set(parts):  # by name
        extra = [name for name in optional if name in parts]
        if open_ or extra:
            yield way({name: part(name) for name in [*open_, *extra]})
    positional = [*open_, *(n for n in optional if is_target(n) or "edge" in n)]
    if not whole and len(parts) > 1 and isinstance(batch, (tuple, list)):
        if any(p.kind is p.VAR_POSITIONAL for p in parameters) and not open_:
            yield Arguments(lambda batch: (list(batch), dict(fixed)), tuple(notes))
        if len(open_) > 1 or len(positional) > 1:
            keys = list(zip(positional, parts, strict=False))
            if len(keys) >= len(open_):
                yield way({name: part(key) for name, key in keys})
    if len(open_) == 1:
        (name,) = open_
        forms = {
            "": lambda batch: batch,
            f"of the batch, {name} is {_input_key(batch) or 'all'}": input_of,
        }
        order = list(forms.items())[: 1 if whole else 2]
        if not WHOLE.fullmatch(name) and isinstance(batch, (tuple, list)):
            order.reverse()
        for note, pick in order:
            yield way({name: pick}, *[note] * bool(note))
        if LOADER.fullmatch(name):
            yield way({name: lambda batch: _Loader([batch])}, f"{name} has one batch")
            if whole:
                note = f"{name} has one batch (x, y) with labels y of zeros"
                yield way({name: lambda x: _Loader([_labelled(x)])}, note)
        if whole and (keys := _keys_read(fn, name)):
            yield way({name: lambda x: _filled(keys, x)}, f"{name} is a dict of {', '.join(keys)}")
        if whole and WHOLE.fullmatch(name):
            yield way({name: _labelled}, f"{name} is (x, y) with labels y of zeros")
            yield way({name: lambda x: [x]}, f"{name} is a list of one tensor")
    elif open_ and all(is_input(n) or is_target(n) for n in open_) and is_input(open_[0]):
        copies = ", ".join(open_[1:])
        yield way(dict.fromkeys(open_, input_of), f"the data stand for {copies} too")
    elif not open_ and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        if "edge_index" in parts:
            names = (_input_key(batch) or "x", "edge_index")
            yield Arguments(
                lambda batch: ([named_parts(batch)[name] for name in names], dict(fixed)),
                (*notes, f"of the batch, {' and '.join(names)} are given"),
            )
        yield Arguments(lambda batch: ([batch], dict(fixed)), tuple(notes))
    elif not open_:
        if whole and optional and is_input(optional[0]):
            yield way({optional[0]: lambda batch: batch})
        yield way({})


def _labelled(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.zeros(len(x), dtype=torch.long)


def _filled(keys: list[str], x: Tensor) -> dict[str, Tensor]:
    """A dict of these keys: the data, and labels of zeros."""
    data = [key for key in keys if is_input(key)] or keys[:1]
    return {key: x if key in data else _labelled(x)[1] for key in keys}
