r"""Normal distributions wrapped around hyperbolic space.

Points are those of R^(n+1) with x_0 > 0 on the hyperboloid -x_0² + x_1² + .. + x_n² = -1, and
densities are with respect to its volume; (x_1 .. x_n) / (1 + x_0) is the same point in the
Poincaré ball. All is computed in float64, since coordinates grow exponentially with distance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from musigma.distributions.latents import POSTERIORS, PosteriorHead
from musigma.gaussian import DiagonalGaussian, EventDistribution, Format, Shape

__all__ = ["HyperbolicNormal", "StandardHyperbolic", "poincare"]


def poincare(x: Tensor) -> Tensor:
    """Points of the hyperboloid (..., n+1) as points of the Poincaré ball (..., n)."""
    return x[..., 1:] / (1 + x[..., :1])


def _norm(u: Tensor) -> Tensor:
    """The length of tangents, in the Lorentzian form."""
    square = u[..., 1:].square().sum(-1, keepdim=True) - u[..., :1].square()
    return square.clamp(min=1e-30).sqrt()


class HyperbolicNormal(EventDistribution):
    r"""A Gaussian of tangents at the origin, transported to a point and wrapped around the space.

    .. math:: x = \exp_\mu(\mathrm{PT}_{o \to \mu}(v)), \quad v \sim N(0, \sigma^2), \quad
        \log p(x) = \log N(v; 0, \sigma^2) - (n-1) \log\frac{\sinh |v|}{|v|}

    with the parallel transport PT from the origin o = (1, 0 .. 0), and the exponential map of the
    hyperboloid. v / σ is the whitened value. (Nagano et al., "A Wrapped Normal Distribution on
    Hyperbolic Space for Gradient-Based Learning", 2019, arXiv:1902.02992. In the Poincaré ball it
    is the wrapped normal of Mathieu et al., "Continuous Hierarchical Representations with Poincaré
    Variational Auto-Encoders", 2019, arXiv:1901.06033.)

    Args:
        location: log_o(μ), the mean as a tangent of the origin, shape (\*batch, n).
        log_std: log σ, of the same shape.

    Example:
        >>> p = HyperbolicNormal(torch.zeros(2), torch.zeros(2))
        >>> p.center
        tensor([1., 0., 0.])
    """

    has_rsample = True

    def __init__(self, location: Tensor, log_std: Tensor):
        self.noise = DiagonalGaussian(torch.zeros_like(location), log_std, 1)
        location = location.double()
        r = location.norm(dim=-1, keepdim=True).clamp(min=1e-15)
        self.at = torch.cat([r.cosh(), r.sinh() / r * location], -1)
        super().__init__(location.shape[:-1], self.at.shape[-1:])

    @property
    def center(self) -> Tensor:
        """The point μ."""
        return self.at.to(self.noise.mean)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw differentiably; the tangent is multiplied by `temperature`."""
        return self._point(self.noise.rsample(sample_shape, temperature=temperature))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to volume, in nats, of the batch shape."""
        v = self._tangent(value)
        r = v.norm(dim=-1).clamp(min=1e-15)
        log_volume = r + torch.log(-torch.expm1(-2 * r) / (2 * r))  # log sinh(r) / r
        return self.noise.log_prob(v.to(self.noise.mean)) - (
            (self.event_shape[0] - 2) * log_volume
        ).to(self.noise.mean)

    def whiten(self, value: Tensor) -> Tensor:
        """v / σ of a point."""
        return self.noise.whiten(self._tangent(value).to(self.noise.mean))

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return self._point(self.noise.unwhiten(noise))

    def _point(self, v: Tensor) -> Tensor:
        """exp_μ(PT(v)), with PT(v) = v + <μ, v> / (1 + μ_0) · (o + μ)."""
        at, v = self.at, v.double()
        along = (at[..., 1:] * v).sum(-1, keepdim=True) / (1 + at[..., :1])
        u = torch.cat([along * (1 + at[..., :1]), v + along * at[..., 1:]], -1)
        r = _norm(u)
        return (r.cosh() * at + r.sinh() / r * u).to(self.noise.mean)

    def _tangent(self, value: Tensor) -> Tensor:
        """The inverse of `_point`; the first coordinate of a value follows from the others."""
        rest, at = value[..., 1:].double(), self.at
        x = torch.cat([(1 + rest.square().sum(-1, keepdim=True)).sqrt(), rest], -1)
        r = 2 * (0.5 * _norm(x - at)).asinh()
        u = r / r.sinh() * (x - r.cosh() * at)
        return u[..., 1:] - u[..., :1] / (1 + at[..., :1]) * at[..., 1:]


class StandardHyperbolic(nn.Module):
    """The head of the prior with μ = o and σ = 1.

    Args:
        n: The dimension of the space.
    """

    zeros: Tensor

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(n), persistent=False)

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> HyperbolicNormal:
        """The distribution, of batch shape ()."""
        return HyperbolicNormal(self.zeros, self.zeros)


@POSTERIORS.register
def hyperbolic(size: int, net: Callable[[int], nn.Module], format: Format) -> PosteriorHead:
    """`HyperbolicNormal`, with the prior at the origin; the decoder reads points in R^(size + 1).

    `format` reads the tangent of the mean, and the standard deviations.
    """

    def read(h: Tensor) -> HyperbolicNormal:
        return HyperbolicNormal(*format.split(h))

    prior = partial(StandardHyperbolic, size)
    return PosteriorHead(
        net(2 * size), read, event=(size + 1,), prior=prior, saturation=format.saturation
    )
