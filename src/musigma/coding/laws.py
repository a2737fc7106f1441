r"""Distributions of integers, coded by binary decisions along their distribution function.

A law knows how much of its mass lies below k, for k = 0 .. 2^depth. A value is found by bisection:
each answer to "is it in the upper half?" is a bit, whose probability is a ratio of two masses,

.. math:: P(\text{upper}) = \frac{C(high) - C(middle)}{C(high) - C(low)},

rounded to a multiple of 2^-22. This codes every law to within 10^-5 of its entropy, with `depth`
bits for each value and without tables of masses.

Encoder and decoder must compute the same probabilities on any machine: parameters are integers,
functions are read from tables that are computed in decimal arithmetic, and every operation
between is correctly rounded.
"""

from __future__ import annotations

import decimal
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from musigma.coding.stack import ONE, Stack

__all__ = ["Bisected", "Bits", "Law", "Mixture", "Normal", "Uniform", "Weights"]

STEPS = 64.0
"""Table entries per unit."""
SHARPNESS = 128
"""Log scales are integer multiples of 1 / SHARPNESS."""


class Law(ABC):
    """Distributions of many independent integers, one for each element of `shape`."""

    shape: tuple[int, ...]

    @abstractmethod
    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push values of this shape; ValueError if one has no probability."""

    @abstractmethod
    def pop(self, stack: Stack) -> np.ndarray:
        """Pop values, int64, of this shape; `Exhausted` if the stack holds too few bits."""


class Uniform(Law):
    """Integers 0 .. size - 1, all equally likely."""

    def __init__(self, shape: tuple[int, ...], size: int):
        self.shape, self.sizes = shape, np.full(shape, size)

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push integers."""
        stack.push(values, self.sizes)

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop integers."""
        return stack.pop(self.sizes)


class Bisected(Law):
    """Levels 0 .. levels - 1, by their distribution function `below`."""

    levels: int

    @abstractmethod
    def below(self, k: np.ndarray) -> np.ndarray:
        """The mass below level k, up to a factor: float64, increasing, constant from `levels`."""

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push levels."""
        if not ((values >= 0) & (values < self.levels)).all():
            raise ValueError(f"values: expected levels 0 to {self.levels - 1}")
        decisions: list[tuple[np.ndarray, np.ndarray]] = []

        def decide(at: Any, middle: np.ndarray, ones: np.ndarray) -> np.ndarray:
            decisions.append((values[at] >= middle, ones))
            return decisions[-1][0]

        self._bisect(decide)
        for answer in reversed(decisions):
            stack.push_bits(*answer)

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop levels."""
        return self._bisect(lambda at, middle, ones: stack.pop_bits(ones))

    def _bisect(self, decide: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        low, half = np.zeros(self.shape, np.int64), 1 << (self.levels - 1).bit_length()
        under, over = np.zeros(self.shape), self.below(low + half)
        power_of_two, yes = half == self.levels, np.zeros(self.shape, bool)
        while half := half >> 1:
            middle = low + half
            between = self.below(middle)
            at = ... if power_of_two else middle < self.levels  # there is nothing above
            yes[...] = False
            yes[at] = decide(at, middle[at], _share(over - between, over - under)[at])
            low = np.where(yes, middle, low)
            under, over = np.where(yes, between, under), np.where(yes, over, between)
        return low


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A probability in units of 1 / `ONE`, never 0 or 1: one half where the whole is zero."""
    share = np.divide(part, whole, out=np.full(part.shape, 0.5), where=whole > 0)
    return np.clip(np.rint(share * ONE), 1, ONE - 1)


