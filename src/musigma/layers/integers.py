"""Maps of integers to integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.layers.maps import Map
from musigma.tensors import at_least_float32, rounded

__all__ = ["IntegerShift"]


@dataclass(frozen=True)
class IntegerShift(Map):
    r""":math:`y = x + \lfloor \mathrm{scale} \cdot h \rceil`, which maps integers to integers.

    Counting measure has no volume to change, so log dy/dx = 0. The gradient is that of
    y = x + scale · h: rounding counts as the identity (the straight-through estimator). With a
    `Coupling` this is the integer discrete coupling of Hoogeboom et al., "Integer Discrete Flows
    and Lossless Compression", 2019, arXiv:1905.07376. Integers must be below 2^24 in float32.

    Args:
        scale: The shift, in levels, for h = 1.

    Example:
        >>> IntegerShift(10.0).forward(torch.tensor([[3.0]]), torch.tensor([[0.16]]))[0]
        tensor([[5.]])
    """

    scale: float = 1.0
    straight_through = True

    @property
    def outputs(self) -> int:
        """1: the shift."""
        return 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x + round(scale · h), 0)``."""
        y = x + rounded(self.scale * at_least_float32(h))
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y - round(scale · h), 0)``."""
        x = y - rounded(self.scale * at_least_float32(h))
        return x, torch.zeros_like(x)
