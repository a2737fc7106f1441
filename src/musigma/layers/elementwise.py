"""Elementwise bijections: fixed ones, and `Elementwise` with learned parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.layers.maps import Map
from musigma.model import Bijection
from musigma.tensors import at_least_float32, sum_event

__all__ = ["Elementwise", "Logit", "Rescale"]


class Elementwise(Bijection):
    r"""A map of each element whose parameters are learned constants.

    .. math:: y_i = f(x_i;\ h_i), \quad \log|\det| = \sum_i \log \partial y_i / \partial x_i

    The parameters h start at zero, where most maps are the identity.

    Args:
        shape: The event shape, (D,) or (C, H, W), or D. Along an axis of size 1 (but the first)
            all elements share their parameters: (C, 1, 1) is one map for each channel.
        map: The map that is applied to each element.

    Raises:
        ValueError: On a forward pass, if the data do not fit the shape.

    Example:
        >>> from musigma.layers import Spline
        >>> layer = Elementwise(3, map=Spline(bins=4))
        >>> tuple(layer.h.shape), layer(torch.randn(2, 3))[1].shape
        ((33,), torch.Size([2]))
    """

    def __init__(self, shape: int | Sequence[int], *, map: Map):
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.map = map
        self.h = nn.Parameter(torch.zeros(map.outputs * self.shape[0], *self.shape[1:]))

    def _parameters_for(self, x: Tensor) -> Tensor:
        event, (channels, *axes) = tuple(x.shape[1:]), self.shape
        fits = len(event) == len(self.shape) and event[:1] == (channels,)
        if not fits or any(a not in (1, n) for a, n in zip(axes, event[1:], strict=True)):
            raise ValueError(f"x: expected (B, {', '.join(map(str, self.shape))}); got {event}")
        return self.h.expand(len(x), -1, *event[1:])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        y, log_slope = self.map.forward(at_least_float32(x), self._parameters_for(x))
        return y, sum_event(log_slope, x.ndim - 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``."""
        x, log_slope = self.map.inverse(at_least_float32(y), self._parameters_for(y))
        return x, sum_event(log_slope, y.ndim - 1)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Any], Tensor]]]:
        """This layer, and a function that returns the share of its scales at a limit."""
        if (share := getattr(self.map, "saturation", None)) is not None:
            yield self, lambda _: share(self.h[None])

    def extra_repr(self) -> str:
        """Names the shape and the map."""
        return f"{self.shape}, map={self.map}"


class Rescale(Bijection):
    r"""A fixed change of units, :math:`y = a x + b`; :math:`\log|\det| = D \log|a|`.

    As a layer, its constant log-determinant, which is often forgotten, is part of every figure.

    Args:
        scale: a, not zero.
        shift: b.

    Example:
        >>> Rescale(1 / 256, -0.5)(torch.full((1, 3), 128.0))
        (tensor([[0., 0., 0.]]), tensor([-16.6355]))
    """

    is_preprocessing = True

    def __init__(self, scale: float, shift: float = 0.0):
        super().__init__()
        if scale == 0:
            raise ValueError("scale: expected a number other than zero")
        self.scale, self.shift = scale, shift

    def _log_det(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), x[0].numel() * math.log(abs(self.scale)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(a x + b, log_det)``."""
        x = at_least_float32(x)
        return x * self.scale + self.shift, self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((y - b) / a, -log_det)``."""
        y = at_least_float32(y)
        return (y - self.shift) / self.scale, -self._log_det(y)

    def extra_repr(self) -> str:
        """Names the constants."""
        return f"scale={self.scale:.6g}, shift={self.shift:.6g}"


class Logit(Bijection):
    r"""The unit interval to the real line, :math:`y = \mathrm{logit}(\alpha + (1 - 2\alpha) x)`.

    (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv:1605.08803.)

    Args:
        alpha: Margin α in (0, 0.5), which keeps the logit of 0 and of 1 finite.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number in (0, 0.5); got {alpha}")
        self.alpha = alpha

    def _log_det(self, y: Tensor) -> Tensor:
        log_slope = math.log(1 - 2 * self.alpha) - F.logsigmoid(y) - F.logsigmoid(-y)
        return sum_event(log_slope, log_slope.ndim - 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, Σ log(1 - 2α) - log u (1 - u))`` at u = α + (1 - 2α) x."""
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * at_least_float32(x))
        return y, self._log_det(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((sigmoid(y) - α) / (1 - 2α), -log_det)``."""
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha), -self._log_det(y)

    def extra_repr(self) -> str:
        """Names the constant."""
        return f"alpha={self.alpha}"
