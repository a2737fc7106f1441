"""Formats, which read a tensor as mean and scale, and the Gaussian distribution."""

import dataclasses
import itertools
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
    kl_divergence,
)

from musigma.gaussian import DiagonalGaussian, Format, GaussianHead, Layout, Order, Scale
from musigma.nets import ZeroConv2d

LIMITED = ("atan", "tanh", "softclip", "softcap")
TWICE = {"log_std": 1.0, "log_var": 2.0}


@pytest.fixture(autouse=True)
def exact():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@st.composite
def formats(draw, **fixed):
    """Any format."""
    scale = fixed.get("scale", draw(st.sampled_from(get_args(Scale))))
    chosen = {
        "layout": draw(st.sampled_from(get_args(Layout))),
        "order": draw(st.sampled_from(get_args(Order))),
        "scale": scale,
        "dim": draw(st.sampled_from([1, 2, -1])),
        "bounds": draw(st.sampled_from([None, (-10.0, 10.0), (-2.5, 0.125)])),
        "floor": draw(st.sampled_from([0.0, 1e-4, 0.01])),
        "limit": draw(st.sampled_from([None, 0.7, 3.0])) if scale in LIMITED else None,
        "offset": draw(st.sampled_from([0.0, 2.0, -0.3])),
        "gain": draw(st.sampled_from([1.0, 0.1, -2.0])),
    }
    return Format(**chosen | fixed)


def numbers(*shape, low, high):
    return low + (high - low) * torch.rand(shape)


# -- split and join


@settings(max_examples=400, deadline=None)
@given(
    format=formats(),
    shape=st.lists(st.integers(1, 3), min_size=3, max_size=4),
    seed=st.integers(0, 9),
)
def test_split_is_the_inverse_of_join(format, shape, seed):
    torch.manual_seed(seed)
    # Slightly inside the reach, because the map has no slope at its ends; and far above the floor,
    # because smaller scales are indistinguishable from the floor.
    low, high = (max(-3.0, format.reach[0]), min(3.0, format.reach[1]))
    if format.floor:
        low = max(low, format.reach[0] + 0.2, 0.5 * math.log(format.floor))
    room = high - low
    assume(room > 0.1)
    log_std = numbers(*shape, low=low + 0.05 * room, high=high - 0.05 * room)
    mean = torch.randn(shape)
    h = format.join(mean, log_std)
    again, log_std_again = format.split(h)
    assert torch.allclose(again, mean, rtol=0, atol=1e-12)
    assert torch.allclose(log_std_again, log_std, rtol=0, atol=1e-10)


