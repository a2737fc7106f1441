"""PyOD: its VAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyod.models.vae import VAE

DISTRIBUTION = "pyod"
EXPECTED = {
    "vae": "bug kl_constant",  # capacity 0 clamps the KL to 0
    "vae_capacity": "bug kl_constant",  # min(KL, capacity): held only while below
    "training_forward": "bug kl_constant",
}

Step = Callable[[], torch.Tensor]


def _detector(**options: float) -> VAE:
    torch.manual_seed(0)
    detector = VAE(device=torch.device("cpu"), verbose=0, dropout_rate=0.0, **options)
    detector.feature_size = 12
    detector.build_model()
    detector.model.train()
    detector.optimizer = torch.optim.Adam(detector.model.parameters(), lr=detector.lr)
    return detector


def _step(detector: VAE) -> Step:
    data = torch.randn(32, 12)

    def step() -> torch.Tensor:
        reconstruction, mean, log_var = detector.model(data)
        return detector.criterion(
            data,
            reconstruction,
            mean,
            log_var,
            beta=detector.beta,
            capacity=detector.capacity,
            logvar_clip=detector.logvar_clip_,
        )

    return step


def make_vae_step() -> Step:
    return _step(_detector())


def make_vae_capacity_step() -> Step:
    return _step(_detector(capacity=5.0))


def make_training_forward_step() -> Callable[[], float]:
    detector, data = _detector(), torch.randn(32, 12)
    return lambda: detector.training_forward(data)  # with its backward and its optimizer
