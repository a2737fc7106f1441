"""disent: its variational frameworks, as Lightning calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from disent.frameworks import vae
from disent.model import AutoEncoder
from disent.model.ae import DecoderLinear, EncoderLinear

DISTRIBUTION = "disent"
EXPECTED = {
    "vae": "warning reduction_imbalance",  # both terms are means by default
    "vae_sums": "correct",
    "vae_approx": "correct",
    "beta_vae": "correct",
    "beta_tc_vae": "incomplete",
    "dip_vae": "incomplete",  # and its covariance is wrong by E[var] off the diagonal
    "info_vae": "incomplete",
    "ada_gvae": "correct",  # posteriors of a pair are averaged
    "laplace": "incomplete",
}

Step = Callable[[], torch.Tensor]


def _step(kind: str, images: int = 1, **options: Any) -> Step:
    torch.manual_seed(0)
    framework = getattr(vae, kind)
    model = AutoEncoder(EncoderLinear((1, 4, 4), 3, z_multiplier=2), DecoderLinear((1, 4, 4), 3))
    module = framework(model=model, cfg=framework.cfg(optimizer="adam", **options)).train()
    module.log_dict = lambda *_, **__: None  # Lightning's, without a trainer
    data = tuple(torch.rand(16, 1, 4, 4) for _ in range(images))
    return lambda: module.do_training_step({"x_targ": data}, 0)


def make_vae_step() -> Step:
    return _step("Vae")


def make_vae_sums_step() -> Step:
    return _step("Vae", loss_reduction="mean_sum")


def make_vae_approx_step() -> Step:
    return _step("Vae", loss_reduction="mean_sum", kl_loss_mode="approx")


def make_beta_vae_step() -> Step:
    return _step("BetaVae", loss_reduction="mean_sum", beta=1.0)


def make_beta_tc_vae_step() -> Step:
    return _step("BetaTcVae", loss_reduction="mean_sum", beta=4.0)


def make_dip_vae_step() -> Step:
    return _step("DipVae", loss_reduction="mean_sum", beta=1.0)


def make_info_vae_step() -> Step:
    return _step("InfoVae")


def make_ada_gvae_step() -> Step:
    return _step("AdaGVaeMinimal", images=2, loss_reduction="mean_sum", beta=1.0)


def make_laplace_step() -> Step:
    return _step("Vae", loss_reduction="mean_sum", latent_distribution="laplace")
