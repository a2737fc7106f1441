"""Scores of rows of a table, batch by batch, on any engine that has Arrow batches or frames.

A `Scorer` is a function of a batch that can be sent to other processes: of Ray, Spark, Dask, or
any other (docs/engines.md).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musigma import anomaly, checkpoint, data, evaluation
from musigma.data import Dataset
from musigma.frames import as_kind, kind_of
from musigma.model import Model

__all__ = ["BLOCK", "Scorer", "nats", "padded"]

BLOCK = 256
"""Rows that a model processes together."""
MULTIPLE = 32
"""Rows are processed in multiples of this number."""


def nats(model: Model, rows: Dataset) -> np.ndarray:
    """-log p(x) of each row in nats, or an upper bound of it, float64 (N,).

    Matrix products of different shapes round differently, so rows are processed in multiples of
    32: the figure of a row does not depend on how many others are scored with it.
    """
    if not len(rows):
        return np.empty(0)
    return evaluation.score(model, padded(rows), batch_size=BLOCK)["nats"][: len(rows)]


def padded(rows: Dataset) -> Dataset:
    """Rows, and the first of them again until their number is a multiple of 32."""
    index = np.arange(len(rows) + -len(rows) % MULTIPLE)
    return rows.subset(np.where(index < len(rows), index, 0))


class Scorer:
    """Scores batches of rows by a trained model: -log p in nats, p-values, and flags.

    It is pickled as its arguments. The model is loaded in the process that scores, when the first
    batch comes. Batches are scored in blocks, so the memory of a call grows with the size of its
    batch only by the three columns that come out.

    Args:
        run: A run folder or a checkpoint of a model of a table. Every process must be able to read
            it.
        fpr: Largest share of normal rows to flag. Then `p_value` and `flag` come out too.
        calibrate: Normal rows that the model was not trained on, whose scores p-values compare
            with: a file, a frame, or their scores, nats (n,). By default the held-out part of the
            data that the run was trained on, if `fpr` is given. They are scored at once.
        keep: Columns of a batch that come out beside the scores, such as a key.
        block: Largest number of rows that are in memory as the model takes them.
        device: Name of a torch device.
        threads: Number of CPU threads of torch in each process that scores, if given. Engines that
            run a process for each core need 1.
        plugin: File of a model of your own, as for the command line.

    Attributes:
        calibration: Scores of the calibration rows in increasing order, nats (n,); None if there
            are no p-values.

    Raises:
        ValueError: If there is no such run, or too few rows are held out to promise `fpr`; on a
            call, if the columns of a batch do not fit, or rows cannot be scored.

    Example:
        >>> import tempfile, pyarrow as pa
        >>> from musigma import Spec, build, save
        >>> from musigma.schema import Column, Schema
        >>> x = np.random.default_rng(0).normal(size=(500, 2)).round(2)
        >>> spec = Spec((2,), schema=Schema([Column("a"), Column("b")]).measure(x))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(build("table", spec, hidden=16), f"{folder}/model.safetensors")
        ...     scorer = Scorer(folder, fpr=0.05, calibrate=pa.table({"a": x[:, 0], "b": x[:, 1]}))
        ...     scorer(pa.table({"a": [0.0, 50.0], "b": [0.0, -50.0]})).column("flag").to_pylist()
        [False, True]
    """

    def __init__(
        self,
        run: str | Path,
        *,
        fpr: float | None = None,
        calibrate: Any = None,
        keep: Sequence[str] = (),
        block: int = 4096,
        device: str = "cpu",
        threads: int | None = None,
        plugin: str | None = None,
    ):
        if block < 1:
            raise ValueError(f"block: expected 1 or more rows; got {block}")
        self.run, self.fpr, self.keep, self.block = str(run), fpr, tuple(keep), block
        self.device, self.threads, self.plugin = device, threads, plugin
        self.calibration: np.ndarray | None = None
        if fpr is not None or calibrate is not None:
            if not (isinstance(calibrate, np.ndarray) and calibrate.ndim == 1):
                calibrate = nats(self.model, self._held_out(calibrate))
            self.calibration = np.sort(calibrate)
            if fpr is not None:
                anomaly.threshold(self.calibration, fpr)  # refuses a rate that is too small

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make an equal scorer, with the scores of the calibration rows."""
        names = ("run", "fpr", "keep", "block", "device", "threads", "plugin")
        return {name: getattr(self, name) for name in names} | {"calibrate": self.calibration}

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Scorer, **self.arguments), ()

    @property
    def model(self) -> Model:
        """The model, which is loaded once in each process."""
        return self._loaded[0]

    @property
    def _loaded(self) -> tuple[Model, dict[str, Any]]:
        path = Path(self.run)
        path = path / "model.safetensors" if path.is_dir() else path
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        return _load(path, stamp, self.device, self.threads, self.plugin)

    # -- rows

    def _held_out(self, source: Any) -> Dataset:
        """The rows to calibrate on."""
        about = self._loaded[1].get("data") or {}
        origin = about.get("source") if source is None else source
        if origin is None:
            raise ValueError(
                "calibrate: the run does not say what it was trained on; give normal rows that it "
                "was not trained on"
            )
        try:
            rows = self._rows(origin)
        except (ValueError, OSError) as error:
            raise ValueError(f"calibrate: {error}") from error
        if source is None:
            if data.digest(rows) != about.get("digest"):
                raise ValueError(
                    f"calibrate: {origin} has changed since the run was trained on it; give "
                    "normal rows that it was not trained on"
                )
            rows = rows.split("held-out")
        rates = [] if self.fpr is None else [self.fpr]
        return rows.subset(anomaly.calibration_rows(rows.content(), rates))

    def _rows(self, source: Any) -> Dataset:
        """Rows of a file or of an Arrow table, as the model takes them."""
        spec = self.model.spec
        assert spec is not None  # every model in a checkpoint has one
        given = [variable.name for variable in spec.context]
        if spec.schema is None:
            how: dict[str, Any] = {"columns": spec.columns or None}
        else:
            how = {"schema": spec.schema, "unseen": "probability"}
        return data.load(source, given=given, allow_constant=True, **how)

    # -- batches

    def __call__(self, batch: Any) -> Any:
        """The scores of a batch.

        Args:
            batch: A `pyarrow.RecordBatch` or `Table`, or a frame of pandas or polars. Columns are
                found by their names; others are ignored.

        Returns:
            The same kind of table, with the index of a frame, and columns `nats` (-log p, or an
            upper bound of it; high for unusual rows), `p_value` and `flag` (p-value at most
            `fpr`), after those to keep.
        """
        import pyarrow as pa

        if (kind := kind_of(batch)) is None:
            raise ValueError(
                "batch: expected an Arrow batch or table, or a frame of pandas or polars; got "
                f"{type(batch).__name__}"
            )
        if isinstance(batch, pa.RecordBatch):
            scores = self(pa.Table.from_batches([batch]))
            whole = [column.combine_chunks() for column in scores.columns]
            return pa.RecordBatch.from_arrays(whole, schema=scores.schema)
        columns = self._kept(batch)
        columns["nats"] = pa.array(self._nats(batch), pa.float64())
        if self.calibration is not None:
            p = anomaly.p_values(columns["nats"], self.calibration)
            columns["p_value"] = pa.array(p, pa.float64())
            if self.fpr is not None:
                columns["flag"] = pa.array(p <= self.fpr, pa.bool_())
        return as_kind(pa.table(columns), kind, batch)

    def _kept(self, batch: Any) -> dict[str, Any]:
        """The columns to keep."""
        names = list(getattr(batch, "column_names", None) or batch.columns)
        if missing := [name for name in self.keep if name not in names]:
            raise ValueError(
                f"keep: expected columns of the batch, {', '.join(map(str, names))}; got "
                f"{', '.join(missing)}"
            )
        return {name: _arrow(batch[name]) for name in self.keep}

    def _nats(self, batch: Any) -> np.ndarray:
        """Scores of a batch, in blocks."""
        part = getattr(batch, "iloc", None)
        parts = [np.empty(0)]
        for at in range(0, len(batch), self.block):
            rows = batch.slice(at, self.block) if part is None else part[at : at + self.block]
            parts.append(nats(self.model, self._rows(rows)))
        return np.concatenate(parts)

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The scores of each of several batches, one after another, as Spark's `mapInArrow` asks.

        Args:
            source: Batches, as `__call__` takes them.
        """
        yield from map(self, source)

    def reader(self, source: Any) -> Any:
        """The scores of a stream of Arrow batches, as a stream, a `pyarrow.RecordBatchReader`.

        Args:
            source: Record batches, one after another; or what hands them out as Arrow does, such
                as a relation of DuckDB or a dataset of Arrow.

        Raises:
            ValueError: If there is no batch, so that its columns are unknown.
        """
        import pyarrow as pa

        if hasattr(source, "scanner"):
            source = source.scanner().to_reader()
        elif hasattr(source, "__arrow_c_stream__"):
            source = pa.RecordBatchReader.from_stream(source)
        stream = iter(source)
        first = next(stream, None)
        columns = getattr(source, "schema", None) or getattr(first, "schema", None)
        if columns is None:
            raise ValueError("source: expected batches; got none")
        schema = self(columns.empty_table()).schema
        rest = stream if first is None else itertools.chain([first], stream)
        return pa.RecordBatchReader.from_batches(schema, self.batches(rest))


def _arrow(column: Any) -> Any:
    """A column of a table of any kind as an Arrow array."""
    import pyarrow as pa

    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column
    return column.to_arrow() if hasattr(column, "to_arrow") else pa.array(column)


@functools.lru_cache(maxsize=4)
def _load(
    path: Path, stamp: int, device: str, threads: int | None, plugin: str | None
) -> tuple[Model, dict[str, Any]]:
    """A model, and what its checkpoint says of its data; `stamp` is the time of the file."""
    if threads is not None:
        torch.set_num_threads(threads)
    if plugin:
        from musigma import plugins

        plugins.register(plugin)
    model, extra = checkpoint.read(path)
    if model.spec is None or len(model.spec.shape) != 1:
        raise ValueError(f"run: {path} is a model of images; a Scorer takes rows of a table")
    return model.to(device), extra
