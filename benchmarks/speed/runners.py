"""Runs contenders in this process or in separate processes.

A separate process runs `benchmarks.speed.child`. Requests and answers are lines of JSON; what a
contender prints is discarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.counts import counts, peak_growth
from benchmarks.speed.harness import CLOCKS, Contender, Subject, Unavailable, time_slice

__all__ = ["Conditions", "InProcess", "Subprocess"]

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Settings of a separate process.

    Args:
        threads: Number of torch threads; None: torch's default.
        keep_heap: Whether the process keeps freed memory.
        device: Device of all computations.
        clock: One of `CLOCKS`.
    """

    threads: int | None = None
    keep_heap: bool = True
    device: str = "cpu"
    clock: str = "wall"


class InProcess:
    """A contender in this process.

    Args:
        contender: Set up at once.
        device: Device of all computations.
        clock: One of `CLOCKS`.

    Raises:
        Unavailable: If the contender cannot run here.
    """

    def __init__(self, contender: Contender, device: str = "cpu", clock: str = "wall"):
        self.device, self.clock = device, CLOCKS[clock]
        torch.manual_seed(0)
        with self._on_device():
            self.subject: Subject = contender.setup()

    def about(self) -> dict[str, Any]:
        """The operations, the number of parameters and the note."""
        s = self.subject
        return {
            "calls": list(s.calls),
            "parameters": s.parameters,
            "countable": s.countable,
            "note": s.note,
        }

    def warm(self, operation: str, calls: int = 2) -> None:
        """Initialise the model if this is the first call, then run the operation a few times."""
        with self._on_device():
            if self.subject.initialize:
                with self.subject.mode("step"):
                    self.subject.initialize()
                self.subject.initialize = None
            with self.subject.mode(operation):
                for _ in range(calls):
                    self.subject.calls[operation]()

    def time(self, operation: str, seconds: float) -> list[float]:
        """Run the operation for the given seconds; returns the seconds of each call."""
        with self._on_device(), self.subject.mode(operation):
            return time_slice(self._synchronous(operation), seconds, self.clock)

    def counts(self, operation: str) -> dict[str, int]:
        """FLOPs, kernels and saved bytes."""
        with self._on_device():
            return counts(self.subject, operation)

    def growth(self, operation: str) -> int | None:
        """Peak memory of the first three calls, in bytes above the bare model."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.warm(operation, 3)
            return torch.cuda.max_memory_allocated() - before
        return peak_growth(lambda: self.warm(operation, 1))

    def close(self) -> None:
        """Free the model and its data."""
        del self.subject

    def _on_device(self):
        """Create new tensors on the device; on a CPU without the cost of a torch function mode."""
        return contextlib.nullcontext() if self.device == "cpu" else torch.device(self.device)

    def _synchronous(self, operation: str):
        """The call; on an accelerator, until its last kernel has finished."""
        call = self.subject.calls[operation]
        if self.device == "cpu":
            return call

        def until_done() -> None:
            call()
            torch.accelerator.synchronize()

        return until_done


class Subprocess:
    """A contender in a separate process, with the methods of `InProcess`.

    Args:
        workload: By name.
        contender: Its `environment` and `package` apply to the process.
        conditions: Threads, heap, device and clock.

    Raises:
        Unavailable: If the contender cannot run here.
    """

    def __init__(self, workload: str, contender: Contender, conditions: Conditions):
        first = [contender.package] if contender.package else []
        path = [*first, str(ROOT), *filter(None, sys.path)]
        self.contender = contender.name
        self.environment = {
            **os.environ,
            **(contender.environment or {}),
            "PYTHONPATH": os.pathsep.join(path),
        }
        self.request = {
            "workload": workload,
            "contender": contender.name.partition("@")[0],
            "package": contender.package,
            **asdict(conditions),
        }
        self._start()

    def restart(self) -> None:
        """Continue in a new process."""
        self.close()
        self._start()

    def _start(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            text=True,
        )
        try:
            self.answer = self._ask(self.request)
        except BaseException:
            self.close()
            raise

    def about(self) -> dict[str, Any]:
        """The operations, the number of parameters and the note."""
        return self.answer

    def warm(self, operation: str, calls: int = 2) -> None:
        """Initialise the model if this is the first call, then run the operation a few times."""
        self._ask({"method": "warm", "operation": operation, "calls": calls})

    def time(self, operation: str, seconds: float) -> list[float]:
        """Run the operation for the given seconds; returns the seconds of each call."""
        return self._ask({"method": "time", "operation": operation, "seconds": seconds})

    def counts(self, operation: str) -> dict[str, int]:
        """FLOPs, kernels and saved bytes."""
        return self._ask({"method": "counts", "operation": operation})

    def growth(self, operation: str) -> int | None:
        """Peak memory of the first three calls, in bytes above the bare model."""
        return self._ask({"method": "growth", "operation": operation})

    def close(self) -> None:
        """End the process."""
        self.child.kill()
        self.child.communicate()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except (BrokenPipeError, ValueError):  # the process ended or was closed
            line = ""
        if not line:
            raise RuntimeError(f"the process ended with code {self.child.wait()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]
