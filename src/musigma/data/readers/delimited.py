"""Delimited text tables (.csv, .tsv) in the usual encodings, separators and decimal signs."""

from __future__ import annotations

import codecs
import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from musigma.data.columns import (
    COMMA_DECIMAL,
    COMMA_GROUPS,
    LABEL_NAMES,
    Convert,
    Table,
    assemble,
    comma_decimal,
    convention,
    is_called_id,
    is_missing,
    is_number,
    plain_text,
)
from musigma.data.errors import DataError, damage, printable
from musigma.data.raw import RawData, Request

SEPARATORS = ",;\t| "
SAMPLE = 50  # lines from which the format is read


def read_delimited(path: Path, request: Request) -> RawData:
    """A table of numbers; all faults are found at once."""
    return assemble(read_table(path, request), request)


class _Format(NamedTuple):
    """How a file is written: its encoding, its separator, and the lines before the table."""

    encoding: str
    separator: str
    skip: int


def read_table(path: Path, request: Request) -> Table:
    """The names and cells of a file.

    Raises:
        DataError: If it is empty, or not text.
    """
    with damage(request.where):
        form = _format(path, request)
        with _opened(path, form) as file:
            first = next(_split(file, form.separator), (0, None))[1]
        if first is None:
            raise DataError(f"{request.where}: is empty: give a table of numbers")
        first = [printable(cell.strip()) for cell in first]
        table = _parse(path, form, float, first)
        commas = [
            cell
            for j, cells in table.texts.items()
            for cell, value in zip(cells[1:], table.values[1:, j], strict=True)
            if np.isnan(value) and "," in cell and _may_be_number(cell)
        ]
        convert, table.doubt = convention(commas) if commas else (None, "")
        if convert is not None:
            table = _parse(path, form, convert, first)
            how = "decimal commas" if convert is comma_decimal else "commas in numbers"
            request.note(f"{how} are read as such: {commas[0]!r} is {convert(commas[0]):g}")
    return _with_names(table, first, request)


def _format(path: Path, request: Request) -> _Format:
    with path.open("rb") as file:
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
    with path.open(encoding=encoding, newline="") as file:
        for line in file:
            if line.startswith("#"):
                request.note(f"line {skip + 1} is left out, a comment: {printable(line.strip())}")
            elif match := re.match(r"sep=(.)\s*$", line, re.IGNORECASE):
                separator = match[1]  # as Excel writes it
            elif line.strip():
                break
            skip += 1
        else:
            return _Format(encoding, ",", 0 if skip == 0 else skip)
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


def _opened(path: Path, form: _Format) -> TextIO:
    file = path.open(encoding=form.encoding, newline="")
    for _ in range(form.skip):
        file.readline()
    return file


def _split(lines: Iterator[str] | TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each line, from 1, and its cells; empty lines are left out."""
    if separator == " ":
        return ((i, cells) for i, line in enumerate(lines, 1) if (cells := line.split()))
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    return ((reader.line_num, cells) for cells in reader if cells)


def _parse(path: Path, form: _Format, convert: Convert, first: list[str]) -> Table:
    """All cells, the first line among them; of some columns the texts are kept."""
    width = len(first)
    values, lines, ragged = array("d"), array("q"), {}
    texts: dict[int, list[str]] = {j: [] for j, name in enumerate(first) if is_called_id(name)}
    with _opened(path, form) as file:
        for number, cells in _split(file, form.separator):
            line = number + form.skip
            if len(cells) != width:
                ragged[f"line {line}"] = (
                    f"has {len(cells)} cells and the first line {width}: make them equal"
                )
                continue
            try:
                values.extend(list(map(convert, cells)))
            except ValueError:
                for j, cell in enumerate(cells):
                    try:
                        values.append(convert(cell))
                    except ValueError:
                        values.append(np.nan)
                        if lines and j not in texts:
                            texts[j] = [
                                first[j],
                                *map(plain_text, values[j + width :: width][:-1]),
                            ]
            for j, column in texts.items():
                column.append(cells[j])
            lines.append(line)
    array_ = np.array(values).reshape(-1, width)
    return Table((), array_, texts, [], lambda i: f"line {lines[i]}", ragged)


def _with_names(table: Table, first: list[str], request: Request) -> Table:
    """The table without its first line, if that has the names of the columns; and their kinds."""
    numbers = (~np.isnan(table.values[0])).tolist()
    header = _is_header(first, numbers, table.values[1:])
    if header and all(numbers):
        request.note(f"the first line, {','.join(first)}, is taken as names of columns")
    if header:
        row_name = table.row_name
        table.names, table.values = tuple(first), table.values[1:]
        table.texts = {j: cells[1:] for j, cells in table.texts.items()}
        table.row_name = lambda i: row_name(i + 1)
    n = len(table.values)
    for j, column in enumerate(table.values.T):
        no_number = np.flatnonzero(np.isnan(column)).tolist()
        cells = (
            [table.texts[j][i] for i in no_number] if j in table.texts else [""] * len(no_number)
        )
        text = sum(not _may_be_number(cell) for cell in cells)
        rest = n - text - sum(map(is_missing, cells))
        table.kinds.append("text" if text > rest else "number" if rest or not n else "empty")
    return table


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
