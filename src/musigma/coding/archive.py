"""Files of compressed images, opened: all of them, one, or what damage has left."""

from __future__ import annotations

import json
import lzma
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from musigma import checkpoint
from musigma.coding import numerics as arithmetic
from musigma.coding.batch import (
    SEAL,
    Batch,
    bits_of,
    context_rows,
    digest,
    joined,
    side_by_side,
    unpacked,
    width,
)
from musigma.coding.codec import SEED, Codec, Coded
from musigma.coding.container import BITS_BACK, KINDS, PACKED, Chunk, Reader
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.rounding import Exceptions
from musigma.coding.stack import CODER
from musigma.model import Model
from musigma.zoo.flows.published_glow import to_format_1

__all__ = ["Archive", "decompress", "model_digest", "summary"]

FINEST = 32
"""Grids are no finer than 2^-32."""


def decompress(path: str | Path | BinaryIO, model: Model | None = None, **options: Any) -> Batch:
    """All images of a `.mus` file; see `Archive`, which gives them in parts.

    Raises:
        CodingError: As `Archive` and its iteration say.
    """
    if isinstance(path, (str, Path)):
        with Path(path).open("rb") as file:
            return decompress(file, model, **options)
    archive = Archive(path, model, **options)
    return joined([Batch(np.zeros((0, *archive.shape), np.int64)), *archive])


class Archive:
    """A `.mus` file, opened: its images in their order, by their numbers, or chunk by chunk.

    Args:
        file: Open for reading bytes, seekable.
        model: The one that it was written with; None: the one in it.
        limits: What the file may ask for.
        trust: Whether the model in the file may be built, if none is given; a hostile file could
            name one that takes all memory.
        workers: Chunks that are worked on at a time; None: as many as there are cores.

    Raises:
        DamagedFile: If it is no `.mus` file, or its header is damaged.
        WrongModel: If the model is another one, or none is given and none is in the file.
        NumericsDiffer: If this machine computes other numbers than the one that wrote it.
        UnknownVersion, LimitExceeded: As they say.
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
        self.reader = Reader(file, limits)
        self.workers = workers
        header = checked(self.reader.header)
        self.shape, self.bits = tuple(header["shape"]), header["bits"]
        self.about: dict[str, Any] = header["about"]
        if model is None:
            model = _embedded(self.reader, header, trust)
        elif model_digest(model) != header["model"]["digest"]:
            raise WrongModel(
                "the file was written with another model: a "
                f"{header['model']['architecture']} of digest {header['model']['digest'][:12]}, "
                f"and this one's is {model_digest(model)[:12]}; give that one"
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
                f"the file is pinned to the machine that wrote it: {found}; read it there, and "
                "compress with numerics exact what others are to read"
            )
        shape, bits = tuple(model.config["shape"]), bits_of(model)
        if (shape, bits) != (self.shape, self.bits):
            raise DamagedFile(
                f"the header says {self.bits} bits of shape {self.shape}, and its model takes "
                f"{bits} of {shape}; the writer had a fault"
            )
        try:
            self.codec = Codec(model, numerics=header["numerics"], latents=header["latents"])
            fingerprint = self.codec.fingerprint()
        except CodingError:
            raise
        except ValueError as error:
            raise DamagedFile(f"the header's {error}; the writer had a fault") from error
        if fingerprint != header["fingerprint"]:
            raise NumericsDiffer(
                "this machine's arithmetic differs from that of the one that wrote the file, as a "
                "test image shows, so nothing is decoded; read it where it was written"
            )

    def __len__(self) -> int:
        return self.reader.images

    def chunk(self, place: int) -> Batch:
        """The images of one of ``reader.entries``.

        Raises:
            DamagedFile: If the chunk is damaged.
            NumericsDiffer: If what is decoded is not what was encoded.
        """
        return self._decoded(self.reader.read(place))

    def __iter__(self) -> Iterator[Batch]:
        """All chunks in order, decoded side by side.

        Raises:
            DamagedFile, NumericsDiffer: As `chunk`, where the first such chunk comes.
        """
        if self.reader.lost or not self.reader.ended:
            lost = ", ".join(f"{a} to {b - 1}" for a, b in self.reader.lost) or "from the end"
            raise DamagedFile(
                f"images are missing: {lost}; --keep-going gives what is there, by `chunk`"
            )
        chunks = (self.reader.read(place) for place in range(len(self.reader)))
        yield from side_by_side(self._decoded, chunks, self.workers)

    def one(self, index: int) -> Batch:
        """One image; decodes the chunk that it is in.

        Raises:
            IndexError: If the file was never to hold it.
            DamagedFile, NumericsDiffer: If it is lost, or as `chunk`.
        """
        for place, entry in enumerate(self.reader.entries):
            if entry.first <= index < entry.first + entry.count:
                chunk, at = self.chunk(place), index - entry.first
                about = {name: values[at : at + 1] for name, values in chunk.about.items()}
                return Batch(chunk.levels[at : at + 1], about)
        if 0 <= index < len(self):
            raise DamagedFile(f"image {index}: it is lost; copy the file again")
        raise IndexError(f"image {index}: the file has {len(self)}")

    def _decoded(self, chunk: Chunk) -> Batch:
        where = f"chunk {chunk.index} (images {chunk.first} to {chunk.first + chunk.count - 1})"
        if chunk.kind not in (PACKED, BITS_BACK):
            raise UnknownVersion(f"{where}: is {KINDS[chunk.kind]}; upgrade musigma")
        if chunk.raw != chunk.count * math.prod(self.shape) * width(self.bits):
            raise DamagedFile(
                f"{where}: declares {chunk.raw:,} bytes, and its images are not of that size; "
                "the writer had a fault"
            )
        try:
            about = _about(chunk)
            context = context_rows(self.codec.model, about.get("labels"))
            if chunk.kind == PACKED:
                shape = (chunk.count, *self.shape)
                batch = Batch(unpacked(chunk.payload[SEAL:], shape, self.bits), about)
                if chunk.payload[:SEAL] != digest(batch.levels, batch.side)[:SEAL]:
                    raise ValueError("the images or their labels are not those that went in")
                return batch
        except (ValueError, TypeError, lzma.LZMAError) as error:
            raise DamagedFile(f"{where}: {error}; the writer had a fault") from error
        coded = _coded(chunk)
        try:
            levels = self.codec.unpack(coded, self.shape, context, chunk.side)
        except NumericsDiffer as error:
            raise NumericsDiffer(
                f"{where}: {error}; the file is whole, so this machine's arithmetic differs from "
                "that of the one that wrote it: read it there"
            ) from error
        return Batch(levels, about)


def model_digest(model: Model) -> str:
    """By what a file knows its model: of its configuration and its parameters."""
    return checkpoint.digest(to_format_1(model.config), model.state_dict())


def checked(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """A header with all that is needed.

    Raises:
        DamagedFile: If something is missing, or is of another kind.
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
                f"the file's numerics are {header['numerics']!r}, which this musigma does not "
                "know; upgrade musigma"
            )
    if wrong:
        raise DamagedFile(f"the header lacks {', '.join(wrong)}; the writer had a fault")
    return header


