"""The device that a command computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def devices() -> list[str]:
    """The devices of this machine, as `--device` takes them; the CPU is last."""
    import torch

    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if gpu is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return [*([gpu.type] if count == 1 else [f"{gpu.type}:{i}" for i in range(count)]), "cpu"]


def device_named(name: str | None) -> torch.device:
    """The device of a name, or the best one.

    Raises:
        ValueError: If this machine has no such device, naming those that it has.
    """
    import torch

    name = name or devices()[0].partition(":")[0]
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and (local := os.environ.get("LOCAL_RANK")):
            device = torch.device("cuda", int(local) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = devices()
        reason = ""
        if name in known or f"{name}:0" in known:
            reason = f" (it is found, but fails: {str(error).splitlines()[0]})"
        raise ValueError(
            f"device: {name!r} cannot be used on this machine{reason}; it has {', '.join(known)}"
        ) from error
    return device
