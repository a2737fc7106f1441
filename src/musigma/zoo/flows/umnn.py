"""Flows of vectors by unconstrained monotonic neural networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.layers import UMNN
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, transform, vector_flow


@vector_flow
def umnn(
    features: int,
    context: int,
    *,
    kind: Literal["autoregressive", "coupling"] = "autoregressive",
    depth: int = 3,
    hidden: int = 128,
    hidden_layers: int = 2,
    signal: int = 8,
    width: int = 32,
    bins: int = 32,
    bound: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> Iterator[Layer]:
    """Unconstrained monotonic neural network flow (Wehenkel & Louppe, 2019, arXiv:1908.05164).

    Each feature passes the integral of a positive network, which depends on other features by a
    signal. The network is evaluated at fixed points and is linear between them (`UMNN`), so that
    both directions, and the log-determinant, are exact.

    Args:
        kind: `autoregressive`: all previous features transform each one; `coupling`: one half of
            the features, and the context, transforms the other.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        signal: Number of elements of the signal.
        width: Width of both hidden layers of the positive network.
        bins: Number of intervals between its points.
        bound: The points lie in [-bound, bound].
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors).
        norm: Put an activation normalization before each transform.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    for _ in range(depth):
        yield from step(features, norm, permutation)
        map = UMNN(signal=signal, hidden=[width, width], bins=bins, bound=bound)
        yield transform(map, kind, features, context, [hidden] * hidden_layers, zero=False)
