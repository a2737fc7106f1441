"""The commands that several processes share: each does its part of the batches.

Each writes what it made into a file of its own, a shard, and none waits for another. What is
drawn depends on the seed and on the number of the batch alone, so the shards one after the other
are what one process writes. Only `evaluate` has the processes speak: they have one figure.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from cyclopts import App, Parameter

from musigma.cli.shared import (
    USUAL,
    USUAL_DATA,
    CommonOptions,
    Data,
    Screen,
    Trained,
    at_least_one,
    check_out,
    said,
    told,
)
from musigma.data import Dataset, Progress
from musigma.files import replacing
from musigma.processes import Processes

commands = App()

BLOCK = 64  # samples that are drawn together
ROW_GROUP = 2**26  # bytes that are held before they are written

Columns = dict[str, Any]  # of some rows, by their names: arrays, or texts in a row


def read_temperature(text: str) -> float | tuple[float, ...]:
    """One number, or one for each latent: 0.7, or 0.7,0.8,1."""
    try:
        values = tuple(float(t) for t in text.split(","))
    except ValueError:
        raise ValueError(f"temperature: expected 0.7, or 0.7,0.8,1; got {text!r}") from None
    if any(not 0 <= t < math.inf for t in values):
        raise ValueError(f"temperature: expected numbers from 0; got {text!r}")
    return values[0] if len(values) == 1 else values


def shard(out: Path, own: Processes) -> Path:
    """The file of one process of several; of the only one, the file itself.

    >>> shard(Path("scores.csv"), Processes(2, 4)).name
    'scores-00002-of-00004.csv'
    """
    if own.count == 1:
        return out
    return out.with_name(f"{out.stem}-{own.rank:05}-of-{own.count:05}{out.suffix}")


def share(own: Processes, n: int, size: int) -> range:
    """Which of n rows are of one process: whole batches of a size, all of them once.

    >>> [share(Processes(rank, 3), 10, 4) for rank in range(3)]
    [range(0, 4), range(4, 8), range(8, 10)]
    """
    of = own.share(math.ceil(n / size))
    return range(min(of.start * size, n), min(of.stop * size, n))


@commands.command
def sample(
    run: str,
    *,
    n: int = 64,
    temperature: str = "1",
    mode: Annotated[bool, Parameter(negative="")] = False,
    label: str | None = None,
    temperatures: str | None = None,
    out: Path | None = None,
    common: CommonOptions = USUAL,
) -> None:
    """Draw new examples.

    Args:
        run: A run folder, or a .safetensors file.
        n: How many.
        temperature: Multiplies the standard deviation of every draw; with commas, one for each
            latent, top first.
        mode: Show the centre of p(x | latents), not a draw from it.
        label: The class to draw, by its name or number, if the model is conditional; by default
            all in turn.
        temperatures: Show the centres of the same draws at several temperatures, a row for each:
            0,0.5,0.7,1. In place of `--temperature`.
        out: A .png grid, or an .npy or .npz array; of several processes, arrays in shards.
        common: Shared options.
    """
    import torch

    from musigma.evaluation import noise

    at_least_one(n=n)
    scale, own = read_temperature(temperature), told()
    screen, trained = Screen(common), Trained(run, common)
    pictures = len(trained.shape) == 3 and own.count == 1
    out = out or Path("samples.png" if pictures else "samples.npy")
    trained.check_out(out)
    if own.count > 1 and (out.suffix == ".png" or temperatures is not None):
        raise ValueError(
            f"out: {own.count} processes write arrays in shards; name a .npy or .npz file, or "
            "draw the picture in one process"
        )
    if temperatures is not None:
        if temperature != "1":
            raise ValueError("temperature: --temperatures has them already; leave it out")
        _at_temperatures(trained, n, temperatures, trained.context(n, label), out, screen)
        return
    context, rows = trained.context(n, label), share(own, n, BLOCK)
    parts = [torch.empty(0, *trained.shape, dtype=trained.dtype)]
    with screen.progress("sampling") as progress:
        for start in rows[::BLOCK]:
            block = range(start, min(start + BLOCK, rows.stop))
            given = None if context is None else context[start : block.stop]
            noise(common.seed, start // BLOCK)
            drawn = trained.model.sample(len(block), given, temperature=scale, mode=mode)
            parts.append(drawn.cpu())
            if progress:
                progress(block.stop - rows.start, len(rows))
    trained.write(torch.cat(parts), out := shard(out, own))
    answer = {"out": str(out), "n": len(rows), "temperature": temperature, **_among(own)}
    screen.result(answer, f"{len(rows)} samples{_whose(own)}: {out}")


def _at_temperatures(
    trained: Trained, n: int, text: str, context: Any, out: Path, screen: Screen
) -> None:
    """A row of draws for each temperature."""
    from musigma import editing

    values = read_temperature(text)
    values = values if isinstance(values, tuple) else (values,)
    drawn = editing.temperatures(trained.model, n, values, context)
    trained.write_rows(drawn, out)
    answer = {"out": str(out), "n": n, "temperatures": list(values)}
    screen.result(answer, f"{n} samples at {len(values)} temperatures: {out}")


@commands.command
def encode(
    run: str,
    data: str,
    *,
    out: Path,
    draw: Annotated[bool, Parameter(negative="")] = False,
    whiten: Annotated[bool, Parameter(negative="")] = False,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Write the latents of data: z0 (the top), z1, ..., and the label of each example.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name.
        out: An .npz file of arrays, or a .parquet table with a column for each element: z0_0,
            z0_1, ...; of several processes, in shards.
        draw: Draw from the posterior instead of taking its centre.
        whiten: Write (z - mean) / std under the prior of each latent.
        options: Which data.
        common: Shared options.
    """
    import torch

    from musigma.evaluation import batches

    check_out(out, ".npz", ".parquet")
    screen, trained, own = Screen(common), Trained(run, common), told()
    found, out = trained.data(data, options, screen), shard(out, own)
    rows = share(own, len(found), options.batch_size)
    empty, done = trained.latents(), rows.start
    with (
        written(out, whitened=whiten) as add,
        screen.progress("encoding") as progress,
        torch.no_grad(),
    ):
        add(_latents(found, range(done, done), empty, out))
        for x, context in batches(
            trained.model,
            found,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=_counted(progress, rows),
            processes=own,
        ):
            z = trained.model.encode(x, context, mode=not draw, whiten=whiten)
            add(_latents(found, range(done, done + len(x)), z, out))
            done += len(x)
    shapes = {f"z{i}": [len(rows), *z.shape[1:]] for i, z in enumerate(empty)}
    shapes |= {"labels": [len(rows)]} if found.labels is not None else {}
    arrays = shapes | {"whitened": []}
    screen.result(
        {"out": str(out), "split": trained.part, "arrays": arrays, **_among(own)},
        f"{len(rows):,} examples ({trained.part} of {data}), latents {len(empty)}"
        f"{_whose(own)}: {out}",
    )


