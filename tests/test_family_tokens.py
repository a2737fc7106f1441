"""TarFlow and Jet: laws, audit, memory, noise, training, compression."""

import io
import math

import numpy as np
import pytest
import torch

from families import nats_after, training_step
from musigma import build, coding
from musigma.audit import audit_model, audit_step
from musigma.distributions import StandardNormal
from musigma.evaluation import slow_directions
from musigma.gaussian import DiagonalGaussian
from musigma.layers import Autoregressive, Rescale
from musigma.memory import fallbacks, set_memory
from musigma.model import Chain, Prior
from musigma.testing import check_model, randomized
from musigma.zoo.noise import denoised, noisy

TINY = {"patch": 2, "depth": 2, "width": 8, "heads": 2, "blocks": 1}
SHAPE = (1, 4, 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


MODELS = {
    "tarflow": ("tarflow", 4, {}),
    "tarflow, continuous, context": ("tarflow", None, {"context": 3}),
    "tarflow, learned noise": ("tarflow", 4, {"noise": "learned", "alpha": 1e-5, "context": 2}),
    "tarflow, noise": ("tarflow", 4, {"noise": "gaussian", "noise_std": 0.2, "context": 3}),
    "tarflow, noise, continuous": ("tarflow", None, {"noise": "gaussian", "noise_std": 0.5}),
    "jet": ("jet", 4, {"spatial": 2, "depth": 4}),
    "jet, continuous, context": ("jet", None, {"context": 3, "spatial": 2}),
    "jet, additive": ("jet", 4, {"coupling": "additive", "spatial": 0, "dequantize": "learned"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_laws(name):
    architecture, bits, options = MODELS[name]
    model = build(architecture, SHAPE, bits=bits, **(TINY | options))
    check_model(model, SHAPE, bits=bits, context=options.get("context", 0))


@pytest.mark.parametrize("name", ["tarflow", "tarflow, noise", "jet"])
def test_audit(name):
    architecture, bits, options = MODELS[name]
    model = build(architecture, SHAPE, bits=bits, **(TINY | options))
    assert audit_model(model).verdict == "correct"
    report = audit_step(training_step(model))
    assert not report.findings, report


def bars(n, seed=0):
    """Images of a bright row at a random height, with noise of 8 levels."""
    generator = np.random.default_rng(seed)
    x = 60 + 8 * generator.normal(size=(n, *SHAPE))
    x[np.arange(n), 0, generator.integers(0, 4, n)] += 120
    return x.round().astype(np.uint8)


TRUTH = math.log(4) + 16 * (0.5 * math.log(2 * math.pi * math.e) + math.log(8))
"""Nats of `bars`: its four modes hardly overlap, and the levels are close."""


def nats_of_gaussian():
    """Nats of the Gaussian of the mean and the covariance of `bars`."""
    x = torch.from_numpy(bars(4096)).flatten(1).double()
    return 8 * math.log(2 * math.pi * math.e) + 0.5 * float(torch.logdet(x.T.cov()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "over"), [("tarflow", 2.0), ("jet", 4.5)])
def test_training_comes_near_the_truth(name, over):
    model = build(name, SHAPE, patch=2, depth=4, width=16, heads=2, blocks=1)
    nats = nats_after(model, data=bars, lr=3e-3)
    assert TRUTH - 0.3 < nats < TRUTH + over < nats_of_gaussian() - 2


@pytest.mark.parametrize("name", ["tarflow", "jet"])
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_memory_modes_give_the_same_gradients(name, mode):
    model = randomized(build(name, SHAPE, bits=None, **TINY), scale=0.5)
    x, gradients = torch.randn(4, *SHAPE, dtype=torch.float64), []
    for m in ("store", mode):
        set_memory(model, m)
        model.zero_grad()
        model(x).elbo.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-8)
    assert not fallbacks(model)


def test_a_sample_is_decoded_by_windows_as_token_by_token():
    model = randomized(build("tarflow", (1, 8, 8), bits=None, **TINY), scale=0.5)
    z = (torch.randn(2, 4, 4, 4, dtype=torch.float64),)
    layers = [layer for layer in model.layers if isinstance(layer, Autoregressive)]
    images = []
    for window in (1, 16):
        for layer in layers:
            layer.window = window
        with torch.no_grad():
            images.append(model.decode(z))
    assert not torch.equal(*images)  # another order of sums
    assert torch.allclose(*images, rtol=1e-9, atol=1e-9)
    assert slow_directions(model) == {"sampling": ["Autoregressive takes one step per token"]}
    assert slow_directions(build("jet", (1, 8, 8), **TINY)) == {}


@pytest.mark.parametrize(
    ("name", "options"),
    [("tarflow", {}), ("tarflow", {"noise": "gaussian"}), ("jet", {"spatial": 2})],
)
def test_compression(name, options):
    model = build(name, SHAPE, bits=4, **TINY, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = np.random.default_rng(0).integers(0, 16, (20, *SHAPE))
    file = io.BytesIO()
    coding.compress(model, x, file, workers=0)
    file.seek(0)
    assert np.array_equal(coding.decompress(file, model).levels, x)


# -- noise


def test_the_bound_of_noisy_continuous_data_is_the_density_of_the_noisy_data():
    flow = Chain([Rescale(0.5, 1.0)], Prior(StandardNormal((1, 2, 2)))).double()
    model = noisy(flow, (1, 2, 2), None, 0.3)
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    torch.manual_seed(1)
    elbo = model.elbo(x)
    torch.manual_seed(1)
    y = model.encoder(x).rsample()
    assert torch.allclose(elbo, flow.log_prob(y), atol=1e-12)


def test_the_bound_of_noisy_levels_holds():
    """Of one element, against its probability and the expectation, both by quadrature."""
    flow, levels, std = Chain([Rescale(3.0)], Prior(StandardNormal((1, 1, 1)))).double(), 8, 0.15
    model = noisy(flow, (1, 1, 1), levels, std)
    y = torch.linspace(-6, 6, 4001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    step, log_p_y, total = (y[1] - y[0]).item(), flow.log_prob(y), 0.0
    for level in range(levels):
        x = torch.full_like(y, level)
        log_p_x, log_q = model.decoder(y).log_prob(x), model.encoder(x).log_prob(y)
        p = float((log_p_y + log_p_x).exp().sum() * step)
        bound = float((log_q.exp() * (log_p_y + log_p_x - log_q)).sum() * step)
        total += p
        assert bound < math.log(p) < bound + 1
        assert abs(float(model.elbo(x).mean()) - bound) < 0.05
    assert abs(total - 1) < 1e-6


def test_denoising_returns_the_posterior_mean():
    """For Gaussian data of variance 3 and noise of variance 1: three quarters of what is noisy."""
    flow = Chain([Rescale(0.5)], Prior(StandardNormal((1, 2, 2))))
    torch.manual_seed(3)
    x = denoised(noisy(flow, (1, 2, 2), None, 1.0), 6)
    torch.manual_seed(3)
    assert torch.allclose(x, 0.75 * flow.sample(6), atol=1e-5)
    assert not x.requires_grad


def test_denoised_images_are_levels_and_take_a_context():
    model = build("tarflow", SHAPE, bits=4, noise="gaussian", context=3, **TINY)
    x = denoised(model, 5, torch.randn(5, 3))
    assert x.shape == (5, *SHAPE)
    assert ((x >= 0) & (x <= 15) & (x == x.round())).all()
    with pytest.raises(TypeError, match="expected a flow of noisy data"):
        denoised(build("tarflow", SHAPE, bits=4, **TINY), 5)
    assert isinstance(model.encoder(x), DiagonalGaussian)


def test_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"patch: .* a divisor of both sides of 4x4; got 3"):
        build("tarflow", SHAPE, patch=3)
    with pytest.raises(ValueError, match="spatial: patches of 4 make 1 columns"):
        build("jet", SHAPE, patch=4)
    with pytest.raises(ValueError, match="alpha: noise is gaussian"):
        build("tarflow", SHAPE, **TINY, noise="gaussian", alpha=0.1)
    with pytest.raises(ValueError, match="std: expected a positive number; got 0"):
        build("tarflow", SHAPE, **TINY, noise="gaussian", noise_std=0)
    with pytest.raises(ValueError, match="is for images"):
        build("jet", (5,))
