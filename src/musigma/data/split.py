"""The split into parts, as a function of the content of the examples."""

from __future__ import annotations

from typing import Literal

import numpy as np

from musigma.data.errors import DataError

__all__ = ["PARTS", "Part", "parts"]

Part = Literal["all", "train", "validation", "held-out"]
PARTS = ("train", "validation", "held-out")


def parts(
    hashes: np.ndarray,
    official_test: np.ndarray | None,
    official_validation: np.ndarray | None,
    fraction: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the examples to train on, to choose weights by, and to hold out.

    Args:
        hashes: Hashes of the contents, uint64 (N,).
        official_test: Examples that the source reserves for testing, bool (N,), or None.
        official_validation: Examples that it reserves for validation, bool (N,), or None.
        fraction: Share to hold out, where the source reserves none.

    >>> masks = parts(np.arange(4, dtype=np.uint64), np.array([0, 0, 0, 1], bool), None, 0.1)
    >>> [mask.tolist() for mask in masks]
    [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    """
    held = official_test
    if held is None or held.all() or not held.any():
        held = _below(hashes, fraction, above=2)
    rest, validation = ~held, official_validation
    if validation is None or validation[rest].all() or not validation[rest].any():
        train = rest.copy()
        train[rest] = _below(hashes[rest], 1 - fraction / 2)
    else:
        train = rest & ~validation
    return train, rest & ~train, held


def _below(hashes: np.ndarray, fraction: float, *, above: int = 1) -> np.ndarray:
    """Hashes below a share of their range: at least one, leaving at least `above` others."""
    distinct = np.unique(hashes)
    if len(distinct) < 1 + above:
        kind = "no examples" if not len(distinct) else f"only {len(distinct)} different examples"
        raise DataError(
            f"cannot be split, since it holds {kind}: give more data, or take part 'all'"
        )
    cut = np.searchsorted(distinct, np.uint64(int(fraction * 2**64)))
    return hashes < distinct[min(max(int(cut), 1), len(distinct) - above)]
