"""A result as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["BEGIN", "END", "line", "markdown", "place"]

BEGIN, END = "<!-- measured by benchmarks.speed -->", "<!-- end of the measured part -->"
"""Lines between which a page with other text has its tables."""

Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """All tables of a result of `benchmarks.speed.run`, complete or not."""
    workloads: Mapping[str, Any] = result["workloads"]
    parts = [
        *_conditions(workloads),
        *_against_commit(workloads),
        *_against_peers(workloads),
        *_counts(workloads),
        *_memory_modes(workloads),
    ]
    for name, workload in workloads.items():
        parts += _all_contenders(name, workload)
    parts += _skipped(workloads)
    return "\n".join(parts) + "\n"


def place(page: str, tables: str) -> str:
    """Put tables between `BEGIN` and `END` of a page; an empty page gets both lines.

    Raises:
        ValueError: If the page has text but not both lines.

    Example:
        >>> page = "Above." + place("", "first") + "Below."
        >>> place(page, "second") == "Above." + place("", "second") + "Below."
        True
    """
    measured = f"{BEGIN}\n\n{tables.strip()}\n\n{END}\n"
    if not page.strip():
        return measured
    above, begin, rest = page.partition(BEGIN)
    _, end, below = rest.partition(END + "\n")
    if not (begin and end):
        raise ValueError(
            f"out: the page has text, but no lines {BEGIN} and {END} to put the tables between; "
            "add both lines, or name another file"
        )
    return above + measured + below


def line(name: str, operation: str, summary: Result) -> str:
    """One measurement in a line: ours against the best peer, or against another commit.

    Example:
        >>> ratio = {"median": 1.5, "low": 1.4, "high": 1.6, "best": 1.55}
        >>> times = {"musigma": {"best_ms": 2.0}, "zuko": {"best_ms": 3.1}}
        >>> summary = {"times": times, "best_peer": "zuko", "faster": {"musigma": ratio}}
        >>> line("maf-8", "step", summary)
        'maf-8 step: musigma 2.00 ms, zuko 3.10 ms; 1.50x as fast (1.40 to 1.60)'
    """
    times = summary["times"]
    against = summary.get("against", {})
    shown = [
        n for n in times if n in summary.get("faster", {}) or n == summary.get("best_peer")
    ] or list(times)
    text = ", ".join(f"{n} {_ms(times[n]['best_ms'])} ms" for n in shown)
    for ratio in summary.get("faster", {}).values():
        text += f"; {_spread(ratio, 'x as fast')}"
    for ratio in against.values():
        text += f"; {_spread(ratio)} the time of {ratio['name']}"
    return f"{name} {operation}: {text}"


# --- the parts ---------------------------------------------------------------------------------


def _conditions(workloads: Mapping[str, Any]) -> Iterator[str]:
    """Machine and settings, once for all workloads that share them."""
    groups: dict[str, list[str]] = {}
    for name, workload in workloads.items():
        machine, settings, plan = workload["machine"], workload["settings"], workload["plan"]
        openmp = ", ".join(f"{k} {v}" for k, v in settings.items() if k.isupper() and v != "unset")
        conditions = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
            + (f"{machine['gpu']}, " if "gpu" in machine else "")
            + f"Python {machine['python']}, torch {machine['torch']} ({machine['capability']}), "
            f"{machine['when']}; for all contenders: {settings['threads']} torch threads, "
            f"freed heap {'kept' if settings['heap_kept'] else 'returned'}, matmul precision "
            f"{settings['matmul_precision']}, {openmp or 'OpenMP defaults'}; "
            f"{plan['seconds']:g} s for each contender in {plan['rounds']} rounds"
            + (", in CPU time" if plan["clock"] == "cpu" else "")
        )
        groups.setdefault(conditions, []).append(name)
    for conditions, names in groups.items():
        subset = f" ({', '.join(names)})" if len(groups) > 1 else ""
        yield f"Measured on {conditions}{subset}."
    versions: dict[str, str] = {}
    for workload in workloads.values():
        for contender in workload["contenders"].values():
            versions |= contender.get("versions", {})
    if versions:
        yield ""
        yield "Versions: " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())) + "."
    yield ""


def _against_commit(workloads: Mapping[str, Any]) -> Iterator[str]:
    """This tree against another commit, one row for each operation."""
    rows = []
    for name, workload in workloads.items():
        for operation, summary in workload["operations"].items():
            times = summary["times"]
            for now, ratio in summary.get("against", {}).items():
                then = ratio["name"]
                row = [name, operation, then, _ms(times[now]["best_ms"])]
                row += [_ms(times[then]["best_ms"]), _spread(ratio)]
                for key, scale in (("kernels", 1), ("saved_bytes", 2**20)):
                    row.append(_pair(times[now].get(key), [times[then].get(key)], scale))
                growth = [workload["contenders"][n].get("growth_bytes") for n in (now, then)]
                row.append(_pair(growth[0], growth[1:], 2**20) if operation == "step" else "")
                rows.append(row)
    if rows:
        yield "## Against another commit"
        yield ""
        yield from _table(
            "workload | operation | commit | now, ms | then, ms | time over then | kernels "
            "| kept for backward, MiB | growth, MiB",
            rows,
        )


def _against_peers(workloads: Mapping[str, Any]) -> Iterator[str]:
    """Ours against the best torch peer, one row for each operation."""
    rows = []
    for name, workload in workloads.items():
        for operation, summary in workload["operations"].items():
            if "best_peer" not in summary:
                continue
            times, peer = summary["times"], summary["best_peer"]
            ours, fast = _named(workload, "ours"), _named(workload, "fast")
            shares = summary.get("peak_shares", {})
            faster = summary["faster"]
            rows.append(
                [
                    name,
                    operation,
                    _ms(times[ours]["best_ms"]) if ours in times else "",
                    _ms(times[fast]["best_ms"]) if fast in times else "",
                    f"{peer} {_ms(times[peer]['best_ms'])}",
                    _spread(faster[ours]) if ours in faster else "",
                    _spread(faster[fast]) if fast in faster else "",
                    " / ".join(
                        f"{100 * shares[n]:.0f}" for n in (ours, fast, peer) if n in shares
                    ),
                ]
            )
    if rows:
        yield "## Against the best torch peer"
        yield ""
        yield from _table(
            "workload | operation | musigma, ms | `--fast`, ms | best torch peer, ms "
            "| float32: times as fast | `--fast`: times as fast | % of peak: ours / fast / peer",
            rows,
        )


def _counts(workloads: Mapping[str, Any]) -> Iterator[str]:
    """Exact counts: ours against the least of the peers."""
    rows = []
    for name, workload in workloads.items():
        ours = _named(workload, "ours")
        contenders = workload["contenders"]
        for operation, summary in workload["operations"].items():
            times = summary["times"]
            known = [n for n in times if n in contenders]  # those that failed later are not
            peers = [n for n in known if contenders[n]["kind"] == "peer"]
            if ours not in times or "flops" not in times[ours]:
                continue
            cells = [name, operation]
            for key, scale in (("flops", 1e9), ("kernels", 1), ("saved_bytes", 2**20)):
                others = [times[p].get(key) for p in peers]
                cells.append(_pair(times[ours].get(key), others, scale))
            growth = [contenders[n].get("growth_bytes") for n in (ours, *peers)]
            cells.append(_pair(growth[0], growth[1:], 2**20) if operation == "step" else "")
            rows.append(cells)
    if rows:
        yield "## Counts"
        yield ""
        yield (
            "Ours / the least of the torch peers. FLOPs, kernels and kept bytes are exact. Growth "
            "is the memory of a fresh process above the bare model, at the peak of three steps."
        )
        yield ""
        yield from _table(
            "workload | operation | GFLOP | kernels | kept for backward, MiB | growth, MiB", rows
        )


def _memory_modes(workloads: Mapping[str, Any]) -> Iterator[str]:
    """Variants of ours against the default."""
    rows = []
    for name, workload in workloads.items():
        contenders = workload["contenders"]
        for summary in workload["operations"].values():
            for contender, row in summary["times"].items():
                if contenders[contender]["kind"] != "variant" or "ratio" not in row:
                    continue
                ours = _named(workload, "ours")
                saved = [r.get("saved_bytes") for r in (row, summary["times"][ours])]
                growth = [contenders[n].get("growth_bytes") for n in (contender, ours)]
                cells = [name, contender, _spread(row["ratio"])]
                rows.append([*cells, *(" / ".join(map(_mb, pair)) for pair in (saved, growth))])
    if rows:
        yield "## Memory modes, over `store`"
        yield ""
        yield from _table(
            "workload | mode | time of a step | kept for backward, MiB | growth, MiB", rows
        )


def _all_contenders(name: str, workload: Result) -> Iterator[str]:
    """Every contender of one workload."""
    if not workload["operations"]:
        return
    yield f"### {name}"
    yield ""
    yield f"{workload['about']}."
    yield ""
    rows = []
    for operation, summary in workload["operations"].items():
        for contender, row in summary["times"].items():
            about = workload["contenders"][contender]
            rows.append(
                [
                    operation,
                    contender,
                    _ms(row["best_ms"]),
                    _ms(row["median_ms"]),
                    _spread(row["ratio"]) if "ratio" in row else "",
                    f"{about['parameters']:,}",
                    f"{row['flops'] / 1e9:.3g}" if "flops" in row else "",
                    f"{row['kernels']:,}" if "kernels" in row else "",
                    _mb(row.get("saved_bytes")),
                    _mb(about.get("growth_bytes")) if operation == "step" else "",
                    about["note"],
                ]
            )
    yield from _table(
        "operation | contender | best decile, ms | median, ms | time over musigma | parameters "
        "| GFLOP | kernels | kept, MiB | growth, MiB | note",
        rows,
    )
    peaks = [
        ", ".join(f"{n.removeprefix('peak ')} {v:.0f}" for n, v in summary["peak_gflops"].items())
        for summary in workload["operations"].values()
        if summary.get("peak_gflops")
    ]
    notes = [f"The machine's own peak meanwhile, GFLOP/s: {'; '.join(peaks)}."] if peaks else []
    if "load" in workload["machine"]:
        notes.append(f"Load average at the start: {workload['machine']['load']:.1f}.")
    yield from [" ".join(notes), ""]


def _skipped(workloads: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, workload in workloads.items():
        for contender, reason in workload["skipped"].items():
            reasons.setdefault((contender, reason), []).append(name)
    if reasons:
        yield "Left out:"
        yield ""
        for (contender, reason), names in reasons.items():
            yield f"- {contender} ({', '.join(names)}): {reason}"


# --- cells -------------------------------------------------------------------------------------


def _named(workload: Result, kind: str) -> str:
    """The contender of a kind, or an empty name."""
    return next((n for n, c in workload["contenders"].items() if c["kind"] == kind), "")


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def _spread(ratio: Mapping[str, float], unit: str = "x") -> str:
    return f"{ratio['median']:.2f}{unit} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _pair(ours: float | None, others: Sequence[float | None], scale: float) -> str:
    known = [v for v in others if v is not None]
    if ours is None:
        return ""
    pattern = "{:,.0f}" if scale == 1 else "{:,.3g}"
    cells = [pattern.format(ours / scale)]
    return " / ".join([*cells, pattern.format(min(known) / scale)] if known else cells)


def _table(head: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
