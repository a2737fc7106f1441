"""MOVE: its VAE of categorical and continuous data sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

if not hasattr(np, "float_"):  # move-dl is written for NumPy 1
    np.float_ = np.float64
from move.models.vae import VAE

DISTRIBUTION = "move-dl"
EXPECTED = {
    "vae": "warning reduction_imbalance",  # and the last column of each set is not scored
}


def make_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = VAE(
        categorical_shapes=[(2, 3)],
        continuous_shapes=[4, 5],
        continuous_weights=[1, 1],
        categorical_weights=[1],
        num_hidden=[16],
        num_latent=3,
        dropout=0.0,
    ).train()
    cat = torch.nn.functional.one_hot(torch.randint(3, (16, 2)), 3).float().flatten(1)
    con = torch.randn(16, 9)

    def step() -> torch.Tensor:
        cat_out, con_out, mean, log_var = model(torch.cat([cat, con], 1))
        return model.loss_function(cat, cat_out, con, con_out, mean, log_var, 1.0)[0]

    return step
