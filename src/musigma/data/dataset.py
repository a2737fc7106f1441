"""Data sets: `load` reads a source, and `Dataset` gives its examples as a model sees them.

A data set keeps its examples as they were read: in memory, or on disk where they take too much of
it, memory-mapped or decoded when they are indexed. `Dataset.take` preprocesses those that are
asked for. The split into parts is a function of the content, and of the parts that the source
itself defines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np

from musigma.data import readers
from musigma.data.columns import listed
from musigma.data.given import Given
from musigma.data.readers import DataError, LazyImages, Progress
from musigma.data.sampling import binarized
from musigma.data.split import PARTS, Part, parts
from musigma.spec import Spec, Variable

__all__ = [
    "Dataset",
    "Part",
    "Preprocess",
    "digest",
    "identity",
    "load",
]

Binarize = Literal["threshold", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How images are preprocessed; saved with a model, so that new data are treated alike.

    Args:
        size: Pixels to resize images to: a square, or (height, width). Images are scaled,
            antialiased, until they cover it, and cropped centrally.
        bits: Bits of each channel: level x becomes floor(x / 2^(8 - bits)).
        binarize: One bit instead: x >= 128 ("threshold"), or a new draw with probability x / 255
            each time an example is taken ("dynamic").

    >>> Preprocess(binarize="dynamic").levels_bits
    1
    >>> Preprocess.from_json(Preprocess(size=32, bits=5).to_json())
    Preprocess(size=32, bits=5, binarize=None)
    >>> Preprocess(size=(48, 64)).pixels
    (48, 64)
    """

    size: int | tuple[int, int] | None = None
    bits: int = 8
    binarize: Binarize | None = None

    def __post_init__(self):
        sides = self.size if isinstance(self.size, (tuple, list)) else (self.size,) * 2
        if self.size is not None and not (
            len(sides) == 2 and all(_is_whole(side) and side >= 1 for side in sides)
        ):
            raise DataError(
                f"size is {self.size!r}: give a whole number of pixels from 1, two of them "
                "(height, width), or None"
            )
        size = sides[0] if len(set(sides)) == 1 else tuple(sides)
        object.__setattr__(self, "size", size)  # a square is one number
        if not (_is_whole(self.bits) and 1 <= self.bits <= 8):
            raise DataError(f"bits is {self.bits!r}: give a whole number from 1 to 8")
        if self.binarize not in (None, *get_args(Binarize)):
            raise DataError(f"binarize is {self.binarize!r}: give 'threshold', 'dynamic' or None")
        if self.binarize and self.bits != 8:
            raise DataError(
                f"bits is {self.bits} with binarize, which leaves one: drop one of them"
            )

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Height and width that images are resized to; None: they are not."""
        if self.size is None or isinstance(self.size, tuple):
            return self.size
        return self.size, self.size

    @property
    def levels_bits(self) -> int:
        """Bits per channel of what `Dataset.take` returns."""
        return 1 if self.binarize else self.bits

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocess:
        """Read what `to_json` wrote; unknown keys are errors."""
        known = {field.name for field in fields(cls)}
        if not isinstance(plain, Mapping) or not set(plain) <= known:
            raise DataError(f"preprocess is {plain!r}: its keys are {', '.join(sorted(known))}")
        return cls(**plain)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


UNTOUCHED = Preprocess()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples of one shape, with labels, names and context.

    Args:
        array: uint8 levels 0..255 of shape (N, C, H, W), or float32 (N, D), before preprocessing.
            It may be memory-mapped, or decode images when they are indexed; all subsets share it.
        rows: The rows of `array` that belong to this set, in its order; None: all.
        name: The source as it was given.
        preprocess: What `take` does to images; `size` has been applied to `array` already.
        labels: int64 (N,), indices into `label_names`.
        label_names: Names of the classes.
        ids: A name for each example, its file name for instance.
        official_test: True for examples that the source itself reserves for testing.
        official_validation: True for examples that the source itself reserves for validation.
        columns: Names of the columns of a table.
        given: Further context of each example, by name: what a model can be conditioned on.
        skipped: What could not be used and was left out, with the reasons, by name.
        notes: What the user should know about how the data were read.
        hashes: Hashes of the rows of `array`, computed once and shared by all subsets.

    >>> data = Dataset(np.arange(12, dtype=np.float32).reshape(6, 2))
    >>> data.shape, len(data), data.subset([4, 5]).take([0])
    ((2,), 6, array([[8., 9.]], dtype=float32))
    """

    array: np.ndarray | LazyImages = field(repr=False)
    _: KW_ONLY
    rows: np.ndarray | None = field(default=None, repr=False)
    name: str = ""
    preprocess: Preprocess = UNTOUCHED
    labels: np.ndarray | None = field(default=None, repr=False)
    label_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = field(default=None, repr=False)
    official_test: np.ndarray | None = field(default=None, repr=False)
    official_validation: np.ndarray | None = field(default=None, repr=False)
    columns: tuple[str, ...] = ()
    given: Mapping[str, Given] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hashes: _Hashes | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.hashes is None or self.hashes.array is not self.array:
            object.__setattr__(self, "hashes", _Hashes(self.array))
        if (self.array.dtype, self.array.ndim) not in ((np.uint8, 4), (np.float32, 2)):
            raise DataError(
                f"array is {self.array.dtype} of shape {self.array.shape}: give uint8 "
                "(N, C, H, W) or float32 (N, D)"
            )
        if self.bits is None and self.preprocess != UNTOUCHED:
            raise DataError(
                f"{self.name or 'array'}: is a table, and {self.preprocess} is for images: leave "
                "size, bits and binarize out"
            )
        for what in ("labels", "ids", "official_test", "official_validation"):
            value = getattr(self, what)
            if value is not None and len(value) != len(self):
                raise DataError(f"{what} has {len(value)} entries for {len(self)} examples")
        for name, given in self.given.items():
            if len(given) != len(self):
                raise DataError(
                    f"given: {name!r} has {len(given)} rows for {len(self)} examples: give one "
                    "for each"
                )
        if self.labels is not None and "label" in self.given:
            raise DataError("given: 'label' names the labels already: give it another name")

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    @property
    def x(self) -> np.ndarray:
        """All examples as `take` gives them (for seed 0 and step 0), in memory."""
        return self.take(np.arange(len(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.array.shape[1:]

    @property
    def bits(self) -> int | None:
        """Bits per channel of what `take` returns; None if it is continuous."""
        return self.preprocess.levels_bits if self.array.dtype == np.uint8 else None

    @property
    def variables(self) -> tuple[Variable, ...]:
        """All that a model can be conditioned on: `label`, if there are labels, and `given`."""
        given = (value.variable(name) for name, value in self.given.items())
        if self.labels is None:
            return tuple(given)
        return Variable("label", names=self.label_names), *given

    def spec(self, context: Sequence[str] = ()) -> Spec:
        """What a model of these data is built from, conditioned on the variables named.

        Raises:
            DataError: If there is no such variable.
        """
        known = {variable.name: variable for variable in self.variables}
        if missing := [name for name in context if name not in known]:
            raise DataError(
                f"context: {self.name or 'array'} has no {', '.join(missing)}: give "
                f"{', '.join(known) or 'none, it has no labels and nothing else given'}"
            )
        levels = None if self.bits is None else 2**self.bits
        return Spec(self.shape, levels, self.columns, tuple(known[name] for name in context))

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        step: int = 0,
        first: int = 0,
    ) -> np.ndarray:
        """The examples at `indices` as a model sees them: uint8 levels from 0, or float32.

        Dynamic binarization is a pure function of (seed, step, position); the positions count
        from `first`. So a batch can be taken in parts:

        >>> levels = np.full((4, 1, 2, 2), 99, np.uint8)
        >>> data = Dataset(levels, preprocess=Preprocess(binarize="dynamic"))
        >>> whole = data.take([0, 1, 2, 3], seed=5)
        >>> bool((whole[3:] == data.take([3], seed=5, first=3)).all())
        True
        """
        index = np.asarray(indices) if len(indices) else np.empty(0, np.int64)
        rows = index if self.rows is None else self.rows[index]
        x = np.ascontiguousarray(self.array[rows])
        if self.preprocess.binarize == "dynamic":
            return binarized(x, seed, step, first * prod(self.shape))
        return x if self.bits in (None, 8) else x >> np.uint8(8 - self.bits)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every column over these rows, float64 (D,) each.

        Raises:
            DataError: If these are images, or a column is constant: its density is infinite.
        """
        if self.bits is not None:
            raise DataError(f"{self.name or 'array'}: holds images, which have no columns")
        mean, square, done = np.zeros(self.shape), np.zeros(self.shape), 0
        step = max(1, (1 << 22) // prod(self.shape))
        for start in range(0, len(self), step):
            block = self.take(np.arange(start, min(start + step, len(self)))).astype(np.float64)
            n, center = len(block), block.mean(0)
            gap = center - mean  # Chan, Golub, LeVeque (1979), "Updating formulae": parts joined
            square += ((block - center) ** 2).sum(0) + gap**2 * (done * n / (done + n))
            done += n
            mean += gap * (n / done)
        std = np.sqrt(square / max(1, done))
        if len(constant := np.flatnonzero(std == 0)):
            raise DataError(
                f"{self.name or 'array'}: {listed(self.columns, constant)} "
                f"{'are' if len(constant) > 1 else 'is'} constant in the {done} rows to train on, "
                "where the density is infinite: drop it, or give more data"
            )
        return mean, std

    def subset(self, which: Sequence[int] | np.ndarray) -> Dataset:
        """The examples of a mask or of indices, in that order; no example is copied."""
        rows = np.arange(len(self))[which] if len(which) else np.empty(0, np.int64)
        arrays = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("labels", "official_test", "official_validation")
        }
        return replace(
            self,
            rows=rows if self.rows is None else self.rows[rows],
            ids=None if self.ids is None else tuple(self.ids[i] for i in rows),
            given={name: given.subset(rows) for name, given in self.given.items()},
            **arrays,
        )

    def split(self, part: Part, fraction: float = 0.1) -> Dataset:
        """One part of the data: for training, for choosing weights, or held out until the end.

        The parts that the source defines are used as they are: its test part is held out. Where
        it defines none, each example is held out with probability `fraction` by a hash of its
        content, and half as many of the others are for validation, by the same hash. An example
        and its duplicates are therefore in the same part, whatever the order of the files.
        """
        if part not in get_args(Part):
            raise DataError(f"part is {part!r}: give {', '.join(get_args(Part))}")
        if not 0 < fraction < 1:
            raise DataError(f"fraction is {fraction}: give a number between 0 and 1")
        if part == "all":
            return self
        try:
            masks = parts(self.content(), self.official_test, self.official_validation, fraction)
        except DataError as error:
            raise DataError(f"{self.name or 'array'}: {error}") from None
        return self.subset(masks[PARTS.index(part)])

    def content(self) -> np.ndarray:
        """64 bits of BLAKE2b of each example's content before `preprocess`, uint64 (N,)."""
        assert self.hashes is not None  # set by `__post_init__`
        return self.hashes.of(self.rows)


class _Hashes:
    """Hashes of the rows of an array, computed when they are first needed."""

    def __init__(self, array: np.ndarray | LazyImages, known: np.ndarray | None = None):
        self.array, self.known = array, known

    def of(self, rows: np.ndarray | None) -> np.ndarray:
        """The hashes of some rows, or of all."""
        if self.known is None and rows is None:
            self.known = readers.content_hashes(self.array, len(self.array))
        if self.known is None:
            assert rows is not None
            return readers.content_hashes((self.array[row] for row in rows), len(rows))
        return self.known if rows is None else self.known[rows]


def load(
    source: str | Path,
    *,
    preprocess: Preprocess = UNTOUCHED,
    given: str | Iterable[str] = (),
    columns: Sequence[str] | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    allow_constant: bool = False,
    in_memory: bool | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set from a path, a URL, or by its name.

    It reads folders and archives (tar, zip) of images, MNIST's IDX files and CIFAR batches;
    `.npy`, `.npz`, `.csv`, `.tsv` and `.parquet`; folders of tar or parquet files, or a pattern of
    them (`shards-{0000..0099}.tar`); all of these by a URL that fsspec knows; and the names
    `digits`, `mnist-5k`, `mnist`, `fashion-mnist`, `cifar10`, `two-moons`, `checkerboard` and
    `eight-gaussians`. A name takes precedence over a file of the same name, which is written
    `./mnist`. Published sets are looked for in `$MUSIGMA_DATA`, in `/usr/share/datasets` and in
    the user's cache, and otherwise downloaded into the cache.

    Args:
        source: A path, a URL or a name.
        preprocess: How images are preprocessed.
        given: Context to read along with the examples: `label` requires labels; names or patterns
            of columns (`x_*`), which then are no part of x; or files with a row for each example
            (`attach`).
        columns: The columns of a table that a model needs, in its order. Others are left out.
        channels: 3 makes gray images RGB.
        skip_bad: Leave out images and rows that cannot be used; `Dataset.skipped` names them.
        allow_constant: Accept constant columns: harmless for scoring with a trained model, but
            not for training, where the density of such a column is infinite.
        in_memory: Whether to read examples into memory. By default they are read if they take at
            most a quarter of it (divided by the processes of a `torchrun` on this machine).
            Others stay on disk, and the user's cache stores an index of them. `.npy` files always
            stay there unless this is True; `.npz`, `.csv` and IDX files never do.
        progress: Called with (done, total) as examples are read (for a URL, MiB).

    Raises:
        DataError: If the data cannot be used as they are; the message says what to do.

    >>> data = load("two-moons")
    >>> data.shape, data.bits, sum(len(data.split(p)) for p in ("train", "validation", "held-out"))
    ((2,), None, 20000)
    """
    from musigma.data.attach import attach, is_source

    wanted = [given] if isinstance(given, str) else list(given)
    files = [item for item in wanted if item != "label" and is_source(item)]
    found = readers.read(
        source,
        size=preprocess.pixels,
        channels=channels,
        columns=None if columns is None else tuple(columns),
        given=tuple(item for item in wanted if item != "label" and item not in files),
        allow_constant=allow_constant,
        skip_bad=skip_bad,
        in_memory=in_memory,
        report=progress or (lambda done, total: None),
    )
    name = readers.plain(source) if readers.is_url(source) else str(source)
    if found.x.dtype == np.uint8:
        _check_levels(found.x, preprocess.levels_bits, name)
    if "label" in wanted and found.labels is None:
        raise DataError(
            f"{name}: given: it has no labels: put images into a folder for each class, or name "
            "a column of a table 'label'"
        )
    data = Dataset(
        found.x,
        name=name,
        preprocess=preprocess,
        labels=found.labels,
        label_names=found.label_names,
        ids=found.ids,
        official_test=found.official_test,
        official_validation=found.official_validation,
        columns=found.columns,
        given=found.given,
        skipped=found.skipped,
        notes=found.notes,
        hashes=_Hashes(found.x, found.hashes),
    )
    if found.usable is not None:
        rows = np.flatnonzero(found.usable)
        data = replace(data, ids=data.ids or tuple(map(str, range(len(data))))).subset(rows)
    for file in files:
        data = attach(data, file, allow_constant=allow_constant)
    return data


def _check_levels(x: np.ndarray | LazyImages, bits: int, where: str) -> None:
    """Refuse images whose levels were reduced already: reducing them again would leave black."""
    high = 0
    for example in x if bits < 8 and len(x) > 1 else ():
        high = max(high, int(example.max()))
        if high >= 2**bits:
            return
    if high:
        raise DataError(
            f"{where}: levels run from 0 to {high} only, and {bits} bits are cut from levels "
            f"0..255: multiply them by {255 // (2**bits - 1)}, or keep 8 bits"
        )


def identity(source: str | Path) -> str:
    """What identifies a source: its name, its URL without the query, or its resolved path.

    >>> identity("digits")
    'digits'
    >>> identity("a/../b.npy") == str(Path("b.npy").resolve())
    True
    """
    if isinstance(source, str) and source in readers.BUILT_IN:
        return source
    if readers.is_url(source):
        return readers.plain(source)
    return str(Path(source).expanduser().resolve())


def digest(dataset: Dataset) -> str:
    """A hash of all examples, labels and what is given with them, in order.

    A run stores it, to recognize its own data.
    """
    state = blake2b(dataset.content().astype("<u8").data, digest_size=16)
    if dataset.labels is not None:
        state.update(np.ascontiguousarray(dataset.labels).data)
    for name in sorted(dataset.given):
        state.update(f"\0{name}\0".encode() + dataset.given[name].content())
    return state.hexdigest()
