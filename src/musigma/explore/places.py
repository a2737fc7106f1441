"""The elements of all latents of a model, numbered in one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["Places"]


def read_pairs(text: str, name: str) -> dict[int, float]:
    """Numbers by place, from text such as 3:1.5,7:0.

    Raises:
        ValueError: If it is of another kind, or a number is not between -100 and 100.
    """
    given = {}
    for word in filter(None, text.split(",")):
        place, _, value = word.partition(":")
        try:
            i, number = int(place), float(value)
        except ValueError:
            i, number = -1, math.nan
        if not abs(number) <= 100:
            raise ValueError(f"{name}: expected elements such as 3:1.5,7:0; got {word[:40]!r}")
        given[i] = number
    return given


class Places:
    """Numbers and names of the elements of latents.

    Args:
        shapes: The shape of each latent, top first.

    Example:
        >>> places = Places([(3,), (1, 2, 2)])
        >>> places.place(5), places.name(5), places.changes("0:1.5,6:0")
        ((1, 0, 1, 0), 'z1[0,1,0]', {(0, 0): 1.5, (1, 0, 1, 1): 0.0})
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        self.shapes = shapes

    def place(self, i: int) -> tuple[int, ...]:
        """The number of a latent, and the index in it, of element i of all latents."""
        sizes = [math.prod(shape) for shape in self.shapes]
        if not 0 <= i < sum(sizes):
            raise ValueError(f"latent: expected 0 to {sum(sizes) - 1}; got {i}")
        ends = list(accumulate(sizes))
        latent = next(k for k, end in enumerate(ends) if i < end)
        rest, where = i - (ends[latent] - sizes[latent]), []
        for size in reversed(self.shapes[latent]):
            rest, k = divmod(rest, size)
            where.insert(0, k)
        return latent, *where

    def name(self, i: int) -> str:
        """The name of an element: z[3], or z1[0,2,2] if there are several latents."""
        latent, *where = self.place(i)
        number = latent if len(self.shapes) > 1 else ""
        return f"z{number}[{','.join(map(str, where))}]"

    def changes(self, text: str) -> dict[tuple[int, ...], float]:
        """The elements to set, from text such as 3:1.5,7:0."""
        return {self.place(i): value for i, value in read_pairs(text, "set").items()}
