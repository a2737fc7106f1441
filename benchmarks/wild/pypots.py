"""PyPOTS: GP-VAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pypots.nn.modules.gpvae import BackboneGPVAE

DISTRIBUTION = "pypots"
EXPECTED = {"gp_vae": "incomplete"}  # a full covariance by a sparse solve, a GP as the prior


def make_gp_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = BackboneGPVAE(4, 6, 2, (8, 8), (8, 8), window_size=3).train()
    x, mask = torch.randn(5, 6, 4), torch.rand(5, 6, 4) < 0.8
    return lambda: model(x, mask)
