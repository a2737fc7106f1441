"""Autoregressive convolutions, and emerging ones that they form."""

import pytest
import torch

from musigma import build
from musigma.layers import AutoregressiveConv
from musigma.testing import check_layer, check_model, jacobian, randomized


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [3, 5])
def test_it_obeys_all_laws(size, reverse):
    check_layer(AutoregressiveConv(2, size=size, reverse=reverse), (2, 3, 4))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_pixel_depends_on_those_before_it(reverse):
    """The Jacobian is a triangle with ones on its diagonal."""
    layer = randomized(AutoregressiveConv(2, reverse=reverse))
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    matrix = jacobian(lambda x: layer(x)[0].flatten(2).transpose(1, 2).flatten(1), x)[0]
    by_pixel = matrix.reshape(12, 2, 2, 12).permute(0, 3, 1, 2)  # output and input pixel, channels
    across = torch.triu if not reverse else torch.tril
    outside = across(torch.ones(12, 12), diagonal=-1 if reverse else 1).bool()
    assert not by_pixel[outside].any()
    assert bool((by_pixel.diagonal() == torch.eye(2)[:, :, None]).all())


def test_two_of_them_reach_all_pixels_around():
    first, second = (randomized(AutoregressiveConv(1, reverse=r)) for r in (False, True))
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    y = second(first(x)[0])[0]
    (gradient,) = torch.autograd.grad(y[0, 0, 2, 2], x)
    assert bool((gradient[0, 0, 1:4, 1:4] != 0).all())


def test_the_inverse_has_gradients():
    layer = randomized(AutoregressiveConv(2))
    y = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: layer.inverse(y)[0], y)


def test_an_even_size_is_refused():
    with pytest.raises(ValueError, match="odd number; got 4"):
        AutoregressiveConv(2, size=4)


def test_glow_takes_it_by_an_option():
    small = {"levels": 1, "depth": 1, "hidden": 6, "permutation": "emerging"}
    model = build("glow", (2, 4, 6), bits=None, **small)
    check_model(model, (2, 4, 6))
    assert any(layer.slow_inverse == "one step per pixel" for layer in model.layers)
