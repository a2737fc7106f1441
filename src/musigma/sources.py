"""Readers: from whatever holds the data to one array, its labels and its names.

`read` takes a path or a built-in name and answers with a `Source`: images as uint8 levels
0..255 of shape (N, C, H, W), tables and points as float32 (N, D). Folders, tar and zip archives
are one thing here, a *walk*: a function that yields (name, open) for each file, as often as it is
called. Images are walked twice, first for their headers, so that every complaint about sizes and
modes comes before the first pixel is decoded. Nothing is extracted to disk, no pickle is trusted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import math
import os
import pickle
import re
import tarfile
import warnings
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Progress = Callable[[int, int], None]
Walk = Callable[[], Iterator[tuple[str, Callable[[], BinaryIO]]]]

MAX_MEMBER = 1 << 30  # bytes: no file inside an archive is larger
MAX_ARRAY = 1 << 36  # bytes: no header is believed that asks for more
LABEL_COLUMNS = ("label", "class", "target", "y")
TRAIN, TEST = "train", ("test", "val", "valid", "validation")

ARCHIVE = re.compile(r".*\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz|zip)", re.IGNORECASE)
IDX = re.compile(r"(.*?)[-_.]?(images|labels)[-.]idx\d[-.]ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")
CIFAR_PICKLED = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)


class DataError(ValueError):
    """Data that cannot be used as they are; the message is one line that says what to do."""


@dataclass(frozen=True)
class Source:
    """What a reader found; the fields are those of `musigma.data.Dataset`."""

    x: np.ndarray
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    official_test: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def read(
    source: str | Path,
    *,
    size: int | None = None,
    allow_constant: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Read a path or a built-in name, resizing images to `size` x `size` if one is given.

    >>> read("two-moons").x.shape
    (20000, 2)
    """
    report = progress or (lambda done, total: None)
    if not str(source).strip():
        raise DataError(f"source is {str(source)!r}: give {UNDERSTOOD}")
    try:
        if isinstance(source, str) and source in BUILT_IN:
            found = BUILT_IN[source](report)
        else:
            found = _read_path(Path(source).expanduser(), size, skip_bad, report)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise DataError(f"{source}: {reason}: give a path that can be read") from error
    if found.x.size == 0:
        raise DataError(f"{source}: holds no examples (its shape is {found.x.shape})")
    if found.x.dtype == np.uint8:
        return replace(found, x=_resized(found.x, size, report)) if size else found
    if size is not None:
        raise DataError(f"{source}: is a table, and size={size} is for images: leave it out")
    return replace(found, x=_table(found.x, found.columns, str(source), allow_constant))


