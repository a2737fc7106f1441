"""The arithmetic of networks in coding: exact anywhere, or pinned to one kind of machine.

`exact` computes networks in float64. Their outputs differ by about 1e-14 between batch sizes,
threads, kernels and machines, and `Rounding` removes the difference, so that any machine can read
the file. `pinned` computes in float32, about twice as fast, and removes no differences: the reader
needs the same release of torch and the same kind of processor, and any other machine is refused
before it decodes a pixel.
"""

from __future__ import annotations

import copy
import platform
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from musigma.model import Model

__all__ = ["Kernels", "Numerics", "machine", "prepared"]

Numerics = Literal["exact", "pinned"]


def prepared(model: Model, numerics: Numerics) -> Model:
    """A copy of a model for coding, on the CPU.

    Raises:
        ValueError: For unknown numerics.
    """
    if numerics not in get_args(Numerics):
        raise ValueError(f"numerics: expected {' or '.join(get_args(Numerics))}; got {numerics!r}")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    if numerics == "exact":
        return model.double()
    for module in model.modules():
        module.register_forward_pre_hook(_pinned)
    return model.float()


def _pinned(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The other direction may have the same numbers in another memory layout, or in float64."""
    return tuple(
        (t.float() if t.dtype == torch.float64 else t).contiguous() if isinstance(t, Tensor) else t
        for t in inputs
    )


def machine() -> dict[str, Any]:
    """Everything besides the model on which results in float32 depend."""
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    }


class Kernels(TorchFunctionMode):
    """Convolutions in float64 by matrix products: up to 14 times as fast as those of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace convolutions."""
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d) and args[0].dtype == torch.float64:
            return _conv2d(*args, **kwargs)
        return func(*args, **kwargs)


ROOM = 350_000
"""Numbers that fit the cache of a processor."""


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
    if groups != 1 or isinstance(padding[0], str) or x.ndim != 4:
        padding = padding[0] if isinstance(padding[0], str) else padding
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x = x.permute(0, 2, 3, 1)
    bias = x.new_zeros(len(weight)) if bias is None else bias
    within = all(p < size for p, size in zip(padding, weight.shape[2:], strict=True))
    if 4 * len(weight) <= x.shape[3] and stride == dilation == (1, 1) and within:
        return _scattered(x, weight, bias, padding).permute(0, 3, 1, 2)
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    return _gathered(x, weight, bias, stride, dilation).permute(0, 3, 1, 2)


def _gathered(x, weight, bias, stride, dilation):
    """The inputs of each output side by side, times the weights; some images at a time."""
    n, channels, (rows, columns) = len(x), x.shape[3], weight.shape[2:]
    height, width = (
        (x.shape[i + 1] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    image, line, pixel, one = x.stride()
    seen = x.as_strided(
        (n, height, width, rows, columns, channels),
        (image, line * stride[0], pixel * stride[1], line * dilation[0], pixel * dilation[1], one),
    )
    flat = weight.permute(2, 3, 1, 0).reshape(-1, len(weight))
    y = x.new_empty(n, height * width, len(weight))
    at_once = max(1, ROOM // max(1, seen[0].numel()))
    for i in range(0, n, at_once):
        part = y[i : i + at_once].view(-1, len(weight))
        torch.addmm(bias, seen[i : i + at_once].reshape(len(part), -1), flat, out=part)
    return y.view(n, height, width, len(weight))


def _scattered(x, weight, bias, padding):
    """Every pixel times all weights, added to the outputs that see it: for few outputs."""
    n, height, width, channels = x.shape
    out, _, rows, columns = weight.shape
    y = (x.reshape(-1, channels) @ weight.permute(1, 2, 3, 0).reshape(channels, -1)).view(
        n, height, width, rows * columns, out
    )
    sums = x.new_zeros(n, height + rows - 1, width + columns - 1, out)
    for k in range(rows * columns):
        top, left = rows - 1 - k // columns, columns - 1 - k % columns
        sums[:, top : top + height, left : left + width] += y[:, :, :, k]
    (top, left), (tall, wide) = padding, (height + 2 * padding[0], width + 2 * padding[1])
    first, second = rows - 1 - top, columns - 1 - left
    return sums[:, first : first + tall - rows + 1, second : second + wide - columns + 1] + bias


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)
