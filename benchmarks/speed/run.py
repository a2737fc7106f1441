"""The benchmark: set up, warm up, count, time in turns, and record the result."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, Literal

import torch

from benchmarks.speed.harness import (
    CLOCKS,
    Contender,
    Slice,
    Timing,
    Turn,
    Unavailable,
    Workload,
    best_decile,
    interleave,
    ratio,
    time_slice,
)
from benchmarks.speed.machine import describe, peak_kernels, settings
from benchmarks.speed.runners import Conditions, InProcess, Subprocess

__all__ = ["Plan", "against", "run"]

Status = Callable[[str], None]
Runner = InProcess | Subprocess
PEAK = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and for how long.

    Args:
        seconds: Time for each contender and operation, over all rounds.
        rounds: Number of turns of each contender.
        processes: Number of processes, one after the other, in which each contender runs that
            does not run in this one. The layout of a process in memory alone can change its
            speed by several percent; one process cannot tell such differences from others.
        threads: Number of torch threads; None: torch's default.
        operations: Operations to time; None: all of a workload.
        peers: Names of peers, or prefixes of names; None: all that are installed.
        fast: Whether `--fast` training takes part.
        memory: Whether the growth of fresh processes is measured.
        counts: Whether FLOPs, kernels and saved bytes are counted.
        keep_heap: Whether processes keep freed memory.
        clock: `wall`, or `cpu`: CPU time summed over all threads. Beside other work, the latter
            with one thread is more reliable.
        device: Device of all computations.

    Raises:
        ValueError: If a number is not positive.
    """

    seconds: float = 6.0
    rounds: int = 6
    processes: int = 1
    threads: int | None = None
    operations: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    fast: bool = False
    memory: bool = True
    counts: bool = True
    keep_heap: bool = True
    clock: Literal["wall", "cpu"] = "wall"
    device: str = "cpu"

    def __post_init__(self):
        for name in ("seconds", "rounds", "processes", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number; got {value}")

    def includes(self, contender: Contender) -> bool:
        """Whether a contender takes part."""
        if contender.kind in ("peer", "other"):
            return self.peers is None or contender.name.startswith(self.peers)
        return self.fast or not contender.kind.startswith("fast")


def against(workload: Workload, commit: str, package: str) -> Workload:
    """The workload with another commit of musigma as a contender, both in separate processes.

    Args:
        workload: Of this tree.
        commit: Shown after "musigma@".
        package: Folder from which the other commit's `musigma` is imported.
    """
    contenders: list[Contender] = []
    for contender in workload.contenders:
        if contender.kind in ("ours", "fast"):
            name = f"{contender.name}@{commit}"
            separate = replace(contender, environment=contender.environment or {})
            kind = "baseline" if contender.kind == "ours" else "fast baseline"
            baseline = replace(separate, name=name, kind=kind, package=package)
            contenders += [separate, baseline]
        else:
            contenders.append(contender)
    return replace(workload, contenders=tuple(contenders))


def run(
    workloads: Sequence[Workload], plan: Plan, status: Status | None = None
) -> Iterator[dict[str, Any]]:
    """Measure workloads one after the other; yields the whole result so far after every round.

    Args:
        workloads: From `benchmarks.speed.workloads`.
        plan: What is measured.
        status: Called with a short description of what is going on.
    """
    result: dict[str, Any] = {"workloads": {}}
    with settings(threads=plan.threads, keep_heap=plan.keep_heap) as applied:
        conditions = {
            "machine": describe(plan.device),
            "settings": applied,
            "plan": asdict(plan),
        }
        for workload in workloads:
            record = {**conditions, "about": workload.about, "batch": workload.batch}
            result["workloads"][workload.name] = record
            for _ in _measure(workload, plan, record, status or (lambda _: None)):
                yield result
        yield result


def _measure(
    workload: Workload, plan: Plan, record: dict[str, Any], status: Status
) -> Iterator[None]:
    """Fill in the record of one workload, operation by operation."""
    start = time.monotonic()
    record |= {"contenders": {}, "skipped": {}, "operations": {}}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of peers
        runners: dict[str, Runner] = {}
        for contender in filter(plan.includes, workload.contenders):
            name = contender.name
            status(f"{workload.name}: {name}")
            try:
                about = {"kind": contender.kind, "versions": _versions(contender)}
                runner = _start(workload, contender, plan)
                stack.callback(runner.close)
                about |= runner.about()
                _check_parameters(workload, about["parameters"])
                compiles = contender.kind.startswith("fast")  # the compiler's memory would count
                if plan.memory and "step" in about["calls"] and not compiles:
                    status(f"{workload.name}: memory of {name}")
                    about["growth_bytes"] = _growth(workload, contender, plan)
                record["contenders"][name], runners[name] = about, runner
            except Exception as error:  # one contender's failure does not stop the others
                _skip(record, name, error)
        for operation in plan.operations or workload.operations:
            if operation in workload.operations:
                yield from _time(workload, operation, runners, plan, record, status)
        record["seconds"] = round(time.monotonic() - start, 1)


def _time(
    workload: Workload,
    operation: str,
    runners: dict[str, Runner],
    plan: Plan,
    record: dict[str, Any],
    status: Status,
) -> Iterator[None]:
    """Warm up, count, and time in turns."""
    slices: dict[str, Slice] = {}
    counted: dict[str, dict[str, int]] = {}
    warming = 1 if operation == "epoch" else 3  # calls
    for name, runner in list(runners.items()):
        about = record["contenders"][name]
        if operation not in about["calls"]:
            continue
        status(f"{workload.name} {operation}: warming up {name}")
        try:
            runner.warm(operation, warming)
            if plan.counts and operation != "epoch" and about["countable"]:
                counted[name] = runner.counts(operation)
        except Exception as error:
            _skip(record, name, error)
            del runners[name]
            continue
        slices[name] = lambda seconds, runner=runner: runner.time(operation, seconds)
    if not slices:
        return
    peaks = _peaks() if workload.conv and plan.device == "cpu" else {}
    for name, (call, _) in peaks.items():
        slices[name] = lambda seconds, call=call: time_slice(
            call, min(0.3, seconds), CLOCKS[plan.clock]
        )

    def before_turn(turn: Turn) -> None:
        place = f"round {turn.round + 1} of {turn.rounds}"
        status(f"{workload.name} {operation}: {place}, {turn.name}")
        runner = runners.get(turn.name)
        due = turn.round * plan.processes % turn.rounds < plan.processes
        if turn.round and due and isinstance(runner, Subprocess):
            runner.restart()
            runner.warm(operation, warming)

    def on_failure(name: str, error: Exception) -> None:
        _skip(record, name, error)
        runners.pop(name, None)

    for timings in interleave(
        slices,
        rounds=plan.rounds,
        seconds=plan.seconds,
        before_turn=before_turn,
        on_failure=on_failure,
    ):
        record["operations"][operation] = _summary(
            workload, operation, timings, counted, peaks, record
        )
        yield
        gc.collect()  # between rounds, so that no contender's slice pays for it


def _summary(
    workload: Workload,
    operation: str,
    timings: dict[str, Timing],
    counted: dict[str, dict[str, int]],
    peaks: dict[str, tuple[Callable[[], object], int]],
    record: dict[str, Any],
) -> dict[str, Any]:
    """Times, counts, ratios to ours, to a baseline and to the best peer, and shares of peak."""
    rows: dict[str, Any] = {}
    examples = workload.epoch if operation == "epoch" else workload.batch
    for name, timing in timings.items():
        if name not in peaks:
            rows[name] = timing.row(examples) | counted.get(name, {})
    summary: dict[str, Any] = {"times": rows}
    kinds = {name: record["contenders"][name]["kind"] for name in rows}
    ours = next((name for name, kind in kinds.items() if kind == "ours"), None)
    if ours is not None:
        for name in rows:
            rows[name]["ratio"] = ratio(timings[name], timings[ours])._asdict()
    peers = [name for name, kind in kinds.items() if kind == "peer"]
    if peers:
        best = min(peers, key=lambda name: rows[name]["best_ms"])
        summary["best_peer"] = best
        summary["faster"] = {
            name: ratio(timings[best], timings[name])._asdict()
            for name, kind in kinds.items()
            if kind in ("ours", "fast")
        }
    baselines = {n.partition("@")[0]: n for n, kind in kinds.items() if kind.endswith("baseline")}
    if pairs := {now: then for now, then in baselines.items() if now in rows}:
        summary["against"] = {
            now: {"name": then, **ratio(timings[now], timings[then])._asdict()}
            for now, then in pairs.items()
        }
    if peaks:
        summary["peak_gflops"] = {
            name: 1e-9 * flops / best_decile(timings[name].seconds)
            for name, (_, flops) in peaks.items()
            if name in timings
        }
        summary["peak_shares"] = _shares(rows, kinds, ours, summary["peak_gflops"])
    return summary


def _shares(
    rows: dict[str, Any], kinds: dict[str, str], ours: str | None, peak: dict[str, float]
) -> dict[str, float]:
    """FLOP/s over the machine's peak in that type; compiled models do the FLOPs of ours."""
    shares = {}
    for name, row in rows.items():
        fast = kinds[name] == "fast"
        flops = rows.get(ours, {}).get("flops") if fast and ours else row.get("flops")
        limit = peak.get("peak bf16" if fast else "peak fp32")
        if flops and limit:
            shares[name] = 1e-9 * flops / (1e-3 * row["best_ms"]) / limit
    return shares


def _start(workload: Workload, contender: Contender, plan: Plan) -> Runner:
    for distribution in contender.needs:
        _version(distribution)
    if contender.environment is None:
        return InProcess(contender, plan.device, plan.clock)
    return Subprocess(workload.name, contender, _conditions(plan))


def _conditions(plan: Plan) -> Conditions:
    return Conditions(
        threads=torch.get_num_threads(),
        keep_heap=plan.keep_heap,
        device=plan.device,
        clock=plan.clock,
    )


def _growth(workload: Workload, contender: Contender, plan: Plan) -> int | None:
    """Memory growth of a fresh process with the default heap (a retained heap hides it)."""
    runner = Subprocess(workload.name, contender, replace(_conditions(plan), keep_heap=False))
    try:
        return runner.growth("step")
    finally:
        runner.close()


def _versions(contender: Contender) -> dict[str, str]:
    return {name: _version(name) for name in contender.needs}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Unavailable(f"{distribution} is not installed") from None


def _skip(record: dict[str, Any], name: str, error: Exception) -> None:
    reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
    record["skipped"][name] = reason
    record["contenders"].pop(name, None)


def _check_parameters(workload: Workload, parameters: int) -> None:
    if workload.parameters is not None and parameters != workload.parameters:
        raise ValueError(
            f"the model has {parameters:,} parameters; expected {workload.parameters:,}"
        )


def _peaks() -> dict[str, tuple[Callable[[], object], int]]:
    """For each type, the kernel that comes nearest to the machine's peak."""
    peaks = {}
    for name, dtype in PEAK.items():
        speeds = {}
        for call, flops in peak_kernels(dtype).values():
            call()
            speeds[flops / best_decile(time_slice(call, 0.1))] = (call, flops)
        peaks[f"peak {name}"] = speeds[max(speeds)]
    return peaks
