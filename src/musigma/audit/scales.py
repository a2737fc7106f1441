r"""Naming the standard deviation as a function of the number b that a network emits for it.

A sampler is measured at many b; its curve sigma(b) is compared with known readings. Every reading
is a base curve g, and a measured curve is

    sigma(b) = clip(k g(b) [+ f], low, high)     or     clip(sqrt(k^2 g(b)^2 + f^2), low, high),

with a noise scale k, a floor f on the standard deviation or on the variance, and bounds. These are
read off the curve: the bounds are the plateaus at its ends, the floor is its smallest value, and
k is the ratio at one point between. Readings that differ by more than the error of the
measurement are therefore never confused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["READINGS", "Curve", "Reading", "name_curve"]

Function = Callable[[Tensor], Tensor]


class Reading(NamedTuple):
    """A meaning of a number b: its standard deviation, NaN where it has none.

    `formula` is that function in words; `variance` and `log_variance` are its terms in a KL.
    """

    sigma: Function
    formula: str
    words: str = ""
    variance: str = ""
    log_variance: str = ""


def _positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, math.nan)


READINGS = {
    "log_var": Reading(lambda b: (b / 2).exp(), "exp(b/2)", "log variance", "exp(b)", "b"),
    "log_std": Reading(torch.exp, "exp(b)", "log sigma", "exp(2 b)", "2 b"),
    "std": Reading(_positive, "b", "sigma"),
    "signed std": Reading(torch.abs, "|b|", "sigma of either sign"),
    "variance": Reading(lambda b: _positive(b).sqrt(), "sqrt(b)", "variance"),
    "softplus": Reading(F.softplus, "softplus(b)"),
    "softplus of variance": Reading(lambda b: F.softplus(b).sqrt(), "sqrt(softplus(b))"),
    "elu+1": Reading(lambda b: F.elu(b) + 1, "elu(b) + 1"),
    "relu": Reading(torch.relu, "relu(b)"),
    "relu of variance": Reading(lambda b: b.relu().sqrt(), "sqrt(relu(b))"),
    "abs of variance": Reading(lambda b: b.abs().sqrt(), "sqrt(|b|)"),
    "square": Reading(torch.square, "b^2"),
    "sigmoid": Reading(torch.sigmoid, "sigmoid(b)"),
    "sigmoid of variance": Reading(lambda b: b.sigmoid().sqrt(), "sqrt(sigmoid(b))"),
    "squareplus": Reading(lambda b: torch.asinh(b / 2).exp(), "(b + sqrt(b^2 + 4)) / 2"),
    "log_precision": Reading(lambda b: (-b / 2).exp(), "exp(-b/2)"),
    "-log_std": Reading(lambda b: (-b).exp(), "exp(-b)"),
    "precision": Reading(lambda b: _positive(b).rsqrt(), "1 / sqrt(b)"),
    "inverse std": Reading(lambda b: _positive(b).reciprocal(), "1 / b"),
    "unit variance": Reading(torch.ones_like, "1", "nothing: sigma is constant"),
}

Bounds = tuple[float | None, float | None]
NONE: Bounds = (None, None)


@dataclass(frozen=True)
class Curve:
    """A curve sigma(b) and its name.

    Args:
        name: Of the reading; "unnamed" if it is unknown.
        base: The function g.
        noise_scale: The factor k.
        floor: f, added to the standard deviation, or its square to the variance.
        floor_on: "std" or "variance".
        bounds: Smallest and largest standard deviation; None where there is no bound.
        raw_bounds: The b at which the bounds begin.
        more: Further parameters of g: offset, slope.
    """

    name: str
    base: Function
    noise_scale: float = 1.0
    floor: float = 0.0
    floor_on: str = "std"
    bounds: Bounds = NONE
    raw_bounds: Bounds = NONE
    more: dict[str, float] = field(default_factory=dict)

    def sigma(self, b: Tensor) -> Tensor:
        """The standard deviation at b; zero where the reading has none, and there is no bound."""
        value = self.noise_scale * self.base(b)
        on_variance = self.floor_on == "variance"
        value = (value**2 + self.floor**2).sqrt() if on_variance else value + self.floor
        low, high = self.bounds
        return value.nan_to_num(low or 0.0, posinf=math.inf).clamp(low or 0.0, high)

    @property
    def named(self) -> bool:
        """Whether it is a known function."""
        return self.name != "unnamed"

    @property
    def limits(self) -> int:
        """How many of a floor and two bounds it has."""
        return (self.floor > 0) + sum(bound is not None for bound in self.bounds)

    @property
    def is_bounded(self) -> bool:
        """Whether it is a plain reading but for a floor or bounds."""
        return self.limits > 0 and self.noise_scale == 1 and not self.more

    @property
    def smallest(self) -> float:
        """The smallest standard deviation at any b from -60 to 60."""
        return float(self.sigma(torch.linspace(-60, 60, 241, dtype=torch.float64)).min())

    @property
    def text(self) -> str:
        """The name with all parameters, in words."""
        words = [self.name]
        if self.raw_bounds != NONE:
            words.append("clamped to [{}, {}]".format(*_ends(self.raw_bounds, "-inf")))
        elif self.bounds != NONE:
            words.append("std within [{}, {}]".format(*_ends(self.bounds, "0")))
        if self.floor:
            shown = self.floor**2 if self.floor_on == "variance" else self.floor
            words.append(f"floor {shown:.4g} on the {self.floor_on}")
        words += [f"{name} {value:.4g}" for name, value in self.more.items()]
        if abs(self.noise_scale - 1) > 1e-4:
            words.append(f"noise scaled by {self.noise_scale:.4g}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """As in the details of a report."""
        numbers = {name: value for name, value in vars(self).items() if name != "base"}
        return {"text": self.text, **numbers}

    def off(self, b: Tensor, sigma: Tensor) -> float:
        """Its largest relative error at the points of a measured curve."""
        return float(((self.sigma(b) - sigma) / torch.where(sigma > 0, sigma, 1.0)).abs().max())


def _ends(bounds: Bounds, lowest: str) -> list[str]:
    otherwise = (lowest, "inf")
    return [o if v is None else f"{v + 0.0:.4g}" for v, o in zip(bounds, otherwise, strict=True)]


def name_curve(b: Tensor, sigma: Tensor, tolerance: float = 1e-6) -> Curve:
    """Name a measured curve sigma(b).

    Args:
        b: Numbers (n,) in ascending order that a network may emit: best from -60 to 60, and dense
            around 0.
        sigma: The standard deviation (n,) at each, not negative.
        tolerance: Relative error of ratios of sigma.

    Returns:
        The curve of the simplest reading within the tolerance; one named "unnamed", which
        interpolates, if there is none.

    Example:
        >>> b = torch.linspace(-60, 60, 121, dtype=torch.float64)
        >>> name_curve(b, (b.clamp(-30, 20) / 2).exp(), 1e-6).text
        'log_var, clamped to [-30, 20]'
    """
    if float(sigma.max() / sigma.min().clamp(min=1e-300)) < 1 + 3 * tolerance:
        level = float(sigma.median())
        k = 1.0 if abs(level - 1) <= tolerance else level
        return Curve("unit variance", torch.ones_like, k)
    fits = [
        curve
        for name, reading in READINGS.items()
        if name != "signed std" or b[0] < 0 < b[-1]  # "std" there
        for curve in _fits(name, reading.sigma, b, sigma, tolerance)
    ]
    if fits:
        return min(fits, key=lambda c: (c.noise_scale != 1, c.limits, c.floor > 0))
    for curve in _families(b, sigma):
        if curve.off(b, sigma) <= 10 * tolerance:
            return curve
    return Curve("unnamed", lambda t: torch.as_tensor(np.interp(t, b, sigma)))


def _fits(name: str, g: Function, b: Tensor, sigma: Tensor, tolerance: float) -> Iterator[Curve]:
    """The reading without and with either floor, with the curve's bounds, where it fits."""
    base, smallest = g(b).nan_to_num(0.0), float(sigma.min())
    start, end = _plateau(sigma, tolerance), len(b) - _plateau(sigma.flip(0), tolerance)
    if end - start < 3:
        return
    inside = (b >= b[start]) & (b <= b[end - 1]) & (base > 0)
    floors, two_bounds = [("std", 0.0)], name.startswith("sigmoid")  # of _families
    if not two_bounds and float(base.min()) * 1e4 <= base.max() and smallest > 0:
        floors += [("std", smallest), ("variance", smallest)]
    for kind, f in floors:
        usable = inside & (sigma > 2 * f)
        if not usable.any():
            continue
        at = int(torch.where(usable, (b - 1).abs(), math.inf).argmin())
        there = float(sigma[at])
        k = (math.sqrt(there**2 - f**2) if kind == "variance" else there - f) / float(base[at])
        if abs(k - 1) <= tolerance:
            k, f = 1.0, f / k
        elif two_bounds:
            continue
        yield from _bounded(Curve(name, g, k, f, kind), b, sigma, start, end, tolerance)


