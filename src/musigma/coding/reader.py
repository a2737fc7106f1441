"""Reads `.mus` files, damaged ones too; `musigma.coding.container` defines the format."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np

from musigma.coding import container as mus
from musigma.coding.container import Chunk, Entry
from musigma.coding.errors import CodingError, DamagedFile, Limits, UnknownVersion

__all__ = ["Reader"]

MAGICS = re.compile(mus.CHUNK_MAGIC + b"|" + mus.FOOT_MAGIC)
WINDOW = 1 << 18
"""Bytes that a scan reads at a time."""
FAULT = "the checksums are right, so the program that wrote the file made an error"
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


class Source:
    """The bytes of a file, and the chunks in them.

    The time is linear in the size of the file, whatever it contains: a scan never goes back, and
    what it reads twice is limited by a budget.
    """

    def __init__(self, file: BinaryIO, limits: Limits):
        self.file, self.limits = file, limits
        self.size = file.seek(0, io.SEEK_END)
        self.seed = 0  # CRC of the start, from which those of headers are continued
        self.budget = 2 * self.size
        self._window = (0, b"")

    def at(self, offset: int, size: int) -> bytes:
        """Bytes that lie within the file."""
        base, data = self._window
        if base <= offset and offset + size <= base + len(data):
            return data[offset - base : offset - base + size]
        self.file.seek(offset)
        parts, missing = [], size
        while missing:
            part = self.file.read(missing)
            if not part:
                raise DamagedFile(
                    f"the file ended at byte {offset + size - missing} and had {self.size} bytes "
                    "when it was opened; do not change it while it is read"
                )
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def entry(self, offset: int) -> Entry | None:
        """The chunk at a place, if its header is whole."""
        if offset + mus.HEAD.size > self.size:
            return None
        data = self.at(offset, mus.HEAD.size)
        entry = Entry(*mus.HEAD.unpack(data), offset=offset)
        whole = zlib.crc32(data[: -mus.CHECK.size], self.seed) == entry.check
        if not whole or entry.magic != mus.CHUNK_MAGIC or not entry.consistent():
            return None
        entry.hold(self.limits)
        return entry

    def rows(self, offset: int) -> list[tuple[int, ...]] | None:
        """The rows of the footer at a place, if it is whole."""
        if offset + mus.FOOT.size + mus.TAIL.size > self.size:
            return None
        magic, chunks, images, *_ = mus.FOOT.unpack(self.at(offset, mus.FOOT.size))
        size = mus.FOOT.size + mus.ROW.size * chunks + mus.TAIL.size
        if magic != mus.FOOT_MAGIC or offset + size > self.size or not self.spend(size):
            return None
        if offset + size == self.size:
            self.limits.hold("chunks", chunks, "file: chunks")
        elif chunks > self.limits.chunks:
            return None  # chance, most likely
        data = self.at(offset, size)
        _, check, end = mus.TAIL.unpack(data[-mus.TAIL.size :])
        if end != mus.END_MAGIC or zlib.crc32(data[:-8], self.seed) != check:
            return None
        rows = list(mus.ROW.iter_unpack(data[mus.FOOT.size : -mus.TAIL.size]))
        firsts, counts = [row[2] for row in rows], [row[3] for row in rows]
        self.limits.hold("images", images, "file: images")
        follow = [*firsts, images] == list(accumulate(counts, initial=0))
        return rows if follow and all(counts) else None

    def intact(self, entry: Entry) -> bool:
        """Whether the body of a chunk matches its checksum; no if the budget is spent."""
        if not self.spend(entry.size):
            return False
        return mus.body_digest(self.at(entry.offset, entry.size)[mus.HEAD.size :]) == entry.body

    def spend(self, size: int) -> bool:
        """Whether so many bytes may be read a second time."""
        self.budget -= size
        return self.budget >= 0

    def magic(self, position: int) -> int | None:
        """The next position, from a given one on, at which a chunk or footer seems to begin."""
        while position < self.size:
            base, data = self._window
            if base <= position < base + len(data):
                if match := MAGICS.search(data, position - base):
                    return base + match.start()
                if base + len(data) >= self.size:
                    return None
                position = max(position, base + len(data) - len(mus.CHUNK_MAGIC) + 1)
            # a new window from here: it mostly holds what follows the magic, too
            self._window = (position, self.at(position, min(WINDOW, self.size - position)))
        return None


def find(source: Source, begin: int) -> tuple[Sequence[Entry], int, Any, bool, bool]:
    """The chunks of a file, the first of which lies at `begin`: one after the other, or by a scan.

    A damaged file yields every chunk whose header is whole and belongs to this file. The
    information in a whole footer is used even if the footer has moved.

    Returns:
        The attributes `entries`, `images`, `lost`, `rescanned` and `ended` of `Reader`.
    """
    if (entries := _undamaged(source, begin)) is not None:
        return entries, sum(entry.count for entry in entries), (), False, True
    rows, last = None, source.size - mus.TAIL.size
    if last >= begin:
        rows = source.rows(mus.TAIL.unpack(source.at(last, mus.TAIL.size))[0])
    found, scanned = _scan(source, begin)
    rows = scanned if rows is None else rows
    if rows is not None and found and not any(_listed(entry, rows) for entry in found):
        rows = None  # those of another file
    whole = [entry for entry in found if entry.end <= source.size]
    if rows is not None:
        entries = _distinct(source, [entry for entry in whole if _listed(entry, rows)])
        images = sum(count for _, _, _, count, *_ in rows)
    else:
        entries = _in_order(_distinct(source, whole))
        images = max((entry.first + entry.count for entry in found), default=0)
    return entries, images, tuple(_gaps(entries, images)), True, rows is not None


def _undamaged(source: Source, offset: int) -> list[Entry] | None:
    """The chunks of a file that consists of whole headers, bodies and the right footer."""
    entries: list[Entry] = []
    images = 0
    while entry := source.entry(offset):
        if (entry.index, entry.first) != (len(entries), images) or entry.end > source.size:
            return None
        entries.append(entry)
        source.limits.hold("chunks", len(entries), "file: chunks")
        offset, images = entry.end, images + entry.count
    expected = mus.footer(entries, offset, source.seed)
    rest = source.size - offset
    return entries if rest == len(expected) and source.at(offset, rest) == expected else None


def _scan(source: Source, position: int) -> tuple[list[Entry], list[tuple[int, ...]] | None]:
    """All chunks with a whole header, in the order of the file, and the last whole footer."""
    found: list[Entry] = []
    rows, tried = None, 0
    while (there := source.magic(position)) is not None:
        tried += 1
        source.limits.hold("chunks", tried // 4, "file: a quarter of the apparent chunks")
        if entry := source.entry(there):
            found.append(entry)
            source.limits.hold("chunks", len(found), "file: chunks")
            position = entry.end if _body_follows(source, entry) else there + mus.HEAD.size
        elif (listed := source.rows(there)) is not None:
            rows = listed
            position = there + mus.FOOT.size + mus.ROW.size * len(rows) + mus.TAIL.size
        else:
            position = there + len(mus.CHUNK_MAGIC)
    return found, rows


def _listed(entry: Entry, rows: Sequence[tuple[int, ...]]) -> bool:
    """Whether a footer lists this chunk, wherever it lies now."""
    return entry.index < len(rows) and rows[entry.index][1:] == entry.row[1:]


def _body_follows(source: Source, entry: Entry) -> bool:
    """Whether the whole body of a chunk is there, so that no other chunk begins within it."""
    if entry.end >= source.size:
        return entry.end == source.size
    after = source.at(entry.end, min(len(mus.CHUNK_MAGIC), source.size - entry.end))
    return MAGICS.match(after) is not None or source.intact(entry)


def _distinct(source: Source, entries: Iterable[Entry]) -> list[Entry]:
    """One chunk of each index, in order: of several equal copies the first that is whole.

    Where two copies differ, none is kept, because either may be the right one.
    """
    copies: dict[int, list[Entry]] = {}
    for entry in entries:
        copies.setdefault(entry.index, []).append(entry)
    kept = []
    for _, same in sorted(copies.items()):
        if len(same) == 1:
            kept += same
        elif len({(e.check, e.first, e.count, e.size) for e in same}) == 1:
            kept.append(next(filter(source.intact, same), same[0]))
    return kept


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Chunks that can be of one file: none overlap, and each missing chunk had an image."""
    kept: list[Entry] = []
    index = reached = 0
    for entry in entries:
        missed = entry.index - index
        if entry.first - reached >= missed and (missed or entry.first == reached):
            kept.append(entry)
            index, reached = entry.index + 1, entry.first + entry.count
    return kept


