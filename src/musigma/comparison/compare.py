"""The whole comparison of a synthetic table with a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from musigma.comparison.boosting import sample
from musigma.comparison.marginals import MOST_PAIRED, Marginal, marginal, pairs
from musigma.comparison.privacy import privacy
from musigma.comparison.reading import Tables
from musigma.comparison.result import Comparison
from musigma.comparison.two_samples import LEAST, c2st, check_rows
from musigma.comparison.usefulness import chosen, usefulness
from musigma.schema import Schema

__all__ = ["compare", "compare_rows"]

FEW = 2_000
"""Rows to train on, and to test on, where every column is a target in turn."""

MOST_TARGETS = 20


def compare(
    real: Any,
    synthetic: Any,
    train: Any = None,
    *,
    schema: Any = "infer",
    target: str | Sequence[str] | None = None,
    most: int = 20_000,
    seed: int = 0,
    progress: Callable[..., None] = lambda done, total, note="": None,
) -> Comparison:
    """Compare a synthetic table with a real one.

    Columns are matched by name. `Comparison` states what was measured; `print` shows it,
    `to_html` makes a page, `to_dict` plain data.

    Args:
        real: The real table: whatever `musigma.data.load` reads, or a `Dataset` with a schema. If
            there is `train`, rows that the synthesizer has not seen; without it, all real rows.
        synthetic: The synthetic table.
        train: The rows that the synthesizer was trained on.
        schema: Types of the columns of the real table: "infer", a schema file, or a `Schema`.
        target: Columns to predict; by default each of the first 20 in turn, from 2,000 rows.
        most: Largest number of rows of each table in a test; more are drawn from at random.
        seed: Random seed of everything that is drawn.
        progress: Called with (done, total, note).

    Raises:
        ValueError: If a table has fewer than 100 rows, the real one fewer than 200; if columns
            of the real table are missing or of another type; or if there is no such target.
        DataError: If a table cannot be read, or scikit-learn is not installed.
    """
    tables = Tables.read(real, synthetic, train, schema)
    return compare_rows(
        tables.real,
        tables.synthetic,
        tables.schema,
        tables.train,
        target=target,
        most=most,
        seed=seed,
        progress=progress,
        names=tables.names,
        differences=tables.differences,
        notes=tables.notes,
    )


def compare_rows(
    real: np.ndarray,
    synthetic: np.ndarray,
    schema: Schema,
    train: np.ndarray | None = None,
    *,
    target: str | Sequence[str] | None = None,
    most: int = 20_000,
    seed: int = 0,
    progress: Callable[..., None] = lambda done, total, note="": None,
    names: Mapping[str, str] | None = None,
    differences: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare rows that are encoded already, as `musigma.schema` describes them.

    Args:
        real: Rows (N, D), float64.
        synthetic: Rows (M, D).
        schema: The columns.
        train: Rows (K, D) that the synthesizer was trained on; see `compare`.
        target: As in `compare`.
        most: As in `compare`.
        seed: As in `compare`.
        progress: As in `compare`.
        names: What the tables are called in the result.
        differences: Differences that were found before.
        notes: Notes about how the tables were read.

    Raises:
        ValueError: As `compare`.

    Example:
        >>> from musigma.schema import Column
        >>> schema = Schema([Column("height"), Column("weight")])
        >>> x = np.random.default_rng(0).normal(size=(3, 400, 2))
        >>> found = compare_rows(x[0], x[1] + 1, schema, target="weight")
        >>> found.c2st.auc.low > 0.6, found.baseline.auc.low < 0.5 < found.baseline.auc.high
        (True, True)
    """
    given = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    check_rows(schema, {"real": 2 * LEAST}, **given)
    wanted = chosen(schema, target, MOST_TARGETS)
    random = np.random.default_rng(seed)
    if train is None:
        mixed, half = sample(real, len(real), random), len(real) // 2
        learn, test = mixed[:half], mixed[half:]
        split = "half of the real table to train on, the other half to test on"
    else:
        learn, test = train, real
        split = "training rows to train on, the real table to test on"
    total = 5 + 5 + 2 * len(wanted) + len(schema) + 1 + 3
    done = -1

    def step(note: str) -> None:
        nonlocal done
        done = min(done + 1, total)
        progress(done, total, note)

    def part(what: str) -> Callable[[str], None]:
        return lambda note: step(f"{what}: {note}")

    test_ = c2st(
        real, synthetic, schema, most=most, shuffle=True, seed=seed, step=part("two-sample test")
    )
    mixed = sample(real, len(real), random)
    halves = mixed[: len(real) // 2], mixed[len(real) // 2 :]
    baseline = c2st(*halves, schema, most=most, seed=seed, step=part("real against real"))
    scores, skipped = [], {}
    few = FEW if target is None else most
    for name in wanted:
        try:
            scores += usefulness(
                synthetic, learn, test, schema, name, most=few, seed=seed, step=step
            )
        except ValueError as error:
            if target is not None:
                raise
            skipped[name] = str(error).partition(": ")[2]
    columns = []
    for j, column in enumerate(schema.columns):
        step(f"column {column.name}")
        more = None if train is None else train[:, j]
        columns.append(marginal(real[:, j], synthetic[:, j], column, more))
    step("pairs of columns")
    both = pairs(real, synthetic, schema, most=most, seed=seed)
    private = privacy(real, synthetic, schema, train, seed=seed, step=part("privacy"))
    progress(total, total)
    known = len(real) + (0 if train is None else len(train))
    notes = list(notes)
    if len(schema) > MOST_TARGETS and target is None:
        notes.append(f"Targets are the first {MOST_TARGETS} columns.")
    if len(schema) > MOST_PAIRED:
        notes.append(f"Pairs are those of the first {MOST_PAIRED} columns.")
    if train is None:
        notes.append(
            "Without training rows (`train`), the real rows may be those that the synthesizer was "
            "trained on; figures then flatter it."
        )
    return Comparison(
        {name: (names or {}).get(name, name) for name in given},
        {name: len(rows) for name, rows in given.items()},
        seed,
        {column.name: column.kind for column in schema.columns},
        (*differences, *_different(columns, schema, len(synthetic), known)),
        tuple(notes),
        test_,
        baseline,
        scores,
        split,
        skipped,
        columns,
        both,
        private,
    )


def _different(
    columns: Sequence[Marginal], schema: Schema, synthetic: int, real: int
) -> list[str]:
    """Sentences about levels, ranges and units that synthetic rows should not have.

    Args:
        columns: The columns.
        schema: What they mean.
        synthetic: Number of synthetic rows.
        real: Number of real rows, with the training rows.
    """
    found, expected = [], 2 * synthetic / real  # as many new real rows lie outside the range
    for m, column in zip(columns, schema.columns, strict=True):
        if m.invented:
            levels = ", ".join(map(repr, list(m.invented)[:5]))
            more = f" and {len(m.invented) - 5} more" if len(m.invented) > 5 else ""
            rows = sum(m.invented.values())
            found.append(f"{m.column}: {rows:,} synthetic rows have levels that no real row has: ")
            found[-1] += f"{levels}{more}"
        elif m.outside * synthetic > expected + 4 * expected**0.5 + 2:
            found.append(
                f"{m.column}: {m.outside:.2%} of the synthetic values lie outside the range of "
                "the real ones"
            )
        if m.off_grid:
            found.append(
                f"{m.column}: {m.off_grid:.2%} of the synthetic values are no multiples of "
                f"{column.step:g}, as all real ones are"
            )
        if m.missing_synthetic and not m.missing_real:
            found.append(
                f"{m.column}: {m.missing_synthetic:.2%} of the synthetic values are missing, and "
                "no real ones"
            )
    return found
