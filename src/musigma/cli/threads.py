"""How many CPU threads training uses: one for each core that no other process is using.

The threads of an operation wait for each other. If one of them shares its core with another
process, all the others wait for it, spinning, and a training step can take several times as long
as with one thread fewer (docs/speed.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Threads"]

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK")
"""Environment variables of users and launchers; with any of them, nothing is changed."""

WINDOW = 2.0
"""Seconds over which the use of the cores is averaged during training."""

FIRST_WINDOW = 0.3


def _seconds() -> tuple[float, float] | None:
    """A clock, and the CPU seconds of other processes on our cores; None if they are unknown."""
    try:
        cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        lines = Path("/proc/stat").read_text().splitlines()
        rows = [fields[1:8] for line in lines if (fields := line.split())[0] in cores]
    except (AttributeError, OSError, IndexError):  # not Linux
        return None
    ticks = sum(
        int(n)
        for user, nice, system, _, _, irq, soft in rows
        for n in (user, nice, system, irq, soft)
    )
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class Threads:
    """torch's number of threads, adapted to the cores that are free.

    Create it early: the first choice averages over the time since then.

    Args:
        environment: Where users and launchers choose a number of threads; then nothing changes.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        self.fixed = any(name in environment for name in CHOSEN_BY_USER)
        self.most, self.last = 0, _seconds()

    def choose(self, number: int | None = None) -> int:
        """Set the number of threads before training; returns it.

        Args:
            number: The number that a run began with, which its exact continuation needs; None, or
                more than there are cores: as many as there are free cores.
        """
        import torch

        self.most = self.most or torch.get_num_threads()
        if self.fixed:
            return self.most
        if number is None or number > self.most:
            time.sleep(max(0.0, FIRST_WINDOW - self._age()))
            number = self._free()
        torch.set_num_threads(number)
        return number

    def adapt(self, step: int = 0) -> bool:
        """Follow the load during training; returns False, so `musigma.fit` does not stop."""
        if not self.fixed and self._age() > WINDOW:
            import torch

            if (number := self._free()) != torch.get_num_threads():
                torch.set_num_threads(number)
        return False

    def _age(self) -> float:
        """Seconds since the free cores were counted; 0 if the system does not report it."""
        return time.monotonic() - self.last[0] if self.last else 0.0

    def _free(self) -> int:
        """The cores that other processes did not use since the last call, on average."""
        before, self.last = self.last, _seconds()
        if before is None or self.last is None or self.last[0] <= before[0]:
            return max(1, self.most)
        elapsed, used = (b - a for a, b in zip(before, self.last, strict=True))
        return max(1, self.most - round(max(0.0, used / elapsed)))
