"""Images of another kind: how well every score of `musigma.detectors` finds them.

    MUSIGMA_DATA=... python benchmarks/strange_images.py measure [SET ...]   # trains into runs/
    python benchmarks/strange_images.py collect     # the JSON file in docs/, and the table

The sets are Fashion-MNIST and MNIST, and CIFAR-10 (from JPEG, `cifar10-jpeg.tar.xz`) in color and
in gray: the mean of the three channels, rounded, in all three. A model of one set of a pair scores
test images of both. Each model is small, and trained for a few hundred steps of 64 images on one
thread; Glow adds uniform noise, the VAE has a mixture of logistics. A background model is the same
on images of which a fifth of the levels is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import musigma
from musigma import Dataset, TrainConfig, anomaly, build, detectors, fit
from musigma.data import Preprocess
from musigma.files import write_json

HERE = Path(__file__).parent
RUNS, DOCS = HERE.parent / "runs" / "strange-images", HERE.parent / "docs"
GLOW = {"depth": 6, "hidden": 64, "dequantize": "uniform"}


@dataclass(frozen=True)
class Trained:
    """How a model is trained."""

    architecture: str
    options: dict[str, Any]
    steps: int
    perturb: float = 0.0
    seed: int = 0


MODELS = {
    "glow": Trained("glow", GLOW, 500),
    "glow-background": Trained("glow", GLOW, 300, perturb=0.2),
    "vae": Trained("vae", {"width": 32}, 500),
    "vae-background": Trained("vae", {"width": 32}, 300, perturb=0.2),
    "vae-1": Trained("vae", {"width": 32}, 500, seed=1),
    "vae-2": Trained("vae", {"width": 32}, 500, seed=2),
}


@dataclass(frozen=True)
class Pair:
    """What is measured for models of one set: which images are strange to them, and how many.

    Attributes:
        strange: The set of strange images.
        kinds: The models.
        share: The share of the steps that models are trained for.
        scored: Test images of each set; `few` of them for the regret.
        fitted: Training images that statistics are fitted on.
    """

    strange: str
    kinds: tuple[str, ...] = tuple(MODELS)
    share: float = 1.0
    scored: int = 1000
    few: int = 400
    fitted: int = 2000


SMALL: dict[str, Any] = {"kinds": ("glow", "glow-background", "vae", "vae-background")}
SMALL |= {"scored": 500, "few": 40, "fitted": 1000}
PAIRS = {
    "fashion": Pair("mnist"),
    "mnist": Pair("fashion", few=100),
    "color": Pair("gray", **SMALL),
    "gray": Pair("color", **SMALL),
}


# --- data ----------------------------------------------------------------------------------------


@cache
def images(name: str) -> Dataset:
    """All images of a set."""
    if name in ("mnist", "fashion"):
        return musigma.data.load({"fashion": "fashion-mnist"}.get(name, name))
    found = musigma.data.load(str(Path(os.environ["MUSIGMA_DATA"]) / "cifar10-jpeg.tar.xz"))
    if name == "color":
        return found
    mean = np.rint(found.array[:].mean(1, keepdims=True)).astype(np.uint8)
    return replace(found, array=np.repeat(mean, 3, 1), name=name)


def train(name: str) -> None:
    """Train a model, unless it is there."""
    set_name, _, kind = name.partition("-")
    how, out = MODELS[kind], RUNS / name / "model.safetensors"
    if out.exists():
        return
    data = replace(images(set_name), preprocess=Preprocess(perturb=how.perturb))
    learn, validation = data.split("train"), data.split("validation")
    steps = round(how.steps * PAIRS[set_name].share)
    config = TrainConfig(
        steps=steps,
        batch_size=64,
        precision="bf16",
        seed=how.seed,
        evaluations=2,
        evaluate_on=500,
    )
    torch.manual_seed(how.seed)
    model = build(how.architecture, learn.spec(), **how.options)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fit(model, learn, validation, config, folder, device="cpu")
        model = musigma.load(f"{folder}/model.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    musigma.save(model, out, extra={"steps": steps})
    print(name, f"{steps:,} steps, {time.process_time() - start:.0f} s", flush=True)


# --- scores --------------------------------------------------------------------------------------


def split(name: str) -> tuple[Dataset, Dataset]:
    """Test images of a set to score, and its training images to fit statistics on."""
    found, learn, how = images(name).split("held-out"), images(name).split("train"), PAIRS[name]
    rows = np.arange(len(found))
    if name == "gray":  # other images than those in color
        rows = rows[::-1]
    return found.subset(rows[: how.scored]), learn.subset(np.arange(how.fitted))


def loaded(name: str) -> Any:
    """A trained model, or None."""
    path = RUNS / name / "model.safetensors"
    return musigma.load(path) if path.exists() else None


def measure(name: str, by: Sequence[str], kinds: Sequence[str]) -> None:
    """Train what is missing, score test images of both sets by detectors, write the figures."""
    how = PAIRS[name]
    for kind in how.kinds:
        if kind in kinds:
            train(f"{name}-{kind}")
    (normal, learn), (strange, _) = split(name), split(how.strange)
    out, both = RUNS / f"{name}.json", (normal, strange)
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in rows if row["detector"] not in by or row["model"] not in kinds]
    few = [data.subset(np.arange(how.few)) for data in both]
    for kind in ("glow", "vae"):
        model = loaded(f"{name}-{kind}")
        if model is None or kind not in kinds:
            continue
        members = [loaded(f"{name}-{kind}-{i}") for i in (1, 2)]
        reference = detectors.Reference(
            model,
            train=learn,
            background=loaded(f"{name}-{kind}-background"),
            members=[member for member in members if member is not None],
            batch_size=50,
        )
        for detector in by:
            function = detectors.DETECTORS[detector]
            sets = few if detector == "likelihood_regret" else both
            start = time.process_time()
            try:
                scores = [function(reference, data) for data in sets]
            except ValueError as reason:
                print(name, kind, detector, reason, flush=True)
                continue
            found, note = anomaly.nan_as_strangest(np.concatenate(scores), detector)
            n = len(scores[0])
            auroc = anomaly.detection(found, np.arange(len(found)) >= n)["auroc"]
            row = {"set": name, "model": kind, "detector": detector, "n": n}
            row |= {"auroc": [round(end, 4) for end in auroc], "note": note}
            row["milliseconds"] = round(1000 * (time.process_time() - start) / len(found), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(out, rows)


def collect() -> None:
    """Write the figures of all sets into docs/, and print the table."""
    files = [RUNS / f"{name}.json" for name in PAIRS]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    write_json(DOCS / "figures" / "strange-images.json", rows)
    rows.sort(key=lambda row: (row["model"], row["detector"]))
    found = {(r["model"], r["detector"], r["set"]): r["auroc"] for r in rows}
    print("| model | score |", " | ".join(f"{s} → {how.strange}" for s, how in PAIRS.items()), "|")
    print("|---|---|" + "---|" * len(PAIRS))
    for model, detector in dict.fromkeys((r["model"], r["detector"]) for r in rows):
        cells = [found.get((model, detector, s)) for s in PAIRS]
        texts = ["-" if c is None else f"{c[0]:.3f} ({c[1]:.3f}–{c[2]:.3f})" for c in cells]
        print(f"| {model} | `{detector}` | {' | '.join(texts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["measure", "collect"])
    parser.add_argument("names", nargs="*", help="sets")
    parser.add_argument("--by", nargs="*", default=[*detectors.DETECTORS])
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what == "measure":
        for name in chosen.names or PAIRS:
            measure(name, chosen.by, chosen.models)
    else:
        collect()


if __name__ == "__main__":
    main()
