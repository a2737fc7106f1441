"""Images that stay on disk and are decoded when they are indexed.

An *index* holds, for each image, its place, its header, its label, and a hash of its pixels. To
build it every image is decoded once, so broken images are found before training starts, and
`split` reads nothing more. An index that is out of date is rebuilt; entries of images that have
not changed are taken from the old one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.cache import Record, store
from musigma.data.errors import DataError, first_line, printable
from musigma.data.raw import Request, content_hashes
from musigma.data.readers.decoding import Header, fault, pixels, quiet
from musigma.data.readers.filesets import FileSet, Member, Place, content

UNFINISHED = {"unfinished": True}
WORTH_STORING = 1000  # images from which an interrupted index is stored


class Names(Sequence[str]):
    r"""Millions of names in two arrays.

    >>> list(Names.of(["a", "bc", "caf\udce9"])) == ["a", "bc", "caf\udce9"]
    True
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Pack names, which may be of any bytes."""
        texts = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(texts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:  # never a slice
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Images on disk that are indexed like an array, uint8 (N, C, H, W).

    Args:
        where: What messages call the source.
        root: The folder that contains the files.
        files: Names of the files.
        stamps: Size and time of each file, int64 (files, 2), by which a change is noticed.
        names: Names of the images.
        places: `Place` of each image, int64 (N, 4).
        shape: (N, C, H, W).
        size: Height and width that images are resized to; None: they are not.
    """

    where: str
    root: Path
    files: Names
    stamps: np.ndarray
    names: Names
    places: np.ndarray
    shape: tuple[int, int, int, int]
    size: tuple[int, int] | None

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def nbytes(self) -> int:
        """Bytes of all images when decoded."""
        n, c, h, w = self.shape
        return n * c * h * w

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Any) -> np.ndarray:
        """One image, or those of a slice, a mask or an array of indices."""
        if isinstance(key, slice):
            rows = np.arange(*key.indices(len(self)))
        else:
            rows = np.asarray(key)
            if rows.dtype == np.bool_:
                if rows.shape != (len(self),):
                    raise IndexError(f"a mask of shape {rows.shape} for {len(self)} images")
                rows = np.flatnonzero(rows)
            elif rows.dtype.kind not in "iu":
                raise IndexError(f"images are indexed by whole numbers, not by {key!r}")
        wrong = (rows < -len(self)) | (rows >= len(self))
        if wrong.any():
            raise IndexError(f"index {rows[wrong].flat[0]} is out of range for {len(self)} images")
        out = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        with quiet():
            for at, row in np.ndenumerate(rows % len(self) if len(self) else rows):
                out[at] = self._decoded(int(row))
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: images on disk become an array only by copying; got False")
        return self[:] if dtype is None else self[:].astype(dtype)

    def decode(self, row: int) -> np.ndarray:
        """Read and decode an image, within `quiet`."""
        data, about = self.content(row)
        place = self.places[row].tolist()
        if [about.st_size, about.st_mtime_ns] != self.stamps[place[0]].tolist():
            raise OSError("it has another size or date")
        example = pixels(lambda: io.BytesIO(data), self.shape[1], self.size)
        if example.shape != self.shape[1:]:
            raise OSError(f"its shape is {example.shape}")
        return example

    def content(self, row: int) -> tuple[bytes, os.stat_result]:
        """The bytes of an image, and the state of its file."""
        file, offset, length, packed = self.places[row].tolist()
        place = Place(file, offset, length, bool(packed))
        return content(self.root / self.files[file], place)

    def _decoded(self, row: int) -> np.ndarray:
        """An image that could be decoded when the index was built."""
        try:
            return self.decode(row)
        except Exception as error:
            name = printable(self.names[row])
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(
                f"{self.where}: {name} is not what it was when this source was indexed "
                f"({reason}): run the command again, which rebuilds the index"
            ) from error


