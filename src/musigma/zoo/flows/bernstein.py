"""Bernstein polynomial flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.layers import Bernstein
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, transform, vector_flow


@vector_flow
def bernstein(
    features: int,
    context: int,
    *,
    kind: Literal["autoregressive", "coupling"] = "autoregressive",
    depth: int = 3,
    hidden: int = 128,
    hidden_layers: int = 2,
    degree: int = 16,
    bound: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> Iterator[Layer]:
    """Bernstein polynomial flow (Ramasinghe, Fernando, Khan, Barnes, 2021, arXiv:2102.03509).

    An increasing polynomial of each feature, whose coefficients depend on other features, is
    continued by straight lines outside [-bound, bound]. Sampling is by root finding.

    Args:
        kind: `autoregressive`: all previous features transform each one; `coupling`: one half of
            the features, and the context, transforms the other.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        degree: Degree of the polynomials.
        bound: Polynomials act on [-bound, bound].
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors).
        norm: Put an activation normalization before each transform.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    map, widths = Bernstein(degree=degree, bound=bound), [hidden] * hidden_layers
    for _ in range(depth):
        yield from step(features, norm, permutation)
        yield transform(map, kind, features, context, widths)
