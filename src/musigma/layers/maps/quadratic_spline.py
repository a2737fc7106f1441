"""The spline of parabolas, whose slope is piecewise linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.layers.maps.bins import Bins, knots, locate, pick, shares
from musigma.layers.maps.map import Map, planes

__all__ = ["QuadraticSpline", "area", "place"]


@dataclass(frozen=True)
class QuadraticSpline(Bins, Map):
    r"""A spline of parabolas on K bins: its slope is linear in each bin, and continuous.

    .. math:: y = y_k + w_k \theta \left(v_k + (v_{k+1} - v_k) \theta / 2\right), \quad
        \theta = (x - x_k) / w_k, \quad dy/dx = v_k + (v_{k+1} - v_k) \theta

    For every element the network emits K widths and K - 1 slopes of the inner knots, all
    unbounded. A softmax makes the widths shares of [-B, B]; slopes go through a softplus, and are
    divided by their integral, while the slope of the outer knots remains 1. Outside [-B, B] the
    map is the identity; with all parameters zero it is the identity everywhere. (Müller,
    McWilliams, Rousselle, Gross, Novák, "Neural Importance Sampling", 2019, arXiv:1808.03856;
    the outer slopes are those of Durkan et al., 2019, arXiv:1906.04032.)

    Args:
        bins: K, 2 or more.
        bound: B.
        least: The smallest slope, and the smallest width as a share of 2 B.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> spline, x = QuadraticSpline(bins=4), torch.linspace(-6, 6, 5)[:, None]
        >>> y, log_slope = spline.forward(x, torch.randn(5, 7))
        >>> torch.allclose(spline.forward(x, torch.zeros(5, 7))[0], x, atol=1e-6)
        True
    """

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 2 K - 1."""
        return 2 * self.bins - 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        z = x.clamp(-self.bound, self.bound)
        widths, slopes, xs, ys = self._bins(raw)
        k = locate(xs, z)
        w, v, v1 = pick(widths, k), pick(slopes, k), pick(slopes, k + 1)
        theta, inside = ((z - pick(xs, k)) / w).clamp(0, 1), z == x
        y = torch.where(inside, pick(ys, k) + w * area(theta, v, v1), x)
        return y, torch.where(inside, torch.lerp(v, v1, theta).log(), 0.0)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``, by the root of a quadratic."""
        y, raw = planes(self, y, h)
        z = y.clamp(-self.bound, self.bound)
        widths, slopes, xs, ys = self._bins(raw)
        k = locate(ys, z)
        w, v, v1 = pick(widths, k), pick(slopes, k), pick(slopes, k + 1)
        theta, inside = place((z - pick(ys, k)) / w, v, v1), z == y
        x = torch.where(inside, pick(xs, k) + w * theta, y)
        return x, torch.where(inside, -torch.lerp(v, v1, theta).log(), 0.0)

    def _bins(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Widths (K, ...), and slopes, x and y of the knots (K + 1, ...)."""
        width = shares(raw[: self.bins], self.least)
        inner = F.softplus(raw[self.bins :]) + self.least
        ends = (width[0] + width[-1]) / 2
        within = (width[0] * inner[0] + width[-1] * inner[-1]) / 2
        within = within + (width[1:-1] * (inner[:-1] + inner[1:]) / 2).sum(0)
        free = inner * ((1 - ends) / within)  # with outer slopes of 1, the integral is 1
        slopes = F.pad(free, (0, 0) * (raw.ndim - 1) + (1, 1), value=1.0)
        slopes = slopes.mul(1 - self.least).add(self.least)
        width = 2 * self.bound * width
        ys = knots(width * (slopes[:-1] + slopes[1:]) / 2)
        return width, slopes, knots(width) - self.bound, ys - self.bound


def area(theta: Tensor, v: Tensor, v1: Tensor) -> Tensor:
    """The integral from 0 to theta of a slope that is v at 0, v1 at 1, and linear between."""
    return theta * (v * (1 - theta / 2) + v1 * theta / 2)


def place(size: Tensor, v: Tensor, v1: Tensor) -> Tensor:
    """The theta in [0, 1] with `area` of a given size."""
    root = (v.square() + 2 * (v1 - v) * size).clamp(min=0).sqrt()
    return (2 * size / (v + root)).clamp(0, 1)
