r"""Bijections as exact maps of integers, each at the cost of its log-determinant.

Values lie on a grid, x = k · 2^-g, and a layer must map integers k to integers without loss.
Reordering does. Adding a rounded function of other elements does too, x2 + round(t(x1)), and with
it every triangular matrix with a diagonal of ones. Only scaling remains. For y = x R / S with
integers R and S,

.. math:: z = R k + r, \quad r \sim U(0..R-1); \qquad k' = \lfloor z / S \rfloor, \quad
    s = z - S k'

maps (k, r) to (k', s), one to one: r is popped off the stack and s < S is pushed, which costs
log2(S / R) bits: exactly -log2 |det|. This is local bits-back coding (Ho, Lohn, Abbeel,
"Compression with Flows via Local Bits-Back Coding", 2019, arXiv:1905.08500) with uniform instead
of Gaussian noise (the uniform coder of Zhang, Zhang, McAuley, Li, "iFlow", 2021,
arXiv:2111.00965): uniform noise has no tails in which bits are lost.

A nonlinear map is a scaling of each of many short intervals: see `Intervals`.
"""

from __future__ import annotations

import decimal
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from musigma import layers
from musigma.coding.errors import CodingError
from musigma.coding.laws import exponential
from musigma.coding.stack import Stack
from musigma.context import conditioned

__all__ = ["Increasing", "Intervals", "MapRule", "Rule", "register", "rule_of"]

REAL = 12
"""The grid of real numbers after a logit: 2^-12."""
STEPS = 4096
"""Log scales are integer multiples of 1 / STEPS."""
PARTS = 3
"""The elements of a batch are scaled in this many parts, to pop few bits at a time."""
SHIFT = 12
"""Outputs of networks that are added are multiples of 2^-12, or of the grid if it is coarser."""


R = TypeVar("R", bound=Callable[..., Any])
_RULES: dict[type, Any] = {}


def register(kind: type) -> Callable[[R], R]:
    """Register how objects of a type are coded; a decorator of the rule.

    A rule may be defined in any file. There are three kinds:

    - The rule of a `Bijection` is a subclass of `Rule`, which maps integers to integers exactly.
    - The rule of a map (the ``map`` of a `Coupling`, an `Autoregressive` or an `Elementwise`) is
      a subclass of `MapRule`. `Intervals` serves every increasing map.
    - The rule of a distribution is a function ``rule(dist, quantizer)`` that returns a
      `musigma.coding.laws.Law`; a `Quantizer` turns parameters into integers.

    Models, and layers that draw and score (dequantization, splits), need no rule: what they draw,
    score and transform is coded by the rules above.

    A subclass shares the rule of its base class if it redefines nothing but `__init__`. Otherwise
    it needs a rule of its own.

    Args:
        kind: The type. A rule that it already has is replaced.

    Example:
        >>> import torch
        >>> from musigma import coding
        >>> from musigma.model import Bijection
        >>> class Flip(Bijection):
        ...     def forward(self, x, context=None):
        ...         return -x, x.new_zeros(len(x))
        ...     inverse = forward
        >>> @coding.register(Flip)
        ... class FlipRule(coding.Rule):
        ...     def up(self, x):
        ...         return -x
        ...     down = up
    """

    def decorate(rule: R) -> R:
        _RULES[kind] = rule
        return rule

    return decorate


def rule_of(subject: object) -> Any:
    """The rule of an object, by its type."""
    kind = type(subject)
    base, reason = next((base for base in kind.__mro__ if base in _RULES), None), ""
    if base is not None:
        redefined = _redefined(kind, base)
        if not redefined:
            return _RULES[base]
        reason = f": it redefines {', '.join(redefined)} of {base.__name__}"
    raise ValueError(
        f"{kind.__name__} has no coding rule{reason}; register one with "
        f"@musigma.coding.register({kind.__name__}), or use a model whose parts have one "
        "(docs/compression.md lists them)"
    )


