"""One image: its header, its pixels, its size, and why it may be unusable."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from musigma.data.errors import DataError, first_line
from musigma.data.raw import Request


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
    start = b""
    with contextlib.suppress(Exception), opener() as file:
        start = file.read(512).lstrip()[:15].lower()
        if not start:
            return "is empty: remove it or fetch it again"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page or XML, not an image: fetch it again"
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
