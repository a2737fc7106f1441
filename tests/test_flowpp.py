"""Flow++: gated attention, and the model."""

import pytest
import torch
import torch.nn.functional as F

from musigma.gaussian import GaussianHead
from musigma.nets import AttentionNet, GatedAttention, GatedConv
from musigma.testing import check_head, randomized


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
