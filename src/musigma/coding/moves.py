r"""Bijections as exact maps of whole numbers, each by a rule that costs its log-determinant.

Values lie on a grid, x = k · 2^-g, and a layer must map k to whole numbers again and lose nothing.
Reordering does. So does adding what depends on other elements, rounded: x2 + round(t(x1)), and
with it every triangular matrix with a diagonal of ones. What is left is scaling. With y = x R / S
for whole R and S,

.. math:: z = R k + r, \quad r \sim U(0..R-1); \qquad k' = \lfloor z / S \rfloor, \quad
    s = z - S k'

maps (k, r) to (k', s), one to one: r is popped off the stack and s < S is pushed, so it costs
log2(S / R) bits, which is -log2 |det| exactly. This is local bits-back coding (Ho, Lohn, Abbeel,
"Compression with Flows via Local Bits-Back Coding", 2019, arXiv:1905.08500) with uniform noise
instead of Gaussian (the uniform coder of Zhang, Zhang, McAuley, Li, "iFlow", 2021,
arXiv:2111.00965): there are no tails to lose bits in, and no noise but the last digit.

A bent map is a scaling of each of many short intervals: see `Intervals`.
"""

from __future__ import annotations

import decimal
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.coding.errors import CodingError
from musigma.coding.laws import exponential
from musigma.coding.stack import Stack
from musigma.context import conditioned
from musigma.layers import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    Checkerboard,
    Coupling,
    InvertibleConv,
    Logit,
    Permutation,
    Rescale,
    Spline,
    Squeeze,
)
from musigma.model import Bijection, Inverse

__all__ = ["MOVES", "REAL", "Move", "move"]

REAL = 12
"""The grid of real numbers after a logit."""
STEPS = 4096
"""Log scales are whole multiples of 1 / STEPS."""
PARTS = 3
"""In which the elements of a batch are scaled, so that few bits are off the stack at a time."""
SHIFT = 12
"""What networks add is a whole multiple of 2^-12, or of the grid if that is coarser."""


class Move(ABC):
    """A layer at work on one batch, in one direction.

    Args:
        layer: The bijection.
        stack: Of bits.
        whole: Rounds what networks emit: ``whole(values, scale, which)``.
        grid: Of the layer's input and of its output, data to latents.
        tensor: Makes whole numbers on a grid what networks are given.
        context: Of the batch.
    """

    def __init__(
        self,
        layer: Any,
        stack: Stack,
        whole: Callable[[Tensor, float, int], np.ndarray],
        grid: tuple[int, int],
        tensor: Callable[[np.ndarray, int], Tensor],
        context: Tensor | None,
    ):
        self.layer, self.stack, self.whole, self.context = layer, stack, whole, context
        self.below, self.above = grid
        self.tensor = tensor

    @abstractmethod
    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""

    @abstractmethod
    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data; the stack is as it was before `up`."""

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        """The grid of the output."""
        return below

    def scale(self, k: np.ndarray, by: np.ndarray, into: np.ndarray) -> np.ndarray:
        """``k * by / into``, data to latents."""
        return self._scaled(k, by, into, range(PARTS))

    def unscale(self, k: np.ndarray, by: np.ndarray, into: np.ndarray) -> np.ndarray:
        """The inverse of `scale`."""
        return self._scaled(k, into, by, reversed(range(PARTS)))

    def _scaled(
        self, k: np.ndarray, by: np.ndarray, into: np.ndarray, parts: Iterable[int]
    ) -> np.ndarray:
        if k.size and np.abs(k).max() >= 2.0**62 / max(by.max(), into.max()):
            raise OverflowError("a value is too far out to be scaled")
        if min(by.min(initial=1), into.min(initial=1)) < 1:
            raise OverflowError("an interval is narrower than the grid")
        if max(by.max(initial=1), into.max(initial=1)) > 1 << 24:
            raise OverflowError("an interval is wider than a stack takes at once")
        flat, by, into = (np.broadcast_to(a, k.shape).reshape(-1) for a in (k, by, into))
        scaled = np.empty_like(flat)
        for i in parts:
            part = slice(i * len(flat) // PARTS, (i + 1) * len(flat) // PARTS)
            z = flat[part] * by[part] + self.stack.pop(by[part])
            scaled[part] = z // into[part]
            self.stack.push(z - scaled[part] * into[part], into[part])
        return scaled.reshape(k.shape)


def ratio(log_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers up to 2^24 whose ratio is exp(log_scale / STEPS), to ten digits.

    Both are ten binary digits with zeros behind: what a `Stack` wastes nothing on.
    """
    mantissa, exponent = np.frexp(exponential(log_scale, STEPS))
    digits = np.maximum(1, np.rint(np.ldexp(mantissa, 10))).astype(np.int64)
    up = np.clip(exponent - 10, -24, 14)
    return np.left_shift(digits, np.maximum(up, 0)), np.left_shift(1, np.maximum(-up, 0))


