"""Neural autoregressive flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.layers import DeepSigmoid
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, transform, vector_flow


@vector_flow
def naf(
    features: int,
    context: int,
    *,
    kind: Literal["autoregressive", "coupling"] = "autoregressive",
    depth: int = 3,
    hidden: int = 128,
    hidden_layers: int = 2,
    units: int = 8,
    layers: int = 2,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> Iterator[Layer]:
    """Neural autoregressive flow (Huang, Krueger, Lacoste, Courville, 2018, arXiv:1804.00779).

    Each feature passes a small monotone network of sigmoids (the paper's deep sigmoidal flow),
    whose weights depend on other features. Sampling is by root finding.

    Args:
        kind: `autoregressive`: all previous features transform each one; `coupling`: one half of
            the features, and the context, transforms the other.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        units: Number of sigmoids of each layer of the monotone network.
        layers: Number of its layers.
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors).
        norm: Put an activation normalization before each transform.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    map, widths = DeepSigmoid(units=units, layers=layers), [hidden] * hidden_layers
    for _ in range(depth):
        yield from step(features, norm, permutation)
        yield transform(map, kind, features, context, widths)
