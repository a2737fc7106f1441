"""Increasing Bernstein polynomials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.layers.maps.bins import knots
from musigma.layers.maps.map import Monotone, planes

__all__ = ["Bernstein"]


@dataclass(frozen=True)
class Bernstein(Monotone):
    r"""An increasing Bernstein polynomial on [-B, B], continued by straight lines.

    .. math:: y = \sum_{i=0}^{M} \theta_i \binom{M}{i} t^i (1 - t)^{M - i}, \quad
        t = (x + B) / 2B, \quad \theta_i = \theta_0 + \delta_1 + \ldots + \delta_i

    The slope is a Bernstein polynomial of degree M - 1 with the coefficients
    :math:`\delta M / 2B > 0`, so it is positive, and no sum has terms of both signs. Outside
    [-B, B] the map goes on with the slope at the border, so that it and its slope are continuous.
    For every element the network emits a shift, and M numbers whose softplus are the steps δ; the
    shift is that of the middle of θ. With all parameters zero the map is the identity. (Sick,
    Hothorn, Dürr, "Deep transformation models", 2020, arXiv:2004.00464; Ramasinghe, Fernando,
    Khan, Barnes, "Robust normalizing flows using Bernstein-type polynomials", 2021,
    arXiv:2102.03509.)

    Args:
        degree: M.
        bound: B.
        least: The smallest step, as a share of those of the identity.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> map, x = Bernstein(degree=6), torch.linspace(-9, 9, 5)[:, None]
        >>> torch.allclose(map.forward(x, torch.zeros(5, 7))[0], x, atol=1e-5)
        True
    """

    degree: int = 16
    bound: float = 5.0
    least: float = 1e-3

    def __post_init__(self):
        if not 1 <= self.degree <= 100:
            raise ValueError(f"degree: expected 1 to 100; got {self.degree}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound: expected a positive number; got {self.bound}")
        if not 0 < self.least < 1:
            raise ValueError(f"least: expected a number between 0 and 1; got {self.least}")

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, M + 1."""
        return self.degree + 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        steps = F.softplus(raw[1:] + math.log(math.expm1(1 - self.least))) + self.least
        steps = steps * (2 * self.bound / self.degree)
        z = x.clamp(-self.bound, self.bound)
        t = (z + self.bound) / (2 * self.bound)
        theta = knots(steps)
        theta = theta - theta[-1] / 2
        y = raw[0] + (_basis(self.degree, t) * theta).sum(0)
        slope = (_basis(self.degree - 1, t) * steps).sum(0)
        slope = slope * (self.degree / (2 * self.bound))
        return y + torch.where(x == z, 0.0, slope * (x - z)), slope.log()


def _basis(degree: int, t: Tensor) -> Tensor:
    """The Bernstein polynomials of a degree at t, (degree + 1, ...)."""
    i = torch.arange(degree + 1, dtype=t.dtype, device=t.device).reshape(-1, *(1,) * t.ndim)
    count = torch.tensor([math.comb(degree, k) for k in range(degree + 1)], dtype=torch.float64)
    return count.to(t).reshape(i.shape) * t**i * (1 - t) ** (degree - i)
