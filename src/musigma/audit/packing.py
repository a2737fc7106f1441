"""The layout of a packed tensor: which numbers are means, and which scales."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox

__all__ = ["Packing", "arguments", "find_packing"]

MOVED = 96  # numbers that are moved, one at a time
SEEDS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Packing:
    """A layout of a packed tensor: flat positions (D,) of the means and of the scales.

    `shape` and `latent` are the shapes of one packed example and of one z.
    """

    name: str
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    mean: Tensor
    second: Tensor

    def pack(self, mean: Tensor, second: Tensor) -> Tensor:
        """Means and scales (n, *latent) as one tensor (n, *shape)."""
        n = len(mean)
        packed = mean.new_empty(n, math.prod(self.shape))
        packed[:, self.mean] = mean.reshape(n, -1)
        packed[:, self.second] = second.reshape(n, -1)
        return packed.reshape(n, *self.shape)

    def packed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A callable of a packed tensor as one of mean, scale and its other arguments."""
        return lambda mean, second, *more: fn(self.pack(mean, second), *more)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`."""
        n = len(packed)
        flat = packed.reshape(n, -1)
        return (
            flat[:, self.mean].reshape(n, *self.latent),
            flat[:, self.second].reshape(n, *self.latent),
        )


def find_packing(sandbox: Sandbox, sample: Callable[..., Any], packed: Tensor) -> Packing:
    """The layout of a tensor that a sampler takes, by what moving one number does to z.

    At the same seed, moving a mean moves one z by as much, whatever the noise; moving a scale
    moves one z by a multiple of its noise.

    Raises:
        AuditError: If z is not half as large, or no layout is found.
    """
    rows, shape = len(packed), tuple(packed.shape[1:])
    n = math.prod(shape)

    def draw(h: Tensor, seed: int) -> Tensor:
        sandbox.reseed(seed)
        packed = sandbox.to_input(h).reshape(-1, *shape).clone()
        return sandbox.ask_first("sample", sample, packed)

    base = torch.full((rows, n), 0.3, dtype=torch.float64)
    latent = tuple(draw(base, 0).shape[1:])
    if 2 * math.prod(latent) != n:
        raise AuditError(
            f"sample: given a packed tensor {tuple(packed.shape)}, expected z with half as many "
            f"numbers; got shape {(rows, *latent)}"
        )
    positions = torch.linspace(0, n - 1, min(n, MOVED)).round().long().unique().tolist()
    still = [draw(base, seed).reshape(rows, -1)[0] for seed in SEEDS]
    roles: dict[int, tuple[bool, int]] = {}
    for j in positions:
        moved = base.clone()
        moved[0, j] += 0.5
        by = torch.stack(
            [
                draw(moved, seed).reshape(rows, -1)[0] - z
                for seed, z in zip(SEEDS, still, strict=True)
            ]
        )
        touched = int(by.abs().amax(0).argmax())
        move = by[:, touched]
        constant = float((move - move.mean()).abs().max()) < 1e-3 * float(move.abs().max())
        roles[j] = (constant, touched)
    for candidate in _candidates(shape, latent):
        where = {int(p): (True, i) for i, p in enumerate(candidate.mean)}
        where |= {int(p): (False, i) for i, p in enumerate(candidate.second)}
        if all(where[j] == role for j, role in roles.items()):
            return candidate
    if len(positions) == n and len(set(roles.values())) == n:
        position = {role: j for j, role in roles.items()}
        d = n // 2
        mean, second = (torch.tensor([position[k, i] for i in range(d)]) for k in (True, False))
        return Packing("permuted", shape, latent, mean, second)
    raise AuditError("sample: which numbers of the packed tensor are means is unknown")


def _candidates(shape: tuple[int, ...], latent: tuple[int, ...]) -> Iterator[Packing]:
    index = torch.arange(math.prod(shape)).reshape(shape)
    for dim in range(len(shape)):
        if shape[dim] % 2:
            continue
        where = "" if dim == 0 else f" of dimension {dim + 1}"
        halves = index.chunk(2, dim)
        first = torch.arange(0, shape[dim], 2)
        crossed = (index.index_select(dim, first), index.index_select(dim, first + 1))
        per_feature = dim == len(shape) - 1 > 0 and shape[dim] == 2
        for name, (a, b) in (("halves", halves), ("interleaved", crossed)):
            word = "per feature" if per_feature else name + where
            a, b = a.flatten(), b.flatten()
            yield Packing(f"{word}, mean first", shape, latent, a, b)
            yield Packing(f"{word}, scale first", shape, latent, b, a)


def arguments(fn: Any) -> int | None:
    """The number of positional arguments that a callable needs; None if unknown."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)
