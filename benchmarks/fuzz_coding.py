"""Fuzz the readers of compressed files: they may fail only by the documented errors.

    python benchmarks/fuzz_coding.py --inputs 1000000 [--seed 0] [--target container]
    python benchmarks/fuzz_coding.py --inputs 20000 --target decompress
    python benchmarks/fuzz_coding.py --inputs 1000000 --engine atheris    # if it is installed

Small files are changed (bits, blocks, lengths, splices). The checksums of half of the results are
repaired, so that the change reaches the code behind the checksums. An input fails if it raises
anything but a `CodingError`; if it yields what no file held, although no checksum was repaired
(the target `decompress`: if it yields other images than were compressed, in any case); if it takes
longer than ten seconds; or if it takes much memory. Failing inputs are written to --keep. A new
target is one line of `TARGETS`.
"""

import argparse
import atexit
import hashlib
import io
import random
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

atheris = None
if "atheris" in sys.argv:
    with suppress(ImportError):
        import atheris

if atheris:
    with atheris.instrument_imports(include=["musigma.coding"]):
        from musigma.coding import CodingError, container
        from musigma.coding import reader as reading
else:
    from musigma.coding import CodingError, container
    from musigma.coding import reader as reading

SECONDS = 10
MEMORY = 32 << 20  # bytes for one input of a few thousand bytes


@dataclass
class Target:
    """Whole files, and a function that reads a changed one and returns an outcome.

    `run` takes the bytes, and whether all of their checksums are unchanged. It raises a
    `CodingError` for what it refuses, and an AssertionError for what it should have refused.
    """

    corpus: list[bytes]
    run: Callable[[bytes, bool], str]


# -- the container


def chunk_key(header, chunk) -> bytes:
    digest = hashlib.sha256(repr((header, chunk.index, chunk.first, chunk.count)).encode())
    digest.update(repr((chunk.kind, chunk.raw, tuple(chunk.schedule), chunk.side)).encode())
    digest.update(chunk.exceptions.tobytes() + b"|" + chunk.payload)
    return digest.digest()


def container_files() -> tuple[list[bytes], set[bytes]]:
    """Whole files, and keys of all chunks and models in them."""
    rng = np.random.default_rng(0)
    files, keys = [], set()
    for number, (kinds, model) in enumerate(
        [
            ((), None),
            ((0,), None),
            ((2, 2, 2), None),
            ((0, 1, 2, 3), b"model" * 9),
            ((3, 1), b"m"),
            ((2,) * 9, None),
        ]
    ):
        file, header = io.BytesIO(), {"file": number, "grid": [1], "model": {"sha256": "ab" * 8}}
        keys.add(repr((header, model)).encode())
        with container.Writer(file, header, model) as writer:
            first = 0
            for index, kind in enumerate(kinds):
                schedule = [1, 2, 3, 5][: index % 4 + 1] if kind in container.MODEL_KINDS else []
                count = sum(schedule) or 3
                exceptions = np.zeros(index % 3, container.EXCEPTION)
                exceptions["up"] = rng.integers(0, 2, len(exceptions))
                payload = rng.bytes(20 * index)
                if index == 1:  # a chunk within a chunk
                    payload += file.getvalue()[-90:]
                chunk = container.Chunk(
                    index=index,
                    first=first,
                    count=count,
                    kind=kind,
                    raw=count * 100,
                    schedule=schedule,
                    exceptions=exceptions,
                    side=b"name" * index,
                    payload=payload,
                )
                writer.write(chunk)
                keys.add(chunk_key(header, chunk))
                first += count
        files.append(file.getvalue())
    return files, keys


def container_target() -> Target:
    files, keys = container_files()

    def run(data: bytes, honest: bool) -> str:
        reader = reading.Reader(io.BytesIO(data))
        failures: list[CodingError] = []
        read = 0
        for place in range(len(reader)):
            try:
                chunk = reader.read(place)
            except CodingError as error:
                failures.append(error)
                continue
            read += 1
            assert chunk.count == reader.entries[place].count
            assert not honest or chunk_key(reader.header, chunk) in keys, "wrong chunk"
        if reader.model_size:
            try:
                model = reader.model()
                assert not honest or repr((reader.header, model)).encode() in keys, "wrong model"
            except CodingError as error:
                failures.append(error)
        assert all(a < b <= reader.images for a, b in reader.lost)
        if failures and not read:
            raise failures[0]
        if failures or reader.lost or not reader.ended:
            return "part of it read"
        return "read after a rescan" if reader.rescanned else "read"

    return Target(files, run)


# -- whole files, with their models


