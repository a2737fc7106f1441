"""CISS-VAE: the loss of its first training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ciss_vae.classes.vae import CISSVAE
from ciss_vae.utils.loss import loss_function

DISTRIBUTION = "CISS-VAE"
EXPECTED = {"ciss_vae": "warning reduction_imbalance"}  # beta 0.001


def make_ciss_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    groups = {"continuous": list(range(8))}
    model = CISSVAE(
        input_dim=8,
        hidden_dims=[16],
        layer_order_enc=["shared"],
        layer_order_dec=["shared"],
        latent_shared=True,
        latent_dim=3,
        output_shared=True,
        num_clusters=2,
    ).train()
    x, mask = torch.randn(16, 8), (torch.rand(16, 8) < 0.8).float()
    cluster = torch.arange(16) % 2

    def step() -> torch.Tensor:
        recon, mean, log_var = model(x, cluster)
        return loss_function(cluster, mask, recon, x, groups, mean, log_var)

    return step
