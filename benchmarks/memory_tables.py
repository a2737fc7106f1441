"""Peak memory of a large table: training `table` and scoring, from a parquet file.

    python benchmarks/memory_tables.py --rows 1000000 --minutes 1

It writes a file of 30 columns of all types, and prints the largest resident set of each command,
which is that of one process. docs/engines.md has the figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK = 50_000

STREAMED = """
import sys
import pyarrow.parquet as pq
from musigma import Scorer
run, rows, out = sys.argv[1:]
scorer = Scorer(run, fpr=0.01, calibrate=pq.ParquetFile(rows).read_row_group(0))
scores = scorer.reader(pq.ParquetFile(rows).iter_batches(batch_size=50_000))
with pq.ParquetWriter(out, scores.schema) as file:
    for batch in scores:
        file.write_batch(batch)
"""


def chunk(random: np.random.Generator, n: int) -> pa.Table:
    """Rows of 30 columns: 20 continuous, 4 counts, 4 categories, a boolean and a date."""
    level = random.normal(size=n)
    columns: dict[str, pa.Array] = {}
    for j in range(20):
        x = level * (j % 5) / 4 + random.standard_t(4, size=n)
        x = np.round(x, 2) if j % 2 else x
        columns[f"x{j}"] = pa.array(x, mask=random.random(n) < 0.05 * (j % 3 == 0))
    for j in range(4):
        columns[f"count{j}"] = pa.array(random.poisson(np.exp(1 + 0.3 * level)))
    for j, levels in enumerate((3, 10, 100, 1000)):
        code = np.minimum(random.geometric(3 / (levels + 3), size=n), levels) - 1
        names = pa.array([f"level {i}" for i in range(levels)])
        columns[f"category{j}"] = pa.DictionaryArray.from_arrays(code.astype(np.int32), names)
    columns["yes"] = pa.array(random.random(n) < 1 / (1 + np.exp(-level)))
    columns["day"] = pa.array(random.integers(15_000, 20_000, n).astype("datetime64[D]"))
    return pa.table(columns)


def write(path: Path, rows: int, seed: int) -> None:
    """A parquet file of so many rows, a chunk at a time."""
    random = np.random.default_rng(seed)
    first = chunk(random, min(CHUNK, rows))
    with pq.ParquetWriter(path, first.schema) as file:
        file.write_table(first)
        for start in range(CHUNK, rows, CHUNK):
            file.write_table(chunk(random, min(CHUNK, rows - start)))


def measured(name: str, command: list[str]) -> None:
    """Run a command, and print its time and its largest resident set."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: exit status {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - begin
    peak = usage.ru_maxrss / 2**20  # KiB, on Linux
    print(f"{name:24} {peak:5.2f} GiB   {seconds:6.0f} s, {usage.ru_utime:6.0f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    musigma = [sys.executable, "-m", "musigma"]
    with tempfile.TemporaryDirectory() as folder:
        rows, run = Path(folder) / "rows.parquet", Path(folder) / "run"
        write(rows, options.rows, seed=0)
        print(f"{options.rows:,} rows of 30 columns, {rows.stat().st_size / 2**20:.0f} MiB")
        measured("import alone", [sys.executable, "-c", "import torch, pyarrow"])
        train = ["train", "table", str(rows), "--out", str(run), "--blocks", "1"]
        budget = ["--minutes", str(options.minutes), "--hidden", str(options.hidden)]
        measured("musigma train", [*musigma, *train, *budget])
        score = ["score", str(run), str(rows), "--out", f"{folder}/scores.parquet"]
        measured("musigma score", [*musigma, *score])
        stream = [sys.executable, "-c", STREAMED, str(run), str(rows), f"{folder}/stream.parquet"]
        measured("Scorer, as a stream", stream)


if __name__ == "__main__":
    main()
