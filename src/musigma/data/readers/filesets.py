"""Files that belong together: a folder, an archive, or several archives (shards).

A `FileSet` lists the files of a source with their sizes and times, and walks over their members:
the files of a folder, or the contents of archives. A member of a folder, a plain tar or a zip has
a `Place`, by which it can be read at any time; a member of a compressed tar can be read only while
the walk is at it. Nothing is extracted to disk.
"""

from __future__ import annotations

import io
import itertools
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from musigma.data.errors import DataError, damage, printable
from musigma.data.readers.layout import parts_of_files

MAX_MEMBER = 1 << 30  # bytes: no file inside an archive is larger
MAX_SHARDS = 1 << 20
SHARD = re.compile(r".*\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz)", re.IGNORECASE)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with ranges matches, as a shell expands it.

    >>> expanded("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    *texts, last = RANGE.split(pattern)
    runs, count = [], 1
    for text, low, high in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        width = len(low) if low.startswith("0") else 0
        run = range(int(low), int(high) + 1)
        runs.append([f"{text}{i:0{width}}" for i in run[:MAX_SHARDS]])
        count *= len(run)
    if not 0 < count <= MAX_SHARDS:
        raise DataError(f"{pattern}: matches {count} files: give a pattern of 1 to {MAX_SHARDS}")
    return ["".join(parts) + last for parts in itertools.product(*runs)]


class File(NamedTuple):
    """A file by its path below the root, with its size and time, which tell versions apart."""

    name: str
    size: int
    mtime: int  # nanoseconds


class Place(NamedTuple):
    """The location of a member: the index of its file, its first byte, its length."""

    file: int
    offset: int = -1  # -1: the whole file
    length: int = -1
    packed: bool = False  # compressed by deflate


class Member(NamedTuple):
    """A file to read: by `open` while the walk is at it, or later by its `place`."""

    name: str
    open: Callable[[], BinaryIO]
    place: Place | None = None
    size: int = 0  # of a member of an archive, as it claims
    path: str = ""  # without the archive's name: its folders are parts and classes


@dataclass(frozen=True)
class FileSet:
    """The files of a source, and a walk over their members."""

    root: Path  # the folder that names are relative to
    files: Sequence[File]
    name: str  # the key of the source in the cache
    archives: bool = False  # whether the members are inside the files
    links: Sequence[str] = ()  # to folders, which are not followed

    @classmethod
    def of_folder(cls, root: Path) -> FileSet:
        """All files below a folder, without hidden files; links to folders are not followed."""
        files, links = _listing(root)
        return cls(Path(os.path.abspath(root)), files, str(root.resolve()), links=links)

    @classmethod
    def of_files(cls, paths: Sequence[Path], *, archives: bool = False) -> FileSet:
        """Some files; names are relative to the folder that contains them all."""
        paths = [Path(os.path.abspath(path)) for path in paths]
        root = Path(os.path.commonpath([path.parent for path in paths]))
        files = [_file(path, path.relative_to(root).as_posix()) for path in paths]
        name = "\n".join(str(path.resolve()) for path in paths)
        return cls(root, files, name, archives)

    def shards(self) -> FileSet:
        """The tar archives among the files, as archives."""
        files = [file for file in self.files if SHARD.fullmatch(file.name)]
        return FileSet(self.root, files, self.name, archives=True, links=self.links)

    def walk(self) -> Iterator[Member]:
        """Every member, in the order of the files, and within an archive in its own order.

        Where the names of archives say that some are for training and others are not, the part
        is the first folder of each member's path.
        """
        parts = parts_of_files([file.name for file in self.files]) if self.archives else {}
        for number, file in enumerate(self.files):
            path = self.root / file.name
            if not self.archives:
                yield Member(file.name, partial(open, path, "rb"), Place(number), path=file.name)
                continue
            folder = parts.get(file.name) or file.name.rpartition("/")[0]
            members = _zip if file.name.lower().endswith(".zip") else _tar
            for member in members(path, number):
                inner = member.name.removeprefix("./")
                if any(part.startswith(".") and part != "." for part in inner.split("/")):
                    continue  # hidden
                if member.size > MAX_MEMBER:
                    raise DataError(
                        f"{path}: member {printable(member.name)} claims {member.size} bytes, "
                        f"over the cap of {MAX_MEMBER}: unpack the archive and give the folder"
                    )
                yield member._replace(
                    name=f"{file.name}/{inner}" if len(self.files) > 1 else inner,
                    path=f"{folder}/{inner}" if folder else inner,
                )

    @cached_property
    def version(self) -> str:
        """A digest that changes if any file is added, removed, renamed or written to."""
        state = blake2b(digest_size=16)
        for name, size, mtime in self.files:
            state.update(b"%b\0%d %d\0" % (os.fsencode(name), size, mtime))
        return state.hexdigest()


def _listing(root: Path) -> tuple[list[File], list[str]]:
    """All files below a folder, and all links to folders."""
    found, links, folders = [], [], [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_symlink() and os.path.isdir(entry):
                    links.append(name)
                else:
                    found.append(_file(entry, name))
    return sorted(found), sorted(links)


def _file(path: Path | os.DirEntry[str], name: str) -> File:
    try:
        about = path.stat()
    except OSError:  # a broken link: opening it will fail
        return File(name, -1, 0)
    return File(name, about.st_size, about.st_mtime_ns)


def suffix(name: str) -> str:
    """The suffix of a name, in lower case (faster than `Path.suffix`)."""
    return posixpath.splitext(name)[1].lower()


class _StrictHeader(tarfile.TarInfo):
    """A header that raises an error when it is broken, instead of ending the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or not any(buf):
                raise  # the end of the archive
            raise tarfile.ReadError(f"{error} in the middle") from error


def _tar(path: Path, file: int) -> Iterator[Member]:
    """The members of a tar archive; they have places if it is not compressed."""
    with damage(str(path)), tarfile.open(path, tarinfo=_StrictHeader) as archive:
        plain = isinstance(archive.fileobj, io.BufferedReader)
        while (member := archive.next()) is not None:
            archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            if not member.isfile():
                continue
            place: Place | None = None
            opener: Any = partial(archive.extractfile, member)
            if plain and not member.issparse():
                place = Place(file, member.offset_data, member.size)
            else:
                opener = partial(_copy, path, opener)
            yield Member(member.name, opener, place, member.size)
        if plain and any(map(any, iter(partial(archive.fileobj.read, 1 << 20), b""))):
            raise ValueError("more follows its end")


def _zip(path: Path, file: int) -> Iterator[Member]:
    """The members of a zip archive."""
    with damage(str(path)), zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for member in archive.infolist():
            if member.is_dir():
                continue
            place = None
            if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raw.seek(member.header_offset + 26)
                lengths = raw.read(4)  # of the name and of the extra field before the data
                start = raw.tell() + sum(
                    int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2)
                )
                deflated = member.compress_type == zipfile.ZIP_DEFLATED
                place = Place(file, start, member.compress_size, deflated)
            opener = partial(_copy, path, partial(archive.open, member))
            yield Member(member.filename, opener, place, member.file_size)


def _copy(path: Path, opener: Callable[[], Any]) -> BinaryIO:
    """A member in memory: seeking inside a compressed archive would decompress it again."""
    with damage(str(path)), opener() as file:
        return io.BytesIO(file.read())


def content(path: Path, place: Place) -> tuple[bytes, os.stat_result]:
    """The bytes of a member at its place, and the state of the file that they were read from."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if place.offset < 0:
            return file.read(), about
        file.seek(place.offset)
        data = file.read(place.length)
    if place.packed:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_MEMBER)
    return data, about
