"""Tables in Arrow's memory format: frames of pandas and polars, and files of one or more parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musigma.data.assembly import refuse_twice
from musigma.data.cache import float32
from musigma.data.errors import DataError, damage, first_line, listing, missing
from musigma.data.raw import Request, allocate
from musigma.data.sequences import joined
from musigma.data.tables import LOOKED_AT, Content, Table, is_number, text_of
from musigma.data.times import DAY, written
from musigma.schema import Column

TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second


def pyarrow(what: str) -> Any:
    """The library pyarrow, which something needs.

    Raises:
        DataError: If it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
    except ImportError as error:
        raise missing(what, "pyarrow", "tables") from error
    return pyarrow


class Arrow(Table):
    """Columns of Arrow types, which come in batches of rows."""

    def __init__(self, schema: Any, rows: int, request: Request):
        types = pyarrow(request.where).types
        self.request, self.rows = request, rows
        self.names = tuple(n for n in schema.names if not n.startswith("__index_level_"))
        if len(self.names) < len(schema.names):
            request.note("the index of the frame that it was written from is left out")
        refuse_twice(self.names, request)
        self.kinds, self.storage = [], []
        for name in self.names:
            kind = schema.field(name).type
            self.storage.append(str(kind))
            self.kinds.append(_content(types, kind))
        for j, kind in enumerate(self.kinds):
            if kind == "text" and self._are_numbers(self.cells(j, LOOKED_AT)):
                self.kinds[j] = "number"  # written as text

    @staticmethod
    def _are_numbers(cells: Sequence[str]) -> bool:
        return all(map(is_number, cells))

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns, in batches of rows that take some megabytes."""
        raise NotImplementedError

    def blocks(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """Numbers, float64 (rows, columns)."""
        for batch in self.batches(columns):
            block = np.empty((batch.num_rows, len(columns)), np.float64)
            for i, column in enumerate(batch.columns):
                try:
                    block[:, i] = _numbers(column)
                except ValueError as error:
                    raise self.request.error(
                        f"column {columns[i]!r} holds text among numbers "
                        f"({first_line(error)}): convert or drop it"
                    ) from error
            yield block

    def x(self, columns: Sequence[int]) -> np.ndarray:
        x, done = allocate((self.rows, len(columns)), self.request.where, np.float32), 0
        for block in self.blocks([self.names[j] for j in columns]):
            x[done : done + len(block)] = float32(block)
            done += len(block)
        return x

    def numbers(self, j: int) -> np.ndarray:
        return np.concatenate([*self.blocks([self.names[j]]), np.empty((0, 1))])[:, 0]

    def sequences(self, j: int) -> np.ndarray:
        parts = [_rows(batch.column(0)) for batch in self.batches([self.names[j]])]
        counts = np.concatenate([np.empty(0, np.int64), *(counts for counts, _ in parts)])
        widths = {flat.shape[1] for _, flat in parts if len(flat)}
        if len(widths) > 1 or 0 in widths:
            raise self.request.error(
                f"column {self.names[j]!r} has lists in which rows differ in their numbers of "
                "features: make them equal"
            )
        flat = [flat for _, flat in parts if len(flat)] or [np.empty((0, 1))]
        return joined(counts, np.concatenate(flat))

    def batches_of_words(self, j: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        for batch in self.batches([self.names[j]]):
            column = batch.column(0).dictionary_encode()
            words = column.dictionary.to_pylist()
            yield [*words, None], column.indices.fill_null(len(words)).to_numpy()

    def lacks(self, word: Any) -> bool:
        return word is None or word != word


def _content(types: Any, kind: Any) -> Content:
    """What a column of an Arrow type holds."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):
        return "empty"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number"
    if types.is_date(kind) or types.is_timestamp(kind):
        return "time"
    if types.is_boolean(kind):
        return "truth"
    for _ in range(2):  # lists of numbers, or of rows of numbers
        kind = kind.value_type if _is_list(types, kind) else kind
    return "list" if types.is_integer(kind) or types.is_floating(kind) else "other"


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _rows(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The number of rows of each list (N,), 0 if it is missing; and all rows, float64 (R, F).

    F is 0 if the rows differ in their numbers of features.
    """
    import pyarrow as pa
    import pyarrow.compute as compute

    def opened(lists: Any) -> tuple[np.ndarray, Any]:
        counts = compute.call_function("list_value_length", [lists]).fill_null(0)
        return counts.to_numpy().astype(np.int64), lists.flatten()

    counts, values = opened(column)
    width = 1
    if _is_list(pa.types, values.type):
        widths, values = opened(values)
        width = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0
    if not width:
        return counts, np.empty((int(counts.sum()), 0))
    return counts, _numbers(values).reshape(-1, width)


def _numbers(column: Any) -> np.ndarray:
    """An Arrow array as float64, NaN where it is null; times are seconds since 1970."""
    import pyarrow as pa
    import pyarrow.compute as compute

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("s"))
        kind = column.type
    if pa.types.is_timestamp(kind):
        ticks = TICKS[kind.unit]
        if kind.unit == "ns":  # float64 does not keep nanoseconds since 1970
            column, ticks = compute.call_function("divide", [column.cast(pa.int64()), 1000]), 10**6
        return _numbers(column.cast(pa.int64())) / ticks
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == "string_view"):
        column = column.cast(pa.float64(), safe=False)
    return column.to_numpy(zero_copy_only=False)  # a null becomes NaN


class Frame(Arrow):
    """A table in memory."""

    def __init__(self, table: Any, request: Request):
        self.table = table
        super().__init__(table.schema, table.num_rows, request)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        yield from self.table.select(list(columns)).to_batches(1 << 20)


def read_arrow(path: Path, request: Request) -> Frame:
    """The table in an Arrow or Feather file, memory-mapped where it is not compressed."""
    pa = pyarrow(f"{request.where}: reading {path.suffix}")
    from pyarrow import feather

    with path.open("rb") as file:
        start = file.read(6)
    with damage(request.where):
        if start[:4] == b"FEA1":
            table = feather.read_table(path)
        elif start == b"ARROW1":
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return Frame(table, request)


def frame(source: Any, request: Request) -> Frame:
    """A frame of pandas, polars or another library, an Arrow table, or columns by name.

    Raises:
        DataError: If it is none of these, or columns have no type, which are all named.
    """
    pa = pyarrow("frames:")
    columns: list[tuple[str, Any]] = []
    if hasattr(source, "columns") and hasattr(source, "iloc"):  # pandas, whose index has no place
        columns = [(str(name), source.iloc[:, j]) for j, name in enumerate(source.columns)]
    elif isinstance(source, Mapping):
        columns = [(str(name), values) for name, values in source.items()]
    elif isinstance(source, np.ndarray):
        names = source.dtype.names or ()
        columns = [(name, source[name]) for name in names]
        columns = columns or [(f"x{j}", values.tolist()) for j, values in enumerate(source.T)]
    if not columns:
        try:
            return Frame(pa.table(source), request)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"source is of type {type(source).__name__}: give a path, a table of named "
                "columns, or an array (N, D)"
            ) from error
    arrays, faults = [], {}
    for name, values in columns:
        try:
            arrays.append(pa.array(values, from_pandas=True))
        except (pa.ArrowException, TypeError, ValueError) as error:
            faults[f"column {name!r}"] = f"cannot be read as one type ({first_line(error)})"
    if faults:
        raise request.error(f"columns cannot be read:\n{listing(faults)}")
    try:
        return Frame(pa.table(arrays, [name for name, _ in columns]), request)
    except pa.ArrowInvalid as error:
        raise request.error(f"{first_line(error)}: give columns of one length") from error


def type_of(storage: str) -> Any:
    """The Arrow type of a name.

    >>> type_of("dictionary<values=string, indices=int8, ordered=1>").ordered
    True
    >>> [str(type_of(name)) for name in ("float64", "timestamp[us, tz=UTC]", "decimal128(9, 2)")]
    ['double', 'timestamp[us, tz=UTC]', 'decimal128(9, 2)']
    """
    pa = pyarrow("types of columns:")
    if match := re.fullmatch(r"dictionary<values=(.*), indices=(\w+), ordered=([01])>", storage):
        values, indices, ordered = match.groups()
        return pa.dictionary(type_of(indices), type_of(values), ordered == "1")
    if match := re.fullmatch(r"timestamp\[(\w+), tz=(.*)\]", storage):
        return pa.timestamp(*match.groups())
    if match := re.fullmatch(r"(decimal\d+)\((\d+), (-?\d+)\)", storage):
        return getattr(pa, match[1])(int(match[2]), int(match[3]))
    return pa.type_for_alias(storage)


def column_of(x: np.ndarray, column: Column) -> Any:
    """Numbers of a column, float64 (N,), as an Arrow array of its type."""
    pa = pyarrow("typed tables:")
    kind, missing = type_of(column.storage), np.isnan(x)
    if column.has_levels:
        missing |= x >= len(column.levels)
        places = pa.array(np.where(missing, 0, x).astype(np.int32), mask=missing)
        levels = pa.array(column.levels, pa.string())
        if pa.types.is_dictionary(kind):
            levels, places = levels.cast(kind.value_type), places.cast(kind.index_type)
            return pa.DictionaryArray.from_arrays(places, levels, ordered=kind.ordered)
        return levels.take(places).cast(kind)
    if column.kind == "date":
        x = x * DAY
    if column.step:
        x = column.on_grid(x)
    if column.format:
        return pa.array(written(x, column.format), kind)
    if column.kind in ("date", "datetime"):
        seconds = np.where(missing, 0, x)
        whole = np.floor(seconds)
        ticks = whole.astype(np.int64) * 10**6 + np.rint((seconds - whole) * 1e6).astype(np.int64)
        return pa.array(ticks, pa.timestamp("us"), mask=missing).cast(kind, safe=False)
    if pa.types.is_integer(kind):
        whole = np.rint(np.where(missing, 0, x)).astype(np.int64)
        return pa.array(whole, mask=missing).cast(kind)
    if not (pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return pa.array([None if v != v else text_of(v) for v in x.tolist()]).cast(kind)
    return pa.array(x, mask=missing).cast(kind, safe=False)
