"""Delimited text tables (.csv, .tsv) in the usual encodings, separators and decimal signs."""

from __future__ import annotations

import codecs
import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from musigma.data.columns import (
    COMMA_DECIMAL,
    COMMA_GROUPS,
    LABEL_NAMES,
    Convert,
    Kind,
    Table,
    assemble,
    convention,
    is_missing,
    is_number,
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


@dataclass
class _Cells:
    """The cells of a file, read with one convention for numbers.

    `odd` are the cells that are no numbers, by column and row; `texts` all cells of some columns.
    """

    values: array = field(default_factory=lambda: array("d"))
    lines: array = field(default_factory=lambda: array("q"))
    odd: dict[int, dict[int, str]] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    ragged: dict[str, str] = field(default_factory=dict)


def read_table(path: Path, request: Request) -> Table:
    """The names and cells of a file.

    Raises:
        DataError: If it is empty, or not text.
    """
    with damage(request.where):
        form = _format(path, request)
        with _opened(path, form) as file:
            sample = [cells for _, cells in islice(_rows(file, form), SAMPLE)]
    if not sample:
        raise DataError(f"{request.where}: is empty: give a table of numbers")
    first, width = [printable(cell.strip()) for cell in sample[0]], len(sample[0])
    words = {j for row in sample for j, cell in enumerate(row[:width]) if not is_number(cell)}
    with damage(request.where):
        cells = _parse(path, form, float, width, words)
        commas = [
            cell
            for column in cells.odd.values()
            for row, cell in column.items()
            if row and "," in cell and _may_be_number(cell)
        ]
        convert, doubt = convention(commas) if commas else (None, "")
        if convert is not None:
            cells = _parse(path, form, convert, width, words)
            how = "decimal commas" if convert.__name__ == "comma_decimal" else "commas in numbers"
            request.note(f"{how} are read as such: {commas[0]!r} is {convert(commas[0]):g}")
    return _table(first, cells, doubt, request)


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


def _rows(file: TextIO, form: _Format) -> Iterator[tuple[int, list[str]]]:
    """The number of each line, from 1, and its cells; empty lines are left out."""
    return ((line + form.skip, cells) for line, cells in _split(file, form.separator))


def _split(lines: Iterator[str] | TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    if separator == " ":
        for number, line in enumerate(lines, 1):
            if cells := line.split():
                yield number, cells
        return
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    for cells in reader:
        if cells:
            yield reader.line_num, cells


def _parse(path: Path, form: _Format, convert: Convert, width: int, words: set[int]) -> _Cells:
    found = _Cells(odd={j: {} for j in range(width)}, texts={j: [] for j in words})
    with _opened(path, form) as file:
        for line, cells in _rows(file, form):
            if len(cells) != width:
                found.ragged[f"line {line}"] = (
                    f"has {len(cells)} cells and the first line {width}: make them equal"
                )
                continue
            try:
                found.values.extend(list(map(convert, cells)))
            except ValueError:
                for j, cell in enumerate(cells):
                    try:
                        found.values.append(convert(cell))
                    except ValueError:
                        found.values.append(np.nan)
                        found.odd[j][len(found.lines)] = cell
            for j in words:
                found.texts[j].append(cells[j])
            found.lines.append(line)
    return found


def _table(first: list[str], cells: _Cells, doubt: str, request: Request) -> Table:
    values = np.array(cells.values).reshape(-1, len(first))
    numbers = [0 not in odd for odd in cells.odd.values()]
    filled = [len(odd) < len(values) / 2 for odd in cells.odd.values()]
    header = _is_header(first, numbers, filled, values[1:])
    if header and all(numbers):
        request.note(f"the first line, {','.join(first)}, is taken as names of columns")
    start = int(header)
    odd = [{i - start: c for i, c in o.items() if i >= start} for o in cells.odd.values()]
    values, lines = values[start:], cells.lines[start:]
    kinds: list[Kind] = []
    for column, others in zip(values.T, odd, strict=True):
        text = sum(not _may_be_number(cell) for cell in others.values())
        others = sum(is_missing(cell) for cell in others.values())
        numbers = len(column) - text - others
        kind = "text" if text > numbers else "number" if numbers or not len(column) else "empty"
        kinds.append(kind)
    return Table(
        tuple(first) if header else (),
        values,
        {j: texts[start:] for j, texts in cells.texts.items()},
        odd,
        kinds,
        lambda i: f"line {lines[i]}",
        cells.ragged,
        doubt,
    )


def _is_header(
    first: Sequence[str], numbers: Sequence[bool], filled: Sequence[bool], below: np.ndarray
) -> bool:
    """Whether the first line has the names of the columns.

    Those are words over numbers; numbers that count, as pandas writes them; or whole numbers over
    columns of fractions, such as years.

    Args:
        first: The cells of the first line.
        numbers: Which of them are numbers.
        filled: Which columns hold numbers, mostly.
        below: The numbers below.
    """
    if not any(numbers) or not len(below):
        return not any(numbers)
    if any(
        not number and cell and f for cell, number, f in zip(first, numbers, filled, strict=True)
    ):
        return True
    counts = list(first)
    counts = counts[1:] if not counts[0] else counts
    counts = counts[:-1] if counts[-1].lower() in LABEL_NAMES else counts
    if len(first) < 2:
        return False
    if counts == [str(i) for i in range(len(counts))]:
        return True
    fractions = (below != np.rint(below)).mean(0) > 0.5
    return all(re.fullmatch(r"\d+", c) for c in first) and bool(fractions.all())
