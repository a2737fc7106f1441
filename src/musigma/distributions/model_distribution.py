"""An exact model as a `torch.distributions.Distribution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musigma import context as contexts
from musigma.context import Context
from musigma.gaussian import EventDistribution, Shape

__all__ = ["ModelDistribution"]


class ModelDistribution(EventDistribution):
    """An exact model as a distribution, with batch shape (), or (B,) for a context of B rows.

    Args:
        model: The model.
        context: One row for each distribution of the batch, or None.
    """

    def __init__(self, model: Any, context: Context):
        self.model, self.context = model, context
        rows = contexts.length(context)
        if model.spec is not None:
            event = model.spec.shape
        else:
            with torch.random.fork_rng():
                event = model.sample(rows or 1, context).shape[1:]
        batch = () if rows is None else (rows,)
        super().__init__(batch, event)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats: ``value.shape`` without the event dimensions, broadcast."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        batch = torch.broadcast_shapes(batch, self.batch_shape)
        flat = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        return self.model.log_prob(flat, self._contexts(batch)).reshape(batch)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw, without a gradient; every standard deviation is multiplied by `temperature`."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.repeat_interleave(shape[1:].numel())
        context = self._contexts(shape)
        drawn = self.model.sample(shape.numel(), context, temperature=temperature)
        return drawn.reshape(*shape, *self.event_shape)

    def _contexts(self, batch: torch.Size) -> Context:
        """One row of context for each of a batch of values."""
        return contexts.apply(
            lambda t: t.expand(*batch, *t.shape[1:]).flatten(0, len(batch) - 1), self.context
        )
