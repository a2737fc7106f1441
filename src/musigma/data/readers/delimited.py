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
    LABEL_NAMES,
    PADDED,
    WIDTH,
    Content,
    Convert,
    Table,
    cell_fault,
    comma_decimal,
    convention,
    is_called_id,
    is_missing,
    is_number,
    is_plain,
    number,
    number_fault,
)
from musigma.files import impostor

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
            first = self._names_of_all(first, start, request)
            self.padded = _columns_with(PADDED, start)
            self.points = _columns_with(re.compile(r".*\."), start)
            self._parse(path, form, number, first)
            self._keep_texts(path, form, first)
            marked = [
                cell
                for j, cells in self.texts.items()
                for cell, value in zip(cells[1:], self.values[1:, j], strict=True)
                if np.isnan(value) and _may_be_number(cell) and not is_missing(cell)
            ]
            convert, self.doubt = convention(marked) if marked else (None, "")
            if convert is not None:
                self._parse(path, form, convert, first)
                self._keep_texts(path, form, first)
                commas = [cell for cell in marked if "," in cell]
                how = "signs between digits" if not commas else "commas in numbers"
                how = "decimal commas" if commas and convert is comma_decimal else how
                cell = (commas or marked)[0]
                request.note(f"{how} are read as such: {cell!r} is {convert(cell):.10g}")
        if self.quote:
            raise request.error(
                f'line {self.quote} opens a quotation mark (") that is never closed: close it, or '
                "remove it"
            )
        if self.blank:
            what = "1 line has" if self.blank == 1 else f"{self.blank:,} lines have"
            request.note(f"{what} only empty cells: left out")
        numbers = (~np.isnan(self.values[0])).tolist()
        if _is_header(first, numbers, self.values[1:]):
            if all(numbers):
                request.note(f"the first line, {','.join(first)}, is taken as names of columns")
            self.names, self.values, self.lines = tuple(first), self.values[1:], self.lines[1:]
            self.texts = {j: cells[1:] for j, cells in self.texts.items()}
        self._count()
        while self.names and self.rows > 1 and self._repeats_header():
            line = f"line {self.lines[0]}"
            words = "holds words where the lines below hold numbers, like more names, or units"
            self.ragged = {line: f"{words}: remove it", **self.ragged}
            self.values, self.lines = self.values[1:], self.lines[1:]
            self.texts = {j: cells[1:] for j, cells in self.texts.items()}
            self._count()
        width = len(self.kinds)
        self.storage = [self._storage(j) for j in range(width)]

    @staticmethod
    def _names_of_all(first: list[str], rows: list[list[str]], request: Request) -> list[str]:
        """The first line, with an empty name added if it has a cell less than all other lines.

        The column without a name is the last where it is empty, and the first if it names rows,
        as R writes tables.

        Raises:
            DataError: If it is neither.
        """
        widths = {len(cells) for cells in rows}
        if len(rows) < 3 or len(widths) > 1 or widths == {len(first)}:
            return first
        refusal = request.error(
            f"the first line has {len(first)} cell{'s' * (len(first) > 1)} and all others "
            f"{widths.pop()}: give each column one name"
        )
        if len(rows[0]) != len(first) + 1:
            raise refusal
        if not any(cells[-1].strip() for cells in rows):
            return [*first, ""]
        names = [cells[0].strip() for cells in rows]
        counted = names == [str(i) for i in range(1, len(names) + 1)]
        numbers = map(is_number, first if counted else first + names)
        if len(set(names)) < len(names) or any(numbers):
            raise refusal
        request.note(
            "the first line has a cell less than the others: their first cells are taken as names "
            "of rows"
        )
        return ["", *first]

    def _parse(self, path: Path, form: _Format, convert: Convert, first: list[str]) -> None:
        """Read all numbers, the first line among them."""
        values, self.lines, self.ragged = array("d"), array("q"), {}
        self.blank, self.quote, start, line, cells = 0, 0, 0, 0, []

        def number_or_nan(cell: str) -> float:
            try:
                return convert(cell)
            except ValueError:
                return np.nan

        for end, cells in _rows(path, form):
            start, line = line + 1, end
            if not self.lines:
                cells = first
            if len(cells) != len(first):
                self.ragged[f"line {line}"] = (
                    f"has {len(cells)} cell{'s' * (len(cells) > 1)} and the first line "
                    f"{len(first)}: make them equal"
                )
                continue
            if _is_blank(cells):
                self.blank += 1
                continue
            try:
                values.extend(list(map(convert, cells)))
            except ValueError:
                values.extend(map(number_or_nan, cells))
            self.lines.append(line)
        self.values = np.array(values).reshape(-1, len(first))
        if any("\n" in cell for cell in cells):  # of the last line
            with _open(path, form.encoding) as file:
                if sum(text.count('"') for text in file) % 2:
                    self.quote = start

    def _keep_texts(self, path: Path, form: _Format, first: list[str]) -> None:
        """Keep the text of columns that have cells other than numbers, or may name rows."""
        values = self.values[1:] if len(self.values) > 1 else self.values
        gaps = np.atleast_1d(np.isnan(values).any(0))
        self.texts: dict[int, list[str]] = {
            j: []
            for j, name in enumerate(first)
            if gaps[j] or j in self.padded or is_called_id(name)
        }
        for line, cells in _rows(path, form) if self.texts else ():
            if line == self.lines[0]:
                cells = first
            if len(cells) == len(first) and not _is_blank(cells):
                for j, column in self.texts.items():
                    column.append(cells[j].strip())

    def _count(self) -> None:
        """Set the number of rows, and what each column holds."""
        self.rows, width = self.values.shape
        self.kinds = [self._kind(j) for j in range(width)]

    def _repeats_header(self) -> bool:
        """Whether the first row has words wherever columns hold numbers."""
        numbers = [j for j, kind in enumerate(self.kinds) if kind == "number"]
        return bool(numbers) and all(
            np.isnan(self.values[0, j]) and not _may_be_number(self.texts[j][0]) for j in numbers
        )

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
        return ((i, cells) for i, line in enumerate(lines, 1) if (cells := _split_at_spaces(line)))
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    return ((reader.line_num, cells) for cells in reader if cells)


