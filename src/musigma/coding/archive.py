"""Files of compressed images, opened for reading: all images, one, or what damage has left."""

from __future__ import annotations

import lzma
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from musigma import checkpoint
from musigma.coding import numerics as arithmetic
from musigma.coding.batch import Batch, digest, joined, unpacked, unpacked_side, width
from musigma.coding.codec import Codec, Coded
from musigma.coding.container import BITS_BACK, KINDS, PACKED, Chunk
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.inputs import bits_of, context_of, spec_of
from musigma.coding.reader import FAULT, Reader
from musigma.coding.stack import CODER
from musigma.model import Model
from musigma.zoo.flows.published_glow import to_format_1

__all__ = ["Archive", "decompress", "summary"]

FINEST = 32
"""Grids are no finer than 2^-32."""
SEAL = 16
"""Bytes of a `digest` that stand before images that a general codec packed."""
T = TypeVar("T")
R = TypeVar("R")


def decompress(path: str | Path | BinaryIO, model: Model | None = None, **options: Any) -> Batch:
    """All images of a `.mus` file; `Archive`, which takes the options, yields them in parts.

    Raises:
        CodingError: See `Archive` and its iteration.
    """
    if isinstance(path, (str, Path)):
        with Path(path).open("rb") as file:
            return decompress(file, model, **options)
    archive = Archive(path, model, **options)
    return joined([Batch(np.zeros((0, *archive.shape), np.int64)), *archive])


class Archive:
    """An open `.mus` file: its images in order, by number, or chunk by chunk.

    Args:
        file: Open for reading bytes, seekable.
        model: The model that it was written with; None: the model in the file.
        limits: What the file may ask for.
        trust: Whether the model in the file may be built; a hostile file could name a model that
            takes all memory.
        workers: Number of chunks to decode at a time; None: one for each core.

    Attributes:
        shape: Shape of an image.
        bits: Bits of each element.
        about: The JSON values that were kept with the file.

    Raises:
        DamagedFile: If it is no `.mus` file, or its header is damaged.
        WrongModel: If the model is another one, or there is none.
        NumericsDiffer: If this machine computes other numbers than the one that wrote the file.
        UnknownVersion: If the file has a later format.
        LimitExceeded: If the file asks for more than `limits` grant.
    """

    def __init__(
        self,
        file: BinaryIO,
        model: Model | None = None,
        *,
        limits: Limits | None = None,
        trust: bool = False,
        workers: int | None = None,
    ):
        self.reader, self.workers = Reader(file, limits), workers
        header = checked(self.reader.header)
        self.shape, self.bits = tuple(header["shape"]), header["bits"]
        self.about: dict[str, Any] = header["about"]
        written = f"a {header['model']['architecture']} of digest {header['model']['digest'][:12]}"
        if model is None:
            model = _embedded(self.reader, header, written, trust)
        elif not _is_model(model, header):
            raise WrongModel(
                f"the file was written with another model, {written}, and the digest of this one "
                f"is {model_digest(model)[:12]}; give the model that it was written with"
            )
        if header["coder"] != CODER:
            raise UnknownVersion(
                f"the file was coded by {header['coder']}, and this is {CODER}; install the "
                "musigma that wrote it"
            )
        here = arithmetic.machine() if header["numerics"] == "pinned" else {}
        if other := {k: v for k, v in header["machine"].items() if here.get(k) != v}:
            found = ", ".join(f"{k} {v} (here {here.get(k)})" for k, v in sorted(other.items()))
            raise NumericsDiffer(
                f"the file is pinned to the machine that wrote it: {found}; read it there, or "
                "compress with numerics exact"
            )
        bits, shape = bits_of(model), spec_of(model).shape
        if (shape, bits) != (self.shape, self.bits):
            raise DamagedFile(
                f"the header says {self.bits} bits of shape {self.shape}, and its model takes "
                f"{bits} of {shape}; {FAULT}"
            )
        try:
            self.codec = Codec(model, numerics=header["numerics"], latents=header["latents"])
            fingerprint = self.codec.fingerprint()
        except CodingError:
            raise
        except ValueError as error:
            raise DamagedFile(f"the header does not fit its model: {error}; {FAULT}") from error
        if fingerprint != header["fingerprint"]:
            raise NumericsDiffer(
                "a test image shows that the arithmetic of this machine differs from that of the "
                "machine that wrote the file, so nothing is decoded; read it where it was written"
            )

    def __len__(self) -> int:
        return self.reader.images

    def chunk(self, place: int) -> Batch:
        """The images of ``reader.entries[place]``.

        Raises:
            DamagedFile: If the chunk is damaged.
            NumericsDiffer: If the decoded images are not those that were encoded.
        """
        return self._decoded(self.reader.read(place))

    def __iter__(self) -> Iterator[Batch]:
        """All chunks in order, decoded in parallel.

        Raises:
            DamagedFile, NumericsDiffer: As `chunk`, at the first such chunk.
        """
        if self.reader.lost or not self.reader.ended:
            lost = ", ".join(f"{a} to {b - 1}" for a, b in self.reader.lost) or "from the end"
            raise DamagedFile(
                f"images are missing: {lost}; `chunk`, or --keep-going, reads the others"
            )
        chunks = (self.reader.read(place) for place in range(len(self.reader)))
        yield from in_parallel(self._decoded, chunks, self.workers)

    def one(self, index: int) -> Batch:
        """One image; decodes its chunk.

        Raises:
            IndexError: If the file never held it.
            DamagedFile, NumericsDiffer: If it is lost, or as `chunk`.
        """
        for place, entry in enumerate(self.reader.entries):
            if entry.first <= index < entry.first + entry.count:
                at = index - entry.first
                return self.chunk(place).rows(slice(at, at + 1))
        if 0 <= index < len(self):
            raise DamagedFile(f"image {index}: it is lost; copy the file again")
        raise IndexError(f"image {index}: the file has {len(self)}")

    def _decoded(self, chunk: Chunk) -> Batch:
        where = f"chunk {chunk.index} (images {chunk.first} to {chunk.first + chunk.count - 1})"
        if chunk.kind not in (PACKED, BITS_BACK):
            raise UnknownVersion(f"{where}: is {KINDS[chunk.kind]}; upgrade musigma")
        if chunk.raw != chunk.count * math.prod(self.shape) * width(self.bits):
            raise DamagedFile(
                f"{where}: declares {chunk.raw:,} bytes, which is not the size of its images; "
                f"{FAULT}"
            )
        try:
            about, given = unpacked_side(chunk.side, chunk.count)
            context = context_of(self.codec.model, Batch(np.empty(0), about, given))
            if chunk.kind == PACKED:
                levels = unpacked(chunk.payload[SEAL:], (chunk.count, *self.shape), self.bits)
                if chunk.payload[:SEAL] != digest(levels, chunk.side)[:SEAL]:
                    raise ValueError("the images do not match their digest")
                return Batch(levels, about, given)
            coded = Coded.restored(chunk)
        except (ValueError, TypeError, lzma.LZMAError) as error:
            raise DamagedFile(f"{where}: {error}; {FAULT}") from error
        try:
            levels = self.codec.unpack(coded, self.shape, context, chunk.side)
        except NumericsDiffer as error:
            raise NumericsDiffer(
                f"{where}: {error}; the file is whole, so the arithmetic of this machine differs "
                "from that of the machine that wrote it: read it there"
            ) from error
        return Batch(levels, about, given)


