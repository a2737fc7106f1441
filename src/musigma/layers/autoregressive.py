"""Autoregressive flows: each feature is transformed by the features before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from musigma.layers.maps import Map
from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["Autoregressive", "AutoregressiveNet"]


class AutoregressiveNet(Protocol):
    """The protocol of the network of an `Autoregressive` layer, such as `MADE`.

    Attributes:
        owners: The feature 0 .. D - 1 to which each output belongs. The outputs of feature i
            depend only on features 0 .. i - 1 and the context.
    """

    owners: Sequence[int]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs (B, len(owners)) for x (B, D), in one pass."""
        ...

    def unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Evaluate feature by feature: for i = 0 .. D - 1, ``x[:, i : i + 1] = fill(i, h_i)``.

        Step i computes h_i (B, outputs), the outputs of feature i in the order of `owners`, from
        the features that `fill` has returned so far, and gives them to `fill`, which returns
        feature i, (B, 1). The network may cache results between steps: hidden units, the state of
        a recurrent network, the keys and values of a causal transformer.

        Args:
            fill: Called once for each feature, in order.
            like: A tensor of x's shape (B, D), type and device; its values are not read.
            context: As in `__call__`.
        """
        ...


class Autoregressive(Bijection):
    r"""Features 0 .. i - 1 of a vector, and the context, transform feature i.

    .. math:: y_i = f(x_i;\ h_i(x_0, \ldots, x_{i-1})), \quad
        \log|\det| = \sum_i \log \partial y_i / \partial x_i

    where f is the map and h the network. `forward` takes one pass of the network; `inverse`
    computes one feature after another. With an `Affine` map and a `MADE` this is a masked
    autoregressive flow (Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density
    Estimation", 2017, arXiv:1705.07057); with a `Spline` it is an autoregressive neural spline
    flow (Durkan et al., 2019, arXiv:1906.04032).

    Args:
        net: A module that implements `AutoregressiveNet`, built for ``map.owners(D)``.
        map: The map that is applied to each feature.

    Raises:
        ValueError: If the network's outputs are not in the order in which the map reads them.

    Example:
        >>> from musigma.layers import MADE, Spline
        >>> spline, x = Spline(), torch.randn(4, 5)
        >>> layer = Autoregressive(MADE(spline.owners(5), hidden=[16]), map=spline)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    def __init__(self, net: nn.Module, *, map: Map):
        super().__init__()
        self.net: Any = net
        self.map = map
        self.features = max(self.net.owners) + 1
        if list(self.net.owners) != (expected := map.owners(self.features)):
            raise ValueError(
                f"net: {map} reads outputs that belong to the features {expected}; this network's "
                f"belong to {list(self.net.owners)}; build it from map.owners({self.features})"
            )

    def _vectors(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(
                f"x: this layer is for vectors (B, {self.features}); got {tuple(x.shape)}"
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

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if (share := getattr(self.map, "saturation", None)) is not None:
            yield self.net, share

    def extra_repr(self) -> str:
        """Names the map."""
        return f"map={self.map}"
