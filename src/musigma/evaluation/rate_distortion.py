"""Rates and distortions of a decoder, over the weight of its data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from musigma.data import Dataset
from musigma.evaluation.annealing import Annealing, Chains
from musigma.evaluation.inputs import Progress, batches, check, evaluating
from musigma.model import Model

__all__ = ["rate_distortion"]


def rate_distortion(
    model: Model,
    data: Dataset,
    *,
    k: int = 8,
    annealing: Annealing | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    r"""What it costs to describe the latents, and then the data, whatever the encoder.

    .. math:: p_\beta(z|x) \propto p(z)\, p(x|z)^\beta, \quad D_\beta = E[-\log p(x|z)], \quad
        R_\beta = KL(p_\beta(z|x) \| p(z)) = -\beta D_\beta - \log Z_\beta

    No q(z | x) has a smaller rate at the same distortion. At β = 1 both add up to -log p(x). One
    run of annealed importance sampling from the prior passes through every β. (Huang, Makhzani,
    Cao, Grosse, "Evaluating Lossy Compression Rates of Deep Generative Models", 2020,
    arXiv:2008.06653.)

    Args:
        model: A model with latents that are real numbers. It is set to evaluation mode during the
            call.
        data: The examples.
        k: Chains for each example.
        annealing: Its number of steps is that of the points; it starts at the prior.
        batch_size: Examples per batch.
        seed: Random seed.
        progress: Called with (done, total).

    Returns:
        A row for each β, as JSON values: `beta`; the means over the examples of `rate` (an upper
        bound on average) and `distortion`, in nats; and their `standard_error_...`.

    Raises:
        ValueError: As `score`; or if there are no examples.

    Example:
        >>> import musigma
        >>> digits = musigma.data.load("digits").subset(range(8))
        >>> _ = torch.manual_seed(0)
        >>> model = musigma.build("mlp_vae", digits.spec(), latents=2, hidden=8)
        >>> curve = rate_distortion(model, digits, annealing=Annealing(steps=20))
        >>> [round(row["beta"], 2) for row in curve[3::4]]
        [0.07, 0.3, 0.7, 0.93, 1.0]
    """
    check(model, data)
    if not len(data):
        raise ValueError(f"data: {data.name or 'the set'} holds no examples to evaluate")
    annealing = dataclasses.replace(annealing or Annealing(), from_prior=True)
    columns: dict[float, list[torch.Tensor]] = {}
    with evaluating(model):
        for x, context in batches(
            model, data, batch_size=batch_size, seed=seed, progress=progress
        ):
            for beta, log_z, log_px in Chains(model, x, context, annealing).tempered(k):
                both = torch.stack([beta * log_px - log_z, -log_px], 1)
                columns.setdefault(beta, []).append(both.cpu())
    return [_row(beta, torch.cat(parts).numpy()) for beta, parts in columns.items()]


def _row(beta: float, both: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"beta": beta}
    for name, values in zip(("rate", "distortion"), both.T, strict=True):
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        row |= {name: float(values.mean()), f"standard_error_{name}": error}
    return row