def _redefined(kind: type, base: type) -> list[str]:
    """Attributes of a base class that classes between it and a subclass redefine."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    names = {name for cls in between for name in vars(cls) if hasattr(base, name)}
    harmless = {"extra_repr", "_abc_impl", "_is_protocol"}  # of which Python sets two itself
    return sorted(
        name for name in names - harmless if name == "__call__" or not name.startswith("__")
    )


class Rule(ABC):
    """How one batch of integers passes a bijection, exactly, in both directions.

    A subclass implements `up` and `down`, by integer operations, `scale`, `unscale` and the stack;
    and `grid_above` if the layer changes the grid. `musigma.coding.register` registers it.

    Attributes:
        layer: The bijection.
        stack: The bits.
        integers: ``integers(values, scale, which)``: ``values * scale``, rounded, for what
            networks emit. `which` tells the parameters of one layer apart: 0, 1, ...
        below: g of the grid 2^-g of the layer's input, data to latents.
        above: That of its output.
        tensor: ``tensor(integers, g)``: the numbers k · 2^-g, as networks take them.
        context: The context of the batch, or None.
    """

    def __init__(
        self,
        layer: Any,
        stack: Stack,
        integers: Callable[[Tensor, float, int], np.ndarray],
        grid: tuple[int, int],
        tensor: Callable[[np.ndarray, int], Tensor],
        context: Any,
    ):
        self.layer, self.stack, self.integers, self.context = layer, stack, integers, context
        self.below, self.above = grid
        self.tensor = tensor

    @abstractmethod
    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents: int64 to int64."""

    @abstractmethod
    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data; leaves the stack as it was before `up`."""

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        """The grid of the output, for an input on the grid `below`."""
        return below

    def scale(self, k: np.ndarray, by: np.ndarray, into: np.ndarray) -> np.ndarray:
        """``k * by / into``, data to latents; OverflowError if a value or a ratio is too large."""
        return self._scaled(k, by, into, range(PARTS))

    def unscale(self, k: np.ndarray, by: np.ndarray, into: np.ndarray) -> np.ndarray:
        """The inverse of `scale`."""
        return self._scaled(k, into, by, reversed(range(PARTS)))

    def _scaled(
        self, k: np.ndarray, by: np.ndarray, into: np.ndarray, parts: Iterable[int]
    ) -> np.ndarray:
        if k.size and np.abs(k).max() >= 2.0**62 / max(by.max(), into.max()):
            raise OverflowError("a value is too large to be scaled")
        if min(by.min(initial=1), into.min(initial=1)) < 1:
            raise OverflowError("an interval is narrower than the grid")
        if max(by.max(initial=1), into.max(initial=1)) > 1 << 24:
            raise OverflowError("an interval is wider than 2^24 steps of the grid")
        flat, by, into = (np.broadcast_to(a, k.shape).reshape(-1) for a in (k, by, into))
        scaled = np.empty_like(flat)
        for i in parts:
            part = slice(i * len(flat) // PARTS, (i + 1) * len(flat) // PARTS)
            z = flat[part] * by[part] + self.stack.pop(by[part])
            scaled[part] = z // into[part]
            self.stack.push(z - scaled[part] * into[part], into[part])
        return scaled.reshape(k.shape)


def ratio(log_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers up to 2^24 whose ratio is exp(log_scale / STEPS), to ten binary digits.

    Both are ten digits followed by zeros, on which a `Stack` loses nothing.
    """
    mantissa, exponent = np.frexp(exponential(log_scale, STEPS))
    digits = np.maximum(1, np.rint(np.ldexp(mantissa, 10))).astype(np.int64)
    up = np.clip(exponent - 10, -24, 14)
    return np.left_shift(digits, np.maximum(up, 0)), np.left_shift(1, np.maximum(-up, 0))


def fixed(parameter: Tensor, scale: float) -> np.ndarray:
    """A parameter of the model times `scale`, rounded: the same in both directions."""
    scaled = parameter.detach().double().cpu().numpy() * scale
    if not np.isfinite(scaled).all():
        raise CodingError("the model has a parameter that is not finite, or a singular matrix")
    if (np.abs(scaled) >= 2.0**52).any():
        raise OverflowError("a parameter of the model is too large for integers")
    return np.rint(scaled).astype(np.int64)


# --- maps of single elements -------------------------------------------------------------------


class MapRule(ABC):
    """How a map of single elements acts on integers, within the rule of the layer that owns it.

    Args:
        rule: The rule of the layer.
        map: The map.
        h: The parameters, as the layer's network emits them.
        which: The number of the first of these parameters, for `Rule.integers`; the rule may use
            this and the next one.
    """

    def __init__(self, rule: Rule, map: Any, h: Any, which: int = 0):
        self.rule, self.map, self.h, self.which = rule, map, h, which

    @abstractmethod
    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""

    @abstractmethod
    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""

    def shift(self, shift: Tensor) -> np.ndarray:
        """A shift as integers on the grid of the input."""
        fine = min(self.rule.below, SHIFT)
        return np.left_shift(
            self.rule.integers(shift, 2.0**fine, self.which), self.rule.below - fine
        )


