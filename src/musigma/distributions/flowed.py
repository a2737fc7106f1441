"""A flow given features as a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.gaussian import EventDistribution, Shape
from musigma.tensors import at_least_float32
from musigma.trace import Trace

__all__ = ["FlowHead", "Flowed"]


class Flowed(EventDistribution):
    """An exact conditional model, given features, as a distribution that remembers its last draw.

    The density of the last draw is the one that was computed with it, so it takes no inverse. That
    of any other value takes one, and so does the gradient of the density of a draw without one.

    Args:
        model: The model, a `Chain`.
        features: Its context, one row for each distribution: (B, F), or maps (B, F, H, W).
        event: The shape of an event.
    """

    has_rsample = True

    def __init__(self, model: Any, features: Tensor, event: Sequence[int]):
        self.model, self.features = model, features
        self._last: tuple[Tensor | None, Tensor | None] = None, None
        super().__init__((len(features),), event)

    @property
    def center(self) -> Tensor:
        """The image of the center of the base distribution."""
        trace = Trace(generating=True, n=len(self.features), temperature=0.0, scoring=False)
        return self.model.generate(trace, self.features)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw differentiably; `temperature` is that of the base distribution."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.repeat_interleave(shape[1:].numel())
        trace = Trace(generating=True, n=shape.numel(), temperature=temperature)
        z = self.model.generate(trace, self._rows(shape)).reshape(*shape, *self.event_shape)
        self._last = z, trace.evidence(self.model.latents()).elbo.reshape(shape)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        last, log_prob = self._last
        known = log_prob if value is last else None
        if known is not None and (known.requires_grad or not torch.is_grad_enabled()):
            return known
        batch = value.shape[: value.ndim - len(self.event_shape)]
        batch = torch.broadcast_shapes(batch, self.batch_shape)
        flat = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        return self.model.log_prob(flat, self._rows(batch)).reshape(batch)

    def _rows(self, batch: torch.Size) -> Tensor:
        """One row of features for each of a batch of values."""
        event = self.features.shape[1:]
        return self.features.expand(*batch, *event).reshape(-1, *event)


class FlowHead(nn.Module):
    """A network whose output conditions a flow: q(z | x) is the density of the flow given net(x).

    Args:
        net: ``net(x)`` or ``net(x, context)``; emits the features, (B, F), or maps.
        flow: A `Chain` of z given F features, whose draws should be fast.
        event: The shape of z.
    """

    def __init__(self, net: nn.Module, flow: Any, event: Sequence[int]):
        super().__init__()
        self.net, self.flow, self.event = net, flow, tuple(event)

    def forward(self, given: Tensor, context: Tensor | None = None) -> Flowed:
        """q(z | given)."""
        features = at_least_float32(conditioned(self.net, given, context))
        return Flowed(self.flow, features, self.event)

    def emitters(self) -> tuple[()]:
        """None: the network emits features."""
        return ()
