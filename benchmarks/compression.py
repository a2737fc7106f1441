"""Compression by models compared with general codecs: sizes and times.

    MUSIGMA_DATA=... python benchmarks/compression.py general [SET ...]
    MUSIGMA_DATA=... python benchmarks/compression.py ours SET RUN [--n 1000] [--draws 4]
    MUSIGMA_DATA=... python benchmarks/compression.py all SET RUN [SET RUN ...] [--numerics pinned]
    python benchmarks/compression.py table     # the tables and the figure of docs/compression.md

The sets are the test images of `mnist`, `mnist-binarized` (drawn once, with seed 0),
`fashion-mnist` and `cifar10`; `all` takes every image, in the order of the data. Rates are in bits
per element (pixel and channel). Results are kept in docs/figures/compression.json and not measured
again, unless `--again` is given.

`general` compresses every image as a file of its own, then all images as one picture of 100 x 100
tiles, then their bytes in a row (eight pixels to a byte if they have one bit; of color images,
planes or pixels in a row, whichever is smaller). The order of the images is shuffled once.
Everything that is written is read again and compared. JPEG XL needs `imagecodecs`; zstd needs
Python 3.14 or `zstandard`. A codec that is not installed is listed without a result.

`ours` compresses the same images by a model, in one process for writing and one for reading, first
with one worker (and one thread) and then with two. The model's own figure is the mean of several
draws for each image. The coder is one more draw, so the standard error of the difference follows
from the spread of the draws of an image.

`cifar10` is read from `cifar10-jpeg.tar.xz` in $MUSIGMA_DATA if that exists: the same images, but
from JPEG files. They take fewer bits than the published ones and cannot be compared with them.
"""

import argparse
import bz2
import ctypes
import gzip
import importlib
import io
import json
import lzma
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parent.parent / "docs" / "figures" / "compression.json"
SETS = ("mnist", "mnist-binarized", "fashion-mnist", "cifar10")
TILES = 100
SINGLE = 20
"""Number of images that `ours` also writes to files of their own."""


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Levels (N, C, H, W), uint8, with their number of bits, their labels and a note."""

    levels: np.ndarray
    bits: int
    labels: np.ndarray
    note: str = ""

    def __len__(self) -> int:
        return len(self.levels)

    def first(self, n: int) -> "Images":
        """The first n images."""
        return Images(self.levels[:n], self.bits, self.labels[:n], self.note)

    def plain(self) -> dict[str, bytes]:
        """Their bytes in a row, in each order of channels."""
        if self.bits == 1 or self.levels.shape[1] == 1:
            return {"": (np.packbits(self.levels) if self.bits == 1 else self.levels).tobytes()}
        return {"planes": self.levels.tobytes(), "pixels": self.pictures().tobytes()}

    def pictures(self) -> np.ndarray:
        """(N, H, W) or (N, H, W, 3)."""
        return np.ascontiguousarray(
            self.levels[:, 0] if self.levels.shape[1] == 1 else np.moveaxis(self.levels, 1, -1)
        )

    def tile(self) -> np.ndarray:
        """The first 100 x 100 images as one picture."""
        x = self.pictures()[: TILES * TILES]
        h, w = x.shape[1:3]
        grid = x.reshape(TILES, TILES, *x.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(grid.reshape(TILES * h, TILES * w, *x.shape[3:]))


def images(name: str, *, every: bool = False) -> Images:
    """The test images of a set, shuffled once, or all images in their order."""
    import musigma

    if name not in SETS:
        raise SystemExit(f"{name}: expected one of {', '.join(SETS)}")
    binary = name == "mnist-binarized"
    treat = musigma.Preprocess(binarize="dynamic" if binary else None)
    source, note = name.removesuffix("-binarized"), ""
    jpegs = Path(os.environ.get("MUSIGMA_DATA", "")) / "cifar10-jpeg.tar.xz"
    if name == "cifar10" and jpegs.is_file():
        source, note = str(jpegs), "made from JPEG files of CIFAR-10"
    data = musigma.data.load(source, preprocess=treat)
    data = data if every else data.split("held-out")
    order = np.arange(len(data)) if every else np.random.default_rng(0).permutation(len(data))
    assert data.labels is not None
    return Images(data.x[order], 1 if binary else 8, data.labels[order], note)


# --- results -----------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    return {"general": {}, "ours": {}, "all": {}, **found}


def save(part: str, name: str, value: Any) -> None:
    found = results()
    found[part][name] = value
    draft = OUT.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=2) + "\n")
    draft.replace(OUT)


# --- general codecs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A codec of images: levels (H, W) or (H, W, 3) with a number of bits to bytes, and back."""

    name: str
    version: Callable[[], str]
    encode: Callable[[np.ndarray, int], bytes]
    decode: Callable[[bytes, int], np.ndarray]
    files: int | None = None  # number of images that it writes to files; None: all
    tile: bool = True