def model_digest(model: Model) -> str:
    """The digest of a model's configuration and parameters, by which a file identifies it."""
    return checkpoint.digest(to_format_1(model.config), model.state_dict())


def _is_model(model: Model, header: Mapping[str, Any]) -> bool:
    """Whether a file was written with this model; of an earlier format, perhaps."""
    written = header["model"]["digest"]
    return written == model.former_digest or written == model_digest(model)


def checked(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """A header with everything that is needed.

    Raises:
        DamagedFile: If something is missing, or has another type.
        UnknownVersion: If its numerics are unknown.
    """
    kinds = {
        "about": dict, "bits": int, "coder": str, "fingerprint": str, "latents": list,
        "machine": dict, "model": dict, "numerics": str, "shape": list,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if type(header.get(name)) is not kind]
    if not wrong:
        numbers = [*header["shape"], *header["latents"], header["bits"]]
        whole = all(type(n) is int and 0 < n < 1 << 24 for n in numbers)
        whole = whole and all(g <= FINEST for g in header["latents"])
        named = all(type(header["model"].get(k)) is str for k in ("architecture", "digest"))
        if not (whole and named and header["bits"] <= 16 and math.prod(header["shape"]) < 1 << 28):
            wrong = ["shape, latents, bits or model"]
        elif header["numerics"] not in ("exact", "pinned"):
            raise UnknownVersion(
                f"the file has numerics {header['numerics']!r}, which this musigma does not know; "
                "upgrade musigma"
            )
    if wrong:
        raise DamagedFile(f"the header lacks {', '.join(wrong)}; {FAULT}")
    return header


def summary(file: BinaryIO, limits: Limits | None = None) -> dict[str, Any]:
    """What a `.mus` file says of itself, without its model: a plain dict.

    Raises:
        CodingError: As `Archive`, of the file.
    """
    reader = Reader(file, limits)
    header = checked(reader.header)
    found = sum(entry.count for entry in reader.entries)
    packed = sum(entry.count for entry in reader.entries if entry.kind == PACKED)
    data, dims = file.seek(0, 2) - reader.model_size, math.prod(header["shape"])
    names = ("shape", "bits", "model", "numerics", "machine", "coder", "about")
    return {
        **{name: header[name] for name in names},
        "images": reader.images,
        "chunks": len(reader.entries),
        "images_coded": found - packed,
        "images_packed": packed,
        "data_bytes": data,
        "bits_per_dim": 8 * data / max(1, dims * found),
        "model_bytes": reader.model_size,
        "lost": reader.lost,
        "whole": reader.ended and not reader.lost,
    }


def _embedded(reader: Reader, header: Mapping[str, Any], written: str, trust: bool) -> Model:
    if not reader.model_size:
        raise WrongModel(f"the file holds no model; give the model it was written with, {written}")
    if not trust:
        raise CodingError(
            "the file holds its model, and a model from a stranger may take all memory when it is "
            "built; if you trust the file, say so (--trust, trust=True), or give the model"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(reader.model())
        try:
            model = checkpoint.load(path)
        except Exception as error:  # a hostile model can fail in any way
            raise DamagedFile(
                f"the model in the file cannot be built: {error}; give the model that it was "
                "written with"
            ) from error
    if not _is_model(model, header):
        raise WrongModel("the model in the file is not the model that the header names")
    return model


def in_parallel(work: Callable[[T], R], items: Iterator[T], workers: int | None) -> Iterator[R]:
    """``map(work, items)`` in order, on so many threads; None: one for each core."""
    count = workers or os.cpu_count() or 1
    with arithmetic.one_thread(), ThreadPoolExecutor(count) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > count:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
