"""The columns of a table as a schema, and its rows as numbers and back.

`infer` decides the kind of each column; `encode` makes rows of float64 of a table, as
`musigma.schema` describes them, and `decode` makes an Arrow table of such rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from musigma.data import times
from musigma.data.errors import named
from musigma.data.raw import Request, allocate
from musigma.data.sampling import different
from musigma.data.tables import (
    DATE,
    LIST,
    PADDED,
    Table,
    Words,
    is_number,
    list_fault,
    names_rows,
    text_of,
    unit_fault,
    with_units,
)
from musigma.schema import LEVELLED, Column, Schema

BOOLEANS = [set(pair.split()) for pair in ("false true", "no yes", "f t", "n y", "off on", "0 1")]
GRIDS = range(7)  # decimals after which a grid is no longer looked for
PLAIN = 2  # decimals that are a grid even where most values differ
EXACT = 2**53  # whole numbers from here on are not exact in float64
MANY = 20  # different words that may be categories although they are numbers with units
REASONS = 5  # different faults of the cells of a column that are named

TIMES = ("date", "datetime")
FIELDS = {  # what may be said of columns of some kinds only
    "levels": LEVELLED,
    "step": ("continuous",),
    "rounded": ("continuous",),
    "format": TIMES,
}


# Kinds -------------------------------------------------------------------------------------------


class Draft(NamedTuple):
    """What is known of a column before its data are seen: kinds it may have, and fields."""

    kinds: tuple[str, ...] = ()
    fields: Mapping[str, Any] = {}


class _Unusable(Exception):
    """A column that cannot be data."""


class _LeftOut(Exception):
    """A column that is not data: names of rows, or free text."""


@dataclass
class _Content:
    """One column of a table, whose values are read once, when they are needed."""

    table: Table
    j: int
    name: str = ""

    @property
    def storage(self) -> str:
        """How its values are written."""
        return self.table.storage[self.j]

    @cached_property
    def is_words(self) -> bool:
        """Whether it holds words: text, truth values, or digits that are no numbers (007)."""
        kind = self.table.kinds[self.j]
        if kind == "number" and "string" in self.storage:
            return any(PADDED.match(text) for text in self.words.different if text is not None)
        return kind in ("text", "truth") or self.storage.startswith("dictionary")

    @cached_property
    def numbers(self) -> np.ndarray:
        """Its values, NaN where missing."""
        return self.table.numbers(self.j)

    @cached_property
    def finite(self) -> np.ndarray:
        """The different values that are finite, in increasing order."""
        return different(self.numbers[np.isfinite(self.numbers)])

    @cached_property
    def words(self) -> Words:
        """Its words as text, None where missing."""
        found = self.table.words(self.j)
        return Words(
            [None if self.table.lacks(w) else text_of(w) for w in found.different], found.codes
        )

    @cached_property
    def texts(self) -> dict[str, int]:
        """The different words that are not missing, with the number of rows of each."""
        counts = np.bincount(self.words.codes, minlength=len(self.words.different)).tolist()
        found: dict[str, int] = {}
        for text, count in zip(self.words.different, counts, strict=True):
            if text is not None and count:
                found[text] = found.get(text, 0) + count
        return found

    @property
    def present(self) -> int:
        """The number of rows in which it is not missing."""
        if self.is_words:
            return sum(self.texts.values())
        return int((~np.isnan(self.numbers)).sum())

    def kind(self, constant: bool) -> str:
        """The kind of its values, as `docs/tables.md` describes.

        Raises:
            _LeftOut: If it names rows, or is free text.
            _Unusable: If it is empty, of a type that no kind has, or constant.
        """
        table, j = self.table, self.j
        content = table.kinds[j]
        if content == "list":
            raise _Unusable(f"is {self.storage}: give lists as context (--given), or drop it")
        if content == "other":
            raise _Unusable(f"is {self.storage}: convert or drop it")
        if content == "empty" or not self.present:
            faults = {} if self.is_words else table.not_numbers(j)
            raise _Unusable(next(iter(faults.values()), "is empty: drop it"))
        found = self._kind_of_words() if self.is_words else self._kind_of_numbers()
        values = self.texts if self.is_words else self.finite
        if len(values) == 1 and not constant:
            (value,) = values
            value = value if isinstance(value, str) else f"{value:g}"
            raise _Unusable(f"is constant ({value}): drop it")
        return found

    def _kind_of_words(self) -> str:
        texts, n = self.texts, self.present
        if self.storage.startswith("dictionary"):
            return "ordinal" if "ordered=1" in self.storage else "category"
        if {text.lower() for text in texts} in BOOLEANS and len(texts) == 2:
            return "boolean"
        if self.storage == "bool":
            return "boolean"
        if found := times.format_of(list(texts)):
            return found.kind
        words = list(texts)
        if len(words) > MANY and (cell := with_units(words[:1000])):
            raise _Unusable(unit_fault(cell))
        if len(words) > MANY and all(map(LIST.fullmatch, words)):
            raise _Unusable(list_fault(words[0]))
        dated = re.search(r"\d{4}|:", words[0])  # 1.2.3 is a version
        if dated and len(words) > 2 and all(map(DATE.fullmatch, words)):
            pattern = re.sub(r"\d", "0", words[0])
            other = next((w for w in words if re.sub(r"\d", "0", w) != pattern), words[-1])
            raise _Unusable(
                f"holds dates or times in no format that is known, such as {words[0]!r} and "
                f"{other!r}: write all as 2026-12-31 or 2026-12-31 17:30, or call it a category "
                "in a schema"
            )
        if len(texts) == self.table.rows > 1:
            raise _LeftOut("is different in every row: it names rows, and is not data")
        if len(texts) > max(2, n / 2):
            raise _LeftOut(
                f"is left out as free text: {len(texts):,} different values in {n:,} rows"
            )
        return "category"

    def _kind_of_numbers(self) -> str:
        values = self.finite
        if self.table.kinds[self.j] == "time":
            return "date" if (values % times.DAY == 0).all() else "datetime"
        large = np.abs(values).max(initial=0) >= EXACT
        if not _whole(values) or (large and "float" in plain_type(self.storage)):
            return "continuous"
        if self.table.names and names_rows(self.table, self.j):
            raise _LeftOut("is different in every row: it names rows, and is not data")
        if large:
            raise _Unusable(
                "has whole numbers from 2^53 on, which float64 does not keep: drop it, or make it "
                "text if it names something"
            )
        return "boolean" if set(values.tolist()) <= {0, 1} else "count"

    def column(self, kind: str, **chosen: Any) -> Column:
        """The column as one of a kind; `chosen` are fields that are known.

        Raises:
            _Unusable: If its values are not of that kind.
        """
        for key in FIELDS.keys() & chosen.keys():
            if kind not in FIELDS[key]:
                raise _Unusable(f"is {kind}, and {key} is for {' and '.join(FIELDS[key])} columns")
        about: dict[str, Any] = {"name": self.name, "kind": kind}
        about |= {"storage": plain_type(self.storage), "missing": self.present < self.table.rows}
        if kind in LEVELLED:
            about["levels"] = chosen.get("levels") or self._levels()
            if kind == "boolean" and len(about["levels"]) > 2:
                raise _Unusable(f"has {len(about['levels'])} values, and cannot be boolean")
        elif kind in TIMES:
            about |= self._time(kind, chosen.pop("format", None))
        elif self.is_words or self.table.kinds[self.j] == "time":
            what = "dates" if not self.is_words else f"text, such as {next(iter(self.texts))!r}"
            raise _Unusable(f"holds {what}, and cannot be {kind}")
        elif kind == "continuous":
            about["step"] = _grid(self.finite, self.present, self.storage)
        elif not _whole(self.finite):
            raise _Unusable("holds fractions, and cannot be a count: make it continuous")
        try:
            column = Column(**about | chosen)
        except ValueError as error:
            raise _Unusable(str(error).partition(": ")[2]) from None
        if kind == "continuous" and "step" in chosen:
            off = self.finite[self.finite != column.on_grid(self.finite)]
            if len(off):
                raise _Unusable(f"holds {off[0]:g}, which is no multiple of {column.step:g}")
        return column

    def as_drafted(self, draft: Draft) -> Column:
        """The column as one of the first kind of a draft that fits.

        Raises:
            _LeftOut, _Unusable: If there is none.
        """
        *others, last = draft.kinds or (self.kind(constant=True),)
        for kind in others:
            with suppress(_Unusable):
                return self.column(kind, **draft.fields)
        return self.column(last, **draft.fields)

    def _levels(self) -> list[str]:
        texts = list(self.texts)
        if self.storage.startswith("dictionary"):  # some may occur in no row
            texts = [text for text in self.words.different if text is not None]
            if "ordered=1" in self.storage:
                return texts
        if all(map(is_number, texts)):
            return sorted(texts, key=float)
        return sorted(texts, key=lambda text: (text.lower(), text))

    def _time(self, kind: str, form: str | None) -> dict[str, Any]:
        """The format and the step of dates, or of dates with times."""
        if not self.is_words and self.table.kinds[self.j] != "time":
            raise _Unusable(f"holds numbers, and cannot be a {kind}")
        if not self.is_words:
            seconds, form = self.finite, None
        else:
            try:
                found = times.format_of(list(self.texts)) if form is None else None
            except ValueError as error:
                raise _Unusable(str(error)) from None
            form = form or (found.format if found else times.ISO[0])
            seconds = times.seconds(list(self.texts), form)
            seconds = seconds[~np.isnan(seconds)]
        if kind == "date" and (seconds % times.DAY != 0).any():
            raise _Unusable("holds times of day, and cannot be a date: make it a datetime")
        steps = (s for s in (3600.0, 60.0, 1.0) if (seconds % s == 0).all())
        return {"format": form, "step": next(steps, None)}


def names(table: Table) -> tuple[str, ...]:
    """The names of the columns; x0, x1, ... if there are none."""
    return table.names or tuple(f"x{j}" for j in range(len(table.kinds)))


def plain_type(storage: str) -> str:
    """The name of an Arrow type as NumPy has it."""
    names = {"double": "float64", "float": "float32", "halffloat": "float16"}
    return names.get(storage, storage)


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all())


def _grid(different: np.ndarray, n: int, storage: str) -> float | None:
    """The unit in the last place, if all values are multiples of it."""
    dtype = np.float32 if plain_type(storage) == "float32" else np.float64
    values = different.astype(dtype)
    if not len(values):
        return None
    with np.errstate(all="ignore"):  # at the end of the range
        least = 4 * float(np.spacing(np.abs(values).max()))
    for decimals in GRIDS:
        scale = 10.0**decimals
        if not 1 / scale >= least or (decimals > PLAIN and len(values) > n / 2):
            return None
        if ((np.rint(different * scale) / scale).astype(dtype) == values).all():
            return float(f"1e-{decimals}")
    return None


# Inference ---------------------------------------------------------------------------------------


def infer(table: Table, request: Request, which: Sequence[int]) -> tuple[Schema, dict[str, str]]:
    """The schema of some columns, and those that cannot be used, with the reasons.

    Args:
        table: The table.
        request: Takes a note of each column that is left out, unless all are asked for by name.
        which: The columns, in the order of the schema.
    """
    columns, faults = [], {}
    for j in which:
        if not (name := names(table)[j]):
            if table.kinds[j] == "empty":
                request.note(f"column {j + 1}, which has no name, is empty, and is left out")
            elif not names_rows(table, j):
                faults[f"column {j + 1}"] = "has no name: name it, or drop it"
            continue
        content = _Content(table, j, name)
        try:
            columns.append(content.column(content.kind(request.allow_constant)))
        except _LeftOut as error:
            if request.of:
                faults[table.called(j)] = str(error)
            else:
                request.note(f"{table.called(j)} {error}")
        except (_Unusable, ValueError) as error:
            faults[table.called(j)] = str(error)
    if request.missing == "ignore":
        columns = [replace(column, missing=False) for column in columns]
    return Schema(tuple(columns)), faults


def completed(
    table: Table, drafts: Mapping[str, Draft], request: Request
) -> tuple[Schema, dict[str, str]]:
    """The schema that a file states, with what it leaves open as it is in a table.

    Args:
        table: The table.
        drafts: What is known of each column, by its name.
        request: Says whether missing values are modeled.
    """
    columns, faults = [], {}
    known = {name: j for j, name in enumerate(names(table))}
    for name, draft in drafts.items():
        if name not in known:
            faults[f"column {name!r}"] = "is in the schema, and not in the data"
            continue
        content = _Content(table, known[name], name)
        try:
            column = content.as_drafted(draft)
        except (_LeftOut, _Unusable, ValueError) as error:
            faults[f"column {name!r}"] = str(error)
            continue
        columns.append(replace(column, missing=False) if request.missing == "ignore" else column)
    return Schema(tuple(columns)), faults


# Rows --------------------------------------------------------------------------------------------


def encode(
    table: Table, schema: Schema, request: Request
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Rows of a table as numbers, float64 (N, D); which of them cannot be used; and the faults.

    Raises:
        DataError: If the table has not all columns of the schema.
    """
    order = names(table)
    if not table.names and len(order) == len(schema):
        order = schema.names
    known = {name: j for j, name in enumerate(order)}
    x = allocate((table.rows, len(schema)), request.where, np.float64)
    bad, faults = np.zeros(table.rows, bool), dict(table.ragged)
    for k, column in enumerate(schema.columns):
        if request.partial and column.name not in known:
            x[:, k] = np.nan
            continue
        content = _Content(table, known[column.name])
        x[:, k], wrong = _encoded(content, column, request.unseen)
        if column.has_levels and (n := int((x[:, k] == len(column.levels)).sum())):
            levels = {_normal(level, column.kind) for level in column.levels}
            new = [repr(t) for t in content.texts if _normal(t, column.kind) not in levels]
            request.note(
                f"column {column.name!r}: {n:,} of {len(x):,} values are not in the schema "
                f"({named(new)}), and have the probability of unknown levels"
            )
        x[np.isnan(x[:, k]), k] = np.nan  # NaN have signs, and equal rows have equal bytes
        bad[list(wrong)] = True
        faults |= _named(wrong, table, column, request)
        request.report(k + 1, len(schema))
    return x, bad, faults


