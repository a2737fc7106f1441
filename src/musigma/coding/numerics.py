"""The arithmetic of networks in coding: exact anywhere, or pinned to one kind of machine.

`exact` computes networks in float64. Their outputs differ by about 1e-14 between batch sizes,
threads, kernels and machines. Rounded to a grid they agree exactly, unless a number lies so close
to the middle between two points that the difference decides: the encoder lists these exceptions,
one value in two million, and the decoder looks them up. Any machine can therefore read the file.
`pinned` computes in float32, about twice as fast, and lists nothing: the reader needs the same
release of torch and the same kind of processor, and any other machine is refused before it decodes
a pixel.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from musigma.coding.errors import CodingError, NumericsDiffer
from musigma.model import Model

__all__ = ["Exceptions", "Kernels", "Numerics", "Rounding", "machine", "one_thread", "prepared"]

Numerics = Literal["exact", "pinned"]
GUARD = 2.0**-22
"""Values closer than this to the middle between two integers are listed."""
Exceptions = dict[tuple[int, int], bool]
"""Whether a listed value was rounded up, by its place and its index in the batch."""
ROOM = 350_000
"""Numbers that fit the cache of a processor."""


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Rounding:
    """Rounds the real numbers of one batch.

    Args:
        listed: The exceptions that the encoder listed; None in the encoder, which fills the
            attribute `listed`.
        guarded: Whether there are exceptions; false where numbers are always the same.
    """

    def __init__(self, listed: Exceptions | None = None, *, guarded: bool = True):
        self.encoding, self.guarded = listed is None, guarded
        self.listed: Exceptions = {} if listed is None else listed

    def __call__(self, values: Tensor, scale: float, place: int) -> np.ndarray:
        """``values * scale``, rounded, int64; `place` identifies the values in both directions.

        Raises:
            CodingError: If a value is not finite, or exceeds 2^52.
            NumericsDiffer: If the encoder should have listed a value, and did not.
        """
        scaled = values.detach().to(torch.float64).cpu().contiguous().numpy() * scale
        if not (np.abs(scaled) < 2.0**52).all():
            raise CodingError(
                "the model's distributions are not finite for some of these data, or too large; "
                "evaluate the model on them, and look at `inspect`"
            )
        whole = np.rint(scaled)
        off = np.abs(scaled - whole) if self.guarded else np.zeros(0)
        for i in np.flatnonzero(off > 0.5 - GUARD).tolist():
            low = math.floor(scaled.flat[i])
            if self.encoding:
                self.listed[place, i] = bool(whole.flat[i] > low)
            elif (place, i) in self.listed:
                whole.flat[i] = low + self.listed[place, i]
            elif off.flat[i] > 0.5 - GUARD / 2:
                raise NumericsDiffer(
                    "a parameter lies where the encoder would have listed an exception: the "
                    "arithmetic of this machine differs from that of the machine that wrote the "
                    "file"
                )
        return whole.astype(np.int64)


class Kernels(TorchFunctionMode):
    """Convolutions in float64 by matrix products: up to 14 times as fast as those of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace convolutions."""
        if func in (F.conv2d, torch.conv2d) and args[0].dtype == torch.float64:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, pad, spread = (_pair(v) for v in (stride, padding, dilation))
    if groups != 1 or isinstance(padding, str) or x.ndim != 4 or spread != (1, 1):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x = x.permute(0, 2, 3, 1)
    bias = x.new_zeros(len(weight)) if bias is None else bias
    within = all(p < size for p, size in zip(pad, weight.shape[2:], strict=True))
    if 4 * len(weight) <= x.shape[3] and stride == (1, 1) and within:
        return _scattered(x, weight, bias, pad).permute(0, 3, 1, 2)
    x = F.pad(x, (0, 0, pad[1], pad[1], pad[0], pad[0])).contiguous()
    return _gathered(x, weight, bias, stride).permute(0, 3, 1, 2)


def _gathered(x, weight, bias, stride):
    """The inputs of each output side by side, times the weights; some images at a time."""
    seen = x.unfold(1, weight.shape[2], stride[0]).unfold(2, weight.shape[3], stride[1])
    n, height, width = seen.shape[:3]
    seen = seen.permute(0, 1, 2, 4, 5, 3)
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
    up, left = rows - 1 - padding[0], columns - 1 - padding[1]
    return sums[:, up : sums.shape[1] - up, left : sums.shape[2] - left] + bias


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)
