"""Contenders, workloads, and timing in turns.

The speed of a shared machine drifts by more than the differences to be measured. Contenders
therefore take turns: each round runs every contender for a slice of time, in random order, which
the next round reverses (whoever runs later in a round is a few percent slower), and results are
ratios of times within the same round.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "CLOCKS",
    "Contender",
    "Ratio",
    "Subject",
    "Timing",
    "Unavailable",
    "Workload",
    "best_decile",
    "interleave",
    "peer_module",
    "quartiles",
    "ratio",
    "time_slice",
]

Kind = Literal["ours", "fast", "baseline", "fast baseline", "variant", "peer", "other"]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Elapsed time, and CPU time of this process summed over its threads."""
Slice = Callable[[float], list[float]]
"""Runs one contender for the given seconds; returns the seconds of each call."""


class Unavailable(Exception):
    """A contender cannot run here; the message gives the reason."""


def peer_module(name: str) -> Any:
    """Import a module of a peer.

    Raises:
        Unavailable: If the import fails.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error


@dataclass
class Subject:
    """The result of a contender's `setup`.

    Attributes:
        calls: The operations to time, by name. `step` and `epoch` train; all others run without
            gradients.
        model: Switched to training or evaluation mode before each slice; None if the contender
            has no torch module.
        loss: The forward pass alone, whose saved tensors are counted; None: not counted.
        initialize: Data-dependent initialization, called once before the first operation.
        parameters: Number of trainable parameters.
        countable: Whether FLOPs and kernels can be counted; False for compiled models.
        note: Difference from the other contenders, in a few words.
    """

    calls: Mapping[str, Callable[[], object]]
    model: nn.Module | None = None
    loss: Callable[[], Tensor] | None = None
    initialize: Callable[[], object] | None = None
    parameters: int = 0
    countable: bool = True
    note: str = ""

    @contextmanager
    def mode(self, operation: str) -> Iterator[None]:
        """Training mode for `step` and `epoch`; evaluation mode without gradients otherwise."""
        trains = operation in ("step", "epoch")
        if self.model is not None:
            self.model.train(trains)
        with torch.set_grad_enabled(trains):
            yield


@dataclass(frozen=True)
class Contender:
    """One implementation of a workload.

    Args:
        name: Shown in tables. All contenders are compared with "musigma".
        setup: Builds the model and everything else that is not timed.
        kind: `ours` (float32), `fast` (ours with `--fast`), `baseline` or `fast baseline` (the
            same at another commit), `variant` (ours with another option), `peer` (another torch
            library) or `other` (another framework).
        needs: Distributions that must be installed; their versions are recorded.
        environment: Environment variables of a separate process for this contender; None: it
            runs in this process.
        package: Folder that `musigma` is imported from, for a baseline.
    """

    name: str
    setup: Callable[[], Subject]
    kind: Kind = "peer"
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    package: str | None = None


@dataclass(frozen=True)
class Workload:
    """A model, a batch and a loss, the same for all contenders.

    Args:
        name: On the command line.
        about: Description for the report.
        batch: Examples in a step or a call.
        operations: The operations to time, in order.
        contenders: Implementations, ours first.
        epoch: Examples in an epoch.
        parameters: Number of parameters that every contender must have; None: contenders differ,
            as the table shows.
        conv: Whether convolutions dominate, so that the share of the machine's peak is reported.
    """

    name: str
    about: str
    batch: int
    operations: tuple[str, ...]
    contenders: tuple[Contender, ...]
    epoch: int = 0
    parameters: int | None = None
    conv: bool = False


def best_decile(seconds: Sequence[float]) -> float:
    """The tenth percentile of times, steadier than the mean on a shared machine.

    Example:
        >>> best_decile([5.0, 1.0, 2.0])
        1.0
    """
    return sorted(seconds)[len(seconds) // 10]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0])
        (1.5, 2.0, 2.5)
        >>> quartiles([7.0])
        (7.0, 7.0, 7.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass
class Timing:
    """Seconds of every call of one contender, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The times of all rounds."""
        return [s for r in self.rounds for s in r]

    def row(self, batch: int) -> dict[str, Any]:
        """Summary for the report; times in milliseconds."""
        seconds = self.seconds
        best = best_decile(seconds)
        return {
            "n": len(seconds),
            "best_ms": 1e3 * best,
            "median_ms": 1e3 * statistics.median(seconds),
            "rounds_ms": [1e3 * best_decile(r) for r in self.rounds],
            "examples_per_second": batch / best,
        }


class Ratio(NamedTuple):
    """The time of one contender over that of another.

    Attributes:
        median: Median over the rounds of the ratio of best deciles within a round.
        low: Lower quartile of these ratios.
        high: Upper quartile of these ratios.
        best: Ratio of the best deciles over all rounds.
    """

    median: float
    low: float
    high: float
    best: float


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """The time of `slow` over the time of `fast`, measured in the same rounds.

    Example:
        >>> ratio(Timing([[2.0], [6.0]]), Timing([[1.0], [2.0]]))
        Ratio(median=2.5, low=2.25, high=2.75, best=2.0)
    """
    ratios = [
        best_decile(a) / best_decile(b) for a, b in zip(slow.rounds, fast.rounds, strict=False)
    ]
    low, median, high = quartiles(ratios)
    return Ratio(median, low, high, best_decile(slow.seconds) / best_decile(fast.seconds))


def time_slice(
    call: Callable[[], object], seconds: float, clock: Clock = time.perf_counter
) -> list[float]:
    """Call repeatedly for the given seconds, at least once; returns the seconds of each call."""
    times: list[float] = []
    start = now = clock()
    while not times or now - start < seconds:
        before = clock()
        call()
        now = clock()
        times.append(now - before)
    return times


class Turn(NamedTuple):
    """The contender about to run, and the round."""

    name: str
    round: int
    rounds: int


def interleave(
    slices: Mapping[str, Slice],
    *,
    rounds: int,
    seconds: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    before_turn: Callable[[Turn], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> Iterator[dict[str, Timing]]:
    """Run all contenders in turns; yields the timings so far after each round.

    A call may take longer than its slice. After two rounds, no further round begins once three
    times the planned time has passed. A contender that fails is left out of later rounds.

    Args:
        slices: By contender name.
        rounds: Maximum number of rounds.
        seconds: Time for each contender, over all rounds.
        seed: Random seed of the order within rounds.
        clock: In seconds.
        before_turn: Called before each slice; its time does not count.
        on_failure: Called with the contender and its error.
    """
    order, shuffle = list(slices), random.Random(seed).shuffle
    timings: dict[str, Timing] = {name: Timing() for name in order}
    start, planned = clock(), seconds * len(order)
    for index in range(rounds):
        order.reverse() if index % 2 else shuffle(order)
        for name in list(order):
            began = clock()
            try:
                if before_turn:
                    before_turn(Turn(name, index, rounds))
                start += clock() - began
                timings[name].rounds.append(slices[name](seconds / rounds))
            except Exception as error:  # one contender's failure does not stop the others
                order.remove(name)
                del timings[name]
                if on_failure:
                    on_failure(name, error)
        yield timings
        if index and clock() - start > 3 * planned:
            return
