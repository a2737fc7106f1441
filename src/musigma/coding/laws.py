r"""Distributions of whole numbers, coded by yes-or-no decisions along their distribution function.

A law knows how much of its mass lies below k, for k = 0 .. 2^depth. A value is found by halving:
is it in the upper half? each answer is a bit whose probability is a ratio of two masses,

.. math:: P(\text{upper}) = \frac{C(high) - C(middle)}{C(high) - C(low)},

rounded to a whole number of 2^-22 parts. So one rule codes every law to within 10^-5 of its
entropy, at `depth` bits a value, with no tables of masses.

Encoder and decoder must find the same bits on any machine. So parameters arrive as whole numbers,
functions are read off tables that are computed in decimal arithmetic, and everything between is
one correctly rounded operation at a time.
"""

from __future__ import annotations

import decimal
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from musigma.coding.stack import ONE, Stack

__all__ = ["Bits", "Halved", "Law", "Mixture", "Normal", "Weights", "exponential", "gaussian"]

STEPS = 64.0
"""Lines of a table to one."""
SHARPNESS = 128
"""Logarithms of scales are whole multiples of 1 / SHARPNESS."""


class Law(ABC):
    """Laws of many whole numbers at once, of a shape."""

    shape: tuple[int, ...]

    @abstractmethod
    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push values, of this shape.

        Raises:
            ValueError: If there is one that the law does not have.
        """

    @abstractmethod
    def pop(self, stack: Stack) -> np.ndarray:
        """Pop values, int64, of this shape.

        Raises:
            musigma.coding.stack.Exhausted: If the stack holds too little.
        """


class Halved(Law):
    """Levels 0 .. levels - 1, by a distribution function that can be asked anywhere."""

    levels: int

    @abstractmethod
    def below(self, k: np.ndarray) -> np.ndarray:
        """The mass below level k, up to a factor: rising in k, float64; all from `levels` on."""

    def push(self, stack: Stack, values: np.ndarray) -> None:
        """Push levels."""
        if not ((values >= 0) & (values < self.levels)).all():
            raise ValueError(f"values: expected levels 0 to {self.levels - 1}")
        decisions: list[tuple[np.ndarray, np.ndarray]] = []

        def look(middle: np.ndarray, ones: np.ndarray) -> np.ndarray:
            decisions.append((values >= middle, ones))
            return decisions[-1][0]

        self._halve(look)
        for answer in reversed(decisions):
            stack.push_bits(*answer)

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop levels."""
        return self._halve(lambda _, ones: stack.pop_bits(ones))

    def _halve(self, ask: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        low, half = np.zeros(self.shape, np.int64), 1 << (self.levels - 1).bit_length()
        under, over = np.zeros(self.shape), self.below(low + half)
        while half := half >> 1:
            middle = low + half
            between = self.below(middle)
            yes = ask(middle, _share(over - between, over - under))
            low = np.where(yes, middle, low)
            under, over = np.where(yes, between, under), np.where(yes, over, between)
        return low


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A probability in parts of `ONE`, never 0 or 1: a half where the whole is nothing."""
    share = np.divide(part, whole, out=np.full(part.shape, 0.5), where=whole > 0)
    return np.clip(np.rint(share * ONE), 1, ONE - 1)


class Normal(Law):
    """Whole numbers about a mean, as a Gaussian has them.

    A value is found by halving 1,024 cells, of which 32 to 64 make up a standard deviation (or
    which are the numbers themselves, if that is less than 32); within a cell all are alike.

    Args:
        mean: Whole numbers.
        log_std: Logarithms of the standard deviations, as multiples of 1 / `SHARPNESS`.
        wide: Whether values beyond the cells, which reach 8 standard deviations at least, can
            come: at 45 bits each, and 10^-6 bits for all others. A value that is popped though
            it was not pushed, as a draw is, must not: a wild one would cost more than it gains.
            So none beyond 8 standard deviations is, whatever the cells reach.
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
        """Push whole numbers; any, if `wide`, that are less than 2^23 cells away.

        Raises:
            OverflowError: If `wide`, and one is further away.
        """
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
            raise ValueError("values: expected some within 8 standard deviations")
        near = ~beyond
        cells, rows = cells[near], self.row[near]
        nodes = [(1 << d) + (cells >> (self.HALVINGS - d)) for d in range(self.HALVINGS)]
        yes = [cells >> (self.HALVINGS - 1 - d) & 1 for d in range(self.HALVINGS)]
        if len(cells):
            answers, ones = np.stack(yes), self.table[rows, np.stack(nodes)]
            open_ = _open(ones)
            if (answers != (ones > 0))[~open_].any():
                raise ValueError("values: expected some within 8 standard deviations")
            stack.push_bits(answers[open_], ones[open_])
        if self.wide:
            stack.push_bits(beyond, np.full(self.shape, FAR))

    def pop(self, stack: Stack) -> np.ndarray:
        """Pop whole numbers."""
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
    """Which decisions are none already."""
    return (ones > 0) & (ones < ONE)


FAR = 4.0
"""The probability, in parts of `ONE`, that a value of a wide `Normal` lies beyond its cells."""


def _cell(log_std: int) -> int:
    """The logarithm, to base 2, of how many numbers a cell has."""
    std = float(exponential(np.array(log_std), SHARPNESS))
    return max(0, math.frexp(std)[1] - 6)


@lru_cache(maxsize=8192)
def _decisions(log_std: int, wide: bool) -> np.ndarray:
    """The probability of the upper half at each node; the children of node n are 2n and 2n + 1.

    Unless `wide`, halves beyond 8 standard deviations have none: one in a million is too many.
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


class Weights(Halved):
    """Levels with a logarithm of the weight of each.

    Args:
        logits: Whole multiples of 1 / `SHARPNESS`, shape (B, levels, ...).
    """

    def __init__(self, logits: np.ndarray):
        weights = np.moveaxis(exponential(logits - logits.max(1, keepdims=True), SHARPNESS), 1, -1)
        self.levels, self.shape = weights.shape[-1], weights.shape[:-1]
        self.sums = np.zeros((*self.shape, self.levels + 1))
        np.cumsum(weights + 1e-12, -1, out=self.sums[..., 1:])

    def below(self, k: np.ndarray) -> np.ndarray:
        """Sums of weights."""
        at = np.minimum(k, self.levels)[..., None]
        return np.take_along_axis(self.sums, at, -1)[..., 0]


class Mixture(Halved):
    """Levels as a mixture of logistic distributions has them, the ends with what lies beyond.

    Args:
        weights: Of each component, shape (K, *shape).
        mean: In 256ths of a level, whole numbers, of the same shape.
        inverse: 1 / scale, in levels, of the same shape.
        levels: How many there are.
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
        """The mixture's distribution function between levels k - 1 and k."""
        mass = np.zeros(self.shape)
        for weight, part in zip(self.weights, self.parts(k), strict=True):
            part *= weight
            mass += part
        mass[k <= 0] = 0.0
        return np.where(k >= self.levels, self.total, mass)

    def parts(self, k: np.ndarray) -> Sequence[np.ndarray]:
        """The components' distribution functions there."""
        edge = k * float(self.PARTS) - self.PARTS / 2
        return [
            _read(_logistic, (edge - mean) * steep)
            for mean, steep in zip(self.mean, self.steep, strict=True)
        ]

    def masses(self, values: np.ndarray) -> np.ndarray:
        """The mass of each value in each component, (K, *shape)."""
        low, high = (np.stack(self.parts(values + i)) for i in (0, 1))
        low, high = np.where(values <= 0, 0.0, low), np.where(values >= self.levels - 1, 1.0, high)
        return high - low


class Bits(Halved):
    """Zeros and ones.

    Args:
        logits: Of a one, whole multiples of 1 / `SHARPNESS`.
    """

    levels = 2

    def __init__(self, logits: np.ndarray):
        self.shape = logits.shape
        self.zero = logistic(logits * (-1.0 / SHARPNESS))

    def below(self, k: np.ndarray) -> np.ndarray:
        """0, the probability of a zero, 1."""
        return np.where(k == 1, self.zero, np.where(k < 1, 0.0, 1.0))


# --- functions, from tables --------------------------------------------------------------------


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
    """A function off its table, at so many lines from the middle; `at` is written over."""
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
    """Where the lines of a table begin, and how much they rise."""
    return table(), np.append(np.diff(table()), 0.0)


def _decimals() -> decimal.Context:
    return decimal.Context(prec=30)


@lru_cache
def _exponentials(parts: int) -> np.ndarray:
    with decimal.localcontext(_decimals()):
        step = (decimal.Decimal(1) / parts).exp()
        up = [decimal.Decimal(1)]
        for _ in range(20 * parts):
            up.append(up[-1] * step)
        return np.array([float(1 / e) for e in reversed(up[1:])] + [float(e) for e in up])


@lru_cache
def _logistic() -> np.ndarray:
    """1 / (1 + e^-t) for t from -32 to 32 in steps of 1/64."""
    with decimal.localcontext(_decimals()):
        step, value, upper = (decimal.Decimal(1) / 64).exp(), decimal.Decimal(1), []
        for _ in range(32 * 64 + 1):
            upper.append(value)
            value = value / step
        rising = [e / (1 + e) for e in reversed(upper)] + [1 / (1 + e) for e in upper[1:]]
        return np.array([float(v) for v in rising])


@lru_cache
def _normal() -> np.ndarray:
    """The normal distribution function from -8 to 8 in steps of 1/64, by its Taylor series."""
    with decimal.localcontext(decimal.Context(prec=50)):
        pi = decimal.Decimal("3.14159265358979323846264338327950288419716939937511")
        lower = []
        for i in range(8 * 64 + 1):
            t = decimal.Decimal(i) / 64
            term, total, n = t, t, 0
            while abs(term) > decimal.Decimal("1e-45"):
                n += 1
                term = term * t * t / (2 * n + 1)
                total += term
            above = decimal.Decimal("0.5") - total * (-t * t / 2).exp() / (2 * pi).sqrt()
            lower.append(above)
        rising = [*reversed(lower), *(1 - v for v in lower[1:])]
        return np.array([float(v) for v in rising])
