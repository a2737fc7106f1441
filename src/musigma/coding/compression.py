"""Data sets to files that hold every bit, and as much as the model says they do.

Chunks are packed on as many cores as there are, each by itself; what is written is read again,
decoded and compared before the file takes its place.
"""

from __future__ import annotations

import math
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from musigma import checkpoint
from musigma.coding import numerics as arithmetic
from musigma.coding.archive import Archive, model_digest
from musigma.coding.batch import (
    SEAL,
    Batch,
    bits_of,
    check_levels,
    context_rows,
    digest,
    joined,
    packed,
    plain,
    side_by_side,
    width,
)
from musigma.coding.codec import Codec, Coded, latent_grids
from musigma.coding.container import BITS_BACK, EXCEPTION, PACKED, Chunk, Writer
from musigma.coding.errors import CodingError, Limits, NumericsDiffer
from musigma.coding.numerics import Numerics
from musigma.coding.stack import CODER
from musigma.files import replacing
from musigma.model import Model

__all__ = ["Report", "compress"]

CHUNK = 4096
"""Images of a chunk; fewer, if they would take more than `CHUNK_BYTES`."""
CHUNK_BYTES = 1 << 24
SAMPLE = 256
"""Images that the model's own figure is taken of."""
GENERAL = 1 << 20
"""Elements of the first images, from which it is estimated what xz makes of all."""
Progress = Callable[[int, int, str], object]


@dataclass
class Report:
    """What a compressed file costs, and what the model had said.

    Attributes:
        images: How many.
        dims: Elements of each.
        raw_bytes: What they take plainly, at as many bits as they have levels for.
        data_bytes: The file without a model.
        side_bytes: Of those, what names, modes and labels take.
        model_bytes: What the model takes, in the file or beside it.
        net_bits_per_dim: Of the images that the model coded, less the bits that chunks begin with;
            NaN if there are none.
        bits_per_dim: `data_bytes`, without names, modes and labels, for each element.
        ideal_bits_per_dim: -ELBO of the first images, by fresh draws, and its standard error.
        ideal_error: That.
        packed: Images that a general codec packed better, or that the model could not code.
        general_bytes: What xz makes of the same images, as estimated by the first ones.
        break_even: Images from which data and model together take less than xz's; None: never.
        verified: Whether the file was read, decoded and compared.
        seconds: It took, in all.
    """

    images: int = 0
    dims: int = 0
    raw_bytes: int = 0
    data_bytes: int = 0
    side_bytes: int = 0
    model_bytes: int = 0
    net_bits_per_dim: float = math.nan
    bits_per_dim: float = math.nan
    ideal_bits_per_dim: float = math.nan
    ideal_error: float = math.nan
    packed: int = 0
    general_bytes: int = 0
    break_even: int | None = None
    verified: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


def compress(
    model: Model,
    data: np.ndarray | Sequence[Batch] | Any,
    path: str | Path | BinaryIO,
    *,
    about: Mapping[str, Any] | None = None,
    numerics: Numerics = "exact",
    chunk: int | None = None,
    embed: bool = False,
    verify: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    r"""Write data as a `.mus` file, without loss, at the rate that the model gives them.

    .. math:: \text{bits} = \sum_i -\text{ELBO}(x_i) / \ln 2

    and, for each chunk, what its first image takes to begin with, 60 to 3,000 bytes.

    Args:
        model: Built by an `architecture`, with bits, not None, and with a coding rule for every
            layer.
        data: Whole numbers 0 .. 2^bits - 1, shape (N, \*shape); or any sequence whose slices are a
            `Batch`, which is asked for one chunk after the other.
        path: The file; or one that is open for writing, which is not read again.
        about: JSON values to keep with the file.
        numerics: `exact`: any machine can read it; `pinned`: faster, and only machines like this
            one can.
        chunk: Images in each chunk: what is lost by damage, decoded for one image, and done by one
            core; None: 4,096, or 16 MiB of them.
        embed: Whether the model goes into the file, too.
        verify: Whether the file is decoded and compared before it takes its place.
        workers: Chunks that are worked on at a time; None: as many as there are cores.
        progress: Called with (images done, images, the bits/dim so far in words).

    Raises:
        ValueError: If the model cannot code such data, or constriction is not installed.
        CodingError: If it gives some images no finite density; or decoding gave other images.
        OSError: If the file cannot be written. An old file stays, as it does after all of these.

    Example:
        >>> import musigma, tempfile
        >>> from musigma.coding import decompress
        >>> model = musigma.build("vae", (1, 4, 4), bits=1, latents=4)
        >>> x = np.random.default_rng(0).integers(0, 2, (40, 1, 4, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress(model, x, f"{folder}/x.mus")
        ...     bool((decompress(f"{folder}/x.mus", model).levels == x).all())
        True
    """
    bits_of(model)  # refuses models that no file can name
    source: Any = _Array(model, data) if isinstance(data, np.ndarray) else data
    if not len(source):
        raise ValueError("data: there are no images to compress")
    job = _Compression(model, source, numerics, chunk, workers, progress)
    if not isinstance(path, (str, Path)):
        job.write(path, about or {}, embed)
        return job.report()
    with replacing(path) as draft:
        with draft.open("wb") as file:
            job.write(file, about or {}, embed)
        if verify:
            with draft.open("rb") as file:
                job.verify(Archive(file, model, limits=Limits(total=1 << 62)))
    return job.report()


class _Array:
    """An array as a sequence of batches."""

    def __init__(self, model: Model, x: np.ndarray):
        check_levels(model, x)
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.x[rows].astype(np.int64))


