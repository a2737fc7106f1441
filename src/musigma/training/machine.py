"""What a machine can do for a run: kept heap, low precision, compilation, and parts that fit."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import Context
from musigma.model import Model
from musigma.processes import current_processes
from musigma.training.config import TrainConfig, bytes_of, text_of

__all__ = [
    "accelerator",
    "casting",
    "compiled",
    "kept_bytes",
    "notices",
    "parts",
    "plain",
    "retain_heap",
]


def accelerator(config: TrainConfig, out: Path, *, cpu: bool) -> Any:
    """What brings processes and trackers together."""
    from accelerate import Accelerator

    return Accelerator(
        device_placement=False,
        cpu=cpu,
        log_with=list(config.track) or None,
        project_dir=out,
    )


def plain(config: TrainConfig) -> dict[str, Any]:
    """Of a configuration, what trackers can take."""
    kinds = (int, float, str)
    values = asdict(config).items()
    return {name: v if isinstance(v, kinds) else str(v) for name, v in values}


def notices(config: TrainConfig, n: int) -> list[str]:
    """What a run on n examples does otherwise than its options may have been meant."""
    found = []
    if config.batch_size > n:
        found.append(
            f"a batch of {config.batch_size} is more than all {n} training examples: some come "
            "more than once in every step"
        )
    if config.shard and current_processes().count == 1:
        found.append(
            "shard: there are no other processes to cut the weights over, so they stay whole"
        )
    return found


def retain_heap() -> bool:
    """Keep freed memory with the process, where the C library is glibc; whether it is.

    By default it gives every large tensor back to the system, and zeroes it anew, at each step.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    no_maps, trim_above, grow_by = (-4, 0), (-1, 2**31 - 1), (-2, 2**26)
    return all(mallopt(*setting) for setting in (no_maps, trim_above, grow_by))


def casting(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context in which networks compute in the precision that is wished for.

    Matrix products and convolutions alone: densities, log-determinants and the arithmetic of
    bijections raise what networks emit to float32.
    """
    if not config.bf16:
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost of the parts that a model repeats."""
    if getattr(model, "repeated", False):
        return [model]
    return [block for child in model.children() for block in blocks(child)]


def compiled(model: Model) -> str | None:
    """Compile each repeated block, or all of a model that repeats none; or say why not."""
    try:
        torch.compile(torch.sin)(torch.ones(8))
    except Exception as error:  # whatever is missing: a compiler, its headers, a library
        return f"not compiled: {str(error).splitlines()[0]}"
    found = blocks(model)
    for block in found if len(found) > 1 else [model]:
        block.compile(dynamic=False)
    return None


def kept_bytes(run: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, besides parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, Any] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = run()
    size = sum(storage.nbytes() for storage in seen.values())
    del kept
    return size


def parts(model: Model, x: Tensor, context: Context, config: TrainConfig, share: int) -> int:
    """In how many parts a process works through its share of a batch.

    A memory budget pays for weights, gradients, two moments and the average, and for what a part
    keeps for its backward pass, half as much again while that pass runs.

    Raises:
        ValueError: If not even one example at a time fits.
    """
    if config.memory_budget is None:
        return min(config.accumulate, share)
    budget = bytes_of(config.memory_budget)
    weights = [*model.parameters()]
    state = 5 * sum(p.nbytes for p in weights)
    examples = x.repeat_interleave(config.k, 0)
    given = contexts.repeat(context, config.k)
    kept = kept_bytes(lambda: model(examples, given, closed_form=config.k == 1), weights)
    each = 1.5 * kept / len(x)
    room = int((budget - state) // each) if budget > state else 0
    if room < 1:
        hint = "" if config.memory != "store" else "; --memory checkpoint takes less"
        raise ValueError(
            f"memory_budget: weights and one example take {text_of(state + each)}, more than "
            f"{config.memory_budget}{hint}"
        )
    return math.ceil(share / min(room, share))
