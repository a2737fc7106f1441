"""The file format `.mus`, written and read; `musigma.coding.layout` defines it.

This module knows nothing of models and codes: bytes in, bytes out. A file is a header, perhaps a
model, and chunks of images that stand alone. Damage to a chunk loses that chunk; a truncated file
yields all chunks before its end. Every length is checked against the size of the file and `Limits`
before anything of that size is read or allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from musigma.coding import layout
from musigma.coding.errors import CodingError, DamagedFile, LimitExceeded, Limits, UnknownVersion
from musigma.coding.layout import (
    CHECK,
    EXCEPTION,
    HEAD,
    KINDS,
    MAGIC,
    MAJOR,
    MINOR,
    MODEL,
    START,
    Chunk,
    Entry,
    body_digest,
    scheduled,
)
from musigma.coding.scan import Source, find

__all__ = ["Reader", "Writer"]

NEWLINES = "a .mus file whose line ends were changed; transfer it again, as binary"
AS_TEXT = "a .mus file that was re-encoded as text; transfer it again, as binary"
OTHERS = (
    (b"\x89MUS\n", NEWLINES),
    (b"\x89MUS\r\r\n", NEWLINES),
    (b"\tMUS\r\n", "a .mus file whose eighth bits are lost; transfer it again, as binary"),
    (b"\xc2\x89MUS", AS_TEXT),
    (b"\xef\xbf\xbdMUS", AS_TEXT),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a zip archive, or a PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file that it stands for"),
    (b"<", "a page of HTML or XML, perhaps the error page of a download"),
    (b"{", "JSON"),
)
"""How other files begin, and what they are."""
FAULT = "the checksums are right, so the program that wrote the file made an error"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any, levels: int) -> bool:
    """Whether a value is JSON with strings as keys, nested to at most this many levels."""
    if isinstance(value, dict):
        names = all(isinstance(key, str) for key in value)
        return levels > 0 and names and all(_plain(v, levels - 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return levels > 0 and all(_plain(v, levels - 1) for v in value)
    return value is None or isinstance(value, (str, bool, int, float))


class Writer:
    """Writes a file from start to end, without seeking: a pipe will do.

    A `with` block closes it at its end. After an exception it does not: the file then has no
    footer, and reads as a truncated one.

    Args:
        file: Open for writing bytes; it stays open.
        header: JSON values, with strings as keys.
        model: The model to embed, or None.
        limits: The limits of whoever will read the file.
        arrays: Whether the side of a chunk may hold arrays, which is written as a flag.

    Raises:
        ValueError: If the header is not JSON, or the model is empty.
        LimitExceeded: If one of them is too large.
        OSError: If the file cannot be written; in `write` and `close`, too.

    Example:
        >>> file = io.BytesIO()
        >>> with Writer(file, {"width": 2}) as writer:
        ...     writer.write(Chunk(index=0, first=0, count=1, kind=0, raw=4, payload=b"abcd"))
        68
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
        if not isinstance(header, Mapping) or not _plain(dict(header), self._limits.depth):
            raise ValueError(
                "header: expected a dictionary of JSON values, with strings as keys, nested to at "
                f"most {self._limits.depth} levels; turn arrays into lists"
            )
        try:
            text = _canonical(dict(header))
        except ValueError as error:
            raise ValueError(f"header: not JSON ({error}); give None for NaN") from error
        self._limits.hold("header", len(text), "header: bytes of JSON")
        flags = layout.WITH_MODEL * (model is not None) | layout.WITH_ARRAYS * arrays
        start = START.pack(MAGIC, MAJOR, MINOR, flags, len(text)) + text
        if model is not None:
            if not model:
                raise ValueError("model: expected bytes; give None for no model")
            self._limits.hold("embedded", len(model), "model: bytes")
            start += MODEL.pack(len(model), hashlib.sha256(model).digest())
        self._seed = zlib.crc32(start)
        self._rows = bytearray()
        self._digest = hashlib.sha256()
        self._written = self._chunks = self._images = self._raw = 0
        self._open = True
        self._put(start + CHECK.pack(self._seed), model or b"")

    def write(self, chunk: Chunk) -> int:
        """Write the next chunk, and return its size in bytes.

        Raises:
            ValueError: If it is not the next one, or is inconsistent; nothing is written.
            LimitExceeded: If it is too large; nothing is written.
        """
        self._check(chunk)
        side = zlib.compress(chunk.side, 9) if chunk.side else b""
        schedule = bytes(size - 1 for size in chunk.schedule)
        front = schedule + chunk.exceptions.tobytes() + side
        fields = (
            *(
                layout.CHUNK_MAGIC,
                chunk.index,
                chunk.first,
                chunk.count,
                chunk.kind,
                len(schedule),
            ),
            *(len(chunk.exceptions), len(side), len(chunk.side), chunk.raw, len(chunk.payload)),
            body_digest(front, chunk.payload).digest(),
        )
        try:
            head = HEAD.pack(*fields, 0)[: -CHECK.size]
        except struct.error as error:  # limits were raised beyond the format
            raise LimitExceeded(f"chunk {chunk.index}: too large for the format") from error
        check = zlib.crc32(head, self._seed)
        head += CHECK.pack(check)
        size = len(head) + len(front) + len(chunk.payload)
        row = layout.ROW.pack(self._written, size, chunk.first, chunk.count, chunk.kind, check)
        self._put(head + front, chunk.payload)
        self._rows += row
        self._digest.update(head)
        self._chunks += 1
        self._images += chunk.count
        self._raw += chunk.raw
        return size

    def close(self) -> int:
        """Write the footer, unless it is written, and return the size of the whole file.

        Raises:
            ValueError: If a write has failed.
        """
        if self._open:
            foot = layout.FOOT.pack(
                layout.FOOT_MAGIC, self._chunks, self._images, self._raw, self._digest.digest()
            )
            body = foot + bytes(self._rows) + layout.TAIL.pack(self._written, 0, b"")[:8]
            check = zlib.crc32(body, self._seed)
            self._put(body + CHECK.pack(check) + layout.END_MAGIC)
            self._open = False
        elif self._written < 0:
            raise ValueError("file: a write to it has failed; write it again")
        return self._written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def _check(self, chunk: Chunk) -> None:
        if not self._open:
            raise ValueError("file: closed, or a write to it has failed; write to a new file")
        if (chunk.index, chunk.first) != (self._chunks, self._images):
            raise ValueError(
                f"chunk: expected number {self._chunks} from image {self._images}; got number "
                f"{chunk.index} from image {chunk.first}; write chunks in order"
            )
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
        for name in ("side", "payload"):
            if not isinstance(getattr(chunk, name), bytes):
                kind = type(getattr(chunk, name)).__name__
                raise ValueError(f"chunk: expected bytes as {name}; got {kind}; give x.tobytes()")
        sizes = (len(chunk.exceptions), 0, len(chunk.side), chunk.raw, len(chunk.payload))
        entry = Entry(b"", chunk.index, chunk.first, chunk.count, chunk.kind, 0, *sizes, b"", 0, 0)
        entry.hold(self._limits)
        self._limits.hold("chunks", self._chunks + 1, "file: chunks")
        self._limits.hold("total", self._raw + chunk.raw, "file: bytes, decompressed")

    def _put(self, *parts: bytes) -> None:
        """Write all bytes, in as many calls as the file takes."""
        written, self._written = self._written, -1  # until everything is written
        still, self._open = self._open, False
        for part in parts:
            view = memoryview(part)
            while view:
                done = self._file.write(view)
                if done is None:
                    if isinstance(self._file, io.RawIOBase):
                        raise BlockingIOError("file: open it in blocking mode")
                    done = len(view)
                view = view[done:]
            written += len(part)
        self._written, self._open = written, still


