"""What a network's outputs do to each element: couplings and autoregressive layers share it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from musigma.gaussian import Format, at_least_float32
from musigma.layers.maps.spline import Spline

__all__ = ["ElementMap", "Kind"]

Kind = Literal["affine", "additive", "spline"]


class ElementMap:
    r"""A monotone map of each element, by what a network emits on axis 1.

    `affine`: y = (x + t) e^s, with (t, s) read by a `Format`; `additive`: y = x + t; `spline`: by
    a `Spline`. Both directions return the value and the log-slope of their own, of x's shape.

    Args:
        kind: Which.
        format: How an affine map reads its outputs.
        spline: How a spline does; None for the usual one.

    Raises:
        ValueError: For an unknown kind.
    """

    def __init__(self, kind: Kind, format: Format, spline: Spline | None = None):
        if kind not in ("affine", "additive", "spline"):
            raise ValueError(f"kind: expected 'affine', 'additive' or 'spline'; got {kind!r}")
        self.kind, self.format, self.spline = kind, format, spline or Spline()

    @property
    def outputs(self) -> int:
        """Numbers that a network emits for each element."""
        return {"affine": 2, "additive": 1, "spline": self.spline.outputs}[self.kind]

    def owners(self, elements: int) -> list[int]:
        """The element that each output on axis 1 belongs to.

        Raises:
            ValueError: If the format reads another axis, or more than one tensor.
        """
        each = torch.arange(elements)
        if self.kind != "affine":
            return each.repeat(self.outputs).tolist()
        if self.format.layout not in ("halves", "interleaved") or self.format.dim != 1:
            raise ValueError(
                "format: the outputs of one vector are read as halves or interleaved, on axis 1; "
                f"got '{self.format}'"
            )
        rows = Format().relayout(each.repeat(2), self.format)
        assert isinstance(rows, Tensor)
        return rows.tolist()

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "affine":
            return self.format.split(h)
        shift = at_least_float32(h)
        return shift, torch.zeros_like(shift)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        if self.kind == "spline":
            return self.spline.forward(x, h)
        shift, log_scale = self._read(h)
        return (x + shift) * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``."""
        if self.kind == "spline":
            return self.spline.inverse(y, h)
        shift, log_scale = self._read(h)
        return y * (-log_scale).exp() - shift, -log_scale

    def __str__(self) -> str:
        reading = {"affine": f", format='{self.format}'", "spline": f", {self.spline}"}
        return f"kind={self.kind!r}" + reading.get(self.kind, "")