@dataclass(frozen=True)
class Archive:
    """A codec of bytes."""

    name: str
    version: Callable[[], str]
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]


def pillow(kind: str, **options: Any) -> dict[str, Any]:
    """The functions of a `Picture` by Pillow."""

    def encode(x: np.ndarray, bits: int) -> bytes:
        from PIL import Image

        image = Image.fromarray(x * 255 if bits == 1 else x)
        if kind == "PNG" and bits == 1:
            image = image.convert("1", dither=Image.Dither.NONE)
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    def decode(data: bytes, bits: int) -> np.ndarray:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None
        with Image.open(io.BytesIO(data)) as image:
            x = np.asarray(image)
        return x.astype(np.uint8) // (255 if bits == 1 and x.dtype != bool else 1)

    return {"encode": encode, "decode": decode}


def pillow_version(library: str) -> Callable[[], str]:
    def version() -> str:
        import PIL
        from PIL import features

        return f"Pillow {PIL.__version__}, {library} {features.version(library)}"

    return version


def jxl(effort: int) -> dict[str, Any]:
    def encode(x: np.ndarray, bits: int) -> bytes:
        codecs = importlib.import_module("imagecodecs")
        more = {"bitspersample": 1} if bits == 1 else {}
        return codecs.jpegxl_encode(x, lossless=True, effort=effort, numthreads=1, **more)

    def decode(data: bytes, bits: int) -> np.ndarray:
        return importlib.import_module("imagecodecs").jpegxl_decode(data, numthreads=1)

    def version() -> str:
        codecs = importlib.import_module("imagecodecs")
        return f"{codecs.jpegxl_version()}, imagecodecs {codecs.__version__}"

    return {"version": version, "encode": encode, "decode": decode}


def zstd() -> dict[str, Any]:
    def encode(data: bytes) -> bytes:
        with suppress(ImportError):
            return importlib.import_module("compression.zstd").compress(data, 19)
        return importlib.import_module("zstandard").ZstdCompressor(level=19).compress(data)

    def decode(data: bytes) -> bytes:
        with suppress(ImportError):
            return importlib.import_module("compression.zstd").decompress(data)
        return importlib.import_module("zstandard").ZstdDecompressor().decompress(data)

    def version() -> str:
        with suppress(ImportError):
            return f"zstd {importlib.import_module('compression.zstd').zstd_version}"
        numbers = importlib.import_module("zstandard").ZSTD_VERSION
        return f"zstd {'.'.join(map(str, numbers))}"

    return {"version": version, "encode": encode, "decode": decode}


def linked(module: str, library: str, function: str) -> Callable[[], str]:
    """The version that a C library reports, or that of Python."""

    def version() -> str:
        with suppress(ImportError, AttributeError, OSError):
            file = importlib.import_module(module).__file__
            report = getattr(ctypes.CDLL(file), function)
            report.restype = ctypes.c_char_p
            return f"{library} {report().decode().split(',')[0]}"
        return f"Python {platform.python_version()}"

    return version


