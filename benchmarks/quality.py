"""The likelihood that models reach in ten minutes and in an hour of training on two cores.

    MUSIGMA_DATA=... python benchmarks/quality.py run [NAME ...]     # use an idle machine
    MUSIGMA_DATA=... python benchmarks/quality.py measure [NAME ...]
    python benchmarks/quality.py collect     # pictures and quality.json, in docs/figures
    python -m tools.tables    # put the figures into docs/figures.md

`run` calls the command line, one run at a time; finished runs are skipped. On a busy machine,
`--steps` sets the number of steps that an idle one would reach in the same minutes. `measure`
computes importance-weighted bounds of VAEs: 100 draws on all 10,000 test images, and 1,000 draws
on the first 500. `quality_peers.py` trains other libraries' models for the same minutes;
`collect` includes them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import musigma
from musigma.evaluation import evaluate
from musigma.report import figures

HERE = Path(__file__).parent
RUNS, DOCS = HERE.parent / "runs" / "quality", HERE.parent / "docs"

MODELS = {
    "vae": (10, "vae mnist --binarize dynamic"),
    "ladder": (60, "ladder mnist --binarize dynamic"),
    "glow-10": (10, "glow mnist"),
    "glow-60": (60, "glow mnist"),
    "glow-10-uniform": (10, "glow mnist --dequantize uniform"),
    "glow-60-uniform": (60, "glow mnist --dequantize uniform"),
    "glow-fashion": (30, "glow fashion-mnist"),
}
ONE_CORE = {
    "glow-fashion-haar": (60, "glow fashion-mnist --squeeze haar --batch-size 32"),
    "color-glow": (20, "glow cifar10-jpeg.tar.xz"),
    "color-ladder": (60, "ladder cifar10-jpeg.tar.xz"),
}
"""Runs on one thread; their minutes are those of one core."""
OWN = MODELS | ONE_CORE
PEERS = {"pythae": (10, "pythae", "mnist"), "normflows": (10, "normflows", "mnist")}
"""Minutes, library and images; pythae's VAE gets binarized ones."""
PICTURES = {
    "binarized MNIST": ("vae", "ladder", "pythae"),
    "MNIST": ("glow-10", "glow-60", "glow-10-uniform", "glow-60-uniform", "normflows"),
    "color images": ("color-ladder", "color-glow"),
}


def run(names: list[str], steps: int | None) -> None:
    """Train the models that are not trained yet."""
    for name in names:
        minutes, words = OWN[name]
        budget = ["--steps", str(steps)] if steps else ["--minutes", str(minutes)]
        architecture, data, *options = words.split()
        if data.startswith("cifar10"):
            data = str(Path(os.environ["MUSIGMA_DATA"]) / data)
        command = [sys.executable, "-m", "musigma", "train", architecture, data, *options, *budget]
        command += ["--precision", "bf16", "--auto-resume", "--out", str(RUNS / name)]
        if not (RUNS / name / "evaluation.json").exists():
            print(time.strftime("%H:%M"), *command[2:], flush=True)
            threads = {"OMP_NUM_THREADS": "1"} if name in ONE_CORE else {}
            subprocess.run(command, check=True, env=os.environ | threads)


def bounds(name: str, model, test) -> None:
    """Write importance-weighted bounds of a VAE on test images into its run folder."""
    found = {}
    for k, n in ((1, 500), (1, 10_000), (1000, 500), (100, 10_000)):
        part = test.subset(np.arange(n))
        figure = evaluate(model, part, k=k, batch_size=max(1, 512 // k))
        found[f"{k} draws, {n:,} images"] = figure["nats"]
        print(name, k, n, figure["nats"], flush=True)
    (RUNS / name / "bounds.json").write_text(json.dumps(found, indent=2) + "\n")


def measure(names: list[str]) -> None:
    """Write the bounds of trained VAEs."""
    treat = musigma.Preprocess(binarize="dynamic")
    test = musigma.data.load("mnist", preprocess=treat).split("held-out")
    for name in names:
        weights = RUNS / name / "model.safetensors"
        if weights.exists() and not name.startswith("glow"):
            bounds(name, musigma.load(weights), test)


def record(name: str) -> dict:
    """The command, the curve and the figures of a finished run."""
    rows = [json.loads(r) for r in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
    figure = json.loads((RUNS / name / "evaluation.json").read_text())
    minutes = (OWN | PEERS)[name][0]
    curve = [r for r in rows if r["kind"] == "evaluation"]
    steps = figure.pop("steps", curve[-1]["step"])
    found = {
        "run": " on ".join(PEERS[name][1:]) if name in PEERS else f"musigma train {OWN[name][1]}",
        "minutes": minutes,
        "cores": 1 if name in ONE_CORE else 2,
        "steps": steps,
        "test": {k: v for k, v in figure.items() if k != "scores"},  # of every image
        "validation": [
            {
                "minute": round(minutes * r["step"] / steps, 2),
                "bits_per_dim": r["bits_per_dim"],
                "nats": r["nats"],
            }
            for r in curve
        ],
    }
    if (RUNS / name / "bounds.json").exists():
        found["bounds, nats"] = json.loads((RUNS / name / "bounds.json").read_text())
    return found


def collect() -> None:
    """Add finished runs to the JSON file, and draw the curves and the samples of color images."""
    store = DOCS / "figures" / "quality.json"
    names = OWN | PEERS
    done = [name for name in names if (RUNS / name / "evaluation.json").exists()]
    runs = json.loads(store.read_text()) | {name: record(name) for name in done}
    runs = {name: runs[name] for name in names if name in runs}
    store.write_text(json.dumps(runs, indent=1) + "\n")
    for what, names in PICTURES.items():
        tracks = {
            f"{name} ({runs[name]['run'].split()[0]})": [
                (60 * r["minute"], r["bits_per_dim"]) for r in runs[name]["validation"]
            ]
            for name in names
            if name in runs
        }
        file = f"quality-{what.lower().replace(' ', '-')}.png"
        figures.comparison(tracks, DOCS / "figures" / file, title=f"{what}: validation images")
    for name in PICTURES["color images"]:
        samples = RUNS / name / "samples" / "samples.png"
        if samples.exists():
            shutil.copy(samples, DOCS / "figures" / f"quality-{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "measure", "collect"])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    names = chosen.names or list(MODELS)
    if chosen.what == "run":
        run(names, chosen.steps)
    elif chosen.what == "measure":
        measure(names)
    else:
        collect()
