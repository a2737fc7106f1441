"""A certain value, as the posterior of a latent that is a function of the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, register_kl

from musigma.context import conditioned
from musigma.distributions.latents import POSTERIORS
from musigma.gaussian import DiagonalGaussian, EventDistribution, Format, Shape
from musigma.tensors import at_least_float32

__all__ = ["DeterministicHead", "PointMass"]


class PointMass(EventDistribution):
    r"""All mass at one value: log p is 0 there, and -inf elsewhere.

    It is the posterior of a discrete latent z = f(x). Then log w = log p(x | z) + log p(z) is an
    exact lower bound of log p(x), because p(x) is a sum over z.

    Of a real vector, there is no such bound: see `DeterministicHead`.

    Args:
        value: Shape (B, \*event).

    Example:
        >>> q = PointMass(torch.tensor([[3.0, 1.0]]))
        >>> q.sample(), q.log_prob(torch.tensor([[3.0, 1.0]]))
        (tensor([[3., 1.]]), tensor([0.]))
    """

    element = constraints.nonnegative_integer
    has_rsample = True

    def __init__(self, value: Tensor):
        self.value = value
        super().__init__(value.shape[:1], value.shape[1:])

    @property
    def mean(self) -> Tensor:
        """The value."""
        return self.value

    @property
    def mode(self) -> Tensor:
        """The value."""
        return self.value

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """The value, whatever the temperature."""
        return self.value.expand(*sample_shape, *self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 where all elements are equal, -inf elsewhere; shape (B,)."""
        different = self._sum((value != self.value).to(self.value))
        return torch.where(different == 0, 0.0, -torch.inf).to(self.value)


class DeterministicHead(nn.Module):
    """A network whose output is z while training, and the mean of N(f(x), noise² I) otherwise.

    A real vector z that is a function of x has a density of x only with noise. In training, the
    KL is -log p(z), a penalty of z: |z|² / 2 and a constant for N(0, I).

    Args:
        net: f, from x, and the context if there is one, to (B, D).
        noise: The standard deviation.

    Raises:
        ValueError: If the noise is not positive.
    """

    def __init__(self, net: nn.Module, noise: float):
        super().__init__()
        if noise <= 0:
            raise ValueError(f"noise: expected a positive number; got {noise}")
        self.net, self.noise = net, noise

    def forward(self, given: Tensor, context: Tensor | None = None) -> Distribution:
        """The distribution of z."""
        mean = at_least_float32(conditioned(self.net, given, context))
        if self.training:
            return PointMass(mean)
        return DiagonalGaussian(mean, torch.full_like(mean, self.noise).log(), 1)

    def emitters(self) -> tuple[()]:
        """None: the scale is fixed."""
        return ()


@POSTERIORS.register
def deterministic(
    size: int, net: Callable[[int], nn.Module], format: Format, *, noise: float = 0.05
) -> nn.Module:
    """A `DeterministicHead`."""
    return DeterministicHead(net(size), noise)


@register_kl(PointMass, Distribution)
def point_mass_kl(q: PointMass, p: Distribution) -> Tensor:
    """KL(q || p) = -log p(value), in nats, for discrete p; for a density, up to a constant."""
    return -p.log_prob(q.value)
