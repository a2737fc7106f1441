"""Layers: the parts of a chain, which report their terms to a `Trace` once per direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from musigma.trace import Trace

__all__ = ["Bijection", "Inverse", "Layer"]


class Layer(nn.Module, ABC):
    """A part of a chain: takes x while inferring, and returns it while generating.

    To write one, implement `infer` and `generate` as mirror images: what one direction draws, the
    other scores. A layer that generates a variable uses itself as the site and yields itself from
    `variables`. `musigma.testing.check_layer` tests the result.

    Attributes:
        exact: False if inference draws anything that the generative direction does not determine.
        is_preprocessing: True if the layer only changes how data are stored (levels, range).
        repeated: True for a block that models repeat; each one is compiled and sharded
            separately. Any module may have this attribute. A model with fewer than two such
            blocks (a masked autoregressive flow, for instance) is compiled as a whole.
        straight_through: True if gradients hold constant, by `detach`, what depends on the
            parameters (the error of rounding, for instance). Any module may have this attribute,
            and any map. Laws of gradients then hold the same values constant.
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
        """Set data-dependent parameters from one batch; by default there are none."""


class Bijection(Layer):
    """A layer that is an invertible function and draws nothing.

    Implement `forward` and `inverse`, each returning the value and the log |det| of its own
    direction, in nats per example, shape (B,).

    Attributes:
        slow_forward: If `forward` takes many passes or an iteration, what it takes, as
            ``"one step per feature"``; `musigma info` states it.
        slow_inverse: The same of `inverse`.
    """

    slow_forward: str = ""
    slow_inverse: str = ""

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latents: ``(y, log |det dy/dx|)``."""

    @abstractmethod
    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: ``(x, log |det dx/dy|)``."""

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)`` from y, where x is a leaf and the others are computed from it.

        A reversible backward pass uses it; override it to share work between both directions.
        """
        with torch.no_grad():
            x, _ = self.inverse(y, context)
        x = x.detach().requires_grad_()
        return x, *self(x, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Apply `forward`, and record the log-determinant."""
        return trace.bijection(self, x, context)

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Apply `inverse`, and record the log-determinant."""
        return trace.bijection(self, z, context)


class Inverse(Bijection):
    """The inverse of another bijection; `calibrate` does not reach it.

    Args:
        bijection: Its `inverse` becomes `forward`.
    """

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection
        self.slow_forward, self.slow_inverse = bijection.slow_inverse, bijection.slow_forward

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the bijection."""
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The bijection."""
        return self.bijection(y, context)
