"""Images in a row, what comes with them, and what work is done on them side by side."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from musigma.evaluation import context_size
from musigma.model import Model

__all__ = [
    "SEAL",
    "Batch",
    "bits_of",
    "check_levels",
    "context_rows",
    "digest",
    "joined",
    "packed",
    "plain",
    "side_by_side",
    "unpacked",
    "width",
]

SEAL = 16
"""Bytes of a `digest` that stand before images that a general codec packed."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """Neighbouring images of a data set.

    Attributes:
        levels: Whole numbers, shape (N, *shape), as the model takes them.
        about: What else each image comes with, by its name, one JSON value for each: `names`,
            `modes`, `labels`.
    """

    levels: np.ndarray
    about: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def side(self) -> bytes:
        """`about` as bytes, which are the same for the same values."""
        plain = {name: list(values) for name, values in self.about.items()}
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode() if plain else b""


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches in a row as one."""
    about: dict[str, list[Any]] = {}
    for batch in batches:
        for name, values in batch.about.items():
            about.setdefault(name, []).extend(values)
    return Batch(np.concatenate([batch.levels for batch in batches]), about)


def digest(levels: np.ndarray, side: bytes) -> bytes:
    """SHA-256 of images (N, ...) and of all that comes with them."""
    state = hashlib.sha256(f"{levels.shape}".encode() + side)
    state.update(np.ascontiguousarray(levels.astype("<i4")).data)
    return state.digest()


def bits_of(model: Model) -> int:
    """How many bits each element of a model's data has.

    Raises:
        ValueError: If it was composed by hand, or is of continuous data.
    """
    if not model.config:
        raise ValueError(
            "model: this one was composed by hand, so a file could not say what it was written "
            "with; make its builder an @musigma.architecture"
        )
    bits = model.config["options"].get("bits", 8)
    if bits is None:
        raise ValueError(
            "model: it is of continuous values, which no file holds exactly at its rate; train "
            "one on levels (--bits), and round the data to them"
        )
    return bits


def width(bits: int) -> int:
    """Bytes of a level."""
    return 2 if bits > 8 else 1


def check_levels(model: Model, x: np.ndarray) -> None:
    """Refuse what are not levels of a model's data.

    Raises:
        ValueError: If shape, type or range are others.
    """
    shape, bits = tuple(model.config["shape"]), bits_of(model)
    if x.shape[1:] != shape or x.dtype.kind not in "iub":
        raise ValueError(
            f"data: the model takes whole numbers of shape (N, {', '.join(map(str, shape))}); got "
            f"{x.dtype} of shape {x.shape}"
        )
    if x.size and (x.min() < 0 or x.max() >= 2**bits):
        raise ValueError(
            f"data: the model takes levels 0 to {2**bits - 1}; got {x.min()} to {x.max()}"
        )


def context_rows(model: Model, labels: Sequence[int] | None) -> np.ndarray | None:
    """One row per image for a conditional model.

    Raises:
        ValueError: If there are no labels, or others than it knows.
    """
    classes = context_size(model)
    if not classes:
        return None
    given = np.asarray([] if labels is None else labels)
    if labels is None or given.dtype.kind not in "iu" or not (given >= 0).all():
        raise ValueError(
            f"labels: the model is conditioned on {classes} classes; give a label each"
        )
    if given.max(initial=0) >= classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}; got {given.max()}")
    return np.eye(classes)[given]


# --- a general codec ---------------------------------------------------------------------------


def plain(levels: np.ndarray, bits: int) -> bytes:
    """Levels as bytes, eight of one bit to each."""
    if bits == 1:
        return np.packbits(levels.astype(np.uint8)).tobytes()
    return levels.astype(f"<u{width(bits)}").tobytes()


def packed(levels: np.ndarray, bits: int) -> bytes:
    """Levels by a general codec, xz."""
    return lzma.compress(plain(levels, bits), preset=6)


def unpacked(payload: bytes, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The levels of `packed`.

    Raises:
        ValueError, lzma.LZMAError: If they are not, and all of them.
    """
    n = math.prod(shape)
    size = math.ceil(n / 8) if bits == 1 else n * width(bits)
    inflater = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    plain = inflater.decompress(payload, size + 1)
    if len(plain) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"expected {size} bytes and no more, got {len(plain)}")
    if bits == 1:
        flat = np.unpackbits(np.frombuffer(plain, np.uint8), count=n)
    else:
        flat = np.frombuffer(plain, f"<u{width(bits)}")
    if flat.max(initial=0) >= 2**bits:
        raise ValueError(f"expected levels below {2**bits}, got {flat.max()}")
    return flat.reshape(shape).astype(np.int64)


# --- side by side ------------------------------------------------------------------------------


def side_by_side(work: Callable[[T], R], items: Iterator[T], workers: int | None) -> Iterator[R]:
    """``map(work, items)``, with as many at a time as there are workers, in their order."""
    count = workers or os.cpu_count() or 1
    with _one_thread_each(), ThreadPoolExecutor(count) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > count:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
