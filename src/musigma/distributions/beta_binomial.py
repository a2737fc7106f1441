"""Beta-binomial levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.tensors import at_least_float32, per_example

__all__ = ["FactorizedBetaBinomial"]


class FactorizedBetaBinomial(EventDistribution):
    r"""Independent levels 0 .. n: successes in n trials whose probability has a Beta distribution.

    .. math:: p(x) = \binom{n}{x} \frac{B(x + \alpha, n - x + \beta)}{B(\alpha, \beta)}

    Computed in float64 where the device has it: the terms are far larger than their sum. (As a
    likelihood of pixels: Townsend, Bird, Barber, "Practical lossless compression with latent
    variables using bits back coding", 2019, arXiv:1901.04866.)

    Args:
        log_alpha: Shape (B, \*event).
        log_beta: Of the same shape.
        levels: n + 1.

    Example:
        >>> uniform = FactorizedBetaBinomial(torch.zeros(1, 3), torch.zeros(1, 3), 256)
        >>> uniform.log_prob(torch.tensor([[0.0, 7.0, 255.0]])) / -3
        tensor([5.5452])
    """

    element = constraints.nonnegative_integer

    def __init__(self, log_alpha: Tensor, log_beta: Tensor, levels: int):
        self.dtype = at_least_float32(log_alpha).dtype
        wide = torch.float32 if log_alpha.device.type == "mps" else torch.float64
        self.alpha, self.beta = (t.to(wide).clamp(-20, 20).exp() for t in (log_alpha, log_beta))
        self.n = levels - 1
        super().__init__(log_alpha.shape[:1], log_alpha.shape[1:])

    @classmethod
    def from_channels(cls, h: Tensor, levels: int) -> FactorizedBetaBinomial:
        """Read h (B, 2 C, ...): log α in the first half of the channels, log β in the second."""
        log_alpha, log_beta = h.chunk(2, 1)
        return cls(log_alpha, log_beta, levels)

    @property
    def mean(self) -> Tensor:
        """The mean level, n α / (α + β)."""
        return (self.n * self.alpha / (self.alpha + self.beta)).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The most probable level."""
        return self._choose((), 0.0)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; the log masses are divided by `temperature`."""
        return self._choose(sample_shape, temperature)

    def _choose(self, sample_shape: Sequence[int], temperature: float | Tensor) -> Tensor:
        """The level with the highest log mass plus Gumbel noise, one level at a time."""
        best = self.alpha.new_full((*sample_shape, *self.alpha.shape), -math.inf)
        level = torch.zeros_like(best)
        t = per_example(temperature, best)
        for candidate in range(self.n + 1):
            gumbel = -torch.empty_like(best).exponential_().log()
            score = self._log_mass(torch.full_like(self.alpha, candidate)) + t * gumbel
            level = torch.where(score > best, candidate, level)
            best = torch.maximum(score, best)
        return level.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return self._sum(self._log_mass(value.to(self.alpha))).to(self.dtype)

    def _log_mass(self, x: Tensor) -> Tensor:
        a, b, n = self.alpha, self.beta, self.n
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        drawn = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(n + a + b)
        return choose + drawn - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)


@register_likelihood("beta-binomial", data="levels")
def beta_binomial(shape: Sequence[int], net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """A `FactorizedBetaBinomial`."""
    return LikelihoodHead(net(2 * shape[0]), FactorizedBetaBinomial.from_channels, levels=levels)
