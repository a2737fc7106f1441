"""``musigma watch``: looking on at runs from another terminal, by what they write."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from musigma.cli.shared import USUAL, CommonOptions, Screen
from musigma.files import number, row_of
from musigma.training import Progress, TrainConfig

commands = App()

PAUSE = 1.0  # seconds between two looks
SILENT = 60.0  # seconds without a row, at least, after which a run is no longer taken to run
FAR = 2**25  # bytes
TROUBLES = {"setback": "setbacks", "alert": "alerts", "notice": "notices", "skipped": "skips"}

Point = tuple[float, float]


@commands.command
def watch(
    runs: list[Path],
    *,
    once: Annotated[bool, Parameter(negative="")] = False,
    common: CommonOptions = USUAL,
) -> None:
    """Look on at runs: how far they are, what they reached, and what went wrong.

    Nothing but their folders is read, so it can be started and ended (Ctrl-C) at any time, on any
    machine that sees them. It ends by itself when all runs are finished. Where the output is no
    terminal, and with --json, it looks once.

    Args:
        runs: Run folders; they need not be there yet.
        once: Look once.
        common: Shared options.
    """
    looks = [Look(run) for run in runs]
    once = once or not sys.stdout.isatty()
    if common.json or once:
        for look in looks:
            while look.more():
                pass
    if common.json:
        Screen(common).result({"runs": [look.summary() for look in looks]})
        return
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # of a terminal that lacks some letters
    console = Console(highlight=False)
    if once or console.is_dumb_terminal:
        for look in looks:
            console.print(Picture(look.summary()))
        return
    height = 8 if len(looks) == 1 else 4
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            behind = [look for look in looks if look.more()]
            seen = [look.summary() for look in looks]
            live.update(Group(*(Picture(one, height) for one in seen)), refresh=True)
            if not behind and all(one["state"] == "finished" for one in seen):
                return
            if not behind:
                time.sleep(PAUSE)


# --- reading -------------------------------------------------------------------------------------


class Tail:
    """A log of JSON rows, of which each look reads what is new.

    The last line that was read is looked for again first: where it is not, the log was rewound or
    replaced, and is read anew. Lines that were cut are passed over; one that has no end yet waits.
    Far from the end, of all steps that were taken one in 16 is looked at.
    """

    def __init__(self, path: Path):
        self.path, self.at, self.last = path, 0, b""

    def read(self, most: int = 2**23) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the log is read anew, and rows: of at most so many bytes, and a line."""
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            anew, self.at, self.last = self.at > 0, 0, b""
            return anew, []
        with file:
            file.seek(self.at - len(self.last))
            anew = file.read(len(self.last)) != self.last
            if anew:
                self.at, self.last = 0, b""
                file.seek(0)
            rows, start = [], self.at
            far = os.fstat(file.fileno()).st_size > start + FAR
            for i, line in enumerate(file):
                if not line.endswith(b"\n") or self.at > start + most:
                    break
                self.at, self.last = self.at + len(line), line
                if far and i % 16 and line.startswith(b'{"kind": "train"'):
                    continue
                if (row := row_of(line)) is not None:
                    rows.append(row)
        return anew, rows


