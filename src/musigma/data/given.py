"""What each example comes with: numbers, classes or images that a model is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from musigma.data.errors import DataError, printable
from musigma.data.raw import content_hashes
from musigma.spec import Variable

__all__ = ["Given"]


@dataclass(frozen=True, eq=False)
class Given:
    """A context variable of a data set: one row for each example.

    Args:
        values: int64 (N,), indices into `names`; float32 (N,) or (N, F), finite; or uint8 levels
            0..255 of shape (N, C, H, W), which may be decoded when they are indexed.
        names: Names of the classes; empty for numbers and images.

    Raises:
        DataError: If dtype, shape or values are not as above.

    >>> Given(np.array([1, 0, 1]), names=("cat", "dog")).variable("pet")
    Variable(name='pet', shape=(2,), classes=2, names=('cat', 'dog'), levels=None)
    """

    values: np.ndarray = field(repr=False)
    names: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(map(str, self.names)))
        values, kind = self.values, (self.values.dtype, self.values.ndim)
        if self.names:
            if kind != (np.int64, 1):
                raise DataError(
                    f"values are {values.dtype} of shape {values.shape} with {len(self.names)} "
                    "class names: give int64 (N,), indices into the names"
                )
            low, high = (int(f(values, initial=0)) for f in (np.min, np.max))
            if low < 0 or high >= len(self.names):
                raise DataError(
                    f"values run from {low} to {high}, and there are {len(self.names)} class "
                    "names: give indices into the names, from 0"
                )
        elif kind not in ((np.float32, 1), (np.float32, 2), (np.uint8, 4)):
            raise DataError(
                f"values are {values.dtype} of shape {values.shape}: give float32 (N,) or (N, F), "
                "uint8 (N, C, H, W), or int64 (N,) with the names of the classes"
            )
        elif values.dtype == np.float32 and len(values):
            bad = ~np.isfinite(np.asarray(values).reshape(len(values), -1)).all(1)
            if not bad.any():
                return
            raise DataError(
                f"values are not finite in {bad.sum()} rows, the first of them {bad.argmax()} "
                "(from 0): drop or fill these rows"
            )

    @classmethod
    def of_text(cls, cells: Sequence[str] | np.ndarray) -> Given:
        """Text as classes, sorted by name."""
        names, codes = np.unique(
            [printable(str(cell).strip()) for cell in cells], return_inverse=True
        )
        return cls(codes.astype(np.int64), tuple(names.tolist()))

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, rows: np.ndarray) -> Given:
        """The rows at these indices; images that are decoded when indexed stay on disk."""
        if self.values.dtype != np.uint8:
            return replace(self, values=self.values[rows])
        return replace(self, values=_Rows.of(self.values, rows))

    def variable(self, name: str) -> Variable:
        """How a model describes it."""
        levels = 256 if self.values.dtype == np.uint8 else None
        return Variable(name, self.values.shape[1:], names=self.names, levels=levels)

    def content(self) -> bytes:
        """The bytes that a digest covers: the names and every value."""
        values = self.values
        if values.dtype == np.uint8:
            values = content_hashes((values[i] for i in range(len(values))), len(values))
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        return "\0".join([*self.names, ""]).encode() + little.tobytes()


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of images that lie on disk, without reading any."""

    array: Any
    rows: np.ndarray

    dtype, ndim = np.dtype(np.uint8), 4

    @classmethod
    def of(cls, array: Any, rows: np.ndarray) -> Any:
        """The rows of an array, or of rows of one."""
        return cls(array.array, array.rows[rows]) if isinstance(array, cls) else cls(array, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[self.rows[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
