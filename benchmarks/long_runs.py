"""Train nine models for 10,000 steps in float32 and bfloat16; count what is not finite.

    python benchmarks/long_runs.py [NAME ...]    # an hour on one core

Small models are trained on scikit-learn's digits (flows of vectors: on the 20 pixels that vary
most) with the default optimizer. The script counts the steps that were skipped because the loss or
a gradient was not finite, and those skipped because a gradient was far longer than usual, and
checks the inverse of the trained model. Results go to docs/figures/long-runs.json; those that it
holds are not measured again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import stored
import torch

from musigma import data
from musigma.evaluation import batch, evaluate
from musigma.training import TrainConfig, fit
from musigma.zoo import build

OUT = Path(__file__).parent.parent / "docs" / "figures" / "long-runs.json"

OPTIONS = {
    "vae": {"width": 16, "latents": 8},
    "mlp_vae": {"hidden": 64, "latents": 8},
    "ladder": {"levels": 3, "latents": 4, "width": 16},
    "autoencoder_kl": {"widths": (16, 32), "groups": 8, "latents": 2},
    "realnvp": {"levels": 1, "depth": 2, "hidden": 16},
    "glow": {"levels": 2, "depth": 4, "hidden": 32},
    "nsf": {"depth": 3, "hidden": 64},
    "nsf autoregressive": {"depth": 3, "hidden": 64, "kind": "autoregressive"},
    "maf": {"depth": 4, "hidden": 64},
}
TABLES = ("nsf", "nsf autoregressive", "maf")
STEPS = 10_000


def examples(name: str) -> data.Dataset:
    """The digits as images, or some of their pixels as a table."""
    digits = data.load("digits")
    if name not in TABLES:
        return digits
    table = digits.x.reshape(len(digits), -1).astype(np.float32)
    table = table[:, np.argsort(table.std(0))[-20:]]
    table += np.random.default_rng(0).uniform(size=table.shape).astype(np.float32) * 16
    return data.Dataset((table - table.mean(0)) / table.std(0), name="digits as a table")


def run(name: str, precision: str) -> dict:
    """Train one model; returns its counts."""
    found = examples(name)
    torch.manual_seed(0)
    model = build(name.split()[0], found.shape, bits=found.bits, **OPTIONS[name])
    config = TrainConfig(steps=STEPS, batch_size=32, precision=precision)  # pyright: ignore
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        done = fit(
            model, found.split("train"), found.split("validation"), config, folder,
            device="cpu", watch=rows.append,
        )  # fmt: skip
    skipped = [row["reason"] for row in rows if row["kind"] == "skipped"]
    long = sum("above" in reason for reason in skipped)
    held = found.split("held-out")
    figure = evaluate(done.model, held)
    x, context = batch(held, np.arange(64), done.model)
    latents = done.model.encode(x, context, mode=True)
    error = float((done.model.decode(latents, context) - x).abs().max())
    flow = set(done.model.latents()) == set(done.model.variables())
    return {
        "architecture": name,
        "precision": precision,
        "steps": done.steps,
        "not_finite": len(skipped) - long,
        "skipped_as_too_long": long,
        "setbacks": sum(row["kind"] == "setback" for row in rows),
        "warnings": sorted({r["message"][:60] for r in rows if r["kind"] == "warning"}),
        "nats": figure["nats"],
        "non_finite_test_examples": figure["non_finite"],
        "round_trip": error if flow else None,
        "seconds": round(done.seconds, 1),
    }


def main() -> None:
    """Measure the named models, or all, that have no result yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(OPTIONS)}")
    for name in parser.parse_args().names or OPTIONS:
        for precision in ("fp32", "bf16"):
            asked = {"architecture": name, "precision": precision}
            if stored.has(OUT, asked):
                continue
            row = run(name, precision)
            print(time.strftime("%H:%M"), json.dumps(row), flush=True)
            stored.merge(OUT, [row], [*asked])


if __name__ == "__main__":
    main()
