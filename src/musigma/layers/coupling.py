"""Coupling layers: one half of the channels transforms the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.layers.maps import Affine, Map
from musigma.model import Bijection
from musigma.tensors import at_least_float32, sum_event

__all__ = ["Coupling"]


class Coupling(Bijection):
    r"""The first half of the channels, and the context, transform the second half.

    .. math:: y_1 = x_1, \quad y_2 = f(x_2;\ h(x_1)), \quad
        \log|\det| = \sum \log \partial y_2 / \partial x_2

    where f is the map and h the network. With an `Affine` map this is the coupling of Real NVP
    (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv:1605.08803) in
    the form (x + t) e^s of Glow (Kingma & Dhariwal, 2018, arXiv:1807.03039); with a `Spline` it is
    that of Durkan et al., "Neural Spline Flows", 2019, arXiv:1906.04032. Both directions cost one
    pass of the network.

    Args:
        net: ``net(x1)`` or ``net(x1, context)``, with x1 the first ``C // 2`` channels; emits
            ``map.outputs`` channels for each channel of x2.
        map: The map that is applied to each element of x2.

    Example:
        >>> coupling = Coupling(nn.Linear(2, 6))
        >>> x = torch.randn(4, 5)
        >>> y, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        True
    """

    repeated = True

    def __init__(self, net: nn.Module, *, map: Map = Affine()):
        super().__init__()
        self.net, self.map = net, map

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        x1, x2 = at_least_float32(x).split([half, x.shape[1] - half], 1)  # gradients are joined
        return x1, x2

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, with y2 from the map's `forward`."""
        x1, x2 = self._halves(x)
        y2, log_slope = self.map.forward(x2, conditioned(self.net, x1, context))
        return torch.cat([x1, y2], 1), sum_event(log_slope, x.ndim - 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, with x2 from the map's `inverse`."""
        x1, y2 = self._halves(y)
        x2, log_slope = self.map.inverse(y2, conditioned(self.net, x1, context))
        return torch.cat([x1, x2], 1), sum_event(log_slope, y.ndim - 1)

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)``, by one pass of the network."""
        x = at_least_float32(y).detach().clone().requires_grad_()
        x1, x2 = self._halves(x)
        h = conditioned(self.net, x1, context)
        with torch.no_grad():
            x2.data.copy_(self.map.inverse(x2, h)[0])  # the network has read only x1
        y2, log_slope = self.map.forward(x2, h)
        return x, torch.cat([x1, y2], 1), sum_event(log_slope, x.ndim - 1)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if (share := getattr(self.map, "saturation", None)) is not None:
            yield self.net, share

    def extra_repr(self) -> str:
        """Names the map."""
        return f"map={self.map}"
