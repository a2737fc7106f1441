"""Every map: increasing over the whole line, with the slope and the inverse that it states."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musigma.layers import (
    UMNN,
    Affine,
    Autoregressive,
    Bernstein,
    CircularSpline,
    Composed,
    Coupling,
    CubicSpline,
    DeepSigmoid,
    Elementwise,
    LinearSpline,
    MixtureGaussianCDF,
    MixtureLogisticCDF,
    Monotone,
    QuadraticSpline,
    Spline,
    SumOfSquares,
)
from musigma.nets import MADE, MLP
from musigma.testing import check_layer, randomized


def umnn(**options):
    torch.manual_seed(0)
    return randomized(UMNN(**options), scale=3.0)


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
    "bernstein": Bernstein(),
    "bernstein, degree 1": Bernstein(degree=1, bound=2.0),
    "sum of squares": SumOfSquares(),
    "sum of squares, degree 0": SumOfSquares(polynomials=1, degree=0),
    "logistic mixture": MixtureLogisticCDF(),
    "logistic mixture, 1": MixtureLogisticCDF(1),
    "gaussian mixture": MixtureGaussianCDF(),
    "gaussian mixture, 1": MixtureGaussianCDF(1),
    "deep sigmoid": DeepSigmoid(),
    "deep sigmoid, 1 unit": DeepSigmoid(units=1, layers=3),
    "umnn": umnn(),
    "umnn, 2 bins": umnn(bins=2, bound=1.0, hidden=[8]),
    "composed": Composed(MixtureLogisticCDF(4), Affine()),
}
IDENTICAL = {"linear", "quadratic", "cubic", "rational-quadratic", "circular", "bernstein",
             "sum of squares"}  # fmt: skip
NEARLY = {"logistic mixture": 0.04, "gaussian mixture": 0.02, "deep sigmoid": 0.07}
"""How far from the identity they are on [-3, 3] with parameters of zero."""

FARTHEST = {"sum of squares": 1e4}  # it grows as x^9

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


def line(dtype, farthest=1e6):
    """Numbers of the whole line, dense around zero."""
    end = math.asinh(farthest)
    return torch.linspace(-end, end, 1201, dtype=dtype).sinh()[:, None]


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=15, deadline=None)
def increases(map, seed, dtype):
    x = line(dtype, next((far for name, far in FARTHEST.items() if MAPS[name] is map), 1e6))
    h = drawn(map, (1, 1), seed, dtype)[1].expand(len(x), -1)
    y, log_slope = map.forward(x, h)
    assert y.dtype == log_slope.dtype == dtype
    assert y.isfinite().all()
    assert log_slope.isfinite().all()
    rounding = 8 * torch.finfo(dtype).eps * (1 + y[1:].abs())  # a slope may be e^-40
    rise = y.diff(dim=0)
    assert (rise >= -rounding).all(), float(x[int(rise.argmin())])
    assert (rise > 0).double().mean() > 0.5
    ends = torch.tensor([[-1e20], [1e20]], dtype=torch.float64)  # and a slope may be 1e-12
    low, high = map.forward(ends, h[:2].double())[0]
    assert low < -1
    assert high > 1


def test_maps_increase_over_the_whole_line(map):
    increases(map)


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_is_that_of_autograd(map, seed):
    x, h = drawn(map, (40, 3), seed)
    x.requires_grad_()
    y, log_slope = map.forward(x, h)
    (slope,) = torch.autograd.grad(y.sum(), x)
    near = y.abs() < 50  # the derivative of log_ndtr in torch loses digits far from zero
    for where, rtol in ((near, 1e-10), (~near, 1e-8)):
        torch.testing.assert_close(log_slope.exp()[where], slope[where], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_inverts(map, seed):
    x, h = drawn(map, (40, 3), seed)
    y, log_slope = map.forward(x, h)
    again, back = map.inverse(y, h)
    size = (1 + y.abs()) / log_slope.exp()
    assert ((again - x).abs() <= 1e-13 * (1 + x.abs() + size)).all()
    steep = log_slope > -10  # elsewhere rounding of y moves x far
    torch.testing.assert_close(back[steep], -log_slope[steep], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_both_directions_agree_in_single_precision(map, seed):
    y, h = drawn(map, (200, 3), seed, torch.float32, scale=1.0)
    x, back = map.inverse(y, h)
    again, log_slope = map.forward(x, h)
    size = 1 + y.abs() + log_slope.exp() * (1 + x.abs())
    assert ((again - y).abs() / size).max() <= ROUNDING
    torch.testing.assert_close(back, -log_slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NEARLY)
def test_with_parameters_of_zero_it_is_nearly_the_identity(name):
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    y, _ = MAPS[name].forward(x, torch.zeros(101, MAPS[name].outputs).double())
    assert (y - x).abs().max() < NEARLY[name]


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
    with pytest.raises(
        ValueError, match=rf"h: (.|\n)* takes {map.outputs} numbers for each element"
    ):
        map.forward(x, h[:, 1:])


@pytest.mark.parametrize("name", [name for name in MAPS if "," not in name])
def test_every_layer_takes_it(name):
    torch.manual_seed(0)
    map = MAPS[name]
    check_layer(Coupling(MLP(1, 2 * map.outputs, hidden=[6]), map=map), (3,))
    if not isinstance(map, Monotone):  # else root finding, which has tests of its own, takes long
        check_layer(Autoregressive(MADE(map.owners(3), hidden=[6]), map=map), (3,))
        check_layer(Elementwise((2, 1), map=map), (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAPS if "," not in name])
def test_forward_compiles_as_one_graph(name):
    map = MAPS[name]
    x, h = drawn(map, (5, 2), 0)
    torch._dynamo.reset()
    compiled = torch.compile(map.forward, fullgraph=True, backend="aot_eager")
    for found, truth in zip(compiled(x, h), map.forward(x, h), strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSpline(bins=1), "bins: expected 2 or more; got 1"),
        (lambda: QuadraticSpline(bound=0.0), "bound: expected a positive number; got 0"),
        (lambda: CubicSpline(least=0.2), "least: expected a number between 0 and"),
        (lambda: CircularSpline(period=-1.0), "period: expected a positive number; got -1"),
        (lambda: CircularSpline(bins=1), "bins: expected 2 or more; got 1"),
        (lambda: Bernstein(degree=0), "degree: expected 1 to 100; got 0"),
        (lambda: Bernstein(bound=math.inf), "bound: expected a positive number; got inf"),
        (lambda: Bernstein(least=1.0), "least: expected a number between 0 and 1; got 1"),
        (lambda: SumOfSquares(polynomials=0), "polynomials: expected 1 or more; got 0"),
        (lambda: SumOfSquares(scale=0.0), "scale: expected a positive number; got 0"),
        (lambda: SumOfSquares(least=0.0), "least: expected a number between 0 and 1; got 0"),
        (lambda: MixtureLogisticCDF(0), "components: expected 1 or more; got 0"),
        (lambda: DeepSigmoid(layers=0), "layers: expected 1 or more; got 0"),
        (lambda: UMNN(bins=3), "bins: expected an even number, 2 or more; got 3"),
        (lambda: UMNN(hidden=[]), r"signal, hidden: expected positive numbers; got 8, \[\]"),
        (lambda: UMNN(bound=0.0), "bound: expected a positive number; got 0"),
        (lambda: UMNN(least=2.0), "least: expected a number between 0 and 1; got 2"),
        (Composed, "maps: expected one or more; got none"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_composed_maps_read_the_parameters_of_each_in_turn():
    map = Composed(QuadraticSpline(), Affine(), MixtureGaussianCDF(2))
    assert map.slow_inverse == "root finding"
    assert map.owners(2) == [0, 1] * map.outputs
    x, h = drawn(map, (5, 2), 0)
    y, total = x, 0
    for part, of in zip(h.split([30, 4, 12], 1), map.maps, strict=True):
        y, log_slope = of.forward(y, part)
        total = total + log_slope
    found = map.forward(x, h)
    assert found[0].equal(y)
    assert found[1].equal(total)


def test_a_mixture_is_fitted_to_data_by_their_quantiles():
    """The distribution function of three clusters, one far away, becomes about normal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=generator) * torch.tensor([1.0, 20.0])
    x[:1000] -= 30
    x[1000:1100, 0] += 200
    map = MixtureGaussianCDF(32)
    y, _ = map.forward(x, map.fitted(x).expand(len(x), -1))
    levels = torch.linspace(0.02, 0.98, 25)
    found = torch.quantile(y, levels, 0)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(levels)[:, None]
    assert (found - normal).abs().mean() < 0.05
