"""Data: what a source holds, how its examples are treated, and which of them a step sees.

`load` answers with a `Dataset` that keeps the examples as they were found: in memory, or on disk
where they take too much of it, memory-mapped or decoded when asked for. `Dataset.take` treats the
ones asked for as its `Preprocess` says. Batches, binarization noise and the held-out split are
pure functions of seeds, steps and content: no state to save, no order of files to depend on,
nothing drawn from a global generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from functools import lru_cache
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np

from musigma.data import readers
from musigma.data.given import Given
from musigma.data.readers import DataError, LazyImages, Progress
from musigma.spec import Spec, Variable

__all__ = [
    "DataError",
    "Dataset",
    "Given",
    "Part",
    "Preprocess",
    "Progress",
    "batch_indices",
    "describe",
    "digest",
    "identity",
    "load",
]

Binarize = Literal["threshold", "dynamic"]
Part = Literal["all", "train", "validation", "held-out"]
NOISE, ORDER, REDRAW = 0, 1, 2  # streams of random numbers that share a seed


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How images are treated, kept with a model so that new data meet it as the training data did.

    Args:
        size: Bring images to so many pixels: a square, or (height, width). They are scaled,
            antialiased, until they cover it, and what stands over is cut off evenly.
        bits: Levels per channel are 2^bits: level x becomes floor(x / 2^(8 - bits)).
        binarize: One bit instead: x >= 128 ("threshold"), or drawn afresh with probability x / 255
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
        object.__setattr__(self, "size", size)  # one form of each: squares are numbers
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
        """Height and width of what images are brought to, if they are."""
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
    """Examples of one shape, with what is known about each.

    Args:
        array: uint8 levels 0..255 of shape (N, C, H, W), or float32 (N, D), before any treatment;
            perhaps memory-mapped, or images that are decoded when they are indexed; shared by all
            subsets.
        rows: Which rows of `array` this set holds, in its order; None for all.
        name: The source as it was given.
        preprocess: What `take` does to images; `size` has been applied to `array` already.
        labels: int64 (N,), indices into `label_names`.
        label_names: What the labels are called.
        ids: A name for each example, its file name for instance.
        official_test: True where the source itself sets an example aside for testing.
        official_validation: True where it sets one aside to choose by.
        columns: Names of a table's columns.
        given: What each example comes with besides its label, by name: what a model can be
            conditioned on.
        skipped: Names of files that could not be used and were left out.
        notes: What the user should know of how the data were read.
        hashes: Of the rows of `array`: found out once, and shared by all subsets.

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
    skipped: tuple[str, ...] = ()
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
            return _binarized(x, seed, step, first * prod(self.shape))
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
                f"{self.name or 'array'}: {readers.listed(self.columns, constant)} "
                f"{'are' if len(constant) > 1 else 'is'} constant in the {done} rows to train on, "
                "where the density is infinite: drop it, or give more data"
            )
        return mean, std

    def subset(self, which: Sequence[int] | np.ndarray) -> Dataset:
        """The examples of a mask or of indices, in that order; no example is copied."""
        keep = np.arange(len(self))[which] if len(which) else np.empty(0, np.int64)
        kept = {
            name: None if (value := getattr(self, name)) is None else value[keep]
            for name in ("labels", "official_test", "official_validation")
        }
        return replace(
            self,
            rows=keep if self.rows is None else self.rows[keep],
            ids=None if self.ids is None else tuple(self.ids[i] for i in keep),
            given={name: given.subset(keep) for name, given in self.given.items()},
            **kept,
        )

    def split(self, part: Part, fraction: float = 0.1) -> Dataset:
        """A part of the data: to train on, to choose weights by, or held out until the end.

        A source's own test part is what is held out, and its own validation part is for that.
        Where there is none, each example is held out with probability `fraction` by a hash of its
        content; half as many of the others are for validation, by the same hash. So whatever the
        order of the files, an example and its duplicates fall on the same side.
        """
        if part not in get_args(Part):
            raise DataError(f"part is {part!r}: give {', '.join(get_args(Part))}")
        if not 0 < fraction < 1:
            raise DataError(f"fraction is {fraction}: give a number between 0 and 1")
        if part == "all":
            return self
        hashes, held = self.content(), self.official_test
        if held is None or held.all() or not held.any():
            held = self._below(hashes, fraction, above=2)
        if part == "held-out":
            return self.subset(held)
        rest, own = ~held, self.official_validation
        if own is None or own[rest].all() or not own[rest].any():
            rest[rest] = self._below(hashes[rest], 1 - fraction / 2)
        else:
            rest &= ~own
        return self.subset(rest if part == "train" else ~(held | rest))

    def content(self) -> np.ndarray:
        """64 bits of BLAKE2b of each example's content before `preprocess`, uint64 (N,)."""
        assert self.hashes is not None  # `__post_init__` has seen to it
        return self.hashes.of(self.rows)

    def _below(self, hashes: np.ndarray, fraction: float, *, above: int = 1) -> np.ndarray:
        """Which hashes lie below a cut: in tiny sets one at least, and `above` that do not."""
        distinct = np.unique(hashes)
        if len(distinct) < 1 + above:
            kind = "no examples" if not len(distinct) else f"only {len(distinct)} different ones"
            raise DataError(
                f"{self.name or 'array'}: cannot be split, it holds {kind} to share out: give "
                "more data, or take part 'all'"
            )
        cut = np.searchsorted(distinct, np.uint64(int(fraction * 2**64)))
        return hashes < distinct[min(max(int(cut), 1), len(distinct) - above)]


