"""The training steps of this library's own models pass the audit of steps.

VAEs pass by their KL, flows by their log-determinant, each with random parameters: at their
initialization, many layers are the identity.
"""

import pytest
import torch

from musigma.audit import audit_step
from musigma.audit.models import examples_of
from musigma.gaussian import DiagonalGaussian
from musigma.layers import ActNorm
from musigma.testing import randomized
from musigma.training.config import TrainConfig
from musigma.training.step import ObjectivePass
from musigma.zoo import build
from tests.test_audit_models import SMALL

MODELS = [(name, shape, options) for name in SMALL for shape, options in SMALL[name]]
NAMES = [f"{name}-{i}" for name in SMALL for i, _ in enumerate(SMALL[name])]
SLOW = ("glow-0", "glow-3", "realnvp-1", "vae-1")  # architectures that are there once more
INTENDED = {"autoencoder_kl": ("reduction_imbalance",)}  # its KL has a small weight by design
NEITHER = ("table", "published_glow", "idf")
"""A product of conditionals; a classifier that reads the latents before they are whitened; and
integers, whose mass has no log-determinant."""


def step_of(name, shape, options, change=None, **config):
    """The loss of the trainer for a batch, as a step."""
    torch.manual_seed(0)
    model = randomized(build(name, shape, **options), scale=0.25).float().train()
    if change is not None:
        change(model)
    x, context = examples_of(model)
    run = ObjectivePass(model, TrainConfig(**config), None)
    return (lambda: run(x, context, 1.0)[0].mean()), x


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        pytest.param(*model, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, model in zip(NAMES, MODELS, strict=True)
    ],
)
def test_the_training_step_of_every_architecture_is_right(name, shape, options):
    step, _ = step_of(name, shape, options)
    state = torch.random.get_rng_state()
    report = audit_step(step)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not [f for f in report.findings if f.code not in INTENDED.get(name, ())], report
    if name in NEITHER:
        assert report.verdict == "incomplete"
        return
    assert not report.missing, report
    parts = ("KL", "log-determinant")
    assert any(part in line for part in parts for line in report.checked), report


def halve_log_det(model):
    layer = next(m for m in model.modules() if isinstance(m, ActNorm))
    right = layer.forward

    def forward(x, context=None):
        y, log_det = right(x, context)
        return y, 0.5 * log_det

    layer.forward = forward


@pytest.mark.parametrize("name", ["realnvp", "maf", "nsf", "glow", "vflow"])
def test_a_log_determinant_that_is_halved_is_found(name):
    shape, options = next((s, o) for s, o in SMALL[name] if o.get("bits") is None)
    step, _ = step_of(name, shape, options | {"bits": None}, change=halve_log_det)
    report = audit_step(step)
    assert report.codes == ("logdet_mismatch",), report


VAE = ("mlp_vae", (1, 4, 4), {"hidden": 8, "latents": 3, "bits": 1})


@pytest.mark.parametrize(
    ("config", "codes"),
    [
        ({"beta": 3.0}, ("reduction_imbalance",)),
        ({"free_bits": 0.1}, ("free_bits",)),
        ({"k": 5}, ()),
    ],
)
def test_objectives_are_named(config, codes):
    step, _ = step_of(*VAE, **config)
    report = audit_step(step)
    assert report.codes == codes, report
    assert report.verdict == ("warning" if codes else "correct"), report
    if "beta" in config:
        assert "beta = 3" in report.findings[0].message


def test_a_posterior_that_gets_no_gradient_is_found(monkeypatch):
    right = DiagonalGaussian.rsample
    monkeypatch.setattr(DiagonalGaussian, "rsample", lambda *a, **k: right(*a, **k).detach())
    step, _ = step_of(*VAE)
    report = audit_step(step)
    assert report.verdict == "bug", report
    assert "no_gradient" in report.codes