def _bounded(
    curve: Curve, b: Tensor, sigma: Tensor, start: int, end: int, tolerance: float
) -> Iterator[Curve]:
    """The curve with the fewest of the bounds that plateaus are, if it fits so.

    The plateaus are before the point `start`, and from the point `end` on.
    """
    first, last = sigma[[0, -1]].tolist()
    plateaus, middle = [first] * (start > 0) + [last] * (end < len(b)), sigma[start:end].median()
    for levels in (c for r in range(len(plateaus) + 1) for c in combinations(plateaus, r)):
        low = max((v for v in levels if v <= middle), default=None)
        high = min((v for v in levels if v > middle), default=None)
        bounded = replace(curve, bounds=(low, high))
        if bounded.off(b, sigma) <= 3 * tolerance:
            at_start, at_end = start > 0 and first in levels, end < len(b) and last in levels
            raw = (
                _crossing(curve, b[start - 1], b[start], first) if at_start else None,
                _crossing(curve, b[end - 1], b[end], last) if at_end else None,
            )
            yield replace(bounded, raw_bounds=raw)
            return


def _plateau(sigma: Tensor, tolerance: float) -> int:
    """How many points at the start have the first one's value; 0 if only itself."""
    same = (sigma / sigma[0].clamp(min=1e-300) - 1).abs() < max(1e-9, tolerance / 3)
    run = int(same.int().cumprod(0).sum())
    return run if run > 1 else 0