def _read_path(path: Path, size: int | None, skip_bad: bool, report: Progress) -> Source:
    name, where = path.name.lower(), str(path)
    if path.is_dir():
        return _read_files(partial(_walk_folder, path), where, size, skip_bad, report)
    if not path.exists():
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"{where}: no such file, folder or built-in set: {hint}give {UNDERSTOOD}")
    if ARCHIVE.fullmatch(name):
        walk = _walk_zip if name.endswith(".zip") else _walk_tar
        return _read_files(partial(walk, path), where, size, skip_bad, report)
    if path.suffix.lower() in READERS:
        with _damage(where):
            return READERS[path.suffix.lower()](path)
    if path.suffix.lower() in _pillow()[1] or CIFAR.fullmatch(path.name):
        return _read_files(partial(_walk_each, [path]), where, size, skip_bad, report)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\x00\x00", b"\x1f\x8b"):  # the magic of IDX, and of gzip around it
        return Source(_idx_images(_idx_array(path.read_bytes(), where), where))
    raise DataError(f"{where}: is of no kind that is understood: give {UNDERSTOOD}")


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turn whatever a parser throws at broken input into a `DataError`."""
    try:
        yield
    except (DataError, PermissionError):
        raise
    except Exception as error:
        raise DataError(
            f"{where}: is damaged, truncated or not what its name says ({_first_line(error)}): "
            "make or fetch it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _missing(what: str, package: str, extra: str) -> DataError:
    return DataError(f"{what} needs {package}: pip install 'musigma[{extra}]'")


# Walks: the files of a folder, a list or an archive ------------------------------------------


def _walk_folder(root: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    def fail(error: OSError) -> None:
        raise error

    names = []
    for folder, inner, files in os.walk(root, onerror=fail):
        inner[:] = [name for name in inner if not name.startswith(".")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]
    for name in sorted(names):
        if not _hidden(name):
            yield name, partial(open, root / name, "rb")


def _walk_each(paths: Sequence[Path]) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    for path in paths:
        yield path.name, partial(open, path, "rb")


def _walk_tar(path: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    with _damage(str(path)), tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and not _hidden(member.name):
                _check_member(path, member.name, member.size)
                yield (
                    member.name.removeprefix("./"),
                    partial(_copy, path, partial(archive.extractfile, member)),
                )


def _walk_zip(path: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    with _damage(str(path)), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and not _hidden(member.filename):
                _check_member(path, member.filename, member.file_size)
                yield member.filename, partial(_copy, path, partial(archive.open, member))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _check_member(path: Path, name: str, size: int) -> None:
    if size > MAX_MEMBER:
        raise DataError(
            f"{path}: member {name} claims {size} bytes, over the cap of {MAX_MEMBER}: "
            "unpack the archive and give the folder"
        )


def _copy(path: Path, opener: Callable[[], Any]) -> BinaryIO:
    """A member in memory: seeking inside a compressed archive would decompress it anew."""
    with _damage(str(path)), opener() as file:
        return io.BytesIO(file.read())


# Files together: images, IDX, CIFAR ----------------------------------------------------------


@lru_cache(maxsize=1)
def _pillow() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats Pillow may open, and their suffixes; none of those that start other programs."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    formats = set(Image.OPEN) - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}
    common_first = sorted(formats, key=lambda kind: (kind not in ("JPEG", "PNG"), kind))
    return tuple(common_first), frozenset(s for s, kind in suffixes.items() if kind in formats)


def _read_files(
    walk: Walk, where: str, size: int | None, skip_bad: bool, report: Progress
) -> Source:
    """Read IDX files, CIFAR batches or images, whichever a walk comes upon."""
    suffixes = _pillow()[1]
    idx: dict[str, bytes] = {}
    cifar: dict[str, bytes] = {}
    images = _Images(where, size, skip_bad)
    others: Counter[str] = Counter()
    for name, opener in walk():
        base = name.rpartition("/")[2]
        kind = idx if IDX.fullmatch(base) else cifar if CIFAR.fullmatch(base) else None
        if kind is not None:
            with opener() as file:
                kind[name] = file.read()
        elif Path(base).suffix.lower() in suffixes:
            images.survey(name, opener)
        else:
            others[Path(base).suffix or base] += 1
    if idx:
        return _read_idx(idx, where)
    if cifar:
        return _read_cifar(cifar, where)
    if not images.headers:
        others["unreadable images"] = len(images.skipped)
        left = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4) if count)
        raise DataError(f"{where}: holds no images ({left or 'it is empty'}): give {UNDERSTOOD}")
    return images.decode(walk, report)


class _Images:
    """Images met twice: `survey` looks at their headers, `decode` at all pixels of one shape."""

    def __init__(self, where: str, size: int | None, skip_bad: bool):
        self.where, self.size, self.skip_bad = where, size, skip_bad
        self.headers: dict[str, tuple[tuple[int, int], bool]] = {}  # (width, height), in color
        self.skipped: list[str] = []

    def survey(self, name: str, opener: Callable[[], BinaryIO]) -> None:
        with self._skipping(name), _picture(opener) as image:
            if image.mode[0] in "IF":
                raise DataError(
                    f"{self.where}: {name} has 16-bit or floating-point levels (mode "
                    f"{image.mode}): save it with 8 bits"
                )
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            shape = image.size[::-1] if turned else image.size
            self.headers[name] = shape, image.mode not in ("1", "L", "LA")

    def decode(self, walk: Walk, report: Progress) -> Source:
        names = sorted(self.headers)
        width, height = (self.size, self.size) if self.size else self._common_shape(names)
        channels = 3 if any(color for _, color in self.headers.values()) else 1
        x = _allocate((len(names), channels, height, width), self.where)
        row = {name: i for i, name in enumerate(names)}
        done = 0
        for name, opener in walk():
            if name in row:
                with self._skipping(name), _picture(opener) as image:
                    x[row[name]] = _pixels(image, channels, self.size, f"{self.where}: {name}")
                report(done := done + 1, len(names))
        if len(self.headers) < len(names):
            names = sorted(self.headers)
            x = x[[row[name] for name in names]]
        test, labels, label_names = _layout(names)
        skipped = tuple(sorted(self.skipped))
        return Source(x, labels, label_names, tuple(names), test, skipped=skipped)

    def _common_shape(self, names: Sequence[str]) -> tuple[int, int]:
        (width, height), _ = self.headers[names[0]]
        for name in names:
            w, h = self.headers[name][0]
            if (w, h) != (width, height):
                raise DataError(
                    f"{self.where}: images differ in size: {names[0]} is {width} x {height}, "
                    f"{name} is {w} x {h}: pass --size N to bring all to N x N"
                )
        return width, height

    @contextmanager
    def _skipping(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            if not self.skip_bad:
                raise DataError(
                    f"{self.where}: {name} is not a readable image ({_first_line(error)}): "
                    "repair or remove it, or pass --skip-bad"
                ) from error
            self.skipped.append(name)
            self.headers.pop(name, None)


@contextmanager
def _picture(opener: Callable[[], BinaryIO]) -> Iterator[Any]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with opener() as file, Image.open(file, formats=_pillow()[0]) as image:
            yield image


def _pixels(image: Any, channels: int, size: int | None, where: str) -> np.ndarray:
    """Decode, turn upright, drop an opaque alpha, and fit; uint8 (C, H, W)."""
    from PIL import ImageOps

    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise DataError(
                f"{where} has transparent pixels, which no model here knows: flatten it onto a "
                "background of your choice"
            )
        image = image.convert("RGBA")
    image = _fitted(image.convert("RGB" if channels == 3 else "L"), size)
    return np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)


def _fitted(image: Any, size: int | None) -> Any:
    """Shorter side to `size`, antialiased, and the center of what stands over."""
    from PIL import Image, ImageOps

    if size is None or image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _resized(x: np.ndarray, size: int, report: Progress) -> np.ndarray:
    from PIL import Image

    if x.shape[2:] == (size, size):
        return x
    out = _allocate((*x.shape[:2], size, size), "size")
    for i, example in enumerate(x):
        for channel, plane in enumerate(example):
            image = Image.fromarray(np.ascontiguousarray(plane))
            out[i, channel] = np.asarray(_fitted(image, size))
        report(i + 1, len(x))
    return out


def _allocate(shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        gib = math.prod(shape) / 2**30
        raise DataError(
            f"{where}: {shape} levels take {gib:.0f} GiB: pass a smaller --size N, or give a "
            "memory-mapped .npy"
        ) from error


def _layout(
    names: Sequence[str],
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """What the folders say: the official test part, the labels and their names.

    >>> _layout(["a/train/cat/1.png", "a/train/dog/2.png", "a/test/cat/3.png"])
    (array([False, False,  True]), array([0, 1, 0]), ('cat', 'dog'))
    """
    folders = [name.split("/")[:-1] for name in names]
    shared = next(
        (i for i, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1),
        min(map(len, folders)),
    )
    folders = [folder[shared:] for folder in folders]
    tops = {folder[0] if folder else "" for folder in folders}
    official_test = None
    if TRAIN in tops and len(tops) > 1 and tops <= {TRAIN, *TEST}:
        official_test = np.array([folder[0] != TRAIN for folder in folders])
        folders = [folder[1:] for folder in folders]
    classes = [folder[0] if folder else "" for folder in folders]
    label_names = tuple(sorted(set(classes)))
    if "" in label_names or len(label_names) < 2:
        return official_test, None, ()
    number = {name: i for i, name in enumerate(label_names)}
    return official_test, np.array([number[name] for name in classes], np.int64), label_names


def _read_idx(files: dict[str, bytes], where: str) -> Source:
    """MNIST's files; of a plain and a gzipped one the plain is taken."""
    parts: dict[tuple[str, str], bytes] = {}  # (train or test, images or labels)
    sets = set()
    for name in sorted(files, key=lambda name: (name.endswith(".gz"), name)):
        folder, _, base = name.rpartition("/")
        match = IDX.fullmatch(base)
        assert match
        known = re.fullmatch(r"(.*?)[-_.]?(train|test|t10k)?", match[1])
        assert known
        sets.add((folder, known[1]))
        parts.setdefault((TRAIN if known[2] in (None, TRAIN) else "test", match[2]), files[name])
    if len(sets) > 1:
        found = ", ".join("/".join(filter(None, pair)) or "./" for pair in sorted(sets))
        raise DataError(f"{where}: holds {len(sets)} IDX sets ({found}): give the folder of one")
    present = [part for part in (TRAIN, "test") if (part, "images") in parts]
    if not present:
        raise DataError(f"{where}: holds IDX labels but no IDX images: put the images beside them")
    images = [
        _idx_images(_idx_array(parts[part, "images"], f"{where}: {part} images"), where)
        for part in present
    ]
    if len({block.shape[1:] for block in images}) > 1:
        raise DataError(f"{where}: train and test images differ in shape: give the folder of one")
    test = np.repeat([part == "test" for part in present], [len(block) for block in images])
    x, labels, label_names = np.concatenate(images), None, ()
    if all((part, "labels") in parts for part in present):
        blocks = [_idx_array(parts[p, "labels"], f"{where}: {p} labels") for p in present]
        labels, label_names = _as_labels(np.concatenate(blocks), len(x), where)
    return Source(x, labels, label_names, None, test if len(present) > 1 else None)


