"""The Haar wavelet transform of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["HaarSqueeze"]


class HaarSqueeze(Bijection):
    r"""Trade space for channels by an orthogonal wavelet: (C, H, W) to (4 C, H / 2, W / 2).

    .. math:: \begin{pmatrix} y_1 \\ y_2 \\ y_3 \\ y_4 \end{pmatrix} = \frac12
        \begin{pmatrix} 1 & 1 & 1 & 1 \\ 1 & -1 & 1 & -1 \\ 1 & 1 & -1 & -1 \\ 1 & -1 & -1 & 1
        \end{pmatrix} \begin{pmatrix} a \\ b \\ c \\ d \end{pmatrix}, \quad \log|\det| = 0

    for each 2x2 block with rows (a, b) and (c, d). The C channels of the sums come first, then
    those of the differences between columns, between rows, and across; so a `Split` keeps the sums
    and one kind of differences. The matrix is its own inverse. (Haar, 1910; in flows: Ardizzone et
    al., "Guided Image Generation with Conditional Invertible Neural Networks", 2019,
    arXiv:1907.02392.)

    Raises:
        ValueError: For an odd height or width.

    Example:
        >>> y, log_det = HaarSqueeze()(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        >>> y.flatten(), log_det
        (tensor([ 5., -1., -2.,  0.]), tensor([0.]))
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The wavelet coefficients."""
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x: HaarSqueeze needs images (B, C, H, W) of even sides; got {tuple(x.shape)}"
            )
        blocks = F.pixel_unshuffle(at_least_float32(x), 2).unflatten(1, (-1, 4))
        return torch.cat(haar(*blocks.unbind(2)), 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image."""
        blocks = torch.stack(haar(*at_least_float32(y).chunk(4, 1)), 2)
        return F.pixel_shuffle(blocks.flatten(1, 2), 2), y.new_zeros(len(y))


def haar(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """The transform of four numbers; its own inverse."""
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return [(top + bottom) / 2, (left + right) / 2, (top - bottom) / 2, (left - right) / 2]
