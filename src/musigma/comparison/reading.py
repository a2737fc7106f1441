"""Real and synthetic tables as rows with one schema."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import Dataset, load
from musigma.data.errors import named
from musigma.data.tables import text_of
from musigma.schema import Column, Schema

__all__ = ["Tables"]


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables as rows of one schema: that of the real one, with the levels of all.

    Attributes:
        schema: The columns.
        real: Rows (N, D).
        synthetic: Rows (M, D).
        train: Rows (K, D), if there are any.
        names: What they were read from: the last part of a path.
        differences: Sentences about columns that differ.
        notes: What was noted when the real table was read.
    """

    schema: Schema
    real: np.ndarray
    synthetic: np.ndarray
    train: np.ndarray | None
    names: dict[str, str]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, real: Any, synthetic: Any, train: Any = None, schema: Any = "infer") -> Tables:
        """Read tables; see `musigma.comparison.compare`.

        Raises:
            DataError: Naming all columns and cells that cannot be used.
        """
        found = load(real, schema=schema, allow_constant=True)
        columns = found.schema or Schema(())
        sources = {"real": real, "synthetic": synthetic}
        differences: list[str] = []
        learned = None
        if train is not None:
            sources["train"] = train
            learned, columns = _read("train", train, columns, differences)
        rows, columns = _read("synthetic", synthetic, columns, differences)
        names = {name: _name(source, name) for name, source in sources.items()}
        return cls(columns, found.x, rows, learned, names, tuple(differences), found.notes)


def _read(
    name: str, source: Any, schema: Schema, differences: list[str]
) -> tuple[np.ndarray, Schema]:
    """Rows of a table by a schema, and the schema with the levels that only this table has.

    Numbers may have fractions where those of the schema have none, and any value may be missing.
    """
    own = load(source, schema="infer", allow_constant=True)
    kinds = {column.name: column for column in (own.schema or Schema(())).columns}
    if more := [repr(one) for one in kinds if one not in schema.names]:
        differences.append(f"Columns of {name} only, which are left out: {named(more, 20)}")
    for column in schema.columns:
        theirs = kinds.get(column.name, column).kind
        if theirs != column.kind and not {theirs, column.kind} <= ALIKE:
            differences.append(
                f"{column.name}: {column.kind} in the real table, {theirs} in {name} by itself"
            )
    x = load(
        source,
        schema=Schema(tuple(map(_loosened, schema.columns))),
        unseen="probability",
        allow_constant=True,
    ).x
    columns = list(schema.columns)
    for j, column in enumerate(columns):
        unknown = np.flatnonzero(x[:, j] == len(column.levels))
        if column.has_levels and len(unknown):
            texts = _texts(own, column.name, unknown)
            levels = column.levels + tuple(sorted(set(texts)))
            columns[j] = replace(column, levels=levels, cells=None)
            x[unknown, j] = [levels.index(text) for text in texts]
    return x, Schema(tuple(columns))


ALIKE = {"category", "ordinal", "boolean"}
"""Kinds of levels, which one table alone cannot always tell apart."""


def _loosened(column: Column) -> Column:
    if column.kind == "count":
        return replace(column, kind="continuous", step=None, missing=True, cells=None)
    if column.kind == "continuous":
        return replace(column, step=None, rounded=False, missing=True, cells=None)
    return replace(column, missing=True, cells=None)


def _texts(own: Dataset, name: str, rows: np.ndarray) -> list[str]:
    """The words of a column in some rows."""
    if own.schema is None or name not in own.schema.names:
        return ["(unknown)"] * len(rows)
    j = own.schema.index(name)
    column, values = own.schema.columns[j], own.x[rows, j].tolist()
    return [column.levels[int(v)] if column.has_levels else text_of(v) for v in values]


def _name(source: Any, name: str) -> str:
    """The last part of a path or a URL; pages are shared."""
    return Path(source).name or name if isinstance(source, (str, Path)) else name