def _split_at_spaces(line: str) -> list[str]:
    """The cells of a line, of which some may be in quotation marks."""
    if '"' not in line:
        return line.split()
    return next(csv.reader([" ".join(line.split())], delimiter=" "))


def _format(path: Path, request: Request) -> _Format:
    """The format of a file; what is not obvious is noted."""
    with gzip.open(path) if _is_zipped(path) else path.open("rb") as file:
        start = file.read(1 << 12)
        encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        low, high = (start[i::2].count(0) for i in (1, 0))
        if not encoding and max(low, high) > len(start) / 4 and not min(low, high):
            encoding = "utf-16-le" if low else "utf-16-be"
            request.note("it is read as UTF-16, although no mark of the byte order says so")
        if not encoding and (reason := _no_text(start)):
            raise request.error(reason)
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
    separator = separator or _separator(lines)
    if before := _before_table(lines, separator):
        shown = lines[0].strip()[:WIDTH]
        which = "1 line is" if before == 1 else f"{before} lines are"
        request.note(f"{which} left out before the table, such as {shown!r}")
    return _Format(encoding, separator, skip + before)


def _before_table(lines: Sequence[str], separator: str) -> int:
    """The number of lines above a table: those with fewer cells than its lines and a cell less."""
    rows = list(_split(iter(lines), separator))
    widths = [len(cells) for _, cells in rows]
    usual = max(set(widths), key=widths.count)
    first = widths.index(usual)
    if first and widths[first - 1] == usual - 1 and any(map(is_number, rows[first][1])):
        first -= 1  # names of all columns but one
    return rows[first - 1][0] if first and widths.count(usual) > 2 else 0


def _separator(lines: Sequence[str]) -> str:
    """The separator with which all lines have as many cells, and most cells are numbers."""
    best, chosen = (False, False, -1.0), ","
    for separator in SEPARATORS:
        rows = [cells for _, cells in _split(iter(lines), separator)]
        widths = [len(row) for row in rows]
        if not rows or (usual := max(set(widths), key=widths.count)) < 2:
            continue
        cells = [cell for row in rows[1:] or rows for cell in row]
        numbers = sum(is_number(cell) or _may_be_number(cell) for cell in cells)
        share = widths.count(usual) / len(rows)
        found = share == 1, share > 0.5, numbers / len(cells)
        if found > best:
            best, chosen = found, separator
    return chosen


def _no_text(start: bytes) -> str | None:
    """Why a file is no table of text, by its first bytes."""
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive or an Excel workbook: unpack it, or save the sheet as .csv"
    if re.match(rb'(\[\s*)?\{\s*("|$)', start.lstrip()):
        return "is JSON: write the table as .csv or .parquet, such as by pandas.read_json"
    if sum(byte < 9 or 13 < byte < 27 for byte in start) > len(start) / 50:
        return "is no text: give a table of text, or rename it after its format"
    return impostor(start)


def _is_blank(cells: Sequence[str]) -> bool:
    """Whether several cells are all empty."""
    return len(cells) > 1 and not any(map(str.strip, cells))


def _may_be_number(cell: str) -> bool:
    """Whether a cell is a number in some convention, or missing."""
    text = cell.strip()
    return is_plain(text) or is_missing(text)


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
