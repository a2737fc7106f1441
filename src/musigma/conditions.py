"""Conditions on the columns of a table, such as ``country == "FR" and 18 <= age < 65``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from musigma.schema import Column, Schema

__all__ = ["Condition", "Pieces", "Values", "as_number", "written"]

LONGEST = 100_000  # characters of a condition
DEEPEST = 50  # parentheses and `not` inside each other
OPERATORS = ("==", "!=", "<=", ">=", "<", ">")
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
KEYWORDS = ("and", "or", "not", "in", "is", "between", "missing", "null", "true", "false")
TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |`(?P<quoted>(?:[^`]|``)+)`
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<word>[^\W\d][\w.]*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\],=&|~!])
    |(?P<end>$))""",
    re.VERBOSE,
)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
HINTS = {"=": "==", "&": "and", "&&": "and", "|": "or", "||": "or", "~": "not", "!": "not"}


# --- sets of values ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """A set of values of one column.

    Attributes:
        intervals: Closed intervals of float64, apart from each other, in increasing order.
        missing: Whether a missing value belongs to it.
    """

    intervals: tuple[tuple[float, float], ...] = ()
    missing: bool = False

    def __bool__(self) -> bool:
        return bool(self.intervals) or self.missing

    def __and__(self, other: Values) -> Values:
        both = ((max(a, c), min(b, d)) for a, b in self.intervals for c, d in other.intervals)
        return Values(tuple(sorted(i for i in both if i[0] <= i[1])), self.missing & other.missing)

    def __or__(self, other: Values) -> Values:
        joined: list[tuple[float, float]] = []
        for low, high in sorted(self.intervals + other.intervals):
            if joined and low <= math.nextafter(joined[-1][1], math.inf):
                joined[-1] = joined[-1][0], max(joined[-1][1], high)
            else:
                joined.append((low, high))
        return Values(tuple(joined), self.missing | other.missing)

    def contains(self, x: np.ndarray) -> np.ndarray:
        """Whether each value, NaN where missing, belongs to it."""
        low, high = np.array(self.intervals).reshape(-1, 2).T
        at = np.searchsorted(low, x, side="right") - 1
        inside = np.zeros(x.shape, bool)
        if len(low):
            inside = (at >= 0) & (x <= high[at])
        return np.where(np.isnan(x), self.missing, inside)


class Pieces(NamedTuple):
    """A set of values, divided by the cells of a column; one element for each piece.

    Attributes:
        cell: The code of the cell; that of a missing value is the number of cells.
        share: The share of the cell's probability that the piece has.
        start: The smallest value; in steps of the grid, if the column has one.
        stop: The largest value, likewise.
    """

    cell: np.ndarray
    share: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def pieces(values: Values, column: Column) -> Pieces:
    """Divide a set by the cells of a column; pieces without probability are left out."""
    cells, grid = column.measured, column.grid
    edges, found = np.array(cells.edges), []
    for low, high in values.intervals:
        if not len(cells):
            break
        if not column.has_levels:  # draws outside the range of the data are moved to its ends
            if low > column.high or high < column.low:
                continue
            low = -math.inf if low <= column.low else low
            high = math.inf if high >= column.high else high
        first = max(0, int(np.searchsorted(edges, low)) - 1)
        last = min(len(cells), int(np.searchsorted(edges, high, side="right")))
        for c in range(first, last):
            ends = edges[c], edges[c + 1]
            a, b = max(low, ends[0]), min(high, ends[1])
            if grid:
                smallest, largest = (
                    round(e / grid + h) for e, h in zip(ends, (0.5, -0.5), strict=True)
                )
                start = max(smallest, math.ceil(a / grid - 1e-9))
                stop = min(largest, math.floor(b / grid + 1e-9))
                share = (stop - start + 1) / (largest - smallest + 1)
            else:
                start, stop = a, b
                share = (b - a) / (ends[1] - ends[0]) if ends[1] > ends[0] else float(a <= b)
            if share > 0:
                found.append((c, share, start, stop))
    if values.missing and column.missing:
        found.append((len(cells), 1.0, 0.0, 0.0))
    cell, share, start, stop = np.array(found, float).reshape(-1, 4).T
    return Pieces(cell.astype(np.int64), share, start, stop)


# --- conditions --------------------------------------------------------------------------------


class _Both(NamedTuple):
    """The values for which a comparison holds, and those for which its opposite does."""

    column: int
    yes: Values
    no: Values


class _Joined(NamedTuple):
    """Parts joined with `and` or `or`; or one part with `not`."""

    word: str
    parts: Sequence[_Joined | _Both]


Node = _Joined | _Both


@dataclass(frozen=True)
class Condition:
    """A condition on the columns of a table, as a set of values for each column.

    Comparisons ``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, chained ones such as
    ``18 <= age < 65``, ``in (..)``, ``between .. and ..``, ``is missing``, the name of a boolean
    column alone, and these joined with ``and``, ``or``, ``not`` and parentheses. ``or`` joins
    conditions on the same column. Names that are not words stand in backquotes, texts in quotes;
    dates and times are ISO texts, in UTC: ``"2024-01-31"``. Levels of an ordinal column are
    ordered. A missing value satisfies no comparison, nor the opposite of one.

    Attributes:
        text: The condition as it was written.
        schema: The columns.
        allowed: The allowed values of each column that it mentions, by the number of the column.

    Example:
        >>> schema = Schema([Column("age", "count"), Column("sex", "category", ("f", "m"))])
        >>> rows = np.array([[17, 0], [40, 0], [40, 1], [np.nan, 0]])
        >>> Condition.parse("18 <= age < 65 and sex != 'm'", schema).holds(rows)
        array([False,  True, False, False])
    """

    text: str
    schema: Schema
    allowed: dict[int, Values]

    @classmethod
    def parse(cls, text: str, schema: Schema) -> Condition:
        """Read a condition.

        Args:
            text: The condition.
            schema: The columns. If they are measured, values without probability are refused.

        Raises:
            ValueError: If it cannot be read; or for all columns and values that do not exist or
                do not fit, and columns without an allowed value.
        """
        parser = _Parser(text, schema)
        node = parser.read()
        allowed = _sets(node, True, schema, parser.faults)
        for j, values in allowed.items():
            if j != UNKNOWN and (reason := _impossible(values, schema.columns[j])):
                parser.faults.append(reason)
        if faults := list(dict.fromkeys(parser.faults)):
            few = len(faults) == 1
            raise ValueError(
                f"where: {faults[0]}" if few else "where:\n" + "\n".join(f"  {f}" for f in faults)
            )
        return cls(text, schema, allowed)

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of the rows (N, D) satisfies it."""
        each = [values.contains(rows[:, j]) for j, values in self.allowed.items()]
        return np.all(each, axis=0)

    def pieces(self, j: int) -> Pieces:
        """The allowed values of column j, divided by its cells."""
        return pieces(self.allowed[j], self.schema.columns[j])


