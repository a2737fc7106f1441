"""A result as Markdown: what was measured, against whom, by how much, and how sure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["BEGIN", "END", "line", "markdown", "placed"]

BEGIN, END = "<!-- measured by musigma bench -->", "<!-- end of the measured part -->"
"""Lines between which a page has its tables, if it has other text."""

Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """All tables of a result that `benchmarks.speed.run` yielded, perhaps before its end."""
    works: Mapping[str, Any] = result["works"]
    parts = [*_conditions(works), *_against_peers(works), *_exact(works), *_modes(works)]
    for name, work in works.items():
        parts += _work(name, work)
    parts += _skipped(works)
    return "\n".join(parts) + "\n"


def placed(page: str, tables: str) -> str:
    """A page with these tables between `BEGIN` and `END`; an empty page is all tables.

    Raises:
        ValueError: If the page has text, and no such place.

    Example:
        >>> page = "Above." + placed("", "first") + "Below."
        >>> placed(page, "second") == "Above." + placed("", "second") + "Below."
        True
    """
    measured = f"{BEGIN}\n\n{tables.strip()}\n\n{END}\n"
    if not page.strip():
        return measured
    above, begin, rest = page.partition(BEGIN)
    _, end, below = rest.partition(END + "\n")
    if not (begin and end):
        raise ValueError(
            f"out: the page has text, and no lines {BEGIN} and {END} to put tables between; "
            "add them, or name another file"
        )
    return above + measured + below


def line(name: str, what: str, found: Result) -> str:
    """One measurement in a line: ours against the best peer.

    Example:
        >>> ratio = {"median": 1.5, "low": 1.4, "high": 1.6, "best": 1.55}
        >>> times = {"musigma": {"best_ms": 2.0}, "zuko": {"best_ms": 3.1}}
        >>> found = {"times": times, "best_peer": "zuko", "faster": {"musigma": ratio}}
        >>> line("maf-8", "step", found)
        'maf-8 step: musigma 2.00 ms, zuko 3.10 ms; 1.50x (1.40 to 1.60)'
    """
    times = found["times"]
    shown = [n for n in times if n in found.get("faster", {}) or n == found.get("best_peer")]
    text = ", ".join(f"{n} {_ms(times[n]['best_ms'])} ms" for n in shown or times)
    faster = "".join(f"; {_spread(r)}" for r in found.get("faster", {}).values())
    return f"{name} {what}: {text}{faster}"


# --- the parts ---------------------------------------------------------------------------------


def _conditions(works: Mapping[str, Any]) -> Iterator[str]:
    """Where and how; said once for all works that share it."""
    groups: dict[str, list[str]] = {}
    for name, work in works.items():
        machine, settings, plan = work["machine"], work["settings"], work["plan"]
        said = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
            + (f"{machine['gpu']}, " if "gpu" in machine else "")
            + f"Python {machine['python']}, torch {machine['torch']} ({machine['capability']}), "
            f"{machine['when']}; for all alike: {settings['threads']} of torch's threads, "
            f"freed heap {'kept' if settings['heap_kept'] else 'as it comes'}, matmul precision "
            f"{settings['matmul_precision']}, OMP_WAIT_POLICY {settings['OMP_WAIT_POLICY']}; "
            f"{plan['seconds']:g} s for each contender in {plan['rounds']} rounds"
            + (", in CPU time" if plan["clock"] == "cpu" else "")
        )
        groups.setdefault(said, []).append(name)
    for said, names in groups.items():
        yield f"Measured on {said}" + (f" ({', '.join(names)})" if len(groups) > 1 else "") + "."
    versions: dict[str, str] = {}
    for work in works.values():
        for contender in work["contenders"].values():
            versions |= contender.get("versions", {})
    if versions:
        yield ""
        yield "Versions: " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())) + "."
    yield ""


def _against_peers(works: Mapping[str, Any]) -> Iterator[str]:
    """One row for each thing that is timed."""
    rows = []
    for name, work in works.items():
        for what, found in work["whats"].items():
            if "best_peer" not in found:
                continue
            times, peer = found["times"], found["best_peer"]
            own, best = _own(work, "ours"), _own(work, "best")
            shares = found.get("peak_shares", {})
            faster = found["faster"]
            rows.append(
                [
                    name,
                    what,
                    _ms(times[own]["best_ms"]) if own in times else "",
                    _ms(times[best]["best_ms"]) if best in times else "",
                    f"{peer} {_ms(times[peer]['best_ms'])}",
                    _spread(faster[own]) if own in faster else "",
                    _spread(faster[best]) if best in faster else "",
                    " / ".join(f"{100 * shares[n]:.0f}" for n in (own, best, peer) if n in shares),
                ]
            )
    if rows:
        yield "## Against the best torch peer"
        yield ""
        yield from _table(
            "work | what | musigma, ms | best mode, ms | best torch peer, ms | fp32: times faster "
            "| best mode: times faster | % of peak: ours / best / peer",
            rows,
        )


def _exact(works: Mapping[str, Any]) -> Iterator[str]:
    """What is counted, ours against everyone's least."""
    rows = []
    for name, work in works.items():
        own = _own(work, "ours")
        for what, found in work["whats"].items():
            times = found["times"]
            peers = [n for n in times if work["contenders"][n]["kind"] == "peer"]
            if own not in times or "flops" not in times[own]:
                continue
            cells = [name, what]
            for key, scale in (("flops", 1e9), ("kernels", 1), ("saved_bytes", 2**20)):
                cells.append(_pair(times[own].get(key), [times[p].get(key) for p in peers], scale))
            growth = [work["contenders"][p].get("growth_bytes") for p in peers]
            ours = work["contenders"][own].get("growth_bytes")
            cells.append(_pair(ours, growth, 2**20) if what == "step" else "")
            rows.append(cells)
    if rows:
        yield "## Counted"
        yield ""
        yield (
            "Ours / the least of the torch peers. FLOPs, kernels and kept bytes are exact; growth "
            "is that of a fresh process over the bare model, at the peak of three steps."
        )
        yield ""
        yield from _table(
            "work | what | GFLOP | kernels | kept for backward, MiB | growth, MiB", rows
        )


