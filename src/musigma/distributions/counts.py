"""Distributions of counts 0, 1, 2, ... without a largest one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gamma, constraints

from musigma.context import conditioned
from musigma.distributions.likelihood import register_likelihood
from musigma.gaussian import EventDistribution, Shape
from musigma.tensors import at_least_float32, per_example

__all__ = [
    "CountHead",
    "Counts",
    "FactorizedNegativeBinomial",
    "FactorizedPoisson",
    "ZeroInflated",
    "are_counted",
]

LARGEST = 20.0
"""Bound of the absolute value of log means and log inverse dispersions."""


class Counts(EventDistribution):
    r"""Independent counts, one for each element, with parameters in float64 where possible.

    A subclass implements `log_mass` and `draw`, element by element, and has `mean` and `mode`.
    Values that are no counts have mass zero. A draw at temperature t is the integer nearest to
    :math:`m + t (x - m)`, with m the mode and x an ordinary draw.

    Args:
        like: A parameter, shape (\*batch, \*event).
        event_ndims: Number of dimensions of an event; None: all but the first.
    """

    element = constraints.nonnegative_integer

    def __init__(self, like: Tensor, event_ndims: int | None = None):
        self.dtype = at_least_float32(like).dtype
        batch_ndims = 1 if event_ndims is None else like.ndim - event_ndims
        super().__init__(like.shape[:batch_ndims], like.shape[batch_ndims:])

    @abstractmethod
    def log_mass(self, value: Tensor) -> Tensor:
        """Log mass of each element, for counts."""

    @abstractmethod
    def draw(self, shape: Shape) -> Tensor:
        """Draw elements, of shape (*shape, B, *event)."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        count = (value >= 0) & (value == value.floor())
        mass = self.log_mass(wide(torch.where(count, value, 0)))
        return self._sum(torch.where(count, mass, -torch.inf)).to(self.dtype)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw counts."""
        with torch.no_grad():
            drawn = self.draw(sample_shape).to(self.dtype)
            if not isinstance(temperature, Tensor) and temperature == 1.0:
                return drawn
            t = per_example(temperature, drawn)
            return (self.mode + t * (drawn - self.mode)).round()  # pyright: ignore


def wide(t: Tensor) -> Tensor:
    """A tensor in float64, or in float32 where the device has nothing better."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


class FactorizedPoisson(Counts):
    r"""Independent Poisson variables: :math:`\log p(x) = \sum_i x_i \log m_i - m_i - \log x_i!`.

    Args:
        log_mean: log m, shape (B, \*event).

    Example:
        >>> FactorizedPoisson(torch.zeros(1, 2)).log_prob(torch.tensor([[0.0, 3.0]]))
        tensor([-3.7918])
    """

    def __init__(self, log_mean: Tensor):
        super().__init__(log_mean)
        self.log_mean = wide(log_mean).clamp(-LARGEST, LARGEST)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.log_mean.exp().to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The largest of the most probable counts."""
        return self.mean.floor()

    def log_mass(self, value: Tensor) -> Tensor:
        """Log mass of each element."""
        return value * self.log_mean - self.log_mean.exp() - torch.lgamma(value + 1)

    def draw(self, shape: Shape) -> Tensor:
        """Draw elements."""
        return torch.poisson(self.log_mean.exp().expand(*shape, *self.log_mean.shape))


class FactorizedNegativeBinomial(Counts):
    r"""Independent negative binomials: Poisson variables whose rates are Gamma variables.

    .. math:: p(x) = \frac{\Gamma(x + \theta)}{\Gamma(\theta) x!}
        \left(\frac{\theta}{\theta + m}\right)^\theta \left(\frac{m}{\theta + m}\right)^x

    with mean m and variance m + m² / θ; θ is the inverse dispersion.

    Args:
        log_mean: log m, shape (B, \*event).
        log_inverse_dispersion: log θ, broadcast against it.
        event_ndims: Number of dimensions of an event; None: all but the first.

    Example:
        >>> dist = FactorizedNegativeBinomial(torch.zeros(1, 2), torch.zeros(1, 2))
        >>> dist.log_prob(torch.tensor([[0.0, 2.0]]))  # a half, and an eighth
        tensor([-2.7726])
    """

    def __init__(
        self, log_mean: Tensor, log_inverse_dispersion: Tensor, event_ndims: int | None = None
    ):
        super().__init__(log_mean, event_ndims)
        self.log_mean = wide(log_mean).clamp(-LARGEST, LARGEST)
        theta = wide(log_inverse_dispersion).clamp(-LARGEST, LARGEST)
        self.log_theta = theta.expand_as(self.log_mean)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.log_mean.exp().to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The largest of the most probable counts."""
        mode = self.log_mean.exp() * (1 - (-self.log_theta).exp())
        return mode.clamp(min=0).floor().to(self.dtype)

    def log_mass(self, value: Tensor) -> Tensor:
        """Log mass of each element."""
        theta, ratio = self.log_theta.exp(), self.log_mean - self.log_theta
        choose = torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        return choose - theta * F.softplus(ratio) - value * F.softplus(-ratio)

    def draw(self, shape: Shape) -> Tensor:
        """Draw elements."""
        theta = self.log_theta.exp().expand(*shape, *self.log_mean.shape)
        rate = Gamma(theta, (self.log_theta - self.log_mean).exp(), validate_args=False).sample()
        return torch.poisson(rate)


