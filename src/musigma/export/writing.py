"""Files of exported functions, checked against PyTorch before they appear."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musigma.data import Preprocess
from musigma.export.functions import Function
from musigma.export.programs import TOLERANCE, difference, quiet
from musigma.export.sheet import sheet
from musigma.files import finite, replacing, replacing_folder
from musigma.model import Model

__all__ = ["KINDS", "SHEET", "Kind", "check_needs", "save", "write"]

SHEET = "sheet.json"
"""Name of the sheet in a folder."""

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Kind(NamedTuple):
    """A kind of files.

    Attributes:
        suffix: Of a file.
        save: Writes a function into a file.
        load: Returns what runs a file.
        needs: Modules that `save` and `load` need.
    """

    suffix: str
    save: Callable[[Function, Path], None]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()


def write(
    model: Model,
    functions: Sequence[Function],
    out: str | Path,
    kind: str = "onnx",
    *,
    preprocess: Preprocess | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write functions, and the sheet that describes them.

    Each file is run and compared with the model before it appears. A folder appears, or is
    replaced, as a whole.

    Args:
        model: The model.
        functions: Its functions.
        out: A folder that is new, empty, or of an earlier export, in which each function is a
            file of its name, beside ``sheet.json``; or, of a single function, a file with the
            suffix of the kind, and the sheet beside it.
        kind: One of `KINDS`: `onnx` or `torch`.
        preprocess: How images become the levels that the model takes.
        progress: Called with the number of functions that are written, and their number.

    Returns:
        The sheet.

    Raises:
        ValueError: If a file computes other numbers than the model, what writes or runs it is not
            installed, several functions are to be written into one file, or the folder holds other
            files.
    """
    out, how = Path(out), KINDS[kind]
    check_needs(kind)
    if out.suffix == how.suffix:
        if len(functions) != 1:
            names = ", ".join(function.name for function in functions)
            raise ValueError(
                f"{kind}: a file holds one function, and these are {names}; choose one "
                "(--function), or name a folder"
            )
        about = sheet(model, functions, {functions[0].name: out.name}, preprocess)
        with replacing(out) as draft, replacing(out.with_suffix(".json")) as text:
            about["functions"][functions[0].name]["largest_difference"] = save(
                functions[0], draft, kind
            )
            _write_sheet(about, text)
        progress(1, 1)
        return about
    files = {function.name: f"{function.name}{how.suffix}" for function in functions}
    about = sheet(model, functions, files, preprocess)
    with replacing_folder(out, SHEET) as folder:
        for i, function in enumerate(functions):
            progress(i, len(functions))
            worst = save(function, folder / files[function.name], kind)
            about["functions"][function.name]["largest_difference"] = worst
        _write_sheet(about, folder / SHEET)
    progress(len(functions), len(functions))
    return about


def check_needs(kind: str) -> None:
    """Refuse a kind of files of which a library that writes or runs it is missing.

    Raises:
        ValueError: Naming all that are missing.
    """
    missing = [name for name in KINDS[kind].needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{kind}: it needs {', '.join(missing)}: pip install 'musigma[export]'")


def save(function: Function, path: Path, kind: str = "onnx") -> float:
    """Write a function into a file, and run it.

    Returns:
        The largest `difference` from the model.

    Raises:
        ValueError: If the function cannot be written, or the file computes other numbers.
    """
    how, worst = KINDS[kind], 0.0
    with quiet():
        how.save(function, path)
        try:
            run = how.load(path)
        except Exception as error:  # runtimes raise anything
            text = str(error).partition("\n")[0][:200]
            raise ValueError(
                f"{function.name}: the file cannot be run ({text}); nothing is written"
            ) from error
    levels = [value.levels for value in function.outputs]
    for part in (slice(None), slice(1)):
        got = run([value.tensor[part] for value in function.inputs])
        wanted = [value.tensor[part] for value in function.outputs]
        worst = max(worst, difference(got, wanted, levels))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{function.name}: the exported function differs from the model by {worst:.2g} "
            f"(relative where values are above 1, and to the largest level of images), more than "
            f"{TOLERANCE:g}; nothing is written"
        )
    return worst


def _write_sheet(about: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(finite(about), indent=2) + "\n", encoding="utf-8")


# --- torch.export --------------------------------------------------------------------------------


def _save_torch(function: Function, path: Path) -> None:
    # a file object, since the path of a draft has another suffix than .pt2
    content = io.BytesIO()
    torch.export.save(function.program, content)
    path.write_bytes(content.getvalue())


def _load_torch(path: Path) -> Run:
    program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda inputs: program(*inputs)


# --- ONNX ----------------------------------------------------------------------------------------


def _save_onnx(function: Function, path: Path) -> None:
    batch: Any = torch.export.Dim("batch", min=1)
    try:
        program = torch.onnx.export(
            function.program,
            dynamo=True,
            verbose=False,
            input_names=[value.name for value in function.inputs],
            output_names=[value.name for value in function.outputs],
            dynamic_shapes=tuple({0: batch} for _ in function.inputs),
        )
    except Exception as error:  # conversion raises anything
        raise ValueError(f"{function.name}: {_onnx_reason(error)}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(path, external_data=False)


def _onnx_reason(error: BaseException) -> str:
    text = str(error)
    _, found, rest = text.partition("No ONNX function found for <OpOverload(op='")
    if found:
        name = rest.partition("'")[0]
        why = " (typed columns, bounds and --embed quantile need it)" * (name in LACKING)
        return f"ONNX has no operation for {name}{why}; use --torch-export"
    first = text.partition("\n")[0][:200]
    return f"PyTorch cannot convert it to ONNX ({first}); use --torch-export"


LACKING = ("aten.searchsorted", "prims.ndtri")
"""Operations that ONNX lacks, of typed columns, of bounds and of the embedding `quantile`."""


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [t.numpy(force=True) for t in inputs]
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array).to(inputs[0].device) for array in results]

    return run


KINDS = {
    "onnx": Kind(".onnx", _save_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch": Kind(".pt2", _save_torch, _load_torch),
}
"""Kinds of files, by name."""
