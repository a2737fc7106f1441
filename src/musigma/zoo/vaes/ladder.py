"""A top-down hierarchical VAE with convolutional latents at several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musigma.distributions import data_of
from musigma.gaussian import Format, GaussianHead
from musigma.ladder import Ladder, LadderBlock
from musigma.model import Model
from musigma.nets import (
    ConvEncoder,
    ResBlock,
    ResNet,
    Scaled,
    ToPixels,
    Upsample,
    halved,
    join,
)
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import image_shape
from musigma.zoo.vaes.vae import chosen_likelihood, named_likelihood, over_data


@architecture
def ladder(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    levels: int = 4,
    latents: int = 8,
    width: int = 48,
    blocks: int = 1,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "emitted",
    context: int = 0,
) -> Model:
    """A ladder of latents, from small feature maps to large (Child, 2021, arXiv:2011.10650).

    The image is halved until its smaller side is at most 7. The latents are spread over all sizes
    except the full one, smallest first. For color images ``--lr 1e-3`` is stable, where the
    default of 3e-3 makes training go back to earlier states.

    Args:
        shape: (C, H, W), at least 4x4.
        bits: Bits of each element; None for continuous images.
        levels: Number of latents; each is a feature map.
        latents: Channels of each latent.
        width: Channels of the networks.
        blocks: Number of residual blocks between two latents.
        likelihood: A name that `musigma.likelihood` takes; `auto` is `bernoulli` for
            1 bit, `gaussian` for continuous data, and `logistic-mixture` otherwise.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood: `emitted` by the network, one for each
            `channel` or `pixel`, `optimal` (the root mean squared error), or a number.
        context: Number of features of the context; it conditions every network.
    """
    at_least(1, levels=levels, latents=latents, width=width, components=components)
    at_least(0, blocks=blocks)
    _, height, wide = image_shape(shape)
    if min(height, wide) < 4:
        raise ValueError(f"shape: a ladder needs images of at least 4x4; got {height}x{wide}")
    name = chosen_likelihood(likelihood, bits)
    continuous, scale = (
        data_of(name) not in ("levels", "counts"),
        None if bits is None else 2**bits,
    )
    down = max(1, math.ceil(math.log2(min(height, wide) / 7)))
    sizes = halved(height, wide, down)[:0:-1]  # from the smallest up to half the full size
    at = [i * down // levels for i in range(levels)]  # the size of each latent

    bottom_up = BottomUp(
        ConvEncoder(shape, None, width=width, halvings=down, blocks=blocks, context=context), at
    )
    depth = levels * max(1, blocks)
    rungs = [
        LadderBlock(
            prior=_gaussian(width, latents, width, context, zero=True),
            posterior=_gaussian(2 * width, latents, width, context),
            merge=Merge(
                latents,
                width,
                blocks,
                depth,
                sizes[after] if after > i else None,
                context,
            ),
        )
        for i, after in zip(at, [*at[1:], down - 1], strict=True)
    ]

    def decode(emitted: int) -> nn.Module:
        return Decoder(width, (emitted, height, wide), blocks, context)

    decoder = named_likelihood(name, shape, decode, scale or 2, components, std)
    if scale:
        bottom_up = Scaled(bottom_up, 2 if continuous else scale)
    model = Ladder(bottom_up, rungs, decoder, (width, *sizes[0]))
    return over_data(model, shape, bits, continuous)


def _gaussian(inputs: int, latents: int, width: int, context: int, *, zero: bool = False):
    net = ResNet(inputs, 2 * latents, width=width, blocks=0, context=context, zero=zero)
    return GaussianHead(net, event_ndims=3, format=Format())


class BottomUp(nn.Module):
    """The feature map for each latent; latents of one size share it."""

    def __init__(self, encoder: ConvEncoder, at: Sequence[int]):
        super().__init__()
        self.encoder, self.at = encoder, list(at)

    def forward(self, x: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """One map for each latent, top first."""
        maps = self.encoder(x, context)
        return [maps[i] for i in self.at]


class Merge(nn.Module):
    """Add a latent to the state, apply residual blocks, and enlarge it for a larger next latent.

    The projection of z and the residual branches are initialized smaller in deeper ladders, as in
    Child (2021), so that the variance of the state does not grow with depth.
    """

    def __init__(
        self,
        latents: int,
        width: int,
        blocks: int,
        depth: int,
        size: tuple[int, int] | None,
        context: int,
    ):
        super().__init__()
        self.context = context
        self.project = nn.Conv2d(latents + context, width, 1)
        residual = [ResBlock(width) for _ in range(blocks)]
        self.blocks = nn.Sequential(*residual, *([Upsample(width, size)] if size else []))
        with torch.no_grad():
            for conv in (self.project, *(block.leave for block in residual)):
                conv.weight.div_(math.sqrt(depth))

    def forward(self, state: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The next state."""
        return self.blocks(state + self.project(join(z, context, self.context)))


class Decoder(nn.Module):
    """The last state and the context to the input of the likelihood."""

    def __init__(self, width: int, shape: Sequence[int], blocks: int, context: int):
        super().__init__()
        self.context = context
        self.enter = nn.Conv2d(width + context, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.leave = ToPixels(width, shape)

    def forward(self, state: Tensor, context: Tensor | None = None) -> Tensor:
        """The image-shaped output."""
        return self.leave(self.blocks(self.enter(join(state, context, self.context))))
