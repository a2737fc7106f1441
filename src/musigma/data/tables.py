"""Tables: columns of numbers or words, in memory or in batches of rows, and what is made of them.

A reader makes a `Table` of a file, and `assemble` makes a `Dataset` of it, so arrays, text and
parquet are judged by the same rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from musigma.data.cache import blocks, facts
from musigma.data.columns import Kind, cell_fault, is_missing, label_values, number_fault, roles
from musigma.data.dataset import Dataset, Given, Hashes
from musigma.data.errors import called, named, printable
from musigma.data.raw import Request, as_labels

COARSE = 1e-3  # share of a column's range: float32 steps larger than this lose information
NAMED = 1000  # cells that are named, of those that cannot be used
LARGEST = np.finfo(np.float32).max


class Words(NamedTuple):
    """A column of words: those that are different, None if missing; and the word of each row."""

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
        """What messages call a column."""
        return called(self.names, j)

    def row_id(self, i: int) -> str:
        """The name of a row, where no column has one."""
        return str(i)

    def row_called(self, i: int) -> str:
        """What messages call a row."""
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
        if len(faults) >= NAMED:
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
    """Which columns of x to keep: not those that repeat another, whose density is infinite.

    Constant columns are refused. Noted are columns of which float32 keeps little, and those that
    only count the rows.
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
            f"{listed(which[counting])} counts the rows: drop it, if it is no measurement"
        )
    return which.tolist()
