"""Context from another file: a row for each example, matched by name or by order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.columns import Table, given_column, is_missing
from musigma.data.common import Request, all_faults, damage, listing, named
from musigma.data.dataset import Dataset, load
from musigma.data.given import Given
from musigma.data.readers import READERS, DataError, is_url
from musigma.data.readers.delimited import read_table
from musigma.data.readers.parquet import read_parquet_table

__all__ = ["attach", "is_source"]

TABLES = (".csv", ".tsv", ".parquet")


def is_source(item: str) -> bool:
    """Whether what is given names a file, a folder or a URL, rather than columns."""
    return is_url(item) or Path(item).suffix.lower() in READERS or Path(item).exists()


def attach(dataset: Dataset, source: str | Path, *, columns: Sequence[str] = ()) -> Dataset:
    """A data set with further context, from a file with a row for each example.

    Each column of a table becomes one variable: text becomes classes, numbers stay numbers. An
    array (.npy) or a folder of images becomes one variable with the name of the file; an .npz
    holds one array for each variable. If a column of the table has the name of every example (its
    file name, with or without folders and suffix), rows are matched by it. Otherwise the counts
    must be equal, and rows are taken in order; a note says so.

    Args:
        dataset: The data.
        source: A .csv, .tsv, .parquet, .npy or .npz file, or a folder of images.
        columns: The columns to take; by default all but the one with the names.

    Raises:
        DataError: If rows are missing, values are missing or constant, or names are taken; all
            faults are named.
    """
    path, where = Path(source).expanduser(), f"given: {source}"
    request = Request(where)
    if path.suffix.lower() in TABLES:
        found = _of_table(path, dataset, columns, request)
    elif path.suffix.lower() == ".npz":
        with damage(where), np.load(path, allow_pickle=False) as arrays:
            names = columns or arrays.files
            values = {name: _of_array(arrays[name], where, name) for name in names}
        found = _in_order(values, dataset, request)
    elif path.suffix.lower() == ".npy":
        with damage(where):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim > 2:
            found = _of_images(path, dataset, request)
        else:
            found = _in_order({path.stem: _of_array(array, where, path.stem)}, dataset, request)
    else:
        found = _of_images(path, dataset, request)
    taken = sorted(set(found) & {*dataset.given, *dataset.columns, "label"})
    if taken:
        raise DataError(f"{where}: the names {named(taken, 20)} are taken: give others")
    return replace(
        dataset,
        given={**dataset.given, **found},
        notes=(*dataset.notes, *(note.replace("given: ", "", 1) for note in request.notes)),
    )


def _of_table(
    path: Path, dataset: Dataset, columns: Sequence[str], request: Request
) -> dict[str, Given]:
    read = read_parquet_table if path.suffix.lower() == ".parquet" else read_table
    with damage(request.where):
        table: Table = read(path, request)
    if not table.names:
        raise DataError(f"{request.where}: its columns have no names: add a first line of names")
    if table.ragged:
        raise DataError(f"{request.where}: rows are cut off:\n{listing(table.ragged)}")
    by, rows = _matched(table, dataset, request)
    if missing := [name for name in columns if name not in table.names]:
        raise DataError(
            f"{request.where}: has no column {named(missing, 20)}: give one of "
            f"{named(table.names, 20)}"
        )
    wanted = columns or [name for j, name in enumerate(table.names) if j != by]
    faults: dict[str, str] = {}
    for name in wanted:
        j = table.names.index(name)
        if table.kinds[j] == "text":
            cells = table.cells(j)
            bad = [i for i in rows.tolist() if is_missing(cells[i])]
            constant = len({cells[i].strip() for i in rows.tolist()}) == 1
        else:
            values = table.values[rows, j]
            bad = [int(rows[k]) for k in np.flatnonzero(~np.isfinite(values))]
            constant = len(np.unique(values)) == 1
        for i in bad:
            faults[f"{table.row_name(i)}, {table.called(j)}"] = table.cell_fault(i, j)
        if constant and len(rows) > 1:
            faults[table.called(j)] = "is constant, and tells nothing: drop it"
    if faults:
        text = all_faults(faults, "cells and columns", table.values.size)
        text = text.replace(", or pass --skip-bad to leave them out", "")
        raise DataError(f"{request.where}: {text.replace(', or pass --skip-bad', '')}")
    return {name: given_column(table, table.names.index(name), rows) for name in wanted}


def _matched(table: Table, dataset: Dataset, request: Request) -> tuple[int | None, np.ndarray]:
    """The column that names examples, and the row of each example."""
    n, ids = len(table.values), dataset.ids or ()
    best, missing = None, list(ids)
    for j in range(len(table.names)) if ids else ():
        row = {_short(cell): i for i, cell in enumerate(table.cells(j))}
        for key in (_short, _base):
            keys = [key(name) for name in ids]
            absent = [name for name, k in zip(ids, keys, strict=True) if k not in row]
            if not absent and len(row) == n:
                request.note(f"rows are matched with examples by the column {table.names[j]!r}")
                return j, np.array([row[k] for k in keys])
            if len(absent) < len(missing):
                best, missing = j, absent
    if best is not None and len(missing) < len(ids) / 2:
        raise DataError(
            f"{request.where}: the column {table.names[best]!r} names examples, and lacks "
            f"{len(missing)} of {len(ids)}: {named(missing, 20)}"
        )
    _check_counts(n, dataset, request)
    return None, np.arange(n)


def _short(name: str) -> str:
    """A file name without its suffix."""
    folder, slash, base = name.strip().rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _base(name: str) -> str:
    """A file name without folders and suffix."""
    return _short(name).rpartition("/")[2]


def _check_counts(n: int, dataset: Dataset, request: Request) -> None:
    if n != len(dataset):
        raise DataError(
            f"{request.where}: has {n} rows for {len(dataset)} examples, and no column that names "
            "them: give one row for each, or a column of file names"
        )
    request.note("rows are taken in the order of the examples")


def _in_order(values: dict[str, Given], dataset: Dataset, request: Request) -> dict[str, Given]:
    for given in values.values():
        _check_counts(len(given), dataset, request)
    return values


def _of_array(array: Any, where: str, name: str) -> Given:
    """An array as context: text becomes classes; numbers become float32."""
    if array.dtype.kind in "US":
        return Given.of_text(array.astype("U"))
    if array.dtype.kind not in "buif" or array.ndim not in (1, 2):
        raise DataError(
            f"{where}: {name} is {array.dtype} of shape {array.shape}: give numbers or text (N,), "
            "or numbers (N, F)"
        )
    flat = np.asarray(array, np.float32)
    constant = np.flatnonzero((flat == flat[:1]).reshape(len(flat), -1).all(0))
    if len(flat) > 1 and len(constant):
        columns = "" if flat.ndim == 1 else f", column {', '.join(map(str, constant[:20]))},"
        raise DataError(f"{where}: {name}{columns} is constant, and tells nothing: drop it")
    try:
        return Given(flat)
    except DataError as error:
        raise DataError(f"{where}: {name}: {error}") from None


def _of_images(path: Path, dataset: Dataset, request: Request) -> dict[str, Given]:
    """Images as context, matched by their names without folders and suffixes, or by order."""
    images = load(path)
    if images.bits is None:
        raise DataError(f"{request.where}: holds no images")
    request.notes.extend(images.notes)
    ids, keys = dataset.ids, {}
    if ids and images.ids:
        for key in (_short, _base):
            keys = {key(name): i for i, name in enumerate(images.ids)}
            wanted = [key(name) for name in ids]
            if len(keys) == len(images) and all(name in keys for name in wanted):
                request.note("images are matched with examples by their names")
                rows = np.array([keys[name] for name in wanted])
                return {path.stem: Given(images.array).subset(rows)}
    _check_counts(len(images), dataset, request)
    return {path.stem: Given(images.array)}