def _gaps(entries: Sequence[Entry], images: int) -> Iterator[tuple[int, int]]:
    reached = 0
    for entry in entries:
        if entry.first > reached:
            yield reached, entry.first
        reached = entry.first + entry.count
    if images > reached:
        yield reached, images


class Reader:
    r"""The header of a file, and its chunks in any order.

    If the file is damaged, it is scanned for chunks with a whole header. Iteration yields all
    chunks that were found, up to a damaged one.

    Args:
        file: Open for reading bytes, seekable; it stays open. One reader at a time may use it.
        limits: The limits that the file must respect.

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
        DamagedFile: If it is not a `.mus` file, or its header is damaged.
        UnknownVersion: If it has a newer format.
        LimitExceeded: If it asks for more than `limits` allow.

    Example:
        >>> Reader(io.BytesIO(b"PK..."))
        Traceback (most recent call last):
            ...
        musigma.coding.errors.DamagedFile: not a .mus file, which begins with b'MUS'
    """

    def __init__(self, file: BinaryIO, limits: Limits | None = None):
        self._limits = limits or Limits()
        self._source = Source(file, self._limits)
        start = self._start()
        self.entries, self.images, self.lost, self.rescanned, self.ended = find(
            self._source, self._model + self.model_size
        )
        self._limits.hold("total", sum(e.raw for e in self.entries), "file: bytes, decompressed")
        self.header = _header(start, self._limits.depth)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Chunk]:
        return (self.read(place) for place in range(len(self)))

    def model(self) -> bytes:
        """The embedded model; `DamagedFile` if it is not as it was written."""
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
            UnknownVersion: If its kind belongs to a newer format.
        """
        entry = self.entries[place]
        if self._source.entry(entry.offset) != entry:
            raise DamagedFile(f"{entry}: its header has changed since the file was opened")
        if entry.kind not in mus.KINDS:
            raise UnknownVersion(
                f"{entry}: it is of kind {entry.kind}, and this musigma knows kinds up to "
                f"{max(mus.KINDS)}; upgrade musigma"
            )
        front = self._source.at(entry.offset + mus.HEAD.size, entry.front)
        payload = self._source.at(entry.offset + mus.HEAD.size + entry.front, entry.payload)
        if mus.body_digest(front, payload) != entry.body:
            raise DamagedFile(
                f"{entry}: its content does not match its checksum; copy the file again"
            )
        schedule = tuple(byte + 1 for byte in front[: entry.batches])
        side = _inflated(front[len(front) - entry.side :], entry.inflated)
        if side is None or not mus.scheduled(entry.kind, schedule, entry.count):
            raise DamagedFile(f"{entry}: its parts do not agree; {FAULT}")
        listed = np.frombuffer(front[entry.batches : len(front) - entry.side], mus.EXCEPTION)
        return Chunk(
            index=entry.index,
            first=entry.first,
            count=entry.count,
            kind=entry.kind,
            raw=entry.raw,
            schedule=schedule,
            exceptions=listed,
            side=side,
            payload=payload,
        )

    def _start(self) -> bytes:
        """Read everything before the chunks, and return the JSON of the header."""
        source = self._source
        begin = source.at(0, min(mus.START.size + 9, source.size))
        if not begin.startswith(mus.MAGIC):
            raise DamagedFile(_other(begin))
        if source.size < mus.START.size:
            raise _cut("header")
        _, major, minor, flags, length = mus.START.unpack(begin[: mus.START.size])
        self.version = (major, minor)
        if major != mus.MAJOR:
            raise _later(f"format {major}.{minor}")
        end = mus.START.size + length + (mus.MODEL.size if flags & mus.WITH_MODEL else 0)
        if end + mus.CHECK.size > source.size:
            raise _cut("header")
        self._limits.hold("header", length, "header: bytes of JSON")
        start = source.at(0, end)
        source.seed = zlib.crc32(start)
        if source.at(end, mus.CHECK.size) != mus.CHECK.pack(source.seed):
            raise DamagedFile(
                "the header of the file is damaged, and without it nothing can be decompressed; "
                "copy the file again"
            )
        if flags & ~(mus.WITH_MODEL | mus.WITH_ARRAYS):
            raise _later(f"format {major}.{minor} with the flags {flags:#x}")
        self.arrays = bool(flags & mus.WITH_ARRAYS)
        self.model_size, self._model = 0, end + mus.CHECK.size
        if flags & mus.WITH_MODEL:
            self.model_size, self._model_digest = mus.MODEL.unpack(start[-mus.MODEL.size :])
            if not 0 < self.model_size <= source.size - self._model:
                raise _cut("model")
            self._limits.hold("embedded", self.model_size, "model: bytes")
        return start[mus.START.size : mus.START.size + length]


def _header(text: bytes, levels: int) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict) and mus.is_json(value, levels) and mus.canonical(value) == text:
            return value
    raise DamagedFile(
        "the header of the file is not canonical JSON (sorted keys, no blanks, no NaN, at most "
        f"{levels} levels); {FAULT}"
    )


def _later(what: str) -> UnknownVersion:
    return UnknownVersion(
        f"the file has {what}, and this musigma reads {mus.MAJOR}.x; upgrade musigma"
    )


def _cut(part: str) -> DamagedFile:
    return DamagedFile(f"the file is truncated within its {part}; copy it again")


def _inflated(data: bytes, size: int) -> bytes | None:
    """Inflated data, if they have exactly this size."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, size + 1)
    except zlib.error:
        return None
    whole = inflater.eof and not inflater.unused_data if data else True
    return plain if whole and len(plain) == size else None


def _other(begin: bytes) -> str:
    """The kind of a file that does not begin as a `.mus` file."""
    if not begin:
        return "the file is empty; copy it again"
    if mus.MAGIC.startswith(begin):
        return "the file is truncated within its first bytes; copy it again"
    for magic, name in OTHERS:
        if begin.startswith(magic):
            return f"not a .mus file but apparently {name}"
    if begin[8:10] == b'{"':
        return "not a .mus file but apparently a safetensors file: a model"
    return f"not a .mus file, which begins with {mus.MAGIC[:4]!r}"
