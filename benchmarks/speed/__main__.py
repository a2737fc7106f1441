"""Time training, sampling and scoring against peers or another commit, in turns.

Peers that are not installed are left out and listed. Two Glows exist only as clones:
MUSIGMA_PEERS names a folder that holds them as OWNER+NAME. Ctrl-C ends the run and keeps what is
known so far.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m benchmarks.speed", description=__doc__)
    p.add_argument(
        "workloads",
        nargs="*",
        metavar="WORKLOAD",
        help="names, or prefixes of names: mlp-vae, conv-vae, glow, nsf, maf (default: all)",
    )
    p.add_argument(
        "--operations", type=_words, help="step, epoch, sample, log_prob (default: all)"
    )
    p.add_argument("--peers", type=_words, help="names, prefixes of names, or none (default: all)")
    p.add_argument(
        "--against",
        metavar="COMMIT",
        help="compare with musigma at this commit; peers take part only if --peers names them",
    )
    p.add_argument("--fast", action="store_true", help="include bfloat16 and compiled training")
    p.add_argument("--quick", action="store_true", help="a few workloads, two minutes in all")
    p.add_argument("--seconds", type=float, help="for each contender and operation (default: 6)")
    p.add_argument("--rounds", type=int, help="turns of each contender (default: 6)")
    p.add_argument(
        "--processes",
        type=int,
        help="processes, one after the other, of each contender that does not run in this one "
        "(default: 1; with --against, one for every two rounds)",
    )
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="elapsed time or CPU time; beside other work, use cpu with --threads 1",
    )
    p.add_argument("--no-keep-heap", action="store_true", help="return freed memory to the system")
    p.add_argument("--no-memory", action="store_true", help="skip the growth of fresh processes")
    p.add_argument("--device", default="cpu", help="device of all computations (default: cpu)")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.add_argument(
        "--out",
        type=Path,
        help="a .json file, or a .md page with its .json beside it; other workloads in it, and "
        "the page's own text, are kept",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="skip workloads that OUT has; run each of the others in a process of its own",
    )
    return p


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a usage error exits with code 2 before anything is measured."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle contenders must not spin
    command = parser()
    options = command.parse_args(arguments)
    try:
        measure_each(options) if options.resume else measure(options)
    except (ValueError, OSError) as error:
        command.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the workloads, print the result, and write it to `out`."""
    from benchmarks.speed import run as library
    from benchmarks.speed.tables import line, markdown
    from benchmarks.speed.workloads import QUICK, WORKLOADS, select

    chosen = select(options.workloads or (QUICK if options.quick else ()))
    peers = () if options.peers == ("none",) else options.peers
    if options.against and peers is None:
        peers = ()
    _check_words(
        "operations", options.operations, {o for w in WORKLOADS.values() for o in w.operations}
    )
    contenders = [c for w in WORKLOADS.values() for c in w.contenders]
    _check_words(
        "peers", peers, {c.name for c in contenders if c.kind in ("peer", "other")}, prefix=True
    )
    quick_operations = ("step", "log_prob", "sample") if options.quick else None
    rounds = options.rounds or (3 if options.quick else 6)
    plan = library.Plan(
        seconds=options.seconds or (0.8 if options.quick else 6.0),
        rounds=rounds,
        processes=options.processes or ((rounds + 1) // 2 if options.against else 1),
        threads=options.threads,
        operations=options.operations or quick_operations,
        peers=peers,
        fast=options.fast,
        memory=not (options.no_memory or options.quick),
        keep_heap=not options.no_keep_heap,
        clock=options.clock,
        device=options.device,
    )
    before = read_results(options.out)
    result: dict[str, Any] = {"workloads": {}}
    reported: set[tuple[str, str]] = set()

    def report(finished: bool) -> None:
        records = result["workloads"].items()
        known = [(name, o) for name, record in records for o in record["operations"]]
        for name, operation in known if finished else known[:-1]:
            if (name, operation) not in reported:
                reported.add((name, operation))
                summary = result["workloads"][name]["operations"][operation]
                _print(line(name, operation, summary))

    interrupted = False
    with ExitStack() as stack:
        if options.against:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            commit = extract(options.against, Path(folder))
            package = str(Path(folder) / "src")
            chosen = [library.against(workload, commit, package) for workload in chosen]
        try:
            for partial in library.run(chosen, plan, _status(options)):
                if not result["workloads"]:
                    _warn_about_load(partial)
                result = partial
                report(finished=False)
        except KeyboardInterrupt:
            interrupted = True
            _print("interrupted; these are the results so far")
    report(finished=True)
    result |= {"interrupted": interrupted}
    if options.out is not None:
        write_results(options.out, before, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(markdown(result) if options.out is None else options.out)
    if interrupted:
        raise KeyboardInterrupt
    return result


def measure_each(options: argparse.Namespace) -> None:
    """Measure each workload that `out` lacks in a process of its own, and write it at once."""
    from benchmarks.speed.workloads import select

    if options.out is None:
        raise ValueError("--resume: expected --out, the file that holds earlier results")
    finished = {name for name, r in read_results(options.out).items() if "seconds" in r}
    names = [w.name for w in select(options.workloads)]
    words = [w for w in sys.argv[1:] if w not in (*options.workloads, "--resume")]
    for name in names:
        if name not in finished:
            _print(time.strftime("%H:%M"), name)
            command = [sys.executable, "-m", "benchmarks.speed", name, *words]
            subprocess.run(command, check=True, cwd=ROOT)


def extract(commit: str, folder: Path) -> str:
    """Write `src` of a commit into a folder; returns the abbreviated commit."""
    git = ["git", "-C", str(ROOT)]
    try:
        short = subprocess.run(
            [*git, "rev-parse", "--short", "--verify", f"{commit}^{{commit}}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except subprocess.CalledProcessError:
        message = f"--against: expected a commit of this repository; got {commit!r}"
        raise ValueError(message) from None
    archive = subprocess.run([*git, "archive", short, "src"], check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return short


def read_results(out: Path | None) -> dict[str, Any]:
    """Workloads of an earlier run; refuses a file that could not be written afterwards."""
    from benchmarks.speed.tables import place

    if out is None:
        return {}
    if out.suffix not in (".json", ".md"):
        raise ValueError(f"out: expected a .json or .md file; got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {out.parent}")
    store = out.with_suffix(".json")
    if out.suffix == ".md" and out.exists():
        place(out.read_text(encoding="utf-8"), "")
    if not store.exists():
        return {}
    try:
        return dict(json.loads(store.read_text(encoding="utf-8"))["workloads"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {store} holds no results of this benchmark ({error})") from error


def write_results(out: Path, before: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the new results and those of earlier runs, in the order of the workloads."""
    from benchmarks.speed.tables import markdown, place
    from benchmarks.speed.workloads import WORKLOADS
    from musigma.files import replacing, write_json

    new = {name: r for name, r in result["workloads"].items() if r["operations"]}
    merged = {**before, **new}
    ordered = {"workloads": {name: merged[name] for name in WORKLOADS if name in merged}}
    write_json(out.with_suffix(".json"), ordered)
    if out.suffix == ".md":
        page = out.read_text(encoding="utf-8") if out.exists() else ""
        with replacing(out) as draft:
            draft.write_text(place(page, markdown(ordered)), encoding="utf-8")


def _check_words(
    name: str, words: Iterable[str] | None, known: set[str], *, prefix: bool = False
) -> None:
    for word in words or ():
        if not any(k.startswith(word) if prefix else k == word for k in known):
            raise ValueError(f"{name}: expected some of {', '.join(sorted(known))}; got {word!r}")


def _warn_about_load(result: dict[str, Any]) -> None:
    """Warn while there is time to stop that other work makes the figures unreliable."""
    first = next(iter(result["workloads"].values()))
    load = first["machine"].get("load", 0.0)
    if load > 0.5:
        hint = "; --clock cpu --threads 1 is more reliable"
        wall = first["plan"]["clock"] == "wall"
        _print(f"other work runs on this machine (load average {load:.1f}){hint if wall else ''}")


def _status(options: argparse.Namespace):
    """A status line that overwrites itself, on a terminal."""
    if options.json or not sys.stderr.isatty():
        return None
    width = os.get_terminal_size(sys.stderr.fileno()).columns - 1

    def show(text: str) -> None:
        print(text[:width].ljust(width), end="\r", file=sys.stderr, flush=True)

    return show


def _print(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
