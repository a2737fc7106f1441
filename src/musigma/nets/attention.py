"""Gated convolutions and self-attention of images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join
from musigma.memory import recomputed
from musigma.nets.conv import ZeroConv2d
from musigma.tensors import at_least_float32

__all__ = ["AttentionNet", "GatedAttention", "GatedConv", "attend"]


LONG = 512
"""Number of keys from which a CPU trains on bfloat16 at least as fast as on float32."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of queries, keys and values (..., L, width).

    On a CPU, short sequences are computed in float32 under autocast too: torch's kernel takes up
    to six times as long in bfloat16.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a query (rows) sees a key (columns), up to (..., L, L).
    """
    if q.device.type != "cpu" or k.shape[-2] >= LONG:
        return F.scaled_dot_product_attention(q, k, v, mask)
    q, k, v = map(at_least_float32, (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, mask)


class _ChannelNorm(nn.LayerNorm):
    """Normalization over the channels of each pixel, with a scale and a shift."""

    def forward(self, input: Tensor) -> Tensor:
        """The output, of the input's shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def concat_elu(x: Tensor) -> Tensor:
    """elu(x) and elu(-x), as twice the channels."""
    return F.elu(torch.cat([x, -x], 1))


def gated(h: Tensor) -> Tensor:
    """The first half of the channels, times the sigmoid of the second."""
    values, gates = h.chunk(2, 1)
    return values * gates.sigmoid()


class GatedConv(nn.Module):
    """Two 3x3 convolutions, a gate, a shortcut, and normalization of the channels.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.enter = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.leave = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.norm = _ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the input's shape."""
        h = self.enter(concat_elu(x))
        return self.norm(x + gated(self.leave(concat_elu(h))))


class GatedAttention(nn.Module):
    """Self-attention between all pixels, a gate, a shortcut, and normalization of the channels.

    Rows and columns of the pixels are known by sines and cosines, so images may have any size. The
    cost grows with the square of the number of pixels.

    Args:
        channels: Channels in and out, a multiple of `heads`.
        heads: Number of heads.

    Raises:
        ValueError: If the channels are not a multiple of the heads.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels; got {heads}")
        self.heads = heads
        self.enter = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, 2 * channels, 1)
        self.norm = _ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the input's shape."""
        h = self.enter(x + _positions(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = h.transpose(-1, -2).unbind(1)  # each (B, heads, pixels, channels / heads)
        h = attend(q.contiguous(), k.contiguous(), v.contiguous())
        h = h.transpose(-1, -2).reshape(x.shape)
        return self.norm(x + gated(self.leave(h)))


def _positions(x: Tensor) -> Tensor:
    """Sines and cosines of the rows and columns of an image, (C, H, W)."""
    channels, height, width = x.shape[1:]
    quarter = math.ceil(channels / 4)
    waves = torch.exp(-math.log(1e3) * torch.arange(quarter, device=x.device) / quarter).to(x)
    rows, columns = (
        torch.arange(n, device=x.device).to(x)[:, None] * waves for n in (height, width)
    )
    rows = rows.T[:, :, None].expand(-1, height, width)
    columns = columns.T[:, None, :].expand(-1, height, width)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])[:channels]


class AttentionNet(nn.Module):
    """Blocks of a gated convolution and self-attention, which keep the image's size.

    (The coupling network of Ho, Chen, Srinivas, Duan, Abbeel, "Flow++", 2019, arXiv:1902.00275.)

    Args:
        inputs: Channels in.
        outputs: Channels out.
        width: Channels between, a multiple of `heads`.
        blocks: Number of blocks.
        heads: Heads of attention; 0 for gated convolutions alone.
        context: Number of features of the context, joined as channels.
        zero: Initialize the last layer to zero (a `ZeroConv2d`).

    Attributes:
        recompute: Whether the backward pass recomputes the network from its input
            (`musigma.memory`).

    Example:
        >>> AttentionNet(2, 6, width=8, blocks=1)(torch.randn(5, 2, 3, 4)).shape
        torch.Size([5, 6, 3, 4])
    """

    recompute = False

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        blocks: int = 1,
        heads: int = 4,
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.context = context
        self.enter = nn.Conv2d(inputs + context, width, 3, padding=1)
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [GatedConv(width), *([GatedAttention(width, heads)] if heads else [])]
        self.blocks = nn.Sequential(*layers)
        self.leave = (
            ZeroConv2d(width, outputs) if zero else nn.Conv2d(width, outputs, 3, padding=1)
        )

    @recomputed
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (B, outputs, H, W)."""
        return self.leave(self.blocks(self.enter(join(x, context, self.context))))
