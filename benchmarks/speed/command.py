"""``musigma bench``: how fast this is here, against the peers that are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from musigma.cli.devices import best_device
from musigma.cli.options import Common, CommonOptions
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen

commands = App()


@commands.command
def bench(
    *works: str,
    peers: str | None = None,
    what: str | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    best: Annotated[bool, Parameter(negative="")] = False,
    quick: Annotated[bool, Parameter(negative="")] = False,
    keep_heap: bool = True,
    clock: Literal["wall", "cpu"] = "wall",
    memory: bool = True,
    out: Path | None = None,
    common: CommonOptions = Common(),
) -> None:
    """Compare training, sampling and scoring with peers, in turns, as ratios with their spread.

    Peers that are not installed are left out, and named. Two Glows are known from clones alone:
    MUSIGMA_PEERS names a folder that holds them as OWNER+NAME. Ctrl-C ends it with what is known.

    Args:
        works: Names, or beginnings of names: mlp-vae, conv-vae, glow, nsf, maf; by default all.
        peers: Names, or beginnings of names, with commas; `none`; by default all.
        what: What is timed, with commas: step, epoch, sample, log_prob; by default all.
        seconds: For each contender and each thing that is timed; by default 6.
        rounds: In how many turns; by default 6.
        threads: Of torch.
        best: Our fastest mode takes part: bf16, compiled. Compiling takes a minute.
        quick: A few works, a second each: two minutes in all.
        keep_heap: Keep freed memory, for all alike.
        clock: What passed, or what the process was computing for (over all its threads): with
            `--threads 1` the latter is surer where other work runs.
        memory: Measure by how much a fresh process of each contender grows.
        out: A .json file, or a .md page with the .json of its figures beside it. Works that are
            in it and are not measured anew are kept, and so is a page's other text.
        common: Shared options.
    """
    from benchmarks.speed import QUICK, WORKS, Plan, markdown, run, select
    from benchmarks.speed.tables import line

    screen = Screen(common)
    chosen = select(works or (QUICK if quick else ()))
    for name, asked, known in (
        ("what", _words(what), {one for work in WORKS.values() for one in work.whats}),
        ("peers", _words(peers) if peers != "none" else (), _peers(WORKS.values())),
    ):
        for one in asked or ():
            if not any(word.startswith(one) if name == "peers" else word == one for word in known):
                raise ValueError(f"{name}: known are {', '.join(sorted(known))}; got {one!r}")
    plan = Plan(
        seconds=(0.8 if quick else 6.0) if seconds is None else seconds,
        rounds=(3 if quick else 6) if rounds is None else rounds,
        threads=threads,
        whats=_words(what) or (("step", "log_prob", "sample") if quick else None),
        peers=() if peers == "none" else _words(peers),
        best=best,
        memory=memory and not quick,
        keep_heap=keep_heap,
        clock=clock,
        device=common.device or best_device(),
    )
    before = _kept(out)
    result: dict[str, Any] = {"works": {}}
    told: set[tuple[str, str]] = set()

    def tell(finished: bool) -> None:
        known = [(n, w) for n, found in result["works"].items() for w in found["whats"]]
        for name, one in known if finished else known[:-1]:
            if (name, one) not in told:
                told.add((name, one))
                screen.note(line(name, one, result["works"][name]["whats"][one]))

    stopped = False
    try:
        for known in run(chosen, plan, _status(screen)):
            if not told and not result["works"]:
                _warn(screen, known)
            result = known
            tell(False)
    except KeyboardInterrupt:
        stopped = True
        screen.note("stopped; this is what is known")
    tell(True)
    result |= {"stopped": stopped}
    if out is not None:
        _write(out, before, result)
    screen.result(result, markdown(result) if out is None else f"{out}")
    if stopped:
        raise KeyboardInterrupt


def _warn(screen: Screen, result: dict[str, Any]) -> None:
    """Say what makes figures unsure, while there is time to stop."""
    first = next(iter(result["works"].values()))
    load, settings = first["machine"].get("load", 0.0), first["settings"]
    if load > 0.5:
        waits = settings["OMP_WAIT_POLICY"] != "passive"
        hint = "; set OMP_WAIT_POLICY=passive, or threads that wait will spin" if waits else ""
        screen.note(f"other work runs on this machine (load average {load:.1f}){hint}")
        if first["plan"]["clock"] == "wall":
            screen.note("--clock cpu --threads 1 is surer then")


def _peers(works: Any) -> set[str]:
    """The names of all peers of some works, installed or not."""
    return {c.name for w in works for c in w.contenders if c.kind in ("peer", "other")}


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(","))


def _status(screen: Screen):
    """One line on a terminal that is written over: no thread that draws while others are timed."""
    if screen.common.json or not screen.console.is_terminal:
        return None
    width = screen.console.width - 1

    def say(text: str) -> None:
        screen.console.print(text[:width].ljust(width), end="\r", markup=False)

    return say


def _kept(out: Path | None) -> dict[str, Any]:
    """What an earlier run left; refuses, before hours are spent, what could not be written."""
    from benchmarks.speed.tables import placed

    if out is None:
        return {}
    check_out(out, ".json", ".md")
    store = out.with_suffix(".json")
    if out.suffix == ".md" and out.exists():
        placed(out.read_text(encoding="utf-8"), "")
    if not store.exists():
        return {}
    try:
        return json.loads(store.read_text(encoding="utf-8"))["works"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {store} is no result of an earlier run ({error})") from error


def _write(out: Path, before: dict[str, Any], result: dict[str, Any]) -> None:
    from benchmarks.speed import WORKS, markdown
    from benchmarks.speed.tables import placed

    from musigma.files import replacing, write_json

    works = {**before, **{n: work for n, work in result["works"].items() if work["whats"]}}
    every = {"works": {name: works[name] for name in WORKS if name in works}}
    write_json(out.with_suffix(".json"), every)
    if out.suffix == ".md":
        page = out.read_text(encoding="utf-8") if out.exists() else ""
        with replacing(out) as draft:
            draft.write_text(placed(page, markdown(every)), encoding="utf-8")
