"""Samples, latents, reconstructions and interpolations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    USE,
    Common,
    CommonOptions,
    Data,
    DataOptions,
    Run,
    Source,
    app,
    at_least_one,
    temperatures,
)
from musigma.cli.outputs import Columns, Share, check_out, rows_file
from musigma.cli.screen import count, launched_processes
from musigma.cli.trained import Trained, as_array

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from musigma.context import Context
    from musigma.data import Dataset
    from musigma.spec import Variable

BLOCK = 64
"""Number of samples that are drawn together."""


@app.command(group=USE)
def sample(
    run: Run,
    *,
    n: int = 64,
    label: str | None = None,
    given: tuple[str, ...] = (),
    temperature: str = "1",
    mode: bool = False,
    several: Annotated[str | None, Parameter(name="--temperatures")] = None,
    out: Path | None = None,
    common: CommonOptions = Common(),
) -> None:
    """Draw new examples.

    Args:
        n: Number of samples; with `--given`, for each row of the file.
        label: Class to draw, by name or number, if the model is conditioned on classes. By default
            all classes in turn.
        given: File with the rows to draw for, if the model is conditioned on more than classes: a
            table with a column for each variable, an array, or a folder of images. May be given
            several times, once for each file. The n samples of a row follow each other.
        temperature: Factor of the standard deviation of every draw; or one for each latent, top
            first: 0.7,0.8,1.
        mode: Return the centre of p(x | latents) instead of a draw from it.
        several: Show the centres of the same draws at several temperatures, a row for each:
            0,0.5,0.7,1. Replaces `--temperature`.
        out: A .png grid, or an .npy or .npz array; samples of a table also as .csv or .parquet.
            Each of several processes writes a shard.
    """
    import torch

    from musigma import context as contexts
    from musigma.evaluation import noise

    at_least_one(n=n)
    scale, processes = temperatures(temperature), launched_processes()
    trained = Trained(run, common)
    out = out or Path(
        "samples.png" if trained.is_image and processes.count == 1 else "samples.npy"
    )
    trained.check_out(out)
    if processes.count > 1 and (out.suffix == ".png" or several is not None):
        raise ValueError(
            f"out: {processes.count} processes write arrays in shards; name an .npy or .npz file, "
            "or draw the picture in one process"
        )
    context = trained.context(n, label, given)
    n = n if context is None else contexts.length(context) or n
    if several is not None:
        if temperature != "1":
            raise ValueError("temperature: --temperatures replaces it; leave one of them out")
        _at_temperatures(trained, n, temperatures(several), context, out)
        return
    share = Share(processes, n, BLOCK)
    rows, out = share.rows, share.path(out)
    parts = [torch.empty(0, *trained.shape, dtype=trained.dtype)]
    with trained.screen.progress("sampling") as progress:
        for start in rows[::BLOCK]:
            block = slice(start, min(start + BLOCK, rows.stop))
            noise(common.seed, start // BLOCK)
            drawn = trained.model.sample(
                block.stop - start,
                contexts.rows(context, block),
                temperature=_scale(scale),
                mode=mode,
            )
            parts.append(drawn.cpu())
            if progress:
                progress(block.stop - rows.start, len(rows))
    trained.write(torch.cat(parts), out)
    trained.screen.result(
        {"out": str(out), "n": len(rows), "temperature": temperature, **share.fields},
        f"{count(len(rows), 'sample')}{share}: {out}",
    )


def _scale(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """One temperature for all latents, or one for each."""
    return values[0] if len(values) == 1 else values


def _at_temperatures(
    trained: Trained, n: int, values: Sequence[float], context: Context, out: Path
) -> None:
    """Write a row of draws for each temperature."""
    from musigma import editing

    trained.write_rows(editing.temperatures(trained.model, n, values, context), out)
    trained.screen.result(
        {"out": str(out), "n": n, "temperatures": list(values)},
        f"{count(n, 'sample')} at {count(len(values), 'temperature')}: {out}",
    )


@app.command(group=USE)
def encode(
    run: Run,
    source: Source,
    *,
    out: Path,
    draw: bool = False,
    whiten: bool = False,
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Write the latents of data: z0 (the top), z1, ..., with the label of each example.

    Args:
        out: An .npz file of arrays, or a .parquet table with a column for each element: z0_0,
            z0_1, ... Each of several processes writes a shard.
        draw: Draw from the posterior instead of taking its centre.
        whiten: Write (z - mean) / std under the prior of each latent.
    """
    import torch

    from musigma.evaluation import batches

    check_out(out, ".npz", ".parquet")
    trained, processes = Trained(run, common), launched_processes()
    found = trained.data(source, options)
    share = Share(processes, len(found), options.batch_size)
    rows, out = share.rows, share.path(out)
    empty, done = trained.latents(), rows.start
    with (
        rows_file(out, whitened=whiten) as add,
        trained.screen.progress("encoding") as progress,
        torch.no_grad(),
    ):
        add(
            _latent_columns(
                trained, found, range(done, done), empty, trained.blank_context(0), out
            )
        )
        for x, context in batches(
            trained.model,
            found,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=share.progress(progress),
            processes=processes,
        ):
            z = trained.model.encode(x, context, mode=not draw, whiten=whiten)
            add(_latent_columns(trained, found, range(done, done + len(x)), z, context, out))
            done += len(x)
    shapes = {f"z{i}": [len(rows), *z.shape[1:]] for i, z in enumerate(empty)}
    shapes |= {"labels": [len(rows)]} if found.labels is not None else {}
    shapes |= {f"given_{v.name}": [len(rows), *v.shape] for v in _unlabelled(trained)}
    trained.screen.result(
        {
            "out": str(out),
            "split": trained.part,
            "arrays": shapes | {"whitened": []},
            **share.fields,
        },
        f"{count(len(empty), 'latent')} of {count(len(rows), 'example')} "
        f"({trained.part} of {source}){share}: {out}",
    )


