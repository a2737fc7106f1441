"""Data sets to files that hold every bit, at the rate of the model.

Chunks are packed in parallel, independently of each other. What is written is read again, decoded
and compared before the file takes its place.
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
from musigma.coding.archive import SEAL, Archive, in_parallel, model_digest
from musigma.coding.batch import Batch, digest, joined, packed, plain, width
from musigma.coding.codec import Codec
from musigma.coding.coder import latent_grids
from musigma.coding.container import BITS_BACK, PACKED, Chunk, Writer
from musigma.coding.errors import CodingError, Limits, NumericsDiffer
from musigma.coding.inputs import bits_of, check_levels, context_of, spec_of, with_context
from musigma.coding.numerics import Numerics
from musigma.coding.stack import CODER
from musigma.context import Context, apply, chunks
from musigma.files import replacing
from musigma.model import Model

__all__ = ["Report", "compress"]

CHUNK = 4096
"""Images in a chunk, or fewer, so that they take at most `CHUNK_BYTES`."""
CHUNK_BYTES = 1 << 24
SAMPLE = 256
"""Number of images from which the model's own figure is computed."""
GENERAL = 1 << 20
"""Number of elements from which the size of all images by xz is estimated."""
Progress = Callable[[int, int, str], object]


@dataclass
class Report:
    """The cost of a compressed file, and the model's own figure.

    Attributes:
        images: Number of images.
        dims: Elements of an image.
        raw_bytes: Bytes of the images without compression, at their number of bits.
        data_bytes: Bytes of the file without the model.
        side_bytes: Those for names, modes, labels and context.
        model_bytes: Bytes of the model, in the file or beside it.
        net_bits_per_dim: Rate of the images that the model coded, without the bits that chunks
            begin with; NaN if there are none.
        bits_per_dim: Rate of `data_bytes` without `side_bytes`.
        ideal_bits_per_dim: -ELBO of a sample of the images, by fresh draws.
        ideal_error: Its standard error.
        packed: Number of images that a general codec packed, because the model could not code
            them, or not as well.
        general_bytes: Bytes of all images by xz, estimated from the first ones.
        break_even: Number of images from which the data and the model together are smaller than
            by xz; None: never.
        verified: Whether the file was read, decoded and compared.
        seconds: Time that it took.
    """

    images: int
    dims: int
    raw_bytes: int
    data_bytes: int
    side_bytes: int
    model_bytes: int
    net_bits_per_dim: float
    bits_per_dim: float
    ideal_bits_per_dim: float
    ideal_error: float
    packed: int
    general_bytes: int
    break_even: int | None
    verified: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


