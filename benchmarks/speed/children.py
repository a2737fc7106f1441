"""Contenders in processes of their own: another back end, or memory that nothing else has touched.

A child is `python -m benchmarks.speed`; it is asked, and answers, in lines of JSON. What a
contender writes to its standard output goes nowhere, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from benchmarks.speed.counts import counts, peak_growth
from benchmarks.speed.harness import CLOCKS, Contender, Subject, Unavailable, slice_of
from benchmarks.speed.machine import settings
from benchmarks.speed.works import find

__all__ = ["Apart", "Here", "serve"]


class Here:
    """A contender in this process.

    Args:
        contender: Set up at once.
        device: Where it computes.
        clock: What calls are timed by, one of `CLOCKS`.

    Raises:
        Unavailable: If the contender cannot take part.
    """

    def __init__(self, contender: Contender, device: str = "cpu", clock: str = "wall"):
        self.device, self.clock = device, CLOCKS[clock]
        torch.manual_seed(0)
        with self._placed():
            self.subject: Subject = contender.setup()

    def about(self) -> dict[str, Any]:
        """What there is to call, and what is said about it."""
        s = self.subject
        return {
            "calls": list(s.calls),
            "parameters": s.parameters,
            "countable": s.countable,
            "note": s.note,
        }

    def warm(self, what: str, calls: int = 2) -> None:
        """Do once what must come first, and then what is timed, a few times."""
        with self._placed():
            if self.subject.warm:
                with self.subject.ready("step"):
                    self.subject.warm()
                self.subject.warm = None
            with self.subject.ready(what):
                for _ in range(calls):
                    self.subject.calls[what]()

    def time(self, what: str, seconds: float) -> list[float]:
        """A slice."""
        with self._placed(), self.subject.ready(what):
            return slice_of(self._finished(what), seconds, self.clock)

    def counts(self, what: str) -> dict[str, int]:
        """FLOPs, kernels, saved bytes."""
        with self._placed():
            return counts(self.subject, what)

    def growth(self, what: str) -> int | None:
        """Bytes over the bare model at the peak of three calls, the first ones ever."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.warm(what, 3)
            return torch.cuda.max_memory_allocated() - before
        return peak_growth(lambda: self.warm(what, 1))

    def close(self) -> None:
        """Let go of the model and its data."""
        del self.subject

    def _placed(self):
        """New tensors are made on the device; on a CPU without the cost of saying so."""
        return contextlib.nullcontext() if self.device == "cpu" else torch.device(self.device)

    def _finished(self, what: str):
        """The call; on a GPU, until its last kernel has run."""
        call = self.subject.calls[what]
        if self.device == "cpu":
            return call

        def until_done() -> None:
            call()
            torch.accelerator.synchronize()

        return until_done


class Apart:
    """A contender in a process of its own, with the methods of `Here`.

    Args:
        work: By its name.
        contender: The process is started with its environment.
        options: Of `settings`, the device, and the clock.

    Raises:
        Unavailable: If the contender cannot take part.
    """

    def __init__(self, work: str, contender: Contender, **options: Any):
        environment = {
            **os.environ,
            **(contender.apart or {}),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        try:
            self.said = self._ask({"work": work, "contender": contender.name, **options})
        except BaseException:
            self.close()
            raise

    def about(self) -> dict[str, Any]:
        """What there is to call, and what is said about it."""
        return self.said

    def warm(self, what: str, calls: int = 2) -> None:
        """Do once what must come first, and then what is timed, a few times."""
        self._ask({"do": "warm", "what": what, "calls": calls})

    def time(self, what: str, seconds: float) -> list[float]:
        """A slice."""
        return self._ask({"do": "time", "what": what, "seconds": seconds})

    def counts(self, what: str) -> dict[str, int]:
        """FLOPs, kernels, saved bytes."""
        return self._ask({"do": "counts", "what": what})

    def growth(self, what: str) -> int | None:
        """Bytes over the bare model at the peak of three calls, the first ones ever."""
        return self._ask({"do": "growth", "what": what})

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
        except (BrokenPipeError, ValueError):  # it is gone, or was closed
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with code {self.child.wait()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]


def serve() -> None:
    """Be the child: answer requests until there are no more."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # jax has no other way to be told of threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: first["threads"]])
    with settings(threads=first["threads"], keep_heap=first["keep_heap"]):
        here: Here | None = None
        try:
            contender = find(first["work"], first["contender"])
            here = Here(contender, first["device"], first["clock"])
            reply({"answer": here.about()})
        except Unavailable as why:
            reply({"unavailable": str(why)})
        except Exception as error:  # said to the parent, who leaves this contender out
            reply({"error": f"{type(error).__name__}: {error}"})
        for line in sys.stdin if here else ():
            request = json.loads(line)
            try:
                reply({"answer": getattr(here, request.pop("do"))(**request)})
            except Exception as error:
                reply({"error": f"{type(error).__name__}: {error}"})
