"""The commands that use a trained model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from musigma.cli import compress, shards
from musigma.cli.shared import (
    USUAL,
    USUAL_DATA,
    CommonOptions,
    Data,
    Screen,
    Trained,
    as_levels,
    at_least_one,
    check_out,
    said,
)

commands = App()


@commands.command
def reconstruct(
    run: str,
    data: str,
    *,
    n: int = 16,
    out: Path = Path("reconstructions.png"),
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Encode and decode examples: originals above, what the latents know of them below.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name.
        n: How many.
        out: A .png grid, or an .npy or .npz array of the reconstructions alone.
        options: Which data.
        common: Shared options.
    """
    import torch

    from musigma.report import figures

    screen, trained = Screen(common), Trained(run, common)
    trained.check_out(out)
    x, context = trained.examples(data, options, screen, n)
    with torch.no_grad():
        again = trained.model.reconstruct(x, context)
    if out.suffix == ".png" and len(trained.shape) == 3:
        figures.rows([as_levels(x), as_levels(again)], out, levels=trained.levels)
    else:
        trained.write(again, out)
    error = float((again - x).abs().mean())
    screen.result(
        {"out": str(out), "n": len(x), "mean_absolute_error": error},
        f"{len(x)} reconstructions, mean absolute error {error:.4g}: {out}",
    )


