"""The process of one contender, started by `benchmarks.speed.runners.Subprocess`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def serve() -> None:
    """Set up the contender named in the first request; answer requests until the input ends."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    threads = first["threads"]
    if threads and hasattr(os, "sched_setaffinity"):  # the only limit that jax respects
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    from benchmarks.speed.harness import Unavailable
    from benchmarks.speed.machine import settings
    from benchmarks.speed.runners import InProcess
    from benchmarks.speed.workloads import find

    with settings(threads=threads, keep_heap=first["keep_heap"]):
        runner: InProcess | None = None
        try:
            if first["package"]:
                check_package(first["package"])
            contender = find(first["workload"], first["contender"])
            runner = InProcess(contender, first["device"], first["clock"])
            reply({"answer": runner.about()})
        except Unavailable as error:
            reply({"unavailable": str(error)})
        except Exception as error:  # the parent leaves this contender out
            reply({"error": f"{type(error).__name__}: {error}"})
        for line in sys.stdin if runner else ():
            request = json.loads(line)
            try:
                reply({"answer": getattr(runner, request.pop("method"))(**request)})
            except Exception as error:
                reply({"error": f"{type(error).__name__}: {error}"})


def check_package(folder: str) -> None:
    """Refuse to time another package than the one in the folder."""
    import musigma

    found = Path(musigma.__file__).resolve()
    if not found.is_relative_to(Path(folder).resolve()):
        raise ImportError(f"expected musigma from {folder}; got {found}")


if __name__ == "__main__":
    serve()
