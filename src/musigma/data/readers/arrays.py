"""Arrays: .npy and .npz files, and what is computed from arrays block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.columns import called, listed, number_fault
from musigma.data.errors import DataError
from musigma.data.raw import RawData, Request, as_labels, content_hashes

COARSE = 1e-3  # share of a column's range: float32 steps larger than this lose information
NAMED = 1000  # rows that are left out and named


def read_numpy(path: Path, request: Request) -> RawData:
    """An .npy file, memory-mapped where it can be, or an .npz with images or a table."""
    where = request.where
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        return _levels_or_table(x, request)
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
        found = _levels_or_table(arrays[data[0]], request)
        if not labels:
            return found
        y = arrays[labels[0]]
        y, names = as_labels(y, len(arrays[data[0]]), f"{where}: {labels[0]}")
        if found.ids is not None:  # some images were left out
            y = y[[int(name) for name in found.ids]]
        return replace(found, labels=y, label_names=names)


def _levels_or_table(x: np.ndarray, request: Request) -> RawData:
    """Images as uint8 (N, C, H, W); tables unchanged, for `as_table`."""
    where = request.where
    if x.size == 0:
        return RawData(x)
    if x.dtype.kind not in "buif":
        raise DataError(f"{where}: is of type {x.dtype}: store uint8 images or a float table")
    if x.ndim in (3, 4):
        _check_axes(x.shape, where)
        levels, ids, skipped = _to_levels(x, request)
        return RawData(as_images(levels, where), ids=ids, skipped=skipped)
    if x.ndim == 5:
        raise DataError(
            f"{where}: has shape {x.shape}, as volumes or films do, and models take images: give "
            "slices, such as x.reshape(-1, C, H, W)"
        )
    if x.ndim == 1 and x.dtype.kind == "f":
        raise DataError(
            f"{where}: has shape {x.shape}: a table of one column is x[:, None], and one example "
            "is x[None]"
        )
    if x.ndim != 2 or x.dtype == np.uint8:
        raise DataError(
            f"{where}: is {x.dtype} of shape {x.shape}: images are uint8 (N, C, H, W) or "
            "(N, H, W[, C]), tables are float (N, D): reshape it"
        )
    return RawData(x)


def _check_axes(shape: tuple[int, ...], where: str) -> None:
    if len(shape) == 4 and min(shape[1], shape[3]) > 4:
        n, depth, *rest = shape
        raise DataError(
            f"{where}: shape {shape} has no axis of 1 to 4 channels: reshape it; of volumes, give "
            f"the slices, x.reshape({n * depth}, 1, {rest[0]}, {rest[1]})"
        )


def as_images(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 (N, H, W[, C]) or (N, C, H, W) as (N, C, H, W), without copying.

    >>> as_images(np.zeros((5, 28, 20, 3), np.uint8), "x").shape
    (5, 3, 28, 20)
    """
    if x.ndim == 3:
        return x[:, None]
    _check_axes(x.shape, where)
    first, last = x.shape[1], x.shape[3]
    if (last in (1, 3) and first not in (1, 3)) or (first > 4 and last <= 4):
        return np.moveaxis(x, -1, 1)
    return x


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in blocks of a few megabytes, so that a memory-mapped file is never read as a whole."""
    step = max(1, (1 << 22) * len(x) // max(1, x.size))
    return (np.asarray(x[i : i + step]) for i in range(0, len(x), step))


def _to_levels(
    x: np.ndarray, request: Request
) -> tuple[np.ndarray, tuple[str, ...] | None, dict[str, str]]:
    """Levels of images; names of those that are left, if some are left out, and which are."""
    if x.dtype == np.uint8:
        return x, None, {}
    if x.dtype == np.bool_:
        bits = (block.astype(np.uint8) * np.uint8(255) for block in blocks(x))
        request.note(
            "False and True become the levels 0 and 255: --binarize threshold makes 1 bit"
        )
        return derived(x, "levels", x.shape, np.uint8, lambda: bits, request), None, {}
    ids, faults = None, {}
    if x.dtype.kind == "f":
        finite = np.concatenate([np.isfinite(b).reshape(len(b), -1).all(1) for b in blocks(x)])
        if not finite.all():
            bad = np.flatnonzero(~finite).tolist()
            faults = {
                f"image {i} (from 0)": "has values that are not finite: fill them" for i in bad
            }
            if not request.skip_bad:
                request.refuse(faults, "images", len(x))
            x, ids = np.asarray(x)[finite], tuple(map(str, np.flatnonzero(finite).tolist()))
    if not len(x):
        raise DataError(f"{request.where}: no image has finite values")
    low = min(float(block.min()) for block in blocks(x))
    high = max(float(block.max()) for block in blocks(x))
    scale = 255 if x.dtype.kind == "f" and high <= 1 else 1
    refusal = DataError(
        f"{request.where}: images are levels 0..255, and these {x.dtype} values run from {low:g} "
        f"to {high:g}: {_advice(x, low, high)}"
    )
    if not (low >= 0 and high <= 255):
        raise refusal

    def rounded() -> Iterator[np.ndarray]:
        for block in blocks(x):
            exact = block * float(scale)
            nearest = np.rint(exact)
            if np.abs(exact - nearest).max() > 1e-3:
                raise refusal
            yield nearest.astype(np.uint8)

    return derived(x, "levels", x.shape, np.uint8, rounded, request), ids, faults


def _advice(x: np.ndarray, low: float, high: float) -> str:
    """What to do with arrays of more than two axes that hold no levels."""
    if x.dtype.kind in "iu":
        return "rescale to 0..255, and store uint8"
    flat = "x.reshape(len(x), -1).astype(np.float32)"
    if low >= 0 and high <= 1:
        images = "of images, round: np.rint(255 * x).astype(np.uint8)"
    elif low >= -0.25 and high <= 1.25:
        images = (
            "of images that overshoot 0..1, clip and round: np.rint(255 * x.clip(0, 1))"
            ".astype(np.uint8)"
        )
    elif low >= 0 and high <= 255:
        images = "of images, round: np.rint(x).astype(np.uint8)"
    else:
        images = "of images, rescale to 0..255, round, and store uint8"
    return f"{images}; series or other values are a table of continuous columns: {flat}"


def derived(
    x: np.ndarray,
    what: str,
    shape: tuple[int, ...],
    dtype: Any,
    make: Callable[[], Iterable[np.ndarray]],
    request: Request,
) -> np.ndarray:
    """An array computed from another; it is written to the cache if both exceed memory.

    Args:
        x: What it is computed from.
        what: What is computed, by which the cache knows it.
        shape: Shape of the result.
        dtype: Type of the result.
        make: Yields its rows, in blocks.
        request: Decides what fits.
    """
    if not isinstance(x, np.memmap):
        return cache.flat("", {}, shape, dtype, make, replace(request, in_memory=True))
    file = _file(x)
    about = {"version": cache.stamp(file), **_view(x)}
    return cache.flat(f"{file}\n{what}", about, shape, dtype, make, request)


def _file(x: np.memmap) -> Path:
    assert x.filename is not None  # no open file is mapped here
    return Path(os.fsdecode(x.filename))


def _view(x: np.ndarray) -> dict[str, Any]:
    return {"dtype of source": x.dtype.str, "view": [list(x.shape), list(x.strides)]}


def facts(x: np.ndarray, request: Request) -> dict[str, np.ndarray]:
    """What one pass finds: of tables the range of each column, and rows that are not finite.

    Of files beyond memory it also finds the hashes of the examples, and all is cached.
    """
    low, high = np.full(x.shape[1:], np.inf), np.full(x.shape[1:], -np.inf)
    bad: list[np.ndarray] = []

    def passed() -> Iterator[np.ndarray]:
        nonlocal low, high
        start = 0
        for block in blocks(x):
            if x.dtype.kind == "f":
                finite = np.isfinite(block).all(1)
                bad.append(start + np.flatnonzero(~finite))
                usable = block if finite.all() else block[finite]
                low = np.minimum(low, usable.min(0, initial=np.inf))
                high = np.maximum(high, usable.max(0, initial=-np.inf))
            start += len(block)
            yield block

    def found() -> dict[str, np.ndarray]:
        rows = np.concatenate([np.empty(0, np.int64), *bad])
        return {"low": low, "high": high, "bad": rows}

    def build(old: cache.Record | None) -> cache.Record:
        rows = (row for block in passed() for row in block)
        hashes = content_hashes(rows, len(x), request.report)
        return cache.Record({}, {}, {"hashes": hashes, **found()})

    if not isinstance(x, np.memmap) or request.fits(x.nbytes):
        if x.dtype.kind == "f":
            for _ in passed():
                pass
        return found()
    file = _file(x)
    about = {"source": str(file), "version": cache.stamp(file), "facts": 2, **_view(x)}
    path = cache.place("facts", f"{file}\n{x.dtype.str}", ".npz")
    return cache.cached(path, about, build, request).arrays


def as_table(found: RawData, request: Request, allow_constant: bool) -> RawData:
    """float32 (N, D), finite, with no constant column and no column twice.

    Files of float32 stay memory-mapped. Rows that are not finite are refused, or left out.
    """
    x, columns, where = found.x, found.columns, request.where
    if x.dtype != np.float32:
        make = partial(float32_blocks, blocks(x))
        source, x = x, derived(x, "float32", x.shape, np.float32, make, request)
    else:
        source = x
    known = facts(x, request)
    low, high, bad = known["low"], known["high"], known["bad"]
    usable, skipped = None, dict(found.skipped)
    if len(bad):
        faults = {}
        for i in bad[:NAMED].tolist():
            row = np.asarray(source[i])
            with np.errstate(over="ignore"):
                j = int(np.flatnonzero(~np.isfinite(row.astype(np.float32)))[0])
            faults[f"row {i} (from 0), {called(columns, j)}"] = number_fault(float(row[j]))
        if not request.skip_bad:
            request.refuse(faults, "rows", len(x), len(bad))
        request.note(f"{len(bad)} of {len(x)} rows are left out: they are not finite")
        usable = np.ones(len(x), bool)
        usable[bad] = False
        skipped |= faults
        if not usable.any():
            raise DataError(f"{where}: no row is finite in all columns: drop or fill columns")
    if not allow_constant:
        _refuse_constant(columns, low, high, len(x) - len(bad), where)
        x, columns = _without_duplicates(x, columns, low, high, request)
        if x.shape[1] < len(low):
            return as_table(replace(found, x=x, columns=columns), request, allow_constant)
        _note_doubtful(x, columns, low, high, request)
    return replace(found, x=x, usable=usable, skipped=skipped, hashes=known.get("hashes"))


def float32_blocks(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks of numbers as float32; those too large become infinite."""
    for block in rows:
        with np.errstate(over="ignore"):
            yield block.astype(np.float32)


