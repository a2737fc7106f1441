"""The `Request` that readers take, and what they share: memory limits, hashes, labels."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from musigma.data.errors import DataError, all_faults
from musigma.schema import Schema

if TYPE_CHECKING:
    from musigma.data.columns import Draft

Progress = Callable[[int, int], None]
MAX_ARRAY = 1 << 36  # bytes: a header that asks for more is refused
ARCHIVE = re.compile(r".*\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz|zip)", re.IGNORECASE)
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Request:
    """How to read a source, and the notes for the user about how it was read."""

    where: str  # what messages call it
    size: tuple[int, int] | None = None  # height and width that images are resized to
    skip_bad: bool = False  # leave out images and rows that cannot be used
    allow_constant: bool = False
    in_memory: bool | None = None  # None: arrays that fit
    channels: int | None = None  # 3 makes gray images RGB
    columns: tuple[str, ...] | None = None  # those of a table that are wanted, in this order
    of: tuple[
        str, ...
    ] = ()  # patterns of columns that are data; others are neither data nor labels
    given: tuple[str, ...] = ()  # patterns of columns that are context, and no part of x
    schema: Schema | Mapping[str, Draft] | Literal["infer"] | None = None  # of a typed table
    label: str | None = None  # a column of a typed table that is labels; "label": the usual names
    unlabeled: bool = False  # missing labels are -1, instead of unusable
    unseen: Literal["refuse", "probability"] = "refuse"  # categories that the schema lacks
    missing: Literal["model", "ignore"] = "model"  # missing values, if the schema is inferred
    partial: bool = False  # columns of a schema that a table lacks are missing in all rows
    report: Progress = lambda done, total: None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, which begins with the name of the source."""
        self.notes.append(f"{self.where}: {text}")

    def error(self, text: str) -> DataError:
        """An error, which begins with the name of the source."""
        return DataError(f"{self.where}: {text}")

    def refuse(
        self, faults: Mapping[str, str], what: str, total: int, bad: int | None = None
    ) -> None:
        """Raise an error that names faults of `bad` examples of `total`, unless `skip_bad`."""
        if faults and not self.skip_bad:
            raise self.error(all_faults(faults, what, total, bad))

    def fits(self, n_bytes: int) -> bool:
        """Whether an array of so many bytes is made in memory."""
        return n_bytes <= memory_limit() if self.in_memory is None else self.in_memory


def memory_limit() -> int:
    """Bytes an array may take: a quarter of the memory, shared by the machine's processes."""
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        most = 16 << 30
    for path in CGROUP:
        try:
            most = min(most, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # not that kind of system, or no limit
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return most // 4 // max(1, int(processes) if processes.isdecimal() else 1)


def content_hashes(examples: Iterable[np.ndarray], n: int) -> np.ndarray:
    """64 bits of BLAKE2b of each example's bytes; splits and digests are made from them.

    >>> content_hashes(np.zeros((2, 1), np.float32), 2)
    array([5657698912149702814, 5657698912149702814], dtype=uint64)
    """
    hashes = np.empty(n, np.uint64)
    for i, example in enumerate(examples):
        content = np.ascontiguousarray(example).data
        hashes[i] = int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
    return hashes


def allocate(shape: tuple[int, ...], where: str, dtype: Any = np.uint8) -> np.ndarray:
    """An array in memory, or an error that it does not fit."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        gib = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
        raise DataError(
            f"{where}: {shape} values take {gib:.0f} GiB: leave in_memory out, or pass a smaller "
            "--size N"
        ) from error


def as_labels(y: np.ndarray, n: int, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 with their names; small whole numbers keep their values.

    >>> as_labels(np.array(["b", "a", "b"]), 3, "y")
    (array([1, 0, 1]), ('a', 'b'))
    """
    if y.shape[1:] == (1,):
        y = y[:, 0]
    if y.dtype.kind == "f" and (abs(y) < 2**53).all() and (y == np.rint(y)).all():
        y = y.astype(np.int64)
    if y.shape != (n,) or y.dtype.kind not in "biuUS":
        advice = "give one label for each example"
        if y.ndim == 2 and len(y) == n and y.dtype.kind in "biu" and (y.sum(1) == 1).all():
            advice = "make these one-hot labels classes, y.argmax(1)"
        elif y.shape == (n,) and y.dtype.kind == "f":
            advice = "make fractions and NaN whole numbers, or leave them out"
        raise DataError(
            f"{where}: labels are {y.dtype} of shape {y.shape}, not whole numbers or strings of "
            f"shape ({n},): {advice}"
        )
    if y.dtype.kind in "bui" and n and y.min() >= 0 and y.max() < 1000:
        return y.astype(np.int64), tuple(map(str, range(int(y.max()) + 1)))
    names, labels = np.unique(y.astype("U") if y.dtype.kind == "S" else y, return_inverse=True)
    return labels.astype(np.int64), tuple(map(str, names.tolist()))
