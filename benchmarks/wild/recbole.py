"""RecBole: its variational recommenders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recbole.model.general_recommender import ldiffrec, macridvae, multivae, ract, recvae

DISTRIBUTION = "recbole"
EXPECTED = {
    "multi_vae": "bug kl_mismatch",  # sampled: 0.01 sigma
    "ract": "bug kl_mismatch",
    "rec_vae": "warning kl_offset",  # sampled 0.01 sigma, log q of sigma: off by a constant
    "macrid_vae": "correct",  # prior std 0.01, mean of norm 1
    "ldiffrec_autoencoder": "correct",
}
USERS, ITEMS = 20, 30

Step = Callable[[], torch.Tensor]


class Ratings:
    """As much of a data set of RecBole as its models ask for."""

    def num(self, field: str) -> int:
        """How many users, or items, there are."""
        return {"user": USERS, "item": ITEMS}[field]

    def history_item_matrix(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The items of each user, their ratings, and how many there are."""
        generator = torch.Generator().manual_seed(0)
        items = torch.rand(USERS, ITEMS, generator=generator).argsort(1)[:, :8]
        return items, torch.ones(USERS, 8), torch.full((USERS,), 8)


CONFIG: dict[str, Any] = {
    "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item",
    "NEG_PREFIX": "neg_",
    "device": torch.device("cpu"),
    "mlp_hidden_size": [24],
    "encoder_hidden_size": [24],
    "latent_dimension": 8,
    "hidden_dimension": 24,
    "embedding_size": 8,
    "dropout_prob": 0.5,
    "anneal_cap": 0.2,
    "total_anneal_steps": 0,  # the weight at the end of the annealing
    "kfac": 2,
    "tau": 0.1,
    "nogb": False,
    "std": 0.01,
    "reg_weights": [0.0, 0.0],
    "beta": 0.2,
    "gamma": 0.005,
    "mixture_weights": [0.15, 0.75, 0.1],
    "critic_layers": [10],
    "metrics_k": 10,
    "train_stage": "actor_pretrain",
    "pre_model_path": "",
}
BATCH = {"user": torch.arange(12)}


def _step(kind: type, **options: Any) -> Step:
    torch.manual_seed(0)
    model = kind(CONFIG, Ratings()).train()
    return lambda: model.calculate_loss(BATCH, **options)


def make_multi_vae_step() -> Step:
    return _step(multivae.MultiVAE)


def make_ract_step() -> Step:
    return _step(ract.RaCT)


def make_rec_vae_step() -> Step:
    return _step(recvae.RecVAE, encoder_flag=True)


def make_macrid_vae_step() -> Step:
    return _step(macridvae.MacridVAE)


def make_ldiffrec_autoencoder_step() -> Step:
    torch.manual_seed(0)
    model = ldiffrec.AutoEncoder(
        torch.zeros(ITEMS - 1, 4), 1, [16, 6], [16], "cpu", "tanh"
    ).train()
    items, _, _ = Ratings().history_item_matrix()
    ratings = torch.zeros(USERS, ITEMS).scatter(1, items, 1.0)

    def step() -> torch.Tensor:  # the terms of LDiffRec.calculate_loss without its diffusion
        _, latent, kl = model.Encode(ratings)
        return ldiffrec.compute_loss(model.Decode(latent), ratings) + 0.03 * kl

    return step
