"""Tables in one .parquet file, or in several that have the same columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.columns import Kind, Table, is_number, label_values, refuse_columns, roles
from musigma.data.errors import DataError, damage, first_line, missing, named, printable
from musigma.data.given import Given
from musigma.data.raw import RawData, Request, as_labels
from musigma.data.readers.arrays import float32_blocks
from musigma.data.readers.layout import official_masks, parts_of_files

LOOKED_AT = 100_000  # rows by which it is decided what a column is


def read_parquet(paths: Sequence[Path], request: Request) -> RawData:
    """Read a table; files named after parts (train-00000-of-00002.parquet) are those parts."""
    parts = parts_of_files([path.as_posix() for path in paths])
    if rest := [path.name for path in paths if parts and parts[path.as_posix()] is None]:
        request.note(f"files that are of no part are left out: {named(rest)}")
        paths = [path for path in paths if parts[path.as_posix()]]
    files = _Parquet(paths, request)
    if not files.rows:
        return RawData(np.empty((0, len(files.columns)), np.float32))
    found = roles(files.columns, files.kinds, files.cells, files.is_label, request)
    refuse_columns(found, request)
    name = "\n".join(str(path.resolve()) for path in paths)
    about = {"source": name, "version": [cache.stamp(path) for path in paths]}
    fits = request.fits(4 * files.rows * len(files.columns))
    labels, label_names = None, ()
    if found.label is not None:
        column = files.columns[found.label]

        def build(old: cache.Record | None) -> cache.Record:
            labels, names = files.labels(column)
            return cache.Record({}, {"names": names}, {"labels": labels})

        if fits:
            record = build(None)
        else:
            place = cache.place("facts", f"{name}\n{column}", ".npz")
            record = cache.cached(place, {**about, "column": column}, build, request)
        labels, label_names = record.arrays["labels"], tuple(record.info["names"])
    columns = tuple(files.columns[j] for j in found.data)
    x = cache.flat(
        f"{name}\nparquet",
        {**about, "columns": columns},
        (files.rows, len(columns)),
        np.float32,
        lambda: float32_blocks(files.values(columns)),
        request,
    )
    return RawData(
        x,
        labels,
        label_names,
        tuple(files.texts(files.columns[found.ids])) if fits and found.ids is not None else None,
        *files.official(),
        columns=columns,
        given={files.columns[j]: files.given(j) for j in found.given},
    )


def read_parquet_table(path: Path, request: Request) -> Table:
    """All columns of a file, in memory."""
    files = _Parquet([path], request)
    texts = {
        j: files.texts(name)
        for j, (name, kind) in enumerate(zip(files.columns, files.kinds, strict=True))
        if kind == "text"
    }
    values = np.full((files.rows, len(files.columns)), np.nan)
    for j, name in enumerate(files.columns):
        if j not in texts:
            values[:, j] = np.concatenate([*files.values([name]), np.empty((0, 1))])[:, 0]
    return Table(files.columns, values, texts, files.kinds, lambda i: f"row {i} (from 0)")


class _Parquet:
    """The .parquet files of a table, read in batches of rows."""

    def __init__(self, paths: Sequence[Path], request: Request):
        try:
            import pyarrow as pa
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise missing(f"{request.where}: reading .parquet", "pyarrow", "tables") from error
        self.paths, self.request, self._open = paths, request, parquet.ParquetFile
        self.lengths: list[int] = []
        self.columns: tuple[str, ...] = ()
        self.kinds: list[Kind] = []
        wrong: dict[str, str] = {}
        for path in paths:
            with damage(str(path)), self._open(path) as file:
                schema = file.schema_arrow
                self.lengths.append(file.metadata.num_rows)
            names = tuple(name for name in schema.names if not name.startswith("__index_level_"))
            if path != paths[0] and names != self.columns:
                raise DataError(
                    f"{path}: has the columns {named(names, 20)}, and {paths[0].name} has "
                    f"{named(self.columns, 20)}: make them equal"
                )
            self.columns, self.kinds = names, []
            for name in names:
                kind = schema.field(name).type
                if pa.types.is_dictionary(kind):
                    kind = kind.value_type
                if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                    self.kinds.append("text")
                elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
                    self.kinds.append("number")
                elif pa.types.is_null(kind):
                    self.kinds.append("empty")
                else:
                    self.kinds.append("number")
                    wrong[f"column {name!r}"] = f"is {kind}, not a number: convert or drop it"
        self.rows = sum(self.lengths)
        for j, kind in enumerate(self.kinds):
            if kind == "text" and all(map(is_number, self.cells(j))):
                self.kinds[j] = "number"  # written as text
        used = request.columns
        wrong = {k: v for k, v in wrong.items() if used is None or k[8:-1] in used}
        if wrong:
            name, reason = next(iter(wrong.items()))
            rest = f" (and {len(wrong) - 1} more columns)" if len(wrong) > 1 else ""
            raise DataError(f"{paths[0]}: {name} {reason}{rest}")

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
                try:
                    block[:, i] = column.to_numpy(zero_copy_only=False)  # a null becomes NaN
                except ValueError as error:
                    raise DataError(
                        f"{self.request.where}: column {columns[i]!r} holds text among numbers "
                        f"({first_line(error)}): convert or drop it"
                    ) from error
            yield block

    def texts(self, column: str) -> list[str]:
        """A column as text; nulls are empty."""
        cells = (batch.column(0).to_pylist() for batch in self.batches([column]))
        return ["" if c is None else printable(str(c)) for block in cells for c in block]

    def cells(self, j: int) -> list[str]:
        """The first cells of a column as text."""
        found: list[str] = []
        for batch in self.batches([self.columns[j]]):
            found += ["" if c is None else str(c) for c in batch.column(0).to_pylist()]
            if len(found) >= LOOKED_AT:
                break
        return found

    def is_label(self, j: int) -> bool:
        """Whether a column holds whole numbers or text; it is read up to the first fraction."""
        for batch in self.batches([self.columns[j]]):
            distinct = [v for v in batch.column(0).unique().to_pylist() if v is not None]
            if distinct and label_values(distinct) is None:
                return False
        return True

    def labels(self, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """A column as labels."""
        numbers: dict[Any, int] = {}
        codes, where = [], f"{self.request.where}: column {name!r}"
        for batch in self.batches([name]):
            column = batch.column(0)
            if column.null_count:
                raise DataError(f"{where} has nulls: fill or drop such rows")
            column = column.dictionary_encode()
            values = column.dictionary.to_pylist()
            code = np.array([numbers.setdefault(value, len(numbers)) for value in values])
            codes.append(code[column.indices.to_numpy()])
        values = label_values(list(numbers))
        assert values is not None
        labels, names = as_labels(values, len(numbers), where)
        return labels[np.concatenate(codes)], names

    def given(self, j: int) -> Given:
        """A column as context."""
        name = self.columns[j]
        if self.kinds[j] == "text":
            return Given.of_text(self.texts(name))
        return Given(np.concatenate([*self.values([name])])[:, 0].astype(np.float32))

    def official(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Masks of the rows for testing and for validation, by the names of the files."""
        parts = parts_of_files([path.as_posix() for path in self.paths])
        if not parts:
            return None, None
        names = [parts[path.as_posix()] or "" for path in self.paths]
        rows = np.repeat(np.array(names), self.lengths)
        return official_masks(rows)
