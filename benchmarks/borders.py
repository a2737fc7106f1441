"""Posteriors that pile up at borders, by the map from an interval or a half-line to all of space.

    python benchmarks/borders.py interval
    python benchmarks/borders.py half-line

theta has two independent elements, and x = theta + sigma * noise, so the posterior is known. Each
map is followed by the same spline flow, trained for 500 steps on 1,800 simulations (200 others
choose the weights). Reported is KL(truth || model) in nats on 20,000 pairs from the prior, and on
the pairs whose x is outside the prior's range or within sigma of a border.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from musigma import build
from musigma.layers import Conditioner, Coupling, Permutation, Spline, Unconstrain
from musigma.model import Bijection, Chain
from musigma.support import Support
from musigma.tensors import moments

D, HIDDEN, DEPTH = 2, 50, 4
N, TEST, STEPS, BATCH = 2000, 20_000, 500, 100
PRIORS: dict[str, Any] = {
    "uniform": stats.uniform(),
    "exponential": stats.expon(),
    "lognormal": stats.lognorm(1.0),
}
TASKS = {
    "interval": (["probit", "logit", "spline", "none"], [("uniform", 0.03), ("uniform", 0.3)]),
    "half-line": (["probit", "logit", "softplus"], [("exponential", 0.3), ("lognormal", 0.3)]),
}


class Softplus(Bijection):
    """The inverse of softplus on x > 0, standardized on the data."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.scale, self.mean, self.std = x.log().mean(0).exp(), torch.zeros(D), torch.ones(D)
        self.mean, self.std = (t.float() for t in moments(self(x)[0]))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        x = x.double() / self.scale
        rest = torch.log(-torch.expm1(-x))
        log_det = -(rest + self.scale.log() + self.std.log()).sum(1)
        return ((x + rest - self.mean) / self.std).float(), log_det.float()

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Only densities are compared."""
        raise NotImplementedError


class IntervalSplines(nn.Module):
    """A flow that stays on [0, 1]: splines of [-3, 3] to itself, and a uniform base."""

    def __init__(self):
        super().__init__()
        spline, half = Spline(bins=8, bound=3.0), D // 2
        self.layers = nn.ModuleList()
        for _ in range(DEPTH):
            outputs = spline.outputs * (D - half)
            net = Conditioner(half, outputs, hidden=[HIDDEN] * 2, context=D, zero=True)
            self.layers.extend([Permutation.reverse(D), Coupling(net, map=spline)])

    def calibrate(self, x: Tensor, context: Tensor) -> None:
        """Nothing depends on the data."""

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """Log density, nats (B,)."""
        x, total = 6 * x - 3, torch.zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x, context)
            total = total + log_det
        return total


def model_of(kind: str, theta: Tensor, bounded: bool) -> nn.Module:
    """A flow behind a map."""
    if kind == "spline":
        return IntervalSplines()
    how: dict[str, Any] = {"kind": "coupling", "depth": DEPTH, "hidden": HIDDEN, "context": D}
    flow = build("nsf", (D,), standardize=kind == "none", **how)
    if kind == "none":
        return flow
    first: Bijection = Softplus(theta)
    if kind != "softplus":
        first = Unconstrain(Support([0] * D, [1 if bounded else None] * D), map=kind)  # pyright: ignore
        first.calibrate(theta)
    return Chain([first, *flow.layers], flow.prior)  # pyright: ignore


def simulate(prior: str, sigma: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """theta and x, (n, D) each."""
    rng = np.random.default_rng(seed)
    theta = PRIORS[prior].rvs((n, D), random_state=rng)
    return theta, theta + sigma * rng.normal(size=(n, D))


def log_posterior(theta: np.ndarray, x: np.ndarray, prior: str, sigma: float) -> np.ndarray:
    """The exact log density, by quadrature of its norm where it has no closed form."""
    law = PRIORS[prior]
    joint = (law.logpdf(theta) + stats.norm.logpdf(x, theta, sigma)).sum(1)
    if prior == "uniform":
        away = np.where(x > 0.5, 1 - x, x)  # the mass is that of a tail at the nearer border
        low, high = stats.norm.logsf([-away / sigma, (1 - away) / sigma])
        return joint - (low + np.log1p(-np.exp(high - low))).sum(1)
    u = np.linspace(-12, 6, 6001)
    weight = law.logpdf(np.exp(u)) + u + np.log(u[1] - u[0])
    constant = math.log(sigma * math.sqrt(2 * math.pi))

    def log_mass(value: float) -> float:
        terms = weight - ((value - np.exp(u)) / sigma) ** 2 / 2
        return terms.max() + np.log(np.exp(terms - terms.max()).sum()) - constant

    return joint - np.vectorize(log_mass)(x).sum(1)


def result(kind: str, prior: str, sigma: float, seed: int) -> dict[str, float | str]:
    """Train, and compare with the truth."""
    torch.manual_seed(seed)
    theta, x = simulate(prior, sigma, N, seed)
    units = x.mean(0), x.std(0)
    rows = torch.from_numpy(theta).float(), torch.from_numpy((x - units[0]) / units[1]).float()
    test_theta, test_x = simulate(prior, sigma, TEST, 1000)
    started = time.process_time()
    model = model_of(kind, rows[0], prior == "uniform")
    model.calibrate(*(t[:512] for t in rows))  # pyright: ignore
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    validation, best, kept = N // 10, math.inf, {}
    for step in range(STEPS):
        batch = torch.randint(validation, N, (BATCH,))
        loss = -model.log_prob(*(t[batch] for t in rows)).mean()  # pyright: ignore
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            with torch.no_grad():
                nats = -model.log_prob(*(t[:validation] for t in rows)).mean().item()  # pyright: ignore
            if nats < best:
                best, kept = nats, copy.deepcopy(model.state_dict())
    seconds = time.process_time() - started
    model.load_state_dict(kept)
    given = torch.from_numpy((test_x - units[0]) / units[1]).float()
    with torch.no_grad():
        log_q = model.eval().log_prob(torch.from_numpy(test_theta).float(), given)  # pyright: ignore
    kl = log_posterior(test_theta, test_x, prior, sigma) - log_q.double().numpy()
    near = (test_x < sigma).any(1) | ((test_x > 1 - sigma).any(1) & (prior == "uniform"))
    return {
        "map": kind,
        "prior": prior,
        "sigma": sigma,
        "seed": seed,
        "kl": float(kl.mean()),
        "error": float(kl.std() / math.sqrt(TEST)),
        "kl_near": float(kl[near].mean()),
        "share_near": float(near.mean()),
        "cpu_seconds": seconds,
    }


def results(what: str, seeds: int) -> Iterator[dict[str, float | str]]:
    """One result for each map, prior and seed."""
    maps, tasks = TASKS[what]
    for seed, (prior, sigma), kind in product(range(seeds), tasks, maps):
        yield result(kind, prior, sigma, seed)


def main() -> None:
    """Print a line of JSON for each result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    words = parser.parse_args()
    torch.set_num_threads(1)
    for row in results(words.what, words.seeds):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
