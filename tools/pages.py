"""Run the code of pages, and keep what it prints: `python -m tools.pages docs/how-to/*.md`.

The blocks `python`, and the commands of musigma in the blocks `sh`, are one program, which runs in
an empty folder. A block `text` holds what the block before it printed, or the message of a command
that failed; if its last line is `...`, the first lines of it. Without `--check`, these blocks are
rewritten.
"""

import argparse
import contextlib
import io
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from musigma.cli import main as musigma

BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def outputs(page: Path, markdown: str) -> Iterator[tuple[re.Match[str], str]]:
    """Run a page; for each block of text, the block and what was printed before it."""
    names: dict[str, object] = {"__name__": "docs"}
    printed = ""
    torch.manual_seed(0)
    for block in BLOCK.finditer(markdown):
        if block[1] == "text":
            yield block, begun(block[2], printed)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if block[1] == "python":
                exec(compile(block[2], str(page), "exec"), names)
            else:
                for command in block[2].splitlines():
                    run(shlex.split(command)[1:])
        text = out.getvalue().replace(f"{Path.cwd()}/", "").strip("\n")
        printed = "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def run(words: list[str]) -> None:
    """Run a command, and print the message if it fails."""
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        try:
            musigma(words)
        except SystemExit as end:
            if end.code:
                print(messages.getvalue())


def begun(block: str, printed: str) -> str:
    """What was printed, cut as the block is."""
    lines = block.splitlines()
    if lines[-1:] != ["..."]:
        return printed
    return "\n".join([*printed.splitlines()[: len(lines) - 1], "...\n"])


def agree(kept: str, printed: str, tolerance: float = 0.1) -> bool:
    """Whether two texts have the same words, and numbers that differ by a tenth at most.

    What training reaches depends on the processor; a number that rounds to few digits may differ
    by one in the last.

    >>> agree("KL 1.02 nats", "KL 1.05 nats"), agree("KL 1.0", "KL 1.5"), agree("a 1", "b 1")
    (True, False, False)
    """
    if NUMBER.sub("#", kept).split() != NUMBER.sub("#", printed).split():
        return False
    for a, b in zip(NUMBER.findall(kept), NUMBER.findall(printed), strict=True):
        last = 0.0 if "e" in a else 1.01 * 10.0 ** -len(a.partition(".")[2])
        x, y = float(a.replace(",", "")), float(b.replace(",", ""))
        if not math.isclose(x, y, rel_tol=tolerance, abs_tol=last):
            return False
    return True


def differences(page: Path) -> list[str]:
    """What a page says that its code does not print, run in the present folder."""
    text = page.read_text(encoding="utf-8")
    return [
        f"{page.name}: the page has\n{block[2]}\nbut its code prints\n{printed}"
        for block, printed in outputs(page, text)
        if not agree(block[2], printed)
    ]


def rewrite(page: Path) -> None:
    """Put what the code prints into the blocks of text."""
    text = page.read_text(encoding="utf-8")
    parts, end = [], 0
    for block, printed in outputs(page, text):
        parts += [text[end : block.start(2)], printed]
        end = block.end(2)
    page.write_text("".join([*parts, text[end:]]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="Only report differences.")
    options = parser.parse_args()
    found: list[str] = []
    for page in [page.resolve() for page in options.pages]:  # before the folder changes
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            found += differences(page) if options.check else rewrite(page) or []
            os.chdir(page.parent)
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
