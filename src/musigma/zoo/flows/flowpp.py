"""Flow++: couplings by mixtures of logistics, networks with attention, and a flow of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from musigma.distributions import FlowHead, LogitNormalHead, StandardNormal
from musigma.layers import (
    ActNorm,
    Affine,
    Checkerboard,
    Composed,
    Coupling,
    InvertibleConv,
    MixtureLogisticCDF,
    Permutation,
    Squeeze,
)
from musigma.model import Bijection, Chain, Inverse, Layer, Prior
from musigma.nets import AttentionNet
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import dequantization
from musigma.zoo.parts import data_layers, image_shape


@architecture
def flowpp(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    depth: int = 2,
    hidden: int = 32,
    blocks: int = 1,
    heads: int = 4,
    components: int = 8,
    dequantize: Literal["uniform", "learned", "flow"] = "learned",
    alpha: float | None = 1e-5,
    context: int = 0,
) -> Chain:
    """Flow++ (Ho, Chen, Srinivas, Duan, Abbeel, 2019, arXiv:1902.00275).

    Couplings by checkerboard, by channel and again by checkerboard, at two scales, without splits.
    Each maps an element by the distribution function of a mixture of logistics, a logit and an
    affine map, with parameters from a network of gated convolutions and attention. Scores take one
    pass; samples take one pass and, in each coupling, the roots of an increasing function.

    Args:
        shape: (C, H, W), with even sides.
        bits: Bits of each element; None for continuous images.
        depth: Number of couplings in each of the three stages; the last stage is left out if half
            the width is odd.
        hidden: Channels of the networks, a multiple of `heads`.
        blocks: Number of blocks of a gated convolution and attention in each network.
        heads: Heads of attention; 0 for gated convolutions alone. Attention is between all pixels.
        components: Number of logistics in each mixture.
        dequantize: Noise that is logit-normal given the image, `learned`, which compression can
            code; or by a `flow` given the image, as in the paper; or `uniform`.
        alpha: As in `glow` (0.05 in the paper).
        context: Number of features of the context.
    """
    at_least(1, depth=depth, hidden=hidden, blocks=blocks, components=components)
    channels, height, width = image_shape(shape)
    if height % 2 or width % 2:
        raise ValueError(f"shape: expected even sides; got {height}x{width}")

    def net(inputs: int, outputs: int, features: int) -> nn.Module:
        return AttentionNet(
            inputs, outputs, width=hidden, blocks=blocks, heads=heads, context=features, zero=True
        )

    def coupling(channels: int, features: int) -> Coupling:
        half, map = channels // 2, Composed(MixtureLogisticCDF(components), Affine())
        return Coupling(net(half, map.outputs * (channels - half), features), map=map)

    def stage(channels: int) -> list[Layer]:
        layers: list[Layer] = []
        for _ in range(depth):
            layers += [ActNorm(channels), InvertibleConv(channels), coupling(channels, context)]
        return layers

    def on_board(inner: Sequence[Layer]) -> list[Layer]:
        board = Checkerboard()
        return [board, *inner, Inverse(board)]

    def noise_flow() -> nn.Module:
        layers: list[Bijection] = []
        for _ in range(2):
            swap = Permutation([*range(channels, 2 * channels), *range(channels)])
            layers += [Inverse(coupling(2 * channels, hidden)), swap]
        flow = Chain(on_board(layers), Prior(StandardNormal(shape)))
        features = AttentionNet(
            channels, hidden, width=hidden, blocks=blocks, heads=0, context=context
        )
        return LogitNormalHead(FlowHead(features, flow, shape), 2 ** (bits or 0))

    if dequantize == "flow":
        noise = None if bits is None else noise_flow()
    else:
        noise = dequantization(shape, bits, dequantize, hidden, context)
    layers = data_layers(shape, bits, alpha, low=-0.5, noise=noise)
    layers += [*on_board(stage(2 * channels)), Squeeze(), *stage(4 * channels)]
    if width % 4 == 0:
        layers += on_board(stage(8 * channels))
    return Chain(layers, Prior(StandardNormal((4 * channels, height // 2, width // 2))))
