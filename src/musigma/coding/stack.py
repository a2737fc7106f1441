"""A stack of bits: the only module that uses the entropy coder.

Everything that is coded is either a bit with a known probability or an integer that is uniform
below a bound. Both are array calls of an asymmetric numeral system (Duda, 2009, arXiv:0902.0271)
in the `constriction` library (Bamler, "Understanding Entropy Coding With Asymmetric Numeral
Systems (ANS): a Statistician's Perspective", 2022, arXiv:2201.01741).

Pushing costs -log2 p bits and popping recovers as many; each undoes the other exactly. A value can
therefore be *drawn* by popping it, as bits-back coding does. Invalid values are refused by a
`ValueError`, and then nothing is pushed; popping from too few bits raises `Exhausted`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

__all__ = ["CODER", "ONE", "Exhausted", "Stack"]

CODER = "constriction 0.5, 32-bit words, 64-bit state, 24-bit probabilities"

ONE = 1 << 22
"""Probabilities are integers 1 to ONE - 1, in units of 1 / ONE."""


class Exhausted(Exception):
    """A pop asked for more bits than the stack holds; the stack is unchanged."""


class Stack:
    """A stack of bits: 32-bit words, as `words` returns them.

    With `foreign`, the words are arbitrary bits, which `words(foreign=True)` returns once
    everything that was popped has been pushed, and the other way round.

    Example:
        >>> stack = Stack(np.arange(8, dtype=np.uint32), foreign=True)
        >>> sizes = np.array([10, 3, 7])
        >>> drawn = stack.pop(sizes)
        >>> stack.push(drawn, sizes)
        >>> stack.words(foreign=True).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, words: np.ndarray, *, foreign: bool = False):
        models = _constriction().stream.model
        self._bit, self._uniform = models.Bernoulli(perfect=False), models.Uniform()
        try:
            self._coder = _constriction().stream.stack.AnsCoder(
                np.ascontiguousarray(words, np.uint32), seal=foreign
            )
        except ValueError as error:
            raise ValueError(f"words: these are not a stack ({error})") from error
        self._lowest = self.bits

    @property
    def bits(self) -> int:
        """Number of bits on the stack."""
        return self._coder.num_valid_bits()

    @property
    def lowest(self) -> int:
        """The smallest number of bits since `mark`."""
        return min(self._lowest, self.bits)

    def mark(self) -> None:
        """Reset `lowest`."""
        self._lowest = self.bits

    def words(self, *, foreign: bool = False) -> np.ndarray:
        """The content; with `foreign`, the arbitrary bits that it began with and has again."""
        try:
            return self._coder.get_compressed(unseal=foreign)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"the stack does not hold what it began with ({error})") from error

    def copy(self) -> Stack:
        """Another stack with the same content."""
        twin = copy.copy(self)
        twin._coder = self._coder.clone()
        return twin

    def push(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """Push integers 0 <= value < size <= 2^24, each uniform below its size."""
        values, sizes = _integers("values", values), _integers("sizes", sizes)
        if values.shape != sizes.shape:
            raise ValueError(
                f"values: expected {sizes.size}, one for each size; got {values.size}"
            )
        if not ((values >= 0) & (values < sizes) & (sizes <= 1 << 24)).all():
            raise ValueError("values: expected 0 <= value < size <= 2^24")
        values, sizes = values.astype(np.int32), sizes.astype(np.int32)
        zeros = _zeros(sizes)
        self._push(values & (zeros - 1), zeros)
        self._push(values // zeros, sizes // zeros)

    def _push(self, values: np.ndarray, sizes: np.ndarray) -> None:
        free = sizes > 1  # others cost nothing, and the coder does not accept them
        self._encode(values[free], self._uniform, sizes[free])

    def pop(self, sizes: np.ndarray) -> np.ndarray:
        """Pop integers that are uniform below their sizes, int64, of the shape of `sizes`."""
        flat = _integers("sizes", sizes)
        if not ((flat >= 1) & (flat <= 1 << 24)).all():
            raise ValueError("sizes: expected 1 to 2^24")
        flat = flat.astype(np.int32)
        zeros = _zeros(flat)
        upper = self._pop(flat // zeros)
        try:
            lower = self._pop(zeros)
        except Exhausted:
            self._push(upper, flat // zeros)
            raise
        return (upper * zeros + lower).reshape(np.shape(sizes))

    def _pop(self, sizes: np.ndarray) -> np.ndarray:
        free, values = sizes > 1, np.zeros(sizes.shape, np.int64)
        values[free] = self._decode(self._uniform, sizes[free])
        return values

    def push_bits(self, bits: np.ndarray, ones: np.ndarray) -> None:
        """Push bits, each 1 with probability ``ones / ONE``."""
        flat, likely = _integers("bits", bits), _probabilities(ones)
        if flat.shape != likely.shape or not ((flat == 0) | (flat == 1)).all():
            raise ValueError(f"bits: expected 0 or 1, {likely.size} of them; got {flat.size}")
        self._encode(flat, self._bit, likely)

    def pop_bits(self, ones: np.ndarray) -> np.ndarray:
        """Pop bits of these probabilities, bool, of the shape of `ones`."""
        bits = self._decode(self._bit, _probabilities(ones))
        return bits.astype(bool).reshape(np.shape(ones))

    def _encode(self, symbols: np.ndarray, model: Any, parameters: np.ndarray) -> None:
        self._lowest = min(self._lowest, self.bits)
        if len(symbols):
            self._coder.encode_reverse(symbols.astype(np.int32, copy=False), model, parameters)

    def _decode(self, model: Any, parameters: np.ndarray) -> np.ndarray:
        if not len(parameters):
            return np.zeros(0, np.int32)
        before = self._coder.clone() if self.bits < 24 * len(parameters) + 64 else None
        symbols = self._coder.decode(model, parameters)
        if before is not None and self.bits < 64:  # an empty coder returns symbols without end
            self._coder = before
            raise Exhausted
        return symbols


def _integers(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "iub":
        raise ValueError(f"{name}: expected integers; got {values.dtype}")
    return np.ascontiguousarray(values).reshape(-1)


def _zeros(sizes: np.ndarray) -> np.ndarray:
    """The largest power of two that divides each size: a factor on which the coder loses nothing.

    On another factor n it loses up to n / 2^24 of a bit: next to nothing for ten digits.
    """
    return sizes & -sizes


def _probabilities(ones: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(ones).reshape(-1)
    if not ((flat > 0) & (flat < ONE)).all():
        raise ValueError(f"ones: expected 1 to {ONE - 1}")
    return flat / ONE


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ValueError(
            "compression needs the package constriction, which is not installed: "
            "pip install 'musigma[compress]'"
        ) from error
    return constriction