class ZeroInflated(Counts):
    r"""Counts that are 0 with an additional probability: :math:`\pi \delta_0 + (1 - \pi) p`.

    Args:
        counts: p.
        logits: log π / (1 - π), of its shape.

    Example:
        >>> dist = ZeroInflated(FactorizedPoisson(torch.zeros(1, 1)), torch.zeros(1, 1))
        >>> dist.log_prob(torch.zeros(1, 1)).exp()  # 0.5 + 0.5 / e
        tensor([0.6839])
    """

    def __init__(self, counts: Counts, logits: Tensor):
        super().__init__(logits)
        self.counts, self.logits = counts, wide(logits)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return (-self.logits).sigmoid().to(self.dtype) * self.counts.mean

    @property
    def mode(self) -> Tensor:
        """The most probable count."""
        other = wide(self.counts.mode)
        zero = self.log_mass(torch.zeros_like(other)) >= self.log_mass(other)
        return torch.where(zero, 0, other).to(self.dtype)

    def log_mass(self, value: Tensor) -> Tensor:
        """Log mass of each element."""
        counted = F.logsigmoid(-self.logits) + self.counts.log_mass(value)
        return torch.where(
            value == 0, torch.logaddexp(F.logsigmoid(self.logits), counted), counted
        )

    def draw(self, shape: Shape) -> Tensor:
        """Draw elements."""
        kept = torch.bernoulli((-self.logits).sigmoid().expand(*shape, *self.logits.shape))
        return kept * self.counts.draw(shape)


class CountHead(nn.Module):
    r"""A likelihood of counts.

    Without an exposure the network emits log means h. With an exposure l (B, 1), the mean of
    element i is :math:`l \cdot softmax(h)_i`, a share of l (Lopez et al., "Deep generative
    modeling for single-cell transcriptomics", 2018, doi:10.1038/s41592-018-0229-2).

    Args:
        shape: The event shape.
        net: Builds a network with a given number of output channels.
        counts: A function of log means, and of log inverse dispersions unless `dispersion` is
            None, to `Counts`.
        dispersion: `feature`: one inverse dispersion for each element, a parameter; `emitted`: by
            the network, for each element of each example; None: the counts have none.
        inflated: Whether the counts are `ZeroInflated`, with logits that the network emits.

    Raises:
        ValueError: For another dispersion.
    """

    def __init__(
        self,
        shape: Shape,
        net: Callable[[int], nn.Module],
        counts: Callable[..., Counts],
        *,
        dispersion: str | None = None,
        inflated: bool = False,
    ):
        super().__init__()
        if dispersion not in (None, "feature", "emitted"):
            raise ValueError(f"dispersion: expected 'feature' or 'emitted'; got {dispersion!r}")
        self.counts, self.emitted, self.inflated = counts, dispersion == "emitted", inflated
        self.parts = 1 + self.emitted + inflated
        self.net = net(self.parts * shape[0])
        own = dispersion == "feature"
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(*shape)) if own else None

    def forward(
        self, given: Tensor, context: Tensor | None = None, exposure: Tensor | None = None
    ) -> Counts:
        """The distribution."""
        log_mean, *rest = self._parts(conditioned(self.net, given, context))
        if exposure is not None:
            log_mean = log_mean.log_softmax(1) + exposure.clamp(min=1).log()
        dispersion = [rest.pop(0)] if self.emitted else []
        if self.log_inverse_dispersion is not None:
            dispersion = [self.log_inverse_dispersion.expand_as(log_mean)]
        counts = self.counts(log_mean, *dispersion)
        return ZeroInflated(counts, rest[0]) if self.inflated else counts

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and the share of its log means and dispersions at their bound."""
        scales = 1 + self.emitted
        yield (
            self.net,
            lambda h: (torch.stack(self._parts(h)[:scales]).abs() > LARGEST).float().mean(),
        )

    def _parts(self, h: Tensor) -> list[Tensor]:
        return list(at_least_float32(h).chunk(self.parts, 1))


def are_counted(model: nn.Module) -> bool:
    """Whether the data of a model are counts, by its likelihood."""
    return any(isinstance(module, CountHead) for module in model.modules())


@register_likelihood("poisson", data="counts")
def poisson(shape: Shape, net: Callable[[int], nn.Module]) -> nn.Module:
    """A `FactorizedPoisson`."""
    return CountHead(shape, net, FactorizedPoisson)


@register_likelihood("nb", data="counts")
def negative_binomial(
    shape: Shape, net: Callable[[int], nn.Module], dispersion: str = "feature", **options: Any
) -> nn.Module:
    """A `FactorizedNegativeBinomial`, with the inverse dispersion that `dispersion` selects."""
    return CountHead(shape, net, FactorizedNegativeBinomial, dispersion=dispersion, **options)


@register_likelihood("zinb", data="counts")
def zero_inflated_negative_binomial(
    shape: Shape, net: Callable[[int], nn.Module], dispersion: str = "feature"
) -> nn.Module:
    """A `ZeroInflated` negative binomial."""
    return negative_binomial(shape, net, dispersion, inflated=True)
