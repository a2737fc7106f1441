"""Real numbers rounded to integers, identically on every machine.

Networks in float64 agree to about 1e-14 between batch sizes, threads, kernels and machines.
Rounded to a grid they agree exactly, unless a number lies so close to the middle between two
points that the difference decides. The encoder lists these exceptions, one value in two million,
and the decoder looks them up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musigma.coding.errors import CodingError, NumericsDiffer

__all__ = ["GUARD", "Exceptions", "Rounding"]

GUARD = 2.0**-22
"""Values closer than this to the middle between two integers are listed."""

Exceptions = dict[tuple[int, int], bool]
"""Whether a listed value was rounded up, by its place and its index in the batch."""


class Rounding:
    """Rounds the real numbers of one batch.

    Args:
        listed: The exceptions that the encoder listed; None in the encoder, which fills the
            attribute `listed`.
        guarded: Whether there are exceptions; false where numbers are always the same.
    """

    def __init__(self, listed: Exceptions | None = None, *, guarded: bool = True):
        self.encoding, self.guarded = listed is None, guarded
        self.listed: Exceptions = {} if listed is None else listed

    def __call__(self, values: Tensor, scale: float, place: int) -> np.ndarray:
        """``values * scale``, rounded, int64.

        Args:
            values: Any tensor.
            scale: The factor; a power of two is exact.
            place: A number that identifies these values in both directions.

        Raises:
            CodingError: If a value is not finite, or exceeds 2^52.
            NumericsDiffer: If the encoder should have listed a value, and did not.
        """
        scaled = values.detach().to(torch.float64).cpu().contiguous().numpy() * scale
        if not (np.abs(scaled) < 2.0**52).all():
            raise CodingError(
                "the model's distributions are not finite for some of these data, or too large; "
                "evaluate the model on them, and look at `inspect`"
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
                    "a parameter lies where the encoder would have listed an exception: the "
                    "arithmetic of this machine differs from that of the machine that wrote the "
                    "file"
                )
        return flat.astype(np.int64).reshape(scaled.shape)