def _latents(found: Dataset, rows: range, z: Sequence[Any], out: Path) -> Columns:
    """Of some examples, as the file has them: arrays, or a column for each element."""
    arrays = {f"z{i}": t.cpu().numpy() for i, t in enumerate(z)}
    if out.suffix == ".npz":
        labels = {} if found.labels is None else {"labels": found.labels[rows.start : rows.stop]}
        return arrays | labels
    flat = {name: a.reshape(len(a), math.prod(a.shape[1:])) for name, a in arrays.items()}
    columns = {f"{name}_{j}": a[:, j] for name, a in flat.items() for j in range(a.shape[1])}
    return _named(found, rows) | columns


def _named(found: Dataset, rows: range) -> Columns:
    """Which examples they are."""
    columns: Columns = {"index": np.arange(rows.start, rows.stop)}
    if found.ids:
        columns["id"] = found.ids[rows.start : rows.stop]
    if found.labels is not None:
        labels, names = found.labels[rows.start : rows.stop], found.label_names
        columns["label"] = [names[i] for i in labels] if names else labels
    return columns


@commands.command
def score(
    run: str,
    data: str,
    *,
    out: Path,
    k: int = 1,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Write every example's bits per dimension, as a table: high ones are the odd ones.

    By one draw an example's figure moves a little with the pass that it is in; --k steadies it.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name.
        out: A .csv or .parquet file; of several processes, in shards.
        k: Draws per example; more give a tighter bound.
        options: Which data; unlike elsewhere, all of them unless --split says otherwise.
        common: Shared options.
    """
    from musigma import evaluation

    check_out(out, ".csv", ".parquet")
    screen, trained, own = Screen(common), Trained(run, common), told()
    options = dataclasses.replace(options, split=options.split or "all")
    found, out = trained.data(data, options, screen), shard(out, own)
    rows = share(own, len(found), options.batch_size)
    with written(out) as add, screen.progress("scoring") as progress:
        columns = evaluation.score(
            trained.model,
            found,
            k=k,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=_counted(progress, rows),
            processes=own,
        )
        if not len(rows):  # the columns of any example, and none of it
            one = evaluation.score(trained.model, found.subset([0]), k=k)
            columns = {name: values[:0] for name, values in one.items()}
        add(_named(found, rows) | columns)
    bits = columns["bits_per_dim"] if len(rows) else [math.nan]
    summary = {
        "out": str(out),
        "n": len(rows),
        **_among(own),
        "bits_per_dim": float(np.mean(bits)),
        "highest": float(np.max(bits)),
        "lowest": float(np.min(bits)),
        "bound": evaluation.bound(trained.model, k),
    }
    figures = (
        f", {summary['lowest']:.4f} to {summary['highest']:.4f} bits/dim, "
        f"mean {summary['bits_per_dim']:.4f} ({summary['bound']})"
    )
    text = f"{len(rows):,} scores{figures if len(rows) else ''}{_whose(own)}: {out}"
    screen.result(summary, text)


@commands.command
def evaluate(
    run: str,
    data: str,
    *,
    k: int = 1,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """The mean bits per dimension of data, with its standard error, and what kind of figure it is.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name.
        k: Draws per example; more give a tighter bound of models that are not exact.
        options: Which data.
        common: Shared options.
    """
    from musigma import evaluation
    from musigma.training import join, leave

    own = join(common.device) if told().count > 1 else told()
    screen, trained = Screen(common), Trained(run, common)
    found = trained.data(data, options, screen)
    with screen.progress("evaluating") as progress:
        figure = evaluation.evaluate(
            trained.model,
            found,
            k=k,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=_counted(progress, share(own, len(found), options.batch_size)),
            processes=own,
        )
    leave()
    text = f"{said(figure)}; {trained.part} of {data}"
    screen.result({"run": run, "data": data, "split": trained.part, **figure}, text)


def _among(own: Processes) -> dict[str, int]:
    """What an answer says besides where it is of a share alone."""
    return {} if own.count == 1 else {"process": own.rank, "processes": own.count}


def _whose(own: Processes) -> str:
    return "" if own.count == 1 else f", the share of process {own.rank} of {own.count}"


def _counted(progress: Progress | None, rows: range) -> Progress | None:
    """Progress through all rows, as that through one's own."""
    return progress and (lambda done, _: progress(done - rows.start, len(rows)))


# --- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(out: Path, **about: Any) -> Iterator[Callable[[Columns], None]]:
    """A file that takes rows, some at a time; it is there when all are, and not before.

    An .npz keeps its rows on the disk until then, a .parquet 64 MiB of them in memory.

    Args:
        out: A .csv, .parquet or .npz file.
        about: What is said of all rows: in a .parquet, in the metadata of its schema.
    """
    write = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}[out.suffix]
    with replacing(out) as draft, write(draft, about) as add:
        yield add


