"""Disentanglement of objectives on pictures with five known factors (`shapes`).

    python benchmarks/disentanglement.py --steps 6000 --seeds 5 --out disentanglement.json

Trains the same VAE, of 10 latents and perceptrons with two hidden layers of 256, on 1-bit images
by each objective and seed, and measures the means of its posteriors
(`musigma.evaluation.disentanglement`). Writes every run, and the mean and standard deviation over
seeds of each metric.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch

from musigma import TrainConfig, build, fit
from musigma.data import Preprocess, load
from musigma.evaluation import DCI, disentanglement, evaluate

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
        "cpu_seconds": seconds,
        "bits_per_dim": evaluate(run.model, data.split("held-out"))["bits_per_dim"],
        **found,
    }


def summary(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """The mean and the standard deviation of each metric over seeds, by objective."""
    found: dict[str, dict[str, list[float]]] = {}
    for objective in dict.fromkeys(run["objective"] for run in runs):
        rows = [run for run in runs if run["objective"] == objective]
        found[objective] = {
            name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
            for name in rows[0]
            if name not in ("objective", "seed")
            for values in [[row[name] for row in rows]]
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objective", action="append", help="by default all")
    parser.add_argument("--out", default="disentanglement.json")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        for objective in arguments.objective or OBJECTIVES:
            runs.append(measured(objective, seed, arguments.steps))
            print(json.dumps(runs[-1]), flush=True)
            with open(arguments.out, "w", encoding="utf-8") as file:
                json.dump({"runs": runs, "summary": summary(runs)}, file, indent=1)


if __name__ == "__main__":
    main()
