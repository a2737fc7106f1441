"""The user's cache: results that took long to compute, stored for the next time.

It contains *records*, small arrays with a header that names their source and its version, and
*flat arrays*, which are written block by block where memory is too small, and memory-mapped: those
that are `derived` from others, and tables. `facts` about arrays on disk are records. Both are
written whole or not at all, by one process while others wait. Entries that are truncated,
damaged, foreign or out of date are computed again. No pickles are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musigma.data.errors import first_line
from musigma.data.raw import Request, allocate, content_hashes
from musigma.files import locked, replacing

FORMAT = "musigma record 1"


class Record(NamedTuple):
    """Arrays with JSON values: `about` identifies the source, `info` is whatever else is known."""

    about: dict[str, Any]
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]


def folder() -> Path:
    """``$XDG_CACHE_HOME/musigma``, or ``~/.cache/musigma``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "musigma"


def place(kind: str, name: str, suffix: str = "") -> Path:
    """The path of a cache entry of a kind, for a name that may be a path or a URL."""
    key = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return folder() / kind / f"{key}{suffix}"


def stamp(path: Path) -> list[int]:
    """Size and modification time of a file, which identify its version."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def read(path: Path) -> Record | None:
    """The record in a file; None if it does not exist or is not a whole record."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header.pop("format") != FORMAT:
            return None
        return Record(header["about"], header["info"], arrays)
    except Exception:  # the parsers raise many types for damaged files
        return None


def write(path: Path, record: Record) -> None:
    """Write a record, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "about": record.about, "info": record.info})
    arrays: dict[str, Any] = {"header": np.frombuffer(text.encode(), np.uint8), **record.arrays}
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def cached(
    path: Path,
    about: Mapping[str, Any],
    build: Callable[[], Record],
    request: Request,
    beside: Path | None = None,
) -> Record:
    """The record of a source in its present version `about`, from the cache or built.

    A file `beside` it, which `build` makes too, must be there and have the stamp of the record. It
    is mapped as the array "beside" while no other process may replace it.
    """
    about = json.loads(json.dumps(about))
    with locked(path.with_suffix(".lock")) as exclusive:
        record = read(path)
        if record and (
            record.about != about
            or (beside and not (beside.is_file() and record.info["stamp"] == stamp(beside)))
        ):
            record = None
        if record is None:
            for left in path.parent.glob(f".{path.stem}.*") if exclusive else ():
                left.unlink(missing_ok=True)  # drafts of processes that were killed
            record = build()._replace(about=about)
            store(path, record, request)
        if beside:
            record.arrays["beside"] = np.load(beside, mmap_mode="r", allow_pickle=False)
        return record


def store(path: Path, record: Record, request: Request) -> None:
    """Write a record, or note that it could not be written."""
    try:
        write(path, record)
    except OSError as error:
        reason = first_line(error)
        request.notes.append(
            f"the cache {folder()} cannot be written ({reason}), so {request.where} will be "
            "surveyed again next time: set XDG_CACHE_HOME to a folder of your own"
        )


def flat(
    name: str,
    about: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: Any,
    blocks: Callable[[], Iterable[np.ndarray]],
    request: Request,
) -> np.ndarray:
    """An array made of blocks of rows: in memory if it fits, else memory-mapped from the cache.

    In the cache, the names of its source and its own identify it; `about` is the source's version.

    Raises:
        DataError: If there is no room; nothing is left behind.
    """
    n_bytes, kind = prod(shape) * np.dtype(dtype).itemsize, np.dtype(dtype).str
    if request.fits(n_bytes):
        out, done = allocate(shape, request.where, dtype), 0
        for block in blocks():
            out[done : done + len(block)] = block
            done += len(block)
        return out
    path = place("arrays", name, ".npy")

    def build() -> Record:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, draft.open("wb") as file:
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in _readable(blocks(), request):
                file.write(np.ascontiguousarray(block, dtype).data)
        return Record({}, {"stamp": stamp(path)}, {})

    try:
        version = {**about, "shape": shape, "dtype": kind}
        record = cached(path.with_suffix(".npz"), version, build, request, beside=path)
        return record.arrays["beside"]
    except OSError as error:
        raise request.error(
            f"needs {n_bytes / 2**30:.1f} GiB in the cache {folder()}, which "
            f"cannot be written ({first_line(error)}): make room there, or set "
            "XDG_CACHE_HOME to a folder on a larger disk"
        ) from error


def _readable(blocks: Iterable[np.ndarray], request: Request) -> Iterator[np.ndarray]:
    """The blocks; an error in reading them is not mistaken for one in writing."""
    try:
        yield from blocks
    except OSError as error:
        raise request.error(f"{first_line(error)}: give a path that can be read") from error


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in blocks of a few megabytes, so that a memory-mapped file is never read as a whole."""
    step = max(1, (1 << 22) * len(x) // max(1, x.size))
    return (np.asarray(x[i : i + step]) for i in range(0, len(x), step))


def float32(x: np.ndarray) -> np.ndarray:
    """Numbers as float32; those too large become infinite."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def _source(x: np.memmap) -> tuple[Path, dict[str, Any]]:
    """The file of an array, and the version and the part of it that the array is."""
    assert x.filename is not None  # no open file is mapped here
    path = Path(os.fsdecode(x.filename))
    view = [list(x.shape), list(x.strides)]
    return path, {"version": stamp(path), "dtype of source": x.dtype.str, "view": view}


def derived(
    x: np.ndarray,
    what: str,
    shape: tuple[int, ...],
    dtype: Any,
    make: Callable[[], Iterable[np.ndarray]],
    request: Request,
) -> np.ndarray:
    """An array computed from another; it is written to the cache if both exceed memory.

    `what` names it, and identifies it in the cache; `make` yields its rows, in blocks.
    """
    if not isinstance(x, np.memmap):
        return flat("", {}, shape, dtype, make, replace(request, in_memory=True))
    file, about = _source(x)
    return flat(f"{file}\n{what}", about, shape, dtype, make, request)


def facts(x: np.ndarray, request: Request) -> dict[str, np.ndarray]:
    """Facts that one pass finds: for tables, each column's range and the rows that are not finite.

    For files larger than memory, also the hashes of the examples; the cache stores all of them.
    """
    on_disk = isinstance(x, np.memmap) and not request.fits(x.nbytes)

    def build() -> Record:
        low, high = np.full(x.shape[1:], np.inf), np.full(x.shape[1:], -np.inf)
        bad, hashes, done = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], 0
        for block in blocks(x) if on_disk or x.dtype.kind == "f" else ():
            if x.dtype.kind == "f":
                finite = np.isfinite(block).all(1)
                bad.append(done + np.flatnonzero(~finite))
                usable = block if finite.all() else block[finite]
                low = np.minimum(low, usable.min(0, initial=np.inf))
                high = np.maximum(high, usable.max(0, initial=-np.inf))
            done += len(block)
            if on_disk:
                hashes.append(content_hashes(block, len(block)))
                request.report(done, len(x))
        found = {"low": low, "high": high, "bad": np.concatenate(bad)}
        return Record({}, {}, found | ({"hashes": np.concatenate(hashes)} if on_disk else {}))

    if not isinstance(x, np.memmap) or not on_disk:
        return build().arrays
    file, about = _source(x)
    path = place("facts", f"{file}\n{x.dtype.str}", ".npz")
    return cached(path, {"source": str(file), "facts": 2, **about}, build, request).arrays
