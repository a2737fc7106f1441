"""Masked autoregressive flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.gaussian import Format
from musigma.layers import MADE, Affine, Autoregressive
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, vector_flow


@vector_flow
def maf(
    features: int,
    context: int,
    *,
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    format: str = "halves softclip",
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> Iterator[Layer]:
    """Masked autoregressive flow (Papamakarios, Pavlakou, Murray, 2017, arXiv:1705.07057).

    Activation normalization replaces the paper's batch normalization, so no density depends on the
    other examples of a batch. Densities take one pass; samples take one step per feature.

    Args:
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        format: How each transform reads its network's output, as `Format.parse` takes it.
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors), which begins as a shuffle.
        norm: Put an activation normalization before each transform.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    affine, widths = Affine(Format.parse(format)), [hidden] * hidden_layers
    for _ in range(depth):
        yield from step(features, norm, permutation)
        net = MADE(affine.owners(features), hidden=widths, context=context, zero=True)
        yield Autoregressive(net, map=affine)
