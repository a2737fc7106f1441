"""Files that hold many images each: MNIST's IDX files and CIFAR's batches."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
from typing import Any

import numpy as np

from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, damage
from musigma.data.raw import MAX_ARRAY, as_labels
from musigma.data.readers.arrays import as_images

IDX = re.compile(r"(.*?)[-_.]?(train|test|t10k)?[-_.]?(images|labels)[-.]idx\d[-.]ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")
CIFAR_PICKLED = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)


def read_idx(files: dict[str, bytes], where: str) -> Dataset:
    """MNIST's files; plain ones are preferred to gzipped ones."""
    parts: dict[tuple[str, str], bytes] = {}  # (train or test, images or labels)
    sets = set()
    for name in sorted(files, key=lambda name: (name.endswith(".gz"), name)):
        folder, _, base = name.rpartition("/")
        ((prefix, part, kind, _),) = IDX.findall(base)
        sets.add((folder, prefix))
        part = "test" if part in ("test", "t10k") else "train"
        parts.setdefault((part, kind), files[name])
    if len(sets) > 1:
        found = ", ".join("/".join(filter(None, pair)) or "./" for pair in sorted(sets))
        raise DataError(f"{where}: holds {len(sets)} IDX sets ({found}): give the folder of one")
    present = [part for part in ("train", "test") if (part, "images") in parts]
    if not present:
        raise DataError(f"{where}: holds IDX labels but no IDX images: add the images")
    images = [idx_images(parts[part, "images"], where, f": {part} images") for part in present]
    if len({block.shape[1:] for block in images}) > 1:
        raise DataError(f"{where}: train and test images differ in shape: give the folder of one")
    test = np.repeat([part == "test" for part in present], [len(block) for block in images])
    x, labels, label_names = np.concatenate(images), None, ()
    if all((part, "labels") in parts for part in present):
        blocks = [idx_array(parts[p, "labels"], f"{where}: {p} labels") for p in present]
        labels, label_names = as_labels(np.concatenate(blocks), len(x), where)
    official = test if len(present) > 1 else None
    return Dataset(x, labels=labels, label_names=label_names, official_test=official)


def idx_array(data: bytes, where: str) -> np.ndarray:
    """The array in an IDX file, which may be compressed with gzip."""
    zipped = data[:2] == b"\x1f\x8b"
    with damage(where), gzip.open(io.BytesIO(data)) if zipped else io.BytesIO(data) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 4:
            raise DataError(
                f"{where}: starts with {head.hex()}, and IDX files of bytes start with 0000080n: "
                "give an IDX file of images"
            )
        sizes = file.read(4 * head[3])
        shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
        count = math.prod(shape)
        most = len(data) * (1032 if zipped else 1)  # the best that deflate can do
        body = b"" if count > min(most, MAX_ARRAY) else file.read(count + 1)
    if len(sizes) < 4 * head[3] or len(body) != count:
        raise DataError(
            f"{where}: the IDX header announces {' x '.join(map(str, shape))} bytes and "
            f"{'more' if len(body) > count else 'fewer'} follow: fetch the file again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def idx_images(data: bytes, where: str, what: str = "") -> np.ndarray:
    """The images in an IDX file."""
    x = idx_array(data, f"{where}{what}")
    if x.ndim < 3:
        raise DataError(
            f"{where}: holds {x.ndim}-dimensional IDX data, perhaps labels: give the file of "
            "images, or the folder of both"
        )
    return as_images(x, where)


def read_cifar(files: dict[str, bytes], where: str) -> Dataset:
    """CIFAR's batches, binary or pickled."""
    images, labels, test = [], [], []
    for name, data in sorted(files.items()):
        if name.endswith(".bin"):
            if not data or len(data) % 3073:
                raise DataError(
                    f"{where}: {name} has {len(data)} bytes, which 3073 does not divide: fetch it "
                    "again"
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
    held_out = official if 0 < official.sum() < len(x) else None
    return Dataset(x, labels=y, label_names=names, official_test=held_out)


class _Inert:
    """Replaces every class that a CIFAR batch names; stores its arguments and does nothing."""

    def __init__(self, *given: Any):
        self.given = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _CifarUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR's Python version without running anything that they name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, codec: text.encode("latin1")
        if f"{module}.{name}" in CIFAR_PICKLED:
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch needs")


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
# fmt: on
