"""MultiVae: multimodal VAEs, as its trainer calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from multivae import models
from multivae.data.datasets.base import MultimodalBaseDataset

DISTRIBUTION = "multivae"
EXPECTED = {
    "mvae": "correct",  # a product of experts, several subsets
    "mopoe": "correct",  # the KL of a mixture, bounded by a mean
    "jmvae": "correct",  # and a KL between posteriors
    "cvae": "correct",
    "mmvae": "incomplete",  # Laplace posteriors
    "mmvae_normal": "correct",
    "mmvae_plus": "correct",
    "mvtcae": "correct",
    "crmvae": "correct",
    "dmvae": "correct",
    "telbo_joint": "correct",
    "telbo_single": "bug kl_mismatch",  # log_var of the joint posterior
    "nexus": "correct",
}
SIZES = {"a": (8,), "b": (6,)}

Step = Callable[[], torch.Tensor]


def _step(kind: str, config: str = "", epoch: int = 1, **options: Any) -> Step:
    torch.manual_seed(0)
    options = {
        "n_modalities": 2,
        "latent_dim": 3,
        "input_dims": SIZES,
        "decoders_dist": {"a": "normal", "b": "normal"},
    } | options
    model = getattr(models, kind)(getattr(models, config or f"{kind}Config")(**options)).train()
    batch = MultimodalBaseDataset({k: torch.rand(16, *v) for k, v in SIZES.items()})
    return lambda: (
        model(batch, epoch=epoch, dataset_size=1000, uses_ddp=False, batch_ratio=0.0).loss
    )


def make_mvae_step() -> Step:
    return _step("MVAE", warmup=1)


def make_mopoe_step() -> Step:
    return _step("MoPoE")


def make_jmvae_step() -> Step:
    return _step("JMVAE", warmup=1)


def make_cvae_step() -> Step:
    torch.manual_seed(0)
    config = models.CVAEConfig(
        input_dims=SIZES,
        latent_dim=3,
        main_modality="a",
        conditioning_modalities=["b"],
        decoder_dist="normal",
    )
    model = models.CVAE(config).train()
    batch = MultimodalBaseDataset({k: torch.rand(16, *v) for k, v in SIZES.items()})
    return lambda: model(batch).loss


def make_mmvae_step() -> Step:
    return _step("MMVAE", K=2)


def make_mmvae_normal_step() -> Step:
    return _step("MMVAE", K=1, prior_and_posterior_dist="normal", loss="iwae_looser")


def make_mmvae_plus_step() -> Step:
    return _step(
        "MMVAEPlus",
        K=1,
        prior_and_posterior_dist="normal",
        loss="iwae_looser",
        modalities_specific_dim=2,
    )


def make_mvtcae_step() -> Step:
    return _step("MVTCAE")


def make_crmvae_step() -> Step:
    return _step("CRMVAE")


def make_dmvae_step() -> Step:
    return _step("DMVAE", modalities_specific_dim={"a": 2, "b": 2})


def make_telbo_joint_step() -> Step:
    return _step("TELBO", warmup=1, epoch=1)


def make_telbo_single_step() -> Step:
    return _step("TELBO", warmup=1, epoch=2)


def make_nexus_step() -> Step:
    return _step(
        "Nexus",
        warmup=1,
        modalities_specific_dim={"a": 2, "b": 2},
        msg_dim=2,
        dropout_rate=0.0,
    )
