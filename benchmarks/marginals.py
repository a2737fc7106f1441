"""Standardization of columns by moments and by distribution functions, on diamonds (plotnine).

    python benchmarks/marginals.py --seconds 60

Trains an autoregressive `nsf` on the seven numeric columns three times, for the same processor
seconds: on dequantized numbers with `standardize=True` and with `standardize="quantile"`, and on
rows with a schema. Prints the nats of 5,394 test rows; all are densities of rows that are uniform
within half a step of the grids.
"""

import argparse
import json
import math
import tempfile
import time

import numpy as np
import torch

from musigma import TrainConfig, build, fit
from musigma.data import Dataset, load
from musigma.schema import Column, Schema
from musigma.spec import Spec

STEPS = {"carat": 0.01, "depth": 0.1, "table": 0.1, "price": 1, "x": 0.01, "y": 0.01, "z": 0.01}


def split_rows() -> list[np.ndarray]:
    """Training, validation and test rows of the numeric columns, float64."""
    data = load("diamonds", schema="infer")
    x = data.x[:, [data.columns.index(name) for name in STEPS]]
    x = x[np.random.default_rng(0).permutation(len(x))]
    n = len(x) // 10
    return [x[n + 1000 :], x[n : n + 1000], x[:n]]


def measured(kind: str, seconds: float) -> dict[str, float]:
    """Train one model, and score the test rows."""
    rng, parts = np.random.default_rng(1), split_rows()
    options = {"kind": "autoregressive", "depth": 5, "hidden": 128, "bins": 16}
    if kind == "schema":
        schema = Schema([Column(name, step=step) for name, step in STEPS.items()])
        train, validation, test = (Dataset(x, schema=schema) for x in parts)
        spec = Spec((7,), schema=schema.measure(parts[0]))
    else:
        noise = [(rng.random(x.shape) - 0.5) * list(STEPS.values()) for x in parts]
        pairs = zip(parts, noise, strict=True)
        train, validation, test = (Dataset((x + u).astype(np.float32)) for x, u in pairs)
        spec, options["standardize"] = Spec((7,)), "quantile" if kind == "quantile" else True

    def trained(steps: int):
        torch.manual_seed(0)
        model = build("nsf", spec, **options)
        config = TrainConfig(steps=steps, batch_size=256, lr=2e-3, evaluations=3)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            run = fit(model, train, validation, config, folder, device="cpu")
        return run.model.eval(), time.process_time() - start

    trained(10)
    steps = int(seconds / (trained(100)[1] / 100))
    model, used = trained(steps)
    rows = torch.from_numpy(test.take(np.arange(len(test))))
    with torch.no_grad():
        nats = torch.cat([model.elbo(part) for part in rows.split(1024)])
        start = time.process_time()
        model.elbo(rows[:1024])
        each = 1e6 * (time.process_time() - start) / 1024
    return {
        "steps": steps,
        "cpu_seconds": used,
        "test_nats": nats.mean().item(),
        "standard_error": nats.std().item() / math.sqrt(len(nats)),
        "microseconds_per_row": each,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kinds", nargs="*", default=["moments", "quantile", "schema"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({kind: measured(kind, chosen.seconds) for kind in chosen.kinds}, indent=2))
