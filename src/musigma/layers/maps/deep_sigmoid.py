"""The deep sigmoidal map of neural autoregressive flows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from musigma.layers.maps.map import Monotone, planes
from musigma.layers.maps.mixture import grid, logit_of_sigmoids

__all__ = ["DeepSigmoid"]


@dataclass(frozen=True)
class DeepSigmoid(Monotone):
    r"""A monotone network of an element, whose weights another network emits.

    .. math:: x_{l} = \mathrm{logit} \left(w_l^\top \sigma(a_l x_{l-1} + b_l)\right), \quad
        w_l = \mathrm{softmax}(\cdot), \quad a_l = \mathrm{softplus}(\cdot), \quad y = x_L

    For every element and each of the L layers the network emits K numbers each for w, a and b.
    With all of them zero, every layer is near the identity, and its units differ, as those of
    `MixtureLogisticCDF`. Sums are computed from logarithms, so nothing is lost where sigmoids are
    close to 0 or 1. (The deep sigmoidal flow of Huang, Krueger, Lacoste, Courville, "Neural
    Autoregressive Flows", 2018, arXiv:1804.00779.)

    Args:
        units: K.
        layers: L.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> import torch
        >>> net = DeepSigmoid(units=4, layers=2)
        >>> x, h = torch.randn(5, 3), torch.randn(5, net.outputs * 3)
        >>> torch.allclose(net.inverse(net.forward(x, h)[0], h)[0], x, atol=1e-4)
        True
    """

    units: int = 8
    layers: int = 2

    def __post_init__(self):
        for name in ("units", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more; got {getattr(self, name)}")

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 3 K L."""
        return 3 * self.units * self.layers

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        at, scale = grid(self.units, math.pi**2 / 3)
        at = at.to(raw).reshape(-1, *(1,) * x.ndim) / scale
        even = math.log(math.expm1(1 / scale))
        total = x.new_zeros(())
        for part in raw.chunk(self.layers):
            weights, slopes, shifts = part.chunk(3)
            a = F.softplus(slopes + even).clamp(min=1e-6)
            x, log_slope = logit_of_sigmoids(
                weights.log_softmax(0), a * x + (shifts - at), a.log()
            )
            total = total + log_slope
        return x, total
