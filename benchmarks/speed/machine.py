"""The machine, the settings of the process, and the machine's own peak."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed.package import retain_heap

__all__ = ["describe", "peak_kernels", "settings"]

OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables that decide how threads share work and wait for each other."""


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, versions and date; no host or user names."""
    machine: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "when": time.strftime("%Y-%m-%d"),
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 2)
    return machine


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    present = set(flags[1].split()) if flags else set()
    extras = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in present]
    return " ".join([name[1] if name else platform.machine(), *extras])


@contextmanager
def settings(*, threads: int | None = None, keep_heap: bool = True) -> Iterator[dict[str, Any]]:
    """Apply the settings that all contenders share to this process; yields a record of them.

    Args:
        threads: Number of torch threads; None: torch's default.
        keep_heap: Keep freed memory instead of returning it to the system after each step.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield {
            "threads": torch.get_num_threads(),
            "heap_kept": keep_heap and retain_heap(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            **{name: os.environ.get(name, "unset") for name in OPENMP},
        }
    finally:
        torch.set_num_threads(before)


def peak_kernels(dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls that come near the machine's peak, with the FLOPs of each, by name.

    A square matrix product through each library that torch has for it, and 3x3 convolutions with
    channels last.
    """
    n = 1024
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    kernels: dict[str, tuple[Callable[[], object], int]] = {
        f"matmul {n}": (lambda: a @ b, 2 * n**3),
    }
    if (linear := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) and not a.is_cuda:
        kernels[f"oneDNN matmul {n}"] = (lambda: linear(a, b, None, "none", [], ""), 2 * n**3)
    for channels, size in ((128, 16), (64, 32)):
        x = torch.randn(32, channels, size, size).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
        kernels[f"conv 3x3 {channels} at {size}x{size}"] = (
            lambda x=x, w=w: F.conv2d(x, w, padding=1),
            2 * 32 * 9 * channels**2 * size**2,
        )
    return kernels
