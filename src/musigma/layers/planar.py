"""Planar bijections, and the increasing function of one number that they apply."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.layers.maps import Monotone
from musigma.model import Bijection
from musigma.nets import Amortized
from musigma.tensors import at_least_float32

__all__ = ["Bend", "Planar"]


class Bend(Monotone):
    r""":math:`y = x + s \tanh(a x + b)` with :math:`s a > -1`; h holds s, a and b.

    Its slope is computed as tanh² + (1 + s a)(1 - tanh²), which is never negative.

    Example:
        >>> bend, h = Bend(), torch.tensor([[-0.9, 1.0, 0.3]])
        >>> y, _ = bend.forward(torch.tensor([[0.5]]), h)
        >>> bend.inverse(y, h)[0]
        tensor([[0.5000]])
    """

    @property
    def outputs(self) -> int:
        """3: s, a and b."""
        return 3

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        s, a, b = h.chunk(3, 1)
        t = torch.tanh(a * x + b)
        return x + s * t, (t.square() + (1 + s * a) * (1 - t.square())).log()


class Planar(Bijection):
    r"""A shift along one direction that depends on the position along another one.

    .. math:: y = x + \hat u \tanh(w^\top x + b), \quad
        \log|\det| = \log\big(1 + w^\top \hat u\, \tanh'(w^\top x + b)\big)

    It is invertible if :math:`w^\top \hat u > -1`, so u is moved along w:
    :math:`\hat u = u + (m(w^\top u) - w^\top u)\, w / \|w\|^2` with
    :math:`m(a) = \log(1 + e^a) - 1`, kept above -1 + 1e-6. The inverse solves an equation in one
    unknown, :math:`w^\top x`, to the last bit. (Rezende & Mohamed, "Variational Inference with
    Normalizing Flows", 2015, arXiv:1505.05770.)

    Args:
        features: D.
        context: Number of features of the context; with it a network emits w, u and b.
        hidden: Width of each hidden layer of that network.

    Example:
        >>> layer, x = Planar(3), torch.randn(4, 3)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    slow_inverse = "root finding of one number"

    def __init__(self, features: int, *, context: int = 0, hidden: Sequence[int] = (64,)):
        super().__init__()
        self.features = features
        limit = 1 / math.sqrt(features)
        w, u = limit * (2 * torch.rand(2, features) - 1)
        u += math.log(math.e - 1) * w / w.square().sum()  # for which w^T û = w^T u = 0 on average
        start = torch.cat([w, u, torch.zeros(1)])
        self.numbers = Amortized(start, context=context, hidden=hidden)

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """w, û, and what `Bend` takes: w^T û, 1 and b."""
        h = at_least_float32(self.numbers(x, context))
        w, u, b = h.split([self.features, self.features, 1], 1)
        product = (w * u).sum(1, keepdim=True)
        allowed = F.softplus(product).clamp(min=1e-6) - 1
        squared = w.square().sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        u = u + (allowed - product) * w / squared
        return w, u, torch.cat([allowed, torch.ones_like(b), b], 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        x = at_least_float32(x)
        w, u, h = self._read(x, context)
        along = (w * x).sum(1, keepdim=True)
        _, log_slope = Bend().forward(along, h)
        return x + u * torch.tanh(along + h[:, 2:]), log_slope[:, 0]

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, by root finding."""
        y = at_least_float32(y)
        w, u, h = self._read(y, context)
        along, log_slope = Bend().inverse((w * y).sum(1, keepdim=True), h)
        return y - u * torch.tanh(along + h[:, 2:]), log_slope[:, 0]
