"""One image: its header, its pixels, its size; and which images no model here can use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from musigma.data.readers.base import DataError, Request, first_line


class Header(NamedTuple):
    """What is known of an image before it is decoded; turned upright."""

    width: int
    height: int
    color: bool
    several: bool  # frames, of which the first is used


class Unusable(DataError):
    """An image that can be read, and not be used: what to do with it."""


@lru_cache(maxsize=1)
def pillow_kinds() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats Pillow may open, and their suffixes; none of those that start other programs."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    formats = set(Image.OPEN) - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}
    common_first = sorted(formats, key=lambda kind: (kind not in ("JPEG", "PNG"), kind))
    return tuple(common_first), frozenset(s for s, kind in suffixes.items() if kind in formats)


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow without its warnings, but for one: decompression bombs are errors."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(opener: Callable[[], BinaryIO]) -> Iterator[Any]:
    from PIL import Image

    with opener() as file, Image.open(file, formats=pillow_kinds()[0]) as image:
        yield image


def header(opener: Callable[[], BinaryIO]) -> Header:
    """Look at an image's header, within `quiet`; 16-bit levels are refused."""
    with _opened(opener) as image:
        if image.mode[0] in "IF":
            raise Unusable(
                f"has 16-bit or floating-point levels (mode {image.mode}): save it with 8 bits, "
                "or pass --skip-bad"
            )
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
        color = image.mode not in ("1", "L", "LA")
        return Header(width, height, color, _is_animated(image))


def _is_animated(image: Any) -> bool:
    """Whether it has more than one frame; those that cannot be read do not count."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


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
                    "has transparent pixels, which no model here knows: flatten it onto a "
                    "background of your choice, or pass --skip-bad"
                )
            image = image.convert("RGBA")
        image = _fitted(image.convert("RGB" if channels == 3 else "L"), size)
        return np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)


def complaint(error: Exception) -> str:
    """What is the matter with an image: the end of a sentence that begins with its name."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, DataError):
        raise error  # of the archive around it
    reason = first_line(error)
    return f"is not a readable image ({reason}): repair or remove it, or pass --skip-bad"


def _fitted(image: Any, size: tuple[int, int] | None) -> Any:
    """Cover (height, width), antialiased, and cut off evenly what stands over."""
    from PIL import Image, ImageOps

    if size is None or image.size == (size[1], size[0]):
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def resized(x: np.ndarray, size: tuple[int, int], request: Request) -> Iterator[np.ndarray]:
    """Images brought to (height, width), one by one: (1, C, height, width) each."""
    from PIL import Image

    for i, example in enumerate(x):
        planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in example)
        yield np.stack([np.asarray(_fitted(plane, size)) for plane in planes])[None]
        request.report(i + 1, len(x))
