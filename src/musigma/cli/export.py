"""``musigma export``: a trained model as files that run without this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from musigma.cli.explore import data_of
from musigma.cli.options import CONVERT, DATA, Common, DataOptions, Run, app, at_least_one
from musigma.cli.trained import Trained
from musigma.files import check_folder

Name = Literal["encoder", "decoder", "log_prob", "sampler"]


@app.command(group=CONVERT)
def export(
    run: Run,
    *,
    onnx: Path | None = None,
    torch_export: Path | None = None,
    static: Path | None = None,
    functions: Annotated[tuple[Name, ...], Parameter(name="--function")] = (),
    examples: int | None = None,
    onnxruntime: Path | None = None,
    overwrite: bool = False,
    source: Annotated[str | None, Parameter(name="--data", group=DATA)] = None,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Write a model as functions that run without this library.

    The functions are encoder, decoder, log_prob and sampler. `sheet.json` describes the inputs and
    outputs of each. Draws are inputs, called `noise`, so the functions are deterministic. Before a
    file appears, it is run and compared with the model.

    Args:
        onnx: Folder for files of ONNX, or an .onnx file for a single function. Needs pip install
            'musigma[export]'.
        torch_export: Folder for files of torch.export, or a .pt2 file for a single function.
        static: Folder for a page that shows the model in a browser alone, on any static server.
            It holds the model and some of its data, which anyone who opens it can read.
        functions: A function to write; may be given several times. By default all that the model
            has.
        examples: Number of examples of the data in the folder of `--static`, evenly spread. By
            default 200.
        onnxruntime: Folder of the npm package onnxruntime-web, for `--static`. By default it is
            downloaded once from the npm registry, and checked.
        overwrite: Replace what an earlier export wrote.
        source: Data that `--static` shows. By default those that the model was trained on.
    """
    from musigma import export as exporting
    from musigma.export.writing import check_needs

    at_least_one(examples=examples)
    wanted = {"onnx": onnx, "torch": torch_export, "static": static}
    chosen = [(kind, out) for kind, out in wanted.items() if out is not None]
    if len(chosen) != 1:
        raise ValueError(
            "export: say what to write: one of --onnx, --torch-export and --static, and where"
        )
    ((kind, out),) = chosen
    common = dataclasses.replace(common, device=common.device or "cpu")
    if kind == "static":
        if functions:
            raise ValueError("function: --static writes those that its page needs; leave it out")
        check_needs("onnx")
        from musigma.explore.standalone import MARK

        _check_folder(out, kind, overwrite, MARK)
        _write_page(Trained(run, common), source, options, out, examples or 200, onnxruntime)
        return
    given = {"data": source, "examples": examples, "onnxruntime": onnxruntime}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: it is for --static; leave it out")
    check_needs(kind)
    _check_out(out, kind, functions, overwrite)
    trained = Trained(run, common)
    screen = trained.screen
    with screen.progress("tracing") as progress:
        made = exporting.functions_of(trained.model, functions, progress=progress)
    with screen.progress(f"writing {kind}") as progress:
        about = exporting.write(
            trained.model, made, out, kind, preprocess=trained.preprocess, progress=progress
        )
    differences = {name: row["largest_difference"] for name, row in about["functions"].items()}
    screen.result(
        {"out": str(out), "kind": kind, "largest_difference": differences},
        f"{', '.join(differences)}: {out}",
    )


def _write_page(
    trained: Trained,
    source: str | None,
    options: DataOptions,
    out: Path,
    examples: int,
    runtime: Path | None,
) -> None:
    """Write the page of a model, and say what is in it."""
    from musigma.explore import Explorer, standalone
    from musigma.explore.survey import spread

    if runtime is None:
        trained.screen.note(
            f"ONNX Runtime Web: {standalone.PACKAGE}, downloaded once and kept in the cache"
        )
    _, found = data_of(trained, source, options)
    some = found.subset(spread(len(found), examples))
    explorer = Explorer(trained.model.float(), some, seed=trained.common.seed)
    with trained.screen.progress("writing a page") as progress:
        about = standalone.write(explorer, out, runtime, progress=progress)
    trained.screen.result(
        {"out": str(out), "kind": "static", **about},
        f"{out}: the model and {about['examples']:,} examples of the data, "
        f"{about['bytes'] / 1e6:.1f} MB, which whoever opens the page can read\n"
        f"python -m http.server --directory {out}   shows it on this machine",
    )


def _check_out(out: Path, kind: str, functions: tuple[str, ...], overwrite: bool) -> None:
    """Refuse a path before anything is computed for it."""
    from musigma.export import KINDS, NAMES
    from musigma.export.writing import SHEET

    option, suffix = {"torch": "torch-export"}.get(kind, kind), KINDS[kind].suffix
    if out.suffix != suffix:
        if out.suffix in (".onnx", ".pt2"):
            raise ValueError(f"{option}: expected a folder, or a {suffix} file; got {out}")
        _check_folder(out, option, overwrite, SHEET)
        return
    if not out.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {out.parent}; create it first")
    if len(functions or NAMES) > 1:
        raise ValueError(
            f"{option}: a file holds one function; choose it (--function), or name a folder"
        )
    if out.is_dir():
        raise ValueError(f"{option}: {out} is a folder; name a file")
    taken = [path for path in (out, out.with_suffix(".json")) if path.exists()]
    _check_free(taken, option, overwrite)


def _check_folder(out: Path, option: str, overwrite: bool, mark: str) -> None:
    """Refuse a folder that is no earlier export, or that may not be replaced."""
    check_folder(out, mark, option)
    _check_free([out] if out.is_dir() and any(out.iterdir()) else [], option, overwrite)


def _check_free(taken: list[Path], option: str, overwrite: bool) -> None:
    if taken and not overwrite:
        raise ValueError(f"{option}: {taken[0]} already exists; pass --overwrite or another name")
