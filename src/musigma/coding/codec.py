"""Images to bits and back, one chunk at a time, by one model.

A chunk is coded on a stack of its own, batch by batch. Bits-back coding needs initial bits:
a hash of the content of the chunk. The bits that remain on the stack after decoding therefore show
whether every value is right. Only the first images pay for these bits, because batches begin with
one image and grow with the stack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from musigma.coding.batch import digest, example
from musigma.coding.coder import Coder, find_grids, latent_grids
from musigma.coding.container import EXCEPTION, Chunk
from musigma.coding.errors import CodingError, NumericsDiffer
from musigma.coding.numerics import Exceptions, Kernels, Numerics, Rounding, one_thread, prepared
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
TOO_MANY = "an image needs more initial bits than a file can hold: use smaller images"


@dataclass(frozen=True)
class Coded:
    """A chunk of images as bits."""

    schedule: list[int]  # sizes of the batches, in the order in which they were pushed
    listed: list[Exceptions]  # of each batch; see `Rounding`
    seed: int  # number of 32-bit words of the hash that the stack began with
    words: np.ndarray  # the stack

    @property
    def bits(self) -> int:
        """Cost of the images: the stack, less the bits that it began with."""
        return 32 * (len(self.words) - self.seed)

    def stored(self) -> dict[str, Any]:
        """The parts of a `Chunk` that hold these bits."""
        rows = [
            (batch, place, index, up)
            for batch, exceptions in enumerate(self.listed)
            for (place, index), up in exceptions.items()
        ]
        payload = self.seed.to_bytes(4, "little") + self.words.astype("<u4").tobytes()
        return {
            "schedule": self.schedule,
            "exceptions": np.array(rows, EXCEPTION),
            "payload": payload,
        }

    @classmethod
    def restored(cls, chunk: Chunk) -> Coded:
        """Read what `stored` returned."""
        listed: list[Exceptions] = [{} for _ in chunk.schedule]
        for batch, place, index, up in chunk.exceptions.tolist():
            if batch >= len(listed):
                raise ValueError("an exception belongs to no batch")
            listed[batch][place, index] = bool(up)
        if len(chunk.payload) < 8 or len(chunk.payload) % 4:
            raise ValueError("the payload does not consist of 32-bit words")
        words = np.frombuffer(chunk.payload, "<u4").astype(np.uint32)
        seed = int(words[0])
        if not 4 <= seed <= SEED:
            raise ValueError(f"the stack begins with {seed} words")
        return cls(list(chunk.schedule), listed, seed, words[1:])


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
        self.model = prepared(model, numerics)
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
        """Integer images (N, *shape) as bits; `salt` is all that belongs to them.

        Raises:
            CodingError: If an image has no finite density under the model.
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
        at = sum(coded.schedule)
        x = np.zeros((at, *shape), np.int64)
        try:
            with self._at_work():
                stack = Stack(coded.words)
                for n, listed in zip(coded.schedule[::-1], coded.listed[::-1], strict=True):
                    coder = self._coder(stack, n, listed)
                    given = self._context(context, at - n, at)
                    x[at - n : at] = self.model.generate(coder, given).reshape(n, *shape).numpy()
                    at -= n
                left = stack.words(foreign=True)
        except NumericsDiffer:
            raise
        except (Exhausted, ValueError, OverflowError) as error:
            raise NumericsDiffer(f"decoding failed ({str(error) or 'no bits left'})") from error
        if not np.array_equal(left, _words(digest(x, salt), coded.seed)):
            raise NumericsDiffer("the decoded images are not the images that were encoded")
        return x

    def _push(self, stack: Stack, x: np.ndarray, context: Context) -> Exceptions:
        coder = self._coder(stack, len(x))
        stack.mark()
        self.model.infer(torch.from_numpy(x).to(self.dtype), coder, context)
        coder.close()
        return coder.rounding.listed

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

    def _coder(self, stack: Stack, n: int, listed: Exceptions | None = None) -> Coder:
        """A trace of n images, which decodes if their exceptions were listed."""
        rounding = Rounding(listed, guarded=self.guarded)
        return Coder(stack, self.grids, rounding, n=n, dtype=self.dtype)

    def _context(self, context: Context, start: int, stop: int) -> Context:
        return apply(lambda t: t.to(self.dtype), rows(context, slice(start, stop)))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        threads = one_thread() if self.numerics == "pinned" else nullcontext()
        with torch.inference_mode(), Kernels(), np.errstate(all="ignore"), threads:
            yield

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
    """Refuse a model that cannot code, before its data are read.

    Raises:
        ValueError: For continuous data; for a layer, a map or a distribution without a coding
            rule, by its name; or for a model whose directions do not mirror each other.
    """
    x, context = example(model)
    plain = prepared(model, "pinned")
    given = apply(lambda t: t.float(), context)
    latents = latent_grids(plain, torch.from_numpy(x), given)
    Codec(model, numerics="exact", latents=latents).fingerprint()
