"""lightning-bolts: its VAE, with a small input."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import lightning_utilities.core.apply_func as apply_func
import torch

# lightning-bolts is written for Lightning 1
sys.modules.setdefault("pytorch_lightning.utilities.apply_func", apply_func)
VAE = importlib.import_module("pl_bolts.models.autoencoders.basic_vae.basic_vae_module").VAE

DISTRIBUTION = "lightning-bolts"
EXPECTED = {"vae": "warning reduction_imbalance"}  # two means, and 0.1


def make_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = VAE(input_height=32, latent_dim=4).train()
    batch = (torch.rand(4, 3, 32, 32), torch.zeros(4))
    return lambda: model.step(batch, 0)[0]
