"""Flows of vectors by additive couplings, and inverse autoregressive flows, as families."""

import torch

from musigma import build
from musigma.testing import randomized
from tests.families import check_flow_family, parts


@parts
def test_nice(part):
    check_flow_family("nice", part, below=2.75, hidden=32, depth=6)


def test_the_couplings_of_nice_preserve_volume():
    model = randomized(build("nice", (5,), bits=None, hidden=8))
    x = torch.randn(3, 5, dtype=torch.float64)
    *couplings, scale = model.layers
    for layer in couplings:
        x, log_det = layer(x)
        assert not log_det.any()
    assert torch.allclose(scale(x)[1], scale.log_scale.sum().expand(3))


@parts
def test_iaf(part):
    check_flow_family("iaf", part, below=2.9, hidden=24, depth=2)


def test_iaf_is_maf_with_its_directions_exchanged():
    options = {"bits": None, "depth": 1, "hidden": 8, "norm": False}
    maf, iaf = build("maf", (4,), **options), build("iaf", (4,), **options)
    iaf.layers[1].bijection.load_state_dict(maf.layers[1].state_dict())
    x = torch.randn(3, 4)
    assert torch.allclose(iaf.layers[1].inverse(x)[0], maf.layers[1](x)[0], atol=1e-6)
    assert iaf.layers[1].slow_forward == maf.layers[1].slow_inverse != ""
