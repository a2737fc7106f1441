"""Flows with maps of every kind compress, without loss and at the cost of the model."""

import io
import math

import numpy as np
import pytest
import torch

from musigma import coding
from musigma.testing import randomized
from musigma.zoo import build

FLOWS = {
    "bernstein": {"kind": "coupling", "degree": 6},
    "naf": {"kind": "coupling", "units": 4, "layers": 1},
    "sos": {"kind": "coupling"},
    "umnn": {"width": 8, "bins": 8},
    "gaussianization": {"components": 4, "depth": 2},
    "nsf": {"spline": "cubic"},
}


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in FLOWS if name != "gaussianization"),
        pytest.param("gaussianization", marks=pytest.mark.slow),
    ],
)
def test_a_flow_compresses(name):
    torch.manual_seed(0)
    options = {"depth": 1, "hidden": 8, **FLOWS[name]}
    if name == "gaussianization":
        del options["hidden"]
    model = build(name, (3,), bits=3, alpha=0.05, **options)
    config = model.config
    model = randomized(model).float()
    model.config = config
    x = np.random.default_rng(0).integers(0, 8, (24, 3))
    file = io.BytesIO()
    coding.compress(model, x, file, workers=1)
    assert (coding.decompress(file, model, workers=1).levels == x).all()
    codec = coding.Archive(file, model, workers=1).codec
    coded = codec.pack(x, None, b"")
    with torch.no_grad():
        given = torch.from_numpy(x)
        draws = torch.stack([-model(given).elbo for _ in range(200)]).double() / math.log(2)
    error = 5 * draws.var(0).sum().sqrt().item() * math.sqrt(1 + 1 / 200) + 64
    assert abs(coded.bits - draws.mean(0).sum().item()) < error + 5e-3 * x.size