def _refuse_constant(columns: Any, low: np.ndarray, high: np.ndarray, n: int, where: str) -> None:
    constant = np.flatnonzero(low == high)
    if not len(constant):
        return
    if n == 1:
        raise DataError(f"{where}: holds a single example: give more")
    verb = "are" if len(constant) > 1 else "is"
    raise DataError(
        f"{where}: {listed(columns, constant)} {verb} constant in float32, where a density is "
        "infinite: drop it, or subtract an offset"
    )


def _without_duplicates(
    x: np.ndarray, columns: Any, low: np.ndarray, high: np.ndarray, request: Request
) -> tuple[np.ndarray, Any]:
    """A table without columns that repeat another, whose density would be infinite."""
    seen: dict[tuple, list[int]] = {}
    repeated: dict[int, int] = {}
    ends = x[[0, -1]]
    for j in range(x.shape[1]):
        like = seen.setdefault((low[j], high[j], *ends[:, j].tolist()), [])
        same = (i for i in like if all((b[:, i] == b[:, j]).all() for b in blocks(x)))
        first = next(same, None)
        if first is None:
            like.append(j)
        else:
            repeated[j] = first
    if not repeated:
        return x, columns
    pairs = [f"{called(columns, j)} repeats {called(columns, i)}" for j, i in repeated.items()]
    text = "; ".join(pairs[:5]) + ("; ..." if len(pairs) > 5 else "")
    if not columns or isinstance(x, np.memmap):
        raise DataError(f"{request.where}: {text}, where a density is infinite: drop it")
    request.note(f"{text}, and is left out")
    kept = [j for j in range(x.shape[1]) if j not in repeated]
    return np.ascontiguousarray(x[:, kept]), tuple(columns[j] for j in kept)


def _note_doubtful(
    x: np.ndarray, columns: Any, low: np.ndarray, high: np.ndarray, request: Request
) -> None:
    """Note columns of which float32 keeps little, and columns that only count the rows."""
    step = np.spacing(np.maximum(abs(low), abs(high)).astype(np.float32))
    coarse = np.flatnonzero((step > COARSE * (high - low)) & (low < high))
    if len(coarse):
        request.note(
            f"float32 keeps few different values of {listed(columns, coarse)}: subtract an offset"
        )
    start = np.asarray(x[:1000], np.float64)
    steps = (np.diff(start, axis=0) == 1).all(0) & (high - low == len(x) - 1) & (len(x) > 2)
    if len(counting := np.flatnonzero(steps)):
        request.note(
            f"{listed(columns, counting)} counts the rows: drop it, if it is no measurement"
        )
