"""The parts of a data set, the examples of each step, and the noise of its binarization.

The split is a function of the content of the examples; batches and noise are functions of seed and
step. There is no state to save and no global generator: a step of a resumed run sees what it would
have seen, on any machine and with any number of processes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from musigma.data.errors import DataError

__all__ = ["PARTS", "Part", "batch_indices", "binarized", "different", "parts", "perturbed"]

Part = Literal["all", "train", "validation", "held-out"]
PARTS = ("train", "validation", "held-out")

NOISE, ORDER, REDRAW, REPLACED = 0, 1, 2, 3  # streams of random numbers that share a seed


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of a step, as a function of its arguments alone.

    Successive steps walk through permutations of range(n), one per epoch. A batch may end one
    epoch and begin the next, so every example is seen exactly once in each.

    >>> batches = [batch_indices(5, 2, seed=0, step=step) for step in range(5)]
    >>> sorted(np.concatenate(batches).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    for what, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise DataError(f"{what} is {value}: give a whole number from {least}")
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = [
        _permutation(n, seed, epoch)[max(start - epoch * n, 0) : stop - epoch * n]
        for epoch in range(start // n, (stop - 1) // n + 1)
    ]
    return np.concatenate(pieces)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation by Philox's raw words, which are the same in all versions of NumPy."""
    return np.argsort(_philox(seed, epoch, ORDER).random_raw(n), kind="stable")


def _philox(seed: int, step: int, stream: int, block: int = 0) -> np.random.Philox:
    """Random words by their position in a stream; a block has four."""
    key = np.array([seed % 2**64, step % 2**64], np.uint64)
    return np.random.Philox(key=key, counter=np.array([block, 0, 0, stream], np.uint64))


def binarized(x: np.ndarray, seed: int, step: int, start: int) -> np.ndarray:
    """One with probability x / 255 exactly, from the random bytes of a step that begin at `start`.

    A byte below 255 is uniform on 0..254 and is compared to x. One byte in 256 is 255; it is
    drawn again from a hash of its position (SplitMix64; Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", 2014).
    """
    block, skip = divmod(start, 32)
    words = _philox(seed, step, NOISE, block).random_raw((skip + x.size + 7) // 8)
    noise = words.astype("<u8", copy=False).view(np.uint8)[skip : skip + x.size]
    levels = x.reshape(-1)
    ones = noise < levels
    again = np.flatnonzero((noise == 255) & (levels > 0))
    if len(again):
        key = _philox(seed, step, REDRAW).random_raw(1)
        z = key + (again + start).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        ones[again] = (z ^ (z >> np.uint64(31))) % np.uint64(255) < levels[again]
    return ones.view(np.uint8).reshape(x.shape)


def perturbed(x: np.ndarray, rate: float, seed: int, step: int, start: int) -> np.ndarray:
    """Each level replaced with probability `rate` by a uniform one, by the words from `start` on.

    >>> x = perturbed(np.zeros((1, 100_000), np.uint8), 0.25, seed=0, step=0, start=0)
    >>> round(float((x > 0).mean()), 2)  # 0.25 * 255 / 256
    0.25
    """
    block, skip = divmod(start, 4)
    words = _philox(seed, step, REPLACED, block).random_raw(skip + x.size)[skip:]
    replaced = (words >> np.uint64(32)) < np.uint64(rate * 2**32)
    levels = words.astype(np.uint8)  # the lowest byte, which the other bits do not determine
    return np.where(replaced, levels, x.reshape(-1)).reshape(x.shape)


def parts(
    hashes: np.ndarray,
    official_test: np.ndarray | None,
    official_validation: np.ndarray | None,
    fraction: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the training, validation and held-out examples.

    Parts that the source reserves are used; others are chosen by the hashes of the contents.

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


def different(hashes: np.ndarray) -> np.ndarray:
    """The different hashes, in increasing order."""
    return np.unique(hashes, return_counts=True)[0]  # by sorting, which is faster than hashing


def _below(hashes: np.ndarray, fraction: float, *, above: int = 1) -> np.ndarray:
    """Hashes below a share of their range: at least one, leaving at least `above` others."""
    distinct = different(hashes)
    if len(distinct) < 1 + above:
        kind = "no examples" if not len(distinct) else f"only {len(distinct)} different examples"
        raise DataError(
            f"cannot be split, since it holds {kind}: give more data, or take part 'all'"
        )
    cut = np.searchsorted(distinct, np.uint64(int(fraction * 2**64)))
    return hashes < distinct[min(max(int(cut), 1), len(distinct) - above)]
