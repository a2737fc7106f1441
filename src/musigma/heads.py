"""Conditional distributions besides the Gaussian: likelihoods of pixels, and priors.

A head is a module whose ``forward(given, context)`` returns a distribution with batch shape (B,),
or () where nothing is given. Discrete likelihoods are of integer levels 0 .. levels - 1, so their
log p is that of the data as stored: no dequantisation, and no density. Each distribution's
`temperature` shrinks a draw towards its centre, which temperature 0 is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from musigma.gaussian import (
    DiagonalGaussian,
    Format,
    GaussianHead,
    at_least_float32,
    per_example,
    sum_event,
)

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "LearnedNormal",
    "LikelihoodHead",
    "LogitNormal",
    "LogitNormalHead",
    "OptimalGaussianHead",
    "StandardNormal",
    "StandardUniform",
    "likelihood",
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


# --- likelihoods of integer levels -------------------------------------------------------------


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
        return self._sum(value * self.logits - F.softplus(self.logits))


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
        """The likeliest level: where the ratio of neighbours falls below 1, or else an end."""
        a, b, n = self.alpha, self.beta, self.n
        peaked = a + b > 2
        last_rise = (n * (a - 1) + 1 - b) / torch.where(peaked, a + b - 2, torch.ones_like(a))
        inside = (last_rise.floor() + 1).clamp(0, n)
        return torch.where(peaked, inside, torch.where(a > b, n, 0).to(a)).to(self.dtype)

    def sample(
        self, sample_shape: Sequence[int] = (), *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Draw levels; distance from the mode times temperature, to the nearest level."""
        shape = (*sample_shape, *self.alpha.shape)
        bias = torch.distributions.Beta(self.alpha, self.beta, validate_args=False)
        drawn = torch.binomial(self.alpha.new_full(shape, self.n), bias.sample(tuple(sample_shape)))
        mode = self.mode
        drawn = drawn.to(self.dtype)
        return mode + (per_example(temperature, drawn) * (drawn - mode)).round()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        x, a, b, n = value.to(self.alpha), self.alpha, self.beta, self.n
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        drawn = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(n + a + b)
        prior = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return self._sum(choose + drawn - prior).to(self.dtype)


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


# --- likelihoods on the unit interval ----------------------------------------------------------


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


# --- heads: modules whose output is a distribution ----------------------------------------------


class StandardNormal(nn.Module):
    """N(0, I) over events of a shape, whatever is given."""

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape ()."""
        return DiagonalGaussian(self.zeros, self.zeros, self.zeros.ndim)


class StandardUniform(nn.Module):
    """Uniform on [0, 1) over events of a shape: noise for dequantisation, and the null model."""

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape () if nothing is given and (B,) otherwise."""
        zeros = self.zeros if given is None else self.zeros.expand(len(given), *self.zeros.shape)
        return Uniform(zeros, self.zeros.ndim)


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


class LearnedNormal(nn.Module):
    """A Gaussian with learned mean and log_std ("learn_top"), shifted by the context if any.

    Args:
        shape: Event shape.
        each: Of an image (C, H, W), whether each `channel` or each `pixel` has its own parameters.
        context: How many features the context has; 0 for none. It shifts whole channels.
        bounds: Of log_std, as in a `Format`.

    Raises:
        ValueError: For another `each`; or, on a forward pass, without the context declared.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        each: Literal["channel", "pixel"] = "channel",
        context: int = 0,
        bounds: tuple[float, float] | None = Format().bounds,
    ):
        super().__init__()
        if each not in ("channel", "pixel"):
            raise ValueError(f"each: expected 'channel' or 'pixel'; got {each!r}")
        self.shape, self.context = tuple(shape), context
        spread = () if each == "channel" else self.shape[1:]
        self.raw = nn.Parameter(torch.zeros(2 * shape[0], *spread))
        self.from_context = nn.Linear(context, 2 * shape[0], bias=False) if context else None
        if self.from_context is not None:
            nn.init.zeros_(self.from_context.weight)
        self.format = Format(dim=-len(self.shape), bounds=bounds)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape () without a context and (B,) with one.

        A prior's context is what it is given, so either argument serves.
        """
        context = given if context is None else context
        ones = (1,) * (len(self.shape) - 1)
        raw = self.raw if self.raw.ndim > 1 else self.raw.reshape(-1, *ones)
        if self.from_context is not None:
            if context is None:
                raise ValueError(f"context: this prior needs {self.context} features; got none")
            raw = raw + self.from_context(context).reshape(len(context), -1, *ones)
        mean, log_std = (
            t.expand(*t.shape[: -len(self.shape)], *self.shape) for t in self.format.split(raw)
        )
        return DiagonalGaussian(mean, log_std, len(self.shape))


