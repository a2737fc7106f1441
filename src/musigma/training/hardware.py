"""Hardware options of a run: retained heap, low precision, compilation, parts that fit memory."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.data import Dataset
from musigma.evaluation import batch
from musigma.model import Model
from musigma.processes import current_processes
from musigma.training.config import TrainConfig, bytes_of, text_of

__all__ = [
    "accelerator",
    "autocast",
    "blocks",
    "compile_blocks",
    "number_of_parts",
    "retain_heap",
    "saved_bytes",
    "trackable",
]


def accelerator(config: TrainConfig, out: Path, *, cpu: bool, unused: bool) -> Any:
    """The Accelerator of a run, for processes and trackers.

    Args:
        config: Names the trackers.
        out: The run folder.
        cpu: Whether processes communicate on the CPU.
        unused: Whether some weights may have no gradient.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    return Accelerator(
        device_placement=False,
        cpu=cpu,
        log_with=list(config.track) or None,
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def trackable(config: TrainConfig) -> dict[str, Any]:
    """A configuration in types that trackers take."""
    kinds = (int, float, str)
    values = asdict(config).items()
    return {name: v if isinstance(v, kinds) else str(v) for name, v in values}


def retain_heap() -> bool:
    """Let glibc retain freed memory. Returns whether the C library is glibc.

    By default it returns the memory of every large tensor to the system, at each step.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    no_maps, trim_above, grow_by = (-4, 0), (-1, 2**31 - 1), (-2, 2**26)
    return all(mallopt(*setting) for setting in (no_maps, trim_above, grow_by))


def autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context in which networks compute in the configured precision.

    It affects matrix products and convolutions. Densities, log-determinants and the arithmetic of
    bijections convert the outputs of networks to float32.
    """
    if not config.bf16:
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with ``repeated = True``."""
    if getattr(model, "repeated", False):
        return [model]
    return [block for child in model.children() for block in blocks(child)]


def compile_blocks(model: Model) -> str | None:
    """Compile each block, or the whole model if it has at most one.

    Returns:
        The reason if nothing can be compiled; None otherwise.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8))
    except Exception as error:  # a compiler, its headers or a library is missing
        return f"not compiled: {str(error).splitlines()[0]}"
    repeated = blocks(model)
    for block in repeated if len(repeated) > 1 else [model]:
        block.compile(dynamic=False)
    return None


def saved_bytes(run: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd saves in a forward pass, besides parameters."""
    excluded = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, Any] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in excluded:
            seen[storage.data_ptr()] = storage  # kept alive, so that addresses are unique
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        outputs = run()  # keep the graph alive
    size = sum(storage.nbytes() for storage in seen.values())
    del outputs
    return size


def number_of_parts(model: Model, train: Dataset, config: TrainConfig) -> int:
    """Number of parts in which this process processes its share of a batch.

    A memory budget covers weights, gradients, two moments and averaged weights, and the tensors
    that one part saves for its backward pass, plus half of that during the pass.

    Raises:
        ValueError: If not even one example fits.
    """
    rows = current_processes().share(config.batch_size)
    share = rows.stop - rows.start
    if config.memory_budget is None:
        return min(config.accumulate, share)
    budget = bytes_of(config.memory_budget)
    weights = [*model.parameters()]
    state = 5 * sum(p.nbytes for p in weights)
    x, context = batch(train, np.arange(min(4, len(train))), model)
    examples, given = x.repeat_interleave(config.k, 0), contexts.repeat(context, config.k)
    with torch.random.fork_rng():
        saved = saved_bytes(lambda: model(examples, given, closed_form=config.k == 1), weights)
    each = 1.5 * saved / len(x)
    fitting = int((budget - state) // each) if budget > state else 0
    if fitting < 1:
        hint = "" if config.memory != "store" else "; --memory checkpoint takes less"
        raise ValueError(
            f"memory_budget: weights and one example take {text_of(state + each)}, more than "
            f"{config.memory_budget}{hint}"
        )
    return math.ceil(share / min(fitting, share))
