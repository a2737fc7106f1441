"""Binary levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.tensors import at_least_float32, per_example

__all__ = ["FactorizedBernoulli"]


class FactorizedBernoulli(EventDistribution):
    r"""Independent levels 0 and 1: :math:`\log p(x) = \sum_i x_i l_i - \log(1 + e^{l_i})`.

    Args:
        logits: l, shape (B, \*event).

    Example:
        >>> FactorizedBernoulli(torch.zeros(2, 3)).log_prob(torch.ones(2, 3))
        tensor([-2.0794, -2.0794])
    """

    element = constraints.boolean

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)
        super().__init__(logits.shape[:1], logits.shape[1:])

    @property
    def mean(self) -> Tensor:
        """The probability of a one."""
        return self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        """The more probable level."""
        return (self.logits > 0).to(self.logits)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; the logits are divided by `temperature`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        t = per_example(temperature, logits)
        return torch.bernoulli((logits / (t + 1e-30)).sigmoid())  # 1e-30: no division by zero

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        value = value.to(self.logits).expand_as(self.logits)
        terms = F.binary_cross_entropy_with_logits(self.logits, value, reduction="none")
        return -self._sum(terms)


@register_likelihood("bernoulli", data="levels")
def bernoulli(shape: Sequence[int], net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """A `FactorizedBernoulli`.

    Raises:
        ValueError: For data with more than two levels.
    """
    if levels != 2:
        raise ValueError(
            f"likelihood: a Bernoulli is for data with 2 levels; these have {levels}; binarize "
            "them, or use 'logistic-mixture', or 'continuous-bernoulli' for gray values in [0, 1]"
        )
    return LikelihoodHead(net(shape[0]), FactorizedBernoulli)
