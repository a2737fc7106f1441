"""Batches of images, and what belongs to them as bytes.

The side of a chunk, which is what it holds besides pixels, is a JSON object: a list of one value
for each image under each name. Where there are arrays, too, it is a byte 1, the length of the JSON
(u32), the JSON object {"about": ..., "given": [[name, dtype, shape of a row], ...]}, and the bytes
of each array: the first bytes of all numbers, then the second bytes, and so on.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Batch"]

DTYPES = ("|u1", "<i8", "<f4", "<f8")
"""Types of arrays besides pixels."""


@dataclass(frozen=True)
class Batch:
    """Consecutive images of a data set.

    Attributes:
        levels: Integers, shape (N, *shape), as the model takes them.
        about: What else belongs to each image, by name, one JSON value for each: `names`, `modes`,
            `labels`.
        given: The context of each image except its label, by name: indices of classes (N,),
            numbers (N, F) or images (N, C, H, W), in any type of `DTYPES`.
    """

    levels: np.ndarray
    about: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.levels)

    def rows(self, which: slice) -> Batch:
        """Some of the images."""
        about = {name: values[which] for name, values in self.about.items()}
        given = {name: values[which] for name, values in self.given.items()}
        return Batch(self.levels[which], about, given)

    @property
    def side(self) -> bytes:
        """`about` and `given` as bytes, which are the same for the same values."""
        about = {name: list(values) for name, values in self.about.items()}
        if not self.given:
            return _json(about) if about else b""
        arrays = [(name, storable(name, a)) for name, a in sorted(self.given.items())]
        listed = [[name, a.dtype.str, list(a.shape[1:])] for name, a in arrays]
        text = _json({"about": about, "given": listed})
        planes = (
            a.reshape(-1).view(np.uint8).reshape(a.size, a.itemsize).T.tobytes() for _, a in arrays
        )
        return b"".join([b"\x01", struct.pack("<I", len(text)), text, *planes])


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def storable(name: str, array: np.ndarray) -> np.ndarray:
    """A contiguous array of a type that files hold; integers become int64.

    Raises:
        ValueError: For other types.
    """
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    if array.dtype.str not in DTYPES:
        raise ValueError(
            f"given: {name!r} is {array.dtype}; expected uint8, int64, float32 or float64"
        )
    return np.ascontiguousarray(array)


def unpacked_side(side: bytes, n: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`about` and `given` of n images.

    Raises:
        ValueError: If the bytes are nothing that `Batch.side` returns.
    """
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
    for batch in batches:
        for name, values in batch.about.items():
            about.setdefault(name, []).extend(values)
    names = {name for batch in batches for name in batch.given}
    given = {
        name: np.concatenate([b.given[name] for b in batches if name in b.given])
        for name in sorted(names)
    }
    return Batch(np.concatenate([batch.levels for batch in batches]), about, given)


def digest(levels: np.ndarray, side: bytes) -> bytes:
    """SHA-256 of images (N, ...) and of all that belongs to them."""
    state = hashlib.sha256(f"{levels.shape}".encode() + side)
    state.update(np.ascontiguousarray(levels.astype("<i4")).data)
    return state.digest()