def _idx_array(data: bytes, where: str) -> np.ndarray:
    zipped = data[:2] == b"\x1f\x8b"
    with _damage(where), gzip.open(io.BytesIO(data)) if zipped else io.BytesIO(data) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 4:
            raise DataError(
                f"{where}: starts with {head.hex()}, and an IDX file of bytes with 0000080n: "
                "give an IDX file of images"
            )
        sizes = file.read(4 * head[3])
        shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
        count = math.prod(shape)
        most = len(data) * (1032 if zipped else 1)  # deflate packs no better
        body = b"" if count > min(most, MAX_ARRAY) else file.read(count + 1)
    if len(sizes) < 4 * head[3] or len(body) != count:
        raise DataError(
            f"{where}: the IDX header promises {' x '.join(map(str, shape))} bytes and "
            f"{'more' if len(body) > count else 'fewer'} follow: fetch the file again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_images(x: np.ndarray, where: str) -> np.ndarray:
    if x.ndim < 3:
        raise DataError(
            f"{where}: holds {x.ndim}-dimensional IDX data, labels perhaps: give the file of "
            "images, or the folder of both"
        )
    return _images(x, where)


def _read_cifar(files: dict[str, bytes], where: str) -> Source:
    images, labels, test = [], [], []
    for name, data in sorted(files.items()):
        if name.endswith(".bin"):
            if not data or len(data) % 3073:
                raise DataError(
                    f"{where}: {name} has {len(data)} bytes, no multiple of 3073: fetch it again"
                )
            records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
            x, y = records[:, 1:], records[:, 0]
        else:
            x, y = _cifar_pickle(data, f"{where}: {name}")
        images.append(x.reshape(-1, 3, 32, 32))
        labels.append(y)
        test.append(np.full(len(y), name.rpartition("/")[2].startswith("test")))
    x, y, official = np.concatenate(images), np.concatenate(labels), np.concatenate(test)
    y, names = _as_labels(y, len(x), where)
    names = CIFAR10_LABELS if len(names) <= 10 else names
    return Source(x, y, names, None, official if 0 < official.sum() < len(x) else None)


class _Inert:
    """Stands for every class a CIFAR batch names: it keeps what it is given and does nothing."""

    def __init__(self, *given: Any):
        self.given = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _CifarUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR's Python version without calling anything that they name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, codec: text.encode("latin1")
        if f"{module}.{name}" in CIFAR_PICKLED:
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, as no CIFAR batch does")


def _cifar_pickle(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    with _damage(where):
        batch = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key if isinstance(key, bytes) else key.encode(): batch[key] for key in batch}
        _, shape, kind, fortran, body = batch[b"data"].state
        y = np.array(batch[b"labels"], np.int64)
        if kind.given[0] not in (b"u1", "u1") or fortran or shape != (len(y), 3072):
            raise ValueError(f"its data are {kind.given[0]} of shape {shape}, not u1 (N, 3072)")
        return np.frombuffer(body, np.uint8).reshape(shape), y


# Arrays --------------------------------------------------------------------------------------


def _read_numpy(path: Path) -> Source:
    where = str(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        return Source(_levels_or_table(np.load(path, mmap_mode="r", allow_pickle=False), where))
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        keys = set(arrays.files)
        data = [key for key in ("x", "images", "data", "arr_0") if key in keys]
        labels = [key for key in ("y", "labels") if key in keys]
        rest = keys - set(data) - set(labels)
        if not data and len(rest) == 1:
            data, rest = list(rest), set()
        if len(data) != 1 or len(labels) > 1 or rest:
            raise DataError(
                f"{where}: holds the arrays {', '.join(sorted(keys)) or '(none)'}: keep one named "
                "x, images or data, and at most one of labels named y or labels"
            )
        x = _levels_or_table(arrays[data[0]], where)
        if not labels:
            return Source(x)
        return Source(x, *_as_labels(arrays[labels[0]], len(x), f"{where}: {labels[0]}"))


def _levels_or_table(x: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8 (N, C, H, W); tables as they are, for `_table` to look at."""
    if x.size == 0:
        return x
    if x.dtype.kind not in "buif":
        raise DataError(f"{where}: is of type {x.dtype}: store uint8 images or a float table")
    if x.ndim in (3, 4):
        return _images(_to_levels(x, where), where)
    if x.ndim != 2 or x.dtype == np.uint8:
        raise DataError(
            f"{where}: is {x.dtype} of shape {x.shape}: images are uint8 (N, C, H, W) or "
            "(N, H, W[, C]), tables are float (N, D): reshape it"
        )
    return x


def _images(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 (N, H, W[, C]) or (N, C, H, W) as (N, C, H, W), without copying.

    >>> _images(np.zeros((5, 28, 20, 3), np.uint8), "x").shape
    (5, 3, 28, 20)
    """
    if x.ndim == 3:
        return x[:, None]
    first, last = x.shape[1], x.shape[3]
    if (last in (1, 3) and first not in (1, 3)) or (first > 4 and last <= 4):
        return np.moveaxis(x, -1, 1)
    if first > 4:
        raise DataError(f"{where}: shape {x.shape} has no axis of 1 to 4 channels: reshape it")
    return x


def _blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows in blocks of some megabytes, so that a memory-mapped file never comes in whole."""
    step = max(1, (1 << 22) * len(x) // max(1, x.size))
    return ((i, np.asarray(x[i : i + step])) for i in range(0, len(x), step))


def _to_levels(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == np.bool_:
        return x.astype(np.uint8) * np.uint8(255)
    low = min(float(block.min()) for _, block in _blocks(x))
    high = max(float(block.max()) for _, block in _blocks(x))
    scale = 255 if x.dtype.kind == "f" and high <= 1 else 1
    levels = np.empty(x.shape, np.uint8)
    if low >= 0 and high <= 255:  # false for NaN
        for i, block in _blocks(x):
            exact = block * float(scale)
            levels[i : i + len(block)] = nearest = np.rint(exact)
            if np.abs(exact - nearest).max() > 1e-3:
                break
        else:
            return levels
    unit = low >= 0 and high <= 1
    advice = "multiply by 255, round, and store uint8" if unit else "rescale to 0..255"
    raise DataError(
        f"{where}: images are levels 0..255, and these {x.dtype} values run from {low:g} to "
        f"{high:g}: {advice}"
    )


def _as_labels(y: np.ndarray, n: int, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 with their names; small whole numbers keep their values.

    >>> _as_labels(np.array(["b", "a", "b"]), 3, "y")
    (array([1, 0, 1]), ('a', 'b'))
    """
    if y.shape != (n,) or y.dtype.kind not in "biuUS":
        raise DataError(
            f"{where}: labels are {y.dtype} of shape {y.shape}, not whole numbers or strings of "
            f"shape ({n},)"
        )
    if y.dtype.kind in "bui" and n and y.min() >= 0 and y.max() < 1000:
        return y.astype(np.int64), tuple(map(str, range(int(y.max()) + 1)))
    names, labels = np.unique(y.astype("U") if y.dtype.kind == "S" else y, return_inverse=True)
    return labels.astype(np.int64), tuple(map(str, names.tolist()))


# Tables --------------------------------------------------------------------------------------


def _table(
    x: np.ndarray, columns: tuple[str, ...], where: str, allow_constant: bool
) -> np.ndarray:
    """float32 (N, D), finite, and with no constant column; float32 files stay memory-mapped."""

    def called(column: int) -> str:
        return f"column {columns[column]!r}" if columns else f"column {column} (from 0)"

    if x.dtype != np.float32:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    low, high = np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf)
    for start, block in _blocks(x):
        finite = np.isfinite(block)
        if not finite.all():
            row, column = map(int, np.argwhere(~finite)[0])
            raise DataError(
                f"{where}: row {start + row} (from 0), {called(column)} is {block[row, column]}: "
                "drop or fill such rows"
            )
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    constant = np.flatnonzero(low == high)
    if len(constant) and not allow_constant:
        names = ", ".join(map(called, constant[:5])) + (", ..." if len(constant) > 5 else "")
        verb = "are" if len(constant) > 1 else "is"
        raise DataError(f"{where}: {names} {verb} constant, where a density is infinite: drop it")
    return x


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_header(row: Sequence[str]) -> bool:
    """Names, none of them a number; or numbers that only count, as pandas writes them."""
    if not any(map(_is_number, row)):
        return True
    counts = row[:-1] if row[-1].strip().lower() in LABEL_COLUMNS else row
    return len(row) > 1 and list(counts) == [str(i) for i in range(len(counts))]


def _read_csv(path: Path) -> Source:
    where = str(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        sample = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=sample.count))
        rows = (row for row in reader if row)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{where}: is empty: give a table of numbers")
        columns: tuple[str, ...] = ()
        if _is_header(first):
            columns = tuple(cell.strip() for cell in first)
            if "" in columns:
                raise DataError(
                    f"{where}: column {columns.index('') + 1} has no name, an index perhaps: name "
                    "it or write the file without it"
                )
        else:
            rows = chain([first], rows)
        labelled = len(first) > 1 and bool(columns) and columns[-1].lower() in LABEL_COLUMNS
        values, last = array("d"), []
        for row in rows:
            if len(row) != len(first):
                raise DataError(
                    f"{where}: line {reader.line_num} has {len(row)} cells and the first line "
                    f"{len(first)}: make them equal"
                )
            cells = row[:-1] if labelled else row
            try:
                values.extend(map(float, cells))
            except ValueError:
                at = next(i for i, cell in enumerate(cells) if not _is_number(cell))
                name = repr(columns[at]) if columns else str(at + 1)
                raise DataError(
                    f"{where}: line {reader.line_num}, column {name} is {cells[at]!r}, not a "
                    "number: fill or drop it (strings may stand in a last column 'label')"
                ) from None
            if labelled:
                last.append(row[-1].strip())
    x = np.array(values).reshape(-1, len(first) - labelled)
    return _with_labels(x, columns, np.array(last) if labelled else None, where)


def _read_parquet(path: Path) -> Source:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise _missing(f"{path}: reading .parquet", "pyarrow", "tables") from error
    where = str(path)
    with parquet.ParquetFile(path) as file:
        table = file.read()
    if table.column_names and table.column_names[-1] == "__index_level_0__":
        table = table.select(table.column_names[:-1])  # pandas' index is no datum
    columns, last = tuple(table.column_names), None
    if len(columns) > 1 and columns[-1].lower() in LABEL_COLUMNS:
        last = np.array(table.column(len(columns) - 1).to_pylist())
        table = table.select(columns[:-1])
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(
                f"{where}: column {name!r} is {kind}, not a number: convert or drop it"
            )
    x = np.empty((table.num_rows, table.num_columns), np.float64)
    for i, column in enumerate(table.columns):
        x[:, i] = column.to_numpy()  # a null becomes NaN
    return _with_labels(x, columns, last, where)


def _with_labels(
    x: np.ndarray, columns: tuple[str, ...], last: np.ndarray | None, where: str
) -> Source:
    """Take a last column of whole numbers or strings for labels, one of fractions for data."""
    if last is None or not len(last):
        return Source(x, columns=columns[: x.shape[1]])
    if last.dtype.kind == "U" and all(map(_is_number, last)):
        last = last.astype(np.float64)
    if last.dtype.kind == "f":
        if not (np.isfinite(last) & (last == np.rint(last)) & (abs(last) < 2**53)).all():
            return Source(np.column_stack([x, last]), columns=columns)
        last = last.astype(np.int64)
    labels, names = _as_labels(last, len(x), f"{where}: column {columns[-1]!r}")
    return Source(x, labels, names, columns=columns[:-1])


# Built-in sets -------------------------------------------------------------------------------

IDX_FILES: tuple[str, ...] = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
SYSTEM = Path("/usr/share/datasets")  # where Debian's packages put them
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
# fmt: off
CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)
# fmt: on


