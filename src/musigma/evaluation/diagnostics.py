"""Signs of trouble in a model: scales at their limit, latents that carry nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    """For every network that emits scales with a limit, the share of them at their limit."""
    shares: dict[str, float] = {}

    def watch(name: str, share: Callable[[Any], Tensor]):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shares[name] = float(share(output))

        return hook

    hooks = []
    for name, module in model.named_modules():
        for net, share in getattr(module, "emitters", tuple)():
            hooks.append(net.register_forward_hook(watch(name, share)))
    try:
        model(x, context)
    finally:
        for hook in hooks:
            hook.remove()
    return shares