def _unlabelled(trained: Trained) -> list[Variable]:
    """What the model is conditioned on besides `label`, which has an array of its own."""
    return [v for v in trained.spec.context if v.name != "label"]


def _latent_columns(
    trained: Trained, found: Dataset, rows: range, z: Sequence[Tensor], context: Context, out: Path
) -> Columns:
    """Latents, labels and context as arrays; for a table, latents with a column per element."""
    arrays = {f"z{i}": as_array(t) for i, t in enumerate(z)}
    if out.suffix == ".npz":
        if found.labels is not None:
            arrays["labels"] = found.labels[rows.start : rows.stop]
        named = trained.named_context(context)
        return arrays | {f"given_{v.name}": as_array(named[v.name]) for v in _unlabelled(trained)}
    flat = {name: a.reshape(len(a), math.prod(a.shape[1:])) for name, a in arrays.items()}
    columns = {f"{name}_{j}": a[:, j] for name, a in flat.items() for j in range(a.shape[1])}
    return example_columns(found, rows) | columns


def example_columns(found: Dataset, rows: range) -> Columns:
    """Columns that identify examples: their index, and id and label if there are any."""
    import numpy as np

    columns: Columns = {"index": np.arange(rows.start, rows.stop)}
    if found.ids:
        columns["id"] = found.ids[rows.start : rows.stop]
    if found.labels is not None:
        labels, names = found.labels[rows.start : rows.stop], found.label_names
        columns["label"] = [names[i] for i in labels] if names else labels
    return columns


@app.command(group=USE)
def decode(
    run: Run,
    latents: Annotated[Path, Parameter(group=ARGUMENTS)],
    *,
    out: Path | None = None,
    temperature: str = "1",
    label: str | None = None,
    common: CommonOptions = Common(),
) -> None:
    """Turn latents into examples. Latents that are not given are drawn.

    Args:
        latents: An .npz file with arrays z0 (the top), z1, ..., as `encode` writes it; all of
            them, or the first few.
        out: A .png grid, or an .npy or .npz array; rows of a table also as .csv or .parquet.
        temperature: Factor of the standard deviation of the latents that are drawn.
        label: Class of all examples, if the model is conditioned on classes. By default the labels
            in the file.
    """
    import torch

    scale = temperatures(temperature)
    trained = Trained(run, common)
    out = out or Path("decoded.png" if trained.is_image else "decoded.npy")
    trained.check_out(out)
    z, context, whitened = _read_latents(latents, trained, label)
    n = len(z[0])
    with torch.no_grad():
        x = trained.model.decode(z, context, whiten=whitened, temperature=_scale(scale))
    trained.write(x, out)
    trained.screen.result({"out": str(out), "n": n}, f"{count(n, 'example')}: {out}")


def _read_latents(
    path: Path, trained: Trained, label: str | None
) -> tuple[list[Tensor], Context, bool]:
    """Latents as the model takes them, their context if any, and whether they are whitened."""
    import numpy as np
    import torch

    if not path.is_file():
        raise ValueError(f"latents: there is no file {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = sum(re.fullmatch(r"z\d+", name) is not None for name in arrays)
        z = [arrays[f"z{i}"] for i in range(count)]
        whitened = bool(arrays.get("whitened", False))
    except Exception as error:  # whatever the parsers raise for a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"latents: {path} is not an .npz file of z0, z1, ... ({reason})"
        ) from error
    wanted, got = [tuple(t.shape[1:]) for t in trained.latents()], [a.shape for a in z]
    if not z or [s[1:] for s in got] != wanted[: len(z)] or len({s[:1] for s in got}) > 1:
        raise ValueError(
            f"latents: expected z0, z1, ... of shapes (n, *s) for s in {wanted}, top first; "
            f"{path} has {got}"
        )
    if not len(z[0]) or any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in z):
        raise ValueError(f"latents: expected finite numbers; {path} has none, or others")
    tensors = [torch.from_numpy(a).to(trained.device, trained.dtype) for a in z]
    return tensors, _context_of(arrays, len(z[0]), path, trained, label), whitened


