"""Files of `torch.save`, read without running anything that a pickle names.

Tensors, containers and dtypes are rebuilt; any other class or function becomes an `Inert` stand-in
that keeps the state it is given. So a checkpoint of Lightning is read without Lightning, a pickled
module yields its tensors without its class, and a pickle that calls ``os.system`` calls nothing.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inert", "load", "named_tensors"]

DEPTH = 12
"""How many containers deep tensors are looked for."""

MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Where a pickled `nn.Module` keeps its tensors and its parts."""


class Inert(dict):
    """An object of a class that was not loaded: keeps its state and runs nothing.

    Attributes:
        kind: The dotted name of the class or function that the pickle asked for.
        state: What the pickle would have restored, or None.
    """

    kind = ""
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Return another stand-in."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Take an item of a list, or of a set, and forget it."""

    extend = add = append
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


def load(path: Path) -> tuple[Any, list[str]]:
    """The object in a file of `torch.save`, and the names that were replaced by stand-ins.

    Raises:
        ValueError: For a TorchScript archive, which is code.
        Exception: Whatever torch and pickle raise at a damaged file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise ValueError("a TorchScript archive, which is code; save its state_dict()")
    reader = _Reader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    return value, reader.replaced


def named_tensors(value: Any) -> dict[str, Tensor | Inert]:
    """Every tensor inside an object, by its dotted path of keys, indices and attributes.

    A tensor of a kind that was not rebuilt (sparse, quantised) is listed as its stand-in.
    """
    return dict(_walk(value, (), ()))


def _walk(value: Any, at: tuple[str, ...], above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) or (isinstance(value, Inert) and _is_tensor(value)):
        yield ".".join(at), value
        return
    if len(at) > DEPTH or id(value) in above:
        return
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inside += value.items()
    elif isinstance(value, (list, tuple)):
        inside += enumerate(value)
    if isinstance(value, Inert):
        states = value.state if isinstance(value.state, tuple) else (value.state,)
        inside += [
            pair for state in states if isinstance(state, Mapping) for pair in state.items()
        ]
    for key, item in inside:
        name = getattr(key, "kind", None) or str(key)  # the dotted name, of a class
        step = () if isinstance(value, Inert) and key in MODULE_TABLES else (name,)
        yield from _walk(item, at + step, (*above, id(value)))


def _is_tensor(value: Inert) -> bool:
    return value.kind.startswith(("torch._utils._rebuild", "torch._tensor._rebuild"))


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor, without the hooks and attributes that a pickle may bring."""
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped(), offset, size, stride)


SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, kind, arguments, *_: make(*arguments),
}
"""What a pickle may name and get."""


class _Reader:
    """What `torch.load` takes for the module pickle: its `Unpickler` finds `SAFE` names alone."""

    __name__ = "musigma.convert.pickles"

    def __init__(self):
        replaced: list[str] = []
        made: dict[str, type[Inert]] = {}

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                if (module, name) in SAFE:
                    return SAFE[module, name]
                if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                    return getattr(torch, name)
                kind = f"{module}.{name}"
                if kind not in made:
                    replaced.append(kind)
                    made[kind] = type(name, (Inert,), {"kind": kind})
                return made[kind]

        self.replaced = replaced
        self.Unpickler = Unpickler
        self.load: Callable[..., Any] = lambda file, **options: Unpickler(file, **options).load()
