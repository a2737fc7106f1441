"""Autoencoders of codes: VQ-VAE, with residual quantization, or with finite scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from musigma.distributions import data_of
from musigma.model import Model
from musigma.nets import (
    MLP,
    QUANTIZERS,
    CausalTransformer,
    ConvEncoder,
    Logarithm,
    ResBlock,
    Scaled,
    ToPixels,
    Upsample,
    halved,
    join,
)
from musigma.quantized import QuantizedVAE
from musigma.zoo import architecture, at_least
from musigma.zoo.vaes.vae import chosen_likelihood, named_likelihood, over_data


@architecture
def vqvae(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    quantizer: str = "vq",
    latents: int = 16,
    positions: int = 8,
    halvings: int = 2,
    width: int = 64,
    blocks: int = 2,
    prior_width: int = 128,
    prior_heads: int = 4,
    prior_blocks: int = 3,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "channel",
    standardize: bool = False,
    context: int = 0,
) -> Model:
    """A VAE of discrete codes (van den Oord, Vinyals, Kavukcuoglu, 2017, arXiv:1711.00937).

    A causal transformer over the codes is its prior, and is trained along with the rest. See
    `musigma.quantized.QuantizedVAE`. Samples take one step per code.

    Args:
        shape: (C, H, W), at least 4x4, or (D,).
        bits: Bits of each element; None for continuous data.
        quantizer: `vq`: nearest vectors; `residual`: the sum of several; `fsq`: finite scalars.
            Options follow the name: 'vq classes=512', 'residual classes=64 depth=4',
            'fsq levels=8,5,5,5'.
        latents: Features of each position, which are quantized; for `fsq` that of its levels.
        positions: Number of positions, for vectors.
        halvings: Number of times that images are halved; positions are the smallest map.
        width: Channels, or units, of the networks.
        blocks: Residual blocks at each size (images), or hidden layers (vectors).
        prior_width: Width of the transformer.
        prior_heads: Its number of heads, a divisor of the width.
        prior_blocks: Its number of blocks.
        likelihood: A name that `musigma.likelihood` takes; `auto` is `bernoulli` for
            1 bit, `gaussian` for continuous data, and `logistic-mixture` otherwise.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood: `emitted` by the network, one for each
            `channel` or `pixel`, `optimal` (the root mean squared error), or a number.
        standardize: Standardize continuous vectors in the first layer.
        context: Number of features of the context; it conditions encoder, decoder and prior.
    """
    at_least(1, latents=latents, positions=positions, halvings=halvings, width=width)
    at_least(0, blocks=blocks, prior_blocks=prior_blocks)
    name = chosen_likelihood(likelihood, bits)
    kind, levels = data_of(name), None if bits is None else 2**bits
    book: Any = QUANTIZERS.choice(quantizer)(latents)
    features, how = book.features, {"hidden": [width] * blocks, "context": context}
    if len(shape) == 3:
        sizes = halved(shape[1], shape[2], halvings)
        size = sizes[-1]
        encoder = MapEncoder(shape, features, width, halvings, blocks, context)
    else:
        sizes, size = [], (positions,)
        encoder = MLP(math.prod(shape), (features, positions), **how)

    def decode(channels: int) -> nn.Module:
        if sizes:
            emitted = (channels, *shape[1:])
            return MapDecoder(emitted, features, width, sizes[-2:0:-1], blocks, context)
        return MLP(features * positions, channels, **how)

    if levels is not None:
        encoder = Scaled(encoder, levels if kind in ("levels", "counts") else 2)
    elif kind == "counts":
        encoder = Logarithm(encoder)
    prior = CausalTransformer(
        range(book.classes),
        math.prod(size) * book.depth,
        width=prior_width,
        heads=prior_heads,
        blocks=prior_blocks,
        context=context,
    )
    decoder = named_likelihood(name, shape, decode, levels or 2, components, std)
    model = QuantizedVAE(encoder, book, decoder, prior, size)
    return over_data(model, shape, bits, kind not in ("levels", "counts"), standardize)


class MapEncoder(nn.Module):
    """Images to a map of features at the smallest size."""

    def __init__(self, shape, features: int, width: int, halvings: int, blocks: int, context: int):
        super().__init__()
        how: Any = {"width": width, "halvings": halvings, "blocks": blocks, "context": context}
        self.net, self.leave = ConvEncoder(shape, None, **how), nn.Conv2d(width, features, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The features, (B, D, H, W)."""
        return self.leave(self.net(x, context)[0])


class MapDecoder(nn.Module):
    """A map of features to an image; `sizes` are those between, smallest first."""

    def __init__(self, shape, features: int, width: int, sizes, blocks: int, context: int):
        super().__init__()
        self.context = context
        self.enter = nn.Conv2d(features + context, width, 3, padding=1)
        layers: list[nn.Module] = [ResBlock(width) for _ in range(blocks)]
        for size in sizes:
            layers += [Upsample(width, size), *(ResBlock(width) for _ in range(blocks))]
        self.layers = nn.Sequential(*layers, ToPixels(width, shape))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The image-shaped output."""
        return self.layers(self.enter(join(z, context, self.context)))
