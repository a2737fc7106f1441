"""Sum-of-squares polynomial flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.layers import SumOfSquares
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, transform, vector_flow


@vector_flow
def sos(
    features: int,
    context: int,
    *,
    kind: Literal["autoregressive", "coupling"] = "autoregressive",
    depth: int = 3,
    hidden: int = 128,
    hidden_layers: int = 2,
    polynomials: int = 3,
    degree: int = 4,
    scale: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> Iterator[Layer]:
    """Sum-of-squares polynomial flow (Jaini, Selby, Yu, 2019, arXiv:1905.02325).

    Each feature passes an increasing polynomial, the integral of a mean of squared polynomials,
    whose coefficients depend on other features. It grows fast, so densities fall fast far outside
    the data, and data should be standardized. Sampling is by root finding.

    Args:
        kind: `autoregressive`: all previous features transform each one; `coupling`: one half of
            the features, and the context, transforms the other.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        polynomials: Number of polynomials that are squared.
        degree: Degree of these; the transforms have twice this degree and one.
        scale: The unit of the features within the polynomials.
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors).
        norm: Put an activation normalization before each transform.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    map = SumOfSquares(polynomials=polynomials, degree=degree, scale=scale)
    for _ in range(depth):
        yield from step(features, norm, permutation)
        yield transform(map, kind, features, context, [hidden] * hidden_layers, zero=False)
