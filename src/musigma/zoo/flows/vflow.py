"""Augmented flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.gaussian import Format, GaussianHead
from musigma.layers import Affine, Augment, Coupling
from musigma.model import Layer
from musigma.nets import MLP
from musigma.zoo import at_least
from musigma.zoo.parts import step, vector_flow


@vector_flow
def vflow(
    features: int,
    context: int,
    *,
    extra: int | None = None,
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "lu",
    norm: bool = True,
) -> Iterator[Layer]:
    """Affine couplings of more dimensions than the data (Chen et al., "VFlow", 2020).

    Noise e, Gaussian given x, is appended to x, and a flow models both (arXiv:2002.09741; the
    augmented normalizing flows of Huang, Dinh, Courville, 2020, arXiv:2002.07101). log p(x) has a
    bound, log p(x, e) - log q(e | x), which `iwae` tightens. Both directions take one pass.

    Args:
        extra: Number of dimensions that are appended; None: as many as the data have.
        depth: Number of couplings.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        permutation: Mixing of the dimensions before each coupling, as in `maf`.
        norm: Put an activation normalization before each coupling.
    """
    extra = features if extra is None else extra
    at_least(1, extra=extra, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    widths, affine = [hidden] * hidden_layers, Affine(Format(scale="softclip"))

    def net(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, hidden=widths, context=context, zero=True)

    yield Augment(GaussianHead(net(features, 2 * extra), event_ndims=1), features)
    width = features + extra
    half = width // 2
    for _ in range(depth):
        yield from step(width, norm, permutation)
        yield Coupling(net(half, affine.outputs * (width - half)), map=affine)
