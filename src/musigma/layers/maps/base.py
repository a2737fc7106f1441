"""The protocol of maps."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Map"]


class Map(Protocol):
    r"""A strictly increasing, differentiable map of each element, :math:`y_i = f(x_i; h_i)`.

    Any object with these members is a map; inherit from `Map` to get the default `owners`. If a
    parameter has a limit, the map should also have ``saturation(h) -> Tensor``: the share, from 0
    to 1, of elements whose parameter is at the limit.

    Attributes:
        outputs: Number of outputs of the network for each element.

    Example:
        >>> import torch
        >>> from musigma.layers import Elementwise
        >>> class Sinh(Map):
        ...     '''y = sinh(asinh(x) + h) (the sinh-arcsinh transform).'''
        ...     outputs = 1
        ...     def forward(self, x, h):
        ...         y = (x.asinh() + h).sinh()
        ...         return y, 0.5 * ((1 + y**2) / (1 + x**2)).log()
        ...     def inverse(self, y, h):
        ...         return self.forward(y, -h)
        >>> Elementwise(3, map=Sinh())(torch.ones(2, 3))[0].shape
        torch.Size([2, 3])
    """

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element."""
        ...

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``, both of shape (B, C, ...), for h of shape (B, outputs · C, ...)."""
        ...

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``; the shapes are those of `forward`."""
        ...

    def owners(self, elements: int) -> list[int]:
        """The channel, 0 .. elements - 1, to which each entry of h on axis 1 belongs.

        By default the first parameter of all channels comes first, then the second of all.
        """
        return [*range(elements)] * self.outputs
