"""Categorical levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.base import EventDistribution
from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.tensors import at_least_float32, per_example

__all__ = ["FactorizedCategorical"]


class FactorizedCategorical(EventDistribution):
    r"""Independent levels, each with its own probabilities.

    Args:
        logits: Shape (B, levels, \*event).

    Example:
        >>> dist = FactorizedCategorical(torch.zeros(2, 256, 1, 4, 4))
        >>> dist.log_prob(torch.zeros(2, 1, 4, 4)) / -16
        tensor([5.5452, 5.5452])
    """

    element = constraints.nonnegative_integer

    def __init__(self, logits: Tensor):
        self.log_probs = at_least_float32(logits).log_softmax(1)
        super().__init__(logits.shape[:1], logits.shape[2:])

    @classmethod
    def from_channels(cls, h: Tensor, levels: int) -> FactorizedCategorical:
        """Read h (B, levels · C, ...): channel l C + c is the logit of level l of channel c."""
        return cls(h.unflatten(1, (levels, -1)))

    @property
    def mean(self) -> Tensor:
        """The mean level."""
        levels = torch.arange(self.log_probs.shape[1], device=self.log_probs.device)
        levels = levels.to(self.log_probs)
        return torch.einsum("bl...,l->b...", self.log_probs.exp(), levels)

    @property
    def mode(self) -> Tensor:
        """The most probable level."""
        return self.log_probs.argmax(1).to(self.log_probs)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; the logits are divided by `temperature`."""
        wide = self.log_probs.expand(*sample_shape, *self.log_probs.shape)
        gumbel = -torch.empty_like(wide).exponential_().log()
        scores = wide + per_example(temperature, wide) * gumbel
        return scores.argmax(-1 - len(self.event_shape)).to(self.log_probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        index = value.long().unsqueeze(1)
        return self._sum(self.log_probs.gather(1, index).squeeze(1))


@register_likelihood("categorical", data="levels")
def categorical(shape: Sequence[int], net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """A `FactorizedCategorical`."""
    return LikelihoodHead(
        net(shape[0] * levels), FactorizedCategorical.from_channels, levels=levels
    )