class _Compression:
    """One file on its way."""

    def __init__(
        self,
        model: Model,
        source: Any,
        numerics: Numerics,
        chunk: int | None,
        workers: int | None,
        progress: Progress | None,
    ):
        self.began = time.perf_counter()
        self.bits = bits_of(model)
        self.model, self.source, self.numerics, self.workers = model, source, numerics, workers
        self.shape: tuple[int, ...] = tuple(model.config["shape"])
        self.dims, self.progress = math.prod(self.shape), progress
        most = chunk or max(1, min(CHUNK, CHUNK_BYTES // self.dims))
        if not 1 <= most <= Limits().chunk_images:
            raise ValueError(f"chunk: expected 1 to {Limits().chunk_images} images; got {chunk}")
        parts = math.ceil(len(source) / most)
        if chunk is None and parts % 2 and len(source) > 2 * parts * SAMPLE:
            parts += 1  # so that two cores are done at the same time
        self.cuts = [i * len(source) // parts for i in range(parts + 1)]
        first = _sample(source)
        context = context_rows(model, first.about.get("labels"))
        x = torch.from_numpy(first.levels)
        given = None if context is None else torch.from_numpy(context).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same data make the same file
            self.ideal = _ideal(model, first.levels, context)
            fine = latent_grids(_plain(model), x, given)
        self.codec = Codec(model, numerics=numerics, latents=fine)
        some = source[0 : min(len(source), max(SAMPLE, GENERAL // self.dims))]
        self.general = len(packed(some.levels, self.bits)) / len(some)
        self.digests: list[bytes] = []
        self.net = self.coded = self.packed = self.side = self.written = self.so_far = 0
        self.model_bytes = len(_as_bytes(model))
        self.embedded = self.verified = False

    def write(self, file: BinaryIO, about: Mapping[str, Any], embed: bool) -> None:
        """The whole file."""
        header = {
            "about": dict(about),
            "bits": self.bits,
            "coder": CODER,
            "fingerprint": self.codec.fingerprint(),
            "latents": self.codec.latents,
            "machine": arithmetic.machine() if self.numerics == "pinned" else {},
            "model": {
                "architecture": self.model.config["architecture"],
                "digest": model_digest(self.model),
            },
            "numerics": self.numerics,
            "shape": list(self.shape),
        }
        self.embedded = embed
        pieces = zip(self.cuts, self.cuts[1:], strict=False)
        batches = ((first, self.source[first:last]) for first, last in pieces)
        with Writer(file, header, _as_bytes(self.model) if embed else None) as writer:
            work = enumerate(side_by_side(self._packed, batches, self.workers))
            for index, (first, batch, kind, coded, payload) in work:
                rows = _exceptions(coded) if coded else np.empty(0, EXCEPTION)
                schedule = coded.schedule if coded else []
                chunk = Chunk(
                    index=index, first=first, count=len(batch), kind=kind,
                    raw=len(batch) * self.dims * width(self.bits),
                    schedule=schedule, exceptions=rows, side=batch.side, payload=payload,
                )  # fmt: skip
                self.so_far += writer.write(chunk)
                self.side += len(zlib.compress(batch.side, 9)) if batch.side else 0
                self.digests.append(digest(batch.levels, batch.side))
                if coded:
                    self.net, self.coded = self.net + coded.bits, self.coded + len(batch)
                else:
                    self.packed += len(batch)
                self._tell(first + len(batch))
            self.written = writer.close()

    def _packed(self, piece: tuple[int, Batch]) -> tuple[int, Batch, int, Coded | None, bytes]:
        first, batch = piece
        check_levels(self.model, batch.levels)
        context = context_rows(self.model, batch.about.get("labels"))
        coded, payload = None, None
        try:
            coded = self.codec.pack(batch.levels, context, batch.side)
            payload = coded.words.astype("<u4").tobytes()
            payload = coded.seed.to_bytes(4, "little") + payload
        except OverflowError:  # further out than whole numbers reach
            coded = None
        except CodingError as error:
            last = first + len(batch) - 1
            raise CodingError(f"images {first} to {last}: {error}") from error
        quick = len(zlib.compress(plain(batch.levels, self.bits), 6))
        if payload is None or 0.6 * quick < len(payload):
            general = digest(batch.levels, batch.side)[:SEAL] + packed(batch.levels, self.bits)
            if payload is None or len(general) < len(payload):
                return first, batch, PACKED, None, general
        return first, batch, BITS_BACK, coded, payload

    def verify(self, archive: Archive) -> None:
        """Decode what was written, and compare it with what was to be."""
        archive.workers = self.workers
        for i, batch in enumerate(archive):
            if digest(batch.levels, batch.side) != self.digests[i]:
                raise NumericsDiffer(
                    f"chunk {i} does not decode to what it was made of, so no file is written; "
                    "please report this"
                )
            self._tell(self.cuts[i + 1])
        self.verified = True

    def _tell(self, done: int) -> None:
        if self.progress:
            rate = 8 * self.so_far / (self.packed + self.coded) / self.dims
            said = f"{rate:.4f} bits/dim, by the model {self.ideal[0]:.4f}"
            self.progress(done, len(self.source), said)

    def report(self) -> Report:
        """What it came to."""
        n, data = len(self.source), self.written - self.model_bytes * self.embedded
        gain = self.general - (data - self.side) / n
        return Report(
            images=n,
            dims=self.dims,
            raw_bytes=math.ceil(n * self.dims * self.bits / 8),
            data_bytes=data,
            side_bytes=self.side,
            model_bytes=self.model_bytes,
            net_bits_per_dim=self.net / (self.coded * self.dims) if self.coded else math.nan,
            bits_per_dim=8 * (data - self.side) / (n * self.dims),
            ideal_bits_per_dim=self.ideal[0],
            ideal_error=self.ideal[1],
            packed=self.packed,
            general_bytes=round(n * self.general),
            break_even=math.ceil(self.model_bytes / gain) if gain > 0 else None,
            verified=self.verified,
            seconds=time.perf_counter() - self.began,
        )


def _sample(source: Any) -> Batch:
    """Images from all over a data set."""
    n, parts = len(source), min(8, len(source))
    size = max(1, SAMPLE // parts)
    starts = sorted({min(i * n // parts, max(0, n - size)) for i in range(parts)})
    return joined([source[start : min(start + size, n)] for start in starts])


def _as_bytes(model: Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoint.save(model, path)
        return path.read_bytes()


def _plain(model: Model) -> Model:
    return arithmetic.prepared(model, "pinned")


@torch.no_grad()
def _ideal(model: Model, x: np.ndarray, context: np.ndarray | None) -> tuple[float, float]:
    """-ELBO in bits/dim, and its standard error."""
    model, parts = _plain(model), []
    for at in range(0, len(x), 64):
        given = None if context is None else torch.from_numpy(context[at : at + 64]).float()
        parts.append(model.bits_per_dim(torch.from_numpy(x[at : at + 64]), given).double())
    bits = torch.cat(parts)
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return bits.mean().item(), error


def _exceptions(coded: Coded) -> np.ndarray:
    rows = [
        (batch, place, index, up)
        for batch, listed in enumerate(coded.listed)
        for (place, index), up in listed.items()
    ]
    return np.array(rows, EXCEPTION)
