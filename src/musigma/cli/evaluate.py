"""Figures of a model on data: of the whole, and of each example."""

from __future__ import annotations

import math
from pathlib import Path

from musigma.cli.options import USE, Common, CommonOptions, Data, DataOptions, Run, Source, app
from musigma.cli.outputs import Share, check_out, rows_file
from musigma.cli.sample import example_columns
from musigma.cli.screen import count, figure_text, launched_processes
from musigma.cli.trained import Trained


@app.command(group=USE)
def score(
    run: Run,
    source: Source,
    *,
    out: Path,
    k: int = 1,
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Score every example in bits per dimension; outliers score highest.

    With one draw per example (k = 1) a score depends a little on the batch that the example is in;
    a larger k reduces this. All of the data are scored unless --split says otherwise.

    Args:
        out: A .csv or .parquet table. Each of several processes writes a shard.
        k: Draws per example; more draws give a tighter bound.
    """
    import numpy as np

    from musigma import evaluation

    check_out(out, ".csv", ".parquet")
    trained, processes = Trained(run, common), launched_processes()
    found = trained.data(source, options.everything())
    share = Share(processes, len(found), options.batch_size)
    rows, out = share.rows, share.path(out)
    with rows_file(out) as add, trained.screen.progress("scoring") as progress:
        columns = evaluation.score(
            trained.model,
            found,
            k=k,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=share.progress(progress),
            processes=processes,
        )
        if not len(rows):  # more processes than batches: a table with columns and no rows
            one = evaluation.score(trained.model, found.subset([0]), k=k)
            columns = {name: values[:0] for name, values in one.items()}
        add(example_columns(found, rows) | columns)
    bits = columns["bits_per_dim"] if len(rows) else [math.nan]
    summary = {
        "out": str(out),
        "n": len(rows),
        **share.fields,
        "bits_per_dim": float(np.mean(bits)),
        "highest": float(np.max(bits)),
        "lowest": float(np.min(bits)),
        "bound": evaluation.bound(trained.model, k),
    }
    figures = (
        f", {summary['lowest']:.4f} to {summary['highest']:.4f} bits/dim, "
        f"mean {summary['bits_per_dim']:.4f} ({summary['bound']})"
    )
    text = f"{count(len(rows), 'score')}{figures if len(rows) else ''}{share}: {out}"
    trained.screen.result(summary, text)


@app.command(group=USE)
def evaluate(
    run: Run,
    source: Source,
    *,
    k: int = 1,
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Compute the mean bits per dimension of data, with its standard error.

    The answer says whether the figure is exact or an upper bound.

    Args:
        k: Draws per example; more draws give a tighter bound for models that are not exact.
    """
    from musigma import evaluation
    from musigma.training import join, leave

    processes = launched_processes()
    if processes.count > 1:
        processes = join(common.device)
    trained = Trained(run, common)
    found = trained.data(source, options)
    with trained.screen.progress("evaluating") as progress:
        share = Share(processes, len(found), options.batch_size)
        figure = evaluation.evaluate(
            trained.model,
            found,
            k=k,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=share.progress(progress),
            processes=processes,
        )
    leave()
    text = f"{figure_text(figure)}; {trained.part} of {source}"
    trained.screen.result({"run": run, "data": source, "split": trained.part, **figure}, text)
