"""Coupling: one half of the channels decides what happens to the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from musigma.gaussian import Format, at_least_float32
from musigma.model import Bijection, conditioned

__all__ = ["Coupling"]


class Coupling(Bijection):
    r"""The first half of the channels, and the context, transform the second half.

    .. math:: y_1 = x_1, \quad y_2 = (x_2 + t(x_1)) \cdot e^{s(x_1)}, \quad \log|\det| = \sum s

    An `affine` coupling reads (t, s) from its network by a `Format`, of which the scale says how s
    is bounded; an `additive` one has s = 0, and its network emits t alone. Both directions cost
    one pass of the network. (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP",
    2017, arXiv:1605.08803; the form (x + t) e^s is that of Kingma & Dhariwal, "Glow", 2018,
    arXiv:1807.03039.)

    Args:
        net: ``net(x1)`` or ``net(x1, context)``, with x1 the first ``C // 2`` channels; emits
            2 ``ceil(C / 2)`` channels, or half of that if additive.
        kind: `affine` or `additive`.
        format: How the network's output is read.

    Raises:
        ValueError: For an unknown kind.

    Example:
        >>> coupling = Coupling(nn.Linear(2, 6))
        >>> x = torch.randn(4, 5)
        >>> y, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        kind: Literal["affine", "additive"] = "affine",
        format: Format = Format(scale="tanh"),
    ):
        super().__init__()
        if kind not in ("affine", "additive"):
            raise ValueError(f"kind: expected 'affine' or 'additive'; got {kind!r}")
        self.net, self.kind, self.format = net, kind, format

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        x = at_least_float32(x)
        return x[:, :half], x[:, half:]

    def _read(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        h = conditioned(self.net, x1, context)
        if self.kind == "affine":
            return self.format.split(h)
        shift = at_least_float32(h)
        return shift, torch.zeros_like(shift)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, Σ s)``."""
        x1, x2 = self._halves(x)
        shift, log_scale = self._read(x1, context)
        y2 = (x2 + shift) * log_scale.exp()
        return torch.cat([x1, y2], 1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, -Σ s)``."""
        x1, y2 = self._halves(y)
        shift, log_scale = self._read(x1, context)
        x2 = y2 * (-log_scale).exp() - shift
        return torch.cat([x1, x2], 1), -log_scale.flatten(1).sum(1)

    def extra_repr(self) -> str:
        """Names the convention."""
        return f"kind={self.kind!r}" + (
            f", format='{self.format}'" if self.kind == "affine" else ""
        )
