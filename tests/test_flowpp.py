"""Flow++: gated attention, and the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musigma import build
from musigma.audit import audit_model, audit_step
from musigma.coding import Codec, check
from musigma.coding.coder import latent_grids
from musigma.gaussian import GaussianHead
from musigma.nets import AttentionNet, GatedAttention, GatedConv
from musigma.testing import check_head, check_model, randomized
from tests.families import nats_after, training_step


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("heads", "context"), [(2, 0), (0, 0), (4, 2)])
def test_heads_with_the_network_obey_all_laws(heads, context):
    net = AttentionNet(3, 4, width=8, heads=heads, context=context, zero=bool(context))
    check_head(
        GaussianHead(net, event_ndims=3), torch.randn(4, 3, 3, 5), (2, 3, 5), context=context
    )


def test_attention_is_that_of_torch():
    """`nn.MultiheadAttention` with the same weights, the gate, the shortcut and the norm."""
    layer = randomized(GatedAttention(8, heads=2))
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    theirs.in_proj_weight.data = layer.enter.weight.data.flatten(1)
    theirs.in_proj_bias.data = layer.enter.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = torch.eye(8).double(), torch.zeros(8)
    theirs = theirs.double()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    waves = torch.tensor([1.0, 1e3**-0.5])
    places = torch.cat(
        [f(at * w)[None] for at in (rows, columns) for f in (torch.sin, torch.cos) for w in waves]
    )
    tokens = (x + places.double()).flatten(2).transpose(1, 2)
    attended = theirs(tokens, tokens, tokens, need_weights=False)[0]
    values, gates = F.linear(attended, layer.leave.weight.flatten(1), layer.leave.bias).chunk(
        2, -1
    )
    mixed = x.flatten(2).transpose(1, 2) + values * gates.sigmoid()
    true = F.layer_norm(mixed, (8,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x).flatten(2).transpose(1, 2), true, rtol=1e-6, atol=1e-6)


def test_attention_reaches_every_pixel_and_convolutions_do_not():
    x = torch.zeros(1, 8, 9, 9, requires_grad=True)
    for layer, everywhere in ((GatedAttention(8), True), (GatedConv(8), False)):
        (gradient,) = torch.autograd.grad(randomized(layer).float()(x)[0, :, 0, 0].sum(), x)
        assert bool((gradient.abs().sum(1) > 0).all()) is everywhere


def test_channels_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisor of 6 channels; got 4"):
        GatedAttention(6, heads=4)


SMALL = {"depth": 1, "hidden": 8, "components": 3, "heads": 2}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((1, 2, 6), {"bits": 3, "dequantize": "flow"}, marks=pytest.mark.slow),
        ((2, 2, 4), {"bits": None, "context": 2}),
    ],
)
def test_models_obey_all_laws(shape, options):
    model = build("flowpp", shape, **SMALL, **options)
    assert model.exact is (options["bits"] is None)
    check_model(model, shape, bits=options["bits"], context=options.get("context", 0))


def test_the_flow_of_noise_is_a_density_and_remembers_its_draws():
    model = build("flowpp", (1, 2, 2), bits=2, dequantize="flow", **SMALL)
    model = randomized(model, scale=0.5)
    noise = model.layers[0].noise
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    with torch.no_grad():
        dist = noise(x.expand(3, -1, -1, -1))
        drawn = dist.rsample()
        torch.testing.assert_close(dist.log_prob(drawn), dist.log_prob(drawn.clone()))
        many = noise(x.expand(20_000, -1, -1, -1))
        u = many.rsample()
        weights = (-many.log_prob(u)).exp()  # their mean is the volume of the unit cube
    assert bool(((u > 0) & (u < 1)).all())
    assert float(weights.mean()) == pytest.approx(1, abs=5 * float(weights.std()) / 20_000**0.5)


@pytest.mark.slow
def test_the_audit_finds_no_fault_with_a_flow_of_noise():
    """It cannot examine the flow, in which heads are not apart from their draws."""
    model = build("flowpp", (1, 4, 4), bits=3, dequantize="flow", **SMALL)
    assert audit_model(model).verdict == "correct"
    assert not audit_step(training_step(model)).findings


def test_an_odd_side_is_refused():
    with pytest.raises(ValueError, match="even sides; got 3x4"):
        build("flowpp", (1, 3, 4))


@pytest.mark.slow
def test_compression_reaches_the_bound():
    torch.manual_seed(0)
    model = build("flowpp", (1, 4, 4), bits=3, dequantize="learned", **SMALL)
    x = np.random.default_rng(0).integers(0, 8, (12, 1, 4, 4))
    latents = latent_grids(model.double(), torch.from_numpy(x).double())
    codec = Codec(model, numerics="exact", latents=latents)
    coded = codec.pack(x, None, b"")
    assert (codec.unpack(coded, (1, 4, 4), None, b"") == x).all()
    with torch.no_grad():
        own = -float(sum(model.elbo(torch.from_numpy(x)).sum() for _ in range(10))) / 10
    assert coded.bits == pytest.approx(own / math.log(2), rel=0.06)


def test_a_flow_of_noise_has_no_coding_rule():
    model = build("flowpp", (1, 4, 4), bits=3, dequantize="flow", **SMALL)
    with pytest.raises(ValueError, match="Squashed has no coding rule"):
        check(model)


def images(n, seed=0):
    """A random level from 0 to 223, and three others a little above it."""
    generator = np.random.default_rng(seed)
    level = generator.integers(0, 224, (n, 1, 1, 1))
    steps = generator.integers(0, 32, (n, 1, 2, 2))
    return (level + steps).astype(np.uint8)


@pytest.mark.slow
def test_training_comes_close_to_the_entropy():
    """Which is at least 3 log 32 + log 224 = 15.8 nats; independent pixels cost 22."""
    model = build("flowpp", (1, 2, 2), **SMALL)
    assert nats_after(model, data=images, steps=60, batch_size=64, lr=1e-2) < 20
