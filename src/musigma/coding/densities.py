"""Which law codes which distribution: their parameters, rounded to grids.

The grids are so fine that what rounding costs is far below a thousandth of the bits.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.distributions import Distribution

from musigma.coding.laws import (
    SHARPNESS,
    Bits,
    Halved,
    Law,
    Mixture,
    Normal,
    Weights,
    exponential,
    gaussian,
)
from musigma.coding.stack import Stack
from musigma.distributions import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    LogitNormal,
    Uniform,
)
from musigma.gaussian import DiagonalGaussian

__all__ = ["CODED", "Codable", "codable"]

Whole = Callable[[Tensor, float, int], np.ndarray]
"""Rounds ``values * scale``; the number tells one parameter of a distribution from the others."""


class Codable(Protocol):
    """What values of a distribution are pushed and popped by, as whole numbers."""

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push a batch of values."""

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop one."""
        ...


def codable(dist: Distribution, n: int, grid: int, whole: Whole, *, drawn: bool) -> Codable:
    """How values k · 2^-grid of a distribution are coded.

    Args:
        dist: One of `CODED`.
        n: How many examples; a distribution of batch shape () is that of each.
        grid: Of the values.
        whole: Rounds parameters.
        drawn: Whether values are popped when they are first met, so that none may be wild.

    Raises:
        ValueError: For another distribution.
    """
    for kind, rule in CODED.items():
        if type(dist) is kind:
            if not dist.batch_shape:
                dist = dist.expand((n,)) if kind is DiagonalGaussian else dist
            return rule(dist, n, grid, whole, drawn)
    raise ValueError(
        f"{type(dist).__name__} has no coding rule; there are rules for "
        f"{', '.join(kind.__name__ for kind in CODED)}"
    )


def _normal(dist: DiagonalGaussian, n: int, grid: int, whole: Whole, drawn: bool) -> Law:
    fine = min(grid, 16)
    mean = np.left_shift(whole(dist.mean, 2.0**fine, 0), grid - fine)
    log_std = whole(dist.log_std + grid * math.log(2), SHARPNESS, 1)
    return Normal(mean, log_std, wide=not drawn)


def _bernoulli(dist: Bernoulli, n: int, grid: int, whole: Whole, drawn: bool) -> Law:
    return Bits(whole(dist.logits.clamp(-30, 30), SHARPNESS, 0))


def _categorical(dist: Categorical, n: int, grid: int, whole: Whole, drawn: bool) -> Law:
    return Weights(whole(dist.log_probs.clamp(min=-60), SHARPNESS, 0))


class _Uniform:
    """Uniform on [0, 1), on its grid."""

    def __init__(self, shape: tuple[int, ...], grid: int):
        self.sizes = np.full(shape, 1 << grid)

    def push(self, stack: Stack, values: np.ndarray) -> None:
        stack.push(values, self.sizes)

    def pop(self, stack: Stack) -> np.ndarray:
        return stack.pop(self.sizes)


def _uniform(dist: Uniform, n: int, grid: int, whole: Whole, drawn: bool) -> Codable:
    return _Uniform((n, *dist.event_shape), grid)


class _Noise(Halved):
    """A `LogitNormal`, by 1,024 parts of the unit interval; within each all are alike."""

    PARTS = 10

    def __init__(self, mean: np.ndarray, log_std: np.ndarray, grid: int):
        self.mean, self.std, self.levels = mean / 4096, exponential(log_std, SHARPNESS), 1024
        self.shape, self.rest = mean.shape, 1 << (grid - self.PARTS)

    def below(self, k: np.ndarray) -> np.ndarray:
        inner = gaussian((_logits()[k] - self.mean) / self.std)
        return np.where(k <= 0, 0.0, np.where(k >= 1024, 1.0, inner))

    def push(self, stack: Stack, values: np.ndarray) -> None:
        stack.push(values % self.rest, np.full(self.shape, self.rest))
        super().push(stack, values // self.rest)

    def pop(self, stack: Stack) -> np.ndarray:
        return super().pop(stack) * self.rest + stack.pop(np.full(self.shape, self.rest))


@lru_cache
def _logits() -> np.ndarray:
    """log(k / (1024 - k)), computed in decimal arithmetic, so that it is the same everywhere."""
    with decimal.localcontext(decimal.Context(prec=30)):
        inner = [float((decimal.Decimal(k) / (1024 - k)).ln()) for k in range(1, 1024)]
    return np.array([-16.0, *inner, 16.0])


def _noise(dist: LogitNormal, n: int, grid: int, whole: Whole, drawn: bool) -> Codable:
    mean = whole(dist.base.mean, 4096, 0)
    return _Noise(mean, whole(dist.base.log_std, SHARPNESS, 1), grid)


class _Pixels:
    """A discretized mixture of logistics, channel by channel: each shifts those after it."""

    def __init__(self, dist: DiscretizedLogisticMixture, whole: Whole):
        step, self.levels = (dist.levels - 1) / 2, dist.levels
        logits = whole(dist.log_weights.clamp(min=-60), SHARPNESS, 0)
        self.weights = np.moveaxis(exponential(logits, SHARPNESS), 1, 0)
        mean = whole((dist.means + 1) * step, Mixture.PARTS, 1)  # (B, K, C, ...)
        log_scale = whole(dist.log_scale + math.log(step), SHARPNESS, 2)
        self.mean = np.moveaxis(mean, 1, 0)
        self.inverse = np.moveaxis(exponential(-log_scale, SHARPNESS), 1, 0)
        self.coefficients = None
        if dist.coefficients is not None:
            self.coefficients = np.moveaxis(whole(dist.coefficients, 1024, 3), 1, 0) / 1024

    def push(self, stack: Stack, values: np.ndarray) -> None:
        for c in reversed(range(values.shape[1])):
            self._channel(values[:, :c]).push(stack, values[:, c])

    def pop(self, stack: Stack) -> np.ndarray:
        known = np.zeros((self.mean.shape[1], 0, *self.mean.shape[3:]), np.int64)
        for _ in range(self.mean.shape[2]):
            new = self._channel(known).pop(stack)
            known = np.concatenate([known, new[:, None]], 1)
        return known

    def _channel(self, known: np.ndarray) -> Mixture:
        """The mixture of the channel after those that are known."""
        mixture, weights = None, self.weights
        for c in range(known.shape[1] + 1):
            mean = self.mean[:, :, c]
            if self.coefficients is not None:
                at = c * (c - 1) // 2
                for earlier in range(c):
                    shift = self.coefficients[:, :, at + earlier]
                    middle = (self.levels - 1) / 2
                    mean = mean + shift * ((known[:, earlier] - middle) * Mixture.PARTS)
            mixture = Mixture(weights, mean, self.inverse[:, :, c], self.levels)
            if c < known.shape[1]:
                weights = weights * (mixture.masses(known[:, c]) + 1e-12)
        assert mixture is not None
        return mixture


def _pixels(
    dist: DiscretizedLogisticMixture, n: int, grid: int, whole: Whole, drawn: bool
) -> Codable:
    return _Pixels(dist, whole)


CODED: dict[type[Distribution], Callable[..., Codable]] = {
    DiagonalGaussian: _normal,
    Bernoulli: _bernoulli,
    Categorical: _categorical,
    DiscretizedLogisticMixture: _pixels,
    Uniform: _uniform,
    LogitNormal: _noise,
}
"""The rule of each distribution that has one."""
