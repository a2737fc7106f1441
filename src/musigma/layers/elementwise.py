"""Scalar maps, applied to every element alike, and their log-slopes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.gaussian import at_least_float32, sum_event
from musigma.model import Bijection

__all__ = ["Affine", "Logit"]


class Affine(Bijection):
    r"""A fixed change of units, :math:`y = a x + b`; :math:`\log|\det| = D \log|a|`.

    Written as a layer, so that the constant which so many figures lack stands in the account.

    Args:
        scale: a, not zero.
        shift: b.

    Example:
        >>> Affine(1 / 256, -0.5)(torch.full((1, 3), 128.0))
        (tensor([[0., 0., 0.]]), tensor([-16.6355]))
    """

    units = True

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
        alpha: Distance of the ends of [0, 1] from those of the logit, in (0, 0.5).
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
