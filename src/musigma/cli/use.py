"""Commands that use a model: samples, latents, reconstructions, edits, mixtures, figures."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from musigma.cli import tables
from musigma.cli.members import Differences
from musigma.cli.options import (
    USE,
    Argument,
    Common,
    DataOptions,
    Run,
    RunOnData,
    app,
    at_least_one,
    latent_numbers,
    temperatures,
)
from musigma.cli.outputs import Columns, Share, check_out, write_rows
from musigma.cli.screen import count, launched_processes
from musigma.cli.trained import Trained, class_number

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from musigma.context import Context
    from musigma.data import Dataset
    from musigma.processes import Processes
    from musigma.spec import Variable

BLOCK, ROWS = 64, 4096
"""Number of samples that are drawn together: of examples, and of rows of typed columns."""


# --- examples from the model ---------------------------------------------------------------------


@app.command(group=USE)
def sample(
    run: Run,
    *,
    n: int = 64,
    label: str | None = None,
    given: tuple[str, ...] = (),
    where: str | None = None,
    temperature: str = "1",
    mode: bool = False,
    several: Annotated[str | None, Parameter(name="--temperatures")] = None,
    out: Path | None = None,
    common: Common = Common(),
) -> None:
    """Draw new examples.

    Args:
        n: Number of samples; with `--given`, for each row of the file.
        label: Class to draw, by name or number, if the model is conditioned on classes. By default
            all classes in turn.
        given: File with the rows to draw for, if the model is conditioned on more than classes: a
            table with a column for each variable, an array, or a folder of images. May be given
            several times, once for each file. The n samples of a row follow each other; if there
            are several rows, the first column of a table, `observation`, has their numbers, or
            their names if a column such as `id` has them. For a model of typed columns that is
            conditioned on nothing: rows to complete, a table in which columns, and cells, are
            missing.
        where: Condition that all samples satisfy, for a model of typed columns (`table`):
            'country == "FR" and 18 <= age < 65'. See `docs/questions.md`.
        temperature: Factor of the standard deviation of every draw; or one for each latent, top
            first: 0.7,0.8,1.
        mode: Return the center of p(x | latents) instead of a draw from it.
        several: Show the centers of the same draws at several temperatures, a row for each:
            0,0.5,0.7,1. Replaces `--temperature`.
        out: A .png grid, or an .npy or .npz array; samples of a table also as .csv or .parquet.
            Each of several processes writes a shard. A .nc file is InferenceData of ArviZ, with
            the rows that are given as observed data.
    """
    import torch

    from musigma import context as contexts
    from musigma import editing
    from musigma.evaluation import noise

    at_least_one(n=n)
    scale, processes = temperatures(temperature), launched_processes()
    trained = Trained(run, common)
    usual = "samples.png" if trained.is_image and processes.count == 1 else "samples.npy"
    out = out or Path("samples.csv" if trained.spec.schema is not None else usual)
    trained.check_out(out, ".nc")
    if out.suffix == ".nc":
        trained.check_draws(given, label)
    completes = bool(given) and trained.spec.schema is not None and not trained.spec.context
    if where is not None or completes:
        option = "given" if where is None else "where"
        if temperature != "1" or mode or several is not None or processes.count > 1:
            raise ValueError(
                f"{option}: it draws from the model as it is, in one process; leave out --mode "
                "and --temperature"
            )
        if where is not None and given:
            raise ValueError("where: give --where or --given, not both")
        if where is not None:
            tables.sample_where(trained, where, n, label, out)
        else:
            tables.sample_given(trained, given, n, out)
        return
    whole = out.suffix in (".png", ".nc") or several is not None
    if processes.count > 1 and whole:
        raise ValueError(
            f"out: {processes.count} processes write arrays in shards; name an .npy or .npz file, "
            "or use one process"
        )
    if out.suffix == ".nc" and several is not None:
        raise ValueError("out: a .nc file holds draws at one temperature; name another kind")
    names, each = None, n if given else 1
    if given:
        observed, names = trained.observations(given, label)
    else:
        observed = trained.context(n, label)
    observations = contexts.length(observed) or 1 if given else 1
    n = n * observations
    if several is not None:
        if temperature != "1":
            raise ValueError("temperature: --temperatures replaces it; leave one of them out")
        values = temperatures(several)
        context = contexts.repeat(observed, each)
        trained.write_rows(editing.temperatures(trained.model, n, values, context), out)
        what = f"{count(n, 'sample')} at {count(len(values), 'temperature')}"
        trained.wrote(out, what, n=n, temperatures=list(values))
        return
    beside = _observation_of(trained, names, observations, each, out)
    at_once = bool(given) and _draws_at_once(trained, scale, mode)
    size = BLOCK if trained.spec.schema is None and not at_once else ROWS
    if at_once and each < size:
        size -= size % each  # whole observations
    share = Share(processes, n, size)
    rows, out = share.rows, share.path(out)
    parts = [torch.empty(0, *trained.shape, dtype=trained.dtype)]
    as_it_is = temperature == "1" and not mode
    members = Differences(trained.model if as_it_is else None, observed)
    with trained.screen.progress("sampling") as progress:
        for start in rows[::size]:
            block = slice(start, min(start + size, rows.stop))
            noise(common.seed, start // size)
            which = torch.arange(block.start, block.stop, device=trained.device) // each
            if at_once:
                x = _drawn(trained.model, observed, which, scale[0])
            else:
                by = contexts.rows(observed, which)
                x = trained.model.sample(len(which), by, temperature=_scale(scale), mode=mode)
            parts.append(x.cpu())
            members.add(x, which)
            progress(block.stop - rows.start, len(rows))
    if out.suffix == ".nc":
        if not given:
            observed = contexts.rows(observed, slice(1))
        drawn = torch.cat(parts)
        trained.write_draws(drawn, observed, observations, names, out, temperature=temperature)
    else:
        beside = {name: values[rows.start : rows.stop] for name, values in beside.items()}
        trained.write(torch.cat(parts), out, beside=beside)
    what = f"{count(len(rows), 'sample')}{share}"
    answer = {"out": str(out), "n": len(rows), "temperature": temperature, **share.fields}
    answer |= {**members.fields, **trained.warnings}
    trained.screen.result(answer, f"{what}: {out}{members.line}")


def _observation_of(
    trained: Trained, names: Sequence[str] | None, observations: int, each: int, out: Path
) -> dict[str, Any]:
    """The column that tells draws of several observations apart: their names, or numbers."""
    import numpy as np

    if observations == 1 or out.suffix not in (".csv", ".parquet", ".npz"):
        return {}
    if "observation" in trained.spec.columns:
        raise ValueError(
            "given: the model has a column 'observation', which is the name of the column that "
            "tells draws of several rows apart; give one row at a time, or write an .npy file"
        )
    values = np.arange(observations) if names is None else np.array(names)
    repeated = values.repeat(each)
    return {
        "observation": repeated if names is None or out.suffix == ".npz" else repeated.tolist()
    }


def _draws_at_once(trained: Trained, scale: tuple[float, ...], mode: bool) -> bool:
    """Whether the draws of one observation can share one pass of its embedding."""
    return trained.model.exact and not trained.is_image and len(scale) == 1 and not mode


def _drawn(model: Any, observed: Context, which: Tensor, temperature: float) -> Tensor:
    """A draw for each of some observations, whose numbers do not decrease."""
    import torch

    from musigma import context as contexts

    first, counts = int(which[0]), torch.bincount(which - which[0])
    rows = contexts.rows(observed, slice(first, first + len(counts)))
    most = int(counts.max())
    x = model.as_distribution(rows).sample((most,), temperature=temperature)
    kept = torch.arange(most, device=which.device) < counts[:, None]
    return x.transpose(0, 1)[kept]


def _scale(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """One temperature for all latents, or one for each."""
    return values[0] if len(values) == 1 else values


@app.command(group=USE)
def decode(
    run: Run,
    latents: Annotated[Path, Argument],
    *,
    out: Path | None = None,
    temperature: str = "1",
    label: str | None = None,
    common: Common = Common(),
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
    trained.check_latents("decode")
    out = out or Path("decoded.png" if trained.is_image else "decoded.npy")
    trained.check_out(out)
    z, context, whitened = _read_latents(latents, trained, label)
    with torch.no_grad():
        x = trained.model.decode(z, context, whiten=whitened, temperature=_scale(scale))
    trained.write(x, out)
    trained.wrote(out, count(len(x), "example"), n=len(x))


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
    empty, got = trained.nothing()[0], [a.shape for a in z]
    wanted = [tuple(t.shape[1:]) for t in empty]
    if not z or [s[1:] for s in got] != wanted[: len(z)] or len({s[:1] for s in got}) > 1:
        raise ValueError(
            f"latents: expected z0, z1, ... of shapes (n, *s) for s in {wanted}, top first; "
            f"{path} has {got}"
        )
    if not len(z[0]) or any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in z):
        raise ValueError(f"latents: expected finite numbers; {path} has none, or other values")
    tensors = [torch.from_numpy(a).to(t) for a, t in zip(z, empty, strict=False)]
    return tensors, _context_of(arrays, len(z[0]), path, trained, label), whitened


def _context_of(
    arrays: Mapping[str, np.ndarray], n: int, path: Path, trained: Trained, label: str | None
) -> Context:
    """The context of n latents: what `encode` wrote with them, and `label` in place of labels."""
    if not trained.spec.context:
        return trained.context(n, label)  # which refuses a label
    named = {}
    for variable in trained.spec.context:
        name = _array_name(variable)
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
    finite = ~np.isinf(rows) if len(variable.shape) == 2 else np.isfinite(rows)  # NaN is padding
    if rows.shape != (n, *variable.shape) or not finite.all():
        raise ValueError(
            f"latents: {where}: expected finite numbers of shape {(n, *variable.shape)}; got "
            f"shape {rows.shape}"
        )
    return torch.from_numpy(rows)


def _array_name(variable: Variable) -> str:
    """The name of the rows of a variable in a file of latents."""
    return "labels" if variable.name == "label" else f"given_{variable.name}"


# --- a row for each example ----------------------------------------------------------------------


@app.command(group=USE)
def encode(on: RunOnData, *, out: Path, draw: bool = False, whiten: bool = False) -> None:
    """Write the latents of data: z0 (the top), z1, ..., with the label of each example.

    Args:
        out: An .npz file of arrays, or a .parquet table with a column for each element: z0_0,
            z0_1, ... Each of several processes writes a shard.
        draw: Draw from the posterior instead of taking its center.
        whiten: Write (z - mean) / std under the prior of each latent.
    """
    import torch

    from musigma.evaluation import batches

    check_out(out, ".npz", ".parquet")
    trained = Trained(on.run, on.common)
    trained.check_latents("encode")
    found, share = shared(trained, on.source, on.options, launched_processes())
    rows, out = share.rows, share.path(out)
    columns = _latent_arrays if out.suffix == ".npz" else _latent_columns
    empty, none = trained.nothing()

    def parts(progress: Callable[..., None]) -> Iterator[Columns]:
        start = rows.start
        yield columns(trained, found, range(start, start), empty, none)
        for x, context in batches(
            trained.model,
            found,
            batch_size=on.options.batch_size,
            seed=on.common.seed,
            progress=progress,
            processes=share.processes,
        ):
            z = trained.model.encode(x, context, mode=not draw, whiten=whiten)
            yield columns(trained, found, range(start, start + len(x)), z, context)
            start += len(x)

    with trained.screen.progress("encoding") as progress, torch.no_grad():
        write_rows(out, parts(share.progress(progress)), whitened=whiten)
    shapes = {f"z{i}": [len(rows), *z.shape[1:]] for i, z in enumerate(empty)}
    shapes |= {"labels": [len(rows)]} if found.labels is not None else {}
    shapes |= {_array_name(v): [len(rows), *v.shape] for v in _unlabeled(trained)}
    trained.wrote(
        out,
        f"{count(len(empty), 'latent')} of {count(len(rows), 'example')} "
        f"({trained.part} of {on.source}){share}",
        split=trained.part,
        arrays=shapes | {"whitened": []},
        **share.fields,
    )


def shared(
    trained: Trained, source: str, options: DataOptions, processes: Processes
) -> tuple[Dataset, Share]:
    """Data, and the share of them that this process works on."""
    found = trained.data(source, options)
    return found, Share(processes, len(found), options.batch_size)


def _unlabeled(trained: Trained) -> list[Variable]:
    """The variables of the context other than `label`, which has its own array."""
    return [v for v in trained.spec.context if v.name != "label"]


def _latent_arrays(
    trained: Trained, found: Dataset, rows: range, z: Sequence[Tensor], context: Any
) -> Columns:
    """Latents, labels and context as arrays."""
    arrays = {f"z{i}": t.numpy(force=True) for i, t in enumerate(z)}
    if found.labels is not None:
        arrays["labels"] = found.labels[rows.start : rows.stop]
    for v in _unlabeled(trained):
        given = context[v.name] if len(trained.spec.context) > 1 else context
        arrays[_array_name(v)] = given.numpy(force=True)
    return arrays


def _latent_columns(
    trained: Trained, found: Dataset, rows: range, z: Sequence[Tensor], context: Any
) -> Columns:
    """Latents with a column for each element, for a table."""
    columns = example_columns(found, rows)
    for i, t in enumerate(z):
        flat = t.reshape(len(t), math.prod(t.shape[1:])).numpy(force=True)
        columns |= {f"z{i}_{j}": column for j, column in enumerate(flat.T)}
    return columns


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


# --- pictures of examples ------------------------------------------------------------------------


@app.command(group=USE)
def reconstruct(on: RunOnData, *, n: int = 16, out: Path = Path("reconstructions.png")) -> None:
    """Encode and decode examples. The picture shows originals above their reconstructions.

    Args:
        n: Number of examples.
        out: A .png grid; or the reconstructions alone as an .npy or .npz array, those of a table
            also as .csv or .parquet.
    """
    trained = Trained(on.run, on.common)
    trained.check_latents("reconstruct")
    trained.check_out(out)
    x, context = trained.examples(on.source, on.options, n)
    again = trained.reconstruct(x, context, out)
    what, answer = count(len(x), "reconstruction"), {}
    if trained.spec.schema is None:  # columns of a table have units of their own
        answer["mean_absolute_error"] = error = float((again - x).abs().mean())
        what += f", mean absolute error {error:.4g}"
    trained.wrote(out, what, n=len(x), **answer)


@app.command(group=USE)
def interpolate(
    on: RunOnData,
    *,
    pairs: int = 8,
    steps: int = 9,
    path: Literal["spherical", "linear"] = "spherical",
    out: Path = Path("interpolations.png"),
) -> None:
    """Interpolate between pairs of examples in latent space, a row for each pair.

    Args:
        pairs: Number of pairs: examples 0 and 1, 2 and 3, and so on.
        steps: Number of examples in each row, both ends included.
        path: Path between latents: along the sphere on which the prior has its mass, or straight.
        out: A .png grid, or an .npy or .npz array; rows of a table also as .csv or .parquet.
    """
    if pairs < 1 or steps < 2:
        raise ValueError(f"pairs, steps: expected at least 1 and 2; got {pairs} and {steps}")
    trained = Trained(on.run, on.common)
    trained.check_latents("interpolate")
    trained.check_out(out)
    x, context = trained.examples(on.source, on.options, 2 * pairs)
    if len(x) < 2:
        raise ValueError(
            f"data: {on.source} holds {len(x)} examples; an interpolation needs two, so give more"
        )
    n = trained.interpolate(x, context, out, steps, path=path)
    trained.wrote(out, count(n, "interpolation"), pairs=n, steps=steps)


@app.command(group=USE)
def direction(
    on: RunOnData,
    *,
    positive: str,
    negative: str | None = None,
    method: Literal["mean", "probe"] = "mean",
    levels: str | None = None,
    at_most: int = 10_000,
    out: Path,
) -> None:
    """Find the direction in latent space that represents a class of labeled data.

    All of the data are used unless --split says otherwise.

    Args:
        positive: Class that has the attribute, by name or number.
        negative: Class that lacks it. By default all other classes.
        method: Difference of the class means, or a linear probe (logistic regression).
        levels: Latents to use, counted from 0 at the top: 0,1. By default all of them.
        at_most: Largest number of examples to encode.
        out: The .npz file to write.
    """
    import numpy as np

    from musigma import editing

    at_least_one(at_most=at_most)
    check_out(out, ".npz")
    trained, chosen = Trained(on.run, on.common), latent_numbers(levels)
    trained.check_latents("direction")
    editing.checked_levels(trained.model, chosen)
    found = trained.data(on.source, on.options.everything())
    if found.labels is None:
        raise ValueError(f"data: {on.source} has no labels; put images into class folders")
    labels, names = np.asarray(found.labels), list(found.label_names)
    wanted = class_number(positive, names, len(names))
    has = labels == wanted
    if negative is not None:
        rows = np.flatnonzero(has | (labels == class_number(negative, names, len(names))))
        found, has = found.subset(rows), has[rows]
    with trained.screen.progress("encoding") as progress:
        step = editing.direction(
            trained.model,
            found,
            has,
            attribute=names[wanted],
            method=method,
            levels=chosen,
            at_most=at_most,
            batch_size=on.options.batch_size,
            seed=on.common.seed,
            progress=progress,
        )
    step.save(out)
    length = math.sqrt(sum(float(t.square().sum()) for t in step.latents))
    examples = {"with": int(has.sum()), "without": int((~has).sum())}
    what = (
        f"{step.attribute}: {examples['with']:,} examples with it, {examples['without']:,} "
        f"without; length {length:.3g}, area under the ROC curve {step.auc:.3f}"
    )
    answer = {"attribute": step.attribute, "method": method, **examples}
    trained.wrote(out, what, **answer, length=length, auc=step.auc)


@app.command(group=USE)
def edit(
    on: RunOnData,
    *,
    direction: Path,
    strength: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-2..2",
    n: int = 8,
    label: str | None = None,
    out: Path = Path("edited.png"),
) -> None:
    """Decrease and increase an attribute of examples; each row shows one example.

    The examples are the first of all the data unless --split says otherwise.

    Args:
        direction: An .npz file that `musigma direction` wrote.
        strength: Steps along the direction: -2..2 for five, -2..2:9 for nine, or numbers separated
            by commas. A step of 1 leads from examples without the attribute to those with it.
        n: Number of examples.
        label: Class of the examples, by name or number, if the model is conditioned on classes and
            the data have no labels.
        out: A .png grid, or an .npy or .npz array; rows of a table also as .csv or .parquet.
    """
    from musigma import editing

    strengths = _strengths(strength)
    if not direction.is_file():
        raise ValueError(f"direction: there is no file {direction}")
    trained = Trained(on.run, on.common)
    trained.check_latents("edit")
    trained.check_out(out)
    step = editing.Direction.load(direction)
    x, context = trained.examples(on.source, on.options.everything(), n, label)
    trained.write_rows(editing.edit(trained.model, x, step, strengths, context), out)
    what = f"{count(len(x), 'row')}, {step.attribute or 'direction'} {strength}"
    trained.wrote(out, what, n=len(x), attribute=step.attribute, strengths=strengths)


def _strengths(text: str) -> list[float]:
    """Steps along a direction: -2..2, -2..2:9 or -1,0,0.5."""
    values: list[float] = []
    span, _, steps = text.partition(":")
    with contextlib.suppress(ValueError, OverflowError):
        if ".." in span:
            low, high = map(float, span.split(".."))
            count = int(steps) if steps else max(2, round(abs(high - low)) + 1)
            if 2 <= count <= 1000:
                values = [low + (high - low) * i / (count - 1) for i in range(count)]
        else:
            values = [float(word) for word in text.split(",")]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"strength: expected -2..2, -2..2:9 or -1,0,0.5; got {text!r}")
    return values


@app.command(group=USE)
def mix(on: RunOnData, *, levels: str = "0", n: int = 6, out: Path = Path("mixed.png")) -> None:
    """Mix examples: some latents from one example, the rest from another.

    The left column shows the first n examples, the top row the next n. Each picture takes the
    chosen latents from the top row and all others from the left column. The model needs several
    latents.

    Args:
        levels: Latents from the top row, counted from 0 at the top: 0,1.
        n: Number of examples in the column and in the row.
        out: A .png grid; or the mixtures alone as an .npy or .npz array, those of a table also as
            .csv or .parquet.
    """
    import torch

    from musigma import context as contexts
    from musigma import editing

    at_least_one(n=n)
    trained, chosen = Trained(on.run, on.common), latent_numbers(levels) or []
    trained.check_out(out)
    x, context = trained.examples(on.source, on.options, 2 * n)
    half = len(x) // 2
    if not half:
        raise ValueError(f"data: {on.source} holds {len(x)} examples; a mixture needs two")
    left, top = slice(half), slice(half, 2 * half)
    ends = (contexts.rows(context, part) for part in (left, top))
    mixed = editing.mix(trained.model, x[left], x[top], chosen, *ends)
    if out.suffix == ".png":
        sheet = torch.cat([x[left].unsqueeze(1), mixed], 1).flatten(0, 1)
        blank = torch.zeros_like(x[:1])
        trained.write(torch.cat([blank, x[top], sheet]), out, columns=half + 1)
    else:
        trained.write_rows(mixed, out)
    trained.wrote(out, count(half * half, "mixture"), n=half, levels=chosen)
