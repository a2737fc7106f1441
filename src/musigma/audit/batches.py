"""Batches, and how functions are called with them.

`bindings` gives the parts of a batch, or what a function returned for it, to the parameters of
another function. Names decide: `meaning` says what they mean. Where they say nothing, the order
does. A `Bound` is a function with a source for each argument, which says what was assumed.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from musigma.audit.findings import AuditError, name_of
from musigma.audit.sandbox import Sandbox

__all__ = [
    "THE_OUTPUTS", "Bound", "Stub", "bindings", "examples", "forms", "fresh", "input_of", "leaves",
    "losses", "meaning", "member", "named_outputs", "required", "signature_of",
]  # fmt: skip

MEANINGS = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "position": r"i|idx|index|(batch|data|optimizer|dataloader|loader)_?(i|idx|index|nb|id)",
        "size": r"batch_?size|bs|bsz|n_?batch",
        "device": r"device",
        "loop": r"opt(im)?(izer)?|(lr_)?scheduler|writer|logger",
        "loader": r"(\w+_)?(data_?)?(loader|iterator)",
        "repeats": r"(\w+_)?(epochs?|steps?|iter(ation)?s?|n_batches)|it",
        "draws": r"(\w+_)?(n(um)?_samples|k)",
        "model": r"(\w+_)?(model|net|vae|network|flow|module)",
        "batch": r"(mini_?)?batch|data|inputs?|samples?|item|xy|graph|example",
        "data": r"xs?|x_?(true|in|orig|real|data|input|batch)|(true|orig|real)_x|images?|imgs?|"
        r"features?|obs|original|real|pixel_values|seq|sequences?",
        "target": r"y|y_?true|targets?|x_?target|labels?|gt|tgt",
        "reconstruction": r".*(rec|pred|decod|tilde|logits).*|.*hat|out(?!put \d).*|x_|xr.*|gen.*",
        "log_det": r".*(det|jac|ldj|ladj).*",
        "log_p": r".*(log_?(p|q|prob|z)|prior).*",
        "weight": r".*(beta|weight|gamma|alpha|lambda?|anneal|coeff?|temperature).*|M_N|tau|kl_?w",
        "scale": r".*(log|sig|std|var|scale).*|.*(lv|ls)",
        "mean": r".*(mean|mu|loc).*|m",
        "z": r"z.*|.*latent.*|code.*|.*sample.*",
    }.items()
}
ROLES = {"reconstruction", "log_det", "log_p", "scale", "mean", "z"}  # of what a network returns
THE_BATCH, THE_DATA, THE_OUTPUTS = "the batch", "the data", "the outputs"
THE_LOADER = "a loader of one batch"


def meaning(name: str) -> str:
    """What the name of an argument, of an output or of a part of a batch means; "" if nothing.

    Example:
        >>> [meaning(name) for name in ("batch_idx", "log_var", "x_hat", "foo")]
        ['position', 'scale', 'reconstruction', '']
    """
    return next((what for what, names in MEANINGS.items() if names.fullmatch(name)), "")


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch with other tensors; models and functions in it are not copied.

    Example:
        >>> mapped({"x": torch.ones(2), "name": "a"}, torch.neg)
        {'x': tensor([-1., -1.]), 'name': 'a'}
    """
    kept = [part for part in (batch, *named_parts(batch).values()) if callable(part)]
    copied = {id(t): change(t) for t in leaves(batch, depth=5).values()}
    with contextlib.suppress(Exception):  # there are objects that cannot be copied
        return copy.deepcopy(batch, {id(part): part for part in kept} | copied)
    return batch


def fresh(batch: Any) -> Any:
    """A copy of a batch that a function may change."""
    return mapped(batch, lambda t: t.detach().clone())


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


def input_of(batch: Any) -> Any:
    """The data of a batch: the tensor itself, the part with such a name, or the first tensor."""
    tensors = {k: t for k, t in named_parts(batch).items() if isinstance(t, Tensor)}
    named = [t for name, t in tensors.items() if _is_data(name)]
    return next(iter([*named, *tensors.values()]), batch)


def leaves(value: Any, depth: int = 2) -> dict[str, Tensor]:
    """The tensors in what was returned, by their names or positions; "" if it is one.

    Example:
        >>> leaves({"loss": torch.zeros(()), "parts": (torch.ones(2), 3)})
        {'loss': tensor(0.), 'parts.0': tensor([1., 1.])}
    """
    if isinstance(value, Tensor):
        return {"": value}
    found: dict[str, Tensor] = {}
    if depth and not isinstance(value, (nn.Module, Distribution, str, bytes)):
        for name, part in named_parts(value).items():
            for inner, leaf in leaves(part, depth - 1).items():
                found[f"{name}.{inner}".rstrip(".")] = leaf
    return found


