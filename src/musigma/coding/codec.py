"""Images to bits and back, a chunk at a time, by one model.

A chunk is coded on its own stack, batch after batch. Bits-back needs bits to begin with: they are
a hash of the chunk's own content, so that what is left on the stack after decoding says whether
every value is right. Only the first images pay for them, because batches begin at one image and
grow with the stack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.coding import numerics as arithmetic
from musigma.coding.batch import bits_of, digest
from musigma.coding.coder import Coder, drawn_sites, grids
from musigma.coding.errors import CodingError, NumericsDiffer
from musigma.coding.numerics import Kernels, Numerics
from musigma.coding.rounding import Exceptions, Rounding
from musigma.coding.stack import Exhausted, Stack
from musigma.evaluation import context_size
from musigma.gaussian import DiagonalGaussian
from musigma.model import VAE, Model, Prior
from musigma.trace import Trace

__all__ = ["BATCH", "Codec", "Coded", "check", "latent_grids"]

BATCH = 64
"""Images that go through the networks together, at most."""
MARGIN = 128
"""Bits that stay on a stack at least."""
PROBE = 1 << 12
"""Words of the stack on which a chunk's first image is tried first."""
SEED = 1 << 22
"""Words that a stack begins with, at most."""


TOO_MANY = "an image takes more bits to begin with than a file holds: use smaller images"


@dataclass(frozen=True)
class Coded:
    """A chunk of images as bits.

    Attributes:
        schedule: Sizes of the batches, in the order in which they were pushed.
        listed: What `Rounding` listed in each.
        seed: 32-bit words of the hash that the stack began with.
        words: The stack.
    """

    schedule: list[int]
    listed: list[Exceptions]
    seed: int
    words: np.ndarray

    @property
    def bits(self) -> int:
        """What the images cost: the stack, less the bits that it began with."""
        return 32 * (len(self.words) - self.seed)