def _sets(node: Node, positive: bool, schema: Schema, faults: list[str]) -> dict[int, Values]:
    """The allowed values of each column, if a part of a condition holds; or if its opposite does.

    The opposite of a comparison holds for no missing value either, so `not` can be moved into the
    parts that it applies to.
    """
    if isinstance(node, _Both):
        return {node.column: node.yes if positive else node.no}
    word, parts = node.word, node.parts
    if word == "not":
        return _sets(parts[0], not positive, schema, faults)
    each = [_sets(part, positive, schema, faults) for part in parts]
    columns = list(dict.fromkeys(j for part in each for j in part))
    if (word == "and") == positive:
        joined = {}
        for j in columns:
            joined[j] = ANY
            for part in each:
                joined[j] &= part.get(j, ANY)
        return joined
    if UNKNOWN in columns:
        return dict.fromkeys(columns, ANY)
    if len(columns) > 1:
        names = ", ".join(schema.names[j] for j in columns)
        text = "`or`" if positive else "`not` of `and`"
        faults.append(
            f"{text}: joins conditions on different columns ({names}), and rows can be drawn for "
            "one set of values in each column; ask for each part by itself"
        )
        return dict.fromkeys(columns, ANY)
    union = Values()
    for part in each:
        union |= part[columns[0]]
    return {columns[0]: union}