class Normal(Law):
    """Integers around a mean, Gaussian.

    A value is found by bisection of 1,024 cells, 32 to 64 to a standard deviation; below 32
    integers to a standard deviation, a cell is one integer. Within a cell the law is uniform.

    Args:
        mean: Integers.
        log_std: Log standard deviations, integer multiples of 1 / `SHARPNESS`.
        wide: Whether there is mass beyond the cells, which reach 8 standard deviations or more:
            such a value costs 45 bits, and every other one 10^-6 bits more. A law that values are
            drawn from must not be wide, because an outlier would cost more than it gains; nor
            does it reach beyond 8 standard deviations.
    """

    HALVINGS = 10

    def __init__(self, mean: np.ndarray, log_std: np.ndarray, *, wide: bool):
        self.mean, self.shape, self.wide = mean, mean.shape, wide
        kinds, self.row = np.unique(log_std, return_inverse=True)
        self.row = self.row.reshape(self.shape)
        self.table = np.stack([_decisions(int(kind), wide) for kind in kinds])
        self.shift = np.array([_cell(int(kind)) for kind in kinds], np.int64)[self.row]
        self.lowest = mean - np.left_shift(1, self.shift + self.HALVINGS - 1)

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push integers; if `wide`, any that are less than 2^23 cells from the mean."""
        away = values - self.lowest
        cells = np.right_shift(away, self.shift)
        stack.push(away - np.left_shift(cells, self.shift), np.left_shift(1, self.shift))
        beyond = (cells < 0) | (cells >= 1 << self.HALVINGS)
        if self.wide:
            far = cells[beyond] + (1 << 23)
            if not ((far >= 0) & (far < 1 << 24)).all():
                raise OverflowError("a value lies more than 2^23 cells from its mean")
            stack.push(far, np.full(far.shape, 1 << 24))
        elif beyond.any():
            raise ValueError("values: expected at most 8 standard deviations from the mean")
        near = ~beyond
        cells, rows = cells[near], self.row[near]
        depth = np.arange(self.HALVINGS)[:, None]
        answers = cells >> (self.HALVINGS - 1 - depth) & 1
        ones = self.table[rows, (1 << depth) + (cells >> (self.HALVINGS - depth))]
        open_ = _open(ones)
        if (answers != (ones > 0))[~open_].any():
            raise ValueError("values: expected at most 8 standard deviations from the mean")
        stack.push_bits(answers[open_], ones[open_])
        if self.wide:
            stack.push_bits(beyond, np.full(self.shape, FAR))

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop integers."""
        near = np.ones(self.shape, bool)
        if self.wide:
            near = ~stack.pop_bits(np.full(self.shape, FAR))
        node, rows = np.ones(near.sum(), np.int64), self.row[near]
        for _ in range(self.HALVINGS):
            ones = self.table[rows, node]
            answers, open_ = ones > 0, _open(ones)
            answers[open_] = stack.pop_bits(ones[open_])
            node = 2 * node + answers
        cells = np.empty(self.shape, np.int64)
        cells[near] = node - (1 << self.HALVINGS)
        if self.wide:
            cells[~near] = stack.pop(np.full((~near).sum(), 1 << 24)) - (1 << 23)
        return self.lowest + np.left_shift(cells, self.shift) + stack.pop(1 << self.shift)


def _open(ones: np.ndarray) -> np.ndarray:
    """Which decisions are not certain."""
    return (ones > 0) & (ones < ONE)


FAR = 4.0
"""The probability of a value beyond the cells of a wide `Normal`, in units of 1 / `ONE`."""


def _cell(log_std: int) -> int:
    """log2 of the number of integers in a cell."""
    std = float(exponential(np.array(log_std), SHARPNESS))
    return max(0, math.frexp(std)[1] - 6)


