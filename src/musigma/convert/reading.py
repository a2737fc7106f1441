"""Foreign files as named tensors, read without running anything in them.

From a pickle, tensors, containers and dtypes are rebuilt; any other class or function becomes an
`Inert` stand-in that keeps the state it is given. A checkpoint of Lightning is therefore read
without Lightning, a pickled module yields its tensors without its class, and a pickle that calls
``os.system`` calls nothing.
"""

from __future__ import annotations

import json
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from musigma.files import impostor

__all__ = ["Contents", "ForeignError", "Inert", "printable", "read", "read_json"]

FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.pt",
    "trained.pkg",
    "model.ckpt",
    "model.npz",
)
"""The files in which a folder may hold its weights; the first that exists is read."""

DEPTH = 12
"""Largest nesting of containers in which tensors are looked for."""

MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes in which a pickled `nn.Module` keeps its tensors and submodules."""


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
        """Another stand-in."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Forget an item of a list, or of a set."""

    extend = add = append
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


class ForeignError(ValueError):
    """A checkpoint that cannot be converted; the message says what differs, and from what."""


@dataclass
class Contents:
    """The tensors of a file.

    Attributes:
        path: The file.
        tensors: By name; an `Inert` stands for a tensor of a kind that is not read.
        notes: Notes for the user about how the file was read.
    """

    path: Path
    tensors: dict[str, Tensor | Inert]
    notes: list[str] = field(default_factory=list)


def read(source: str | Path) -> Contents:
    """The tensors of a file, or of the file in which a folder holds its weights.

    Raises:
        ForeignError: If there is no such file, or it is damaged, or holds no tensors.
    """
    path, notes = Path(source), []
    if not path.exists():
        raise ForeignError(f"{path}: there is no such file or folder")
    if path.is_dir():
        path, notes = _file_in(path)
    if not path.is_file():
        raise ForeignError(f"{path}: is neither a file nor a folder")
    try:
        tensors = _tensors(path, notes)
    except ForeignError:
        raise
    except pickle.UnpicklingError as error:
        raise ForeignError(f"{path}: a damaged pickle ({printable(str(error))})") from error
    except Exception as error:  # whatever a parser throws at a damaged file
        reason = printable((str(error) or "no message").splitlines()[0])
        raise ForeignError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); it may be damaged or cut "
            "short, or hold something other than tensors"
        ) from error
    if not tensors:
        raise ForeignError(f"{path}: holds no tensors")
    return Contents(path, tensors, notes)


def _file_in(folder: Path) -> tuple[Path, list[str]]:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if files:
        others = ", ".join(file.name for file in files[1:])
        said = (
            f"file: read {files[0].name}; the folder also holds {others} (name a file to read it)"
        )
        return files[0], [said] if others else []
    if (folder / "vae" / "config.json").is_file():
        raise ForeignError(f"{folder}: a pipeline of diffusers; name its folder vae")
    raise ForeignError(f"{folder}: holds none of {', '.join(FILES)}; name the file itself")


def _tensors(path: Path, notes: list[str]) -> dict[str, Any]:
    import numpy as np

    if path.name.endswith(".index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = sorted({str(name) for name in index["weight_map"].values()})
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in shards):
            raise ForeignError(f"{path}: names shards that are not .safetensors files beside it")
        parts = [_tensors(path.parent / name, notes) for name in shards]
        return {name: t for part in parts for name, t in part.items()}
    with path.open("rb") as file:
        start = file.read(512)
    if reason := impostor(start):
        raise ForeignError(f"{path}: {reason}")
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            if "musigma" in (file.metadata() or {}):
                raise ForeignError(f"{path}: is already a checkpoint of musigma")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not zipfile.is_zipfile(path):
        if path.suffix == ".npz" or (
            start[:2] not in (b"\x80\x02", b"\x80\x04") or tarfile.is_tarfile(path)
        ):
            raise ForeignError(
                f"{path}: is not a .safetensors, .npz or torch.save file; if it was one, it is "
                "cut short or damaged, so copy it again"
            )
        return _pickled(path, notes)
    with zipfile.ZipFile(path) as archive:
        if sum(i.file_size for i in archive.infolist()) > 3e7 + 30 * path.stat().st_size:
            raise ForeignError(f"{path}: claims to hold far more than it does")
        damaged = archive.testzip()  # torch does not check the checksums itself
    if damaged is not None:
        raise ForeignError(f"{path}: {printable(damaged)} in it is damaged, so copy it again")
    if path.suffix != ".npz":
        return _pickled(path, notes)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if len({name.removesuffix(":0") for name in arrays}) < len(arrays):
        raise ForeignError(f"{path}: holds two arrays of one name, with and without ':0'")
    return {
        name.removesuffix(":0"): torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape))
        for name, a in arrays.items()
    }


def _pickled(path: Path, notes: list[str]) -> dict[str, Tensor | Inert]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise ValueError("a TorchScript archive, which is code; save its state_dict()")
    stand_ins: dict[str, type[Inert]] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            kind = f"{module}.{name}"
            if kind in SAFE:
                return SAFE[kind]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if kind not in stand_ins:
                stand_ins[kind] = type(name, (Inert,), {"kind": kind})
            return stand_ins[kind]

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
    if isinstance(value, Tensor):
        raise ForeignError(f"{path}: holds a single tensor, not a state dict")
    if stand_ins:
        more = f" and {len(stand_ins) - 3} more" if len(stand_ins) > 3 else ""
        notes.append(
            f"pickle: read the tensors alone; classes that were not loaded: "
            f"{printable(', '.join(list(stand_ins)[:3]))}{more}"
        )
    return dict(_walk(value, (), ()))


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor, without the hooks and attributes that a pickle may bring."""
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped(), offset, size, stride)


SAFE: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, arguments, *_: make(*arguments),
}
"""What a pickle may name, and what it gets."""


def _walk(value: Any, at: tuple[str, ...], above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Every tensor inside an object, by its dotted path of keys, indices and attributes.

    A tensor of a kind that was not rebuilt (sparse, quantized) is listed as its stand-in.
    """
    inert = isinstance(value, Inert)
    unread = "torch._utils._rebuild", "torch._tensor._rebuild"
    if isinstance(value, Tensor) or (inert and value.kind.startswith(unread)):
        yield ".".join(at), value
        return
    if len(at) > DEPTH or id(value) in above:
        return
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inside += value.items()
    elif isinstance(value, (list, tuple)):
        inside += enumerate(value)
    if inert:
        states = value.state if isinstance(value.state, tuple) else (value.state,)
        inside += [
            pair for state in states if isinstance(state, Mapping) for pair in state.items()
        ]
    for key, item in inside:
        name = getattr(key, "kind", None) or str(key)  # the dotted name, of a class
        step = () if inert and key in MODULE_TABLES else (name,)
        yield from _walk(item, at + step, (*above, id(value)))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of at most 1 MB; None if there is no such file or no object.

    Raises:
        ForeignError: If the file is not JSON.
    """
    try:
        if path.stat().st_size > 1_000_000:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"{path}: is not readable JSON ({error})") from error
    return value if isinstance(value, dict) else None


def printable(text: str) -> str:
    """At most 300 characters of a file's text, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
