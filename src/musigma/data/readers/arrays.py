"""Arrays of images or of numbers: .npy and .npz files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.assembly import assemble
from musigma.data.cache import blocks, derived, float32
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, printable
from musigma.data.pairs import matching
from musigma.data.raw import Request, as_labels
from musigma.data.readers.arrow import frame
from musigma.data.readers.layout import SPELLINGS, WORDS, Part, official_masks, part_of
from musigma.data.tables import Content, Table, number_fault

DATA = ("x", "images", "image", "imgs", "data", "arr0", "arr_0")
LABELS = ("y", "labels", "label", "targets", "target")
OBJECTS = re.compile("pickle|Python objects")


def read_numpy(path: Path, request: Request) -> Dataset:
    """An .npy file, memory-mapped where it can be, or an .npz with images or a table."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        return _read_npz(path, request) if zipped else of_array(_mapped(path), request)
    except ValueError as error:
        if isinstance(error, DataError) or not OBJECTS.search(str(error)):
            raise
        raise request.error(
            "holds Python objects, which are never unpickled: save arrays of numbers or strings, "
            "such as x.astype(np.float32)"
        ) from error


def _mapped(path: Path) -> np.ndarray:
    x = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(x, np.memmap) and path.stat().st_size > x.offset + x.nbytes:
        raise DataError(
            f"{path}: bytes follow its array of shape {x.shape}, as where several are saved into "
            "one file: save each into a file of its own, or all into one .npz"
        )
    return x


def _read_npz(path: Path, request: Request) -> Dataset:
    """Images or a table, and labels; or several parts of them."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        if request.of:
            return read_named({name: arrays[name] for name in arrays.files}, request)
        keys = sorted(arrays.files)
        if strange := [m.filename for m in arrays.zip.infolist() if m.filename[-4:] != ".npy"]:
            raise request.error(
                f"holds {printable(strange[0])}, which is no array: name an archive of images .zip"
            )
        if parts := _parts(keys):
            return _read_parts(arrays, parts, request)
        data = [key for key in keys if key.lower() in DATA]
        labels = [key for key in keys if key.lower() in LABELS]
        rest = set(keys) - {*data, *labels}
        if not data and len(rest) == 1:
            data, rest = list(rest), set()
        if len(data) != 1 or len(labels) > 1 or rest:
            raise request.error(
                f"holds the arrays {', '.join(keys) or '(none)'}: keep one named x, images or "
                "data, and at most one of labels named y or labels; parts are named x_train, "
                "y_train, x_test and so on"
            )
        y = arrays[labels[0]] if labels else None
        return _labeled(arrays[data[0]], y, labels[0] if labels else "", request)


def _parts(names: Sequence[str]) -> dict[Part, dict[bool, str]]:
    """The arrays of each part: of labels (True) and of examples; empty where there are no parts.

    >>> _parts(["x_train", "y_train", "test_images", "test_labels"])["test"]
    {False: 'test_images', True: 'test_labels'}
    """
    found: dict[Part, dict[bool, str]] = {}
    for name in names:
        words = [word.lower() for word in WORDS.findall(name)]
        parts = [part for word in words if (part := part_of(word))]
        rest = "".join(word for word in words if not part_of(word))
        if len(parts) != 1 or rest not in DATA + LABELS:
            return {}
        found.setdefault(parts[0], {})[rest in LABELS] = name
    whole = "train" in found and len(found) > 1 and all(False in part for part in found.values())
    if not whole or len(names) > sum(map(len, found.values())):
        return {}
    return {part: found[part] for part in SPELLINGS if part in found}


def _read_parts(
    arrays: Any, parts: Mapping[Part, Mapping[bool, str]], request: Request
) -> Dataset:
    """Parts for training, validation and testing as one data set."""
    x = {part: arrays[names[False]] for part, names in parts.items()}
    if len({(a.shape[1:], a.dtype) for a in x.values()}) > 1:
        listed = ", ".join(f"{parts[part][False]} {a.dtype} {a.shape}" for part, a in x.items())
        raise request.error(f"its parts differ in type or shape, {listed}: make them alike")
    where = np.repeat(list(x), [len(a) for a in x.values()])
    y, without = None, [part for part, names in parts.items() if True not in names]
    if not without:
        y = np.concatenate([np.squeeze(arrays[names[True]]) for names in parts.values()])
    elif len(without) < len(parts):
        request.note(f"there are no labels, since {' and '.join(without)} has none")
    found = _labeled(np.concatenate(list(x.values())), y, "labels", request)
    if found.ids is not None:  # some examples were left out
        where = where[[int(name) for name in found.ids]]
    test, validation = official_masks(where)
    return replace(found, official_test=test, official_validation=validation)


def _labeled(x: np.ndarray, given: np.ndarray | None, name: str, request: Request) -> Dataset:
    """Examples with their labels, if there are any."""
    found = of_array(x, request)
    if given is None:
        return found
    known = np.ones(len(given), bool)
    if request.unlabeled and given.dtype.kind == "i":
        known = given != -1
    y = np.full(len(x), -1)
    y[known], names = as_labels(
        given[known], int(known.sum()) + len(x) - len(given), f"{request.where}: {name}"
    )
    if found.ids is not None:  # some examples were left out
        y = y[[int(name) for name in found.ids]]
    return replace(found, labels=y, label_names=names)


def read_named(arrays: Mapping[str, np.ndarray], request: Request) -> Dataset:
    """Arrays by name, of which some are modeled and others are given.

    The columns of a modeled array (N, D) are called theta_0, theta_1, ... if it is called theta.
    Given arrays are (N,), (N, F), or sequences (N, M, F).

    Raises:
        DataError: If the arrays differ in their numbers of rows.
    """
    counts = {name: a.shape[0] if a.ndim else 0 for name, a in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} of {name}" for name, n in counts.items())
        raise request.error(f"the numbers of rows differ, {listed}: make them equal")
    names, columns, of = list(arrays), dict[str, np.ndarray](), []
    modeled: dict[str, list[str]] = {}
    for name in (names[j] for pattern in request.of for j in matching(names, pattern)):
        if arrays[name].ndim == 2:
            modeled[name] = [f"{name}_{j}" for j in range(arrays[name].shape[1])]
    for name, array in arrays.items():
        columns |= (
            dict(zip(modeled[name], array.T, strict=True)) if name in modeled else {name: array}
        )
    for pattern in request.of:
        found = [names[j] for j in matching(names, pattern)]
        of += [part for name in found for part in modeled.get(name, [name])] or [pattern]
    return assemble(_Named(columns), replace(request, of=tuple(dict.fromkeys(of))))


class _Named(Table):
    """Arrays by name as the columns of a table; those of several axes are lists."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.names, self.arrays = tuple(arrays), list(arrays.values())
        self.rows = len(self.arrays[0]) if arrays else 0
        self.kinds = [self._kind(array) for array in self.arrays]
        self.storage = [
            array.dtype.name if array.ndim == 1 else f"{array.dtype} of shape {array.shape}"
            for array in self.arrays
        ]

    @staticmethod
    def _kind(array: np.ndarray) -> Content:
        if array.dtype.kind in "US":
            return "text" if array.ndim == 1 else "other"
        if array.dtype.kind not in "buif" or array.ndim not in (1, 2, 3):
            return "other"
        return "number" if array.ndim == 1 else "list"

    def x(self, columns: Sequence[int]) -> np.ndarray:
        return np.stack([float32(self.arrays[j]) for j in columns], 1)

    def numbers(self, j: int) -> np.ndarray:
        return self.arrays[j].astype(np.float64)

    def sequences(self, j: int) -> np.ndarray:
        return float32(self.arrays[j])

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        words, codes = np.unique(self.arrays[j], return_inverse=True)
        yield words.tolist(), codes