class _Hashes:
    """Hashes of the rows of an array, computed when they are first asked for."""

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
    skip_bad: bool = False,
    allow_constant: bool = False,
    in_memory: bool | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set from a path, a URL, or by its name.

    Understood are folders and archives (tar, zip) of images, MNIST's IDX files and CIFAR batches,
    `.npy`, `.npz`, `.csv`, `.parquet`, folders of tar or parquet files or a pattern of them
    (`shards-{0000..0099}.tar`), all of these by a URL that fsspec knows, and the names `digits`,
    `mnist-5k`, `mnist`, `fashion-mnist`, `cifar10`, `two-moons`, `checkerboard` and
    `eight-gaussians`. A name wins over a file of the same name, which is written `./mnist`.
    Published sets are looked for in `$MUSIGMA_DATA`, in `/usr/share/datasets` and in the user's
    cache, and downloaded into that
    cache otherwise.

    Args:
        source: A path, a URL or a name.
        preprocess: How images are treated.
        skip_bad: Leave images out that cannot be used, and name them in `Dataset.skipped`.
        allow_constant: Take tables with constant columns: harmless for scoring, where the model
            is given, and fatal for training, where the density in them is infinite.
        in_memory: Whether examples are read into memory. By default those are that take at most a
            quarter of it (divided by the processes of a `torchrun` on this machine); others stay
            on disk, and the user's cache keeps what is known of them. `.npy` files stay there
            anyway, unless this is True; `.npz`, `.csv` and IDX files never do.
        progress: Called with (done, total) as examples are read (of a URL, MiB).

    Raises:
        DataError: The data cannot be used as they are; the message says what to do.

    >>> data = load("two-moons")
    >>> data.shape, data.bits, sum(len(data.split(p)) for p in ("train", "validation", "held-out"))
    ((2,), None, 20000)
    """
    found = readers.read(
        source,
        size=preprocess.pixels,
        allow_constant=allow_constant,
        skip_bad=skip_bad,
        in_memory=in_memory,
        progress=progress,
    )
    name = readers.plain(source) if readers.is_url(source) else str(source)
    if found.x.dtype == np.uint8:
        _check_levels(found.x, preprocess.levels_bits, name)
    return Dataset(
        found.x,
        name=name,
        preprocess=preprocess,
        labels=found.labels,
        label_names=found.label_names,
        ids=found.ids,
        official_test=found.official_test,
        official_validation=found.official_validation,
        columns=found.columns,
        skipped=found.skipped,
        notes=found.notes,
        hashes=_Hashes(found.x, found.hashes),
    )


def _check_levels(x: np.ndarray | LazyImages, bits: int, where: str) -> None:
    """Stop at images whose levels seem to be reduced already: reducing them again leaves black."""
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
    """What makes two sources the same one: the name, the URL without its query, or the path.

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

    A run stores it, to recognise its own data.
    """
    state = blake2b(dataset.content().astype("<u8").data, digest_size=16)
    if dataset.labels is not None:
        state.update(np.ascontiguousarray(dataset.labels).data)
    for name in sorted(dataset.given):
        state.update(f"\0{name}\0".encode() + dataset.given[name].content())
    return state.hexdigest()


def describe(dataset: Dataset) -> dict[str, Any]:
    """A summary that JSON can hold.

    >>> describe(Dataset(np.zeros((3, 2), np.float32), name="points"))["shape"]
    [2]
    """
    labels = None
    if dataset.labels is not None:
        count = Counter(dataset.labels.tolist())
        labels = {name: count[i] for i, name in enumerate(dataset.label_names)}
    return {
        "name": dataset.name,
        "n": len(dataset),
        "shape": list(dataset.shape),
        "bits": dataset.bits,
        "preprocess": dataset.preprocess.to_json(),
        "labels": labels,
        "columns": list(dataset.columns),
        "given": {
            variable.name: {"shape": list(variable.shape), "names": list(variable.names)}
            for variable in dataset.variables
            if variable.name in dataset.given
        },
        "skipped": list(dataset.skipped),
    }


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Indices of batch `step`: a pure function, so a resumed run sees what it would have seen.

    The steps walk through an endless sequence of permutations of range(n), one per epoch; a batch
    may end one epoch and begin the next, so every example is seen once in each.

    >>> batches = [batch_indices(5, 2, seed=0, step=step) for step in range(5)]
    >>> sorted(np.concatenate(batches).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    for what, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise DataError(f"{what} is {value}: give a whole number from {least}")
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = [
        _permutation(n, seed, epoch)[max(start - epoch * n, 0) : stop - epoch * n]
        for epoch in range(start // n, (stop - 1) // n + 1)
    ]
    return np.concatenate(pieces)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation from Philox's raw words, which no version of NumPy may change."""
    return np.argsort(_philox(seed, epoch, ORDER).random_raw(n), kind="stable")


