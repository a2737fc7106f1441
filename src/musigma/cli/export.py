"""``musigma export``: a trained model as files that run without this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from musigma.cli.options import CONVERT, Common, Run, app
from musigma.cli.trained import Trained

Name = Literal["encoder", "decoder", "log_prob", "sampler"]


@app.command(group=CONVERT)
def export(
    run: Run,
    *,
    onnx: Path | None = None,
    torch_export: Path | None = None,
    functions: Annotated[tuple[Name, ...], Parameter(name="--function")] = (),
    overwrite: bool = False,
    common: Common = Common(),
) -> None:
    """Write a model as functions that run without this library.

    They are encoder, decoder, log_prob and sampler. A sheet in JSON beside them says of each what
    goes in and what comes out. Every draw is an input, `noise`, so all of them are deterministic.
    Each file is run, and compared with the model, before it appears.

    Args:
        onnx: Folder for files of ONNX, or an .onnx file for a single function. Needs pip install
            'musigma[export]'.
        torch_export: Folder for files of torch.export, or a .pt2 file for a single function.
        functions: A function to write; may be given several times. By default all that the model
            has.
        overwrite: Replace what an earlier export wrote.
    """
    from musigma import export as exporting
    from musigma.export.writing import check_needs

    wanted = {"onnx": onnx, "torch": torch_export}
    chosen = [(kind, out) for kind, out in wanted.items() if out is not None]
    if len(chosen) != 1:
        raise ValueError("export: say what to write: one of --onnx and --torch-export, and where")
    ((kind, out),) = chosen
    check_needs(kind)
    _check_out(out, kind, functions, overwrite)
    trained = Trained(run, dataclasses.replace(common, device=common.device or "cpu"))
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


def _check_out(out: Path, kind: str, functions: tuple[str, ...], overwrite: bool) -> None:
    """Refuse a path before anything is computed for it."""
    from musigma.export import KINDS, NAMES
    from musigma.export.writing import SHEET

    option, suffix = {"torch": "torch-export"}.get(kind, kind), KINDS[kind].suffix
    if not out.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {out.parent}; create it first")
    file = out.suffix == suffix
    if not file and out.suffix in (".onnx", ".pt2"):
        raise ValueError(f"{option}: expected a folder, or a {suffix} file; got {out}")
    if file and len(functions or NAMES) > 1:
        raise ValueError(
            f"{option}: a file holds one function; choose it (--function), or name a folder"
        )
    taken = [path for path in ((out, out.with_suffix(".json")) if file else (out,)) if _full(path)]
    if taken and not overwrite:
        raise ValueError(f"{option}: {taken[0]} already exists; pass --overwrite or another name")
    if file and out.is_dir():
        raise ValueError(f"{option}: {out} is a folder; name a file")
    if not file and taken and not (out / SHEET).is_file():
        raise ValueError(
            f"{option}: {out} is no folder of an earlier export (it has no {SHEET}), and would be "
            "replaced as a whole; name another one"
        )


def _full(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
