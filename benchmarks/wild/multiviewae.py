"""multi-view-AE: its variational models, as `training_step` calls them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from multiviewae import models

DISTRIBUTION = "multiviewae"
EXPECTED = {
    "mvae": "correct",  # a product of experts
    "mcvae": "correct",  # KLs summed over views, likelihoods averaged over pairs: beta 4
    "dvcca": "correct",
    "jmvae": "correct",
    "mopoe_vae": "correct",
    "mvtcae": "correct",
    "me_mvae": "correct",
    "mmvae": "correct",
    "mm_jsd": "incomplete",
    "dmvae": "correct",
    "weighted_mvae": "correct",
}

Step = Callable[[], torch.Tensor]


def _step(kind: str, **options: object) -> Step:
    torch.manual_seed(0)
    model = getattr(models, kind)(input_dim=[8, 6], z_dim=3, **options)
    model._training = True
    model.warmup = 0
    views = [torch.randn(16, 8), torch.randn(16, 6)]
    model.train()
    return lambda: model.loss_function(views, model(views))["loss"]


def make_mvae_step() -> Step:
    return _step("mVAE")


def make_mcvae_step() -> Step:
    return _step("mcVAE")


def make_dvcca_step() -> Step:
    return _step("DVCCA")


def make_jmvae_step() -> Step:
    return _step("JMVAE")


def make_mopoe_vae_step() -> Step:
    return _step("MoPoEVAE")


def make_mvtcae_step() -> Step:
    return _step("mvtCAE")


def make_me_mvae_step() -> Step:
    return _step("me_mVAE")


def make_mmvae_step() -> Step:
    return _step("mmVAE")


def make_mm_jsd_step() -> Step:
    return _step("mmJSD")


def make_dmvae_step() -> Step:
    return _step("DMVAE")


def make_weighted_mvae_step() -> Step:
    return _step("weighted_mVAE")
