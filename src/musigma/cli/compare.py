"""The command that compares figures of models, or a synthetic table with a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from musigma.cli.options import INSPECT, Argument, Common, app, at_least_one
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen
from musigma.cli.threads import Threads

if TYPE_CHECKING:
    from musigma.comparison import Comparison
    from musigma.evaluation.paired import Compared

OF_RECORDS, OF_TABLES = Group("Records", sort_key=8), Group("Tables", sort_key=8)


@app.command(group=INSPECT)
def compare(
    sources: Annotated[list[str], Argument],
    *,
    out: Path | None = None,
    allow: Annotated[
        tuple[Literal["split", "context", "k"], ...], Parameter(group=OF_RECORDS)
    ] = (),
    train: Annotated[str | None, Parameter(group=OF_TABLES)] = None,
    schema: Annotated[str | None, Parameter(group=OF_TABLES)] = None,
    target: Annotated[tuple[str, ...], Parameter(group=OF_TABLES)] = (),
    rows: Annotated[int | None, Parameter(group=OF_TABLES)] = None,
    common: Common = Common(),
) -> None:
    """Compare figures of models on the same examples, or a synthetic table with a real one.

    `musigma compare RUN RUN ...` compares records, which `train` and `evaluate --out` write: each
    figure with its standard error, and its difference to the first in pairs of examples, with an
    interval of 95 % and a p-value. Figures of other examples, splits, preprocessing, measures,
    contexts or numbers of draws are refused, and every difference is named.

    `musigma compare REAL SYNTHETIC` compares tables: likeness, usefulness, privacy.

    Args:
        sources: Two or more records, .json files or run folders; or two tables: the real one, with
            --train of rows that the synthesizer has not seen, and the synthetic one.
        out: A .html page, or the tables of the result as a .md or .tex file.
        allow: A difference of the records that is not to be refused. May be given several times.
        train: The rows that the synthesizer was trained on, for the membership test.
        schema: A schema file of the real table. By default types are inferred.
        target: Column to predict from the others. May be given several times. By default each of
            the first 20 columns, from 2,000 rows.
        rows: Largest number of rows of each table in a test, by default 20,000; more are drawn
            from at random.
    """
    from musigma.report.sections import SUFFIXES

    if out is not None:
        check_out(out, *SUFFIXES)
    at_least_one(rows=rows)
    screen, records = Screen(common), [one for one in sources if _is_record(Path(one))]
    if records:
        if others := [one for one in sources if one not in records]:
            raise ValueError(
                f"sources: {', '.join(records)}: expected other records (.json files, or run "
                f"folders) to compare with; got {', '.join(others)}"
            )
        _refuse("tables", train=train, schema=schema, target=target, rows=rows)
        found = _records(records, allow)
    else:
        if len(sources) != 2:
            raise ValueError(
                "sources: expected a real and a synthetic table, or two or more records (.json "
                f"files, or run folders); got {', '.join(sources)}"
            )
        _refuse("records", allow=allow)
        found = _tables(sources, train, screen, schema=schema, target=target, most=rows)
    answer, text = found.to_dict(), str(found)
    if out is not None:
        found.document.write(out)
        answer, text = {**answer, "out": str(out)}, f"{text}\n\nwritten: {out.resolve()}"
    screen.result(answer, text)


def _is_record(path: Path) -> bool:
    """Whether a file holds a record, or a folder a run, and not a table."""
    files = ("evaluation.json", "model.safetensors")
    return path.suffix == ".json" or any((path / name).is_file() for name in files)


def _refuse(kind: str, **given: Any) -> None:
    """Refuse options that are for something else."""
    if unused := [name for name, value in given.items() if value]:
        raise ValueError(f"{', '.join(unused)}: for {kind} alone; leave it out")


def _records(paths: Sequence[str], allow: Sequence[str]) -> Compared:
    """Compare records, by the name of the file or the run, or by the path where names repeat."""
    from musigma.evaluation import Record, compare

    short = [Path(path).resolve().stem for path in paths]
    names = [
        one if short.count(one) == 1 else path for one, path in zip(short, paths, strict=True)
    ]
    return compare(dict(zip(names, map(Record.read, paths), strict=True)), allow=allow)


def _tables(
    sources: Sequence[str], train: str | None, screen: Screen, **options: Any
) -> Comparison:
    """Compare a real table and a synthetic one, with the options that are given."""
    from musigma import comparison

    (real, synthetic), given = sources, {name: value for name, value in options.items() if value}
    Threads().choose()
    with screen.progress("comparing") as progress:
        seed = screen.common.seed
        return comparison.compare(real, synthetic, train, seed=seed, progress=progress, **given)