def _modes(works: Mapping[str, Any]) -> Iterator[str]:
    """Variants of ours, over ours."""
    rows = []
    for name, work in works.items():
        for found in work["whats"].values():
            for contender, row in found["times"].items():
                about = work["contenders"][contender]
                if about["kind"] != "variant" or "ratio" not in row:
                    continue
                own = found["times"][_own(work, "ours")]
                rows.append(
                    [
                        name,
                        contender,
                        _spread(row["ratio"]),
                        f"{_mb(row.get('saved_bytes'))} / {_mb(own.get('saved_bytes'))}",
                        f"{_mb(about.get('growth_bytes'))} / "
                        f"{_mb(work['contenders'][_own(work, 'ours')].get('growth_bytes'))}",
                    ]
                )
    if rows:
        yield "## Memory modes, over `store`"
        yield ""
        yield from _table(
            "work | mode | time of a step | kept for backward, MiB | growth, MiB", rows
        )


def _work(name: str, work: Result) -> Iterator[str]:
    """Everyone."""
    if not work["whats"]:
        return
    yield f"### {name}"
    yield ""
    yield f"{work['about']}."
    yield ""
    rows = []
    for what, found in work["whats"].items():
        for contender, row in found["times"].items():
            about = work["contenders"][contender]
            rows.append(
                [
                    what,
                    contender,
                    _ms(row["best_ms"]),
                    _ms(row["median_ms"]),
                    _spread(row["ratio"]) if "ratio" in row else "",
                    f"{about['parameters']:,}",
                    f"{row['flops'] / 1e9:.3g}" if "flops" in row else "",
                    f"{row['kernels']:,}" if "kernels" in row else "",
                    _mb(row.get("saved_bytes")),
                    _mb(about.get("growth_bytes")) if what == "step" else "",
                    about["note"],
                ]
            )
    yield from _table(
        "what | who | best decile, ms | median, ms | time over musigma | parameters | GFLOP "
        "| kernels | kept, MiB | growth, MiB | note",
        rows,
    )
    peaks = [
        ", ".join(f"{n.removeprefix('peak ')} {v:.0f}" for n, v in found["peak_gflops"].items())
        for found in work["whats"].values()
        if found.get("peak_gflops")
    ]
    said = [f"The machine's own peak meanwhile, GFLOP/s: {'; '.join(peaks)}."] if peaks else []
    if "load" in work["machine"]:
        said.append(f"Load average when it began: {work['machine']['load']:.1f}.")
    yield from [" ".join(said), ""]


def _skipped(works: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, work in works.items():
        for contender, why in work["skipped"].items():
            reasons.setdefault((contender, why), []).append(name)
    if reasons:
        yield "Left out:"
        yield ""
        for (contender, why), names in reasons.items():
            yield f"- {contender} ({', '.join(names)}): {why}"


# --- cells -------------------------------------------------------------------------------------


def _own(work: Result, kind: str) -> str:
    return next((n for n, c in work["contenders"].items() if c["kind"] == kind), "")


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _pair(own: float | None, others: Sequence[float | None], scale: float) -> str:
    known = [v for v in others if v is not None]
    if own is None:
        return ""
    pattern = "{:,.0f}" if scale == 1 else "{:,.3g}"
    cells = [pattern.format(own / scale)]
    return " / ".join([*cells, pattern.format(min(known) / scale)] if known else cells)


def _table(head: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