def _named(
    wrong: Mapping[int, str], table: Table, column: Column, request: Request
) -> dict[str, str]:
    """Faults of a column by the names of their rows: all of them, or one for each reason."""
    name = f"column {column.name!r}"
    if request.skip_bad:
        return {f"{table.row_called(i)}, {name}": reason for i, reason in wrong.items()}
    alike: dict[str, list[int]] = {}
    for i in sorted(wrong):
        alike.setdefault(wrong[i], []).append(i)
    faults = {}
    for reason, rows in list(alike.items())[:REASONS]:
        more = f" ({len(rows):,} rows)" if len(rows) > 1 else ""
        faults[f"{table.row_called(rows[0])}, {name}"] = reason + more
    if rest := sum(map(len, list(alike.values())[REASONS:])):
        faults[name] = f"has {rest:,} more such cells"
    return faults


def _encoded(content: _Content, column: Column, unseen: str) -> tuple[np.ndarray, dict[int, str]]:
    """A column as numbers, and the rows that cannot be used, with the reasons."""
    if column.has_levels:
        return _positions(content, column, unseen)
    if column.kind in TIMES:
        x, wrong = _instants(content, column)
    elif content.table.kinds[content.j] in ("time", "list", "other"):
        rows = content.table.rows
        return np.full(rows, np.nan), dict.fromkeys(
            range(rows), f"is {content.storage}, no number"
        )
    else:
        x, wrong = content.numbers + 0.0, dict(content.table.not_numbers(content.j))
    for i in np.flatnonzero(np.isinf(x)).tolist():
        wrong[i] = "is infinite: fill or drop it"
    short = column.storage in ("float16", "float32")
    if short:  # text may have been written of such numbers
        x = x.astype(column.storage).astype(np.float64)
    if column.step and column.kind != "datetime":
        nearest = column.on_grid(x)
        if short:
            x = np.where(nearest.astype(column.storage) == x, nearest, x)
        if column.is_discrete:
            what = "a whole number" if column.step == 1 else f"a multiple of {column.step:g}"
            off = np.isfinite(x) & (x != nearest)
            for i in np.flatnonzero(off).tolist():
                wrong.setdefault(i, f"is {x[i]:g}, not {what}: round it, or make it continuous")
            for i in np.flatnonzero(np.abs(x) >= EXACT).tolist():
                wrong.setdefault(
                    i, f"is {x[i]:g}; whole numbers from 2^53 on are not exact: drop it"
                )
    return x, wrong


