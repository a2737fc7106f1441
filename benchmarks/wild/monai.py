"""MONAI: VarAutoEncoder and AutoencoderKL, with the losses of its tutorials."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.networks.nets import AutoencoderKL, VarAutoEncoder
from torch.nn import functional as F

DISTRIBUTION = "monai"
EXPECTED = {
    "var_autoencoder": "correct",
    "autoencoder_kl": "correct",  # 1e-6 beside an absolute error: no known likelihood
}

Step = Callable[[], torch.Tensor]


def make_var_autoencoder_step() -> Step:
    torch.manual_seed(0)
    model = VarAutoEncoder(2, (1, 8, 8), 1, 4, channels=(4, 8), strides=(1, 2)).train()
    data = torch.rand(6, 1, 8, 8)

    def step() -> torch.Tensor:  # the tutorial of the variational autoencoder on MedNIST, beta 1
        x, mean, log_var, _ = model(data)
        bce = F.binary_cross_entropy(x, data, reduction="sum")
        return bce - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())

    return step


def make_autoencoder_kl_step() -> Step:
    torch.manual_seed(0)
    model = AutoencoderKL(
        2,
        channels=(8, 8),
        latent_channels=2,
        num_res_blocks=(1, 1),
        attention_levels=(False, False),
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).train()
    data = torch.rand(4, 1, 8, 8)

    def step() -> torch.Tensor:  # the tutorial of 2d latent diffusion, before its discriminator
        reconstruction, mean, sigma = model(data)
        kl = 0.5 * torch.sum(mean.pow(2) + sigma.pow(2) - torch.log(sigma.pow(2)) - 1, [1, 2, 3])
        return F.l1_loss(reconstruction, data) + 1e-6 * torch.sum(kl) / kl.shape[0]

    return step
