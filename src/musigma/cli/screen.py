"""What a command prints: progress and notes on standard error, its answer on standard output."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from musigma.cli.options import Common

if TYPE_CHECKING:
    from musigma.processes import Processes


def rank_and_count() -> tuple[int, int]:
    """The number of this process and the number of processes, as the launcher set them.

    Raises:
        ValueError: If the environment variables contradict each other.
    """
    words = [os.environ.get(*entry) for entry in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    rank, count = (int(word) if word.isdecimal() else -1 for word in words)
    if not 0 <= rank < count:
        raise ValueError(
            f"RANK, WORLD_SIZE: expected a number from 0 and a larger one; got {words[0]!r} and "
            f"{words[1]!r}; let a launcher set both, or unset them"
        )
    return rank, count


def launched_processes() -> Processes:
    """This process among those of its launcher."""
    from musigma.processes import Processes

    return Processes(*rank_and_count())


class Screen:
    """Where a command prints: for people, or for a program with --json.

    Of several processes only the main one prints.
    """

    def __init__(self, common: Common):
        from rich.console import Console

        self.common, self.main = common, rank_and_count()[0] == 0
        quiet = common.json or not self.main
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line for people."""
        self.console.print(text, markup=False)

    def result(self, value: dict[str, Any], text: str = "") -> None:
        """Print the command's answer: as JSON if asked for, otherwise as text."""
        from musigma.files import finite

        if self.main:
            print(json.dumps(finite(value), indent=2) if self.common.json else text)

    @contextmanager
    def progress(self, title: str):
        """A progress bar, as a function of (done, total), or None where there is no terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn())
        if self.console.quiet or not self.console.is_terminal:
            yield None
            return
        with Progress(
            *columns,
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, note="": bar.update(
                task, completed=done, total=total, description=f"{title} {note}".strip()
            )


def figure_text(figure: dict[str, Any]) -> str:
    """A figure with its standard error, its bound and its number of examples, on one line."""
    bound = {"exact": "exact"}.get(figure["bound"], f"upper bound, {figure['bound']}")
    error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
    bits, nats = (math.nan if figure[n] is None else figure[n] for n in ("bits_per_dim", "nats"))
    return (
        f"{bits:.4f}{error} bits/dim, {nats:.2f} nats per example ({bound}; n = {figure['n']:,})"
    )
