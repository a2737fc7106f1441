"""How the output of a network is read as mean and log-scale, and what a misreading does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from musigma.explore import answers
from musigma.explore.lines import lines
from musigma.gaussian import Format

__all__ = ["head", "mismatch"]


def head(text: str, numbers: Sequence[float]) -> dict[str, Any]:
    """How a format reads the output of a network."""
    if len(numbers) != 6 or not all(abs(value) < 1e4 for value in numbers):
        raise ValueError("numbers: expected 6 of them, below 10,000")
    form, mean, log_std = answers.read(text, numbers)
    order = Format(form.layout, form.order, bounds=None, dim=form.dim)
    places = answers.read(str(order), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])[1:]
    raw = torch.linspace(-6, 6, 121)
    return {
        "format": str(form),
        "mean": mean[0].tolist(),
        "log_std": log_std[0].tolist(),
        "mean_from": places[0][0].int().tolist(),
        "scale_from": places[1][0].int().tolist(),
        "raw": raw.tolist(),
        "curve": form.log_std(raw).tolist(),
        "python": lines((answers.read, {"text": text, "numbers": list(numbers)})),
    }


def mismatch(sampler: str, charged: str, noise: float) -> dict[str, Any]:
    """A loss whose sampler and KL read the scale differently."""
    if not 0.05 <= noise <= 5:
        raise ValueError(f"noise: expected 0.05 to 5; got {noise:g}")
    arguments = {"sampler": sampler, "charged": charged, "noise": noise}
    r, drawn, loss, bound_, kl = answers.mismatch(**arguments)
    best, least = int(loss.argmin()), int(bound_.argmin())
    return {
        "r": r[:, 0].tolist(),
        "std": drawn[:, 0].exp().tolist(),
        "loss": loss.tolist(),
        "bound": bound_.tolist(),
        "chosen": best,
        "best": least,
        "true_std": noise / math.sqrt(1 + noise**2),
        "charged_std": float(Format.parse(charged).log_std(r[best]).exp()),
        "charged": float(kl[best]),
        "python": lines((answers.mismatch, arguments)),
    }