UNKNOWN = -1  # in place of the number of a column
PRESENT = Values(((-math.inf, math.inf),))
MISSING = Values((), True)
ANY = PRESENT | MISSING


def _impossible(values: Values, column: Column) -> str | None:
    """Why a column can have none of some values; None if it can."""
    name = f"column {column.name!r}"
    if not values:
        return f"{name}: no value satisfies all that is asked of it"
    if column.cells is None or len(pieces(values, column).cell):
        return None
    if values == MISSING:
        return f"{name}: its values are never missing"
    if not len(column.cells):
        return f"{name}: its values were all missing in training"
    if all(low > column.high or high < column.low for low, high in values.intervals):
        low, high = written(column, column.low), written(column, column.high)
        return f"{name}: no training value satisfies the condition; they are {low} to {high}"
    if column.grid:
        what = "whole numbers" if column.grid == 1 else f"multiples of {column.grid:g}"
        return f"{name}: no value satisfies the condition; they are {what}"
    if all(low == high for low, high in values.intervals):
        return f"{name}: a single value of a continuous column has no probability; give a range"
    return f"{name}: no value near a training value satisfies the condition"


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Literal:
    """A value in a condition: its text, as it is shown, and a number if it is one."""

    text: str
    kind: str  # text, number or truth

    @property
    def shown(self) -> str:
        return f'"{self.text}"' if self.kind == "text" else self.text


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Parser:
    """Reads a condition; `faults` are those of its columns and values."""

    def __init__(self, text: str, schema: Schema):
        self.text, self.schema, self.faults, self.depth = text, schema, [], 0
        if len(text) > LONGEST:
            raise ValueError(f"where: expected at most {LONGEST:,} characters; got {len(text):,}")
        self.tokens = list(self._tokens())
        self.at = 0

    def _tokens(self) -> Iterator[_Token]:
        end = 0
        while True:
            found = TOKEN.match(self.text, end)
            if found is None:
                rest = self.text[end:].lstrip()
                raise self._wrong(len(self.text) - len(rest), "cannot be read")
            kind = str(found.lastgroup)
            yield _Token(kind, found[kind], found.start(kind))
            if kind == "end":
                return
            end = found.end()

    def _wrong(self, start: int, reason: str) -> ValueError:
        rest = self.text[start:].strip()
        where = f"at {rest[:20]!r}" if rest else "at its end"
        return ValueError(f"where: {self.text[:200]!r} {reason} {where}")

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def word(self, *words: str) -> str | None:
        """The next word or sign, if it is one of these; it is then passed."""
        token = self.token
        found = token.text.lower() if token.kind == "word" else token.text
        if token.kind in ("word", "sign") and found in words:
            self.at += 1
            return found
        return None

    def need(self, *words: str) -> str:
        if (found := self.word(*words)) is None:
            token = self.token
            hint = HINTS.get(token.text, "")
            expected = f"has {token.text!r} for {hint!r}" if hint else f"needs {words[0]!r}"
            raise self._wrong(token.start, expected)
        return found

    def read(self) -> Node:
        """The whole condition."""
        node = self._either()
        if self.token.kind != "end":
            self.need("and", "or")
        return node

    def _either(self) -> Node:
        return self._list("or", lambda: self._list("and", self._part))

    def _list(self, word: str, part: Callable[[], Node]) -> Node:
        parts = [part()]
        while self.word(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else _Joined(word, parts)

    def _part(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._wrong(self.token.start, f"has more than {DEEPEST} levels of parentheses")
        if self.word("not"):
            node = _Joined("not", [self._part()])
        elif self.word("("):
            node = self._either()
            self.need(")")
        else:
            node = self._comparison()
        self.depth -= 1
        return node

    def _comparison(self) -> Node:
        if (first := self._literal()) is not None:
            sign = self.need(*OPERATORS)
            j = self._column()
            parts = [self._compare(j, MIRRORED.get(sign, sign), first)]
            if other := self.word(*OPERATORS):
                parts.append(self._compare(j, other, self._value()))
            return _Joined("and", parts)
        j = self._column()
        if sign := self.word(*OPERATORS):
            return self._compare(j, sign, self._value())
        if self.word("is"):
            negated = self.word("not")
            self.need("missing", "null")
            both = _Both(j, MISSING, PRESENT)
            return _Joined("not", [both]) if negated else both
        negated = self.word("not")
        if self.word("in"):
            close = {"(": ")", "[": "]"}[self.need("(", "[")]
            parts = [self._compare(j, "==", self._value())]
            while self.word(","):
                parts.append(self._compare(j, "==", self._value()))
            self.need(close)
            node: Node = _Joined("or", parts)
        elif self.word("between"):
            low = self._compare(j, ">=", self._value())
            self.need("and")
            node = _Joined("and", [low, self._compare(j, "<=", self._value())])
        elif negated or self.token.text in HINTS:
            self.need("in", "between")
            raise AssertionError
        elif j != UNKNOWN and self.schema.columns[j].kind != "boolean":
            raise self._wrong(self.token.start, f"needs a comparison for {self.schema.names[j]!r}")
        else:
            return self._compare(j, "==", _Literal("true", "truth"))
        return _Joined("not", [node]) if negated else node

    def _literal(self) -> _Literal | None:
        """The next value, if there is one."""
        kind, text, _ = self.token
        if kind == "text":
            text = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), text[1:-1])
        elif kind == "word" and text.lower() in ("true", "false"):
            kind, text = "truth", text.lower()
        elif kind != "number":
            return None
        self.at += 1
        return _Literal(text, kind)

    def _value(self) -> _Literal:
        token = self.token
        if (literal := self._literal()) is not None:
            return literal
        if token.kind == "word" and token.text.lower() in ("missing", "null"):
            raise self._wrong(token.start, "needs 'is missing' or 'is not missing'")
        if token.kind in ("word", "quoted") and token.text.lower() not in KEYWORDS:
            other = token.text in self.schema.names
            reason = "compares two columns, and only comparisons with values are possible,"
            raise self._wrong(
                token.start, reason if other else f'needs quotes ("{token.text}") if it is a text'
            )
        raise self._wrong(token.start, "needs a value")

    def _column(self) -> int:
        """The number of the column that is named next."""
        kind, name, start = self.token
        if kind not in ("word", "quoted") or (kind == "word" and name.lower() in KEYWORDS):
            raise self._wrong(start, "needs the name of a column")
        self.at += 1
        name = name.replace("``", "`") if kind == "quoted" else name
        if name in self.schema.names:
            return self.schema.index(name)
        near = _near(name, self.schema.names)
        known = f"did you mean {near}?" if near else "see `musigma inspect` for the columns"
        if not near and len(self.schema) <= 20:
            known = f"expected one of {', '.join(self.schema.names)}"
        self.faults.append(f"there is no column {name!r}; {known}")
        return UNKNOWN

    def _compare(self, j: int, sign: str, value: _Literal) -> _Both:
        """A comparison of a column with a value."""
        if j == UNKNOWN:
            return _Both(j, ANY, ANY)
        column = self.schema.columns[j]
        try:
            if sign not in ("==", "!=") and column.has_levels and column.kind != "ordinal":
                raise ValueError(f"is a {column.kind}, which has no order: use == or in")
            below, equal, above = _divided(column, value)
        except ValueError as error:
            self.faults.append(f"column {column.name!r} {error}")
            return _Both(j, ANY, ANY)
        yes, no = {
            "==": (equal, below | above),
            "<": (below, equal | above),
            ">": (above, below | equal),
        }.get(sign) or {
            "!=": (below | above, equal),
            ">=": (equal | above, below),
            "<=": (below | equal, above),
        }[sign]
        if column.has_levels and sign not in ("==", "!="):  # an unknown level has no place
            known = Values(((-math.inf, len(column.levels) - 1.0),))
            yes, no = yes & known, no & known
        return _Both(j, yes, no)


