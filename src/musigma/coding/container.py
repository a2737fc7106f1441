"""The file format `.mus`, written and read; `musigma.coding.layout` says what is where.

It knows nothing of models and of codes: bytes in, bytes out. A file is a header, perhaps a model,
and chunks of images, each on its own. Damage to one chunk loses that chunk; a file that was cut
short gives all chunks before the cut. Nothing is read or allocated for a length that was not held
against the file's size and against `Limits`.
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

from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    LimitExceeded,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.layout import (
    BITS_BACK,
    CHECK,
    CHUNK_MAGIC,
    END_MAGIC,
    EXCEPTION,
    FOOT,
    FOOT_MAGIC,
    HEAD,
    KINDS,
    MAGIC,
    MAJOR,
    MINOR,
    MODEL,
    PACKED,
    RAW,
    RECORDS,
    ROW,
    START,
    TAIL,
    WITH_MODEL,
    Chunk,
    Entry,
    Head,
    body_digest,
    scheduled,
)
from musigma.coding.search import Source, find

__all__ = [
    "BITS_BACK",
    "EXCEPTION",
    "KINDS",
    "PACKED",
    "RAW",
    "RECORDS",
    "Chunk",
    "CodingError",
    "DamagedFile",
    "Entry",
    "LimitExceeded",
    "Limits",
    "NumericsDiffer",
    "Reader",
    "UnknownVersion",
    "Writer",
    "WrongModel",
]

FOREIGN = (
    (b"\x89MUS\n", "a .mus file whose line ends were changed; transfer it again, as binary"),
    (b"\x89MUS\r\r\n", "a .mus file whose line ends were changed; transfer it again, as binary"),
    (b"\tMUS\r\n", "a .mus file whose eighth bits are lost; transfer it again, as binary"),
    (b"\xc2\x89MUS", "a .mus file that was re-encoded as text; transfer it again, as binary"),
    (b"\xef\xbf\xbdMUS", "a .mus file that was re-encoded as text; transfer it again, as binary"),
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


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any, levels: int) -> bool:
    """Whether a value is JSON, with text for keys, of at most so many levels."""
    if isinstance(value, dict):
        names = all(isinstance(key, str) for key in value)
        return levels > 0 and names and all(_plain(v, levels - 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return levels > 0 and all(_plain(v, levels - 1) for v in value)
    return value is None or isinstance(value, (str, bool, int, float))


class Writer:
    """Writes a file from its start to its end; it neither seeks nor tells, so a pipe will do.

    In a `with` block it closes itself, unless by an exception: the file then has no footer, and
    reads as one that was cut short.

    Args:
        file: Open for writing bytes; it stays open.
        header: JSON values, with text for keys.
        model: A model to go into the file; None: none.
        limits: As those of whoever will read the file.

    Raises:
        ValueError: If the header is not JSON, or the model is empty.
        LimitExceeded: If one of them is too large.
        OSError: If the file cannot be written; of `write` and `close` too.

    Example:
        >>> file = io.BytesIO()
        >>> with Writer(file, {"width": 2}) as writer:
        ...     writer.write(Chunk(index=0, first=0, count=1, kind=RAW, raw=4, payload=b"abcd"))
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
    ):
        self._file, self._limits = file, limits or Limits()
        if not isinstance(header, Mapping) or not _plain(dict(header), self._limits.depth):
            raise ValueError(
                "header: expected a dictionary of JSON values, with text for keys, of at most "
                f"{self._limits.depth} levels; make arrays lists, and flatten it"
            )
        try:
            text = _canonical(dict(header))
        except ValueError as error:
            raise ValueError(f"header: cannot be JSON ({error}); give None for NaN") from error
        self._limits.hold("header", len(text), "header: bytes of JSON")
        start = START.pack(MAGIC, MAJOR, MINOR, WITH_MODEL * (model is not None), len(text)) + text
        if model is not None:
            if not model:
                raise ValueError("model: expected bytes, got none; give None for no model")
            self._limits.hold("embedded", len(model), "model: bytes")
            start += MODEL.pack(len(model), hashlib.sha256(model).digest())
        self._seed = zlib.crc32(start)
        self._rows = bytearray()
        self._digest = hashlib.sha256()
        self._written = self._chunks = self._images = self._raw = 0
        self._open = True
        self._put(start + CHECK.pack(self._seed), model or b"")

    def write(self, chunk: Chunk) -> int:
        """Write the next chunk, and return how many bytes it took.

        Raises:
            ValueError: If it is not the next one, or its parts do not agree; nothing is written.
            LimitExceeded: If it is too large; nothing is written.
        """
        self._check(chunk)
        side = zlib.compress(chunk.side, 9) if chunk.side else b""
        schedule = bytes(size - 1 for size in chunk.schedule)
        front = schedule + chunk.exceptions.tobytes() + side
        fields = (
            *(CHUNK_MAGIC, chunk.index, chunk.first, chunk.count, chunk.kind, len(schedule)),
            *(len(chunk.exceptions), len(side), len(chunk.side), chunk.raw, len(chunk.payload)),
            body_digest(front, chunk.payload).digest(),
        )
        try:
            head = HEAD.pack(*fields, 0)[: -CHECK.size]
        except struct.error as error:  # the limits were raised further than that
            raise LimitExceeded(f"chunk {chunk.index}: more than fits the format") from error
        check = zlib.crc32(head, self._seed)
        head += CHECK.pack(check)
        size = len(head) + len(front) + len(chunk.payload)
        row = ROW.pack(self._written, size, chunk.first, chunk.count, chunk.kind, check)
        self._put(head + front, chunk.payload)
        self._rows += row
        self._digest.update(head)
        self._chunks += 1
        self._images += chunk.count
        self._raw += chunk.raw
        return size

    def close(self) -> int:
        """Write the footer, if it is not yet written, and return the bytes of the whole file.

        Raises:
            ValueError: If a write failed before, so that the file cannot be made whole.
        """
        if self._open:
            foot = FOOT.pack(
                FOOT_MAGIC, self._chunks, self._images, self._raw, self._digest.digest()
            )
            body = foot + bytes(self._rows) + TAIL.pack(self._written, 0, b"")[:8]
            check = zlib.crc32(body, self._seed)
            self._put(body + CHECK.pack(check) + END_MAGIC)
            self._open = False
        elif self._written < 0:
            raise ValueError("file: a write to it failed, so it is not whole; write it anew")
        return self._written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def _check(self, chunk: Chunk) -> None:
        if not self._open:
            raise ValueError("file: closed, or a write to it failed; write to a new one")
        if (chunk.index, chunk.first) != (self._chunks, self._images):
            raise ValueError(
                f"chunk: expected number {self._chunks} from image {self._images}, got number "
                f"{chunk.index} from image {chunk.first}; write chunks in their order"
            )
        if chunk.kind not in KINDS:
            raise ValueError(f"chunk: expected a kind in {list(KINDS)}, got {chunk.kind!r}")
        if chunk.count < 1 or chunk.raw < 0:
            raise ValueError(
                f"chunk: expected at least one image, and its size in bytes; got {chunk.count} "
                f"images of {chunk.raw} bytes"
            )
        if not scheduled(chunk.kind, chunk.schedule, chunk.count):
            raise ValueError(
                f"chunk: of the kind {KINDS[chunk.kind]!r} with {chunk.count} images; expected "
                "batches of 1 to 256 images that sum to it, and none if no model took part, got "
                f"{list(chunk.schedule)[:9]}"
            )
        if chunk.exceptions.dtype != EXCEPTION or chunk.exceptions.ndim != 1:
            raise ValueError(
                f"chunk: expected exceptions of dtype {EXCEPTION} and one axis, got "
                f"{chunk.exceptions.dtype} of shape {chunk.exceptions.shape}"
            )
        for name in ("side", "payload"):
            if not isinstance(getattr(chunk, name), bytes):
                kind = type(getattr(chunk, name)).__name__
                raise ValueError(f"chunk: expected bytes as {name}, got {kind}; give x.tobytes()")
        sizes = (len(chunk.exceptions), 0, len(chunk.side), chunk.raw, len(chunk.payload))
        Head(b"", chunk.index, chunk.first, chunk.count, chunk.kind, 0, *sizes, b"", 0).hold(
            self._limits
        )
        self._limits.hold("chunks", self._chunks + 1, "file: chunks")
        self._limits.hold("total", self._raw + chunk.raw, "file: bytes once decompressed")

    def _put(self, *parts: bytes) -> None:
        """Write all of the bytes, in as many calls as the file likes to take."""
        written, self._written = self._written, -1  # until all of it is there
        still, self._open = self._open, False
        for part in parts:
            view = memoryview(part)
            while view:
                done = self._file.write(view)
                if done is None:
                    if isinstance(self._file, io.RawIOBase):
                        raise BlockingIOError("file: it does not block; open it so that it does")
                    done = len(view)
                view = view[done:]
            written += len(part)
        self._written, self._open = written, still


