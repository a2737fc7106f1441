"""Layers: the parts of a chain, which state their terms to a `Trace` once per direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from musigma.trace import Trace

__all__ = ["Bijection", "Inverse", "Layer"]


class Layer(nn.Module, ABC):
    """A part of a chain: consumes x on the way up, and gives it back on the way down.

    To write one, implement `infer` and `generate` as mirror images: whatever one direction draws,
    the other scores. A layer that generates a variable names itself as the site and yields itself
    from `variables`. `musigma.testing.check_layer` proves the result.

    Attributes:
        exact: False if inference draws anything that the generative direction does not determine.
        is_preprocessing: True if the layer only changes how data are stored (levels, range).
        repeated: True for a block that models repeat: compiled, and sharded, one by one. Any
            module may have this attribute.
    """

    exact: bool = True
    is_preprocessing: bool = False
    repeated: bool = False

    @abstractmethod
    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Data to latents."""

    @abstractmethod
    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Latents to data."""

    def variables(self) -> Iterator[nn.Module]:
        """The sites of the variables that this layer generates, in the order of generation."""
        return iter(())

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters from one batch; most layers have none."""


class Bijection(Layer):
    """A layer that is a pure function and has an inverse: it never sees the trace.

    Implement `forward` and `inverse`, each returning the value and the log |det| of its own
    direction, in nats per example, shape (B,).
    """

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latents: ``(y, log |det dy/dx|)``."""

    @abstractmethod
    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: ``(x, log |det dx/dy|)``."""

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)`` from y: x is a leaf, and the others are computed from it again.

        What a reversible backward pass goes by; work that both directions share may be done once.
        """
        with torch.no_grad():
            x, _ = self.inverse(y, context)
        x = x.detach().requires_grad_()
        return x, *self(x, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """States its log-determinant, and nothing else."""
        return trace.bijection(self, x, context)

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """States its log-determinant, and nothing else."""
        return trace.bijection(self, z, context)


class Inverse(Bijection):
    """Another bijection, the other way round; it is not calibrated.

    Args:
        bijection: Its `inverse` becomes `forward`.
    """

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the bijection."""
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The bijection."""
        return self.bijection(y, context)
