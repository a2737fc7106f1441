"""autoencoders: its variational models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import autoencoders
import torch
from autoencoders.data.base import TensorSpec

DISTRIBUTION = "autoencoders"
EXPECTED = {
    "vae": "warning reduction_imbalance",  # a mean over pixels beside a sum over latents
    "beta_vae": "warning reduction_imbalance",
    "beta_tc_vae": "incomplete",
    "dip_vae": "incomplete",
    "factor_vae": "warning reduction_imbalance",
    "info_vae": "incomplete",
    "vamp_prior_vae": "warning reduction_imbalance",
    "hvae": "warning",  # what z2 was conditioned on is not what is decoded
    "free_bits": "warning free_bits",
}

Step = Callable[[], torch.Tensor]


def _step(name: str, **options: Any) -> Step:
    torch.manual_seed(0)
    kind = getattr(autoencoders, f"{name}Model")
    model = kind(
        config=kind.config_class(latent_dim=3, **options),
        sample_spec=TensorSpec(shape=(12,)),
        encoder="mlp",
        encoder_config={"hidden_dims": [16]},
        decoder="mlp",
        decoder_config={"hidden_dims": [16, 12]},
    ).train()
    data = torch.rand(16, 12)
    return lambda: model(data, current_epoch=1000).loss


def make_vae_step() -> Step:
    return _step("VariationalAutoencoder")


def make_beta_vae_step() -> Step:
    return _step("BetaVariationalAutoencoder")


def make_beta_tc_vae_step() -> Step:
    return _step("BetaTCVariationalAutoencoder")


def make_dip_vae_step() -> Step:
    return _step("DIPVariationalAutoencoder")


def make_factor_vae_step() -> Step:
    return _step("FactorVariationalAutoencoder")


def make_info_vae_step() -> Step:
    return _step("InformationVariationalAutoencoder")


def make_vamp_prior_vae_step() -> Step:
    return _step("VampPriorVariationalAutoencoder")


def make_hvae_step() -> Step:
    return _step("HierarchicalVariationalAutoencoder", top_latent_dim=2)


def make_free_bits_step() -> Step:
    return _step("VariationalAutoencoder", free_bits=0.5)