def decompress_files() -> tuple[list[bytes], dict[str, object], set[bytes]]:
    """Files of two small models, the models by their digests, and keys of all chunks."""
    import torch

    from musigma import build, coding
    from musigma.coding.archive import model_digest

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng, files, models, keys = np.random.default_rng(0), [], {}, set()
    for name, shape, options in [
        ("vae", (1, 4, 4), {"bits": 1, "net": "mlp", "width": 8, "latents": 2}),
        ("glow", (1, 2, 2), {"bits": 3, "levels": 1, "depth": 1, "hidden": 4}),
    ]:
        model = build(name, shape, **options)
        models[model_digest(model)] = model
        x = rng.integers(0, 2 ** options["bits"], (9, *shape))
        for images, chunk in ((x, 4), (x[:2], 2), (np.zeros((40, *shape), np.int64), 20)):
            file, about = io.BytesIO(), {"names": [f"{i}.png" for i in range(len(images))]}
            source = Named(coding.Batch(images, about))
            coding.compress(model, source, file, chunk=chunk, workers=1)
            files.append(file.getvalue())
            for batch in coding.Archive(file, model, workers=1):
                keys.add(batch.levels.tobytes())
    return files, models, keys


class Named:
    """A batch as a sequence of batches."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: slice):
        about = {name: values[rows] for name, values in self.batch.about.items()}
        return type(self.batch)(self.batch.levels[rows], about)


def decompress_target() -> Target:
    from musigma import coding

    files, models, keys = decompress_files()

    def run(data: bytes, honest: bool) -> str:
        first, *_ = models.values()
        model = next((m for d, m in models.items() if d.encode() in data), first)
        limits = coding.Limits(total=1 << 20)
        archive = coding.Archive(io.BytesIO(data), model, limits=limits, workers=1)
        read, failures = [], []
        for place, entry in enumerate(archive.reader.entries):
            try:
                batch = archive.chunk(place)
            except CodingError as error:
                failures.append(error)
                continue
            assert len(batch) == entry.count
            assert batch.levels.tobytes() in keys, "other images"
            read.append((entry.first, batch))
        if read and zlib.crc32(data) % 8 == 0:
            with tempfile.TemporaryDirectory() as folder, suppress(CodingError):
                coding.extract(read, archive, Path(folder) / "out")
        if failures and not read:
            raise failures[0]
        return "part of it read" if failures or archive.reader.lost else "read"

    return Target(files, run)


TARGETS: dict[str, Callable[[], Target]] = {
    "container": container_target,
    "decompress": decompress_target,
}


# -- changes

TELLING = (0, 1, 2, 255, 256, 257, 65_535, 65_536, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31)
TELLING += ((1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1)


def bits(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def number(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    """Another length, count or place, in a field of a header or anywhere."""
    places = [12, 8, 10]
    for match in reading.MAGICS.finditer(data):
        places += range(match.start() + 4, match.start() + container.HEAD.size, 4)
    place = rng.choice(places) if rng.random() < 0.9 else rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 4, 4, 8))
    old = int.from_bytes(data[place : place + size], "little")
    new = rng.choice((*TELLING, old + 1, old - 1, old * 2, old ^ 1, len(data)))
    data[place : place + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


def block(data: bytearray, rng: random.Random) -> slice:
    """A part of a file, which mostly begins and ends at a magic."""
    edges = [m.start() for m in reading.MAGICS.finditer(data)] + [0, len(data)]
    if rng.random() < 0.4:
        edges = range(len(data) + 1)
    a, b = sorted((rng.choice(edges), rng.choice(edges)))
    return slice(a, b)


def cut(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def drop(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del data[block(data, rng)]


def repeat(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    there = block(data, rng)
    data[there.stop : there.stop] = data[there][:4096] * rng.choice((1, 1, 2, 30))


def swap(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    there = block(data, rng)
    part = data[there]
    del data[there]
    place = block(data, rng).start
    data[place:place] = part


def splice(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    other = bytearray(rng.choice(others))
    data[block(data, rng)] = other[block(other, rng)]


def noise(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    part = rng.choice((b"MUSC", b"MUSF", b"MUSE", rng.randbytes(rng.randrange(100))))
    place = rng.randrange(len(data) + 1)
    data[place : place + len(part) * rng.randrange(2)] = part


CHANGES = (bits, bits, number, number, number, cut, drop, repeat, swap, splice, noise)


def repair(data: bytes | bytearray) -> bytes:
    """The file with all checksums corrected for its present content."""
    data = bytearray(data)

    def put(check: int, place: int) -> None:
        data[place : place + 4] = container.CHECK.pack(check)

    if len(data) < container.START.size:
        return bytes(data)
    flags, length = container.START.unpack_from(data)[3:]
    body = (
        container.START.size
        + length
        + (container.MODEL.size if flags & container.WITH_MODEL else 0)
    )
    if body + 4 > len(data):
        return bytes(data)
    seed = zlib.crc32(data[:body])
    put(seed, body)
    heads, begin = [], body + 4
    if flags & container.WITH_MODEL:
        size = container.MODEL.unpack_from(data, body - container.MODEL.size)[0]
        begin += size
        data[body - 32 : body] = hashlib.sha256(data[body + 4 : begin]).digest()
        seed = zlib.crc32(data[:body])
        put(seed, body)
    for match in list(reading.MAGICS.finditer(data, min(begin, len(data)))):
        place = match.start()
        if match[0] == container.CHUNK_MAGIC and place + container.HEAD.size <= len(data):
            end = container.Entry(*container.HEAD.unpack_from(data, place), offset=place).end
            if end <= len(data):
                body = container.body_digest(bytes(data[place + container.HEAD.size : end]))
                data[place + 52 : place + 60] = body
            put(zlib.crc32(data[place : place + 60], seed), place + 60)
            heads.append(bytes(data[place : place + container.HEAD.size]))
        elif match[0] == container.FOOT_MAGIC and place + container.FOOT.size <= len(data):
            chunks = container.FOOT.unpack_from(data, place)[1]
            end = place + container.FOOT.size + container.ROW.size * chunks + container.TAIL.size
            if end > len(data):
                continue
            for row, head in zip(range(chunks), heads, strict=False):
                put(
                    container.CHECK.unpack(head[-4:])[0],
                    place + container.FOOT.size + 32 * row + 28,
                )
            digest = hashlib.sha256(b"".join(heads)).digest()
            data[place + container.FOOT.size - 32 : place + container.FOOT.size] = digest
            put(zlib.crc32(data[place : end - 8], seed), end - 8)
    return bytes(data)


def changed(corpus: list[bytes], rng: random.Random) -> tuple[bytes, bool]:
    """A file with some changes, and whether its checksums are unchanged."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(CHANGES)(data, rng, corpus)
    if rng.random() < 0.5:
        return bytes(data), True
    return repair(data), False


