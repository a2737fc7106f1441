"""Training speed beside one other busy process, by how OpenMP threads wait for each other.

    python -m benchmarks.beside                      # steps, by OpenMP's settings
    python -m benchmarks.beside --command            # `musigma train`, which adapts its threads

Every setting runs in a process of its own, alone and beside a process that only computes, in
turns and in random order. A slice during which anything else used more than a tenth of a core is
discarded and repeated. The table shows the speed of a step relative to torch's default setting
when alone: the median over slices, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.speed.harness import Contender, quartiles
from benchmarks.speed.runners import Conditions, Subprocess
from benchmarks.speed.workloads import select
from musigma.cli.threads import CHOSEN_BY_USER

SETTINGS = {
    "torch's default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
DEFAULT = next(iter(SETTINGS))
COMMANDS = {DEFAULT: {"OMP_NUM_THREADS": "2"}, "musigma train": {}}
TRAIN = [
    "train",
    "mlp_vae",
    "digits",
    "--minutes",
    "0.2",
    "--evaluations",
    "1",
    "--json",
    "--overwrite",
    "--out",
]
TICK = os.sysconf("SC_CLK_TCK")
Key = tuple[str, bool]
"""A setting, and whether another process is busy."""


def machine_seconds() -> float:
    """CPU time that all processes of this machine have used."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:10]
    return sum(map(int, (user, nice, system, irq, softirq))) / TICK


def process_seconds(pid: int) -> float:
    """CPU time that a process has used, over all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Busy:
    """A process that computes while it is allowed to."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def running(self, wanted: bool):
        """Let it run for the duration of a block, if wanted."""
        if wanted:
            self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(
    workload: str, settings: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[Key, list[float]]:
    """Steps per second of every setting, alone and beside a busy process, slice by slice."""
    (found,) = select([workload])
    setup = found.contenders[0].setup
    speeds: dict[Key, list[float]] = {(s, b): [] for s in settings for b in (False, True)}
    with ExitStack() as stack:
        busy = Busy()
        stack.callback(busy.close)
        runners: dict[str, Subprocess] = {}
        for name, environment in settings.items():
            contender = Contender("musigma", setup, environment=environment)
            runners[name] = Subprocess(workload, contender, Conditions(threads=None))
            stack.callback(runners[name].close)
            runners[name].warm("step", 3)
        shuffle, deadline = random.Random(0).shuffle, time.monotonic() + 60 * options.minutes
        discarded = 0
        while time.monotonic() < deadline:
            order = [key for key, values in speeds.items() if len(values) < options.rounds]
            if not order:
                break
            shuffle(order)
            for name, beside in order:
                runner = runners[name]
                with busy.running(beside):
                    pids = (runner.child.pid, busy.process.pid, os.getpid())
                    before, ours = machine_seconds(), sum(map(process_seconds, pids))
                    start = time.monotonic()
                    seconds = runner.time("step", options.seconds)
                    elapsed = time.monotonic() - start
                    others = machine_seconds() - before
                    others -= sum(map(process_seconds, pids)) - ours
                if others > options.tolerance * elapsed:
                    discarded += 1
                    continue
                speeds[name, beside].append(len(seconds) / sum(seconds))
        print(f"{workload}: {discarded} slices discarded", file=sys.stderr)
    return speeds


def measure_command(options: argparse.Namespace) -> dict[Key, list[float]]:
    """Steps per second of `musigma train`, with fixed and with adapted threads."""
    keys = [(s, b) for s in COMMANDS for b in (False, True)]
    speeds: dict[Key, list[float]] = {key: [] for key in keys}
    busy, shuffle = Busy(), random.Random(0).shuffle
    deadline = time.monotonic() + 60 * options.minutes
    with ExitStack() as stack:
        stack.callback(busy.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        while time.monotonic() < deadline:
            order = [key for key in keys if len(speeds[key]) < options.rounds]
            if not order:
                break
            shuffle(order)
            for name, beside in order:
                environment = {**os.environ, **COMMANDS[name]}
                with busy.running(beside):
                    before, used = machine_seconds(), own_seconds(busy)
                    start = time.monotonic()
                    done = subprocess.run(
                        [sys.executable, "-m", "musigma", *TRAIN, f"{folder}/run"],
                        env=environment,
                        check=True,
                        capture_output=True,
                    )
                    elapsed = time.monotonic() - start
                    others = machine_seconds() - before - (own_seconds(busy) - used)
                if others <= options.tolerance * elapsed:
                    result = json.loads(done.stdout)
                    speeds[name, beside].append(result["steps"] / result["seconds"])
    return speeds


def own_seconds(busy: Busy) -> float:
    """CPU time of this process, of the children that ended, and of the busy process."""
    return sum(os.times()[:4]) + process_seconds(busy.process.pid)


def table(workload: str, speeds: dict[Key, list[float]]) -> str:
    """Speeds relative to torch's default alone, as rows of a Markdown table."""
    if not speeds[DEFAULT, False]:
        return f"| {workload} | no undisturbed slice | | |"
    _, reference, _ = quartiles(speeds[DEFAULT, False])
    rows = []
    for setting in dict.fromkeys(name for name, _ in speeds):
        cells = []
        for beside in (False, True):
            values = speeds[setting, beside]
            if not values:
                cells.append("not measured")
                continue
            low, middle, high = (v / reference for v in quartiles(values))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f}, n = {len(values)})")
        rows.append(f"| {workload} | {setting} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main() -> None:
    """Measure and print the table."""
    p = argparse.ArgumentParser("python -m benchmarks.beside", description=__doc__.split("\n")[0])
    p.add_argument("workloads", nargs="*", help="of benchmarks.speed (default: a VAE, two flows)")
    p.add_argument("--command", action="store_true", help="time `musigma train` instead")
    p.add_argument(
        "--spins", type=int, nargs="*", default=[], help="further settings of GOMP_SPINCOUNT"
    )
    p.add_argument("--cores", type=int, default=2, help="cores for all processes (default: 2)")
    p.add_argument("--seconds", type=float, default=1.0, help="of a slice (default: 1)")
    p.add_argument("--rounds", type=int, default=10, help="slices of each setting (default: 10)")
    p.add_argument("--minutes", type=float, default=5.0, help="limit for each workload")
    p.add_argument(
        "--tolerance", type=float, default=0.1, help="cores that other processes may use"
    )
    p.add_argument("--out", type=Path, help="a .json file for the speeds of all slices")
    options = p.parse_args()
    for name in (*CHOSEN_BY_USER, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    settings = SETTINGS | {f"spin {n:,}": {"GOMP_SPINCOUNT": str(n)} for n in options.spins}
    every = {}
    workloads = options.workloads or ["mlp-vae", "nsf-c-8", "glow-128"]
    print("| workload | setting | alone | beside one busy process |\n|---|---|---|---|")
    for workload in ["mlp_vae on digits"] if options.command else workloads:
        if options.command:
            speeds = measure_command(options)
        else:
            speeds = measure(workload, settings, options)
        print(table(workload, speeds), flush=True)
        every[workload] = [[*key, values] for key, values in speeds.items()]
    if options.out:
        options.out.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
