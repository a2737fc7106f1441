"""Gaussianization flows, rotations, and maps of each element that are fitted or take a context."""

import copy

import pytest
import torch

from musigma.distributions import StandardNormal
from musigma.layers import Elementwise, MixtureGaussianCDF, Rotation, Spline
from musigma.model import Chain, Prior
from musigma.testing import check_layer, check_model, randomized
from musigma.zoo import build
from tests.families import check_flow_family, parts, ring


@parts
def test_family(part):
    check_flow_family(
        "gaussianization",
        part,
        below=2.3,
        features=3,
        train={"steps": 200, "lr": 1e-2},
        depth=4,
        components=8,
    )


@pytest.mark.parametrize("event", [(2,), (5,), (3, 2, 2)], ids=str)
def test_rotations_are_orthogonal_and_obey_the_laws(event):
    """Under splines: a standard normal density alone does not depend on a rotation."""
    c = event[0]
    layers = [Rotation(c), Elementwise(event, map=Spline(bins=3))]
    check_model(Chain(layers, Prior(StandardNormal(event))), event)
    matrix = randomized(Rotation(c)).matrix().detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(c).double())
    assert Rotation(1)(torch.ones(2, 1))[0].abs().tolist() == [[1.0], [1.0]]


def test_reflections_are_multiplied_in_the_stated_order():
    layer = randomized(Rotation(4))
    product = torch.eye(4).double()
    for i, v in enumerate(layer.vectors.detach().tril(-1).T):
        v = v + torch.eye(4)[i]
        product = product @ (torch.eye(4) - 2 * torch.outer(v, v) / v.square().sum())
    torch.testing.assert_close(layer.matrix().detach(), product)


def test_rotations_begin_at_random():
    torch.manual_seed(0)
    first = torch.stack([Rotation(3).matrix()[0].detach() for _ in range(500)])
    assert (first.square().mean(0) - 1 / 3).abs().max() < 0.05


def test_elements_whose_map_depends_on_a_context():
    check_layer(Elementwise(3, map=Spline(bins=3), context=2), (3,), context=2)
    check_layer(Elementwise((2, 1), map=Spline(bins=3), context=2), (2, 4), context=2)
    assert "net" not in dict(Elementwise(3, map=Spline()).named_children())


def test_fitting_happens_once_and_is_part_of_the_state():
    x = torch.randn(500, 2) ** 3
    layer = Elementwise(2, map=MixtureGaussianCDF(16))
    again = copy.deepcopy(layer)
    layer.calibrate(x)
    y, _ = layer(x)
    assert (y.std(0) - 1).abs().max() < 0.15
    before = layer.h.detach().clone()
    layer.calibrate(x + 1)
    assert layer.h.equal(before)
    again.load_state_dict(layer.state_dict())
    again.calibrate(x + 1)
    assert again.h.equal(before)
    assert not Elementwise(2, map=Spline()).state_dict().keys() & {"calibrated"}


def test_fitting_layer_by_layer_starts_training_near_the_data():
    """Without any training, better than the Gaussian of the same covariance, which has 3.54."""
    torch.manual_seed(0)
    model = build("gaussianization", (2,), bits=None, depth=16, components=32)
    model.calibrate(torch.from_numpy(ring(4096)))
    with torch.no_grad():
        nats = -model.log_prob(torch.from_numpy(ring(2000, seed=1))).mean()
    assert nats < 2.4