class Reader:
    r"""A file's header, and its chunks in any order.

    The chunks are found by the footer, if it is whole and agrees with every chunk's header. If
    not, the file is looked through for chunks with a whole header, and what a whole footer says
    of them still holds. Iterating gives all chunks that were found, until one is damaged.

    Args:
        file: Open for reading bytes, seekable; it stays open. One reader at a time may use it.
        limits: What the file may ask for.

    Attributes:
        header: The JSON values that were written.
        version: Major and minor.
        model_size: Bytes of the embedded model; 0: there is none.
        entries: The chunks that were found, in the order of their images.
        images: How many the file holds, or held, as far as is known.
        lost: Images that were written and are in no entry: pairs of the first and the one after
            the last. A chunk of `entries` may still turn out damaged by `read`.
        rescanned: Whether the file was looked through, because its footer did not tell all.
        ended: Whether a footer was found that is this file's. If not, more images may be lost
            than `lost` says: those that came after the last chunk found.

    Raises:
        DamagedFile: If it is no `.mus` file, or its header is damaged.
        UnknownVersion: If it is of a later format.
        LimitExceeded: If it asks for more than `limits` grant.
        OSError: If the file cannot be read; of `read` and `model` too.

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
        self._limits.hold(
            "total", sum(e.raw for e in found.entries), "file: bytes once decompressed"
        )
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
            raise CodingError("the file holds no model; give the one that it was written with")
        data = self._source.at(self._model, self.model_size)
        if hashlib.sha256(data).digest() != self._model_digest:
            raise DamagedFile(
                "the model in the file does not match its digest, so it is damaged; copy the file "
                "again, or give the model that it was written with"
            )
        return data

    def read(self, place: int) -> Chunk:
        """The chunk of `entries[place]`.

        Raises:
            DamagedFile: If it is not as it was written.
            UnknownVersion: If it is of a kind of a later format.
        """
        entry = self.entries[place]
        head = self._source.head(entry.offset)
        if head is None or head.entry(entry.offset) != entry:
            raise DamagedFile(f"{entry}: its header was changed while it was read; read it again")
        if head.kind not in KINDS:
            raise UnknownVersion(
                f"{entry}: of the kind {head.kind}, and this musigma knows kinds up to "
                f"{max(KINDS)}; upgrade musigma"
            )
        front = self._source.at(entry.offset + HEAD.size, head.front)
        payload = self._source.at(entry.offset + HEAD.size + head.front, head.payload)
        if body_digest(front, payload).digest() != head.body:
            raise DamagedFile(
                f"{entry}: its content does not match its checksum; copy the file again"
            )
        exceptions = np.empty(0, EXCEPTION)
        if head.exceptions:
            exceptions = np.frombuffer(front, EXCEPTION, head.exceptions, head.batches)
        schedule = tuple(byte + 1 for byte in front[: head.batches])
        side = _inflated(front[len(front) - head.side :], head.inflated)
        if side is None or not scheduled(head.kind, schedule, head.count):
            raise DamagedFile(f"{entry}: its parts do not agree; the writer had a fault")
        return Chunk(
            index=head.index,
            first=head.first,
            count=head.count,
            kind=head.kind,
            raw=head.raw,
            schedule=schedule,
            exceptions=exceptions,
            side=side,
            payload=payload,
        )

    def _start(self) -> bytes:
        """Read all that comes before the chunks, and return the header's JSON."""
        source = self._source
        begin = source.at(0, min(START.size + 9, source.size))
        if not begin.startswith(MAGIC):
            raise DamagedFile(_foreign(begin))
        if source.size < START.size:
            raise _cut("header")
        _, major, minor, flags, length = START.unpack(begin[: START.size])
        self.version = (major, minor)
        if major != MAJOR:
            raise _later(f"format {major}.{minor}")
        end = START.size + length
        end += MODEL.size if flags & WITH_MODEL else 0
        if end + CHECK.size > source.size:
            raise _cut("header")
        self._limits.hold("header", length, "header: bytes of JSON")
        start = source.at(0, end)
        source.seed = zlib.crc32(start)
        if source.at(end, CHECK.size) != CHECK.pack(source.seed):
            raise DamagedFile(
                "the file's header does not match its checksum, and without it nothing can be "
                "decompressed; copy the file again"
            )
        if flags & ~WITH_MODEL:
            raise _later(f"format {major}.{minor} with the flags {flags:#x}")
        self.model_size, self._model = 0, end + CHECK.size
        if flags & WITH_MODEL:
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
        "the file's header is not canonical JSON: an object with sorted keys, no blanks, no NaN "
        f"and at most {levels} levels; the writer had a fault"
    )


def _later(what: str) -> UnknownVersion:
    return UnknownVersion(
        f"the file is of {what}, and this musigma reads {MAJOR}.x; upgrade musigma"
    )


def _inflated(data: bytes, size: int) -> bytes | None:
    """What was deflated, if it is exactly so many bytes."""
    if not data:
        return b"" if size == 0 else None
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, size + 1)
    except zlib.error:
        return None
    return plain if inflater.eof and len(plain) == size and not inflater.unused_data else None


def _foreign(begin: bytes) -> str:
    if not begin:
        return "the file is empty; copy it again"
    if MAGIC.startswith(begin):
        return "the file was cut short within its first bytes; copy it again"
    for magic, name in FOREIGN:
        if begin.startswith(magic):
            return f"not a .mus file but, as it seems, {name}"
    if begin[8:10] == b'{"':
        return "not a .mus file but, as it seems, a safetensors file: a model"
    return f"not a .mus file, which begins with {MAGIC[:4]!r}"


def _cut(part: str) -> DamagedFile:
    return DamagedFile(f"the file was cut short within its {part}; copy it again")