class Codec:
    """A model as a coder of its data.

    Args:
        model: With a coding rule for every layer and distribution.
        numerics: The arithmetic, `exact` or `pinned`.
        latents: g of each latent's grid 2^-g, as `latent_grids` finds them.

    Raises:
        ValueError: For a layer, a distribution or a model that has no coding rule, by its name.
    """

    def __init__(self, model: Model, *, numerics: Numerics, latents: Sequence[int]):
        self.model = arithmetic.prepared(model, numerics)
        self.numerics, self.latents = numerics, list(latents)
        self.guarded = numerics == "exact"
        self.dtype = torch.float64 if numerics == "exact" else torch.float32
        count = len(list(drawn_sites(self.model)))
        if len(self.latents) != count:
            raise ValueError(f"latents: expected {count} grids; got {len(self.latents)}")
        self.grids = grids(self.model, self.latents)

    # -- both directions

    def pack(self, x: np.ndarray, context: np.ndarray | None, salt: bytes) -> Coded:
        """Images (N, ...) of whole numbers as bits.

        Args:
            x: Levels, 0 to levels - 1 of what the model takes.
            context: One row per image, if the model takes one.
            salt: Hashed with the images: whatever else they must come with.

        Raises:
            CodingError: If the model gives an image no finite density.
            OverflowError: If it takes one further than whole numbers reach.
        """
        with self._at_work():
            need = self._need(x[:1], None if context is None else context[:1])
            content = digest(x, salt)
            while True:
                seed = math.ceil((need + MARGIN) / 32) + 1
                if seed > SEED:
                    raise CodingError(TOO_MANY)
                try:
                    return self._packed(x, context, _words(content, seed), need)
                except Exhausted:
                    need = 1.5 * need + 1024

    def _packed(
        self, x: np.ndarray, context: np.ndarray | None, seed: np.ndarray, need: float
    ) -> Coded:
        stack = Stack(seed, foreign=True)
        schedule: list[int] = []
        listed: list[Exceptions] = []
        at, most = 0, BATCH
        while at < len(x):
            n = int(max(1, min(most, len(x) - at, (stack.bits - MARGIN) // need)))
            before, stack = stack, stack.copy()
            try:
                found = self._push(stack, x[at : at + n], _rows(context, at, at + n))
            except Exhausted:
                if n == 1:
                    raise
                stack, most = before, n // 2
                continue
            need = max(need, (before.bits - stack.lowest) / n * 1.05)
            schedule.append(n)
            listed.append(found)
            at, most = at + n, BATCH
        return Coded(schedule, listed, len(seed), stack.words())

    def unpack(
        self, coded: Coded, shape: Sequence[int], context: np.ndarray | None, salt: bytes
    ) -> np.ndarray:
        """The images, (N, *shape), int64.

        Raises:
            NumericsDiffer: If they are not the ones that were packed.
        """
        with self._at_work():
            try:
                stack, x = self._unpacked(coded, shape, context)
                left = stack.words(foreign=True)
            except NumericsDiffer:
                raise
            except (Exhausted, ValueError, OverflowError) as error:
                raise NumericsDiffer(
                    f"decoding went astray ({str(error) or 'no bits left'})"
                ) from error
        whole = len(left) == coded.seed
        if not whole or not np.array_equal(left, _words(digest(x, salt), coded.seed)):
            raise NumericsDiffer("the images that come out are not the ones that went in")
        return x

    def _unpacked(
        self, coded: Coded, shape: Sequence[int], context: np.ndarray | None
    ) -> tuple[Stack, np.ndarray]:
        stack, at = Stack(coded.words), sum(coded.schedule)
        x = np.zeros((at, *shape), np.int64)
        for n, listed in zip(reversed(coded.schedule), reversed(coded.listed), strict=True):
            rows = slice(at - n, at)
            coder = self._coder(stack, Rounding(listed, guarded=self.guarded), n, generating=True)
            given = self._context(_rows(context, at - n, at))
            x[rows] = self.model.generate(coder, given).reshape(n, *shape).numpy()
            at -= n
        return stack, x

    def _push(self, stack: Stack, x: np.ndarray, context: np.ndarray | None) -> Exceptions:
        rounding = Rounding(guarded=self.guarded)
        coder = self._coder(stack, rounding, len(x), generating=False)
        stack.mark()
        self.model.infer(torch.from_numpy(x).to(self.dtype), coder, self._context(context))
        coder.close()
        return rounding.listed

    def _need(self, x: np.ndarray, context: np.ndarray | None) -> float:
        """How many bits an image takes off the stack before it puts any there."""
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

    def _context(self, rows: np.ndarray | None) -> Tensor | None:
        return None if rows is None else torch.from_numpy(rows).to(self.dtype)

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

    # -- what it is

    @lru_cache(maxsize=1)  # noqa: B019  (a codec lives as long as what it codes)
    def fingerprint(self) -> str:
        """Of all the arithmetic: a hash of the bits of an image that is always the same."""
        shape, width = self.model.config["shape"], context_size(self.model)
        x = np.arange(2 * math.prod(shape)).reshape(2, *shape) * 7 // 3 % 2 ** bits_of(self.model)
        try:
            words = self.pack(x, np.eye(2, width) if width else None, b"fingerprint").words
        except OverflowError:  # whatever else it can code
            words = np.zeros(0)
        return hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()[:32]


def _rows(context: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
    return None if context is None else context[start:stop]


def _words(content: bytes, n: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(content).digest(4 * n), "<u4").astype(np.uint32)


def check(model: Model) -> None:
    """Refuse a model that cannot code, before anything is read for it.

    Raises:
        ValueError: For continuous data, or a layer, a distribution or a model without a coding
            rule, by its name.
    """
    bits_of(model)
    latents = [12] * len(list(drawn_sites(model)))
    Codec(model, numerics="exact", latents=latents).fingerprint()


@torch.no_grad()
def latent_grids(model: Model, x: Tensor, context: Tensor | None = None) -> list[int]:
    """How finely each latent must be cut: to a quarter of its posterior's standard deviation.

    Args:
        model: The model.
        x: Some data.
        context: One row for each.

    Returns:
        For each of `musigma.coding.coder.drawn_sites`, g of a grid 2^-g.
    """
    scales = _Scales()
    model.infer(model.floating(x), scales, context)
    found = []
    for site in drawn_sites(model):
        narrow = torch.quantile(scales.log_std[site].double()[:100_000], 0.01).item()
        if not math.isfinite(narrow):
            raise CodingError(
                "the model's posterior is not finite for these data; evaluate the model on them"
            )
        fine = isinstance(site, VAE) and not isinstance(site.prior, Prior)
        found.append(max(12 if fine else 2, min(20, math.ceil(2 - narrow / math.log(2)))))
    return found


class _Scales(Trace):
    """Keeps how wide each posterior is."""

    def __init__(self) -> None:
        super().__init__(scoring=False)
        self.log_std: dict[Any, Tensor] = {}

    def q(self, site: Any, dist: Any, value: Tensor | None = None) -> Tensor:
        if isinstance(dist, DiagonalGaussian):
            self.log_std[site] = dist.log_std.flatten()
        return super().q(site, dist, value)

    def latent(self, site: Any, q: Any, p: Any) -> Tensor:
        self.log_std[site] = q.log_std.flatten()
        return super().latent(site, q, p)