@contextlib.contextmanager
def _csv(draft: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Columns], None]]:
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer, names = csv.writer(file), []

        def add(columns: Columns) -> None:
            if not names:
                names.extend(columns)
                writer.writerow(names)
            plain = (v.tolist() if isinstance(v, np.ndarray) else v for v in columns.values())
            writer.writerows(zip(*plain, strict=True))

        yield add


@contextlib.contextmanager
def _parquet(draft: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Columns], None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "out: .parquet needs pyarrow: pip install 'musigma[tables]', or name another kind of "
            "file"
        ) from None
    metadata = {name: json.dumps(value) for name, value in about.items()}
    writer, held, size = None, [], 0

    def add(columns: Columns) -> None:
        nonlocal size
        arrays = {
            name: pyarrow.array(v, None if isinstance(v, np.ndarray) else pyarrow.string())
            for name, v in columns.items()
        }
        held.append(pyarrow.table(arrays, metadata=metadata))
        size += held[-1].nbytes
        if size > ROW_GROUP:
            flush()

    def flush() -> None:
        nonlocal writer, size
        table = pyarrow.concat_tables(held)
        if writer is None:
            writer = files.enter_context(pyarrow.parquet.ParquetWriter(draft, table.schema))
        writer.write_table(table)
        held.clear()
        size = 0

    with contextlib.ExitStack() as files:
        yield add
        if held:
            flush()


@contextlib.contextmanager
def _npz(draft: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Columns], None]]:
    kept: dict[str, tuple[IO[bytes], np.ndarray]] = {}  # a file without a name, and its first rows
    with contextlib.ExitStack() as files:

        def add(columns: Columns) -> None:
            for name, rows in columns.items():
                if name not in kept:
                    file = files.enter_context(tempfile.TemporaryFile(dir=draft.parent))
                    kept[name] = file, rows
                kept[name][0].write(np.ascontiguousarray(rows).data)

        yield add
        archive = files.enter_context(zipfile.ZipFile(draft, "w"))
        for name, (file, first) in kept.items():
            row = first.itemsize * math.prod(first.shape[1:])
            head = {
                "descr": np.lib.format.dtype_to_descr(first.dtype),
                "fortran_order": False,
                "shape": (file.tell() // row, *first.shape[1:]),
            }
            file.seek(0)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, head)
                shutil.copyfileobj(file, member, 2**20)
        for name, value in about.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(value))