class Reader:
    r"""The header of a file, and its chunks in any order.

    The chunks are found by the footer if it is whole and agrees with the header of every chunk.
    Otherwise the file is scanned for chunks with a whole header, and whatever a whole footer says
    of them still holds. Iteration yields all chunks that were found, up to a damaged one.

    Args:
        file: Open for reading bytes, seekable; it stays open. One reader at a time may use it.
        limits: What the file may ask for.

    Attributes:
        header: The JSON values that were written.
        version: Major and minor version.
        arrays: Whether the side of a chunk may hold arrays.
        model_size: Bytes of the embedded model; 0 if there is none.
        entries: The chunks that were found, in the order of their images.
        images: Number of images that the file holds, or held, as far as is known.
        lost: Images that were written and are in no entry: pairs of the first and the one after
            the last. `read` may still find a chunk in `entries` damaged.
        rescanned: Whether the file was scanned, because its footer did not tell everything.
        ended: Whether a footer of this file was found. If not, images after the last chunk may be
            lost, too.

    Raises:
        DamagedFile: If it is no `.mus` file, or its header is damaged.
        UnknownVersion: If it has a later format.
        LimitExceeded: If it asks for more than `limits` grant.
        OSError: If the file cannot be read; in `read` and `model`, too.

    Example:
        >>> Reader(io.BytesIO(b"PK..."))
        Traceback (most recent call last):
            ...
        musigma.coding.errors.DamagedFile: not a .mus file, which begins with b'\x89MUS'
    """

    def __init__(self, file: BinaryIO, limits: Limits | None = None):
        self._limits = limits or Limits()
        self._source = Source(file, self._limits)
        start = self._start()
        found = find(self._source, self._model + self.model_size)
        self._limits.hold("total", sum(e.raw for e in found.entries), "file: bytes, decompressed")
        self.header = _header(start, self._limits.depth)
        self.entries: Sequence[Entry] = tuple(found.entries)
        self.images, self.lost = found.images, found.lost
        self.rescanned, self.ended = found.rescanned, found.ended

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Chunk]:
        return (self.read(place) for place in range(len(self)))

    def model(self) -> bytes:
        """The embedded model.

        Raises:
            DamagedFile: If it is not as it was written.
            CodingError: If there is none.
        """
        if not self.model_size:
            raise CodingError("the file holds no model; give the model that it was written with")
        data = self._source.at(self._model, self.model_size)
        if hashlib.sha256(data).digest() != self._model_digest:
            raise DamagedFile(
                "the model in the file is damaged: it does not match its digest; copy the file "
                "again, or give the model that it was written with"
            )
        return data

    def read(self, place: int) -> Chunk:
        """The chunk `entries[place]`.

        Raises:
            DamagedFile: If it is not as it was written.
            UnknownVersion: If its kind is one of a later format.
        """
        entry = self.entries[place]
        if self._source.entry(entry.offset) != entry:
            raise DamagedFile(f"{entry}: its header has changed since the file was opened")
        if entry.kind not in KINDS:
            raise UnknownVersion(
                f"{entry}: it is of kind {entry.kind}, and this musigma knows kinds up to "
                f"{max(KINDS)}; upgrade musigma"
            )
        front = self._source.at(entry.offset + HEAD.size, entry.front)
        payload = self._source.at(entry.offset + HEAD.size + entry.front, entry.payload)
        if body_digest(front, payload).digest() != entry.body:
            raise DamagedFile(
                f"{entry}: its content does not match its checksum; copy the file again"
            )
        schedule = tuple(byte + 1 for byte in front[: entry.batches])
        side = _inflated(front[len(front) - entry.side :], entry.inflated)
        if side is None or not scheduled(entry.kind, schedule, entry.count):
            raise DamagedFile(f"{entry}: its parts do not agree; {FAULT}")
        listed = front[entry.batches : len(front) - entry.side]
        named = {name: getattr(entry, name) for name in ("index", "first", "count", "kind", "raw")}
        return Chunk(
            **named,
            schedule=schedule,
            exceptions=np.frombuffer(listed, EXCEPTION),
            side=side,
            payload=payload,
        )

    def _start(self) -> bytes:
        """Read everything before the chunks, and return the JSON of the header."""
        source = self._source
        begin = source.at(0, min(START.size + 9, source.size))
        if not begin.startswith(MAGIC):
            raise DamagedFile(_other(begin))
        if source.size < START.size:
            raise _cut("header")
        _, major, minor, flags, length = START.unpack(begin[: START.size])
        self.version = (major, minor)
        if major != MAJOR:
            raise _later(f"format {major}.{minor}")
        end = START.size + length
        end += MODEL.size if flags & layout.WITH_MODEL else 0
        if end + CHECK.size > source.size:
            raise _cut("header")
        self._limits.hold("header", length, "header: bytes of JSON")
        start = source.at(0, end)
        source.seed = zlib.crc32(start)
        if source.at(end, CHECK.size) != CHECK.pack(source.seed):
            raise DamagedFile(
                "the header of the file is damaged, and without it nothing can be decompressed; "
                "copy the file again"
            )
        if flags & ~(layout.WITH_MODEL | layout.WITH_ARRAYS):
            raise _later(f"format {major}.{minor} with the flags {flags:#x}")
        self.arrays = bool(flags & layout.WITH_ARRAYS)
        self.model_size, self._model = 0, end + CHECK.size
        if flags & layout.WITH_MODEL:
            self.model_size, self._model_digest = MODEL.unpack(start[-MODEL.size :])
            if not 0 < self.model_size <= source.size - self._model:
                raise _cut("model")
            self._limits.hold("embedded", self.model_size, "model: bytes")
        return start[START.size : START.size + length]


