"""Whether a classifier can tell the rows of two tables apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from musigma.comparison.boosting import classifier, features, sample, threads
from musigma.evaluation.intervals import Interval, area, normal, share
from musigma.schema import Schema

__all__ = ["LEAST", "TwoSamples", "c2st"]

LEAST = 100
"""Rows of a table, below which nothing is compared."""

MOST_SHUFFLED = 60
"""Columns, above which the part of each column is not measured."""


@dataclass(frozen=True)
class TwoSamples:
    """The result of a classifier two-sample test.

    Attributes:
        rows: Rows of each table.
        folds: Folds of the cross-validation.
        auc: P(a row of the second table has a higher score than one of the first).
        accuracy: Share of the rows that are assigned to their table.
        p_value: Probability of such an AUC or a higher one if both tables have one distribution.
        columns: By how much the AUC falls if the values of a column are shuffled among the rows
            that are scored; the largest first. Empty if it was not measured.
    """

    rows: int
    folds: int
    auc: Interval
    accuracy: Interval
    p_value: float
    columns: dict[str, float]


@threads()
def c2st(
    first: np.ndarray,
    second: np.ndarray,
    schema: Schema,
    *,
    folds: int = 5,
    most: int = 20_000,
    shuffle: bool = False,
    seed: int = 0,
    step: Callable[[str], None] = lambda note: None,
) -> TwoSamples:
    """Classifier two-sample test: can gradient boosting tell two tables apart?

    Equal numbers of rows of both are split into folds; each fold is scored by a classifier that
    was trained on the others. An AUC of 0.5 means that it cannot, 1 that it always can; well
    below 0.5, rows of one table are copies of rows of the other.

    Every row that is scored also trains the classifiers of the other folds, so errors of folds are
    correlated. The variances of AUC and accuracy are therefore multiplied by 1 + K / (K - 1) for K
    folds, the correction of Nadeau & Bengio.

    Args:
        first: Rows (N, D) of typed columns, as `musigma.data.load` encodes them.
        second: Rows (M, D).
        schema: The columns.
        folds: Number K of folds.
        most: Largest number of rows of each table; more are drawn from at random.
        shuffle: Whether to measure the part of each column, for tables of up to 60 columns.
        seed: Random seed.
        step: Called with a note before each fold.

    Raises:
        ValueError: If a table has fewer than 100 rows, or numbers of columns differ.
        DataError: If scikit-learn is not installed.

    Sources: Lopez-Paz & Oquab, "Revisiting classifier two-sample tests", 2017, arXiv:1610.06545;
    Nadeau & Bengio, "Inference for the generalization error", 2003.

    Example:
        >>> from musigma.schema import Column
        >>> schema = Schema([Column("height"), Column("weight")])
        >>> random = np.random.default_rng(0)
        >>> x, y = random.normal(size=(2, 300, 2))
        >>> c2st(x, y, schema).auc.low < 0.5 < c2st(x, y + [2, 0], schema).auc.low
        True
    """
    check_rows(schema, first=first, second=second)
    random = np.random.default_rng(seed)
    n = min(len(first), len(second), most)
    x = np.concatenate(features(schema, sample(first, n, random), sample(second, n, random)))
    y = np.repeat([0, 1], n)
    fold = np.tile(np.arange(n) % folds, 2)  # rows are in random order
    below, above, falls = [], [], []
    right = 0
    for k in range(folds):
        step(f"fold {k + 1} of {folds}")
        test = fold == k
        fitted = classifier(schema, seed).fit(x[~test], y[~test])
        rows, second_ = x[test], y[test] == 1
        scores = fitted.decision_function(rows)
        value, b, a = area(scores[second_], scores[~second_])
        below.append(b)
        above.append(a)
        right += int(((scores > 0) == second_).sum())
        if shuffle and len(schema) <= MOST_SHUFFLED:
            falls.append(
                [value - _without(fitted, rows, second_, j, random) for j in range(len(schema))]
            )
    more = 1 + folds / (folds - 1)
    auc = _auc(np.concatenate(below), np.concatenate(above), more)
    accuracy = share(right / more, 2 * n / more)
    null = more * (2 * n / folds + 1) * folds / (12 * n**2)
    columns = dict(zip(schema.names, np.mean(falls, 0).tolist(), strict=True)) if falls else {}
    columns = dict(sorted(columns.items(), key=lambda item: -item[1]))
    return TwoSamples(n, folds, auc, accuracy, _above((auc.value - 0.5) / null**0.5), columns)


def _auc(below: np.ndarray, above: np.ndarray, more: float) -> Interval:
    value, n = float(below.mean()), len(below)
    variance = (below.var() + above.var()) / n
    return normal(value, more * variance, 0.0, 1.0) if variance else share(value * n, n)


def _above(z: float) -> float:
    """The probability that a standard normal variable is above z."""
    from scipy.special import ndtr

    return float(ndtr(-z))


def _without(fitted, rows: np.ndarray, second: np.ndarray, j: int, random) -> float:
    """The AUC if column j is shuffled."""
    shuffled = rows.copy()
    shuffled[:, j] = random.permutation(rows[:, j])
    scores = fitted.decision_function(shuffled)
    return area(scores[second], scores[~second])[0]


def check_rows(schema: Schema, least: Mapping[str, int] = {}, /, **tables: np.ndarray) -> None:
    """Refuse tables with too few rows, or with other columns; all at once.

    Args:
        schema: The columns.
        least: Rows that a table needs, where these are not 100.
        **tables: Rows by name.

    Raises:
        ValueError: With the name of every table that is refused.
    """
    faults = []
    for name, rows in tables.items():
        if rows.ndim != 2 or rows.shape[1] != len(schema):
            faults.append(f"{name}: expected rows of {len(schema)} columns; got {rows.shape}")
        elif len(rows) < (needed := least.get(name, LEAST)):
            faults.append(
                f"{name}: expected at least {needed} rows; got {len(rows)}: give more rows"
            )
    if faults:
        raise ValueError("\n".join(faults))