def _context_of(
    arrays: Mapping[str, np.ndarray], n: int, path: Path, trained: Trained, label: str | None
) -> Context:
    """The context of n latents: what `encode` wrote with them, and `label` in place of labels."""
    if not trained.spec.context:
        return trained.context(n, label)  # which refuses a label
    named = {}
    for variable in trained.spec.context:
        name = "labels" if variable.name == "label" else f"given_{variable.name}"
        if variable is trained.class_variable and (label is not None or name not in arrays):
            named[variable.name] = trained.class_rows(n, label)
        elif name not in arrays:
            raise ValueError(
                f"latents: {path} has no array {name}, and the model is conditioned on "
                f"{variable.name}; `encode` writes it with the latents"
            )
        else:
            rows = _context_rows(arrays[name], variable, n, f"{path}: {name}")
            named[variable.name] = rows.to(trained.device, trained.dtype)
    return trained.as_context(named)


def _context_rows(rows: np.ndarray, variable: Variable, n: int, where: str) -> Tensor:
    """The rows of a variable in a file of latents; labels are numbers of classes."""
    import numpy as np
    import torch

    if variable.name == "label":
        known = rows.dtype.kind in "iu" and ((rows >= 0) & (rows < variable.classes)).all()
        if rows.shape != (n,) or not known:
            raise ValueError(
                f"latents: {where}: expected {n} labels from 0 to {variable.classes - 1}; correct "
                "them, or choose a class (--label)"
            )
        rows = np.eye(variable.classes)[rows]
    if rows.shape != (n, *variable.shape) or not np.isfinite(rows).all():
        raise ValueError(
            f"latents: {where}: expected finite numbers of shape {(n, *variable.shape)}; got "
            f"shape {rows.shape}"
        )
    return torch.from_numpy(rows)


@app.command(group=USE)
def reconstruct(
    run: Run,
    source: Source,
    *,
    n: int = 16,
    out: Path = Path("reconstructions.png"),
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Encode and decode examples. The picture shows originals above their reconstructions.

    Args:
        n: Number of examples.
        out: A .png grid; or the reconstructions alone as an .npy or .npz array, those of a table
            also as .csv or .parquet.
    """
    import torch

    from musigma.report import figures

    trained = Trained(run, common)
    trained.check_out(out)
    x, context = trained.examples(source, options, n)
    with torch.no_grad():
        again = trained.model.reconstruct(x, context)
    if out.suffix == ".png" and trained.is_image:
        figures.rows([as_array(x), as_array(again)], out, levels=trained.levels)
    else:
        trained.write(again, out)
    error = float((again - x).abs().mean())
    trained.screen.result(
        {"out": str(out), "n": len(x), "mean_absolute_error": error},
        f"{count(len(x), 'reconstruction')}, mean absolute error {error:.4g}: {out}",
    )


@app.command(group=USE)
def interpolate(
    run: Run,
    source: Source,
    *,
    pairs: int = 8,
    steps: int = 9,
    path: Literal["spherical", "linear"] = "spherical",
    out: Path = Path("interpolations.png"),
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Interpolate between pairs of examples in latent space, a row for each pair.

    Args:
        pairs: Number of pairs: examples 0 and 1, 2 and 3, and so on.
        steps: Number of examples in each row, both ends included.
        path: Path between latents: along the sphere on which the prior has its mass, or straight.
        out: A .png grid, or an .npy or .npz array; rows of a table also as .csv or .parquet.
    """
    import torch

    from musigma import context as contexts

    if pairs < 1 or steps < 2:
        raise ValueError(f"pairs, steps: expected at least 1 and 2; got {pairs} and {steps}")
    trained = Trained(run, common)
    trained.check_out(out)
    x, context = trained.examples(source, options, 2 * pairs)
    if len(x) < 2:
        raise ValueError(
            f"data: {source} holds {len(x)} examples; an interpolation needs two, so give more"
        )
    n = len(x) // 2 * 2
    ends = (contexts.rows(context, slice(first, n, 2)) for first in (0, 1))
    with torch.no_grad():
        rows = trained.model.interpolate(x[:n:2], x[1:n:2], steps, *ends, path=path)
    trained.write_rows(rows, out)
    trained.screen.result(
        {"out": str(out), "pairs": len(rows), "steps": steps},
        f"{count(len(rows), 'interpolation')}: {out}",
    )
