"""diffusers: AutoencoderKL and a relative, with the loss of its example of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderOobleck
from torch.nn import functional as F

DISTRIBUTION = "diffusers"
EXPECTED = {
    "autoencoder_kl": "warning reduction_imbalance",  # kl_scale 1e-6 beside a mean over pixels
    "autoencoder_kl_elbo": "correct",
    "oobleck": "warning reduction_imbalance",
    "temporal_decoder": "correct",
}

Step = Callable[[], torch.Tensor]


def _model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
    ).train()


def make_autoencoder_kl_step() -> Step:
    model, data = _model(), torch.rand(4, 3, 8, 8) * 2 - 1

    def step() -> torch.Tensor:  # examples/research_projects/autoencoderkl, without LPIPS and GAN
        posterior = model.encode(data).latent_dist
        z = posterior.sample()
        reconstruction = model.decode(z).sample
        rec_loss = F.mse_loss(reconstruction.float(), data.float(), reduction="none")
        nll_loss = torch.sum(rec_loss) / rec_loss.shape[0]
        kl_loss = torch.sum(posterior.kl()) / posterior.kl().shape[0]
        return nll_loss + 1e-6 * kl_loss

    return step


def make_autoencoder_kl_elbo_step() -> Step:
    model, data = _model(), torch.rand(4, 3, 8, 8) * 2 - 1

    def step() -> torch.Tensor:
        posterior = model.encode(data).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        return (0.5 * (reconstruction - data).square().sum((1, 2, 3)) + posterior.kl()).mean()

    return step


def make_temporal_decoder_step() -> Step:
    torch.manual_seed(0)
    model = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=2,
    ).train()
    data = torch.rand(2, 3, 8, 8) * 2 - 1

    def step() -> torch.Tensor:
        posterior = model.encode(data).latent_dist
        reconstruction = model.decode(posterior.sample(), num_frames=2).sample
        return (0.5 * (reconstruction - data).square().sum((1, 2, 3)) + posterior.kl()).mean()

    return step


def make_oobleck_step() -> Step:
    torch.manual_seed(0)
    model = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    ).train()
    data = torch.rand(2, 2, 32) * 2 - 1

    def step() -> torch.Tensor:
        posterior = model.encode(data).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        return 0.5 * (reconstruction - data).square().sum((1, 2)).mean() + posterior.kl()

    return step
