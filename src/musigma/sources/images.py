"""Files that come together: folders and archives of images, IDX files, CIFAR batches."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from musigma.sources.arrays import as_images, as_labels
from musigma.sources.base import (
    MAX_ARRAY,
    DataError,
    Progress,
    Source,
    Walk,
    allocate,
    damage,
    first_line,
)

MAX_MEMBER = 1 << 30  # bytes: no file inside an archive is larger
TRAIN, TEST = "train", ("test", "val", "valid", "validation")
IDX = re.compile(r"(.*?)[-_.]?(images|labels)[-.]idx\d[-.]ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")
CIFAR_PICKLED = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)


def walk_folder(root: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Every file below a folder, by name."""

    def fail(error: OSError) -> None:
        raise error

    names = []
    for folder, inner, files in os.walk(root, onerror=fail):
        inner[:] = [name for name in inner if not name.startswith(".")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]
    for name in sorted(names):
        if not _hidden(name):
            yield name, partial(open, root / name, "rb")


def walk_each(paths: Sequence[Path]) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """A list of files."""
    for path in paths:
        yield path.name, partial(open, path, "rb")


def walk_tar(path: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Every file of a tar archive, compressed or not."""
    with damage(str(path)), tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and not _hidden(member.name):
                _check_member(path, member.name, member.size)
                yield (
                    member.name.removeprefix("./"),
                    partial(_copy, path, partial(archive.extractfile, member)),
                )


def walk_zip(path: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Every file of a zip archive."""
    with damage(str(path)), zipfile.ZipFile(path) as archive:
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
    with damage(str(path)), opener() as file:
        return io.BytesIO(file.read())


@lru_cache(maxsize=1)
def pillow_kinds() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats Pillow may open, and their suffixes; none of those that start other programs."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    formats = set(Image.OPEN) - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}
    common_first = sorted(formats, key=lambda kind: (kind not in ("JPEG", "PNG"), kind))
    return tuple(common_first), frozenset(s for s, kind in suffixes.items() if kind in formats)


def read_files(
    walk: Walk, where: str, size: int | None, skip_bad: bool, report: Progress
) -> Source:
    """Read IDX files, CIFAR batches or images, whichever a walk comes upon."""
    suffixes = pillow_kinds()[1]
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
        raise DataError(
            f"{where}: holds no images ({left or 'it is empty'}): give images, IDX files or CIFAR "
            "batches"
        )
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
        x = allocate((len(names), channels, height, width), self.where)
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
                    f"{self.where}: {name} is not a readable image ({first_line(error)}): "
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
        with opener() as file, Image.open(file, formats=pillow_kinds()[0]) as image:
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


def resized(x: np.ndarray, size: int, report: Progress) -> np.ndarray:
    """Images brought to squares of a size."""
    from PIL import Image

    if x.shape[2:] == (size, size):
        return x
    out = allocate((*x.shape[:2], size, size), "size")
    for i, example in enumerate(x):
        for channel, plane in enumerate(example):
            image = Image.fromarray(np.ascontiguousarray(plane))
            out[i, channel] = np.asarray(_fitted(image, size))
        report(i + 1, len(x))
    return out


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
        idx_images(idx_array(parts[part, "images"], f"{where}: {part} images"), where)
        for part in present
    ]
    if len({block.shape[1:] for block in images}) > 1:
        raise DataError(f"{where}: train and test images differ in shape: give the folder of one")
    test = np.repeat([part == "test" for part in present], [len(block) for block in images])
    x, labels, label_names = np.concatenate(images), None, ()
    if all((part, "labels") in parts for part in present):
        blocks = [idx_array(parts[p, "labels"], f"{where}: {p} labels") for p in present]
        labels, label_names = as_labels(np.concatenate(blocks), len(x), where)
    return Source(x, labels, label_names, None, test if len(present) > 1 else None)


def idx_array(data: bytes, where: str) -> np.ndarray:
    """The array in an IDX file, compressed or not, of no more than its bytes."""
    zipped = data[:2] == b"\x1f\x8b"
    with damage(where), gzip.open(io.BytesIO(data)) if zipped else io.BytesIO(data) as file:
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


def idx_images(x: np.ndarray, where: str) -> np.ndarray:
    """An IDX array as images."""
    if x.ndim < 3:
        raise DataError(
            f"{where}: holds {x.ndim}-dimensional IDX data, labels perhaps: give the file of "
            "images, or the folder of both"
        )
    return as_images(x, where)


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
    y, names = as_labels(y, len(x), where)
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
    with damage(where):
        batch = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key if isinstance(key, bytes) else key.encode(): batch[key] for key in batch}
        _, shape, kind, fortran, body = batch[b"data"].state
        y = np.array(batch[b"labels"], np.int64)
        if kind.given[0] not in (b"u1", "u1") or fortran or shape != (len(y), 3072):
            raise ValueError(f"its data are {kind.given[0]} of shape {shape}, not u1 (N, 3072)")
        return np.frombuffer(body, np.uint8).reshape(shape), y


# fmt: off
CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
