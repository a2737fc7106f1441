r"""Naming the standard deviation as a function of the number b that a network emits for it.

A sampler is measured at many b; its curve sigma(b) is compared with known readings. Every reading
is a base curve g, and a measured curve is

    sigma(b) = clip(k g(b) [+ f], low, high)     or     clip(sqrt(k^2 g(b)^2 + f^2), low, high),

with a noise scale k, a floor f on the standard deviation or on the variance, and bounds. These are
read off the curve: the bounds are the plateaus at its ends, the floor is its smallest value, and
k is the ratio at one point between. So readings that differ by more than the error of the
measurement are never confused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["READINGS", "Curve", "name_curve"]

NAN = math.nan


def _positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, NAN)


# Standard deviation as a function of b, by the reading's name; NaN where it has none.
READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_var": lambda b: (b / 2).exp(),
    "log_std": lambda b: b.exp(),
    "std": _positive,
    "signed std": lambda b: b.abs(),
    "variance": lambda b: _positive(b).sqrt(),
    "softplus": F.softplus,
    "softplus of variance": lambda b: F.softplus(b).sqrt(),
    "elu+1": lambda b: F.elu(b) + 1,
    "relu": lambda b: b.clamp(min=0),
    "relu of variance": lambda b: b.clamp(min=0).sqrt(),
    "abs of variance": lambda b: b.abs().sqrt(),
    "square": lambda b: b**2,
    "sigmoid": torch.sigmoid,
    "sigmoid of variance": lambda b: torch.sigmoid(b).sqrt(),
    "squareplus": lambda b: torch.asinh(b / 2).exp(),
    "log_precision": lambda b: (-b / 2).exp(),
    "-log_std": lambda b: (-b).exp(),
    "precision": lambda b: _positive(b).rsqrt(),
    "inverse std": lambda b: _positive(b).reciprocal(),
    "unit variance": torch.ones_like,
}

EXPONENTIALS = {0.5: "log_var", 1.0: "log_std", -0.5: "log_precision", -1.0: "-log_std"}


@dataclass(frozen=True)
class Curve:
    """A named curve sigma(b).

    Args:
        name: Of the reading; "unnamed" if it is unknown.
        noise_scale: The factor k of the reading.
        sigma: The curve as a function; None if it has no name.
        bounds: Smallest and largest standard deviation; None where there is no bound.
        raw_bounds: The b at which the bounds begin.
        floor: Added to the standard deviation, or its square to the variance.
        floor_on: "std" or "variance".
        error: The largest relative difference from the measurement.
        more: Further parameters: offset, slope.
    """

    name: str
    noise_scale: float = 1.0
    sigma: Callable[[Tensor], Tensor] | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    raw_bounds: tuple[float | None, float | None] = (None, None)
    floor: float = 0.0
    floor_on: str = "std"
    error: float = math.inf
    more: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The name with all parameters, in words."""
        words = [self.name]
        low, high = self.raw_bounds
        if low is not None or high is not None:
            ends = (_digits(low, "-inf"), _digits(high, "inf"))
            words.append("clamped to [{}, {}]".format(*ends))
        elif self.bounds != (None, None):
            ends = (_digits(self.bounds[0], "0"), _digits(self.bounds[1], "inf"))
            words.append("std within [{}, {}]".format(*ends))
        if self.floor:
            shown = self.floor**2 if self.floor_on == "variance" else self.floor
            words.append(f"floor {shown:.4g} on the {self.floor_on}")
        for name, value in self.more.items():
            words.append(f"{name} {value:.4g}")
        if abs(self.noise_scale - 1) > 1e-4:
            words.append(f"noise scaled by {self.noise_scale:.4g}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """As in the details of a report."""
        return {
            "name": self.name,
            "text": self.text,
            "noise_scale": self.noise_scale,
            "bounds": list(self.bounds),
            "raw_bounds": list(self.raw_bounds),
            "floor": self.floor,
            "floor_on": self.floor_on if self.floor else None,
            **self.more,
        }


def _digits(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value + 0.0:.4g}"


def name_curve(b: Tensor, sigma: Tensor, tolerance: float, scale_error: float = 0.0) -> Curve:
    """The simplest reading of a measured curve within the tolerance, or one named "unnamed".

    Args:
        b: The points, ascending (n,).
        sigma: The standard deviations, not negative (n,).
        tolerance: Relative error of their ratios.
        scale_error: Relative error that they share: that of the noise scale.

    Example:
        >>> b = torch.linspace(-60, 60, 121, dtype=torch.float64)
        >>> name_curve(b, (b.clamp(-30, 20) / 2).exp(), 1e-6).text
        'log_var, clamped to [-30, 20]'
    """
    spread = float(sigma.max() / sigma.min().clamp(min=1e-300))
    if spread < 1 + 3 * tolerance:
        level = float(sigma.median())
        k = 1.0 if abs(level - 1) <= scale_error + tolerance else level
        return Curve("unit variance", k, lambda t: torch.full_like(t, k), error=spread - 1)
    signs = bool((b < 0).any() and (b > 0).any())
    fits: list[tuple[float, int, Curve]] = []
    for rank, (name, g) in enumerate(READINGS.items()):
        if name == "unit variance" or (name == "signed std" and not signs):
            continue
        for curve in _fits(name, g, b, sigma, tolerance):
            if curve.error > 3 * tolerance:
                continue
            k = curve.noise_scale
            if abs(k - 1) <= scale_error + tolerance:
                curve = _with(curve, k=1.0)
            elif name.startswith("sigmoid"):
                continue  # a bound, and no noise scale: see _bounded
            plain = curve.bounds == (None, None) and curve.floor == 0
            penalty = 100 * (curve.noise_scale != 1) + 10 * (not plain) + 5 * (curve.floor > 0)
            fits.append((penalty + rank / 100, rank, curve))
    if fits:
        return min(fits, key=lambda entry: entry[:2])[2]
    for family in (_softplus, _exponential, _bounded):
        curve = family(b, sigma)
        if curve is not None and curve.error <= 10 * tolerance:
            return curve
    return Curve("unnamed")


def _with(curve: Curve, k: float) -> Curve:
    old, base = curve.noise_scale, curve.sigma
    fixed = base if base is None else (lambda t: base(t) * (k / old))
    scaled = {} if curve.floor == 0 else {"floor": curve.floor * k / old}
    return Curve(
        **{**curve.__dict__, "noise_scale": k, "sigma": fixed, **scaled}  # pyright: ignore
    )


def _plateaus(sigma: Tensor, tolerance: float) -> tuple[int, int]:
    """How many points at each end have the end's value; 0 if only the end itself."""
    same = max(1e-9, tolerance / 3)
    counts = []
    for curve in (sigma, sigma.flip(0)):
        equal = (curve / curve[0].clamp(min=1e-300) - 1).abs() < same
        run = int((~equal).int().argmax()) if not bool(equal.all()) else len(sigma)
        counts.append(run if run > 1 else 0)
    return counts[0], counts[1]


def _fits(
    name: str, g: Callable[[Tensor], Tensor], b: Tensor, sigma: Tensor, tolerance: float
) -> list[Curve]:
    """The reading without and with either floor, each with the curve's bounds."""
    low_run, high_run = _plateaus(sigma, tolerance)
    n = len(b)
    inside = torch.arange(n)
    inside = (inside >= low_run) & (inside < n - high_run)
    base = g(b)
    if not bool(base[inside].isfinite().any()) or int(inside.sum()) < 3:
        return []
    base = base.nan_to_num(0.0)  # where the reading has no value, a bound may apply
    smallest = float(sigma.min())
    curves = []
    for kind in ("none", "std", "variance"):
        f = 0.0 if kind == "none" else smallest
        if kind != "none" and name.startswith("sigmoid"):
            continue  # two bounds: see _bounded
        if kind != "none" and (f <= 0 or float(base.min()) * 100 > float(base.max()) * 1e-2):
            continue
        usable = inside & (base > 0) & (sigma > 2 * f) & base.isfinite()
        if not bool(usable.any()):
            continue
        at = int(torch.where(usable, (b - 1).abs(), math.inf).argmin())
        rest = float(sigma[at])
        above = math.sqrt(rest**2 - f**2) if kind == "variance" else rest - f
        k = above / float(base[at])
        if k <= 0:
            continue

        def curve(t: Tensor, k: float = k, f: float = f, kind: str = kind) -> Tensor:
            value = k * g(t)
            return (value**2 + f**2).sqrt() if kind == "variance" else value + f

        shape = curve(b).nan_to_num(0.0)
        low, high = _bounds(shape, sigma, inside, low_run, high_run)
        if kind != "none" and low is not None and low <= f * (1 + 1e-6 + 3 * tolerance):
            low = None  # the floor, not a bound
        bounded = shape.clamp(min=low, max=high) if (low, high) != (None, None) else shape
        scale = torch.where(sigma > 0, sigma, 1.0)
        error = float(((bounded - sigma) / scale).abs().max())
        raw = (_where(g, b, shape, low), _where(g, b, shape, high))
        if name in ("log_precision", "-log_std", "precision", "inverse std"):
            raw = (raw[1], raw[0])

        def whole(
            t: Tensor, curve=curve, low: float | None = low, high: float | None = high
        ) -> Tensor:
            value = curve(t)
            if low is not None:
                value = value.nan_to_num(nan=low).clamp(min=low)
            return value if high is None else value.clamp(max=high)

        curves.append(
            Curve(
                name, k, whole, (low, high), raw, f,
                "variance" if kind == "variance" else "std", error,
            )
        )  # fmt: skip
    return curves


def _bounds(
    shape: Tensor, sigma: Tensor, inside: Tensor, low_run: int, high_run: int
) -> tuple[float | None, float | None]:
    """The levels of the plateaus that the reading itself does not have."""
    ends = []
    for run, at in ((low_run, 0), (high_run, -1)):
        if run and abs(float(shape[at] / sigma[at].clamp(min=1e-300)) - 1) > 1e-9:
            ends.append(float(sigma[at]))
    middle = float(sigma[inside].median())
    low = max((e for e in ends if e <= middle), default=None)
    high = min((e for e in ends if e > middle), default=None)
    return low, high


def _where(
    g: Callable[[Tensor], Tensor], b: Tensor, shape: Tensor, level: float | None
) -> float | None:
    """The b at which a monotone curve reaches a level."""
    if level is None:
        return None
    hits = ((shape / level - 1).abs() < 1e-9).nonzero()
    if len(hits) == 1:
        return float(b[int(hits[0])]) + 0.0
    crossed = ((shape[1:] - level) * (shape[:-1] - level) <= 0).nonzero()
    if len(crossed) != 1:
        return None
    i = int(crossed[0])
    at = i if float(shape[i]) > 0 else i + 1
    ratio = float(shape[at]) / float(g(b[at : at + 1]).nan_to_num(0.0).clamp(min=1e-300)[0])
    low, high = float(b[i]), float(b[i + 1])
    rising = float(shape[i + 1]) > float(shape[i])
    for _ in range(60):
        middle = (low + high) / 2
        value = ratio * float(g(b.new_tensor([middle])).nan_to_num(0.0)[0])
        low, high = (low, middle) if (value > level) == rising else (middle, high)
    nearest = round(high)
    if abs(high) < 1e-9:
        return 0.0
    return float(nearest) if nearest and abs(high / nearest - 1) < 1e-5 else high


def _relative_error(curve: Tensor, measured: Tensor) -> float:
    return float(((curve - measured) / measured.clamp(min=1e-300)).abs().max())


def _softplus(b: Tensor, sigma: Tensor) -> Curve | None:
    """The parameters of k softplus(a b + c), from its two asymptotes."""
    if b[0] > -20 or b[-1] < 20 or bool((sigma <= 0).any()):
        return None
    log = sigma.log()
    a = float((log[1] - log[0]) / (b[1] - b[0]))
    slope = float((sigma[-1] - sigma[-2]) / (b[-1] - b[-2]))
    if a <= 0 or slope <= 0:
        return None
    k = slope / a
    c = float(log[0]) - a * float(b[0]) - math.log(k)

    def curve(t: Tensor) -> Tensor:
        return k * F.softplus(a * t + c, threshold=40)

    more = {} if abs(a - 1) < 1e-6 else {"slope": a}
    if abs(c) > 1e-6:
        more["offset"] = c
    k = 1.0 if abs(k - 1) < 1e-6 else k
    return Curve("softplus", k, curve, error=_relative_error(curve(b), sigma), more=more)


def _exponential(b: Tensor, sigma: Tensor) -> Curve | None:
    """The parameters of exp(a b + c)."""
    if bool((sigma <= 0).any()):
        return None
    log = sigma.log()
    i, j = int((b + 1).abs().argmin()), int((b - 1).abs().argmin())
    if i == j:
        return None
    a = float((log[j] - log[i]) / (b[j] - b[i]))
    c = float(log[j]) - a * float(b[j])

    def curve(t: Tensor) -> Tensor:
        return (a * t + c).exp()

    name = next((n for x, n in EXPONENTIALS.items() if abs(a / x - 1) < 1e-6), f"exp({a:.6g} b)")
    return Curve(name, math.exp(c), curve, error=_relative_error(curve(b), sigma))


def _bounded(b: Tensor, sigma: Tensor) -> Curve | None:
    """Sigma or log sigma as a sigmoid or hyperbolic tangent of b, between its asymptotes."""
    if b[0] > -20 or b[-1] < 20 or bool((sigma <= 0).any()):
        return None
    ends = float(sigma[0]), float(sigma[-1])
    ends = (0.0 if ends[0] < 1e-8 * ends[1] else ends[0], ends[1])
    best: Curve | None = None
    for name, there, back in (
        ("sigmoid", lambda t: t, lambda t: t),
        ("log_std", torch.log, torch.exp),
        ("sigmoid of variance", torch.square, torch.sqrt),
    ):
        low, high = (float(there(sigma.new_tensor(end))) for end in ends)
        if not math.isfinite(low):
            continue
        share = ((there(sigma) - low) / (high - low)).clamp(1e-12, 1 - 1e-12)
        i, j = int((b + 0.5).abs().argmin()), int((b - 0.5).abs().argmin())
        logit = torch.logit(share)
        a = float((logit[j] - logit[i]) / (b[j] - b[i]))
        c = float(logit[j]) - a * float(b[j])

        def curve(t: Tensor, low=low, high=high, a=a, c=c, back=back) -> Tensor:
            return back(low + (high - low) * torch.sigmoid(a * t + c))

        more = {"tanh slope": a / 2} if name == "log_std" else {"slope": a}
        more = {n: v for n, v in more.items() if abs(v - 1) > 1e-5 or n == "tanh slope"}
        if abs(c) > 1e-6:
            more["offset"] = c
        candidate = Curve(
            name,
            1.0,
            curve,
            (min(ends), max(ends)),
            error=_relative_error(curve(b), sigma),
            more=more,
        )
        if best is None or candidate.error < best.error:
            best = candidate
    return best
