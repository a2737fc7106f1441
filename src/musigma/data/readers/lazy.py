"""Images that stay where they are, and are decoded when they are asked for.

An *index* knows of each image where it lies, what shape it has, its label, and a hash of its
pixels. To make it every image is decoded once; so whatever cannot be used is found before the
first step, and `split` needs no second look. An index that is out of date is made anew, and what
has not changed since is taken over from it.
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

from musigma.data.cache import Record, keep
from musigma.data.readers.base import DataError, Request, content_hashes, first_line, printable
from musigma.data.readers.pictures import Header, complaint, pixels, quiet
from musigma.data.readers.walks import Member, Origin, Place, content

UNFINISHED = {"unfinished": True}
WORTH_KEEPING = 1000  # images of an index that was not finished


class Names(Sequence[str]):
    r"""Millions of names in two arrays.

    >>> list(Names.of(["a", "bc", "caf\udce9"])) == ["a", "bc", "caf\udce9"]
    True
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Pack names, whatever bytes they are of."""
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
    """An array of images, uint8 (N, C, H, W), for all who index it.

    Args:
        where: What messages call the source.
        root: The folder that `files` lie in.
        files: Their names.
        stamps: Size and time of each file, int64 (files, 2): if they differ, it was changed.
        names: Of the images.
        places: `Place` of each image, int64 (N, 4).
        shape: Of the whole.
        size: What images are resized to, if they are.
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
        """What all images would take, decoded."""
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
                out[at] = self._known(int(row))
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("images that lie on disk are an array only as a copy")
        return self[:] if dtype is None else self[:].astype(dtype)

    def decode(self, row: int) -> np.ndarray:
        """An image as it lies there now, within `quiet`."""
        file, offset, length, packed = self.places[row].tolist()
        place = Place(file, offset, length, bool(packed))
        data, about = content(self.root / self.files[place.file], place)
        if [about.st_size, about.st_mtime_ns] != self.stamps[place.file].tolist():
            raise OSError("it has another size or date")
        example = pixels(lambda: io.BytesIO(data), self.shape[1], self.size)
        if example.shape != self.shape[1:]:
            raise OSError(f"its shape is {example.shape}")
        return example

    def _known(self, row: int) -> np.ndarray:
        """An image that could be decoded when the index was made."""
        try:
            return self.decode(row)
        except Exception as error:
            name = printable(self.names[row])
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(
                f"{self.where}: {name} is not what it was when this source was indexed "
                f"({reason}): run the command again, and the index is made anew"
            ) from error


class Found:
    """What an index of an earlier version of the source knows of images that have not changed."""

    def __init__(self, record: Record | None):
        self._rows, self._shape = {}, None
        if record is not None and record.arrays["headers"].shape[1:] == (len(Header._fields),):
            self._arrays, self._shape = record.arrays, record.info["shape"]
            self._rows = {key: row for row, key in enumerate(record.arrays["keys"].tolist())}

    def header(self, origin: Origin, member: Member) -> Header | None:
        """The header of an image, if it is known."""
        row = self._rows.get(key_of(origin, member.name, member.place)) if self._rows else None
        if row is None:
            return None
        width, height, color, several = self._arrays["headers"][row].tolist()
        return Header(width, height, bool(color), bool(several))

    def hashes(self, keys: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of images by their keys, and which of them are known for such a shape."""
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


def key_of(origin: Origin, name: str, place: Place | None) -> int:
    """A number for an image in its present version."""
    assert place is not None
    text = f"{origin.files[place.file][1:]} {place[1:]} "
    return int.from_bytes(
        blake2b(text.encode() + os.fsencode(name), digest_size=8).digest(), "big"
    )


def index(
    origin: Origin,
    request: Request,
    names: Sequence[str],
    places: Sequence[Place | None],
    headers: Sequence[Header],
    shape: tuple[int, int, int],
    path: Path,
    old: Record | None,
) -> Record:
    """Decode every image once, and write down what `source` needs.

    Raises:
        DataError: At the first image that cannot be used, unless such are to be skipped; what
            was found until then is kept.
    """
    found = Found(old)
    array = LazyImages(
        request.where,
        origin.root,
        Names.of([file.name for file in origin.files]),
        np.array([file[1:] for file in origin.files], np.int64).reshape(-1, 2),
        Names.of(names),
        np.array(places, np.int64).reshape(-1, 4),
        (len(names), *shape),
        request.size,
    )
    keys = np.array([key_of(origin, *pair) for pair in zip(names, places, strict=True)], np.uint64)
    hashes, known = found.hashes(keys, shape)
    problems: dict[int, str] = {}

    def look(row: int) -> int | str:
        try:
            return int(content_hashes([array.decode(row)], 1)[0])
        except Exception as error:
            return complaint(error)

    def record(rows: np.ndarray, about: dict[str, Any]) -> Record:
        left_out = [[printable(names[row]), text] for row, text in problems.items()]
        arrays = {
            "files": array.files.text,
            "file_ends": array.files.ends,
            "stamps": array.stamps,
            "names": (kept := Names.of([names[row] for row in map(int, rows)])).text,
            "name_ends": kept.ends,
            "places": array.places[rows],
            "headers": as_array(headers)[rows],
            "keys": keys[rows],
            "hashes": hashes[rows],
        }
        return Record(about, {"shape": list(shape), "problems": left_out}, arrays)

    todo = np.flatnonzero(~known)
    todo = todo[np.lexsort(array.places[todo, 1::-1].T)]  # as they lie in the files
    done = int(known.sum())
    try:
        with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(todo), 256):
                block = list(map(int, todo[start : start + 256]))
                for row, result in zip(block, pool.map(look, block), strict=True):
                    if isinstance(result, int):
                        hashes[row], known[row] = result, True
                    elif request.skip_bad:
                        problems[row] = result
                    else:
                        name = printable(names[row])
                        raise DataError(f"{request.where}: {name} {result}")
                    done += 1
                    request.report(done, len(names))
    except BaseException:
        if known.sum() >= WORTH_KEEPING:
            keep(path, record(np.flatnonzero(known), UNFINISHED), request)
        raise
    return record(np.flatnonzero(known), {})
