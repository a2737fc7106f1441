"""Increasing polynomials, as integrals of sums of squares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from musigma.layers.maps.map import Monotone, planes

__all__ = ["SumOfSquares"]


@dataclass(frozen=True)
class SumOfSquares(Monotone):
    r"""An increasing polynomial of degree 2 L + 1: the integral of a mean of K squares.

    .. math:: y = c + \int_0^x \epsilon + \frac{1 - \epsilon}{K} \sum_{k=1}^K
        \Big(1 + \sum_{l=0}^L a_{kl} (u / s)^l\Big)^2 du

    where ε is `least` and s is `scale`. For every element the network emits c and then the
    K (L + 1) numbers a. With all of them zero the map is the identity, and all squares are alike;
    the parameters should begin at random. The integral is a Gauss-Legendre sum of L + 1 terms,
    which is exact, and whose terms are positive, so no digits are lost. Far from zero the map
    grows as :math:`x^{2L + 1}`: in float32 it overflows beyond about :math:`s\, 10^{38/(2L+1)}`.
    (Jaini, Selby, Yu, "Sum-of-Squares Polynomial Flow", 2019, arXiv:1905.02325.)

    Args:
        polynomials: K.
        degree: L, that of the polynomials that are squared.
        scale: s.
        least: ε, the smallest slope.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> map, x = SumOfSquares(), torch.linspace(-4, 4, 5)[:, None]
        >>> torch.allclose(map.forward(x, torch.zeros(5, map.outputs))[0], x)
        True
    """

    polynomials: int = 3
    degree: int = 4
    scale: float = 5.0
    least: float = 1e-3
    _rule: list[list[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name, least in (("polynomials", 1), ("degree", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more; got {getattr(self, name)}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a positive number; got {self.scale}")
        if not 0 < self.least < 1:
            raise ValueError(f"least: expected a number between 0 and 1; got {self.least}")
        rule = np.polynomial.legendre.leggauss(self.degree + 1)
        object.__setattr__(self, "_rule", [array.tolist() for array in rule])

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, K (L + 1) + 1."""
        return self.polynomials * (self.degree + 1) + 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        a = raw[1:].unflatten(0, (self.polynomials, -1))
        points, weights = torch.tensor(self._rule, dtype=torch.float64).to(x)
        points, weights = (t.reshape(-1, *(1,) * x.ndim) for t in (points + 1, weights))
        slopes = self._slope(torch.cat([points * (x / 2), x[None]]), a)
        return raw[0] + x / 2 * (weights * slopes[:-1]).sum(0), slopes[-1].log()

    def _slope(self, x: Tensor, a: Tensor) -> Tensor:
        """The integrand at x (N, ...), for a (K, L + 1, ...)."""
        u, p = x / self.scale, a[:, -1:].expand(-1, len(x), *x.shape[1:])
        for i in reversed(range(self.degree)):
            p = p * u + a[:, i, None]
        return self.least + (1 - self.least) * (1 + p).square().mean(0)