class Curve:
    """A curve of any number of points, kept as few: means of as many as it takes."""

    def __init__(self, most: int = 512):
        self.most, self.width = most, 1
        self.bins: list[tuple[float, float, int]] = []  # last x, sum of y, how many

    def add(self, x: float, y: float) -> None:
        """A point to the right of all others."""
        if self.bins and self.bins[-1][2] < self.width:
            _, total, count = self.bins.pop()
            self.bins.append((x, total + y, count + 1))
            return
        if len(self.bins) == self.most:
            pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
            self.bins = [(b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
            self.width *= 2
        self.bins.append((x, y, 1))

    @property
    def points(self) -> list[Point]:
        """Each bin's last x, and its mean y."""
        return [(x, total / count) for x, total, count in self.bins]


class Course:
    """What the rows of a log say of a run: all of them pass, and few are kept."""

    def __init__(self):
        self.rows = self.step = self.skipped = 0
        self.seconds = self.gap = 0.0
        self.last: Mapping[str, Any] = {}  # step that was taken
        self.best: Mapping[str, Any] | None = None
        self.bits, self.speed = deque(maxlen=20), deque(maxlen=20)
        self.train, self.validation = Curve(), Curve()
        self.troubles = {kind: deque(maxlen=20) for kind in TROUBLES}

    def take(self, row: Mapping[str, Any]) -> None:
        """Take in a row."""
        kind, step, bits = row["kind"], row["step"], number(row.get("bits_per_dim"))
        seconds = number(row.get("seconds")) or self.seconds
        self.gap = seconds - self.seconds if seconds > self.seconds else self.gap
        self.step, self.seconds, self.rows = step, seconds, self.rows + 1
        if kind == "train":
            self.last = row
            if (speed := number(row.get("examples_per_second"))) is not None:
                self.speed.append(speed)
            if bits is not None:
                self.bits.append(bits)
                self.train.add(step, bits)
        elif kind == "evaluation" and bits is not None:
            self.validation.add(step, bits)
            if self.best is None or bits < self.best["bits_per_dim"]:
                self.best = row
        elif kind in TROUBLES:
            self.skipped += kind == "skipped"
            text = str(row.get("reason" if kind == "skipped" else "message", ""))
            self.troubles[kind].append({"step": step, "seconds": seconds, "message": text})


def _mean(values: Collection[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Look:
    """One run that is looked at.

    Args:
        run: Its folder, which need not be there yet.
    """

    def __init__(self, run: Path):
        self.run = run
        self.tail, self.course = Tail(run / "metrics.jsonl"), Course()

    def more(self) -> bool:
        """Read some of what is new; whether there may be more."""
        before = self.tail.at
        anew, rows = self.tail.read()
        if anew:
            self.course = Course()
        for row in rows:
            self.course.take(row)
        return anew or self.tail.at > before

    def summary(self) -> dict[str, Any]:
        """What is known now; JSON-plain.

        Returns:
            `state`: "waiting" for a first row; "running"; "silent", where rows fail to come;
            "stopped", where they do and the state was saved after the last; or "finished".
            `silent`: seconds since something was written. `share` of the budget, `seconds` of
            training, `seconds_left` at this rate. `bits_per_dim` and `examples_per_second`: means
            of the last 20 rows. `best`: the row of the best validation figure. `grad_norm`,
            `learning_rate` and `kl` (nats of each latent, top first) of the last step. `skipped`
            steps, and the last `skips`, `setbacks`, `alerts` and `notices`. `train` and
            `validation`: curves. `evaluation`: the final figure.
        """
        course, config = self.course, _json(self.run / "config.json")
        share = self._share(config)
        written, saved = (_written(self.run / n) for n in ("metrics.jsonl", "state.safetensors"))
        silent = None if written is None else max(0.0, time.time() - written)
        quiet = silent is not None and silent > max(SILENT, 10 * course.gap)
        evaluation = _json(self.run / "evaluation.json")
        if not course.rows:
            state = "waiting"
        elif share == 1 and (evaluation or quiet or not config):
            state = "finished"
        elif quiet:
            state = "stopped" if saved and written and saved >= written else "silent"
        else:
            state = "running"
        return {
            "run": str(self.run),
            "state": state,
            "silent": silent,
            "architecture": _at(config, "model", "architecture"),
            "data": _at(config, "data", "source"),
            "share": share,
            "seconds": course.seconds,
            "seconds_left": self._left(config, share),
            "step": course.step,
            "bits_per_dim": _mean(course.bits),
            "best": course.best,
            "examples_per_second": _mean(course.speed),
            "grad_norm": number(course.last.get("grad_norm")),
            "learning_rate": number(course.last.get("learning_rate")),
            "kl": [number(v) for v in kl] if isinstance(kl := course.last.get("kl"), list) else [],
            "skipped": course.skipped,
            **{name: list(course.troubles[kind]) for kind, name in TROUBLES.items()},
            "train": course.train.points,
            "validation": course.validation.points,
            "evaluation": evaluation or None,
        }

    def _share(self, config: Mapping[str, Any]) -> float | None:
        """Of the budget; the rows know it as it was at the last step that was written down."""
        progress = Progress(step=self.course.step, seconds=self.course.seconds)
        try:
            return TrainConfig(**config["train"]).share(progress, config["data"]["train"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):  # no run of this version's
            return number(self.course.last.get("share"))

    def _left(self, config: Mapping[str, Any], share: float | None) -> float | None:
        if not share:
            return None
        minutes = number(_at(config, "train", "minutes"))
        whole = 60 * minutes if minutes else self.course.seconds / share
        return max(0.0, whole - self.course.seconds)


def _json(path: Path) -> dict[str, Any]:
    """What a file of a run holds; nothing if it is not there, or is being replaced."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


# --- showing -------------------------------------------------------------------------------------


COLORS = {"running": "green", "finished": "bold green", "silent": "red", "stopped": "yellow"}


class Picture:
    """A summary, for rich to show.

    Args:
        seen: As `Look.summary` returns it.
        height: Lines of the curves.
    """

    def __init__(self, seen: Mapping[str, Any], height: int = 8):
        self.seen, self.height = seen, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A frame with everything in it."""
        width, ascii_only = max(20, options.max_width - 4), options.ascii_only
        yield Panel(
            Group(
                self._state(),
                *self._progress(),
                *self._figures(),
                *self._curves(width, ascii_only),
                *self._latents("#" if ascii_only else "\N{FULL BLOCK}"),
                *self._troubles(),
            ),
            title=Text(self.seen["run"]),
            title_align="left",
        )

    def _state(self) -> Text:
        seen = self.seen
        text = Text(seen["state"], style=COLORS.get(seen["state"], "dim"))
        if seen["state"] == "waiting":
            text.append(" for its first step")
        if seen["state"] in ("silent", "stopped"):
            text.append(f" for {_duration(seen['silent'])}")
        if seen["architecture"]:
            text.append(f"   {seen['architecture']} on {Path(str(seen['data'])).name}", "dim")
        return text

    def _progress(self) -> Iterator[Table]:
        share, left = self.seen["share"], self.seen["seconds_left"]
        if share is None or self.seen["state"] == "waiting":
            return
        words = f"{share:.0%}  {_duration(self.seen['seconds'])}"
        if left and self.seen["state"] == "running":
            words += f", {_duration(left)} left"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=1.0, completed=share, width=30), words)
        yield grid

    def _figures(self) -> Iterator[Text]:
        seen, best, final = self.seen, self.seen["best"], self.seen["evaluation"]
        if seen["state"] == "waiting":
            return
        now = seen["bits_per_dim"]
        words = [f"step {seen['step']:,}"]
        words[0] += f"   {now:.4f} bits/dim" if now is not None else ""
        if best:
            words.append(
                f"{_figure(best)} on validation data, at its best at step {best['step']:,}"
            )
        if final and number(final.get("bits_per_dim")) is not None:
            words.append(f"{_figure(final)} on held-out data ({final.get('bound')})")
        yield Text("\n".join(words))
        rates = [
            f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.3g}"
            for name, value in (
                ("examples/s", seen["examples_per_second"]),
                ("gradient", seen["grad_norm"]),
                ("learning rate", seen["learning_rate"]),
                ("skipped steps", seen["skipped"] or None),
            )
            if value is not None
        ]
        yield Text("   ".join(rates), style="dim")

    def _curves(self, width: int, ascii_only: bool) -> Iterator[Text]:
        train, validation = self.seen["train"], self.seen["validation"]
        if not (frame := _frame([*train, *validation])):
            return
        left, right, low, high = frame
        grid = plotted(train, validation, frame, width - 10, self.height, ascii_only)
        for i, line in enumerate(grid):
            value = {0: f"{high:.3f}", len(grid) - 1: f"{low:.3f}"}.get(i, "")
            text = Text(f"{value:>9} ", style="dim")
            for letter, is_mark in line:
                text.append(letter, "bold magenta" if is_mark else "cyan")
            yield text
        start, end = f"{left:,.0f}", f"{right:,.0f}"
        middle = "steps; o is validation".center(width - 10 - len(start) - len(end))
        yield Text(f"{'':>10}{start}{middle}{end}", style="dim")

    def _latents(self, block: str, most: int = 8) -> Iterator[Text]:
        kl = [nats or 0.0 for nats in self.seen["kl"]]
        for i, nats in enumerate(kl[:most]):
            bar = block * math.ceil(20 * max(nats, 0.0) / max(*kl, 1e-9))
            yield Text.assemble(f"{f'z{i}':>9} ", (f"{bar:<20}", "blue"), f" {nats:.2f} nats")
        if len(kl) > most:
            rest = f"{len(kl) - most} more, {sum(kl[most:]):.2f} nats"
            yield Text(f"{'':>10}{rest}", style="dim")

    def _troubles(self, most: int = 8) -> Iterator[Text]:
        found = []
        for kind, name in TROUBLES.items():
            last = self.seen[name][-2 if kind == "skipped" else -most :]
            found += [(trouble["step"], kind, trouble) for trouble in last]
        for step, kind, trouble in sorted(found, key=lambda one: one[0])[-most:]:
            style = "dim" if kind == "notice" else "yellow" if kind == "alert" else "red"
            when = f"step {step:,}, {_duration(trouble['seconds'])}"
            yield Text.assemble((kind, style), f" at {when}: {trouble['message']}")


def _figure(row: Mapping[str, Any]) -> str:
    error = number(row.get("standard_error"))
    return f"{row['bits_per_dim']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _frame(points: Sequence[Point]) -> tuple[float, float, float, float] | None:
    """Left, right, low and high of what is shown; high early values run out of it."""
    if not points:
        return None
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    late = [y for x, y in points if x >= left + 0.2 * (right - left)]
    low, high = min(y for _, y in points), max(late)
    return left, right, low, high if high > low else low + 1e-3


def plotted(
    line: Sequence[Point],
    marks: Sequence[Point],
    frame: tuple[float, float, float, float],
    width: int,
    height: int,
    ascii_only: bool = False,
) -> list[list[tuple[str, bool]]]:
    """A line in braille, eight dots to a letter, and marks over it; or in plain letters.

    Args:
        line: Points from left to right.
        marks: Points.
        frame: Left, right, low and high; points above it are left out.
        width: In letters.
        height: In letters.
        ascii_only: Without braille.

    Returns:
        Lines of (letter, whether it is a mark), from the top.

    >>> cells = plotted([(0, 0.0), (1, 1.0)], [(1, 0.0)], (0, 1, 0, 1), 4, 2, ascii_only=True)
    >>> print(*("".join(letter for letter, _ in row) for row in cells), sep="|")
      ..|.. o
    """
    import numpy as np

    left, right, low, high = frame
    across, down = (1, 1) if ascii_only else (2, 4)  # dots of a letter
    columns, rows = width * across, height * down

    def dot(y: float) -> int:
        return round((high - y) / (high - low) * (rows - 1))

    dots: set[tuple[int, int]] = set()
    if line:
        x, y = np.asarray(line, np.float64).T
        at = np.linspace(left, right, columns)
        inside = (at >= x[0]) & (at <= x[-1]) if len(x) > 1 else at == at[np.abs(at - x).argmin()]
        before = None
        for column in np.flatnonzero(inside):
            now = dot(float(np.interp(at[column], x, y)))
            start = now if before is None else before + (now > before) - (now < before)
            dots |= {(row, int(column)) for row in range(min(start, now), max(start, now) + 1)}
            before = now
    letters: dict[tuple[int, int], int] = {}
    for row, column in dots:
        if row >= 0:
            cell = row // down, column // across
            bit = (0, 1, 2, 6, 3, 4, 5, 7)[row % down + 4 * (column % across)]
            letters[cell] = letters.get(cell, 0) | 1 << bit
    cells = [
        [(" " if not bits else "." if ascii_only else chr(0x2800 + bits), False) for bits in some]
        for some in ([letters.get((i, j), 0) for j in range(width)] for i in range(height))
    ]
    for x, y in marks:
        if (row := dot(y) // down) >= 0:
            column = round((x - left) / (right - left) * (width - 1)) if right > left else 0
            cells[row][column] = "o", True
    return cells
