"""The file format `.mus`, and its writer: bytes in, bytes out, without models and codes.

A file is a header, perhaps a model, and chunks of images that stand alone. Every part has a
checksum. The CRC (`zlib.crc32`) of a chunk's header, and that of the footer, is continued from the
CRC of the start of the file, so a chunk of another file is not taken for one of this file. All
integers are little-endian:

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

Damage to a chunk loses that chunk; a truncated file yields all chunks before its end. Every length
is checked against the size of the file and `Limits` before anything of that size is read or
allocated. The checksums find accidents. They do not protect against forgery: a forged file can
hold any images, but it cannot make a reader fail other than by a `CodingError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from musigma.coding.errors import LimitExceeded, Limits

__all__ = ["Chunk", "Writer"]

MAGIC = b"\x89MUS\r\n\x1a\n"  # not text, and damaged by every transfer as text
CHUNK_MAGIC, FOOT_MAGIC, END_MAGIC = b"MUSC", b"MUSF", b"MUSE"
MAJOR, MINOR = 1, 0
WITH_MODEL, WITH_ARRAYS = 1, 2  # the flags

START = struct.Struct("<8sBBHI")
MODEL = struct.Struct("<Q32s")
CHECK = struct.Struct("<I")
HEAD = struct.Struct("<4s8I2Q8sI")
FOOT = struct.Struct("<4sIQQ32s")
ROW = struct.Struct("<QQ4I")
TAIL = struct.Struct("<QI4s")
EXCEPTION = np.dtype([("batch", "<u4"), ("place", "<u4"), ("index", "<u4"), ("up", "<u4")])
"""An exception of rounding: its batch, place and element, and whether it was rounded up."""

RAW, PACKED, BITS_BACK, RECORDS = range(4)
KINDS = {
    RAW: "raw",
    PACKED: "packed by a general codec",
    BITS_BACK: "coded by the model, with bits back",
    RECORDS: "coded by the model, one record per image",
}
MODEL_KINDS = (BITS_BACK, RECORDS)


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """Some images of a file, which are decompressed without the others."""

    index: int  # among the chunks of the file
    first: int  # the number of its first image
    count: int  # images, at least one
    kind: int  # one of `KINDS`
    raw: int  # bytes of the images, decompressed, without `side`; whoever decompresses checks it
    schedule: Sequence[int] = ()  # sizes of the batches that the model coded, each 1 to 256
    exceptions: np.ndarray = field(default_factory=lambda: np.empty(0, EXCEPTION))
    side: bytes = b""  # what belongs to the images besides pixels; stored deflated
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Entry:
    """The header of a chunk, as `HEAD` packs it, and the place of the chunk in its file."""

    magic: bytes
    index: int
    first: int
    count: int
    kind: int
    batches: int  # their number, and that of exceptions
    exceptions: int
    side: int  # its bytes, as stored and inflated
    inflated: int
    raw: int
    payload: int
    body: bytes  # the digest of the body
    check: int  # the CRC of the header
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

    @property
    def row(self) -> tuple[int, ...]:
        """The chunk as the footer lists it."""
        return self.offset, self.size, self.first, self.count, self.kind, self.check

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
        for name, value, what in (
            ("images", self.first + self.count, "images up to its end"),
            ("chunk_images", self.count, "images"),
            ("chunk_raw", self.raw, "bytes, decompressed"),
            ("payload", self.payload, "bytes of payload"),
            ("exceptions", self.exceptions, "exceptions"),
            ("side", self.inflated, "bytes besides pixels"),
        ):
            limits.hold(name, value, f"chunk {self.index}: {what}")


def footer(entries: Sequence[Entry], offset: int, seed: int) -> bytes:
    """The footer of these chunks, at its place in the file; `seed` is the CRC of the start."""
    heads = hashlib.sha256(b"".join(HEAD.pack(*astuple(entry)[:-1]) for entry in entries))
    images, raw = sum(e.count for e in entries), sum(e.raw for e in entries)
    body = FOOT.pack(FOOT_MAGIC, len(entries), images, raw, heads.digest())
    body += b"".join(ROW.pack(*entry.row) for entry in entries) + struct.pack("<Q", offset)
    return body + CHECK.pack(zlib.crc32(body, seed)) + END_MAGIC


def body_digest(*parts: bytes) -> bytes:
    """The digest of the body of a chunk.

    A CRC would not do: the blocks of a PNG end in their own CRC, and two blocks of equal length
    may change places without changing the CRC around them.
    """
    return hashlib.blake2b(b"".join(parts), digest_size=8).digest()


def scheduled(kind: int, schedule: Sequence[int], count: int) -> bool:
    """Whether batches make up the images of a chunk."""
    if kind not in MODEL_KINDS:
        return len(schedule) == 0
    return sum(schedule) == count and all(1 <= size <= 256 for size in schedule)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def is_json(value: Any, levels: int) -> bool:
    """Whether a value is JSON with strings as keys, nested to at most this many levels."""
    if isinstance(value, dict):
        names = all(isinstance(key, str) for key in value)
        return levels > 0 and names and all(is_json(v, levels - 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return levels > 0 and all(is_json(v, levels - 1) for v in value)
    return value is None or isinstance(value, (str, bool, int, float))


class Writer:
    """Writes a file from start to end, without seeking, so it can write to a pipe.

    A `with` block closes it at its end. After an exception it does not: the file then has no
    footer, and reads as a truncated one. The limits are those of whoever will read the file;
    `arrays` tells whether the side of a chunk may hold arrays.

    Example:
        >>> file = io.BytesIO()
        >>> with Writer(file, {"width": 2}) as writer:
        ...     writer.write(Chunk(index=0, first=0, count=1, kind=0, raw=4, payload=b"abcd"))
        68
        >>> from musigma.coding.reader import Reader
        >>> reader = Reader(file)
        >>> reader.header, [chunk.payload for chunk in reader]
        ({'width': 2}, [b'abcd'])
    """

    def __init__(
        self,
        file: BinaryIO,
        header: Mapping[str, Any],
        model: bytes | None = None,
        limits: Limits | None = None,
        *,
        arrays: bool = False,
    ):
        self._file, self._limits = file, limits or Limits()
        if not isinstance(header, Mapping) or not is_json(dict(header), self._limits.depth):
            raise ValueError(
                "header: expected a dictionary of JSON values, with strings as keys, nested to at "
                f"most {self._limits.depth} levels; turn arrays into lists"
            )
        try:
            text = canonical(dict(header))
        except ValueError as error:
            raise ValueError(f"header: not JSON ({error}); give None for NaN") from error
        self._limits.hold("header", len(text), "header: bytes of JSON")
        flags = WITH_MODEL * (model is not None) | WITH_ARRAYS * arrays
        start = START.pack(MAGIC, MAJOR, MINOR, flags, len(text)) + text
        if model is not None:
            if not model:
                raise ValueError("model: expected bytes; give None for no model")
            self._limits.hold("embedded", len(model), "model: bytes")
            start += MODEL.pack(len(model), hashlib.sha256(model).digest())
        self._seed = zlib.crc32(start)
        self.entries: list[Entry] = []
        self._written = self._raw = 0
        self._failed = self._closed = False
        self._put(start + CHECK.pack(self._seed), model or b"")

    def write(self, chunk: Chunk) -> int:
        """Write the next chunk, and return its size; nothing is written if it is refused."""
        images = self.entries[-1].first + self.entries[-1].count if self.entries else 0
        if self._closed or self._failed:
            raise ValueError("file: closed, or a write to it has failed; write to a new file")
        if (chunk.index, chunk.first) != (len(self.entries), images):
            raise ValueError(
                f"chunk: expected number {len(self.entries)} from image {images}; got number "
                f"{chunk.index} from image {chunk.first}; write chunks in order"
            )
        _check(chunk)
        side = zlib.compress(chunk.side, 9) if chunk.side else b""
        front = bytes(size - 1 for size in chunk.schedule) + chunk.exceptions.tobytes() + side
        entry = Entry(
            CHUNK_MAGIC,
            chunk.index,
            chunk.first,
            chunk.count,
            chunk.kind,
            len(chunk.schedule),
            len(chunk.exceptions),
            len(side),
            len(chunk.side),
            chunk.raw,
            len(chunk.payload),
            body_digest(front, chunk.payload),
            check=0,
            offset=self._written,
        )
        entry.hold(self._limits)
        self._limits.hold("chunks", len(self.entries) + 1, "file: chunks")
        self._limits.hold("total", self._raw + chunk.raw, "file: bytes, decompressed")
        try:
            head = HEAD.pack(*astuple(entry)[:-1])[: -CHECK.size]
        except struct.error as error:  # limits were raised beyond the format
            raise LimitExceeded(f"chunk {chunk.index}: too large for the format") from error
        entry = replace(entry, check=zlib.crc32(head, self._seed))
        self._put(head + CHECK.pack(entry.check) + front, chunk.payload)
        self.entries.append(entry)
        self._raw += chunk.raw
        return entry.size

    def close(self) -> int:
        """Write the footer, unless it is written, and return the size of the whole file."""
        if self._failed:
            raise ValueError("file: a write to it has failed; write it again")
        if not self._closed:
            self._put(footer(self.entries, self._written, self._seed))
            self._closed = True
        return self._written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def _put(self, *parts: bytes) -> None:
        """Write all bytes, in as many calls as the file takes."""
        self._failed = True  # until everything is written
        for part in parts:
            view = memoryview(part)
            while view:
                done = self._file.write(view)
                if done is None and isinstance(self._file, io.RawIOBase):
                    raise BlockingIOError("file: open it in blocking mode")
                view = view[len(view) if done is None else done :]
            self._written += len(part)
        self._failed = False


def _check(chunk: Chunk) -> None:
    """Refuse a chunk that is inconsistent."""
    if chunk.kind not in KINDS:
        raise ValueError(f"chunk: expected a kind in {list(KINDS)}; got {chunk.kind!r}")
    if chunk.count < 1 or chunk.raw < 0:
        raise ValueError(
            "chunk: expected at least one image, and a size in bytes; got "
            f"{chunk.count} images of {chunk.raw} bytes"
        )
    if not scheduled(chunk.kind, chunk.schedule, chunk.count):
        raise ValueError(
            "chunk: expected batches of 1 to 256 images that sum to "
            f"{chunk.count}, or none if no model took part (it is {KINDS[chunk.kind]}); got "
            f"{list(chunk.schedule)[:9]}"
        )
    if chunk.exceptions.dtype != EXCEPTION or chunk.exceptions.ndim != 1:
        raise ValueError(
            f"chunk: expected exceptions of dtype {EXCEPTION} and one axis; got "
            f"{chunk.exceptions.dtype} of shape {chunk.exceptions.shape}"
        )
    for name, data in (("side", chunk.side), ("payload", chunk.payload)):
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise ValueError(f"chunk: expected bytes as {name}; got {kind}; give x.tobytes()")
