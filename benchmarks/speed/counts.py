"""What can be counted exactly, on any machine and under any load: bytes, FLOPs, kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.harness import Subject
from torch.utils._python_dispatch import TorchDispatchMode

from musigma.training.machine import kept_bytes

__all__ = ["counts", "flops", "kernels", "peak_growth"]


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call.

    Two for each multiply-add, as `torch.utils.flop_counter` counts them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    fast = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch's counter knows it not
    with FlopCounterMode(display=False, custom_mapping={fast: _linear} if fast else {}) as counter:
        call()
    return counter.get_total_flops()


def _linear(x: Sequence[int], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    return 2 * math.prod(x) * weight[0]


_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


class _Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in _NO_WORK:
            self.count += 1
        return func(*args, **(kwargs or {}))


def kernels(call: Callable[[], object]) -> int:
    """Operations that touch memory in a call: what is dispatched, less views and empty tensors.

    On a GPU, about as many kernels are launched; on a CPU, each costs a few microseconds however
    little there is to do.

    Example:
        >>> x = torch.randn(3, 4)
        >>> kernels(lambda: (x.t() + 1).exp())
        2
    """
    with _Kernels() as mode:
        call()
    return mode.count


def counts(subject: Subject, what: str) -> dict[str, int]:
    """FLOPs and kernels of one call, and, of a `step`, the saved bytes of its loss."""
    with subject.ready(what):
        found = {"flops": flops(subject.calls[what]), "kernels": kernels(subject.calls[what])}
        if what == "step" and subject.loss is not None and subject.model is not None:
            found["saved_bytes"] = kept_bytes(subject.loss, [*subject.model.parameters()])
    return found


def peak_growth(call: Callable[[], object], times: int = 3) -> int | None:
    """Bytes by which this process grows at its peak over `times` calls; None: not known here.

    Only meaningful in a process that has computed nothing yet, for the heap keeps what was freed.
    On Linux alone, where the kernel keeps the peak.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None
    clear.write_text("5")  # forget the peak so far
    before = _kilobytes(status, "VmRSS")
    for _ in range(times):
        call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
