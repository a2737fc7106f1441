"""Radial bijections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.model import Bijection
from musigma.nets import Amortized
from musigma.tensors import at_least_float32

__all__ = ["Radial"]


class Radial(Bijection):
    r"""A contraction or an expansion around a center.

    .. math:: y = x + \frac{\beta}{\alpha + r} (x - c), \quad r = \|x - c\|, \quad
        \log|\det| = (D - 1) \log\frac{k + r}{\alpha + r}
        + \log\frac{r^2 + 2 \alpha r + \alpha k}{(\alpha + r)^2}

    with α = softplus(α') and k = α + β = softplus(β'), so it is always invertible. The inverse is
    in closed form: r is the positive root of :math:`r^2 + (k - R)\, r = \alpha R`, where R is the
    distance of y from the center. (Rezende & Mohamed, "Variational Inference with Normalizing
    Flows", 2015, arXiv:1505.05770.)

    Args:
        features: D.
        context: Number of features of the context; with it a network emits c, α' and β'.
        hidden: Width of each hidden layer of that network.

    Example:
        >>> layer, x = Radial(3), torch.randn(4, 3)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(self, features: int, *, context: int = 0, hidden: Sequence[int] = (64,)):
        super().__init__()
        self.features = features
        start = (2 * torch.rand(features + 2) - 1) / math.sqrt(features)
        self.numbers = Amortized(start, context=context, hidden=hidden)

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h = at_least_float32(self.numbers(x, context))
        center, alpha, k = h.split([self.features, 1, 1], 1)
        return center, F.softplus(alpha), F.softplus(k)

    def _log_det(self, r: Tensor, alpha: Tensor, k: Tensor) -> Tensor:
        across = (k + r).log() - (alpha + r).log()
        along = (r * (r + 2 * alpha) + alpha * k).log() - 2 * (alpha + r).log()
        return ((self.features - 1) * across + along)[:, 0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        x = at_least_float32(x)
        center, alpha, k = self._read(x, context)
        r = torch.linalg.vector_norm(x - center, dim=1, keepdim=True)
        return x + (k - alpha) / (alpha + r) * (x - center), self._log_det(r, alpha, k)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``."""
        y = at_least_float32(y)
        center, alpha, k = self._read(y, context)
        distance = torch.linalg.vector_norm(y - center, dim=1, keepdim=True)
        half = (distance - k) / 2
        root = (half.square() + alpha * distance).sqrt()
        # of two forms of the same root, the one without cancellation
        r = torch.where(half > 0, half + root, alpha * distance / (root - half.clamp(max=0)))
        return y - (k - alpha) / (k + r) * (y - center), -self._log_det(r, alpha, k)
