"""Distributions of integer levels 0 .. levels - 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.likelihood import LikelihoodHead, register_likelihood
from musigma.gaussian import EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example, sum_event

__all__ = [
    "DiscretizedLogisticMixture",
    "FactorizedBernoulli",
    "FactorizedBetaBinomial",
    "FactorizedCategorical",
]


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

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw levels; the logits are divided by `temperature`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        t = per_example(temperature, logits)
        # no division by zero, and at temperature 0 equal probabilities give the mode, 0
        return torch.bernoulli(((logits - 1e-20) / (t + 1e-30)).sigmoid())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return self._sum(self.log_prob_of_elements(value))

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        """Log mass of each element in nats, shape (B, *event)."""
        value = value.to(self.logits).expand_as(self.logits)
        return -F.binary_cross_entropy_with_logits(self.logits, value, reduction="none")


@register_likelihood("bernoulli", data="levels")
def bernoulli(shape: Shape, net: Callable[[int], nn.Module], levels: int) -> nn.Module:
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

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw levels; the logits are divided by `temperature`."""
        wide = self.log_probs.expand(*sample_shape, *self.log_probs.shape)
        scores = wide + per_example(temperature, wide) * gumbel_like(wide)
        return scores.argmax(-1 - len(self.event_shape)).to(self.log_probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return self._sum(self.log_prob_of_elements(value))

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        """Log mass of each element in nats, shape (B, *event)."""
        return self.log_probs.gather(1, value.long().unsqueeze(1)).squeeze(1)


@register_likelihood("categorical", data="levels")
def categorical(shape: Shape, net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """A `FactorizedCategorical`."""
    return LikelihoodHead(
        net(shape[0] * levels), FactorizedCategorical.from_channels, levels=levels
    )


class FactorizedBetaBinomial(EventDistribution):
    r"""Independent levels 0 .. n: successes in n trials whose probability has a Beta distribution.

    .. math:: p(x) = \binom{n}{x} \frac{B(x + \alpha, n - x + \beta)}{B(\alpha, \beta)}

    Computed in float64 where the device has it: the terms are far larger than their sum. (As a
    likelihood of pixels: Townsend, Bird, Barber, "Practical lossless compression with latent
    variables using bits back coding", 2019, arXiv:1901.04866.)

    Args:
        log_alpha: Shape (B, \*event).
        log_beta: Of the same shape.
        levels: n + 1.

    Example:
        >>> uniform = FactorizedBetaBinomial(torch.zeros(1, 3), torch.zeros(1, 3), 256)
        >>> uniform.log_prob(torch.tensor([[0.0, 7.0, 255.0]])) / -3
        tensor([5.5452])
    """

    element = constraints.nonnegative_integer

    def __init__(self, log_alpha: Tensor, log_beta: Tensor, levels: int):
        self.dtype = at_least_float32(log_alpha).dtype
        wide = torch.float32 if log_alpha.device.type == "mps" else torch.float64
        self.alpha, self.beta = (t.to(wide).clamp(-20, 20).exp() for t in (log_alpha, log_beta))
        self.n = levels - 1
        super().__init__(log_alpha.shape[:1], log_alpha.shape[1:])

    @classmethod
    def from_channels(cls, h: Tensor, levels: int) -> FactorizedBetaBinomial:
        """Read h (B, 2 C, ...): log α in the first half of the channels, log β in the second."""
        log_alpha, log_beta = h.chunk(2, 1)
        return cls(log_alpha, log_beta, levels)

    @property
    def mean(self) -> Tensor:
        """The mean level, n α / (α + β)."""
        return (self.n * self.alpha / (self.alpha + self.beta)).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The most probable level."""
        return self.sample(temperature=0.0)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw levels; the log masses are divided by `temperature`.

        A draw is the level with the highest log mass plus Gumbel noise, found one by one.
        """
        best = self.alpha.new_full((*sample_shape, *self.alpha.shape), -math.inf)
        level = torch.zeros_like(best)
        t = per_example(temperature, best)
        for candidate in range(self.n + 1):
            score = self._log_mass(torch.full_like(self.alpha, candidate)) + t * gumbel_like(best)
            level = torch.where(score > best, candidate, level)
            best = torch.maximum(score, best)
        return level.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return self._sum(self._log_mass(value.to(self.alpha))).to(self.dtype)

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        """Log mass of each element in nats, shape (B, *event)."""
        return self._log_mass(value.to(self.alpha)).to(self.dtype)

    def _log_mass(self, x: Tensor) -> Tensor:
        a, b, n = self.alpha, self.beta, self.n
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        drawn = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(n + a + b)
        return choose + drawn - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)


@register_likelihood("beta-binomial", data="levels")
def beta_binomial(shape: Shape, net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """A `FactorizedBetaBinomial`."""
    return LikelihoodHead(net(2 * shape[0]), FactorizedBetaBinomial.from_channels, levels=levels)


class DiscretizedLogisticMixture(EventDistribution):
    r"""A mixture of K logistics, integrated over the bin of each level, so masses sum to one.

    .. math:: p(x) = \sum_k \pi_k \prod_c \sigma((x_c + \tfrac12 w - m_{kc}) / s_{kc})
                                      - \sigma((x_c - \tfrac12 w - m_{kc}) / s_{kc})

    for each pixel, in coordinates where the levels run from -1 to 1 and a bin has width w; the
    first and the last bin extend to infinity. The channels of a pixel share the component, and the
    values of earlier channels, times `coefficients`, shift the mean of each (Salimans et al.,
    "PixelCNN++", 2017, arXiv:1701.05517; their threshold for small masses is not needed, since the
    mass is computed as σ(a) σ(-b) (1 - exp(b - a)), which is accurate at any scale).

    Args:
        logits: log π up to a constant, shape (B, K, H, W), or (B, K) for vectors of one element.
        mean: m, shape (B, K, C, H, W).
        log_scale: log s, same shape.
        levels: Number of levels.
        coefficients: Shape (B, K, C (C - 1) / 2, H, W); None: channels are independent given k.
    """

    element = constraints.nonnegative_integer

    def __init__(
        self,
        logits: Tensor,
        mean: Tensor,
        log_scale: Tensor,
        levels: int,
        coefficients: Tensor | None = None,
    ):
        self.log_weights = at_least_float32(logits).log_softmax(1)
        self.means, self.log_scale = at_least_float32(mean), at_least_float32(log_scale)
        self.coefficients = None if coefficients is None else at_least_float32(coefficients)
        self.levels = levels
        super().__init__(mean.shape[:1], mean.shape[2:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return sum_event(self.log_prob_of_elements(value), len(self.event_shape) - 1)

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        """Log mass of each pixel in nats, all channels together, shape (B, H, W)."""
        value = at_least_float32(value).contiguous().unsqueeze(1)
        half = 1 / (self.levels - 1)
        centered = 2 * half * value - 1 - self._shifted(value)
        inverse = (-self.log_scale).exp()
        below, above = (centered - half) * inverse, (centered + half) * inverse
        log_cdf, log_survival = F.logsigmoid(above), F.logsigmoid(-below)
        mass = log_cdf + log_survival + log1mexp(2 * half * inverse)
        mass = torch.where(value <= 0, log_cdf, mass)
        mass = torch.where(value >= self.levels - 1, log_survival, mass)
        return torch.logsumexp(mass.sum(2) + self.log_weights, 1)

    def _shifted(self, value: Tensor) -> Tensor:
        """Component means given the values (B, 1, C, H, W) of earlier channels."""
        if self.coefficients is None:
            return self.means
        x = 2 * value / (self.levels - 1) - 1
        first, *means = self.means.unbind(2)
        parts = self.coefficients.split([*range(1, len(means) + 1)], 2)
        shifts = ((part * x[:, :, : part.shape[2]]).sum(2) for part in parts)
        return torch.stack([first, *map(torch.add, means, shifts)], 2)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw levels; component logits are divided by `temperature`, scales multiplied by it."""
        if sample_shape:
            return torch.stack(
                [self.sample(temperature=temperature) for _ in range(math.prod(sample_shape))]
            ).unflatten(0, tuple(sample_shape))
        gumbel = gumbel_like(self.log_weights)
        t = per_example(temperature, gumbel)
        uniform = torch.rand_like(self.means[:, 0]).clamp(1e-7, 1 - 1e-7)
        return self._draw((self.log_weights + t * gumbel).argmax(1), t, uniform.logit())

    @property
    def mode(self) -> Tensor:
        """The center of the heaviest component, as a level."""
        return self._draw(self.log_weights.argmax(1), 0.0, torch.zeros_like(self.means[:, 0]))

    @property
    def location(self) -> Tensor:
        """The mean of the logistics before they are rounded to levels, as levels, (B, C, H, W).

        It has a gradient, and may lie outside of the levels.
        """
        channels: list[Tensor] = []
        at = 0
        for c in range(self.means.shape[2]):
            m = self.means[:, :, c]
            if self.coefficients is not None:
                for earlier in channels:
                    m = m + self.coefficients[:, :, at] * earlier
                    at += 1
            channels.append(m)
        weights = self.log_weights.exp().unsqueeze(2)
        mean = (weights * torch.stack(channels, 2)).sum(1)
        return (mean + 1) * (self.levels - 1) / 2

    def _draw(self, k: Tensor, temperature: float | Tensor, noise: Tensor) -> Tensor:
        def chosen(t: Tensor) -> Tensor:
            index = k.unsqueeze(1).unsqueeze(1).expand(-1, 1, *t.shape[2:])
            return t.gather(1, index).squeeze(1)

        mean, log_scale = chosen(self.means), chosen(self.log_scale)
        shift = None if self.coefficients is None else chosen(self.coefficients)
        drawn: list[Tensor] = []
        at = 0
        for c in range(mean.shape[1]):
            m = mean[:, c]
            if shift is not None:
                for earlier in drawn:
                    m = m + shift[:, at] * (2 * earlier / (self.levels - 1) - 1)
                    at += 1
            t = temperature.squeeze(1) if isinstance(temperature, Tensor) else temperature
            x = m + t * log_scale[:, c].exp() * noise[:, c]
            level = ((x + 1) * (self.levels - 1) / 2).round().clamp(0, self.levels - 1)
            drawn.append(level)
        return torch.stack(drawn, 1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)), for x > 0."""
    return torch.log(-torch.expm1(-x))


FORMAT = Format(dim=2, bounds=(-7.0, 7.0), offset=-2.0)
"""How the means and log scales of all components are read."""


@dataclass(frozen=True)
class LogisticRead:
    """Reads, for each component in turn, its logit, C means, C raw scales, and coefficients.

    Args:
        channels: C.
        levels: Number of levels.
        components: Number of components.
        coupled: Whether channels of a pixel depend on earlier ones, by coefficients.
    """

    channels: int
    levels: int
    components: int = 1
    coupled: bool = False

    @property
    def outputs(self) -> int:
        """Channels that the network emits."""
        c = self.channels
        return self.components * (1 + 2 * c + (c * (c - 1) // 2 if self.coupled else 0))

    def __call__(self, h: Tensor) -> DiscretizedLogisticMixture:
        """The distribution."""
        logits, scales, coefficients = self._parts(h)
        mean, log_scale = FORMAT.split(scales)
        coefficients = coefficients.tanh() if self.coupled else None
        return DiscretizedLogisticMixture(
            logits[:, :, 0], mean, log_scale, self.levels, coefficients
        )

    def saturation(self, h: Tensor) -> Tensor:
        """The share of scales at a limit."""
        return FORMAT.saturation(self._parts(h)[1])

    def _parts(self, h: Tensor) -> tuple[Tensor, ...]:
        """Logits, means with raw scales, and coefficients, each (B, K, ..., H, W).

        Pixels come last in memory, since values are the same for all components: where channels
        come last, operations on both take four times as long.
        """
        h = h.contiguous().unflatten(1, (self.components, -1))
        each = h.shape[2]
        return h.split([1, 2 * self.channels, each - 1 - 2 * self.channels], 2)


@register_likelihood("logistic", data="levels")
def logistic(shape: Shape, net: Callable[[int], nn.Module], levels: int) -> nn.Module:
    """One discretized logistic for each element."""
    read = LogisticRead(shape[0], levels)
    return LikelihoodHead(net(read.outputs), read)


@register_likelihood("logistic-mixture", data="levels")
def logistic_mixture(
    shape: Shape, net: Callable[[int], nn.Module], levels: int, components: int
) -> nn.Module:
    """A `DiscretizedLogisticMixture` whose channels depend on earlier ones."""
    read = LogisticRead(shape[0], levels, components, coupled=shape[0] > 1)
    return LikelihoodHead(net(read.outputs), read)
