"""The command that compares a synthetic table with a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from musigma.cli.options import INSPECT, Argument, Common, app, at_least_one
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen
from musigma.cli.threads import Threads


@app.command(group=INSPECT)
def compare(
    real: Annotated[str, Argument],
    synthetic: Annotated[str, Argument],
    *,
    train: str | None = None,
    schema: str = "infer",
    target: tuple[str, ...] = (),
    rows: int = 20_000,
    html: Path | None = None,
    common: Common = Common(),
) -> None:
    """Compare a synthetic table with a real one: likeness, usefulness, privacy.

    Args:
        real: The real table: a file, a URL, or the name of a data set. With `--train`, rows that
            the synthesizer has not seen.
        synthetic: The synthetic table; its columns are found by their names.
        train: The rows that the synthesizer was trained on, for the membership test.
        schema: A schema file of the real table. By default types are inferred.
        target: Column to predict from the others. May be given several times. By default each of
            the first 20 columns, from 2,000 rows.
        rows: Largest number of rows of each table in a test; more are drawn from at random.
        html: The .html file to write a page with pictures to.
    """
    from musigma import comparison
    from musigma.files import replacing

    threads = Threads()
    at_least_one(rows=rows)
    if html is not None:
        check_out(html, ".html")
    threads.choose()
    screen = Screen(common)
    with screen.progress("comparing") as progress:
        result = comparison.compare(
            real,
            synthetic,
            train,
            schema=schema,
            target=target or None,
            most=rows,
            seed=common.seed,
            progress=progress,
        )
    if html is not None:
        with replacing(html) as draft:
            draft.write_text(result.to_html(), encoding="utf-8")
    wrote = {} if html is None else {"html": str(html)}
    text = str(result) if html is None else f"{result}\n\nreport: {html.resolve()}"
    screen.result(result.to_dict() | wrote, text)
