r"""The modified Bessel function of the first kind, for any order and argument, and its ratio.

.. math:: g_\nu(x) = \log\big(I_\nu(x)\, (x/2)^{-\nu}\big), \quad
    A_\nu(x) = I_{\nu+1}(x) / I_\nu(x) = g_\nu'(x)

g is finite at zero, -log Γ(ν + 1). All terms of its power series are positive, which is summed
where ν² + x² is small; elsewhere Debye's expansion, which is uniform in ν (Abramowitz & Stegun,
1964, 9.6.10 and 9.7.7), is used. Both are computed in float64.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["bessel_ratio", "log_bessel"]

NEAR = 30.0
"""Radius sqrt(ν² + x²) below which the series is summed."""
TERMS = 64
"""Terms of the series: at x = 30 the last is 1e-37 of the largest."""


def _debye(orders: int) -> list[list[float]]:
    """Coefficients of u_k(t) / t^k in t²: u_k+1 = t² (1-t²) u_k' / 2 + ∫ (1-5s²) u_k ds / 8."""
    u, rows = {0: Fraction(1)}, []
    for k in range(orders):
        rows.append([float(u.get(k + 2 * j, Fraction(0))) for j in range(k + 1)])
        new: dict[int, Fraction] = {}
        for power, c in u.items():
            for at, add in (
                (power + 1, c * power / 2 + c / (8 * (power + 1))),
                (power + 3, -c * power / 2 - 5 * c / (8 * (power + 3))),
            ):
                new[at] = new.get(at, Fraction(0)) + add
        u = new
    return rows


_DEBYE = _debye(12)


def log_bessel(x: Tensor, order: float) -> Tensor:
    r"""g_ν(x) = log(I_ν(x) (x/2)^-ν) in float64, for x >= 0 and ν >= 0, with its gradient.

    Example:
        >>> log_bessel(torch.tensor(2.0), 0.0)  # log I_0(2)
        tensor(0.8240, dtype=torch.float64)
    """
    return _LogBessel.apply(x.double(), order)  # pyright: ignore[reportReturnType]


def bessel_ratio(x: Tensor, order: float) -> Tensor:
    r"""A_ν(x) = I_ν+1(x) / I_ν(x) in float64, from 0 to 1, with its gradient."""
    return _Ratio.apply(x.double(), order)  # pyright: ignore[reportReturnType]


def _value(x: Tensor, nu: float) -> Tensor:
    near = x.square() + nu**2 < NEAR**2
    return torch.where(near, _series(x.clamp(max=NEAR), nu), _expansion(x, nu))


def _series(x: Tensor, nu: float) -> Tensor:
    k = torch.arange(TERMS, dtype=x.dtype, device=x.device)
    log_square = 2 * (x / 2).clamp(min=1e-150).log()[..., None]
    return (k * log_square - torch.lgamma(k + 1) - torch.lgamma(k + nu + 1)).logsumexp(-1)


def _expansion(x: Tensor, nu: float) -> Tensor:
    """R - ν log((ν + R) / 2) - ½ log(2πR) + log Σ u_k(ν/R) / ν^k, with R² = ν² + x²."""
    root = (x.square() + nu**2).sqrt().clamp(min=1e-3)
    t2, total = (nu / root).square(), torch.zeros_like(x)
    for k in reversed(range(len(_DEBYE))):
        inner = torch.zeros_like(x)
        for c in reversed(_DEBYE[k]):
            inner = inner * t2 + c
        total = total / root + inner if k else total / root + 1
    angle = nu * (math.log(2) - (nu + root).log())
    return root + angle - 0.5 * (2 * math.pi * root).log() + total.log()


class _LogBessel(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.order = order
        return _value(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * bessel_ratio(ctx.saved_tensors[0], ctx.order), None


class _Ratio(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: float) -> Tensor:
        over_x = 0.5 * (_value(x, order + 1) - _value(x, order)).exp()
        ctx.save_for_backward(x, over_x)
        ctx.order = order
        return x * over_x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, over_x = ctx.saved_tensors  # A' = 1 - A² - (2ν + 1) A / x
        return grads[0] * (1 - (x * over_x).square() - (2 * ctx.order + 1) * over_x), None
