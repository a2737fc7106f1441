"""``musigma compress`` and ``decompress``: data as files that hold every bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

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
)

commands = App()


@commands.command
def compress(
    run: str,
    data: str,
    out: Path,
    *,
    prepared: Annotated[bool, Parameter(negative="")] = False,
    labels: Annotated[bool, Parameter(negative="")] = False,
    embed: Annotated[bool, Parameter(negative="")] = False,
    numerics: Literal["exact", "pinned"] = "exact",
    chunk: int | None = None,
    workers: int | None = None,
    verify: bool = True,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Write data as a .mus file, without loss, at the rate that the model gives them.

    Args:
        run: A run folder, or a .safetensors file.
        data: A folder, a file, or a name: images of the model's size, whose pixels, names and
            modes come out again.
        out: The .mus file.
        prepared: Keep what the model sees (resized, binarized, fewer levels) and not the data
            themselves; without it, it is an error if the model sees less than there is.
        labels: Keep labels too; those of a conditional model are kept anyway.
        embed: Put the model into the file, so that it can be read without the run.
        numerics: exact: any machine can read the file. pinned: about twice as fast, and only
            machines with the same processor and torch can.
        chunk: Images in each chunk: what damage loses, and what is decoded for a single image; by
            default 4096, or 16 MiB of them.
        workers: Chunks that are worked on at a time; by default one for each core.
        verify: Decode the file and compare, before it is put in its place.
        options: Which data; all of them unless --split says otherwise.
        common: Shared options.
    """
    from musigma import coding
    from musigma.evaluation import context_size

    check_out(out, ".mus")
    at_least_one(**{name: v for name, v in (("chunk", chunk), ("workers", workers)) if v})
    screen, trained = Screen(common), Trained(run, common)
    coding.check(trained.model)
    options = dataclasses.replace(options, split=options.split or "all")
    found = trained.data(data, options, screen)
    folder = Path(data) if Path(data).is_dir() and found.ids is not None else None
    labels = labels or bool(context_size(trained.model))
    examples = coding.Examples(
        found, folder=folder, labels=labels, prepared=prepared, seed=common.seed
    )
    model = trained.model.cpu()
    with screen.progress("compressing") as progress:
        report = coding.compress(
            model,
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
    screen.result(answer, _told(answer))


def _told(report: dict[str, Any]) -> str:
    n, model = report["images"], report["model_bytes"]
    lines = [
        f"{n:,} images: {report['data_bytes']:,} bytes of data, and a model of {model:,}: "
        f"{report['out']}",
        f"{report['bits_per_dim']:.4f} bits/dim in the file; by the model itself "
        f"{report['ideal_bits_per_dim']:.4f} ± {report['ideal_error']:.4f} (of a sample)",
    ]
    if report["packed"] < n:
        lines.append(
            f"{report['net_bits_per_dim']:.4f} without the bits that each chunk begins with, over "
            f"the {n - report['packed']:,} images that the model coded"
        )
    if report["side_bytes"]:
        lines.append(f"names, modes and labels: {report['side_bytes']:,} bytes")
    if report["packed"]:
        lines.append(f"packed better by xz, or not codable by the model: {report['packed']:,}")
    pays = report["break_even"]
    paid = f"pays for itself from {pays:,} images" if pays else "never pays for itself"
    lines.append(f"xz would take about {report['general_bytes']:,} bytes; the model {paid}")
    lines.append("read again and compared" if report["verified"] else "not read again")
    return "\n".join(lines)


@commands.command
def decompress(
    file: Path,
    out: Path,
    *,
    run: str | None = None,
    trust: Annotated[bool, Parameter(negative="")] = False,
    index: int | None = None,
    keep_going: Annotated[bool, Parameter(negative="")] = False,
    max_output: int = 4096,
    workers: int | None = None,
    common: CommonOptions = USUAL,
) -> None:
    """Get the data of a .mus file back, to the bit.

    It ends with 3 if the file is damaged, 4 if the model is another one, 5 if this machine
    computes other numbers than the one that wrote the file, 6 if the file asks for more than is
    allowed, and 7 if it is of a later format.

    Args:
        file: The .mus file.
        out: A folder that does not exist, or an .npz or .npy file.
        run: The run folder, or the .safetensors file, that it was written with; by default the
            model in the file.
        trust: Build the model that is in the file, which a stranger might have made to take all
            memory.
        index: Only this image, from 0.
        keep_going: Leave out chunks that cannot be read, name the images that are lost, and end
            with 3.
        max_output: MiB that the data may take.
        workers: Chunks that are worked on at a time; by default one for each core.
        common: Shared options.
    """
    from musigma import coding

    coding.check_out(out)
    at_least_one(max_output=max_output, **({"workers": workers} if workers else {}))
    screen = Screen(common)
    model = None if run is None else Trained(run, common).model.cpu()
    limits = coding.Limits(total=max_output << 20)
    lost: list[tuple[int, int, str]] = []
    with _opened(file) as opened:
        archive = coding.Archive(opened, model, limits=limits, trust=trust, workers=workers)
        with screen.progress("decompressing") as progress:
            if index is not None:
                if not 0 <= index < len(archive):
                    raise ValueError(f"index: expected 0 to {len(archive) - 1}; got {index}")
                batches = iter([(index, archive.one(index))])
            elif keep_going:
                batches = _what_is_left(archive, lost, progress)
            else:
                batches = _numbered(archive, progress)
            count = coding.extract(batches, archive, out)
    answer = {"out": str(out), "images": count, "lost": [list(row) for row in lost]}
    said = [f"{count:,} images: {out}", *(f"lost: {a} to {b - 1}: {why}" for a, b, why in lost)]
    screen.result(answer, "\n".join(said))
    if lost:
        raise coding.DamagedFile(
            f"{sum(b - a for a, b, _ in lost):,} images are lost; all others are in {out}"
        )


def _numbered(archive: Any, progress: Any) -> Iterator[tuple[int, Any]]:
    first = 0
    for batch in archive:
        yield first, batch
        first += len(batch)
        if progress:
            progress(first, len(archive))


def _what_is_left(archive: Any, lost: list[Any], progress: Any) -> Iterator[tuple[int, Any]]:
    from musigma.coding import CodingError

    lost += [(a, b, "their chunk is not there") for a, b in archive.reader.lost]
    if not archive.reader.ended:
        lost.append((archive.reader.images, archive.reader.images, "the file ends too early"))
    for place, entry in enumerate(archive.reader.entries):
        try:
            batch = archive.chunk(place)
        except CodingError as error:
            lost.append((entry.first, entry.first + entry.count, str(error)))
            continue
        yield entry.first, batch
        if progress:
            progress(entry.first + entry.count, len(archive))


def _opened(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"file: there is no file {file}")
    return file.open("rb")


def tell(file: Path, screen: Screen) -> None:
    """What a .mus file says of itself."""
    from musigma.coding import summary

    if file.suffix != ".mus":
        raise ValueError(f"data: give some, of which {file} says what one input is to it")
    with _opened(file) as opened:
        found = summary(opened)
    found["file_bytes"] = file.stat().st_size
    shape = "x".join(map(str, found["shape"]))
    lines = [
        f"{found['images']:,} images of {shape}, {found['bits']} bits, in {found['chunks']} "
        f"chunks: {found['data_bytes']:,} bytes, {found['bits_per_dim']:.4f} bits/dim",
        f"model: {found['model']['architecture']}, digest {found['model']['digest'][:12]}, "
        + (
            f"in the file ({found['model_bytes']:,} bytes)" if found["model_bytes"] else "not here"
        ),
        f"numerics: {found['numerics']}"
        + "".join(f", {k} {v}" for k, v in sorted(found["machine"].items())),
    ]
    if found["images_packed"]:
        lines.append(f"by a general codec: {found['images_packed']:,} images")
    if found["about"]:
        lines.append(f"kept with them: {', '.join(sorted(found['about']))}")
    for a, b in found["lost"]:
        lines.append(f"lost: images {a} to {b - 1}")
    if not found["whole"]:
        lines.append("the file is damaged; decompress --keep-going gets what is left")
    screen.result(found, "\n".join(lines))
