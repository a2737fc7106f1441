"""pyautoencoder: VAE and AdaGVAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyautoencoder.variational import VAE, AdaGVAE
from torch import nn

DISTRIBUTION = "pyautoencoder"
EXPECTED = {
    "vae": "correct",
    "vae_bernoulli": "correct",
    "vae_samples": "correct",
    "ada_gvae": "correct",
}

Step = Callable[[], torch.Tensor]


def _model() -> VAE:
    torch.manual_seed(0)
    model = VAE(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 12)),
        3,
    )
    model.build(torch.rand(2, 12))
    return model.train()


def _step(likelihood: str, samples: int) -> Step:
    model, data = _model(), torch.rand(16, 12)
    return lambda: (
        model.compute_loss(data, model(data, S=samples), likelihood=likelihood).objective
    )


def make_vae_step() -> Step:
    return _step("gaussian", 1)


def make_vae_bernoulli_step() -> Step:
    return _step("bernoulli", 1)


def make_vae_samples_step() -> Step:
    return _step("gaussian", 3)


def make_ada_gvae_step() -> Step:
    model = AdaGVAE(_model()).train()
    pair = (torch.rand(16, 12), torch.rand(16, 12))
    return lambda: model.compute_loss(pair, model(pair)).objective
