"""The processes that share a task: which of them this one is, and what they tell each other.

They are started from outside (``torchrun --nproc-per-node 4 -m musigma train …``, ``accelerate
launch``, a cluster's own launcher). Each does its share, and what comes out does not depend on
how many there are: batches are cut, never drawn anew, and each example is scored once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Processes", "cut_like", "here", "joined", "local", "whole"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process of several.

    Args:
        rank: Its number, from 0, which is the main one.
        count: How many there are.

    Example:
        >>> [Processes(rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes what there is one of."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n things in a row are this one's: neighbours, all of them once."""
        return slice(self.rank * n // self.count, (self.rank + 1) * n // self.count)

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes."""
        if self.count == 1:
            return values
        home = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(values, dtype=torch.float64, device=home)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return tuple(shared.tolist())

    def gathered(self, own: T) -> list[T]:
        """What each process has, in their order."""
        if self.count == 1:
            return [own]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, own)
        return everyone

    def joined(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of all processes, one after the other."""
        parts = [part for part in self.gathered(dict(columns)) if part]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


def joined(piece: Tensor, like: Tensor) -> Tensor:
    """The whole of which each process holds a piece, as it does of another tensor."""
    if not _cut(like):
        return piece
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore
    pieces = DTensor.from_local(piece, mesh, placements, shape=like.shape, stride=like.stride())
    return pieces.full_tensor()


def _cut(t: Tensor) -> bool:
    """Whether it is a DTensor; to import that class takes longer than all of this library."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a piece; then all processes must ask."""
    return t.full_tensor() if _cut(t) else t  # pyright: ignore[reportAttributeAccessIssue]


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, and all of one that is not cut."""
    return t.to_local() if _cut(t) else t  # pyright: ignore[reportAttributeAccessIssue]


def cut_like(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut over the processes as another one is, if that is."""
    if not _cut(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore
    return distribute_tensor(t.to(like.device), mesh, placements)


def here() -> Processes:
    """This process, among those that torch was told of."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return ALONE
