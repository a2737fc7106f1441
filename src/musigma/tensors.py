"""Small tensor operations that are used throughout the library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "batch_last",
    "channels_last",
    "concatenated",
    "frozen",
    "gumbel_like",
    "moments",
    "normal_quantile",
    "per_example",
    "rounded",
    "slerp",
    "split",
    "sum_event",
]


def at_least_float32(t: Tensor) -> Tensor:
    """Convert half precision to float32, for densities; other types are unchanged."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def channels_last(t: Tensor) -> Tensor:
    """Images (B, C, H, W) in channels-last memory format, which is fast for convolutions."""
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def batch_last(t: Tensor) -> bool:
    """Whether these are vectors (B, C) of which each element is contiguous over the batch.

    The networks of couplings and autoregressive layers emit them so (`musigma.nets.vectors`).
    Operations on tensors of two layouts take several times as long.
    """
    return t.ndim == 2 and t.stride(0) == 1 != t.stride(1)


def split(t: Tensor, sizes: list[int], dim: int = 1) -> Sequence[Tensor]:
    """Parts of some sizes, as `torch.split`; the gradient has the layout of `t`."""
    if dim == 1 and t.requires_grad and batch_last(t):
        return [part.t() for part in t.t().split_with_sizes(sizes)]
    return t.split_with_sizes(sizes, dim)


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Parts joined on axis 1, in the layout of the parts."""
    if any(batch_last(part) for part in parts):
        return torch.cat([part.t() for part in parts]).t()
    return torch.cat([*parts], 1)


def sum_event(t: Tensor, event_ndims: int) -> Tensor:
    """The sum over the last `event_ndims` dimensions, which may be none."""
    return t.sum([*range(-event_ndims, 0)]) if event_ndims else t


def per_example(weight: float | Tensor, value: Tensor) -> float | Tensor:
    """A number, or one number per example (B,), reshaped to multiply `value` (B, ...)."""
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight.to(value).reshape(-1, *(1,) * (value.ndim - 1))
    return weight


def gumbel_like(t: Tensor) -> Tensor:
    """Gumbel noise: the largest entry of log p + noise is a draw from p."""
    return -torch.empty_like(t).exponential_().log()


def moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows, in float64 on the CPU.

    The standard deviation is 1 where all rows are equal, up to the rounding of the tensor's type.
    """
    eps = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
    t = t.to("cpu", torch.float64)
    mean, std = t.mean(0), t.std(0, correction=0)
    return mean, torch.where(std > 4 * eps * mean.abs(), std, torch.ones_like(std))


def rounded(t: Tensor) -> Tensor:
    """The nearest integers, with the gradient of the identity (the straight-through estimator).

    (Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
    2013, arXiv:1308.3432.) The sum is exact in any floating-point type.
    """
    return t + (t.round() - t).detach()


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate the direction and the length of two batches of tensors, 0 <= t <= 1."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    length_a, length_b = (v.norm(dim=1, keepdim=True) for v in (flat_a, flat_b))
    unit_a, unit_b = (v / n.clamp(min=1e-12) for v, n in ((flat_a, length_a), (flat_b, length_b)))
    angle = torch.acos((unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1))
    sine = angle.sin()
    turned = (((1 - t) * angle).sin() * unit_a + (t * angle).sin() * unit_b) / sine
    straight = torch.lerp(unit_a, unit_b, t)
    direction = torch.where(sine > 1e-4, turned, straight)
    return (direction * torch.lerp(length_a, length_b, t)).view_as(a)


def normal_quantile(log_p: Tensor) -> Tensor:
    """The quantile of the standard normal distribution at exp(log_p), at most one half.

    Where exp underflows, by Newton's method from the leading terms of its asymptotic expansion.
    """
    near = torch.special.ndtri(log_p.clamp(min=-690.0).exp())
    log_p = log_p.clamp(-1e300, -100.0)
    y = -(-2 * log_p - (-4 * math.pi * log_p).log()).sqrt()
    for _ in range(3):
        mills = torch.special.erfcx(-y / math.sqrt(2)) * math.sqrt(math.pi / 2)
        y = y - (torch.special.log_ndtr(y) - log_p) * mills
    return torch.where(log_p < -300, y, near)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which these parameters are constants, without gradients."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
