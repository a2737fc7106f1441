"""Readers: from whatever holds the data to one array, its labels and its names.

`read` takes a path, a URL or a built-in name and returns `RawData`: images as uint8 levels 0..255
of shape (N, C, H, W), tables and points as float32 (N, D). Data that fit into memory are read into
it; otherwise arrays are memory-mapped (`cache`), and images are decoded when they are indexed
(`lazy_images`). Folders, archives and shards are all a `FileSet`. Pickles are never run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.errors import DataError, damage, first_line
from musigma.data.raw import ARCHIVE, Progress, RawData, Request, content_hashes
from musigma.data.readers.arrays import as_table, derived, facts, read_numpy
from musigma.data.readers.decoding import pillow_kinds, resized
from musigma.data.readers.delimited import read_delimited
from musigma.data.readers.filesets import SHARD, FileSet, expanded, suffix
from musigma.data.readers.idx_cifar import CIFAR, idx_array, idx_images
from musigma.data.readers.image_sets import holds_many, read_files
from musigma.data.readers.lazy_images import LazyImages
from musigma.data.readers.parquet import read_parquet
from musigma.data.readers.published import BUILT_IN
from musigma.data.readers.remote import fetched, is_url, plain

__all__ = [
    "BUILT_IN",
    "DataError",
    "LazyImages",
    "Progress",
    "RawData",
    "content_hashes",
    "is_url",
    "plain",
    "read",
]


def read(source: str | Path, *, allow_constant: bool = False, **options: Any) -> RawData:
    """Read a path, a URL or a built-in name; the options are fields of `Request`.

    >>> read("two-moons").x.shape
    (20000, 2)
    """
    if not str(source).strip():
        raise DataError(f"source is {str(source)!r}: give {UNDERSTOOD}")
    where = plain(str(source)) if is_url(source) else str(source)
    request = Request(where, **options)
    try:
        if isinstance(source, str) and source in BUILT_IN:
            found = BUILT_IN[source](request.report)
        else:
            path = fetched(str(source), request) if is_url(source) else source
            found = _read_path(Path(path).expanduser(), request)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{where}: {reason}: give a path that can be read") from error
    if 0 in found.x.shape and not (found.given and len(found.x)):
        raise DataError(f"{where}: holds no examples (its shape is {found.x.shape})")
    if found.x.dtype != np.uint8:
        if request.size is not None:
            size = _size_text(request.size)
            raise DataError(f"{where}: is a table, and size={size} is for images: leave it out")
        if request.given and not found.given:
            raise DataError(f"{where}: given: its columns have no names: give a file of context")
        found = as_table(found, request, allow_constant)
    else:
        if request.given:
            raise DataError(
                f"{where}: given: {request.given[0]!r} is no file, and these are images, which "
                "have no columns: give 'label', or a file with a row for each image"
            )
        if isinstance(found.x, np.ndarray):
            found = _resized(found, request)
        if request.channels == 3 and found.x.shape[1] == 1:
            request.note("gray images are made RGB, as the model's are")
            found = _in_color(found)
    if request.in_memory and isinstance(found.x, np.memmap):
        found = replace(found, x=np.array(found.x))
    return replace(found, notes=tuple(dict.fromkeys(request.notes)))


def _resized(found: RawData, request: Request) -> RawData:
    """Images of the requested size; of files beyond memory, with their hashes."""
    x, size = found.x, request.size
    if size and x.shape[2:] != size:
        shape = (*x.shape[:2], *size)
        make = partial(resized, x, size, request)
        x = derived(x, f"size {_size_text(size)}", shape, np.uint8, make, request)
    return replace(found, x=x, hashes=facts(x, request).get("hashes"))


def _in_color(found: RawData) -> RawData:
    """Gray images as RGB: the levels are repeated when they are read."""
    n, _, *size = found.x.shape
    shape = (n, 3, *size)
    if isinstance(found.x, LazyImages):
        return replace(found, x=replace(found.x, shape=shape), hashes=None)
    return replace(found, x=np.broadcast_to(found.x, shape), hashes=None)


def _size_text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else "x".join(map(str, size))


def _read_path(path: Path, request: Request) -> RawData:
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
        return read_files(FileSet.of_files([path], archives=True), request)
    if path.suffix.lower() in READERS:
        with damage(where):
            return READERS[path.suffix.lower()](path, request)
    if path.suffix.lower() in pillow_kinds()[1] or CIFAR.fullmatch(path.name):
        return read_files(FileSet.of_files([path]), request)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\x00\x00", b"\x1f\x8b"):  # the magic of IDX, and of gzip around it
        return RawData(idx_images(idx_array(path.read_bytes(), where), where))
    hint = "the URL of a folder ends with /; " if where.startswith(("http:", "https:")) else ""
    raise DataError(f"{where}: its format is unknown: {hint}give {UNDERSTOOD}")


def _read_folder(path: Path, request: Request) -> RawData:
    """A folder of images; or, where it has none, of tar shards or parts of a table."""
    files = FileSet.of_folder(path)
    kinds = {suffix(file.name) for file in files.files}
    if not (kinds & pillow_kinds()[1] or any(holds_many(file.name) for file in files.files)):
        if any(SHARD.fullmatch(file.name) for file in files.files):
            return read_files(files.shards(), request)
        if ".parquet" in kinds:
            parts = [file.name for file in files.files if suffix(file.name) == ".parquet"]
            return read_parquet([path / part for part in parts], request)
    return read_files(files, request)


def _read_shards(paths: list[Path], request: Request) -> RawData:
    """The files that a pattern matches."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DataError(
            f"{request.where}: {len(missing)} of {len(paths)} files do not exist, such as "
            f"{missing[0]}: give a range of existing files"
        )
    if all(SHARD.fullmatch(path.name) for path in paths):
        return read_files(FileSet.of_files(paths, archives=True), request)
    if all(path.suffix.lower() == ".parquet" for path in paths):
        return read_parquet(paths, request)
    raise DataError(f"{request.where}: matches files that are not all .tar, or all .parquet")


READERS: dict[str, Callable[[Path, Request], RawData]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": lambda path, request: read_parquet([path], request),
}
UNDERSTOOD = (
    "a folder or archive (.tar, .tar.gz, .tar.xz, .zip) of images, IDX files or CIFAR batches; "
    "shards, as a folder or shards-{0000..0099}.tar; a file .npy, .npz, .csv, .tsv, .parquet or "
    f"IDX; a URL; or one of {', '.join(BUILT_IN)}"
)
