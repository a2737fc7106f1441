"""Images that stay on disk and are decoded when they are indexed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.errors import DataError, first_line, printable
from musigma.data.raw import Request
from musigma.data.readers.decoding import pixels, quiet
from musigma.data.readers.filesets import Place, content


class Names(Sequence[str]):
    r"""Millions of names in two arrays.

    >>> list(Names.of(["a", "bc", "caf\udce9"])) == ["a", "bc", "caf\udce9"]
    True
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
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
    """Images on disk that are indexed like an array, uint8 (N, C, H, W)."""

    where: str  # what messages call the source
    root: Path  # the folder that contains the files
    files: Names
    stamps: np.ndarray  # size and time of each file, by which a change is noticed, (files, 2)
    names: Names  # of the images
    places: np.ndarray  # `Place` of each image, (N, 4)
    shape: tuple[int, ...]
    size: tuple[int, int] | None  # height and width that images are resized to

    dtype = np.dtype(np.uint8)
    ndim = 4

    @classmethod
    def of(
        cls, request: Request, root: Path, arrays: Mapping[str, np.ndarray], shape: Sequence[int]
    ) -> LazyImages:
        """The images of an index."""
        files, names = (
            Names(arrays["files"], arrays["file_ends"]),
            Names(arrays["names"], arrays["name_ends"]),
        )
        places, stamps = arrays["places"], arrays["stamps"]
        whole = (len(places), *shape)
        return cls(request.where, root, files, stamps, names, places, whole, request.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all images when decoded."""
        return prod(self.shape)

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
