"""Posteriors of eight simulators, beside those of sbi, on the same simulations.

    pip install --no-deps sbibm                      # observations and reference posteriors
    python -m benchmarks.sbi --out results           # everything, for hours; resumed if stopped
    python -m benchmarks.sbi --out results --tasks two_moons slcp --simulations 1000 --seeds 1
    python -m benchmarks.sbi --out results --table   # the table of what is there
    python -m benchmarks.sbi --out results --exact   # a Gaussian model whose posterior is known

Every cell (task, simulations, method, seed) trains one model by the method's defaults, and is one
JSON file. It holds the seconds of training (of the wall clock, and of the processor), the mean
log density of 20,000 further pairs, and for each observation the C2ST of 10,000 draws against
sbibm's reference posterior: the accuracy of networks that tell them apart
(`musigma.comparison.vector_c2st`), for which 0.5 is perfect. `musigma-5` is a mixture of five
models. Methods that begin with `sbi-` need sbi. The published column is its NPE in sbibm's paper,
the mean of ten observations.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.simulator_tasks import TASKS, Task
from musigma import Dataset, Spec, Variable, build, fit
from musigma.comparison import vector_c2st
from musigma.data import Given
from musigma.support import Support
from musigma.training import conditional_config

PUBLISHED = {
    ("two_moons", 1000): 0.73,
    ("two_moons", 10_000): 0.61,
    ("slcp", 1000): 0.98,
    ("slcp", 10_000): 0.90,
    ("gaussian_mixture", 1000): 0.73,
    ("gaussian_mixture", 10_000): 0.66,
    ("gaussian_linear", 1000): 0.69,
    ("gaussian_linear", 10_000): 0.55,
    ("gaussian_linear_uniform", 1000): 0.70,
    ("gaussian_linear_uniform", 10_000): 0.55,
    ("bernoulli_glm", 1000): 0.86,
    ("bernoulli_glm", 10_000): 0.68,
    ("sir", 1000): 0.82,
    ("sir", 10_000): 0.68,
    ("lotka_volterra", 1000): 1.00,
    ("lotka_volterra", 10_000): 1.00,
}
DRAWS, PAIRS, HELD = 10_000, 20_000, 0.1


@dataclass(frozen=True)
class Posterior:
    """A trained conditional density.

    Args:
        log_prob: Of rows of parameters (n, D) given rows of data (n, F), nats (n,).
        sample: n draws given one row of data (F,), (n, D).
    """

    log_prob: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sample: Callable[[int, torch.Tensor], torch.Tensor]


def support_of(task: Task) -> Support | None:
    """The support of the prior; None if it is all of space."""
    if task.low == -math.inf and task.high == math.inf:
        return None
    return Support((task.low,) * task.parameters, (task.high,) * task.parameters)


def musigma(
    task: Task, theta: np.ndarray, x: np.ndarray, seed: int, ensemble: int = 1
) -> Posterior:
    """`nsf` with the default options and training of conditional densities."""
    array, support = theta.astype(np.float32), support_of(task)
    data = Dataset(array, given={"x": Given(x.astype(np.float32))}, support=support)
    held = int(HELD * len(data))
    spec = Spec(data.shape, context=(Variable("x", x.shape[1:]),), support=support)
    torch.manual_seed(seed)
    model = build("nsf", spec, standardize=support is None, ensemble=ensemble)
    train, validation = data.subset(range(held, len(data))), data.subset(range(held))
    config = conditional_config(len(train), x.shape[1], seed=seed)
    with tempfile.TemporaryDirectory() as out:
        model = fit(model, train, validation, config, out, device="cpu").model
    return Posterior(
        lambda theta, x: model.log_prob(theta, {"x": x}),
        lambda n, x: model.as_distribution({"x": x[None]}).sample((n,))[:, 0],
    )


def torch_prior(task: Task) -> torch.distributions.Distribution:
    """The prior as sbi takes it: its support is what matters, for draws outside are rejected."""
    low, high = (torch.full((task.parameters,), float(v)) for v in (task.low, task.high))
    rows = torch.from_numpy(task.pairs(10_000, 0)[0]).float()
    if task.low == -math.inf:
        return torch.distributions.MultivariateNormal(rows.mean(0), rows.T.cov())
    if task.high == math.inf:
        logs = rows.log()
        each: torch.distributions.Distribution = torch.distributions.LogNormal(
            logs.mean(0), logs.std(0)
        )
    else:
        each = torch.distributions.Uniform(low, high)
    return torch.distributions.Independent(each, 1)


def npe(estimator: str) -> Callable[[Task, np.ndarray, np.ndarray, int], Posterior]:
    """sbi's NPE with a density estimator of its own, at its defaults."""

    def train(task: Task, theta: np.ndarray, x: np.ndarray, seed: int) -> Posterior:
        from sbi.inference import NPE  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        inference = NPE(torch_prior(task), density_estimator=estimator, show_progress_bars=False)
        rows = (torch.from_numpy(t).float() for t in (theta, x))
        density = inference.append_simulations(*rows).train()
        posterior = inference.build_posterior()
        return Posterior(
            lambda theta, x: density.log_prob(theta[None], x)[0],
            lambda n, x: posterior.sample((n,), x=x[None], show_progress_bars=False),
        )

    return train


