"""The page of a model as files that run in a browser alone, without a server of this library."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from musigma.data import cache
from musigma.evaluation import bound
from musigma.explore import answers
from musigma.explore.examples import COLUMNS, Choice
from musigma.explore.explorer import SHOWN, STEPS, Explorer, moments_of
from musigma.export import Call, Function, Value, save, traced
from musigma.files import finite, replacing_folder

__all__ = ["MARK", "write"]

VIEWS = ["one", "traverse", "map"]
MARK = "musigma.json"
"""The file with the answers, by which a folder of this kind is known."""

HERE = Path(__file__).parent
POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; base-uri 'none'"

PACKAGE = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"
PACKAGE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME = {"ort.wasm.bundle.min.mjs": "ort.js", "ort-wasm-simd-threaded.wasm": "ort.wasm"}
"""Files of ONNX Runtime Web (MIT license), and their names in the page."""

Progress = Callable[[int, int], None]


def write(
    explorer: Explorer,
    out: str | Path,
    runtime: Path | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write a folder that any static server shows as the page of a model.

    It holds three views (one input, traverse, the map), the encoder and the decoder as ONNX, ONNX
    Runtime Web, and all examples of the explorer. The browser asks no other host.

    Args:
        explorer: The model, and the examples that the page holds.
        out: The folder. If it exists, it is replaced; it must be empty, or such a page.
        runtime: A folder of the npm package onnxruntime-web, or its `dist`. None: the package
            1.30.0 of the npm registry, from the cache or downloaded once, and checked.
        progress: Called with the number of steps that are done, and their number.

    Returns:
        The number of `examples` in the folder, its `bytes`, and the `largest_difference` of each
        function from the model.

    Raises:
        ValueError: If the page cannot show the model, or its functions cannot be exported; or if
            the runtime is not there, or the folder holds other files.
    """
    if faults := list(_faults(explorer)):
        raise ValueError(f"static: this page cannot show the model: {'; '.join(faults)}")
    files, steps = _runtime(runtime), 5
    progress(0, steps)
    functions = traced(explorer.model, [Look, Decode])
    progress(1, steps)
    survey = explorer.survey.wait()
    assert survey.thread is not None
    survey.thread.join()
    if survey.error:
        raise ValueError(f"static: {survey.error}")
    progress(2, steps)
    with replacing_folder(out, MARK) as folder:
        shutil.copytree(HERE / "static", folder, dirs_exist_ok=True)
        shutil.copytree(HERE / "browser", folder, dirs_exist_ok=True)
        (folder / "onnxruntime").mkdir()
        for name, content in files.items():
            (folder / "onnxruntime" / name).write_bytes(content)
        worst = {}
        for i, function in enumerate(functions):
            worst[function.name] = save(function, folder / f"{function.name}.onnx")
            progress(3 + i, steps)
        (folder / "examples.bin").write_bytes(b"".join(_contents(explorer)))
        text = json.dumps(finite(_answers(explorer, functions)))
        (folder / MARK).write_text(text, encoding="utf-8")
        index = folder / "index.html"
        index.write_text(_index(index.read_text(encoding="utf-8"), explorer), encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    progress(steps, steps)
    count = len(explorer.examples.data)
    return {"examples": count, "bytes": size, "largest_difference": worst}


def _faults(explorer: Explorer) -> Iterator[str]:
    """Why the page cannot show a model."""
    spec = explorer.examples.spec
    if explorer.moments is None:
        yield explorer.model.no_latents
    elif explorer.moments is answers.estimated:
        yield "its posterior is no Gaussian, so mean and scale would be those of draws in Python"
    if any(
        p.is_floating_point() and p.dtype != torch.float32 for p in explorer.model.parameters()
    ):
        yield "its parameters are not float32, in which browsers compute (model.float())"
    if spec.schema is not None:
        yield "its columns have types, which only Python reads"
    if len(explorer.examples.data) < 2:
        yield "its map needs two examples or more"
    if any(len(variable.shape) == 2 for variable in spec.context):
        yield "it is conditioned on sequences"


# --- functions -----------------------------------------------------------------------------------


class Look(Call):
    """All that the page says of an example: whitened latents, their cost, a draw, the bound."""

    name = "look"
    what = "mean, standard deviation and cost of each latent, their center, a draw, -log p(x)"

    def first(self) -> Iterator[Value]:
        """The data."""
        yield self.data()

    def inputs(self) -> list[Value]:
        """Data and context."""
        found = super().inputs()
        (x,), context = self.split([value.tensor for value in found])
        self.moments = moments_of(self.model, x, context)
        return found

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Whitened latents in one row."""
        (x,), context = self.split(values)
        mean, std, cost = self.moments(self.model, x, context)
        center = self.model.encode(x, context, mode=True, whiten=True)
        drawn = self.model.encode(x, context, whiten=True)
        nats = -self.model(x, context).elbo
        flat = {"center": center, "drawn": drawn}
        rows = {name: torch.cat([t.flatten(1) for t in z], 1) for name, z in flat.items()}
        return {"mean": mean, "std": std, "cost": cost, **rows, "nats": nats}


class Decode(Call):
    """Whitened latents in one row, decoded."""

    name = "decode"
    what = "the center of p(x | z)"

    def first(self) -> Iterator[Value]:
        """The latents."""
        z = self.latents()
        self.shapes = [tuple(t.shape[1:]) for t in z]
        flat = torch.cat([t.flatten(1) for t in z], 1)
        yield Value("z", flat, "whitened latents in one row")

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Data."""
        (flat,), context = self.split(values)
        parts = flat.split([math.prod(shape) for shape in self.shapes], 1)
        z = [t.reshape(-1, *shape) for t, shape in zip(parts, self.shapes, strict=True)]
        return {"x": self.model.decode(z, context, whiten=True)}


# --- what the page knows -------------------------------------------------------------------------


def _answers(explorer: Explorer, functions: list[Function]) -> dict[str, Any]:
    """All that the browser does not compute."""
    survey, examples = explorer.survey, explorer.examples
    spec, data = examples.spec, examples.data
    about = explorer.about() | {
        "data": PurePath(data.name).name,
        "umap": False,
        "views": VIEWS,
        "served": False,
        "conditionals": "",
        "training": False,
    }
    colors: dict[str, Any] = {"score": [survey.scores.tolist(), []]}
    for name in examples.colors():
        values, names = examples.color(name, survey.rows)
        colors[name] = [values.tolist(), names]
    return {
        "about": about,
        "order": explorer.order(),
        "plane": explorer.plane(Choice()) if examples.flat else None,
        "map": {
            "rows": survey.rows.tolist(),
            "places": survey.places.T.tolist(),
            "colors": colors,
        },
        "top": survey.top,
        "names": [explorer.places.name(i) for i in range(about["dims"])],
        "middle": survey.plane[0].tolist(),
        "axes": survey.plane[1].tolist(),
        "steps": survey.steps.tolist(),
        "along": STEPS,
        "shown": SHOWN,
        "columns": COLUMNS,
        "bound": bound(explorer.model),
        "levels": spec.levels if isinstance(spec.levels, int) else 0,
        "context": [[v.name, list(v.shape), v.classes] for v in spec.context],
        "examples": [examples.about(Choice(i)) for i in range(len(data))],
        "inputs": {
            function.name: [
                {"name": v.name, "shape": list(v.tensor.shape[1:]), "law": v.law}
                for v in function.inputs
            ]
            for function in functions
        },
    }


def _contents(explorer: Explorer) -> Iterator[bytes]:
    """The examples, then each variable of their context, as float32."""
    x, context = explorer.examples.batch(range(len(explorer.examples.data)))
    yield _bytes(x)
    variables = explorer.examples.spec.context
    for variable in variables:
        yield _bytes(context if isinstance(context, Tensor) else (context or {})[variable.name])


def _bytes(t: Tensor) -> bytes:
    return t.numpy(force=True).astype("<f4").tobytes()


def _index(text: str, explorer: Explorer) -> str:
    """The page, with a policy that keeps it from other hosts, and what the folder holds.

    A browser runs no modules of a page that was opened as a file, so until they run it says that.
    """
    count = len(explorer.examples.data)
    note = (
        f'  <p class="quiet">This page is complete: the model and {count:,} examples of the data '
        "are files beside it, which whoever opens it can read.</p>\n"
    )
    policy = f'  <meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    help_ = (
        "<p>This page is loading. If it stays like this, it was opened as a file: serve its "
        "folder (python -m http.server), and open the address.</p>"
    )
    added = {"  <meta charset": policy, "</main>": help_, "  <footer>\n": note}
    assert all(text.count(before) == 1 for before in added)
    for before, new in added.items():
        text = text.replace(before, f"{new}{before}")
    return text


