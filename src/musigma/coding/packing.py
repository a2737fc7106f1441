"""Levels as bytes, and by a general codec: xz."""

from __future__ import annotations

import lzma
import math

import numpy as np


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
