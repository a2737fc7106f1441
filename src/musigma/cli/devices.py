"""The device that a command computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available() -> list[str]:
    """The devices of this machine, as `--device` takes them; the CPU is last."""
    import torch

    names = []
    if (gpu := torch.accelerator.current_accelerator(check_available=True)) is not None:
        count = torch.accelerator.device_count()
        names = [f"{gpu.type}:{i}" if count > 1 else gpu.type for i in range(count)]
    return [*names, "cpu"]


def best_device() -> str:
    """Cuda or mps where there is one, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_named(name: str | None) -> torch.device:
    """The device of a name, or the best one.

    Raises:
        ValueError: If this machine has no such device, naming those that it has.
    """
    import torch

    name = name or best_device()
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and (local := os.environ.get("LOCAL_RANK")):
            device = torch.device("cuda", int(local) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = available()
        reason = ""
        if name in known or f"{name}:0" in known:
            reason = f" (it is found, but fails: {str(error).splitlines()[0]})"
        raise ValueError(
            f"device: {name!r} cannot be used on this machine{reason}; it has {', '.join(known)}"
        ) from error
    return device
