"""Images to bits and back, one chunk at a time, by one model.

A chunk is coded on a stack of its own, batch by batch. Bits-back coding needs bits to begin with:
a hash of the content of the chunk. What remains on the stack after decoding therefore tells
whether every value is right. Only the first images pay for these bits, because batches begin with
one image and grow with the stack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from musigma.coding import numerics as arithmetic
from musigma.coding.batch import digest
from musigma.coding.coder import Coder
from musigma.coding.errors import CodingError, NumericsDiffer
from musigma.coding.inputs import example
from musigma.coding.numerics import Kernels, Numerics
from musigma.coding.planning import find_grids, latent_grids
from musigma.coding.rounding import Exceptions, Rounding
from musigma.coding.stack import Exhausted, Stack
from musigma.context import Context, apply, rows
from musigma.model import Model

__all__ = ["BATCH", "Codec", "Coded", "check"]

BATCH = 64
"""Images that pass the networks together, at most."""
MARGIN = 128
"""Bits that always stay on a stack."""
PROBE = 1 << 12
"""Words of the stack on which the first image of a chunk is tried first."""
SEED = 1 << 22
"""Words that a stack begins with, at most."""
TOO_MANY = "an image takes more bits to begin with than a file can hold: use smaller images"


@dataclass(frozen=True)
class Coded:
    """A chunk of images as bits.

    Attributes:
        schedule: Sizes of the batches, in the order in which they were pushed.
        listed: The exceptions of each batch; see `Rounding`.
        seed: Number of 32-bit words of the hash that the stack began with.
        words: The stack.
    """

    schedule: list[int]
    listed: list[Exceptions]
    seed: int
    words: np.ndarray

    @property
    def bits(self) -> int:
        """Cost of the images: the stack, less the bits that it began with."""
        return 32 * (len(self.words) - self.seed)


class Codec:
    """A model as a coder of its data.

    Args:
        model: Each of its layers, maps and distributions has a coding rule.
        numerics: The arithmetic, `exact` or `pinned`.
        latents: g of the grid 2^-g of each latent, from `latent_grids`.

    Raises:
        ValueError: For a model that cannot code; see `find_grids`.
    """

    def __init__(self, model: Model, *, numerics: Numerics, latents: Sequence[int]):
        self.model = arithmetic.prepared(model, numerics)
        self.numerics, self.latents = numerics, list(latents)
        self.guarded = numerics == "exact"
        self.dtype = torch.float64 if numerics == "exact" else torch.float32
        x, context = example(self.model)
        with self._at_work():
            first = torch.from_numpy(x[:1]).to(self.dtype)
            given = self._context(context, 0, 1)
            self.grids = find_grids(self.model, first, given, self.latents)

    # -- both directions

    def pack(self, x: np.ndarray, context: Context, salt: bytes) -> Coded:
        """Integer images (N, *shape) as bits.

        Args:
            x: Levels, from 0.
            context: One row per image, if the model takes a context.
            salt: Hashed with the images: everything that belongs to them.

        Raises:
            CodingError: If the model gives an image no finite density.
            OverflowError: If a value is too large for integers.
        """
        with self._at_work():
            need = self._need(x[:1], self._context(context, 0, 1))
            content = digest(x, salt)
            while True:
                seed = math.ceil((need + MARGIN) / 32) + 1
                if seed > SEED:
                    raise CodingError(TOO_MANY)
                try:
                    return self._packed(x, context, _words(content, seed), need)
                except Exhausted:
                    need = 1.5 * need + 1024

    def _packed(self, x: np.ndarray, context: Context, seed: np.ndarray, need: float) -> Coded:
        stack = Stack(seed, foreign=True)
        schedule: list[int] = []
        listed: list[Exceptions] = []
        at, most = 0, BATCH
        while at < len(x):
            n = int(max(1, min(most, len(x) - at, (stack.bits - MARGIN) // need)))
            before, stack = stack, stack.copy()
            try:
                exceptions = self._push(stack, x[at : at + n], self._context(context, at, at + n))
            except Exhausted:
                if n == 1:
                    raise
                stack, most = before, n // 2
                continue
            need = max(need, (before.bits - stack.lowest) / n * 1.05)
            schedule.append(n)
            listed.append(exceptions)
            at, most = at + n, BATCH
        return Coded(schedule, listed, len(seed), stack.words())

    def unpack(
        self, coded: Coded, shape: Sequence[int], context: Context, salt: bytes
    ) -> np.ndarray:
        """The images, (N, *shape), int64.

        Raises:
            NumericsDiffer: If they are not the images that were packed.
        """
        with self._at_work():
            try:
                stack, x = self._unpacked(coded, shape, context)
                left = stack.words(foreign=True)
            except NumericsDiffer:
                raise
            except (Exhausted, ValueError, OverflowError) as error:
                raise NumericsDiffer(
                    f"decoding failed ({str(error) or 'no bits left'})"
                ) from error
        whole = len(left) == coded.seed
        if not whole or not np.array_equal(left, _words(digest(x, salt), coded.seed)):
            raise NumericsDiffer("the decoded images are not the images that were encoded")
        return x

    def _unpacked(
        self, coded: Coded, shape: Sequence[int], context: Context
    ) -> tuple[Stack, np.ndarray]:
        stack, at = Stack(coded.words), sum(coded.schedule)
        x = np.zeros((at, *shape), np.int64)
        for n, listed in zip(reversed(coded.schedule), reversed(coded.listed), strict=True):
            coder = self._coder(stack, Rounding(listed, guarded=self.guarded), n, generating=True)
            given = self._context(context, at - n, at)
            x[at - n : at] = self.model.generate(coder, given).reshape(n, *shape).numpy()
            at -= n
        return stack, x

    def _push(self, stack: Stack, x: np.ndarray, context: Context) -> Exceptions:
        rounding = Rounding(guarded=self.guarded)
        coder = self._coder(stack, rounding, len(x), generating=False)
        stack.mark()
        self.model.infer(torch.from_numpy(x).to(self.dtype), coder, context)
        coder.close()
        return rounding.listed

    def _need(self, x: np.ndarray, context: Context) -> float:
        """Bits that an image pops before it pushes any."""
        words = PROBE
        while words <= SEED:
            stack = Stack(_words(b"need", words), foreign=True)
            before = stack.bits
            try:
                self._push(stack, x, context)
            except Exhausted:
                words *= 4
                continue
            return 1.05 * (before - stack.lowest) + 64
        raise CodingError(TOO_MANY)

    def _coder(self, stack: Stack, rounding: Rounding, n: int, *, generating: bool) -> Coder:
        return Coder(stack, self.grids, rounding, n=n, dtype=self.dtype, generating=generating)

    def _context(self, context: Context, start: int, stop: int) -> Context:
        return apply(lambda t: t.to(self.dtype), rows(context, slice(start, stop)))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        with torch.inference_mode(), Kernels(), np.errstate(all="ignore"):
            if self.numerics == "pinned":
                torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    @lru_cache(maxsize=1)  # noqa: B019  (a codec lives as long as what it codes)
    def fingerprint(self) -> str:
        """A hash of the bits of the `example`, on which all of the arithmetic acts."""
        x, context = example(self.model)
        try:
            words = self.pack(x, context, b"fingerprint").words
        except OverflowError:  # other images may be coded all the same
            words = np.zeros(0)
        return hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()[:32]


def _words(content: bytes, n: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(content).digest(4 * n), "<u4").astype(np.uint32)


def check(model: Model) -> None:
    """Refuse a model that cannot code, before anything is read for it.

    Raises:
        ValueError: For continuous data; for a layer, a map or a distribution without a coding
            rule, by its name; or for a model whose directions do not mirror each other.
    """
    x, context = example(model)
    plain = arithmetic.prepared(model, "pinned")
    given = apply(lambda t: t.float(), context)
    latents = latent_grids(plain, torch.from_numpy(x), given)
    Codec(model, numerics="exact", latents=latents).fingerprint()
