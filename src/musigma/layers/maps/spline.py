"""The monotone rational-quadratic spline, of the line and of the circle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from musigma.layers.maps.bins import Bins
from musigma.layers.maps.map import Map, planes

__all__ = ["CircularSpline", "Spline"]


@dataclass(frozen=True)
class Spline(Bins, Map):
    r"""A monotone spline of each element.

    For every element the network emits K widths, K heights and K - 1 slopes of the inner knots,
    all unbounded. A softmax makes widths and heights shares of the square [-B, B]²; slopes go
    through a softplus. Outside [-B, B] the map is the identity, and the outer knots have its slope
    1; with all parameters zero it is the identity everywhere. (Durkan, Bekasov, Murray,
    Papamakarios, "Neural Spline Flows", 2019, arXiv:1906.04032. Their raw slope is this one plus
    log(exp(1 - least) - 1).)

    Args:
        bins: K, 2 or more.
        bound: B. One in two million standard normal values lies outside [-5, 5].
        least: The smallest slope, and the smallest width and height as a share of 2 B.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> spline, x = Spline(bins=4), torch.linspace(-6, 6, 5)[:, None]
        >>> y, log_slope = spline.forward(x, torch.randn(5, 11))
        >>> bool((y.diff(dim=0) > -10).all()), torch.equal(y[[0, 4]], x[[0, 4]])
        (True, True)
    """

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 3 K - 1."""
        return 3 * self.bins - 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``, both of x's shape (B, C, ...), for h (B, (3 K - 1) C, ...).

        Channel p C + c of h is parameter p of channel c: first all widths, then all heights, then
        all slopes.

        Raises:
            ValueError: If h has another shape.
        """
        return _apply(_Forward.apply, self, *planes(self, x, h))

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``, for h as in `forward`."""
        return _apply(_Inverse.apply, self, *planes(self, y, h))


@dataclass(frozen=True)
class CircularSpline(Map):
    r"""A monotone spline of a circle, lifted to the line: f(x + period) = f(x) + period.

    For every element the network emits a shift of x, K widths, K heights and K slopes of the
    knots, all unbounded; the first and the last knot are the same point of the circle. In other
    respects the spline is that of `Spline`, on [-period / 2, period / 2]. With all parameters zero
    it is the identity. Values are not wrapped, so the map increases over the whole line; the layer
    `Circle` wraps them. (Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan, Cranmer,
    "Normalizing Flows on Tori and Spheres", 2020, arXiv:2002.02428.)

    Args:
        bins: K, 2 or more.
        period: The circumference.
        least: The smallest slope, and the smallest width and height as a share of the period.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> spline, h = CircularSpline(bins=4), torch.randn(1, 13)
        >>> x = torch.tensor([[3.0]])
        >>> y, z = (spline.forward(t, h)[0] for t in (x, x + 2 * math.pi))
        >>> torch.allclose(z - y, torch.tensor(2 * math.pi))
        True
    """

    bins: int = 8
    period: float = 2 * math.pi
    least: float = 1e-3

    def __post_init__(self):
        if not 0 < self.period < math.inf:
            raise ValueError(f"period: expected a positive number; got {self.period}")
        Bins(self.bins, self.period / 2, self.least)

    @property
    def bound(self) -> float:
        """Half of the period."""
        return self.period / 2

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element, 3 K + 1."""
        return 3 * self.bins + 1

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        x, raw = planes(self, x, h)
        x = x + raw[0]
        turns = self._turns(x)
        y, log_slope = _apply(_Forward.apply, self, self._wrapped(x - turns), raw[1:])
        return y + turns, log_slope

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``."""
        y, raw = planes(self, y, h)
        turns = self._turns(y)
        x, log_slope = _apply(_Inverse.apply, self, self._wrapped(y - turns), raw[1:])
        return x + turns - raw[0], log_slope

    def _turns(self, x: Tensor) -> Tensor:
        return (x.detach() / self.period).round() * self.period

    def _wrapped(self, x: Tensor) -> Tensor:
        return x.clamp(-self.bound, self.bound)  # beyond by rounding


