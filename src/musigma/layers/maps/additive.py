"""The map that adds a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.layers.maps.map import Map
from musigma.tensors import at_least_float32

__all__ = ["Additive"]


@dataclass(frozen=True)
class Additive(Map):
    """y = x + h: a map of slope 1, so the volume is preserved."""

    @property
    def outputs(self) -> int:
        """1: the shift."""
        return 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x + h, 0)``."""
        shift = at_least_float32(h)
        return x + shift, torch.zeros_like(shift)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y - h, 0)``."""
        shift = at_least_float32(h)
        return y - shift, torch.zeros_like(shift)
