"""The Haar transform as a squeeze, and models that use it."""

import math

import numpy as np
import pytest
import torch

from musigma import build
from musigma.coding import Codec
from musigma.coding.coder import latent_grids
from musigma.layers import HaarSqueeze
from musigma.testing import check_layer, check_model


def test_it_obeys_all_laws():
    check_layer(HaarSqueeze(), (3, 4, 6))


def test_it_is_two_one_dimensional_transforms():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    rows = x.unflatten(3, (3, 2)).unflatten(2, (2, 2))  # (B, C, H / 2, 2, W / 2, 2)
    true = torch.einsum("bchiwj,ki,lj->bklchw", rows, pair, pair).flatten(1, 3)
    y, log_det = HaarSqueeze()(x)
    torch.testing.assert_close(y, true)
    torch.testing.assert_close(y.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)))
    assert not log_det.any()
    torch.testing.assert_close(y[:, :3] / 2, torch.nn.functional.avg_pool2d(x, 2))


def test_an_odd_side_is_refused():
    with pytest.raises(ValueError, match="even sides"):
        HaarSqueeze()(torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("name", ["glow", "realnvp"])
def test_models_take_it_by_an_option(name):
    small = {"depth": 1, "hidden": 6, "levels": 2}
    model = build(name, (1, 8, 8), bits=3, squeeze="haar", **small)
    check_model(model, (1, 8, 8), bits=3)
    assert model.config["options"]["squeeze"] == "haar"
    assert "squeeze" not in build(name, (1, 8, 8), bits=3, **small).config["options"]
    with pytest.raises(ValueError, match="squeeze: expected space or haar"):
        build(name, (1, 8, 8), squeeze="daubechies", **small)


def test_it_costs_no_bits_to_code():
    torch.manual_seed(0)
    model = build("realnvp", (1, 8, 8), bits=3, depth=1, hidden=4, levels=1, squeeze="haar")
    x = np.random.default_rng(0).integers(0, 8, (40, 1, 8, 8))
    latents = latent_grids(model.double(), torch.from_numpy(x).double())
    codec = Codec(model, numerics="exact", latents=latents)
    coded = codec.pack(x, None, b"")
    assert (codec.unpack(coded, (1, 8, 8), None, b"") == x).all()
    with torch.no_grad():
        own = -float(sum(model.elbo(torch.from_numpy(x).double()).sum() for _ in range(8))) / 8
    assert coded.bits == pytest.approx(own / math.log(2), rel=0.02)
