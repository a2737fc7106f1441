"""The command that checks whether posterior draws of a conditional model are calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    INSPECT,
    Common,
    DataOptions,
    Run,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out, write_rows
from musigma.cli.trained import Trained

TEST = "A table of true parameters and observations, which the model was not trained on."


@app.command(group=INSPECT)
def calibrate(
    run: Run,
    test: Annotated[str | None, Parameter(group=ARGUMENTS, help=TEST)] = None,
    *,
    draws: int | None = None,
    pairs: int = 10_000,
    tolerance: float = 0.1,
    local: int = 8,
    at: tuple[str, ...] = (),
    out: Path | None = None,
    ranks: Path | None = None,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Check whether draws given an observation are calibrated: ranks, coverage, local tests.

    TEST holds pairs of true parameters and observations, as the training data do. By default, and
    if it is the training data, it is their held-out part. The verdict is calibrated,
    overconfident, underconfident, biased, miscalibrated (of another shape), or cannot tell, if the
    pairs are too few.

    Args:
        draws: Number of draws for each pair. By default 1,000; fewer for more than 2,000 pairs.
        pairs: Largest number of pairs; of more, so many are chosen at random.
        tolerance: Smallest deviation of coverage that matters. If the pairs are too few to find
            it, the verdict is "cannot tell".
        local: Number of pairs, chosen at random, at whose observations a classifier tries to tell
            draws from true parameters. 0: none.
        at: File with observations to test in this way instead, as `sample --given` takes it. May
            be given several times, once for each file.
        out: A .html page with pictures, or the tables as a .md or .tex file.
        ranks: The .csv or .parquet file to write the ranks of every pair to.
    """
    from musigma import coverage
    from musigma.report.sections import SUFFIXES

    at_least_one(draws=draws, pairs=pairs, local=local or None)
    if out is not None:
        check_out(out, *SUFFIXES)
    if ranks is not None:
        check_out(ranks, ".csv", ".parquet")
    trained = Trained(run, common)
    _refuse(trained)
    source = test or trained.about_data.get("source")
    if source is None:
        raise ValueError(
            "TEST: the checkpoint does not say what it was trained on; give pairs that it was not "
            "trained on"
        )
    data = trained.data(source, options)
    if trained.seen and trained.part in ("all", "train"):
        raise ValueError(
            f"split: the model was trained on {source}, so its draws look better there than they "
            "are; leave out --split, to use the held-out part, or give other pairs"
        )
    observed = trained.context(1, None, at) if at else None
    with trained.screen.progress("drawing") as progress:
        found = coverage.check(
            trained.model,
            data,
            draws=draws,
            pairs=pairs,
            tolerance=tolerance,
            local=local,
            at=observed,
            seed=common.seed,
            source=source if trained.part == "all" else f"the {trained.part} part of {source}",
            progress=progress,
        )
    answer, text, wrote = found.to_dict(), str(found), {}
    if trained.seen:
        note = f"{source} is what the model was trained on, so its {trained.part} part is used"
        trained.screen.note(note)
    if out is not None:
        found.document.write(out)
        wrote["out"], text = str(out), f"{text}\n\nreport: {out.resolve()}"
    if ranks is not None:
        write_rows(ranks, [found.columns()])
        wrote["ranks"], text = str(ranks), f"{text}\n\nranks: {ranks.resolve()}"
    trained.screen.result(answer | wrote, text)


def _refuse(trained: Trained) -> None:
    """Refuse a model whose draws cannot be checked."""
    if not trained.spec.context:
        raise ValueError(
            "RUN: the model is conditioned on nothing, so there is nothing to draw given an "
            "observation; train one with --given"
        )
    if trained.is_image:
        raise ValueError(
            f"RUN: expected a model of columns of numbers; its examples are images of shape "
            f"{trained.shape}, whose elements are too many to test"
        )
