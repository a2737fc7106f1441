"""Tables: text as numbers, columns as data, labels or context, and what is made of them.

A reader makes a `Table` of a file, and `assemble` makes a `Dataset` of it, so arrays, text and
parquet follow the same rules. Every decision is reported: a note
names whatever is not data, and an error names whatever cannot be used.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import numpy as np

from musigma.data.cache import blocks, facts
from musigma.data.dataset import Dataset, Given, Hashes
from musigma.data.errors import called, listing, named, printable
from musigma.data.raw import Request, as_labels

LABEL_NAMES = ("label", "class", "target", "y")
ID_NAME = re.compile(
    r"|unnamed:? ?\d*|index|id|idx|key|uuid|guid|.*[ _.-](id|idx|index|uuid|guid)"
    r"|row[ _.]?(index|id|idx|names?|no|nr|num|number)?"
    r"|(file|image|img)[ _]?(names?)?|path|name"
)
CAMEL_ID = re.compile(r".*[a-z]I[dD]")
LOOKED_AT = 100_000  # cells that decide the kind of a column of a large table
MISSING = frozenset(
    ["", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "?", "-", "--", "."]
)
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?.*")
COMMA_DECIMAL = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d*)(,\d+)?([eE][+-]?\d+)?")
COMMA_GROUPS = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d*)(\.\d*)?([eE][+-]?\d+)?")
WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")
COARSE = 1e-3  # share of a column's range: float32 steps larger than this lose information
NAMED = 1000  # cells of a row, or of a table on disk, that are named as unusable
LARGEST = np.finfo(np.float32).max

Kind = Literal["number", "text", "empty"]
Convert = Callable[[str], float]


# Cells -------------------------------------------------------------------------------------------


def is_number(cell: str) -> bool:
    """Whether `float` reads a cell.

    >>> is_number(" 1e3"), is_number("1,5"), is_number("nan")
    (True, False, True)
    """
    try:
        float(cell)
    except ValueError:
        return False
    return True


def is_missing(cell: Any) -> bool:
    """Whether a cell stands for a missing value.

    >>> [is_missing(cell) for cell in ("", " NA ", "0", None)]
    [True, True, False, True]
    """
    return cell is None or str(cell).strip().lower() in MISSING


def is_called_id(name: str) -> bool:
    """Whether a name is usual for a column that names the rows.

    >>> [is_called_id(name) for name in ("", "Unnamed: 0", "PassengerId", "row number", "paid")]
    [True, True, True, True, False]
    """
    return bool(ID_NAME.fullmatch(name.lower()) or CAMEL_ID.fullmatch(name))


def comma_decimal(cell: str) -> float:
    """A number with a decimal comma, and points, if any, between groups of three digits.

    >>> comma_decimal("1.234,5"), comma_decimal("20,63")
    (1234.5, 20.63)
    """
    if not COMMA_DECIMAL.fullmatch(cell.strip()):
        raise ValueError(cell)
    return float(cell.replace(".", "").replace(",", "."))


def comma_groups(cell: str) -> float:
    """A number with a decimal point, and commas, if any, between groups of three digits.

    >>> comma_groups("1,234.5")
    1234.5
    """
    if not COMMA_GROUPS.fullmatch(cell.strip()):
        raise ValueError(cell)
    return float(cell.replace(",", ""))


def convention(cells: Sequence[str]) -> tuple[Convert | None, str]:
    """How commas in numbers are to be read, from all cells with commas; and why they cannot be.

    >>> convention(["20,63", "1,234"])[0].__name__, convention(["1,234.5"])[0].__name__
    ('comma_decimal', 'comma_groups')
    >>> convention(["1,234"])
    (None, "'1,234' may be 1234 or 1.234")
    """
    ways = (comma_decimal, COMMA_DECIMAL), (comma_groups, COMMA_GROUPS)
    fitting = [
        convert
        for convert, pattern in ways
        if all(pattern.fullmatch(cell.strip()) for cell in cells)
    ]
    if len(fitting) == 2:
        cell = cells[0]
        return None, f"{cell!r} may be {comma_groups(cell):g} or {comma_decimal(cell):g}"
    return (fitting[0] if fitting else None), ""


def cell_fault(cell: str, doubt: str = "") -> str:
    """Why a cell of a column of numbers is not a number, and what to do."""
    if is_missing(cell):
        return "is missing: fill or drop it"
    if doubt and "," in cell:
        return f"is {cell.strip()!r}, and {doubt}: write numbers with decimal points"
    return f"is {cell.strip()!r}, {_kind_of_text(cell)}: fill or drop it"


def number_fault(value: float) -> str:
    """Why a number cannot be used, and what to do.

    >>> number_fault(float("nan")), number_fault(1e39)
    ('is nan: fill or drop it', 'is 1e+39, too large for float32: rescale it')
    """
    if np.isfinite(value):
        return f"is {value:g}, too large for float32: rescale it"
    if np.isnan(value):
        return "is nan: fill or drop it"
    return "is infinite or too large for float32: rescale, fill or drop it"


def _kind_of_text(cell: str) -> str:
    text = cell.strip()
    if DATE.fullmatch(text):
        return "a date or time and not a number"
    if text.endswith("%") or text[:1] in "$€£¥":
        return "with a unit, and not a plain number"
    return "not a number"


def column_fault(name: str | None, cell: str) -> str:
    """Why a text column is not data, and what to do; `name` is None if columns have no names."""
    text, such = cell.strip().lower(), repr(cell.strip()[:40])
    if name is None:
        return (
            f"holds text, such as {such}, and has no name: add a first line of names, and call it "
            "'label' if it is the class of each row"
        )
    if DATE.fullmatch(text):
        return f"holds dates or times, such as {such}: convert it to numbers, or drop it"
    if text in ("true", "false", "yes", "no"):
        return (
            f"holds values such as {such}: write 0 and 1, or give it as context (--given {name})"
        )
    return (
        f"holds text, such as {such}: name it 'label' if it is the class of each row, give it as "
        f"context (--given {name}), or drop it"
    )


# Tables ------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """A column of words: the distinct words, None if missing, and the index of each row's word."""

    different: list[Any]
    codes: np.ndarray

    def of(self, rows: np.ndarray) -> Words:
        """Some rows, and only the words that they have."""
        used, codes = np.unique(self.codes[rows], return_inverse=True)
        return Words([self.different[i] for i in used.tolist()], codes)

    def missing(self) -> np.ndarray:
        """A mask of the cells that stand for missing values."""
        return np.array([is_missing(word) for word in self.different], bool)[self.codes]


