"""Flows of angles: wrapping, densities on the torus, and training."""

import math

import numpy as np
import pytest
import torch

from musigma.audit import audit_step
from musigma.layers import Circle
from musigma.nets import Conditioner, Periodic
from musigma.testing import check_model, randomized
from musigma.zoo import build
from tests.families import nats_after, training_step


def angles(*shape, period=2 * math.pi, low=-math.pi):
    generator = torch.Generator().manual_seed(0)
    return low + period * torch.rand(shape, generator=generator, dtype=torch.float64)


def small(features=3, **options):
    torch.manual_seed(0)
    return build("ncsf", (features,), depth=2, hidden=8, bins=4, **options)


def test_a_circle_wraps():
    layer = Circle(24.0, 6.0)
    x = angles(4, 3, period=24.0, low=6.0)
    for t in (x, x + 24, x - 72):
        torch.testing.assert_close(layer(t)[0], x)
        torch.testing.assert_close(layer.inverse(t)[0], x)
    y, log_det = layer(torch.tensor([[5.0, 30.0, 6.0, -19.0]]))
    assert y.tolist() == [[29.0, 6.0, 6.0, 29.0]]
    assert log_det.tolist() == [0.0]
    with pytest.raises(ValueError, match="period: expected a positive number; got -1"):
        Circle(-1.0)


def test_a_periodic_network_is_periodic():
    net = Periodic(Conditioner(4, 3, hidden=[8], context=1), 5.0).double()
    x, context = angles(6, 2), torch.randn(6, 1).double()
    torch.testing.assert_close(net(x, context), net(x - 15, context))
    assert (net(x, context) - net(x + 1, context)).abs().max() > 1e-3


@pytest.mark.parametrize("context", [0, 2])
def test_the_laws_of_every_model(context):
    check_model(small(context=context), (3,), context=context, x=angles(4, 3))


def test_one_angle():
    check_model(small(features=1), (1,), x=angles(4, 1))


def test_the_density_is_periodic_and_continuous_and_integrates_to_one():
    model = randomized(small(features=2), scale=2.0)
    n = 200
    side = -math.pi + 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_p = model.log_prob(grid)
        assert abs(float(log_p.exp().mean()) * 4 * math.pi**2 - 1) < 1e-3
        assert log_p.std() > 0.05
        torch.testing.assert_close(model.log_prob(grid + 2 * math.pi), log_p)
        ends = torch.tensor([[math.pi - 1e-9, 0.3], [-math.pi + 1e-9, 0.3]], dtype=torch.float64)
        torch.testing.assert_close(*model.log_prob(ends), rtol=1e-6, atol=1e-6)


def test_draws_lie_in_one_period():
    model = randomized(small(period=360.0, low=0.0))
    x = model.sample(500)
    assert (x >= 0).all()
    assert (x <= 360).all()
    assert x.std(0).min() > 50


def test_it_passes_its_own_audit():
    report = audit_step(training_step(small()))
    assert not report.findings, report


def von_mises(n, seed=0):
    """A bump across the border ±π, and another angle that follows the first."""
    generator = np.random.default_rng(seed)
    a = generator.vonmises(np.pi, 4.0, n)
    b = 2 * a + generator.vonmises(0.0, 8.0, n)
    return np.stack([a, (b + np.pi) % (2 * np.pi) - np.pi], 1).astype(np.float32)


@pytest.mark.slow
def test_it_learns_a_density_across_the_border():
    """The truth has the entropy of both von Mises distributions, 1.77 nats."""
    from scipy.stats import vonmises

    truth = vonmises(4.0).entropy() + vonmises(8.0).entropy()
    torch.manual_seed(0)
    model = build("ncsf", (2,), depth=4, hidden=32)
    assert nats_after(model, data=von_mises, steps=300) < truth + 0.1


@pytest.mark.parametrize("options", [{"bits": 8}, {"shape": (3, 8, 8)}])
def test_other_data_are_refused(options):
    with pytest.raises(ValueError, match="shape: ncsf is for vectors of continuous angles"):
        build("ncsf", **{"shape": (2,), **options})
