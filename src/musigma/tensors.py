"""Small operations on tensors that every part of the library shares."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32", "channels_last", "per_example", "sum_event"]


def at_least_float32(t: Tensor) -> Tensor:
    """Half precision as float32, any other type unchanged: no density is computed in less."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def channels_last(t: Tensor) -> Tensor:
    """Images (B, C, H, W) in the memory format in which convolutions are fastest."""
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def sum_event(t: Tensor, event_ndims: int) -> Tensor:
    """The sum over the last `event_ndims` dimensions, which may be none."""
    return t.sum([*range(-event_ndims, 0)]) if event_ndims else t


def per_example(weight: float | Tensor, value: Tensor) -> float | Tensor:
    """A number, or one number for each example (B,), shaped to multiply `value` (B, ...)."""
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight.to(value).reshape(-1, *(1,) * (value.ndim - 1))
    return weight
