"""The affine map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.gaussian import Format
from musigma.layers.maps.map import Map

__all__ = ["Affine"]


@dataclass(frozen=True, repr=False)
class Affine(Map):
    r""":math:`y = (x + t) e^s`, with (t, s) read from h by a `Format` as (mean, log_std).

    Args:
        format: How h is read; its scale determines how s is bounded.

    Raises:
        TypeError: If `format` is not a `Format`.

    Example:
        >>> y, log_slope = Affine().forward(torch.ones(1, 2), torch.zeros(1, 4))
        >>> y, log_slope
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    format: Format = Format(scale="tanh")

    def __post_init__(self):
        if not isinstance(self.format, Format):
            raise TypeError(
                f"format: expected a Format; got {self.format!r} (the fixed change of units "
                "y = a x + b is the layer Rescale)"
            )

    @property
    def outputs(self) -> int:
        """2: the shift and the scale."""
        return 2

    def owners(self, elements: int) -> list[int]:
        """The channel to which each entry of h on axis 1 belongs.

        Raises:
            ValueError: If the format reads another axis, or more than one tensor.
        """
        if self.format.layout not in ("halves", "interleaved") or self.format.dim != 1:
            raise ValueError(
                "format: the outputs of one vector are read as halves or interleaved, on axis 1; "
                f"got '{self.format}'"
            )
        rows = Format().relayout(torch.arange(elements).repeat(2), self.format)
        assert isinstance(rows, Tensor)
        return rows.tolist()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``((x + t) exp(s), s)``."""
        shift, log_scale = self.format.split(h)
        return (x + shift) * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y exp(-s) - t, -s)``."""
        shift, log_scale = self.format.split(h)
        log_slope = -log_scale
        return y * log_slope.exp() - shift, log_slope

    def saturation(self, h: Tensor) -> Tensor:
        """The share of scales at a limit of the format; see `Format.saturation`."""
        return self.format.saturation(h)

    def __repr__(self) -> str:
        return f"Affine(format='{self.format}')"