class LogitNormalHead(nn.Module):
    """A `LogitNormal` whose Gaussian is emitted by a head: learned noise for `Dequantize`.

    Args:
        base: A `GaussianHead` over events of the data's shape.
        levels: The head is given the data scaled from 0 .. levels - 1 to [-1, 1].
    """

    def __init__(self, base: GaussianHead, levels: int):
        super().__init__()
        self.base, self.levels = base, levels

    def forward(self, given: Tensor, context: Tensor | None = None) -> LogitNormal:
        """q(u | x)."""
        return LogitNormal(self.base(2 * given / max(1, self.levels - 1) - 1, context))


class OptimalGaussianHead(nn.Module):
    r"""A Gaussian likelihood whose one variance is at its optimum: the mean squared error.

    .. math:: \log p(x|z) = \log N(x; \mu(z), \sigma^2), \quad \sigma^2 = MSE

    While training, σ² is that of the batch, with its gradient; its running value is what sampling
    and evaluation use, where the likelihood is therefore an honest density of one example (Rybkin,
    Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021,
    arXiv:2006.13202).

    Args:
        net: Emits the mean.
        event_ndims: 1 for vectors, 3 for images.
        momentum: The share of the running log σ that a batch replaces.
        smallest: Lower bound of log σ.
    """

    log_std: Tensor

    def __init__(
        self, net: nn.Module, *, event_ndims: int, momentum: float = 0.05, smallest: float = -6.0
    ):
        super().__init__()
        self.net, self.event_ndims, self.momentum = net, event_ndims, momentum
        self.smallest = smallest
        self.register_buffer("log_std", torch.zeros(()))

    def forward(self, given: Tensor, context: Tensor | None = None) -> DiagonalGaussian:
        """The likelihood."""
        mean = at_least_float32(self.net(given) if context is None else self.net(given, context))
        if self.training:
            return _FittedGaussian(mean, self)
        return DiagonalGaussian(mean, self.log_std, self.event_ndims)


class _FittedGaussian(DiagonalGaussian):
    """A Gaussian that takes its variance from the value that it scores."""

    def __init__(self, mean: Tensor, head: OptimalGaussianHead):
        super().__init__(mean, head.log_std, head.event_ndims)
        self.head = head

    def log_prob(self, value: Tensor) -> Tensor:
        mse = (at_least_float32(value) - self.mean).square().mean()
        log_std = 0.5 * mse.clamp(min=math.exp(2 * self.head.smallest)).log()
        with torch.no_grad():  # a batch that is not finite must not stay in the running value
            kept = torch.where(log_std.isfinite(), log_std, self.head.log_std)
            self.head.log_std.lerp_(kept, self.head.momentum)
        return DiagonalGaussian(self.mean, log_std, self.event_ndims).log_prob(value)


Likelihood = Literal[
    "bernoulli", "categorical", "logistic", "logistic-mixture", "beta-binomial",
    "continuous-bernoulli", "gaussian",
]  # fmt: skip
CONTINUOUS = ("continuous-bernoulli", "gaussian")
"""Likelihoods that are densities: on integer data they need dequantisation."""


