"""Data sets: `Dataset` gives the examples of a source as a model sees them.

A data set keeps its examples as they were read: in memory, or on disk if they do not
fit, where they are memory-mapped or decoded when they are indexed. `Dataset.take` preprocesses
those that are asked for. The split into parts is a function of the content, and of the parts that
the source itself defines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import numpy as np

from musigma.data.errors import DataError, called, listing, named, printable
from musigma.data.raw import content_hashes
from musigma.data.sampling import PARTS, Part, binarized, parts, perturbed
from musigma.data.sequences import unusable
from musigma.schema import Schema
from musigma.spec import Spec, Variable
from musigma.support import Support

if TYPE_CHECKING:
    from musigma.data.readers import LazyImages

__all__ = ["Dataset", "Given", "Hashes", "Part", "Preprocess", "digest"]

Binarize = Literal["threshold", "dynamic"]

BLOCK = 1 << 16
"""Rows that are compared with a support at once."""
NAMED = 3
"""Rows that are named in each column that has some outside."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How images are preprocessed; saved with a model, to prepare new data in the same way.

    Args:
        size: Pixels to resize images to: a square, or (height, width). Images are scaled,
            antialiased, until they cover it, and cropped centrally.
        bits: Bits of each channel: level x becomes floor(x / 2^(8 - bits)).
        binarize: One bit instead: x >= 128 ("threshold"), or a new draw with probability x / 255
            each time an example is taken ("dynamic").
        perturb: Probability that an element is replaced by a uniform draw from all levels, before
            it loses bits, anew each time an example is taken: the training data of a background
            model (Ren et al., "Likelihood Ratios for Out-of-Distribution Detection", 2019,
            arXiv:1906.02845).

    >>> Preprocess(binarize="dynamic").levels_bits
    1
    >>> Preprocess.from_json(Preprocess(size=32, bits=5).to_json())
    Preprocess(size=32, bits=5, binarize=None, perturb=0.0)
    >>> Preprocess(size=(48, 64)).pixels
    (48, 64)
    """

    size: int | tuple[int, int] | None = None
    bits: int = 8
    binarize: Binarize | None = None
    perturb: float = 0.0

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
        if not (isinstance(self.perturb, (int, float)) and 0 <= self.perturb < 1):
            raise DataError(f"perturb is {self.perturb!r}: give a probability from 0 to below 1")

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

    @property
    def is_drawn(self) -> bool:
        """Whether `Dataset.take` draws what it returns, by its seed and its step."""
        return self.binarize == "dynamic" or self.perturb > 0

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back; it names `perturb` where there is any."""
        plain = asdict(self)
        if not self.perturb:
            del plain["perturb"]
        return plain

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
class Given:
    """A context variable of a data set: one row for each example.

    Args:
        values: int64 (N,), indices into `names`; float32 (N,) or (N, F), finite; float32
            (N, M, F), sequences of up to M rows of F numbers, where rows of NaN follow the last
            row of each; or uint8 levels 0..255 of shape (N, C, H, W), which may be decoded when
            they are indexed.
        names: Names of the classes; empty for numbers and images.

    Raises:
        DataError: If dtype, shape or values are not as above.

    >>> Given(np.array([1, 0, 1]), names=("cat", "dog")).variable("pet")
    Variable(name='pet', shape=(2,), classes=2, names=('cat', 'dog'), levels=None)
    """

    values: np.ndarray = field(repr=False)
    names: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(map(str, self.names)))
        values, kind = self.values, (self.values.dtype, self.values.ndim)
        if self.names:
            if kind != (np.int64, 1):
                raise DataError(
                    f"values are {values.dtype} of shape {values.shape} with {len(self.names)} "
                    "class names: give int64 (N,), indices into the names"
                )
            low, high = (int(f(values, initial=0)) for f in (np.min, np.max))
            if low < 0 or high >= len(self.names):
                raise DataError(
                    f"values run from {low} to {high}, and there are {len(self.names)} class "
                    "names: give indices into the names, from 0"
                )
        elif kind not in (*((np.float32, axes) for axes in (1, 2, 3)), (np.uint8, 4)):
            raise DataError(
                f"values are {values.dtype} of shape {values.shape}: give float32 (N,), (N, F) "
                "or (N, M, F), uint8 (N, C, H, W), or int64 (N,) with the names of the classes"
            )
        elif values.dtype == np.float32 and (bad := unusable(values)).any():
            what = "" if values.ndim < 3 else ", or sequences have no row,"
            raise DataError(
                f"values are not finite{what} in {bad.sum()} rows, the first of them "
                f"{bad.argmax()} (from 0): drop or fill these rows"
            )

    @classmethod
    def of_text(cls, cells: Sequence[str] | np.ndarray) -> Given:
        """Text as classes, sorted by name."""
        names, codes = np.unique(
            [printable(str(cell).strip()) for cell in cells], return_inverse=True
        )
        return cls(codes.astype(np.int64), tuple(names.tolist()))

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, rows: np.ndarray) -> Given:
        """The rows at these indices; images that are decoded when indexed stay on disk."""
        if self.values.dtype != np.uint8:
            return replace(self, values=self.values[rows])
        return replace(self, values=_Rows.of(self.values, rows))

    def variable(self, name: str) -> Variable:
        """How a model describes it."""
        levels = 256 if self.values.dtype == np.uint8 else None
        return Variable(name, self.values.shape[1:], names=self.names, levels=levels)

    def content(self) -> bytes:
        """The bytes that a digest covers: the names and every value."""
        values = self.values
        if values.dtype == np.uint8:
            values = content_hashes((values[i] for i in range(len(values))), len(values))
        elif values.ndim == 3:  # NaN have signs
            values = np.where(np.isnan(values), np.float32(np.nan), values)
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        return "\0".join([*self.names, ""]).encode() + little.tobytes()


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of images that lie on disk, without reading any."""

    array: Any
    rows: np.ndarray

    dtype, ndim = np.dtype(np.uint8), 4

    @classmethod
    def of(cls, array: Any, rows: np.ndarray) -> Any:
        """The rows of an array, or of rows of one."""
        return cls(array.array, array.rows[rows]) if isinstance(array, cls) else cls(array, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[self.rows[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples of one shape, with labels, names and context.

    Args:
        array: uint8 levels 0..255 of shape (N, C, H, W), or float32 (N, D), before preprocessing;
            with a schema, float64 (N, D). It may be memory-mapped, or decode images when they are
            indexed; all subsets share it.
        rows: The rows of `array` that belong to this set, in its order; None: all.
        name: The source as it was given.
        preprocess: How `take` processes images; `size` has been applied to `array` already.
        labels: int64 (N,), indices into `label_names`; -1 where it is not known.
        label_names: Names of the classes.
        ids: A name for each example, its file name for instance.
        official_test: True for examples that the source itself reserves for testing.
        official_validation: True for examples that the source itself reserves for validation.
        columns: Names of the columns of a table.
        schema: Their types, if they are typed (`musigma.schema`).
        support: The set in which all rows lie, if it is known (`within`).
        counts: Whether rows of a table are modeled as counts, so that equal values are no fault.
        given: Further context of each example, by name: what a model can be conditioned on.
        skipped: Reasons why examples were left out, by name.
        notes: Notes for the user about how the data were read.
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
    schema: Schema | None = None
    support: Support | None = None
    counts: bool = False
    given: Mapping[str, Given] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hashes: Hashes | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.hashes is None or self.hashes.array is not self.array:
            object.__setattr__(self, "hashes", Hashes(self.array))
        kind = self.array.dtype, self.array.ndim
        if kind not in ((np.uint8, 4), (np.float32, 2)) and (
            self.schema is None or kind != (np.float64, 2)
        ):
            raise DataError(
                f"array is {self.array.dtype} of shape {self.array.shape}: give uint8 "
                "(N, C, H, W), float32 (N, D), or float64 (N, D) with a schema"
            )
        if self.schema is not None and self.shape != (len(self.schema),):
            raise DataError(
                f"schema: expected one of {self.array.shape[-1]} columns; got {len(self.schema)}"
            )
        if self.bits is None and self.preprocess != UNTOUCHED:
            settings, usual = asdict(self.preprocess), asdict(UNTOUCHED)
            changed = [f"{key}={settings[key]!r}" for key in usual if settings[key] != usual[key]]
            raise DataError(
                f"{self.name or 'array'}: is a table, and {' and '.join(changed)} is for images: "
                "leave it out"
            )
        for what in ("labels", "ids", "official_test", "official_validation"):
            value = getattr(self, what)
            if value is not None and len(value) != len(self):
                raise DataError(f"{what} has {len(value)} entries for {len(self)} examples")
        for name, given in self.given.items():
            if (n := len(given)) != len(self):
                raise DataError(
                    f"given: {name!r} has {n} rows for {len(self)} examples: give one for each"
                )
        if self.labels is not None and "label" in self.given:
            raise DataError("given: 'label' already names the labels: choose another name")

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
        """The `Spec` of a model of these data, conditioned on the named variables.

        Its schema, if the columns are typed, is measured on the training part.

        Raises:
            DataError: If there is no such variable.
        """
        known = {variable.name: variable for variable in self.variables}
        if missing := [name for name in context if name not in known]:
            raise DataError(
                f"context: {self.name or 'array'} has no {', '.join(missing)}: give "
                f"{', '.join(known) or 'none, since it has no labels and no other context'}"
            )
        levels = None if self.bits is None else 2**self.bits
        schema = self.schema
        if schema is not None:
            schema = schema.measure(self.split("train").x)
        variables = tuple(known[name] for name in context)
        return Spec(self.shape, levels, self.columns, variables, schema, self.support)

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        step: int = 0,
        first: int = 0,
    ) -> np.ndarray:
        """The examples at `indices` as a model sees them: uint8 levels from 0, or numbers.

        Perturbation and dynamic binarization are pure functions of (seed, step, position); the
        positions count from `first`, so a batch can be taken in parts:

        >>> levels = np.full((4, 1, 2, 2), 99, np.uint8)
        >>> data = Dataset(levels, preprocess=Preprocess(binarize="dynamic"))
        >>> whole = data.take([0, 1, 2, 3], seed=5)
        >>> bool((whole[3:] == data.take([3], seed=5, first=3)).all())
        True
        """
        index = np.asarray(indices) if len(indices) else np.empty(0, np.int64)
        rows = index if self.rows is None else self.rows[index]
        x, start = np.ascontiguousarray(self.array[rows]), first * prod(self.shape)
        if self.preprocess.perturb:
            x = perturbed(x, self.preprocess.perturb, seed, step, start)
        if self.preprocess.binarize == "dynamic":
            return binarized(x, seed, step, start)
        return x if self.bits in (None, 8) else x >> np.uint8(8 - self.bits)

    def moments(
        self, of: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every column over these rows, float64 (D,) each.

        Args:
            of: A function of rows (n, D) to rows (n, D') whose moments are wanted instead.

        Raises:
            DataError: If these are images, or a column is constant: its density is infinite.
        """
        if self.bits is not None:
            raise DataError(f"{self.name or 'array'}: holds images, which have no columns")
        n, step = max(1, len(self)), max(1, (1 << 22) // prod(self.shape))

        def total(term: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            parts = np.split(np.arange(len(self)), range(step, len(self), step))
            rows = (self.take(part) for part in parts)
            return sum(
                (term((x if of is None else of(x)).astype(np.float64)).sum(0) for x in rows),
                np.zeros(self.shape if of is None else ()),
            )

        mean = total(lambda x: x) / n
        std = np.sqrt(total(lambda x: (x - mean) ** 2) / n)
        if of is None and len(constant := np.flatnonzero(std == 0)):
            names = named([called(self.columns, j) for j in constant.tolist()])
            verb = "are" if len(constant) > 1 else "is"
            raise DataError(
                f"{self.name or 'array'}: {names} {verb} constant in the {len(self)} rows to "
                "train on, where the density is infinite: drop it, or give more data"
            )
        return mean, std

    def outside(self, support: Support) -> tuple[int, dict[str, str]]:
        """The number of rows outside a support; and by column, what is expected and what is there.

        Raises:
            DataError: If these are no vectors of real numbers of its size.
        """
        if self.array.dtype != np.float32 or self.shape != (len(support),):
            raise DataError(
                f"bounds: they are of {len(support)} columns of real numbers, and "
                f"{self.name or 'array'} holds {self.array.dtype} of shape {self.shape}"
            )
        first: dict[int, list[str]] = {}
        counts, bad = np.zeros(len(support), np.int64), 0
        for start in range(0, len(self), BLOCK):
            x = self.take(np.arange(start, min(start + BLOCK, len(self))))
            out = ~support.inside(x.astype(np.float64))
            counts, bad = counts + out.sum(0), bad + int(out.any(1).sum())
            for j in np.flatnonzero(out.any(0)).tolist():
                seen = first.setdefault(j, [])
                rows = np.flatnonzero(out[:, j])[: NAMED - len(seen)].tolist()
                seen += [f"{self._row(start + i)}: {support.found(x[i], j)}" for i in rows]
        faults = {}
        for j, seen in sorted(first.items()):
            more = f" and {counts[j] - NAMED:,} more" if counts[j] > NAMED else ""
            faults[called(self.columns, j)] = (
                f"is to be {support.expected(j, self.columns)}; {', '.join(seen)}{more}"
            )
        return bad, faults

    def not_counts(self) -> str:
        """The first element that is no count 0, 1, 2, ...; empty if all are."""
        step = max(1, (1 << 22) // prod(self.shape))
        for start in range(0, len(self), step):
            x = self.take(np.arange(start, min(start + step, len(self)))).astype(np.float64)
            bad = np.argwhere((x < 0) | (x != np.floor(x)))
            if len(bad):
                i, j = bad[0][0], bad[0][1:]
                where = called(self.columns, int(j[0])) if len(j) == 1 else f"element {tuple(j)}"
                return f"{self._row(start + int(i))}, {where} is {x[tuple(bad[0])]:g}"
        return ""

    def within(self, support: Support) -> Dataset:
        """These rows, once it is known that all of them lie in a support.

        Raises:
            DataError: If some lie outside, naming columns, numbers of rows and the first of them;
                or these are no vectors of real numbers of its size.
        """
        bad, faults = self.outside(support)
        if bad:
            raise DataError(
                f"{self.name or 'array'}: {bad:,} of {len(self):,} rows are outside the bounds; "
                f"correct the bounds, or drop these rows:\n{listing(faults)}"
            )
        return replace(self, support=support)

    def _row(self, i: int) -> str:
        """The name of a row in messages."""
        if self.ids is not None:
            return f"row {self.ids[i]!r}"
        return f"row {i if self.rows is None else self.rows[i]} (from 0)"

    def subset(self, which: Sequence[int] | np.ndarray) -> Dataset:
        """The examples of a mask or of indices, in that order; no example is copied."""
        rows = np.arange(len(self))[which] if len(which) else np.empty(0, np.int64)
        arrays = {
            name: value[rows]
            for name in ("rows", "labels", "official_test", "official_validation")
            if (value := getattr(self, name)) is not None
        }
        return replace(
            self,
            ids=None if self.ids is None else tuple(self.ids[i] for i in rows),
            given={name: given.subset(rows) for name, given in self.given.items()},
            **{"rows": rows, **arrays},
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


class Hashes:
    """Hashes of the rows of an array, computed when they are first needed."""

    def __init__(self, array: np.ndarray | LazyImages, known: np.ndarray | None = None):
        self.array, self.known = array, known

    def of(self, rows: np.ndarray | None) -> np.ndarray:
        """The hashes of some rows, or of all."""
        if self.known is None and rows is None:
            self.known = content_hashes(self.array, len(self.array))
        if self.known is None:
            assert rows is not None
            return content_hashes((self.array[row] for row in rows), len(rows))
        return self.known if rows is None else self.known[rows]


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