def _divided(column: Column, value: _Literal) -> tuple[Values, Values, Values]:
    """The values below, equal to and above a value."""
    x, grid = _number(column, value), column.grid
    low = high = x
    if grid and abs(x / grid - round(x / grid)) < 1e-6:  # as close as multiples are in float64
        k, near = round(x / grid), max(1e-6 * grid, 4 * math.ulp(x))
        low, high = k * grid - near, k * grid + near
    return (
        Values(((-math.inf, math.nextafter(low, -math.inf)),)),
        Values(((low, high),)),
        Values(((math.nextafter(high, math.inf), math.inf),)),
    )


def as_number(column: Column, value: str | float | bool | None) -> float:
    """A value of a column as it stands in the rows.

    Args:
        column: The column.
        value: A number; a level; a date or time as ISO text; None if it is missing.

    Raises:
        ValueError: If it does not fit the column.

    >>> as_number(Column("sex", "category", ("f", "m")), "m"), as_number(Column("n", "count"), 3)
    (1.0, 3.0)
    """
    if value is None:
        return math.nan
    kind = "number"
    if isinstance(value, (str, bool)):
        kind = "text" if isinstance(value, str) else "truth"
    text = value if isinstance(value, str) else f"{value}".lower()
    try:
        return _number(column, _Literal(text, kind))
    except ValueError as error:
        raise ValueError(f"column {column.name!r} {error}") from None


