"""Distributions besides the Gaussian: of pixels, as integer levels or in the unit interval.

Discrete ones are of levels 0 .. levels - 1, so their log p is that of the data as stored: no
dequantisation, and no density. Each one's `temperature` shrinks a draw towards its centre, which
temperature 0 is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

from musigma.gaussian import DiagonalGaussian, at_least_float32, per_example, sum_event

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "LogitNormal",
    "ModelDistribution",
    "Uniform",
]


class _Event(Distribution):
    """A distribution over events of `event_ndims` dimensions, without argument checks."""

    _base: constraints.Constraint = constraints.real

    def __init__(self, batch_shape: Sequence[int], event_shape: Sequence[int]):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self._base, len(self.event_shape))

    def _sum(self, terms: Tensor) -> Tensor:
        return sum_event(terms, len(self.event_shape))


# --- of integer levels -------------------------------------------------------------------------


class Bernoulli(_Event):
    r"""Levels 0 and 1: :math:`\log p(x) = \sum_i x_i l_i - \log(1 + e^{l_i})`.

    Args:
        logits: l, shape (B, \*event).

    Example:
        >>> Bernoulli(torch.zeros(2, 3)).log_prob(torch.ones(2, 3))
        tensor([-2.0794, -2.0794])
    """

    _base = constraints.boolean

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)
        super().__init__(logits.shape[:1], logits.shape[1:])

    @property
    def mean(self) -> Tensor:
        """The probability of a one."""
        return self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        """The likelier level."""
        return (self.logits > 0).to(self.logits)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; the logits are divided by `temperature`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        t = per_example(temperature, logits)
        return torch.bernoulli((logits / (t + 1e-30)).sigmoid())  # all but certain at 0

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        value = value.to(self.logits).expand_as(self.logits)
        terms = F.binary_cross_entropy_with_logits(self.logits, value, reduction="none")
        return -self._sum(terms)


class Categorical(_Event):
    r"""Any distribution over the levels: one logit for each, shape (B, levels, \*event).

    Example:
        >>> Categorical(torch.zeros(2, 256, 1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 4)) / -16
        tensor([5.5452, 5.5452])
    """

    _base = constraints.nonnegative_integer

    def __init__(self, logits: Tensor):
        self.log_probs = at_least_float32(logits).log_softmax(1)
        super().__init__(logits.shape[:1], logits.shape[2:])

    @property
    def mean(self) -> Tensor:
        """The mean level."""
        levels = torch.arange(self.log_probs.shape[1], device=self.log_probs.device)
        levels = levels.to(self.log_probs)
        return torch.einsum("bl...,l->b...", self.log_probs.exp(), levels)

    @property
    def mode(self) -> Tensor:
        """The likeliest level."""
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


class BetaBinomial(_Event):
    r"""Levels 0 .. n, by n throws of a coin whose bias has a Beta distribution.

    .. math:: p(x) = \binom{n}{x} \frac{B(x + \alpha, n - x + \beta)}{B(\alpha, \beta)}

    Computed in float64 where the device has it: the terms are far larger than their sum. (As a
    likelihood of pixels: Townsend, Bird, Barber, "Practical lossless compression with latent
    variables using bits back coding", 2019, arXiv:1901.04866.)

    Args:
        log_alpha: Shape (B, \*event).
        log_beta: Of the same shape.
        levels: n + 1.

    Example:
        >>> uniform = BetaBinomial(torch.zeros(1, 3), torch.zeros(1, 3), 256)
        >>> uniform.log_prob(torch.tensor([[0.0, 7.0, 255.0]])) / -3
        tensor([5.5452])
    """

    _base = constraints.nonnegative_integer

    def __init__(self, log_alpha: Tensor, log_beta: Tensor, levels: int):
        self.dtype = at_least_float32(log_alpha).dtype
        wide = torch.float32 if log_alpha.device.type == "mps" else torch.float64
        self.alpha, self.beta = (t.to(wide).clamp(-20, 20).exp() for t in (log_alpha, log_beta))
        self.n = levels - 1
        super().__init__(log_alpha.shape[:1], log_alpha.shape[1:])

    @property
    def mean(self) -> Tensor:
        """The mean level, n α / (α + β)."""
        return (self.n * self.alpha / (self.alpha + self.beta)).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The likeliest level."""
        return self._choose((), 0.0)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; the log masses are divided by `temperature`."""
        return self._choose(sample_shape, temperature)

    def _choose(self, sample_shape: Sequence[int], temperature: float | Tensor) -> Tensor:
        """The level of the highest log mass with noise, as `Categorical` draws; one at a time."""
        best = self.alpha.new_full((*sample_shape, *self.alpha.shape), -math.inf)
        level = torch.zeros_like(best)
        t = per_example(temperature, best)
        for candidate in range(self.n + 1):
            gumbel = -torch.empty_like(best).exponential_().log()
            score = self._log_mass(torch.full_like(self.alpha, candidate)) + t * gumbel
            level = torch.where(score > best, candidate, level)
            best = torch.maximum(score, best)
        return level.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        return self._sum(self._log_mass(value.to(self.alpha))).to(self.dtype)

    def _log_mass(self, x: Tensor) -> Tensor:
        a, b, n = self.alpha, self.beta, self.n
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        drawn = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(n + a + b)
        return choose + drawn - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)


class DiscretizedLogisticMixture(_Event):
    r"""A mixture of K logistics, integrated over each level's bin: sums to one over the levels.

    .. math:: p(x) = \sum_k \pi_k \prod_c \sigma((x_c + \tfrac12 w - m_{kc}) / s_{kc})
                                      - \sigma((x_c - \tfrac12 w - m_{kc}) / s_{kc})

    for each pixel, in coordinates where the levels run from -1 to 1 and a bin is w wide; the first
    and the last bin reach to infinity. The channels of a pixel share the choice of component, and
    the mean of each is shifted by the values of the channels before it times `coefficients`
    (Salimans et al., "PixelCNN++", 2017, arXiv:1701.05517, whose threshold for small masses is not
    needed here: the mass is σ(a) σ(-b) (1 - exp(b - a)), which is exact at any scale).

    Args:
        logits: log π up to a constant, shape (B, K, H, W), or (B, K) for vectors of one element.
        mean: m, shape (B, K, C, H, W).
        log_scale: log s, of the same shape.
        levels: How many levels there are.
        coefficients: Shape (B, K, C (C - 1) / 2, H, W), or None: channels independent given k.
    """

    _base = constraints.nonnegative_integer

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
        value = at_least_float32(value).unsqueeze(1)
        half = 1 / (self.levels - 1)
        centred = 2 * half * value - 1 - self._shifted(value.expand_as(self.means))
        inverse = (-self.log_scale).exp()
        below, above = (centred - half) * inverse, (centred + half) * inverse
        top, bottom = value >= self.levels - 1, value <= 0
        inside = F.logsigmoid(above) + F.logsigmoid(-below)
        inside = inside + torch.log(-torch.expm1(-2 * half * inverse))
        mass = torch.where(bottom, F.logsigmoid(above), inside)
        mass = torch.where(top, F.logsigmoid(-below), mass)
        pixels = torch.logsumexp(mass.sum(2) + self.log_weights, 1)
        return sum_event(pixels, len(self.event_shape) - 1)

    def _shifted(self, value: Tensor) -> Tensor:
        """Component means given the true channels before each: (B, K, C, H, W)."""
        if self.coefficients is None:
            return self.means
        x = 2 * value / (self.levels - 1) - 1
        channels, at = [self.means[:, :, 0]], 0
        for c in range(1, self.means.shape[2]):
            shift = (self.coefficients[:, :, at : at + c] * x[:, :, :c]).sum(2)
            channels.append(self.means[:, :, c] + shift)
            at += c
        return torch.stack(channels, 2)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; component logits are divided by `temperature`, scales multiplied by it."""
        if sample_shape:
            return torch.stack(
                [self.sample(temperature=temperature) for _ in range(math.prod(sample_shape))]
            ).unflatten(0, tuple(sample_shape))
        gumbel = -torch.empty_like(self.log_weights).exponential_().log()
        t = per_example(temperature, gumbel)
        uniform = torch.rand_like(self.means[:, 0]).clamp(1e-7, 1 - 1e-7)
        return self._draw((self.log_weights + t * gumbel).argmax(1), t, uniform.logit())

    @property
    def mode(self) -> Tensor:
        """The centre of the heaviest component, as a level."""
        return self._draw(self.log_weights.argmax(1), 0.0, torch.zeros_like(self.means[:, 0]))

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


# --- on the unit interval ----------------------------------------------------------------------


class ContinuousBernoulli(_Event):
    r"""A density on [0, 1], proportional to :math:`e^{x l}`: what BCE on grey values forgets.

    .. math:: \log p(x) = \sum_i x_i l_i - \log\frac{e^{l_i} - 1}{l_i}

    (Loaiza-Ganem & Cunningham, "The continuous Bernoulli", 2019, arXiv:1907.06845.)

    Args:
        logits: l, shape (B, \*event).

    Example:
        >>> ContinuousBernoulli(torch.zeros(1, 3)).log_prob(torch.rand(1, 3))
        tensor([0.])
    """

    _base = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)
        super().__init__(logits.shape[:1], logits.shape[1:])

    def _away_from_zero(self) -> tuple[Tensor, Tensor]:
        small = self.logits.abs() < 0.1
        return small, torch.where(small, torch.ones_like(self.logits), self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, shape (B,)."""
        (small, far), square = self._away_from_zero(), self.logits.square()
        series = self.logits / 2 + square / 24 - square**2 / 2880 + square**3 / 181440
        size = far.abs()
        normaliser = size + torch.log(-torch.expm1(-size)) - size.log() + far.clamp(max=0)
        terms = value * self.logits - torch.where(small, series, normaliser)
        return self._sum(torch.where((value < 0) | (value > 1), -math.inf, terms))

    @property
    def mean(self) -> Tensor:
        """The mean, in (0, 1)."""
        small, far = self._away_from_zero()
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        return torch.where(small, series, -1 / torch.expm1(-far) - 1 / far)

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw by the inverse distribution function; distance from the mean times temperature."""
        small, far = self._away_from_zero()
        u = torch.rand_like(self.logits.expand(*sample_shape, *self.logits.shape))
        negative = -far.abs()  # the inverse is stable on this side, and the other is its mirror
        x = torch.log1p(u * torch.expm1(negative)) / negative
        x = torch.where(far > 0, 1 - x, x)
        x = torch.where(small, u + self.logits * u * (u - 1) * -0.5, x)
        return self.mean + per_example(temperature, x) * (x - self.mean)


class LogitNormal(_Event):
    """sigmoid(y) with y ~ N(mean, std²): noise on (0, 1), for learned dequantisation.

    Args:
        base: The `DiagonalGaussian` of y.
    """

    _base = constraints.unit_interval
    has_rsample = True

    def __init__(self, base: DiagonalGaussian):
        self.base = base
        super().__init__(base.batch_shape, base.event_shape)

    @property
    def mean(self) -> Tensor:
        """The median, sigmoid(mean of y), which stands for the centre."""
        return self.base.mean.sigmoid()

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw, differentiably, strictly inside (0, 1)."""
        y = self.base.rsample(sample_shape, temperature=temperature)
        edge = torch.finfo(y.dtype).eps
        return y.sigmoid().clamp(edge, 1 - edge)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, shape (B,): log N(logit u) - log u - log(1 - u)."""
        edge = torch.finfo(self.base.mean.dtype).eps
        y = value.clamp(edge, 1 - edge).logit()
        return self.base.log_prob(y) - self._sum(F.logsigmoid(y) + F.logsigmoid(-y))


class Uniform(_Event):
    """Uniform on [0, 1), independently: density one there, zero elsewhere."""

    _base = constraints.unit_interval
    has_rsample = True

    def __init__(self, zeros: Tensor, event_ndims: int):
        self.zeros = zeros
        cut = zeros.ndim - event_ndims
        super().__init__(zeros.shape[:cut], zeros.shape[cut:])

    @property
    def mean(self) -> Tensor:
        """One half."""
        return self.zeros + 0.5

    def rsample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw; distance from one half times temperature."""
        u = torch.rand_like(self.zeros.expand(*sample_shape, *self.zeros.shape))
        return 0.5 + per_example(temperature, u) * (u - 0.5)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero inside [0, 1], -inf outside, in nats, shape (B,)."""
        outside = (value < 0) | (value > 1)
        return self._sum(torch.where(outside, -math.inf, 0.0).to(self.zeros))


# --- of a model ---------------------------------------------------------------------------------


class ModelDistribution(Distribution):
    """An exact model seen as a `torch.distributions.Distribution`."""

    def __init__(self, model: Any, context: Tensor | None):
        self.model, self.context = model, context
        with torch.random.fork_rng():
            example = model.sample(1 if context is None else len(context), context)
        batch = () if context is None else (len(context),)
        super().__init__(torch.Size(batch), example.shape[1:], validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None: the model has its own parameters."""
        return {}

    @property
    def support(self) -> constraints.Constraint:
        """All real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats: ``value.shape`` without the event dimensions."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        context = self.context
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
        flat = value.reshape(-1, *self.event_shape)
        return self.model.log_prob(flat, context).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw, without a gradient."""
        shape = (*sample_shape, *self.batch_shape)
        n, context = math.prod(shape), self.context
        if context is not None:
            context = context.expand(*shape, -1).reshape(-1, context.shape[-1])
        return self.model.sample(n, context).reshape(*shape, *self.event_shape)
