"""How good a model gets in ten minutes, and in an hour, on two cores.

    MUSIGMA_DATA=... python benchmarks/quality.py run [NAME ...]     # on an idle machine
    MUSIGMA_DATA=... python benchmarks/quality.py measure [NAME ...]
    python benchmarks/quality.py collect     # the curves and a table, for docs/figures.md

`run` calls the command line, one run at a time, and goes on where it stopped. On a machine that is
not idle, `--steps` gives a run the steps that the minutes would hold on an idle one. `measure`
takes importance-weighted bounds of VAEs: 100 draws on all 10,000 test images, and 1,000 draws on
the first 500.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RUNS, DOCS = HERE.parent / "runs" / "quality", HERE.parent / "docs"

MODELS = {
    "vae": (10, "vae mnist --binarize dynamic"),
    "ladder": (60, "ladder mnist --binarize dynamic"),
    "glow-10": (10, "glow mnist"),
    "glow-60": (60, "glow mnist"),
    "glow-fashion": (60, "glow fashion-mnist"),
}


def run(names: list[str], steps: int | None) -> None:
    """Train what has not been trained yet."""
    for name in names:
        minutes, words = MODELS[name]
        budget = ["--steps", str(steps)] if steps else ["--minutes", str(minutes)]
        command = [sys.executable, "-m", "musigma", "train", *words.split(), *budget]
        command += ["--precision", "bf16", "--auto-resume", "--out", str(RUNS / name)]
        if not (RUNS / name / "evaluation.json").exists():
            print(time.strftime("%H:%M"), *command[2:], flush=True)
            subprocess.run(command, check=True)


def measure(names: list[str]) -> None:
    """Importance-weighted bounds on test images."""
    import musigma
    from musigma.evaluation import evaluate

    for name in names:
        out = RUNS / name
        if not (out / "model.safetensors").exists() or name.startswith("glow"):
            continue
        treat = musigma.Preprocess(binarize="dynamic")
        test = musigma.data.load("mnist", preprocess=treat).split("held-out")
        model, found = musigma.load(out / "model.safetensors"), {}
        for k, n in ((1, 500), (1, 10_000), (1000, 500), (100, 10_000)):
            part = test.subset(np.arange(n))
            found[f"{k} draws, {n} images"] = evaluate(
                model, part, k=k, batch_size=max(1, 512 // k)
            )
            print(name, k, n, found[f"{k} draws, {n} images"]["nats"], flush=True)
        (out / "bounds.json").write_text(json.dumps(found, indent=2) + "\n")


def collect(names: list[str]) -> None:
    """The curves, and a table."""
    from musigma import figures

    print("| run | test | steps | validation curve |\n|---|---|---|---|")
    for name in names:
        out = RUNS / name
        if not (out / "evaluation.json").exists():
            continue
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in rows if r["kind"] == "train"]
        curve = [r for r in rows if r["kind"] == "evaluation"]
        figures.comparison(
            {MODELS[name][1]: [(r["seconds"], r["bits_per_dim"]) for r in curve]},
            DOCS / "figures" / f"quality-{name}.png",
            title=f"{name}: validation, bits per dimension",
        )
        figure = json.loads((out / "evaluation.json").read_text())
        test = f"{figure['bits_per_dim']:.4f} bits/dim, {figure['nats']:.2f} nats"
        if (out / "bounds.json").exists():
            bounds = json.loads((out / "bounds.json").read_text())
            test += "".join(f"; {what}: {f['nats']:.2f}" for what, f in bounds.items())
        points = ", ".join(f"{r['seconds'] / 60:.0f} min {r['bits_per_dim']:.3f}" for r in curve)
        print(f"| {MODELS[name][1]} | {test} | {steps[-1]['step']:,} | {points} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "measure", "collect"])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    names = chosen.names or list(MODELS)
    if chosen.what == "run":
        run(names, chosen.steps)
    else:
        (measure if chosen.what == "measure" else collect)(names)