@settings(max_examples=200, deadline=None)
@given(format=formats(floor=0.0, bounds=None, gain=1.0, offset=0.0), seed=st.integers(0, 9))
def test_join_is_the_inverse_of_split(format, seed):
    torch.manual_seed(seed)
    parts = torch.randn(2, 3, 4, 2)
    h = format._pack(parts[0], parts[1].clamp(-2, 2))
    again = format.join(*format.split(h))
    for a, b in zip(again, h, strict=True):  # a pair of tensors, or the rows of one
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(format=formats())
def test_layouts_against_independent_indexing(format):
    """By an independent implementation of `layout`."""
    h = torch.randn(2, 4, 6, 2)
    size = h.shape[format.dim]
    if format.layout == "two-heads":
        h = parts = (h[0], h[1])
    elif format.layout == "per-feature":
        parts = h[..., 0], h[..., 1]
    elif format.layout == "halves":
        index = torch.arange(size)
        parts = (
            h.index_select(format.dim, index[: size // 2]),
            h.index_select(format.dim, index[size // 2 :]),
        )
    else:
        parts = (
            h.index_select(format.dim, torch.arange(0, size, 2)),
            h.index_select(format.dim, torch.arange(1, size, 2)),
        )
    if format.order == "scale-first":
        parts = parts[::-1]
    mean, log_std = format.split(h)
    assert torch.equal(mean, parts[0] * format.gain)
    assert torch.equal(log_std, format.log_std(parts[1] * format.gain))


@settings(max_examples=300, deadline=None)
@given(format=formats())
def test_text_round_trips(format):
    assert Format.parse(str(format)) == format
    assert hash(Format.parse(str(format))) == hash(format)


@settings(max_examples=100, deadline=None)
@given(format=formats())
def test_every_log_std_is_within_the_reach(format):
    """No output of a network leaves the reach, and extreme outputs approach its ends."""
    raw = torch.cat([torch.linspace(-60, 60, 20001), torch.tensor([-1e9, 1e9])])
    log_std, (low, high) = format.log_std(raw), format.reach
    assert log_std.isfinite().all()
    assert (log_std.diff()[:-2] >= -1e-12).all(), "not monotone"
    slack = 1e-9 + 1e-9 * abs(low if math.isfinite(low) else 0)
    assert log_std.min() >= low - slack
    assert log_std.max() <= high + slack
    if math.isfinite(low):
        assert log_std.min() <= low + 2e-3
    if math.isfinite(high):
        assert log_std.max() >= high - 2e-3


# -- other layouts of one layer


def layer(kind, features):
    """A last layer, as a function of its parameters, with an input."""
    if kind == "linear":
        x = torch.randn(5, 4)
        return x, torch.randn(features, 4), torch.randn(features), F.linear
    x = torch.randn(5, 4, 3, 3)
    weight, bias = torch.randn(features, 4, 3, 3), torch.randn(features)
    return x, weight, bias, lambda x, w, b: F.conv2d(x, w, b, padding=1)


def emit(format, run, x, weight, bias):
    """The output of a network with this last layer, in its layout."""
    if format.layout == "two-heads":
        pairs = zip(weight, bias, strict=True)
        return tuple(run(x, w, b) for w, b in pairs)
    h = run(x, weight, bias)
    return h.unflatten(1, (-1, 2)).movedim(2, -1) if format.layout == "per-feature" else h


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scale", get_args(Scale))
def test_permuted_last_layers_are_equivalent(kind, scale):
    x, weight, bias, run = layer(kind, 6)
    start = Format(scale=scale, offset=0.3)
    truth = start.split(run(x, weight, bias))
    for layout, order in itertools.product(get_args(Layout), get_args(Order)):
        to = dataclasses.replace(start, layout=layout, order=order)
        moved = start.permute(weight, bias, to)
        by_hand = start.relayout(weight, to), start.relayout(bias, to)
        for ours, theirs in zip(moved, by_hand, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        result = to.split(emit(to, run, x, *moved))
        back = to.permute(*moved, start)
        assert torch.equal(back[0], weight)
        assert torch.equal(back[1], bias)
        for ours, theirs in zip(result, truth, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12), str(to)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("a", "b"), [("log_std", "log_var"), ("log_var", "log_std")])
def test_log_std_and_log_var_differ_by_a_factor_of_two(kind, a, b):
    x, weight, bias, run = layer(kind, 6)
    start = Format(scale=a, offset=TWICE[a] * 0.7, bounds=(-1.5, 1.5))
    truth = start.split(run(x, weight, bias))
    for layout in get_args(Layout):
        to = Format(layout, scale=b, offset=TWICE[b] * 0.7, bounds=(-1.5, 1.5))
        moved = start.permute(weight, bias, to)
        for ours, theirs in zip(to.split(emit(to, run, x, *moved)), truth, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        assert torch.equal(to.permute(*moved, start)[0], weight)
    assert start.permute(weight, None, start)[1] is None


def test_cross_is_a_permutation_of_split():
    """Even and odd channels or halves (Glow's "cross" and "split") are the same model."""
    cross, halves = Format.parse("cross"), Format.parse("split")
    conv = ZeroConv2d(3, 8)
    for p in conv.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 3, 5, 5)
    other = ZeroConv2d(3, 8)
    weight, bias = cross.permute(conv.conv.weight, conv.conv.bias, halves)
    other.load_state_dict(
        {"conv.weight": weight, "conv.bias": bias, "logs": cross.relayout(conv.logs, halves)}
    )
    for a, b in zip(cross.split(conv(x)), halves.split(other(x)), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_halves_of_one_layer_equal_two_heads():
    layer, x = nn.Linear(5, 8), torch.randn(3, 5)
    two = Format("two-heads")
    (w1, w2), (b1, b2) = Format().permute(layer.weight, layer.bias, two)
    mean, log_std = Format().split(layer(x))
    assert torch.equal(F.linear(x, w1, b1), mean)
    assert torch.equal(F.linear(x, w2, b2), log_std)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("log_std", "softplus"),
        ("softplus", "squareplus"),
        ("sigmoid+2", "2*sigmoid"),
        ("tanh", "log_std"),
        ("log_std", "log_std bounds=none"),
        ("log_std floor=0.1", "log_var floor=0.01"),
        ("atan", "atan limit=3"),
        ("log_std", "log_std gain=0.1"),
        ("log_std", "log_std offset=1"),
        ("log_std offset=1", "log_var offset=1"),
    ],
)
def test_conversions_that_no_layer_can_express_are_refused(a, b):
    a, b = Format.parse(a), Format.parse(b)
    with pytest.raises(ValueError, match="keep the format, or train again"):
        a.permute(torch.randn(6, 2), torch.randn(6), b)


# -- the format of each library, written out


def clamped(t, low, high):
    return torch.minimum(torch.maximum(t, torch.tensor(low)), torch.tensor(high))


def halves(h):
    return h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]


def even_odd(h):
    return h[:, 0::2], h[:, 1::2]


def features(h):
    return h[..., 0], h[..., 1]


def two(h):
    return h


OTHERS = {  # format, how that code takes the tensor apart, (first, second) -> (mean, std)
    "glow split prior": ("cross log_std", even_odd, lambda a, b: (a, b.exp())),
    "glow coupling": ("cross sigmoid+2", even_odd, lambda a, b: (a, 1 / (1 + (-b - 2).exp()))),
    "glow top prior": ("halves", halves, lambda a, b: (a, b.exp())),
    "rosinality coupling": (
        "halves scale-first sigmoid+2",
        halves,
        lambda a, b: (b, torch.sigmoid(a + 2)),
    ),
    "vdvae": ("halves log_std", halves, lambda a, b: (a, b.exp())),
    "diffusers": (
        "halves log_var bounds=-15,10",
        halves,
        lambda a, b: (a, (0.5 * clamped(b, -30.0, 20.0)).exp()),
    ),
    "diffusers oobleck": (
        "halves softplus floor=1e-4 bounds=none",
        halves,
        lambda a, b: (a, (1 + b.exp()).log() + 1e-4),
    ),
    "pythae": ("two-heads log_var bounds=none", two, lambda a, b: (a, (0.5 * b).exp())),
    "disvae": (
        "per-feature log_var bounds=none",
        features,
        lambda a, b: (a, (0.5 * b).exp()),
    ),
    "normflows encoder": ("halves log_var", halves, lambda a, b: (a, b.exp().sqrt())),
    "normflows coupling": ("interleaved log_std", even_odd, lambda a, b: (a, b.exp())),
    "nflows normal": ("halves log_std dim=-1", None, lambda a, b: (a, b.exp())),
    "nflows coupling": (
        "halves sigmoid+2 floor=1e-3",
        halves,
        lambda a, b: (a, torch.sigmoid(b + 2) + 1e-3),
    ),
    "nflows coupling, general": (
        f"halves softplus floor=1e-3 bounds=-100,{math.log(3.0)}",
        halves,
        lambda a, b: (a, clamped(F.softplus(b) + 1e-3, 0.0, 3.0)),
    ),
    "nflows made": (
        "per-feature scale-first softplus floor=1e-3",
        features,
        lambda a, b: (b, F.softplus(a) + 1e-3),
    ),
    "survae normal": ("halves log_std dim=2", None, lambda a, b: (a, b.exp())),
    "survae 'sequential'": (
        "interleaved scale-first log_std",
        even_odd,
        lambda a, b: (b, a.exp()),
    ),
    "freia glow": (
        "halves scale-first atan",
        halves,
        lambda a, b: (b, (2 * 0.636 * torch.atan(a / 2)).exp()),
    ),
    "freia all-in-one": (
        "halves scale-first tanh gain=0.1",
        halves,
        lambda a, b: (0.1 * b, (2 * torch.tanh(0.1 * a)).exp()),
    ),
    "zuko": (
        "per-feature softclip",
        features,
        lambda a, b: (a, (b / (1 + abs(b / math.log(1e3)))).exp()),
    ),
    "flowjax": ("two-heads softplus", two, lambda a, b: (a, F.softplus(b))),
    "flowjax, default": (
        "two-heads softplus floor=1e-2",
        two,
        lambda a, b: (a, F.softplus(b) + 1e-2),
    ),
    "tarflow": ("halves scale-first log_std", halves, lambda a, b: (b, a.exp())),
    "jet": ("halves 2*sigmoid", halves, lambda a, b: (a, 2 * torch.sigmoid(b))),
    "resflow coupling": (
        "halves scale-first sigmoid+2",
        halves,
        lambda a, b: (b, torch.sigmoid(a + 2)),
    ),
    "local bits-back": (
        "halves tanh limit=0.8",
        halves,
        lambda a, b: (a, (0.8 * torch.tanh(b)).exp()),
    ),
    "pyro": (
        "two-heads log_std bounds=-5,3",
        two,
        lambda a, b: (a, clamped(b, -5.0, 3.0).exp()),
    ),
    "tfp glow coupling": (
        "halves scale-first sigmoid+2",
        halves,
        lambda a, b: (b, torch.sigmoid(a + 2)),
    ),
    "tfp glow exit": (
        "halves scale-first log_std offset=2",
        halves,
        lambda a, b: (b, (a + 2).exp()),
    ),
    "distrax": ("two-heads log_std", two, lambda a, b: (a, b.exp())),
    "distrax, capped": (
        f"two-heads softcap limit={math.log(5.0)}",
        two,
        lambda a, b: (a, (math.log(5) - F.softplus(math.log(5) - b)).exp()),
    ),
    "scvi": (
        "two-heads log_var floor=1e-4 bounds=none",
        two,
        lambda a, b: (a, (b.exp() + 1e-4).sqrt()),
    ),
    "intro_dgm": (
        "halves log_var bounds=-3.5,1",
        halves,
        lambda a, b: (a, (0.5 * F.hardtanh(b, -7.0, 2.0)).exp()),
    ),
    "givt": (
        "two-heads squareplus floor=1e-6",
        two,
        lambda a, b: (a, (b + (b**2 + 4).sqrt()) / 2 + 1e-6),
    ),
    "craystack": ("two-heads log_std", two, lambda a, b: (a, b.exp())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_formats_of_other_libraries(name):
    text, take, formula = OTHERS[name]
    format = Format.parse(text)
    h = 3 * torch.randn(6, 4, 8, 2)
    if take is two:
        h = (h[0], h[1])
    elif take is None:
        dim, size = format.dim, h.shape[format.dim] // 2

        def take(h):
            return h.narrow(dim, 0, size), h.narrow(dim, size, size)

    mean, std = formula(*take(h))
    ours, log_std = format.split(h)
    assert torch.allclose(ours, mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(log_std.exp(), std, rtol=1e-12, atol=0)


# -- limits


def test_saturation_is_the_share_of_scales_at_a_limit():
    h = torch.zeros(2, 8)
    h[0, 4:6] = torch.tensor([10.5, -11.0])
    assert Format().saturation(h) == 2 / 8
    h[1, 4] = 200.0
    assert Format(scale="tanh").saturation(h).item() == pytest.approx(3 / 8)
    assert Format(scale="log_std", bounds=None).saturation(h) == 0
    assert Format(scale="log_var", floor=1.0, bounds=None).saturation(h) == 1 / 8
    with torch.no_grad():
        assert Format().saturation(h) == 3 / 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", get_args(Scale))
def test_extreme_outputs_are_finite_by_default(scale, dtype):
    """Values, densities and gradients are finite for any output of a network."""
    raw = torch.tensor([-6e4, -300.0, -100.0, -31.0, 0.0, 31.0, 100.0, 300.0, 6e4])
    h = torch.stack([torch.ones_like(raw), raw], -1).to(dtype).requires_grad_()
    dist = DiagonalGaussian(*Format("per-feature", scale=scale).split(h), 1)
    log_prob = dist.log_prob(torch.zeros(9, dtype=dtype))
    assert log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    kl = kl_divergence(dist, DiagonalGaussian(torch.zeros(9), torch.zeros(9), 1))
    assert log_prob.isfinite()
    assert kl.isfinite()
    (log_prob + dist.rsample().sum()).backward()
    if dtype != torch.float16:  # whose largest number, 65504, is less than 1/std² may be
        assert h.grad.isfinite().all()


# -- the distribution


def pair(*shape, event_ndims, draw=None):
    mean, log_std = torch.randn(2, *shape)
    ours = DiagonalGaussian(mean, log_std, event_ndims)
    return ours, Independent(Normal(mean, log_std.exp()), event_ndims)


SHAPES = [((5,), 1), ((4, 3), 1), ((4, 3), 0), ((4, 3), 2), ((2, 4, 3, 2), 3), ((2, 3, 4), 1)]


@pytest.mark.parametrize(("shape", "event_ndims"), SHAPES)
def test_densities_equal_those_of_torch(shape, event_ndims):
    ours, theirs = pair(*shape, event_ndims=event_ndims)
    other, other_theirs = pair(*shape, event_ndims=event_ndims)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    x = theirs.sample((3,))
    for a, b in [
        (ours.log_prob(x), theirs.log_prob(x)),
        (ours.entropy(), theirs.entropy()),
        (ours.mean, theirs.mean),
        (ours.mode, theirs.mode),
        (ours.stddev, theirs.stddev),
        (ours.variance, theirs.variance),
        (kl_divergence(ours, other), kl_divergence(theirs, other_theirs)),
    ]:
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        assert a.shape == b.shape
    torch.manual_seed(1)
    drawn = ours.rsample((2,))
    torch.manual_seed(1)
    assert torch.allclose(drawn, theirs.rsample((2,)), rtol=1e-12, atol=1e-12)
    assert not ours.sample().requires_grad
    wide = ours.expand((2, *ours.batch_shape))
    assert torch.allclose(wide.log_prob(x[:2]), theirs.log_prob(x[:2]), rtol=1e-12, atol=1e-12)
    assert wide.event_shape == theirs.event_shape


def test_the_distribution_works_in_torchs_wrappers():
    mean, log_std = torch.randn(2, 4, 3, 2)
    ours, theirs = DiagonalGaussian(mean, log_std, 1), Normal(mean, log_std.exp())
    x = torch.randn(4, 3, 2)
    a = Independent(ours, 1)
    b = Independent(theirs, 2)
    assert a.event_shape == b.event_shape
    assert torch.allclose(a.log_prob(x), b.log_prob(x), atol=1e-12)
    assert a.rsample((2,)).shape == (2, 4, 3, 2)
    move = [AffineTransform(0.3, 2.0, event_dim=1)]
    a = TransformedDistribution(ours, move, validate_args=False)
    b = TransformedDistribution(Independent(theirs, 1), move, validate_args=False)
    assert torch.allclose(a.log_prob(x), b.log_prob(x), atol=1e-12)
    weights = Categorical(logits=torch.randn(4, 3))
    a = MixtureSameFamily(weights, ours)
    b = MixtureSameFamily(weights, Independent(theirs, 1))
    assert torch.allclose(a.log_prob(x[:, 0]), b.log_prob(x[:, 0]), atol=1e-12)
    assert torch.allclose(a.mean, b.mean)
    assert torch.allclose(a.variance, b.variance)
    assert a.sample((5,)).shape == (5, 4, 2)


def test_kl_is_zero_for_equal_gaussians_and_needs_equal_event_shapes():
    (p, _), (q, _) = pair(4, 3, event_ndims=1), pair(4, 3, event_ndims=1)
    assert kl_divergence(p, p).abs().max() < 1e-14
    assert (kl_divergence(p, q) > 0).all()
    with pytest.raises(ValueError, match="event shape of q"):
        kl_divergence(p, pair(4, 5, event_ndims=1)[0])


def test_temperature_multiplies_the_standard_deviation():
    dist = DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4), 1)
    draws = {}
    for t in (0.0, 0.5, 1.0):
        torch.manual_seed(1)
        draws[t] = dist.rsample((6,), temperature=t)
    assert torch.equal(draws[0.0], dist.mean.expand(6, 3, 4))
    halfway = dist.mean + 0.5 * (draws[1.0] - dist.mean)
    assert torch.allclose(draws[0.5], halfway, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    each = dist.rsample((6,), temperature=torch.tensor([0.0, 0.5, 1.0, 0.0, 0.5, 1.0]))
    truth = [draws[t][i] for i, t in enumerate([0.0, 0.5, 1.0] * 2)]
    assert torch.allclose(each, torch.stack(truth), rtol=0, atol=1e-12)
    torch.manual_seed(2)
    n = 40_000
    many = DiagonalGaussian(torch.zeros(1), torch.tensor([0.7]), 1).sample((n,), temperature=0.3)
    expected = 0.3 * math.exp(0.7)
    assert abs(many.std() / expected - 1) < 4 / math.sqrt(2 * n)  # four standard errors


def test_whitened_values_are_standard_normal():
    dist = DiagonalGaussian(torch.randn(3, 4), 3 * torch.randn(3, 4), 1)
    x, noise = torch.randn(2, 3, 4)
    assert torch.allclose(dist.unwhiten(dist.whiten(x)), x, rtol=1e-12, atol=1e-12)
    assert torch.allclose(dist.whiten(dist.unwhiten(noise)), noise, rtol=1e-9, atol=1e-9)
    standard = Normal(0.0, 1.0).log_prob(noise).sum(1) - dist.log_std.sum(1)
    assert torch.allclose(dist.log_prob(dist.unwhiten(noise)), standard, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32(dtype):
    """The density equals that of the same numbers in float32."""
    torch.set_default_dtype(torch.float32)
    mean, log_std, x = (torch.randn(3, 64).to(dtype) for _ in range(3))
    low = DiagonalGaussian(mean, log_std, 1)
    high = DiagonalGaussian(mean.float(), log_std.float(), 1)
    assert low.log_prob(x).dtype == torch.float32
    assert torch.equal(low.log_prob(x), high.log_prob(x.float()))
    assert torch.equal(low.entropy(), high.entropy())
    assert torch.equal(kl_divergence(low, high), kl_divergence(high, high))
    assert low.rsample().dtype == torch.float32
    h = torch.cat([mean, log_std], 1)
    assert all(t.dtype == torch.float32 for t in Format().split(h))


def test_autocast_affects_only_the_network():
    torch.set_default_dtype(torch.float32)
    head = GaussianHead(nn.Linear(8, 64), event_ndims=1)
    given, x = torch.randn(3, 8), torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        h = head.net(given)
        dist = head(given)
        log_prob, entropy, draw = dist.log_prob(x), dist.entropy(), dist.rsample()
        kl = kl_divergence(dist, DiagonalGaussian(torch.zeros(32), torch.zeros(32), 1))
    assert h.dtype == torch.bfloat16
    assert {t.dtype for t in (log_prob, entropy, draw, kl, dist.mean)} == {torch.float32}
    outside = DiagonalGaussian(*head.format.split(h), 1)
    assert torch.equal(log_prob, outside.log_prob(x))
    assert torch.equal(entropy, outside.entropy())


@pytest.mark.parametrize("log_std", [0.5, "shared"])
def test_a_fixed_or_learned_scale(log_std):
    fixed = torch.tensor([[0.5]]) if log_std == "shared" else log_std
    head = GaussianHead(nn.Conv2d(3, 4, 1), event_ndims=3, log_std=fixed)
    dist = head(torch.randn(2, 3, 5, 6))
    assert dist.event_shape == (4, 5, 6)
    assert torch.equal(dist.log_std, torch.full((2, 4, 5, 6), 0.5))
    assert len(list(head.parameters())) == (3 if log_std == "shared" else 2)
    assert ("log_std" in head.state_dict()) == (log_std == "shared")
    wild = GaussianHead(nn.Conv2d(3, 4, 1), event_ndims=3, log_std=torch.tensor(1e9))
    assert (wild(torch.randn(2, 3, 5, 6)).log_std == 10).all()


# -- messages


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Format(layout="cross"), "layout: expected one of halves, .*; got 'cross'"),
        (lambda: Format(order="std-first"), "order: expected one of mean-first, .*'std-first'"),
        (lambda: Format(scale="sigma"), "scale: expected one of log_std, .*; got 'sigma'"),
        (lambda: Format(limit=2.0), "limit: scale 'log_std' has none; got 2.0"),
        (lambda: Format(scale="tanh", limit=-1.0), "limit: expected a positive number; got -1.0"),
        (lambda: Format(bounds=(3.0, -3.0)), "bounds: expected .* low < high"),
        (lambda: Format(bounds=(1.0,)), "bounds: expected"),
        (lambda: Format(floor=-1.0), "floor: expected 0 or more"),
        (lambda: Format(gain=0.0), "gain: expected a number other than zero"),
        (
            lambda: Format.parse("interleaved logvar"),
            "unknown word 'logvar'; did you mean 'log_var'",
        ),
        (lambda: Format.parse("floor=x"), "cannot read the number in 'floor=x'"),
        (lambda: Format.parse("halves cross"), "layout is given twice"),
        (lambda: Format().split(torch.zeros(2, 5)), r"even number of channels on axis 1; got \(2"),
        (lambda: Format().split(torch.zeros(5)), "even number of channels on axis 1"),
        (lambda: Format().split((torch.zeros(2), torch.zeros(2))), "got .* and "),
        (lambda: Format("two-heads").split(torch.zeros(2, 4)), "a pair of tensors of one shape"),
        (
            lambda: Format("two-heads").split((torch.zeros(2, 4), torch.zeros(2, 3))),
            r"pair of tensors of one shape; got \(2, 4\) and \(2, 3\)",
        ),
        (lambda: Format("per-feature").split(torch.zeros(2, 4)), "last axis of size 2"),
        (
            lambda: Format(scale="sigmoid+2").join(torch.zeros(1, 1), torch.ones(1, 1)),
            "reaches from -10 to 0; got values from 1 to 1",
        ),
        (
            lambda: Format(floor=0.1).join(torch.zeros(1, 1), torch.full((1, 1), -5.0)),
            "log_std: .* reaches from -2.303",
        ),
        (
            lambda: DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 4), 1),
            r"log_std: shape \(2, 4\) does not broadcast .* mean, \(2, 3\)",
        ),
        (
            lambda: DiagonalGaussian(torch.zeros(3), torch.zeros(3), 2),
            r"event_ndims: expected 0 to 1 for shape \(3,\); got 2",
        ),
        (
            lambda: kl_divergence(
                DiagonalGaussian(torch.zeros(3), torch.zeros(3), 1),
                DiagonalGaussian(torch.zeros(4), torch.zeros(4), 1),
            ),
            r"p: expected the event shape of q, \(3,\); got \(4,\)",
        ),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repr():
    dist = DiagonalGaussian(torch.zeros(2, 3), torch.zeros(3), 1)
    assert repr(dist).startswith("DiagonalGaussian(batch_shape=(2,), event_shape=(3,)")
    assert "interleaved mean-first log_var" in repr(
        GaussianHead(nn.Linear(2, 4), event_ndims=1, format=Format.parse("cross log_var"))
    )
