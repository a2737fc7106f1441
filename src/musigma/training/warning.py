"""Conditions that training warns about: spikes, collapse, saturation, implausible figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation import (
    COLLAPSED,
    ILL_CONDITIONED,
    SATURATED,
    conditioning,
    saturation,
)
from musigma.model import Model
from musigma.processes import current_processes
from musigma.training.config import TrainConfig
from musigma.training.state import Progress

__all__ = [
    "KINDS",
    "figure_warnings",
    "loss_spike",
    "model_warnings",
    "references",
    "start_warnings",
]

KINDS = ("collapse", "saturation", "unexamined", "conditioning", "raw", "gaussian", "rising")
"""Kinds of conditions that each evaluation looks for."""
SPIKE = 10.0
"""Mean deviations from the usual loss above which a loss is a spike."""
EARLY = 100
"""Steps before which a poor figure is not implausible."""
RISING = 3
"""Evaluations without improvement after which a higher figure is overfitting."""
ELEMENTS = 2**22
"""Most numbers that a reference is computed from."""
FEW = 30
"""Validation examples below which figures vary too much."""


def start_warnings(config: TrainConfig, train: int, validation: int) -> list[str]:
    """Warnings at the start of a run, given the numbers of examples."""
    messages = []
    if config.batch_size > train:
        messages.append(
            f"a batch of {config.batch_size} is more than all {train} training examples, so some "
            "occur more than once in every step"
        )
    if validation < FEW:
        messages.append(
            f"the validation data are {validation} example{'s' * (validation != 1)}, too few for "
            "a reliable figure, so which weights are best is mostly chance; use more data"
        )
    if config.shard and current_processes().count == 1:
        messages.append("shard: there are no other processes, so the weights stay whole")
    return messages


def loss_spike(progress: Progress, loss: float) -> dict[str, str]:
    """A warning if a loss is far above the usual one, which is then updated with it."""
    warnings = {}
    usual, deviation = progress.usual_loss or (loss, abs(loss))
    if progress.step > 100 and loss > usual + SPIKE * deviation:
        warnings["spike"] = (
            f"the loss is {loss:.4g} nats; it is usually {usual:.4g} ± {deviation:.2g}"
        )
    weight = 0.02 if progress.step else 1.0
    change = min(loss, usual + SPIKE * deviation) - usual  # bounds the effect of one spike
    progress.usual_loss = [usual + weight * change, deviation + weight * (abs(change) - deviation)]
    return warnings


@torch.no_grad()
def model_warnings(
    model: Model, figure: Mapping[str, Any], x: Tensor, context: Context
) -> dict[str, str]:
    """Warnings about a model, by kind and module name, given its evaluation and a batch."""
    warnings: dict[str, str] = {}
    names = model.site_names()
    sites = [] if model.is_flow else [names[site] for site in model.latents()]
    for site, nats in zip(sites, figure["kl"], strict=False):
        if nats < COLLAPSED:
            warnings[f"collapse {site}"] = (
                f"posterior collapse: the latent of {site} carries {nats:.3f} nats; --free-bits "
                "or --kl-warmup keep latents active"
            )
    shares = saturation(model, x, context)
    if unexamined := [name for name, share in shares.items() if share is None]:
        warnings["unexamined"] = (
            "not examined for saturated scales, since they define no emitters(): "
            + ", ".join(unexamined)
        )
    for name, share in shares.items():
        if share is not None and share > SATURATED:
            warnings[f"saturation {name}"] = (
                f"{share:.0%} of the scales of {name} are at their limit; use a wider format, or "
                "a smaller --lr"
            )
    for name, condition in conditioning(model).items():
        if condition > ILL_CONDITIONED:
            warnings[f"conditioning {name}"] = (
                f"the matrix of {name} has condition number {condition:.1e}, so decoding loses "
                f"{math.log10(condition):.0f} digits; use a smaller --lr"
            )
    return warnings


def references(train: Dataset, validation: Dataset) -> dict[str, float]:
    """Figures that a trained model should beat, in bits per dimension.

    `raw`: the bits of each element, for integer data. `gaussian`: a Gaussian with the mean and the
    standard deviation of each column of the first training examples, for real numbers.
    """
    if train.bits is not None:
        return {"raw": float(train.bits)}
    if train.schema is not None:
        return {}
    n = max(2, ELEMENTS // math.prod(train.shape))
    first, x = (
        data.take(np.arange(min(len(data), n))).astype(np.float64) for data in (train, validation)
    )
    mean, std = first.mean(0), first.std(0)
    if not len(x) or not (std > 0).all():
        return {}
    nats = 0.5 * ((x - mean) / std) ** 2 + np.log(std) + 0.5 * math.log(2 * math.pi)
    return {"gaussian": float(nats.mean()) / math.log(2)}


def figure_warnings(
    figure: Mapping[str, Any], reference: Mapping[str, float], progress: Progress, share: float
) -> dict[str, str]:
    """Warnings about a validation figure: late in the budget it is poor, or it rises."""
    bits, error = figure["bits_per_dim"], figure.get("standard_error") or 0.0
    warnings: dict[str, str] = {}
    late = share >= 0.5 and progress.step >= EARLY
    if late and bits > reference.get("raw", math.inf):
        warnings["raw"] = (
            f"the validation figure, {bits:.4g} bits/dim, is above the {reference['raw']:g} bits "
            "that the data take uncompressed: the model has learned nothing yet, or the data do "
            "not suit it (a longer budget, or another architecture)"
        )
    if late and bits > reference.get("gaussian", math.inf) + 3 * error:
        warnings["gaussian"] = (
            f"the validation figure, {bits:.4g} bits/dim, is worse than that of a Gaussian with "
            f"the mean and variance of each column, {reference['gaussian']:.4g}: look at the "
            "columns' units and outliers (--standardize), or give a longer budget"
        )
    if progress.stale >= RISING and bits > progress.best + 3 * error:
        warnings["rising"] = (
            f"overfitting: the validation figure has not improved since step {progress.best_step} "
            f"({progress.best:.4g} bits/dim, now {bits:.4g}); model.safetensors holds the weights "
            "of that step (--patience stops there)"
        )
    return warnings
