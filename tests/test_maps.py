"""Every map: increasing over the whole line, with the slope and the inverse that it states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musigma.layers import (
    Autoregressive,
    CircularSpline,
    Coupling,
    CubicSpline,
    Elementwise,
    LinearSpline,
    Monotone,
    QuadraticSpline,
    Spline,
)
from musigma.nets import MADE, MLP
from musigma.testing import check_layer

MAPS = {
    "linear": LinearSpline(),
    "linear, 3 bins": LinearSpline(bins=3, bound=2.0),
    "quadratic": QuadraticSpline(),
    "quadratic, 2 bins": QuadraticSpline(bins=2, bound=1.0),
    "cubic": CubicSpline(),
    "cubic, 3 bins": CubicSpline(bins=3, bound=2.0),
    "rational-quadratic": Spline(),
    "circular": CircularSpline(),
    "circular, 3 bins": CircularSpline(bins=3, period=1.0),
}
IDENTICAL = {name for name in MAPS if name.split(",")[0] in (
    "linear", "quadratic", "cubic", "rational-quadratic", "circular"
)}  # fmt: skip

ROUNDING = 1e-6
"""The largest error in float32 of a forward pass after an inverse one. It is relative to
1 + |y| + slope (1 + |x|), because x itself is rounded."""


@pytest.fixture(params=MAPS, ids=str)
def map(request):
    return MAPS[request.param]


def drawn(map, size, seed, dtype=torch.float64, scale=3.0):
    """x, and parameters of the given scale."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(size, generator=generator, dtype=dtype)
    h = scale * torch.randn(
        (size[0], map.outputs * size[1], *size[2:]), generator=generator, dtype=dtype
    )
    return x, h


def line(dtype):
    """Numbers of the whole line, dense around zero."""
    t = torch.linspace(-14, 14, 1201, dtype=dtype)
    return t.sinh()[:, None]


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=15, deadline=None)
def increases(map, seed, dtype):
    x = line(dtype)
    h = drawn(map, (1, 1), seed, dtype)[1].expand(len(x), -1)
    y, log_slope = map.forward(x, h)
    assert y.dtype == log_slope.dtype == dtype
    assert y.isfinite().all()
    assert log_slope.isfinite().all()
    rise = y.diff(dim=0) if dtype == torch.float64 else y.diff(dim=0) + 1e-6 * (1 + y[1:].abs())
    assert (rise > 0).all(), float(x[int(rise.argmin())])
    assert y[0] < -1
    assert y[-1] > 1


def test_maps_increase_over_the_whole_line(map):
    increases(map)


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_is_that_of_autograd(map, seed):
    x, h = drawn(map, (40, 3), seed)
    x.requires_grad_()
    y, log_slope = map.forward(x, h)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope.exp(), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_inverts(map, seed):
    x, h = drawn(map, (40, 3), seed)
    y, log_slope = map.forward(x, h)
    again, back = map.inverse(y, h)
    size = (1 + y.abs()) / log_slope.exp()
    assert ((again - x).abs() <= 1e-13 * (1 + x.abs() + size)).all()
    torch.testing.assert_close(back, -log_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_both_directions_agree_in_single_precision(map, seed):
    y, h = drawn(map, (200, 3), seed, torch.float32, scale=1.0)
    x, back = map.inverse(y, h)
    again, log_slope = map.forward(x, h)
    size = 1 + y.abs() + log_slope.exp() * (1 + x.abs())
    assert ((again - y).abs() / size).max() <= ROUNDING
    torch.testing.assert_close(back, -log_slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(IDENTICAL))
def test_with_parameters_of_zero_it_is_the_identity(name):
    map = MAPS[name]
    x, h = drawn(map, (50, 2), 0, scale=0.0)
    y, log_slope = map.forward(x, h)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_images_and_wrong_shapes(map):
    x, h = drawn(map, (2, 3, 4, 2), 0)
    y, _ = map.forward(x, h)
    one = h.unflatten(1, (map.outputs, 3))[:, :, 1, 2, 1]
    torch.testing.assert_close(y[:, 1:2, 2, 1], map.forward(x[:, 1:2, 2, 1], one)[0])
    with pytest.raises(ValueError, match=rf"h: .* takes {map.outputs} numbers for each element"):
        map.forward(x, h[:, 1:])


@pytest.mark.parametrize("name", [name for name in MAPS if "," not in name])
def test_every_layer_takes_it(name):
    torch.manual_seed(0)
    map = MAPS[name]
    check_layer(Coupling(MLP(1, 2 * map.outputs, hidden=[6]), map=map), (3,))
    if not isinstance(map, Monotone):  # else root finding, which has tests of its own, takes long
        check_layer(Autoregressive(MADE(map.owners(3), hidden=[6]), map=map), (3,))
        check_layer(Elementwise((2, 1), map=map), (2, 3))
