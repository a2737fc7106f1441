"""gd-vae-pytorch: its two losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gd_vae_pytorch.vae import dyvae_loss, loss_VAE_neg_tilde_L_B
from torch import nn

DISTRIBUTION = "gd-vae-pytorch"
EXPECTED = {
    "vae": "correct",  # its prior variance is 1 + 1e-5
    "dynamic_vae": "warning reduction_imbalance",
}


def _mlp(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inside, 16), nn.ReLU(), nn.Linear(16, outside))


def make_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    theta = {"model_mu": _mlp(3, 12), "model_log_sigma_sq": _mlp(3, 12)}
    phi = {
        "model_mu": _mlp(12, 3),
        "model_log_sigma_sq": _mlp(12, 3),
        "nu": torch.tensor(1.0),
    }
    data = torch.randn(16, 12)
    sizes = {"m1_mc": 2, "batch_size": 16, "total_N_xi": 16, "num_dim_x": 12, "num_dim_z": 3}
    return lambda: loss_VAE_neg_tilde_L_B(data, theta, phi, device="cpu", beta=1.0, **sizes)


def make_dynamic_vae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    mean, log_var, decoder = _mlp(12, 3), _mlp(12, 3), _mlp(3, 12)
    data, target = torch.randn(16, 12), torch.randn(16, 12)
    options = {
        "beta": 1.0,
        "gamma": 1.0,
        "num_monte_carlo_samples": 2,
        "latent_prior_std_dev": torch.tensor(1.0),
        "device": "cpu",
        "mse_loss": nn.MSELoss(),
    }
    return lambda: dyvae_loss(
        mean, log_var, decoder, lambda z, _: z + 0.1, None, data, target, **options
    )
