"""Maps against other libraries, given the same parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from musigma.layers import (
    UMNN,
    Bernstein,
    CircularSpline,
    CubicSpline,
    DeepSigmoid,
    LinearSpline,
    MixtureGaussianCDF,
    MixtureLogisticCDF,
    QuadraticSpline,
    Spline,
    SumOfSquares,
)
from musigma.layers.maps.mixture import grid
from musigma.testing import randomized

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


# -- maps of the whole line


def test_sums_of_squares_of_zuko():
    """Its slope is the mean of squares plus 1e-3, ours is that over 1 + 1e-3."""
    transforms = pytest.importorskip("zuko.transforms")
    slope = 1e-3
    map = SumOfSquares(polynomials=3, degree=4, scale=10.0, least=slope / (1 + slope))
    x, h = drawn(map)
    h[:, 0] = 0.0
    theirs = transforms.SOSPolynomialTransform(h[:, 1:].reshape(-1, 3, 5), slope=slope, eps=1e-12)
    y, log_slope = map.forward(x, h)
    value, log_det = theirs.call_and_ladj(x[:, 0])
    assert_close((1 + slope) * y[:, 0], value, rtol=1e-6, atol=1e-6)
    assert_close(log_slope[:, 0] + math.log1p(slope), log_det, rtol=1e-6, atol=1e-6)
    assert_close(
        map.inverse(x, h)[0][:, 0], theirs.inv((1 + slope) * x[:, 0]), rtol=1e-6, atol=1e-6
    )


def test_bernstein_polynomials_of_zuko():
    """Its two outer steps are equal, and its polynomial ends 1e-6 before the bounds."""
    transforms = pytest.importorskip("zuko.transforms")
    free, bound = 7, 4.0
    map = Bernstein(degree=free + 1, bound=bound, least=1e-12)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    raw = torch.randn(400, free, generator=generator, dtype=torch.float64)
    theirs = transforms.BernsteinTransform(raw, bound=bound, eps=1e-9)
    steps = F.softplus(torch.cat([raw[:, 1:2], raw[:, 1:], raw[:, -1:]], 1))
    scaled = torch.log(torch.expm1(steps * map.degree / (2 * bound)))
    middle = theirs.theta[:, 0] + steps.sum(1) / 2
    h = torch.cat([middle[:, None], scaled - math.log(math.e - 1)], 1)
    both_agree(map, x, h, lambda x: theirs.call_and_ladj(x), inverse=False)
    assert_close(map.inverse(x, h)[0][:, 0], theirs.inv(x[:, 0]), rtol=1e-6, atol=1e-6)


def test_gaussian_mixtures_of_zuko():
    """It multiplies the distribution function, from -1 to 1, by 1 - 1e-6."""
    transforms = pytest.importorskip("zuko.transforms")
    k = 5
    map = MixtureGaussianCDF(k)
    x, h = drawn(map, scale=0.7)
    h[:, :k] = 0.0  # its weights are equal
    at, scale = grid(k, 1.0)
    means, log_scales = h[:, k : 2 * k] + at, h[:, 2 * k :] + math.log(scale)
    inverse = (-log_scales).exp()
    theirs = transforms.GaussianizationTransform(-means * inverse, -log_scales)
    y, log_slope = map.forward(x, h)
    value = theirs(x[:, 0])
    near = y[:, 0].abs() < 4
    assert near.sum() > 350
    mass, other = (torch.erf(t / math.sqrt(2)) for t in (y[:, 0], value))
    assert_close(mass[near] * (1 - 1e-6), other[near], rtol=1e-9, atol=1e-9)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.zeros(400, k).double()),
        torch.distributions.Normal(means, log_scales.exp()),
    )
    assert_close(log_slope[:, 0], density.log_prob(x[:, 0]) - normal.log_prob(y[:, 0]))


def test_mixtures_are_those_of_scipy():
    from scipy import stats
    from scipy.special import logit

    k = 4
    x = torch.linspace(-8, 8, 50, dtype=torch.float64)[:, None]
    h = torch.randn(1, 3 * k, generator=torch.Generator().manual_seed(0)).double()
    families = (
        (MixtureGaussianCDF(k), stats.norm, stats.norm.ppf, 1.0),
        (MixtureLogisticCDF(k), stats.logistic, logit, math.pi**2 / 3),
    )
    for map, family, quantile, variance in families:
        at, scale = grid(k, variance)
        weights = h[0, :k].softmax(0).numpy()
        means = (h[0, k : 2 * k] + at).numpy()
        scales = (h[0, 2 * k :].exp() * scale).numpy()
        mass = (weights * family(means, scales).cdf(x.numpy())).sum(1)
        y = map.forward(x, h.expand(50, -1))[0][:, 0]
        middle = (mass > 1e-6) & (mass < 1 - 1e-6)
        assert_close(y[middle], torch.from_numpy(quantile(mass[middle])), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("map", [MixtureGaussianCDF(3), MixtureLogisticCDF(3)], ids=str)
def test_far_from_the_mixture_the_widest_component_decides(map):
    """y / x tends to the reciprocal of its scale, in both directions, without overflow."""
    h = torch.tensor([[0.3, 0.0, -0.5, 1.0, 0.0, -2.0, 0.4, -0.3, 0.7]], dtype=torch.float64)
    scale = grid(3, 1.0)[1] * math.exp(0.7)
    x = torch.tensor([[1e3], [1e6], [1e9], [-1e3], [-1e6], [-1e9]], dtype=torch.float64)
    y, log_slope = map.forward(x, h.expand(6, -1))
    assert_close(y / x, torch.full_like(x, 1 / scale), rtol=1e-2, atol=0)
    assert_close(log_slope, torch.full_like(x, -math.log(scale)), rtol=1e-2, atol=1e-4)


def test_the_sigmoidal_map_of_pyro():
    transforms = pytest.importorskip("pyro.distributions.transforms")
    units = 6
    map = DeepSigmoid(units=units, layers=1)
    x, h = drawn(map)
    at, scale = grid(units, math.pi**2 / 3)
    weights, slopes, shifts = h.split(units, 1)
    even = math.log(math.expm1(1 / scale))
    given = slopes + even, weights, shifts - at / scale

    def network(_):
        return tuple(t[..., None] for t in given)

    theirs = transforms.NeuralAutoregressive(network, hidden_units=units)
    y, log_slope = map.forward(x, h)
    value = theirs(x)
    assert_close(y, value, rtol=1e-6, atol=1e-6)
    assert_close(log_slope[:, 0], theirs.log_abs_det_jacobian(x, value), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("map", [DeepSigmoid(units=4), MixtureLogisticCDF(4)], ids=str)
def test_monotonic_transforms_of_zuko_have_the_same_inverse_and_slope(map):
    """It bisects on [-10, 10], and differentiates by autograd."""
    transforms = pytest.importorskip("zuko.transforms")
    x, h = drawn(map, scale=0.5)
    theirs = transforms.MonotonicTransform(
        lambda x: map.forward(x[:, None], h)[0][:, 0], bound=30.0, eps=1e-10
    )
    y, log_slope = map.forward(x, h)
    value, log_det = theirs.call_and_ladj(x[:, 0])
    assert_close(y[:, 0], value)
    assert_close(log_slope[:, 0], log_det, rtol=1e-6, atol=1e-6)
    assert_close(map.inverse(x, h)[0][:, 0], theirs.inv(x[:, 0]), rtol=1e-6, atol=1e-6)


def test_integrals_of_positive_networks_of_zuko():
    """With many bins; the error is that of the trapezoidal rule."""
    transforms = pytest.importorskip("zuko.transforms")
    torch.manual_seed(0)
    map = randomized(UMNN(signal=3, hidden=[8, 8], bins=20_000, bound=4.0))
    x, h = drawn(map, rows=12)
    x = x.clamp(-4, 4)
    h[:, 0] = 0.0
    each = h[:, 1:].t()
    rows = torch.arange(12)

    def g(u):
        """The network at u (points, 12) or (12,)."""
        flat = map.integrand(u.reshape(-1), each)
        return flat[:, rows].reshape(*u.shape, 12).diagonal(dim1=-2, dim2=-1)

    theirs = transforms.UnconstrainedMonotonicTransform(g, n=40)
    y, log_slope = map.forward(x, h)
    assert_close(y[:, 0], theirs(x[:, 0]), rtol=1e-6, atol=1e-6)
    assert_close(log_slope[:, 0], theirs.log_abs_det_jacobian(x[:, 0], None), rtol=1e-6, atol=1e-6)
    assert_close(map.inverse(y, h)[0], x, rtol=1e-6, atol=1e-6)
