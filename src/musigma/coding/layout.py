"""The file format `.mus`: a header, perhaps a model, and chunks of images that stand alone.

Every part has a checksum. The CRC (`zlib.crc32`) of a chunk's header, and that of the footer, is
continued from the CRC of the start of the file, so a chunk of another file is not taken for one of
this file. All integers are little-endian:

    start    magic 8s | major u8 | minor u8 | flags u16 | header length u32
             header: canonical JSON
             with flag 1:  model length u64 | sha256 of the model 32s
             CRC of all of the above u32
             with flag 1:  the model
    chunk    "MUSC" | index u32 | first image u32 | images u32 | kind u32 | batches u32
             exceptions u32 | side: stored u32, inflated u32 | raw u64 | payload u64
             digest of the body, BLAKE2b, 8s | CRC of this header, continued from the start, u32
             body: batch sizes less one u8 | exceptions, of four u32 each | side, zlib | payload
    footer   "MUSF" | chunks u32 | images u64 | raw u64 | sha256 of all chunk headers 32s
             per chunk: offset u64 | size u64 | first u32 | images u32 | kind u32 | its CRC u32
             offset of the footer u64 | CRC of it, continued from the start, u32 | "MUSE"

Flag 2: the side of a chunk may hold arrays; see `musigma.coding.batch`.

The checksums find accidents. They do not protect against forgery: a forged file can hold any
images, but it cannot make a reader fail other than by a `CodingError`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from musigma.coding.errors import Limits

MAGIC = b"\x89MUS\r\n\x1a\n"  # not text, and damaged by every transfer as text
MAJOR, MINOR = 1, 0
WITH_MODEL, WITH_ARRAYS = 1, 2  # the flags

RAW, PACKED, BITS_BACK, RECORDS = range(4)
KINDS = {
    RAW: "raw",
    PACKED: "packed by a general codec",
    BITS_BACK: "coded by the model, with bits back",
    RECORDS: "coded by the model, one record per image",
}

MODEL_KINDS = (BITS_BACK, RECORDS)

EXCEPTION = np.dtype([("batch", "<u4"), ("place", "<u4"), ("index", "<u4"), ("up", "<u4")])
"""An exception of rounding: its batch, place and element, and whether it was rounded up."""

START = struct.Struct("<8sBBHI")
MODEL = struct.Struct("<Q32s")
CHECK = struct.Struct("<I")
HEAD = struct.Struct("<4s8I2Q8sI")
FOOT = struct.Struct("<4sIQQ32s")
ROW = struct.Struct("<QQ4I")
TAIL = struct.Struct("<QI4s")
CHUNK_MAGIC, FOOT_MAGIC, END_MAGIC = b"MUSC", b"MUSF", b"MUSE"


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """Some images of a file, which are decompressed without the others.

    Attributes:
        index: Its number among the chunks of the file.
        first: Number of its first image.
        count: Number of images, at least one.
        kind: One of `KINDS`.
        raw: Bytes of the images, decompressed, without `side`. Whoever decompresses must check it.
        schedule: Sizes of the coded batches, each 1 to 256, in all `count`; empty if no model took
            part.
        exceptions: Array of dtype `EXCEPTION`, shape (E,); read-only from a reader.
        side: What belongs to the images besides pixels; stored deflated.
        payload: The images.
    """

    index: int
    first: int
    count: int
    kind: int
    raw: int
    schedule: Sequence[int] = ()
    exceptions: np.ndarray = field(default_factory=lambda: np.empty(0, EXCEPTION))
    side: bytes = b""
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Entry:
    """The header of a chunk, as `HEAD` packs it, and the place of the chunk in its file.

    Attributes:
        index, first, count, kind, raw: As in `Chunk`.
        batches: Number of coded batches.
        exceptions: Number of exceptions.
        side: Bytes of the side as it is stored.
        inflated: Bytes of the side.
        payload: Bytes of the payload.
        body: The digest of the body.
        check: The CRC of the header.
        offset: The first byte of the chunk.
    """

    magic: bytes
    index: int
    first: int
    count: int
    kind: int
    batches: int
    exceptions: int
    side: int
    inflated: int
    raw: int
    payload: int
    body: bytes
    check: int
    offset: int

    @property
    def front(self) -> int:
        """Bytes of the body before the payload."""
        return self.batches + EXCEPTION.itemsize * self.exceptions + self.side

    @property
    def size(self) -> int:
        """Bytes of the chunk."""
        return HEAD.size + self.front + self.payload

    @property
    def end(self) -> int:
        """The first byte after the chunk."""
        return self.offset + self.size

    def __str__(self) -> str:
        last = self.first + self.count - 1
        return f"chunk {self.index} (images {self.first} to {last}, at byte {self.offset})"

    def consistent(self) -> bool:
        """Whether its numbers agree with each other."""
        return (
            self.count >= max(1, self.batches)
            and (self.side == 0) == (self.inflated == 0)
            and self.side <= self.inflated + self.inflated // 8 + 64
        )

    def hold(self, limits: Limits) -> None:
        """Refuse a chunk that exceeds a limit."""
        where = f"chunk {self.index}"
        limits.hold("images", self.first + self.count, f"{where}: images up to its end")
        limits.hold("chunk_images", self.count, f"{where}: images")
        limits.hold("chunk_raw", self.raw, f"{where}: bytes, decompressed")
        limits.hold("payload", self.payload, f"{where}: bytes of payload")
        limits.hold("exceptions", self.exceptions, f"{where}: exceptions")
        limits.hold("side", self.inflated, f"{where}: bytes besides pixels")


class Footer(NamedTuple):
    """The footer of a file, which takes `size` bytes: what was written, and where.

    Each row is (offset, size, first image, images, kind, CRC of the header) of a chunk.
    """

    rows: list[tuple[int, ...]]
    images: int
    raw: int
    digest: bytes
    size: int

    def lists(self, entry: Entry) -> bool:
        """Whether this chunk was written, wherever it lies now."""
        written = (entry.size, entry.first, entry.count, entry.kind, entry.check)
        return entry.index < len(self.rows) and self.rows[entry.index][1:] == written


def body_digest(*parts: bytes) -> hashlib.blake2b:
    """The digest of the body of a chunk, to be updated with what follows.

    A CRC would not do: the blocks of a PNG end in their own CRC, and two blocks of equal length
    may change places without changing the CRC around them.

    >>> import zlib
    >>> block, other = (part + zlib.crc32(part).to_bytes(4, "little") for part in (b"1", b"2"))
    >>> zlib.crc32(block + other) == zlib.crc32(other + block)
    True
    >>> body_digest(block, other).digest() == body_digest(other, block).digest()
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest


def scheduled(kind: int, schedule: Sequence[int], count: int) -> bool:
    """Whether batches make up the images of a chunk."""
    if kind not in MODEL_KINDS:
        return len(schedule) == 0
    return sum(schedule) == count and all(1 <= size <= 256 for size in schedule)
