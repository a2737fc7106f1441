"""multimodal_autoencoders: a modality's loss, as `JointTrainer` pretrains it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from multimodal_autoencoders.base.autoencoder import VariationalAutoencoder
from multimodal_autoencoders.joint_trainer import JointTrainer
from multimodal_autoencoders.model import decoders, encoders

DISTRIBUTION = "multimodal_autoencoders"
EXPECTED = {"pretraining": "bug"}  # the KL is summed over the batch, the reconstruction averaged


def make_pretraining_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = VariationalAutoencoder(
        encoders.SimpleEncoder(12, 16), decoders.SimpleDecoder(12, 16, 3), "adam", 1e-3
    ).train()
    trainer = JointTrainer({"one": model}, torch.nn.Linear(3, 1))
    data = torch.rand(16, 12)

    def step() -> torch.Tensor:
        recon, _, mean, log_var = model(data)
        return trainer._ae_recon_metric(data, recon) + 0.01 * trainer._compute_KL_loss(
            mean, log_var
        )

    return step