def _positions(
    content: _Content, column: Column, unseen: str
) -> tuple[np.ndarray, dict[int, str]]:
    """The positions of words among levels."""
    words, table = content.table.words(content.j), content.table
    place = {level: float(i) for i, level in enumerate(column.levels)}
    alike = {_normal(level, column.kind): i for level, i in place.items()}
    codes, unknown = np.full(len(words.different), np.nan), {}
    for k, word in enumerate(words.different):
        text = "" if word is None else text_of(word)
        found = place.get(text, alike.get(_normal(text, column.kind)))
        if found is not None and word is not None:
            codes[k] = found
        elif not table.lacks(word):
            codes[k] = len(column.levels)
            unknown[k] = text
    x, wrong = codes[words.codes], {}
    if unseen == "refuse" and unknown:
        for i in np.flatnonzero(x == len(column.levels)).tolist():
            text = unknown[int(words.codes[i])]
            wrong[i] = f"is {text!r}, which is not among the levels of the schema"
    return x, wrong


def _normal(text: str, kind: str) -> str:
    """What equal levels have in common when they are written in different ways."""
    if is_number(text):
        return text_of(float(text))
    return text.lower() if kind == "boolean" else text


def _instants(content: _Content, column: Column) -> tuple[np.ndarray, dict[int, str]]:
    """Days or seconds since 1970."""
    wrong: dict[int, str] = {}
    if content.table.kinds[content.j] == "time":
        x = content.numbers + 0.0
    else:
        words, form = content.words, column.format
        texts = [text or "" for text in words.different]
        if form is None:
            found = times.format_of([text for text in texts if text])
            form = found.format if found else times.ISO[0]
        x = times.seconds(texts, form)
        if column.kind == "date" and "%H" not in form:  # dates as libraries write their times
            x = np.where(np.isnan(x), times.seconds(texts, f"{form} %H:%M:%S"), x)
        x = x[words.codes]
        missing = np.array([text is None for text in words.different], bool)[words.codes]
        for i in np.flatnonzero(np.isnan(x) & ~missing).tolist():
            wrong[i] = f"is {texts[words.codes[i]]!r}, not a date like {times.example(form)}"
    if column.kind == "date":
        for i in np.flatnonzero(np.isfinite(x) & (x % times.DAY != 0)).tolist():
            wrong[i] = "has a time of day, and the column holds dates"
        x = np.floor(x / times.DAY)
    return x, wrong


def decode(rows: np.ndarray, schema: Schema) -> Any:
    """Rows of numbers as a `pyarrow.Table`, with names, types and missing values as they were.

    Args:
        rows: Float64 (N, D), as `encode` makes them; a category that is unknown becomes missing.
        schema: The D columns.

    Raises:
        DataError: If pyarrow is not installed.

    Example:
        >>> age, sex = Column("age", "count"), Column("sex", "category", ("f", "m"))
        >>> schema = Schema([age, sex])
        >>> decode(np.array([[41, 0], [np.nan, 1]]), schema).to_pydict()
        {'age': [41, None], 'sex': ['f', 'm']}
    """
    from musigma.data.readers.arrow import column_of, pyarrow

    columns = {c.name: column_of(rows[:, j], c) for j, c in enumerate(schema.columns)}
    return pyarrow("typed tables:").table(columns)
