"""The integral of a positive network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.layers.maps.bins import knots, locate, pick
from musigma.layers.maps.map import Map, planes
from musigma.layers.maps.quadratic_spline import area, place
from musigma.tensors import at_least_float32

__all__ = ["UMNN"]


class UMNN(nn.Module, Map):
    r"""An unconstrained monotonic neural network: the integral of a positive network of x.

    .. math:: y = c + \int_0^x g(u; s)\, du

    The network g has weights of its own, and the network of the layer emits c and a signal s for
    each element. g is evaluated at K + 1 fixed points of [-B, B], is linear between them and
    constant outside, and this function is integrated exactly. So y increases for all weights,
    log dy/dx is its derivative without error, and the inverse has a closed form. A quadrature of g
    from 0 to x, as in the paper, has none of these: its derivative differs from g, and its value
    may fall where g does. As K grows, both agree. (Wehenkel & Louppe, "Unconstrained Monotonic
    Neural Networks", 2019, arXiv:1908.05164.)

    Args:
        signal: Number of elements of s.
        hidden: Width of each hidden layer of g.
        bins: K, an even number.
        bound: B.
        least: The smallest value of g.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from musigma.layers import MADE, Autoregressive
        >>> map, x = UMNN(signal=4, hidden=[16]), torch.randn(5, 3)
        >>> layer = Autoregressive(MADE(map.owners(3), hidden=[16]), map=map)
        >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-4)
        True
    """

    points: Tensor

    def __init__(
        self,
        *,
        signal: int = 8,
        hidden: Sequence[int] = (32, 32),
        bins: int = 32,
        bound: float = 5.0,
        least: float = 1e-3,
    ):
        super().__init__()
        if signal < 1 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"signal, hidden: expected positive numbers; got {signal}, {list(hidden)}"
            )
        if bins < 2 or bins % 2:
            raise ValueError(f"bins: expected an even number, 2 or more; got {bins}")
        if not 0 < bound < math.inf:
            raise ValueError(f"bound: expected a positive number; got {bound}")
        if not 0 < least < 1:
            raise ValueError(f"least: expected a number between 0 and 1; got {least}")
        self.signal, self.bins, self.bound, self.least = signal, bins, bound, least
        self.at, self.given = nn.Linear(1, hidden[0]), nn.Linear(signal, hidden[0], bias=False)
        self.stack = nn.Sequential(
            *(
                module
                for a, b in itertools.pairwise([*hidden, 1])
                for module in (nn.SiLU(), nn.Linear(a, b))
            )
        )

    @property
    def outputs(self) -> int:
        """Number of outputs of the network of the layer for each element: c and the signal."""
        return 1 + self.signal

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        slopes, ys, width = self._knots(raw)
        z = x.clamp(-self.bound, self.bound)
        at = (z + self.bound) / width
        k = at.detach().nan_to_num(0).long().clamp(max=self.bins - 1)
        v, v1 = pick(slopes, k), pick(slopes, k + 1)
        theta = (at - k).clamp(0, 1)
        slope = torch.lerp(v, v1, theta)
        y = pick(ys, k) + width * area(theta, v, v1)
        return y + torch.where(x == z, 0.0, slope * (x - z)), slope.log()

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``, by the root of a quadratic."""
        y, raw = planes(self, y, h)
        slopes, ys, width = self._knots(raw)
        z = torch.minimum(torch.maximum(y, ys[0]), ys[-1])
        k = locate(ys, z)
        v, v1 = pick(slopes, k), pick(slopes, k + 1)
        theta = place((z - pick(ys, k)) / width, v, v1)
        slope = torch.lerp(v, v1, theta)
        x = (k + theta) * width - self.bound
        return x + torch.where(y == z, 0.0, (y - z) / slope), -slope.log()

    def integrand(self, at: Tensor, signal: Tensor) -> Tensor:
        """g at points (N,), for signals (signal, ...): (N, ...), in the type of the weights."""
        dtype = self.at.weight.dtype
        signal, at = signal.to(dtype).movedim(0, -1), at.to(dtype)
        inputs = self.at(at.reshape(-1, *(1,) * signal.ndim)) + self.given(signal)
        raw = at_least_float32(self.stack(inputs)[..., 0])
        return F.softplus(raw + math.log(math.expm1(1 - self.least))) + self.least

    def _knots(self, raw: Tensor) -> tuple[Tensor, Tensor, float]:
        """The slope and y (K + 1, ...) at the points, and the distance of these."""
        at = torch.linspace(
            -self.bound, self.bound, self.bins + 1, dtype=raw.dtype, device=raw.device
        )
        slopes = self.integrand(at, raw[1:]).to(raw)
        width = 2 * self.bound / self.bins
        ys = knots(width * (slopes[:-1] + slopes[1:]) / 2)
        return slopes, ys - ys[self.bins // 2] + raw[0], width

    def extra_repr(self) -> str:
        """Names the sizes."""
        return f"signal={self.signal}, bins={self.bins}, bound={self.bound}"
