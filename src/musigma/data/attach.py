"""Context from other files, with a row for each example, matched by name or by order."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from musigma.data.assembly import as_given, refuse_twice
from musigma.data.cache import float32
from musigma.data.dataset import Dataset, Given
from musigma.data.errors import DataError, damage, listing, named
from musigma.data.pairs import unusable_cells, varying
from musigma.data.raw import Request
from musigma.data.readers import TABLES, LazyImages, is_url, load
from musigma.data.sequences import unusable
from musigma.data.tables import Table, Words, as_lists, list_fault, names_rows
from musigma.spec import Variable

__all__ = ["attach", "given_rows", "is_source"]


def is_source(item: str) -> bool:
    """Whether an item of what is given names a file, a folder or a URL, rather than columns."""
    return (
        is_url(item)
        or Path(item).suffix.lower() in (*TABLES, ".npy", ".npz")
        or Path(item).exists()
    )


def attach(
    dataset: Dataset,
    source: str | Path,
    *,
    columns: Sequence[str] = (),
    allow_constant: bool = False,
    skip_bad: bool = False,
) -> Dataset:
    """A data set with further context, from a file with a row for each example.

    Each column of a table is a variable: text becomes classes, numbers stay numbers, and lists of
    numbers are sequences. An array (.npy) or a folder of images is one variable with the name of
    the file; an .npz has an array for each variable. Arrays of floats (N, M, F) are sequences. If
    a column of the table, or the names of the images, contain the name of every example (its file
    name, with or without folders and suffix), rows are matched by it. Otherwise the counts must
    be equal, and rows are taken in order; a note says so.

    Args:
        dataset: The data.
        source: A .csv, .tsv, .parquet, .npy or .npz file, or a folder of images.
        columns: The variables to take; by default all.
        allow_constant: Accept constant variables, which a trained model can be given.
        skip_bad: Leave out constant variables, and examples whose rows cannot be used.

    Raises:
        DataError: If examples have no row, values are missing or constant, or names are taken;
            all faults are named.
    """
    request = Request(f"given: {source}", allow_constant=allow_constant, skip_bad=skip_bad)
    variables, names, usable = _read(source, columns, request)
    taken = sorted(set(variables) & {*dataset.given, *dataset.columns, "label"})
    if taken:
        raise request.error(f"the names {named(taken, 20)} are already taken: choose others")
    rows = _matched(len(usable), names, dataset, request)
    if len(bad := np.flatnonzero(~usable[rows])):
        request.note(f"{len(bad):,} of {len(rows):,} examples left out: their rows cannot be used")
        kept = np.flatnonzero(usable[rows])
        dataset, rows = dataset.subset(kept), rows[kept]
    rows = (np.cumsum(usable) - 1)[rows]
    given = {name: value.subset(rows) for name, value in variables.items()}
    notes = (*dataset.notes, *request.notes)
    return replace(dataset, given={**dataset.given, **given}, notes=notes)


def given_rows(sources: Iterable[str | Path], variables: Sequence[Variable]) -> dict[str, Given]:
    """Rows of a context from files, for generating examples; other variables are ignored.

    Raises:
        DataError: If a variable is in no file or in several, a file is not there or has no rows,
            or the files differ in their numbers of rows.
    """
    return observations(sources, variables)[0]


def observations(
    sources: Iterable[str | Path], variables: Sequence[Variable]
) -> tuple[dict[str, Given], tuple[str, ...] | None]:
    """Rows of a context from files, as `given_rows` returns them, and their names, if any.

    The names are those in the first column that names the rows of a table (`id`, for instance).
    """
    found: dict[str, Given] = {}
    ids: tuple[str, ...] | None = None
    wanted = [v.name for v in variables]
    arrays: list[str] = []
    for source in sources:
        request = Request(f"given: {source}", allow_constant=True)
        known, names, _ = _read(source, (), request, wanted=wanted)
        ids = ids or next((tuple(cells) for name, cells in names.items() if name), None)
        if len(variables) == 1 and len(known) == 1:  # an array has no name to match
            known = {variables[0].name: next(iter(known.values()))}
        if empty := [name for name in wanted if name in known and not len(known[name])]:
            raise request.error(f"has no rows of {named(empty, 20)}: give one or more")
        if twice := [name for name in wanted if name in known and name in found]:
            raise request.error(
                f"{named(twice, 20)} are also in a file before it: give one of them"
            )
        if Path(source).suffix.lower() == ".npy" and not set(known) & set(wanted):
            arrays.append(str(source))
        found |= {name: known[name] for name in wanted if name in known}
    if missing := [name for name in wanted if name not in found]:
        hint = f" ({named(arrays)} has no names of columns: write a .csv or .parquet)"
        raise DataError(
            f"given: no file holds {named(missing, 20)}: give a column of that name"
            f"{hint if arrays else ''}"
        )
    if len({len(value) for value in found.values()}) > 1:
        counts = ", ".join(f"{len(value)} of {name}" for name, value in found.items())
        raise DataError(f"given: the numbers of rows differ, {counts}: make them equal")
    rows = {v.name: _classes(found[v.name]) if v.classes else found[v.name] for v in variables}
    return rows, ids


def _classes(given: Given) -> Given:
    """A variable of classes, whose names may be numbers."""
    if given.names or given.values.ndim != 1:
        return given
    return Given.of_text([f"{value:g}" for value in given.values])


def _read(
    source: str | Path,
    columns: Sequence[str],
    request: Request,
    *,
    wanted: Sequence[str] | None = None,
) -> tuple[dict[str, Given], dict[str, list[str]], np.ndarray]:
    """The contents of a file: variables, columns that may name the examples, and usable rows.

    The variables have the usable rows alone; the last result is a mask of them.
    """
    path, names, faults = Path(source).expanduser(), {}, {}
    ending = path.suffix.lower()
    given: dict[str, Cells] = {}
    if ending in (*TABLES, ".npy", ".npz") and not is_url(str(source)) and not path.exists():
        raise request.error("there is no such file")
    with damage(request.where):
        if ending in TABLES:
            table = TABLES[ending](path, request)
            _check_columns(columns, table.names, request)
            given, names = _of_table(table, wanted or columns, request)
        elif ending == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                _check_columns(columns, arrays.files, request)
                given = {name: _of_array(arrays[name]) for name in columns or arrays.files}
        elif ending == ".npy" and not _are_images(np.load(path, mmap_mode="r")):
            given = {path.stem: _of_array(np.load(path, allow_pickle=False))}
        else:
            images = load(path)
            request.notes.extend(images.notes)
            given = {path.stem: images.array}
            names = {"": list(images.ids or ())}
    counts = {name: len(c.codes if isinstance(c, Words) else c) for name, c in given.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} of {name}" for name, n in counts.items())
        raise request.error(f"the numbers of rows differ, {listed}: make them equal")
    usable = np.ones(next(iter(counts.values()), 0), bool)
    for cells in given.values() if request.skip_bad else ():
        usable &= ~_unusable(cells)
    variables = {}
    for name, cells in given.items():
        try:
            variables[name] = _given(cells, usable)
        except DataError as error:
            faults[name] = str(error)
    variables, constant = varying(variables, request)
    if faults := faults | constant:
        raise request.error(f"cannot be used:\n{listing(faults)}")
    return variables, names, usable


Cells = np.ndarray | LazyImages | Words
"""The rows of a variable: numbers, sequences, images or words."""


def _unusable(cells: Cells) -> np.ndarray:
    """A mask of the rows that cannot be used."""
    if isinstance(cells, Words):
        return cells.missing()
    return np.zeros(len(cells), bool) if cells.dtype == np.uint8 else unusable(np.asarray(cells))


def _given(cells: Cells, usable: np.ndarray) -> Given:
    """The usable rows of a variable."""
    if isinstance(cells, Words) or cells.dtype != np.uint8:
        return as_given(cells, np.flatnonzero(usable))  # pyright: ignore[reportArgumentType]
    images = Given(cells)  # pyright: ignore[reportArgumentType]
    return images if usable.all() else images.subset(np.flatnonzero(usable))


def _of_array(array: np.ndarray) -> Cells:
    """An array as numbers, sequences, images or words."""
    if array.dtype.kind in "US":
        names, codes = np.unique(array.astype("U"), return_inverse=True)
        return Words(names.tolist(), codes)
    images = array.dtype == np.uint8 and array.ndim > 2
    return array if images else float32(array)


def _are_images(array: np.ndarray) -> bool:
    """Whether an array holds images, rather than numbers or sequences of numbers."""
    return array.ndim > 3 or (array.ndim == 3 and array.dtype.kind != "f")


def _check_columns(columns: Sequence[str], known: Sequence[str], request: Request) -> None:
    if missing := [name for name in columns if name not in known]:
        raise request.error(f"has no {named(missing, 20)}: give some of {named(known, 20)}")


def _of_table(
    table: Table, columns: Sequence[str], request: Request
) -> tuple[dict[str, Cells], dict[str, list[str]]]:
    if not table.names:
        raise request.error("its columns have no names: add a first line of names")
    refuse_twice(table.names, request)
    faults = dict(table.ragged)
    variables: dict[str, Cells] = {}
    names = {}
    for j, name in enumerate(table.names):
        if name not in columns and names_rows(table, j):
            names[name] = table.cells(j)
        elif name in columns or not columns:
            if (lists := as_lists(table, j)) is not None:
                faults[table.called(j)] = list_fault(lists)
                continue
            cells, wrong = table.column(j)
            variables[name] = cells if isinstance(cells, Words) else float32(cells)
            rows = np.flatnonzero(wrong)
            if len(rows) and not isinstance(cells, Words) and cells.ndim == 3:
                faults[table.called(j)] = unusable_cells(table, j, rows, cells[rows])
                continue
            for i in rows.tolist() if not request.skip_bad else ():
                value = None if isinstance(cells, Words) else float(cells[i])
                faults.update([table.fault(i, j, value)])
    if faults and not request.skip_bad:
        what = "1 cell or column" if len(faults) == 1 else f"{len(faults)} cells"
        raise request.error(f"{what} cannot be used; fill them:\n{listing(faults)}")
    return variables, names


def _matched(
    n: int, names: Mapping[str, list[str]], dataset: Dataset, request: Request
) -> np.ndarray:
    """The row of each example."""
    ids = dataset.ids or ()
    nearest, missing = "", list(ids)
    for column, cells in names.items() if ids else ():
        for key in (_without_suffix, _base):
            rows = {key(cell): i for i, cell in enumerate(cells)}
            absent = [name for name in ids if key(name) not in rows]
            if len(rows) == len(cells) and not absent:
                by = f"the column {column!r}" if column else "their names"
                request.note(f"rows are matched with examples by {by}")
                return np.array([rows[key(name)] for name in ids])
            if len(absent) < len(missing):
                nearest, missing = column, absent
    if len(missing) < len(ids) / 2:
        by = f"the column {nearest!r} names" if nearest else "the images name"
        raise request.error(
            f"{by} examples, and {len(missing)} of {len(ids)} are missing: {named(missing, 20)}"
        )
    if n != len(dataset):
        raise request.error(
            f"has {n} rows for {len(dataset)} examples, and no column that names "
            "them: give one row for each, or a column of file names"
        )
    request.note("rows are taken in the order of the examples")
    return np.arange(n)


def _without_suffix(name: str) -> str:
    return posixpath.splitext(name.strip())[0]


def _base(name: str) -> str:
    return posixpath.basename(_without_suffix(name))