def summary(file: BinaryIO, limits: Limits | None = None) -> dict[str, Any]:
    """What a `.mus` file says of itself, without a model: a plain dict.

    Raises:
        CodingError: As `Archive` does of the file.
    """
    reader = Reader(file, limits)
    header = checked(reader.header)
    kinds = {"packed": 0, "coded": 0}
    for entry in reader.entries:
        kinds["packed" if entry.kind == PACKED else "coded"] += entry.count
    data = file.seek(0, 2) - reader.model_size
    dims = math.prod(header["shape"])
    return {
        "images": reader.images,
        "shape": header["shape"],
        "bits": header["bits"],
        "chunks": len(reader.entries),
        "images_coded": kinds["coded"],
        "images_packed": kinds["packed"],
        "data_bytes": data,
        "bits_per_dim": 8 * data / max(1, dims * sum(kinds.values())),
        "model": dict(header["model"]),
        "model_bytes": reader.model_size,
        "numerics": header["numerics"],
        "machine": header["machine"],
        "coder": header["coder"],
        "about": header["about"],
        "lost": reader.lost,
        "whole": reader.ended and not reader.lost,
    }


def _embedded(reader: Reader, header: Mapping[str, Any], trust: bool) -> Model:
    if not reader.model_size:
        raise WrongModel(
            f"the file holds no model; give the {header['model']['architecture']} that it was "
            f"written with, of digest {header['model']['digest'][:12]}"
        )
    if not trust:
        raise CodingError(
            "the file holds its model, and building what a stranger made may take all memory; "
            "if you trust the file, say so (--trust, trust=True), or give the model"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(reader.model())
        try:
            model = checkpoint.load(path)
        except Exception as error:  # what a stranger made can fail in any way
            raise DamagedFile(
                f"the model in the file cannot be built: {error}; give the one that it was "
                "written with"
            ) from error
    if model_digest(model) != header["model"]["digest"]:
        raise WrongModel("the model in the file is not the one that it names")
    return model


def _about(chunk: Chunk) -> dict[str, Any]:
    """What comes with the images of a chunk, a list each.

    Raises:
        ValueError: If that is not what is there.
    """
    try:
        about = json.loads(chunk.side) if chunk.side else {}
    except RecursionError as error:
        raise ValueError("names, modes or labels are nested") from error
    if not isinstance(about, dict) or any(
        not isinstance(values, list) or len(values) != chunk.count for values in about.values()
    ):
        raise ValueError("names, modes or labels are missing")
    if not all(type(label) is int and 0 <= label < 1 << 31 for label in about.get("labels", [])):
        raise ValueError("labels are no whole numbers")
    return about


def _coded(chunk: Chunk) -> Coded:
    listed: list[Exceptions] = [{} for _ in chunk.schedule]
    for batch, place, index, up in chunk.exceptions.tolist():
        if batch >= len(listed):
            raise DamagedFile(f"chunk {chunk.index}: lists a value of no batch")
        listed[batch][place, index] = bool(up)
    if len(chunk.payload) < 8 or len(chunk.payload) % 4:
        raise DamagedFile(f"chunk {chunk.index}: expected 32-bit words; the writer had a fault")
    words = np.frombuffer(chunk.payload, "<u4").astype(np.uint32)
    seed = int(words[0])
    if not 4 <= seed <= SEED:
        raise DamagedFile(f"chunk {chunk.index}: begins with {seed} words; the writer had a fault")
    return Coded(list(chunk.schedule), listed, seed, words[1:])
