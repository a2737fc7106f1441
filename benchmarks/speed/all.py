"""The tables of docs/speed.md, work by work, on an idle machine: about an hour.

    python benchmarks/speed.py            # what the page does not have yet
    python benchmarks/speed.py --again glow nsf     # these anew

Every work has a process of its own, so that no compiled code and no heap of one meets another. It
goes on where it stopped. MUSIGMA_PEERS names a folder with clones of chaiyujin/glow-pytorch and
rosinality/glow-pytorch, called OWNER+NAME; all other peers are taken from where Python finds them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed import select

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"


def measured() -> set[str]:
    """The works that the page has, to their end."""
    store = PAGE.with_suffix(".json")
    works = json.loads(store.read_text())["works"] if store.exists() else {}
    return {name for name, work in works.items() if "seconds" in work}


def main(names: list[str], again: bool, options: list[str]) -> None:
    """One command line for each work."""
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}  # threads that wait do not spin
    for work in select(names):
        if work.name in measured() and not again:
            continue
        command = [sys.executable, "-m", "musigma", "bench", work.name, "--best"]
        command += ["--out", str(PAGE), *options]
        print(time.strftime("%H:%M"), *command[2:], flush=True)
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", default="6")
    parser.add_argument("--rounds", default="6")
    chosen = parser.parse_args()
    main(chosen.works, chosen.again, ["--seconds", chosen.seconds, "--rounds", chosen.rounds])
