"""From a set with borders to all of space: boxes, half-lines, simplices, ordered vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from musigma.distributions.cells import Tables
from musigma.layer import Bijection
from musigma.layers.marginals import LOG_SQRT_2PI, Rows
from musigma.support import Part, Support, constraint_type
from musigma.tensors import at_least_float32, moments, normal_quantile

__all__ = ["Unconstrain"]

EDGE = {torch.float32: 2.0**-32, torch.float64: 2.0**-53}
"""Distance from a border, as a share of the whole, at which values on it are taken to lie; or
half the spacing of the numbers there, if that is more."""
FAR = 500.0
"""Logarithm of the largest distance from a border that a draw has, in units of the scale."""


class Unconstrain(Bijection):
    r"""Rows in a `Support` to all of space, so that a model of the result has no mass outside.

    Each bounded part goes through the distribution function F of the uniform distribution on it,
    and the quantile function of a standard normal (or logistic) variable, so rows that are
    uniform there become exactly normal. For an interval,

    .. math:: y = \Phi^{-1}\left(\frac{x - a}{b - a}\right), \quad
        \log|\det| = -\log (b - a) - \log \varphi(y)

    A simplex of K elements is divided one element after another, into K - 1 variables: the share
    :math:`v_i = x_i / (x_i + \dots + x_K)` has :math:`F_i(v) = 1 - (1 - v)^{K - i}` under the
    uniform distribution. Its density is one of the first K - 1 elements (with respect to their
    Lebesgue measure), where the uniform distribution has the density (K - 1)!. An ordered vector
    of K elements between two bounds has K + 1 gaps, which are a simplex. An element x > a of a
    half-line goes through the share (x - a) / (x - a + s), where s is the geometric mean of x - a
    over all training rows; with the logit this is the logarithm of (x - a) / s. So do the gaps of
    an ordered vector with one bound or none. Other elements are left as they are.

    Then each variable is shifted and scaled, by its mean and standard deviation over all training
    rows (buffers, as in `Standardize`; until they are measured, by 0 and 1).

    Everything is computed in float64. A value at a border is taken to lie within it, at a distance
    of half the spacing of the numbers there, so its density is finite. Outside the support the
    density is zero: `log_det` is -inf. Generated rows lie inside, in their own type and in
    float64.

    (The map of an interval by the normal distribution function is that of Gaussian copulas. Shares
    of a simplex, with the logit: Stan Development Team, "Stan Reference Manual", constraint
    transforms.)

    Args:
        support: Where rows lie, D elements.
        map: `probit` or `logit`. With the probit, models of posteriors that pile
            up at borders were closer to the truth (`benchmarks/borders.py`).

    Raises:
        ValueError: For another map.

    Example:
        >>> layer = Unconstrain(Support([0, 0], [1, None]))
        >>> layer(torch.tensor([[0.75, 1.0], [2.0, 1.0]]))[1]
        tensor([0.6791,   -inf])
    """

    scale: Tensor
    mean: Tensor
    std: Tensor
    calibrated: Tensor

    def __init__(self, support: Support, *, map: Literal["probit", "logit"] = "probit"):
        super().__init__()
        if map not in ("probit", "logit"):
            raise ValueError(f"map: expected 'probit' or 'logit'; got {map!r}")
        self.support, self.map = support, map
        self.blocks = _blocks(support, map)
        outputs = [j for block in self.blocks for j in block.outputs]
        self.tables = Tables(
            limits=torch.from_numpy(support.limits),
            ends32=torch.from_numpy(_ends(support, np.float32)),
            ends64=torch.from_numpy(_ends(support, np.float64)),
            order=torch.tensor(outputs).argsort(),
            back=torch.tensor([j for b in self.blocks for j in b.inputs]).argsort(),
        )
        self.register_buffer("scale", torch.ones(len(support)))
        self.register_buffer("mean", torch.zeros(support.freedom))
        self.register_buffer("std", torch.ones(support.freedom))
        self.register_buffer("calibrated", torch.tensor(False))

    # -- measurement

    def measure(self, data: Rows) -> None:
        """Set the means and the standard deviations to those of all rows of a `Dataset`."""
        self._measure(data.moments)

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set them from a batch, once."""
        if not bool(self.calibrated):
            rows = x.detach().cpu().numpy()
            self._measure(lambda of: [t.numpy() for t in moments(torch.from_numpy(of(rows)))])

    @torch.no_grad()
    def _measure(self, moments_of: Callable[[Callable[[np.ndarray], np.ndarray]], Any]) -> None:
        self.scale.fill_(1.0)
        self.mean.zero_()
        self.std.fill_(1.0)
        if any(isinstance(block, _Gaps) for block in self.blocks):
            logs, positive = np.split(moments_of(self._log_gaps)[0], 2)
            self.scale.copy_(torch.from_numpy(logs / np.maximum(positive, 1e-12)).exp())
        mean, std = moments_of(self._mapped)
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.where(std > 0, std, 1.0)))
        self.calibrated.fill_(True)

    def _log_gaps(self, rows: np.ndarray) -> np.ndarray:
        """Logarithms of gaps, 0 if they are not positive, and whether they are (N, 2 D)."""
        x = torch.from_numpy(rows).double()
        gaps = torch.cat([block.distances(x) for block in self.blocks], 1)
        gaps = gaps[:, self.tables["back"]]
        positive = gaps > 0
        return torch.cat([torch.where(positive, gaps, 1.0).log(), positive], 1).numpy()

    def _mapped(self, rows: np.ndarray) -> np.ndarray:
        device = self.mean.device
        return self(torch.from_numpy(rows).to(device))[0].double().cpu().numpy()

    # -- both directions

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``: y (B, D') has one element less for each simplex."""
        x = at_least_float32(x)
        dtype, x = x.dtype, x.double()
        t = self.tables.on(x.device)
        ys, log_dets = [], []
        for block in self.blocks:
            y, log_det = block.up(x, block.on(x.device), self.scale.double(), dtype)
            ys.append(y)
            log_dets.append(log_det)
        y = torch.cat(ys, 1)[:, t["order"]]
        log_det = torch.stack(log_dets).sum(0) - self.std.double().log().sum()
        inside = self.support.inside(x.detach(), t["limits"]).all(1)
        log_det = torch.where(inside, log_det, -math.inf)
        y = (y - self.mean) / self.std
        return y.to(dtype), log_det.to(dtype)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, -log_det)``."""
        y = at_least_float32(y)
        dtype, y = y.dtype, y.double() * self.std + self.mean
        t = self.tables.on(y.device)
        xs, log_dets = [], []
        for block in self.blocks:
            x, log_det = block.down(y, block.on(y.device), self.scale.double())
            xs.append(x)
            log_dets.append(log_det)
        x = torch.cat(xs, 1)[:, t["back"]]
        log_det = torch.stack(log_dets).sum(0) - self.std.double().log().sum()
        low, high = t["ends32" if dtype == torch.float32 else "ends64"]
        return torch.minimum(torch.maximum(x.to(dtype), low), high), -log_det.to(dtype)

    def extra_repr(self) -> str:
        """Names the number of elements, and the map."""
        return f"{len(self.support)}, map={self.map!r}"


def _ends(support: Support, real: type[np.floating]) -> np.ndarray:
    """The least and the largest number of a type within the bounds of each element (2, D)."""
    bounds = support.limits[:2]
    ends = bounds.astype(real)
    ends[0] = np.where(ends[0] < bounds[0], np.nextafter(ends[0], real(math.inf)), ends[0])
    ends[1] = np.where(ends[1] > bounds[1], np.nextafter(ends[1], real(-math.inf)), ends[1])
    most = np.finfo(real).max
    return np.clip(ends, -most, most)


# --- parts of one kind -------------------------------------------------------------------------


class _Block(ABC):
    """G parts of a support that have K elements each, and are mapped in the same way.

    Attributes:
        inputs: Positions of all their elements.
        outputs: Positions of their variables.
    """

    def __init__(self, parts: list[tuple[Part, int]], map: str):
        self.probit = map == "probit"
        self.k, self.freedom = len(parts[0][0].elements), parts[0][0].freedom
        self.inputs = [j for part, _ in parts for j in part.elements]
        self.outputs = [first + i for part, first in parts for i in range(part.freedom)]
        self.tables = Tables(
            inputs=torch.tensor(self.inputs),
            outputs=torch.tensor(self.outputs),
            low=torch.tensor([part.low for part, _ in parts], dtype=torch.float64),
            high=torch.tensor([part.high for part, _ in parts], dtype=torch.float64),
        )

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The constants on a device."""
        return self.tables.on(device)

    def take(self, t: Tensor, which: Tensor) -> Tensor:
        """The elements (B, G, K) or variables (B, G, K') of the parts, of rows (B, *)."""
        return t[:, which].unflatten(1, (len(self.tables["low"]), -1))

    @abstractmethod
    def up(
        self, x: Tensor, t: dict[str, Tensor], scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, y (B, G K')."""

    @abstractmethod
    def down(self, y: Tensor, t: dict[str, Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_det)`` of `up`, x (B, G K)."""

    def distances(self, x: Tensor) -> Tensor:
        """The gaps that have a scale (B, G K); 1 for other elements."""
        return torch.ones(len(x), len(self.inputs), dtype=x.dtype)

    # -- the distribution of y

    def log_base(self, y: Tensor) -> Tensor:
        """Log density of y for uniform rows."""
        if self.probit:
            return -y.square() / 2 - LOG_SQRT_2PI
        return -y.abs() - 2 * F.softplus(-y.abs())

    def quantile(self, p: Tensor, q: Tensor) -> Tensor:
        """The quantile at p = 1 - q."""
        if not self.probit:
            return p.log() - q.log()
        y = torch.special.ndtri(torch.minimum(p, q))
        return torch.where(p < q, y, -y)

    def of_logs(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The quantile at p = 1 - q, from their logarithms."""
        if not self.probit:
            return log_p - log_q
        y = normal_quantile(torch.minimum(log_p, log_q))
        return torch.where(log_p < log_q, y, -y)

    def both(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mass below y and above it."""
        mass = torch.special.ndtr if self.probit else torch.sigmoid
        return mass(y), mass(-y)

    def log_above(self, y: Tensor) -> Tensor:
        """The log of the mass above y."""
        return torch.special.log_ndtr(-y) if self.probit else -F.softplus(y)


class _Lines(_Block):
    """Elements without bounds."""

    def up(self, x, t, scale, dtype):
        return x[:, t["inputs"]], x.new_zeros(len(x))

    def down(self, y, t, scale):
        return y[:, t["outputs"]], y.new_zeros(len(y))


class _Gaps(_Block):
    """Half-lines, and ordered vectors with one bound or none: the logarithms of their gaps.

    Where there is only an upper bound, all signs and the order are reversed.
    """

    def __init__(self, parts: list[tuple[Part, int]], map: str):
        super().__init__(parts, map)
        first = parts[0][0]
        self.falling = math.isinf(first.low) and math.isfinite(first.high)
        self.free = int(math.isinf(first.low) and math.isinf(first.high))
        self.tables["border"] = self.tables["high" if self.falling else "low"]
        single = self.tables["border"].float()
        above = torch.nextafter(single, torch.full_like(single, math.inf))
        self.tables["spacing"] = (above - single).double().nan_to_num(0.0)

    def gaps(self, x: Tensor, t: dict[str, Tensor]) -> Tensor:
        """The gaps (B, G, K); the first is the first element itself, if there is no bound."""
        x = self.take(x, t["inputs"])
        border = t["border"][:, None].expand(len(x), -1, 1)
        if self.falling:
            return -torch.diff(torch.cat([border, x.flip(-1)], -1))
        if self.free:
            return torch.cat([x[..., :1], x.diff()], -1)
        return torch.diff(torch.cat([border, x], -1))

    def scales(self, scale: Tensor, t: dict[str, Tensor]) -> Tensor:
        """The scales of the gaps (G, K)."""
        scale = scale[t["inputs"]].unflatten(0, (-1, self.k))
        return scale.flip(-1) if self.falling else scale

    def distances(self, x):
        gaps = self.gaps(x, self.tables)
        if self.free:
            gaps[..., 0] = 1.0
        return (gaps.flip(-1) if self.falling else gaps).flatten(1)

    def up(self, x, t, scale, dtype):
        gaps, scale = self.gaps(x, t), self.scales(scale, t)
        least = EDGE[dtype] * scale
        if not self.free and dtype == torch.float32:
            first = torch.maximum(least[:, :1], t["spacing"][:, None] / 2)
            least = torch.cat([first, least[:, 1:]], 1)
        logs = torch.maximum(gaps, least).log()
        z = logs - scale.log()
        y = self.of_logs(-F.softplus(-z), -F.softplus(z))
        log_det = self.slope(y, z) - logs
        if self.free:
            y = torch.cat([gaps[..., :1], y[..., 1:]], -1)
        return y.flatten(1), log_det[..., self.free :].sum((1, 2))

    def down(self, y, t, scale):
        y, scale = self.take(y, t["outputs"]), self.scales(scale, t)
        z = self.log_above(-y) - self.log_above(y)
        logs = z.clamp(max=FAR) + scale.log()
        log_det = (self.slope(y, z) - logs)[..., self.free :].sum((1, 2))
        if self.free:
            x = torch.cat([y[..., :1], logs[..., 1:].exp()], -1).cumsum(-1)
        else:
            x = logs.exp().cumsum(-1)
            x = (t["border"][:, None] - x).flip(-1) if self.falling else t["border"][:, None] + x
        return x.flatten(1), log_det

    def slope(self, y: Tensor, z: Tensor) -> Tensor:
        """log dy/dz, where y and the logistic variable z have the same mass below them."""
        return -F.softplus(z) - F.softplus(-z) - self.log_base(y)


class _Shares(_Block):
    """Intervals, ordered vectors in them, and simplices: M shares of a whole, which sum to 1."""

    def __init__(self, parts: list[tuple[Part, int]], map: str):
        super().__init__(parts, map)
        self.simplex = parts[0][0].simplex
        m = self.freedom
        low, high = self.tables["low"], self.tables["high"]
        width = torch.ones_like(low) if self.simplex else high - low
        self.tables["width"] = width
        self.tables["powers"] = torch.arange(m, 0, -1, dtype=torch.float64)
        self.tables["log_density"] = (math.lgamma(m + 1) - m * width.log()).sum()
        single = torch.stack([low, high]).float()
        inward = torch.nextafter(single, single.flip(0))
        spacing = (inward - single).abs().double() / width
        for name, edge in (("least32", EDGE[torch.float32]), ("least64", EDGE[torch.float64])):
            least = torch.full((len(low), m + 1), edge, dtype=torch.float64)
            if not self.simplex and name == "least32":
                least[:, [0, -1]] = torch.maximum(least[:, [0, -1]], spacing.T / 2)
            self.tables[name] = least

    def shares(self, x: Tensor, t: dict[str, Tensor]) -> Tensor:
        """The shares (B, G, M)."""
        x = self.take(x, t["inputs"])
        if self.simplex:
            return x
        low, high = (t[name][:, None].expand(len(x), -1, 1) for name in ("low", "high"))
        return torch.diff(torch.cat([low, x, high], -1)) / t["width"][:, None]

    def up(self, x, t, scale, dtype):
        shares = self.shares(x, t)
        shares = torch.maximum(shares, t["least32" if dtype == torch.float32 else "least64"])
        if self.freedom == 1:
            p, q = (shares / shares.sum(-1, keepdim=True)).unbind(-1)
            y = self.quantile(p, q)
        else:
            rest = shares.flip(-1).cumsum(-1).flip(-1)
            v, left = shares[..., :-1] / rest[..., :-1], rest[..., 1:] / rest[..., :-1]
            log_left = torch.where(v < 0.5, torch.log1p(-v.clamp(max=0.5)), left.log())
            log_q = t["powers"] * log_left
            y = self.of_logs((-torch.expm1(log_q)).log(), log_q)
        y = y.flatten(1)
        return y, t["log_density"] - self.log_base(y).sum(1)

    def down(self, y, t, scale):
        y = self.take(y, t["outputs"])
        log_det = t["log_density"] - self.log_base(y).sum((1, 2))
        if self.freedom == 1:
            below, above = self.both(y)
        else:
            log_rest = (self.log_above(y) / t["powers"]).cumsum(-1)
            below, above = -torch.expm1(log_rest), log_rest.exp()
        if self.simplex:
            rest = torch.cat([torch.ones_like(above[..., :1]), above], -1)
            v = -torch.expm1(self.log_above(y) / t["powers"])
            return torch.cat([rest[..., :-1] * v, rest[..., -1:]], -1).flatten(1), log_det
        low, high, width = (t[name][:, None] for name in ("low", "high", "width"))
        x = torch.where(below < 0.5, low + width * below, high - width * above)
        if self.freedom > 1:
            x = x.cummax(-1).values
        return x.flatten(1), log_det


def _blocks(support: Support, map: str) -> list[_Block]:
    """The parts of a support by kind."""
    kinds: dict[tuple[Any, ...], list[tuple[Part, int]]] = {}
    first = 0
    for part in support.parts:
        bounded = math.isfinite(part.low), math.isfinite(part.high)
        kind = len(part.elements), part.simplex, *bounded
        kinds.setdefault(kind, []).append((part, first))
        first += part.freedom
    return [_block(kind, parts, map) for kind, parts in kinds.items()]


def _block(kind: tuple[Any, ...], parts: list[tuple[Part, int]], map: str) -> _Block:
    k, simplex, below, above = kind
    if simplex or (below and above):
        return _Shares(parts, map)
    return _Gaps(parts, map) if k > 1 or below or above else _Lines(parts, map)


# --- for torch.distributions -------------------------------------------------------------------


class _Into(Transform):
    """All of space into a support: the inverse of `Unconstrain`, without standardization."""

    bijective = True
    domain = constraints.real_vector

    def __init__(self, support: Support):
        super().__init__(cache_size=0)
        self.support, self.layer = support, Unconstrain(support)
        self.codomain = support.constraint()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Into) and other.support == self.support

    def _flat(self, values: Iterable[Tensor], of: Any) -> tuple[Tensor, Tensor]:
        (t,) = values
        out, log_det = of(t.reshape(-1, t.shape[-1]))
        return out.reshape(*t.shape[:-1], -1), log_det.reshape(t.shape[:-1])

    def _call(self, x: Tensor) -> Tensor:
        return self._flat([x], self.layer.inverse)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._flat([y], self.layer)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._flat([x], self.layer.inverse)[1]

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], len(self.support)))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], self.support.freedom))


for _registry in (biject_to, transform_to):
    _registry.register(constraint_type(), lambda constraint: _Into(constraint.support))
