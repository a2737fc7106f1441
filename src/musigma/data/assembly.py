"""What is made of a table: columns as data, labels, names of rows or context.

A reader makes a `Table` of a file, and `assemble` makes a `Dataset` of it, so arrays, text and
parquet follow the same rules. Every decision is reported: a note names whatever is not data, and
an error names whatever cannot be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from musigma.data import columns
from musigma.data.cache import blocks, facts
from musigma.data.dataset import Dataset, Given, Hashes
from musigma.data.errors import all_faults, listing, named, printable
from musigma.data.pairs import chosen, leave_out, note_left_out, unusable_cells, varying
from musigma.data.raw import Request, as_labels
from musigma.data.sampling import different
from musigma.data.sequences import trimmed
from musigma.data.tables import (
    LABEL_NAMES,
    LOOKED_AT,
    PADDED,
    TYPED,
    Table,
    Words,
    as_lists,
    column_fault,
    is_missing,
    is_number,
    list_fault,
    names_rows,
    unit_fault,
    with_units,
)
from musigma.schema import Schema

COARSE = 1e-3  # share of a column's range: float32 steps larger than this lose information
NAMED = 1000  # cells of a row, or of a table on disk, that are named as unusable


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
        if kind == "empty" and not request.of and not (names and names[j] in (wanted or ())):
            request.note(f"{called(j)} is empty, and is left out")
        else:
            left.append(j)
    found = _named_roles(table, left, called, request) if names else Roles(left, [])
    if not names and ((request.of and wanted is None) or request.given):
        raise request.error(
            f"{'of' if request.of else 'given'}: its columns have no names: add a first line of "
            "names, or give a file of context"
        )
    if wanted is not None and len(wanted) != len(found.data):
        raise request.error(
            f"has {len(found.data)} columns without names, and the model needs "
            f"{len(wanted)}: {named(wanted, 20)}"
        )
    if wanted and not names:
        request.note(f"columns have no names, and are taken in this order: {named(wanted, 20)}")
    faults = {}
    for j in found.given:
        if table.kinds[j] == "other":
            faults[table.called(j)] = f"is {table.storage[j]}: convert or drop it"
        elif (lists := as_lists(table, j)) is not None:
            faults[table.called(j)] = list_fault(lists)
        elif table.kinds[j] == "empty":
            faults[table.called(j)] = "is empty: fill or drop it"
    for j in found.data:
        if table.kinds[j] == "empty" and request.of:
            faults[table.called(j)] = "is empty: fill or drop it"
        elif table.kinds[j] == "list":
            faults[table.called(j)] = (
                f"is {table.storage[j]}: give lists as context (--given {names[j]}), or drop it"
            )
        elif table.kinds[j] in ("truth", "time", "other"):
            how = "convert or drop it"
            if "binary" in table.storage[j]:
                how = "save images as files in a folder or a .tar, or drop it"
            faults[table.called(j)] = f"is {table.storage[j]}, not a number: {how}"
        elif table.kinds[j] == "text":
            cells = [cell for cell in table.cells(j, LOOKED_AT) if not is_missing(cell)]
            words = (cell for cell in cells if not is_number(cell))
            cell = next(words, "")
            if cells and not cell:
                faults[table.called(j)] = (
                    "holds numbers written as text, and missing cells: fill them"
                )
            elif units := with_units(cells[:1000]):
                faults[table.called(j)] = unit_fault(units)
            else:
                faults[table.called(j)] = column_fault(names[j] if names else None, cell)
        elif names and not names[j]:
            faults[f"column {j + 1}"] = "has no name: name it, or drop it"
        elif "string" in table.storage[j]:
            cells = table.cells(j, LOOKED_AT)
            cell = next(filter(PADDED.match, cells), cells[0] if cells else "")
            request.note(
                f"{table.called(j)} is text, such as {cell!r}, and is read as numbers: if these "
                f"are codes, {TYPED}, or drop it"
            )
    for j in found.data if faults and not request.allow_constant else ():
        values = different(table.numbers(j)) if table.kinds[j] == "number" else []
        if len(values) == 1 and abs(values[0]) < 2**53:
            faults[table.called(j)] = f"is constant ({values[0]:g}): drop it"
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
    if twice := sorted(repr(name) for name, n in Counter(names).items() if name and n > 1):
        raise request.error(
            f"several columns are called {named(twice)}: give each a name of its own, in one line "
            "of names"
        )


def _named_roles(
    table: Table, left: list[int], called: Callable[[int], str], request: Request
) -> Roles:
    """The roles of columns that have names."""
    names = table.names
    of, given = chosen(names, left, request)
    left = [j for j in left if j not in given]
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
    elif request.of:
        data = of
    left = [j for j in left if data is None or j not in data]
    label = _label_of(table, left, request) if request.label or not request.of else None
    if label is not None:
        left.remove(label)
        request.note(f"column {names[label]!r} is taken as labels; rename it if it is data")
    ids = [j for j in left if names_rows(table, j)]
    if request.of:
        note_left_out([names[j] for j in left], request)
        return Roles(data or [], given, label, ids[0] if ids else None)
    for j in ids:
        request.note(f"{called(j)} is different in every row: it names rows, and is not data")
    left = [j for j in left if j not in ids]
    if data is not None and left:
        unknown = named([repr(names[j]) for j in left], 20)
        request.note(f"columns that the model does not know are left out: {unknown}")
    return Roles(left if data is None else data, given, label, ids[0] if ids else None)


def _label_of(table: Table, columns: Sequence[int], request: Request) -> int | None:
    """The one of some columns that is labels: by the name that is asked for, or a usual one."""
    if not table.names:
        return None
    if request.label not in (None, "label"):
        return next((j for j in columns if table.names[j] == request.label), None)
    return next((j for j in reversed(columns) if _is_label(table, j)), None)


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


def label_values(words: Sequence[Any]) -> np.ndarray | None:
    """Labels as whole numbers or strings; None if there are fractions, as in data.

    >>> label_values(["1", "2.0", None]).tolist(), label_values(["a"]).tolist()
    ([1, 2], ['a'])
    >>> label_values([0.5])
    """
    values = np.array(
        [printable(w.strip()) if isinstance(w, str) else w for w in words if not is_missing(w)]
    )
    if values.dtype.kind == "U" and all(map(is_number, values)):
        values = values.astype(np.float64)
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values) & (values == np.rint(values)) & (abs(values) < 2**53)
    return values.astype(np.int64) if whole.all() else None


def assemble(table: Table, request: Request) -> Dataset:
    """Data, labels, names of rows and context of a table.

    x is float32 (N, D), finite, with no constant column and no column twice; on disk, it stays
    memory-mapped. Rows that cannot be used are refused, or left out. If a schema is asked for, x
    is what `typed` makes of its columns.

    Raises:
        DataError: Naming all columns that cannot be used, or else all cells.
    """
    if request.schema is not None:
        return typed(table, request)
    found = roles(table, request)
    x, names = table.x(found.data), request.columns or ()
    if table.names:
        names = tuple(table.names[j] for j in found.data)
    beside = {j: table.column(j) for j in found.given}
    words = None
    if found.label is not None:
        words = table.words(found.label)
        beside[found.label] = words, words.missing() & (not request.unlabeled)
    known = facts(x, request)
    bad = np.zeros(table.rows, bool)
    bad[known["bad"]] = True
    for _, unusable in beside.values():
        bad |= unusable
    good, total = np.flatnonzero(~bad), table.rows + len(table.ragged)
    if request.of or found.given:  # simulations, many of which may have failed
        faults = {}
        leave_out(
            dict(table.ragged) | _by_column(table, x, found, known["bad"], beside),
            total - len(good),
            total,
            request,
        )
    else:
        faults = dict(table.ragged) | _by_cell(table, x, found, bad, beside)
        request.refuse(faults, "rows", total, total - len(good))
        if len(good) < total:
            request.note(f"{total - len(good)} of {total} rows are left out: they cannot be used")
    rows = None
    if len(good) < total:
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
    given = {table.names[j]: as_given(beside[j][0], good) for j in found.given}
    given = _kept(given, request)
    labels, label_names = (None, ()) if words is None else _labels(words, good, request)
    ids = None
    if not isinstance(x, np.memmap) or found.ids is None:
        ids = _ids(table, found.ids, good, total)
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
        given=given,
        skipped=faults,
        hashes=Hashes(x, known.get("hashes")),
    )


Beside = Mapping[int, tuple[np.ndarray | Words, np.ndarray]]
"""Columns beside the data by their numbers: cells, and a mask of those that cannot be used."""


def _by_cell(
    table: Table, x: np.ndarray, found: Roles, bad: np.ndarray, beside: Beside
) -> dict[str, str]:
    """The cells that cannot be used, with the reason of each."""
    faults: dict[str, str] = {}
    for i in np.flatnonzero(bad).tolist():
        if len(faults) >= NAMED and isinstance(x, np.memmap):
            break
        row = x[i]
        cells = np.flatnonzero(~np.isfinite(row))[:NAMED].tolist()
        wrong: dict[int, float | None] = {found.data[k]: float(row[k]) for k in cells}
        for j, (cells, unusable) in beside.items():
            if unusable[i]:
                wrong[j] = None if isinstance(cells, Words) else float(cells[i])
        faults.update(table.fault(i, j, wrong[j]) for j in sorted(wrong))
    return faults


def _by_column(
    table: Table, x: np.ndarray, found: Roles, bad: np.ndarray, beside: Beside
) -> dict[str, str]:
    """The columns with cells that cannot be used, with their numbers; `bad` are rows of x."""
    some, wrong = x[bad], {}
    for k, j in enumerate(found.data):
        if len(which := np.flatnonzero(~np.isfinite(some[:, k]))):
            wrong[j] = unusable_cells(table, j, bad[which], some[which, k])
    return _named(table, wrong) | _context_faults(table, beside)


def _context_faults(table: Table, beside: Beside) -> dict[str, str]:
    """The columns beside the data with cells that cannot be used, with their numbers."""
    wrong = {}
    for j, (cells, unusable) in beside.items():
        if len(rows := np.flatnonzero(unusable)):
            values = None if isinstance(cells, Words) else cells[rows]
            wrong[j] = unusable_cells(table, j, rows, values)
    return _named(table, wrong)


def _named(table: Table, faults: Mapping[int, str]) -> dict[str, str]:
    return {table.called(j): faults[j] for j in sorted(faults)}


def _kept(given: Mapping[str, Given], request: Request) -> dict[str, Given]:
    """The context without variables that are constant."""
    left, faults = varying(given, request)
    if faults:
        one = " ".join(next(iter(faults.items())))
        raise request.error(
            one if len(faults) == 1 else f"context cannot be used:\n{listing(faults)}"
        )
    if given and not left:
        raise request.error("given: all of the context is constant: give other columns")
    return left


def typed(table: Table, request: Request) -> Dataset:
    """Rows of typed columns, float64 (N, D), with what they are conditioned on.

    Raises:
        DataError: Naming all columns and all cells that cannot be used.
    """
    names = columns.names(table)
    refuse_twice(names, request)
    total = table.rows + len(table.ragged)
    enough = 1 if request.allow_constant or isinstance(request.schema, Schema) else 2
    if total < enough:
        raise request.error(f"holds {'a single example' if total else 'no examples'}: give more")
    of, given = chosen(names, range(len(names)), request)
    rest = [j for j in range(len(names)) if j not in (*of, *given)]
    label = _label_of(table, rest, request) if request.label else None
    taken = [*given, *([] if label is None else [label])]
    if isinstance(request.schema, Schema):
        schema, faults = request.schema, {}
        lacking = [name for name in schema.names if name not in names]
        if request.partial and lacking and len(lacking) < len(schema):
            request.note(f"has no column {named([repr(n) for n in lacking], 20)}")
        elif table.names and lacking:
            raise request.error(
                f"has no column {named([repr(n) for n in lacking], 20)}, which the schema has: "
                f"its columns are {named(names, 20)}"
            )
        if not table.names and len(names) != len(schema):
            raise request.error(
                f"has {len(names)} columns without names, and the model needs {len(schema)}: "
                f"{named(schema.names, 20)}"
            )
    elif request.schema == "infer":
        free = [j for j in range(len(names)) if j not in taken]
        schema, faults = columns.infer(table, request, of or free)
    else:
        drafts = request.schema or {}
        if of:
            drafts = {names[j]: drafts.get(names[j], columns.Draft()) for j in of}
        schema, faults = columns.completed(table, drafts, request)
    if request.skip_bad:
        for name, reason in faults.items():
            request.note(f"{name} {reason}; it is left out")
        faults = {}
    elsewhere = {*schema.names, *(names[j] for j in taken)}
    rest = [j for j, name in enumerate(names) if name not in elsewhere]
    ids = next((j for j in rest if table.names and names_rows(table, j)), None)
    if request.of:
        note_left_out([names[j] for j in rest], request)
    elif request.schema != "infer" and (others := [names[j] for j in rest if j != ids]):
        request.note(f"columns that the schema does not have are left out: {named(others, 20)}")
    if markers := table.markers():
        listed = [f"{word!r} ({n:,} cells)" for word, n in markers.most_common()]
        request.note(f"read as missing values: {named(listed)}")
    x, bad, wrong = columns.encode(table, schema, request)
    beside, words = {j: table.column(j) for j in given}, None
    if label is not None:
        words = table.words(label)
        beside[label] = words, words.missing() & (not request.unlabeled)
    wrong |= _context_faults(table, beside)
    for _, unusable in beside.values():
        bad |= unusable
    if faults:
        every = {**faults, **wrong}
        if len(every) == 1:
            raise request.error(all_faults(every, "columns", len(names)))
        raise request.error(
            f"{len(every)} columns or cells cannot be used; drop or repair them, or pass "
            f"--skip-bad to leave them out:\n{listing(every)}"
        )
    good = np.flatnonzero(~bad)
    if beside:
        leave_out(wrong, total - len(good), total, request)
        wrong = {}
    request.refuse(wrong, "rows", total, total - len(good))
    if not len(schema) and not beside:
        raise request.error("no column holds data: give a table of numbers or of categories")
    if len(good) < total:
        if not beside:
            request.note(f"{total - len(good)} of {total} rows are left out: they cannot be used")
        x = x[good]
    labels, label_names = (None, ()) if words is None else _labels(words, good, request)
    test, validation = table.official(good)
    return Dataset(
        x,
        labels=labels,
        label_names=label_names,
        ids=_ids(table, ids, good, total),
        official_test=test,
        official_validation=validation,
        schema=schema,
        columns=schema.names,
        given=_kept({names[j]: as_given(beside[j][0], good) for j in given}, request),
        skipped=wrong,
    )


def _labels(
    words: Words, rows: np.ndarray, request: Request
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of some rows, -1 if they are missing, with their names."""
    different, codes = words.of(rows)
    known = np.array([not is_missing(word) for word in different], bool)
    values = label_values(different)
    if values is None:  # fractions, once rows with words are left out
        values = np.array([str(word) for word in different if not is_missing(word)])
    labels, names = as_labels(values, len(values), request.where)
    of_word = np.full(len(different), -1)
    of_word[known] = labels
    return of_word[codes], names


