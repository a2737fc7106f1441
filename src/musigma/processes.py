"""The processes that share a task: rank, communication, and tensors sharded over all of them.

A launcher starts them (``torchrun --nproc-per-node 4 -m musigma train …``, ``accelerate launch``,
or that of a cluster). They divide every batch among them, and score each example once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "SINGLE_PROCESS",
    "Processes",
    "current_processes",
    "full_tensor",
    "gather_shards",
    "local_shard",
    "shard_like",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One of several processes that work together.

    Args:
        rank: The index of this process; the main process is 0.
        count: The number of processes.

    Example:
        >>> [Processes(rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """The part of n items that this process works on: a contiguous slice."""
        return slice(self.rank * n // self.count, (self.rank + 1) * n // self.count)

    def maximum(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes."""
        if self.count == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return tuple(shared.tolist())

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def concatenate(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of all processes, concatenated by rank."""
        parts = [part for part in self.gather(dict(columns)) if part]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def wait(self) -> None:
        """Block until every process has called this."""
        if self.count > 1:
            dist.barrier()


SINGLE_PROCESS = Processes()


def current_processes() -> Processes:
    """This process in torch's default process group; `SINGLE_PROCESS` where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return SINGLE_PROCESS


# -- tensors that may be sharded: DTensors, found without importing that class, which takes seconds


def full_tensor(t: Any) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must call it."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local_shard(t: Any) -> Tensor:
    """This process's shard of a tensor: a view, and all of a tensor that is not sharded."""
    return t.to_local() if hasattr(t, "to_local") else t


def shard_like(t: Tensor, like: Any) -> Tensor:
    """A copy of a whole tensor, sharded as `like` is; the tensor itself if that is not sharded."""
    if not hasattr(like, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(like.device, copy=True), like.device_mesh, like.placements)


def gather_shards(shard: Tensor, like: Any) -> Tensor:
    """The whole tensor of which each process holds a shard, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    pieces = DTensor.from_local(shard, mesh, placements, shape=like.shape, stride=like.stride())
    return pieces.full_tensor()