class LikelihoodHead(nn.Module):
    """A network whose output is read as one of this module's likelihoods; see `likelihood`."""

    def __init__(self, net: nn.Module, name: Likelihood, channels: int, levels: int, k: int):
        super().__init__()
        self.net, self.name, self.channels, self.levels, self.k = net, name, channels, levels, k
        self.format = Format(dim=2, bounds=(-7.0, 7.0), offset=-2.0)

    def forward(self, given: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x | given)."""
        h = at_least_float32(self.net(given) if context is None else self.net(given, context))
        if self.name == "bernoulli":
            return Bernoulli(h)
        if self.name == "continuous-bernoulli":
            return ContinuousBernoulli(h)
        if self.name == "categorical":
            return Categorical(h.unflatten(1, (self.levels, self.channels)))
        if self.name == "beta-binomial":
            return BetaBinomial(*h.chunk(2, 1), self.levels)
        mean, log_scale = self.format.split(self.scales(h))
        h, c = h.unflatten(1, (self.k, -1)), self.channels
        mixes = c > 1 and self.name == "logistic-mixture"
        coefficients = h[:, :, 1 + 2 * c :].tanh() if mixes else None
        return DiscretizedLogisticMixture(h[:, :, 0], mean, log_scale, self.levels, coefficients)

    def scales(self, h: Tensor) -> Tensor:
        """What `format` reads of the network's output, in a logistic likelihood."""
        return h.unflatten(1, (self.k, -1))[:, :, 1 : 1 + 2 * self.channels]

    def extra_repr(self) -> str:
        """Names the likelihood."""
        return f"{self.name}, levels={self.levels}, components={self.k}"


def likelihood(
    name: Likelihood,
    shape: Sequence[int],
    net: Callable[[int], nn.Module],
    *,
    levels: int = 256,
    components: int = 10,
    std: Literal["emitted", "channel", "pixel", "optimal"] | float = "emitted",
) -> nn.Module:
    """The head of a decoder: p(x | z), by name.

    Args:
        name: `bernoulli` (levels 0 and 1), `categorical` (a probability for each level),
            `logistic`, `logistic-mixture` and `beta-binomial` (of levels); `continuous-bernoulli`
            and `gaussian` are densities of values scaled to [0, 1].
        shape: The event shape, (C, H, W) or (D,).
        net: Builds a network that emits as many channels as it is told.
        levels: How many levels the data have.
        components: Of a `logistic-mixture`.
        std: Of a `gaussian`: `emitted` for every pixel by the network, a learned parameter for
            each `channel` or each `pixel`, `optimal` (see `OptimalGaussianHead`), or a number.

    Raises:
        ValueError: For an unknown name, or a Bernoulli of data with more than two levels.

    Example:
        >>> head = likelihood("logistic", (3, 4, 4), lambda c: nn.Conv2d(8, c, 1), levels=256)
        >>> head(torch.randn(2, 8, 4, 4)).log_prob(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2])
    """
    c = shape[0]
    if name == "gaussian":
        if std == "optimal":
            return OptimalGaussianHead(net(c), event_ndims=len(shape))
        if std == "emitted":
            bounded = Format(bounds=(-6.0, 3.0), offset=-1.0)
            return GaussianHead(net(2 * c), event_ndims=len(shape), format=bounded)
        shared = {"channel": (c, *(1,) * (len(shape) - 1)), "pixel": tuple(shape)}
        if isinstance(std, str):
            if std not in shared:
                raise ValueError(
                    "std: expected 'emitted', 'channel', 'pixel', 'optimal' or a number; "
                    f"got {std!r}"
                )
            log_std = torch.full(shared[std], -1.0)
        elif std > 0:
            log_std = math.log(std)
        else:
            raise ValueError(f"std: expected a positive number; got {std}")
        return GaussianHead(net(c), event_ndims=len(shape), log_std=log_std)
    if name == "bernoulli" and levels != 2:
        raise ValueError(
            f"likelihood: a Bernoulli is of data with 2 levels, and these have {levels}; binarize "
            "them, or use 'logistic-mixture', or 'continuous-bernoulli' for grey values in [0, 1]"
        )
    if name in ("bernoulli", "continuous-bernoulli"):
        return LikelihoodHead(net(c), name, c, levels, 1)
    if name == "categorical":
        return LikelihoodHead(net(c * levels), name, c, levels, 1)
    if name == "beta-binomial":
        return LikelihoodHead(net(2 * c), name, c, levels, 1)
    if name == "logistic":
        return LikelihoodHead(net(1 + 2 * c), name, c, levels, 1)
    if name == "logistic-mixture":
        emitted = components * (1 + 2 * c + c * (c - 1) // 2)
        return LikelihoodHead(net(emitted), name, c, levels, components)
    raise ValueError(
        "likelihood: expected bernoulli, categorical, logistic, logistic-mixture, beta-binomial, "
        f"continuous-bernoulli or gaussian; got {name!r}"
    )
