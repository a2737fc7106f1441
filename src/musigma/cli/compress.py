"""``musigma compress`` and ``decompress``: lossless files at the rate of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from musigma.cli.options import (
    COMPRESS,
    Argument,
    Common,
    RunOnData,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen
from musigma.cli.trained import Trained


@app.command(group=COMPRESS)
def compress(
    on: RunOnData,
    out: Annotated[Path, Argument],
    *,
    prepared: bool = False,
    labels: bool = False,
    embed: bool = False,
    numerics: Literal["exact", "pinned"] = "exact",
    chunk: int | None = None,
    workers: int | None = None,
    verify: Annotated[bool, Parameter(negative="--no-verify")] = True,
) -> None:
    """Compress data losslessly into a .mus file, at the rate the model reports.

    Images must have the size of the model. Their pixels, names and modes are restored exactly. All
    of the data are compressed unless --split says otherwise.

    Args:
        out: The .mus file to write.
        prepared: Compress what the model sees (resized, binarized, fewer levels) instead of the
            original data. Without it, data that the model sees only in part are refused.
        labels: Store the labels as well. The context of a conditional model is always stored.
        embed: Store the model in the file, so that it can be read without the run.
        numerics: `exact` files can be read on any machine. `pinned` is about twice as fast, but
            needs the same processor type and PyTorch version for reading.
        chunk: Images per chunk. Damage loses a whole chunk, and reading a single image decodes its
            whole chunk. By default 4096, or fewer if they take more than 16 MiB.
        workers: Chunks that are processed at the same time. By default one per core.
        verify: Decode the file and compare it with the data before it replaces an old one.
    """
    from musigma import coding

    check_out(out, ".mus")
    at_least_one(chunk=chunk, workers=workers)
    trained = Trained(on.run, on.common)
    coding.check(trained.model)
    found = trained.data(on.source, on.options.everything())
    folder = Path(on.source) if Path(on.source).is_dir() and found.ids is not None else None
    examples = coding.Examples(
        found,
        context=trained.spec.context,
        folder=folder,
        labels=labels,
        prepared=prepared,
        seed=on.common.seed,
    )
    with trained.screen.progress("compressing") as progress:
        report = coding.compress(
            trained.model.cpu(),
            examples,
            out,
            about=examples.about,
            numerics=numerics,
            chunk=chunk,
            embed=embed,
            verify=verify,
            workers=workers,
            progress=progress,
        )
    answer = {"out": str(out), **report.to_json()}
    trained.screen.result(answer, "\n".join(_report_lines(answer)))


def _report_lines(report: dict[str, Any]) -> Iterator[str]:
    n = report["images"]
    yield (
        f"{n:,} images: {report['data_bytes']:,} bytes of data and {report['model_bytes']:,} "
        f"bytes of model: {report['out']}"
    )
    yield (
        f"{report['bits_per_dim']:.4f} bits/dim in the file; the model itself gives "
        f"{report['ideal_bits_per_dim']:.4f} ± {report['ideal_error']:.4f} (on a sample)"
    )
    if report["packed"] < n:
        yield (
            f"{report['net_bits_per_dim']:.4f} bits/dim without the initial bits of each chunk, "
            f"over the {n - report['packed']:,} images that the model encodes"
        )
    if report["side_bytes"]:
        yield f"names, modes, labels and context: {report['side_bytes']:,} bytes"
    if report["packed"]:
        yield (
            "compressed with xz, because that is smaller or the model cannot represent them: "
            f"{report['packed']:,} images"
        )
    n = report["break_even"]
    pays = f"pays for itself from {n:,} images" if n else "never pays for itself"
    yield f"xz would take about {report['general_bytes']:,} bytes; the model {pays}"
    yield "verified by decoding" if report["verified"] else "not verified"


@app.command(group=COMPRESS)
def decompress(
    file: Annotated[Path, Argument],
    out: Annotated[Path, Argument],
    *,
    run: str | None = None,
    trust: bool = False,
    index: int | None = None,
    keep_going: bool = False,
    max_output: int = 4096,
    workers: int | None = None,
    common: Common = Common(),
) -> None:
    """Restore the data of a .mus file exactly.

    Exit codes: 3 if the file is damaged, 4 if the model is a different one, 5 if the networks
    compute different numbers on this machine, 6 if the file exceeds a limit, 7 if it has a newer
    format.

    Args:
        file: The .mus file.
        out: A folder that does not exist yet, or an .npz or .npy file.
        run: The run folder or .safetensors file that the data were compressed with. By default the
            model in the file.
        trust: Build the model that is stored in the file. A malicious file could make it use up
            all memory.
        index: Restore only this image, from 0.
        keep_going: Skip chunks that cannot be read, list the images that are lost, and exit with
            3.
        max_output: Largest size of the restored data, in MiB.
        workers: Chunks that are processed at the same time. By default one per core.
    """
    from musigma import coding

    coding.check_out(out)
    at_least_one(max_output=max_output, workers=workers)
    screen = Screen(common)
    model = None if run is None else Trained(run, common).model.cpu()
    limits = coding.Limits(total=max_output << 20)
    lost: list[tuple[int, int, str]] = []
    with _open(file) as opened, screen.progress("decompressing") as progress:
        archive = coding.Archive(opened, model, limits=limits, trust=trust, workers=workers)
        if index is not None:
            if not 0 <= index < len(archive):
                raise ValueError(f"index: expected 0 to {len(archive) - 1}; got {index}")
            batches = [(index, archive.one(index))]
        elif keep_going:
            batches = _readable(archive, lost)
        else:
            firsts = (entry.first for entry in archive.reader.entries)
            batches = zip(firsts, archive, strict=True)
        count = coding.extract(_reported(batches, len(archive), progress), archive, out)
    answer = {"out": str(out), "images": count, "lost": [list(row) for row in lost]}
    lines = [f"{count:,} images: {out}", *(f"lost: {a} to {b - 1}: {why}" for a, b, why in lost)]
    screen.result(answer, "\n".join(lines))
    if lost:
        raise coding.DamagedFile(
            f"{sum(b - a for a, b, _ in lost):,} images are lost; all others are in {out}"
        )


def _readable(archive: Any, lost: list[Any]) -> Iterator[tuple[int, Any]]:
    """The batches that can be read, with their first images; the others are added to `lost`."""
    from musigma.coding import CodingError

    lost += [(a, b, "their chunk is missing") for a, b in archive.reader.lost]
    if not archive.reader.ended:
        lost.append((archive.reader.images, archive.reader.images, "the file ends too early"))
    for place, entry in enumerate(archive.reader.entries):
        try:
            yield entry.first, archive.chunk(place)
        except CodingError as error:
            lost.append((entry.first, entry.first + entry.count, str(error)))


def _reported(
    batches: Iterable[tuple[int, Any]], n: int, progress: Any
) -> Iterator[tuple[int, Any]]:
    for first, batch in batches:
        yield first, batch
        progress(first + len(batch), n)


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"file: there is no file {file}")
    return file.open("rb")


def describe(file: Path, screen: Screen) -> None:
    """Print what a .mus file contains; the data are not decoded."""
    from musigma.coding import summary

    if file.suffix != ".mus":
        raise ValueError("data: required, unless RUN is a .mus file")
    with _open(file) as opened:
        about = summary(opened)
    about["file_bytes"] = file.stat().st_size
    screen.result(about, "\n".join(_summary_lines(about)))


def _summary_lines(about: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{about['images']:,} images of {'x'.join(map(str, about['shape']))}, {about['bits']} "
        f"bits, in {about['chunks']} chunks: {about['data_bytes']:,} bytes, "
        f"{about['bits_per_dim']:.4f} bits/dim"
    )
    size = about["model_bytes"]
    yield (
        f"model: {about['model']['architecture']}, digest {about['model']['digest'][:12]}, "
        f"{f'in the file ({size:,} bytes)' if size else 'not in the file'}"
    )
    machine = "".join(f", {k} {v}" for k, v in sorted(about["machine"].items()))
    yield f"numerics: {about['numerics']}{machine}"
    if about["images_packed"]:
        yield f"compressed by a general codec: {about['images_packed']:,} images"
    if about["about"]:
        yield f"also stored: {', '.join(sorted(about['about']))}"
    for a, b in about["lost"]:
        yield f"lost: images {a} to {b - 1}"
    if not about["whole"]:
        yield "the file is damaged; `decompress --keep-going` restores what can be read"