@register(layers.Additive)
class AdditiveRule(MapRule):
    """A shift."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return x + self.shift(self.h)

    def down(self, y: np.ndarray) -> np.ndarray:
        return y - self.shift(self.h)


@register(layers.IntegerShift)
class IntegerShiftRule(AdditiveRule):
    """A shift by whole numbers."""

    def shift(self, shift: Tensor) -> np.ndarray:
        """The shift, rounded, on the grid of the input."""
        return np.left_shift(
            self.rule.integers(shift, self.map.scale, self.which), self.rule.below
        )


@register(layers.Affine)
class AffineRule(MapRule):
    """A shift and a scale."""

    def up(self, x: np.ndarray) -> np.ndarray:
        shift, ratio = self._read()
        return self.rule.scale(x + shift, *ratio)

    def down(self, y: np.ndarray) -> np.ndarray:
        shift, ratio = self._read()
        return self.rule.unscale(y, *ratio) - shift

    def _read(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        shift, log_scale = self.map.format.split(self.h)
        return self.shift(shift), ratio(self.rule.integers(log_scale, STEPS, self.which + 1))


@register(layers.Spline)
class Intervals(MapRule):
    """Any increasing map, approximated by straight lines on intervals of 1/32 of its output.

    An interval of R integers of the output stands for the S integers of the input that lie
    between the preimages of its ends, and is mapped to them by `Rule.scale`. Register it for a
    map of your own: ``register(MyMap)(Intervals)``.
    """

    WIDTH = 5

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents; OverflowError if the map is too steep for its grid."""
        real = torch.from_numpy(x * 2.0**-self.rule.below)
        y = self.map.forward(real, self.h)[0].double().numpy()
        i = np.floor(y * 2.0**self.WIDTH).astype(np.int64)
        for _ in range(4):  # a rounded end may lie on the other side of x
            low, high = self._ends(i)
            off = np.where(x < low, -1, np.where(x >= high, 1, 0))
            if not off.any():
                break
            i = i + off
        else:
            raise OverflowError("a map is too steep for its grid")
        size, sizes = self._sizes(x)
        return i * size + self.rule.scale(x - low, sizes, high - low)

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        size, sizes = self._sizes(y)
        i = y // size
        low, high = self._ends(i)
        return low + self.rule.unscale(y - i * size, sizes, high - low)

    def _sizes(self, like: np.ndarray) -> tuple[int, np.ndarray]:
        size = 1 << (self.rule.above - self.WIDTH)
        return size, np.full(like.shape, size)

    def _ends(self, i: np.ndarray) -> list[np.ndarray]:
        ends = []
        for j in (0, 1):
            real = torch.from_numpy((i + j) * 2.0**-self.WIDTH)
            x = self.map.inverse(real, self.h)[0]
            ends.append(self.rule.integers(x, 2.0**self.rule.below, self.which + j))
        return ends


for _map in (
    layers.Bernstein,
    layers.CircularSpline,
    layers.Composed,
    layers.CubicSpline,
    layers.DeepSigmoid,
    layers.LinearSpline,
    layers.MixtureGaussianCDF,
    layers.MixtureLogisticCDF,
    layers.QuadraticSpline,
    layers.SumOfSquares,
    layers.UMNN,
):
    register(_map)(Intervals)


class Mapped(Rule):
    """A layer with a map of single elements, which has a rule of its own."""

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        rule_of(layer.map)  # refuses a map without a rule, by name
        return below

    def map(self, h: Tensor, which: int = 0) -> MapRule:
        return rule_of(self.layer.map)(self, self.layer.map, h, which)


@register(layers.Coupling)
class CouplingRule(Mapped):
    """The first half of the channels transforms the second."""

    def up(self, x: np.ndarray) -> np.ndarray:
        first, second, map = self._halves(x)
        return np.concatenate([first, map.up(second)], 1)

    def down(self, y: np.ndarray) -> np.ndarray:
        first, second, map = self._halves(y)
        return np.concatenate([first, map.down(second)], 1)

    def _halves(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, MapRule]:
        first, second = np.split(x, self.layer.sizes(x.shape[1])[:1], 1)
        h = conditioned(self.layer.net, self.tensor(first, self.below), self.context)
        return first, second, self.map(h)


