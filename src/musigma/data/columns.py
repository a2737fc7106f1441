"""The columns of a table: which are data, labels, names of rows, or context; and text as numbers.

Nothing is decided in silence: whatever is not data is noted, and what cannot be used is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import numpy as np

from musigma.data.errors import DataError, listing, named, printable
from musigma.data.given import Given
from musigma.data.raw import RawData, Request, as_labels

LABEL_NAMES = ("label", "class", "target", "y")
ID_NAME = re.compile(
    r"|unnamed:? ?\d*|index|id|idx|key|uuid|guid|.*[ _.-](id|idx|index|uuid|guid)"
    r"|row[ _.]?(index|id|idx|names?|no|nr|num|number)?"
    r"|(file|image|img)[ _]?(names?)?|path|name"
)
CAMEL_ID = re.compile(r".*[a-z]I[dD]")
LARGEST = np.finfo(np.float32).max
MISSING = frozenset(
    ["", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "?", "-", "--", "."]
)
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?.*")
COMMA_DECIMAL = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d*)(,\d+)?([eE][+-]?\d+)?")
COMMA_GROUPS = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d*)(\.\d*)?([eE][+-]?\d+)?")

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


def is_missing(cell: str) -> bool:
    """Whether a cell stands for a missing value.

    >>> [is_missing(cell) for cell in ("", " NA ", "0")]
    [True, True, False]
    """
    return cell.strip().lower() in MISSING


def plain_text(value: float) -> str:
    """A number as text, with all of its digits."""
    return f"{value:.17g}"


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

    def reads(convert: Convert, cell: str) -> bool:
        try:
            convert(cell)
        except ValueError:
            return False
        return True

    decimal, groups = ([c for c in cells if reads(f, c)] for f in (comma_decimal, comma_groups))
    if len(decimal) == len(groups) == len(cells):
        return (
            None,
            f"{cells[0]!r} may be {comma_groups(cells[0]):g} or {comma_decimal(cells[0]):g}",
        )
    if len(decimal) == len(cells):
        return comma_decimal, ""
    if len(groups) == len(cells):
        return comma_groups, ""
    return None, ""


def cell_fault(cell: str, doubt: str = "") -> str:
    """Why a cell of a column of numbers is none, and what to do."""
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


def column_fault(name: str, cell: str) -> str:
    """Why a column of text is no data, and what to do."""
    text = repr(cell.strip()[:40])
    if DATE.fullmatch(cell.strip()):
        return f"holds dates or times, such as {text}: convert it to numbers, or drop it"
    if cell.strip().lower() in ("true", "false", "yes", "no"):
        return f"holds {text} and its like: write 0 and 1, or give it as context (--given {name})"
    return (
        f"holds text, such as {text}: name it 'label' if it is the class of each row, give it as "
        f"context (--given {name}), or drop it"
    )


# Roles -------------------------------------------------------------------------------------------


@dataclass
class Roles:
    """What each column of a table is.

    Attributes:
        data: The columns of x.
        label: The column of labels.
        ids: The column that names the rows.
        given: The columns of the context.
        faults: Columns that cannot be used, with the reasons.
    """

    data: list[int] = field(default_factory=list)
    label: int | None = None
    ids: int | None = None
    given: list[int] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)


def roles(
    names: Sequence[str],
    kinds: Sequence[Kind],
    cells: Callable[[int], Sequence[str]],
    is_label: Callable[[int], bool],
    request: Request,
) -> Roles:
    """Decide what each column is, and note whatever is not data.

    Args:
        names: Their names.
        kinds: What they hold.
        cells: Cells of a column as text: of all rows, or of many.
        is_label: Whether a column holds whole numbers or words rather than fractions.
        request: The columns that are wanted, the patterns of the context, and where notes go.

    Raises:
        DataError: If names occur twice, wanted columns are missing, or a pattern matches nothing.
    """
    found = Roles()
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{request.where}: several columns are called {named([repr(n) for n in twice])}: give "
            "each a name of its own"
        )
    left = list(range(len(names)))
    for j in [j for j in left if kinds[j] == "empty" and names[j] not in (request.columns or ())]:
        left.remove(j)
        what = repr(names[j]) if names[j] else f"{j + 1}, which has no name,"
        request.note(f"column {what} is empty, and is left out")
    for pattern in request.given:
        matched = [j for j in left if fnmatchcase(names[j], pattern)]
        if not matched and not any(fnmatchcase(names[j], pattern) for j in found.given):
            raise DataError(
                f"{request.where}: given: no column matches {pattern!r}: give one of "
                f"{named([name for name in names if name], 20)}"
            )
        found.given += matched
        left = [j for j in left if j not in matched]
    if request.columns is not None:
        missing = [name for name in request.columns if name not in [names[j] for j in left]]
        if missing:
            raise DataError(
                f"{request.where}: has no column {named([repr(n) for n in missing], 20)}, which "
                f"the model needs: its columns are {named(names, 20)}"
            )
        found.data = [names.index(name) for name in request.columns]
        left = [j for j in left if j not in found.data]
    found.label = _label(names, left, is_label, len(names))
    if found.label is not None:
        left.remove(found.label)
        request.note(f"column {names[found.label]!r} is taken as labels; rename it if it is data")
    for j in list(left):
        if not names_rows(names[j], kinds[j], partial(cells, j)):
            continue
        left.remove(j)
        if found.ids is None:
            found.ids = j
        name = repr(names[j]) if names[j] else f"{j + 1}, which has no name,"
        request.note(f"column {name} is different in every row: it names rows, and is no data")
    if request.columns is None:
        found.data = left
    elif left:
        unknown = named([repr(names[j]) for j in left], 20)
        request.note(f"columns that the model does not know are left out: {unknown}")
    for j in found.data:
        if kinds[j] == "text":
            cell = next(cell for cell in cells(j) if not is_missing(cell) and not is_number(cell))
            found.faults[f"column {names[j]!r}"] = column_fault(names[j], cell)
        elif not names[j]:
            found.faults[f"column {j + 1}"] = "has no name: name it, or drop it"
    return found


def _label(
    names: Sequence[str], left: Sequence[int], is_label: Callable[[int], bool], n: int
) -> int | None:
    """The last column with the name of a label; `y` must be last of all, with no `x` beside it."""
    lower = [name.lower() for name in names]
    for j in reversed(left):
        known = lower[j] in LABEL_NAMES and (lower[j] != "y" or (j == n - 1 and "x" not in lower))
        if known and n > 1 and is_label(j):
            return j
    return None


def names_rows(name: str, kind: Kind, cells: Callable[[], Sequence[str]]) -> bool:
    """Whether a column names the rows: all its cells differ, and it is text, or called an id."""
    called = is_called_id(name)
    if kind == "empty" or (kind == "number" and not called):
        return False
    texts = cells()
    whole = kind == "text" or all(map(_is_whole, texts))
    return whole and (called or len(texts) > 1) and len(set(texts)) == len(texts)


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", cell) is not None


def refuse_columns(found: Roles, request: Request) -> None:
    """Name all columns that cannot be used."""
    if len(found.faults) == 1:
        ((name, reason),) = found.faults.items()
        raise DataError(f"{request.where}: {name} {reason}")
    if found.faults:
        raise DataError(
            f"{request.where}: {len(found.faults)} columns cannot be used:\n"
            f"{listing(found.faults)}"
        )
    if not found.data and not found.given:
        raise DataError(f"{request.where}: no column holds data: give a table of numbers")


# Tables in memory --------------------------------------------------------------------------------


@dataclass
class Table:
    """A table in memory, as it was read.

    Attributes:
        names: Names of the columns; empty where there are none.
        values: float64 (N, W); NaN where a cell is missing or no number.
        texts: All cells of the columns that have cells which are no numbers, or may name rows.
        kinds: What each column holds.
        row_name: What messages call a row.
        ragged: Rows that were not read, with the reasons.
        doubt: Why numbers with commas were not read, if they were not.
    """

    names: tuple[str, ...]
    values: np.ndarray
    texts: Mapping[int, list[str]]
    kinds: list[Kind]
    row_name: Callable[[int], str]
    ragged: dict[str, str] = field(default_factory=dict)
    doubt: str = ""

    def cells(self, j: int) -> list[str]:
        """The cells of a column as text."""
        return self.texts[j] if j in self.texts else list(map(plain_text, self.values[:, j]))

    def called(self, j: int) -> str:
        """What messages call a column."""
        return f"column {self.names[j]!r}" if self.names else f"column {j + 1}"

    def cell_fault(self, i: int, j: int) -> str:
        """Why a cell of a column of numbers cannot be used."""
        if np.isnan(self.values[i, j]):
            return cell_fault(self.texts[j][i] if j in self.texts else "", self.doubt)
        return number_fault(self.values[i, j])


def assemble(table: Table, request: Request) -> RawData:
    """Data, labels, names of rows and context of a table in memory.

    Raises:
        DataError: Naming all columns that cannot be used, or else all cells.
    """
    names, n = table.names, len(table.values)
    if names:
        found = roles(
            names,
            table.kinds,
            table.cells,
            lambda j: label_values(table.cells(j)) is not None,
            request,
        )
    else:
        found = _roles_without_names(table, request)
    refuse_columns(found, request)
    numbers = [*found.data, *(j for j in found.given if table.kinds[j] != "text")]
    words = [j for j in found.given if table.kinds[j] == "text"]
    words += [found.label] if found.label is not None else []
    bad = np.zeros((n, len(table.kinds)), bool)
    with np.errstate(invalid="ignore"):
        bad[:, numbers] = ~(np.abs(table.values[:, numbers]) <= LARGEST)
    for j in words:
        bad[:, j] = [is_missing(cell) for cell in table.cells(j)]
    faults = dict(table.ragged)
    for i, j in np.argwhere(bad).tolist():
        faults[f"{table.row_name(i)}, {table.called(j)}"] = table.cell_fault(i, j)
    good = np.flatnonzero(~bad.any(1))
    if not request.skip_bad:
        total = n + len(table.ragged)
        request.refuse(faults, "rows", total, total - len(good))
    labels, label_names = None, ()
    if found.label is not None:
        cells = table.cells(found.label)
        y = label_values([cells[i] for i in good.tolist()])
        assert y is not None  # `roles` has seen to it
        where = f"{request.where}: {table.called(found.label)}"
        labels, label_names = as_labels(y, len(good), where)
    ids = None
    if found.ids is not None:
        cells = table.cells(found.ids)
        ids = tuple(printable(cells[i]) for i in good.tolist())
    elif len(good) < n:
        ids = tuple(map(table.row_name, good.tolist()))
    given = {names[j]: given_column(table, j, good) for j in found.given}
    return RawData(
        table.values[good][:, found.data],
        labels,
        label_names,
        ids,
        columns=tuple(names[j] for j in found.data) if names else (),
        given=given,
        skipped=faults,
    )


def _roles_without_names(table: Table, request: Request) -> Roles:
    """All columns are data, but for empty ones; text needs a line of names."""
    if request.given:
        raise DataError(f"{request.where}: given: its columns have no names: add a first line")
    found = Roles([j for j, kind in enumerate(table.kinds) if kind != "empty"])
    if len(found.data) < len(table.kinds):
        empty = [table.called(j) for j, kind in enumerate(table.kinds) if kind == "empty"]
        request.note(f"{named(empty)} is empty, and is left out")
    for j in found.data:
        if table.kinds[j] == "text":
            cell = next(c for c in table.cells(j) if not is_missing(c) and not is_number(c))
            found.faults[table.called(j)] = (
                f"holds text, such as {cell.strip()[:40]!r}, and has no name: add a first line of "
                "names, and call it 'label' if it is the class of each row"
            )
    wanted = request.columns
    if wanted is not None and len(wanted) != len(found.data):
        raise DataError(
            f"{request.where}: has {len(found.data)} columns without names, and the model needs "
            f"{len(wanted)}: {named(wanted, 20)}"
        )
    return found


def given_column(table: Table, j: int, rows: np.ndarray) -> Given:
    """A column as context: text becomes classes, sorted by name; numbers stay numbers."""
    if table.kinds[j] == "text":
        return Given.of_text(np.array(table.cells(j))[rows])
    return Given(table.values[rows, j].astype(np.float32))


def label_values(cells: Sequence[Any]) -> np.ndarray | None:
    """A column as labels, whole numbers or strings; None if it holds fractions, as data do.

    >>> label_values(["1", "2.0"]).tolist(), label_values(["a"]).tolist(), label_values([0.5])
    ([1, 2], ['a'], None)
    """
    values = np.array([c.strip() if isinstance(c, str) else c for c in cells])
    if values.dtype.kind == "U" and all(map(is_number, values)):
        values = values.astype(np.float64)
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values) & (values == np.rint(values)) & (abs(values) < 2**53)
    return values.astype(np.int64) if whole.all() else None


def listed(columns: Sequence[str], which: Sequence[int] | np.ndarray) -> str:
    """Columns by their names, or by their numbers where they have none; five at most."""
    return named([called(columns, int(i)) for i in which])


def called(columns: Sequence[str], column: int) -> str:
    """What messages call a column."""
    return f"column {columns[column]!r}" if columns else f"column {column} (from 0)"
