"""Splines and masked networks, against autograd, nflows, naive inverses and operation counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from musigma.distributions import StandardNormal
from musigma.evaluation import saturation
from musigma.gaussian import Format
from musigma.layers import (
    MADE,
    Additive,
    Affine,
    Autoregressive,
    Coupling,
    Elementwise,
    Spline,
)
from musigma.model import Chain, Prior
from musigma.nets import MLP
from musigma.testing import randomized
from musigma.zoo import build

GOLDEN = Path(__file__).parent / "golden" / "nflows_spline.npz"


def plain(spline, x, h):
    """The same map from the formulas of the paper, differentiated by autograd."""
    k, b, least = spline.bins, spline.bound, spline.least
    raw = h.unflatten(1, (spline.outputs, -1)).movedim(1, -1)
    width, height = (
        2 * b * (least + (1 - k * least) * part.softmax(-1))
        for part in (raw[..., :k], raw[..., k : 2 * k])
    )
    shift = float(np.log(np.expm1(1 - least)))
    slopes = F.pad(least + F.softplus(raw[..., 2 * k :] + shift), (1, 1), value=1.0)
    xs, ys = (F.pad(part.cumsum(-1), (1, 0)) - b for part in (width, height))
    inside = x.abs() <= b
    z = x.clamp(-b, b)
    at = torch.searchsorted(xs.detach().contiguous(), z.detach()[..., None], right=True) - 1
    at = at.clamp(0, k - 1)

    def pick(t, i=at):
        return t.gather(-1, i)[..., 0]

    w, d, d0, d1 = pick(width), pick(height), pick(slopes), pick(slopes, at + 1)
    s, theta = d / w, (z - pick(xs)) / w
    rest = theta * (1 - theta)
    below = s + (d1 + d0 - 2 * s) * rest
    y = pick(ys) + d * (s * theta**2 + d0 * rest) / below
    slope = s**2 * (d1 * theta**2 + 2 * s * rest + d0 * (1 - theta) ** 2) / below**2
    return torch.where(inside, y, x), torch.where(inside, slope.log(), 0.0)


def drawn(spline, size, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, generator=generator, dtype=torch.float64) * spline.bound / 2
    outputs = (size[0], spline.outputs * size[1], *size[2:])
    h = torch.randn(outputs, generator=generator, dtype=torch.float64) * scale
    return x, h


SPLINES = [Spline(), Spline(bins=2, bound=1.0), Spline(bins=5, bound=3.0), Spline(bins=13)]


@pytest.mark.parametrize("spline", SPLINES, ids=str)
@pytest.mark.parametrize("size", [(40, 5), (6, 3, 4, 2)], ids=str)
def test_values_and_gradients_are_those_of_the_formulas(spline, size):
    x, h = drawn(spline, size)
    found, truth = [], []
    for results, function in ((found, spline.forward), (truth, lambda x, h: plain(spline, x, h))):
        given = x.clone().requires_grad_(), h.clone().requires_grad_()
        y, log_slope = function(*given)
        weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        loss = (weight * y).sum() + (weight.flip(0) * log_slope).sum()
        results += [y, log_slope, *torch.autograd.grad(loss, given)]
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_are_those_of_finite_differences(direction):
    spline = Spline(bins=4, bound=2.0)
    x, h = drawn(spline, (7, 2), seed=3, scale=1.0)
    x, h = x.clamp(-2.3, 2.3).requires_grad_(), h.requires_grad_()
    assert torch.autograd.gradcheck(getattr(spline, direction), (x, h), eps=1e-7, atol=1e-5)


def test_values_of_nflows():
    """Its zero slope is softplus(0); the outer ones are 1 in both."""
    with np.load(GOLDEN) as file:
        g = {name: torch.from_numpy(values) for name, values in file.items()}
    spline = Spline(bins=g["w"].shape[1], bound=float(g["bound"]))
    shift = np.log(np.expm1(1 - spline.least))
    h = torch.cat([g["w"], g["h"], g["d"] - shift], 1)
    for function, value, slope in (
        (spline.forward, "y", "log_slope"),
        (spline.inverse, "inverse", "inverse_log_slope"),
    ):
        y, log_slope = function(g["x"][:, None], h)
        torch.testing.assert_close(y[:, 0], g[value], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_slope[:, 0], g[slope], rtol=1e-8, atol=1e-9)


@given(
    st.integers(2, 12),
    st.floats(0.1, 50),
    st.floats(0, 60),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_splines_are_monotone_and_invert_at_any_scale(bins, bound, scale, seed):
    spline = Spline(bins=bins, bound=bound)
    _, h = drawn(spline, (1, 1), seed, scale)
    x = torch.linspace(-1.2 * bound, 1.2 * bound, 400, dtype=torch.float64)[:, None]
    y, log_slope = spline.forward(x, h.expand(400, -1))
    assert (y.diff(dim=0) > 0).all()
    again, back = spline.inverse(y, h.expand(400, -1))
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-7 * bound)
    outside = x.abs() > bound
    assert torch.equal(y[outside], x[outside])
    assert (log_slope[outside] == 0).all()
    assert back.isfinite().all()


def test_a_spline_with_zero_parameters_is_the_identity():
    spline = Spline(bins=6, bound=2.0)
    x = torch.tensor([[-2.0], [2.0], [0.3], [-9.0], [9.0]], dtype=torch.float64)
    y, log_slope = spline.forward(x, torch.zeros(5, spline.outputs, dtype=torch.float64))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_so(bad):
    spline = Spline()
    x = torch.tensor([[bad], [0.5]])
    y, log_slope = spline.forward(x, torch.randn(2, spline.outputs))
    assert not y[0].isfinite()
    assert y[1].isfinite()
    assert log_slope[1].isfinite()
    y, log_slope = spline.forward(x.nan_to_num(0, 0, 0), torch.full((2, spline.outputs), bad))
    assert not (y.isfinite() & log_slope.isfinite()).any()


def test_saturated_outputs_have_finite_gradients():
    for size in (50.0, -50.0):
        x = torch.linspace(-4, 4, 64)[:, None].requires_grad_()
        h = (torch.randn(64, 23).sign() * size).requires_grad_()
        y, log_slope = Spline().forward(x, h)
        (y.sum() + log_slope.sum()).backward()
        assert x.grad.isfinite().all()
        assert h.grad.isfinite().all()


def test_half_precision_is_converted_and_wrong_shapes_are_refused():
    y, _ = Spline().forward(torch.randn(3, 2).bfloat16(), torch.randn(3, 46).bfloat16())
    assert y.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"bins=8.* takes 23 numbers for each element of x \(3, 2\)"
    ):
        Spline().forward(torch.randn(3, 2), torch.randn(3, 40))
    for wrong, message in (
        ({"bins": 1}, "bins: expected 2 or more"),
        ({"bound": 0.0}, "bound: expected a positive"),
        ({"least": 0.2}, "least: expected a number between 0 and"),
    ):
        with pytest.raises(ValueError, match=message):
            Spline(**wrong)


# -- autoregressive


MAPS = {"affine": Affine(Format(scale="softclip")), "additive": Additive(), "spline": Spline()}


def masked(features, kind, **options):
    return Autoregressive(MADE(MAPS[kind].owners(features), **options), map=MAPS[kind])


@pytest.mark.parametrize("features", [1, 2, 5, 9])
@pytest.mark.parametrize("kind", ["affine", "additive", "spline"])
def test_the_jacobian_is_triangular(features, kind):
    layer = randomized(masked(features, kind, hidden=[11, 6]))
    x = 3 * torch.randn(50, features, dtype=torch.float64)  # at some, no unit is on
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0].sum(0), x).movedim(1, 0)
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    assert (jacobian.diagonal(dim1=1, dim2=2) > 0).all()
    if features > 2:
        assert (jacobian.tril(-1) != 0).any()


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_the_inverse_equals_that_of_naive_iteration(kind):
    layer = randomized(masked(6, kind, hidden=[16, 16], context=2))
    y, context = torch.randn(8, 6).double(), torch.randn(8, 2).double()
    x = torch.zeros_like(y)
    for i in range(6):  # a whole pass of the network for each feature
        x[:, i] = layer.map.inverse(y, layer.net(x, context))[0][:, i]
    found, log_det = layer.inverse(y, context)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(-log_det, layer(found, context)[1], rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(y, context)[0], x, rtol=1e-10, atol=1e-10)


def test_masked_weights_get_no_gradient():
    net = MADE([0, 1, 2, 3] * 2, hidden=[9, 9])
    net(torch.randn(5, 4)).square().sum().backward()
    assert len(net.stack.masked) == 3
    for i in net.stack.masked:
        weight, mask = net.stack.weights[i], net.stack.get_buffer(f"mask{i}")
        assert (weight.grad[mask == 0] == 0).all()
        assert (weight.grad[mask == 1] != 0).any()


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_an_inverse_costs_less_than_one_pass(kind):
    """Features are computed one after another, but each hidden unit only once."""
    layer = masked(43, kind)
    y = torch.randn(64, 43)
    work = []
    for run in (lambda: layer(y), lambda: layer.inverse(y)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        work.append(counter.get_total_flops())
    assert 0 < work[1] <= work[0]


def test_a_coupling_net_has_half_the_inputs_and_outputs():
    """The network takes one half of the features, and emits parameters for the other half."""
    layer = Coupling(MLP(21, 23 * 22, hidden=[128, 128]), map=Spline())
    x = torch.randn(16, 43)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 16 * (21 * 128 + 128 * 128 + 128 * 23 * 22)


@pytest.mark.parametrize("options", [{}, {"kind": "autoregressive"}], ids=str)
def test_densities_integrate_to_one(options):
    torch.manual_seed(0)
    model = randomized(build("nsf", (2,), depth=2, hidden=8, **options))
    side = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("name", ["maf", "nsf", "nsf autoregressive"])
@pytest.mark.slow
def test_spline_flows_learn_a_density_and_stay_finite(name):
    """Two moons, against the best Gaussian of them."""
    from musigma import data

    name, *kind = name.split()
    x = torch.from_numpy(data.load("two-moons").x[:4000])
    torch.manual_seed(0)
    model = build(name, (2,), depth=3, hidden=32, **({"kind": kind[0]} if kind else {}))
    model.calibrate(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        batch = x[torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        loss = -model.log_prob(batch).mean()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        gaussian = 0.5 * torch.logdet(2 * torch.pi * torch.e * torch.cov(x.T))
        assert -model.log_prob(x).mean() < gaussian - (0.05 if name == "maf" else 0.3)


def test_inputs_other_than_vectors_are_refused():
    for name in ("maf", "nsf"):
        with pytest.raises(ValueError, match=rf"shape: {name} is for vectors .*glow"):
            build(name, (3, 8, 8))
    with pytest.raises(ValueError, match=r"for vectors \(B, 3\); got \(2, 4\)"):
        masked(3, "affine")(torch.randn(2, 4))


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_a_density_of_one_feature(kind, context):
    model = randomized(build("nsf", (1,), kind=kind, depth=3, context=context)).double()
    given = torch.randn(5, context).double() if context else None
    x = torch.randn(5, 1).double()
    torch.testing.assert_close(model.decode(model.encode(x, given), given), x)
    grid = torch.linspace(-40, 40, 40_001).double()[:, None]
    rows = given[:1].expand(len(grid), -1) if context else None
    total = torch.trapezoid(model.log_prob(grid, rows).exp(), grid[:, 0])
    assert abs(total - 1) < 1e-4
    if context:
        assert (model.log_prob(x, given) - model.log_prob(x, given.flip(0))).abs().max() > 1e-3


def test_a_network_whose_outputs_are_in_another_order_is_refused():
    interleaved = Affine(Format("interleaved"))
    with pytest.raises(ValueError, match=r"features \[0, 0, 1, 1\].*belong to \[0, 1, 0, 1\]"):
        Autoregressive(MADE(Affine().owners(2)), map=interleaved)
    with pytest.raises(ValueError, match="halves or interleaved"):
        Affine(Format("two-heads")).owners(3)
    with pytest.raises(TypeError, match=r"expected a Format; got 0.5 .*layer Rescale"):
        Affine(0.5)


def test_saturation_covers_every_layer_with_an_affine_map():
    layers = [Coupling(MLP(2, 4, hidden=[8])), masked(4, "affine"), Elementwise(4, map=Affine())]
    model = Chain(layers, Prior(StandardNormal((4,))))
    x = torch.randn(16, 4)
    names = {"layers.0", "layers.1", "layers.2"}
    assert saturation(model, x) == dict.fromkeys(names, 0.0)
    with torch.no_grad():
        layers[1].net.stack.biases[-1][4:6] = 1e6
        layers[2].h[4] = 1e6
    assert saturation(model, x) == {"layers.0": 0.0, "layers.1": 0.5, "layers.2": 0.25}