def _header(text: bytes, levels: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if isinstance(value, dict) and _plain(value, levels) and _canonical(value) == text:
            return value
    except (ValueError, RecursionError):
        pass
    raise DamagedFile(
        "the header of the file is not canonical JSON (sorted keys, no blanks, no NaN, at most "
        f"{levels} levels); {FAULT}"
    )


def _later(what: str) -> UnknownVersion:
    return UnknownVersion(
        f"the file has {what}, and this musigma reads {MAJOR}.x; upgrade musigma"
    )


def _inflated(data: bytes, size: int) -> bytes | None:
    """Inflated data, if they have exactly this size."""
    if not data:
        return b"" if size == 0 else None
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, size + 1)
    except zlib.error:
        return None
    return plain if inflater.eof and len(plain) == size and not inflater.unused_data else None


def _other(begin: bytes) -> str:
    if not begin:
        return "the file is empty; copy it again"
    if MAGIC.startswith(begin):
        return "the file is truncated within its first bytes; copy it again"
    for magic, name in OTHERS:
        if begin.startswith(magic):
            return f"not a .mus file but apparently {name}"
    if begin[8:10] == b'{"':
        return "not a .mus file but apparently a safetensors file: a model"
    return f"not a .mus file, which begins with {MAGIC[:4]!r}"


def _cut(part: str) -> DamagedFile:
    return DamagedFile(f"the file is truncated within its {part}; copy it again")
