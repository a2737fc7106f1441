"""Distribution functions of mixtures, mapped back to the line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.layers.maps.map import Monotone, planes
from musigma.tensors import normal_quantile

__all__ = ["MixtureGaussianCDF", "MixtureLogisticCDF", "grid", "logit_of_sigmoids"]


@dataclass(frozen=True)
class _Mixture(Monotone):
    """Maps with K components, each of a weight, a mean and a log scale."""

    components: int = 8

    def __post_init__(self):
        if self.components < 1:
            raise ValueError(f"components: expected 1 or more; got {self.components}")

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 3 K."""
        return 3 * self.components

    def _read(self, raw: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and log scales (K, ...); `variance` is that of one component."""
        weights, means, log_scales = raw.chunk(3)
        at, scale = grid(self.components, variance)
        at = at.to(raw).reshape(-1, *(1,) * (raw.ndim - 1))
        return weights.log_softmax(0), means + at, log_scales + math.log(scale)


@dataclass(frozen=True)
class MixtureLogisticCDF(_Mixture):
    r"""The distribution function of a mixture of logistic distributions, then a logit.

    .. math:: y = \mathrm{logit} \sum_k \pi_k\, \sigma\left((x - \mu_k) e^{-s_k}\right)

    For every element the network emits K logits of the weights, K means and K log scales. With all
    parameters zero, the means lie at equal distances around 0, the mixture has the variance of one
    logistic variable, and the map is within 0.04 of the identity on [-3, 3]; components that began
    alike would remain alike. All terms are logarithms, so nothing is lost in the tails,
    where the map becomes a line. Flow++ follows it with an affine map:
    ``Composed(MixtureLogisticCDF(32), Affine())``. (Ho, Chen, Srinivas, Duan, Abbeel, "Flow++",
    2019, arXiv:1902.00275.)

    Args:
        components: K.

    Raises:
        ValueError: If `components` is not positive.

    Example:
        >>> x = torch.linspace(-3, 3, 3)[:, None]
        >>> (MixtureLogisticCDF(8).forward(x, torch.zeros(3, 24))[0] - x).abs().max() < 0.04
        tensor(True)
    """

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        log_weights, means, log_scales = self._read(raw, math.pi**2 / 3)
        z = (x - means) * (-log_scales).exp()
        return logit_of_sigmoids(log_weights, z, -log_scales)


@dataclass(frozen=True)
class MixtureGaussianCDF(_Mixture):
    r"""The distribution function of a mixture of Gaussians, then the normal quantile function.

    .. math:: y = \Phi^{-1} \sum_k \pi_k\, \Phi\left((x - \mu_k) e^{-s_k}\right)

    It maps data with that distribution to a standard normal variable. The parameters are those of
    `MixtureLogisticCDF`; with all of them zero the map is within 0.02 of the identity on [-3, 3].
    It is computed in float64, from logarithms of the smaller of the masses below and above x.
    (Meng, Song, Song, Ermon, "Gaussianization Flows", 2020, arXiv:2003.01941, with a Gaussian
    kernel.)

    Args:
        components: K.

    Raises:
        ValueError: If `components` is not positive.

    Example:
        >>> x = torch.randn(1000, 2) ** 3
        >>> map = MixtureGaussianCDF(16)
        >>> y, _ = map.forward(x, map.fitted(x).expand(1000, -1))
        >>> bool((y.std(0) - 1).abs().max() < 0.1)
        True
    """

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        dtype, x, raw = x.dtype, x.double(), raw.double()
        log_weights, means, log_scales = self._read(raw, 1.0)
        z = (x - means) * (-log_scales).exp()
        sides = [log_weights + torch.special.log_ndtr(side) for side in (z, -z)]
        below, above = (side.logsumexp(0) for side in sides)
        upper = below > above
        z, parts, mass = (
            torch.where(upper, a, b) for a, b in ((-z, z), (sides[1], sides[0]), (above, below))
        )
        y = _quantile(mass)
        slopes = parts.log_softmax(0) + _log_hazard(z) - log_scales
        log_slope = slopes.logsumexp(0) - _log_hazard(y)
        return torch.where(upper, -y, y).to(dtype), log_slope.to(dtype)

    def fitted(self, x: Tensor) -> Tensor:
        """Parameters (3 K C,) with which data x (N, C) become about normal, from quantiles."""
        k = self.components
        levels = torch.linspace(0.5 / k, 1 - 0.5 / k, k, dtype=torch.float64, device=x.device)
        ends = torch.arange(k + 1, dtype=torch.float64, device=x.device) / k
        ends = ends.clamp(0.1 / k, 1 - 0.1 / k)
        means, ends = (torch.quantile(x.double(), q, 0) for q in (levels, ends))
        least = 1e-3 * x.double().std(0) + 1e-12
        log_scales = torch.maximum(1.5 * ends.diff(dim=0), least).log()  # components overlap
        at, scale = grid(k, 1.0)
        shifted = means - at.to(means)[:, None], log_scales - math.log(scale)
        return torch.cat([torch.zeros_like(means), *shifted]).flatten().to(x.dtype)


def grid(components: int, variance: float) -> tuple[Tensor, float]:
    """Means at equal distances, and the scale of components, of a given variance at scale 1.

    The means lie within half a standard deviation; the mixture has the given variance.
    """
    at = [i / (components - 1) - 0.5 for i in range(components)] if components > 1 else [0.0]
    scale = math.sqrt(1 - sum(a * a for a in at) / components)
    return torch.tensor(at, dtype=torch.float64) * math.sqrt(variance), scale


def logit_of_sigmoids(log_weights: Tensor, z: Tensor, log_slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``(y, log dy/dx)`` of logit(sum of weights · sigmoid(z)), from z and log dz/dx (K, ...)."""
    low, high = F.logsigmoid(z), F.logsigmoid(-z)
    below, above = log_weights + low, log_weights + high
    y = below.logsumexp(0) - above.logsumexp(0)
    terms = torch.cat([below.log_softmax(0) + high, above.log_softmax(0) + low])
    return y, (terms + log_slopes.repeat(2, *(1,) * (z.ndim - 1))).logsumexp(0)


def _log_hazard(z: Tensor) -> Tensor:
    """Log of the normal density over the mass below, log φ(z) - log Φ(z)."""
    low, high = z.clamp(max=0), z.clamp(min=0)
    far = math.log(2 / math.pi) / 2 - torch.special.erfcx(-low / math.sqrt(2)).log()
    near = -high.square() / 2 - math.log(2 * math.pi) / 2 - torch.special.log_ndtr(high)
    return torch.where(z < 0, far, near)


def _quantile(log_p: Tensor) -> Tensor:
    """`normal_quantile`, with derivatives up to the third."""
    y = normal_quantile(log_p.detach())
    for _ in range(2):
        step = (log_p - torch.special.log_ndtr(y)) * (-_log_hazard(y)).exp()
        y = y + (step - step.detach())
    return y
