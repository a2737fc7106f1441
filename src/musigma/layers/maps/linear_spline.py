"""The spline of straight lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.layers.maps.bins import Bins, knots, locate, pick, shares
from musigma.layers.maps.map import Map, planes

__all__ = ["LinearSpline"]


@dataclass(frozen=True)
class LinearSpline(Bins, Map):
    r"""A spline of straight lines on K bins of equal width.

    .. math:: y = y_k + \theta h_k, \quad \theta = (x - x_k) / w, \quad
        \log dy/dx = \log (h_k / w)

    For every element the network emits K numbers, whose softmax makes the heights shares of
    [-B, B]. Outside [-B, B] the map is the identity; with all parameters zero it is the identity
    everywhere. The slope jumps at the knots. (Müller, McWilliams, Rousselle, Gross, Novák, "Neural
    Importance Sampling", 2019, arXiv:1808.03856.)

    Args:
        bins: K, 2 or more.
        bound: B.
        least: The smallest height as a share of 2 B.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> spline, x = LinearSpline(bins=4), torch.linspace(-6, 6, 5)[:, None]
        >>> y, log_slope = spline.forward(x, torch.randn(5, 4))
        >>> torch.allclose(spline.forward(x, torch.zeros(5, 4))[0], x)
        True
    """

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, K."""
        return self.bins

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        z, width = x.clamp(-self.bound, self.bound), 2 * self.bound / self.bins
        height = 2 * self.bound * shares(raw, self.least)
        at = (z + self.bound) / width
        k = at.detach().nan_to_num(0).long().clamp(max=self.bins - 1)
        h, low = (pick(t, k) for t in (height, knots(height)))
        inside = z == x
        y = torch.where(inside, low - self.bound + (at - k) * h, x)
        return y, torch.where(inside, (h / width).log(), 0.0)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``."""
        y, raw = planes(self, y, h)
        z, width = y.clamp(-self.bound, self.bound), 2 * self.bound / self.bins
        height = 2 * self.bound * shares(raw, self.least)
        ends = knots(height) - self.bound
        k = locate(ends, z)
        h, low = pick(height, k), pick(ends, k)
        inside = z == y
        x = torch.where(inside, (k + (z - low) / h) * width - self.bound, y)
        return x, torch.where(inside, (width / h).log(), 0.0)
