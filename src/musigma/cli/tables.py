"""Commands that ask a density of typed columns: samples under a condition, missing values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from musigma.cli.options import (
    USE,
    Argument,
    Common,
    Reading,
    Run,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out, write_rows, write_table
from musigma.cli.screen import count
from musigma.cli.trained import TABLES, Trained, read_data

if TYPE_CHECKING:
    from musigma.any_order import AnyOrder
    from musigma.data import Dataset
    from musigma.imputation import Imputation
    from musigma.schema import Schema

SUMMARY = ("row", "column", "mean", "std", "q05", "q50", "q95", "mode", "share")


def sample_where(trained: Trained, where: str, n: int, label: str | None, out: Path) -> None:
    """Write n rows that satisfy a condition."""
    import torch

    from musigma import questions
    from musigma.conditional import Conditional

    model, context = trained.any_order("where"), None
    if trained.spec.context:
        if label is None or trained.needs_given:
            raise ValueError(
                "where: the model is conditioned on "
                f"{', '.join(v.name for v in trained.spec.context)}; choose one class (--label)"
            )
        context = trained.class_rows(1, label)
        if isinstance(trained.model, Conditional):
            context = trained.model.embedded(context)
    found = questions.sample_where(model, where, n, context)
    trained.write(torch.from_numpy(found.rows), out)
    error = f" ± {found.standard_error:.2g}" if found.standard_error else ""
    trained.wrote(
        out,
        f"{count(n, 'sample')}; P(where) = {found.probability:.4g}{error}; {found.how}",
        n=n,
        where=where,
        probability=found.probability,
        standard_error=found.standard_error,
        effective=found.effective,
        how=found.how,
    )


def sample_given(trained: Trained, given: tuple[str, ...], n: int, out: Path) -> None:
    """Write n completions of every row of a table, which follow each other."""
    import numpy as np
    import torch

    from musigma import questions

    if len(given) != 1:
        raise ValueError(f"given: expected one table of rows to complete; got {len(given)}")
    (source,) = given
    model = _unconditional(trained, "given")
    rows = np.asarray(_partial(trained, source, Reading()).array)
    absent = np.flatnonzero(np.isnan(rows).all(0)).tolist()
    filled = questions.complete(model, rows.repeat(n, 0), missing=absent)
    trained.write(torch.from_numpy(filled), out)
    drawn = int(np.isnan(rows).sum())
    what = f"{count(len(filled), 'sample')}, {n} for each of {count(len(rows), 'row')} of {source}"
    trained.wrote(out, what, n=len(filled), rows=len(rows), drawn=drawn)


@app.command(group=USE)
def impute(
    run: Run,
    source: Annotated[str, Argument],
    *,
    n: int = 1,
    out: Path,
    summary: Path | None = None,
    reading: Reading = Reading(),
    common: Common = Common(),
) -> None:
    """Draw the missing values of a table, given all the values that each row has.

    Each filled table is a draw as a whole, and n of them show how certain the values are: compute
    what you want to know from each of them, and look at the spread (multiple imputation). Columns
    of the model that the table lacks are drawn too. The column `id` has the names of the rows, if
    the table has them, or their places in it, if some were left out. For models of `musigma train
    table`, whose draws are exact, and of `musigma train miwae`, whose draws are resampled from
    1,000 for each row, by their importance weights.

    Args:
        source: The table.
        n: Number of filled tables. With more than one, they follow each other in the file, and the
            columns `draw` and `row` come first.
        out: A .csv or .parquet table.
        summary: A .csv table with a row for each missing value: the mean, the standard deviation
            and the 5, 50 and 95 % quantiles of its draws; or the most frequent level and its
            share. Needs several draws.
        reading: How the table is read.
    """
    import numpy as np

    from musigma.data.columns import decode

    at_least_one(n=n)
    check_out(out, *TABLES)
    if summary is not None:
        check_out(summary, ".csv")
        if n == 1:
            raise ValueError("summary: it needs several draws (--n 20)")
    trained = Trained(run, common)
    draw, schema = _imputer(trained)
    if n > 1 and (taken := {"draw", "row"} & set(schema.names)):
        raise ValueError(
            f"n: the table has a column {sorted(taken)[0]!r}, which is the name of a column that "
            "tells draws apart; rename it, or draw once (--n 1)"
        )
    data = _partial(trained, source, reading)
    rows = np.asarray(data.array)
    found = draw(rows, n)
    table = decode(np.concatenate([found.filled(i) for i in range(n)]), schema)
    if data.ids and "id" not in schema.names:
        table = table.add_column(0, "id", [list(data.ids) * n])
    if n > 1:
        table = table.add_column(0, "row", [np.tile(np.arange(len(rows)), n)])
        table = table.add_column(0, "draw", [np.repeat(np.arange(n), len(rows))])
    if summary is not None:
        cells = found.summary()
        write_rows(summary, [{name: [cell.get(name) for cell in cells] for name in SUMMARY}])
    write_table(out, table, schema)
    counts = np.isnan(rows).sum(0)
    columns = {name: int(k) for name, k in zip(schema.names, counts, strict=True) if k}
    what = (
        f"{count(int(counts.sum()), 'missing value')} in {count(len(columns), 'column')} of "
        f"{count(len(rows), 'row')}, {count(n, 'draw')}"
    )
    answer: dict[str, Any] = {"rows": len(rows), "draws": n, "missing": columns}
    trained.wrote(out, what, **answer, **({} if summary is None else {"summary": str(summary)}))


def _imputer(trained: Trained) -> tuple[Callable[[Any, int], Imputation], Schema]:
    """A function that draws the missing values of rows n times, and the columns of the model."""
    import numpy as np
    import torch

    from musigma import imputation, questions
    from musigma.any_order import AnyOrder

    spec, model = trained.spec, trained.model
    schema, plain = spec.schema, not spec.context and not isinstance(model, AnyOrder)
    if schema is None or not plain or not imputation.takes_missing(model, spec.shape[0]):
        known = _unconditional(trained, "impute")
        return functools.partial(questions.impute, known), known.schema

    def draw(rows: Any, n: int) -> Imputation:
        x = torch.as_tensor(rows, dtype=torch.float32, device=trained.device)
        filled = imputation.draw_missing(model, x, n).numpy(force=True).swapaxes(1, 2)
        holes = np.isnan(rows)
        return imputation.Imputation(schema, rows, np.argwhere(holes), filled[holes])

    return draw, schema


def _unconditional(trained: Trained, what: str) -> AnyOrder:
    model = trained.any_order(what)
    if trained.spec.context:
        names = ", ".join(v.name for v in trained.spec.context)
        raise ValueError(
            f"{what}: the model is conditioned on {names}, and rows are completed by models of "
            "all columns; train one without --given and --conditional"
        )
    return model


def _partial(trained: Trained, source: str, reading: Reading) -> Dataset:
    """Rows of a table that may lack values and columns."""
    found = read_data(
        source,
        trained.preprocess,
        reading,
        trained.screen,
        schema=trained.spec.schema,
        partial=True,
        allow_constant=True,
    )
    for name, reason in found.skipped.items():
        trained.screen.note(f"left out: {name} {reason}")
    for note in found.notes:
        trained.screen.note(note)
    return found