class Reorder(Move):
    """Elements change places."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return self.layer(torch.from_numpy(x))[0].numpy()

    def down(self, y: np.ndarray) -> np.ndarray:
        return self.layer.inverse(torch.from_numpy(y))[0].numpy()


class Units(Move):
    """A fixed change of units: of the grid, where that is all, so that nothing happens at all."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return self._sign() * x + self._shift()

    def down(self, y: np.ndarray) -> np.ndarray:
        return self._sign() * (y - self._shift())

    def _sign(self) -> int:
        return 1 if self.layer.scale > 0 else -1

    def _shift(self) -> int:
        return int(self.layer.shift * 2**self.above)

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        mantissa, exponent = math.frexp(abs(layer.scale))
        above = below + 1 - exponent
        if mantissa != 0.5 or not (layer.shift * 2.0**above).is_integer():
            raise ValueError(
                f"Rescale(scale={layer.scale}, shift={layer.shift}) has no coding rule: its scale "
                "must be a power of two, and its shift on the grid of its output"
            )
        return above


class PerChannel(Move):
    """ActNorm: a shift and a scale for each channel."""

    def up(self, x: np.ndarray) -> np.ndarray:
        shift, by, into = self._constants(x.ndim)
        return self.scale(x + shift, by, into)

    def down(self, y: np.ndarray) -> np.ndarray:
        shift, by, into = self._constants(y.ndim)
        return self.unscale(y, by, into) - shift

    def _constants(self, ndim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = (1, -1, *(1,) * (ndim - 2))
        shift = fixed(self.layer.bias, 2.0**self.above).reshape(shape)
        by, into = ratio(fixed(self.layer.log_scale, STEPS).reshape(shape))
        return shift, by, into


def fixed(parameter: Tensor, scale: float) -> np.ndarray:
    """A parameter, rounded: it is the same in both directions.

    Raises:
        CodingError: If it is not finite.
        OverflowError: If it is larger than 2^52.
    """
    scaled = parameter.detach().double().cpu().numpy() * scale
    if not np.isfinite(scaled).all():
        raise CodingError("the model has a parameter that is not finite, or a singular matrix")
    if (np.abs(scaled) >= 2.0**52).any():
        raise OverflowError("a parameter of the model is further out than whole numbers reach")
    return np.rint(scaled).astype(np.int64)


class Mix(Move):
    """An invertible 1x1 convolution, W = P L D U: two triangles of ones, and a scale between."""

    PARTS = 2.0**20

    def up(self, x: np.ndarray) -> np.ndarray:
        order, lower, by, into, sign, upper = self._factors(x.ndim)
        x = x + self._times(upper, x)
        x = self.scale(x * sign, by, into)
        return (x + self._times(lower, x))[:, order]

    def down(self, y: np.ndarray) -> np.ndarray:
        order, lower, by, into, sign, upper = self._factors(y.ndim)
        x = y[:, order.argsort()].copy()
        for c in range(1, x.shape[1]):
            x[:, c] -= self._times(lower[c : c + 1, :c], x[:, :c])[:, 0]
        x = self.unscale(x, by, into) * sign
        for c in reversed(range(x.shape[1] - 1)):
            x[:, c] -= self._times(upper[c : c + 1, c + 1 :], x[:, c + 1 :])[:, 0]
        return x

    def _times(self, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
        """``matrix @ x`` at every pixel, rounded: sums of whole numbers that float64 holds."""
        if x.size and np.abs(x).max() * np.abs(matrix).sum(1).max(initial=0) >= 2.0**52:
            raise OverflowError("a value is too far out to be mixed")
        flat = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64)
        sums = flat @ matrix.T
        whole = np.floor((sums + self.PARTS / 2) / self.PARTS).astype(np.int64)
        return np.moveaxis(whole.reshape(len(x), *x.shape[2:], len(matrix)), -1, 1)

    def _factors(self, ndim: int) -> tuple[np.ndarray, ...]:
        layer, shape = self.layer, (1, -1, *(1,) * (ndim - 2))
        if layer.lu:
            diagonal = layer.log_scale.detach().double().cpu()
            order, lower = layer.permutation.argmax(1).cpu().numpy(), layer.lower.double().cpu()
            sign, upper = layer.sign.double().cpu(), layer.upper.double().cpu()
        else:
            order, lower, upper = triangles(layer.weight.detach().double().cpu().numpy())
            sign, diagonal = upper.diagonal().sign(), upper.diagonal().abs().log()
        above = upper.triu(1) / (sign * diagonal.exp())[:, None]
        return (
            order,
            fixed(lower.tril(-1), self.PARTS).astype(np.float64),
            *ratio(fixed(diagonal, STEPS).reshape(shape)),
            fixed(sign, 1).reshape(shape),
            fixed(above, self.PARTS).astype(np.float64),
        )


def triangles(matrix: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
    """Order, L and U, matrix = (L U)[order], by single operations: the same on any machine."""
    lu, rows = matrix.copy(), np.arange(len(matrix))
    with np.errstate(all="ignore"):  # a singular matrix is found by its diagonal
        for i in range(len(lu)):
            best = i + int(np.abs(lu[i:, i]).argmax())
            lu[[i, best]], rows[[i, best]] = lu[[best, i]], rows[[best, i]]
            lu[i + 1 :, i] /= lu[i, i]
            lu[i + 1 :, i + 1 :] -= lu[i + 1 :, i, None] * lu[i, None, i + 1 :]
    return rows.argsort(), torch.from_numpy(np.tril(lu, -1)), torch.from_numpy(np.triu(lu))


class Couple(Move):
    """One half of the channels moves the other."""

    def up(self, x: np.ndarray) -> np.ndarray:
        first, second, move = self._halves(x)
        return np.concatenate([first, move.up(second)], 1)

    def down(self, y: np.ndarray) -> np.ndarray:
        first, second, move = self._halves(y)
        return np.concatenate([first, move.down(second)], 1)

    def _halves(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, Elements]:
        half = x.shape[1] // 2
        given = self.tensor(x[:, :half], self.below)
        h = conditioned(self.layer.net, given, self.context)
        return x[:, :half], x[:, half:], Elements(self, h)


class Elements:
    """What a network's output does to each element, by the layer's map."""

    def __init__(self, move: Move, h: Tensor, at: int = 0):
        self.move, self.h, self.map = move, h, move.layer.map
        fine = min(move.below, SHIFT)
        self.at, self.intervals = at, None
        if isinstance(self.map, Spline):
            self.intervals = Intervals(move, self._spline, self._spline_back, at)
            return
        shift, log_scale = h, None
        if isinstance(self.map, Affine):
            shift, log_scale = self.map.format.split(h)
        elif not isinstance(self.map, Additive):
            raise ValueError(
                f"{type(self.map).__name__} has no coding rule; there are rules for the maps "
                "Additive, Affine and Spline"
            )
        self.shift = np.left_shift(move.whole(shift, 2.0**fine, at), move.below - fine)
        self.ratio = None if log_scale is None else ratio(move.whole(log_scale, STEPS, at + 1))

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""
        if self.intervals:
            return self.intervals.up(x)
        x = x + self.shift
        return x if self.ratio is None else self.move.scale(x, *self.ratio)

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        if self.intervals:
            return self.intervals.down(y)
        if self.ratio is not None:
            y = self.move.unscale(y, *self.ratio)
        return y - self.shift

    def _spline(self, x: Tensor) -> Tensor:
        return self.map.forward(x, self.h)[0]

    def _spline_back(self, y: Tensor) -> Tensor:
        return self.map.inverse(y, self.h)[0]


class Intervals:
    """A rising map of each element, straight on intervals of 1/32 of its output.

    An interval of R numbers of the output stands for the S numbers of the input that lie between
    the preimages of its ends; numbers are scaled from the one to the other by `Move.scale`.

    Args:
        move: The layer at work.
        forward: The map, of tensors of x's shape.
        inverse: Its inverse.
        at: Which parameters of the layer these are.
    """

    WIDTH = 5

    def __init__(
        self,
        move: Move,
        forward: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
        at: int,
    ):
        self.move, self.forward, self.inverse, self.at = move, forward, inverse, at
        self.size = 1 << (move.above - self.WIDTH)

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""
        real = torch.from_numpy(x * 2.0**-self.move.below)
        i = np.floor(self.forward(real).double().numpy() * 2.0**self.WIDTH).astype(np.int64)
        for _ in range(4):  # rounded ends may lie on another side than the map says
            low, high = self._ends(i)
            off = np.where(x < low, -1, np.where(x >= high, 1, 0))
            if not off.any():
                break
            i = i + off
        else:
            raise OverflowError("a map is too steep for its grid")
        sizes = np.full(x.shape, self.size)
        return i * self.size + self.move.scale(x - low, sizes, high - low)

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        i = y // self.size
        low, high = self._ends(i)
        sizes = np.full(y.shape, self.size)
        return low + self.move.unscale(y - i * self.size, sizes, high - low)

    def _ends(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = []
        for j in (0, 1):
            real = torch.from_numpy((i + j) * 2.0**-self.WIDTH)
            ends.append(self.move.whole(self.inverse(real), 2.0**self.move.below, self.at + j))
        return ends[0], ends[1]


class Bend(Move):
    """A logit: one map for all elements, so its intervals are a table."""

    def up(self, x: np.ndarray) -> np.ndarray:
        ends, images = self._table()
        i = np.searchsorted(ends, x, side="right") - 1
        if not ((i >= 0) & (i < len(ends) - 1)).all():
            raise OverflowError("a value lies outside of what a logit takes, or gives")
        sizes = images[i + 1] - images[i]
        return images[i] + self.scale(x - ends[i], sizes, ends[i + 1] - ends[i])

    def down(self, y: np.ndarray) -> np.ndarray:
        ends, images = self._table()
        i = np.searchsorted(images, y, side="right") - 1
        if not ((i >= 0) & (i < len(ends) - 1)).all():
            raise OverflowError("a value lies outside of what a logit takes, or gives")
        sizes = images[i + 1] - images[i]
        return ends[i] + self.unscale(y - images[i], sizes, ends[i + 1] - ends[i])

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        return _logit_table(self.layer.alpha, self.below, self.above)

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        return REAL


@lru_cache
def _logit_table(alpha: float, below: int, above: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals of [0, 1] and their images, on their grids, each one number at least."""
    with decimal.localcontext(decimal.Context(prec=40)):
        last = 0
        a = decimal.Decimal(alpha)
        reach = math.ceil(float((1 / a - 1).ln()) * 2**Intervals.WIDTH)
        ends, images = [0], [-reach]
        for i in range(1 - reach, reach):
            t = decimal.Decimal(i) / 2**Intervals.WIDTH
            u = (1 / (1 + (-t).exp()) - a) / (1 - 2 * a)
            exact = int((u * 2**below).to_integral_value())
            coarse = max(0, (exact - last).bit_length() - 10)  # see `ratio`
            end, last = (exact >> coarse) << coarse, exact
            if ends[-1] < end < 1 << below:
                ends.append(end)
                images.append(i)
    ends.append(1 << below)
    images.append(reach)
    return np.array(ends), np.array(images) << (above - Intervals.WIDTH)


class InTurn(Move):
    """An autoregressive layer: each feature moves by those before it."""

    def up(self, x: np.ndarray) -> np.ndarray:
        given, outputs = self.tensor(x, self.below), []

        def fill(i: int, h: Tensor) -> Tensor:
            outputs.append(h)
            return given[:, i : i + 1]

        self.layer.net.unroll(fill, given, self.context)  # one pass would round otherwise
        y = x.copy()
        for i in reversed(range(x.shape[1])):
            y[:, i : i + 1] = Elements(self, outputs[i], 2 * i).up(x[:, i : i + 1])
        return y

    def down(self, y: np.ndarray) -> np.ndarray:
        x = y.copy()

        def fill(i: int, h: Tensor) -> Tensor:
            x[:, i : i + 1] = Elements(self, h, 2 * i).down(y[:, i : i + 1])
            return self.tensor(x[:, i : i + 1], self.below)

        self.layer.net.unroll(fill, self.tensor(y, self.below), self.context)
        return x


MOVES: dict[type[Bijection], type[Move]] = {
    ActNorm: PerChannel,
    Autoregressive: InTurn,
    Checkerboard: Reorder,
    Coupling: Couple,
    InvertibleConv: Mix,
    Logit: Bend,
    Permutation: Reorder,
    Rescale: Units,
    Squeeze: Reorder,
}
"""The rule of each bijection that has one; an `Inverse` has that of what it inverts."""


def move(layer: Bijection) -> tuple[type[Move], Bijection, bool]:
    """The rule of a layer, the layer that it is of, and whether it is that one's inverse.

    Raises:
        ValueError: If there is none.
    """
    inverted = False
    while isinstance(layer, Inverse):
        layer, inverted = layer.bijection, not inverted
    if type(layer) not in MOVES:
        known = ", ".join(sorted(kind.__name__ for kind in MOVES))
        raise ValueError(
            f"{type(layer).__name__} has no coding rule; there are rules for {known}: replace it "
            "by one of those, or score with it and compress with another model"
        )
    return MOVES[type(layer)], layer, inverted
