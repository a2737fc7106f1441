"""What a command prints: progress and notes on standard error, its answer on standard output."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
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


def count(n: int, what: str) -> str:
    """A number of things: 1 sample, 2 samples."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


class Dashboard:
    """Shows the rows of metrics that `fit` reports, within a `with` block."""

    def __init__(self, screen: Screen):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.screen, self.bits, self.speed = screen, math.nan, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=screen.console,
            transient=True,
            disable=screen.common.json or not screen.console.is_terminal,
        )

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=1.0)
        return self.show

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        if row["kind"] == "evaluation":
            self.screen.note(f"step {row['step']:,}: {figure_text(dict(row))}")
        elif row["kind"] == "skipped":
            self.screen.note(f"step {row['step']:,} skipped: {row['reason']}")
        elif row["kind"] != "train":
            self.screen.note(f"step {row['step']:,}: {row['message']}")
        else:
            weight = 0.05 if self.bits == self.bits else 1.0
            old = self.bits * (1 - weight) if weight < 1 else 0.0
            self.bits = row["bits_per_dim"] * weight + old
            self.speed += weight * (row["examples_per_second"] - self.speed)
            text = (
                f"{self.bits:.3f} bits/dim  latents {sum(row['kl']):.1f} nats  "
                f"{self.speed:,.0f} examples/s"
            )
            self.bar.update(self.task, completed=row["share"], description=text)
