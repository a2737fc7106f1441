"""Roots of increasing functions, against closed forms and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from musigma.layers import Autoregressive, Coupling, Elementwise, Monotone
from musigma.nets import MADE, MLP
from musigma.solvers import ConvergenceError, increasing_root
from musigma.testing import check_layer

TYPES = [torch.float32, torch.float64]


class Cube(Monotone):
    """y = exp(a) x + exp(b) x^3 + c."""

    outputs = 3

    def forward(self, x, h):
        a, b, c = h.unflatten(1, (3, -1)).unbind(1)
        return a.exp() * x + b.exp() * x**3 + c, (a.exp() + 3 * b.exp() * x**2).log()


def neighbors(x):
    inf = torch.full_like(x, torch.inf)
    return torch.nextafter(x, -inf), torch.nextafter(x, inf)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("exponent", [-30, -3, 0, 3, 30])
def test_roots_of_a_line_are_right_to_the_last_bit(dtype, exponent):
    generator = torch.Generator().manual_seed(0)
    slope = (3 * torch.randn(500, generator=generator, dtype=dtype)).exp()
    y = torch.randn(500, generator=generator, dtype=dtype) * 10.0**exponent
    x = increasing_root(lambda x: (slope * x, slope.log()), y)
    rest = (slope * x - y).abs()
    assert all((rest <= (slope * near - y).abs()).all() for near in neighbors(x))
    truth = y.double() / slope.double()
    assert ((x - truth).abs() <= 2 * torch.finfo(dtype).eps * truth.abs()).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_inverse_of_logarithmic_growth_reaches_far_numbers(dtype):
    """y = asinh(x): the roots of y = ±80 lie at 10^34."""
    y = torch.linspace(-80, 80, 321, dtype=dtype)
    x = increasing_root(lambda x: (x.asinh(), -0.5 * torch.log1p(x**2)), y)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), y.double().sinh(), rtol=200 * eps, atol=eps)


@given(st.integers(0, 10**6), st.floats(-1e4, 1e4))
@settings(max_examples=40, deadline=None)
def test_roots_are_those_of_brent(seed, target):
    """Sums of steps and lines, which Newton's method alone does not solve."""
    r = np.random.default_rng(seed)
    at, sharp, tall = r.normal(size=5) * 30, np.exp(2 * r.normal(size=5)), np.exp(r.normal(size=5))

    def f(x):
        return float(0.01 * x + (tall * np.tanh(sharp * (x - at))).sum())

    a, s, t = (torch.from_numpy(v)[:, None] for v in (at, sharp, tall))

    def g(x):
        u = s * (x - a)
        slope = (t * s / u.clamp(-300, 300).cosh().square()).sum(0) + 0.01
        return 0.01 * x + (t * u.tanh()).sum(0), slope.log()

    x = float(increasing_root(g, torch.tensor([target], dtype=torch.float64)))
    assert x == pytest.approx(
        brentq(lambda x: f(x) - target, -1e9, 1e9, xtol=1e-12, rtol=1e-14), rel=1e-11, abs=1e-10
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_few_evaluations_are_needed(dtype):
    calls = []

    def f(x):
        calls.append(1)
        return x + x**3, (1 + 3 * x**2).log()

    increasing_root(f, torch.linspace(-100, 100, 999, dtype=dtype))
    assert len(calls) <= 35


def test_values_that_are_not_finite_stay_so_and_others_are_solved():
    y = torch.tensor([torch.nan, torch.inf, 2.0, -torch.inf])
    x = increasing_root(lambda x: (2 * x, torch.full_like(x, 2.0).log()), y)
    assert x[0].isnan()
    assert x.tolist()[1:] == [torch.inf, 1.0, -torch.inf]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x.tanh(), -2 * x.cosh().log()),
        lambda x: (x * torch.nan, x),
        lambda x: (x.clamp(max=1.0), 0 * x),
    ],
    ids=["bounded", "nan", "bounded above"],
)
def test_a_value_that_is_not_taken_is_an_error_with_the_residual(f):
    with pytest.raises(ConvergenceError, match=r"f\(x\) = 2 .* 1 of 2 elements: .*residual"):
        increasing_root(f, torch.tensor([torch.inf, 2.0]))


def test_derivatives_of_the_inverse_are_those_of_the_implicit_function():
    torch.manual_seed(0)
    y = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Cube().inverse, (y, h))
    assert torch.autograd.gradgradcheck(Cube().inverse, (y, h))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_inverse_has_the_type_of_its_input(dtype):
    y, h = torch.randn(4, 2, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    x, log_slope = Cube().inverse(y, h)
    assert x.dtype == log_slope.dtype == dtype
    torch.testing.assert_close(Cube().forward(x, h)[0], y)


def test_monotone_maps_obey_the_laws_of_every_layer():
    cube = Cube()
    coupling = Coupling(MLP(2, 9, hidden=[8]), map=cube)
    autoregressive = Autoregressive(MADE(cube.owners(4), hidden=[8]), map=cube)
    for layer, features in ((coupling, 5), (autoregressive, 4), (Elementwise(3, map=cube), 3)):
        check_layer(layer, (features,))
    assert coupling.slow_inverse == "root finding"
    assert autoregressive.slow_inverse == "one step per feature, root finding"
    assert Coupling(MLP(2, 4)).slow_inverse == ""
