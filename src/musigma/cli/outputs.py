"""Files that commands write: checked before anything is computed, written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from musigma.processes import Processes
    from musigma.schema import Schema

ROW_GROUP = 2**26
"""Bytes of a .parquet file that are held in memory before they are written."""

DIMENSIONS = ("chain", "draw", "observation")
"""Of draws in a .nc file."""

Columns = dict[str, Any]
"""Columns of some rows by name: arrays, or lists of texts."""

Progress = Callable[..., None]


def check_out(out: Path, *suffixes: str, name: str = "out") -> None:
    """Refuse a file of another kind, or in a folder that does not exist."""
    if out.suffix not in suffixes:
        kinds = ", ".join(suffixes[:-1]) + " or " * (len(suffixes) > 1) + suffixes[-1]
        raise ValueError(f"{name}: expected a {kinds} file; got {out}")
    if out.is_dir() or not out.parent.is_dir():
        reason = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"{name}: {out} cannot be written: {reason}")
    if out.suffix == ".parquet":
        _pyarrow()
    if out.suffix == ".nc":
        _xarray()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "out: writing .parquet needs pyarrow: pip install 'musigma[tables]', or name another "
            "kind of file"
        ) from None
    return pyarrow


def _xarray() -> Any:
    try:
        import h5netcdf  # noqa: F401  # pyright: ignore[reportMissingImports]
        import xarray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "out: writing .nc needs xarray and h5netcdf: pip install 'musigma[arviz]', or name "
            "another kind of file"
        ) from None
    return xarray


def check_draws(names: Iterable[str]) -> None:
    """Refuse names of columns that a .nc file cannot have.

    Raises:
        ValueError: Naming all of them.
    """
    if wrong := [name for name in names if name in DIMENSIONS or "/" in name or not name.strip()]:
        raise ValueError(
            f"out: variables of a .nc file cannot be called {', '.join(map(repr, wrong))}: rename "
            "these columns, or name another kind of file"
        )


def write_draws(
    out: Path,
    draws: np.ndarray,
    names: Iterable[str],
    given: Columns,
    observations: Iterable[str] | None = None,
    **about: Any,
) -> None:
    r"""Write draws as InferenceData of ArviZ, a .nc file that appears once it is complete.

    The group `posterior` has one chain, and a variable of each column, (chain, draw, observation).
    The group `observed_data` has what was given, (observation, ...). A single observation has no
    such dimension.

    Args:
        draws: n draws for each of O observations, (O, n, \*event).
        names: The columns of a vector; without any, all elements are the variable `x`.
        given: What each draw was given, by name: arrays of O rows.
        observations: Their names; by default their numbers, from 0.
        about: Attributes of both groups and of the file.
    """
    from musigma.files import replacing

    xarray, names = _xarray(), list(names)
    several = [] if len(draws) == 1 else ["observation"]

    def variable(values: np.ndarray, name: str, dims: list[str]) -> tuple[list[str], np.ndarray]:
        values = values if several else values.squeeze(dims.index("observation"))
        dims = [dim for dim in dims if dim != "observation" or several]
        return [*dims, *(f"{name}_dim_{i}" for i in range(values.ndim - len(dims)))], values

    dims: list[str] = list(DIMENSIONS)
    every = draws.swapaxes(0, 1)[None]
    columns = {name: every[..., j] for j, name in enumerate(names)} or {"x": every}
    groups = {
        "posterior": {name: variable(values, name, dims) for name, values in columns.items()},
        "observed_data": {
            name: variable(values, name, ["observation"]) for name, values in given.items()
        },
    }
    places: dict[str, Any] = {dim: range(n) for dim, n in zip(dims, every.shape, strict=False)}
    if observations is not None:
        places["observation"] = list(observations)
    with replacing(out) as draft:
        xarray.Dataset(attrs=about).to_netcdf(draft, engine="h5netcdf", mode="w")
        for group, variables in groups.items():
            used = {dim for value in variables.values() for dim in value[0]}
            coordinates = {dim: places[dim] for dim in dims if dim in used}
            data = xarray.Dataset(variables, coordinates, attrs=about)
            if variables:
                data.to_netcdf(draft, engine="h5netcdf", mode="a", group=group)


def write_rows(out: Path, parts: Iterable[Columns], **about: Any) -> None:
    """Write rows, some at a time, into a file that appears once all of them are written.

    Until then an .npz file keeps its rows on disk; a .parquet file holds up to 64 MiB in memory.

    Args:
        out: A .csv, .parquet or .npz file.
        parts: At least one, all with the same columns.
        about: Values that belong to all rows: extra arrays in an .npz file, metadata of the schema
            in a .parquet file.
    """
    from musigma.files import replacing

    with replacing(out) as draft:
        {".csv": _csv, ".parquet": _parquet, ".npz": _npz}[out.suffix](draft, parts, about)


def write_table(out: Path, table: Any, schema: Schema) -> None:
    """Write an Arrow table as a .csv or .parquet file that appears once it is complete.

    Text shows no time of day in a column of dates, whatever its type of Arrow.
    """
    from musigma.files import replacing

    if out.suffix == ".csv":
        columns = dict(zip(table.column_names, table.columns, strict=True))
        dates = {column.name for column in schema.columns if column.kind == "date"}
        for name, values in columns.items():
            if str(values.type) in ("bool", "float", "halffloat"):  # true; 0.1, in its few digits
                columns[name] = values.cast("string")
            elif name in dates and getattr(values.type, "tz", "") is None:
                columns[name] = values.cast("date32")
        write_rows(out, [{name: values.to_pylist() for name, values in columns.items()}])
    else:
        with replacing(out) as draft:
            _pyarrow().parquet.write_table(table, draft)


def _csv(draft: Path, parts: Iterable[Columns], about: Mapping[str, Any]) -> None:
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for i, columns in enumerate(parts):
            if i == 0:
                writer.writerow(columns)
            writer.writerows(zip(*map(_plain, columns.values()), strict=True))


def _plain(values: Any) -> list[Any] | tuple[Any, ...]:
    """The cells of a column of a .csv file; booleans are true and false."""
    if isinstance(values, (list, tuple)):
        return values
    cells = values.tolist()
    return cells if values.dtype != bool else ["true" if cell else "false" for cell in cells]


def _parquet(draft: Path, parts: Iterable[Columns], about: Mapping[str, Any]) -> None:
    pyarrow = _pyarrow()
    metadata = {name: json.dumps(value) for name, value in about.items()}

    def groups() -> Iterator[Any]:
        tables, size = [], 0
        for columns in parts:
            arrays = {
                name: pyarrow.array(v, pyarrow.string() if isinstance(v, (list, tuple)) else None)
                for name, v in columns.items()
            }
            tables.append(pyarrow.table(arrays, metadata=metadata))
            size += tables[-1].nbytes
            if size > ROW_GROUP:
                yield pyarrow.concat_tables(tables)
                tables, size = [], 0
        if tables:
            yield pyarrow.concat_tables(tables)

    rest = groups()
    first = next(rest)
    with pyarrow.parquet.ParquetWriter(draft, first.schema) as writer:
        for table in itertools.chain([first], rest):
            writer.write_table(table)


def _npz(draft: Path, parts: Iterable[Columns], about: Mapping[str, Any]) -> None:
    import numpy as np

    columns: dict[str, tuple[IO[bytes], np.ndarray]] = {}  # an unnamed file, and the first rows
    with contextlib.ExitStack() as files:
        for part in parts:
            for name, rows in part.items():
                if name not in columns:
                    file = files.enter_context(tempfile.TemporaryFile(dir=draft.parent))
                    columns[name] = file, rows
                columns[name][0].write(np.ascontiguousarray(rows).data)
        archive = files.enter_context(zipfile.ZipFile(draft, "w"))
        for name, (file, first) in columns.items():
            row = first.itemsize * math.prod(first.shape[1:])
            header = np.lib.format.header_data_from_array_1_0(np.empty_like(first, order="C"))
            header["shape"] = (file.tell() // row, *first.shape[1:])
            file.seek(0)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(file, member, 2**20)
        for name, value in about.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(value))


@dataclass(frozen=True)
class Share:
    """The rows that one process works on, of n rows in whole batches.

    Each process writes its rows into a file of its own, a shard; none waits for another. Draws
    depend only on the seed and the number of the batch, so the concatenated shards equal what a
    single process writes.

    >>> from musigma.processes import Processes
    >>> [Share(Processes(rank, 3), 10, 4).rows for rank in range(3)]
    [range(0, 4), range(4, 8), range(8, 10)]
    >>> Share(Processes(2, 4), 10, 4).path(Path("scores.csv")).name
    'scores-00002-of-00004.csv'
    """

    processes: Processes
    n: int
    batch_size: int

    @property
    def rows(self) -> range:
        """The numbers of the rows."""
        batches = self.processes.share(math.ceil(self.n / self.batch_size))
        return range(self.n)[batches.start * self.batch_size : batches.stop * self.batch_size]

    def path(self, out: Path) -> Path:
        """The file of this process; of a single process, the file itself."""
        rank, count = self.processes.rank, self.processes.count
        name = f"{out.stem}-{rank:05}-of-{count:05}{out.suffix}"
        return out if count == 1 else out.with_name(name)

    def progress(self, report: Progress) -> Progress:
        """Progress through all rows, reported as progress through these."""
        return lambda done, _: report(done - self.rows.start, len(self.rows))

    @property
    def fields(self) -> dict[str, int]:
        """The entries of a JSON answer about the share; none for a single process."""
        rank, count = self.processes.rank, self.processes.count
        return {} if count == 1 else {"process": rank, "processes": count}

    def __str__(self) -> str:
        rank, count = self.processes.rank, self.processes.count
        return "" if count == 1 else f", the share of process {rank} of {count}"
