"""Numerical solvers of inverses that have no closed form."""

from __future__ import annotations

__all__ = ["ConvergenceError"]


class ConvergenceError(ArithmeticError):
    """A solver has not reached its tolerance; the message states the residual."""
