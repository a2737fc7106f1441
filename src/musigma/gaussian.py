"""Gaussians, and how the output of a network is read as one.

A network emits one tensor or two. A `Format` states which part is the mean and what the other
part means: for example, the logarithm of the standard deviation or of the variance. It can be
printed, parsed, stored and converted. `DiagonalGaussian` is the distribution, always stored as
``(mean, log_std)``; `GaussianHead` combines a network, a format and the distribution.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, register_kl

from musigma.context import conditioned
from musigma.tensors import at_least_float32, per_example, split, sum_event

__all__ = ["DiagonalGaussian", "EventDistribution", "Format", "GaussianHead"]

Layout = Literal["halves", "interleaved", "two-heads", "per-feature"]
Order = Literal["mean-first", "scale-first"]
Scale = Literal[
    "log_std", "log_var", "softplus", "squareplus", "sigmoid+2", "2*sigmoid",
    "atan", "tanh", "softclip", "softcap",
]  # fmt: skip
Shape = Sequence[int]


# --- scales: from the raw scale to the log standard deviation, and back ------------------------


def _log_softplus(h: Tensor) -> Tensor:
    return torch.where(h < -30, h, F.softplus(h.clamp(min=-30)).log())


def _inverse_softplus(log_y: Tensor) -> Tensor:  # y = softplus(h)  ->  h, given log y
    y = log_y.exp()
    return torch.where(log_y < -30, log_y, y + torch.log(-torch.expm1(-y)))


class _ScaleMap(NamedTuple):
    log_std: Callable[[Tensor, float], Tensor]  # (raw, limit) -> log_std
    raw: Callable[[Tensor, float], Tensor]  # (log_std, limit) -> raw
    reach: Callable[[float], tuple[float, float]] = lambda limit: (-math.inf, math.inf)
    limit: float | None = None  # the default; None: this scale has no limit


_ATAN = 0.636  # FrEIA rounds 2/pi to this, and its checkpoints were trained with it

_SCALES: dict[str, _ScaleMap] = {
    "log_std": _ScaleMap(lambda h, _: h, lambda s, _: s),
    "log_var": _ScaleMap(lambda h, _: 0.5 * h, lambda s, _: 2 * s),
    "softplus": _ScaleMap(lambda h, _: _log_softplus(h), lambda s, _: _inverse_softplus(s)),
    "squareplus": _ScaleMap(lambda h, _: torch.asinh(h / 2), lambda s, _: 2 * torch.sinh(s)),
    "sigmoid+2": _ScaleMap(
        lambda h, _: F.logsigmoid(h + 2),
        lambda s, _: s - torch.log(-torch.expm1(s)) - 2,
        lambda _: (-math.inf, 0.0),
    ),
    "2*sigmoid": _ScaleMap(
        lambda h, _: math.log(2) + F.logsigmoid(h),
        lambda s, _: s - math.log(2) - torch.log(-torch.expm1(s - math.log(2))),
        lambda _: (-math.inf, math.log(2)),
    ),
    "atan": _ScaleMap(
        lambda h, limit: limit * _ATAN * torch.atan(h / limit),
        lambda s, limit: limit * torch.tan(s / (limit * _ATAN)),
        lambda limit: (-limit * _ATAN * math.pi / 2, limit * _ATAN * math.pi / 2),
        limit=2.0,
    ),
    "tanh": _ScaleMap(
        lambda h, limit: limit * torch.tanh(h),
        lambda s, limit: torch.atanh(s / limit),
        lambda limit: (-limit, limit),
        limit=2.0,
    ),
    "softclip": _ScaleMap(
        lambda h, limit: h / torch.rsub(h.abs(), 1, alpha=-1 / limit),  # 1 + |h| / limit, at once
        lambda s, limit: s / (1 - s.abs() / limit),
        lambda limit: (-limit, limit),
        limit=math.log(1e3),
    ),
    "softcap": _ScaleMap(
        lambda h, limit: limit - F.softplus(limit - h),
        lambda s, limit: limit - _inverse_softplus((limit - s).log()),
        lambda limit: (-math.inf, limit),
        limit=2.0,
    ),
}


# --- the format --------------------------------------------------------------------------------


def _bounds(text: str) -> tuple[float, ...] | None:
    return None if text == "none" else tuple(map(float, text.split(",")))


_CHOICES = {"layout": get_args(Layout), "order": get_args(Order), "scale": get_args(Scale)}
_READERS: dict[str, Callable[[str], Any]] = {"dim": int, "bounds": _bounds}
_READERS |= dict.fromkeys(("floor", "limit", "offset", "gain"), float)
_ALIASES = {"split": "halves", "cross": "interleaved"}


@dataclass(frozen=True)
class Format:
    r"""How an emitted tensor is read as ``(mean, log_std)``.

    The tensor is multiplied by `gain` and split into a mean and a raw scale by `layout` and
    `order`. The raw scale plus `offset`, r, becomes a standard deviation:

    | scale        | standard deviation                     | seen in                  |
    |--------------|----------------------------------------|--------------------------|
    | `log_std`    | exp(r)                                 | Glow, VDVAE, nflows      |
    | `log_var`    | exp(r / 2)                             | diffusers, most VAEs     |
    | `softplus`   | log(1 + exp(r))                        | flowjax, scvi            |
    | `squareplus` | (r + sqrt(r² + 4)) / 2                 | GIVT                     |
    | `sigmoid+2`  | 1 / (1 + exp(-r - 2))                  | Glow's couplings         |
    | `2*sigmoid`  | 2 / (1 + exp(-r))                      | Jet                      |
    | `atan`       | exp(0.636 · limit · atan(r / limit))   | FrEIA                    |
    | `tanh`       | exp(limit · tanh(r))                   | local bits-back, FrEIA   |
    | `softclip`   | exp(r / (1 + abs(r) / limit))          | zuko                     |
    | `softcap`    | exp(limit - log(1 + exp(limit - r)))   | distrax                  |

    `floor` is added to the variance for `log_var`, and to the standard deviation otherwise.
    `bounds` then clamp **log_std**, whatever the scale (a clamp of a log-variance to [-30, 20] is
    ``bounds=(-15, 10)``). The default keeps the standard deviation between 4.5e-5 and 22026.

    Layouts: `halves` (the first and the second half of `dim`), `interleaved` (even and odd
    positions of `dim`; "cross" in Glow's code), `two-heads` (a pair of tensors), `per-feature` (a
    trailing axis of size two).

    Args:
        layout: Where the two parts are.
        order: Which part comes first.
        scale: What the raw scale means, from the table.
        dim: The axis that holds both parts, for `halves` and `interleaved`.
        bounds: Smallest and largest log_std, or None for no bounds.
        floor: Added to the variance (`log_var`) or to the standard deviation.
        limit: The limit of `atan`, `tanh`, `softclip` and `softcap`; None for its default.
        offset: Added to the raw scale (TFP's Glow emits exp(r + 2)).
        gain: Multiplies the whole tensor (FrEIA's all-in-one block has 0.1).

    Raises:
        ValueError: If a name is unknown, or a value is out of range.

    Example:
        >>> f = Format.parse("interleaved log_var")
        >>> mean, log_std = f.split(torch.tensor([[1.0, 0.0, 2.0, 4.0]]))
        >>> mean, log_std
        (tensor([[1., 2.]]), tensor([[0., 2.]]))
        >>> f.join(mean, log_std)
        tensor([[1., 0., 2., 4.]])
    """

    layout: Layout = "halves"
    order: Order = "mean-first"
    scale: Scale = "log_std"
    dim: int = 1
    bounds: tuple[float, float] | None = (-10.0, 10.0)
    floor: float = 0.0
    limit: float | None = None
    offset: float = 0.0
    gain: float = 1.0

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if (word := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {word!r}")
        default = _SCALES[self.scale].limit
        if self.limit is None:
            object.__setattr__(self, "limit", default)
        elif default is None:
            raise ValueError(f"limit: scale {self.scale!r} has none; got {self.limit}")
        elif self.scale != "softcap" and self.limit <= 0:
            raise ValueError(f"limit: expected a positive number; got {self.limit}")
        if self.bounds is not None and not (
            len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]
        ):
            raise ValueError(f"bounds: expected (low, high) with low < high; got {self.bounds}")
        for name in ("floor", "limit", "offset", "gain"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number; got {value}")
        if self.floor < 0:
            raise ValueError(f"floor: expected 0 or more; got {self.floor}")
        if self.gain == 0:
            raise ValueError("gain: expected a number other than zero")

    # -- reading and writing

    def split(self, h: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Read a tensor, or a pair of tensors, as ``(mean, log_std)`` in float32 or better.

        Raises:
            ValueError: If the tensor does not have two parts of equal shape where `layout` says.
        """
        mean, raw = self._scaled(h)
        return mean, self.log_std(raw)

    def join(self, mean: Tensor, log_std: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Write ``(mean, log_std)`` as the tensor that `split` reads: its inverse.

        Raises:
            ValueError: If this format cannot express a value of log_std.
        """
        (low, high), power, unfloored = self.reach, self._power, log_std
        if self.floor:
            unfloored = ((power * log_std).exp() - self.floor).log() / power
        raw = (_SCALES[self.scale].raw(unfloored, self.limit or 0.0) - self.offset) / self.gain
        if not (raw.isfinite().all() and (log_std >= low).all() and (log_std <= high).all()):
            raise ValueError(
                f"log_std: '{self}' reaches from {low:.4g} to {high:.4g}; got values from "
                f"{log_std.min():.4g} to {log_std.max():.4g}"
            )
        return self._pack(mean / self.gain, raw)

    def log_std(self, raw: Tensor) -> Tensor:
        """The log standard deviation for a raw scale, already multiplied by `gain`."""
        log_std = _SCALES[self.scale].log_std(
            raw + self.offset if self.offset else raw, self.limit or 0.0
        )
        if self.floor:
            floor = torch.full_like(log_std, math.log(self.floor))
            log_std = torch.logaddexp(self._power * log_std, floor) / self._power
        low, high = _SCALES[self.scale].reach(self.limit or 0.0)
        if self.bounds is None or (self.bounds[0] <= low and high <= self.bounds[1]):
            return log_std  # no clamp is needed; a floor only raises `low`
        return log_std.clamp(*self.bounds)

    @property
    def _power(self) -> int:
        """The power of the standard deviation to which the floor is added."""
        return 2 if self.scale == "log_var" else 1

    @property
    def reach(self) -> tuple[float, float]:
        """The smallest and the largest log_std that this format can express."""
        low, high = _SCALES[self.scale].reach(self.limit or 0.0)
        if self.floor:
            low, high = (
                math.log(math.exp(self._power * s) + self.floor) / self._power if s < 350 else s
                for s in (low, high)
            )
        if self.bounds is not None:
            low, high = max(low, self.bounds[0]), min(high, self.bounds[1])
        return low, high

    def saturation(self, h: Tensor | Sequence[Tensor]) -> Tensor:
        """The share of elements, from 0 to 1, whose log_std is at a limit.

        There the derivative of log_std with respect to the raw scale is below 0.01: outside the
        bounds, on the floor, or at the end of a bounded scale.
        """
        with torch.enable_grad():
            raw = self._scaled(h)[1].detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_std(raw).sum(), raw)
        return (slope.abs() < 0.01).float().mean()

    # -- other layouts

    def relayout(
        self, rows: Tensor | Sequence[Tensor], to: Format
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Reorder the rows (dim 0) of a parameter of the last layer to the layout of `to`."""
        return to._of_rows()._pack(*self._of_rows()._unpack(rows))

    def permute(
        self, weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None, to: Format
    ):
        """Convert the last layer of a network from this format to another, exactly.

        A change of layout or order permutes the rows. From `log_std` to `log_var` the rows of the
        scale are doubled; from `log_var` to `log_std` they are halved. `weight` (2 D, ...) and
        `bias` (2 D,) are pairs if the layout is `two-heads`.

        Raises:
            ValueError: If the formats differ in any other way, which no linear layer can express.
        """
        factor = {("log_std", "log_var"): 2.0, ("log_var", "log_std"): 0.5}.get(
            (self.scale, to.scale), 1.0
        )
        moved = replace(
            self,
            layout=to.layout,
            order=to.order,
            dim=to.dim,
            scale=to.scale if factor != 1 else self.scale,
            offset=factor * self.offset,
        )
        if moved != to or (factor != 1 and self.floor):
            raise ValueError(
                f"to: '{self}' and '{to}' differ by more than layout, order and the factor 2 "
                "between log_std and log_var, so no last layer makes them equal; "
                "keep the format, or train again"
            )

        def convert(rows):
            mean, raw = self._of_rows()._unpack(rows)
            return to._of_rows()._pack(mean, factor * raw)

        return convert(weight), None if bias is None else convert(bias)

    def _of_rows(self) -> Format:
        """The format of the rows of a last layer whose output has this format."""
        layout = "interleaved" if self.layout == "per-feature" else self.layout
        return replace(self, layout=layout, dim=0)

    def _scaled(self, h: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Both parts in float32 or better, times the gain."""
        mean, raw = map(at_least_float32, self._unpack(h))
        return (mean, raw) if self.gain == 1 else (mean * self.gain, raw * self.gain)

    def _unpack(self, h: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Both parts as they are, mean first."""
        parts: Sequence[Tensor] = ()
        if not isinstance(h, Tensor):
            parts = tuple(h) if self.layout == "two-heads" else ()
        elif self.layout == "per-feature":
            parts = h.unbind(-1) if h.shape[-1:] == (2,) else ()
        elif not -h.ndim <= self.dim < h.ndim or h.shape[self.dim] % 2:
            parts = ()
        elif self.layout == "halves":
            parts = split(h, [h.shape[self.dim] // 2] * 2, self.dim)
        elif self.layout == "interleaved":
            last = h.movedim(self.dim, -1).unflatten(-1, (-1, 2))  # gradients: channels last too
            parts = tuple(t.movedim(-1, self.dim) for t in last.unbind(-1))
        if len(parts) != 2 or parts[0].shape != parts[1].shape:
            reads = {
                "two-heads": "a pair of tensors of one shape",
                "per-feature": "one tensor with a last axis of size 2",
            }.get(self.layout, f"one tensor with an even number of channels on axis {self.dim}")
            shapes = [h.shape] if isinstance(h, Tensor) else [t.shape for t in h]
            got = " and ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"h: '{self}' reads {reads}; got {got}")
        first, second = parts
        return (first, second) if self.order == "mean-first" else (second, first)

    def _pack(self, mean: Tensor, raw: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The inverse of `_unpack`."""
        pair = (mean, raw) if self.order == "mean-first" else (raw, mean)
        if self.layout == "two-heads":
            return pair
        if self.layout == "per-feature":
            return torch.stack(pair, -1)
        if self.layout == "halves":
            return torch.cat(pair, self.dim)
        axis = self.dim % mean.ndim
        return torch.stack(pair, axis + 1).flatten(axis, axis + 1)

    # -- as text

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read a format from text such as ``"interleaved log_var floor=1e-4"``.

        "split" and "cross" are Glow's names for `halves` and `interleaved`.

        Raises:
            ValueError: If a word is unknown (the message suggests the nearest one) or given twice.

        Example:
            >>> Format.parse("cross sigmoid+2 bounds=none").layout
            'interleaved'
        """
        words = {word: name for name, allowed in _CHOICES.items() for word in allowed}
        values: dict = {}
        for word in text.split():
            name, _, number = word.partition("=")
            word = _ALIASES.get(word, word)
            if word in words:
                name, value = words[word], word
            elif name in _READERS:
                try:
                    value = _READERS[name](number)
                except ValueError:
                    raise ValueError(f"format: cannot read the number in {word!r}") from None
            else:
                close = difflib.get_close_matches(word, [*words, *_ALIASES, *_READERS], 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"format: unknown word {word!r}{hint}")
            if name in values:
                raise ValueError(f"format: {name} is given twice in {text!r}")
            values[name] = value
        return cls(**values)

    def __str__(self) -> str:
        words = [self.layout, self.order, self.scale]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            default = _SCALES[self.scale].limit if field.name == "limit" else field.default
            if value != default:
                if field.name == "bounds":
                    value = "none" if value is None else ",".join(map(repr, value))
                words.append(f"{field.name}={value}")
        return " ".join(words)


# --- the distribution --------------------------------------------------------------------------


class EventDistribution(Distribution):
    """Base class of this library's distributions: over events, without argument validation.

    A subclass implements `log_prob` in nats per event, and `rsample` or `sample`. Draws take a
    `temperature`: a number, or one number for each entry of the first dimension. It shrinks a draw
    toward the center of the distribution, which it reaches at temperature 0.

    Where the elements of an event are independent, it also has `log_prob_of_elements`, whose terms
    add up to `log_prob`; for images, at least the pixels are.

    Attributes:
        element: The constraint that each element of an event meets.
    """

    element: constraints.Constraint = constraints.real
    arg_constraints = {}  # noqa: RUF012  # pyright: ignore

    def __init__(self, batch_shape: Shape, event_shape: Sequence[int]):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Events whose elements each meet `element`."""
        return constraints.independent(self.element, len(self.event_shape))

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Like `rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, temperature=temperature)  # pyright: ignore

    def _sum(self, terms: Tensor) -> Tensor:
        return sum_event(terms, len(self.event_shape))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


class DiagonalGaussian(EventDistribution):
    r"""A Gaussian with independent coordinates, N(mean, diag(exp(2 · log_std))).

    .. math:: \log p(x) = -\sum_i \tfrac12 ((x_i-\mu_i) e^{-s_i})^2 + s_i + \tfrac12\log 2\pi

    where s is `log_std`. The last `event_ndims` dimensions form one event: `log_prob` and
    `entropy` are in nats per example and have the batch shape. Arguments in half precision are
    converted to float32. The KL divergence between two of them is registered with torch.

    Args:
        mean: Shape (\*batch, \*event).
        log_std: The natural logarithm of the standard deviation; broadcast against `mean`.
        event_ndims: Number of trailing dimensions that form one event.

    Raises:
        ValueError: If the shapes do not broadcast, or have fewer than `event_ndims` dimensions.

    Example:
        >>> g = DiagonalGaussian(torch.zeros(5, 3), torch.zeros(5, 3), event_ndims=1)
        >>> g.log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
        >>> bool((g.whiten(g.unwhiten(torch.ones(5, 3))) == 1).all())
        True
    """

    has_rsample = True

    def __init__(self, mean: Tensor, log_std: Tensor, event_ndims: int):
        mean, log_std = at_least_float32(mean), at_least_float32(log_std)
        if mean.shape != log_std.shape:
            try:
                mean, log_std = torch.broadcast_tensors(mean, log_std)
            except RuntimeError:
                raise ValueError(
                    f"log_std: shape {tuple(log_std.shape)} does not broadcast with that of the "
                    f"mean, {tuple(mean.shape)}"
                ) from None
        if not 0 <= event_ndims <= mean.ndim:
            raise ValueError(
                f"event_ndims: expected 0 to {mean.ndim} for shape {tuple(mean.shape)}; "
                f"got {event_ndims}"
            )
        self._mean, self.log_std, self.event_ndims = mean, log_std, event_ndims
        batch_ndims = mean.ndim - event_ndims
        super().__init__(mean.shape[:batch_ndims], mean.shape[batch_ndims:])

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._mean

    @property
    def mode(self) -> Tensor:
        """The mode, which is the mean."""
        return self._mean

    @property
    def base_dist(self) -> DiagonalGaussian:
        """The same Gaussians with scalar events, as in `torch.distributions.Independent`."""
        return DiagonalGaussian(self._mean, self.log_std, 0)

    @property
    def stddev(self) -> Tensor:
        """The standard deviation, exp(log_std)."""
        return self.log_std.exp()

    @property
    def variance(self) -> Tensor:
        """The variance, exp(2 log_std)."""
        return (2 * self.log_std).exp()

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw ``mean + temperature · std · ε`` with ε ~ N(0, I), differentiably.

        `temperature` is a number, or one number for each entry of the first dimension.
        """
        shape = (*sample_shape, *self._mean.shape)
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        return self.unwhiten(per_example(temperature, noise) * noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, summed over the event; it has the batch shape."""
        squares, log_stds = self._sum(self.whiten(value).square()), self._sum(self.log_std)
        constant = 0.5 * math.log(2 * math.pi) * math.prod(self.event_shape)
        return -(0.5 * squares + log_stds + constant)

    def log_prob_of_elements(self, value: Tensor) -> Tensor:
        r"""Log density of each element in nats, shape (\*batch, \*event)."""
        return -(0.5 * self.whiten(value).square() + self.log_std + 0.5 * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the event; it has the batch shape."""
        return self._sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e))

    def whiten(self, value: Tensor) -> Tensor:
        """The standardized value, (value - mean) / std."""
        return (at_least_float32(value) - self._mean) * (-self.log_std).exp()

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The inverse of `whiten`: mean + std · noise."""
        return self._mean + self.log_std.exp() * at_least_float32(noise)

    def expand(self, batch_shape: Shape, _instance=None) -> DiagonalGaussian:
        """The same distribution with another batch shape."""
        shape = (*batch_shape, *self.event_shape)
        return DiagonalGaussian(
            self._mean.expand(shape), self.log_std.expand(shape), self.event_ndims
        )


@register_kl(DiagonalGaussian, DiagonalGaussian)
def gaussian_kl(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    """KL(q || p) in nats, summed over the event: ½ Σ (σ²_q + (μ_q - μ_p)²) / σ²_p - 1 - log ratio.

    Raises:
        ValueError: If the event shapes differ.
    """
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"p: expected the event shape of q, {tuple(q.event_shape)}; got {tuple(p.event_shape)}"
        )
    log_ratio = q.log_std - p.log_std
    terms = 0.5 * ((2 * log_ratio).exp() + p.whiten(q.mean).square() - 1) - log_ratio
    return sum_event(terms, q.event_ndims)


# --- the head ----------------------------------------------------------------------------------


class GaussianHead(nn.Module):
    """A network whose output is read as a `DiagonalGaussian`.

    ``head(given, context)`` is ``net(given, context)``, or ``net(given)`` without a context, read
    by `format`. If `log_std` is given, the network emits only the mean.

    Args:
        net: Emits the tensor, or the pair of tensors, that `format` reads: (B, 2 D) for vectors,
            (B, 2 C, H, W) for images.
        event_ndims: 1 for vectors, 3 for images.
        format: How the network's output is read.
        log_std: None: emitted by the network. A number: fixed. A tensor: the initial value of a
            learned parameter, broadcast against the mean; (C, 1, 1) is one for each channel.

    Example:
        >>> head = GaussianHead(nn.Linear(4, 6), event_ndims=1)
        >>> head(torch.randn(2, 4)).event_shape
        torch.Size([3])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        event_ndims: int,
        format: Format = Format(),
        log_std: float | Tensor | None = None,
    ):
        super().__init__()
        self.net, self.event_ndims, self.format = net, event_ndims, format
        self.emitted = log_std is None
        if isinstance(log_std, Tensor):
            self.log_std = nn.Parameter(log_std.clone())
        else:
            self.log_std = None if log_std is None else float(log_std)

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> DiagonalGaussian:
        """The distribution of a batch."""
        h = conditioned(self.net, given, context)
        if self.emitted:
            mean, log_std = self.format.split(h)
        else:
            mean = at_least_float32(h)
            shared = self.log_std
            fixed = shared if isinstance(shared, Tensor) else torch.full_like(mean, shared or 0.0)
            log_std = fixed if self.format.bounds is None else fixed.clamp(*self.format.bounds)
        return DiagonalGaussian(mean, log_std, self.event_ndims)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if self.emitted:
            yield self.net, self.format.saturation

    def extra_repr(self) -> str:
        """Names the format."""
        if self.emitted:
            return f"format='{self.format}'"
        shared = self.log_std
        return f"log_std={shared:.4g}" if isinstance(shared, float) else "log_std shared"