def _number(column: Column, value: _Literal) -> float:
    """A value as it stands in the rows.

    Raises:
        ValueError: If it does not fit the column.
    """
    if column.has_levels:
        return float(_level(column, value))
    if column.kind in ("date", "datetime"):
        example = "2024-01-31" if column.kind == "date" else "2024-01-31 13:00"
        try:
            if value.kind != "text":
                raise ValueError
            moment = datetime.fromisoformat(value.text.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(
                f'is a {column.kind}: expected a text such as "{example}"; got {value.shown}'
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        seconds = (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
        return seconds / (86400 if column.kind == "date" else 1)
    number = float(value.text) if value.kind == "number" else math.nan
    if not math.isfinite(number):
        raise ValueError(f"is a number: expected a number; got {value.shown}")
    return number


def _level(column: Column, value: _Literal) -> int:
    """The position of a level."""
    levels = column.levels
    if value.text in levels:
        return levels.index(value.text)
    if column.kind == "boolean" and value.kind == "truth":
        return int(value.text == "true")
    if value.kind == "number":
        for i, level in enumerate(levels):
            try:
                if float(level) == float(value.text):
                    return i
            except ValueError:
                continue
    near = _near(value.text, levels)
    hint = f"did you mean {near!r}? " if near else ""
    some = ", ".join(levels[:8]) + (", ..." if len(levels) > 8 else "")
    raise ValueError(f"has no level {value.shown}; {hint}they are {some}")


def _near(name: str, names: Sequence[str]) -> str | None:
    """The name that is most like another, if one is."""
    lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), lower, 1)
    return lower[near[0]] if near else None


def written(column: Column, value: float) -> str:
    """A value of a column as text.

    >>> written(Column("day", "date"), 0.0), written(Column("carat", step=0.01), 0.3)
    ('1970-01-01', '0.30')
    """
    if math.isnan(value):
        return "missing"
    if column.has_levels:
        known = 0 <= value < len(column.levels)
        return column.levels[int(value)] if known else "an unknown level"
    if column.kind in ("date", "datetime"):
        seconds = value * (86400 if column.kind == "date" else 1)
        moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)
        return moment.strftime("%Y-%m-%d" if column.kind == "date" else "%Y-%m-%dT%H:%M:%S")
    if column.step:
        digits = -int(Decimal(repr(column.step)).normalize().as_tuple().exponent)
        return f"{value:.{max(0, digits)}f}"
    return f"{value:.6g}"
