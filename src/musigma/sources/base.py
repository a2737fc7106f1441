"""What all readers share: their result, their error, and what they refuse to believe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

Progress = Callable[[int, int], None]
Walk = Callable[[], Iterator[tuple[str, Callable[[], BinaryIO]]]]
MAX_ARRAY = 1 << 36  # bytes: no header is believed that asks for more
ARCHIVE = re.compile(r".*\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz|zip)", re.IGNORECASE)


class DataError(ValueError):
    """Data that cannot be used as they are; the message is one line that says what to do."""


@dataclass(frozen=True)
class Source:
    """What a reader found; the fields are those of `musigma.data.Dataset`."""

    x: np.ndarray
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    official_test: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@contextmanager
def damage(where: str) -> Iterator[None]:
    """Turn whatever a parser throws at broken input into a `DataError`."""
    try:
        yield
    except (DataError, PermissionError):
        raise
    except Exception as error:
        raise DataError(
            f"{where}: is damaged, truncated or not what its name says ({first_line(error)}): "
            "make or fetch it again"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error) or type(error).__name__).splitlines()[0]


def missing(what: str, package: str, extra: str) -> DataError:
    """The complaint about an optional library."""
    return DataError(f"{what} needs {package}: pip install 'musigma[{extra}]'")


def allocate(shape: tuple[int, ...], where: str) -> np.ndarray:
    """Room for images, or a complaint that there is none."""
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        gib = math.prod(shape) / 2**30
        raise DataError(
            f"{where}: {shape} levels take {gib:.0f} GiB: pass a smaller --size N, or give a "
            "memory-mapped .npy"
        ) from error
