"""Distributions on the unit interval: noise of dequantization, and a likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.gaussian import DiagonalGaussian, EventDistribution, Shape
from musigma.tensors import at_least_float32, per_example

__all__ = [
    "FactorizedContinuousBernoulli",
    "LogitNormal",
    "LogitNormalHead",
    "Squashed",
    "StandardUniform",
    "UnitUniform",
]


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

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
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

    def __init__(self, shape: Shape):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> UnitUniform:
        """The distribution, of batch shape () if nothing is given and (B,) otherwise."""
        zeros = self.zeros if given is None else self.zeros.expand(len(given), *self.zeros.shape)
        return UnitUniform(zeros, self.zeros.ndim)


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

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw, differentiably, strictly inside (0, 1)."""
        y = self.base.rsample(sample_shape, temperature=temperature)
        edge = torch.finfo(y.dtype).eps
        return y.sigmoid().clamp(edge, 1 - edge)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape: log N(logit u) - log u - log(1 - u)."""
        edge = torch.finfo(self.base.mean.dtype).eps
        y = value.clamp(edge, 1 - edge).logit()
        return self.base.log_prob(y) - self._sum(F.logsigmoid(y) + F.logsigmoid(-y))


class Squashed(EventDistribution):
    """sigmoid(y) with y of another distribution, whose last draw is remembered.

    The density of the last draw needs no logit, nor the inverse of a flow (`Flowed`).

    Args:
        base: The distribution of y.
    """

    element = constraints.unit_interval
    has_rsample = True

    def __init__(self, base: Any):
        self.base = base
        self._last: tuple[Tensor | None, Tensor | None] = None, None
        super().__init__(base.batch_shape, base.event_shape)

    @property
    def center(self) -> Tensor:
        """The sigmoid of the center of y."""
        return self._squashed(self.base.center)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw, differentiably, strictly inside (0, 1)."""
        y = self.base.rsample(sample_shape, temperature=temperature)
        u = self._squashed(y)
        self._last = u, y
        return u

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape: log p(y) - log u - log(1 - u)."""
        last, y = self._last
        if value is not last or y is None:
            edge = torch.finfo(value.dtype).eps
            y = value.clamp(edge, 1 - edge).logit()
        return self.base.log_prob(y) - self._sum(F.logsigmoid(y) + F.logsigmoid(-y))

    @staticmethod
    def _squashed(y: Tensor) -> Tensor:
        edge = torch.finfo(y.dtype).eps
        return y.sigmoid().clamp(edge, 1 - edge)


class LogitNormalHead(nn.Module):
    """Learned noise for `Dequantize`: the sigmoid of what another head emits.

    It is a `LogitNormal` if that is a Gaussian, and `Squashed` otherwise.

    Args:
        base: A `GaussianHead`, or a `FlowHead`, over events of the data's shape.
        levels: Number of levels; x is scaled from 0 .. levels - 1 to [-1, 1] for the head.
    """

    def __init__(self, base: nn.Module, levels: int):
        super().__init__()
        self.base, self.levels = base, levels

    def forward(self, given: Tensor, context: Tensor | None = None) -> LogitNormal | Squashed:
        """q(u | x)."""
        base = self.base(2 * given / max(1, self.levels - 1) - 1, context)
        return LogitNormal(base) if isinstance(base, DiagonalGaussian) else Squashed(base)


class FactorizedContinuousBernoulli(EventDistribution):
    r"""Independent values in [0, 1], with density proportional to :math:`e^{x l}`.

    .. math:: \log p(x) = \sum_i x_i l_i - \log\frac{e^{l_i} - 1}{l_i}

    A binary cross-entropy on gray values omits the second term. (Loaiza-Ganem &
    Cunningham, "The continuous Bernoulli", 2019, arXiv:1907.06845.)

    Args:
        logits: l, shape (B, \*event).

    Example:
        >>> FactorizedContinuousBernoulli(torch.zeros(1, 3)).log_prob(torch.rand(1, 3))
        tensor([0.])
    """

    element = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)
        super().__init__(logits.shape[:1], logits.shape[1:])

    def _away_from_zero(self) -> tuple[Tensor, Tensor]:
        small = self.logits.abs() < 0.1
        return small, torch.where(small, torch.ones_like(self.logits), self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, shape (B,)."""
        return self._sum(self.log_prob_of_elements(value))

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        """Log density of each element in nats, shape (B, *event)."""
        (small, far), square = self._away_from_zero(), self.logits.square()
        series = self.logits / 2 + square / 24 - square**2 / 2880 + square**3 / 181440
        size = far.abs()
        normalizer = size + torch.log(-torch.expm1(-size)) - size.log() + far.clamp(max=0)
        terms = value * self.logits - torch.where(small, series, normalizer)
        return torch.where((value < 0) | (value > 1), -math.inf, terms)

    @property
    def mean(self) -> Tensor:
        """The mean, in (0, 1)."""
        small, far = self._away_from_zero()
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        return torch.where(small, series, -1 / torch.expm1(-far) - 1 / far)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw by the quantile function; multiply the distance from the mean by `temperature`."""
        small, far = self._away_from_zero()
        u = torch.rand_like(self.logits.expand(*sample_shape, *self.logits.shape))
        negative = -far.abs()  # the quantile function is stable on this side; mirror the other
        x = torch.log1p(u * torch.expm1(negative)) / negative
        x = torch.where(far > 0, 1 - x, x)
        x = torch.where(small, u + self.logits * u * (u - 1) * -0.5, x)
        return self.mean + per_example(temperature, x) * (x - self.mean)


@register_likelihood("continuous-bernoulli", data="unit")
def continuous_bernoulli(shape: Shape, net: Callable[[int], nn.Module]) -> nn.Module:
    """A `FactorizedContinuousBernoulli`."""
    return LikelihoodHead(net(shape[0]), FactorizedContinuousBernoulli)