@commands.command
def interpolate(
    run: str,
    data: str,
    *,
    pairs: int = 8,
    steps: int = 9,
    path: Literal["spherical", "linear"] = "spherical",
    out: Path = Path("interpolations.png"),
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Walk from one example to another through the latents, a row for each pair.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name.
        pairs: How many pairs: examples 0 and 1, 2 and 3, and so on.
        steps: Examples on each walk, with its two ends.
        path: Along the sphere on which the prior has its mass, or straight.
        out: A .png grid, or an .npy or .npz array.
        options: Which data.
        common: Shared options.
    """
    import torch

    if pairs < 1 or steps < 2:
        raise ValueError(f"pairs, steps: expected at least 1 and 2; got {pairs} and {steps}")
    screen, trained = Screen(common), Trained(run, common)
    trained.check_out(out)
    x, context = trained.examples(data, options, screen, 2 * pairs)
    if len(x) < 2:
        raise ValueError(f"data: {data} holds {len(x)} examples, and a walk needs two")
    x = x[: len(x) // 2 * 2]
    rows = (None, None) if context is None else (context[: len(x) : 2], context[1 : len(x) : 2])
    with torch.no_grad():
        walks = trained.model.interpolate(x[::2], x[1::2], steps, *rows, path=path)
    trained.write_rows(walks, out)
    screen.result(
        {"out": str(out), "pairs": len(walks), "steps": steps}, f"{len(walks)} walks: {out}"
    )


@commands.command
def decode(
    run: str,
    latents: Path,
    *,
    out: Path | None = None,
    temperature: str = "1",
    label: str | None = None,
    common: CommonOptions = USUAL,
) -> None:
    """Make examples of latents: of all of them, or of the topmost ones and draws of the rest.

    Args:
        run: A run folder, or a .safetensors file.
        latents: An .npz file with arrays z0 (the top), z1, ..., as `encode` writes it.
        out: A .png grid, or an .npy or .npz array.
        temperature: Of the latents that are not given.
        label: The class, if the model is conditional; by default the file's own labels.
        common: Shared options.
    """
    import torch

    scale = shards.read_temperature(temperature)
    screen, trained = Screen(common), Trained(run, common)
    out = out or Path("decoded.png" if len(trained.shape) == 3 else "decoded.npy")
    trained.check_out(out)
    z, labels, whitened = _read_latents(latents, trained)
    n = len(z[0])
    context = trained.context(n, label)
    if context is not None and label is None and labels is not None:
        classes = context.shape[1]
        if labels.shape != (n,) or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(
                f"latents: expected {n} labels from 0 to {classes - 1}, and {latents} has others; "
                "correct them, or say which class to take (--label)"
            )
        context = torch.nn.functional.one_hot(labels, classes).to(context)
    with torch.no_grad():
        x = trained.model.decode(z, context, whiten=whitened, temperature=scale)
    trained.write(x, out)
    screen.result({"out": str(out), "n": n}, f"{n} examples: {out}")


def _read_latents(path: Path, trained: Trained) -> tuple[list[Any], Any, bool]:
    """Latents as the model takes them, their labels if any, and whether they are whitened."""
    import numpy as np
    import torch

    if not path.is_file():
        raise ValueError(f"latents: there is no file {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = sum(name[0] == "z" for name in arrays)
        z = [arrays[f"z{i}"] for i in range(count)]
        labels = arrays.get("labels")
        labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        whitened = bool(arrays.get("whitened", False))
    except Exception as error:  # whatever a parser throws at a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"latents: {path} is no .npz file of z0, z1, ... ({reason})") from error
    wanted, got = [tuple(t.shape[1:]) for t in trained.latents()], [a.shape for a in z]
    if not z or [s[1:] for s in got] != wanted[: len(z)] or len({s[:1] for s in got}) > 1:
        raise ValueError(
            f"latents: expected z0, z1, ... of shapes (n, *s) for s in {wanted}, top first; "
            f"{path} has {got}"
        )
    if not len(z[0]) or any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in z):
        raise ValueError(f"latents: expected finite numbers; {path} has none, or others")
    z = [torch.from_numpy(a).to(trained.device, trained.dtype) for a in z]
    return z, labels, whitened


@commands.command
def inspect(
    run: str,
    data: str | None = None,
    *,
    index: int = 0,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """What the model says about one very input: mean, std, variance and KL of every latent.

    Of a .mus file, and no data: what is in it, without decoding any.

    Args:
        run: A run folder, or a .safetensors file; or a .mus file.
        data: A folder, a file, or a name.
        index: Which example of the data, from 0; of all of them unless --split says otherwise.
        options: Which data.
        common: Shared options.
    """
    import numpy as np

    from musigma import evaluation

    if data is None:
        compress.tell(Path(run), Screen(common))
        return
    screen, trained = Screen(common), Trained(run, common)
    options = dataclasses.replace(options, split=options.split or "all")
    found = trained.data(data, options, screen)
    if not 0 <= index < len(found):
        raise ValueError(f"index: expected 0 to {len(found) - 1}; got {index}")
    x, context = evaluation.batch(found, np.array([index]), trained.model, seed=common.seed)
    report = evaluation.inspect(trained.model, x, context)
    report["index"] = index
    if found.ids:
        report["id"] = found.ids[index]
    screen.result(report, _inspection(report))


def _inspection(report: dict[str, Any]) -> str:
    """An inspection as text: a line for each element, of large latents for the costliest."""
    import numpy as np

    lines = [
        f"{report.get('id', 'example ' + str(report['index']))}: {report['bits_per_dim']:.4f} "
        f"bits/dim, {report['nats']:.2f} nats ({report['bound']})"
    ]
    for row in report["latents"]:
        shape = "x".join(map(str, row["shape"]))
        if "kl" in row:
            kl, active = np.array(row["kl"]), np.array(row["active"])
            lines.append(
                f"\n{row['site']} ({shape}): KL {row['kl_total']:.2f} nats, "
                f"{active.sum()} of {active.size} active"
            )
            lines.append(f"{'':>6}{'mean':>10}{'std':>10}{'variance':>10}{'KL':>10}")
            parts = (np.array(row[n]).ravel() for n in ("mean", "std", "variance"))
            table = list(zip(*parts, kl.ravel(), active.ravel(), strict=True))
            for i in np.argsort(-kl.ravel())[:32]:
                *values, on = table[i]
                numbers = "".join(f"{v:>10.4f}" for v in values)
                lines.append(f"{i:>6}{numbers}{'' if on else '  inactive'}")
            if len(table) > 32:
                lines.append(f"  ... and {len(table) - 32} with less KL (--json has them all)")
        elif "mean" in row:
            lines.append(
                f"\n{row['site']} ({shape}): the posterior, under a prior that is a model"
            )
            lines.append(f"{'':>6}{'mean':>10}{'std':>10}{'variance':>10}")
            parts = [np.array(row[n]).ravel() for n in ("mean", "std", "variance")]
            for i, values in enumerate(zip(*parts, strict=True)):
                lines.append(f"{i:>6}{''.join(f'{v:>10.4f}' for v in values)}")
        elif "noise" in row:
            lines.append(f"\n{row['site']} ({shape}): {row['nats']:.2f} nats under its prior")
            for name in ("prior_mean", "prior_log_std", "value", "noise"):
                s = row[name]
                lines.append(
                    f"  {name:<14}mean {s['mean']:>9.4f}  std {s['std']:>8.4f}  "
                    f"from {s['min']:>9.4f} to {s['max']:>9.4f}"
                )
    return "\n".join(lines)


@commands.command
def info(
    run: str,
    *,
    ledger: Annotated[bool, Parameter(negative="")] = False,
    data: str | None = None,
    n: int = 512,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """What a run is: its model, its data, its figures; with --ledger, the account of its bits.

    Args:
        run: A run folder, or a .safetensors file.
        ledger: Print every term of every layer; the rows add up to the figure.
        data: What to draw the account up for; by default the held-out part of the training data.
        n: Of how many examples.
        options: Which data.
        common: Shared options.
    """
    from musigma import evaluation

    at_least_one(n=n)
    screen, trained = Screen(common), Trained(run, common)
    model = trained.model
    about: dict[str, Any] = {
        "file": str(trained.path),
        "model": dict(model.config),
        "exact": model.exact,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": trained.extra.get("data"),
    }
    if trained.folder and (trained.folder / "evaluation.json").is_file():
        about["evaluation"] = _evaluation(trained.folder / "evaluation.json")
    options_text = ", ".join(f"{k}={v}" for k, v in model.config["options"].items())
    lines = [
        f"{model.config['architecture']} for {'x'.join(map(str, trained.shape))}, "
        f"{about['parameters']:,} parameters",
        f"  {options_text}",
    ]
    if "source" in (about["data"] or {}):
        lines.append(
            f"  trained on {about['data'].get('train')} examples of {about['data']['source']}"
        )
    if "foreign" in trained.extra:
        about["foreign"] = trained.extra["foreign"]
        lines.append(
            "  converted from {source}, a checkpoint of {family}".format(**about["foreign"])
        )
    if "evaluation" in about:
        lines.append(f"  held-out: {said(about['evaluation'])}")
    if ledger:
        source = data or (about["data"] or {}).get("source")
        if source is None:
            raise ValueError("data: the checkpoint names no data; give some (--data)")
        found = trained.data(source, options, screen)
        found = found.subset(range(min(n, len(found))))
        rows = evaluation.ledger(model, found, seed=common.seed)
        figure = evaluation.evaluate(model, found, seed=common.seed)
        x, context = next(evaluation.batches(model, found))
        shares = evaluation.saturation(model, x, context)
        about |= {"ledger": rows, "figure": figure, "saturation": shares}
        lines += ["", f"{'bits/dim':>12}  term     layer"]
        lines += [
            f"{r['bits_per_dim']:>12.6f}  {r['term']:<8} {r['site']} ({r['kind']})" for r in rows
        ]
        total = sum(r["bits_per_dim"] for r in rows)
        lines += [f"{total:>12.6f}  sum", f"{figure['bits_per_dim']:>12.6f}  {said(figure)}"]
        tight = {name: share for name, share in shares.items() if share > 0}
        lines += ["", "scales at their limit:"] if tight else ["", "no scale is at its limit"]
        lines += [f"{share:>12.1%}  {name}" for name, share in tight.items()]
    screen.result(about, "\n".join(lines))


def _evaluation(path: Path) -> dict[str, Any]:
    """The figure that training left in a run."""
    try:
        figure = json.loads(path.read_text(encoding="utf-8"))
        said(figure)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"RUN: {path} is not as it was written ({error!r})") from error
    return figure


@commands.command
def report(
    runs: list[Path],
    *,
    out: Path = Path("report.html"),
    title: str = "musigma",
    common: CommonOptions = USUAL,
) -> None:
    """One HTML page of runs: figures, curves, samples, reconstructions, accounts.

    Args:
        runs: Run folders.
        out: The page.
        title: Its title.
        common: Shared options.
    """
    from musigma import report as page

    check_out(out, ".html")
    screen = Screen(common)
    page.write(out, runs, title=title)
    screen.result({"out": str(out), "runs": [str(r) for r in runs]}, f"report: {out.resolve()}")