def losses(value: Any) -> dict[str, Tensor]:
    """The single numbers in what was returned that require a gradient."""
    return {n: t for n, t in leaves(value).items() if t.requires_grad and t.numel() == 1}


def member(obj: Any, name: str) -> Any:
    """An attribute; None if there is none, or if a property raises."""
    with contextlib.suppress(Exception):
        return getattr(obj, name)
    return None


def forms(batch: Any, dtype: torch.dtype | None) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """A batch as it is; then other forms that a function may take, with notes that say so.

    Its data are of a type, or flattened; a tensor is made a pair, or a dict, with labels.
    """
    yield batch, ()
    x = input_of(batch)
    if not isinstance(x, Tensor):
        return
    if dtype not in (None, x.dtype):
        divisor = 255 if x.dtype == torch.uint8 else 1
        note = f"the data are converted from {x.dtype} to {dtype}"
        note += ", and divided by 255" * (divisor > 1)
        yield mapped(batch, lambda t: t.to(dtype) / divisor if t is x else t), (note,)
    if x.ndim > 2:
        note = "the data are flattened"
        yield mapped(batch, lambda t: t.flatten(1) if t is x else t), (note,)
    if isinstance(batch, Tensor) and x.ndim:
        labels = torch.zeros(len(x), dtype=torch.long)
        yield (x, labels), ("the batch is (x, y) with labels y of zeros",)
        yield Filled(x=x, y=labels), ("the batch is a dict of the data and of labels of zeros",)


def examples(obj: Any, example: Any, shape: tuple[int, ...] | None) -> Iterator[Any]:
    """A copy of the batch that is given; else batches that an object may take.

    Raises:
        AuditError: If the batch is empty, or has numbers that are not finite.
    """
    if example is None:
        generator = torch.Generator().manual_seed(0)
        for event in [shape] if shape is not None else _events(obj):
            yield torch.rand(4, *event, generator=generator)
        return
    batch = next(iter(example)) if isinstance(example, DataLoader) else example
    batch = fresh(tree_map_only(np.ndarray, torch.from_numpy, batch))
    x = input_of(batch)
    if isinstance(x, Tensor) and not x.numel():
        raise AuditError(f"example: expected some numbers; got the shape {tuple(x.shape)}")
    dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    if dense and not x.isfinite().all():
        raise AuditError("example: expected finite numbers; there are NaN or infinite ones")
    yield batch


def _events(obj: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that a network may take, by its first layer, to which couplings give half."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layer = next((m for m in Sandbox(obj).layers() if isinstance(m, kinds)), None)
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


# --- arguments ----------------------------------------------------------------------------------


def signature_of(fn: Any) -> inspect.Signature:
    """The parameters of a callable; of a module, those of its forward (in Keras: its call)."""
    fn = getattr(fn, "call", fn.forward) if isinstance(fn, nn.Module) else fn
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return inspect.Signature()


def required(fn: Any) -> list[str]:
    """The names of the arguments that a callable needs."""
    bare = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature_of(fn).parameters.values()
    return [p.name for p in parameters if p.kind not in bare and p.default is p.empty]


class Stub(int):
    """Stands for an optimizer, a trainer or a logger: the number 1, and so is all that it has."""

    def __getattr__(self, name: str) -> Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **how: Any) -> Stub:
        """What a method of a logger returns."""
        return self

    def __getitem__(self, key: Any) -> Stub:
        return self


class Filled(dict[str, Tensor]):
    """A batch as a dict, in which each other name is that of the data, or of the labels."""

    def __missing__(self, name: str) -> Tensor:
        return self["y" if meaning(name) == "target" else "x"]


class Loader(list[Any]):
    """A data loader of one batch."""

    @property
    def dataset(self) -> Loader:
        return self