class Table(ABC):
    """A table as it is read.

    Attributes:
        names: Names of the columns; empty where there are none.
        kinds: What each column holds.
        rows: The number of rows.
        ragged: Rows that were not read, with the reasons.
    """

    names: tuple[str, ...] = ()
    kinds: list[Kind]
    rows: int
    ragged: Mapping[str, str] = {}

    @abstractmethod
    def x(self, columns: Sequence[int]) -> np.ndarray:
        """Columns of numbers, float32 (rows, columns), not finite where a cell cannot be used."""

    def numbers(self, j: int) -> np.ndarray:
        """A column of numbers that has a name, float64 (rows,)."""
        raise NotImplementedError

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        """A column that has a name, as the arguments of `Words`, in batches of rows."""
        raise NotImplementedError

    def words(self, j: int) -> Words:
        """A column as words."""
        seen: dict[Any, int] = {}
        codes = [
            np.array([seen.setdefault(word, len(seen)) for word in words], np.int64)[codes]
            for words, codes in self.batches_of_words(j)
        ]
        return Words(list(seen), np.concatenate([np.empty(0, np.int64), *codes]))

    def cells(self, j: int, most: int | None = None) -> list[str]:
        """The cells of a column as text: all, or the first of many."""
        found: list[str] = []
        for words, codes in self.batches_of_words(j):
            texts = ["" if word is None else str(word) for word in words]
            found += [texts[code] for code in codes.tolist()]
            if most is not None and len(found) >= most:
                break
        return found

    def column(self, j: int) -> tuple[np.ndarray | Words, np.ndarray]:
        """A column as numbers or words, and a mask of the cells that cannot be used."""
        if self.kinds[j] == "text":
            words = self.words(j)
            return words, words.missing()
        values = self.numbers(j)
        return values, ~(np.abs(values) <= LARGEST)

    def called(self, j: int) -> str:
        """The name of a column in messages."""
        return called(self.names, j)

    def row_id(self, i: int) -> str:
        """The name of a row, where no column has one."""
        return str(i)

    def row_called(self, i: int) -> str:
        """The name of a row in messages."""
        return f"row {i} (from 0)"

    def reason(self, i: int, j: int, value: float | None) -> str:
        """Why a cell cannot be used; its value is None in a column of words."""
        return cell_fault("") if value is None else number_fault(value)

    def fault(self, i: int, j: int, value: float | None) -> tuple[str, str]:
        """A cell that cannot be used, and the reason."""
        return f"{self.row_called(i)}, {self.called(j)}", self.reason(i, j, value)

    def official(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which of some rows are for testing, and which for validation."""
        return None, None


# Roles -------------------------------------------------------------------------------------------


class Roles(NamedTuple):
    """The role of each column of a table: in x, in the context, labels, or names of rows."""

    data: list[int]
    given: list[int]
    label: int | None = None
    ids: int | None = None


def roles(table: Table, request: Request) -> Roles:
    """Decide what each column is, and note whatever is not data.

    Raises:
        DataError: If names occur twice, wanted columns are missing, a pattern of the context
            matches nothing, or columns cannot be used, all of which are named.
    """
    names, wanted = table.names, request.columns

    def called(j: int) -> str:
        unnamed = f"column {j + 1}, which has no name," if names else f"column {j + 1}"
        return table.called(j) if names and names[j] else unnamed

    refuse_twice(names, request)
    left = []
    for j, kind in enumerate(table.kinds):
        if kind == "empty" and not (names and names[j] in (wanted or ())):
            request.note(f"{called(j)} is empty, and is left out")
        else:
            left.append(j)
    found = _named_roles(table, left, called, request) if names else Roles(left, [])
    if not names and request.given:
        raise request.error(
            "given: its columns have no names: add a first line of names, or give a "
            "file of context"
        )
    if wanted is not None and len(wanted) != len(found.data):
        raise request.error(
            f"has {len(found.data)} columns without names, and the model needs "
            f"{len(wanted)}: {named(wanted, 20)}"
        )
    faults = {}
    for j in found.data:
        if table.kinds[j] == "text":
            cells = [cell for cell in table.cells(j, LOOKED_AT) if not is_missing(cell)]
            words = (cell for cell in cells if not is_number(cell))
            cell = next(words, cells[0] if cells else "")
            faults[table.called(j)] = column_fault(names[j] if names else None, cell)
        elif names and not names[j]:
            faults[f"column {j + 1}"] = "has no name: name it, or drop it"
    if len(faults) == 1:
        ((name, reason),) = faults.items()
        raise request.error(f"{name} {reason}")
    if faults:
        raise request.error(f"{len(faults)} columns cannot be used:\n{listing(faults)}")
    if not found.data and not found.given:
        raise request.error("no column holds data: give a table of numbers")
    return found


def refuse_twice(names: Sequence[str], request: Request) -> None:
    """Refuse columns of one name."""
    if twice := sorted({repr(name) for name in names if name and names.count(name) > 1}):
        raise request.error(
            f"several columns are called {named(twice)}: give each a name of its own"
        )


def _named_roles(
    table: Table, left: list[int], called: Callable[[int], str], request: Request
) -> Roles:
    """The roles of columns that have names."""
    names, given = table.names, []
    for pattern in request.given:
        matched = [j for j in left if fnmatchcase(names[j], pattern)]
        if not matched and not any(fnmatchcase(names[j], pattern) for j in given):
            raise request.error(
                f"given: no column matches {pattern!r}: give one of "
                f"{named([name for name in names if name], 20)}"
            )
        given += matched
        left = [j for j in left if j not in matched]
    data = None
    if request.columns is not None:
        missing = set(request.columns) - {names[j] for j in left}
        if missing:
            missing = [repr(name) for name in request.columns if name in missing]
            raise request.error(
                f"has no column {named(missing, 20)}, which the model needs: its "
                f"columns are {named(names, 20)}"
            )
        data = [names.index(name) for name in request.columns]
        left = [j for j in left if j not in data]
    label = next((j for j in reversed(left) if _is_label(table, j)), None)
    if label is not None:
        left.remove(label)
        request.note(f"column {names[label]!r} is taken as labels; rename it if it is data")
    ids = [j for j in left if names_rows(table, j)]
    for j in ids:
        request.note(f"{called(j)} is different in every row: it names rows, and is not data")
    left = [j for j in left if j not in ids]
    if data is not None and left:
        unknown = named([repr(names[j]) for j in left], 20)
        request.note(f"columns that the model does not know are left out: {unknown}")
    return Roles(left if data is None else data, given, label, ids[0] if ids else None)


def _is_label(table: Table, j: int) -> bool:
    """Whether a column has the name of a label, and no fractions.

    `y` must be the last column of all, with no `x` beside it.
    """
    lower = [name.lower() for name in table.names]
    if lower[j] not in LABEL_NAMES or len(lower) < 2:
        return False
    if lower[j] == "y" and (j < len(lower) - 1 or "x" in lower):
        return False
    batches = table.batches_of_words(j)  # they are read up to the first fraction
    return all(label_values(words) is not None for words, _ in batches)


def names_rows(table: Table, j: int) -> bool:
    """Whether a column names the rows: all its cells differ, and it is text, or called an id."""
    kind, called = table.kinds[j], is_called_id(table.names[j])
    if kind == "empty" or (kind == "number" and not called):
        return False
    texts = table.cells(j, LOOKED_AT)
    whole = kind == "text" or all(map(WHOLE.fullmatch, texts))
    return whole and (called or len(texts) > 1) and len(set(texts)) == len(texts)


def label_values(words: Sequence[Any]) -> np.ndarray | None:
    """Labels as whole numbers or strings; None if there are fractions, as in data.

    >>> label_values(["1", "2.0", None]).tolist(), label_values(["a"]).tolist()
    ([1, 2], ['a'])
    >>> label_values([0.5])
    """
    values = np.array([w.strip() if isinstance(w, str) else w for w in words if not is_missing(w)])
    if values.dtype.kind == "U" and all(map(is_number, values)):
        values = values.astype(np.float64)
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values) & (values == np.rint(values)) & (abs(values) < 2**53)
    return values.astype(np.int64) if whole.all() else None


def assemble(table: Table, request: Request) -> Dataset:
    """Data, labels, names of rows and context of a table.

    x is float32 (N, D), finite, with no constant column and no column twice; on disk, it stays
    memory-mapped. Rows that cannot be used are refused, or left out.

    Raises:
        DataError: Naming all columns that cannot be used, or else all cells.
    """
    found = roles(table, request)
    x, names = table.x(found.data), tuple(table.names[j] for j in found.data if table.names)
    beside = {j: table.column(j) for j in found.given}
    words = None
    if found.label is not None:
        words = table.words(found.label)
        beside[found.label] = words, words.missing()
    known = facts(x, request)
    bad = np.zeros(table.rows, bool)
    bad[known["bad"]] = True
    for _, unusable in beside.values():
        bad |= unusable
    faults = dict(table.ragged)
    for i in np.flatnonzero(bad).tolist():
        if len(faults) >= NAMED and isinstance(x, np.memmap):
            break
        row = x[i]
        columns = np.flatnonzero(~np.isfinite(row))[:NAMED].tolist()
        wrong: dict[int, float | None] = {found.data[k]: float(row[k]) for k in columns}
        for j, (cells, unusable) in beside.items():
            if unusable[i]:
                wrong[j] = None if isinstance(cells, Words) else float(cells[i])
        faults.update(table.fault(i, j, wrong[j]) for j in sorted(wrong))
    good, total = np.flatnonzero(~bad), table.rows + len(table.ragged)
    request.refuse(faults, "rows", total, total - len(good))
    rows = None
    if len(good) < total:
        request.note(f"{total - len(good)} of {total} rows are left out: they cannot be used")
        if not len(good):
            raise request.error("no row can be used: fill the cells, or drop columns")
        if isinstance(x, np.memmap):
            rows = good
        else:
            x = x[good]
            known = facts(x, request)
    kept = list(range(x.shape[1]))
    if len(good) and not request.allow_constant:
        kept = _varying(table, x, found.data, known, len(good), request)
        if len(kept) < x.shape[1]:
            x = np.ascontiguousarray(x[:, kept])
    labels, label_names, ids = None, (), None
    if words is not None:
        different, codes = words.of(good)
        values = label_values(different)
        if values is None:  # fractions, once rows with words are left out
            values = np.array(list(map(str, different)))
        labels, label_names = as_labels(values, len(values), request.where)
        labels = labels[codes]
    if found.ids is not None and not isinstance(x, np.memmap):
        cells = table.cells(found.ids)
        ids = tuple(printable(cells[i]) for i in good.tolist())
    elif len(good) < total:
        ids = tuple(map(table.row_id, good.tolist()))
    test, validation = table.official(good)
    return Dataset(
        x,
        rows=rows,
        labels=labels,
        label_names=label_names,
        ids=ids,
        official_test=test,
        official_validation=validation,
        columns=tuple(names[k] for k in kept) if names else (),
        given={table.names[j]: as_given(beside[j][0], good) for j in found.given},
        skipped=faults,
        hashes=Hashes(x, known.get("hashes")),
    )


def as_given(cells: np.ndarray | Words, rows: np.ndarray) -> Given:
    """Some rows of a column as context: words become classes, numbers stay numbers."""
    if isinstance(cells, Words):
        words = cells.of(rows)
        return Given.of_text(words.different).subset(words.codes)
    return Given(cells[rows].astype(np.float32))


def _varying(
    table: Table,
    x: np.ndarray,
    columns: Sequence[int],
    known: Mapping[str, np.ndarray],
    n: int,
    request: Request,
) -> list[int]:
    """The columns of x to keep: not those that repeat another, whose density is infinite.

    Constant columns are refused. Notes name columns for which float32 is too coarse, and columns
    that only count the rows.
    """
    low, high = known["low"], known["high"]

    def listed(which: np.ndarray) -> str:
        return named([table.called(columns[k]) for k in which.tolist()])

    if len(constant := np.flatnonzero(low == high)):
        if n == 1:
            raise request.error("holds a single example: give more")
        raise request.error(
            f"{listed(constant)} {'are' if len(constant) > 1 else 'is'} constant in "
            "float32, where a density is infinite: drop it, or subtract an offset"
        )
    kept: dict[tuple, list[int]] = {}
    pairs, ends = [], x[[0, -1]]
    for k in range(x.shape[1]):
        like = kept.setdefault((low[k], high[k], *ends[:, k].tolist()), [])
        same = (i for i in like if all((b[:, i] == b[:, k]).all() for b in blocks(x)))
        if (first := next(same, None)) is None:
            like.append(k)
        else:
            pairs.append(f"{table.called(columns[k])} repeats {table.called(columns[first])}")
    if pairs:
        text = "; ".join(pairs[:5]) + ("; ..." if len(pairs) > 5 else "")
        if not table.names or isinstance(x, np.memmap):
            raise request.error(f"{text}, where a density is infinite: drop it")
        request.note(f"{text}, and is left out")
    which = np.array(sorted(k for like in kept.values() for k in like), np.int64)
    low, high, start = low[which], high[which], np.asarray(x[:1000, which], np.float64)
    step = np.spacing(np.maximum(abs(low), abs(high)).astype(np.float32))
    coarse = (step > COARSE * (high - low)) & (low < high)
    if coarse.any():
        request.note(
            f"float32 keeps few different values of {listed(which[coarse])}: subtract an offset"
        )
    counting = (np.diff(start, axis=0) == 1).all(0) & (high - low == n - 1) & (n > 2)
    if counting.any():
        request.note(
            f"{listed(which[counting])} counts the rows: drop it, unless it is a measurement"
        )
    return which.tolist()
