"""Integer discrete flows of images and vectors of levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from musigma.distributions import IntegerLogisticHead
from musigma.layers import Coupling, IntegerShift, Permutation, Split
from musigma.model import Chain, Inverse, Layer, Prior
from musigma.nets import MLP, Constant, ResNet, Scaled
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import multiscale


@architecture
def idf(
    shape: Sequence[int],
    *,
    bits: int = 8,
    levels: int | None = None,
    depth: int = 4,
    hidden: int = 64,
    blocks: int = 1,
    components: int = 5,
    context: int = 0,
) -> Chain:
    """Integer discrete flow (Hoogeboom et al., 2019, arXiv:1905.07376), of integers to integers.

    Additive couplings round their shift, so latents are integers, log p(x) is an exact log mass
    without dequantization, and compression pops no bits off the stack. The mass is that of all
    integer vectors, so a small part of it lies outside the levels of the data. As in IDF++ (van
    den Berg et al., 2021, arXiv:2006.12459) a coupling starts as the identity, and its permutation
    is undone after it.

    Args:
        shape: (C, H, W), with sides that can be halved `levels` times; or (D,), D at least 2.
        bits: Bits of each element; continuous data have no mass.
        levels: Number of scales of an image. Each halves the sides, and all but the last factor
            out half of their channels. None: as many as the sides allow, up to 3.
        depth: Number of couplings at each scale; for vectors, of all couplings.
        hidden: Width of the networks.
        blocks: Number of residual blocks in each network, for images.
        components: Logistic components of every integer under the priors.
        context: Number of features of the context.

    Raises:
        ValueError: For continuous data, or vectors of a single element.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden, components=components)
    at_least(0, blocks=blocks)
    if bits is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError(
            "bits: an integer discrete flow needs integer levels, as images have, or vectors with "
            "bits=N in Python; got real numbers"
        )
    if len(shape) == 1 and shape[0] < 2:
        raise ValueError(f"shape: a coupling needs vectors of at least 2 elements; got {shape[0]}")
    outputs = 3 * components

    def head(net: nn.Module, channels: int) -> IntegerLogisticHead:
        return IntegerLogisticHead(
            net, channels, levels=2**bits, components=components, event_ndims=len(shape)
        )

    def net(inputs: int, outputs: int) -> nn.Module:
        if len(shape) == 1:
            inner = MLP(inputs, outputs, hidden=[hidden] * 2, context=context, zero=True)
        else:
            inner = ResNet(
                inputs, outputs, width=hidden, blocks=blocks, context=context, zero=True
            )
        return Scaled(inner, 2**bits)

    def steps(channels: int) -> list[Layer]:
        layers: list[Layer] = []
        half, shift = channels // 2, IntegerShift(2 ** (bits - 1))
        for _ in range(depth):
            order = Permutation.shuffle(channels)
            coupling = Coupling(net(half, channels - half), map=shift)
            layers += [order, coupling, Inverse(order)]
        return layers

    def split(channels: int) -> Layer:
        half = channels // 2
        return Split(head(net(half, outputs * half), half))

    if len(shape) == 1:
        layers, top = steps(shape[0]), tuple(shape)
    else:
        layers, top = multiscale(shape, levels, steps, split)
    prior = Constant((outputs * top[0], *top[1:]), context=context)
    return Chain(layers, Prior(head(prior, top[0])))