class Bound(NamedTuple):
    """A function whose arguments are taken from a batch, and from what was returned for it.

    Args:
        fn: The function.
        keys: The names of what its arguments take; several for ``*args``.
        fixed: The arguments that are constants; a dict for ``**kwargs``.

    Example:
        >>> bound = next(bindings(lambda x, beta: beta * x.sum(), torch.ones(3)))
        >>> bound.text, bound(torch.ones(3)).item()
        ('x=the data, beta=1', 3.0)
    """

    fn: Callable[..., Any]
    keys: Mapping[str, str | tuple[str, ...]]
    fixed: Mapping[str, Any]

    def __call__(self, batch: Any, shown: Mapping[str, Any] | None = None) -> Any:
        """What the function returns for a batch, and for what was returned for that, by names."""
        known = {**named_parts(batch), THE_DATA: input_of(batch), THE_BATCH: batch}
        known |= {THE_LOADER: Loader([batch]), **(shown or {})}
        given = {
            name: known[key] if isinstance(key, str) else [known[each] for each in key]
            for name, key in self.keys.items()
        }
        bound = inspect.BoundArguments(signature_of(self.fn), given | self.fixed)  # pyright: ignore
        return self.fn(*bound.args, **bound.kwargs)

    @property
    def text(self) -> str:
        """What is taken for what."""
        words: list[str] = []
        for name in signature_of(self.fn).parameters:
            value = self.keys.get(name, self.fixed.get(name))
            if isinstance(value, dict):
                words += [f"{key}={each}" for key, each in value.items()]
            elif value is not None:
                value = f"{name_of(value)}()" if isinstance(value, nn.Module) else value
                value = f"batch[{value}]" if isinstance(value, str) and value.isdigit() else value
                words += value if isinstance(value, tuple) else [f"{name}={value}"]
        return ", ".join(words)

    def is_plain(self, batch: Any) -> bool:
        """Whether nothing is assumed: arguments are the batch, or its parts of the same names."""
        whole = (THE_BATCH, THE_DATA) if isinstance(batch, Tensor) else (THE_BATCH,)
        return not self.fixed and all(key in (name, *whole) for name, key in self.keys.items())


def bindings(
    fn: Any,
    batch: Any,
    outputs: Mapping[str, Tensor] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Bound]:
    """The ways to call a function, the likeliest first.

    Args:
        fn: A function, a method or a module.
        batch: The batch; only its form is used.
        outputs: What was returned for the batch, by `named_outputs`, if the function takes that.
        given: Arguments that are known already, by their names.
    """
    parameters, parts = signature_of(fn).parameters.values(), named_parts(batch)
    fixed = {**_constants(fn, batch, {*parts, *(outputs or ())}), **(given or {})}
    needed = [name for name in required(fn) if name not in fixed]
    optional = [p.name for p in parameters if p.default is not p.empty and p.name not in fixed]
    spread = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    in_order = list(parts if outputs is None else outputs)

    def bound(names: Iterable[Any], keys: Iterable[str | tuple[str, ...]]) -> Bound:
        taken = dict(zip(names, keys, strict=False))
        return Bound(fn, taken, {name: v for name, v in fixed.items() if name not in taken})

    if not needed and outputs is None:
        needed = [name for name in optional if name in parts]
        needed = needed or [name for name in optional[:1] if _is_data(name)]
    if not needed:
        if outputs is None and not isinstance(batch, (tuple, list)):  # a graph, say
            in_order = [name for name in parts if _is_data(name) or name == "edge_index"]
        if spread and in_order:
            yield bound([spread], [tuple(in_order)])
        yield bound([spread], [(THE_BATCH,)]) if spread and outputs is None else bound([], [])
        return
    if (named := _by_name(needed, outputs, batch)) is not None:
        more = [name for name in optional if name in parts and name not in named]
        yield bound([*named, *more], [*named.values(), *more])
    if outputs is not None:
        x, is_first = THE_BATCH if "batch" in needed else THE_DATA, _is_data(needed[0])
        if len(needed) == len(in_order) + 1 and named is None:
            in_order.insert(0 if is_first else 1, x)
        if len(needed) == len(in_order) > 1:
            yield bound(needed, in_order)
        if len(needed) <= 2:
            keys = [THE_OUTPUTS, x][: len(needed)]
            yield bound(needed, reversed(keys) if is_first else keys)
        return
    if len(needed) == 1:
        yield bound(needed, [THE_BATCH])
        yield bound(needed, [THE_DATA])
    if isinstance(batch, (tuple, list)):
        more = [name for name in optional if meaning(name) == "target" or "edge" in name]
        every = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        for names in ([*needed, *more], every):
            if len(names) > 1 and len({*names} & {*required(fn)}) <= len(batch):
                yield bound(names, in_order)