@dataclass(frozen=True)
class _Published:
    """A data set that others publish: where, as which files, and how they may lie on disk."""

    url: str
    md5: dict[str, str]  # of the files as published
    layouts: tuple[tuple[str, ...], ...]
    label_names: tuple[str, ...]
    first: int | None = None  # CRC of the first image, to tell sets with the same file names apart


def _idx_published(url: str, md5: str, label_names: tuple[str, ...], first: int) -> _Published:
    plain = tuple(name.removesuffix(".gz") for name in IDX_FILES)
    sums = dict(zip(IDX_FILES, md5.split(), strict=True))
    return _Published(url, sums, (IDX_FILES, plain), label_names, first)


PUBLISHED = {
    "mnist": _idx_published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
        tuple("0123456789"),
        0x90A92752,
    ),
    "fashion-mnist": _idx_published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
        FASHION_LABELS,
        0xF270BEB5,
    ),
    "cifar10": _Published(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        (
            ("cifar-10-binary.tar.gz",),
            *(
                tuple(f"{folder}{file}{suffix}" for file in CIFAR_FILES)
                for suffix, inner in ((".bin", "bin"), ("", "py"))
                for folder in ("", f"cifar-10-batches-{inner}/")
            ),
        ),
        CIFAR10_LABELS,
    ),
}


