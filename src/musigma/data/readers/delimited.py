"""Delimited text tables (.csv, .tsv) in the usual encodings, separators and decimal signs."""

from __future__ import annotations

import codecs
import csv
import gzip
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from musigma.data.cache import float32
from musigma.data.errors import damage, printable
from musigma.data.raw import Request
from musigma.data.tables import (
    COMMA_DECIMAL,
    COMMA_GROUPS,
    LABEL_NAMES,
    PADDED,
    Content,
    Convert,
    Table,
    cell_fault,
    comma_decimal,
    convention,
    is_called_id,
    is_missing,
    is_number,
    number_fault,
)

SEPARATORS = ",;\t| "
SAMPLE = 50  # lines from which the format is read


class _Format(NamedTuple):
    """How a file is written: its encoding, its separator, and the lines before the table."""

    encoding: str
    separator: str
    skip: int


class Delimited(Table):
    """The table in a file, as numbers; NaN where a cell is missing or not a number.

    Of columns that have such cells, or may name rows, the text is kept too.

    Raises:
        DataError: If the file is empty, or not text.
    """

    def __init__(self, path: Path, request: Request):
        with damage(request.where):
            form = _format(path, request)
            first = next(_rows(path, form), (0, None))[1]
            if first is None:
                raise request.error("is empty: give a table of numbers")
            first = [printable(cell.strip()) for cell in first]
            start = [cells for _, cells in islice(_rows(path, form), 1, SAMPLE)]
            self.padded = _columns_with(PADDED, start)
            self.points = _columns_with(re.compile(r".*\."), start)
            self._parse(path, form, float, first)
            self._keep_texts(path, form, first)
            commas = [
                cell
                for j, cells in self.texts.items()
                for cell, value in zip(cells[1:], self.values[1:, j], strict=True)
                if np.isnan(value) and "," in cell and _may_be_number(cell)
            ]
            convert, self.doubt = convention(commas) if commas else (None, "")
            if convert is not None:
                self._parse(path, form, convert, first)
                self._keep_texts(path, form, first)
                how = "decimal commas" if convert is comma_decimal else "commas in numbers"
                request.note(f"{how} are read as such: {commas[0]!r} is {convert(commas[0]):g}")
        numbers = (~np.isnan(self.values[0])).tolist()
        if _is_header(first, numbers, self.values[1:]):
            if all(numbers):
                request.note(f"the first line, {','.join(first)}, is taken as names of columns")
            self.names, self.values, self.lines = tuple(first), self.values[1:], self.lines[1:]
            self.texts = {j: cells[1:] for j, cells in self.texts.items()}
        self.rows, width = self.values.shape
        self.kinds = [self._kind(j) for j in range(width)]
        self.storage = [self._storage(j) for j in range(width)]

    def _parse(self, path: Path, form: _Format, convert: Convert, first: list[str]) -> None:
        """Read all numbers, the first line among them."""
        values, self.lines, self.ragged = array("d"), array("q"), {}

        def number(cell: str) -> float:
            try:
                return convert(cell)
            except ValueError:
                return np.nan

        for line, cells in _rows(path, form):
            if len(cells) != len(first):
                self.ragged[f"line {line}"] = (
                    f"has {len(cells)} cells and the first line {len(first)}: make them equal"
                )
                continue
            try:
                values.extend(list(map(convert, cells)))
            except ValueError:
                values.extend(map(number, cells))
            self.lines.append(line)
        self.values = np.array(values).reshape(-1, len(first))

    def _keep_texts(self, path: Path, form: _Format, first: list[str]) -> None:
        """Keep the text of columns that have cells other than numbers, or may name rows."""
        values = self.values[1:] if len(self.values) > 1 else self.values
        gaps = np.atleast_1d(np.isnan(values).any(0))
        self.texts: dict[int, list[str]] = {
            j: []
            for j, name in enumerate(first)
            if gaps[j] or j in self.padded or is_called_id(name)
        }
        for _, cells in _rows(path, form) if self.texts else ():
            if len(cells) == len(first):
                for j, column in self.texts.items():
                    column.append(cells[j].strip())

    def _kind(self, j: int) -> Content:
        no_number = np.flatnonzero(np.isnan(self.values[:, j])).tolist()
        cells = [self.texts[j][i] for i in no_number]
        text = sum(not _may_be_number(cell) for cell in cells)
        rest = self.rows - text - sum(map(is_missing, cells))
        return "text" if text > rest else "number" if rest or not self.rows else "empty"

    def _storage(self, j: int) -> str:
        if self.kinds[j] != "number" or j in self.padded:
            return "string"
        values = self.values[:, j]
        whole = (np.isnan(values) | (values == np.rint(values))).all()
        return "int64" if whole and j not in self.points else "float64"

    def markers(self) -> Counter[str]:
        found = Counter(cell for cells in self.texts.values() for cell in cells)
        return Counter({cell: n for cell, n in found.items() if cell and is_missing(cell)})

    def drop(self, columns: Sequence[str]) -> None:
        """Leave out columns, by their names."""
        kept = [j for j, name in enumerate(self.names) if name not in columns]
        self.values = self.values[:, kept]
        self.texts = {kept.index(j): cells for j, cells in self.texts.items() if j in kept}
        for name in ("kinds", "storage"):
            setattr(self, name, [getattr(self, name)[j] for j in kept])
        self.names = tuple(self.names[j] for j in kept)

    def x(self, columns: Sequence[int]) -> np.ndarray:
        return float32(self.values[:, columns])

    def numbers(self, j: int) -> np.ndarray:
        return self.values[:, j]

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        if j in self.texts:
            yield self.texts[j], np.arange(self.rows)
        else:
            yield from super().batches_of_words(j)

    def not_numbers(self, j: int) -> Mapping[int, str]:
        cells = self.texts.get(j, [])
        return {
            i: cell_fault(cells[i], self.doubt)
            for i in np.flatnonzero(np.isnan(self.values[:, j])).tolist()
            if not is_missing(cells[i])
        }

    def called(self, j: int) -> str:
        return super().called(j) if self.names else f"column {j + 1}"

    def row_called(self, i: int) -> str:
        return f"line {self.lines[i]}"

    row_id = row_called

    def reason(self, i: int, j: int, value: float | None) -> str:
        if value is not None and not np.isnan(self.values[i, j]):
            return number_fault(self.values[i, j])
        return cell_fault(self.texts[j][i], self.doubt)


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path, encoding: str) -> IO[str]:
    if _is_zipped(path):
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _columns_with(pattern: re.Pattern[str], rows: list[list[str]]) -> set[int]:
    """The columns in which the pattern occurs."""
    return {j for cells in rows for j, cell in enumerate(cells) if pattern.match(cell)}