def _philox(seed: int, step: int, stream: int, block: int = 0) -> np.random.Philox:
    """Random words by their place in a stream: a block holds four."""
    key = np.array([seed % 2**64, step % 2**64], np.uint64)
    return np.random.Philox(key=key, counter=np.array([block, 0, 0, stream], np.uint64))


def _binarized(x: np.ndarray, seed: int, step: int, start: int) -> np.ndarray:
    """One with probability x / 255, exactly, by the random bytes from place `start` of a step.

    A byte below 255 is uniform on 0..254, so comparing it to x is all there is to do; one in 256
    is not, and is drawn anew from a hash (SplitMix64; Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", 2014) of its place.
    """
    block, skip = divmod(start, 32)
    words = _philox(seed, step, NOISE, block).random_raw((skip + x.size + 7) // 8)
    noise = words.astype("<u8", copy=False).view(np.uint8)[skip : skip + x.size]
    levels = x.reshape(-1)
    ones = noise < levels
    again = np.flatnonzero((noise == 255) & (levels > 0))
    if len(again):
        key = _philox(seed, step, REDRAW).random_raw(1)
        z = key + (again + start).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        ones[again] = (z ^ (z >> np.uint64(31))) % np.uint64(255) < levels[again]
    return ones.view(np.uint8).reshape(x.shape)
