"""Jet: couplings of the patches of images, by vision transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from musigma.distributions import StandardNormal
from musigma.layers import ActNorm, Checkerboard, Coupling, Permutation, Squeeze
from musigma.model import Chain, Inverse, Layer, Prior
from musigma.nets import Transformer
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import coupling_map, dequantization
from musigma.zoo.parts import data_layers, patches


@architecture
def jet(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    patch: int = 4,
    depth: int = 10,
    spatial: int = 5,
    width: int = 128,
    heads: int = 4,
    blocks: int = 2,
    coupling: Literal["affine", "additive"] = "affine",
    format: str = "halves 2*sigmoid",
    dequantize: Literal["uniform", "learned"] = "uniform",
    alpha: float | None = None,
    context: int = 0,
) -> Chain:
    """Jet (Kolesnikov, Pinto, Tschannen, 2024, arXiv:2412.15129).

    Each coupling transforms half of the numbers of every patch (chosen at random), or half of the
    patches (a checkerboard), given the other half. Both directions take one pass. An activation
    normalization of the patches comes first. The paper's other spatial couplings, stripes, are
    left out.

    Args:
        shape: (C, H, W), with sides that `patch` divides.
        bits: Bits of each element; None for continuous images.
        patch: Side of a patch.
        depth: Number of couplings.
        spatial: Every `spatial`-th coupling is between patches, for which their columns must be
            even in number; 0 for none.
        width: Width of the transformers.
        heads: Number of heads of their attention, a divisor of the width.
        blocks: Number of blocks of each transformer.
        coupling: Affine couplings, or additive ones, which preserve volume.
        format: How an affine coupling reads its network's output, as `Format.parse` takes it.
        dequantize: Uniform noise, as in the paper, or learned noise, as in glow.
        alpha: Margin of a logit that maps [0, 1] to the real line before all other layers, for
            data with bits; None for no logit, as in the paper.
        context: Number of features of the context; it conditions the couplings.
    """
    at_least(1, depth=depth, width=width, heads=heads, blocks=blocks)
    at_least(0, spatial=spatial)
    features, rows, columns = patches(shape, patch)
    if spatial and columns % 2:
        raise ValueError(
            f"spatial: patches of {patch} make {columns} columns, which a checkerboard cannot "
            "halve; choose another patch, or spatial=0"
        )
    map = coupling_map(coupling, format)

    def coupled(channels: int, tokens: int) -> Coupling:
        half = channels // 2
        options = {"width": width, "heads": heads, "blocks": blocks, "context": context}
        net = Transformer(half, map.outputs * (channels - half), tokens, zero=True, **options)
        return Coupling(net, map=map)

    def couplings() -> Iterator[Layer]:
        for i in range(1, depth + 1):
            if spatial and i % spatial == 0:
                board = Checkerboard(white=i // spatial % 2 == 0)
                yield from (board, coupled(2 * features, rows * columns // 2), Inverse(board))
            else:
                yield from (Permutation.shuffle(features), coupled(features, rows * columns))

    noise = dequantization(shape, bits, dequantize, width, context)
    layers = data_layers(shape, bits, alpha, low=-0.5, noise=noise)
    layers += [Squeeze(patch), ActNorm(features), *couplings()]
    return Chain(layers, Prior(StandardNormal((features, rows, columns))))