def compress(
    model: Model,
    data: np.ndarray | Sequence[Batch] | Any,
    path: str | Path | BinaryIO,
    *,
    given: Any = None,
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

    plus, for each chunk, the bits that its first image begins with: 60 to 3,000 bytes.

    Args:
        model: Built by an `architecture`, for integer levels. Each of its layers, maps and
            distributions has a coding rule; see `register`.
        data: Integers 0 .. levels - 1, shape (N, \*shape); or any sequence whose slices are a
            `Batch`, of which one chunk at a time is read.
        path: The file; or one that is open for writing, which is not verified.
        given: The context of an array of data, which the file keeps: a mapping from names to
            arrays with a row for each example, or one array if there is one variable. Classes are
            indices or one-hot rows. A `Batch` carries its own.
        about: JSON values to keep with the file.
        numerics: `exact`: any machine can read the file. `pinned`: faster, and only machines like
            this one can.
        chunk: Number of images in a chunk, which is what damage loses, what is decoded for one
            image, and what one core does; None: 4,096, or 16 MiB.
        embed: Whether the file holds the model, too.
        verify: Whether the file is decoded and compared before it takes its place.
        workers: Number of chunks to code at a time; None: one for each core.
        progress: Called with (images done, images, the rate so far as text).

    Raises:
        ValueError: If the model cannot code such data, or constriction is not installed.
        CodingError: If the model gives an image no finite density, or decoding fails.
        OSError: If the file cannot be written. After any error, an old file is unchanged.

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
    if isinstance(data, np.ndarray):
        check_levels(model, data)
        data = _Array(with_context(model, data, given))
    elif given is not None:
        raise ValueError("given: it goes with an array; a Batch carries its own (Batch.given)")
    if not len(data):
        raise ValueError("data: there are no images to compress")
    job = _Compression(model, data, numerics, chunk, workers, progress)
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
    """A batch as a sequence of batches."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, which: slice) -> Batch:
        return self.batch.rows(which)


class _Compression:
    """The writing of one file."""

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
        self.bits, self.dims = bits_of(model), spec_of(model).dims
        self.model, self.source, self.model_bytes = model, source, _as_bytes(model)
        self.workers, self.progress = workers, progress
        sample = _sample(source)
        self.arrays = bool(sample.given)
        self.bounds = _bounds(sample, len(source), self.dims, chunk)
        x = torch.from_numpy(sample.levels.astype(np.int64))
        plain_model = arithmetic.prepared(model, "pinned")
        given = apply(lambda t: t.float(), context_of(model, sample))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same data make the same file
            self.ideal = _ideal(plain_model, x, given)
            latents = latent_grids(plain_model, x, given)
        self.codec = Codec(model, numerics=numerics, latents=latents)
        first = source[0 : min(len(source), max(SAMPLE, GENERAL // self.dims))]
        self.general = len(packed(first.levels, self.bits)) / len(first)
        self.digests: list[bytes] = []
        self.net = 0
        self.embedded = self.verified = False

    def write(self, file: BinaryIO, about: Mapping[str, Any], embed: bool) -> None:
        """The whole file."""
        header = {
            "about": dict(about),
            "bits": self.bits,
            "coder": CODER,
            "fingerprint": self.codec.fingerprint(),
            "latents": self.codec.latents,
            "machine": arithmetic.machine() if self.codec.numerics == "pinned" else {},
            "model": {
                "architecture": self.model.config["architecture"],
                "digest": model_digest(self.model),
            },
            "numerics": self.codec.numerics,
            "shape": list(spec_of(self.model).shape),
        }
        self.embedded, embedded = embed, self.model_bytes if embed else None
        bounds = zip(self.bounds, self.bounds[1:], strict=False)
        pieces = ((i, a, self.source[a:b]) for i, (a, b) in enumerate(bounds))
        with Writer(file, header, embedded, arrays=self.arrays) as writer:
            self.entries = writer.entries
            for chunk, bits, seal in in_parallel(self._chunk, pieces, self.workers):
                writer.write(chunk)
                self.net += bits
                self.digests.append(seal)
                self._report_progress(chunk.first + chunk.count)
            self.written = writer.close()

    def _chunk(self, piece: tuple[int, int, Batch]) -> tuple[Chunk, int, bytes]:
        """A chunk by the model, or by xz where that is smaller; its net bits, and its digest."""
        index, first, batch = piece
        check_levels(self.model, batch.levels)
        side, context, coded = batch.side, context_of(self.model, batch), None
        seal = digest(batch.levels, side)
        parts: dict[str, Any] = {}
        try:
            coded = self.codec.pack(batch.levels.astype(np.int64), context, side)
            parts = coded.stored()
        except OverflowError:
            pass  # a value is too large for integers
        except CodingError as error:
            raise CodingError(f"images {first} to {first + len(batch) - 1}: {error}") from error
        quick = len(zlib.compress(plain(batch.levels, self.bits), 6))
        if coded is None or 0.6 * quick < len(parts["payload"]):
            general = seal[:SEAL] + packed(batch.levels, self.bits)
            if coded is None or len(general) < len(parts["payload"]):
                coded, parts = None, {"payload": general}
        raw = len(batch) * self.dims * width(self.bits)
        kind = BITS_BACK if coded else PACKED
        chunk = Chunk(
            index=index, first=first, count=len(batch), kind=kind, raw=raw, side=side, **parts
        )
        return chunk, coded.bits if coded else 0, seal

    def verify(self, archive: Archive) -> None:
        """Decode what was written, and compare it with the data."""
        archive.workers = self.workers
        for i, batch in enumerate(archive):
            if digest(batch.levels, batch.side) != self.digests[i]:
                raise NumericsDiffer(
                    f"chunk {i} does not decode to the data that it was made from, so no file is "
                    "written; please report this"
                )
            self._report_progress(self.bounds[i + 1])
        self.verified = True

    def _report_progress(self, done: int) -> None:
        if self.progress:
            begin, last = self.entries[0].offset, self.entries[-1]
            rate = 8 * (last.end - begin) / (last.first + last.count) / self.dims
            text = f"{rate:.4f} bits/dim; by the model {self.ideal[0]:.4f}"
            self.progress(done, len(self.source), text)

    def report(self) -> Report:
        """The result."""
        n, model_bytes = len(self.source), len(self.model_bytes)
        data, side = self.written - model_bytes * self.embedded, sum(e.side for e in self.entries)
        coded = sum(entry.count for entry in self.entries if entry.kind == BITS_BACK)
        gain = self.general - (data - side) / n
        return Report(
            images=n,
            dims=self.dims,
            raw_bytes=math.ceil(n * self.dims * self.bits / 8),
            data_bytes=data,
            side_bytes=side,
            model_bytes=model_bytes,
            net_bits_per_dim=self.net / (coded * self.dims) if coded else math.nan,
            bits_per_dim=8 * (data - side) / (n * self.dims),
            ideal_bits_per_dim=self.ideal[0],
            ideal_error=self.ideal[1],
            packed=n - coded,
            general_bytes=round(n * self.general),
            break_even=math.ceil(model_bytes / gain) if gain > 0 else None,
            verified=self.verified,
            seconds=time.perf_counter() - self.began,
        )


def _bounds(sample: Batch, n: int, dims: int, chunk: int | None) -> list[int]:
    """Where the chunks of n images begin, and where the last one ends."""
    given_bytes = 2 * sum(a[0].nbytes for a in sample.given.values())
    largest = max(1, min(Limits().chunk_images, Limits().side // max(1, given_bytes)))
    most = chunk or max(1, min(CHUNK, CHUNK_BYTES // dims, largest))
    if not 1 <= most <= largest:
        raise ValueError(f"chunk: expected 1 to {largest} images; got {chunk}")
    parts = math.ceil(n / most)
    if chunk is None and parts % 2 and n > 2 * parts * SAMPLE:
        parts += 1  # so that two cores finish at the same time
    return [i * n // parts for i in range(parts + 1)]


def _sample(source: Any) -> Batch:
    """Images from all parts of a data set."""
    n, parts = len(source), min(8, len(source))
    size = max(1, SAMPLE // parts)
    starts = sorted({min(i * n // parts, max(0, n - size)) for i in range(parts)})
    return joined([source[start : min(start + size, n)] for start in starts])


def _as_bytes(model: Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoint.save(model, path)
        return path.read_bytes()


@torch.no_grad()
def _ideal(model: Model, x: torch.Tensor, context: Context) -> tuple[float, float]:
    """-ELBO in bits/dim, and its standard error."""
    parts = zip(x.split(64), chunks(context, 64, len(x)), strict=True)
    bits = torch.cat([model.bits_per_dim(part, given).double() for part, given in parts])
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return bits.mean().item(), error
