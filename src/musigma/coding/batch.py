"""Batches of images with what belongs to them, as bytes and as the input of a model.

The side of a chunk, which is what it holds besides pixels, is a JSON object: a list of one value
for each image under each name. If there are also arrays, it is a byte 1, the length of the JSON
(u32), the JSON object {"about": ..., "given": [[name, dtype, shape of a row], ...]}, and the bytes
of each array: the first bytes of all numbers, then the second bytes, and so on.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.context import Context
from musigma.model import Model
from musigma.spec import Spec, Variable

__all__ = ["Batch"]

DTYPES = ("|u1", "<i8", "<f4", "<f8")
"""Types of arrays besides pixels."""


@dataclass(frozen=True)
class Batch:
    """Consecutive images of a data set.

    Attributes:
        levels: Integers, shape (N, *shape), as the model takes them.
        about: Other information about each image, by name, one JSON value for each: `names`,
            `modes`, `labels`.
        given: The context of each image except its label, by name: indices of classes (N,),
            numbers (N, F) or images (N, C, H, W), in any type of `DTYPES`.
    """

    levels: np.ndarray
    about: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, which: slice) -> Batch:
        """Some of the images."""
        about = {name: values[which] for name, values in self.about.items()}
        given = {name: values[which] for name, values in self.given.items()}
        return Batch(self.levels[which], about, given)

    rows = __getitem__

    @property
    def side(self) -> bytes:
        """`about` and `given` as bytes, which are the same for the same values."""
        about = {name: list(values) for name, values in self.about.items()}
        if not self.given:
            return _json(about) if about else b""
        arrays = {name: storable(name, a) for name, a in sorted(self.given.items())}
        listed = [[name, a.dtype.str, list(a.shape[1:])] for name, a in arrays.items()]
        text = _json({"about": about, "given": listed})
        planes = (a.reshape(-1, 1).view(np.uint8).T.tobytes() for a in arrays.values())
        return b"".join([b"\x01", struct.pack("<I", len(text)), text, *planes])


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def storable(name: str, array: np.ndarray) -> np.ndarray:
    """A contiguous array of a type that files hold; integers become int64."""
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    if array.dtype.str not in DTYPES:
        raise ValueError(
            f"given: {name!r} is {array.dtype}; expected uint8, int64, float32 or float64"
        )
    return np.ascontiguousarray(array)


def unpacked_side(side: bytes, n: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`about` and `given` of n images; ValueError for what `Batch.side` does not return."""
    given: dict[str, np.ndarray] = {}
    try:
        if side[:1] == b"\x01":
            at = 5 + struct.unpack_from("<I", side, 1)[0]
            plain = json.loads(side[5:at])
            about = plain["about"]
            for name, dtype, shape in plain["given"]:
                given[str(name)], at = _array(side, at, dtype, (n, *map(int, shape)))
            if at != len(side):
                raise ValueError("bytes after the arrays")
        else:
            about = json.loads(side) if side else {}
    except (RecursionError, LookupError, TypeError, struct.error) as error:
        raise ValueError(f"names, modes, labels or arrays cannot be read ({error})") from error
    if not isinstance(about, dict) or any(
        not isinstance(values, list) or len(values) != n for values in about.values()
    ):
        raise ValueError("names, modes or labels are missing")
    if not all(type(label) is int and 0 <= label < 1 << 31 for label in about.get("labels", [])):
        raise ValueError("labels are not integers")
    return about, given