PICTURES = (
    Picture("PNG, optimize", pillow_version("zlib"), **pillow("PNG", optimize=True)),
    Picture(
        "WebP lossless, method 6, quality 100",
        pillow_version("webp"),
        **pillow("WEBP", lossless=True, method=6, quality=100, exact=True),
        files=2000,
    ),
    Picture("JPEG XL, effort 7", **jxl(7)),
    Picture("JPEG XL, effort 9", **jxl(9), files=1000),
)
ARCHIVES = (
    Archive(
        "gzip -9",
        lambda: f"zlib {zlib.ZLIB_RUNTIME_VERSION}",
        lambda x: gzip.compress(x, 9, mtime=0),
        gzip.decompress,
    ),
    Archive("zstd -19", **zstd()),
    Archive("bz2 -9", linked("_bz2", "bzip2", "BZ2_bzlibVersion"), bz2.compress, bz2.decompress),
    Archive(
        "xz -9e",
        linked("_lzma", "liblzma", "lzma_version_string"),
        lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME),
        lzma.decompress,
    ),
)


def measured(encode: Callable, decode: Callable, items: list, same: Callable) -> dict[str, Any]:
    """Bytes and CPU seconds of some items, which must come out as they went in."""
    began = time.process_time()
    coded = [encode(item) for item in items]
    written = time.process_time()
    again = [decode(data) for data in coded]
    read = time.process_time()
    if not all(same(a, b) for a, b in zip(items, again, strict=True)):
        raise SystemExit("the decoded images differ from the images that were encoded")
    return {
        "bytes": sum(map(len, coded)),
        "encode_seconds": round(written - began, 3),
        "decode_seconds": round(read - written, 3),
    }


def general(names: list[str], again: bool) -> None:
    """Measure the general codecs."""
    for name in names:
        found, data = results()["general"].get(name, {}), None
        work = [(codec, way) for codec in PICTURES for way in ("file", "tile")]
        work += [(codec, "archive") for codec in ARCHIVES]
        for codec, way in work:
            key = f"{codec.name}, {way}"
            if "bytes" in found.get(key, {}) and not again:
                continue
            data = data or images(name)
            row: dict[str, Any] = {"codec": codec.name, "way": way}
            try:
                row |= {"version": codec.version(), **general_one(codec, way, data)}
            except ImportError as error:
                row["missing"] = str(error)
                print(f"{name}: {key}: missing: {error}", flush=True)
            else:
                print(f"{name}: {key}: {row['bits_per_dim']:.4f}", flush=True)
            found[key] = row
            save("general", name, found)


def general_one(codec: Picture | Archive, way: str, data: Images) -> dict[str, Any]:
    bits = data.bits
    if isinstance(codec, Archive):
        found = [
            {"order": order, **measured(codec.encode, codec.decode, [plain], bytes.__eq__)}
            for order, plain in data.plain().items()
        ]
        count, x = len(data), min(found, key=lambda row: row["bytes"])
    else:
        count = min(codec.files or len(data), len(data)) if way == "file" else TILES * TILES
        items = [data.tile()] if way == "tile" else list(data.pictures()[:count])
        x = measured(
            lambda item: codec.encode(item, bits),
            lambda item: codec.decode(item, bits),
            items,
            alike,
        )
    dims = count * math.prod(data.levels.shape[1:])
    raw = dims * bits / 8
    return {
        "n": count,
        "bits_per_dim": 8 * x["bytes"] / dims,
        **x,
        "encode_mb_per_s": round(raw / 1e6 / max(x["encode_seconds"], 1e-9), 2),
        "decode_mb_per_s": round(raw / 1e6 / max(x["decode_seconds"], 1e-9), 2),
        "note": data.note,
    }


def alike(x: np.ndarray, found: np.ndarray) -> bool:
    """Whether two images are equal; a codec may return gray as three equal channels."""
    x = x[..., None] if found.ndim > x.ndim else x
    return x.shape[:2] == found.shape[:2] and bool((x == found).all())


# --- ours --------------------------------------------------------------------------------------


def weights(run: Path) -> Path:
    return run / "model.safetensors" if run.is_dir() else run


def title(run: Path) -> str:
    """The run's name below the folder of runs."""
    parts = weights(run).resolve().parts[:-1] if run.is_dir() else run.resolve().parts
    at = len(parts) - parts[::-1].index("runs") if "runs" in parts else len(parts) - 1
    return "/".join(parts[at:])


