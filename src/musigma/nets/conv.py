"""Convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join
from musigma.memory import recomputed

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "CouplingNet",
    "EdgeConv2d",
    "ResBlock",
    "ResNet",
    "ToPixels",
    "Upsample",
    "ZeroConv2d",
]


class EdgeConv2d(nn.Conv2d):
    r"""A 3x3 convolution that detects the border of the image.

    .. math:: y = W * x + V * e + b

    with zeros around x, and an additional input channel e, which is 1 around the image and 0
    inside it. V is the "edge bias" of OpenAI's Glow. A convolution whose input is padded with
    ones, as in rosinality's code, is the special case in which V is the sum of W over its input
    channels. Initially V = 0, an ordinary convolution.

    Args:
        inputs: Channels in.
        outputs: Channels out.

    Example:
        >>> conv, x = EdgeConv2d(2, 4), torch.randn(1, 2, 5, 5)
        >>> conv.edge.data.copy_(conv.weight.sum(1, keepdim=True)).shape
        torch.Size([4, 1, 3, 3])
        >>> padded_with_ones = F.conv2d(F.pad(x, [1] * 4, value=1), conv.weight, conv.bias)
        >>> torch.allclose(conv(x), padded_with_ones, atol=1e-6)
        True
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        self.edge = nn.Parameter(torch.zeros(outputs, 1, 3, 3))

    def forward(self, input: Tensor) -> Tensor:
        """The output, (B, outputs, H, W)."""
        return super().forward(input) + edge_bias(self.edge, input.shape[-2:])


def edge_bias(edge: Tensor, size: Sequence[int]) -> Tensor:
    """The contribution V * e of an `EdgeConv2d` for a given size: (1, outputs, H, W)."""
    around = F.pad(edge.new_zeros(1, 1, *size), [1] * 4, value=1)
    return F.conv2d(around, edge)


def conv3x3(inputs: int, outputs: int, edge: bool) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size; an `EdgeConv2d` if `edge`."""
    return EdgeConv2d(inputs, outputs) if edge else nn.Conv2d(inputs, outputs, 3, padding=1)


class ZeroConv2d(nn.Module):
    """A convolution that starts at zero, with a learned gain: ``conv(x) · exp(3 · logs)``.

    (Kingma & Dhariwal, "Glow", 2018, arXiv:1807.03039: Conv2dZeros.) `logs`, the name in that
    code, is a log gain, not a standard deviation.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        context: Number of features of the context, joined as channels.
        edge: Whether it is an `EdgeConv2d`.
    """

    def __init__(self, inputs: int, outputs: int, *, context: int = 0, edge: bool = False):
        super().__init__()
        self.context = context
        self.conv = conv3x3(inputs + context, outputs, edge)
        self.logs = nn.Parameter(torch.zeros(outputs, 1, 1))
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (B, outputs, H, W)."""
        gain = (3 * self.logs).exp()
        weight = self.conv.weight * gain.unsqueeze(1)
        bias = self.conv.bias * gain.flatten()  # pyright: ignore[reportOptionalOperand]
        y = F.conv2d(join(x, context, self.context), weight, bias, padding=1)
        if isinstance(self.conv, EdgeConv2d):
            y = y + edge_bias(self.conv.edge * gain.unsqueeze(1), x.shape[-2:])
        return y


class CouplingNet(nn.Module):
    """Glow's coupling network: conv 3x3, conv 1x1, and a 3x3 that starts at zero.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        hidden: Channels between.
        context: Number of features of the context, joined as constant channels.
        edge: Whether both 3x3 convolutions are `EdgeConv2d`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: int = 128,
        context: int = 0,
        edge: bool = False,
    ):
        super().__init__()
        self.context = context
        self.enter = conv3x3(inputs + context, hidden, edge)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.leave = ZeroConv2d(hidden, outputs, edge=edge)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (B, outputs, H, W)."""
        h = F.relu(self.enter(join(x, context, self.context)), inplace=True)
        return self.leave(F.relu(self.mix(h), inplace=True))


def norm(channels: int) -> nn.Module:
    """Group normalization, which does not depend on the other examples of a batch."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut.

    Args:
        channels: Channels in and out.
        hidden: Channels between; None: `channels`.

    Attributes:
        recompute: Whether the backward pass recomputes the block from its input
            (`musigma.memory`).
    """

    recompute = False
    repeated = True

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.norm = norm(channels)
        self.enter = nn.Conv2d(channels, hidden, 3, padding=1)
        self.leave = nn.Conv2d(hidden, channels, 3, padding=1)

    @recomputed
    def forward(self, x: Tensor) -> Tensor:
        """The output, of the input's shape."""
        h = F.silu(self.enter(F.silu(self.norm(x))))
        return x + self.leave(h)


