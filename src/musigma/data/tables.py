"""Tables as they are read: their columns as numbers or words, and what a cell of text is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from musigma.data.errors import called
from musigma.data.sequences import unusable

LABEL_NAMES = ("label", "class", "target", "y")
ID_NAME = re.compile(
    r"|unnamed:? ?\d*|index|id|idx|key|uuid|guid|.*[ _.-](id|idx|index|uuid|guid)"
    r"|row[ _.]?(index|id|idx|names?|no|nr|num|number)?"
    r"|(file|image|img)[ _]?(names?)?|path|name"
)
CAMEL_ID = re.compile(r".*[a-z]I[dD]")
TYPED = "read columns with their types (--schema infer)"
WIDTH = 40  # characters of a cell that a message shows
LOOKED_AT = 100_000  # cells that decide the kind of a column of a large table
MISSING = frozenset(
    ["", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "?", "-", "--", "."]
)
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?.*")
SIGN, GROUPS, EXPONENT = (
    r"[+\-−]?",
    r"([1-9]\d{0,2}([%s\s'’])\d{3}(\2\d{3})*|\d*)",
    r"([eE][+-]?\d+)?",
)
COMMA_DECIMAL = re.compile(SIGN + GROUPS % "." + r"(,\d+)?" + EXPONENT)
COMMA_GROUPS = re.compile(SIGN + GROUPS % "," + r"(\.\d*)?" + EXPONENT)
MARKED = (
    re.compile(  # a number with a currency or a unit, in parentheses, or with an exponent 1D+02
        r"[(<>≤≥~]?\s*([A-Z]{0,2}[$€£¥₹₽]|(USD|EUR|GBP|CHF|JPY|CNY|INR)\s?)?\s*"
        r"[+\-−]?\s*[$€£¥₹₽]?(?P<number>[.,]?\d([\d.,'’\s]*\d)?)"
        r"(?P<unit>[dD][+-]\d+|\s*([%‰°\"′″]|[^\W\d_])[^\d_]{0,11}|)\s*\)?"
    )
)
PADDED = re.compile(r"\s*[+-]?0\d")  # digits that are not a number: 007
WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")
LIST = re.compile(r"\s*[\[(]\s*[-+.\d].*[\])]\s*", re.DOTALL)
DECIMAL = re.compile(r"(?<![\d.,])\d+[.,]\d+(?![.,]?\d)")  # no part of 10.0.0.1
FILE = re.compile(r"\.[A-Za-z]\w{1,4}$")
UNITS = 5  # different units of the numbers of a column
LARGEST = np.finfo(np.float32).max

Content = Literal["number", "text", "truth", "time", "list", "empty", "other"]
Convert = Callable[[str], float]


# Cells -------------------------------------------------------------------------------------------


def is_number(cell: str) -> bool:
    """Whether a cell is a number with a decimal point, if any.

    >>> is_number(" 1e3"), is_number("1,5"), is_number("nan"), is_number("12_5")
    (True, False, True, False)
    """
    try:
        number(cell)
    except ValueError:
        return False
    return True


def number(cell: str) -> float:
    """The number in a cell as `float` reads it, without the underscores that Python allows.

    >>> number(" 1e3")
    1000.0
    """
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def text_of(value: Any) -> str:
    """A value as text: the shortest one for numbers.

    >>> text_of(2.0), text_of(0.1), text_of(True), text_of("a")
    ('2', '0.1', 'true', 'a')
    """
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_plain(text: str) -> bool:
    """Whether a text is a number in some convention, without units.

    >>> is_plain("1.234,5"), is_plain("1 kg"), is_plain("10.0.0.1")
    (True, False, False)
    """
    return bool(COMMA_DECIMAL.fullmatch(text) or COMMA_GROUPS.fullmatch(text))


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
    """A number with a decimal comma, and points, spaces or apostrophes between groups of digits.

    >>> comma_decimal("1.234,5"), comma_decimal("20,63"), comma_decimal("−1 234,5")
    (1234.5, 20.63, -1234.5)
    """
    if not COMMA_DECIMAL.fullmatch(cell.strip()):
        raise ValueError(cell)
    return float(re.sub(r"[.\s'’]", "", cell).replace(",", ".").replace("−", "-"))


def comma_groups(cell: str) -> float:
    """A number with a decimal point, and commas, spaces or apostrophes between groups of digits.

    >>> comma_groups("1,234.5"), comma_groups("1'234.5")
    (1234.5, 1234.5)
    """
    if not COMMA_GROUPS.fullmatch(cell.strip()):
        raise ValueError(cell)
    return float(re.sub(r"[,\s'’]", "", cell).replace("−", "-"))


def convention(cells: Sequence[str]) -> tuple[Convert | None, str]:
    """How numbers with commas or groups of digits are to be read; and why they cannot be.

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
        doubtful = (cell for cell in cells if comma_groups(cell) != comma_decimal(cell))
        if (cell := next(doubtful, None)) is not None:
            return None, f"{cell!r} may be {comma_groups(cell):g} or {comma_decimal(cell):g}"
    return (fitting[-1] if fitting else None), ""


