"""Annotated matrices of counts: .h5ad files of cells by genes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.assembly import assemble
from musigma.data.dataset import Dataset
from musigma.data.errors import missing, named
from musigma.data.raw import Request
from musigma.data.tables import Content, Table, is_missing

__all__ = ["H5AD", "read_h5ad"]

H5AD = re.compile(r"(.+\.h5ad)(?:/(X|layers/[^/]+|raw/X))?", re.IGNORECASE)
"""A file, and the matrix in it: ``cells.h5ad``, ``cells.h5ad/layers/counts``."""
ROWS = 4096  # that are made dense at once


def read_h5ad(path: Path, request: Request) -> Dataset:
    """Cells as rows, genes as columns; columns of obs can be given.

    Without the name of a matrix, it is the layer `counts` if there is one, and X otherwise. Genes
    that are zero in all cells are left out, with a note, unless the model needs them.
    """
    match = H5AD.fullmatch(str(path))
    assert match is not None  # the caller has found it to be one
    try:
        import anndata
    except ImportError as error:
        raise missing(f"{request.where}: reading .h5ad", "anndata", "h5ad") from error
    if not Path(match[1]).is_file():
        raise request.error("no such file")
    content = anndata.read_h5ad(match[1])
    places: dict[str, Any] = {"X": content.X}
    places |= {f"layers/{name}": matrix for name, matrix in content.layers.items()}
    genes = content.var_names
    if content.raw is not None:
        places["raw/X"] = content.raw.X
    place = match[2] or ("layers/counts" if "layers/counts" in places else "X")
    if places.get(place) is None:
        raise request.error(f"has no {place}: it has {named(list(places))}")
    if place == "raw/X":
        genes = content.raw.var_names
    table = _Cells(places[place], list(map(str, genes)), content.obs, match[1], place, request)
    if request.columns is None and not request.of:
        request = replace(request, of=tuple(map(escape, table.expressed())))
        if silent := table.matrix.shape[1] - len(request.of):
            request.note(f"genes that are zero in all cells are left out: {silent:,}")
    return assemble(table, replace(request, allow_constant=True))


class _Cells(Table):
    """Genes as columns of numbers, followed by the columns of obs."""

    def __init__(
        self, matrix: Any, genes: list[str], obs: Any, file: str, place: str, request: Request
    ):
        self.matrix: Any = matrix.tocsr() if hasattr(matrix, "tocsr") else np.asarray(matrix)
        self.file, self.place, self.request, self.obs = file, place, request, obs
        self.rows, self.cells_of = matrix.shape[0], list(map(str, obs.index))
        self.names = (*genes, *map(str, obs.columns))
        numbers: list[Content] = ["number" for _ in genes]
        self.kinds = [*numbers, *(_content(obs[name]) for name in obs.columns)]
        dtype = self.matrix.dtype.name
        self.storage = [dtype] * len(genes) + [str(obs[c].dtype) for c in obs.columns]
        values = getattr(self.matrix, "data", self.matrix) if self.sparse else self.matrix
        whole = bool(((values >= 0) & (values == np.floor(values))).all())
        request.note(
            f"{place}: {self.rows:,} cells x {len(genes):,} genes, "
            f"{'sparse' if self.sparse else 'dense'} {dtype}, "
            f"{'counts' if whole else 'not counts'}"
        )

    @property
    def sparse(self) -> bool:
        """Whether the matrix is stored without its zeros."""
        return hasattr(self.matrix, "tocsr")

    def expressed(self) -> list[str]:
        """The genes that are not zero in all cells."""
        total = np.asarray(abs(self.matrix).sum(0)).ravel()
        return [self.names[j] for j in np.flatnonzero(total).tolist()]

    def x(self, columns: Sequence[int]) -> np.ndarray:
        about = {"version": cache.stamp(Path(self.file)), "columns": list(map(int, columns))}
        source = f"{Path(self.file).resolve()}/{self.place}"

        def dense() -> Iterator[np.ndarray]:
            for start in range(0, self.rows, ROWS):
                rows = self.matrix[start : start + ROWS][:, columns]
                yield cache.float32(rows.toarray() if self.sparse else rows)
                self.request.report(min(start + ROWS, self.rows), self.rows)

        shape = self.rows, len(columns)
        return cache.flat(
            source, {"source": source, **about}, shape, np.float32, dense, self.request
        )

    def numbers(self, j: int) -> np.ndarray:
        if (k := j - self.matrix.shape[1]) >= 0:
            return self.obs.iloc[:, k].to_numpy(np.float64, na_value=np.nan)
        column = self.matrix[:, [j]]
        return (column.toarray() if self.sparse else column)[:, 0].astype(np.float64)

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        if (k := j - self.matrix.shape[1]) < 0 or self.kinds[j] == "number":
            yield from super().batches_of_words(j)
            return
        column = self.obs.iloc[:, k].astype(object)
        cells = ["" if column.isna().iloc[i] else str(v) for i, v in enumerate(column)]
        words, codes = np.unique(cells, return_inverse=True)
        yield [None if is_missing(word) else word for word in words.tolist()], codes

    def row_id(self, i: int) -> str:
        return self.cells_of[i]


def _content(column: Any) -> Content:
    return "number" if column.dtype.kind in "iuf" else "text"
