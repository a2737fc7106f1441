"""Radial flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, Radial
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def radial(
    features: int,
    context: int,
    *,
    depth: int = 16,
    hidden: int = 64,
    hidden_layers: int = 1,
) -> Iterator[Layer]:
    """Radial flow: contractions and expansions around centers.

    (Rezende & Mohamed, "Variational Inference with Normalizing Flows", 2015, arXiv:1505.05770.)
    Both directions take one pass. The paper uses it the other way, for posteriors.

    Args:
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks of the context, if there is one.
        hidden_layers: Number of hidden layers of these networks.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    yield ActNorm(features)
    for _ in range(depth):
        yield Radial(features, context=context, hidden=[hidden] * hidden_layers)
