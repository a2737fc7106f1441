"""The law that codes each distribution, with its parameters rounded to grids.

The grids are so fine that rounding costs far less than a thousandth of the bits.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from musigma import distributions
from musigma.coding import laws
from musigma.coding.laws import SHARPNESS, Law, exponential
from musigma.coding.rules import register, rule_of
from musigma.coding.stack import Stack
from musigma.gaussian import DiagonalGaussian

__all__ = ["Quantizer", "grid_of", "law_of"]

NOISE = 12
"""The grid of draws from the unit interval: 2^-12."""


@dataclass(frozen=True)
class Quantizer:
    """Turns the parameters of a distribution into integers, for the rule of that distribution.

    Attributes:
        integers: ``integers(values, scale, which)``: ``values * scale``, rounded. `which` tells
            the parameters of one distribution apart: 0 to 3.
        grid: g of the grid 2^-g that the values of the distribution lie on.
        n: Number of examples.
        drawn: Whether values are drawn from the law before anything was pushed by it, as those of
            a posterior are. The law should then give no mass to outliers.
    """

    integers: Callable[[Tensor, float, int], np.ndarray]
    grid: int
    n: int
    drawn: bool


def law_of(dist: Distribution, quantizer: Quantizer) -> Law:
    """The law of the values k · 2^-grid of a distribution.

    Raises:
        ValueError: If the distribution has no coding rule, by its name.
    """
    rule = rule_of(dist)
    if not dist.batch_shape and type(dist).expand is not Distribution.expand:
        dist = dist.expand((quantizer.n,))
    return rule(dist, quantizer)


def grid_of(dist: Distribution) -> int | None:
    """The grid of draws from a distribution: 0 for integers; None if it must be chosen."""
    try:
        support = dist.support
    except NotImplementedError:
        return None
    if support is not None and support.is_discrete:
        return 0
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return NOISE if support is constraints.unit_interval else None


@register(Independent)
def _independent(dist: Independent, quantizer: Quantizer) -> Law:
    return law_of(dist.base_dist, quantizer)


@register(DiagonalGaussian)
def _normal(dist: DiagonalGaussian, quantizer: Quantizer) -> Law:
    grid, fine = quantizer.grid, min(quantizer.grid, 16)
    mean = np.left_shift(quantizer.integers(dist.mean, 2.0**fine, 0), grid - fine)
    log_std = quantizer.integers(dist.log_std + grid * math.log(2), SHARPNESS, 1)
    return laws.Normal(mean, log_std, wide=not quantizer.drawn)


@register(distributions.FactorizedBernoulli)
def _bernoulli(dist: distributions.FactorizedBernoulli, quantizer: Quantizer) -> Law:
    return laws.Bits(quantizer.integers(dist.logits.clamp(-30, 30), SHARPNESS, 0))


@register(distributions.FactorizedCategorical)
def _categorical(dist: distributions.FactorizedCategorical, quantizer: Quantizer) -> Law:
    return laws.Weights(quantizer.integers(dist.log_probs.clamp(min=-60), SHARPNESS, 0))


@register(distributions.UnitUniform)
def _uniform(dist: distributions.UnitUniform, quantizer: Quantizer) -> Law:
    return laws.Uniform((quantizer.n, *dist.event_shape), 1 << quantizer.grid)


@register(distributions.PointMass)
class Certain(Law):
    """Values that are known, at no cost."""

    def __init__(self, dist: distributions.PointMass, quantizer: Quantizer):
        self.values = quantizer.integers(dist.value, 2.0**quantizer.grid, 0)
        self.shape = self.values.shape

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push nothing; ValueError for other values."""
        if not np.array_equal(values, self.values):
            raise ValueError("values: expected those of a point mass, which has no others")

    def pop(self, stack: Stack) -> np.ndarray:
        """The values."""
        return self.values


@register(distributions.AutoregressiveCodes)
class Codes(Law):
    """Codes, each by its probabilities given those before it."""

    FIRST = 8  # the place of the first code's probabilities

    def __init__(self, dist: distributions.AutoregressiveCodes, quantizer: Quantizer):
        self.dist, self.integers = dist, quantizer.integers
        self.shape = (quantizer.n, *dist.event_shape)
        self.more = () if dist.batch_shape else (quantizer.n,)

    def _unrolled(self, code: Callable[[int, laws.Weights], np.ndarray]) -> None:
        """Call ``code(i, law)`` for every position, in order."""

        def chosen(i: int, log_p: Tensor) -> Tensor:
            integers = self.integers(log_p.clamp(min=-60), SHARPNESS, self.FIRST + i)
            index = torch.from_numpy(code(i, laws.Weights(integers)))
            return torch.nn.functional.one_hot(index, log_p.shape[1])

        self.dist.unrolled(self.more, chosen)

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push codes, the last position first."""
        each: list[laws.Weights] = []

        def known(i: int, law: laws.Weights) -> np.ndarray:
            each.append(law)
            return values[:, i]

        self._unrolled(known)
        for i in reversed(range(len(each))):
            each[i].push(stack, values[:, i])

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop codes, the first position first."""
        columns: list[np.ndarray] = []

        def popped(i: int, law: laws.Weights) -> np.ndarray:
            columns.append(law.pop(stack))
            return columns[-1]

        self._unrolled(popped)
        return np.stack(columns, 1)


