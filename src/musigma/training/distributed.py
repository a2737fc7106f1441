"""Training by several processes: rendezvous, and weights that are sharded between them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from musigma.processes import Processes, current_processes

__all__ = [
    "full_tensor",
    "gather_shards",
    "join",
    "leave",
    "local_shard",
    "shard_like",
    "uses_cpu",
]


def join(device: str | None = None) -> Processes:
    """Meet the other processes that a launcher started, if any. `fit` calls this itself."""
    from accelerate import PartialState

    _rendezvous_after_restart(uses_cpu(device))
    PartialState(cpu=uses_cpu(device))
    return current_processes()


def _rendezvous_after_restart(cpu: bool) -> None:
    """Meet in a fresh store after a launcher has restarted all workers.

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


def _is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor, found without importing that class, which takes seconds."""
    return hasattr(t, "full_tensor")


def full_tensor(t: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must call it."""
    return t.full_tensor() if _is_sharded(t) else t  # pyright: ignore[reportAttributeAccessIssue]


def local_shard(t: Tensor) -> Tensor:
    """This process's shard of a tensor: a view, and all of a tensor that is not sharded."""
    return t.to_local() if _is_sharded(t) else t  # pyright: ignore[reportAttributeAccessIssue]


def shard_like(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is."""
    if not _is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore
    return distribute_tensor(t.to(like.device), mesh, placements)


def gather_shards(shard: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each process holds a shard, sharded as `like` is."""
    if not _is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore
    pieces = DTensor.from_local(shard, mesh, placements, shape=like.shape, stride=like.stride())
    return pieces.full_tensor()
