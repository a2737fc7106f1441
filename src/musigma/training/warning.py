"""Conditions that training warns of: spikes, collapse, saturation, implausible figures."""

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

__all__ = ["KINDS", "about_batches", "examine", "implausible", "new", "references", "spike"]

KINDS = ("collapse", "saturation", "unexamined", "conditioning", "raw", "gaussian", "rising")
"""Kinds of conditions that each evaluation looks for."""
SPIKE = 10.0
"""Mean deviations from the usual loss above which a loss is a spike."""
EARLY = 100
"""Steps before which a poor figure is not implausible."""
FEW = 30
"""Validation examples below which figures vary too much."""


def about_batches(config: TrainConfig, train: int, validation: int) -> list[str]:
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


def spike(progress: Progress, loss: float) -> str | None:
    """A warning if a loss is far above the usual one; then updates the usual loss."""
    message = None
    if progress.usual_loss and progress.step > 100:
        usual, distance = progress.usual_loss
        if loss > usual + SPIKE * distance:
            message = f"the loss is {loss:.4g} nats, and usually {usual:.4g} +- {distance:.2g}"
    usual, distance = progress.usual_loss or (loss, abs(loss))
    weight = 0.02 if progress.step else 1.0
    step = min(loss, usual + SPIKE * distance) - usual  # one spike must not become the usual loss
    progress.usual_loss = [usual + weight * step, distance + weight * (abs(step) - distance)]
    return message


@torch.no_grad()
def examine(
    model: Model, figure: Mapping[str, Any], x: Tensor, context: Context
) -> dict[str, str]:
    """Warnings about a model, by kind and module name.

    Args:
        model: The model.
        figure: Its evaluation, with the `kl` of each latent.
        x: A batch.
        context: Its context.
    """
    conditions: dict[str, str] = {}
    names = model.site_names()
    sites = [] if model.is_flow else [names[site] for site in model.latents()]
    for site, nats in zip(sites, figure["kl"], strict=False):
        if nats < COLLAPSED:
            conditions[f"collapse {site}"] = (
                f"posterior collapse: the latent of {site} carries {nats:.3f} nats; --free-bits "
                "or --kl-warmup keep latents active"
            )
    shares = saturation(model, x, context)
    if unexamined := [name for name, share in shares.items() if share is None]:
        conditions["unexamined"] = (
            "not examined for saturated scales, since they define no emitters(): "
            + ", ".join(unexamined)
        )
    for name, share in shares.items():
        if share is not None and share > SATURATED:
            conditions[f"saturation {name}"] = (
                f"{share:.0%} of the scales of {name} are at their limit; use a wider format, or "
                "a smaller --lr"
            )
    for name, condition in conditioning(model).items():
        if condition > ILL_CONDITIONED:
            conditions[f"conditioning {name}"] = (
                f"the matrix of {name} has condition number {condition:.1e}, so decoding loses "
                f"{math.log10(condition):.0f} digits; use a smaller --lr"
            )
    return conditions


def references(train: Dataset, validation: Dataset) -> dict[str, float]:
    """Figures that a trained model should beat, in bits per dimension.

    `raw`: the bits of each element, for integer data. `gaussian`: a Gaussian with the mean and the
    standard deviation of each column of (up to 10,000) training examples, for real numbers.
    """
    if train.bits is not None:
        return {"raw": float(train.bits)}
    fitted, scored = (
        data.take(np.arange(min(len(data), 10_000))).astype(np.float64)
        for data in (train, validation)
    )
    std = fitted.std(0)
    if not len(scored) or not (std > 0).all():
        return {}
    z = (scored - fitted.mean(0)) / std
    nats = 0.5 * z**2 + np.log(std) + 0.5 * math.log(2 * math.pi)
    return {"gaussian": float(nats.mean()) / math.log(2)}


def implausible(
    figure: Mapping[str, Any], reference: Mapping[str, float], progress: Progress, share: float
) -> dict[str, str]:
    """Warnings about a validation figure: later than half of the budget, or if it rises."""
    bits, error = figure["bits_per_dim"], figure.get("standard_error") or 0.0
    conditions: dict[str, str] = {}
    if share >= 0.5 and progress.step >= EARLY:
        if "raw" in reference and bits > reference["raw"]:
            conditions["raw"] = (
                f"the validation figure, {bits:.4g} bits/dim, is above the {reference['raw']:g} "
                "bits that the data take uncompressed: the model has learned nothing yet, or the "
                "data do not suit it (a longer budget, or another architecture)"
            )
        if "gaussian" in reference and bits > reference["gaussian"] + 3 * error:
            conditions["gaussian"] = (
                f"the validation figure, {bits:.4g} bits/dim, is worse than that of a Gaussian "
                f"with the mean and variance of each column, {reference['gaussian']:.4g}: look at "
                "outliers, or give a longer budget"
            )
    if progress.stale >= 3 and bits > progress.best + 3 * error:
        conditions["rising"] = (
            f"overfitting: the validation figure has not improved since step {progress.best_step} "
            f"({progress.best:.4g} bits/dim, now {bits:.4g}); model.safetensors holds the weights "
            "of that step (--patience stops there)"
        )
    return conditions


def new(
    progress: Progress, kinds: tuple[str, ...], conditions: Mapping[str, str]
) -> dict[str, str]:
    """Conditions of the given kinds that did not hold before; updates `progress`."""
    known = {name for name in progress.warnings if name.split(" ")[0] in kinds}
    others = {name: text for name, text in progress.warnings.items() if name not in known}
    progress.warnings = others | dict(conditions)
    return {name: message for name, message in conditions.items() if name not in known}
