"""Gradient boosting of typed rows, as the tests of synthetic tables use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from musigma.data.errors import missing
from musigma.schema import Column, Schema

__all__ = ["classifier", "features", "merged", "regressor", "sample", "threads"]

MOST_LEVELS = 250
"""Levels of a category that trees see; further ones are one level to them."""


def sample(rows: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    """At most this many rows, drawn without replacement, in random order."""
    return rows[random.permutation(len(rows))[:most]]


def features(schema: Schema, *tables: np.ndarray) -> list[np.ndarray]:
    """Tables as trees take them, without NaN.

    Missing numbers become one below all others, missing levels one more level. Rare levels of a
    category with very many are merged.

    Args:
        schema: The columns.
        *tables: Rows (N, D) of each table; all are counted together.
    """
    found = [table.copy() for table in tables]
    for j, column in enumerate(schema.columns):
        if column.kind == "category" and len(column.levels) >= MOST_LEVELS:
            for table, codes in zip(
                found, merged(column, MOST_LEVELS, *tables, at=j), strict=True
            ):
                table[:, j] = codes
        known = np.concatenate([table[:, j] for table in found])
        known = known[~np.isnan(known)]
        instead = known.min(initial=0) - 1
        if column.kind == "category":
            instead = known.max(initial=0) + 1
        for table in found:
            table[np.isnan(table[:, j]), j] = instead
    return found


def merged(column: Column, most: int, *tables: np.ndarray, at: int) -> list[np.ndarray]:
    """The codes of a category with its most frequent levels from 0, and all others as the last.

    Args:
        column: The category.
        most: Number of levels that are kept.
        *tables: Rows (N, D).
        at: Number of the column.
    """
    codes = np.concatenate([table[:, at] for table in tables])
    counts = np.bincount(codes[~np.isnan(codes)].astype(int), minlength=len(column.levels) + 1)
    order = np.argsort(-counts, kind="stable")
    number = np.full(len(counts), float(most))
    number[order[:most]] = np.arange(min(most, len(order)))
    return [
        np.where(np.isnan(t[:, at]), np.nan, number[np.nan_to_num(t[:, at]).astype(int)])
        for t in tables
    ]


def classifier(schema: Schema, seed: int) -> Any:
    """A gradient boosting classifier of rows with these columns, unfitted."""
    return _sklearn().HistGradientBoostingClassifier(**_options(schema, seed))


def regressor(schema: Schema, seed: int) -> Any:
    """A gradient boosting regression on rows with these columns, unfitted."""
    return _sklearn().HistGradientBoostingRegressor(**_options(schema, seed))


@contextmanager
def threads() -> Iterator[None]:
    """Let trees use as many threads as torch does.

    Their threads wait for each other, spinning: with more of them than free cores, a fit takes
    many times as long.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # it comes with scikit-learn
        yield
        return
    import torch

    with threadpool_limits(torch.get_num_threads(), user_api="openmp"):
        yield


def _options(schema: Schema, seed: int) -> dict[str, Any]:
    nominal = [column.kind == "category" for column in schema.columns]
    return {"categorical_features": nominal, "early_stopping": False, "random_state": seed % 2**32}


def _sklearn() -> Any:
    try:
        import sklearn.ensemble
    except ImportError:
        raise missing("comparing tables", "scikit-learn", "data") from None
    return sklearn.ensemble