def of_array(x: np.ndarray, request: Request) -> Dataset:
    """Images as uint8 (N, C, H, W), or a table."""
    where, shape = request.where, x.shape
    if x.size == 0:
        raise request.error(f"holds no examples (its shape is {shape})")
    if x.dtype.names and x.ndim == 1:  # fields are columns
        native = x.dtype.newbyteorder("=")
        return assemble(frame(np.asarray(x).astype(native), request), request)
    if x.dtype.kind not in "buif":
        raise request.error(f"is of type {x.dtype}: store uint8 images or a float table")
    if x.ndim == 3 and x.dtype == np.uint8 and shape[2] in (3, 4) and min(shape[:2]) >= 8:
        raise request.error(
            f"has shape {shape}, like one image (H, W, C): give x[None]; for gray images that are "
            f"{shape[2]} pixels wide, x[:, None]"
        )
    if x.ndim in (3, 4):
        return _images(as_images(x, where), request)
    if x.ndim == 5:
        raise request.error(
            f"has shape {shape}, like volumes or videos, but models take images: give "
            "slices, such as x.reshape(-1, C, H, W)"
        )
    if x.ndim == 1 and x.dtype.kind == "f":
        raise request.error(
            f"has shape {shape}: a table of one column is x[:, None], and one example is x[None]"
        )
    if x.ndim != 2 or (x.dtype == np.uint8 and request.schema is None):
        how, side = "", math.isqrt(shape[-1]) if shape else 0
        if x.ndim == 2 and side**2 == shape[1]:
            how = f", such as x.reshape(-1, 1, {side}, {side})"
        raise request.error(
            f"is {x.dtype} of shape {shape}: images are uint8 (N, C, H, W) or "
            f"(N, H, W[, C]), tables are float (N, D): reshape it{how}"
        )
    return assemble(_Rows(x, request), request)


