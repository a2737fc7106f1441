"""The records of a run: ``metrics.jsonl``, the trackers of the same figures, a profile."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from musigma.files import finite, replacing, row_of
from musigma.spec import bits_per_dim
from musigma.trace import Evidence
from musigma.training.state import Progress

__all__ = ["Log", "Watch", "evidence_row", "profiling"]

Watch = Callable[[Mapping[str, Any]], None]
SKIPPED, WARMUP, RECORDED = 5, 2, 5  # steps of a profile


class Log:
    """Appends rows to ``metrics.jsonl``, and passes them to `watch` and to the trackers.

    `rewind` opens the file. On a full disk rows are dropped, and training continues. A log that
    does not `write` does nothing.
    """

    def __init__(self, path: Path, watch: Watch | None, *, write: bool = True):
        self.path, self.watch, self.writes = path, watch, write
        self.file, self.trackers = None, []
        self.examples, self.measured = 0, time.monotonic()

    def rewind(self, step: int) -> None:
        """Drop rows after a step, and incomplete lines; continue from there."""
        if not self.writes:
            return
        self.close()
        lines = self.path.read_bytes().splitlines() if step and self.path.exists() else []
        kept = [line + b"\n" for line in lines if (row := row_of(line)) and row["step"] <= step]
        with replacing(self.path) as draft:
            draft.write_bytes(b"".join(kept))
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        if self.file:
            with contextlib.suppress(OSError):  # unwritten rows, on a full disk
                self.file.close()
            self.file = None

    def finish(self) -> None:
        """Close the file and the trackers."""
        self.close()
        for tracker in self.trackers:
            with contextlib.suppress(Exception):  # failures of trackers do not stop a run
                tracker.finish()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.write(json.dumps(finite(dict(row))) + "\n")
                self.file.flush()
            if self.watch:
                self.watch(row)
        if self.trackers and row["kind"] in ("train", "evaluation"):
            self._track(row)

    def message(self, kind: str, progress: Progress, message: str) -> None:
        """Append a row of kind `warning`, `info` or `setback`."""
        where = {"step": progress.step, "seconds": progress.seconds}
        self.write({"kind": kind, **where, "message": message})

    def _track(self, row: Mapping[str, Any]) -> None:
        """Pass the numbers of a row to the trackers; drop one that fails."""
        kind, columns = row["kind"], {f"kl_{i}": value for i, value in enumerate(row["kl"])}
        numbers = {name: v for name, v in row.items() if isinstance(v, (int, float))}
        values = {f"{kind}/{n}": v for n, v in {**numbers, **columns}.items() if n != "step"}
        for tracker in list(self.trackers):
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:
                self.trackers.remove(tracker)
                reason = str(error) or type(error).__name__
                where = Progress(row["step"], row["seconds"])
                self.message(
                    "warning", where, f"{tracker.name} failed, so it is no longer used: {reason}"
                )

    def examples_per_second(self) -> float:
        """The speed since the last call; `examples` counts what was processed."""
        now = time.monotonic()
        speed = self.examples / max(now - self.measured, 1e-9)
        self.examples, self.measured = 0, now
        return speed


def evidence_row(evidence: Evidence, dims: int) -> dict[str, Any]:
    """The terms of a batch, averaged over its examples, for a row of the log."""
    means = {name: t.float().mean(0).tolist() for name, t in evidence._asdict().items()}
    nats = -evidence.elbo.mean().item()
    row = {"nats": nats, "bits_per_dim": bits_per_dim(nats, dims)}
    row |= {name: means[name] for name in ("kl", "log_px", "log_q", "log_det")}
    if means["auxiliary"]:  # a classifier's term
        row["auxiliary"] = means["auxiliary"]
    return row


@contextlib.contextmanager
def profiling(path: Path, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Write a trace of steps 8 to 12, for chrome://tracing, or say why it was not written.

    Yields:
        A function to call after each step.
    """
    from torch.profiler import profile, schedule

    problem = f"training ended before step {SKIPPED + WARMUP + 1}"

    def write(profiler: Any) -> None:
        nonlocal problem
        try:
            with replacing(path) as draft:
                profiler.export_chrome_trace(str(draft))
            problem = ""
        except (OSError, RuntimeError) as error:
            problem = str(error)

    plan = schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if problem:
        warn(f"{path.name} was not written: {problem}")
