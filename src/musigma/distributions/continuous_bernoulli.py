"""The continuous Bernoulli: the density on [0, 1] whose log is linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.tensors import at_least_float32, per_example

__all__ = ["FactorizedContinuousBernoulli"]


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
        (small, far), square = self._away_from_zero(), self.logits.square()
        series = self.logits / 2 + square / 24 - square**2 / 2880 + square**3 / 181440
        size = far.abs()
        normalizer = size + torch.log(-torch.expm1(-size)) - size.log() + far.clamp(max=0)
        terms = value * self.logits - torch.where(small, series, normalizer)
        return self._sum(torch.where((value < 0) | (value > 1), -math.inf, terms))

    @property
    def mean(self) -> Tensor:
        """The mean, in (0, 1)."""
        small, far = self._away_from_zero()
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        return torch.where(small, series, -1 / torch.expm1(-far) - 1 / far)

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw by the quantile function; the distance from the mean is times `temperature`."""
        small, far = self._away_from_zero()
        u = torch.rand_like(self.logits.expand(*sample_shape, *self.logits.shape))
        negative = -far.abs()  # the quantile function is stable on this side; mirror the other
        x = torch.log1p(u * torch.expm1(negative)) / negative
        x = torch.where(far > 0, 1 - x, x)
        x = torch.where(small, u + self.logits * u * (u - 1) * -0.5, x)
        return self.mean + per_example(temperature, x) * (x - self.mean)


@register_likelihood("continuous-bernoulli", data="unit")
def continuous_bernoulli(shape: Sequence[int], net: Callable[[int], nn.Module]) -> nn.Module:
    """A `FactorizedContinuousBernoulli`."""
    return LikelihoodHead(net(shape[0]), FactorizedContinuousBernoulli)
