"""Real numbers as whole ones, the same ones on every machine.

Networks in float64 agree to about 1e-14, whatever the batch, the threads, the kernels or the
machine; a number that is rounded to a grid agrees altogether, unless it lies so near the middle
between two points of the grid that the difference decides. The encoder lists those (one in two
million), and the decoder looks them up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musigma.coding.errors import CodingError, NumericsDiffer

__all__ = ["GUARD", "Exceptions", "Rounding"]

GUARD = 2.0**-22
"""Values closer than this to the middle of two whole numbers are listed."""

Exceptions = dict[tuple[int, int], bool]
"""Whether a listed value was rounded up, by its place and its index in the batch."""


class Rounding:
    """How one batch's real numbers are rounded.

    Args:
        listed: What the encoder listed; None: this is the encoder, and `listed` will be its list.
        guarded: Whether values near the middle are listed; not where they are always the same.
    """

    def __init__(self, listed: Exceptions | None = None, *, guarded: bool = True):
        self.encoding, self.guarded = listed is None, guarded
        self.listed: Exceptions = {} if listed is None else listed

    def __call__(self, values: Tensor, scale: float, place: int) -> np.ndarray:
        """``values * scale``, rounded, int64.

        Args:
            values: Of a batch.
            scale: A power of two, where what follows is to be exact.
            place: A number that the same values have in both directions.

        Raises:
            CodingError: If a value is not finite, or larger than 2^52.
            NumericsDiffer: If a value lies where the encoder would have listed it, and did not.
        """
        scaled = values.detach().to(torch.float64).cpu().contiguous().numpy() * scale
        if not (np.abs(scaled) < 2.0**52).all():
            raise CodingError(
                "the model's parameters are not finite for some of these data, or too large to be "
                "coded by; evaluate the model on them, and look at `inspect`"
            )
        whole = np.rint(scaled)
        if not self.guarded:
            return whole.astype(np.int64)
        off = np.abs(scaled - whole)
        near = np.flatnonzero(off.reshape(-1) > 0.5 - GUARD)
        flat = whole.reshape(-1)
        for i in near:
            low = np.floor(scaled.reshape(-1)[i])
            if self.encoding:
                self.listed[place, int(i)] = bool(flat[i] > low)
            elif (place, int(i)) in self.listed:
                flat[i] = low + self.listed[place, int(i)]
            elif off.reshape(-1)[i] > 0.5 - GUARD / 2:
                raise NumericsDiffer(
                    "a parameter lies where the encoder, had it found it there, would have said "
                    "so: this machine's arithmetic differs from the one that wrote the file"
                )
        return flat.astype(np.int64).reshape(scaled.shape)
