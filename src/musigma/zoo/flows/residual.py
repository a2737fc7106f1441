"""Residual flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, Residual
from musigma.model import Layer
from musigma.nets import LipschitzMLP
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def residual(
    features: int,
    context: int,
    *,
    depth: int = 8,
    hidden: int = 64,
    hidden_layers: int = 2,
    bound: float = 0.97,
    exact: int = 16,
) -> Iterator[Layer]:
    """Residual flow: x plus a contraction of x, again and again.

    (Behrmann et al., "Invertible Residual Networks", 2019, arXiv:1811.00995; Chen et al.,
    "Residual Flows for Invertible Generative Modeling", 2019, arXiv:1906.02735.)

    In evaluation densities are exact: they take as many passes as there are features, in one
    batch. In training of more features than `exact` they are unbiased estimates. Samples iterate
    to a fixed point.

    Args:
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        bound: Lipschitz constant of each network, below 1.
        exact: Largest number of features whose density is exact in training, too.

    Raises:
        ValueError: If the bound is not between 0 and 1.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers, exact=exact)
    if not 0 < bound < 1:
        raise ValueError(f"bound: expected a number between 0 and 1; got {bound}")
    for _ in range(depth):
        yield ActNorm(features)
        net = LipschitzMLP(
            features, features, hidden=[hidden] * hidden_layers, context=context, bound=bound
        )
        yield Residual(net, exact=exact)
    yield ActNorm(features)
