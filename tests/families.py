"""What every family of flows must satisfy, for one test of each."""

import tempfile

import numpy as np
import pytest
import torch

from musigma import Dataset, TrainConfig, build, fit
from musigma.audit import audit_step
from musigma.audit.models import examples_of
from musigma.testing import check_model, randomized
from musigma.training.step import ObjectivePass


def integral(model, bound=12.0, points=400, context=None):
    """The integral of a density of two variables over [-bound, bound]², by the trapezoidal rule.

    The points are denser in the middle, by x = bound · sinh(t) / sinh(1).
    """
    t = torch.linspace(-3, 3, points, dtype=torch.float64)
    x = bound * t.sinh() / np.sinh(3)
    weight = bound * t.cosh() / np.sinh(3) * (t[1] - t[0])
    grid = torch.cartesian_prod(x, x)
    with torch.no_grad():
        parts = [
            model.log_prob(part, None if context is None else context.expand(len(part), -1))
            for part in grid.split(20_000)
        ]
    return float((torch.cat(parts).exp() * torch.cartesian_prod(weight, weight).prod(1)).sum())


def ring(n, seed=0):
    """Points near a ring whose radius varies: a Gaussian fits badly."""
    generator = np.random.default_rng(seed)
    angle = generator.uniform(0, 2 * np.pi, n)
    radius = 2 + 0.15 * generator.normal(size=n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def nats_after(model, *, data=ring, **options):
    """Nats per example of 1,000 new examples, after training (500 steps by default)."""
    usual = {"steps": 500, "batch_size": 128, "ema": 0.98, "evaluations": 1, "lr": 5e-3}
    config = TrainConfig(**(usual | options))
    with tempfile.TemporaryDirectory() as folder:
        run = fit(model, Dataset(data(4096)), Dataset(data(512, seed=1)), config, folder)
    with torch.no_grad():
        return float(-run.model(torch.from_numpy(data(1000, seed=2))).elbo.mean())


parts = pytest.mark.parametrize(
    "part", ["proofs", pytest.param("training", marks=pytest.mark.slow)]
)
"""Two tests of a family: training takes longer, so it is slow."""


def check_flow_family(
    name, part, *, below, mass=1e-3, reach=12.0, scale=1.0, features=4, train=(), **options
):
    """The laws, the mass of the density in two dimensions, the audit, and training on a ring.

    Args:
        name: The architecture, for vectors.
        part: `proofs`: all but training; `training`.
        below: Bound of the nats per example after 500 steps on `ring`. A Gaussian of the same
            covariance has 3.54, and the truth is 2.05.
        mass: Tolerance of the integral.
        reach: Bound of the variables over which the density is integrated.
        scale: Scale of the random parameters.
        features: Number of features for the laws.
        train: Options of training, as pairs.
        **options: Options of the architecture.
    """
    torch.manual_seed(0)
    small = {"bits": None, **options}
    if part == "training":
        assert nats_after(build(name, (2,), **small), **dict(train)) < below
        return
    for context in (0, 3):
        check_model(
            build(name, (features,), **small, context=context), (features,), context=context
        )
    flat = randomized(build(name, (2,), **small), scale=scale)
    assert abs(integral(flat, reach) - 1) < mass
    report = audit_step(training_step(build(name, (features,), **small)))
    assert not report.findings, report
    assert any("log-determinant" in line for line in report.checked), report


def training_step(model):
    """The loss of the trainer for one batch, with random parameters, as a function."""
    model = randomized(model, scale=0.25).float().train()
    x, context = examples_of(model)
    run = ObjectivePass(model, TrainConfig(), None)
    return lambda: run(x, context, 1.0)[0].mean()