@register(layers.Autoregressive)
class AutoregressiveRule(Mapped):
    """Each step is transformed by those before it, one after the other in both directions.

    Data to latents could take one pass of the network, but that would round differently.
    """

    def up(self, x: np.ndarray) -> np.ndarray:
        given, outputs = self.tensor(x, self.below), []
        steps = given.flatten(2) if x.ndim > 2 else given

        def fill(i: int, h: Tensor) -> Tensor:
            outputs.append(h)
            return steps[..., i : i + 1]

        self.layer.net.unroll(fill, given, self.context)
        y = x.reshape(*steps.shape).copy()
        for i in reversed(range(y.shape[-1])):
            y[..., i : i + 1] = self.map(outputs[i], 2 * i).up(y[..., i : i + 1])
        return y.reshape(x.shape)

    def down(self, y: np.ndarray) -> np.ndarray:
        x = (y.reshape(*y.shape[:2], -1) if y.ndim > 2 else y).copy()

        def fill(i: int, h: Tensor) -> Tensor:
            x[..., i : i + 1] = self.map(h, 2 * i).down(x[..., i : i + 1])
            return self.tensor(x[..., i : i + 1], self.below)

        self.layer.net.unroll(fill, self.tensor(y, self.below), self.context)
        return x.reshape(y.shape)


@register(layers.Elementwise)
class ElementwiseRule(Mapped):
    """A map with learned constants as parameters."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return self.map(self._constants(x)).up(x)

    def down(self, y: np.ndarray) -> np.ndarray:
        return self.map(self._constants(y)).down(y)

    def _constants(self, x: np.ndarray) -> Tensor:
        return self.layer.parameters_for(self.tensor(x, self.below), self.context)


class Increasing(Rule):
    """Any bijection that maps each element by an increasing function, by `Intervals`.

    It is registered for no layer of this library; ``register(MyLayer)(Increasing)``.
    """

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""
        return Intervals(self, self, None).up(x)

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        return Intervals(self, self, None).down(y)

    def forward(self, x: Tensor, h: None) -> tuple[Tensor, Tensor]:
        """The layer as a map."""
        return self.layer(x, self.context)

    def inverse(self, y: Tensor, h: None) -> tuple[Tensor, Tensor]:
        """Its inverse."""
        return self.layer.inverse(y, self.context)

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        """The grid of the input, or that of real numbers if it is finer."""
        return max(below, REAL)


# --- other layers ------------------------------------------------------------------------------


@register(layers.Checkerboard)
@register(layers.Flip)
@register(layers.Permutation)
@register(layers.Squeeze)
class Reordering(Rule):
    """A rule for layers that reorder elements."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return self.layer(torch.from_numpy(x))[0].numpy()

    def down(self, y: np.ndarray) -> np.ndarray:
        return self.layer.inverse(torch.from_numpy(y))[0].numpy()


@register(layers.Rescale)
class RescaleRule(Rule):
    """A change of the grid, which costs nothing, a sign and a shift."""

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


