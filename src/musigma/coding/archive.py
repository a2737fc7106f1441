"""Files of compressed images: written at the rate of a model, and read back.

Chunks are packed in parallel, independently of each other. A new file is read back, decoded
and compared before it replaces an old one. An open file yields all images, single images, or those
that damage has left.
"""

from __future__ import annotations

import lzma
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from musigma import checkpoint
from musigma.coding import batch as batches
from musigma.coding import numerics as arithmetic
from musigma.coding.batch import Batch, bits_of, check_levels, context_of, digest, joined, spec_of
from musigma.coding.codec import Codec, Coded
from musigma.coding.coder import latent_grids
from musigma.coding.container import BITS_BACK, KINDS, PACKED, Chunk, Writer
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.numerics import Numerics
from musigma.coding.reader import FAULT, Reader
from musigma.coding.stack import CODER
from musigma.context import Context, apply, in_parts
from musigma.files import replacing
from musigma.model import Model
from musigma.zoo.flows.glow import to_format_1

__all__ = ["Archive", "Report", "compress", "decompress", "summary"]

CHUNK = 4096
"""Images in a chunk, or fewer, so that they take at most `CHUNK_BYTES`."""
CHUNK_BYTES = 1 << 24
SAMPLE = 256
"""Number of images from which the model's own figure is computed."""
GENERAL = 1 << 20
"""Number of elements from which the size of all images by xz is estimated."""
FINEST = 32
"""Grids are no finer than 2^-32."""
SEAL = 16
"""Bytes of the `digest` in front of images that a general codec compressed."""
T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int, str], object]


@dataclass
class Report:
    """The cost of a compressed file, and the model's own figure.

    Attributes:
        images: Number of images.
        dims: Elements of an image.
        raw_bytes: Bytes of the images without compression, at their number of bits.
        data_bytes: Bytes of the file without the model.
        side_bytes: Bytes of names, modes, labels and context.
        model_bytes: Bytes of the model, in the file or beside it.
        net_bits_per_dim: Rate of the images that the model coded, without the bits that chunks
            begin with; NaN if there are none.
        bits_per_dim: Rate of `data_bytes` without `side_bytes`.
        ideal_bits_per_dim: -ELBO of a sample of the images, by fresh draws.
        ideal_error: Its standard error.
        packed: Number of images that a general codec compressed, because the model could not code
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

    plus, for each chunk, the initial bits of its first image: 60 to 3,000 bytes.

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
        numerics: `exact`: any machine can read the file. `pinned`: faster, but only machines like
            this one can.
        chunk: Number of images in a chunk. Damage loses a whole chunk, reading one image decodes
            its chunk, and each core codes one chunk at a time. None: 4,096, or 16 MiB.
        embed: Whether the file holds the model, too.
        verify: Whether the file is decoded and compared before it replaces an old one.
        workers: Number of chunks to code at a time; None: one for each core.
        progress: Called with (images done, images, the rate so far as text).

    Raises:
        ValueError: If the model cannot code such data, or constriction is not installed.
        CodingError: If an image has no finite density under the model, or decoding fails.
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
        data = batches.with_context(model, data, given)
    elif given is not None:
        raise ValueError("given: applies to an array; a Batch carries its own (Batch.given)")
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
        self.general = len(batches.packed(first.levels, self.bits)) / len(first)
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
        quick = len(zlib.compress(batches.plain(batch.levels, self.bits), 6))
        if coded is None or 0.6 * quick < len(parts["payload"]):
            general = seal[:SEAL] + batches.packed(batch.levels, self.bits)
            if coded is None or len(general) < len(parts["payload"]):
                coded, parts = None, {"payload": general}
        raw = len(batch) * self.dims * batches.width(self.bits)
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
    """The starts of the chunks of n images, and the end of the last one."""
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
    parts = in_parts(x, context)
    bits = torch.cat([model.bits_per_dim(part, given).double() for part, given in parts])
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return bits.mean().item(), error


# --- reading -----------------------------------------------------------------------------------


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
        limits: The limits that the file must respect.
        trust: Whether the model in the file may be built; a hostile file could name a model that
            takes all memory.
        workers: Number of chunks to decode at a time; None: one for each core.

    Attributes:
        shape: Shape of an image.
        bits: Bits of each element.
        about: The JSON values that were kept with the file.

    Raises:
        DamagedFile: If it is not a `.mus` file, or its header is damaged.
        WrongModel: If the model is missing, or not the one that wrote the file.
        NumericsDiffer: If the model computes different numbers on this machine.
        UnknownVersion: If the file has a newer format.
        LimitExceeded: If the file asks for more than `limits` allow.
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
                f"the file was coded by {header['coder']}, but this is {CODER}; install the "
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
        if chunk.raw != chunk.count * math.prod(self.shape) * batches.width(self.bits):
            raise DamagedFile(
                f"{where}: declares {chunk.raw:,} bytes, which is not the size of its images; "
                f"{FAULT}"
            )
        try:
            about, given = batches.unpacked_side(chunk.side, chunk.count)
            context = context_of(self.codec.model, Batch(np.empty(0), about, given))
            if chunk.kind == PACKED:
                shape = (chunk.count, *self.shape)
                levels = batches.unpacked(chunk.payload[SEAL:], shape, self.bits)
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


def checked(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The header, if it has every entry that is needed.

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
    """The description in a `.mus` file, read without its model: a plain dict.

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
            "the file holds its model, and an untrusted model may use up all memory when it is "
            "built; if you trust the file, pass --trust (trust=True), or give the model"
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


# --- both --------------------------------------------------------------------------------------


def model_digest(model: Model) -> str:
    """The digest of a model's configuration and parameters, by which a file identifies it."""
    return checkpoint.digest(to_format_1(model.config), model.state_dict())


def _is_model(model: Model, header: Mapping[str, Any]) -> bool:
    """Whether a file was written with this model; of an earlier format, perhaps."""
    written = header["model"]["digest"]
    return written == model.former_digest or written == model_digest(model)


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
