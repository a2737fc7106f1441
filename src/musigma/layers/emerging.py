"""Convolutions over pixels in raster order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["AutoregressiveConv"]


class AutoregressiveConv(Bijection):
    r"""A convolution in which a pixel gets a linear function of the pixels before it.

    .. math:: y_p = x_p + \sum_{q < p} W_{q - p}\, x_q, \quad \log|\det| = 0

    The order is by rows, or backwards if `reverse`. The first layer and one that is reversed form
    an emerging convolution, in which a pixel depends on all pixels around it; scales and the
    mixing of channels are left to `ActNorm` and `InvertibleConv`. The weights start at zero.
    Inversion goes pixel by pixel, and enlarges rounding errors if the weights are large.
    (Hoogeboom, van den Berg, Welling, "Emerging Convolutions for Generative Normalizing Flows",
    2019, arXiv:1901.11137.)

    Args:
        channels: C.
        size: Side of the kernel, odd.
        reverse: Whether the order begins at the last pixel.

    Raises:
        ValueError: For an even size.

    Example:
        >>> layer = AutoregressiveConv(1)
        >>> layer.weight.data.fill_(1.0).shape  # rows above, and the columns before
        torch.Size([1, 1, 2, 3])
        >>> layer(torch.ones(1, 1, 2, 3))[0].detach()
        tensor([[[[1., 2., 2.],
                  [3., 5., 4.]]]])
    """

    mask: Tensor
    slow_inverse = "one step per pixel"

    def __init__(self, channels: int, *, size: int = 3, reverse: bool = False):
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size: expected an odd number; got {size}")
        self.reach, self.reverse = size // 2, reverse
        self.weight = nn.Parameter(torch.zeros(channels, channels, self.reach + 1, size))
        mask = torch.ones(self.reach + 1, size)
        mask[-1, self.reach :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        """x, with its first pixel in the order of this layer in the upper left corner."""
        return x.flip(2, 3) if self.reverse else x

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.reach, self.reach, self.reach, 0))

    def shift(self, x: Tensor) -> Tensor:
        """What is added to x, (B, C, H, W)."""
        x = self._padded(self.turned(at_least_float32(x)))
        with torch.autocast(x.device.type, enabled=False):
            return self.turned(F.conv2d(x, self.weight * self.mask))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, 0)``."""
        return at_least_float32(x) + self.shift(x), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, 0)``, pixel by pixel."""
        y = self.turned(at_least_float32(y))
        x = self.unroll(lambda i, j, shift: y[:, :, i, j] - shift, y)
        return self.turned(x), y.new_zeros(len(y))

    def unroll(self, fill: Callable[[int, int, Tensor], Tensor], like: Tensor) -> Tensor:
        """Compute x (B, C, H, W) pixel by pixel, ``x[:, :, i, j] = fill(i, j, shift)``.

        Pixels are in the order of this layer (`turned`). `shift` (B, C) is what y has beside x
        there, from the pixels so far. The values of `like` are not read.
        """
        weight = self.weight * self.mask
        (rows, columns), reach = weight.shape[2:], self.reach
        x = self._padded(torch.zeros_like(like))
        for i in range(like.shape[2]):
            for j in range(like.shape[3]):
                seen = x[:, :, i : i + rows, j : j + columns].clone()
                shift = torch.einsum("ocrs,bcrs->bo", weight, seen)
                x[:, :, i + reach, j + reach] = fill(i, j, shift)
        return x[:, :, reach:, reach : x.shape[3] - reach]

    def extra_repr(self) -> str:
        """Names the size and the order."""
        return f"size={2 * self.reach + 1}, reverse={self.reverse}"