@register(layers.ActNorm)
class ActNormRule(Rule):
    """A shift and a scale for each channel."""

    def up(self, x: np.ndarray) -> np.ndarray:
        shift, by, into = self._constants(x.ndim)
        return self.scale(x + shift, by, into)

    def down(self, y: np.ndarray) -> np.ndarray:
        shift, by, into = self._constants(y.ndim)
        return self.unscale(y, by, into) - shift

    def _constants(self, ndim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bias, log_scale = self.parameters()
        shape = (1, -1, *(1,) * (ndim - 2))
        shift = fixed(bias, 2.0**self.above).reshape(shape)
        return shift, *ratio(fixed(log_scale, STEPS).reshape(shape))

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The shift of each channel, and the log of the scale that then multiplies it."""
        return self.layer.bias, self.layer.log_scale


@register(layers.Standardize)
class StandardizeRule(ActNormRule):
    """A shift and a scale for each feature."""

    def parameters(self) -> tuple[Tensor, Tensor]:
        return -self.layer.mean, -self.layer.std.log()


@register(layers.InvertibleConv)
class InvertibleConvRule(Rule):
    """W = P L D U: two triangles with diagonals of ones, and a scale between them."""

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
        """``matrix @ x`` at every pixel, rounded: sums of integers that float64 holds exactly."""
        if x.size and np.abs(x).max() * np.abs(matrix).sum(1).max(initial=0) >= 2.0**52:
            raise OverflowError("a value is too large for a 1x1 convolution")
        flat = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64)
        sums = flat @ matrix.T
        whole = np.floor((sums + self.PARTS / 2) / self.PARTS).astype(np.int64)
        return np.moveaxis(whole.reshape(len(x), *x.shape[2:], len(matrix)), -1, 1)

    def _factors(self, ndim: int) -> tuple[np.ndarray, ...]:
        shape = (1, -1, *(1,) * (ndim - 2))
        order, lower, upper, sign, diagonal = self._decomposed()
        above = upper.triu(1) / (sign * diagonal.exp())[:, None]
        return (
            order,
            fixed(lower.tril(-1), self.PARTS).astype(np.float64),
            *ratio(fixed(diagonal, STEPS).reshape(shape)),
            fixed(sign, 1).reshape(shape),
            fixed(above, self.PARTS).astype(np.float64),
        )

    def _decomposed(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor]:
        """Order, L, U, and the signs and logarithms of the diagonal of U."""
        layer = self.layer
        if not layer.lu:
            return decomposed(layer.weight.detach().double().numpy())
        factors = (layer.lower, layer.upper, layer.sign, layer.log_scale)
        lower, upper, sign, diagonal = (t.detach().double() for t in factors)
        return layer.permutation.argmax(1).numpy(), lower, upper, sign, diagonal


@register(layers.Rotation)
class RotationRule(InvertibleConvRule):
    """The product of its reflections."""

    def _decomposed(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor]:
        below = self.layer.vectors.detach().double().cpu().numpy()
        matrix = np.eye(len(below))
        for i in reversed(range(len(below))):
            v = np.concatenate([np.zeros(i), np.ones(1), below[i + 1 :, i]])[:, None]
            matrix -= v * ((v * matrix).sum(0) * (2 / (v * v).sum()))
        return decomposed(matrix)


def decomposed(matrix: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor]:
    """As `triangles`, with the signs and logarithms of the diagonal of U."""
    order, lower, upper = triangles(matrix)
    return order, lower, upper, upper.diagonal().sign(), upper.diagonal().abs().log()


def triangles(matrix: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
    """Order, L and U with matrix = (L U)[order], by single operations: the same on any machine."""
    lu, rows = matrix.copy(), np.arange(len(matrix))
    with np.errstate(all="ignore"):  # a singular matrix is found by its diagonal
        for i in range(len(lu)):
            best = i + int(np.abs(lu[i:, i]).argmax())
            lu[[i, best]], rows[[i, best]] = lu[[best, i]], rows[[best, i]]
            lu[i + 1 :, i] /= lu[i, i]
            lu[i + 1 :, i + 1 :] -= lu[i + 1 :, i, None] * lu[i, None, i + 1 :]
    return rows.argsort(), torch.from_numpy(np.tril(lu, -1)), torch.from_numpy(np.triu(lu))


@register(layers.Logit)
class LogitRule(Rule):
    """One increasing map for all elements, so its intervals are a table."""

    def up(self, x: np.ndarray) -> np.ndarray:
        return self._interpolated(x, *self._table(), self.scale)

    def down(self, y: np.ndarray) -> np.ndarray:
        ends, images = self._table()
        return self._interpolated(y, images, ends, lambda k, by, into: self.unscale(k, into, by))

    def _interpolated(
        self, k: np.ndarray, ends: np.ndarray, images: np.ndarray, scale: Callable[..., np.ndarray]
    ) -> np.ndarray:
        """From intervals with these ends to those with these images."""
        i = np.searchsorted(ends, k, side="right") - 1
        if not ((i >= 0) & (i < len(ends) - 1)).all():
            raise OverflowError("a value lies outside of the range of a logit")
        sizes = images[i + 1] - images[i]
        return images[i] + scale(k - ends[i], sizes, ends[i + 1] - ends[i])

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        return _logit_table(self.layer.alpha, self.below, self.above)

    @staticmethod
    def grid_above(layer: Any, below: int) -> int:
        return REAL


@lru_cache
def _logit_table(alpha: float, below: int, above: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals of [0, 1] and their images, on their grids, each one step at least."""
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