def _constants(fn: Any, batch: Any, known: set[str]) -> dict[str, Any]:
    """What stands for arguments that are no part of a batch: a position, a count, a weight."""
    x = input_of(batch)
    values = dict.fromkeys(("repeats", "draws", "weight", "loop"), Stub(1))
    values |= {"position": 0, "device": torch.device("cpu")}
    values |= {"size": len(x)} if isinstance(x, Tensor) and x.ndim else {}
    found = dict[str, Any]()
    for p in signature_of(fn).parameters.values():
        what = meaning(p.name)
        is_needed = p.default is p.empty or what == "repeats"
        if p.kind is p.VAR_KEYWORD:
            if keys := _keys_read(fn, p.name):
                found[p.name] = {key: values.get(meaning(key), Stub(1)) for key in keys}
        elif what in values and p.name not in known and is_needed:
            found[p.name] = values[what]
    return found


def _by_name(
    names: list[str], outputs: Mapping[str, Tensor] | None, batch: Any
) -> dict[str, str] | None:
    """What each argument takes, by their names; None if one is left."""
    parts, data = named_parts(batch), any(map(_is_data, names))
    left, taken = dict(outputs or {}), dict[str, str]()
    answers = [name for name in names if meaning(name) == "reconstruction"]
    answers = answers or [name for name in names if meaning(name) == "target" and data]
    size = getattr(input_of(batch), "numel", int)()

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    def of_batch(name: str) -> Iterator[str]:
        what = meaning(name)
        if name in parts:
            yield name
        if "edge" in name:
            yield from (part for part, value in parts.items() if _is_edges(part, value))
        if what == "loader" or (what == "batch" and outputs is None):
            yield THE_LOADER if what == "loader" else THE_BATCH
        if _is_data(name) or (what == "target" and not data):
            yield THE_DATA
        if what == "target":
            yield from list(parts)[1:2]

    rules: list[Callable[[str], Iterable[str]]] = [
        lambda name: (at for at in left if plain(at) == plain(name)),
        lambda name: (at for at in left if meaning(name) == meaning(at) in ROLES - parts.keys()),
        lambda name: (at for at, t in left.items() if name in answers and t.numel() == size),
        of_batch,
        lambda name: left if len(names) - len(taken) == len(left) else (),
    ]
    for rule, name in product(rules, names):
        if name not in taken and (at := next(iter(rule(name)), None)) is not None:
            taken[name] = at
            left.pop(at, None)
    return {name: taken[name] for name in names} if len(taken) == len(names) else None


def _is_data(name: str) -> bool:
    return meaning(name) in ("data", "batch")


def _is_edges(name: str, part: Any) -> bool:
    pairs = isinstance(part, Tensor) and not part.is_floating_point() and part.ndim == 2
    return "edge" in name or (pairs and len(part) == 2)


# --- names in source code -----------------------------------------------------------------------


def _source_of(fn: Any) -> str:
    """The source code of a function, or of a module's forward; empty if there is none."""
    fn = getattr(fn, "call", fn.forward) if isinstance(fn, nn.Module) else fn
    with contextlib.suppress(OSError, TypeError):
        return textwrap.dedent(inspect.getsource(fn))
    return ""


def _keys_read(fn: Any, parameter: str) -> list[str]:
    """The keys of a parameter that a function reads without a default."""
    pattern = rf"\b{parameter}(?:\[|\.pop\()[\"'](\w+)[\"'][\])]"
    return re.findall(pattern, _source_of(fn))


def named_outputs(value: Any, fn: Any, alone: str) -> dict[str, Tensor]:
    """The tensors that a function returned, by the names in its return statement.

    Args:
        value: What it returned.
        fn: The function, or the module whose forward it is.
        alone: The name of a single tensor.
    """
    found = leaves(value)
    if list(found) == [""]:
        return {alone: found[""]}
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields"):
        return found
    told: list[str] = []
    with contextlib.suppress(SyntaxError):  # of a part of a line
        for node in ast.walk(ast.parse(_source_of(fn))):
            match node:
                case ast.Return(value=ast.Tuple(elts=parts) | ast.List(elts=parts)):
                    told = [_name_in(part) for part in parts]
    told = told if len(told) == len(value) else [""] * len(value)

    def name(key: str) -> str:
        place, dot, rest = key.partition(".")
        own = told[int(place)]
        own = own if own and told.count(own) == 1 else f"output {int(place) + 1}"
        return f"{own}{dot}{rest}"

    return {name(key): tensor for key, tensor in found.items()}


def _name_in(node: ast.expr) -> str:
    """The name of what is returned: of a variable, or of a method that says what it makes."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word):
            return word
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=word)):
            return word if meaning(word) in ROLES else ""
    return ""