def _published(name: str, report: Progress) -> Source:
    """Look where the set may lie already, then download it into the user's cache."""
    known = PUBLISHED[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "musigma" / name
    homes = [SYSTEM / name, cache]
    if own := os.environ.get("MUSIGMA_DATA"):
        homes[:0] = [Path(own, name), Path(own)]
    for home in homes:
        for layout in known.layouts:
            if all((home / file).is_file() for file in layout):
                return _read_published(name, home, layout, report)
    try:
        _download(known, cache, report)
    except Exception as error:
        places = f"{cache}, or $MUSIGMA_DATA/{name}"
        raise DataError(
            f"{name}: is not on this machine and cannot be downloaded ({_first_line(error)}): get "
            f"{', '.join(known.md5)} from {known.url} and put it into {places}"
        ) from error
    return _read_published(name, cache, tuple(known.md5), report)


def _download(known: _Published, cache: Path, report: Progress) -> None:
    try:
        import pooch
    except ImportError as error:
        raise _missing("downloading", "pooch", "data") from error
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        for done, (file, md5) in enumerate(known.md5.items(), 1):
            pooch.retrieve(known.url + file, f"md5:{md5}", file, cache)
            report(done, len(known.md5))
    finally:
        logger.setLevel(level)


def _read_published(name: str, home: Path, layout: tuple[str, ...], report: Progress) -> Source:
    archive = ARCHIVE.fullmatch(layout[0])
    paths = [home / file for file in layout]
    walk = partial(_walk_tar, paths[0]) if archive else partial(_walk_each, paths)
    found = _read_files(walk, str(home), None, False, report)
    crc = zlib.crc32(found.x[:1].tobytes())
    for other, known in PUBLISHED.items():
        if other != name and known.first == crc:
            raise DataError(f"{home}: holds {other}, not {name}: ask for {other!r}, or move it")
    return replace(found, label_names=PUBLISHED[name].label_names)


def _digits(report: Progress) -> Source:
    """Scikit-learn's 1797 8 x 8 digits; their 17 levels v become round(255 v / 16)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("digits:", "scikit-learn", "data") from error
    found: Any = load_digits()
    x = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(x, found.target.astype(np.int64), tuple("0123456789"))


def _points(name: str, report: Progress) -> Source:
    """20,000 points of a plane toy, always the same ones, within about [-4, 4]."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    random = np.random.Generator(np.random.Philox(key=key))
    n, labels = 20_000, None
    noise = random.standard_normal((n, 2))
    if name == "checkerboard":
        x = random.uniform(-4, 4, n)
        row = 2 * random.integers(0, 2, n) + np.floor(x / 2) % 2
        points = np.stack([x, 2 * row - 4 + random.uniform(0, 2, n)], 1)
    elif name == "eight-gaussians":
        labels = random.integers(0, 8, n)
        angle = labels * (np.pi / 4)
        points = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.35 * noise
    else:
        labels = random.integers(0, 2, n)
        angle, side = random.uniform(0, np.pi, n), 1 - 2 * labels
        moons = np.stack([side * np.cos(angle) + labels, side * np.sin(angle) + labels / 2], 1)
        points = 2.5 * (moons - [0.5, 0.25] + 0.1 * noise)
    names = () if labels is None else tuple(map(str, range(int(labels.max()) + 1)))
    return Source(points.astype(np.float32), labels, names, columns=("x1", "x2"))


BUILT_IN: dict[str, Callable[[Progress], Source]] = {
    "digits": _digits,
    **{name: partial(_published, name) for name in PUBLISHED},
    **{name: partial(_points, name) for name in ("two-moons", "checkerboard", "eight-gaussians")},
}
READERS: dict[str, Callable[[Path], Source]] = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
UNDERSTOOD = (
    "a folder or archive (.tar, .tar.gz, .tar.xz, .zip) of images, IDX files or CIFAR batches; an "
    f".npy, .npz, .csv, .parquet or IDX file; or one of {', '.join(BUILT_IN)}"
)