class PreviousIndex:
    """The entries of an earlier index that are still valid, by image."""

    def __init__(self, record: Record | None):
        self._rows, self._shape = {}, None
        if record is not None and record.arrays["headers"].shape[1:] == (len(Header._fields),):
            self._arrays, self._shape = record.arrays, record.info["shape"]
            self._rows = {key: row for row, key in enumerate(record.arrays["keys"].tolist())}

    def header(self, files: FileSet, member: Member) -> Header | None:
        """The header of an image, if it is known."""
        row = self._rows.get(key_of(files, member.name, member.place)) if self._rows else None
        if row is None:
            return None
        width, height, color, several = self._arrays["headers"][row].tolist()
        return Header(width, height, bool(color), bool(several))

    def hashes(self, keys: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of images by their keys, and which are known for this shape."""
        rows = np.array([self._rows.get(key, -1) for key in keys.tolist()], np.int64)
        if self._shape != list(shape):
            rows[:] = -1
        hashes, known = np.zeros(len(keys), np.uint64), rows >= 0
        if known.any():
            hashes[known] = self._arrays["hashes"][rows[known]]
        return hashes, known


def as_array(headers: Sequence[Header]) -> np.ndarray:
    """Headers as int64 (N, fields)."""
    return np.array(headers, np.int64).reshape(-1, len(Header._fields))


def key_of(files: FileSet, name: str, place: Place | None) -> int:
    """A number that identifies an image in its present version."""
    assert place is not None
    text = f"{files.files[place.file][1:]} {place[1:]} "
    return int.from_bytes(
        blake2b(text.encode() + os.fsencode(name), digest_size=8).digest(), "big"
    )


def index(
    files: FileSet,
    request: Request,
    names: Sequence[str],
    places: Sequence[Place | None],
    headers: Sequence[Header],
    shape: tuple[int, int, int],
    path: Path,
    old: Record | None,
) -> tuple[Record, dict[str, str]]:
    """Decode every image once: the record of those that can be used, and the faults of the others.

    If this is interrupted, the entries that are complete are stored.
    """
    previous = PreviousIndex(old)
    array = LazyImages(
        request.where,
        files.root,
        Names.of([file.name for file in files.files]),
        np.array([file[1:] for file in files.files], np.int64).reshape(-1, 2),
        Names.of(names),
        np.array(places, np.int64).reshape(-1, 4),
        (len(names), *shape),
        request.size,
    )
    keys = np.array([key_of(files, *pair) for pair in zip(names, places, strict=True)], np.uint64)
    hashes, known = previous.hashes(keys, shape)
    faults: dict[str, str] = {}

    def hashed(row: int) -> int | str:
        try:
            return int(content_hashes([array.decode(row)], 1)[0])
        except Exception as error:
            return fault(error, lambda: io.BytesIO(array.content(row)[0]))

    def record(rows: np.ndarray, about: dict[str, Any]) -> Record:
        kept = Names.of([names[int(row)] for row in rows])
        arrays = {
            "files": array.files.text,
            "file_ends": array.files.ends,
            "stamps": array.stamps,
            "names": kept.text,
            "name_ends": kept.ends,
            "places": array.places[rows],
            "headers": as_array(headers)[rows],
            "keys": keys[rows],
            "hashes": hashes[rows],
        }
        return Record(about, {"shape": list(shape)}, arrays)

    todo = np.flatnonzero(~known)
    todo = todo[np.lexsort(array.places[todo, 1::-1].T)]  # as they lie in the files
    done = int(known.sum())
    try:
        with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(todo), 256):
                block = list(map(int, todo[start : start + 256]))
                for row, result in zip(block, pool.map(hashed, block), strict=True):
                    if isinstance(result, int):
                        hashes[row], known[row] = result, True
                    else:
                        faults[names[row]] = result
                    done += 1
                    request.report(done, len(names))
    except BaseException:
        if known.sum() >= WORTH_STORING:
            store(path, record(np.flatnonzero(known), UNFINISHED), request)
        raise
    return record(np.flatnonzero(known), {}), faults