@register(distributions.OneHotLatents)
class OneHot(Law):
    """The class of each variable, as a one-hot row."""

    def __init__(self, dist: distributions.OneHotLatents, quantizer: Quantizer):
        self.shape = (quantizer.n, *dist.event_shape)
        log_probs = dist.log_probs.expand(self.shape).clamp(min=-60)
        integers = quantizer.integers(log_probs, SHARPNESS, 0)
        self.classes = laws.Weights(np.moveaxis(integers, -1, 1))

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push one-hot rows."""
        self.classes.push(stack, values.argmax(-1))

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop one-hot rows."""
        return np.eye(self.shape[-1], dtype=np.int64)[self.classes.pop(stack)]


class Noise(laws.Bisected):
    """A `LogitNormal`, by 1,024 parts of the unit interval; uniform within each."""

    PARTS = 10

    def __init__(self, mean: np.ndarray, log_std: np.ndarray, grid: int):
        self.mean, self.std, self.levels = mean / 4096, exponential(log_std, SHARPNESS), 1024
        self.shape, self.rest = mean.shape, 1 << (grid - self.PARTS)

    def below(self, k: np.ndarray) -> np.ndarray:
        """The mass below k / 1024."""
        inner = laws.gaussian((_logits()[k] - self.mean) / self.std)
        return np.where(k <= 0, 0.0, np.where(k >= 1024, 1.0, inner))

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push multiples of the grid."""
        stack.push(values % self.rest, np.full(self.shape, self.rest))
        super().push(stack, values // self.rest)

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop multiples of the grid."""
        return super().pop(stack) * self.rest + stack.pop(np.full(self.shape, self.rest))


@lru_cache
def _logits() -> np.ndarray:
    """log(k / (1024 - k)), computed in decimal arithmetic: the same on any machine."""
    with decimal.localcontext(decimal.Context(prec=30)):
        inner = [float((decimal.Decimal(k) / (1024 - k)).ln()) for k in range(1, 1024)]
    return np.array([-16.0, *inner, 16.0])


@register(distributions.LogitNormal)
def _logit_normal(dist: distributions.LogitNormal, quantizer: Quantizer) -> Law:
    mean = quantizer.integers(dist.base.mean, 4096, 0)
    return Noise(mean, quantizer.integers(dist.base.log_std, SHARPNESS, 1), quantizer.grid)


@register(distributions.IntegerLogisticMixture)
class Integers(laws.Mixture):
    """Integers near 0, where all components have their mass."""

    def __init__(self, dist: distributions.IntegerLogisticMixture, quantizer: Quantizer):
        logits = quantizer.integers(dist.log_weights.clamp(min=-60), SHARPNESS, 0)
        mean = np.moveaxis(quantizer.integers(dist.means, self.PARTS, 1), 1, 0)
        log_scale = np.moveaxis(quantizer.integers(dist.log_scale, SHARPNESS, 2), 1, 0)
        farthest = np.abs(mean) / self.PARTS + 32 * exponential(log_scale, SHARPNESS)
        self.half = 1 << int(farthest.max(initial=0)).bit_length()
        super().__init__(
            np.moveaxis(exponential(logits, SHARPNESS), 1, 0),
            mean + self.half * self.PARTS,
            exponential(-log_scale, SHARPNESS),
            2 * self.half,
        )

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push integers; OverflowError if one is so far away that it has no mass."""
        if values.size and np.abs(values).max() >= self.half:
            raise OverflowError("a value is too far from the means of its components")
        super().push(stack, values + self.half)

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop integers."""
        return super().pop(stack) - self.half


@register(distributions.DiscretizedLogisticMixture)
class Pixels(Law):
    """A discretized mixture of logistics, channel by channel: each shifts those after it."""

    def __init__(self, dist: distributions.DiscretizedLogisticMixture, quantizer: Quantizer):
        step, self.levels = (dist.levels - 1) / 2, dist.levels
        integers, self.shape = quantizer.integers, (quantizer.n, *dist.event_shape)
        logits = integers(dist.log_weights.clamp(min=-60), SHARPNESS, 0)
        self.weights = np.moveaxis(exponential(logits, SHARPNESS), 1, 0)
        mean = integers((dist.means + 1) * step, laws.Mixture.PARTS, 1)  # (B, K, C, ...)
        log_scale = integers(dist.log_scale + math.log(step), SHARPNESS, 2)
        self.mean = np.moveaxis(mean, 1, 0)
        self.inverse = np.moveaxis(exponential(-log_scale, SHARPNESS), 1, 0)
        self.coefficients = None
        if dist.coefficients is not None:
            self.coefficients = np.moveaxis(integers(dist.coefficients, 1024, 3), 1, 0) / 1024

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push levels, the last channel first."""
        for c in reversed(range(values.shape[1])):
            self._channel(values[:, :c]).push(stack, values[:, c])

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop levels, the first channel first."""
        known = np.zeros((self.mean.shape[1], 0, *self.mean.shape[3:]), np.int64)
        for _ in range(self.mean.shape[2]):
            new = self._channel(known).pop(stack)
            known = np.concatenate([known, new[:, None]], 1)
        return known

    def _channel(self, known: np.ndarray) -> laws.Mixture:
        """The mixture of the channel after those that are known."""
        mixture, weights = None, self.weights
        for c in range(known.shape[1] + 1):
            mean = self.mean[:, :, c]
            if self.coefficients is not None:
                at = c * (c - 1) // 2
                for earlier in range(c):
                    shift = self.coefficients[:, :, at + earlier]
                    middle = (self.levels - 1) / 2
                    mean = mean + shift * ((known[:, earlier] - middle) * laws.Mixture.PARTS)
            mixture = laws.Mixture(weights, mean, self.inverse[:, :, c], self.levels)
            if c < known.shape[1]:
                weights = weights * (mixture.masses(known[:, c]) + 1e-12)
        assert mixture is not None
        return mixture
