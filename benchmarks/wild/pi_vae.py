"""pi-vae-pytorch: both versions of its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pi_vae_pytorch import ELBOLoss, PiVAE

DISTRIBUTION = "pi-vae-pytorch"
EXPECTED = {
    "version_1": "correct",  # 0.5 twice: half the KL, beside a Poisson likelihood
    "version_2": "bug kl_mismatch",  # half the KL of another posterior
}

Step = Callable[[], torch.Tensor]


def _step(version: int) -> Step:
    torch.manual_seed(0)
    model = PiVAE(x_dim=10, u_dim=3, z_dim=2, discrete_labels=True).train()
    loss = ELBOLoss(version=version)
    x, u = torch.poisson(torch.full((16, 10), 2.0)), torch.randint(3, (16,))

    def step() -> torch.Tensor:
        out = model(x, u)
        return loss(
            x=x,
            posterior_firing_rate=out["posterior_firing_rate"],
            posterior_mean=out["posterior_mean"],
            posterior_log_variance=out["posterior_log_variance"],
            label_mean=out["label_mean"],
            label_log_variance=out["label_log_variance"],
            encoder_mean=out["encoder_mean"],
            encoder_log_variance=out["encoder_log_variance"],
        )

    return step


def make_version_1_step() -> Step:
    return _step(1)


def make_version_2_step() -> Step:
    return _step(2)
