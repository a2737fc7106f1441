"""Cells and columns of tables: text as numbers; and which columns are data, labels or context.

Nothing is decided in silence: whatever is not data is noted, and what cannot be used is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from musigma.data.errors import listing, named

if TYPE_CHECKING:
    from musigma.data.raw import Request
    from musigma.data.tables import Table

LABEL_NAMES = ("label", "class", "target", "y")
ID_NAME = re.compile(
    r"|unnamed:? ?\d*|index|id|idx|key|uuid|guid|.*[ _.-](id|idx|index|uuid|guid)"
    r"|row[ _.]?(index|id|idx|names?|no|nr|num|number)?"
    r"|(file|image|img)[ _]?(names?)?|path|name"
)
CAMEL_ID = re.compile(r".*[a-z]I[dD]")
LOOKED_AT = 100_000  # cells by which it is decided what a column of a large table is
MISSING = frozenset(
    ["", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "?", "-", "--", "."]
)
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?.*")
COMMA_DECIMAL = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d*)(,\d+)?([eE][+-]?\d+)?")
COMMA_GROUPS = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d*)(\.\d*)?([eE][+-]?\d+)?")
WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")

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


def column_fault(name: str | None, cell: str) -> str:
    """Why a column of text is no data, and what to do; `name` is None if columns have no names."""
    text, such = cell.strip().lower(), repr(cell.strip()[:40])
    if name is None:
        return (
            f"holds text, such as {such}, and has no name: add a first line of names, and call it "
            "'label' if it is the class of each row"
        )
    if DATE.fullmatch(text):
        return f"holds dates or times, such as {such}: convert it to numbers, or drop it"
    if text in ("true", "false", "yes", "no"):
        return f"holds {such} and its like: write 0 and 1, or give it as context (--given {name})"
    return (
        f"holds text, such as {such}: name it 'label' if it is the class of each row, give it as "
        f"context (--given {name}), or drop it"
    )


# Roles -------------------------------------------------------------------------------------------


class Roles(NamedTuple):
    """What each column of a table is: of x, of the context, the labels, or the names of rows."""

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

    if twice := sorted({repr(name) for name in names if name and names.count(name) > 1}):
        raise request.error(
            f"several columns are called {named(twice)}: give each a name of its own"
        )
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
            cells = table.cells(j, LOOKED_AT)
            cell = next(cell for cell in cells if not is_missing(cell) and not is_number(cell))
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
        request.note(f"{called(j)} is different in every row: it names rows, and is no data")
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
