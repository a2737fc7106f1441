"""The running average of the weights, which is what a run evaluates and saves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from musigma.model import Model
from musigma.training.distributed import gather_shards, local_shard, shard_like

__all__ = ["WeightAverage"]


class WeightAverage:
    """An exponential moving average of a model's weights, in a model of its own.

    Where weights are sharded, each process averages its shards, and `assemble` gathers them.

    Args:
        model: The model, not yet sharded.
        decay: Decay per step; 0: the average is the last value.

    Attributes:
        model: The averaged model, in evaluation mode. Up to date after `assemble`.
    """

    def __init__(self, model: Model, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def follow(self, model: Model, *, sharded: bool) -> None:
        """Average the weights of this model from now on."""
        self.weights: list[Tensor] = list(model.parameters())
        self.buffers, self.sharded = list(model.buffers()), sharded
        self.reset()

    def reset(self) -> None:
        """Continue from the weights in `model`, which were replaced."""
        self.means: list[Tensor] = list(self.model.parameters())
        if self.sharded:
            pairs = zip(self.means, self.weights, strict=True)
            self.means = [local_shard(shard_like(mean, like)).clone() for mean, like in pairs]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after a step; the decay is smaller in early steps."""
        if self.decay:
            self._update(min(self.decay, (1 + step) / (10 + step)))

    def _update(self, decay: float) -> None:
        values = [local_shard(p) for p in self.weights]
        torch._foreach_lerp_(self.means, values, 1 - decay)  # pyright: ignore
        for mean, value in zip(self.model.buffers(), self.buffers, strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def assemble(self) -> None:
        """Bring `model` up to date."""
        if not self.decay:
            self._update(0.0)
        if self.sharded:
            trio = zip(self.model.parameters(), self.means, self.weights, strict=True)
            for mean, shard, like in trio:
                mean.copy_(gather_shards(shard, like))
