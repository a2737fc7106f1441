"""Images: their headers, their pixels, why they may be unusable; and images that stay on disk."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from musigma.data.errors import DataError, first_line, printable
from musigma.data.raw import Request
from musigma.data.readers.filesets import Place, content
from musigma.files import impostor


class Header(NamedTuple):
    """Properties of an image before it is decoded, turned upright."""

    width: int
    height: int
    color: bool
    several: bool  # frames


class Unusable(DataError):
    """An image that can be read but not used; the message says why, and what to do."""


@lru_cache(maxsize=1)
def pillow_kinds() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats that Pillow may open, and their suffixes.

    Formats for which Pillow starts other programs are left out.
    """
    from PIL import Image

    suffixes = Image.registered_extensions()
    formats = set(Image.OPEN) - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}
    common_first = sorted(formats, key=lambda kind: (kind not in ("JPEG", "PNG"), kind))
    return tuple(common_first), frozenset(s for s, kind in suffixes.items() if kind in formats)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings, except decompression bombs, which become errors."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def _opened(opener: Callable[[], BinaryIO]) -> Iterator[Any]:
    from PIL import Image

    with opener() as file, Image.open(file, formats=pillow_kinds()[0]) as image:
        yield image


def header(opener: Callable[[], BinaryIO]) -> Header:
    """Read an image's header, within `quiet`.

    Raises:
        Unusable: If its levels have 16 bits or are floating-point numbers.
    """
    with _opened(opener) as image:
        if image.mode[0] in "IF":
            raise Unusable(
                f"has 16-bit or floating-point levels (mode {image.mode}): save it with 8 bits"
            )
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
        several = False
        with contextlib.suppress(Exception):  # if that cannot be read
            several = bool(getattr(image, "is_animated", False))
        return Header(width, height, image.mode not in ("1", "L", "LA"), several)


def pixels(
    opener: Callable[[], BinaryIO], channels: int, size: tuple[int, int] | None
) -> np.ndarray:
    """Decode, within `quiet`, turn upright, drop an opaque alpha, and fit; uint8 (C, H, W)."""
    from PIL import ImageOps

    with _opened(opener) as image:
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            opacity = np.asarray(image.convert("RGBA").getchannel("A"))
            if opacity.min() < 255:
                raise Unusable(
                    "has transparent pixels, which models do not represent: flatten it onto a "
                    "background"
                )
            image = image.convert("RGBA")
        image = _fitted(image.convert("RGB" if channels == 3 else "L"), size)
        return np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)


def fault(error: Exception, opener: Callable[[], BinaryIO]) -> str:
    """What is wrong with an image and what to do: a sentence that begins with its name.

    Raises:
        DataError: If the fault is that of the archive around the image.
    """
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, DataError):
        raise error
    if isinstance(error, FileNotFoundError):
        return "is a link to a file that does not exist: restore or remove it"
    start = b""
    with contextlib.suppress(Exception), opener() as file:
        start = file.read(512)
        if not start.strip():
            return "is empty: remove it or fetch it again"
    if reason := impostor(start):
        return reason
    reason = first_line(error)
    if "cannot identify image file" in reason:
        reason = "its content is of no known format"
    return f"is not a readable image ({reason}): repair or remove it"


def _fitted(image: Any, size: tuple[int, int] | None) -> Any:
    """Scale an image, antialiased, until it covers (height, width), and crop it centrally."""
    from PIL import Image, ImageOps

    if size is None or image.size == (size[1], size[0]):
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def resized(x: np.ndarray, size: tuple[int, int], request: Request) -> Iterator[np.ndarray]:
    """Images resized to (height, width), one by one: (1, C, height, width) each."""
    from PIL import Image

    for i, example in enumerate(x):
        planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in example)
        yield np.stack([np.asarray(_fitted(plane, size)) for plane in planes])[None]
        request.report(i + 1, len(x))


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

    @cached_property
    def rows(self) -> np.ndarray:
        """The numbers of the images."""
        return np.arange(len(self))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Any) -> np.ndarray:
        """One image, or those of a slice, a mask or an array of indices."""
        rows = self.rows[key]  # what an array refuses is refused
        out = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        with quiet():
            for at, row in np.ndenumerate(rows):
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
            reason = first_line(error)
            raise DataError(
                f"{self.where}: {name} has changed since this source was indexed "
                f"({reason}): run the command again, which rebuilds the index"
            ) from error