def _apply(
    function: Callable[..., Any], spline: Spline | CircularSpline, x: Tensor, raw: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a function on planes, in which each parameter of all elements is contiguous.

    Nothing is copied if the network emits its batch last in memory, as `MADE` does.
    """
    batch_last = raw.ndim == 3 and raw.stride(1) == 1
    if batch_last:
        x, raw = x.t(), raw.transpose(1, 2)
    y, log_slope = function(
        x.reshape(-1), raw.reshape(len(raw), -1), spline.bins, spline.bound, spline.least
    )
    y, log_slope = y.view(x.shape), log_slope.view(x.shape)
    return (y.t(), log_slope.t()) if batch_last else (y, log_slope)


# --- the spline -------------------------------------------------------------------------------
#
# In a bin with corner (x0, y0), width w, height h, mean slope s = h / w and slopes d0, d1 at its
# knots, at θ = (x - x0) / w and with ϑ = 1 - θ,
#
#     g0 = s θ + d0 ϑ        β = θ g0 + ϑ g1        q = θ g0 / β        y = y0 + h q
#     g1 = s ϑ + d1 θ        C = ϑ g0 + θ g1        log dy/dx = log C (s / β)²
#
# Every term of these sums is positive, so there is no cancellation. The gradients are explicit,
# because autograd would store dozens of tensors for them.
#
# Below, x has shape (N,); corners and sizes of bins are (2, N) for x and y, slopes (2, N) for the
# left and the right knot.


def _locate(
    z: Tensor, raw: Tensor, axis: int, bins: int, bound: float, least: float
) -> tuple[Tensor, ...]:
    """Find the bin of z along an axis: the shares of all bins, and its corner, size, slopes, k.

    A binary search: the knot in the middle comes from a sum of half of the shares, and a half is
    chosen by weights of 0 and 1, which is exact and much faster than indexing.
    """
    shares = raw[: 2 * bins].view(2, bins, -1).softmax(1)
    most, smallest = 2 * bound * (1 - bins * least), 2 * bound * least
    corner, k, right = z.new_full((), -bound), torch.zeros_like(z), torch.empty_like(z)
    left, slopes, n = shares, _knots(raw[2 * bins :], bins), bins
    while n > 1:
        kept = (n + 1) // 2
        skipped = n - kept
        below = left[:, :skipped].sum(1) if skipped > 1 else left[:, 0]
        knot = torch.add(corner, below, alpha=most).add_(smallest * skipped)
        torch.ge(z, knot[axis], out=right)
        corner = torch.lerp(corner, knot, right)
        left = torch.lerp(left[:, :kept], left[:, skipped:], right)
        slopes = torch.lerp(slopes[: kept + 1], slopes[skipped:], right)
        k.add_(right, alpha=skipped)
        n = kept
    size = torch.add(z.new_full((), smallest), left[:, 0], alpha=most)
    slopes = F.softplus(slopes.add_(math.log(math.expm1(1 - least)))).add_(least)
    return shares, corner, size, slopes, k


def _knots(raw: Tensor, bins: int) -> Tensor:
    """Raw slopes of all K + 1 knots, from those of the inner ones or, on a circle, of K knots."""
    return F.pad(raw, (0, 0, 1, 1)) if len(raw) < bins else torch.cat([raw, raw[:1]])


def _blend(theta: Tensor, s: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """ϑ, g0, g1, θ g0 and β at θ."""
    d0, d1 = slopes
    rest = 1 - theta
    g0 = (s * theta).addcmul_(d0, rest)
    g1 = (s * rest).addcmul_(d1, theta)
    top = theta * g0
    return rest, g0, g1, top, torch.addcmul(top, rest, g1)


def _log_slope(theta: Tensor, s: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, log dy/dx)`` at θ."""
    rest, g0, g1, top, beta = _blend(theta, s, slopes)
    c = g0.mul_(rest).addcmul_(g1, theta)
    return top.div_(beta), torch.div(s, beta).square_().mul_(c).log_()


class _Forward(torch.autograd.Function):
    """x to y, with explicit gradients, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, bins: int, bound: float, least: float):
        z = x.clamp(-bound, bound)
        inside = torch.eq(z, x, out=torch.empty_like(x))
        shares, corner, size, slopes, k = _locate(z, raw, 0, bins, bound, least)
        (x0, y0), (w, h) = corner, size
        theta = z.sub_(x0).div_(w).clamp_(0, 1)
        q, log_slope = _log_slope(theta, h / w, slopes)
        ctx.save_for_backward(shares, size, slopes, k, theta, inside)
        ctx.rows = len(raw)
        ctx.least, ctx.most = least, 2 * bound * (1 - bins * least)
        return torch.lerp(x, torch.addcmul(y0, h, q), inside), log_slope.mul_(inside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gy, gl = grads
        saved = ctx.saved_tensors  # once: under `checkpoint` they are computed when they are read
        gx, raw = _pull(ctx, saved, gl, lambda inside, slope, bend: gy * inside)
        return torch.lerp(gy, gx, saved[-1]), raw, None, None, None


class _Inverse(torch.autograd.Function):
    """y to x, by the root of a quadratic; the gradients are those of `_Forward`, solved for x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, raw: Tensor, bins: int, bound: float, least: float):
        z = y.clamp(-bound, bound)
        inside = torch.eq(z, y, out=torch.empty_like(y))
        shares, corner, size, slopes, k = _locate(z, raw, 1, bins, bound, least)
        (x0, y0), (w, h), (d0, d1) = corner, size, slopes
        s = h / w
        q = z.sub_(y0).div_(h)
        tilt = (d0 + d1).sub_(s, alpha=2).mul_(q)
        linear, rise = d0 - tilt, s * q
        square = tilt.add_(s).sub_(d0)
        root = torch.addcmul(linear.square(), square, rise, value=4).clamp_(min=0).sqrt_()
        theta = rise.mul_(2).div_(root.add_(linear)).clamp_(0, 1)
        log_slope = _log_slope(theta, s, slopes)[1]
        ctx.save_for_backward(shares, size, slopes, k, theta, inside)
        ctx.rows = len(raw)
        ctx.least, ctx.most = least, 2 * bound * (1 - bins * least)
        return torch.lerp(y, torch.addcmul(x0, w, theta), inside), log_slope.mul_(inside).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gx, gl = grads
        gy: Tensor = gx

        def pushed(inside: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
            nonlocal gy
            gy = (gx * inside).add_(bend).div_(slope)
            return -gy

        saved = ctx.saved_tensors
        raw = _pull(ctx, saved, -gl, pushed)[1]
        return torch.lerp(gx, gy, saved[-1]), raw, None, None, None


def _pull(
    ctx: Any,
    saved: Sequence[Tensor],
    gl: Tensor,
    push: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and the parameters, given the gradient gl of log dy/dx.

    The gradient of y is ``push(inside, slope, bend)``: whether x is inside [-B, B], dy/dx, and the
    part of the gradient of x that comes from gl.
    """
    shares, size, slopes, k, theta, inside = saved
    (w, h), (d0, d1) = size, slopes
    gl = gl * inside
    s = h / w
    rest, g0, g1, top, beta = _blend(theta, s, slopes)
    product, square = theta * rest, theta.square()
    over_beta = beta.reciprocal_()
    q = top.mul_(over_beta)
    c = (g0 * rest).addcmul_(g1, theta)
    slope = (s * over_beta).square_().mul_(c)
    by_c, by_beta = c.reciprocal_().mul_(gl), gl * over_beta

    turn = (d0 + d1).sub_(s, alpha=2).mul_(rest - theta).mul_(by_beta)
    bend = g1.sub_(g0).mul_(by_c).sub_(turn).mul_(2).div_(w)
    gy = push(inside, slope, bend)
    gx = slope.mul_(gy).add_(bend)

    by_top = (gy * h).mul_(over_beta)
    by_beta = by_beta.mul_(2).addcmul_(by_top, q)  # with the opposite sign
    by_s = (gl / s).mul_(2).sub_(by_beta).addcmul_(by_top, square)
    by_s.addcmul_(product, by_beta + by_c, value=2).div_(w)
    by_beta.mul_(product)
    by_slopes = torch.empty_like(slopes)
    torch.addcmul(by_top.mul_(product).sub_(by_beta), by_c, rest.square_(), out=by_slopes[0])
    torch.mul(by_c, square, out=by_slopes[1]).sub_(by_beta)
    by_slopes.mul_(torch.expm1(ctx.least - slopes)).neg_()  # 1 - exp(-softplus) is its slope

    by_corner = torch.stack([-gx, gy]).mul_(ctx.most)
    by_size = torch.stack([torch.addcmul(by_s * s, gx, theta).neg_(), by_s.addcmul_(gy, q)])
    by_size.mul_(ctx.most)
    bins = shares.shape[1]
    raw = theta.new_empty(ctx.rows, len(theta))
    knots = torch.arange(bins + 1, dtype=k.dtype, device=k.device)[:, None]
    from_here = torch.ge(k, knots, out=raw.new_empty(bins + 1, len(k)))
    before, here = from_here[1:], from_here[:-1] - from_here[1:]
    by_shares = torch.mul(before, by_corner[:, None]).addcmul_(here, by_size[:, None])
    torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
        by_shares, shares, 1, shares.dtype, grad_input=raw[: 2 * bins].view(shares.shape)
    )
    right = here if ctx.rows == 3 * bins else here[1:]
    left = here.roll(1, 0) if ctx.rows == 3 * bins else here[:-1]
    torch.mul(right, by_slopes[0], out=raw[2 * bins :]).addcmul_(left, by_slopes[1])
    return gx, raw
