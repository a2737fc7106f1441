"""A profile of a few training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musigma.files import replacing

__all__ = ["profiling"]

SKIPPED, WARMUP, RECORDED = 5, 2, 5  # steps


@contextmanager
def profiling(path: Path | None, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Write a trace of steps 8 to 12, for chrome://tracing.

    Args:
        path: The file; None: no trace is written.
        warn: Called with the reason if the trace could not be written.

    Yields:
        A function to call after each step.
    """
    if path is None:
        yield lambda: None
        return
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
