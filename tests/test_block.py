"""Block autoregressive networks as bijections, and the flow made of them."""

import pytest
import torch

from musigma.layers import BlockAutoregressive
from musigma.model import Inverse
from musigma.testing import check_layer, jacobian, randomized
from tests.families import check_flow_family, parts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("context", [0, 2])
def test_laws(context):
    layer = BlockAutoregressive(3, hidden=[3, 5], context=context)
    check_layer(layer, (3,), context=context)


@parts
def test_family(part):
    check_flow_family(
        "bnaf", part, below=3.1, reach=30, train={"lr": 0.02}, depth=2, hidden=6, features=3
    )


def test_outputs_increase_with_their_feature_and_ignore_later_ones():
    layer = randomized(BlockAutoregressive(4, hidden=[3]))
    rows = jacobian(lambda x: layer(x)[0], torch.randn(5, 4, dtype=torch.float64))
    assert (rows.diagonal(dim1=1, dim2=2) > 0).all()
    assert (rows.triu(1) == 0).all()
    assert (rows.tril(-1) != 0).sum() == 5 * 6


def test_it_is_onto_where_the_network_alone_is_bounded():
    layer = randomized(BlockAutoregressive(2))
    y = torch.tensor([[1e4, -1e4], [-300.0, 5.0]], dtype=torch.float64)
    x, log_det = layer.inverse(y)
    again, forward = layer(x)
    assert torch.allclose(again, y, rtol=1e-12)
    assert torch.allclose(forward, -log_det, atol=1e-9)


def test_slopes_do_not_underflow_where_every_unit_is_saturated():
    layer = BlockAutoregressive(2)
    layer.gate.data.fill_(-200.0)  # only the network counts: its slope is about exp(-1000)
    x = torch.tensor([[500.0, -700.0]])
    assert layer(x)[1].isfinite().all()


def test_gradients_of_the_inverse():
    layer = randomized(BlockAutoregressive(2, hidden=[2], context=1))
    parameters = dict(layer.named_parameters())
    given = torch.randn(2, 1, dtype=torch.float64)

    def inverse(y, *values):
        named = {f"bijection.{k}": v for k, v in zip(parameters, values, strict=True)}
        return torch.func.functional_call(Inverse(layer), named, (y, given))

    y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    leaves = [p.detach().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(inverse, (y, *leaves), atol=1e-6, fast_mode=True)


def test_parity_with_pyro():
    block = pytest.importorskip("pyro.distributions.transforms.block_autoregressive")
    theirs = randomized(block.BlockAutoregressive(3, hidden_factors=[4, 2], residual="gated"))
    layer = BlockAutoregressive(3, hidden=[4, 2]).double()
    layer.gate.data = theirs.gate.data
    for mine, other in zip(layer.layers, theirs.layers, strict=True):
        mine.weight.data, mine.log_norm.data = other._weight.data, other._diag_weight.data
        mine.bias.data = other.bias.data
    x = torch.randn(6, 3, dtype=torch.float64)
    y, log_det = layer(x)
    assert torch.allclose(theirs(x), y, atol=1e-6)
    assert torch.allclose(theirs.log_abs_det_jacobian(x, theirs(x)), log_det, atol=1e-6)
