"""Readers: from whatever holds the data to one array, its labels and its names.

`read` takes a path, a URL or a built-in name and answers with a `Source`: images as uint8 levels
0..255 of shape (N, C, H, W), tables and points as float32 (N, D). What fits into memory is read
into it; of what does not, arrays are memory-mapped (`cache`), and images are decoded when they
are asked for (`lazy`). Folders, archives and shards are one thing here, an `Origin` (`walks`).
No pickle is trusted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from musigma.data.readers.arrays import derived, facts, read_numpy
from musigma.data.readers.base import (
    ARCHIVE,
    DataError,
    Progress,
    Request,
    Source,
    content_hashes,
    damage,
    first_line,
)
from musigma.data.readers.cifar import CIFAR, idx_array, idx_images
from musigma.data.readers.images import holds_many, read_files
from musigma.data.readers.lazy import LazyImages
from musigma.data.readers.pictures import pillow_kinds, resized
from musigma.data.readers.published import BUILT_IN
from musigma.data.readers.remote import fetched, is_url, plain
from musigma.data.readers.tables import as_table, listed, read_csv, read_parquet
from musigma.data.readers.walks import SHARD, Origin, expanded, suffix

__all__ = [
    "BUILT_IN",
    "DataError",
    "LazyImages",
    "Progress",
    "Source",
    "content_hashes",
    "is_url",
    "listed",
    "plain",
    "read",
]


def read(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    allow_constant: bool = False,
    skip_bad: bool = False,
    in_memory: bool | None = None,
    progress: Progress | None = None,
) -> Source:
    """Read a path, a URL or a built-in name, bringing images to (height, width) if one is given.

    >>> read("two-moons").x.shape
    (20000, 2)
    """
    if not str(source).strip():
        raise DataError(f"source is {str(source)!r}: give {UNDERSTOOD}")
    where = plain(str(source)) if is_url(source) else str(source)
    report = progress or (lambda done, total: None)
    request = Request(where, size, skip_bad, in_memory, report)
    try:
        if isinstance(source, str) and source in BUILT_IN:
            found = BUILT_IN[source](report)
        else:
            path = fetched(str(source), request) if is_url(source) else source
            found = _read_path(Path(path).expanduser(), request)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{where}: {reason}: give a path that can be read") from error
    if 0 in found.x.shape:
        raise DataError(f"{where}: holds no examples (its shape is {found.x.shape})")
    if found.x.dtype != np.uint8 and size is not None:
        raise DataError(f"{where}: is a table, and size={_said(size)} is for images: leave it out")
    if found.x.dtype != np.uint8:
        found = as_table(found, request, allow_constant)
    elif isinstance(found.x, np.ndarray):
        found = _as_levels(found, request)
    if in_memory and isinstance(found.x, np.memmap):
        found = replace(found, x=np.array(found.x))
    return replace(found, notes=tuple(request.notes))


def _as_levels(found: Source, request: Request) -> Source:
    """Images of the size that is asked for; of files beyond memory, with their hashes."""
    x, size = found.x, request.size
    if size and x.shape[2:] != size:
        shape = (*x.shape[:2], *size)
        make = partial(resized, x, size, request)
        x = derived(x, f"size {_said(size)}", shape, np.uint8, make, request)
    known = facts(x, request, lambda start, block: None)
    return replace(found, x=x, hashes=known.get("hashes"))


def _said(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else "x".join(map(str, size))


def _read_path(path: Path, request: Request) -> Source:
    name, where = path.name.lower(), request.where
    if path.is_dir():
        return _read_folder(path, request)
    if not path.exists():
        shards = [Path(part) for part in expanded(str(path))]
        if len(shards) > 1:
            return _read_shards(shards, request)
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"{where}: no such file, folder or built-in set: {hint}give {UNDERSTOOD}")
    if ARCHIVE.fullmatch(name):
        return read_files(Origin.of_files([path], archives=True), request)
    if path.suffix.lower() in READERS:
        with damage(where):
            return READERS[path.suffix.lower()](path, request)
    if path.suffix.lower() in pillow_kinds()[1] or CIFAR.fullmatch(path.name):
        return read_files(Origin.of_files([path]), request)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\x00\x00", b"\x1f\x8b"):  # the magic of IDX, and of gzip around it
        return Source(idx_images(idx_array(path.read_bytes(), where), where))
    hint = "the URL of a folder ends with /; " if where.startswith(("http:", "https:")) else ""
    raise DataError(f"{where}: is of no kind that is understood: {hint}give {UNDERSTOOD}")


def _read_folder(path: Path, request: Request) -> Source:
    """A folder of images; or, where there are none, of tar shards or parts of a table."""
    origin = Origin.of_folder(path)
    kinds = {suffix(file.name) for file in origin.files}
    if not (kinds & pillow_kinds()[1] or any(holds_many(file.name) for file in origin.files)):
        if any(SHARD.fullmatch(file.name) for file in origin.files):
            return read_files(origin.shards(), request)
        if ".parquet" in kinds:
            parts = [file.name for file in origin.files if suffix(file.name) == ".parquet"]
            return read_parquet([path / part for part in parts], request)
    return read_files(origin, request)


def _read_shards(paths: list[Path], request: Request) -> Source:
    """The files that a pattern stands for."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{request.where}: there is no {path}: give a range of files that are")
    if all(SHARD.fullmatch(path.name) for path in paths):
        return read_files(Origin.of_files(paths, archives=True), request)
    if all(path.suffix.lower() == ".parquet" for path in paths):
        return read_parquet(paths, request)
    raise DataError(f"{request.where}: stands for files that are not all .tar, or all .parquet")


READERS: dict[str, Callable[[Path, Request], Source]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": read_csv,
    ".parquet": lambda path, request: read_parquet([path], request),
}
UNDERSTOOD = (
    "a folder or archive (.tar, .tar.gz, .tar.xz, .zip) of images, IDX files or CIFAR batches; "
    "shards, as a folder or shards-{0000..0099}.tar; an .npy, .npz, .csv, .parquet or IDX file; "
    f"a URL; or one of {', '.join(BUILT_IN)}"
)
