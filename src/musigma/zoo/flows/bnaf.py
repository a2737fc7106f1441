"""Block neural autoregressive flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, BlockAutoregressive, Permutation
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def bnaf(
    features: int,
    context: int,
    *,
    depth: int = 3,
    hidden: int = 10,
    hidden_layers: int = 2,
) -> Iterator[Layer]:
    """Block neural autoregressive flow (De Cao, Titov, Aziz, 2019, arXiv:1904.04676).

    Densities take one pass; samples find one feature after another by root finding. Every
    transform is gated, as those of the paper are between its layers, so that it is onto.

    Args:
        depth: Number of transforms; the order of the features is reversed between them.
        hidden: Units of each hidden layer for each feature.
        hidden_layers: Number of hidden layers.
    """
    at_least(1, depth=depth, hidden=hidden, hidden_layers=hidden_layers)
    yield ActNorm(features)
    for i in range(depth):
        if i:
            yield Permutation.reverse(features)
        yield BlockAutoregressive(features, hidden=[hidden] * hidden_layers, context=context)