@lru_cache(maxsize=8192)
def _decisions(log_std: int, wide: bool) -> np.ndarray:
    """The probability of the upper half at each node; the children of node n are 2n and 2n + 1.

    Unless `wide`, it is zero for halves beyond 8 standard deviations.
    """
    cells, size = 1 << Normal.HALVINGS, float(1 << _cell(log_std))
    std = float(exponential(np.array(log_std), SHARPNESS))
    edges = ((np.arange(cells + 1) - cells // 2) * size - 0.5) / std
    sums = gaussian(edges)
    ones = np.empty(cells)
    for d in range(Normal.HALVINGS):
        at = sums[:: cells >> (d + 1)]
        upper, lower = at[2::2] - at[1::2], at[1::2] - at[:-1:2]
        share = _share(upper, at[2::2] - at[:-1:2])
        if not wide:
            share = np.where(upper == 0, 0, np.where(lower == 0, ONE, share))
        ones[1 << d : 2 << d] = share
    ones[0] = 1
    return ones


class Weights(Bisected):
    """Levels with any probabilities.

    Args:
        logits: Log weights, integer multiples of 1 / `SHARPNESS`, shape (B, levels, ...).
    """

    def __init__(self, logits: np.ndarray):
        weights = np.moveaxis(exponential(logits - logits.max(1, keepdims=True), SHARPNESS), 1, -1)
        self.levels, self.shape = weights.shape[-1], weights.shape[:-1]
        self.sums = np.zeros((*self.shape, self.levels + 1))
        np.cumsum(weights + 1e-12, -1, out=self.sums[..., 1:])

    def below(self, k: np.ndarray) -> np.ndarray:
        """Cumulative weights."""
        at = np.minimum(k, self.levels)[..., None]
        return np.take_along_axis(self.sums, at, -1)[..., 0]


class Mixture(Bisected):
    """A mixture of logistic distributions, integrated over levels; the outer two take the tails.

    Args:
        weights: Weights of the components, shape (K, *shape).
        mean: Means in 256ths of a level, integers, of the same shape.
        inverse: 1 / scale, in levels, of the same shape.
        levels: Number of levels.
    """

    PARTS = 256

    def __init__(self, weights: np.ndarray, mean: np.ndarray, inverse: np.ndarray, levels: int):
        self.weights, self.mean, self.levels = weights, mean, levels
        self.steep = inverse * (STEPS / self.PARTS)
        self.shape = mean.shape[1:]
        self.total = weights[0]
        for weight in weights[1:]:
            self.total = self.total + weight

    def below(self, k: np.ndarray) -> np.ndarray:
        """The distribution function of the mixture between levels k - 1 and k."""
        mass = np.zeros(self.shape)
        for weight, part in zip(self.weights, self.parts(k), strict=True):
            part *= weight
            mass += part
        mass[k <= 0] = 0.0
        return np.where(k >= self.levels, self.total, mass)

    def parts(self, k: np.ndarray) -> Sequence[np.ndarray]:
        """The distribution function of each component there."""
        edge = k * float(self.PARTS) - self.PARTS / 2
        return [
            _read(_logistic, (edge - mean) * steep)
            for mean, steep in zip(self.mean, self.steep, strict=True)
        ]

    def masses(self, values: np.ndarray) -> np.ndarray:
        """The mass of each value in each component, shape (K, *shape)."""
        low, high = (np.stack(self.parts(values + i)) for i in (0, 1))
        low, high = np.where(values <= 0, 0.0, low), np.where(values >= self.levels - 1, 1.0, high)
        return high - low


class Bits(Bisected):
    """Zeros and ones.

    Args:
        logits: The logit of a one, integer multiples of 1 / `SHARPNESS`.
    """

    levels = 2

    def __init__(self, logits: np.ndarray):
        self.shape = logits.shape
        self.zero = logistic(logits * (-1.0 / SHARPNESS))

    def below(self, k: np.ndarray) -> np.ndarray:
        """0, the probability of a zero, and 1."""
        return np.where(k == 1, self.zero, np.where(k < 1, 0.0, 1.0))


# --- functions by tables -----------------------------------------------------------------------


def exponential(whole: np.ndarray, parts: int) -> np.ndarray:
    """exp(whole / parts), from e^-20 to e^20."""
    return _exponentials(parts)[np.clip(whole, -20 * parts, 20 * parts) + 20 * parts]


def logistic(t: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-t), from -32 to 32."""
    return _read(_logistic, t * STEPS)


def gaussian(t: np.ndarray) -> np.ndarray:
    """The normal distribution function, from -8 to 8."""
    return _read(_normal, t * STEPS)


def _read(table: Callable[[], np.ndarray], at: np.ndarray) -> np.ndarray:
    """A function by linear interpolation, `at` entries from the middle; overwrites `at`."""
    values, slopes = _lines(table)
    at += len(values) // 2
    np.clip(at, 0, len(values) - 1, out=at)
    line = at.astype(np.intp)
    at -= line
    at *= slopes[line]
    at += values[line]
    return at


@lru_cache
def _lines(table: Callable[[], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a table, and the differences to the next."""
    return table(), np.append(np.diff(table()), 0.0)


@lru_cache
def _exponentials(parts: int) -> np.ndarray:
    with decimal.localcontext(decimal.Context(prec=30)):
        step = (decimal.Decimal(1) / parts).exp()
        up = [decimal.Decimal(1)]
        for _ in range(20 * parts):
            up.append(up[-1] * step)
        return np.array([float(1 / e) for e in reversed(up[1:])] + [float(e) for e in up])


@lru_cache
def _logistic() -> np.ndarray:
    """1 / (1 + e^-t) for t from -32 to 32 in steps of 1/64."""
    with decimal.localcontext(decimal.Context(prec=30)):
        t = [decimal.Decimal(i) / 64 for i in range(-32 * 64, 32 * 64 + 1)]
        return np.array([float(1 / (1 + (-v).exp())) for v in t])


@lru_cache
def _normal() -> np.ndarray:
    """The normal distribution function from -8 to 8 in steps of 1/64, by its Taylor series."""
    with decimal.localcontext(decimal.Context(prec=50)):
        pi = decimal.Decimal("3.14159265358979323846264338327950288419716939937511")
        values = []
        for i in range(-8 * 64, 8 * 64 + 1):
            t = decimal.Decimal(i) / 64
            term, total, n = t, t, 0
            while abs(term) > decimal.Decimal("1e-45"):
                n += 1
                term = term * t * t / (2 * n + 1)
                total += term
            values.append(decimal.Decimal("0.5") + total * (-t * t / 2).exp() / (2 * pi).sqrt())
        return np.array([float(v) for v in values])
