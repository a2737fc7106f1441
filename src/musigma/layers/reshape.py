"""Reorderings of the elements of an image between space and channels; log_det is zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.model import Bijection

__all__ = ["Checkerboard", "Squeeze"]


class Squeeze(Bijection):
    """Trade space for channels: (C, H, W) to (4 C, H / 2, W / 2), as in Real NVP and Glow.

    Channel ``4 c + 2 i + j`` of the output holds row i, column j of each 2x2 block of channel c.

    Raises:
        ValueError: For an odd height or width.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The squeezed image."""
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x: Squeeze needs images (B, C, H, W) of even sides; got {tuple(x.shape)}"
            )
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image."""
        return F.pixel_shuffle(y, 2), y.new_zeros(len(y))


class Checkerboard(Bijection):
    """The black squares of a checkerboard, then its white ones: (C, H, W) to (2 C, H, W / 2).

    A `Coupling` between a checkerboard and its inverse is Real NVP's checkerboard coupling at half
    the cost, since its network sees no masked image. Even rows keep their even columns first, odd
    rows their odd ones.

    Args:
        white: Whether the white squares come first.

    Raises:
        ValueError: For an odd width.
    """

    def __init__(self, *, white: bool = False):
        super().__init__()
        self.white = white

    def _swap(self, pairs: Tensor) -> Tensor:
        """Swap the two halves (2, B, C, H, W / 2) on every second row; its own inverse."""
        odd = torch.arange(pairs.shape[3], device=pairs.device) % 2 == (0 if self.white else 1)
        return torch.where(odd[:, None], pairs.flip(0), pairs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two halves, as channels."""
        if x.ndim != 4 or x.shape[3] % 2:
            raise ValueError(
                f"x: Checkerboard needs images (B, C, H, W) of even width; got {tuple(x.shape)}"
            )
        first, second = self._swap(torch.stack([x[..., 0::2], x[..., 1::2]]))
        return torch.cat([first, second], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image."""
        even, odd = self._swap(torch.stack(y.chunk(2, 1)))
        return torch.stack([even, odd], -1).flatten(-2), y.new_zeros(len(y))
