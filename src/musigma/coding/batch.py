"""Batches of images, and what belongs to them as bytes.

The side of a chunk, which is what it holds besides pixels, is a JSON object: a list of one value
for each image under each name. Where there are arrays, too, it is a byte 1, the length of the JSON
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
        arrays = {name: storable(name, a) for name, a in sorted(self.given.items())}
        listed = [[name, a.dtype.str, list(a.shape[1:])] for name, a in arrays.items()]
        text = _json({"about": about, "given": listed})
        planes = (a.reshape(-1, 1).view(np.uint8).T.tobytes() for a in arrays.values())
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
    """The levels that were `packed`.

    Raises:
        ValueError, lzma.LZMAError: If the payload does not hold exactly these.
    """
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