# --- ONNX Runtime Web ----------------------------------------------------------------------------


def _runtime(given: Path | None) -> dict[str, bytes]:
    """The files of the runtime, by their names in the page."""
    if given is not None:
        places = [given, given / "dist"]
        found = next((p for p in places if all((p / name).is_file() for name in RUNTIME)), None)
        if found is None:
            raise ValueError(
                f"onnxruntime: {given} holds no {' and '.join(RUNTIME)}; name the folder of the "
                "npm package onnxruntime-web (npm pack onnxruntime-web)"
            )
        return {new: (found / name).read_bytes() for name, new in RUNTIME.items()}
    archive = _package()
    with tarfile.open(archive) as package:
        contents = {}
        for name, new in RUNTIME.items():
            member = package.extractfile(f"package/dist/{name}")
            assert member is not None
            contents[new] = member.read()
    return contents


def _package() -> Path:
    """The package, from the cache or downloaded, checked by its SHA-256.

    Raises:
        ValueError: If it is not there, and cannot be downloaded.
    """
    home = cache.folder() / "onnxruntime-web"
    path = home / PACKAGE.rpartition("/")[2]
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == PACKAGE_SHA256:
        return path
    try:
        import pooch

        logger = pooch.get_logger()
        level = logger.level
        logger.setLevel("ERROR")
        try:
            pooch.retrieve(PACKAGE, f"sha256:{PACKAGE_SHA256}", path.name, home)
        finally:
            logger.setLevel(level)
    except Exception as error:
        raise ValueError(
            f"onnxruntime: ONNX Runtime Web is not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {error}); get it by `npm pack onnxruntime-web`, unpack it, "
            "and name its folder (--onnxruntime)"
        ) from error
    return path
