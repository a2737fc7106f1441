"""Distributions of integers without bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.context import conditioned
from musigma.distributions.levels import log1mexp
from musigma.gaussian import EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example

__all__ = ["IntegerLogisticHead", "IntegerLogisticMixture"]


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
        below, above = (centered - 0.5) * width, (centered + 0.5) * width
        mass = F.logsigmoid(above) + F.logsigmoid(-below) + log1mexp(width)
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
"""How log scales are read, in units of the widths of the channels."""


class IntegerLogisticHead(nn.Module):
    """A network that emits K logits, K means and K raw scales of integers for each channel.

    Means and scales are in units of a center and a width of each channel: those of the levels of
    the data, until `calibrate` sets them to the mean and twice the standard deviation of a batch.
    They are buffers. Where the network emits zeros, the means are evenly spread over the width.

    Args:
        net: ``net(given)`` or ``net(given, context)``, which emits (B, outputs · C, ...); or, for
            a prior, numbers without a batch (`Constant`).
        channels: C.
        levels: Number of levels of the data.
        components: K.
        event_ndims: 1 for vectors, 3 for images.

    Attributes:
        outputs: Channels that the network emits for each channel, 3 K.

    Example:
        >>> head = IntegerLogisticHead(nn.Linear(2, 18), 3, components=2, event_ndims=1)
        >>> head.calibrate(torch.tensor([[0.0, 5.0, 7.0], [4.0, 5.0, 9.0]]))
        >>> head.center.flatten(), head.width.flatten()
        (tensor([2., 5., 8.]), tensor([4.0000, 0.5000, 2.0000]))
        >>> head(torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    center: Tensor
    width: Tensor
    calibrated: Tensor

    def __init__(
        self,
        net: nn.Module,
        channels: int,
        *,
        levels: int = 256,
        components: int = 5,
        event_ndims: int = 3,
    ):
        super().__init__()
        self.net, self.components, self.event_ndims = net, components, event_ndims
        half = torch.full((channels, *(1,) * (event_ndims - 1)), (levels - 1) / 2)
        self.register_buffer("center", half)
        self.register_buffer("width", half.clone())
        self.register_buffer("calibrated", torch.tensor(False))

    @property
    def outputs(self) -> int:
        """Channels that the network emits for each channel."""
        return 3 * self.components

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the centers and the widths from a batch of integers; a second call does nothing."""
        if not bool(self.calibrated):
            flat = at_least_float32(x).transpose(0, 1).flatten(1)
            self.center.copy_(flat.mean(1).reshape(self.center.shape))
            self.width.copy_((2 * flat.std(1, correction=0)).clamp(min=0.5).view_as(self.width))
            self.calibrated.fill_(True)

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> IntegerLogisticMixture:
        """The distribution."""
        logits, mean, raw = self._parts(at_least_float32(conditioned(self.net, given, context)))
        start = (2 * torch.arange(self.components, device=mean.device) + 1) / self.components - 1
        start = start.to(mean).reshape(-1, *(1,) * self.event_ndims)
        log_scale = FORMAT.log_std(raw) + self.width.log()
        mean = self.center + self.width * (mean + start)
        return IntegerLogisticMixture(logits, mean, log_scale, self.event_ndims)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        yield self.net, self._saturation

    def _saturation(self, h: Tensor) -> Tensor:
        raw = self._parts(h)[2]
        return FORMAT.saturation(torch.stack([torch.zeros_like(raw), raw], 1).flatten(1, 2))

    def _parts(self, h: Tensor) -> Sequence[Tensor]:
        parts = h.unflatten(-self.event_ndims, (3, self.components, -1))
        return parts.unbind(-2 - self.event_ndims)
