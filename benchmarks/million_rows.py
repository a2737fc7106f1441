"""Scores of a million rows, from one parquet file to another: musigma and zuko in a plain loop.

    python benchmarks/million_rows.py --rows 1000000

Both score with an autoregressive neural spline flow of 10 columns, with 5 transforms, 2 hidden
layers of 128 units and 8 bins. musigma's model is a checkpoint, which the command `musigma score`
reads; zuko's is loaded from its weights, and its loop reads and scores a batch of the file at a
time, as its authors' tutorials do. Each is a process of its own, on one thread. Printed are its
seconds of CPU, its elapsed time, and the largest resident set. docs/speed.md has the figures.
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
import torch

COLUMNS, CHUNK = 10, 50_000

LOOP = """
import sys
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zuko
weights, rows, out, batch = *sys.argv[1:4], int(sys.argv[4])
flow = zuko.flows.NSF(10, transforms=5, hidden_features=(128, 128), bins=8)
flow.load_state_dict(torch.load(weights, weights_only=True))
flow.eval()
schema = pa.schema([("nats", pa.float32())])
with pq.ParquetWriter(out, schema) as file, torch.no_grad():
    for part in pq.ParquetFile(rows).iter_batches(batch_size=batch):
        x = torch.tensor(part.to_pandas().to_numpy(), dtype=torch.float32)
        nats = -flow().log_prob(x)
        file.write_table(pa.table({"nats": nats.numpy()}, schema=schema))
"""


def write(path: Path, rows: int) -> None:
    """A parquet file of normal numbers, a chunk at a time."""
    random = np.random.default_rng(0)
    names = [f"x{j}" for j in range(COLUMNS)]
    schema = pa.schema([(name, pa.float64()) for name in names])
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, rows, CHUNK):
            x = random.normal(size=(COLUMNS, min(CHUNK, rows - start)))
            file.write_table(pa.table(dict(zip(names, x, strict=True)), schema=schema))


def measured(name: str, command: list[str]) -> None:
    """Run a command on one thread; print its times and its largest resident set."""
    begin = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: exit status {os.waitstatus_to_exitcode(status)}")
    peak, cpu = usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime  # KiB, on Linux
    print(f"{name:24} {cpu:7.1f} s of CPU {time.monotonic() - begin:7.1f} s {peak:6.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 1024, 4096])
    options = parser.parse_args()
    import zuko

    import musigma

    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.parquet", f"{folder}/scores.parquet"
        model, weights = f"{folder}/model.safetensors", f"{folder}/zuko.pt"
        write(rows, options.rows)
        print(f"{options.rows:,} rows of {COLUMNS} columns, {rows.stat().st_size / 2**20:.0f} MiB")
        spec = musigma.Spec((COLUMNS,), columns=tuple(f"x{j}" for j in range(COLUMNS)))
        musigma.save(musigma.build("nsf", spec, kind="autoregressive", depth=5), model)
        flow = zuko.flows.NSF(COLUMNS, transforms=5, hidden_features=(128, 128), bins=8)
        torch.save(flow.state_dict(), weights)
        score = ["-m", "musigma", "score", model, str(rows), "--out", out]
        measured("musigma score", [sys.executable, *score])
        for batch in options.batches:
            loop = ["-c", LOOP, weights, str(rows), out, str(batch)]
            measured(f"zuko, batches of {batch}", [sys.executable, *loop])


if __name__ == "__main__":
    main()
