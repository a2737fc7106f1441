"""The one Gaussian: the catalogue of heads, exact conversions, and torch as a witness."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
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

from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.nets import ZeroConv2d

LAYOUTS = ["halves", "interleaved", "two-heads", "per-feature"]
ORDERS = ["mean-first", "scale-first"]
SCALES = [
    *["log_std", "log_var", "softplus", "squareplus", "sigmoid+2", "2*sigmoid"],
    *["atan", "tanh", "softclip", "softcap"],
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


formats = st.builds(
    lambda layout, order, scale, floor, offset, gain, bounds: Format(
        layout, order, scale, floor=floor, offset=offset, gain=gain, bounds=bounds
    ),
    st.sampled_from(LAYOUTS),
    st.sampled_from(ORDERS),
    st.sampled_from(SCALES),
    st.sampled_from([0.0, 1e-4, 0.05]),
    st.sampled_from([0.0, 2.0, -1.5]),
    st.sampled_from([1.0, 0.1, -2.0]),
    st.sampled_from([None, (-10.0, 10.0), (-3.0, 2.0)]),
)


@given(
    formats,
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_join_is_the_inverse_of_split(f, more, seed):
    shape = (3, 4, *more)
    low, high = f.reach
    low, high = max(low, -5.0) + 1e-2, min(high, 3.0) - 1e-2
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    log_std = low + (high - low) * uniform
    again = f.split(f.join(mean, log_std))
    assert torch.allclose(again[0], mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(again[1], log_std, rtol=1e-9, atol=1e-9)


@given(formats)
@settings(max_examples=200, deadline=None)
def test_text_says_all(f):
    assert Format.parse(str(f)) == f


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_any_axis(layout, dim):
    f = Format(layout, dim=dim, bounds=None)
    h = torch.randn(3, 4, 6)
    mean, log_std = f.split(h)
    size = h.shape[dim] // 2
    assert mean.shape[dim] == log_std.shape[dim] == size
    index = torch.arange(h.shape[dim])
    first = index < size if layout == "halves" else index % 2 == 0
    assert torch.equal(mean, h.index_select(dim, index[first]))
    assert torch.equal(log_std, h.index_select(dim, index[~first]))
    assert torch.equal(f.join(mean, log_std), h)


# -- conversions of a last layer


def emitted(layer, weight, bias, x, f):
    """(mean, log_std) of a layer given by its parameters, in a format."""
    apply = F.linear if isinstance(layer, nn.Linear) else F.conv2d
    if f.layout == "two-heads":
        return f.split([apply(x, w, b) for w, b in zip(weight, bias, strict=True)])
    h = apply(x, weight, bias)
    if f.layout == "per-feature":
        h = h.unflatten(1, (-1, 2)).movedim(2, -1)
    return f.split(h)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [("log_std",) * 2, ("log_std", "log_var"), ("tanh",) * 2])
def test_permuted_layer_emits_the_same_gaussian(kind, order, layout, scales):
    layer, x = (
        (nn.Linear(5, 8), torch.randn(3, 5))
        if kind == "linear"
        else (nn.Conv2d(5, 8, 3), torch.randn(3, 5, 6, 4))
    )
    layer, x = layer.double(), x.double()
    source, target = Format(scale=scales[0]), Format(layout, order, scales[1])
    truth = emitted(layer, layer.weight, layer.bias, x, source)
    weight, bias = source.permute(layer.weight, layer.bias, target)
    there = emitted(layer, weight, bias, x, target)
    back = emitted(layer, *target.permute(weight, bias, source), x, source)
    for got in (there, back):
        for a, b in zip(got, truth, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_cross_split_is_a_permutation_of_half_split_with_its_gain():
    """Glow's question: even and odd channels or halves, it is the same model."""
    cross, halves = Format.parse("cross"), Format.parse("split")
    conv = ZeroConv2d(3, 8).double()
    for p in conv.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 3, 5, 5).double()
    other = ZeroConv2d(3, 8).double()
    weight, bias = cross.permute(conv.conv.weight, conv.conv.bias, halves)
    other.load_state_dict(
        {"conv.weight": weight, "conv.bias": bias, "logs": cross.relayout(conv.logs, halves)}
    )
    for a, b in zip(cross.split(conv(x)), halves.split(other(x)), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_one_layer_that_is_split_equals_two_layers():
    layer, x = nn.Linear(5, 8).double(), torch.randn(3, 5).double()
    two = Format("two-heads")
    (w1, w2), (b1, b2) = Format().permute(layer.weight, layer.bias, two)
    mean, log_std = Format().split(layer(x))
    assert torch.equal(F.linear(x, w1, b1), mean)
    assert torch.equal(F.linear(x, w2, b2), log_std)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("log_std", "softplus"),
        ("log_var", "sigmoid+2"),
        ("tanh", "tanh limit=3"),
        ("log_std", "log_std bounds=-5,5"),
        ("log_std", "log_std floor=1e-3"),
        ("log_std floor=1e-3", "log_var floor=1e-3"),
        ("log_std offset=2", "log_var offset=2"),
        ("log_std", "log_std gain=0.1"),
    ],
)
def test_any_other_conversion_is_refused(source, target):
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="no last layer makes them equal"):
        Format.parse(source).permute(layer.weight, layer.bias, Format.parse(target))


