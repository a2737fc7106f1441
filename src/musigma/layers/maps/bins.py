"""What splines share: bins of a square, and how the bin of an element is found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Bins", "knots", "locate", "pick", "shares"]


@dataclass(frozen=True)
class Bins:
    """The fields of maps with bins on [-bound, bound], whose sizes are at least a share of it.

    Raises:
        ValueError: If a field is out of range.
    """

    bins: int = 8
    bound: float = 5.0
    least: float = 1e-3

    def __post_init__(self):
        if self.bins < 2:
            raise ValueError(f"bins: expected 2 or more; got {self.bins}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound: expected a positive number; got {self.bound}")
        if not 0 < self.least < 1 / self.bins:
            raise ValueError(
                f"least: expected a number between 0 and 1 / bins = {1 / self.bins:.4g}; "
                f"got {self.least}"
            )


def shares(raw: Tensor, least: float) -> Tensor:
    """Positive shares of 1, each at least `least`, from unbounded numbers (K, ...)."""
    return raw.softmax(0).mul(1 - len(raw) * least).add(least)


def knots(sizes: Tensor) -> Tensor:
    """The ends (K + 1, ...) of intervals (K, ...) that follow each other from 0."""
    return F.pad(sizes.cumsum(0), (0, 0) * (sizes.ndim - 1) + (1, 0))


def locate(knots: Tensor, z: Tensor) -> Tensor:
    """The index of the bin of z (...), for knots (K + 1, ...)."""
    return (z >= knots[1:-1]).sum(0)


def pick(of: Tensor, k: Tensor) -> Tensor:
    """The values (...) of bin k, for values of all bins (K, ...)."""
    return of.gather(0, k[None])[0]
