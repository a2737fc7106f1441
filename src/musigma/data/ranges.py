"""The ranges of what a model was given in training, and whether new context lies outside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from musigma.data.dataset import Dataset, Given
from musigma.data.errors import called
from musigma.data.sequences import lengths

__all__ = ["column_ranges", "fingerprints", "numeric", "outside", "ranges", "shifted"]

ROWS, COLUMNS = 10_000, 1000  # of a table, whose ranges are kept
FEW = 5  # rows, up to which values outside the range are outliers, and no other units
FAR = 1.0  # standard deviations beyond the training range, from which on values are reported


def ranges(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The range, mean and standard deviation of each real variable of the context.

    Each entry has lists with a number for each feature, and for sequences `rows`, the smallest and
    the largest number of rows.

    >>> data = Dataset(np.zeros((3, 1), "f"), given={"x": Given(np.array([1, 2, 6], "f"))})
    >>> ranges(data)["x"]["low"], ranges(data)["x"]["high"], ranges(data)["x"]["mean"]
    ([1.0], [6.0], [3.0])
    """
    found = {}
    for name, given in dataset.given.items():
        if given.values.dtype != np.float32 or not len(given):
            continue
        values = _features(given.values).astype(np.float64)
        statistics = {"low": np.min, "high": np.max, "mean": np.mean, "std": np.std}
        about = {key: f(values, 0).tolist() for key, f in statistics.items()}
        if given.values.ndim == 3:
            rows = lengths(given.values)
            about["rows"] = [int(rows.min()), int(rows.max())]
        found[name] = about
    return found


def column_ranges(dataset: Dataset) -> dict[str, list[float]]:
    """The lowest and highest value and the standard deviation of each column of numbers.

    >>> column_ranges(Dataset(np.array([[1.0], [2], [6]], "f"), columns=("x",)))["x"][:2]
    [1.0, 6.0]
    """
    if (
        dataset.bits is not None
        or dataset.counts
        or dataset.shape[0] > COLUMNS
        or not len(dataset)
    ):
        return {}
    return {
        name: [float(f(values)) for f in (np.min, np.max, np.std)]
        for _, name, values in _columns(dataset)
    }


def shifted(known: Mapping[str, Sequence[float]], dataset: Dataset) -> list[str]:
    """Lines about columns most of whose values lie outside the range of the training data.

    Args:
        known: What `column_ranges` returned for the training rows.
        dataset: New rows.

    >>> data = Dataset(np.linspace(1000, 2000, 9, dtype="f")[:, None], columns=("dose",))
    >>> shifted({"dose": [0.5, 2.5, 0.4]}, data)
    ["column 'dose': most values are about 1500, and the training range is 0.5 to 2.5"]
    """
    found: list[str] = []
    for j, name, values in _columns(dataset) if known and len(dataset) >= FEW else ():
        if name not in known:
            continue
        low, high, std = known[name]
        middle = float(np.median(values))
        if max(low - middle, middle - high) > FAR * max(std, 1e-12):
            found.append(
                f"{called(dataset.columns, j)}: most values are about {middle:g}, and the "
                f"training range is {low:g} to {high:g}"
            )
    return found


def numeric(dataset: Dataset) -> list[int]:
    """The places of the columns of numbers, without dates and levels."""
    columns = None if dataset.schema is None else dataset.schema.columns
    return [j for j in range(dataset.shape[0]) if columns is None or columns[j].is_numeric]


def _columns(dataset: Dataset) -> Iterator[tuple[int, str, np.ndarray]]:
    """Places, names (or else places) and finite values of columns of numbers, of some rows."""
    n = len(dataset)
    x = dataset.take(np.linspace(0, n - 1, min(n, ROWS)).astype(np.int64)).astype(np.float64)
    for j in numeric(dataset):
        if len(values := x[:, j][np.isfinite(x[:, j])]):
            yield j, dataset.columns[j] if dataset.columns else str(j), values


def outside(known: Mapping[str, Mapping[str, Any]], given: Mapping[str, Given]) -> list[str]:
    """Lines about variables with values far outside their training range, the farthest first.

    Args:
        known: What `ranges` returned for the training rows.
        given: New rows of the context.

    Returns:
        A line for each variable with a value more than one standard deviation beyond its range.

    >>> known = {"x": {"low": [0.1], "high": [9.8], "mean": [5.0], "std": [2.5]}}
    >>> outside(known, {"x": Given(np.array([3, 41.2], "f"))})[0]
    'x = 41.2 lies 12.6 standard deviations outside the training range [0.1, 9.8] (1 of 2 rows)'
    >>> outside(known, {"x": Given(np.array([0.1, 9.8, 10.5], "f"))})
    []
    """
    found: list[tuple[float, str]] = []
    for name, about in known.items():
        if name not in given or given[name].values.dtype != np.float32:
            continue
        values = given[name].values
        n, width = len(values), len(about["low"])
        flat = _features(values).astype(np.float64)
        if not len(flat) or flat.shape[1] != width:
            continue
        low, high, std = (np.asarray(about[key]) for key in ("low", "high", "std"))
        beyond = np.maximum(low - flat, flat - high)
        distance = beyond / np.maximum(std, 1e-12 + 1e-6 * np.maximum(abs(low), abs(high)))
        i, j = np.unravel_index(distance.argmax(), distance.shape)
        if distance[i, j] > FAR:
            feature = f"{name}[{j}]" if width > 1 else name
            text = (
                f"{feature} = {flat[i, j]:g} lies {distance[i, j]:.1f} standard deviations "
                f"outside the training range [{low[j]:g}, {high[j]:g}]"
            )
            if n > 1 and values.ndim < 3:
                text += f" ({int((distance > FAR).any(1).sum()):,} of {n:,} rows)"
            found.append((float(distance[i, j]), text))
        if "rows" in about and (most := int(lengths(values).max())) > about["rows"][1]:
            times = most / about["rows"][1]
            text = f"{name} has {most:,} rows, more than the {about['rows'][1]:,} of training"
            found.append((times, text))
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


def _features(values: np.ndarray) -> np.ndarray:
    """All rows of numbers, (R, F), without the padding of sequences."""
    values = np.asarray(values)
    flat = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    return flat[~np.isnan(flat).all(1)] if values.ndim == 3 else flat


def fingerprints(given: Mapping[str, Given]) -> list[str]:
    """A digest of each row of a context, by which an observation is recognized.

    >>> a, b = fingerprints({"x": Given(np.array([1, 2], "f"))})
    >>> [b] == fingerprints({"x": Given(np.array([2], "f"))}), a == b
    (True, False)
    """
    found = []
    for i in range(len(next(iter(given.values()), ()))):
        state = hashlib.blake2b(digest_size=16)
        for name in sorted(given):
            value = np.asarray(given[name].values[i])
            if value.ndim == 2 and value.dtype == np.float32:  # a sequence, perhaps padded
                value = value[~np.isnan(value).all(1)]
            text = given[name].names[int(value)].encode() if given[name].names else b""
            state.update(f"{name}\0".encode() + (text or value.tobytes()) + b"\0")
        found.append(state.hexdigest())
    return found
