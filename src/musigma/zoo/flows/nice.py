"""Flows of additive couplings."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import ActNorm, Additive, Conditioner, Coupling, Permutation
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def nice(
    features: int,
    context: int,
    *,
    depth: int = 4,
    hidden: int = 128,
    hidden_layers: int = 2,
) -> Iterator[Layer]:
    """NICE: additive couplings, and a scale of each feature at the end.

    (Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2015,
    arXiv:1410.8516.) The couplings preserve volume; only the last layer, which also shifts, does
    not. It is set from the first batch. Both directions take one pass.

    Args:
        depth: Number of couplings.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    half = features // 2
    for i in range(depth):
        if i:
            yield Permutation.reverse(features)
        net = Conditioner(half, features - half, hidden=[hidden] * hidden_layers, context=context)
        yield Coupling(net, map=Additive())
    yield ActNorm(features)
