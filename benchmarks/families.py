"""Families of flows on the numeric columns of six tables, for equal minutes, paired over seeds.

    python benchmarks/families.py --seconds 10 --seeds 5 [--sets NAME ...] [--names NAME ...]
    python -m tools.tables    # put the figures into docs/families.md

The tables ship with packages: `diamonds` (plotnine), `shuttle` (river), `bikeshare` and `wage`
(ISLP), `randhie` (statsmodels), `breast-cancer` (scikit-learn); those that are missing are named
and left out. Columns are dequantized within half a step of their grid, so densities are finite,
and standardized; figures are nats per test row of the standardized columns. Every model sees the
same rows in the same split, and trains for the same processor seconds on one thread, with a cosine
schedule: families of this library by `fit`, flows of zuko, nflows and normflows by a plain loop
with Adam, all with batches of 256 and gradients clipped to a norm of 5. The weights of the best of
20 validation figures are tested; the time of these evaluations is not counted.
Figures are stored in docs/figures/families.json; those that it has are not measured again.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stored
import torch
from equal_seconds import train_for
from torch import Tensor, nn

from musigma import TrainConfig, build
from musigma.data import DataError, Dataset, load

OUT = Path(__file__).parent.parent / "docs" / "figures" / "families.json"
SETS = ("diamonds", "shuttle", "bikeshare", "wage", "randhie", "breast-cancer")
BATCH = 256
OURS: dict[str, tuple[str, dict]] = {
    "nsf coupling": ("nsf", {"kind": "coupling"}),
    "nsf autoregressive": ("nsf", {"kind": "autoregressive"}),
    "maf": ("maf", {}),
    "bernstein": ("bernstein", {}),
    "naf": ("naf", {}),
    "umnn": ("umnn", {}),
    "cnf": ("cnf", {}),
    "gaussianization": ("gaussianization", {}),
}


def rows(name: str) -> list[np.ndarray]:
    """Training, validation and test rows of a table, dequantized and standardized."""
    if name == "breast-cancer":
        from sklearn.datasets import load_breast_cancer

        x = load_breast_cancer().data
    else:
        data = load(name, schema="infer")
        assert data.schema is not None
        numeric = [
            i for i, c in enumerate(data.schema.columns) if c.kind in ("continuous", "count")
        ]
        x = np.asarray(data.x, np.float64)[:, numeric]
        x = x[np.isfinite(x).all(1)]
    x = x[:, [len(np.unique(column)) > 10 for column in x.T]]
    rng = np.random.default_rng(0)
    grid = np.array([np.diff(np.unique(column)).min() for column in x.T])
    x = (x + (rng.random(x.shape) - 0.5) * grid)[rng.permutation(len(x))]
    n = len(x) // 10
    mean, std = x[2 * n :].mean(0), x[2 * n :].std(0)
    return [((part - mean) / std).astype(np.float32) for part in (x[2 * n :], x[n : 2 * n], x[:n])]


def ours(name: str, parts: list[np.ndarray], seconds: float, seed: int) -> float:
    """Nats per test row of a family of this library."""
    architecture, options = OURS[name]

    model, _ = train_for(
        seconds,
        lambda: build(architecture, parts[0].shape[1:], bits=None, **options),
        *map(Dataset, parts[:2]),
        TrainConfig(
            batch_size=BATCH,
            lr=2e-3,
            clip=5.0,
            evaluations=20,
            evaluate_on=10_000,
            seed=seed,
            ema=0.99,
        ),
    )
    with torch.no_grad():
        return float(-model(torch.from_numpy(parts[2])).elbo.mean())


def zuko_nsf(features: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """zuko's autoregressive spline flow, of the size of ours."""
    import zuko

    flow = zuko.flows.NSF(features, transforms=5, hidden_features=[128] * 2, randperm=True)
    return flow, lambda x: flow().log_prob(x)


def nflows_nsf(features: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """nflows' couplings by splines, with its residual networks."""
    from nflows import transforms as nt
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    layers = []
    for i in range(5):
        layers += [nt.RandomPermutation(features), nt.LULinear(features)]
        layers.append(
            nt.PiecewiseRationalQuadraticCouplingTransform(
                torch.arange(features) % 2 == i % 2,
                lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=128),
                num_bins=8,
                tails="linear",
                tail_bound=5.0,
            )
        )
    flow = Flow(nt.CompositeTransform(layers), StandardNormal([features]))
    return flow, flow.log_prob


def normflows_nsf(features: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """normflows' autoregressive spline flow, as in its examples."""
    import normflows as nf

    layers = []
    for _ in range(5):
        layers += [
            nf.flows.AutoregressiveRationalQuadraticSpline(features, 2, 128, tail_bound=5),
            nf.flows.LULinearPermute(features),
        ]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), layers)
    return flow, flow.log_prob


PEERS = {"zuko nsf": zuko_nsf, "nflows nsf": nflows_nsf, "normflows nsf": normflows_nsf}


def peer(name: str, parts: list[np.ndarray], seconds: float, seed: int) -> float:
    """Nats per test row of another library's flow."""
    torch.manual_seed(seed)
    flow, log_prob = PEERS[name](parts[0].shape[1])
    train, validation, test = map(torch.from_numpy, parts)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    best, kept, due = math.inf, copy.deepcopy(flow.state_dict()), 0.05
    generator = torch.Generator().manual_seed(seed)
    spent = 0.0  # without evaluations, as for ours
    while spent < seconds:
        start = time.process_time()
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * spent / seconds))
        optimizer.zero_grad()
        loss = -log_prob(batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        spent += time.process_time() - start
        if spent >= due * seconds:
            due += 0.05
            figure = nats(log_prob, validation)
            if figure < best:
                best, kept = figure, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(kept)
    return nats(log_prob, test)


@torch.no_grad()
def nats(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The mean of -log p."""
    return float(-torch.cat([log_prob(part) for part in x.split(2048)]).mean())


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet."""
    for table in options.sets:
        try:
            parts = rows(table)
        except DataError as error:
            print(error)
            continue
        for seed in range(options.seeds):
            for name in options.names:
                asked = {"set": table, "name": name, "seed": seed, "seconds": options.seconds}
                if stored.has(options.out, asked):
                    continue
                measure = ours if name in OURS else peer
                figure = measure(name, parts, options.seconds, seed)
                print(f"{table}, seed {seed}: {name} {figure:.4f}", flush=True)
                row = asked | {"nats": figure, "rows": len(parts[0])}
                stored.merge(options.out, [row], [*asked])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--names", nargs="*", default=[*OURS, *PEERS])
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run(chosen)
