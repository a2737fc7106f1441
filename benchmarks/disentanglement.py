"""Disentanglement of objectives on pictures with five known factors (`shapes`).

    python benchmarks/disentanglement.py --steps 4000 --seeds 5
    python benchmarks/disentanglement.py --merge FILE ...    # add runs measured elsewhere
    python -m tools.tables    # put the figures into docs/objectives.md

Trains the same VAE, of 10 latents and perceptrons with two hidden layers of 256, on 1-bit images
by each objective and seed, and measures the means of its posteriors
(`musigma.evaluation.disentanglement`). Runs are stored in docs/figures/disentanglement.json; those
that it has are not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import stored
import torch

from musigma import TrainConfig, build, fit
from musigma.data import Preprocess, load
from musigma.evaluation import DCI, disentanglement, evaluate

OUT = Path(__file__).parent.parent / "docs" / "figures" / "disentanglement.json"
BY = ("objective", "seed", "steps")
OBJECTIVES = (
    "beta-elbo beta=1",
    "beta-elbo beta=2",
    "beta-elbo beta=4",
    "beta-tc beta=2",
    "beta-tc beta=4",
    "factor-vae gamma=10",
    "dip-i",
    "dip-ii",
)
METRICS = ("mig", "sap", *DCI, "factor_score", "modularity", "active")


def measured(objective: str, seed: int, steps: int) -> dict[str, float | int | str]:
    """Train a model by an objective, and measure it."""
    data = load("shapes", preprocess=Preprocess(bits=1))
    torch.manual_seed(seed)
    model = build("vae", data.spec(), latents=10, net="mlp", width=256, blocks=2)
    config = TrainConfig(
        steps=steps, seed=seed, objective=objective, lr=1e-3, schedule="constant", evaluations=2
    )
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = fit(model, data, data.split("validation"), config, folder, device="cpu")
    seconds = round(time.process_time() - start, 1)
    try:
        found = disentanglement(run.model, data, seed=seed)
    except ValueError:  # all posteriors have collapsed
        found = dict.fromkeys(METRICS, 0.0)
    return {
        "objective": objective,
        "seed": seed,
        "steps": steps,
        "cpu_seconds": seconds,
        "bits_per_dim": evaluate(run.model, data.split("held-out"))["bits_per_dim"],
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objective", action="append", help="by default all")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--merge", nargs="+", type=Path, help="only add the rows of these files")
    chosen = parser.parse_args()
    if chosen.merge:
        stored.merge(chosen.out, (row for file in chosen.merge for row in stored.rows(file)), BY)
        return
    for seed in range(chosen.seeds):
        for objective in chosen.objective or OBJECTIVES:
            asked = {"objective": objective, "seed": seed, "steps": chosen.steps}
            if stored.has(chosen.out, asked):
                continue
            row = measured(objective, seed, chosen.steps)
            print(json.dumps(row), flush=True)
            stored.merge(chosen.out, [row], BY)


if __name__ == "__main__":
    main()
