"""Context from other files, with a row for each example, matched by name or by order."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from musigma.data.assembly import as_given, refuse_twice
from musigma.data.dataset import Dataset, Given
from musigma.data.errors import DataError, damage, listing, named
from musigma.data.raw import Request
from musigma.data.readers import TABLES, is_url, load
from musigma.data.tables import Table, Words, names_rows
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
) -> Dataset:
    """A data set with further context, from a file with a row for each example.

    Each column of a table is a variable: text becomes classes, numbers stay numbers. An array
    (.npy) or a folder of images is one variable with the name of the file; an .npz has an array
    for each variable. If a column of the table, or the names of the images, contain the name of
    every example (its file name, with or without folders and suffix), rows are matched by it.
    Otherwise the counts must be equal, and rows are taken in order; a note says so.

    Args:
        dataset: The data.
        source: A .csv, .tsv, .parquet, .npy or .npz file, or a folder of images.
        columns: The variables to take; by default all.
        allow_constant: Accept constant variables, which a trained model can be given.

    Raises:
        DataError: If examples have no row, values are missing or constant, or names are taken;
            all faults are named.
    """
    request = Request(f"given: {source}")
    variables, names = _read(source, columns, request, constant=allow_constant)
    taken = sorted(set(variables) & {*dataset.given, *dataset.columns, "label"})
    if taken:
        raise request.error(f"the names {named(taken, 20)} are already taken: choose others")
    n = len(next(iter(variables.values()), ()))
    rows = _matched(n, names, dataset, request)
    given = {name: value.subset(rows) for name, value in variables.items()}
    notes = (*dataset.notes, *request.notes)
    return replace(dataset, given={**dataset.given, **given}, notes=notes)


def given_rows(sources: Iterable[str | Path], variables: Sequence[Variable]) -> dict[str, Given]:
    """Rows of a context from files, for generating examples; other variables are ignored.

    Raises:
        DataError: If a variable is in no file, or the files differ in their numbers of rows.
    """
    found: dict[str, Given] = {}
    for source in sources:
        request = Request(f"given: {source}")
        names = [v.name for v in variables]
        known, _ = _read(source, (), request, constant=True, wanted=names)
        if len(variables) == 1 and len(known) == 1:  # an array has no name to match
            known = {variables[0].name: next(iter(known.values()))}
        found |= {v.name: known[v.name] for v in variables if v.name in known}
    if missing := [v.name for v in variables if v.name not in found]:
        raise DataError(f"given: no file holds {named(missing, 20)}: give a column of that name")
    if len({len(value) for value in found.values()}) > 1:
        counts = ", ".join(f"{len(value)} of {name}" for name, value in found.items())
        raise DataError(f"given: the numbers of rows differ, {counts}: make them equal")
    return {v.name: _classes(found[v.name]) if v.classes else found[v.name] for v in variables}


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
    constant: bool,
    wanted: Sequence[str] | None = None,
) -> tuple[dict[str, Given], dict[str, list[str]]]:
    """The contents of a file: variables, and columns that may name the examples."""
    path, names, faults = Path(source).expanduser(), {}, {}
    ending = path.suffix.lower()
    given: dict[str, Given | np.ndarray] = {}
    with damage(request.where):
        if ending in TABLES:
            table = TABLES[ending](path, request)
            _check_columns(columns, table.names, request)
            given, names = _of_table(table, wanted or columns, request)
        elif ending == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                _check_columns(columns, arrays.files, request)
                given = {name: arrays[name] for name in columns or arrays.files}
        elif ending == ".npy" and np.load(path, mmap_mode="r").ndim < 3:
            given = {path.stem: np.load(path, allow_pickle=False)}
        else:
            images = load(path)
            request.notes.extend(images.notes)
            given = {path.stem: images.array}  # pyright: ignore[reportAssignmentType]
            names = {"": list(images.ids or ())}
    variables = {}
    for name, content in given.items():
        try:
            variables[name] = content if isinstance(content, Given) else _of_array(content)
        except DataError as error:
            faults[name] = str(error)
            continue
        values = variables[name].values
        if not constant and values.dtype != np.uint8 and len(values) > 1:
            same = np.flatnonzero((values == values[:1]).reshape(len(values), -1).all(0))
            if len(same):
                which = f" in columns {named(list(map(str, same)))}" if values.ndim == 2 else ""
                faults[name] = f"is constant{which}, so it carries no information: drop it"
    if faults:
        raise request.error(f"cannot be used:\n{listing(faults)}")
    return variables, names


def _check_columns(columns: Sequence[str], known: Sequence[str], request: Request) -> None:
    if missing := [name for name in columns if name not in known]:
        raise request.error(f"has no {named(missing, 20)}: give some of {named(known, 20)}")


def _of_array(array: np.ndarray) -> Given:
    if array.dtype.kind in "US":
        return Given.of_text(array.astype("U"))
    images = array.dtype == np.uint8 and array.ndim == 4
    return Given(array if images else array.astype(np.float32))


def _of_table(
    table: Table, columns: Sequence[str], request: Request
) -> tuple[dict[str, Given | np.ndarray], dict[str, list[str]]]:
    if not table.names:
        raise request.error("its columns have no names: add a first line of names")
    refuse_twice(table.names, request)
    faults = dict(table.ragged)
    variables, names = {}, {}
    for j, name in enumerate(table.names):
        if name not in columns and names_rows(table, j):
            names[name] = table.cells(j)
        elif name in columns or not columns:
            cells, wrong = table.column(j)
            for i in np.flatnonzero(wrong).tolist():
                value = None if isinstance(cells, Words) else float(cells[i])
                faults.update([table.fault(i, j, value)])
            if not wrong.any():
                variables[name] = as_given(cells, np.arange(table.rows))
    if faults:
        raise request.error(f"{len(faults)} cells cannot be used; fill them:\n{listing(faults)}")
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