def _crossing(curve: Curve, low: Tensor, high: Tensor, level: float) -> float:
    """The b between two others at which a curve reaches a level, to six digits."""
    for _ in range(4):
        grid = low + (high - low) * torch.linspace(0, 1, 101, dtype=torch.float64)
        at = int((curve.sigma(grid) - level).abs().argmin())
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, 100)]
    return round(float(low + high) / 2, 6) + 0.0


def _families(b: Tensor, sigma: Tensor) -> Iterator[Curve]:
    """Curves k g(a b + c): softplus, exp, and sigmoids between the curve's ends.

    The inverse of k g makes a line of each, whose slope a and offset c two points give.
    """
    if (sigma <= 0).any():
        return
    families: list[tuple[str, Function, Function, float, Bounds]] = []
    families.append(("exp", torch.log, torch.exp, 1.0, NONE))
    if b[0] <= -20 and b[-1] >= 20:
        slope = float((sigma[-1] - sigma[-2]) / (b[-1] - b[-2]))  # k a, at the upper end
        decay = float((sigma[1] / sigma[0]).log() / (b[1] - b[0]))  # a, at the lower end
        if slope > 0 and decay > 0:
            k = 1.0 if abs(slope / decay - 1) < 1e-6 else slope / decay
            families.append(("softplus", lambda s: (s / k).expm1().log(), F.softplus, k, NONE))
        first, last = float(sigma[0]), float(sigma[-1])
        ends = sigma.new_tensor([0.0 if first < 1e-8 * last else first, last])
        bounds = float(ends.min()), float(ends.max())
        for name, there, back in (
            ("sigmoid", torch.clone, torch.clone),
            ("log_std", torch.log, torch.exp),
            ("sigmoid of variance", torch.square, torch.sqrt),
        ):
            low, high = there(ends).tolist()
            if math.isfinite(low):
                families.append((name, *_between(low, high, there, back), 1.0, bounds))
    two = [int((b - x).abs().argmin()) for x in (-0.5, 0.5)]
    for name, link, g, k, bounds in families:
        (x0, x1), (y0, y1) = b[two].tolist(), link(sigma[two]).tolist()
        a = (y1 - y0) / (x1 - x0)
        c = y1 - a * x1
        more = {"tanh slope": a / 2} if name == "log_std" else {"slope": a}
        if name == "exp":
            name, k, c, more = f"exp({a:.6g} b)", math.exp(c), 0.0, {}
        more |= {"offset": c}
        usual = {"slope": 1.0, "offset": 0.0}
        more = {n: v for n, v in more.items() if n not in usual or abs(v - usual[n]) > 1e-5}
        yield Curve(name, lambda t, g=g, a=a, c=c: g(a * t + c), k, bounds=bounds, more=more)


def _between(
    low: float, high: float, there: Function, back: Function
) -> tuple[Function, Function]:
    """A sigmoid between two levels of a function of sigma, and before it the inverse."""
    return (
        lambda s: torch.logit(((there(s) - low) / (high - low)).clamp(1e-12, 1 - 1e-12)),
        lambda t: back(low + (high - low) * t.sigmoid()),
    )
