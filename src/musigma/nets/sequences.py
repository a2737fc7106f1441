"""Networks from sequences of any length, which a mask delimits, to vectors.

Each takes ``(values, mask)``: float (B, L, F), 0 where the mask (B, L) is False, and returns a
vector (B, features) that does not depend on what follows the last element.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.nets.transformer import Attention, waves
from musigma.nets.vectors import residual_branch

__all__ = ["DeepSet", "SequenceTransformer", "SeriesNet"]


class DeepSet(nn.Module):
    r"""An invariant function of any number of exchangeable elements.

    .. math:: \left[\frac{1}{n} \sum_i \phi(x_i), \log(1 + n)\right]

    φ is a residual network. (Zaheer et al., "Deep Sets", 2017, arXiv:1703.06114.) For no
    elements, the mean is 0.

    Args:
        channels: F.
        width: Width of φ.
        blocks: Number of residual blocks of φ.

    Example:
        >>> net, x = DeepSet(2, width=8), torch.randn(3, 5, 2)
        >>> mask = torch.ones(3, 5, dtype=torch.bool)
        >>> torch.allclose(net(x, mask), net(x.flip(1), mask), atol=1e-6)
        True
    """

    def __init__(self, channels: int, *, width: int = 64, blocks: int = 1):
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(residual_branch(width) for _ in range(blocks))
        self.features = width + 1

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """The vector, (B, features)."""
        h = self.enter(values)
        for block in self.blocks:
            h = h + block(h)
        return torch.cat([mean_of(h, mask), log_count(h, mask)], 1)


class SeriesNet(nn.Module):
    """A residual convolutional network of series of up to a given length.

    Every stage but the first halves the series, until 8 positions or fewer are left. The vector
    consists of these positions, of the mean over the series at every stage, and of log(1 + n).

    Args:
        length: Length of the longest series.
        channels: F.
        width: Channels between.
        kernel: Size of the convolutions, odd.
        blocks: Number of residual blocks of each stage.

    Example:
        >>> net, mask = SeriesNet(20, 2, width=8), torch.arange(15) < torch.tensor([[15], [9]])
        >>> x = torch.randn(2, 15, 2) * mask[..., None]
        >>> torch.allclose(net(x, mask)[1:], net(x[1:, :9], mask[1:, :9]), atol=1e-6)
        True
    """

    def __init__(
        self, length: int, channels: int, *, width: int = 32, kernel: int = 5, blocks: int = 1
    ):
        super().__init__()
        self.length, inputs, left = length, channels + 1, length
        self.stages = nn.ModuleList()
        while not self.stages or left > 8:
            stride = 2 if self.stages else 1
            left = math.ceil(left / stride)
            enter = nn.Conv1d(inputs, width, kernel, stride=stride, padding=kernel // 2)
            branches = [_convolutions(width, kernel) for _ in range(blocks)]
            self.stages.append(nn.ModuleList([enter, *branches]))
            inputs = width
        self.features = width * (left + len(self.stages)) + 1

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """The vector, (B, features)."""
        room = (0, self.length - values.shape[1])
        inside = F.pad(mask.to(values.dtype), room)[:, None]
        h = torch.cat([F.pad(values.mT, room), inside], 1)
        found = [log_count(values, mask)]
        for i, stage in enumerate(self.stages):
            enter, *branches = stage.children()
            inside = inside[:, :, ::2] if i else inside
            h = enter(h) * inside
            for branch in branches:
                h = h + branch(h) * inside
            found.append(h.sum(2) / inside.sum(2).clamp(min=1))
        return torch.cat([h.flatten(1), *found], 1)


def _convolutions(width: int, kernel: int) -> nn.Sequential:
    """What a residual block of `SeriesNet` adds to its input."""
    layers = [nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(2)]
    return nn.Sequential(nn.GELU(), layers[0], nn.GELU(), layers[1])


class SequenceTransformer(nn.Module):
    """A transformer encoder of sequences of up to a given length.

    The tokens are a convolution over each element and its neighbors, with learned positions,
    beside one token that the network adds. (Without the convolution, a network learned nothing of
    the correlation of neighbors in 500 steps.) The vector is this token, the mean of the others,
    and log(1 + n).

    Args:
        length: Length of the longest sequence.
        channels: F.
        width: Width of a token.
        heads: Number of heads of the attention, a divisor of `width`.
        blocks: Number of layers.

    Raises:
        ValueError: If `width` is not a multiple of `heads`.

    Example:
        >>> net, mask = SequenceTransformer(9, 2, width=8), torch.arange(9) < torch.tensor([[4]])
        >>> x = torch.randn(1, 9, 2) * mask[..., None]
        >>> torch.allclose(net(x, mask), net(x[:, :4], mask[:, :4]), atol=1e-6)
        True
    """

    def __init__(
        self, length: int, channels: int, *, width: int = 32, heads: int = 4, blocks: int = 2
    ):
        super().__init__()
        self.enter = nn.Conv1d(channels, width, 3, padding=1)
        self.positions = nn.Parameter(waves(length + 1, width))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(blocks))
        self.blocks = nn.ModuleList(residual_branch(width, 2 * width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.features = 2 * width + 1

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """The vector, (B, features)."""
        h = self.enter(F.pad(values.mT, (1, 0))).mT + self.positions[: values.shape[1] + 1]
        inside = F.pad(mask, (1, 0), value=True)[:, None, None]
        for attention, block in zip(self.attention, self.blocks, strict=True):
            h = h + attention(h, inside)
            h = h + block(h)
        h = self.norm(h)
        return torch.cat([h[:, 0], mean_of(h[:, 1:], mask), log_count(h, mask)], 1)


def mean_of(h: Tensor, mask: Tensor) -> Tensor:
    """The mean over the elements, (B, F); 0 if there are none."""
    inside = mask[..., None].to(h.dtype)
    return (h * inside).sum(1) / inside.sum(1).clamp(min=1)


def log_count(like: Tensor, mask: Tensor) -> Tensor:
    """log(1 + number of elements), (B, 1)."""
    return mask.sum(1, keepdim=True).to(like.dtype).log1p()
