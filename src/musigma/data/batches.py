"""Batches of examples, shuffled or in order, taken inline, or in advance by worker processes.

The examples of a step, and their noise, are a function of (seed, step) alone. They are the same
for any number of workers, after a restart, and for any number of processes that share a batch.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from musigma.data import DataError, Dataset, batch_indices

__all__ = ["in_order", "stream"]

Batch = tuple[np.ndarray, np.ndarray]
METHOD = "fork" if sys.platform == "linux" else "spawn"  # forks are unsafe elsewhere
IGNORED = (signal.SIGINT, signal.SIGTERM)
WORTH_A_PROCESS = 8  # batches of images on disk


def stream(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    part: slice = slice(None),
    workers: int = 0,
    ahead: int = 2,
) -> Iterator[Batch]:
    """Batches of the steps from `start` on: examples as a model sees them, and their indices.

    The batch of a step is `dataset.take(indices, seed=seed, step=step)`, where `indices` are
    `batch_indices(...)`, restricted to `part`. Labels and context are looked up by the same
    indices. To end the workers before the stream ends, `close` it (`contextlib.closing`).

    Args:
        dataset: The examples.
        batch_size: Number of examples of a step, in all parts together.
        seed: Seed of the order of the examples, of perturbation and of dynamic binarization.
        start: First step.
        stop: Step before which the stream ends; None: it does not end.
        part: Rows of each batch to take; no other is read or decoded.
        workers: Number of processes that take batches in advance. With 0, each batch is taken
            when it is needed. Workers help where images are decoded or disks are slow.
        ahead: Number of batches that each worker keeps ready.

    Raises:
        DataError: If an argument cannot be used, an example can no longer be read, or a worker
            was killed.

    >>> data = Dataset(np.arange(20, dtype=np.float32).reshape(10, 2), labels=np.arange(10))
    >>> for x, indices in stream(data, 4, seed=0, stop=2):
    ...     print(x.shape, data.labels[indices])
    (4, 2) [8 7 4 2]
    (4, 2) [6 5 9 0]
    """
    least = {"batch_size": 1, "start": 0, "workers": 0, "ahead": 1}
    given = {"batch_size": batch_size, "start": start, "workers": workers, "ahead": ahead}
    for name, value in given.items():
        if value < least[name]:
            raise DataError(f"{name} is {value}: give a whole number from {least[name]}")
    if part.step not in (None, 1):
        raise DataError(f"part is {part}: give a slice of adjacent rows")
    if not len(dataset):
        raise DataError(f"{dataset.name or 'dataset'}: holds no examples to take batches of")
    first, last, _ = part.indices(batch_size)
    part = slice(first, max(first, last))
    shuffled = partial(_shuffled, len(dataset), batch_size, part, seed)
    plan = _Plan(dataset, shuffled, part.stop - part.start, seed, part.start)
    return _batches(plan, range(start, sys.maxsize if stop is None else stop), workers, ahead)


def in_order(
    dataset: Dataset, batch_size: int, *, seed: int = 0, steps: range | None = None
) -> Generator[Batch, None, None]:
    """Every example once, in order, in batches that are taken as those of `stream`.

    Images on disk are decoded by another process while their batches are used, where processes
    are cheap to start.

    Args:
        dataset: The examples.
        batch_size: Number of examples of a batch; the last may have fewer.
        seed: Seed of perturbation and of dynamic binarization.
        steps: Numbers of the batches to take; None: of all.

    >>> data = Dataset(np.arange(10, dtype=np.float32).reshape(5, 2))
    >>> for x, indices in in_order(data, 2):
    ...     print(x.shape, indices)
    (2, 2) [0 1]
    (2, 2) [2 3]
    (1, 2) [4]
    """
    steps = range(math.ceil(len(dataset) / batch_size)) if steps is None else steps
    plan = _Plan(dataset, partial(_ordered, len(dataset), batch_size), batch_size, seed)
    on_disk = not isinstance(dataset.array, np.ndarray)
    workers = int(on_disk and METHOD == "fork" and len(steps) >= WORTH_A_PROCESS)
    return _batches(plan, steps, workers, ahead=4)


def _shuffled(n: int, batch_size: int, part: slice, seed: int, step: int) -> np.ndarray:
    return batch_indices(n, batch_size, seed=seed, step=step)[part]


def _ordered(n: int, batch_size: int, step: int) -> np.ndarray:
    return np.arange(step * batch_size, min((step + 1) * batch_size, n))


@dataclass(frozen=True)
class _Plan:
    """How the batch of a step is taken.

    Args:
        dataset: The examples.
        rows: The indices of the examples of a step.
        size: The largest number of them.
        seed: Seed of perturbation and of dynamic binarization.
        first: The position of the first of them in the batch.
    """

    dataset: Dataset
    rows: Callable[[int], np.ndarray]
    size: int
    seed: int
    first: int = 0

    def take(self, rows: np.ndarray, step: int) -> np.ndarray:
        return self.dataset.take(rows, seed=self.seed, step=step, first=self.first)

    def view(self, memory: Any, n: int) -> np.ndarray:
        """The first n examples of a batch in shared memory."""
        shape = (n, *self.dataset.shape)
        return np.frombuffer(memory, self.dataset.array.dtype, math.prod(shape)).reshape(shape)


def _batches(plan: _Plan, steps: range, count: int, ahead: int) -> Generator[Batch, None, None]:
    workers: list[_Worker] = []
    try:
        for i in range(min(count, len(steps))):
            workers.append(_Worker(plan, steps[i::count], ahead, workers))
        for i, step in enumerate(steps):
            rows = plan.rows(step)
            if workers:
                yield workers[i % count].batch(len(rows)), rows
            else:
                yield plan.take(rows, step), rows
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A process that takes every n-th batch into memory that it shares with this process.

    Each worker has its own pipe. If the worker dies, the pipe closes and the waiting process
    notices. If this process dies, the pipe closes too, and the worker ends. There is no shared
    lock that a dead process could hold.
    """

    def __init__(self, plan: _Plan, steps: range, ahead: int, others: list[_Worker]):
        if METHOD == "spawn" and isinstance(plan.dataset.array, np.memmap):
            raise DataError(
                f"workers: on {sys.platform} each would get a copy of {plan.dataset.name or 'the'}"
                " memory-mapped array: leave them out"
            )
        context: Any = multiprocessing.get_context(METHOD)
        entries = plan.size * math.prod(plan.dataset.shape)
        n_bytes = entries * plan.dataset.array.dtype.itemsize
        self.memory = [context.RawArray("B", max(1, n_bytes)) for _ in range(ahead)]
        self.plan, self.taken, self.owner = plan, 0, os.getpid()
        self.pipe, theirs = context.Pipe()
        ours = [*(other.pipe for other in others), self.pipe] if METHOD == "fork" else []
        self.process = context.Process(
            target=_work, args=(plan, steps, self.memory, theirs, ours), daemon=True
        )
        with warnings.catch_warnings(), _signals_blocked():
            warnings.simplefilter("ignore", DeprecationWarning)  # forks of processes with threads
            self.process.start()
        theirs.close()
        atexit.register(self.close)

    def batch(self, n: int) -> np.ndarray:
        """The next batch, of n examples."""
        slot = self.memory[self.taken % len(self.memory)]
        try:
            problem = self.pipe.recv()
            if problem is None:
                batch = self.plan.view(slot, n).copy()
                self.taken += 1
                self.pipe.send(None)
                return batch
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise DataError(
                f"workers: a process that takes batches of {self.plan.dataset.name or 'the data'} "
                f"died ({_cause(self.process.exitcode)}): give fewer workers, or smaller batches"
            ) from error
        message, details = problem
        raise DataError(message) from RuntimeError(details)

    def close(self) -> None:
        """End the process at once; it writes nothing."""
        if self.owner == os.getpid():
            atexit.unregister(self.close)
            self.pipe.close()
            self.process.kill()
            self.process.join(5)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Delay signals to this process, and to one that it starts meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _work(
    plan: _Plan, steps: range, memory: list[Any], pipe: Connection, others: list[Connection]
) -> None:
    """Run a worker. It ignores the signals that its parent handles for the process group."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    for other in others:  # inherited copies would keep these pipes open
        other.close()
    try:
        for i, step in enumerate(steps):
            if i >= len(memory):
                pipe.recv()  # until a slot is free
            try:
                rows = plan.rows(step)
                plan.view(memory[i % len(memory)], len(rows))[:] = plan.take(rows, step)
            except Exception as error:
                message = str(error) if isinstance(error, DataError) else f"step {step}: {error!r}"
                pipe.send((message, traceback.format_exc()))
                break
            pipe.send(None)
        while True:
            pipe.recv()  # until the parent has taken every batch
    except (EOFError, OSError):
        pass  # the parent closed the stream
