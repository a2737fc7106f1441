"""Continuous normalizing flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, NeuralODE
from musigma.model import Layer
from musigma.nets import MLP
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def cnf(
    features: int,
    context: int,
    *,
    depth: int = 1,
    time_steps: int = 8,
    hidden: int = 64,
    hidden_layers: int = 2,
    exact: int = 16,
) -> Iterator[Layer]:
    """Continuous normalizing flow (FFJORD; Grathwohl et al., 2019, arXiv:1810.01367).

    It is the composition of a fixed number of Runge-Kutta steps, whose density is exact in
    evaluation and integrates to one. In training of more features than `exact` densities are
    unbiased estimates. Samples solve each step by iteration.

    Args:
        depth: Number of differential equations, one after another.
        time_steps: Number of Runge-Kutta steps of each.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        exact: Largest number of features whose density is exact in training, too.
    """
    at_least(1, depth=depth, time_steps=time_steps, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers, exact=exact)
    for _ in range(depth):
        yield ActNorm(features)
        widths = [hidden] * hidden_layers
        net = MLP(features + 1, features, hidden=widths, context=context, zero=True)
        yield NeuralODE(net, steps=time_steps, exact=exact)
    yield ActNorm(features)
