"""Arrays and tables: .npy, .npz, .csv and .parquet."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from musigma.sources.base import DataError, Source, missing

LABEL_COLUMNS = ("label", "class", "target", "y")


def read_numpy(path: Path) -> Source:
    """An .npy file, memory-mapped where it can be, or an .npz with images or a table."""
    where = str(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        return Source(_levels_or_table(np.load(path, mmap_mode="r", allow_pickle=False), where))
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
        x = _levels_or_table(arrays[data[0]], where)
        if not labels:
            return Source(x)
        return Source(x, *as_labels(arrays[labels[0]], len(x), f"{where}: {labels[0]}"))


def _levels_or_table(x: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8 (N, C, H, W); tables as they are, for `table` to look at."""
    if x.size == 0:
        return x
    if x.dtype.kind not in "buif":
        raise DataError(f"{where}: is of type {x.dtype}: store uint8 images or a float table")
    if x.ndim in (3, 4):
        return as_images(_to_levels(x, where), where)
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


def _blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows in blocks of some megabytes, so that a memory-mapped file never comes in whole."""
    step = max(1, (1 << 22) * len(x) // max(1, x.size))
    return ((i, np.asarray(x[i : i + step])) for i in range(0, len(x), step))


def _to_levels(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == np.bool_:
        return x.astype(np.uint8) * np.uint8(255)
    low = min(float(block.min()) for _, block in _blocks(x))
    high = max(float(block.max()) for _, block in _blocks(x))
    scale = 255 if x.dtype.kind == "f" and high <= 1 else 1
    levels = np.empty(x.shape, np.uint8)
    if low >= 0 and high <= 255:  # false for NaN
        for i, block in _blocks(x):
            exact = block * float(scale)
            levels[i : i + len(block)] = nearest = np.rint(exact)
            if np.abs(exact - nearest).max() > 1e-3:
                break
        else:
            return levels
    unit = low >= 0 and high <= 1
    advice = "multiply by 255, round, and store uint8" if unit else "rescale to 0..255"
    raise DataError(
        f"{where}: images are levels 0..255, and these {x.dtype} values run from {low:g} to "
        f"{high:g}: {advice}"
    )


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


def table(x: np.ndarray, columns: tuple[str, ...], where: str, allow_constant: bool) -> np.ndarray:
    """float32 (N, D), finite, and with no constant column; float32 files stay memory-mapped."""

    def called(column: int) -> str:
        return f"column {columns[column]!r}" if columns else f"column {column} (from 0)"

    if x.dtype != np.float32:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    low, high = np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf)
    for start, block in _blocks(x):
        finite = np.isfinite(block)
        if not finite.all():
            row, column = map(int, np.argwhere(~finite)[0])
            raise DataError(
                f"{where}: row {start + row} (from 0), {called(column)} is {block[row, column]}: "
                "drop or fill such rows"
            )
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    constant = np.flatnonzero(low == high)
    if len(constant) and not allow_constant:
        names = ", ".join(map(called, constant[:5])) + (", ..." if len(constant) > 5 else "")
        verb = "are" if len(constant) > 1 else "is"
        raise DataError(f"{where}: {names} {verb} constant, where a density is infinite: drop it")
    return x


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


def read_csv(path: Path) -> Source:
    """A .csv table of numbers, with or without a header."""
    where = str(path)
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
    return _with_labels(x, columns, np.array(last) if labelled else None, where)


def read_parquet(path: Path) -> Source:
    """A .parquet table of numbers."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing(f"{path}: reading .parquet", "pyarrow", "tables") from error
    where = str(path)
    with parquet.ParquetFile(path) as file:
        table = file.read()
    if table.column_names and table.column_names[-1] == "__index_level_0__":
        table = table.select(table.column_names[:-1])  # pandas' index is no datum
    columns, last = tuple(table.column_names), None
    if len(columns) > 1 and columns[-1].lower() in LABEL_COLUMNS:
        last = np.array(table.column(len(columns) - 1).to_pylist())
        table = table.select(columns[:-1])
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(
                f"{where}: column {name!r} is {kind}, not a number: convert or drop it"
            )
    x = np.empty((table.num_rows, table.num_columns), np.float64)
    for i, column in enumerate(table.columns):
        x[:, i] = column.to_numpy()  # a null becomes NaN
    return _with_labels(x, columns, last, where)


def _with_labels(
    x: np.ndarray, columns: tuple[str, ...], last: np.ndarray | None, where: str
) -> Source:
    """Take a last column of whole numbers or strings for labels, one of fractions for data."""
    if last is None or not len(last):
        return Source(x, columns=columns[: x.shape[1]])
    if last.dtype.kind == "U" and all(map(_is_number, last)):
        last = last.astype(np.float64)
    if last.dtype.kind == "f":
        if not (np.isfinite(last) & (last == np.rint(last)) & (abs(last) < 2**53)).all():
            return Source(np.column_stack([x, last]), columns=columns)
        last = last.astype(np.int64)
    labels, names = as_labels(last, len(x), f"{where}: column {columns[-1]!r}")
    return Source(x, labels, names, columns=columns[:-1])