def context(model: Any, labels: np.ndarray) -> np.ndarray | None:
    """One-hot rows for a model that is conditioned on classes."""
    variables = model.spec.context
    return np.eye(variables[0].shape[0], dtype=np.float32)[labels] if variables else None


def measure_in_child(
    way: str, run: Path, folder: Path, workers: int, numerics: str = "exact"
) -> dict[str, Any]:
    """Write or read a file in a separate process."""
    words = [sys.executable, __file__, way, str(weights(run)), str(folder), str(workers)]
    words.append(numerics)
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(way: str, run: Path, folder: Path, workers: int, numerics: Any) -> None:
    """The work of that process."""
    import torch

    import musigma
    from musigma import coding

    if workers == 1:
        torch.set_num_threads(1)
    model = musigma.load(run)
    file, levels = folder / "x.mus", np.load(folder / "x.npy")
    labels = np.load(folder / "labels.npy")
    load, began, busy = os.getloadavg()[0], time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    if way == "child-write":
        before = memory()
        given = context(model, labels)
        options = {"verify": False, "workers": workers, "numerics": numerics}
        report = coding.compress(model, levels, file, given=given, **options)
        found = {name: value for name, value in report.to_json().items() if name != "seconds"}
        found["file_bytes"] = file.stat().st_size
    else:
        del levels
        before = memory()
        batch = coding.decompress(file, model, workers=workers)
    found |= {
        "wall_seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "peak_mib": memory(),
        "before_mib": before,
        "load_average": round(load, 1),
    }
    if way == "child-read":
        levels = np.load(folder / "x.npy")
        if not np.array_equal(batch.levels, levels):
            raise SystemExit("the decoded images differ from the images that were encoded")
        found["compared"] = len(levels)
    print(json.dumps(found))


