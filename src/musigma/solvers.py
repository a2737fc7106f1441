"""Numerical solvers of inverses that have no closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ConvergenceError", "fixed_point", "increasing_root"]


class ConvergenceError(ArithmeticError):
    """A solver has not reached its tolerance; the message states the residual."""


def increasing_root(f: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor) -> Tensor:
    """Solve f(x) = y for every element of y, for increasing functions of the whole line.

    Each root is enclosed between two floating-point numbers, at first the smallest and the largest
    of all. A Newton step from the best point so far, slightly lengthened so that the root comes to
    lie between it and that point, or else a bisection, moves one of them. Bisection counts
    floating-point numbers, so that it separates any two of them in 32 or 64 steps. The search ends
    where f(x) = y, or between two neighboring numbers, of which the better is returned.

    Args:
        f: x to ``(f(x), log df/dx)``, elementwise, of y's shape. An element of f may depend on
            the index, and not on other elements of x. Values may overflow far from the root.
        y: Float32 or float64, of any shape. Where it is not finite, x is y.

    Returns:
        x, without gradient.

    Raises:
        ConvergenceError: If f does not take the value y anywhere, or is not finite near it.

    Example:
        >>> y = torch.tensor([-30.0, 1e-20, 30.0])
        >>> increasing_root(lambda x: (x + x**3, (1 + 3 * x**2).log()), y)
        tensor([-3.0000e+00,  1.0000e-20,  3.0000e+00])
    """
    finite = y.isfinite()
    target = torch.where(finite, y, 0.0).detach()
    limit = _rank(torch.full_like(target, torch.finfo(y.dtype).max))
    low, high = -limit, limit
    under = over = torch.full_like(target, torch.inf)  # residuals at both ends, without sign
    rank = at = _rank(target)
    best, newton = over, torch.zeros_like(target)
    digits = torch.finfo(y.dtype).eps
    done = ~finite
    for step in range(6 * torch.iinfo(rank.dtype).bits):
        x = _number(rank, y.dtype)
        value, log_slope = (t.detach() for t in f(x))
        value = torch.where(value.isnan(), torch.inf * x.sign(), value)
        rest = target - value
        below, exact = rest > 0, rest == 0
        low, high = torch.where(below, rank, low), torch.where(below, high, rank)
        low = torch.where(exact, rank, low)
        under = torch.where(below | exact, rest.abs(), under)
        over = torch.where(below, over, rest.abs())
        done = done | (low + 1 >= high)
        if bool(done.all()):
            break
        better = rest.abs() <= best
        best, at = torch.where(better, rest.abs(), best), torch.where(better, rank, at)
        newton = torch.where(better, rest * (-log_slope).exp(), newton)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        there = _rank(_number(at, y.dtype) + newton)
        move = there - at
        size = move.abs().double()
        beyond = 1 + (size * (size * digits).sqrt().clamp(max=0.5)).long().to(rank.dtype)
        there = torch.where(newton > 0, there + beyond, there - beyond)
        near = (move.sign() * newton.sign() >= 0) & newton.isfinite() & (step % 6 < 5)
        rank = torch.where(near & (low < there) & (there < high), there, middle)
        rank = torch.where(done, torch.where(under <= over, low, high), rank)
    x = _number(torch.where(under <= over, low, high), y.dtype)
    failed = finite & ~(done & under.isfinite() & over.isfinite())
    if bool(failed.any()):
        which = int(failed.flatten().nonzero()[0])
        raise ConvergenceError(
            f"no x with f(x) = {float(target.flatten()[which]):.6g} was found for "
            f"{int(failed.sum())} of {failed.numel()} elements: the residual of the first is "
            f"{float(best.flatten()[which]):.3g} at best; the function must be increasing, finite "
            "and onto the whole line (are its parameters finite?)"
        )
    return torch.where(finite, x, y)


def fixed_point(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float | None = None,
    steps: int = 1000,
) -> Tensor:
    """The x for which x = step(x), by iteration. It carries no gradient.

    It ends when no element moves by more than `tolerance` times the larger of 1 and its row's
    largest element. If step is a contraction with the constant L, the error is then at most that
    times L / (1 - L).

    Args:
        step: A contraction of a batch (B, ...).
        start: Where the iteration begins.
        tolerance: By default 64 units in the last place of the type.
        steps: Largest number of steps.

    Raises:
        ConvergenceError: If x still moves after `steps` steps, or is not finite.

    Example:
        >>> fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.float64)).item()
        0.7390851332151...
    """
    tolerance = 64 * torch.finfo(start.dtype).eps if tolerance is None else tolerance
    x, moved = start, torch.inf
    with torch.no_grad():
        for _ in range(steps):
            new = step(x)
            size = new.flatten(1).abs().amax(1).clamp(min=1)
            moved = float(((new - x).flatten(1).abs().amax(1) / size).max()) if len(x) else 0.0
            if moved <= tolerance:
                return new
            x = new
            if moved != moved or moved == torch.inf:
                break
    raise ConvergenceError(
        f"step: after {steps} steps of the fixed-point iteration, x still moves by {moved:.2g} "
        f"per step, more than {tolerance:.2g}; the function is no contraction here"
    )


def _rank(x: Tensor) -> Tensor:
    """Position of floating-point numbers in their order: integers of as many bits."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits)


def _number(rank: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_rank`."""
    return torch.where(rank < 0, torch.iinfo(rank.dtype).min - rank, rank).view(dtype)
