"""What all readers share: the request, their result, their error, and what they do not believe."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

Progress = Callable[[int, int], None]
MAX_ARRAY = 1 << 36  # bytes: no header is believed that asks for more
ARCHIVE = re.compile(r".*\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz|zip)", re.IGNORECASE)
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class DataError(ValueError):
    """Data that cannot be used as they are; the message is one line that says what to do."""


@dataclass(frozen=True)
class Source:
    """What a reader found; the fields are those of `musigma.data.Dataset`.

    `hashes` are `content_hashes(x)` where they are known already, and `x` is an array, or what
    can be indexed like one.
    """

    x: Any
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    official_test: np.ndarray | None = None
    official_validation: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    hashes: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """How a source is to be read.

    Args:
        where: What messages call it.
        size: Height and width that images are brought to.
        skip_bad: Leave unusable images out.
        in_memory: Whether arrays are made in memory; by default those that fit are.
        report: Called with (done, total).
        notes: Gathers what the user should know.
    """

    where: str
    size: tuple[int, int] | None = None
    skip_bad: bool = False
    in_memory: bool | None = None
    report: Progress = lambda done, total: None
    notes: list[str] = field(default_factory=list)

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


def content_hashes(examples: Iterable[np.ndarray], n: int, report: Progress | None = None) -> Any:
    """64 bits of BLAKE2b of each example's bytes: what splits and digests go by.

    >>> content_hashes(np.zeros((2, 1), np.float32), 2)
    array([5657698912149702814, 5657698912149702814], dtype=uint64)
    """
    hashes = np.empty(n, np.uint64)
    for i, example in enumerate(examples):
        content = np.ascontiguousarray(example).data
        hashes[i] = int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
        if report and (not (i + 1) % 1000 or i + 1 == n):
            report(i + 1, n)
    return hashes


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
    return printable((str(error) or type(error).__name__).splitlines()[0])


def printable(name: str) -> str:
    r"""A name that can be printed, and written as UTF-8, on one line.

    >>> printable("a\nb"), printable("caf\udce9"), printable("café")
    ('a\\nb', 'caf\\xe9', 'café')
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(match[0])[1:-1]

    return UNPRINTABLE.sub(escape, name)


def missing(what: str, package: str, extra: str) -> DataError:
    """The complaint about an optional library."""
    return DataError(f"{what} needs {package}: pip install 'musigma[{extra}]'")


def allocate(shape: tuple[int, ...], where: str, dtype: Any = np.uint8) -> np.ndarray:
    """Room in memory, or a complaint that there is none."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        gib = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
        raise DataError(
            f"{where}: {shape} values take {gib:.0f} GiB: leave in_memory out, or pass a smaller "
            "--size N"
        ) from error
