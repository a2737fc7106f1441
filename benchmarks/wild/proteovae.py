"""proteovae: GuidedVAE and JointVAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from proteovae.models import base, models, utils

DISTRIBUTION = "proteovae"
EXPECTED = {
    "guided_vae": "correct",  # a squared error without 1/2: a Gaussian of variance 1/2
    "guided_vae_dip": "incomplete",
}

Step = Callable[[], torch.Tensor]


def _step(gamma: float) -> Step:
    torch.manual_seed(0)
    config = utils.GuidedConfig(
        input_dim=12, latent_dim=3, device="cpu", guided_dim=1, gamma=gamma, eta=1.0
    )
    model = models.GuidedVAE(
        guide=torch.nn.Linear(1, 2),
        config=config,
        encoder=base.Encoder(12, 3, [16]),
        decoder=base.Decoder(12, 3, [16]),
    ).train()
    batch = (torch.randn(16, 12), torch.arange(16) % 2)
    return lambda: model.loss_function(batch)["loss"]


def make_guided_vae_step() -> Step:
    return _step(0.0)


def make_guided_vae_dip_step() -> Step:
    return _step(1.0)
