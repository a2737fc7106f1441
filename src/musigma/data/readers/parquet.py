"""Tables in one .parquet file, or in several that have the same columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.assembly import assemble
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, damage, named
from musigma.data.raw import Request
from musigma.data.readers.arrow import Arrow, pyarrow
from musigma.data.readers.layout import official_masks, parts_of_files


def read_parquet(paths: Sequence[Path], request: Request) -> Dataset:
    """Read a table; files named after parts (train-00000-of-00002.parquet) are those parts."""
    parts = parts_of_files([path.as_posix() for path in paths])
    if rest := [path.name for path in paths if parts and parts[path.as_posix()] is None]:
        request.note(f"files that belong to no part are left out: {named(rest)}")
        paths = [path for path in paths if parts[path.as_posix()]]
    return assemble(Parquet(paths, request), request)


class Parquet(Arrow):
    """The .parquet files of a table, read in batches of rows."""

    def __init__(self, paths: Sequence[Path], request: Request):
        pa = pyarrow(f"{request.where}: reading .parquet")
        from pyarrow.parquet import ParquetFile

        self.paths, self._open = paths, ParquetFile
        self.lengths: list[int] = []
        schemas = []
        for path in paths:
            with damage(str(path)), ParquetFile(path) as file:
                schemas.append(file.schema_arrow)
                self.lengths.append(file.metadata.num_rows)
            if schemas[-1].names != schemas[0].names:
                raise DataError(
                    f"{path}: has the columns {named(schemas[-1].names, 20)}, and {paths[0].name} "
                    f"has {named(schemas[0].names, 20)}: make them equal"
                )
        types = (_common(pa, kinds) for kinds in zip(*(s.types for s in schemas), strict=True))
        schema = pa.schema(list(zip(schemas[0].names, types, strict=True)))
        super().__init__(schema, sum(self.lengths), request)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        step, done = max(1, (1 << 18) // max(1, len(columns))), 0
        for path in self.paths:  # a buffer would hold the whole file
            with damage(str(path)), self._open(path, pre_buffer=False) as file:
                for batch in file.iter_batches(step, columns=list(columns)):
                    yield batch
                    self.request.report(done := done + batch.num_rows, self.rows)

    def x(self, columns: Sequence[int]) -> np.ndarray:
        names = [self.names[j] for j in columns]
        source = "\n".join(str(path.resolve()) for path in self.paths)
        about = {"version": [cache.stamp(path) for path in self.paths], "columns": names}
        return cache.flat(
            f"{source}\nparquet",
            {"source": source, **about},
            (self.rows, len(columns)),
            np.float32,
            lambda: map(cache.float32, self.blocks(names)),
            self.request,
        )

    def official(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        parts = parts_of_files([path.as_posix() for path in self.paths])
        if not parts:
            return None, None
        names = np.array([parts[path.as_posix()] or "" for path in self.paths])
        return official_masks(np.repeat(names, self.lengths)[rows])


def _common(pa: Any, types: Sequence[Any]) -> Any:
    """The type of a column that has several in different files: text if nothing else fits."""
    parts = [pa.schema([("", kind)]) for kind in dict.fromkeys(types)]
    try:
        return pa.unify_schemas(parts, promote_options="permissive").types[0]
    except pa.ArrowException:
        return pa.string()
