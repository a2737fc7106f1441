"""Distributions of integers without bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from musigma.distributions.levels import log_between
from musigma.gaussian import EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example

__all__ = ["IntegerLogisticMixture", "IntegerRead"]


class _Integers(constraints.Constraint):
    """All integers."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return value == value.round()


class IntegerLogisticMixture(EventDistribution):
    r"""Independent integers; each is a mixture of K logistics, integrated over cells of width 1.

    .. math:: P(n) = \sum_k \pi_k \left[\sigma\left(\frac{n + 1/2 - m_k}{s_k}\right)
        - \sigma\left(\frac{n - 1/2 - m_k}{s_k}\right)\right], \quad n = \dots, -1, 0, 1, \dots

    `DiscretizedLogisticMixture` is for levels 0 .. levels - 1, whose outer bins take the tails.
    (Hoogeboom et al., "Integer Discrete Flows and Lossless Compression", 2019, arXiv:1905.07376.)

    Args:
        logits: log π up to a constant, shape (\*batch, K, \*event).
        mean: m, of the same shape.
        log_scale: log s, of the same shape.
        event_ndims: Number of trailing dimensions that form one event.

    Example:
        >>> zeros = torch.zeros(2, 1, 3)
        >>> dist = IntegerLogisticMixture(zeros, zeros, zeros, event_ndims=1)
        >>> dist.log_prob(torch.zeros(2, 3)) / 3  # log(2 sigmoid(1/2) - 1)
        tensor([-1.4068, -1.4068])
    """

    element = _Integers()

    def __init__(self, logits: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int):
        self.axis = -1 - event_ndims
        self.log_weights = at_least_float32(logits).log_softmax(self.axis)
        self.means, self.log_scale = at_least_float32(mean), at_least_float32(log_scale)
        at = mean.ndim + self.axis
        super().__init__(mean.shape[:at], mean.shape[at + 1 :])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, of the batch shape."""
        centered = at_least_float32(value).unsqueeze(self.axis) - self.means
        width = (-self.log_scale).exp()
        mass = log_between((centered - 0.5) * width, (centered + 0.5) * width, width)
        return self._sum(torch.logsumexp(mass + self.log_weights, self.axis))

    @property
    def mode(self) -> Tensor:
        """The integer next to the mean of the heaviest component."""
        return self._chosen(self.log_weights, self.means).round()

    @torch.no_grad()
    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw integers; `temperature` divides component logits, and multiplies scales."""
        wide = self.log_weights.expand(*sample_shape, *self.log_weights.shape)
        t = per_example(temperature, wide)
        scores = wide + t * gumbel_like(wide)
        uniform = torch.rand_like(wide).clamp(1e-7, 1 - 1e-7)
        return self._chosen(
            scores, self.means + t * self.log_scale.exp() * uniform.logit()
        ).round()

    def _chosen(self, scores: Tensor, values: Tensor) -> Tensor:
        """The value of the component with the highest score."""
        best = scores.argmax(self.axis, keepdim=True)
        return values.expand_as(scores).gather(self.axis, best).squeeze(self.axis)

    def expand(self, batch_shape: Shape, _instance=None) -> IntegerLogisticMixture:
        """The same distribution with another batch shape."""
        shape = (*batch_shape, *self.means.shape[len(self.batch_shape) :])
        parts = (t.expand(shape) for t in (self.log_weights, self.means, self.log_scale))
        return IntegerLogisticMixture(*parts, event_ndims=len(self.event_shape))


FORMAT = Format(bounds=(-9.0, 5.0), offset=-2.0)
"""How log scales are read, in coordinates where the levels run from -1 to 1."""


@dataclass(frozen=True)
class IntegerRead:
    """Reads K logits, K means and K raw scales for each channel as an `IntegerLogisticMixture`.

    Means and scales are in coordinates where the levels 0 .. levels - 1 of the data run from -1 to
    1. Where the network emits zeros, the means are evenly spread over these levels.

    Args:
        levels: Number of levels of the data.
        components: K.
        event_ndims: 1 for vectors, 3 for images.

    Example:
        >>> read = IntegerRead(levels=256, components=2, event_ndims=1)
        >>> read(torch.zeros(5, 3 * read.outputs)).means[0, :, 0]
        tensor([ 63.7500, 191.2500])
    """

    levels: int
    components: int
    event_ndims: int

    @property
    def outputs(self) -> int:
        """Channels that the network emits for each channel."""
        return 3 * self.components

    def __call__(self, h: Tensor) -> IntegerLogisticMixture:
        """The distribution, for h of shape (*batch, outputs · C, ...)."""
        logits, mean, raw = self._parts(h)
        half = (self.levels - 1) / 2
        start = (2 * torch.arange(self.components, device=h.device) + 1) / self.components
        start = start.to(h).reshape(-1, *(1,) * self.event_ndims)
        log_scale = FORMAT.log_std(at_least_float32(raw)) + math.log(half)
        return IntegerLogisticMixture(logits, half * (mean + start), log_scale, self.event_ndims)

    def saturation(self, h: Tensor) -> Tensor:
        """The share of scales at a limit."""
        raw = self._parts(h)[2]
        return FORMAT.saturation(torch.stack([torch.zeros_like(raw), raw], 1).flatten(1, 2))

    def _parts(self, h: Tensor) -> Sequence[Tensor]:
        parts = h.unflatten(-self.event_ndims, (3, self.components, -1))
        return parts.unbind(-2 - self.event_ndims)