def memory() -> float:
    """Peak memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage includes the peak of the parent
        lines = status.read_text().splitlines()
        return round(int(next(s for s in lines if s.startswith("VmHWM")).split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def put(folder: Path, data: Images) -> None:
    np.save(folder / "x.npy", data.levels)
    np.save(folder / "labels.npy", data.labels)


def check_bits(model: Any, data: Images, run: Path) -> None:
    bits, shape = model.spec.bits, model.spec.shape
    if (bits, shape) != (data.bits, data.levels.shape[1:]):
        raise SystemExit(
            f"{run}: the model takes {bits} bits of shape {shape}, and the set has {data.bits} of "
            f"{data.levels.shape[1:]}"
        )


def ours(name: str, run: Path, n: int, draws: int, again: bool) -> None:
    """Measure a model on the images of `general`."""
    import musigma

    key = f"{name}, {title(run)}, {n}"
    if key in results()["ours"] and not again:
        print(f"{key}: measured already (--again measures it again)")
        return
    data, model = images(name), musigma.load(weights(run))
    check_bits(model, data, run)
    data = data.first(n)
    n = len(data)
    row: dict[str, Any] = {"set": name, "run": title(run), "n": n, "note": data.note}
    row["architecture"] = model.config["architecture"]
    row["parameters"] = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), data)
        for workers in (1, 2):
            wrote = measure_in_child("child-write", run, Path(folder), workers)
            read = measure_in_child("child-read", run, Path(folder), workers)
            for way, found in (("write", wrote), ("read", read)):
                seconds = found["wall_seconds"]
                times = ("wall_seconds", "cpu_seconds", "peak_mib", "before_mib", "load_average")
                part = {what: found[what] for what in times}
                part["images_per_s"] = round(n / seconds, 1)
                row[f"{way}, {workers} workers"] = part
                print(f"{key}: {way}, {workers} workers: {part}", flush=True)
        row |= {
            what: wrote[what]
            for what in ("data_bytes", "model_bytes", "packed", "net_bits_per_dim")
        }
        row["file_bits_per_dim"] = wrote["bits_per_dim"]
    if row["packed"]:  # the rate is that of the other images
        row["net_bits_per_dim"] = None
    row |= bound(model, data, draws, row["net_bits_per_dim"])
    row |= single(model, data)
    row |= pays(name, row)
    save("ours", key, row)
    print(json.dumps({key: row}, indent=2))


def bound(model: Any, data: Images, draws: int, net: float | None) -> dict[str, Any]:
    """-ELBO of these images by several draws, and the gap of the coder."""
    import torch

    parts = []
    with torch.no_grad():
        rows = context(model, data.labels)
        for at in range(0, len(data), 200):
            x = torch.from_numpy(data.levels[at : at + 200])
            given = None if rows is None else torch.from_numpy(rows[at : at + 200])
            torch.manual_seed(at)
            bits = [model.bits_per_dim(x, given).double() for _ in range(draws)]
            parts.append(torch.stack(bits))
    table = torch.cat(parts, 1).numpy()  # (draws, N)
    n, mean = len(data), float(table.mean())
    within = float(table.var(0, ddof=1).mean())
    error = math.sqrt(within * (1 + 1 / draws) / n)
    gap = None if net is None else net - mean
    return {
        "draws": draws,
        "model_bits_per_dim": mean,
        "gap_bits_per_dim": gap,
        "gap_error": error,
        "gap_percent": None if gap is None else 100 * gap / mean,
        "gap_percent_error": 100 * error / mean,
        "exact": bool(model.exact),
    }


def single(model: Any, data: Images) -> dict[str, Any]:
    """Size of a file of one image."""
    from musigma import coding

    sizes, packed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(min(SINGLE, len(data))):
            given = context(model, data.labels[i : i + 1])
            file = Path(folder) / f"{i}.mus"
            levels = data.levels[i : i + 1]
            packed += coding.compress(model, levels, file, given=given, workers=1).packed
            sizes.append(file.stat().st_size)
    dims = math.prod(data.levels.shape[1:])
    return {
        "single_bytes": float(np.mean(sizes)),
        "single_bits_per_dim": 8 * float(np.mean(sizes)) / dims,
        "single_packed": packed,
        "single_n": len(sizes),
    }


def pays(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Number of images from which model and file are smaller than by the best general codec."""
    rows = [r for r in results()["general"].get(name, {}).values() if "bytes" in r]
    if not rows:
        return {}
    best = min(rows, key=lambda r: r["bits_per_dim"])
    gain = best["bytes"] / best["n"] - row["data_bytes"] / row["n"]
    return {
        "best_general": f"{best['codec']}, {best['way']}",
        "best_general_bits_per_dim": best["bits_per_dim"],
        "bytes_saved_each": gain,
        "break_even": math.ceil(row["model_bytes"] / gain) if gain > 0 else None,
    }


# --- every image -------------------------------------------------------------------------------


def every(name: str, run: Path, workers: int, numerics: str, again: bool) -> None:
    """Write, read and compare every image of a set."""
    import musigma

    key = f"{name}, {title(run)}"
    if key in results()["all"] and not again:
        print(f"{key}: measured already (--again measures it again)")
        return
    data = images(name, every=True)
    check_bits(musigma.load(weights(run)), data, run)
    row: dict[str, Any] = {"set": name, "run": title(run), "n": len(data), "note": data.note}
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), data)
        wrote = measure_in_child("child-write", run, Path(folder), workers, numerics)
        print(key, wrote, flush=True)
        read = measure_in_child("child-read", run, Path(folder), workers)
    row |= {
        "pixels_compared": read["compared"] * math.prod(data.levels.shape[1:]),
        "raw_bytes": wrote["raw_bytes"],
        "data_bytes": wrote["data_bytes"],
        "model_bytes": wrote["model_bytes"],
        "packed": wrote["packed"],
        "net_bits_per_dim": wrote["net_bits_per_dim"],
        "file_bits_per_dim": wrote["bits_per_dim"],
        "workers": workers,
        "numerics": numerics,
        "write_seconds": wrote["wall_seconds"],
        "read_seconds": read["wall_seconds"],
        "load_average": wrote["load_average"],
    }
    save("all", key, row)
    print(json.dumps({key: row}, indent=2))


# --- tables ------------------------------------------------------------------------------------