# -- the engines


@dataclass
class Tally:
    """The outcomes of the inputs."""

    outcomes: Counter
    slowest: float = 0.0
    memory: int = 0
    failed: int = 0

    def report(self) -> str:
        """One line for each figure."""
        lines = [f"{sum(self.outcomes.values()):>12,} inputs"]
        lines += [f"{count:>12,} {name}" for name, count in self.outcomes.most_common()]
        lines += [f"{self.slowest * 1e3:>12.1f} ms for the slowest input"]
        if self.memory:
            lines += [f"{self.memory / 2**20:>12.2f} MiB at most (measured on some inputs)"]
        return "\n".join(lines)


def attempt(target: Target, data: bytes, honest: bool, tally: Tally, *, measured: bool) -> None:
    """Run one input and count its outcome; an unexpected exception passes through."""
    if measured:
        tracemalloc.start()
    start = time.process_time()  # not that of other programs
    try:
        outcome = target.run(data, honest)
    except CodingError as error:
        outcome = type(error).__name__
    finally:
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tally.memory = max(tally.memory, peak)
    if measured:
        assert peak <= MEMORY, f"{peak} bytes of memory"
    else:
        tally.slowest = max(tally.slowest, time.process_time() - start)
    tally.outcomes[outcome] += 1


def fuzz(target: Target, inputs: int, seed: int = 0, keep: Path | None = None) -> Tally:
    """The built-in engine: changes from a seed, without feedback."""
    tally = Tally(Counter())
    for number_ in range(inputs):
        rng = random.Random(f"{seed} {number_}")  # so that one input can be repeated
        data, honest = changed(target.corpus, rng)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            attempt(target, data, honest, tally, measured=number_ % 50 == 0)
        except Exception as error:
            tally.failed += 1
            tally.outcomes[f"FAILED: {type(error).__name__}"] += 1
            if tally.failed <= 5:
                print(f"input {number_}, seed {seed}, checksums unchanged: {honest}")
                traceback.print_exc()
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number_}.mus").write_bytes(data)
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
    return tally


def too_long(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def fuzz_by_coverage(target: Target, inputs: int, seed: int, keep: Path) -> None:
    """Atheris: builds upon changes that reach new lines. It ends the process itself."""
    if atheris is None:
        sys.exit("--engine atheris: not installed; pip install atheris, or use --engine own")
    tally = Tally(Counter())
    keep.mkdir(parents=True, exist_ok=True)
    for place, data in enumerate(target.corpus):
        (keep / f"corpus-{place}").write_bytes(data)

    def one(data: bytes) -> None:
        attempt(target, data, False, tally, measured=False)
        if sum(tally.outcomes.values()) == inputs:
            print(tally.report(), flush=True)

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            made = bytearray(data)
            rng.choice(CHANGES)(made, rng, target.corpus)
            data = bytes(made)
        else:
            data = atheris.Mutate(data, len(data) + 64)
        return (repair(data) if rng.random() < 0.7 else data)[:size]

    flags = [f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=8192", f"-timeout={SECONDS}"]
    flags += ["-rss_limit_mb=4096", f"-artifact_prefix={keep}/", "-print_final_stats=1"]
    atexit.register(lambda: print(tally.report(), flush=True))
    atheris.Setup([sys.argv[0], *flags, str(keep)], one, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, default="container")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="failing inputs")
    given = parser.parse_args()
    target = TARGETS[given.target]()
    for data in target.corpus:
        assert target.run(data, True) == "read"
    if given.engine == "atheris":
        fuzz_by_coverage(target, given.inputs, given.seed, given.keep)
        return
    with suppress(AttributeError):  # Windows has no alarm
        signal.signal(signal.SIGALRM, too_long)
    start = time.perf_counter()
    tally = fuzz(target, given.inputs, given.seed, given.keep)
    print(tally.report())
    print(f"{time.perf_counter() - start:>12.0f} s")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
