"""Output of commands: progress and notes on standard error, the answer on standard output."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from musigma.cli.options import Common

if TYPE_CHECKING:
    from rich.progress import Progress

    from musigma.processes import Processes


def rank_and_count() -> tuple[int, int]:
    """The number of this process and the number of processes, as the launcher set them.

    Raises:
        ValueError: If the environment variables contradict each other.
    """
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
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
    """The output of a command: text, or JSON with --json.

    Of several processes only the main one prints.
    """

    def __init__(self, common: Common):
        from rich.console import Console

        self.common, self.main = common, rank_and_count()[0] == 0
        quiet = common.json or not self.main
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.noted: set[str] = set()

    def note(self, text: str) -> None:
        """Print a line for people, once."""
        if text not in self.noted:
            self.noted.add(text)
            self.console.print(text, markup=False)

    def result(self, value: dict[str, Any], text: str = "") -> None:
        """Print the command's answer: as JSON if asked for, otherwise as text."""
        from musigma.files import finite

        if self.main:
            print(json.dumps(finite(value), indent=2) if self.common.json else text)

    def bar(self, *columns: Any) -> Progress:
        """A line that vanishes in the end; nothing where there is no terminal."""
        from rich.progress import Progress

        hidden = self.console.quiet or not self.console.is_terminal
        return Progress(*columns, console=self.console, transient=True, disable=hidden)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[..., None]]:
        """A progress bar, as a function of (done, total)."""
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn())
        with self.bar(*columns, MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, note="": bar.update(
                task, completed=done, total=total, description=f"{title} {note}".strip()
            )

    @contextmanager
    def dashboard(self, nats_first: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Shows the rows of metrics that `fit` reports: a function of a row."""
        from rich.progress import BarColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(20), "{task.percentage:>3.0f}%")
        bits, speed = math.nan, 0.0

        def show(row: Mapping[str, Any]) -> None:
            nonlocal bits, speed
            if row["kind"] == "train":
                old, weight = (0.0, 1.0) if math.isnan(bits) else (bits, 0.05)
                bits = old + weight * (row["bits_per_dim"] - old)
                speed += weight * (row["examples_per_second"] - speed)
                text = f"{bits:.3f} bits/dim  latents {sum(row['kl']):.1f} nats  "
                text += f"{speed:,.0f} examples/s"
                bar.update(task, completed=row["share"], description=text)
            elif row["kind"] == "skipped":
                self.note(f"step {row['step']:,} skipped: {row['reason']}")
            else:
                figure = row["kind"] == "evaluation"
                text = figure_text(dict(row), nats_first) if figure else row["message"]
                self.note(f"step {row['step']:,}: {text}")

        with self.bar(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task("starting", total=1.0)
            yield show


def figure_text(figure: Mapping[str, Any], nats_first: bool = False) -> str:
    """A figure with its standard error, its bound and its number of examples, on one line."""
    bound = figure["bound"] if figure["bound"] == "exact" else f"upper bound, {figure['bound']}"
    bits, nats = (math.nan if figure[n] is None else figure[n] for n in ("bits_per_dim", "nats"))
    error = figure["standard_error_nats" if nats_first else "standard_error"]
    error = "" if error is None else f" ± {error:.4f}"
    if nats_first:
        text = f"{nats:.4f}{error} nats per example, {bits:.4f} bits/dim"
    else:
        text = f"{bits:.4f}{error} bits/dim, {nats:.2f} nats per example"
    if figure.get("spread") is not None:
        error = figure["standard_error_spread"]
        error = "" if error is None else f" ± {error:.4f}"
        text += f", differing by {figure['spread']:.4f}{error} nats within the mixture"
    for name, value in figure.get("figures", {}).items():
        text += "" if value is None else f", {name} {value:.4g}"
    return f"{text} ({bound}; n = {figure['n']:,})"


def count(n: int, what: str) -> str:
    """A number of things: 1 sample, 2 samples."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
