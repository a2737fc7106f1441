"""Signs of trouble in a model: scales at their limit, latents that carry nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from musigma.distributions import LikelihoodHead
from musigma.gaussian import GaussianHead
from musigma.layers import Coupling
from musigma.model import Model

__all__ = ["ACTIVE", "COLLAPSED", "SATURATED", "saturation"]

ACTIVE = 0.01
"""Nats: a unit that costs less carries nothing."""
COLLAPSED = 0.05
"""Nats: a latent that costs less has collapsed to its prior."""
SATURATED = 0.5
"""The share of scales at their limit from which that is worth a word."""


@torch.no_grad()
def saturation(model: Model, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
    """For every network whose output a `Format` reads, the share of scales at their limit."""
    shares: dict[str, float] = {}

    def watch(name: str, reader: Any):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            read = reader.scales(output) if isinstance(reader, LikelihoodHead) else output
            shares[name] = float(reader.format.saturation(read))

        return hook

    hooks = []
    for name, module in model.named_modules():
        emits = (
            (isinstance(module, GaussianHead) and module.emitted)
            or (isinstance(module, Coupling) and module.kind == "affine")
            or (isinstance(module, LikelihoodHead) and module.name.startswith("logistic"))
        )
        if emits:
            hooks.append(module.net.register_forward_hook(watch(name, module)))  # pyright: ignore
    try:
        model(x, context)
    finally:
        for hook in hooks:
            hook.remove()
    return shares
