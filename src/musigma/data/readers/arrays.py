"""Arrays: .npy and .npz; what is made of them, and what is known of them, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.readers.base import DataError, Request, Source, content_hashes

Check = Callable[[int, np.ndarray], None]  # of a block of rows that begins at a row


def read_numpy(path: Path, request: Request) -> Source:
    """An .npy file, memory-mapped where it can be, or an .npz with images or a table."""
    where = request.where
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        return Source(_levels_or_table(x, request))
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        keys = set(arrays.files)
        data = [key for key in ("x", "images", "data", "arr_0") if key in keys]
        labels = [key for key in ("y", "labels") if key in keys]
        rest = keys - set(data) - set(labels)
        if not data and len(rest) == 1:
            data, rest = list(rest), set()
        if len(data) != 1 or len(labels) > 1 or rest:
            raise DataError(
                f"{where}: holds the arrays {', '.join(sorted(keys)) or '(none)'}: keep one named "
                "x, images or data, and at most one of labels named y or labels"
            )
        x = _levels_or_table(arrays[data[0]], request)
        if not labels:
            return Source(x)
        return Source(x, *as_labels(arrays[labels[0]], len(x), f"{where}: {labels[0]}"))


def _levels_or_table(x: np.ndarray, request: Request) -> np.ndarray:
    """Images as uint8 (N, C, H, W); tables as they are, for `as_table` to look at."""
    where = request.where
    if x.size == 0:
        return x
    if x.dtype.kind not in "buif":
        raise DataError(f"{where}: is of type {x.dtype}: store uint8 images or a float table")
    if x.ndim in (3, 4):
        return as_images(_to_levels(x, request), where)
    if x.ndim != 2 or x.dtype == np.uint8:
        raise DataError(
            f"{where}: is {x.dtype} of shape {x.shape}: images are uint8 (N, C, H, W) or "
            "(N, H, W[, C]), tables are float (N, D): reshape it"
        )
    return x


def as_images(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 (N, H, W[, C]) or (N, C, H, W) as (N, C, H, W), without copying.

    >>> as_images(np.zeros((5, 28, 20, 3), np.uint8), "x").shape
    (5, 3, 28, 20)
    """
    if x.ndim == 3:
        return x[:, None]
    first, last = x.shape[1], x.shape[3]
    if (last in (1, 3) and first not in (1, 3)) or (first > 4 and last <= 4):
        return np.moveaxis(x, -1, 1)
    if first > 4:
        raise DataError(f"{where}: shape {x.shape} has no axis of 1 to 4 channels: reshape it")
    return x


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in blocks of some megabytes, so that a memory-mapped file never comes in whole."""
    step = max(1, (1 << 22) * len(x) // max(1, x.size))
    return (np.asarray(x[i : i + step]) for i in range(0, len(x), step))


def _to_levels(x: np.ndarray, request: Request) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == np.bool_:
        bits = (block.astype(np.uint8) * np.uint8(255) for block in blocks(x))
        return derived(x, "levels", x.shape, np.uint8, lambda: bits, request)
    low = min(float(block.min()) for block in blocks(x))
    high = max(float(block.max()) for block in blocks(x))
    scale = 255 if x.dtype.kind == "f" and high <= 1 else 1
    unit = low >= 0 and high <= 1
    advice = "multiply by 255, round, and store uint8" if unit else "rescale to 0..255"
    refusal = DataError(
        f"{request.where}: images are levels 0..255, and these {x.dtype} values run from {low:g} "
        f"to {high:g}: {advice}"
    )
    if not (low >= 0 and high <= 255):  # or there are NaN
        raise refusal

    def rounded() -> Iterator[np.ndarray]:
        for block in blocks(x):
            exact = block * float(scale)
            nearest = np.rint(exact)
            if np.abs(exact - nearest).max() > 1e-3:
                raise refusal
            yield nearest.astype(np.uint8)

    return derived(x, "levels", x.shape, np.uint8, rounded, request)


def derived(
    x: np.ndarray,
    what: str,
    shape: tuple[int, ...],
    dtype: Any,
    make: Callable[[], Iterable[np.ndarray]],
    request: Request,
) -> np.ndarray:
    """What is made of an array: kept in the cache if both are too large for memory.

    Args:
        x: What it is made of.
        what: What is made, for the cache to know it by.
        shape: Of the result.
        dtype: Of the result.
        make: Yields its rows, in blocks.
        request: Decides what fits.
    """
    if not isinstance(x, np.memmap):
        return cache.flat("", {}, shape, dtype, make, replace(request, in_memory=True))
    file = _file(x)
    about = {"version": cache.stamp(file), **_view(x)}
    return cache.flat(f"{file}\n{what}", about, shape, dtype, make, request)


def _file(x: np.memmap) -> Path:
    assert x.filename is not None  # nothing here maps an open file
    return Path(os.fsdecode(x.filename))


def _view(x: np.ndarray) -> dict[str, Any]:
    return {"dtype of source": x.dtype.str, "view": [list(x.shape), list(x.strides)]}


def facts(x: np.ndarray, request: Request, check: Check) -> dict[str, np.ndarray]:
    """What one pass tells: a table's least and largest values; of files beyond memory, hashes.

    Args:
        x: The array.
        request: Decides what fits, and is told how far it is.
        check: Called with every block; of a file that was checked before it is not called.
    """
    low, high = np.full(x.shape[1:], np.inf), np.full(x.shape[1:], -np.inf)

    def checked() -> Iterator[np.ndarray]:
        nonlocal low, high
        start = 0
        for block in blocks(x):
            check(start, block)
            if x.dtype.kind == "f":
                low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
            start += len(block)
            yield block

    def build(old: cache.Record | None) -> cache.Record:
        rows = (row for block in checked() for row in block)
        hashes = content_hashes(rows, len(x), request.report)
        return cache.Record({}, {}, {"hashes": hashes, "low": low, "high": high})

    if not isinstance(x, np.memmap) or request.fits(x.nbytes):
        if x.dtype.kind == "f":
            for _ in checked():
                pass
        return {"low": low, "high": high}
    file = _file(x)
    about = {"source": str(file), "version": cache.stamp(file), **_view(x)}
    path = cache.place("facts", f"{file}\n{x.dtype.str}", ".npz")
    return cache.kept(path, about, build, request).arrays


def as_labels(y: np.ndarray, n: int, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 with their names; small whole numbers keep their values.

    >>> as_labels(np.array(["b", "a", "b"]), 3, "y")
    (array([1, 0, 1]), ('a', 'b'))
    """
    if y.shape != (n,) or y.dtype.kind not in "biuUS":
        raise DataError(
            f"{where}: labels are {y.dtype} of shape {y.shape}, not whole numbers or strings of "
            f"shape ({n},)"
        )
    if y.dtype.kind in "bui" and n and y.min() >= 0 and y.max() < 1000:
        return y.astype(np.int64), tuple(map(str, range(int(y.max()) + 1)))
    names, labels = np.unique(y.astype("U") if y.dtype.kind == "S" else y, return_inverse=True)
    return labels.astype(np.int64), tuple(map(str, names.tolist()))