def picture(found: dict[str, Any]) -> None:
    """Bars of every codec on the sets of which there are results by models, the shortest last."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "musigma"}
    sets = [name for name in SETS if name in best_runs(found)]
    figure = Figure(figsize=(4 * len(sets), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        ways = {"file": "each a file", "tile": "one picture", "archive": "bytes in a row"}
        bars = {
            f"{row['codec'].split(',')[0]}, {ways[row['way']]}": row["bits_per_dim"]
            for row in sorted(found["general"][name].values(), key=lambda r: -r["bits_per_dim"])
            if "bits_per_dim" in row
        }
        own = {
            f"musigma, {row['architecture']}": row["file_bits_per_dim"]
            for row in best_runs(found)[name]
        }
        both = dict(sorted({**bars, **own}.items(), key=lambda bar: -bar[1]))
        colors = ["#d1495b" if bar in own else "#9aa5b1" for bar in both]
        drawn = axes.barh(list(both), list(both.values()), color=colors)
        axes.bar_label(drawn, fmt="%.3f", fontsize=7, padding=2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("bits/dim", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.savefig(OUT.with_suffix(".svg"), metadata={"Date": None})


def table() -> None:
    """Print the results as Markdown, and draw the figure."""
    found = results()
    picture(found)
    print("\n\n".join(filter(None, [general_table(found), ours_tables(found), all_table(found)])))


def rows_of(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


WAYS = {"file": "each a file", "tile": "one picture", "archive": "bytes in a row"}


def general_table(found: dict[str, Any]) -> str:
    sets = [name for name in SETS if name in found["general"]]
    if not sets:
        return ""
    work = [(codec.name, way) for way in ("file", "tile") for codec in PICTURES]
    work += [(codec.name, "archive") for codec in ARCHIVES]
    best = {
        name: min(r["bits_per_dim"] for r in found["general"][name].values() if "bytes" in r)
        for name in sets
    }
    rows, versions = [], []
    for codec, way in work:
        cells = [codec, WAYS[way]]
        for name in sets:
            row = found["general"][name].get(f"{codec}, {way}", {})
            cell = f"{row['bits_per_dim']:.3f}" if "bytes" in row else ""
            cell = "missing" if "missing" in row else cell
            if row.get("bits_per_dim") == best[name]:
                cell = f"**{cell}**"
            if row.get("n", 10_000) < 10_000:
                cell += f" ({row['n']:,})"
            cells.append(cell)
            version = f"{codec}: {row.get('version')}"
            versions += [version] if row.get("version") and version not in versions else []
        rows.append(cells)
    ends = []
    for name, runs in best_runs(found).items():
        if name in sets:
            ends.append((name, runs))
    for run in dict.fromkeys(row["run"] for _, rows_ in ends for row in rows_):
        cells = [f"musigma, `{run}`", "one file"]
        for name in sets:
            match = [r for n, rows_ in ends if n == name for r in rows_ if r["run"] == run]
            few = f" ({match[0]['n']:,})" if match and match[0]["n"] < 10_000 else ""
            cells.append(f"{match[0]['file_bits_per_dim']:.3f}{few}" if match else "")
        rows.append(cells)
    notes = {r["note"] for s in sets for r in found["general"][s].values() if r.get("note")}
    text = rows_of(["codec", "images", *sets], rows)
    text += "\n\nIn brackets: the number of images, if it is not 10,000. "
    text += "".join(f"`cifar10`: {note}. " for note in sorted(notes))
    return text + f"Versions: {'; '.join(versions)}."


def best_runs(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each set, each with the result of the most images."""
    most: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found["ours"].values():
        place = row["set"], row["run"]
        if place not in most or most[place]["n"] < row["n"]:
            most[place] = row
    runs: dict[str, list[dict[str, Any]]] = {}
    for (name, _), row in most.items():
        runs.setdefault(name, []).append(row)
    return runs