def _rows(path: Path, form: _Format) -> Iterator[tuple[int, list[str]]]:
    """The number of each line of the table, from 1, and its cells."""
    with _open(path, form.encoding) as file:
        for _ in range(form.skip):
            file.readline()
        for line, cells in _split(file, form.separator):
            yield line + form.skip, cells


def _split(lines: Iterator[str] | IO[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each line, from 1, and its cells; empty lines are left out."""
    if separator == " ":
        return ((i, cells) for i, line in enumerate(lines, 1) if (cells := line.split()))
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    return ((reader.line_num, cells) for cells in reader if cells)


def _format(path: Path, request: Request) -> _Format:
    """The format of a file; what is not obvious is noted."""
    with gzip.open(path) if _is_zipped(path) else path.open("rb") as file:
        start = file.read(4)
        encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        if not encoding:
            file.seek(0)
            decoder, encoding = codecs.getincrementaldecoder("utf-8")(), "utf-8-sig"
            try:
                while block := file.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", True)
            except UnicodeDecodeError:
                encoding = "cp1252"
                request.note("it is not UTF-8, and is read as Windows-1252 (like Latin-1)")
    skip, separator = 0, ""
    with _open(path, encoding) as file:
        for line in file:
            if line.startswith("#"):
                request.note(
                    f"line {skip + 1} is a comment, and is left out: {printable(line.strip())}"
                )
            elif match := re.match(r"sep=(.)\s*$", line, re.IGNORECASE):
                separator = match[1]  # as Excel writes it
            elif line.strip():
                break
            skip += 1
        else:
            return _Format(encoding, ",", skip)
        lines = [line, *islice(file, SAMPLE)]
    return _Format(encoding, separator or _separator(lines), skip)


def _separator(lines: Sequence[str]) -> str:
    """The separator with which all lines have as many cells, and most cells are numbers."""
    best, chosen = (False, -1.0), ","
    for separator in SEPARATORS:
        rows = [cells for _, cells in _split(iter(lines), separator)]
        if not rows or len(rows[0]) < 2:
            continue
        cells = [cell for row in rows[1:] or rows for cell in row]
        numbers = sum(is_number(cell) or _may_be_number(cell) for cell in cells)
        found = len({len(row) for row in rows}) == 1, numbers / len(cells)
        if found > best:
            best, chosen = found, separator
    return chosen


def _may_be_number(cell: str) -> bool:
    """Whether a cell is a number in some convention, or missing."""
    text = cell.strip()
    known = COMMA_DECIMAL.fullmatch(text) or COMMA_GROUPS.fullmatch(text)
    return known is not None or is_missing(text)


def _is_header(first: list[str], numbers: list[bool], below: np.ndarray) -> bool:
    """Whether the first line has the names of the columns.

    Those are words over numbers; numbers that count, as pandas writes them; or whole numbers over
    columns of fractions, such as years. `numbers` tells which cells of the line are numbers.
    """
    if not any(numbers) or not len(below):
        return not any(numbers)
    filled = (~np.isnan(below)).mean(0) > 0.5
    if any(cell and not n and f for cell, n, f in zip(first, numbers, filled, strict=True)):
        return True
    counts = first[1:] if not first[0] else first
    counts = counts[:-1] if counts[-1].lower() in LABEL_NAMES else counts
    if len(first) < 2:
        return False
    if counts == [str(i) for i in range(len(counts))]:
        return True
    fractions = (below != np.rint(below)).mean(0) > 0.5
    return all(re.fullmatch(r"\d+", c) for c in first) and bool(fractions.all())
