"""Commands that inspect: one example under a model, a run, and reports of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    DATA,
    INSPECT,
    OUTPUT,
    Argument,
    Common,
    DataOptions,
    Run,
    Source,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen, count, figure_text
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    from musigma.spec import Variable

MOST_ROWS = 32
"""Elements of a latent that are printed; the rest are left to --json."""


@app.command(group=INSPECT)
def inspect(
    run: Annotated[str, Argument],
    source: Annotated[str | None, Parameter(name="data", group=ARGUMENTS)] = None,
    *,
    index: int = 0,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Show the latents of one example: mean, std, variance and KL of each.

    For a .mus file, show what it contains, without decoding it.

    Args:
        run: A run folder, a .safetensors file, or a .mus file.
        source: A folder, a file, a URL, or the name of a data set. Required unless RUN is a .mus
            file.
        index: Number of the example, from 0, among all of the data unless --split says otherwise.
    """
    import numpy as np

    from musigma import evaluation

    if source is None:
        from musigma.cli.compress import describe

        describe(Path(run), Screen(common))
        return
    trained = Trained(run, common)
    found = trained.data(source, options.everything())
    if not 0 <= index < len(found):
        raise ValueError(f"index: expected 0 to {len(found) - 1}; got {index}")
    x, context = evaluation.batch(found, np.array([index]), trained.model, seed=common.seed)
    report = evaluation.inspect(trained.model, x, context)
    report["index"] = index
    if found.ids:
        report["id"] = found.ids[index]
    trained.screen.result(report, "\n".join(_inspection(report)))


def _inspection(report: dict[str, Any]) -> Iterator[str]:
    """The lines of an inspection; of a large latent only the elements with the highest KL."""
    import numpy as np

    name = report.get("id", f"example {report['index']}")
    yield (
        f"{name}: {report['bits_per_dim']:.4f} bits/dim, {report['nats']:.2f} nats "
        f"({report['bound']})"
    )
    for row in report["latents"]:
        title = f"\n{row['site']} ({'x'.join(map(str, row['shape']))}):"
        moments = [n for n in ("mean", "std", "variance", "kl") if n in row]
        columns = [np.array(row[n]).ravel() for n in moments]
        header = f"{'':>6}{'mean':>10}{'std':>10}{'variance':>10}"
        if "kl" in row:
            kl, active = columns[-1], np.array(row["active"]).ravel()
            yield f"{title} KL {row['kl_total']:.2f} nats, {active.sum()} of {active.size} active"
            yield f"{header}{'KL':>10}"
            for i in np.argsort(-kl)[:MOST_ROWS]:
                yield f"{_cells(i, columns)}{'' if active[i] else '  inactive'}"
            if len(kl) > MOST_ROWS:
                yield f"  ... and {len(kl) - MOST_ROWS} with less KL (--json has all of them)"
        elif columns:
            yield f"{title} the posterior; its prior is a model"
            yield header
            for i in range(len(columns[0])):
                yield _cells(i, columns)
        elif "noise" in row:
            yield f"{title} {row['nats']:.2f} nats under its prior"
            for name in ("prior_mean", "prior_log_std", "value", "noise"):
                s = row[name]
                yield (
                    f"  {name:<14}mean {s['mean']:>9.4f}  std {s['std']:>8.4f}  "
                    f"from {s['min']:>9.4f} to {s['max']:>9.4f}"
                )


def _cells(i: int, columns: list[Any]) -> str:
    return f"{i:>6}{''.join(f'{column[i]:>10.4f}' for column in columns)}"


@app.command(group=INSPECT)
def schema(
    source: Source,
    *,
    schema: Path | None = None,
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    common: Common = Common(),
) -> None:
    """Show what each column of a table is taken for, as a schema file that can be edited.

    `musigma train ... --schema schema.toml` reads it. Columns that cannot be used are left out of
    it, and named in comments.

    Args:
        schema: What is known already: a schema file, or the metadata.json that SDV writes.
        out: File to write, schema.toml for example. By default it is printed.
    """
    from musigma import data
    from musigma.files import replacing

    screen = Screen(common)
    if out is not None:
        check_out(out, ".toml")
    with screen.progress("reading") as progress:
        found = data.load(source, schema=schema or "infer", skip_bad=True, progress=progress)
    if found.schema is None:
        raise ValueError(f"data: {source} holds no table, and images have no columns")
    text = data.schema_toml(found)
    answer = {"columns": data.describe(found)["schema"], "notes": list(found.notes)}
    if out is None:
        screen.result(answer, text.rstrip())
        return
    with replacing(out) as draft:
        draft.write_text(text, encoding="utf-8")
    screen.result({"out": str(out), **answer}, f"{count(len(found.schema), 'column')}: {out}")


