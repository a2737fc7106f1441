"""Autoregressive flows: each feature is transformed by what comes before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from musigma.gaussian import Format, at_least_float32
from musigma.layers.maps.element import ElementMap, Kind
from musigma.layers.maps.spline import Spline
from musigma.model import Bijection
from musigma.nets.made import MADE

__all__ = ["Autoregressive"]


class Autoregressive(Bijection):
    r"""Features 0 .. i - 1 of a vector, and the context, transform feature i.

    .. math:: y_i = f(x_i;\ h_i(x_0, \ldots, x_{i-1})), \quad
        \log|\det| = \sum_i \log \partial y_i / \partial x_i

    with h from a `MADE`. Data to latents is one pass of it, latents to data goes feature by
    feature, and yet computes every hidden unit once. An `affine` map reads h by a `Format`, as a
    `Coupling` does: with it this is a masked autoregressive flow (Papamakarios, Pavlakou, Murray,
    "Masked Autoregressive Flow for Density Estimation", 2017, arXiv:1705.07057); with a `spline`
    it is an autoregressive neural spline flow (Durkan et al., 2019, arXiv:1906.04032).

    Args:
        features: D, 1 or more; the first one's map has constants, but for the context.
        kind: `affine`, `additive` or `spline`.
        format: How an affine map reads the network's output (B, 2 D).
        spline: How a spline does; None: eight bins, on [-5, 5].
        hidden: Width of each hidden layer of the network.
        context: Features of the context.
        zero: Start the network's last layer at zero, and so the layer at the identity.

    Raises:
        ValueError: For an unknown kind, or a format of more than one tensor.

    Example:
        >>> layer, x = Autoregressive(5, kind="spline", hidden=[16]), torch.randn(4, 5)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        features: int,
        *,
        kind: Kind = "affine",
        format: Format = Format(scale="softclip"),
        spline: Spline | None = None,
        hidden: Sequence[int] = (128, 128),
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.kind, self.format = kind, format
        self.map = ElementMap(kind, format, spline)
        owners = self.map.owners(features)
        self.net = MADE(owners, hidden=hidden, context=context, zero=zero)

    def _vectors(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.net.features:
            raise ValueError(
                f"x: this layer is for vectors (B, {self.net.features}); got {tuple(x.shape)}"
            )
        return at_least_float32(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, in one pass of the network."""
        x = self._vectors(x)
        y, log_slope = self.map.forward(x, self.net(x, context))
        return y, log_slope.sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, one feature after the other."""
        y = self._vectors(y)
        features: list[Tensor] = []
        log_slopes: list[Tensor] = []

        def fill(i: int, h: Tensor) -> Tensor:
            x, log_slope = self.map.inverse(y[:, i : i + 1], h)
            features.append(x)
            log_slopes.append(log_slope)
            return x

        self.net.unroll(fill, y, context)
        return torch.cat(features, 1), torch.cat(log_slopes, 1).sum(1)

    def extra_repr(self) -> str:
        """Names the convention."""
        return str(self.map)
