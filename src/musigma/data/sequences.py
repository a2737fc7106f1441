"""Sequences of any length: arrays (N, M, F) in which rows of NaN follow the last row of each.

M is the largest number of rows of an example, and F the number of features of a row.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["joined", "lengths", "trimmed", "unusable"]


def lengths(values: np.ndarray) -> np.ndarray:
    """The number of rows of each sequence (N,), without the rows of NaN at its end.

    >>> lengths(np.array([[[1.0], [2.0]], [[3.0], [np.nan]]])).tolist()
    [2, 1]
    """
    there = np.logical_not(np.isnan(values).all(2))
    if not there.size:
        return np.zeros(len(values), np.int64)
    last = values.shape[1] - there[:, ::-1].argmax(1)
    return np.where(there.any(1), last, 0)


def unusable(values: np.ndarray) -> np.ndarray:
    """A mask (N,) of rows that are not finite, or sequences that have no row or are not finite.

    Args:
        values: (N,), (N, F), or sequences (N, M, F).

    >>> unusable(np.array([[[np.nan], [1.0]], [[1.0], [np.nan]], [[np.nan], [np.nan]]])).tolist()
    [True, False, True]
    """
    if values.ndim < 3:
        rows = values.reshape(len(values), math.prod(values.shape[1:]))
        return np.logical_not(np.isfinite(rows).all(1))
    n = lengths(values)
    inside = np.arange(values.shape[1]) < n[:, None]
    return (n == 0) | ((~np.isfinite(values)).any(2) & inside).any(1)


def joined(counts: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Sequences (N, M, F), float32, of their numbers of rows (N,) and all of their rows (R, F).

    >>> joined(np.array([1, 2]), np.ones((3, 1)))[..., 0]
    array([[ 1., nan],
           [ 1.,  1.]], dtype=float32)
    """
    most = int(counts.max(initial=0))
    values = np.full((len(counts), most, flat.shape[1]), np.nan, np.float32)
    with np.errstate(over="ignore"):  # numbers that are too large become infinite
        values[np.arange(most) < counts[:, None]] = flat
    return values


def trimmed(values: np.ndarray) -> np.ndarray:
    """Sequences without the rows that all of them lack."""
    return values[:, : max(1, int(lengths(values).max(initial=0)))]
