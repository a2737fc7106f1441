r"""Distributions on the unit sphere: von Mises-Fisher and uniform.

Points are unit vectors of R^m, and densities are with respect to the area of the sphere. The
distance of a draw from the center, along the sphere, is multiplied by the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributions import Beta, register_kl

from musigma.distributions.bessel import bessel_ratio, log_bessel
from musigma.distributions.latents import POSTERIORS, PosteriorHead, within
from musigma.gaussian import EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, per_example

__all__ = ["SphereUniform", "UniformOnSphere", "VonMisesFisher"]

NODES, WEIGHTS = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(64))
BOUNDS = (-4.0, 4.0)
"""Bounds of the log standard deviation that sets a concentration."""


def log_area(m: int) -> float:
    """The logarithm of the area of the unit sphere in R^m: log 2 π^(m/2) / Γ(m/2)."""
    return math.log(2) + 0.5 * m * math.log(math.pi) - math.lgamma(0.5 * m)


def _away(center: Tensor, angle: Tensor, temperature: float | Tensor) -> Tensor:
    """Points at an angle, times the temperature, from a center, in random directions."""
    angle = per_example(temperature, angle) * angle
    noise = torch.randn((*angle.shape, center.shape[-1]), dtype=center.dtype, device=center.device)
    tangent = F.normalize(noise - (noise * center).sum(-1, keepdim=True) * center, dim=-1)
    return angle.cos()[..., None] * center + angle.sin()[..., None] * tangent


class VonMisesFisher(EventDistribution):
    r"""The von Mises-Fisher distribution on the unit sphere in R^m.

    .. math:: \log p(x) = \kappa\, \mu^T x + \nu \log\kappa - \tfrac m2 \log 2\pi
        - \log I_\nu(\kappa), \quad \nu = \tfrac m2 - 1

    The angle of a draw from μ is drawn by rejection (Wood, "Simulation of the von Mises Fisher
    distribution", 1994), and its gradient in κ is that of the inverse distribution function
    (Figurnov et al., 2018, arXiv:1805.08498), so it is unbiased, and needs no correction for the
    rejected proposals. The KL divergence to `SphereUniform` is registered with torch. (Davidson
    et al., "Hyperspherical Variational Auto-Encoders", 2018, arXiv:1804.00891.)

    Args:
        direction: μ, unit vectors, shape (\*batch, m).
        concentration: κ > 0, shape (\*batch,).

    Example:
        >>> q = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(2.0))
        >>> q.mean  # coth(2) - 1/2 along the direction
        tensor([0.0000, 0.0000, 0.5373])
    """

    has_rsample = True

    def __init__(self, direction: Tensor, concentration: Tensor):
        self.direction = at_least_float32(direction)
        self.concentration = at_least_float32(concentration)
        super().__init__(direction.shape[:-1], direction.shape[-1:])

    @property
    def order(self) -> float:
        """The order ν = m/2 - 1 of the Bessel function."""
        return 0.5 * self.event_shape[0] - 1

    @property
    def mean(self) -> Tensor:
        """The mean, inside the sphere."""
        length = bessel_ratio(self.concentration, self.order).to(self.direction)
        return length[..., None] * self.direction

    @property
    def mode(self) -> Tensor:
        """The mode, which is the direction."""
        return self.direction

    center = mode

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw differentiably."""
        concentration = self.concentration.double().expand(*sample_shape, *self.batch_shape)
        angle: Any = _Angle.apply(concentration, self.event_shape[0])
        return _away(self.direction, angle.to(self.direction), temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to area, in nats, of the batch shape."""
        m, kappa = self.event_shape[0], self.concentration.double()
        constant = self.order * math.log(2) - 0.5 * m * math.log(2 * math.pi)
        at_mode = kappa - log_bessel(kappa, self.order) + constant
        far = (at_least_float32(value) - self.direction).square().sum(-1)
        return at_mode.to(far) - 0.5 * self.concentration * far

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of the batch shape."""
        return log_area(self.event_shape[0]) - _divergence(self)


class _Angle(Function):
    """A draw of the angle θ from the mean direction, with density ∝ exp(κ cos θ) sin^(m-2) θ."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, m: int) -> Tensor:
        half = 0.5 * (m - 1)
        b = (m - 1) / (2 * kappa + (4 * kappa.square() + (m - 1) ** 2).sqrt())
        below_one = 2 * b / (1 + b)  # 1 - x0, where the envelope touches
        best = -kappa * below_one + (m - 1) * (below_one * (2 - below_one)).log()
        angle, todo = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
        half = torch.tensor(half, dtype=kappa.dtype, device=kappa.device)
        beta = Beta(half, half)
        while todo.any():
            z = beta.sample(kappa.shape)
            gap = 2 * b * z / (1 - (1 - b) * z)  # 1 - cos θ
            log_ratio = (m - 1) * (below_one + (1 - below_one) * gap).log() - kappa * gap - best
            accept = todo & (log_ratio >= torch.rand_like(kappa).log())
            angle = torch.where(accept, 2 * (0.5 * gap).clamp(max=1).sqrt().asin(), angle)
            todo = todo & ~accept
        ctx.save_for_backward(kappa, angle)
        ctx.m = m
        return angle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """dθ/dκ = -∂G/∂κ / p(θ), with the distribution function G by Gauss-Legendre quadrature."""
        (kappa, angle), m = ctx.saved_tensors, ctx.m
        mean = bessel_ratio(kappa, 0.5 * m - 1)
        reach = 14 / (kappa + 0.5 * (m - 2)).clamp(min=1e-3).sqrt()
        beyond = angle.cos() < mean  # integrate over the side on which less of the mass lies
        end = torch.where(beyond, torch.minimum(angle + reach, angle.new_tensor(math.pi)),
                          (angle - reach).clamp(min=0))  # fmt: skip
        half = 0.5 * (angle - end)[..., None]
        t = end[..., None] + half * (1 + NODES.to(half))
        log_ratio = (m - 2) * (t.sin().log() - angle.sin().log()[..., None])
        log_ratio = log_ratio + kappa[..., None] * (t.cos() - angle.cos()[..., None])
        terms = WEIGHTS.to(half) * log_ratio.exp() * (t.cos() - mean[..., None])
        return -grads[0] * (half * terms).sum(-1), None


class SphereUniform(EventDistribution):
    r"""The uniform distribution on the unit sphere in R^m; its center is the first axis.

    Args:
        center: The first axis, shape (\*batch, m), which sets the type and the device.
    """

    has_rsample = True

    def __init__(self, center: Tensor):
        self.center = center
        super().__init__(center.shape[:-1], center.shape[-1:])

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.center)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw points."""
        noise = torch.randn((*sample_shape, *self.center.shape)).to(self.center)
        first, rest = noise[..., 0], noise[..., 1:].norm(dim=-1)
        return _away(self.center, torch.atan2(rest, first), temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the logarithm of the area, in nats, of the batch shape."""
        return torch.full_like(value[..., 0], -log_area(self.event_shape[0]))


class UniformOnSphere(nn.Module):
    """The head of a prior that is uniform on the unit sphere in R^m.

    Args:
        m: The dimension of the space around the sphere.
    """

    axis: Tensor

    def __init__(self, m: int):
        super().__init__()
        self.register_buffer("axis", torch.eye(m)[0], persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> SphereUniform:
        """The distribution, of batch shape ()."""
        return SphereUniform(self.axis)


def _divergence(q: VonMisesFisher) -> Tensor:
    kappa, order = q.concentration.double(), q.order
    nats = kappa * bessel_ratio(kappa, order) - log_bessel(kappa, order) - math.lgamma(order + 1)
    return nats.to(q.concentration)


@register_kl(VonMisesFisher, SphereUniform)
def sphere_kl(q: VonMisesFisher, p: SphereUniform) -> Tensor:
    """KL(q || uniform) in nats: κ A(κ) - log I_ν(κ) (κ/2)^-ν - log Γ(m/2)."""
    return _divergence(q)


@POSTERIORS.register
def von_mises_fisher(size: int, net: Callable[[int], nn.Module], format: Format) -> PosteriorHead:
    """`VonMisesFisher` on a sphere of `size` dimensions, in R^(size + 1); uniform prior.

    The network emits a vector, whose direction is the mean direction, and a scale that `format`
    reads as a standard deviation s, within `BOUNDS`: the concentration is (size + 1) / s², which
    at s = 1 is neither uniform nor a point in any dimension.
    """
    m, format = size + 1, within(format, *BOUNDS)

    def read(h: Tensor) -> VonMisesFisher:
        log_std = format.log_std(format.gain * h[:, m])
        return VonMisesFisher(F.normalize(h[:, :m], dim=-1), m * (-2 * log_std).exp())

    def saturation(h: Tensor) -> Tensor:
        return format.saturation(h[:, m:].expand(-1, 2))

    prior = partial(UniformOnSphere, m)
    return PosteriorHead(net(m + 1), read, event=(m,), prior=prior, saturation=saturation)
