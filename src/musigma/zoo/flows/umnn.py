"""Flows of vectors by unconstrained monotonic neural networks."""

from __future__ import annotations

from musigma.layers import UMNN
from musigma.zoo.parts import map_flow


@map_flow(zero=False)
def umnn(
    *,
    signal: int = 8,
    width: int = 32,
    bins: int = 32,
    bound: float = 5.0,
) -> UMNN:
    """Unconstrained monotonic neural network flow (Wehenkel & Louppe, 2019, arXiv:1908.05164).

    Each feature passes the integral of a positive network, which depends on other features by a
    signal. The network is evaluated at fixed points and is linear between them (`UMNN`), so that
    both directions, and the log-determinant, are exact.

    Args:
        signal: Number of elements of the signal.
        width: Width of both hidden layers of the positive network.
        bins: Number of intervals between its points.
        bound: The points lie in [-bound, bound].
    """
    return UMNN(signal=signal, hidden=[width, width], bins=bins, bound=bound)
