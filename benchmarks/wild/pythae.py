"""pythae: every model with a Gaussian posterior, as `BaseTrainer.train_step` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pythae import models
from pythae.data.datasets import BaseDataset

DISTRIBUTION = "pythae"
EXPECTED = {
    "vae": "correct",
    "beta_vae": "warning reduction_imbalance",  # beta 4
    "disentangled_beta_vae": "warning kl_capacity",
    "iwae": "correct",  # the gradient; the value is not the bound
    "ciwae": "correct",
    "miwae": "correct",
    "piwae": "correct",
    "vae_iaf": "correct",
    "vae_lin_nf_planar": "bug not_injective",
    "vae_lin_nf_radial": "correct",
    "vamp": "correct",  # the prior is a mixture of posteriors
    "hvae": "bug kl_mismatch",
    "rhvae": "bug kl_mismatch",
    "beta_tc_vae": "correct",  # its three terms add up to the KL
    "factor_vae": "incomplete",
    "info_vae": "incomplete",
    "svae": "incomplete",  # von Mises-Fisher
    "poincare_vae": "incomplete",  # wrapped normal
    "msssim_vae": "correct",
    "vae_gan": "correct",
    "adversarial_ae": "incomplete",  # no KL by design
    "wae_mmd": "incomplete",
    "vq_vae": "incomplete",
}

Step = Callable[[], Any]


def _step(model: torch.nn.Module, loss: str = "loss", shape: tuple[int, ...] = (1, 4, 4)) -> Step:
    torch.manual_seed(0)
    data = torch.rand(16, *shape)
    inputs = BaseDataset(data, torch.zeros(len(data)))
    batch = {"data": inputs.data, "labels": inputs.labels}
    model.train()
    return lambda: model(batch, epoch=1, dataset_size=1000, uses_ddp=False)[loss]


def _make(kind: str, config: str = "", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"input_dim": (1, 4, 4), "latent_dim": 3} | options
    return getattr(models, kind)(getattr(models, config or f"{kind}Config")(**options))


def make_vae_step() -> Step:
    return _step(_make("VAE"))


def make_beta_vae_step() -> Step:
    return _step(_make("BetaVAE", beta=4.0))


def make_disentangled_beta_vae_step() -> Step:
    return _step(_make("DisentangledBetaVAE", beta=10.0, C=5.0, warmup_epoch=25))


def make_iwae_step() -> Step:
    return _step(_make("IWAE", number_samples=4))


def make_ciwae_step() -> Step:
    return _step(_make("CIWAE", number_samples=4))


def make_miwae_step() -> Step:
    return _step(_make("MIWAE", number_gradient_estimates=3, number_samples=4))


def make_piwae_step() -> Step:
    return _step(_make("PIWAE", number_gradient_estimates=3, number_samples=4))


def make_vae_iaf_step() -> Step:
    return _step(_make("VAE_IAF", "VAE_IAF_Config"))


def make_vae_lin_nf_planar_step() -> Step:
    return _step(_make("VAE_LinNF", "VAE_LinNF_Config"))


def make_vae_lin_nf_radial_step() -> Step:
    return _step(_make("VAE_LinNF", "VAE_LinNF_Config", flows=["Radial", "Radial"]))


def make_vamp_step() -> Step:
    return _step(_make("VAMP", number_components=5))


def make_hvae_step() -> Step:
    return _step(_make("HVAE"))


def make_rhvae_step() -> Step:
    return _step(_make("RHVAE"))


def make_beta_tc_vae_step() -> Step:
    return _step(_make("BetaTCVAE"))


def make_factor_vae_step() -> Step:
    return _step(_make("FactorVAE"), "autoencoder_loss")


def make_info_vae_step() -> Step:
    return _step(_make("INFOVAE_MMD", "INFOVAE_MMD_Config"))


def make_svae_step() -> Step:
    return _step(_make("SVAE"))


def make_poincare_vae_step() -> Step:
    return _step(_make("PoincareVAE"))


def make_msssim_vae_step() -> Step:
    model = _make("MSSSIM_VAE", "MSSSIM_VAEConfig", input_dim=(1, 16, 16))
    return _step(model, shape=(1, 16, 16))


def make_vae_gan_step() -> Step:
    return _step(_make("VAEGAN"), "encoder_loss")


def make_adversarial_ae_step() -> Step:
    return _step(_make("Adversarial_AE", "Adversarial_AE_Config"), "autoencoder_loss")


def make_wae_mmd_step() -> Step:
    return _step(_make("WAE_MMD", "WAE_MMD_Config"))


def make_vq_vae_step() -> Step:
    return _step(_make("VQVAE"))
