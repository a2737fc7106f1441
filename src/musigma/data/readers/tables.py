"""Tables: .csv, and .parquet in one file or many."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.readers.arrays import Check, as_labels, blocks, derived, facts
from musigma.data.readers.base import DataError, Request, Source, damage, missing

LABEL_COLUMNS = ("label", "class", "target", "y")
LARGEST = np.finfo(np.float32).max
COARSE = 1e-3  # of a column's range: float32 steps that leave a grid of it


def as_table(found: Source, request: Request, allow_constant: bool) -> Source:
    """float32 (N, D), finite, and with no constant column; float32 files stay memory-mapped."""
    x, columns = found.x, found.columns
    check = partial(_check_finite, columns, request.where)
    if x.dtype != np.float32:
        make = partial(_float32, blocks(x), check)
        x = derived(x, "float32", x.shape, np.float32, make, request)
    known = facts(x, request, check)
    low, high = known["low"], known["high"]
    constant = np.flatnonzero(low == high)
    if len(constant) and not allow_constant:
        if len(x) == 1:
            raise DataError(f"{request.where}: holds a single example: give more")
        names, verb = listed(columns, constant), "are" if len(constant) > 1 else "is"
        raise DataError(
            f"{request.where}: {names} {verb} constant in float32, where a density is infinite: "
            "drop it, or subtract an offset"
        )
    step = np.spacing(np.maximum(abs(low), abs(high)).astype(np.float32))
    coarse = np.flatnonzero((step > COARSE * (high - low)) & (low < high))
    if len(coarse):
        request.notes.append(
            f"{request.where}: float32 leaves few different values of {listed(columns, coarse)}: "
            "subtract an offset"
        )
    return replace(found, x=x, hashes=known.get("hashes"))


def listed(columns: Sequence[str], which: Sequence[int] | np.ndarray) -> str:
    """Columns by their names, or their numbers where they have none; five at most."""
    names = ", ".join(_called(columns, int(i)) for i in which[:5])
    return names + (", ..." if len(which) > 5 else "")


def _float32(rows: Iterable[np.ndarray], check: Check) -> Iterator[np.ndarray]:
    start = 0
    for block in rows:
        check(start, block)
        start += len(block)
        yield block.astype(np.float32)


def _called(columns: Sequence[str], column: int) -> str:
    return f"column {columns[column]!r}" if columns else f"column {column} (from 0)"


def _check_finite(columns: Sequence[str], where: str, start: int, block: np.ndarray) -> None:
    usable = np.abs(block) <= LARGEST
    if not usable.all():
        row, column = map(int, np.argwhere(~usable)[0])
        value = block[row, column]
        what = f"{where}: row {start + row} (from 0), {_called(columns, column)} is {value}"
        if np.isfinite(value):
            raise DataError(f"{what}, too large for float32: rescale it")
        raise DataError(f"{what}: drop or fill such rows")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_header(row: Sequence[str]) -> bool:
    """Names, none of them a number; or numbers that only count, as pandas writes them."""
    if not any(map(_is_number, row)):
        return True
    counts = row[:-1] if row[-1].strip().lower() in LABEL_COLUMNS else row
    return len(row) > 1 and list(counts) == [str(i) for i in range(len(counts))]


def read_csv(path: Path, request: Request) -> Source:
    """A .csv table of numbers, with or without a header."""
    where = request.where
    with path.open(encoding="utf-8-sig", newline="") as file:
        sample = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=sample.count))
        rows = (row for row in reader if row)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{where}: is empty: give a table of numbers")
        columns: tuple[str, ...] = ()
        if _is_header(first):
            columns = tuple(cell.strip() for cell in first)
            if "" in columns:
                raise DataError(
                    f"{where}: column {columns.index('') + 1} has no name, an index perhaps: name "
                    "it or write the file without it"
                )
        else:
            rows = chain([first], rows)
        labelled = len(first) > 1 and bool(columns) and columns[-1].lower() in LABEL_COLUMNS
        values, last = array("d"), []
        for row in rows:
            if len(row) != len(first):
                raise DataError(
                    f"{where}: line {reader.line_num} has {len(row)} cells and the first line "
                    f"{len(first)}: make them equal"
                )
            cells = row[:-1] if labelled else row
            try:
                values.extend(map(float, cells))
            except ValueError:
                at = next(i for i, cell in enumerate(cells) if not _is_number(cell))
                name = repr(columns[at]) if columns else str(at + 1)
                raise DataError(
                    f"{where}: line {reader.line_num}, column {name} is {cells[at]!r}, not a "
                    "number: fill or drop it (strings may stand in a last column 'label')"
                ) from None
            if labelled:
                last.append(row[-1].strip())
    x = np.array(values).reshape(-1, len(first) - labelled)
    if not last:
        return Source(x, columns=columns[: x.shape[1]])
    y = _label_values(np.array(last))
    if y is None:
        return Source(np.column_stack([x, np.array(last, np.float64)]), columns=columns)
    name = first[-1].strip()
    labels, names = as_labels(y, len(x), f"{where}: column {name!r}")
    _tell_of_labels(name, request)
    return Source(x, labels, names, columns=columns[:-1])


def _tell_of_labels(column: str, request: Request) -> None:
    request.notes.append(
        f"{request.where}: column {column!r} is taken as labels; rename it if it is data"
    )


def _label_values(last: np.ndarray) -> np.ndarray | None:
    """A last column as labels, whole numbers or strings; None if it holds fractions, as data."""
    if last.dtype.kind == "U" and all(map(_is_number, last)):
        last = last.astype(np.float64)
    if last.dtype.kind != "f":
        return last
    whole = np.isfinite(last) & (last == np.rint(last)) & (abs(last) < 2**53)
    return last.astype(np.int64) if whole.all() else None


class _Parquet:
    """The .parquet files of a table, read in batches of rows."""

    def __init__(self, paths: Sequence[Path], request: Request):
        try:
            import pyarrow as pa
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise missing(f"{request.where}: reading .parquet", "pyarrow", "tables") from error
        self.paths, self.request, self._open = paths, request, parquet.ParquetFile
        self.rows = 0
        self.columns: tuple[str, ...] = ()
        for path in paths:
            with damage(str(path)), self._open(path) as file:
                schema = file.schema_arrow
                self.rows += file.metadata.num_rows
            names = tuple(schema.names)
            if names and names[-1] == "__index_level_0__":
                names = names[:-1]  # pandas' index is no datum
            if path != paths[0] and names != self.columns:
                raise DataError(
                    f"{path}: has the columns {', '.join(names)}, and {paths[0].name} has "
                    f"{', '.join(self.columns)}: make them equal"
                )
            self.columns = names
            for name in names[:-1] if self.labelled else names:
                kind = schema.field(name).type
                if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                    raise DataError(
                        f"{path}: column {name!r} is {kind}, not a number: convert or drop it"
                    )

    @property
    def labelled(self) -> bool:
        """Whether the last column's name is one of a label."""
        return len(self.columns) > 1 and self.columns[-1].lower() in LABEL_COLUMNS

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns, in batches of rows that take some megabytes."""
        step, done = max(1, (1 << 21) // max(1, len(columns))), 0
        for path in self.paths:
            with damage(str(path)), self._open(path) as file:
                for batch in file.iter_batches(step, columns=list(columns)):
                    yield batch
                    self.request.report(done := done + batch.num_rows, self.rows)

    def values(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """Numbers, float64 (rows, columns)."""
        for batch in self.batches(columns):
            block = np.empty((batch.num_rows, len(columns)), np.float64)
            for i, column in enumerate(batch.columns):
                block[:, i] = column.to_numpy(zero_copy_only=False)  # a null becomes NaN
            yield block

    def labels(self) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """The last column as labels; None if it is data."""
        numbers: dict[Any, int] = {}
        codes, where = [], f"{self.request.where}: column {self.columns[-1]!r}"
        for batch in self.batches(self.columns[-1:]):
            column = batch.column(0)
            if column.null_count:
                raise DataError(f"{where} has nulls: fill or drop such rows")
            column = column.dictionary_encode()
            values = column.dictionary.to_pylist()
            if isinstance(values[0], float) and _label_values(np.array(values)) is None:
                return None  # at the first fraction: there may be as many as there are rows
            code = np.array([numbers.setdefault(value, len(numbers)) for value in values])
            codes.append(code[column.indices.to_numpy()])
        values = _label_values(np.array(list(numbers)))
        if values is None:
            return None
        labels, names = as_labels(values, len(numbers), where)
        return labels[np.concatenate(codes)], names


def read_parquet(paths: Sequence[Path], request: Request) -> Source:
    """A table of numbers in one .parquet file, or in several with the same columns."""
    files = _Parquet(paths, request)
    name = "\n".join(str(path.resolve()) for path in paths)
    about = {"source": name, "version": [cache.stamp(path) for path in paths]}
    if not files.rows:
        return Source(np.empty((0, len(files.columns)), np.float32))
    labels, names = None, ()
    if files.labelled:

        def build(old: cache.Record | None) -> cache.Record:
            labels, names = files.labels() or (np.empty(0, np.int64), ())
            return cache.Record({}, {"names": names}, {"labels": labels})

        if request.fits(4 * files.rows * len(files.columns)):
            record = build(None)
        else:
            record = cache.kept(cache.place("facts", name, ".npz"), about, build, request)
        labels, names = record.arrays["labels"], tuple(record.info["names"])
    if names:
        _tell_of_labels(files.columns[-1], request)
    columns = files.columns[:-1] if names else files.columns
    check = partial(_check_finite, columns, request.where)
    x = cache.flat(
        f"{name}\nparquet",
        {**about, "columns": columns},
        (files.rows, len(columns)),
        np.float32,
        lambda: _float32(files.values(columns), check),
        request,
    )
    return Source(x, labels if names else None, names, columns=columns)