class _Rows(Table):
    """A table in an array, whose columns have no names."""

    def __init__(self, array: np.ndarray, request: Request):
        self.array, self.request = array, request
        self.rows, width = array.shape
        self.kinds, self.storage = ["number"] * width, [array.dtype.name] * width

    def x(self, columns: Sequence[int]) -> np.ndarray:
        if self.array.dtype == np.float32:
            return self.array
        x = self.array
        make = partial(map, float32, blocks(x))
        return derived(x, "float32", x.shape, np.float32, make, self.request)

    def numbers(self, j: int) -> np.ndarray:
        return self.array[:, j].astype(np.float64)

    def reason(self, i: int, j: int, value: float | None) -> str:
        return number_fault(float(self.array[i, j]))


def as_images(x: np.ndarray, where: str) -> np.ndarray:
    """Images (N, H, W[, C]) or (N, C, H, W) as (N, C, H, W), without copying.

    >>> as_images(np.zeros((5, 28, 20, 3), np.uint8), "x").shape
    (5, 3, 28, 20)
    """
    if x.ndim == 3:
        return x[:, None]
    if min(x.shape[1], x.shape[3]) > 4:
        n, depth, *rest = x.shape
        if rest[0] in (1, 3) and rest[1] > 4:
            advice = "as MATLAB has it, H x W x C x N: x.transpose(3, 2, 0, 1)"
        else:
            slices = f"x.reshape({n * depth}, 1, {rest[0]}, {rest[1]})"
            advice = f"reshape it, or choose channels; for volumes, give the slices, {slices}"
        raise DataError(f"{where}: shape {x.shape} has no axis of 1 to 4 channels: {advice}")
    first, last = x.shape[1], x.shape[3]
    if (last in (1, 3) and first not in (1, 3)) or (first > 4 and last <= 4):
        return np.moveaxis(x, -1, 1)
    return x


def _images(x: np.ndarray, request: Request) -> Dataset:
    """Images whose values are levels 0..255, 0..1, or False and True."""
    if x.dtype == np.uint8:
        return Dataset(x)
    ids, faults = None, {}
    if x.dtype.kind == "f":
        finite = np.concatenate([np.isfinite(b).reshape(len(b), -1).all(1) for b in blocks(x)])
        if not finite.all():
            faults = {
                f"image {i} (from 0)": "has values that are not finite: fill them"
                for i in np.flatnonzero(~finite).tolist()
            }
            request.refuse(faults, "images", len(x))
            x, ids = np.asarray(x)[finite], tuple(map(str, np.flatnonzero(finite).tolist()))
        if not len(x):
            raise request.error("no image has finite values")
    low = min(float(block.min()) for block in blocks(x))
    high = max(float(block.max()) for block in blocks(x))
    scale = 255 if x.dtype == np.bool_ or (x.dtype.kind == "f" and high <= 1) else 1
    if x.dtype == np.bool_:
        request.note(
            "False and True become the levels 0 and 255: --binarize threshold makes 1 bit"
        )
    refusal = request.error(
        f"images are levels 0..255, and these {x.dtype} values run from {low:g} "
        f"to {high:g}: {_advice(x, low, high)}"
    )
    if not (low >= 0 and high <= 255):
        raise refusal

    def rounded() -> Iterator[np.ndarray]:
        for block in blocks(x):
            exact = block * float(scale)
            nearest = np.rint(exact)
            if np.abs(exact - nearest).max() > 1e-3:
                raise refusal
            yield nearest.astype(np.uint8)

    levels = derived(x, "levels", x.shape, np.uint8, rounded, request)
    return Dataset(levels, ids=ids, skipped=faults)


def _advice(x: np.ndarray, low: float, high: float) -> str:
    """Advice for arrays with more than two axes that do not hold levels."""
    if x.dtype.kind in "iu":
        return "rescale to 0..255, and store uint8"
    flat = "x.reshape(len(x), -1).astype(np.float32)"
    if low >= 0 and high <= 1:
        images = "for images, round: np.rint(255 * x).astype(np.uint8)"
    elif low >= -0.25 and high <= 1.25:
        images = (
            "for images that overshoot 0..1, clip and round: np.rint(255 * x.clip(0, 1))"
            ".astype(np.uint8)"
        )
    elif low >= 0 and high <= 255:
        images = "for images, round: np.rint(x).astype(np.uint8)"
    else:
        images = "for images, rescale to 0..255, round, and store uint8"
    return f"{images}; series or other values are a table of continuous columns: {flat}"
