"""Hardware of a run: processes, sharded weights, retained heap, compilation, memory budget."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from musigma import context as contexts
from musigma.data import Dataset
from musigma.evaluation import batch
from musigma.model import Model
from musigma.processes import Processes, current_processes
from musigma.training.config import TrainConfig, bytes_of

__all__ = [
    "accelerator",
    "blocks",
    "compile_blocks",
    "join",
    "leave",
    "number_of_parts",
    "retain_heap",
    "saved_bytes",
    "shard",
    "uses_cpu",
]


def join(device: str | None = None) -> Processes:
    """Join the other processes that a launcher started, if any. `fit` calls this itself."""
    from accelerate import PartialState

    _rendezvous_after_restart(uses_cpu(device))
    PartialState(cpu=uses_cpu(device))
    return current_processes()


def _rendezvous_after_restart(cpu: bool) -> None:
    """Use a fresh store after a launcher has restarted all workers.

    torchrun's own store still holds the addresses of dead workers, and a worker that reads them
    waits forever. On one node the store is prefixed with the number of the attempt. On several
    nodes that number may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt a
    new store.
    """
    env = os.environ.get
    shared_store = env("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_node = env("LOCAL_WORLD_SIZE") == env("WORLD_SIZE")
    attempt = env("TORCHELASTIC_RESTART_COUNT", "0")
    restarted = shared_store and one_node and int(attempt) > 0 and dist.is_available()
    if not restarted or dist.is_initialized():
        return
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group(
        "gloo" if cpu else "nccl",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def uses_cpu(device: str | None) -> bool:
    """Whether processes communicate on the CPU. Without this Accelerate would not join them."""
    return device == "cpu" or not torch.accelerator.is_available()


def leave() -> None:
    """Leave the process group."""
    if current_processes().count > 1:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Shard the weights over all processes (FSDP2); blocks are gathered one at a time.

    Source: Zhao et al., "PyTorch FSDP", 2023, arXiv:2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (current_processes().count,))
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    for block in blocks:
        fully_shard(getattr(block, "net", block), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def accelerator(config: TrainConfig, out: Path, *, cpu: bool, unused: bool) -> Any:
    """The Accelerator of a run in `out`, for processes and trackers.

    `cpu`: processes communicate on the CPU. `unused`: some weights may have no gradient.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    return Accelerator(
        device_placement=False,
        cpu=cpu,
        log_with=list(config.track) or None,
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def retain_heap() -> bool:
    """Let glibc retain freed memory. Returns whether the C library is glibc.

    By default it returns the memory of every large tensor to the system, at each step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    no_maps, trim_above, grow_by = (-4, 0), (-1, 2**31 - 1), (-2, 2**26)
    return all(mallopt(*setting) for setting in (no_maps, trim_above, grow_by))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with ``repeated = True``."""
    if getattr(model, "repeated", False):
        return [model]
    return [block for child in model.children() for block in blocks(child)]


def compile_blocks(model: Model, *, capture: bool = False) -> str | None:
    """Compile each block, or the whole model if it has at most one.

    Args:
        model: The model.
        capture: On a GPU, also capture the kernels of a model that is compiled as a whole in CUDA
            graphs, since those of a small model take less time than their launches. Each backward
            pass must follow one forward pass.

    Returns:
        The reason if nothing can be compiled; None otherwise.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8))
    except Exception as error:  # a compiler, its headers or a library is missing
        return f"not compiled: {str(error).splitlines()[0]}"
    repeated = blocks(model)
    if len(repeated) > 1:
        for block in repeated:
            block.compile(dynamic=False)
    else:
        model.compile(dynamic=False, mode="reduce-overhead" if capture else None)
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
    k, closed = config.chosen.draws, config.chosen.closed_form
    examples, given = x.repeat_interleave(k, 0), contexts.repeat(context, k)
    with torch.random.fork_rng():
        saved = saved_bytes(lambda: model(examples, given, closed_form=closed), weights)
    each = 1.5 * saved / len(x)
    fitting = int((budget - state) // each) if budget > state else 0
    if fitting < 1:
        unit, scale = ("GB", 1e9) if state + each >= 1e9 else ("MB", 1e6)
        needed = math.ceil((state + each) / scale * 10) / 10
        hint = "" if config.memory != "store" else "; --memory checkpoint takes less"
        raise ValueError(
            f"memory_budget: weights and one example take {needed}{unit}, more than "
            f"{config.memory_budget}{hint}"
        )
    return math.ceil(share / min(fitting, share))
