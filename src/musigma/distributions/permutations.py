"""Distributions of permutations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from musigma.gaussian import EventDistribution, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example

__all__ = ["PlackettLuce"]


class PlackettLuce(EventDistribution):
    r"""A permutation by draws without replacement, with weights exp(l).

    .. math:: \log P(\pi) = \sum_i l_{\pi_i} - \log \sum_{j \ge i} e^{l_{\pi_j}}

    (Plackett, "The Analysis of Permutations", 1975; Luce, "Individual Choice Behavior", 1959.) If
    all weights are equal, all N! permutations are equally likely.

    Args:
        logits: l, shape (B, N).

    Example:
        >>> PlackettLuce(torch.zeros(1, 3)).log_prob(torch.tensor([[2.0, 0.0, 1.0]]))  # -log 6
        tensor([-1.7918])
    """

    element = constraints.nonnegative_integer

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)
        super().__init__(logits.shape[:-1], logits.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,), of positions in the order of the draws."""
        wide, index = torch.broadcast_tensors(self.logits, value.long())
        drawn = wide.gather(-1, index)
        left = drawn.flip(-1).logcumsumexp(-1).flip(-1)
        return (drawn - left).sum(-1)

    @property
    def mode(self) -> Tensor:
        """The heaviest position first; of equal ones the first."""
        return self._sorted(self.logits)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw permutations; the logits are divided by `temperature`."""
        wide = self.logits.expand(*sample_shape, *self.logits.shape)
        return self._sorted(wide + per_example(temperature, wide) * gumbel_like(wide))

    @staticmethod
    def _sorted(scores: Tensor) -> Tensor:
        return scores.argsort(dim=-1, descending=True, stable=True).to(scores)
