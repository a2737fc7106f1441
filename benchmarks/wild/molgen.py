"""molgen: its transformer beta-TC-VAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from molgen.vae import BetaTCVAE, loss_function

DISTRIBUTION = "molgen"
EXPECTED = {
    "plain": "correct",  # a mean over tokens: the weight of the KL is the number of tokens
    "beta_tc_vae": "incomplete",
}

Step = Callable[[], torch.Tensor]


def _step(beta: float, size: int | None) -> Step:
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = BetaTCVAE(10, 8, 16, 3, 2, 1, 0, device).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    tokens = torch.randint(1, 10, (12, 7))

    def step() -> torch.Tensor:
        x, mean, log_var, z = model(tokens)
        return loss_function(
            x, tokens, mean, log_var, z, beta=beta, dataset_size=size, pad_idx=model.pad_idx
        )

    return step


def make_plain_step() -> Step:
    return _step(1.0, None)


def make_beta_tc_vae_step() -> Step:
    return _step(4.0, 1000)
