"""Gamma and beta posteriors, for latents that are positive or between zero and one.

Their draws are those of torch, with implicit gradients (Figurnov et al., 2018, arXiv:1805.08498),
and their KL divergences are in closed form. Whitening maps the logarithm, or the logit, of a value
to mean 0 and standard deviation 1, in which temperatures and interpolations act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta, Gamma, constraints, kl_divergence, register_kl

from musigma.distributions.latents import POSTERIORS, PosteriorHead, within
from musigma.gaussian import EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, per_example

__all__ = ["FactorizedBeta", "FactorizedGamma", "StandardBeta", "StandardGamma"]

BOUNDS = (-5.0, 1.5)
"""Bounds of the log standard deviation that sets a concentration: 0.05 to 22026."""


class _Whitened(EventDistribution):
    """Independent elements of a distribution of torch, by a map to the real line.

    Args:
        each: The distribution, whose last batch dimension becomes the event.
    """

    has_rsample = True

    def __init__(self, each: Any):
        self.each = each
        super().__init__(each.batch_shape[:-1], each.batch_shape[-1:])

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a mapped value."""
        raise NotImplementedError

    def _map(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _unmap(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _inside(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.each.mean

    @property
    def stddev(self) -> Tensor:
        """The standard deviation."""
        return self.each.stddev

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return self.each.variance

    @property
    def center(self) -> Tensor:
        """The value that whitens to zero."""
        return self.unwhiten(torch.zeros_like(self.mean))

    @property
    def base_dist(self) -> Beta | Gamma:
        """The elements, as in `torch.distributions.Independent`."""
        return self.each

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw differentiably; the whitened draw is multiplied by `temperature`."""
        z = self._inside(self.each.rsample(torch.Size(sample_shape)))
        if not isinstance(temperature, Tensor) and temperature == 1.0:
            return z
        noise = self.whiten(z)
        return self.unwhiten(per_example(temperature, noise) * noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        return self._sum(self.each.log_prob(self._inside(at_least_float32(value))))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of the batch shape."""
        return self._sum(self.each.entropy())

    def whiten(self, value: Tensor) -> Tensor:
        """The mapped value, with its mean and standard deviation removed."""
        mean, std = self._moments()
        return (self._map(self._inside(at_least_float32(value))) - mean) / std

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        mean, std = self._moments()
        return self._inside(self._unmap(mean + std * at_least_float32(noise)))


class FactorizedGamma(_Whitened):
    r"""Independent gamma variables: log p(z) = Σ α log β - log Γ(α) + (α - 1) log z - β z.

    Args:
        concentration: α, shape (\*batch, D).
        rate: β, of the same shape.

    Example:
        >>> q = FactorizedGamma(torch.full((3,), 2.0), torch.ones(3))
        >>> q.log_prob(torch.ones(3))
        tensor(-3.)
    """

    element = constraints.positive

    def __init__(self, concentration: Tensor, rate: Tensor):
        super().__init__(Gamma(concentration, rate, validate_args=False))

    def _moments(self) -> tuple[Tensor, Tensor]:
        alpha = self.each.concentration
        return alpha.digamma() - self.each.rate.log(), torch.polygamma(1, alpha).sqrt()

    def _map(self, value: Tensor) -> Tensor:
        return value.log()

    def _unmap(self, value: Tensor) -> Tensor:
        return value.exp()

    def _inside(self, value: Tensor) -> Tensor:
        return value.clamp(min=torch.finfo(value.dtype).tiny)


class FactorizedBeta(_Whitened):
    r"""Independent beta variables: log p(z) = Σ (a - 1) log z + (b - 1) log(1 - z) - log B(a, b).

    Args:
        a: Shape (\*batch, D).
        b: Of the same shape.

    Example:
        >>> FactorizedBeta(torch.ones(3), torch.ones(3)).log_prob(torch.tensor([0.1, 0.5, 0.9]))
        tensor(0.)
    """

    element = constraints.unit_interval

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__(Beta(a, b, validate_args=False))

    def _moments(self) -> tuple[Tensor, Tensor]:
        a, b = self.each.concentration1, self.each.concentration0
        variance = torch.polygamma(1, a) + torch.polygamma(1, b)
        return a.digamma() - b.digamma(), variance.sqrt()

    def _map(self, value: Tensor) -> Tensor:
        return value.logit()

    def _unmap(self, value: Tensor) -> Tensor:
        return value.sigmoid()

    def _inside(self, value: Tensor) -> Tensor:
        edge = torch.finfo(value.dtype).eps
        return value.clamp(edge, 1 - edge)


@register_kl(FactorizedGamma, FactorizedGamma)
@register_kl(FactorizedBeta, FactorizedBeta)
def whitened_kl(q: _Whitened, p: _Whitened) -> Tensor:
    """KL(q || p) in nats, summed over the elements."""
    return kl_divergence(q.each, p.each).sum(-1)


class StandardGamma(nn.Module):
    """The exponential distribution of mean 1, Gamma(1, 1), of each of n elements, as a prior."""

    ones: Tensor

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("ones", torch.ones(n), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> _Whitened:
        """The distribution, of batch shape ()."""
        return FactorizedGamma(self.ones, self.ones)


class StandardBeta(StandardGamma):
    """The uniform distribution on (0, 1), Beta(1, 1), of each of n elements, as a prior."""

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> _Whitened:
        """The distribution, of batch shape ()."""
        return FactorizedBeta(self.ones, self.ones)


@POSTERIORS.register
def gamma(size: int, net: Callable[[int], nn.Module], format: Format) -> PosteriorHead:
    """`FactorizedGamma` of mean e^m and concentration s^-2, with the prior Gamma(1, 1).

    `format` reads m and log s, which is kept within `BOUNDS`. q is the prior at m = 0, s = 1.
    """
    format = within(format, *BOUNDS)

    def read(h: Tensor) -> FactorizedGamma:
        mean, log_std = format.split(h)
        log_concentration = -2 * log_std
        return FactorizedGamma(log_concentration.exp(), (log_concentration - mean).exp())

    prior = partial(StandardGamma, size)
    return PosteriorHead(
        net(2 * size), read, event=(size,), prior=prior, saturation=format.saturation
    )


@POSTERIORS.register
def beta(size: int, net: Callable[[int], nn.Module], format: Format) -> PosteriorHead:
    """`FactorizedBeta` of mean sigmoid(m), with a + b = 2 s^-2, and a uniform prior.

    `format` reads m and log s, which is kept within `BOUNDS`. q is the prior at m = 0, s = 1.
    """
    format = within(format, *BOUNDS)

    def read(h: Tensor) -> FactorizedBeta:
        mean, log_std = format.split(h)
        log_sum = math.log(2) - 2 * log_std
        a, b = ((log_sum + F.logsigmoid(side)).exp() for side in (mean, -mean))
        return FactorizedBeta(a.clamp(min=1e-3), b.clamp(min=1e-3))

    prior = partial(StandardBeta, size)
    return PosteriorHead(
        net(2 * size), read, event=(size,), prior=prior, saturation=format.saturation
    )
