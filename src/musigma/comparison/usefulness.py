"""Whether models that learn from synthetic rows predict real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from musigma.comparison.boosting import classifier, features, merged, regressor, sample, threads
from musigma.comparison.two_samples import LEAST, check_rows
from musigma.evaluation.intervals import Interval, area, normal
from musigma.schema import Schema

__all__ = ["Usefulness", "usefulness"]

MOST_CLASSES = 10
"""Levels of a target that are classes of their own; all others together are one more."""


@dataclass(frozen=True)
class Usefulness:
    """How well a column of real rows is predicted from the others.

    Attributes:
        column: The target.
        measure: `R2`, `R2 of the logarithm`, `accuracy` or `AUC`; the AUC is that of each class
            against all others, averaged by the frequency of the classes.
        synthetic: The figure of the model trained on synthetic rows.
        real: That of the model trained on as many real rows.
        difference: The first minus the second, from the same test rows.
        train_rows: Rows that each model was trained on.
        test_rows: Real rows that both were tested on.
    """

    column: str
    measure: str
    synthetic: Interval
    real: Interval
    difference: Interval
    train_rows: int
    test_rows: int


Terms = tuple[str, float, np.ndarray]
"""A measure, its value, and the deviation from it that every test row accounts for."""


@threads()
def usefulness(
    synthetic: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    schema: Schema,
    target: str,
    *,
    most: int = 20_000,
    seed: int = 0,
    step: Callable[[str], None] = lambda note: None,
) -> list[Usefulness]:
    """Train on synthetic rows, test on real rows; beside it, train on as many real rows.

    One column is predicted from all others by gradient boosting: numbers by regression, levels by
    classification. Numbers that are positive and heavy-tailed (a skewness above 1, which the
    logarithm halves at least) are predicted, and scored, by their logarithms. Rows in which the
    target is missing are left out.

    Intervals hold over draws of the test rows; each model is trained once. They use the part of
    each row in the figure (its influence), and that of the difference is paired.

    Args:
        synthetic: Synthetic rows (N, D) of typed columns.
        train: Real rows to train on (M, D).
        test: Real rows to test on (K, D), none of which are in `train`.
        schema: The columns.
        target: Name of the column to predict.
        most: Largest number of rows to train on, and to test on.
        seed: Random seed.
        step: Called with a note before each model is trained.

    Returns:
        `R2` of numbers; `accuracy` and `AUC` of levels.

    Raises:
        ValueError: If there is no such column, or no other one; if fewer than 100 rows of a table
            have a value of the target, or all values of the test rows are equal.
        DataError: If scikit-learn is not installed.

    Source: Esteban, Hyland & Rätsch, "Real-valued (medical) time series generation with recurrent
    conditional GANs", 2017, arXiv:1706.02633.

    Example:
        >>> from musigma.schema import Column
        >>> schema = Schema([Column("x"), Column("y")])
        >>> random = np.random.default_rng(0)
        >>> x = random.normal(size=(3, 500))
        >>> good = np.stack([x, x + 0.1 * random.normal(size=(3, 500))], 2)
        >>> noise = random.normal(size=(500, 2))
        >>> found = [usefulness(t, good[1], good[2], schema, "y")[0] for t in (good[0], noise)]
        >>> found[0].synthetic.value > 0.95, found[1].synthetic.value < 0.5
        (True, True)
    """
    j, random = schema.index(*chosen(schema, target, 1)), np.random.default_rng(seed)
    check_rows(schema, synthetic=synthetic, train=train, test=test)
    if len(schema) == 1:
        raise ValueError(f"target: {target!r} is the only column; nothing predicts it")
    tables = {"synthetic": synthetic, "train": train, "test": test}
    tables = {name: rows[~np.isnan(rows[:, j])] for name, rows in tables.items()}
    for name, rows in tables.items():
        if len(rows) < LEAST:
            raise ValueError(
                f"target: {target!r} has a value in {len(rows)} rows of {name}; expected at least "
                f"{LEAST}: choose another column"
            )
    n = min(len(tables["synthetic"]), len(tables["train"]), most)
    drawn = [sample(rows, n, random) for rows in list(tables.values())[:2]]
    drawn.append(sample(tables["test"], most, random))
    column = schema.columns[j]
    if column.has_levels:
        targets, measures = merged(column, MOST_CLASSES, *drawn, at=j), _classify
    else:
        is_log = heavy_tailed(tables["train"][:, j])
        least = tables["train"][:, j].min()
        targets = [np.log(np.maximum(r[:, j], least)) if is_log else r[:, j] for r in drawn]
        measures = _regress_log if is_log else _regress
    if np.ptp(targets[2]) == 0:
        raise ValueError(f"target: {target!r} has one value in all test rows; choose another")
    others = Schema(tuple(c for c in schema.columns if c.name != target))
    x = features(others, *(np.delete(rows, j, 1) for rows in drawn))
    found = []
    for k, name in enumerate(("synthetic", "real")):
        step(f"{target} from {name} rows")
        found.append(measures(others, x[k], targets[k], x[2], targets[2], seed))
    rows = len(x[2])

    def interval(value: float, terms: np.ndarray) -> Interval:
        return normal(value, terms.var() / rows)

    return [
        Usefulness(
            target,
            measure,
            interval(a, u),
            interval(b, v),
            interval(a - b, u - v),
            n,
            rows,
        )
        for (measure, a, u), (_, b, v) in zip(*found, strict=True)
    ]


def heavy_tailed(values: np.ndarray) -> bool:
    """Whether numbers are predicted by their logarithms: positive, and skewed unless logged."""
    from scipy.stats import skew

    if values.min() <= 0 or np.ptp(values) == 0:
        return False
    before = float(skew(values))
    return before > 1 and abs(float(skew(np.log(values)))) < before / 2


def _regress(
    schema: Schema, x: np.ndarray, y: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> list[Terms]:
    """R2 = 1 - E(y - f)^2 / Var y."""
    errors = (truth - regressor(schema, seed).fit(x, y).predict(test)) ** 2
    deviations = (truth - truth.mean()) ** 2
    ratio = errors.mean() / deviations.mean()
    return [("R2", 1 - ratio, (ratio * deviations - errors) / deviations.mean())]


def _regress_log(*arguments) -> list[Terms]:
    ((_, value, terms),) = _regress(*arguments)
    return [("R2 of the logarithm", value, terms)]


def _classify(
    schema: Schema, x: np.ndarray, y: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> list[Terms]:
    classes = np.unique(y)
    probability = np.zeros((len(test), MOST_CLASSES + 1))
    if len(classes) == 1:
        probability[:, int(classes[0])] = 1
    else:
        fitted = classifier(schema, seed).fit(x, y)
        probability[:, fitted.classes_.astype(int)] = fitted.predict_proba(test)
    return figures(probability, truth)


def figures(probability: np.ndarray, truth: np.ndarray) -> list[Terms]:
    """Accuracy, and the AUC of each class against all others, of probabilities (N, classes)."""
    right = (probability.argmax(1) == truth).astype(float)
    value, terms = 0.0, np.zeros(len(truth))
    for k in np.unique(truth).astype(int):
        is_k = truth == k
        part, (one, below, above) = is_k.mean(), area(probability[is_k, k], probability[~is_k, k])
        value += part * one
        terms[is_k] += below  # and every row is a part of the frequencies of the classes
        terms[~is_k] += (above - one) * part / (1 - part)
    return [("accuracy", right.mean(), right - right.mean()), ("AUC", value, terms - value)]


def chosen(schema: Schema, wanted: str | Sequence[str] | None, most: int) -> list[str]:
    """The columns to predict: those that are named, or the first few.

    Raises:
        ValueError: Naming those that do not exist.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted or schema.names[:most])
    if unknown := [repr(name) for name in names if name not in schema.names]:
        raise ValueError(
            f"target: expected one of {', '.join(schema.names)}; got {', '.join(unknown)}"
        )
    return names