def _ids(table: Table, j: int | None, good: np.ndarray, total: int) -> tuple[str, ...] | None:
    """The names of rows, from a column if one has them."""
    if j is not None:
        cells = table.cells(j)
        return tuple(printable(cells[i]) for i in good.tolist())
    return tuple(map(table.row_id, good.tolist())) if len(good) < total else None


def as_given(cells: np.ndarray | Words, rows: np.ndarray) -> Given:
    """Some rows of a column as context: words become classes, numbers stay numbers."""
    if isinstance(cells, Words):
        words = cells.of(rows)
        return Given.of_text(words.different).subset(words.codes)
    values = cells[rows].astype(np.float32)
    return Given(values if values.ndim < 3 else trimmed(values))


def _varying(
    table: Table,
    x: np.ndarray,
    numbers: Sequence[int],
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
        return named([table.called(numbers[k]) for k in which.tolist()])

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
            pairs.append(f"{table.called(numbers[k])} repeats {table.called(numbers[first])}")
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
    with np.errstate(invalid="ignore"):  # on disk, x has rows that are left out
        counting = (np.diff(start, axis=0) == 1).all(0) & (high - low == n - 1) & (n > 2)
    if counting.any():
        request.note(
            f"{listed(which[counting])} counts the rows: drop it, unless it is a measurement"
        )
    return which.tolist()
