"""Contenders in turns: who takes part, what was timed, and which ratios follow from it.

A shared machine drifts by more than what is to be measured, so no two times are compared that were
not taken in the same minute: in every round each contender runs for a slice of time, in an order
that is drawn anew, and what is reported is the ratio within each round.
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
    "Work",
    "best_decile",
    "imported",
    "interleave",
    "quartiles",
    "ratio",
    "slice_of",
]

Kind = Literal["ours", "best", "variant", "peer", "other"]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time that passed, or that this process was computing for."""
Slice = Callable[[float], list[float]]
"""Runs one contender for so many seconds, and returns the seconds of each call."""


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


def imported(name: str) -> Any:
    """A peer's module, of which nothing else is known here.

    Raises:
        Unavailable: If it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error


@dataclass
class Subject:
    """What a contender's `setup` returns.

    Attributes:
        calls: What is timed, by name: `step` and `epoch` train, all others run without gradients.
        model: Put into training or evaluation mode before each slice; None if it is no torch
            module.
        loss: The forward pass alone, whose saved tensors are counted; None: not counted.
        warm: What must happen once before the first call (data-dependent initialisation).
        parameters: How many numbers are trained.
        countable: Whether FLOPs and kernels can be counted: not of what is compiled.
        note: How this differs from the others of its work, in a few words.
    """

    calls: Mapping[str, Callable[[], object]]
    model: nn.Module | None = None
    loss: Callable[[], Tensor] | None = None
    warm: Callable[[], object] | None = None
    parameters: int = 0
    countable: bool = True
    note: str = ""

    @contextmanager
    def ready(self, what: str) -> Iterator[None]:
        """In training mode for `step` and `epoch`; in evaluation mode, and without gradients."""
        trains = what in ("step", "epoch")
        if self.model is not None:
            self.model.train(trains)
        with torch.set_grad_enabled(trains):
            yield


@dataclass(frozen=True)
class Contender:
    """One of those that do the same work.

    Args:
        name: Shown in tables; "musigma" is what all others are compared with.
        setup: Builds the model and everything else that is not timed.
        kind: `ours` (fp32), `best` (ours, in its fastest mode), `variant` (ours, otherwise),
            `peer` (on torch) or `other` (on another framework).
        needs: Distributions that must be installed; their versions are recorded.
        apart: Environment variables of a process of its own, for another back end, or so that a
            compiler's faults end nothing else; None: it shares this one.
    """

    name: str
    setup: Callable[[], Subject]
    kind: Kind = "peer"
    needs: tuple[str, ...] = ()
    apart: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Work:
    """A model, a batch and a loss that all contenders share.

    Args:
        name: On the command line.
        about: What it is, for people.
        batch: Examples in a step or a call.
        whats: What is timed, in order.
        contenders: Ours first.
        epoch: Examples in an epoch.
        parameters: What every contender must have; None: they differ, and the table says how.
        conv: Convolutions dominate, so the share of the machine's peak means something.
    """

    name: str
    about: str
    batch: int
    whats: tuple[str, ...]
    contenders: tuple[Contender, ...]
    epoch: int = 0
    parameters: int | None = None
    conv: bool = False


def best_decile(seconds: Sequence[float]) -> float:
    """The time that a tenth of the calls stayed below: steadier than the mean on a shared machine.

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
        """All of them."""
        return [s for r in self.rounds for s in r]

    def row(self, batch: int) -> dict[str, Any]:
        """For the report; times in milliseconds."""
        every = self.seconds
        best = best_decile(every)
        return {
            "n": len(every),
            "best_ms": 1e3 * best,
            "median_ms": 1e3 * statistics.median(every),
            "rounds_ms": [1e3 * best_decile(r) for r in self.rounds],
            "examples_per_second": batch / best,
        }


class Ratio(NamedTuple):
    """How many times longer one contender takes than another.

    Attributes:
        median: Of the ratios of best deciles within each round.
        low: Their lower quartile.
        high: Their upper quartile.
        best: Of the best deciles of all rounds together.
    """

    median: float
    low: float
    high: float
    best: float


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """The time of `slow` over that of `fast`, which took turns.

    Example:
        >>> ratio(Timing([[2.0], [6.0]]), Timing([[1.0], [2.0]]))
        Ratio(median=2.5, low=2.25, high=2.75, best=2.0)
    """
    each = [
        best_decile(a) / best_decile(b) for a, b in zip(slow.rounds, fast.rounds, strict=False)
    ]
    low, median, high = quartiles(each)
    return Ratio(median, low, high, best_decile(slow.seconds) / best_decile(fast.seconds))


def slice_of(
    call: Callable[[], object], seconds: float, clock: Clock = time.perf_counter
) -> list[float]:
    """Call until so many seconds have passed, once at least; returns the seconds of each call."""
    times: list[float] = []
    start = now = clock()
    while not times or now - start < seconds:
        before = clock()
        call()
        now = clock()
        times.append(now - before)
    return times


class Turn(NamedTuple):
    """Whose turn it is, in which round of how many."""

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
    on_turn: Callable[[Turn], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> Iterator[dict[str, Timing]]:
    """Rounds in which everyone has one slice; yields what is known after each of them.

    Calls may take longer than a slice. Once three times the planned time is spent, and two rounds
    are done, no further one begins. A contender that fails is left out from then on.

    Args:
        slices: By the contenders' names.
        rounds: How many at most.
        seconds: For each contender, over all rounds.
        seed: Of the order within the rounds.
        clock: In seconds.
        on_turn: Told before each slice.
        on_failure: Told what went wrong with whom.
    """
    order, shuffle = list(slices), random.Random(seed).shuffle
    timings: dict[str, Timing] = {name: Timing() for name in order}
    began, planned = clock(), seconds * len(order)
    for turn in range(rounds):
        shuffle(order)
        for name in list(order):
            if on_turn:
                on_turn(Turn(name, turn, rounds))
            try:
                timings[name].rounds.append(slices[name](seconds / rounds))
            except Exception as error:  # whatever a contender throws, the others go on
                order.remove(name)
                del timings[name]
                if on_failure:
                    on_failure(name, error)
        yield timings
        if turn and clock() - began > 3 * planned:
            return