def with_units(cells: Sequence[str]) -> str | None:
    """The first of some cells if all of them are numbers with units or signs; None otherwise.

    >>> with_units(["1.5 kg", "300 g"]), with_units(["(5)", "$1,200.50"]), with_units(["p1", "p2"])
    ('1.5 kg', '(5)', None)
    """
    texts = [cell.strip() for cell in cells if not is_missing(cell)]
    found = [
        m if (m := MARKED.fullmatch(text)) and is_plain(m["number"]) else None for text in texts
    ]
    units = {match["unit"].strip() for match in found if match and match["unit"][:1] not in "dD"}
    if None in found and all(map(LIST.fullmatch, texts)):
        return None
    decimals = all(DECIMAL.search(text) and not FILE.search(text) for text in texts)
    if (None in found or len(units) > UNITS) and not decimals:
        return None
    marked = [text for text in texts if not is_plain(text)]
    return marked[0] if len(marked) > len(texts) / 2 else None


def unit_fault(cell: str) -> str:
    """Why a column of numbers with units is not data, and what to do."""
    return (
        f"holds numbers with units or signs, such as {cell[:WIDTH]!r}: write plain numbers, or "
        "drop the column"
    )


def cell_fault(cell: str, doubt: str = "") -> str:
    """Why a cell of a column of numbers is not a number, and what to do."""
    if is_missing(cell):
        return "is missing: fill or drop it"
    text = cell.strip()
    if doubt and "," in cell:
        return f"is {text!r}, and {doubt}: write numbers with decimal points"
    shown = repr(text if len(text) <= WIDTH else f"{text[:WIDTH]}...")
    return f"is {shown}, {_kind_of_text(cell)}: fill or drop it"


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
    if with_units([text]):
        return "with a unit or a sign, and not a plain number"
    return "not a number"


def list_fault(cell: str) -> str:
    """Why a column of text that looks like lists is not data, and what to do."""
    return (
        f"holds text that looks like lists, such as {cell.strip()[:40]!r}: text tables have none, "
        "so write a .parquet file with a column of lists, or an array (N, M, F) as .npy"
    )


def column_fault(name: str | None, cell: str) -> str:
    """Why a text column is not data, and what to do; `name` is None if columns have no names."""
    text, such = cell.strip().lower(), repr(cell.strip()[:40])
    if LIST.fullmatch(cell):
        return list_fault(cell)
    if name is None:
        return (
            f"holds text, such as {such}, and has no name: add a first line of names, and call it "
            "'label' if it is the class of each row"
        )
    if DATE.fullmatch(text):
        return f"holds dates or times, such as {such}: {TYPED}, convert it to numbers, or drop it"
    if text in ("true", "false", "yes", "no"):
        return (
            f"holds values such as {such}: {TYPED}, write 0 and 1, or give it as context "
            f"(--given {name})"
        )
    return (
        f"holds text, such as {such}: {TYPED}, name it 'label' if it is the class of each row, "
        f"give it as context (--given {name}), or drop it"
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
        storage: How its values are written: `int64`, `string`, ... as Arrow names types.
        rows: The number of rows.
        ragged: Rows that were not read, with the reasons.
    """

    names: tuple[str, ...] = ()
    kinds: list[Content]
    storage: list[str]
    rows: int
    ragged: Mapping[str, str] = {}

    @abstractmethod
    def x(self, columns: Sequence[int]) -> np.ndarray:
        """Columns of numbers, float32 (rows, columns), not finite where a cell cannot be used."""

    def numbers(self, j: int) -> np.ndarray:
        """A column, float64 (rows,): NaN if there is no number; times in seconds since 1970."""
        raise NotImplementedError

    def sequences(self, j: int) -> np.ndarray:
        """A column of lists of numbers, float32 (rows, M, F); see `musigma.data.sequences`."""
        raise NotImplementedError

    def not_numbers(self, j: int) -> Mapping[int, str]:
        """The rows whose cells are neither numbers nor missing, with the reasons."""
        return {}

    def markers(self) -> Counter[str]:
        """The words that stand for missing values, apart from the empty one."""
        return Counter()

    def lacks(self, word: Any) -> bool:
        """Whether a word stands for a missing value."""
        return is_missing(word)

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        """A column, as the arguments of `Words`, in batches of rows."""
        different, codes = np.unique(self.numbers(j), return_inverse=True)
        yield different.tolist(), codes

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
            texts = ["" if word is None else text_of(word) for word in words]
            found += [texts[code] for code in codes.tolist()]
            if most is not None and len(found) >= most:
                break
        return found

    def column(self, j: int) -> tuple[np.ndarray | Words, np.ndarray]:
        """A column as numbers or words, and a mask of the cells that cannot be used."""
        if self.kinds[j] == "text":
            words = self.words(j)
            return words, words.missing()
        if self.kinds[j] == "list":
            lists = self.sequences(j)
            return lists, unusable(lists)
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


def as_lists(table: Table, j: int) -> str | None:
    """A cell of a column of text whose first cells look like lists; None for other columns."""
    if table.kinds[j] != "text":
        return None
    cells = [cell for cell in table.cells(j, 100)[:100] if not is_missing(cell)]
    return cells[0] if cells and all(map(LIST.fullmatch, cells)) else None


def names_rows(table: Table, j: int) -> bool:
    """Whether a column names the rows: all its cells differ, and it is text, or called an id."""
    kind, called = table.kinds[j], is_called_id(table.names[j])
    if kind in ("empty", "other", "list") or (kind == "number" and not called):
        return False
    texts = table.cells(j, LOOKED_AT)
    measured = with_units(texts[:1000]) or as_lists(table, j)
    if not called and (len(texts) < 2 or measured):
        return False
    whole = kind == "text" or all(map(WHOLE.fullmatch, texts))
    return whole and len(set(texts)) == len(texts)
