"""Readers: from whatever holds the data to one array, its labels and its names.

`read` takes a path or a built-in name and answers with a `Source`: images as uint8 levels
0..255 of shape (N, C, H, W), tables and points as float32 (N, D). Folders, tar and zip archives
are one thing here, a *walk*: a function that yields (name, open) for each file, as often as it is
called. Images are walked twice, first for their headers, so that every complaint about sizes and
modes comes before the first pixel is decoded. Nothing is extracted to disk, no pickle is trusted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from musigma.sources.arrays import read_csv, read_numpy, read_parquet, table
from musigma.sources.base import ARCHIVE, DataError, Progress, Source, damage, first_line
from musigma.sources.images import (
    CIFAR,
    idx_array,
    idx_images,
    pillow_kinds,
    read_files,
    resized,
    walk_each,
    walk_folder,
    walk_tar,
    walk_zip,
)
from musigma.sources.published import BUILT_IN


def read(
    source: str | Path,
    *,
    size: int | None = None,
    allow_constant: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Read a path or a built-in name, resizing images to `size` x `size` if one is given.

    >>> read("two-moons").x.shape
    (20000, 2)
    """
    report = progress or (lambda done, total: None)
    if not str(source).strip():
        raise DataError(f"source is {str(source)!r}: give {UNDERSTOOD}")
    try:
        if isinstance(source, str) and source in BUILT_IN:
            found = BUILT_IN[source](report)
        else:
            found = _read_path(Path(source).expanduser(), size, skip_bad, report)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{source}: {reason}: give a path that can be read") from error
    if found.x.size == 0:
        raise DataError(f"{source}: holds no examples (its shape is {found.x.shape})")
    if found.x.dtype == np.uint8:
        return replace(found, x=resized(found.x, size, report)) if size else found
    if size is not None:
        raise DataError(f"{source}: is a table, and size={size} is for images: leave it out")
    return replace(found, x=table(found.x, found.columns, str(source), allow_constant))


def _read_path(path: Path, size: int | None, skip_bad: bool, report: Progress) -> Source:
    name, where = path.name.lower(), str(path)
    if path.is_dir():
        return read_files(partial(walk_folder, path), where, size, skip_bad, report)
    if not path.exists():
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"{where}: no such file, folder or built-in set: {hint}give {UNDERSTOOD}")
    if ARCHIVE.fullmatch(name):
        walk = walk_zip if name.endswith(".zip") else walk_tar
        return read_files(partial(walk, path), where, size, skip_bad, report)
    if path.suffix.lower() in READERS:
        with damage(where):
            return READERS[path.suffix.lower()](path)
    if path.suffix.lower() in pillow_kinds()[1] or CIFAR.fullmatch(path.name):
        return read_files(partial(walk_each, [path]), where, size, skip_bad, report)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\x00\x00", b"\x1f\x8b"):  # the magic of IDX, and of gzip around it
        return Source(idx_images(idx_array(path.read_bytes(), where), where))
    raise DataError(f"{where}: is of no kind that is understood: give {UNDERSTOOD}")


READERS: dict[str, Callable[[Path], Source]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
UNDERSTOOD = (
    "a folder or archive (.tar, .tar.gz, .tar.xz, .zip) of images, IDX files or CIFAR batches; an "
    f".npy, .npz, .csv, .parquet or IDX file; or one of {', '.join(BUILT_IN)}"
)
