"""How a context reaches the inside of a network."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join"]


def join(x: Tensor, context: Tensor | None, features: int) -> Tensor:
    """Concatenate a context (B, features) to x (B, C, ...) on axis 1; nothing if features is 0.

    Raises:
        ValueError: If a context is needed and missing, or has another shape.
    """
    if not features:
        return x
    if context is None or context.shape != (len(x), features):
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(
            f"context: this network was built for {features} features per example, shape "
            f"({len(x)}, {features}); got {got}"
        )
    spread = context.to(x.dtype).reshape(*context.shape, *(1,) * (x.ndim - 2))
    return torch.cat([x, spread.expand(-1, -1, *x.shape[2:])], 1)