class ResNet(nn.Module):
    """A residual convolutional network that keeps the image's size.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        width: Channels between.
        blocks: Residual blocks.
        context: Number of features of the context, joined as constant channels.
        zero: Initialize the last layer to zero (a `ZeroConv2d`).

    Attributes:
        recompute: As in `ResBlock`, for the whole network.
    """

    recompute = False

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        blocks: int = 1,
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.context = context
        self.enter = nn.Conv2d(inputs + context, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.leave = ZeroConv2d(width, outputs) if zero else nn.Conv2d(width, outputs, 1)

    @recomputed
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (B, outputs, H, W)."""
        h = self.blocks(self.enter(join(x, context, self.context)))
        return self.leave(F.silu(h))


def halved(height: int, width: int, times: int) -> list[tuple[int, int]]:
    """Image sizes under repeated halving, rounded up."""
    sizes = [(height, width)]
    for _ in range(times):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes.append((height, width))
    return sizes


class ConvEncoder(nn.Module):
    """A residual convolutional network from images of any size to vectors, or feature maps.

    The first convolution already halves the image.

    Args:
        shape: (C, H, W) of the input.
        outputs: Length of the output vector; None: `forward` returns the feature maps of every
            size from half down, smallest first, with `width` channels each.
        width: Channels.
        halvings: Number of times the image is halved, 1 or more.
        blocks: Residual blocks at each size.
        context: Number of features of the context, joined as constant channels.

    Example:
        >>> ConvEncoder((3, 13, 10), 8, width=4, halvings=2)(torch.randn(2, 3, 13, 10)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int | None,
        *,
        width: int = 48,
        halvings: int = 2,
        blocks: int = 1,
        context: int = 0,
    ):
        super().__init__()
        self.context = context
        self.stages = nn.ModuleList()
        for i in range(halvings):
            inputs = width if i else shape[0] + context
            down = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
            self.stages.append(nn.Sequential(down, *(ResBlock(width) for _ in range(blocks))))
        last = math.prod(halved(shape[1], shape[2], halvings)[-1])
        self.leave = None if outputs is None else nn.Linear(width * last, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None):
        """The vector (B, outputs), or the feature maps."""
        h, maps = join(x, context, self.context), []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps[::-1] if self.leave is None else self.leave(F.silu(h).flatten(1))


class ToPixels(nn.Module):
    """Feature maps of half an image's size to the image: a convolution and a pixel shuffle.

    Args:
        width: Channels in.
        shape: (outputs, H, W) of the image, of any size.
    """

    def __init__(self, width: int, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.conv = nn.Conv2d(width, 4 * shape[0], 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """The image-shaped output."""
        _, height, width = self.shape
        return F.pixel_shuffle(self.conv(F.silu(h)), 2)[:, :, :height, :width]


class Upsample(nn.Module):
    """Enlarge to a size by repeating pixels, then convolve."""

    def __init__(self, width: int, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """The enlarged maps."""
        return self.conv(F.interpolate(h, self.size, mode="nearest"))


class ConvDecoder(nn.Module):
    """The mirror image of `ConvEncoder`: vectors (B, inputs) to images (B, outputs, H, W).

    Args:
        inputs: Length of the input vector; extra input axes are flattened.
        shape: (outputs, H, W).
        width: Channels.
        halvings: Number of times the smallest map is doubled.
        blocks: Residual blocks at each size.
        context: Number of features of the context, joined to the input.
    """

    def __init__(
        self,
        inputs: int,
        shape: Sequence[int],
        *,
        width: int = 48,
        halvings: int = 2,
        blocks: int = 1,
        context: int = 0,
    ):
        super().__init__()
        self.context = context
        smallest, *larger = halved(shape[1], shape[2], halvings)[:0:-1]
        self.start = (width, *smallest)
        self.enter = nn.Linear(inputs + context, math.prod(self.start))
        layers: list[nn.Module] = [ResBlock(width) for _ in range(blocks)]
        for size in larger:
            layers += [Upsample(width, size), *(ResBlock(width) for _ in range(blocks))]
        self.layers = nn.Sequential(*layers, ToPixels(width, shape))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The image-shaped output."""
        h = self.enter(join(z.flatten(1), context, self.context))
        return self.layers(h.unflatten(1, self.start))
