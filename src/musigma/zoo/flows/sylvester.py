"""Sylvester flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, Sylvester
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def sylvester(
    features: int,
    context: int,
    *,
    depth: int = 8,
    rank: int | None = None,
    reflections: int = 0,
    hidden: int = 64,
    hidden_layers: int = 1,
) -> Iterator[Layer]:
    """Sylvester flow: planar transforms of several directions at once.

    (van den Berg, Hasenclever, Tomczak, Welling, "Sylvester Normalizing Flows for Variational
    Inference", 2018, arXiv:1803.05649.) Densities take one pass; samples find one number after
    another by root finding, as many in each transform as its rank. The paper uses it the other
    way, for posteriors.

    Args:
        depth: Number of transforms.
        rank: Number of directions of each transform, at most the number of features; None: all.
        reflections: Number of Householder reflections that make the directions orthonormal; 0:
            they are orthonormalized.
        hidden: Width of each hidden layer of the networks of the context, if there is one.
        hidden_layers: Number of hidden layers of these networks.
    """
    at_least(1, depth=depth, rank=rank, hidden=hidden)
    at_least(0, reflections=reflections, hidden_layers=hidden_layers)
    yield ActNorm(features)
    for _ in range(depth):
        yield Sylvester(
            features,
            rank=rank,
            reflections=reflections,
            context=context,
            hidden=[hidden] * hidden_layers,
        )
