"""The density of a table, asked many ways: diamonds (53,940 rows of 10 columns, from plotnine).

    python benchmarks/tables.py --minutes 5 --threads 2 --out docs/tables.json

Trains `table` on 80 % of the rows, and prints for 5,394 test rows the log-likelihood in one order
and mixed over eight, the time of scoring, the probability of conditions, and the log score of
missing cells; beside them the same network trained on one order for the same time. Log-likelihoods
are nats per row: densities of the six columns that are rounded to 0.1 or 0.01, as if each value
were uniform within half a step, and probabilities of price and of the three categories.
"""

import argparse
import json
import math
import tempfile
import time

import numpy as np
import torch

from musigma import TrainConfig, build, fit
from musigma.any_order import AnyOrder
from musigma.conditions import Condition
from musigma.data import load
from musigma.questions import impute, log_prob_given, orders, sample_where, score

CONDITIONS = (
    "carat > 2",
    "x > 8 and y > 8 and z > 5",
    'cut == "Ideal" and carat > 2',
    'color == "D" and price > 10000',
    'color == "J" and clarity == "VS1"',
    'price between 500 and 600 and cut in ("Good", "Fair")',
    "x > 6 and price < 2500",
    "carat > 1 and price <= 3000",
    'clarity == "IF" and color == "D"',
    "carat < 0.3 and price > 1000",
)
NUMERIC = ("carat", "depth", "table", "price", "x", "y", "z")


class OneOrder:
    """`AnyOrder.estimate` for the order of the table alone, to compare with."""

    def __init__(self, model: AnyOrder):
        self.model = model

    def __call__(self, x, context=None):
        """log p in the order of the table, nats (B,)."""
        return self.model.conditionals(x, range(x.shape[1]), context).sum(1)


def trained(data, options, *, one_order: bool = False, subsets: int = 4):
    """A model trained on data, and the CPU seconds that it took."""
    torch.manual_seed(0)
    model = build("table", data.spec(), subsets=subsets)
    if one_order:
        model.estimate = OneOrder(model)
    config = TrainConfig(
        minutes=options.minutes, precision=options.precision, lr=options.lr, evaluations=5
    )
    train, validation = data.split("train"), data.split("validation")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = fit(model, train, validation, config, folder, device="cpu")
    seconds = time.process_time() - start
    run.model.eval()
    return run.model, {"steps": run.steps, "cpu_seconds": seconds}


@torch.no_grad()
def likelihood(model, rows, numeric):
    """Nats per row in the order of the table, in single random orders, and mixed over eight."""
    natural = model.log_prob_orders(rows, [list(range(rows.shape[1]))])
    chosen = orders(model, 9)[1:]
    start = time.process_time()
    eight = score(model, rows, chosen)
    each = (time.process_time() - start) / len(rows) / 8
    first = model.conditionals(rows, [*numeric, *sorted({*range(rows.shape[1])} - {*numeric})])
    return {
        "order_of_the_table": natural.mean().item(),
        "one_random_order": float(eight.mean.mean()),
        "eight_orders_mixed": float(eight.mixture.mean()),
        "standard_error": float(eight.mixture.std() / math.sqrt(len(rows))),
        "spread": float(eight.spread.mean()),
        "numeric_columns_one_order": first[:, numeric].sum(1).mean().item(),
        "microseconds_per_row_and_order": 1e6 * each,
    }


def conditions(model, rows, schema):
    """Probabilities of conditions by the model, with their errors, and in the rows."""
    found = {}
    for text in CONDITIONS:
        start = time.process_time()
        drawn = sample_where(model, text, 2000)
        found[text] = {
            "model": drawn.probability,
            "error": drawn.standard_error,
            "rows": float(Condition.parse(text, schema).holds(rows).mean()),
            "effective_sample_size": drawn.effective,
            "seconds_for_2000_rows": time.process_time() - start,
        }
    return found


def missing_cells(model, rows, schema, share=0.2, n=2000):
    """The log score of missing numeric cells, and that of the Gaussian of IterativeImputer.

    Also the errors of the mean of 20 draws, and of that imputer, in standard deviations.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    rng = np.random.default_rng(0)
    test, train = rows["test"][:n], rows["train"]
    hole = rng.random(test.shape) < share
    numeric = [schema.index(name) for name in NUMERIC]
    nats = log_prob_given(model, test, ~hole)
    ours = np.concatenate([nats[hole[:, j], j] for j in numeric])
    torch.manual_seed(0)
    start = time.process_time()
    center = impute(model, np.where(hole, np.nan, test), 20).center()
    seconds = time.process_time() - start
    imputer = IterativeImputer(random_state=0).fit(train)
    filled = imputer.transform(np.where(hole, np.nan, test))
    gap = rng.random(train[:5000].shape) < share
    again = imputer.transform(np.where(gap, np.nan, train[:5000]))
    theirs = []
    for j in numeric:
        std = np.sqrt(((again - train[:5000])[gap[:, j], j] ** 2).mean())
        error = (filled - test)[hole[:, j], j]
        theirs += (-0.5 * (error / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).tolist()
    error = {
        name: {
            way: float(np.sqrt(((values - test)[hole[:, j], j] ** 2).mean()) / train[:, j].std())
            for way, values in (("impute", center), ("iterative_imputer", filled))
        }
        for name, j in zip(NUMERIC, numeric, strict=True)
    }
    return {
        "cells": len(ours),
        "nats_per_cell": float(np.mean(ours)),
        "iterative_imputer": float(np.mean(theirs)),
        "error": error,
        "seconds_for_20_draws": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--fixed", action="store_true", help="also train on one order")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load("diamonds", schema="infer")
    test = data.split("held-out").subset(range(5394))
    model, about = trained(data, options)
    schema, rows = model.schema, torch.tensor(test.x)
    numeric = [schema.index(name) for name in NUMERIC]
    answer = {"about": {**vars(options), **about, "test_rows": len(rows)}}
    answer["likelihood"] = likelihood(model, rows, numeric)
    print(json.dumps(answer, indent=1), flush=True)
    answer["conditions"] = conditions(model, data.x, schema)
    parts = {"train": data.split("train").x, "test": test.x}
    answer["missing_cells"] = missing_cells(model, parts, schema)
    print(json.dumps(answer, indent=1), flush=True)
    if options.fixed:
        fixed, about = trained(data, options, one_order=True)
        nats = fixed.log_prob_orders(rows, [list(range(rows.shape[1]))]).mean().item()
        answer["one_order_only"] = {**about, "order_of_the_table": nats}
    if options.out:
        with open(options.out, "w") as file:
            json.dump(answer, file, indent=1)
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