@app.command(group=INSPECT)
def info(
    run: Run,
    *,
    ledger: bool = False,
    source: Annotated[str | None, Parameter(name="--data", group=DATA)] = None,
    n: int = 512,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Show the model, the data and the figures of a run.

    Args:
        ledger: Also show the contribution of every term of every layer to the bits per dimension.
        source: Data for the ledger. By default the held-out part of the training data.
        n: Number of examples for the ledger.
    """
    at_least_one(n=n)
    trained = Trained(run, common)
    from musigma.evaluation import slow_directions

    model, data = trained.model, trained.about_data
    about: dict[str, Any] = {
        "file": str(trained.path),
        "model": dict(model.config),
        "exact": model.exact,
        "parameters": sum(p.numel() for p in model.parameters()),
        "slow": slow_directions(model) or None,
        "data": data or None,
    }
    shape = "x".join(map(str, trained.shape))
    lines = [
        f"{model.config['architecture']} for {shape}, {about['parameters']:,} parameters",
        "  " + ", ".join(f"{k}={v}" for k, v in model.config["options"].items()),
    ]
    if trained.spec.context:
        kinds = (f"{v.name} ({_kind(v)})" for v in trained.spec.context)
        lines.append(f"  conditioned on {', '.join(kinds)}")
    for direction, slow in (about["slow"] or {}).items():
        lines.append(f"  {direction} is slow: {', '.join(slow)}")
    if "energy" in data:
        lines.append(f"  trained by the density {data['energy']}")
    if data.get("source") is not None:
        lines.append(f"  trained on {data.get('train')} examples of {data['source']}")
    if "foreign" in trained.extra:
        about["foreign"] = trained.extra["foreign"]
        if "source" in about["foreign"]:
            lines.append("  converted from {source} ({family})".format(**about["foreign"]))
    if trained.folder and (trained.folder / "evaluation.json").is_file():
        about["evaluation"] = _evaluation(trained.folder / "evaluation.json")
        lines.append(f"  held-out: {figure_text(about['evaluation'])}")
    if ledger:
        account = _account(trained, source, n, options)
        about |= account
        lines += _account_lines(**account)
    trained.screen.result(about, "\n".join(lines))


def _kind(variable: Variable) -> str:
    """A variable of the context, as text."""
    if variable.classes:
        return f"{variable.classes} classes"
    shape = "x".join(map(str, variable.shape))
    return "a number" if shape == "1" else f"{shape} {'levels' if variable.levels else 'numbers'}"


def _account(trained: Trained, source: str | None, n: int, options: DataOptions) -> dict[str, Any]:
    """The ledger of a model on data, with the figure that its rows add up to."""
    from musigma import evaluation

    source = source or trained.about_data.get("source")
    if source is None:
        raise ValueError("data: the checkpoint does not say what it was trained on; give --data")
    model, seed = trained.model, trained.common.seed
    found = trained.data(source, options)
    found = found.subset(range(min(n, len(found))))
    x, context = next(evaluation.batches(model, found))
    return {
        "ledger": evaluation.ledger(model, found, seed=seed),
        "figure": evaluation.evaluate(model, found, seed=seed),
        "saturation": evaluation.saturation(model, x, context),
    }


def _account_lines(
    ledger: list[dict[str, Any]], figure: dict[str, Any], saturation: dict[str, float | None]
) -> Iterator[str]:
    yield f"\n{'bits/dim':>12}  term     layer"
    for row in ledger:
        yield f"{row['bits_per_dim']:>12.6f}  {row['term']:<8} {row['site']} ({row['kind']})"
    yield f"{sum(row['bits_per_dim'] for row in ledger):>12.6f}  sum"
    yield f"{figure['bits_per_dim']:>12.6f}  {figure_text(figure)}"
    shares = {name: share for name, share in saturation.items() if share}
    yield "\nshare of scales at their limit:" if shares else "\nno scale is at its limit"
    for name, share in shares.items():
        yield f"{share:>12.1%}  {name}"
    for name in (name for name, share in saturation.items() if share is None):
        yield f"not examined: {name}, which has no emitters() for a network that the pass ran"


def _evaluation(path: Path) -> dict[str, Any]:
    """The figure that training wrote into a run."""
    try:
        figure = json.loads(path.read_text(encoding="utf-8"))
        figure_text(figure)
        figure.pop("scores", None)  # of every example
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"RUN: {path} was changed or damaged ({error!r})") from error
    return figure


@app.command(group=INSPECT)
def report(
    runs: Annotated[list[Path], Argument],
    *,
    out: Path = Path("report.html"),
    title: str = "musigma",
    section: tuple[Path, ...] = (),
    common: Common = Common(),
) -> None:
    """Write an HTML page about runs: figures, curves, samples, reconstructions, ledgers.

    Args:
        runs: Run folders.
        out: The .html file to write.
        title: Title of the page.
        section: A .json file of a further section: an object with a title, and optionally text,
            tables and pictures. May be given several times.
    """
    from musigma import report as page

    check_out(out, ".html")
    page.write(out, runs, title=title, sections=section)
    answer = {"out": str(out), "runs": [str(run) for run in runs]}
    Screen(common).result(answer, f"report: {out.resolve()}")