def _array(side: bytes, at: int, dtype: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    if dtype not in DTYPES or min(shape) < 0:
        raise ValueError(f"an array of {dtype}, shape {shape}")
    kind = np.dtype(dtype)
    size = math.prod(shape)
    end = at + size * kind.itemsize
    if end > len(side):
        raise ValueError("bytes of an array are missing")
    planes = np.frombuffer(side, np.uint8, size * kind.itemsize, at).reshape(kind.itemsize, size)
    return planes.T.copy().view(kind).reshape(shape), end


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    about: dict[str, list[Any]] = {}
    given: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in batch.about.items():
            about.setdefault(name, []).extend(values)
        for name, rows in batch.given.items():
            given.setdefault(name, []).append(rows)
    levels = np.concatenate([batch.levels for batch in batches])
    return Batch(levels, about, {name: np.concatenate(parts) for name, parts in given.items()})


def digest(levels: np.ndarray, side: bytes) -> bytes:
    """SHA-256 of images (N, ...) and of all that belongs to them."""
    state = hashlib.sha256(f"{levels.shape}".encode() + side)
    state.update(np.ascontiguousarray(levels.astype("<i4")).data)
    return state.digest()


# --- levels as bytes ---------------------------------------------------------------------------


def width(bits: int) -> int:
    """Bytes of a level."""
    return 2 if bits > 8 else 1


def plain(levels: np.ndarray, bits: int) -> bytes:
    """Levels as bytes, or as single bits if they are 0 and 1."""
    if bits == 1:
        return np.packbits(levels.astype(np.uint8)).tobytes()
    return levels.astype(f"<u{width(bits)}").tobytes()


def packed(levels: np.ndarray, bits: int) -> bytes:
    """Levels by a general codec, xz."""
    return lzma.compress(plain(levels, bits), preset=6)


def unpacked(payload: bytes, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The levels that were `packed`; ValueError or LZMAError if the payload holds other bytes."""
    n = math.prod(shape)
    size = math.ceil(n / 8) if bits == 1 else n * width(bits)
    inflater = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    plain = inflater.decompress(payload, size + 1)
    if len(plain) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"expected {size} bytes and no more, got {len(plain)}")
    if bits == 1:
        flat = np.unpackbits(np.frombuffer(plain, np.uint8), count=n)
    else:
        flat = np.frombuffer(plain, f"<u{width(bits)}")
    if flat.max(initial=0) >= 2**bits:
        raise ValueError(f"expected levels below {2**bits}, got {flat.max()}")
    return flat.reshape(shape).astype(np.int64)


# --- what a model takes -------------------------------------------------------------------------


def bits_of(model: Model) -> int:
    """Bits of each element of a model's data; refuses a model that was composed by hand."""
    if not model.config or model.spec is None:
        raise ValueError(
            "model: it was composed by hand, so a file could not name it; build it with an "
            "architecture (@musigma.architecture)"
        )
    return int(_levels(model).max() - 1).bit_length()


def spec_of(model: Model) -> Spec:
    """The specification of a model that was built by an architecture."""
    assert model.spec is not None
    return model.spec


def _levels(model: Model) -> np.ndarray:
    """Number of levels of every element, or of each."""
    spec = spec_of(model)
    if spec.schema is not None:
        raise ValueError("model: files hold integer levels, and its data are typed columns")
    levels = np.array(spec.levels)
    if levels.dtype == object:  # some are None
        raise ValueError(
            "model: its data are continuous, which no file holds exactly at its rate; train a "
            "model of integer levels (--bits)"
        )
    return levels


def check_levels(model: Model, x: np.ndarray) -> None:
    """Refuse data that are not levels for the model: another shape, type or range."""
    shape, levels = spec_of(model).shape, _levels(model)
    if x.shape[1:] != shape or x.dtype.kind not in "iub":
        raise ValueError(
            f"data: the model takes integers of shape (N, {', '.join(map(str, shape))}); got "
            f"{x.dtype} of shape {x.shape}"
        )
    flat = x.reshape(-1, math.prod(shape))
    if x.size and (flat.min() < 0 or (flat.max(0) >= levels).any()):
        raise ValueError(
            f"data: the model takes levels 0 to {levels.max() - 1}; got {x.min()} to {x.max()}"
        )


def context_of(model: Model, batch: Batch) -> Context:
    """The context of images, as the model takes it.

    A vector without a name of its own, `context`, is one-hot where there are only labels.
    """
    variables = spec_of(model).context
    if unknown := sorted(set(batch.given) - {variable.name for variable in variables}):
        raise ValueError(f"given: the model is not conditioned on {', '.join(unknown)}")
    return _context({variable.name: _rows(variable, batch) for variable in variables})


def _rows(variable: Variable, batch: Batch) -> Tensor:
    name, classes = variable.name, variable.classes
    values = batch.about.get("labels") if name == "label" else batch.given.get(name)
    if values is None and name == "context" and len(variable.shape) == 1:
        classes, values = variable.shape[0], batch.about.get("labels")
    what = f"{classes} classes" if classes else f"shape {variable.shape} for each example"
    if values is None:
        raise ValueError(
            f"{name}: the model is conditioned on it ({what}), and the data lack it; give it"
        )
    array = np.asarray(values)
    if not classes:
        if array.shape[1:] != variable.shape and (*array.shape[1:], 1) != variable.shape:
            raise ValueError(f"{name}: the model takes {what}; got shape {array.shape}")
        return torch.from_numpy(array).reshape(len(array), *variable.shape)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected an integer for each example; got {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() < classes:
        raise ValueError(
            f"{name}: expected 0 to {classes - 1}; got {array.min()} to {array.max()}"
        )
    return torch.eye(classes, dtype=torch.float64)[torch.from_numpy(array.astype(np.int64))]


def with_context(model: Model, levels: np.ndarray, given: Any) -> Batch:
    """Levels with the context that `compress` was given."""
    variables = spec_of(model).context
    if given is not None and not isinstance(given, Mapping):
        if len(variables) != 1:
            names = ", ".join(repr(v.name) for v in variables) or "nothing"
            raise ValueError(
                f"given: the model is conditioned on {names}; give a mapping of names"
            )
        given = {variables[0].name: given}
    about: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    classes = {variable.name for variable in variables if variable.classes}
    for name, rows in (given or {}).items():
        array = np.asarray(rows)
        if len(array) != len(levels):
            raise ValueError(f"given: {name!r} has {len(array)} rows for {len(levels)} examples")
        if name in classes and array.ndim == 2:
            if not ((array == 0) | (array == 1)).all() or not (array.sum(1) == 1).all():
                raise ValueError(f"given: {name!r} must hold indices of classes, or one-hot rows")
            array = array.argmax(1)
        if name == "label":
            about["labels"] = array.tolist()
        else:
            arrays[name] = storable(name, array)
    return Batch(levels, about, arrays)


def example(model: Model) -> tuple[np.ndarray, Context]:
    """Two images that are always the same, with their context: what fingerprints are made of."""
    x = _pattern(spec_of(model).shape, 2 ** bits_of(model))
    return x, _context({v.name: _example_rows(v) for v in spec_of(model).context})


def _pattern(shape: tuple[int, ...], levels: int) -> np.ndarray:
    return np.arange(2 * math.prod(shape)).reshape(2, *shape) * 7 // 3 % levels


def _example_rows(variable: Variable) -> Tensor:
    if variable.classes or (variable.name == "context" and len(variable.shape) == 1):
        return torch.eye(2, variable.shape[0], dtype=torch.float64)
    scale = 1 if variable.levels else 256
    return torch.from_numpy(_pattern(variable.shape, variable.levels or 256) / scale)


def _context(rows: dict[str, Tensor]) -> Context:
    return rows if len(rows) > 1 else next(iter(rows.values()), None)
