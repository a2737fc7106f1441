"""Real NVP: affine couplings, on images by checkerboard and by channel, on vectors by halves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from musigma.distributions import StandardNormal, StandardUniform
from musigma.gaussian import Format, GaussianHead
from musigma.layers import (
    ActNorm,
    Affine,
    Checkerboard,
    Coupling,
    Dequantize,
    Logit,
    Permutation,
    Rescale,
    Split,
    Squeeze,
)
from musigma.model import Chain, Inverse, Layer, Prior
from musigma.nets import MLP, ResNet, ZeroConv2d
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import halvings, image_shape
from musigma.zoo.flows.maf import standardization


@architecture
def realnvp(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    levels: int | None = None,
    depth: int = 4,
    hidden: int = 32,
    blocks: int = 1,
    standardize: bool = False,
    alpha: float = 1e-5,
    context: int = 0,
) -> Chain:
    """Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017, arXiv:1605.08803).

    Activation normalization replaces the paper's batch normalization, so no density depends on the
    other examples of a batch. Checkerboard couplings work on half-width images.

    Args:
        shape: (C, H, W) with an even width, or (D,) with D of at least 2.
        bits: Bits of each element; None for continuous data.
        levels: Number of scales of an image; None: as many as the sides allow, up to 3.
        depth: Number of couplings of each kind at each scale; for vectors, of all couplings.
        hidden: Width of the coupling networks.
        blocks: Number of residual blocks in each coupling network, for images.
        standardize: Standardize continuous data in the first layer, by the mean and standard
            deviation of the training data; the log-determinant counts.
        alpha: Margin of the logit that maps [0, 1] to the real line, for data with bits (0.05 in
            the paper, with which training on black and white images is slower).
        context: Number of features of the context; it conditions couplings and split priors.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    at_least(0, blocks=blocks)
    layers = standardization(shape, bits, standardize)
    if bits is not None:
        layers += [Dequantize(StandardUniform(shape), 2**bits), Rescale(2.0**-bits), Logit(alpha)]
    if len(shape) == 1:
        if shape[0] < 2:
            raise ValueError("shape: a coupling needs vectors of at least 2 elements; got 1")
        for _ in range(depth):
            layers += step(shape[0], hidden, context, blocks=None)
        return Chain(layers, Prior(StandardNormal(shape)))

    channels, height, width = image_shape(shape)
    levels = halvings(height, width, levels)
    for level in range(levels):
        board = Checkerboard()
        layers.append(board)
        for _ in range(depth):
            layers += step(2 * channels, hidden, context, blocks=blocks)
        layers += [Inverse(board), Squeeze()]
        channels, height, width = 4 * channels, height // 2, width // 2
        for _ in range(depth):
            layers += step(channels, hidden, context, blocks=blocks)
        if level < levels - 1:
            net = ZeroConv2d(channels // 2, channels, context=context)
            layers.append(Split(GaussianHead(net, event_ndims=3)))
            channels //= 2
    return Chain(layers, Prior(StandardNormal((channels, height, width))))


def step(channels: int, hidden: int, context: int, *, blocks: int | None) -> list[Layer]:
    """ActNorm, an affine coupling with a ResNet (an MLP if `blocks` is None), and a reversal."""
    half = channels // 2
    outputs = 2 * (channels - half)
    if blocks is None:
        net: nn.Module = MLP(half, outputs, hidden=[hidden] * 2, context=context, zero=True)
    else:
        net = ResNet(half, outputs, width=hidden, blocks=blocks, context=context, zero=True)
    coupling = Coupling(net, map=Affine(Format(scale="tanh")))
    return [ActNorm(channels), coupling, Permutation.reverse(channels)]
