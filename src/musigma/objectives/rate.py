"""The ELBO with another weight, or another function, of its rate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from musigma.objectives.base import objective, terms_of
from musigma.objectives.parts import kl_of_dimensions
from musigma.trace import Evidence, Recorder

__all__ = ["beta_elbo", "capacity", "free_bits"]


@objective
def beta_elbo(evidence: Evidence, beta: float = 1.0) -> Tensor:
    """Distortion + beta · rate (Higgins et al., "beta-VAE", 2017). Nats, (B,).

    The rate is the cost of the latents. This objective is for models with a likelihood: a flow
    has no distortion.
    """
    return beta * evidence.rate - evidence.log_px - evidence.auxiliary


@objective
def capacity(
    record: Evidence | Recorder,
    *,
    capacity: float = 25.0,
    gamma: float = 100.0,
    anneal: float = 0.5,
    over: Literal["example", "batch"] = "example",
) -> Tensor:
    """Distortion + gamma · abs(rate - C), where C rises from zero to `capacity`. Nats, (B,).

    (Burgess et al., "Understanding disentangling in beta-VAE", 2018, arXiv:1804.03599.)

    Args:
        record: A pass of a model with a likelihood.
        capacity: The last C, in nats.
        gamma: Weight of the distance from it.
        anneal: Share of the training budget over which C rises linearly; 0: none.
        over: Whether the rate of each `example` is to be C, as in the paper, or its mean over the
            `batch`, which depends on the parts and processes that a batch is divided into.

    Raises:
        ValueError: For another `over`.
    """
    if over not in ("example", "batch"):
        raise ValueError(f"over: expected 'example' or 'batch'; got {over!r}")
    evidence = terms_of(record)
    share = record.share if isinstance(record, Recorder) else 1.0
    target = capacity * (min(1.0, share / anneal) if anneal else 1.0)
    rate = evidence.rate if over == "example" else evidence.rate.mean().expand(len(evidence.kl))
    return gamma * (rate - target).abs() - evidence.log_px - evidence.auxiliary


@objective
def free_bits(
    record: Evidence | Recorder,
    free: float = 0.0,
    *,
    beta: float = 1.0,
    per: Literal["latent", "dimension"] = "latent",
) -> Tensor:
    """`beta-elbo`, where each latent's KL, averaged over the batch, costs at least `free` nats.

    If the mean is not above `free`, the KL of every example is replaced by `free`, so reducing it
    further gains nothing (Kingma et al., "Improving Variational Inference with Inverse
    Autoregressive Flow", 2016, arXiv:1606.04934). The mean is over the examples of the pass: in
    training with several processes, or a batch in several parts (`TrainConfig.accumulate`), over
    those of one process and part, so the same batch can have another gradient. Nats, (B,).

    Args:
        record: A pass; a `Recorder` for dimensions.
        free: Nats that are free.
        beta: Weight of the rate.
        per: Whether they are free for each `latent`, a group of dimensions (as one level of a
            hierarchy), or for each `dimension` of each, which must be independent.

    Raises:
        ValueError: For another `per`, or if dimensions are not independent.
        TypeError: If dimensions are asked for and the terms are those of an `Evidence`.
    """
    evidence = terms_of(record)
    kl = evidence.kl
    if per == "dimension":
        if not isinstance(record, Recorder):
            raise TypeError("record: expected a Recorder, which keeps the KL of each dimension")
        kl = kl_of_dimensions(record, "free-bits per=dimension")
    elif per != "latent":
        raise ValueError(f"per: expected 'latent' or 'dimension'; got {per!r}")
    penalized = kl.mean(0) > free
    kl = torch.where(penalized, kl, torch.full_like(kl, free)).sum(1)
    rate = kl + evidence.log_q - evidence.log_det
    return beta * rate - evidence.log_px - evidence.auxiliary
