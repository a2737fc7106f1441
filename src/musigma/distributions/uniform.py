"""Uniform on the unit interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.tensors import per_example

__all__ = ["StandardUniform", "UnitUniform"]


class UnitUniform(EventDistribution):
    r"""Uniform on [0, 1), independently for each element.

    Args:
        zeros: Zeros of shape (\*batch, \*event), which set the type and the device.
        event_ndims: Number of trailing dimensions that form one event.
    """

    element = constraints.unit_interval
    has_rsample = True

    def __init__(self, zeros: Tensor, event_ndims: int):
        self.zeros = zeros
        at = zeros.ndim - event_ndims
        super().__init__(zeros.shape[:at], zeros.shape[at:])

    @property
    def mean(self) -> Tensor:
        """One half."""
        return self.zeros + 0.5

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw; the distance from one half is multiplied by `temperature`."""
        u = torch.rand_like(self.zeros.expand(*sample_shape, *self.zeros.shape))
        return 0.5 + per_example(temperature, u) * (u - 0.5)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero inside [0, 1], -inf outside, in nats, of the batch shape."""
        outside = (value < 0) | (value > 1)
        return self._sum(torch.where(outside, -math.inf, 0.0).to(self.zeros))


class StandardUniform(nn.Module):
    """Uniform on [0, 1) over events of a shape: dequantization noise, or a baseline prior.

    Args:
        shape: The event shape.
    """

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> UnitUniform:
        """The distribution, of batch shape () if nothing is given and (B,) otherwise."""
        zeros = self.zeros if given is None else self.zeros.expand(len(given), *self.zeros.shape)
        return UnitUniform(zeros, self.zeros.ndim)
