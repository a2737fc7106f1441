"""hmiVAE: its Lightning module, without a trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hmiVAE._hmivae_module import hmiVAE

DISTRIBUTION = "hmiVAE"
EXPECTED = {"hmivae": "correct"}  # up to the 1e-6 that only the KL adds to sigma


def make_hmivae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = hmiVAE(
        6, 4, 3, 6, 8, 8, 8, 8, 4, latent_dim=3, n_covariates=2, beta_scheme="constant"
    ).train()
    model.log = lambda *_, **__: None
    batch = [torch.randn(16, n) for n in (6, 4, 3, 6)]
    batch += [torch.eye(2)[torch.arange(16) % 2], torch.ones(16, 4)]
    return lambda: model.training_step(batch)
