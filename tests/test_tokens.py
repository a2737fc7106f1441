"""Transformers, autoregressive layers of tokens, and their inverse by windows."""

import pytest
import torch
from torch import nn

from musigma.layers import (
    MADE,
    Additive,
    Affine,
    Autoregressive,
    Coupling,
    Flip,
    Spline,
    Squeeze,
    StreamedNet,
)
from musigma.nets import CausalTransformer, Transformer
from musigma.testing import check_layer, randomized

AFFINE = Affine()


def causal(shape, map=AFFINE, context=0, window=None, **options):
    channels, *positions = shape
    tokens = int(torch.tensor(positions).prod())
    net = CausalTransformer(
        map.owners(channels),
        tokens,
        context=context,
        **({"width": 8, "heads": 2, "blocks": 2} | options),
    )
    return Autoregressive(net, map=map, window=window)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LAYERS = {
    "affine, image": lambda: (causal((3, 2, 3)), (3, 2, 3), {}),
    "affine, sequence": lambda: (causal((1, 6), window=2), (1, 6), {}),
    "spline": lambda: (causal((2, 4), Spline(), 2, blocks=1), (2, 4), {"context": 2}),
    "additive": lambda: (causal((2, 5), Additive(), window=1), (2, 5), {}),
    "a map as context": lambda: (
        causal((2, 2, 3), context=2, width=4, blocks=1),
        (2, 2, 3),
        {"context": torch.randn(4, 2, 2, 3)},
    ),
    "coupling": lambda: (
        Coupling(Transformer(1, 4, 6, width=8, heads=2, context=2)),
        (3, 2, 3),
        {"context": 2},
    ),
    "flip, image": lambda: (Flip(), (2, 3, 2), {}),
    "flip, sequence": lambda: (Flip(), (2, 5), {}),
    "squeeze by 3": lambda: (Squeeze(3), (2, 3, 6), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_laws(name):
    layer, shape, options = LAYERS[name]()
    check_layer(layer, shape, **options)


@pytest.mark.slow
def test_layers_of_tokens_compile_as_one_graph():
    check_layer(causal((2, 3), blocks=1), (2, 3), compiled=True)
    check_layer(Flip(), (2, 3, 2), compiled=True)
    check_layer(Squeeze(3), (2, 3, 6), compiled=True)


def test_squeeze_makes_patches():
    x = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    patches = Squeeze(4)(x)[0]
    assert torch.equal(patches[1, :, 1, 2], x[1, :, 4:8, 8:12].flatten())
    with pytest.raises(ValueError, match="sides that 4 divides"):
        Squeeze(4)(x[..., :10])
    with pytest.raises(ValueError, match="factor: expected 2 or more; got 1"):
        Squeeze(1)


def test_outputs_of_a_token_depend_on_those_before_it_only():
    net = randomized(CausalTransformer([0, 1, 0, 1], 5, width=8, heads=2))
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda x: net(x)[0], x)[:, :, 0].abs().sum((0, 2))
    assert torch.equal(slope > 0, torch.ones(5, 5).tril(-1).bool())


def test_a_plain_transformer_is_torchs_own():
    net = randomized(Transformer(3, 4, 6, width=8, heads=2, blocks=2))
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    h = net.enter(x.flatten(2).mT) + net.positions
    for block in net.blocks:
        theirs = nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        ).eval()
        ours, mlp = block.attention, block.branch
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": ours.enter.weight,
                "self_attn.in_proj_bias": ours.enter.bias,
                "self_attn.out_proj.weight": ours.leave.weight,
                "self_attn.out_proj.bias": ours.leave.bias,
                "norm1.weight": ours.norm.weight,
                "norm1.bias": ours.norm.bias,
                "norm2.weight": mlp[0].weight,
                "norm2.bias": mlp[0].bias,
                "linear1.weight": mlp[1].weight,
                "linear1.bias": mlp[1].bias,
                "linear2.weight": mlp[3].weight,
                "linear2.bias": mlp[3].bias,
            }
        )
        h = theirs(h)
    expected = net.leave(net.norm(h)).mT.reshape(2, 4, 2, 3)
    assert torch.allclose(net(x), expected, atol=1e-12)


# -- the inverse by windows


class Counted(CausalTransformer):
    """Counts its passes while inverting."""

    passes = 0

    def stream(self, like, context=None):
        outputs = super().stream(like, context)

        def counted(before, start):
            self.passes += 1
            return outputs(before, start)

        return counted


def inverted(layer, y, window):
    """x and log_det, and the number of passes."""
    layer.window, layer.net.passes = window, 0
    with torch.no_grad():
        return *layer.inverse(y), layer.net.passes


def strong(tokens=24, scale=1.0, **options):
    """A layer whose tokens depend on each other, in float64."""
    map = Affine()
    net = Counted(map.owners(3), tokens, width=16, heads=2, **options)
    return randomized(Autoregressive(net, map=map), scale=scale)


@pytest.mark.parametrize("window", [2, 5, 8, 24, 100])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_windows_give_the_result_of_one_token_after_another(window, scale):
    layer, y = strong(scale=scale), torch.randn(3, 3, 4, 6, dtype=torch.float64)
    x, log_det, passes = inverted(layer, y, 1)
    assert passes == 24
    other, other_log_det, fewer = inverted(layer, y, window)
    assert torch.allclose(other, x, rtol=1e-11, atol=1e-11)
    assert torch.allclose(other_log_det, log_det, rtol=1e-11, atol=1e-11)
    assert torch.allclose(layer(other)[0], y, rtol=1e-10, atol=1e-10)
    assert fewer <= 24


