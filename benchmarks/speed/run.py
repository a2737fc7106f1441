"""The benchmark: set up, warm up, count, take turns, and write down what came of it."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from benchmarks.speed.children import Apart, Here
from benchmarks.speed.harness import (
    CLOCKS,
    Contender,
    Slice,
    Timing,
    Turn,
    Unavailable,
    Work,
    best_decile,
    interleave,
    ratio,
    slice_of,
)
from benchmarks.speed.machine import describe, peak_kernels, settings

__all__ = ["Plan", "run"]

Say = Callable[[str], None]
Runner = Here | Apart
PEAK = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Args:
        seconds: For each contender and each thing that is timed, over all rounds.
        rounds: How often everyone has a turn.
        threads: Of torch; None: as it comes.
        whats: Things to time; None: all that a work has.
        peers: Names, or beginnings of names, of peers; None: all that are installed.
        best: Whether our fastest mode takes part.
        memory: Whether the growth of fresh processes is measured.
        counts: Whether FLOPs, kernels and saved bytes are counted.
        keep_heap: Whether freed memory is kept, for all alike.
        clock: `wall`, or `cpu`: what the process was computing for, over all its threads. Where
            other work cannot be stopped, the latter, with one thread, is the surer.
        device: Where everything is computed.

    Raises:
        ValueError: For what cannot be measured.
    """

    seconds: float = 6.0
    rounds: int = 6
    threads: int | None = None
    whats: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    best: bool = False
    memory: bool = True
    counts: bool = True
    keep_heap: bool = True
    clock: Literal["wall", "cpu"] = "wall"
    device: str = "cpu"

    def __post_init__(self):
        for name in ("seconds", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number; got {value}")

    def takes(self, contender: Contender) -> bool:
        """Whether a contender is asked for."""
        if contender.kind in ("peer", "other"):
            return self.peers is None or contender.name.startswith(self.peers)
        return contender.kind != "best" or self.best


def run(works: Sequence[Work], plan: Plan, say: Say | None = None) -> Iterator[dict[str, Any]]:
    """Measure works one after the other; yields the whole result after every round.

    So whoever stops between two of them, or has an interrupt to catch, has all that is known.

    Args:
        works: From `benchmarks.speed.works`.
        plan: How much.
        say: Told in a few words what is going on.
    """
    result: dict[str, Any] = {"works": {}}
    with settings(threads=plan.threads, keep_heap=plan.keep_heap) as chosen:
        where = {"machine": describe(plan.device), "settings": chosen, "plan": asdict(plan)}
        for work in works:
            found: dict[str, Any] = {**where, "about": work.about, "batch": work.batch}
            result["works"][work.name] = found
            for _ in _measure(work, plan, found, say or (lambda _: None)):
                yield result
        yield result


def _measure(work: Work, plan: Plan, found: dict[str, Any], say: Say) -> Iterator[None]:
    """Fill in what is found of one work, bit by bit."""
    began = time.monotonic()
    found |= {"contenders": {}, "skipped": {}, "whats": {}}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers warn of is theirs
        runners: dict[str, Runner] = {}
        for contender in work.contenders:
            if not plan.takes(contender):
                continue
            say(f"{work.name}: {contender.name}")
            try:
                found["contenders"][contender.name] = {
                    "kind": contender.kind,
                    "versions": _versions(contender),
                }
                runner = _start(work, contender, plan)
                stack.callback(runner.close)
                about = runner.about()
                _same(work, about["parameters"])
                found["contenders"][contender.name] |= about
                runners[contender.name] = runner
                compiles = contender.kind == "best"  # and its compiler's memory would be counted
                if plan.memory and "step" in about["calls"] and not compiles:
                    say(f"{work.name}: memory of {contender.name}")
                    found["contenders"][contender.name]["growth_bytes"] = _growth(
                        work, contender, plan
                    )
            except Exception as error:  # whatever a contender throws, the others go on
                _skip(found, contender.name, error)
        for what in plan.whats or work.whats:
            if what in work.whats:
                yield from _time(work, what, runners, plan, found, say)
        found["seconds"] = round(time.monotonic() - began, 1)


def _time(
    work: Work,
    what: str,
    runners: dict[str, Runner],
    plan: Plan,
    found: dict[str, Any],
    say: Say,
) -> Iterator[None]:
    """Warm everyone up, count, and take turns."""
    slices: dict[str, Slice] = {}
    counted: dict[str, dict[str, int]] = {}
    for name, runner in list(runners.items()):
        about = found["contenders"][name]
        if what not in about["calls"]:
            continue
        say(f"{work.name} {what}: warming up {name}")
        try:
            runner.warm(what, 1 if what == "epoch" else 3)
            if plan.counts and what != "epoch" and about["countable"]:
                counted[name] = runner.counts(what)
        except Exception as error:
            _skip(found, name, error)
            del runners[name]
            continue
        slices[name] = lambda seconds, runner=runner: runner.time(what, seconds)
    if not slices:
        return
    peaks = _peaks() if work.conv and plan.device == "cpu" else {}
    for name, (call, _) in peaks.items():
        slices[name] = lambda seconds, call=call: slice_of(
            call, min(0.3, seconds), CLOCKS[plan.clock]
        )

    def on_turn(turn: Turn) -> None:
        say(f"{work.name} {what}: round {turn.round + 1} of {turn.rounds}, {turn.name}")

    def failed(name: str, error: Exception) -> None:
        _skip(found, name, error)
        runners.pop(name, None)

    for timings in interleave(
        slices,
        rounds=plan.rounds,
        seconds=plan.seconds,
        on_turn=on_turn,
        on_failure=failed,
    ):
        found["whats"][what] = _account(work, what, timings, counted, peaks, found)
        yield
        gc.collect()  # between the rounds, not in someone's turn


def _account(
    work: Work,
    what: str,
    timings: dict[str, Timing],
    counted: dict[str, dict[str, int]],
    peaks: dict[str, tuple[Callable[[], object], int]],
    found: dict[str, Any],
) -> dict[str, Any]:
    """Times, counts, ratios to ours and to the best peer, and shares of the peak."""
    rows: dict[str, Any] = {}
    examples = work.epoch if what == "epoch" else work.batch
    for name, timing in timings.items():
        if name not in peaks:
            rows[name] = timing.row(examples) | counted.get(name, {})
    account: dict[str, Any] = {"times": rows}
    kinds = {name: found["contenders"][name]["kind"] for name in rows}
    own = next((name for name, kind in kinds.items() if kind == "ours"), None)
    if own is not None:
        for name in rows:
            rows[name]["ratio"] = ratio(timings[name], timings[own])._asdict()
    rivals = [name for name, kind in kinds.items() if kind == "peer"]
    if rivals:
        best = min(rivals, key=lambda name: rows[name]["best_ms"])
        account["best_peer"] = best
        account["faster"] = {
            name: ratio(timings[best], timings[name])._asdict()
            for name, kind in kinds.items()
            if kind in ("ours", "best")
        }
    if peaks:
        account["peak_gflops"] = {
            name: 1e-9 * flops / best_decile(timings[name].seconds)
            for name, (_, flops) in peaks.items()
            if name in timings
        }
        account["peak_shares"] = _shares(rows, kinds, own, account["peak_gflops"])
    return account


def _shares(
    rows: dict[str, Any], kinds: dict[str, str], own: str | None, peak: dict[str, float]
) -> dict[str, float]:
    """FLOPs in a second, over what the machine can do in that type; ours in bf16 as in fp32."""
    shares = {}
    for name, row in rows.items():
        narrow = kinds[name] == "best"
        flops = rows.get(own, {}).get("flops") if narrow and own else row.get("flops")
        limit = peak.get("peak bf16" if narrow else "peak fp32")
        if flops and limit:
            shares[name] = 1e-9 * flops / (1e-3 * row["best_ms"]) / limit
    return shares


def _start(work: Work, contender: Contender, plan: Plan) -> Runner:
    for need in contender.needs:
        _version(need)
    if contender.apart is None:
        return Here(contender, plan.device, plan.clock)
    return Apart(work.name, contender, **_options(plan))


def _options(plan: Plan) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "keep_heap": plan.keep_heap,
        "device": plan.device,
        "clock": plan.clock,
    }


def _growth(work: Work, contender: Contender, plan: Plan) -> int | None:
    """Of a fresh process; heap that is kept would change nothing, so it is as it comes."""
    apart = Apart(work.name, contender, **_options(plan) | {"keep_heap": False})
    try:
        return apart.growth("step")
    finally:
        apart.close()


def _versions(contender: Contender) -> dict[str, str]:
    return {need: _version(need) for need in contender.needs}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Unavailable(f"{distribution} is not installed") from None


def _skip(found: dict[str, Any], name: str, error: Exception) -> None:
    why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
    found["skipped"][name] = why
    found["contenders"].pop(name, None)


def _same(work: Work, parameters: int) -> None:
    if work.parameters is not None and parameters != work.parameters:
        raise ValueError(
            f"its model has {parameters:,} parameters, and this work has {work.parameters:,}"
        )


def _peaks() -> dict[str, tuple[Callable[[], object], int]]:
    """For each type the kernel that comes nearest to the machine's peak."""
    found = {}
    for name, dtype in PEAK.items():
        speeds = {}
        for call, flops in peak_kernels(dtype).values():
            call()
            speeds[flops / best_decile(slice_of(call, 0.1))] = (call, flops)
        found[f"peak {name}"] = speeds[max(speeds)]
    return found
