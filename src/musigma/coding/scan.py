"""Finds the chunks of a file: by its footer, or by a scan of the whole file.

A damaged file yields every chunk whose header is whole and belongs to this file. What a whole
footer says still holds, even if the footer has moved. The time is linear in the size of the file,
whatever it contains: a scan never goes back, and what it reads twice is limited by a budget.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from musigma.coding import layout
from musigma.coding.errors import DamagedFile, Limits
from musigma.coding.layout import CHECK, CHUNK_MAGIC, FOOT, HEAD, TAIL, Entry, Footer

__all__ = ["Found", "Source", "find"]

MAGICS = re.compile(re.escape(CHUNK_MAGIC) + b"|" + re.escape(layout.FOOT_MAGIC))
WINDOW = 1 << 18  # bytes that are scanned at a time


class Found(NamedTuple):
    """The chunks of a file; see the attributes of `Reader`."""

    entries: list[Entry]
    images: int
    lost: tuple[tuple[int, int], ...] = ()
    rescanned: bool = False
    ended: bool = True


class Source:
    """The bytes of a file, and the headers in it.

    Args:
        file: Open for reading bytes, seekable.
        limits: What it may ask for.
    """

    def __init__(self, file: BinaryIO, limits: Limits):
        self.file, self.limits = file, limits
        self.size = file.seek(0, io.SEEK_END)
        self.seed = 0  # CRC of the start, from which those of headers are continued
        self.budget = 2 * self.size
        self._window = (0, b"")

    def at(self, offset: int, size: int) -> bytes:
        """Bytes that lie within the file.

        Raises:
            DamagedFile: If the file has become shorter.
        """
        base, data = self._window
        if base <= offset and offset + size <= base + len(data):
            return data[offset - base : offset - base + size]
        return self._fetch(offset, size)

    def entry(self, offset: int) -> Entry | None:
        """The chunk at a place, if its header is whole.

        Raises:
            LimitExceeded: If it is whole and asks for too much.
        """
        if offset + HEAD.size > self.size:
            return None
        data = self.at(offset, HEAD.size)
        entry = Entry(*HEAD.unpack(data), offset=offset)
        whole = zlib.crc32(data[: -CHECK.size], self.seed) == entry.check
        if not whole or entry.magic != CHUNK_MAGIC or not entry.consistent():
            return None
        entry.hold(self.limits)
        return entry

    def footer(self, offset: int) -> Footer | None:
        """The footer, if there is a whole one.

        Raises:
            LimitExceeded: If it ends the file and lists too many chunks.
        """
        if offset + FOOT.size + TAIL.size > self.size:
            return None
        foot = self.at(offset, FOOT.size)
        magic, chunks, images, raw, digest = FOOT.unpack(foot)
        size = FOOT.size + layout.ROW.size * chunks + TAIL.size
        if magic != layout.FOOT_MAGIC or offset + size > self.size or not self.spend(size):
            return None
        if offset + size == self.size:
            self.limits.hold("chunks", chunks, "file: chunks")
        elif chunks > self.limits.chunks:
            return None  # chance, most likely
        data = self.at(offset + FOOT.size, size - FOOT.size)
        check, end = struct.unpack("<I4s", data[-8:])
        if end != layout.END_MAGIC or zlib.crc32(data[:-8], zlib.crc32(foot, self.seed)) != check:
            return None
        rows = list(layout.ROW.iter_unpack(data[: layout.ROW.size * chunks]))
        reached = 0
        for _, _, first, count, *_ in rows:
            if first != reached or count < 1:
                return None
            reached += count
        self.limits.hold("images", images, "file: images")
        return Footer(rows, images, raw, digest, size) if reached == images else None

    def intact(self, entry: Entry) -> bool:
        """Whether the body of a chunk matches its checksum; no if the budget is spent."""
        if not self.spend(entry.size):
            return False
        digest, position = layout.body_digest(), entry.offset + HEAD.size
        while position < entry.end:
            part = self.at(position, min(WINDOW, entry.end - position))
            digest.update(part)
            position += len(part)
        return digest.digest() == entry.body

    def spend(self, size: int) -> bool:
        """Whether so many bytes may be read a second time."""
        self.budget -= size
        return self.budget >= 0

    def magic(self, position: int) -> int:
        """Where the next chunk or footer seems to begin, from a position on; -1: nowhere."""
        while position < self.size:
            base, data = self._window
            if base <= position < base + len(data):
                match = MAGICS.search(data, position - base)
                if match:
                    return base + match.start()
                if base + len(data) >= self.size:
                    return -1
                position = max(position, base + len(data) - len(CHUNK_MAGIC) + 1)
            # a new window from here: it mostly holds what follows the magic, too
            self._window = (position, self._fetch(position, min(WINDOW, self.size - position)))
        return -1

    def _fetch(self, offset: int, size: int) -> bytes:
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
        return parts[0] if len(parts) == 1 else b"".join(parts)


def find(source: Source, begin: int) -> Found:
    """The chunks of a file, the first of which lies at `begin`.

    Raises:
        LimitExceeded: If there are too many, or one is too large.
    """
    footer = _last_footer(source, begin)
    entries = footer and _by_footer(source, footer)
    if footer and entries is not None:
        return Found(entries, footer.images)
    found, other = _scan(source, begin)
    footer = footer or other
    if footer and found and not any(map(footer.lists, found)):
        footer = None  # that of another file
    whole = [entry for entry in found if entry.end <= source.size]
    if footer:
        entries, images = _distinct(source, filter(footer.lists, whole)), footer.images
    else:
        entries = _in_order(_distinct(source, whole))
        images = max((entry.first + entry.count for entry in found), default=0)
    return Found(entries, images, tuple(_gaps(entries, images)), True, footer is not None)


def _last_footer(source: Source, begin: int) -> Footer | None:
    """The footer at the end of the file, if it is whole and agrees with the size of the file."""
    last = source.size - TAIL.size - FOOT.size
    if last < begin:
        return None
    offset, _, magic = TAIL.unpack(source.at(source.size - TAIL.size, TAIL.size))
    if magic != layout.END_MAGIC or not begin <= offset <= last:
        return None
    footer = source.footer(offset)
    if footer is None or offset + footer.size != source.size:
        return None
    begins = [*(row[0] for row in footer.rows), offset]
    ends = [begin, *(row[0] + row[1] for row in footer.rows)]
    return footer if begins == ends else None


def _by_footer(source: Source, footer: Footer) -> list[Entry] | None:
    """The chunks that the footer lists, if all of them are where it says."""
    entries, digest = [], hashlib.sha256()
    for index, (offset, *_) in enumerate(footer.rows):
        entry = source.entry(offset)
        if not entry or entry.index != index or not footer.lists(entry):
            return None
        digest.update(source.at(offset, HEAD.size))
        entries.append(entry)
    same = digest.digest() == footer.digest and sum(e.raw for e in entries) == footer.raw
    return entries if same else None


def _scan(source: Source, position: int) -> tuple[list[Entry], Footer | None]:
    """All chunks with a whole header, in the order of the file, and the last whole footer."""
    found: list[Entry] = []
    footer, tried = None, 0
    while (position := source.magic(position)) >= 0:
        tried += 1
        source.limits.hold("chunks", tried // 4, "file: a fourth of what seem to be chunks")
        entry = source.entry(position)
        if entry is not None:
            found.append(entry)
            source.limits.hold("chunks", len(found), "file: chunks")
            position = entry.end if _body_follows(source, entry) else position + HEAD.size
            continue
        there = source.footer(position)
        footer = there or footer
        position += there.size if there else len(CHUNK_MAGIC)
    return found, footer


def _body_follows(source: Source, entry: Entry) -> bool:
    """Whether the whole body of a chunk is there, so that no other chunk begins within it."""
    if entry.end >= source.size:
        return entry.end == source.size
    after = source.at(entry.end, min(len(CHUNK_MAGIC), source.size - entry.end))
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