def test_the_number_of_passes():
    y = torch.randn(3, 3, 24, dtype=torch.float64)
    identity = Autoregressive(Counted([0, 1, 2] * 2, 24, zero=True), map=Affine()).double()
    assert [inverted(identity, y, w)[2] for w in (1, 8, 24, 32)] == [24, 3, 1, 1]
    weak = strong()
    weak.net.leave.weight.data.mul_(0.01)
    for window, most in {1: 24, 4: 20, 8: 18, 16: 11, 24: 10}.items():
        assert inverted(weak, y, window)[2] <= most


class Chained(nn.Module):
    """Each token shifts the next by 5 times itself: none is right before all those before it."""

    owners, tokens, passes = (0,), 6, 0

    def forward(self, x, context=None):
        return 5 * torch.nn.functional.pad(x, (1, -1)) + 1

    def stream(self, like, context=None):
        def outputs(before, start):
            self.passes += 1
            return 5 * before + 1

        return outputs


def test_a_layer_that_no_sweep_shortens_takes_one_pass_per_token():
    layer = Autoregressive(Chained(), map=Additive())
    assert layer.slow_inverse == "one step per token"
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    assert isinstance(layer.net, StreamedNet)
    again, _, passes = inverted(layer, layer(x)[0], 6)
    assert torch.allclose(again, x, atol=1e-9)
    assert passes == 6


def test_maps_that_are_inverted_by_iteration_meet_no_guesses():
    class Slow(Affine):
        slow_inverse = "root finding"

        def inverse(self, y, h):
            assert y.shape[-1] == 1
            return super().inverse(y, h)

    layer, y = strong(), torch.randn(2, 3, 24, dtype=torch.float64)
    x = inverted(layer, y, 1)[0]
    layer.map = Slow()
    assert torch.equal(inverted(layer, y, 24)[0], x)


def test_what_is_not_finite_stays_so_and_ends():
    layer, y = strong(), torch.randn(2, 3, 24, dtype=torch.float64)
    y[0, 0, 7] = torch.nan
    x, _, passes = inverted(layer, y, 8)
    assert x[0, :, :7].isfinite().all()
    assert x[0, :, 8:].isnan().all()
    assert x[1].isfinite().all()
    assert passes <= 24


def test_guesses_that_overflow_do_no_harm():
    class Steep(Affine):
        """Log scales up to 300, so that guesses become infinite."""

        def inverse(self, y, h):
            shift, log_scale = h.chunk(2, 1)
            return y * (-60 * log_scale).exp() - shift, 60 * log_scale

    layer, y = strong(tokens=8).float(), torch.randn(2, 3, 8)
    layer.map = Steep()
    x = inverted(layer, y, 1)[0]
    other = inverted(layer, y, 8)[0]
    assert x[..., 0].isfinite().all()
    assert torch.equal(x.isfinite(), other.isfinite())
    assert torch.allclose(x[..., :2], other[..., :2], rtol=1e-4)


def test_in_float32_windows_are_as_accurate_as_single_steps():
    layer, y = strong(scale=2.0), torch.randn(16, 3, 24, dtype=torch.float64)
    truth = inverted(layer, y, 1)[0]
    single = layer.float()
    errors = [
        float((inverted(single, y.float(), w)[0] - truth).square().mean().sqrt()) for w in (1, 8)
    ]
    assert errors[1] < 2 * errors[0] < 1e-4


def test_gradients_of_the_inverse_are_those_of_the_forward_pass():
    layer = strong(tokens=5)
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    forward = torch.autograd.functional.jacobian(lambda x: layer(x)[0].flatten(), x)
    back = torch.autograd.functional.jacobian(
        lambda y: layer.inverse(y)[0].flatten(), layer(x)[0].detach()
    )
    product = forward.reshape(15, 15) @ back.reshape(15, 15)
    assert torch.allclose(product, torch.eye(15, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    ("batch", "device", "window"),
    [(1, "cpu", 128), (4, "cpu", 32), (5, "cpu", 1), (64, "cuda", 1024), (5000, "cuda", 1)],
)
def test_the_window_is_one_token_where_the_batch_alone_fills_the_processor(batch, device, window):
    assert causal((1, 4), window=None)._window_for(batch, torch.device(device)) == window
    assert causal((1, 4), window=7)._window_for(batch, torch.device(device)) == 7


def test_shapes_are_refused_by_name():
    layer = causal((3, 2, 3))
    with pytest.raises(ValueError, match=r"\(B, 3, ...\) with 6 positions; got \(1, 3, 5\)"):
        layer(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"vectors \(B, 2\); got \(1, 2, 5\)"):
        Autoregressive(MADE([0, 1, 0, 1]), map=Affine())(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="for 6 positions"):
        Transformer(3, 3, 6)(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="divisor of the width 10; got 4"):
        Transformer(3, 3, 6, width=10)
    with pytest.raises(ValueError, match="window: expected 1 or more; got 0"):
        causal((3, 2, 3), window=0)
