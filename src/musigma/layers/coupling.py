"""Coupling: one half of the channels decides what happens to the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from musigma.gaussian import Format, at_least_float32, sum_event
from musigma.layers.maps.element import ElementMap, Kind
from musigma.layers.maps.spline import Spline
from musigma.model import Bijection, conditioned

__all__ = ["Coupling"]


class Coupling(Bijection):
    r"""The first half of the channels, and the context, transform the second half.

    .. math:: y_1 = x_1, \quad y_2 = (x_2 + t(x_1)) \cdot e^{s(x_1)}, \quad \log|\det| = \sum s

    An `affine` coupling reads (t, s) from its network by a `Format`, of which the scale says how s
    is bounded; an `additive` one has s = 0, and its network emits t alone; a `spline` one bends
    every element of x2 by a `Spline`. Both directions cost one pass of the network. (Dinh,
    Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv:1605.08803; the form
    (x + t) e^s is that of Kingma & Dhariwal, "Glow", 2018, arXiv:1807.03039; splines: Durkan et
    al., "Neural Spline Flows", 2019, arXiv:1906.04032.)

    Args:
        net: ``net(x1)`` or ``net(x1, context)``, with x1 the first ``C // 2`` channels; emits
            2 ``ceil(C / 2)`` channels, half of that if additive, and ``spline.outputs`` for each
            channel of x2 if a spline.
        kind: `affine`, `additive` or `spline`.
        format: How the output of an affine coupling's network is read.
        spline: How that of a spline coupling's is; None: eight bins, on [-5, 5].

    Raises:
        ValueError: For an unknown kind.

    Example:
        >>> coupling = Coupling(nn.Linear(2, 6))
        >>> x = torch.randn(4, 5)
        >>> y, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        kind: Kind = "affine",
        format: Format = Format(scale="tanh"),
        spline: Spline | None = None,
    ):
        super().__init__()
        self.net, self.kind, self.format = net, kind, format
        self.map = ElementMap(kind, format, spline)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        x1, x2 = at_least_float32(x).split([half, x.shape[1] - half], 1)  # gradients are joined
        return x1, x2

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, with y2 by the map's forward direction."""
        x1, x2 = self._halves(x)
        y2, log_slope = self.map.forward(x2, conditioned(self.net, x1, context))
        return torch.cat([x1, y2], 1), sum_event(log_slope, x.ndim - 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, with x2 by its inverse."""
        x1, y2 = self._halves(y)
        x2, log_slope = self.map.inverse(y2, conditioned(self.net, x1, context))
        return torch.cat([x1, x2], 1), sum_event(log_slope, y.ndim - 1)

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)``, by one pass of the network."""
        x = at_least_float32(y).detach().clone().requires_grad_()
        x1, x2 = self._halves(x)
        h = conditioned(self.net, x1, context)
        with torch.no_grad():
            x2.data.copy_(self.map.inverse(x2, h)[0])  # of x, the network has read the rest
        y2, log_slope = self.map.forward(x2, h)
        return x, torch.cat([x1, y2], 1), sum_event(log_slope, x.ndim - 1)

    def extra_repr(self) -> str:
        """Names the convention."""
        return str(self.map)