def test_offset_follows_the_factor():
    layer, x = nn.Linear(5, 8).double(), torch.randn(3, 5).double()
    a, b = Format.parse("log_std offset=2"), Format.parse("interleaved log_var offset=4")
    weight, bias = a.permute(layer.weight, layer.bias, b)
    for p, q in zip(a.split(layer(x)), b.split(F.linear(x, weight, bias)), strict=True):
        assert (p - q).abs().max() < 1e-12


# -- the catalogue of heads that others have, each against its own formula for (mean, std)

H = torch.cat([torch.linspace(-9, 9, 36), torch.randn(12)]).double().reshape(3, 16)
A, B = H[:, :8], H[:, 8:]
EVEN, ODD = H[:, ::2], H[:, 1::2]

CATALOGUE = {
    "glow split prior": ("cross log_std", (EVEN, ODD.exp())),
    "glow coupling": ("cross sigmoid+2", (EVEN, torch.sigmoid(ODD + 2))),
    "glow top prior": ("split log_std", (A, B.exp())),
    "rosinality coupling": ("scale-first sigmoid+2", (B, torch.sigmoid(A + 2))),
    "vdvae": ("halves log_std", (A, B.exp())),
    "diffusers": ("log_var bounds=-15,10", (A, (0.5 * B.clamp(-30, 20)).exp())),
    "oobleck": ("softplus floor=1e-4", (A, F.softplus(B) + 1e-4)),
    "disvae": ("interleaved log_var", (EVEN, (0.5 * ODD).exp())),
    "normflows coupling": ("interleaved log_std", (EVEN, ODD.exp())),
    "nflows coupling": ("sigmoid+2 floor=1e-3", (A, torch.sigmoid(B + 2) + 1e-3)),
    "nflows general": (
        f"softplus floor=1e-3 bounds=-30,{math.log(3)!r}",
        (A, (F.softplus(B) + 1e-3).clamp(0, 3)),
    ),
    "nflows made": ("interleaved scale-first softplus", (ODD, F.softplus(EVEN))),
    "survae sequential": ("interleaved scale-first", (ODD, EVEN.exp())),
    "freia": ("scale-first atan limit=2", (B, (2 * 0.636 * torch.atan(A / 2)).exp())),
    "freia all in one": (
        "scale-first tanh limit=2 gain=0.1",
        (0.1 * B, (2 * torch.tanh(0.1 * A)).exp()),
    ),
    "zuko": (
        "softclip",
        (A, (B / (1 + (B / math.log(1e-3)).abs())).exp()),
    ),
    "flowjax": ("softplus floor=1e-2", (A, F.softplus(B) + 1e-2)),
    "tarflow": ("scale-first log_std", (B, A.exp())),
    "jet": ("2*sigmoid", (A, 2 * torch.sigmoid(B))),
    "local bits-back": ("tanh limit=1.5", (A, (1.5 * torch.tanh(B)).exp())),
    "pyro": ("log_std bounds=-5,3", (A, B.clamp(-5, 3).exp())),
    "tfp glow": ("scale-first sigmoid+2", (B, torch.sigmoid(A + 2))),
    "tfp glow exits": ("scale-first log_std offset=2 bounds=none", (B, (A + 2).exp())),
    "distrax": (
        "softcap limit=1.2",
        (A, (1.2 - F.softplus(1.2 - B)).exp()),
    ),
    "scvi": ("log_var floor=1e-4", (A, (B.exp() + 1e-4).sqrt())),
    "intro_dgm": ("log_var bounds=-3.5,1", (A, (0.5 * B.clamp(-7, 2)).exp())),
    "givt": ("squareplus floor=1e-6", (A, (B + (B.square() + 4).sqrt()) / 2 + 1e-6)),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue(name):
    text, (mean, std) = CATALOGUE[name]
    got_mean, log_std = Format.parse(text).split(H)
    assert torch.allclose(got_mean, mean, rtol=1e-14)
    assert torch.allclose(log_std.exp(), std, rtol=1e-10, atol=0)


def test_pair_of_layers():
    mean, log_std = Format("two-heads", scale="log_var").split((A, B))
    assert torch.equal(mean, A)
    assert torch.equal(log_std, B / 2)


# -- limits


def test_default_bounds_keep_densities_finite():
    h = torch.tensor([[0.0, 0.0, 0.0, -100.0, 100.0, 1e30]])
    mean, log_std = Format().split(h)
    g = DiagonalGaussian(mean, log_std, 1)
    assert g.log_prob(torch.ones(1, 3)).isfinite()
    assert kl_divergence(g, DiagonalGaussian(mean, torch.zeros(1, 3), 1)).isfinite()
    assert log_std.tolist() == [[-10, 10, 10]]


def test_share_of_saturated_units():
    h = torch.tensor([[0.0, 0.0, 0.0, 0.0, -11.0, 11.0, 1.0, -1.0]])
    assert Format().saturation(h) == 0.5
    assert Format(bounds=None).saturation(h) == 0.0
    assert Format(scale="tanh").saturation(h) == 0.5
    assert Format(scale="softplus", floor=0.1, bounds=None).saturation(h) == 0.25


def test_extreme_raw_values_have_finite_log_std_and_gradient():
    for scale in SCALES:
        raw = torch.tensor([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4], requires_grad=True)
        log_std = Format(scale=scale).log_std(raw)
        assert log_std.isfinite().all(), scale
        (gradient,) = torch.autograd.grad(log_std.sum(), raw)
        assert gradient.isfinite().all(), scale


# -- errors say what was expected, and what came


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format("thirds"), "layout: expected one of halves"),
        (lambda: Format(scale="sigma"), "scale: expected one of log_std"),
        (lambda: Format(bounds=(1.0, -1.0)), "bounds: expected"),
        (lambda: Format(bounds=(1.0,)), "bounds: expected"),
        (lambda: Format(floor=-1.0), "floor: expected 0 or more"),
        (lambda: Format(limit=3.0), "limit: scale 'log_std' has none"),
        (lambda: Format(scale="tanh", limit=0.0), "limit: expected a positive"),
        (lambda: Format(gain=0.0), "gain: expected"),
        (lambda: Format.parse("log_vr"), "did you mean 'log_var'"),
        (lambda: Format.parse("halves split"), "layout is given twice"),
        (lambda: Format.parse("floor=much"), "cannot read the number"),
        (lambda: Format().split(torch.randn(2, 3)), r"even number of channels on axis 1; got \(2"),
        (lambda: Format().split([torch.randn(2, 3)] * 2), "reads one tensor"),
        (lambda: Format("two-heads").split(torch.randn(2, 4)), "reads a pair"),
        (lambda: Format("two-heads").split([torch.randn(2), torch.randn(3)]), "of one shape"),
        (lambda: Format("per-feature").split(torch.randn(2, 3)), "last axis of size 2"),
        (
            lambda: Format(scale="sigmoid+2").join(torch.zeros(2), torch.ones(2)),
            "log_std: .* reaches from",
        ),
        (lambda: DiagonalGaussian(torch.zeros(2, 3), torch.zeros(4), 1), "does not broadcast"),
        (lambda: DiagonalGaussian(torch.zeros(3), torch.zeros(3), 2), "event_ndims: expected 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- the distribution, against torch's


def pair(*shape, event_ndims=2, dtype=torch.float64):
    mean, log_std = torch.randn(*shape, dtype=dtype), 0.5 * torch.randn(*shape, dtype=dtype)
    ours = DiagonalGaussian(mean, log_std, event_ndims)
    return ours, Independent(Normal(mean, log_std.exp()), event_ndims)


@pytest.mark.parametrize("event_ndims", [0, 1, 2, 3])
def test_against_independent_normal(event_ndims):
    (ours, theirs), (p, q) = (pair(4, 3, 5, event_ndims=event_ndims) for _ in range(2))
    x = torch.randn(4, 3, 5).double()
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    for a, b in (
        (ours.log_prob(x), theirs.log_prob(x)),
        (ours.entropy(), theirs.entropy()),
        (ours.mean, theirs.mean),
        (ours.mode, theirs.mode),
        (ours.stddev, theirs.stddev),
        (ours.variance, theirs.variance),
        (kl_divergence(ours, p), kl_divergence(theirs, q)),
    ):
        assert torch.allclose(a, b, rtol=1e-12)
    torch.manual_seed(1)
    a = ours.rsample((2,))
    torch.manual_seed(1)
    assert torch.allclose(a, theirs.rsample((2,)))


def test_inside_torchs_own_distributions():
    ours, theirs = pair(4, 3, event_ndims=1)
    x = torch.randn(4, 3).double()
    wide = [d.expand((7, 4)).log_prob(x) for d in (ours, theirs)]
    assert wide[0].shape == (7, 4)
    assert torch.allclose(*wide)
    outer = [Independent(d, 1).log_prob(x) for d in (ours, theirs)]
    assert torch.allclose(*outer)
    move = AffineTransform(1.0, 2.0)
    moved = [TransformedDistribution(d, move).log_prob(x) for d in (ours, theirs)]
    assert torch.allclose(*moved)
    mix = Categorical(torch.ones(4).double())
    mixed = [MixtureSameFamily(mix, d).log_prob(x[:2]) for d in (ours, theirs)]
    assert torch.allclose(*mixed)


def test_kl_is_zero_at_the_same_and_needs_one_event_shape():
    (p, _), (q, _) = pair(4, 3, event_ndims=1), pair(4, 3, event_ndims=1)
    assert kl_divergence(p, p).abs().max() < 1e-14
    assert (kl_divergence(p, q) > 0).all()
    with pytest.raises(ValueError, match="event shape of q"):
        kl_divergence(p, pair(4, 5, event_ndims=1)[0])


def test_temperature_multiplies_the_deviation():
    g = DiagonalGaussian(torch.ones(3, 100_000), torch.full((3, 100_000), 0.7), 1)
    std = g.sample(temperature=torch.tensor([0.0, 0.5, 2.0])).std(1) / math.exp(0.7)
    assert torch.allclose(std, torch.tensor([0.0, 0.5, 2.0]), atol=0.02)
    assert not g.sample().requires_grad
    mean = torch.zeros(3, requires_grad=True)
    assert DiagonalGaussian(mean, mean, 1).rsample().requires_grad


def test_whitening_is_standard_and_exact():
    g, _ = pair(5, 4, event_ndims=1)
    x = torch.randn(5, 4).double()
    assert torch.allclose(g.unwhiten(g.whiten(x)), x, rtol=1e-14)
    standard = DiagonalGaussian(torch.zeros(4).double(), torch.zeros(4).double(), 1)
    assert torch.allclose(g.log_prob(x), standard.log_prob(g.whiten(x)) - g.log_std.sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_densities_are_float32_whatever_comes(dtype):
    mean, log_std, x = (torch.randn(4, 300).to(dtype) for _ in range(3))
    g = DiagonalGaussian(mean, log_std, 1)
    truth = DiagonalGaussian(mean.double(), log_std.double(), 1).log_prob(x.double())
    assert g.log_prob(x).dtype == torch.float32
    assert torch.allclose(g.log_prob(x).double(), truth, rtol=1e-5)


def test_densities_are_float32_under_autocast():
    head = GaussianHead(nn.Linear(6, 8), event_ndims=1)
    z = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.net(z).dtype == torch.bfloat16
        g = head(z)
        x = g.rsample()
        kl = kl_divergence(g, DiagonalGaussian(torch.zeros(4), torch.zeros(4), 1))
        assert g.log_prob(x).dtype == x.dtype == kl.dtype == torch.float32


def test_repr_names_the_convention():
    head = GaussianHead(nn.Linear(4, 6), event_ndims=1, format=Format.parse("cross log_var"))
    assert "interleaved mean-first log_var" in repr(head)
    assert "log_std" in repr(DiagonalGaussian(torch.zeros(3), torch.zeros(3), 1))
