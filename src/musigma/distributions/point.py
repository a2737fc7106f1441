"""A certain value, as the posterior of a latent that is a function of the data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from musigma.gaussian import EventDistribution, Shape

__all__ = ["PointMass"]


class PointMass(EventDistribution):
    r"""All mass at one value: log p is 0 there, and -inf elsewhere.

    It is the posterior of a discrete latent z = f(x). Then log w = log p(x | z) + log p(z) is an
    exact lower bound of log p(x), because p(x) is a sum over z.

    Args:
        value: Whole numbers, shape (B, \*event).

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


@register_kl(PointMass, Distribution)
def point_mass_kl(q: PointMass, p: Distribution) -> Tensor:
    """KL(q || p) = -log p(value), in nats, for discrete p."""
    return -p.log_prob(q.value)
