"""Synthetic rows of several libraries beside real ones, after equal minutes of training.

    python benchmarks/synthetic.py --minutes 5                        # use an idle machine
    python benchmarks/synthetic.py --minutes 0.33 --only copula table
    python benchmarks/synthetic.py --peer ctgan=/venvs/ctgan/bin/python --peer mostlyai=...

The table is `diamonds` (of plotnine), or a file (`--data FILE.csv --target COLUMN`): nine tenths
of the rows train, one tenth is held out. Each library trains in a process of its own, on the same
rows, until its minutes of wall time are over, and draws as many rows as are held out.
`musigma.comparison` compares these with the held-out rows, with the training rows for the
membership test.

- table: `musigma train table`, and the same with 8 orders of the columns.
- copula: empirical marginals and a Gaussian copula of them, in the few lines below. It takes what
  it takes.
- tvae, ctgan: ctgan's classes (Xu et al., 2019, arXiv:1907.00503) with their defaults, stopped
  after the epoch in which the time ends.
- mostlyai: mostlyai-engine's TabularARGN (Tiwald et al., 2025, arXiv:2501.12012), which stops by
  itself.

A library that is not installed is skipped, with a line that says so. Each is best installed into a
virtual environment of its own:

    python -m venv /venvs/ctgan && /venvs/ctgan/bin/pip install ctgan
    python -m venv /venvs/mostlyai && /venvs/mostlyai/bin/pip install mostlyai-engine

(mostlyai-engine imports torchvision, if it is there, which must then be the one of its torch.)
Times are wall times of a whole process's work: reading of columns and mixtures included, so they
exceed the minutes somewhat, and by much on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PEERS = {"copula": "", "tvae": "ctgan", "ctgan": "ctgan", "mostlyai": "mostlyai"}
"""Contenders that run in this file, and the environment of each."""

OURS = {"table": [], "table, 8 orders": ["--orders", "8"]}
"""Options of `musigma train table`."""


# --- in the process of a contender: no import of musigma -----------------------------------------


def fit(name: str, train: str, out: str, minutes: float, n: int, seed: int) -> dict[str, float]:
    """Train a contender, write its rows, and return the seconds of both."""
    import numpy as np
    import pandas as pd

    np.random.seed(seed)
    frame = pd.read_csv(train)
    start = time.perf_counter()
    draw = globals()[f"fit_{name}"](frame, 60 * minutes, seed)
    fitted = time.perf_counter()
    rows = draw(n)
    seconds = {"fit": fitted - start, "sample": time.perf_counter() - fitted}
    rows[list(frame)].to_csv(out, index=False)
    return seconds


def fit_copula(frame, seconds: float, seed: int) -> Callable:
    """A Gaussian copula: normal scores of every column, and their correlations."""
    import numpy as np
    from scipy.stats import norm

    random = np.random.default_rng(seed)
    values = {name: np.sort(column.to_numpy()) for name, column in frame.items()}
    scores = []
    for name, column in frame.items():
        low, high = (np.searchsorted(values[name], column, side=s) for s in ("left", "right"))
        place = (low + random.random(len(frame)) * (high - low)) / len(frame)
        scores.append(norm.ppf(place.clip(1e-9, 1 - 1e-9)))
    root = np.linalg.cholesky(np.corrcoef(scores) + 1e-9 * np.eye(len(scores)))

    def draw(n: int):
        place = norm.cdf(random.normal(size=(n, len(root))) @ root.T)
        at = (place * len(frame)).astype(int).clip(max=len(frame) - 1)
        return type(frame)({name: values[name][at[:, j]] for j, name in enumerate(frame)})

    return draw


def fit_tvae(frame, seconds: float, seed: int) -> Callable:
    """TVAE of ctgan, for as many epochs as the time allows."""
    from ctgan.synthesizers import tvae

    return _ctgan(frame, tvae, tvae.TVAE(epochs=10**6), seconds, seed)


def fit_ctgan(frame, seconds: float, seed: int) -> Callable:
    """CTGAN of ctgan, for as many epochs as the time allows."""
    from ctgan.synthesizers import ctgan

    return _ctgan(frame, ctgan, ctgan.CTGAN(epochs=10**6), seconds, seed)


def _ctgan(frame, module, model, seconds: float, seed: int) -> Callable:
    end = time.perf_counter() + seconds

    def until(epochs: range, **_) -> Iterator[int]:
        for epoch in epochs:
            yield epoch
            if time.perf_counter() > end:
                print(f"{epoch + 1} epochs", file=sys.stderr)
                return

    module.tqdm = until  # its loop over epochs
    model.set_random_state(seed)
    discrete = [name for name, column in frame.items() if column.dtype.kind not in "iuf"]
    model.fit(frame, discrete)
    return model.sample


def fit_mostlyai(frame, seconds: float, seed: int) -> Callable:
    """TabularARGN of mostlyai-engine."""
    from mostlyai.engine import TabularARGN, set_random_state

    set_random_state(seed)
    model = TabularARGN(max_training_time=seconds / 60, verbose=0)
    model.fit(frame)
    return lambda n: model.sample(n_samples=n)


# --- in the process that compares ----------------------------------------------------------------


def split(data: str, schema: str, folder: Path) -> tuple[Path, Path]:
    """Files of the training rows and of the held-out rows."""
    import numpy as np
    from pyarrow import csv

    import musigma.data
    from musigma.data.columns import decode

    found = musigma.data.load(data, schema=schema)
    parts = {"held-out": ["held-out"], "train": ["train", "validation"]}
    paths = []
    for name, names in parts.items():
        rows = np.concatenate([found.split(part).x for part in names])
        paths.append(folder / f"{name}.csv")
        csv.write_csv(decode(rows, found.schema), paths[-1])
    return paths[1], paths[0]


def run_ours(options: list[str], train: Path, out: Path, minutes: float, n: int, seed: int):
    """`musigma train table` and `musigma sample`, with the seconds of both."""
    folder = out.with_suffix("")
    command = [sys.executable, "-m", "musigma"]
    more = ["--minutes", str(minutes), "--seed", str(seed), "--out", str(folder), "--overwrite"]
    start = time.perf_counter()
    _call([*command, "train", "table", str(train), *options, *more])
    fitted = time.perf_counter()
    _call([*command, "sample", str(folder), "--n", str(n), "--out", str(out)])
    return {"fit": fitted - start, "sample": time.perf_counter() - fitted}


def run_peer(name: str, python: str, train: Path, out: Path, minutes: float, n: int, seed: int):
    """A contender in a process of its own, or the reason why there is none."""
    words = [python, __file__, "fit", name, str(train), str(out), str(minutes), str(n), str(seed)]
    return json.loads(_call(words).splitlines()[-1])


def _call(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed"])[-1])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="diamonds")
    parser.add_argument("--schema", default="infer")
    parser.add_argument("--target", default="price")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", nargs="*", default=[*OURS, *PEERS], metavar="NAME")
    parser.add_argument("--peer", action="append", default=[], metavar="ENV=PYTHON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a .json file of all comparisons")
    args = parser.parse_args()
    if unknown := set(args.only) - {*OURS, *PEERS}:
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join([*OURS, *PEERS])}")
    pythons = dict(each.partition("=")[::2] for each in args.peer)

    from musigma.comparison import compare
    from musigma.files import write_json

    columns = ("C2ST AUC", "accuracy", f"{args.target}, trained on", "membership AUC", "copies")
    print(f"{'':16}" + "".join(f"{c:26}" for c in columns) + "fit s   us/row")
    every = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held_out = split(args.data, args.schema, folder)
        n = sum(1 for _ in held_out.open(encoding="utf-8")) - 1
        for name in args.only:
            out = folder / f"{name}.csv"
            settings = (train, out, args.minutes, n, args.seed)
            try:
                if name in OURS:
                    seconds = run_ours(OURS[name], *settings)
                else:
                    python = pythons.get(PEERS[name], sys.executable)
                    seconds = run_peer(name, python, *settings)
                found = compare(held_out, out, train, target=args.target, seed=args.seed)
            except (RuntimeError, ValueError) as error:
                print(f"{name:16}skipped: {error}")
                continue
            if not every:
                real = found.usefulness[0].real
                line(
                    "real",
                    *(found.baseline.auc, found.baseline.accuracy, real),
                    *("", found.privacy.chance_copies, math.nan, math.nan),
                )
            line(
                name,
                *(found.c2st.auc, found.c2st.accuracy, found.usefulness[0].synthetic),
                *(found.privacy.membership or "", found.privacy.copies),
                *(seconds["fit"], 1e6 * seconds["sample"] / n),
            )
            every[name] = found.to_dict() | {"seconds": seconds}
    if args.out:
        write_json(args.out, every)


def line(name: str, *cells) -> None:
    *figures, fit_seconds, per_row = cells
    text = "".join(f"{each!s:26}" for each in figures)
    print(f"{name:16}{text}{fit_seconds:<8.0f}{per_row:.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        name, train, out, minutes, n, seed = sys.argv[2:]
        print(json.dumps(fit(name, train, out, float(minutes), int(n), int(seed))))
    else:
        main()
