"""The logit-normal: learned noise on (0, 1), for dequantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.gaussian import DiagonalGaussian, GaussianHead

__all__ = ["LogitNormal", "LogitNormalHead"]


class LogitNormal(EventDistribution):
    """sigmoid(y) with y ~ N(mean, std²).

    Args:
        base: The `DiagonalGaussian` of y.
    """

    element = constraints.unit_interval
    has_rsample = True

    def __init__(self, base: DiagonalGaussian):
        self.base = base
        super().__init__(base.batch_shape, base.event_shape)

    @property
    def mean(self) -> Tensor:
        """The median, sigmoid(mean of y), which serves as the center."""
        return self.base.mean.sigmoid()

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw, differentiably, strictly inside (0, 1)."""
        y = self.base.rsample(sample_shape, temperature=temperature)
        edge = torch.finfo(y.dtype).eps
        return y.sigmoid().clamp(edge, 1 - edge)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape: log N(logit u) - log u - log(1 - u)."""
        edge = torch.finfo(self.base.mean.dtype).eps
        y = value.clamp(edge, 1 - edge).logit()
        return self.base.log_prob(y) - self._sum(F.logsigmoid(y) + F.logsigmoid(-y))


class LogitNormalHead(nn.Module):
    """A `LogitNormal` whose Gaussian is emitted by a head: learned noise for `Dequantize`.

    Args:
        base: A `GaussianHead` over events of the data's shape.
        levels: Number of levels; x is scaled from 0 .. levels - 1 to [-1, 1] for the head.
    """

    def __init__(self, base: GaussianHead, levels: int):
        super().__init__()
        self.base, self.levels = base, levels

    def forward(self, given: Tensor, context: Tensor | None = None) -> LogitNormal:
        """q(u | x)."""
        return LogitNormal(self.base(2 * given / max(1, self.levels - 1) - 1, context))
