"""Tables in one .parquet file, or in several that have the same columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, damage, first_line, missing, named, printable
from musigma.data.raw import Request
from musigma.data.readers.layout import official_masks, parts_of_files
from musigma.data.tables import LOOKED_AT, Table, assemble, is_number


def read_parquet(paths: Sequence[Path], request: Request) -> Dataset:
    """Read a table; files named after parts (train-00000-of-00002.parquet) are those parts."""
    parts = parts_of_files([path.as_posix() for path in paths])
    if rest := [path.name for path in paths if parts and parts[path.as_posix()] is None]:
        request.note(f"files that belong to no part are left out: {named(rest)}")
        paths = [path for path in paths if parts[path.as_posix()]]
    return assemble(Parquet(paths, request), request)


class Parquet(Table):
    """The .parquet files of a table, read in batches of rows."""

    def __init__(self, paths: Sequence[Path], request: Request):
        try:
            import pyarrow as pa
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise missing(f"{request.where}: reading .parquet", "pyarrow", "tables") from error
        self.paths, self.request, self._open = paths, request, parquet.ParquetFile
        self.lengths: list[int] = []
        wrong: dict[str, str] = {}
        for path in paths:
            with damage(str(path)), self._open(path) as file:
                schema = file.schema_arrow
                self.lengths.append(file.metadata.num_rows)
            names = tuple(name for name in schema.names if not name.startswith("__index_level_"))
            if path != paths[0] and names != self.names:
                raise DataError(
                    f"{path}: has the columns {named(names, 20)}, and {paths[0].name} has "
                    f"{named(self.names, 20)}: make them equal"
                )
            self.names, self.kinds = names, []
            for name in names:
                kind = schema.field(name).type
                if pa.types.is_dictionary(kind):
                    kind = kind.value_type
                if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                    self.kinds.append("text")
                elif pa.types.is_null(kind):
                    self.kinds.append("empty")
                else:
                    self.kinds.append("number")
                    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                        wrong[name] = f"is {kind}, not a number: convert or drop it"
        self.rows = sum(self.lengths)
        for j, kind in enumerate(self.kinds):
            if kind == "text" and all(map(is_number, self.cells(j, LOOKED_AT))):
                self.kinds[j] = "number"  # written as text
        used = self.names if request.columns is None else request.columns
        wrong = {name: reason for name, reason in wrong.items() if name in used}
        for name, reason in wrong.items():
            rest = f" (and {len(wrong) - 1} more columns)" if len(wrong) > 1 else ""
            raise DataError(f"{paths[0]}: column {name!r} {reason}{rest}")

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns, in batches of rows that take some megabytes."""
        step, done = max(1, (1 << 21) // max(1, len(columns))), 0
        for path in self.paths:
            with damage(str(path)), self._open(path) as file:
                for batch in file.iter_batches(step, columns=list(columns)):
                    yield batch
                    self.request.report(done := done + batch.num_rows, self.rows)

    def _values(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """Numbers, float64 (rows, columns)."""
        for batch in self._batches(columns):
            block = np.empty((batch.num_rows, len(columns)), np.float64)
            for i, column in enumerate(batch.columns):
                try:
                    block[:, i] = column.to_numpy(zero_copy_only=False)  # a null becomes NaN
                except ValueError as error:
                    raise self.request.error(
                        f"column {columns[i]!r} holds text among numbers "
                        f"({first_line(error)}): convert or drop it"
                    ) from error
            yield block

    def x(self, columns: Sequence[int]) -> np.ndarray:
        names = [self.names[j] for j in columns]
        source = "\n".join(str(path.resolve()) for path in self.paths)
        about = {"version": [cache.stamp(path) for path in self.paths], "columns": names}
        return cache.flat(
            f"{source}\nparquet",
            {"source": source, **about},
            (self.rows, len(columns)),
            np.float32,
            lambda: map(cache.float32, self._values(names)),
            self.request,
        )

    def numbers(self, j: int) -> np.ndarray:
        return np.concatenate([*self._values([self.names[j]]), np.empty((0, 1))])[:, 0]

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        for batch in self._batches([self.names[j]]):
            column = batch.column(0).dictionary_encode()
            words = [
                printable(w) if isinstance(w, str) else w for w in column.dictionary.to_pylist()
            ]
            codes = column.indices.fill_null(len(words)).to_numpy()
            yield [*words, None], codes

    def official(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        parts = parts_of_files([path.as_posix() for path in self.paths])
        if not parts:
            return None, None
        names = np.array([parts[path.as_posix()] or "" for path in self.paths])
        return official_masks(np.repeat(names, self.lengths)[rows])
