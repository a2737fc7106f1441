"""Maps against other libraries, given the same parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from musigma.layers import CircularSpline, CubicSpline, LinearSpline, QuadraticSpline, Spline

K, BOUND = 7, 3.0


def drawn(map, rows=400, scale=1.5, width=2.0):
    """x (rows, 1), parameters, and the same parameters as (rows, outputs)."""
    generator = torch.Generator().manual_seed(0)
    x = width * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return x, scale * torch.randn(rows, map.outputs, generator=generator, dtype=torch.float64)


def both_agree(map, x, h, theirs, *, inverse=True, tolerance=1e-6):
    """The values and the slopes of both directions; `theirs` takes x (rows,) and ``inverse=``."""
    y, log_slope = map.forward(x, h)
    found = theirs(x[:, 0])
    for ours, other in zip((y, log_slope), found, strict=True):
        assert_close(ours[:, 0], other, rtol=tolerance, atol=tolerance)
    if inverse:
        found = theirs(x[:, 0], inverse=True)
        for ours, other in zip(map.inverse(x, h), found, strict=True):
            assert_close(ours[:, 0], other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def double():
    """Float64 by default: nflows computes some knots in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_linear_splines_of_nflows(double):
    """Its inverse adds 1e-6 to the height of the last bin, so that one is left out."""
    nflows = pytest.importorskip("nflows.transforms.splines.linear")
    spline = LinearSpline(bins=K, bound=BOUND, least=1e-12)
    x, h = drawn(spline)
    inner = h[:, :K].softmax(1)[:, :-1].sum(1) * 2 * BOUND - BOUND
    x = torch.where((x[:, 0] > inner) & (x[:, 0] < BOUND), inner - 0.1, x[:, 0])[:, None]
    both_agree(
        spline,
        x,
        h,
        lambda x, inverse=False: nflows.unconstrained_linear_spline(
            x, h, inverse=inverse, tail_bound=BOUND
        ),
    )


def test_quadratic_splines_of_nflows():
    """It is given all slopes: those that it derives at the bounds are not 1, as it intends."""
    nflows = pytest.importorskip("nflows.transforms.splines.quadratic")
    spline = QuadraticSpline(bins=K, bound=BOUND)
    x, h = drawn(spline)
    x = x.clamp(-BOUND, BOUND)
    least = spline.least
    width = least + (1 - K * least) * h[:, :K].softmax(1)
    inner = F.softplus(h[:, K:]) + least
    around = F.pad(inner, (1, 1))  # zeros at the bounds
    known = (width * (around[:, :-1] + around[:, 1:]) / 2).sum(1)
    outer = known / (1 - (width[:, 0] + width[:, -1]) / 2)  # equals the integral
    slopes = torch.cat([outer[:, None], inner, outer[:, None]], 1)
    raw = torch.log(torch.expm1(slopes - least))
    side = {"left": -BOUND, "right": BOUND, "bottom": -BOUND, "top": BOUND}
    both_agree(
        spline,
        x,
        h,
        lambda x, inverse=False: nflows.quadratic_spline(x, h[:, :K], raw, inverse, **side),
    )
    bound = torch.full((len(h), 1), BOUND, dtype=h.dtype)
    slope = spline.forward(bound, h)[1]
    assert_close(slope, torch.zeros_like(slope))
    theirs = nflows.unconstrained_quadratic_spline(
        bound[:, 0], h[:, :K], h[:, K:], tail_bound=BOUND
    )
    assert theirs[1].abs().max() > 0.01


def test_cubic_splines_of_nflows():
    """Its inverse takes cubics that are nearly quadratic for quadratic, so only values agree."""
    nflows = pytest.importorskip("nflows.transforms.splines.cubic")
    spline = CubicSpline(bins=K, bound=BOUND)
    x, h = drawn(spline)
    ends = h[:, 2 * K :] - math.log(2)
    both_agree(
        spline,
        x,
        h,
        lambda x: nflows.unconstrained_cubic_spline(
            x, h[:, :K], h[:, K : 2 * K], ends[:, :1], ends[:, 1:], tail_bound=BOUND
        ),
        inverse=False,
    )


def test_rational_quadratic_splines_of_nflows():
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    spline = Spline(bins=K, bound=BOUND)
    x, h = drawn(spline)
    slopes = h[:, 2 * K :] + math.log(math.expm1(1 - spline.least))
    both_agree(
        spline,
        x,
        h,
        lambda x, inverse=False: nflows.unconstrained_rational_quadratic_spline(
            x, h[:, :K], h[:, K : 2 * K], slopes, inverse=inverse, tails="linear", tail_bound=BOUND
        ),
    )


def test_circular_splines_of_normflows():
    normflows = pytest.importorskip("normflows.utils.splines")
    spline = CircularSpline(bins=K)
    x, h = drawn(spline, width=1.0)
    x = x.clamp(-3.1, 3.1)
    h[:, 0] = 0.0  # it has no shift
    slopes = h[:, 1 + 2 * K :] + math.log(math.expm1(1 - spline.least))
    both_agree(
        spline,
        x,
        h,
        lambda x, inverse=False: normflows.unconstrained_rational_quadratic_spline(
            x,
            h[:, 1 : 1 + K],
            h[:, 1 + K : 1 + 2 * K],
            slopes,
            inverse=inverse,
            tails="circular",
            tail_bound=math.pi,
        ),
    )
