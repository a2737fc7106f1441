"""The protocol of maps, and the base of those whose inverse has no closed form."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from musigma.solvers import increasing_root
from musigma.tensors import at_least_float32

__all__ = ["Map", "Monotone", "planes"]


class Map(Protocol):
    r"""A strictly increasing, differentiable map of each element, :math:`y_i = f(x_i; h_i)`.

    Any object with these members is a map; inherit from `Map` to get the default `owners`. If a
    parameter has a limit, the map should also have ``saturation(h) -> Tensor``: the share, from 0
    to 1, of elements whose parameter is at the limit. If its inverse has no closed form, inherit
    from `Monotone`. A map may be a module with parameters of its own.

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


class Monotone(Map):
    r"""A map whose inverse has no closed form: implement `outputs` and `forward` only.

    The inverse is found by bisection and Newton steps (`musigma.solvers.increasing_root`), to the
    last bit of x that the rounding of `forward` lets it tell apart. It takes twenty to fifty
    evaluations of `forward`, as many as the slowest element of the batch. Its gradients are those
    of the implicit function,

    .. math:: \frac{\partial x}{\partial y} = \frac{1}{f'(x)}, \quad
        \frac{\partial x}{\partial h} = -\frac{\partial f / \partial h}{f'(x)},

    and derivatives up to the third are right.

    Example:
        >>> class Cube(Monotone):
        ...     '''y = x + exp(h) x^3.'''
        ...     outputs = 1
        ...     def forward(self, x, h):
        ...         a = h.exp()
        ...         return x + a * x**3, (1 + 3 * a * x**2).log()
        >>> Cube().inverse(torch.tensor([[10.0]]), torch.zeros(1, 1))[0]
        tensor([[2.]])
    """

    slow_inverse = "root finding"

    @abstractmethod
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``; y increases from -inf to inf with x."""

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``, by root finding.

        Raises:
            ConvergenceError: If `forward` takes the value y nowhere, or is not finite.
        """
        y, h = at_least_float32(y), at_least_float32(h)
        y = y.to(torch.promote_types(y.dtype, h.dtype))
        with torch.no_grad():
            x = increasing_root(lambda x: self.forward(x, h), y)
        if torch.is_grad_enabled():
            for _ in range(2):  # k Newton steps make 2^k - 1 derivatives right
                value, log_slope = self.forward(x, h)
                step = (y - value) * (-log_slope).exp()
                x = x + (step - step.detach())
        return x, -self.forward(x, h)[1]


def planes(map: Map, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C, ...) and the parameters of a map (outputs, B, C, ...), in one type.

    Raises:
        ValueError: If h has another shape than (B, outputs · C, ...).
    """
    expected = (len(x), map.outputs * x.shape[1], *x.shape[2:])
    if h.shape != expected:
        raise ValueError(
            f"h: {map} takes {map.outputs} numbers for each element of x {tuple(x.shape)}, shape "
            f"{expected}; got {tuple(h.shape)}"
        )
    x, h = at_least_float32(x), at_least_float32(h)
    dtype = torch.promote_types(x.dtype, h.dtype)
    return x.to(dtype), h.to(dtype).unflatten(1, (map.outputs, -1)).movedim(1, 0)
