"""Exact counts, the same on any machine and under any load: FLOPs, kernels, saved bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.harness import Subject
from benchmarks.speed.package import kept_bytes

__all__ = ["counts", "flops", "kernels", "mixed_layouts", "peak_growth"]


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call.

    A multiply-add counts as two, as in `torch.utils.flop_counter`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # unknown to torch's counter
    mapping = {linear: _linear_flops} if linear else {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def _linear_flops(x: Sequence[int], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    return 2 * math.prod(x) * weight[0]


_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


class _KernelCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in _NO_WORK:
            self.count += 1
        return func(*args, **(kwargs or {}))


def kernels(call: Callable[[], object]) -> int:
    """Dispatched operations that touch memory in a call: all but views and empty tensors.

    A GPU launches about as many kernels; a CPU spends a few microseconds on each, however small.

    Example:
        >>> x = torch.randn(3, 4)
        >>> kernels(lambda: (x.t() + 1).exp())
        2
    """
    with _KernelCounter() as mode:
        call()
    return mode.count


class _LayoutCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in {*_NO_WORK, "mm", "addmm"}:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            strides = [t.stride() for t in tensors if t.ndim == 2 and min(t.shape) > 1]
            rows = any(last == 1 < first for first, last in strides)
            self.count += rows and any(first == 1 < last for first, last in strides)
        return result


def mixed_layouts(call: Callable[[], object]) -> int:
    """Operations of a call, other than products, on matrices of two memory layouts.

    They read or write one of the matrices in jumps, and take several times as long as others.

    Example:
        >>> x, y = torch.randn(3, 4), torch.randn(4, 3).t()
        >>> mixed_layouts(lambda: (x + x, y.exp() * y))
        0
        >>> mixed_layouts(lambda: x + y)
        1
    """
    with _LayoutCounter() as mode:
        call()
    return mode.count


def counts(subject: Subject, operation: str) -> dict[str, int]:
    """FLOPs and kernels of one call and, for `step`, the bytes that its loss saves."""
    with subject.mode(operation):
        call = subject.calls[operation]
        result = {"flops": flops(call), "kernels": kernels(call)}
        if operation == "step" and subject.loss is not None and subject.model is not None:
            result["saved_bytes"] = kept_bytes(subject.loss, [*subject.model.parameters()])
    return result


def peak_growth(call: Callable[[], object], times: int = 3) -> int | None:
    """Bytes by which this process grows at its peak over `times` calls; None if unknown.

    Meaningful only in a process that has computed nothing yet, because the heap keeps freed
    memory. Linux only: the kernel records the peak.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None
    clear.write_text("5")  # resets the recorded peak
    before = _kilobytes(status, "VmRSS")
    for _ in range(times):
        call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])
