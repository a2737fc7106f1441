"""Eight simulators of the benchmark `sbibm`, and the reference posteriors in its package.

The simulators are written anew, on arrays of any number of rows. Observations, the parameters
that they were made with, and 10,000 draws of each reference posterior are read from the files of
an installed `sbibm`, whose code is never imported, or from the folder `SBIBM` (a copy of the
package's folder of that name). (Lueckmann, Boelts, Greenberg, Goncalves, Macke, "Benchmarking
simulation-based inference", 2021, arXiv:2101.04653.)
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

__all__ = ["TASKS", "Task"]

Random = np.random.Generator


def folder() -> Path:
    """The folder of `sbibm`, installed or named by the environment variable SBIBM."""
    if os.environ.get("SBIBM"):
        return Path(os.environ["SBIBM"])
    spec = importlib.util.find_spec("sbibm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "reference posteriors: pip install --no-deps sbibm, or set SBIBM to the folder sbibm "
            "of its unpacked wheel"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True)
class Task:
    """A prior and a simulator.

    Args:
        name: Name of the task, as in sbibm.
        parameters: Number of parameters.
        prior: Draws n rows of parameters, (n, D).
        simulate: Simulates one row of data for each row of parameters.
        low: Lower bound of every parameter; -inf if there is none.
        high: Upper bound.
    """

    name: str
    parameters: int
    prior: Callable[[Random, int], np.ndarray]
    simulate: Callable[[Random, np.ndarray], np.ndarray]
    low: float = -math.inf
    high: float = math.inf

    def pairs(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """n parameters from the prior (n, D), and data (n, F)."""
        random = np.random.default_rng([seed, *self.name.encode()])
        theta = self.prior(random, n)
        return theta, self.simulate(random, theta)

    def observation(self, number: int) -> np.ndarray:
        """An observation from 1 to 10, (F,)."""
        return self._read(number, "observation.csv")[0]

    def truth(self, number: int) -> np.ndarray:
        """The parameters that an observation was made with, (D,)."""
        return self._read(number, "true_parameters.csv")[0]

    def reference(self, number: int) -> np.ndarray:
        """Draws of the posterior given an observation, (10000, D)."""
        return self._read(number, "reference_posterior_samples.csv.bz2")

    def _read(self, number: int, name: str) -> np.ndarray:
        path = folder() / "tasks" / self.name / "files" / f"num_observation_{number}" / name
        return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)


def box(low: float, high: float, d: int) -> Callable[[Random, int], np.ndarray]:
    """Independent uniform parameters."""
    return lambda random, n: random.uniform(low, high, (n, d))


def log_normal(center: list[float], scale: list[float]) -> Callable[[Random, int], np.ndarray]:
    """Independent log-normal parameters."""
    return lambda random, n: np.exp(random.normal(center, scale, (n, len(center))))


def two_moons(random: Random, theta: np.ndarray) -> np.ndarray:
    """A noisy half circle, shifted by |theta_0 + theta_1| and theta_1 - theta_0."""
    angle = random.uniform(-math.pi / 2, math.pi / 2, len(theta))
    radius = random.normal(0.1, 0.01, len(theta))
    arc = np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], 1)
    first, second = theta.T
    return arc + np.stack([-np.abs(first + second), second - first], 1) / math.sqrt(2)


def slcp(random: Random, theta: np.ndarray) -> np.ndarray:
    """Four points of a Gaussian in the plane: simple likelihood, complex posterior."""
    a, b, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, np.tanh(theta[:, 4])
    noise = random.normal(size=(len(theta), 4, 2))
    a, b = np.sqrt(a**2 + 1e-6), np.sqrt(b**2 + 1e-6)
    x = a[:, None] * noise[..., 0]
    y = b[:, None] * (rho[:, None] * noise[..., 0] + np.sqrt(1 - rho**2)[:, None] * noise[..., 1])
    return (theta[:, None, :2] + np.stack([x, y], -1)).reshape(len(theta), 8)


def gaussian_mixture(random: Random, theta: np.ndarray) -> np.ndarray:
    """The parameters with noise of standard deviation 1 or 0.1."""
    scale = np.where(random.random(len(theta)) < 0.5, 1.0, 0.1)
    return theta + scale[:, None] * random.normal(size=theta.shape)


def gaussian_linear(random: Random, theta: np.ndarray) -> np.ndarray:
    """The parameters with noise of variance 0.1."""
    return theta + random.normal(0, math.sqrt(0.1), theta.shape)


@cache
def glm_files() -> tuple[np.ndarray, np.ndarray]:
    """The design matrix (100, 10) and the stimulus (100,) of bernoulli_glm."""
    files = folder() / "tasks" / "bernoulli_glm" / "files"
    design, stimulus = (
        torch.load(files / f"{name}.pt", weights_only=True).double().numpy()
        for name in ("design_matrix", "stimulus_I")
    )
    return design, stimulus


def glm_prior(random: Random, n: int) -> np.ndarray:
    """A Gaussian that favors smooth filters."""
    d = np.eye(9) - np.eye(9, k=-1)
    f = d @ d + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, f.T @ f
    return random.multivariate_normal(np.zeros(10), np.linalg.inv(precision), n)


def bernoulli_glm(random: Random, theta: np.ndarray) -> np.ndarray:
    """Number of spikes and spike-triggered average of a Bernoulli neuron."""
    design, stimulus = glm_files()
    spikes = random.random((len(theta), 100)) < 1 / (1 + np.exp(-theta @ design.T))
    padded = np.pad(stimulus, 8)  # conv1d(spikes, stimulus, padding=8)[-9:]
    average = [spikes @ padded[8 - lag : 108 - lag] for lag in range(9)]
    return np.stack([spikes.sum(1), *average], 1)


def runge_kutta(
    slope: Callable[[np.ndarray], np.ndarray], state: np.ndarray, times: np.ndarray, steps: int
) -> np.ndarray:
    """Solutions of an autonomous equation at some times, (times, *state)."""
    found = [state]
    for length in np.diff(times) / steps:
        for _ in range(steps):
            k1 = slope(state)
            k2 = slope(state + length / 2 * k1)
            k3 = slope(state + length / 2 * k2)
            k4 = slope(state + length * k3)
            state = state + length / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(state)
    return np.stack(found)


def sir(random: Random, theta: np.ndarray) -> np.ndarray:
    """Infected among 1,000 people who are tested on ten days of an epidemic."""
    contact, recovery = theta.T

    def slope(state: np.ndarray) -> np.ndarray:
        new = contact * state[0] * state[1]
        return np.stack([-new, new - recovery * state[1]])

    start = np.broadcast_to([[1 - 1e-6], [1e-6]], (2, len(theta)))
    infected = runge_kutta(slope, start, 17.0 * np.arange(10), 68)[:, 1]
    return random.binomial(1000, infected.clip(0, 1).T).astype(float)


def lotka_volterra(random: Random, theta: np.ndarray) -> np.ndarray:
    """Prey and predators at ten times, with noise of 10 %."""
    alpha, beta, gamma, delta = theta.T

    def slope(logs: np.ndarray) -> np.ndarray:
        prey, predators = np.exp(logs)
        return np.stack([alpha - beta * predators, delta * prey - gamma])

    start = np.broadcast_to(np.log([[30.0], [1.0]]), (2, len(theta)))
    logs = runge_kutta(slope, start, 2.1 * np.arange(10), 420)
    logs = logs.clip(math.log(1e-10), math.log(1e4)).transpose(2, 1, 0).reshape(-1, 20)
    return np.exp(logs + 0.1 * random.normal(size=logs.shape))


def normal(scale: float, d: int) -> Callable[[Random, int], np.ndarray]:
    """Independent Gaussian parameters."""
    return lambda random, n: random.normal(0, scale, (n, d))


TASKS = {
    task.name: task
    for task in (
        Task("two_moons", 2, box(-1, 1, 2), two_moons, -1, 1),
        Task("slcp", 5, box(-3, 3, 5), slcp, -3, 3),
        Task("gaussian_mixture", 2, box(-10, 10, 2), gaussian_mixture, -10, 10),
        Task("bernoulli_glm", 10, glm_prior, bernoulli_glm),
        Task("gaussian_linear", 10, normal(math.sqrt(0.1), 10), gaussian_linear),
        Task("gaussian_linear_uniform", 10, box(-1, 1, 10), gaussian_linear, -1, 1),
        Task("sir", 2, log_normal([math.log(0.4), math.log(0.125)], [0.5, 0.2]), sir, 0),
        Task("lotka_volterra", 4, log_normal([-0.125, -3] * 2, [0.5] * 4), lotka_volterra, 0),
    )
}
