"""The state of training: a bar on a terminal, and a line for each evaluation elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from musigma.cli.screen import Screen, figure_text


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
