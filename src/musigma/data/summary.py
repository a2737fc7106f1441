"""A description of a data set, and of likely mistakes in it, as JSON and as lines of text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from musigma.data.dataset import Dataset
from musigma.data.errors import SHOWN, called, named, printable
from musigma.data.ranges import numeric
from musigma.data.sampling import PARTS, different
from musigma.data.tables import text_of
from musigma.data.times import DAY, ISO, written
from musigma.schema import Column

__all__ = ["column_lines", "describe", "described", "summary"]

SAMPLE = 10_000  # rows that are examined for doubtful columns, and for values that many share
COLUMNS = 100  # typed columns that are described, one a line
LEVELS = 6  # levels that are shown
SPIKE = 0.05  # share of the rows that have a value that is shown
IMAGES = 64  # images that are examined for doubtful levels
CODE = re.compile(r"-?9{2,}(\.9+)?|-?8{3,}|-1|-?\d(\.\d+)?e\+[2-9]\d|-32768|-?32767|-2147484000")
DEPENDENT = 2000  # rows among which columns that depend on others are looked for
LINEAR = 1e-4  # share of a column's standard deviation that is rounding
CLASSES = 12  # classes that a summary counts one by one


def describe(dataset: Dataset, parts: Mapping[str, Dataset] | None = None) -> dict[str, Any]:
    """A description that JSON can hold; with `parts`, it counts the classes in each.

    >>> describe(Dataset(np.zeros((3, 2), np.float32), name="points"))["shape"]
    [2]
    """
    description = {
        "name": dataset.name,
        "n": len(dataset),
        "shape": list(dataset.shape),
        "bits": dataset.bits,
        "preprocess": dataset.preprocess.to_json(),
        "labels": _count(dataset),
        "columns": list(dataset.columns),
        "given": {
            variable.name: {"shape": list(variable.shape), "names": list(variable.names)}
            for variable in dataset.variables
            if variable.name in dataset.given
        },
        "skipped": dict(dataset.skipped),
        "notes": list(dataset.notes),
    }
    if dataset.schema is not None:
        description["schema"] = described(dataset)
    if parts is not None:
        description["parts"] = {
            name: {"n": len(part), "labels": _count(part)} for name, part in parts.items()
        }
        description["warnings"] = list(doubts(dataset, parts))
    return description


def summary(dataset: Dataset, parts: Mapping[str, Dataset] | None = None) -> list[str]:
    """Lines that describe the data: examples by class and part, and what was left out.

    Args:
        dataset: All of the data.
        parts: The parts by their names; None: as `Dataset.split` gives them.

    >>> data = Dataset(np.arange(20, dtype=np.float32)[:, None] % 7, name="x.npy")
    >>> for line in summary(data):
    ...     print(line)
    x.npy: 20 rows of 1 column
    parts: 11 train, 3 validation, 6 held-out (by a hash of the content)
    13 examples are duplicates; equal examples are in the same part
    """
    if parts is None:
        parts = {name: dataset.split(name) for name in PARTS}  # pyright: ignore
    lines = [_contents(dataset)]
    if dataset.schema is not None:
        known = column_lines(dataset)
        lines += [f"  {line}" for line in known[:COLUMNS]]
        lines += [f"  and {len(known) - COLUMNS} more columns"] if len(known) > COLUMNS else []
    if parts:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        lines.append(f"parts: {sizes} ({_origin(dataset)})")
    if dataset.labels is not None:
        lines.append(_classes(dataset, parts))
    if (support := dataset.support) is not None:
        within = (
            f"{name} {expected}"
            for j, name in enumerate(dataset.columns)
            if (expected := support.expected(j, dataset.columns)) != "any number"
        )
        lines.append(f"support: {'; '.join(within)}")
    if dataset.given:
        kinds: dict[str, list[str]] = {}
        for variable in dataset.variables:
            if variable.name != "label":
                kinds.setdefault(_variable(variable), []).append(variable.name)
        lines.append(f"context: {'; '.join(f'{named(v, 20)} ({k})' for k, v in kinds.items())}")
    if skipped := list(dataset.skipped.items()):
        lines.append(f"left out: {len(skipped)} that cannot be used")
        lines += [f"  {name} {reason}" for name, reason in skipped[:SHOWN]]
        lines += [f"  and {len(skipped) - SHOWN} more"] if len(skipped) > SHOWN else []
    lines += dataset.notes
    repeated = len(dataset) - len(different(dataset.content()))
    if repeated and dataset.official_test is None:
        lines.append(f"{repeated} examples are duplicates; equal examples are in the same part")
    return lines + [f"warning: {text}" for text in doubts(dataset, parts)]


def described(dataset: Dataset) -> list[dict[str, Any]]:
    """What each typed column holds, as JSON can hold it.

    >>> from musigma.schema import Schema
    >>> rows = np.array([[0, 0.5], [0, 1.5], [1, np.nan], [1, 1.5]])
    >>> schema = Schema([Column("paid", "boolean", ("no", "yes")), Column("x", step=0.5)])
    >>> described(Dataset(rows, schema=schema))[1]["missing"]
    0.25
    """
    assert dataset.schema is not None
    n, rows = len(dataset), slice(None) if dataset.rows is None else dataset.rows
    found = []
    for j, column in enumerate(dataset.schema.columns):
        values = np.asarray(dataset.array[rows, j])  # pyright: ignore
        present = values[~np.isnan(values)]
        about: dict[str, Any] = {"name": column.name, "kind": column.kind}
        about["missing"] = 1 - len(present) / max(n, 1)
        if column.has_levels:
            about["levels"] = list(column.levels)
        elif len(present):
            about["low"], about["high"] = (
                _value(x, column) for x in (present.min(), present.max())
            )
            some = present[np.linspace(0, len(present) - 1, min(len(present), SAMPLE)).astype(int)]
            different, counts = np.unique(some, return_counts=True)
            spikes = np.flatnonzero(counts >= max(SPIKE * len(some), 2))
            spikes = spikes[np.argsort(-counts[spikes])][:3]
            about["spikes"] = {
                text_of(_value(float(different[i]), column)): float(counts[i] / len(some))
                for i in spikes.tolist()
            }
        if column.kind == "continuous":
            about["step"], about["rounded"] = column.step, column.rounded
        found.append(about)
    return found


def _value(x: float, column: Column) -> float | str:
    """A value as people write it."""
    if column.kind not in ("date", "datetime"):
        return float(x)
    day = column.kind == "date"
    form = column.format or (ISO[0] if day else "%Y-%m-%d %H:%M:%S")
    return str(written(np.array([x * DAY if day else x]), form)[0])


def column_lines(dataset: Dataset) -> list[str]:
    """A line about each typed column: its name, its kind, and the values that it has.

    >>> from musigma.schema import Schema
    >>> rows = np.array([[0, 0.5], [0, 1.5], [1, np.nan], [1, 1.5]])
    >>> schema = Schema([Column("paid", "boolean", ("no", "yes")), Column("x", step=0.5)])
    >>> for line in column_lines(Dataset(rows, schema=schema)):
    ...     print(line)
    paid: boolean, no or yes
    x: continuous, 0.5 to 1.5 in steps of 0.5, 25% missing; 67% are 1.5
    """
    return [_line(about) for about in described(dataset)]


def _line(about: dict[str, Any]) -> str:
    kind, levels, text = about["kind"], about.get("levels", []), ""
    if kind == "boolean":
        text = f", {' or '.join(levels)}"
    elif "levels" in about:
        order = " < " if kind == "ordinal" else ", "
        more = f"{order}..." if len(levels) > LEVELS else ""
        text = f", {len(levels):,} levels: {order.join(map(printable, levels[:LEVELS]))}{more}"
    elif "low" in about:
        low, high = (
            x if isinstance(x, str) else f"{x:.7g}" for x in (about["low"], about["high"])
        )
        text = f", {low} to {high}"
    if about.get("step"):
        text += f" in steps of {about['step']:g}" + ", as probabilities" * about["rounded"]
    if about["missing"]:
        text += f", {100 * about['missing']:.2g}% missing"
    if spikes := about.get("spikes"):
        text += "; " + ", ".join(
            f"{100 * share:.2g}% are {value}" for value, share in spikes.items()
        )
    return f"{about['name']}: {kind}{text}"


def doubts(dataset: Dataset, parts: Mapping[str, Dataset]) -> Iterator[str]:
    """Likely mistakes."""
    train = parts.get("train", dataset)
    yield from _doubtful_labels(dataset, train)
    if dataset.schema is None and not dataset.counts:
        yield from _doubtful_columns(train) if dataset.bits is None else _doubtful_levels(train)
    if dataset.bits is None and not dataset.counts:
        yield from _doubtful_values(dataset, train)
    for column in dataset.schema.columns if dataset.schema is not None else ():
        if alike := _alike(column.levels):
            yield f"levels of column {column.name!r} differ in case or spaces only: {alike}"
    seen = different(train.content())
    for name, part in parts.items() if dataset.official_test is not None else ():
        again = int(np.isin(part.content(), seen).sum())
        if again and name != "train":
            yield f"{again} of {len(part)} {name} examples are also in the part to train on"


def _contents(dataset: Dataset) -> str:
    n, name = len(dataset), dataset.name or "data"
    if dataset.bits is None:
        width = dataset.shape[0]
        listed = dataset.columns and dataset.schema is None
        columns = f": {named(dataset.columns, 20)}" if listed else ":" * bool(dataset.schema)
        return f"{name}: {n} rows of {width} column{'s' * (width > 1)}{columns}"
    size = " x ".join(map(str, dataset.shape))
    preprocess = dataset.preprocess
    how = f", binarized ({preprocess.binarize})" if preprocess.binarize else ""
    how += f", {preprocess.perturb:.0%} of levels replaced" if preprocess.perturb else ""
    return f"{name}: {n} images of {size}, {dataset.bits} bit{'s' * (dataset.bits > 1)}{how}"


def _origin(dataset: Dataset) -> str:
    test, validation = dataset.official_test, dataset.official_validation
    official = [
        name
        for name, mask in (("held-out", test), ("validation", validation))
        if mask is not None and mask.any() and not mask.all()
    ]
    if not official:
        return "by a hash of the content"
    return f"{' and '.join(official)} as the source defines them"


def _count(dataset: Dataset) -> dict[str, int] | None:
    if dataset.labels is None:
        return None
    count = Counter(dataset.labels.tolist())
    return {name: count[i] for i, name in enumerate(dataset.label_names)}


def _classes(dataset: Dataset, parts: Mapping[str, Dataset]) -> str:
    counts = [count for part in (parts or {"": dataset}).values() if (count := _count(part))]
    each = [
        f"{name} {' / '.join(str(count[name]) for count in counts)}"
        for name in dataset.label_names[:CLASSES]
    ]
    more = len(dataset.label_names) - CLASSES
    order = f" ({' / '.join(parts)})" if parts else ""
    rest = f", and {more} more" if more > 0 else ""
    if dataset.labels is not None and (unknown := int((dataset.labels < 0).sum())):
        rest += f"; {unknown} without a label"
    return f"{len(dataset.label_names)} classes{order}: {', '.join(each)}{rest}"


def _variable(variable: Any) -> str:
    if variable.classes:
        return f"classes {named(variable.names)}"
    if variable.levels:
        return f"images {' x '.join(map(str, variable.shape))}"
    if len(variable.shape) == 2:
        most, features = variable.shape
        return f"up to {most} rows of {'one number' if features == 1 else f'{features} numbers'}"
    return "number" if variable.shape == (1,) else f"{variable.shape[0]} numbers"


def _doubtful_labels(dataset: Dataset, train: Dataset) -> Iterator[str]:
    if dataset.labels is None or train.labels is None:
        return
    n, classes = len(dataset), len(np.unique(dataset.labels))
    if n > 2 and classes == n:
        yield f"every example has a label of its own ({n}): these are probably not classes"
    elif classes > n / 2 and n > 4:
        yield f"there are {classes} classes of {n} examples: these are probably not classes"
    if alike := _alike(dataset.label_names):
        yield f"classes differ in case or spaces only: {alike}"
    there = set(train.labels.tolist())
    without = [name for i, name in enumerate(dataset.label_names) if i not in there]
    if without and classes <= n / 2:
        yield f"classes without an example to train on: {named(without, 10)}"


def _alike(names: Sequence[str]) -> str:
    """Names that differ in case, in spaces or in the encoding of accents only."""
    same: dict[str, list[str]] = {}
    for name in names:
        plain = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        same.setdefault(plain, []).append(repr(name))
    return named([" and ".join(group) for group in same.values() if len(group) > 1])


def _doubtful_values(dataset: Dataset, train: Dataset) -> Iterator[str]:
    """Codes of missing values, columns that follow from others, sums, and flattened images."""
    schema, n, numbers = dataset.schema, len(train), numeric(dataset)
    if n < 5:
        return
    names = [called(dataset.columns, j) for j in numbers]
    rows = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    x = np.asarray(train.take(rows), np.float64)[:, numbers]
    columns = zip(names, x.T, strict=True)
    if codes := [f"{name} ({text})" for name, values in columns if (text := _code(values))]:
        yield (
            f"values far from all others may stand for missing ones: {named(codes)}; leave such "
            "cells empty"
        )
    if dataset.rows is None and not isinstance(dataset.array, np.memmap) and numbers:
        every = np.asarray(dataset.array, np.float64)[:, numbers]
        if np.allclose(every[-1], np.nansum(every[:-1], 0), rtol=1e-5) and every[-1].any():
            yield "the last row is the sum of all others: remove it if it is a total"
    if schema is None and (found := _dependent(x, names)):
        yield (
            "columns follow from others, so a density is unbounded, and nats mean little: "
            f"{named(found)}"
        )
    if schema is None and (side := _side_of_images(x)):
        yield (
            f"rows look like images of {side} x {side} with levels of 8 bits: for images, give an "
            f"array of uint8 levels (N, C, {side}, {side})"
        )


def _code(column: np.ndarray) -> str:
    """A least or largest value like -999 that lies farther from all others than they spread."""
    values = different(column[np.isfinite(column)])
    if len(values) < 3:
        return ""
    for value, rest in ((values[0], values[1:]), (values[-1], values[:-1])):
        gap = min(abs(rest[0] - value), abs(rest[-1] - value))
        if gap > rest[-1] - rest[0] and CODE.fullmatch(f"{value:.7g}"):
            share = np.mean(column == value)
            return (
                f"{value:g} in {100 * share:.2g}% of the rows, others {rest[0]:g} to {rest[-1]:g}"
            )
    return ""


def _dependent(x: np.ndarray, names: Sequence[str]) -> list[str]:
    """The columns that are, but for rounding, linear functions of those before them."""
    some = x[:: max(1, len(x) // DEPENDENT)]
    std = some.std(0)
    kept: list[int] = np.flatnonzero(std > 0).tolist()
    if len(some) < 2 * len(kept) + 10 or len(kept) > DEPENDENT / 4:
        return []
    x = ((some - some.mean(0)) / np.where(std > 0, std, 1)).take(kept, 1)
    found, free = [], list[int]()
    size = np.abs(np.diag(np.linalg.qr(x, mode="r"))) / len(x) ** 0.5
    for j in range(len(kept)):
        if size[j] > LINEAR:
            free.append(j)
            continue
        weights = np.linalg.lstsq(x[:, free], x[:, j])[0]
        large = (np.abs(weights) > 10 * LINEAR).tolist()
        of = [names[kept[k]] for k, some in zip(free, large, strict=True) if some]
        found.append(f"{names[kept[j]]} from {named(of, 3)}")
    return found


def _side_of_images(x: np.ndarray) -> int:
    """The side of square images whose levels 0..255, or 0..1, rows seem to hold; 0 if none."""
    width = x.shape[1]
    side = next((s for c in (1, 3) if c * (s := math.isqrt(width // c)) ** 2 == width), 0)
    if side < 8 or x.min() < 0 or x.max() > 255:
        return 0
    levels = x * (255 if x.max() <= 1 else 1)
    return side if np.abs(levels - np.rint(levels)).max() < 1e-2 and x.max() in (1, 255) else 0


def _doubtful_columns(train: Dataset) -> Iterator[str]:
    """Columns with many equal values, for which a continuous density is unbounded."""
    n, found = len(train), []
    rows = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    for j, column in enumerate(train.take(rows).T) if n >= 20 else ():
        values, counts = np.unique(column, return_counts=True)
        share = counts.max() / len(rows)
        if share > 0.1:
            what = f"{values[counts.argmax()]:g} in {100 * share:.3g}% of the rows"
            found.append(f"{called(train.columns, j)} ({what})")
    if found:
        yield (
            "columns with many equal values, for which a continuous density is unbounded, so "
            f"nats mean little: {named(found)}"
        )


def _doubtful_levels(train: Dataset) -> Iterator[str]:
    """Levels of fewer bits than they are read with, and constant channels."""
    if not len(train):
        return
    rows = np.linspace(0, len(train) - 1, min(len(train), IMAGES)).astype(np.int64)
    x, bits = train.take(rows), train.bits or 8
    levels = np.unique(x)
    if bits == 8 and 2 <= len(levels) <= 16 and levels[-1] < 16:
        option = "--binarize threshold" if levels[-1] == 1 else "--bits"
        yield (
            f"levels run from 0 to {levels[-1]} only, and are read as those of 8 bits, 0..255: "
            f"multiply them by {255 // int(levels[-1])}, and pass {option}"
        )
    elif bits > 1 and len(levels) == 2:
        yield (
            f"images hold only the levels {levels[0]} and {levels[1]}: --binarize threshold makes "
            "them 1 bit"
        )
    low, high = x.min((0, 2, 3)), x.max((0, 2, 3))
    constant = [f"{c} (always {low[c]})" for c in np.flatnonzero(low == high)]
    if constant:
        yield f"channels without content: {', '.join(constant)}"
