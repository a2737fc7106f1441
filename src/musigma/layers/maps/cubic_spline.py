"""The spline of cubic polynomials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.layers.maps.bins import Bins, knots, locate, pick, shares
from musigma.layers.maps.map import Monotone, planes

__all__ = ["CubicSpline"]


@dataclass(frozen=True)
class CubicSpline(Bins, Monotone):
    r"""A monotone spline of cubic polynomials on K bins, with a continuous slope in [-B, B].

    .. math:: y = y_k + w_k \left(d_k \vartheta^2 \theta + (3 s_k - d_{k+1}) \vartheta \theta^2
        + s_k \theta^3\right), \quad \theta = (x - x_k) / w_k, \quad \vartheta = 1 - \theta

    with the mean slopes s = h / w of the bins. For every element the network emits K widths and K
    heights, whose softmax makes them shares of [-B, B], and two numbers for the slopes of the
    outer knots, from 0 to 3 s. The slopes of the inner knots follow from the sizes of the bins by
    the method of Steffen, which keeps the polynomials monotone. Outside [-B, B] the map is the
    identity, and the slope may jump there; with all parameters zero it is the identity everywhere.
    The inverse is found numerically: closed formulas for roots of cubic polynomials lose most
    digits where one is nearly quadratic. (Durkan, Bekasov, Murray, Papamakarios, "Cubic-Spline
    Flows", 2019, arXiv:1906.02145.)

    Args:
        bins: K, 2 or more.
        bound: B.
        least: The smallest width and height as a share of 2 B.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> spline, x = CubicSpline(bins=4), torch.linspace(-6, 6, 5)[:, None]
        >>> y, log_slope = spline.forward(x, torch.randn(5, 10))
        >>> torch.allclose(spline.forward(x, torch.zeros(5, 10))[0], x, atol=1e-6)
        True
    """

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 2 K + 2."""
        return 2 * self.bins + 2

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        z = x.clamp(-self.bound, self.bound)
        *sizes, ends = raw.split([self.bins, self.bins, 2])
        widths, heights = (2 * self.bound * shares(part, self.least) for part in sizes)
        xs, ys = knots(widths) - self.bound, knots(heights) - self.bound
        k = locate(xs, z)
        w, s = pick(widths, k), pick(heights / widths, k)
        slopes = _slopes(widths, heights / widths, ends)
        d, d1 = pick(slopes, k), pick(slopes, k + 1)
        theta, inside = ((z - pick(xs, k)) / w).clamp(0, 1), z == x
        rest = 1 - theta
        rise = theta * (d * rest.square() + theta * ((3 * s - d1) * rest + s * theta))
        slope = d * rest.square() + 2 * (3 * s - d - d1) * theta * rest + d1 * theta.square()
        y = torch.where(inside, pick(ys, k) + w * rise, x)
        return y, torch.where(inside, slope.log(), 0.0)


def _slopes(widths: Tensor, s: Tensor, ends: Tensor) -> Tensor:
    """Slopes of the knots (K + 1, ...), from the widths and the mean slopes of the bins."""
    w, w1 = widths[:-1], widths[1:]
    parabola = (w1 * s[:-1] + w * s[1:]) / (w + w1)
    inner = torch.minimum(2 * torch.minimum(s[:-1], s[1:]), parabola)
    outer = 3 * (ends - math.log(2)).sigmoid() * s[[0, -1]]
    return torch.cat([outer[:1], inner, outer[1:]])