def ours_tables(found: dict[str, Any]) -> str:
    flat = [row for rows in best_runs(found).values() for row in rows]
    if not flat:
        return ""
    rates, costs = [], []
    for row in flat:
        row |= pays(row["set"], row)
        pays_from, best = f"{row['break_even']:,}" if row.get("break_even") else "never", ""
        if "best_general" in row:
            best = f"{row['best_general_bits_per_dim']:.4f} ({row['best_general']})"
        who = [row["set"], f"`{row['run']}`"]
        rates.append(
            [
                *who,
                f"{row['n']:,}",
                f"{row['model_bits_per_dim']:.4f}",
                *gap_cells(row),
                f"{row['file_bits_per_dim']:.4f}",
                f"{row['single_bits_per_dim']:.3f}",
                best,
                f"{row['model_bytes']:,}",
                pays_from,
            ]
        )
        for workers in (1, 2):
            parts = [row[f"{way}, {workers} workers"] for way in ("write", "read")]
            costs.append([*who, str(workers)])
            costs[-1] += [f"{part['wall_seconds']:.1f}" for part in parts]
            costs[-1] += [f"{part['cpu_seconds']:.1f}" for part in parts]
            costs[-1] += [f"{part['images_per_s']:,.0f}" for part in parts]
            costs[-1] += [f"{part['peak_mib']:,.0f}" for part in parts]
            costs[-1] += [f"{parts[0]['load_average']:.1f}"]
    heads = ["set", "run", "images", "-ELBO", "net", "gap", "file", "a file of one"]
    heads += ["best general", "model, bytes", "pays from, images"]
    speeds = ["set", "run", "workers", "write, s", "read, s", "write, core s", "read, core s"]
    speeds += ["write, images/s", "read, images/s", "write, MiB", "read, MiB", "load before"]
    return rows_of(heads, rates) + "\n\n" + rows_of(speeds, costs)


def gap_cells(row: dict[str, Any]) -> list[str]:
    if row["gap_percent"] is None:
        return [f"{row['packed']:,} images by xz", ""]
    gap = f"{row['gap_percent']:+.2f} ± {row['gap_percent_error']:.2f} %"
    return [f"{row['net_bits_per_dim']:.4f}", gap]


def all_table(found: dict[str, Any]) -> str:
    if not found["all"]:
        return ""
    rows = [
        [
            row["set"],
            f"`{row['run']}`",
            row["numerics"],
            f"{row['n']:,}",
            f"{row['pixels_compared']:,}",
            f"{row['raw_bytes']:,}",
            f"{row['data_bytes']:,}",
            f"{row['net_bits_per_dim']:.4f}",
            f"{row['file_bits_per_dim']:.4f}",
            f"{row['write_seconds']:,.0f}",
            f"{row['read_seconds']:,.0f}",
        ]
        for row in found["all"].values()
    ]
    heads = [
        "set",
        "run",
        "numerics",
        "images",
        "values compared, all equal",
        "bytes before",
        "bytes after",
    ]
    return rows_of([*heads, "net", "file", "write, s", "read, s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["general", "ours", "all", "table"])
    parser.add_argument("words", nargs="*", metavar="SET or RUN")
    parser.add_argument("--n", type=int, default=10_000, help="number of images for `ours`")
    parser.add_argument(
        "--draws", type=int, default=4, help="draws per image for the model's own figure"
    )
    parser.add_argument("--workers", type=int, default=2, help="workers for `all`")
    parser.add_argument("--numerics", default="exact", help="numerics for `all`: exact or pinned")
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    chosen = parser.parse_args()
    words, again = chosen.words, chosen.again
    if chosen.draws < 2:
        parser.error("--draws: give 2 or more, for a standard error")
    if chosen.what in ("ours", "all") and (not words or len(words) % 2):
        parser.error(f"{chosen.what}: give a set and a run, one or several times")
    pairs = [(name, Path(run)) for name, run in zip(words[::2], words[1::2], strict=False)]
    if chosen.what == "general":
        general(words or list(SETS), again)
    for name, run in pairs if chosen.what == "ours" else ():
        ours(name, run, chosen.n, chosen.draws, again)
    for name, run in pairs if chosen.what == "all" else ():
        every(name, run, chosen.workers, chosen.numerics, again)
    if chosen.what == "table":
        table()


if __name__ == "__main__":
    if sys.argv[1:2] in (["child-write"], ["child-read"]):
        child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