METHODS: dict[str, Callable[[Task, np.ndarray, np.ndarray, int], Posterior]] = {
    "musigma": musigma,
    "musigma-5": partial(musigma, ensemble=5),
    **{f"sbi-{name}": npe(name) for name in ("nsf", "maf", "zuko_nsf")},
}


def measured(task: Task, n: int, method: str, seed: int, observations: int) -> dict[str, Any]:
    """What one cell holds."""
    theta, x = task.pairs(n, seed)
    wall, cpu = time.perf_counter(), time.process_time()
    posterior = METHODS[method](task, theta, x, seed)
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    test = (torch.from_numpy(t).float().split(2000) for t in task.pairs(PAIRS, 10_000 + seed))
    with torch.no_grad():
        nats = torch.cat([posterior.log_prob(*pair) for pair in zip(*test, strict=True)])
        draws = [
            posterior.sample(DRAWS, torch.from_numpy(task.observation(k)).float()).double()
            for k in range(1, observations + 1)
        ]
    references = [torch.from_numpy(task.reference(k)[:DRAWS]) for k in range(1, observations + 1)]
    c2st = vector_c2st(torch.stack(references), torch.stack(draws)).tolist() if draws else []
    return {
        "seconds": seconds,
        "cpu": cpu,
        "log_prob": float(nats.mean()),
        "error": float(nats.std() / len(nats) ** 0.5),
        "c2st": c2st,
    }


def table(cells: dict[tuple[str, int, str], list[dict[str, Any]]]) -> Iterator[str]:
    """Rows of Markdown: C2ST, log density and processor seconds, means over seeds."""
    methods = [m for m in METHODS if any(key[2] == m for key in cells)]
    yield "| task, simulations | published | " + " | ".join(methods) + " |"
    yield "|---|---|" + "---|" * len(methods)
    for task, n in dict.fromkeys(key[:2] for key in cells):
        row = [f"{task} {n:,}", f"{PUBLISHED.get((task, n), math.nan):.2f}"]
        for method in methods:
            found = cells.get((task, n, method), [])
            tested = [mean(c["c2st"]) for c in found if c["c2st"]]
            words = [f"{mean(tested):.3f}"] if tested else []
            if found:
                words += [f"{mean(c['log_prob'] for c in found):.2f} nats"]
                words += [f"{mean(c['cpu'] for c in found):.0f} s"]
            row.append(", ".join(words))
        yield "| " + " | ".join(row) + " |"


def exact(n: int, seed: int) -> str:
    """The distance from a posterior that is known, and the coverage of its regions.

    theta is standard normal in the plane, x = A theta + noise of standard deviation 0.3, in three
    dimensions. A region of a given mass is {theta: log q(theta | x) > c}; of draws of q, that
    share has a density above c.
    """
    mixing, noise = np.array([[1.0, 0.3, -0.5], [0.5, -1.0, 0.2]]), 0.3

    def simulate(random: np.random.Generator, theta: np.ndarray) -> np.ndarray:
        return theta @ mixing + noise * random.normal(size=(len(theta), 3))

    task = Task("conjugate", 2, lambda random, n: random.normal(size=(n, 2)), simulate)
    start = time.process_time()
    posterior = musigma(task, *task.pairs(n, seed), seed)
    seconds = time.process_time() - start
    theta, x = task.pairs(2000, seed + 1)
    precision = np.eye(2) + mixing @ mixing.T / noise**2
    center = x @ mixing.T @ np.linalg.inv(precision) / noise**2
    away = theta - center
    true = 0.5 * np.linalg.slogdet(precision)[1] - math.log(2 * math.pi)
    true = true - 0.5 * np.einsum("ni,ij,nj->n", away, precision, away)
    rows = torch.from_numpy(x).float()
    with torch.no_grad():
        nats = posterior.log_prob(torch.from_numpy(theta).float(), rows).numpy()
        difference = true - nats
        higher = []
        for row, density in zip(rows, nats, strict=True):
            draws = posterior.sample(400, row)
            others = posterior.log_prob(draws, row.expand(400, -1)).numpy()
            higher.append((others > density).mean())
    words = [
        f"{share:.0%}: {np.mean(np.array(higher) <= share):.3f}" for share in (0.5, 0.8, 0.95)
    ]
    return (
        f"{n:,} simulations, {seconds:.0f} s: KL {difference.mean():.4f} ± "
        f"{difference.std() / len(x) ** 0.5:.4f} nats; coverage {', '.join(words)} (of {len(x):,})"
    )


def main() -> None:
    """Train and measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument("--simulations", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--observations", type=int, default=10, help="of each task; 0: no C2ST")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--exact", action="store_true", help="the Gaussian model alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.exact:
        for n in options.simulations:
            print(exact(n, 0), flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for n in options.simulations:
        for name in options.tasks:
            for method in options.methods:
                for seed in range(options.seeds):
                    path = options.out / f"{name}-{n}-{method}-{seed}.json"
                    if not path.exists() and not options.table:
                        cell = measured(TASKS[name], n, method, seed, options.observations)
                        path.write_text(json.dumps(cell))
                        print(path.stem, json.dumps(cell), flush=True)
                    if path.exists():
                        cells.setdefault((name, n, method), []).append(
                            json.loads(path.read_text())
                        )
    print(*table(cells), sep="\n")


if __name__ == "__main__":
    main()
