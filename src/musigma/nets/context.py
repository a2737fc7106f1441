"""Concatenation of a context to the input of a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["at_size", "join", "pooled"]


def join(x: Tensor, context: Tensor | None, features: int) -> Tensor:
    """Concatenate a context to x (B, C, ...) on axis 1; x itself if `features` is 0.

    Args:
        x: A vector (B, C) or an image (B, C, H, W).
        context: One row per example: a vector (B, features), which is repeated at every pixel, or
            a map (B, features, H', W'), which is resized to x, or averaged if x is a vector.
        features: Number of features that the network was built for.

    Raises:
        ValueError: If a context is needed and missing, or has another shape.
    """
    if not features:
        return x
    if context is None or context.ndim not in (2, 4) or context.shape[:2] != (len(x), features):
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(
            f"context: this network was built for {features} features per example, shape "
            f"({len(x)}, {features}) or ({len(x)}, {features}, height, width); got {got}"
        )
    return torch.cat([x, at_size(context.to(x.dtype), x.shape[2:])], 1)


def at_size(context: Tensor, size: torch.Size) -> Tensor:
    """A context (B, F) or (B, F, H', W') as (B, F, *size)."""
    if not size:
        return pooled(context)
    if context.ndim == 2:
        spread = context.reshape(*context.shape, *(1,) * len(size))
        return spread.expand(*context.shape, *size)
    return (
        context
        if context.shape[2:] == size
        else F.adaptive_avg_pool2d(context, (size[0], size[1]))
    )


def pooled(context: Tensor) -> Tensor:
    """A vector (B, F): a map is averaged over its positions."""
    return context if context.ndim == 2 else context.flatten(2).mean(2)
