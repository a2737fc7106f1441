"""``musigma watch``: follow runs from another terminal, from the files that they write."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from musigma.cli.options import INSPECT, Argument, Common, app
from musigma.cli.screen import Screen
from musigma.files import number, row_of

INTERVAL = 1.0  # seconds between two refreshes
SILENT_AFTER = 60.0  # seconds without a row; ten times the usual interval if that is longer
LONG_LOG = 2**25  # bytes; of longer logs, one training row in 16 is read

PROBLEMS = {"setback": "setbacks", "warning": "warnings", "skipped": "skips"}
EARLIER_KINDS = {"alert": "warning", "notice": "warning"}  # in logs of earlier versions
STYLES = {"setback": "red", "warning": "yellow", "skipped": "red"}
STYLES |= {"running": "green", "finished": "bold green", "silent": "red", "stopped": "yellow"}

Point = tuple[float, float]


@app.command(group=INSPECT)
def watch(
    runs: Annotated[list[Path], Argument],
    *,
    once: bool = False,
    common: Common = Common(),
) -> None:
    """Follow runs from another terminal: progress, figures and problems.

    Reads only the run folders, so it can be started and stopped (Ctrl-C) at any time, on any
    machine that sees them. It ends when all runs are finished. With --json, or if the output is
    not a terminal, it prints the current state once.

    Args:
        runs: Run folders; they may not exist yet.
        once: Print the current state once.
    """
    watched = [WatchedRun(folder) for folder in runs]
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # for terminals that lack some characters
    console = Console(highlight=False)
    if once or common.json or not sys.stdout.isatty() or console.is_dumb_terminal:
        for run in watched:
            while run.read():
                pass
            if not common.json:
                console.print(RunPanel(run.summary()))
        if common.json:
            Screen(common).result({"runs": [run.summary() for run in watched]})
        return
    height = 8 if len(watched) == 1 else 4
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            unread = [run for run in watched if run.read()]
            summaries = [run.summary() for run in watched]
            live.update(Group(*(RunPanel(s, height) for s in summaries)), refresh=True)
            if not unread:
                if all(s["state"] == "finished" for s in summaries):
                    return
                time.sleep(INTERVAL)


# --- reading -------------------------------------------------------------------------------------


class LogReader:
    """Reads the new rows of a log of JSON lines at each call.

    It first looks for the last line that it read. If that line is no longer there, the log was
    rewound or replaced, and is read from its start. Damaged lines are skipped; an
    incomplete last line is read when it is complete.
    """

    def __init__(self, path: Path):
        self.path, self.position, self.last_line = path, 0, b""

    def read(self, max_bytes: int = 2**23) -> tuple[bool, list[dict[str, Any]]]:
        """Whether reading started over, and the rows of the next `max_bytes` and a line."""
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            file = io.BytesIO()
        with file:
            size = file.seek(0, os.SEEK_END)
            file.seek(self.position - len(self.last_line))
            restarted = file.read(len(self.last_line)) != self.last_line
            if restarted:
                self.position, self.last_line = 0, b""
                file.seek(0)
            rows, start = [], self.position
            sparse = size > start + LONG_LOG
            for i, line in enumerate(file):
                if not line.endswith(b"\n") or self.position > start + max_bytes:
                    break
                self.position, self.last_line = self.position + len(line), line
                if sparse and i % 16 and line.startswith(b'{"kind": "train"'):
                    continue
                if (row := row_of(line)) is not None:
                    rows.append(row)
        return restarted, rows


class Curve:
    """A curve of any length in bounded memory: means of equal numbers of adjacent points."""

    def __init__(self, size: int = 512):
        self.size, self.width = size, 1
        self.bins: list[tuple[float, float, int]] = []  # last x, sum of y, number of points

    def add(self, x: float, y: float) -> None:
        """Add a point to the right of all others."""
        if len(self.bins) == self.size and self.bins[-1][2] == self.width:
            pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
            self.bins = [(b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
            self.width *= 2
        if not self.bins or self.bins[-1][2] == self.width:
            self.bins.append((x, 0.0, 0))
        _, total, count = self.bins.pop()
        self.bins.append((x, total + y, count + 1))

    @property
    def points(self) -> list[Point]:
        """The last x and the mean y of each bin."""
        return [(x, total / count) for x, total, count in self.bins]


class History:
    """A summary of the rows of a log, in bounded memory."""

    def __init__(self):
        self.rows = self.step = self.skipped = 0
        self.seconds = self.interval = 0.0  # of training; between the last two rows
        self.last: Mapping[str, Any] = {}  # training row
        self.best: Mapping[str, Any] | None = None
        self.bits, self.speed = deque(maxlen=20), deque(maxlen=20)
        self.train, self.validation = Curve(), Curve()
        self.problems = {kind: deque(maxlen=20) for kind in PROBLEMS}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        kind = EARLIER_KINDS.get(row["kind"], row["kind"])
        step, bits = row["step"], number(row.get("bits_per_dim"))
        seconds = number(row.get("seconds")) or self.seconds
        self.interval = seconds - self.seconds if seconds > self.seconds else self.interval
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
        elif kind in PROBLEMS:
            self.skipped += kind == "skipped"
            message = str(row.get("reason" if kind == "skipped" else "message", ""))
            self.problems[kind].append({"step": step, "seconds": seconds, "message": message})


class WatchedRun:
    """A run and what is known about it.

    Args:
        folder: Its folder, which may not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log, self.history = LogReader(folder / "metrics.jsonl"), History()

    def read(self) -> bool:
        """Read the next new rows; returns whether there may be more."""
        before = self.log.position
        restarted, rows = self.log.read()
        if restarted:
            self.history = History()
        for row in rows:
            self.history.add(row)
        return restarted or self.log.position > before

    def summary(self) -> dict[str, Any]:
        """The current state, as JSON values.

        Returns:
            `state`: "waiting" for a first row; "running"; "silent": rows are overdue; "stopped":
            rows are overdue, and the state was saved after the last one; or "finished".
            `silent`: seconds since the last row. `share` of the budget, `seconds` of training,
            `seconds_left` at this rate. `bits_per_dim` and `examples_per_second`: means of the
            last 20 rows. `best`: the row of the best validation figure. `grad_norm`,
            `learning_rate` and `kl` (nats of each latent, top first) of the last step. `skipped`:
            number of skipped steps. `skips`, `setbacks` and `warnings`: the last 20 of each.
            `train` and `validation`: curves. `evaluation`: the final figure.
        """
        history, config = self.history, _read_json(self.folder / "config.json")
        share, left = self._share(config), None
        if share:
            minutes = number(_get(config, "train", "minutes"))
            total = 60 * minutes if minutes else history.seconds / share
            left = max(0.0, total - history.seconds)
        written, saved = map(self._modified, ("metrics.jsonl", "state.safetensors"))
        silent = None if written is None else max(0.0, time.time() - written)
        overdue = silent is not None and silent > max(SILENT_AFTER, 10 * history.interval)
        evaluation = _read_json(self.folder / "evaluation.json")
        evaluation.pop("scores", None)  # of every example
        if not history.rows:
            state = "waiting"
        elif share == 1 and (evaluation or overdue or not config):
            state = "finished"
        elif overdue:
            state = "stopped" if saved and written and saved >= written else "silent"
        else:
            state = "running"
        kl = history.last.get("kl")
        return {
            "run": str(self.folder),
            "state": state,
            "silent": silent,
            "architecture": _get(config, "model", "architecture"),
            "data": _get(config, "data", "source"),
            "share": share,
            "seconds": history.seconds,
            "seconds_left": left,
            "step": history.step,
            "bits_per_dim": _mean(history.bits),
            "best": history.best,
            "examples_per_second": _mean(history.speed),
            "grad_norm": number(history.last.get("grad_norm")),
            "learning_rate": number(history.last.get("learning_rate")),
            "kl": [number(nats) for nats in kl] if isinstance(kl, list) else [],
            "skipped": history.skipped,
            **{name: list(history.problems[kind]) for kind, name in PROBLEMS.items()},
            "train": history.train.points,
            "validation": history.validation.points,
            "evaluation": evaluation or None,
        }

    def _share(self, config: Mapping[str, Any]) -> float | None:
        """The share of the budget that is spent; the one in the last row if there is no config."""
        from musigma.training import Progress, TrainConfig

        progress = Progress(step=self.history.step, seconds=self.history.seconds)
        try:
            return TrainConfig(**config["train"]).share(progress, config["data"]["train"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):  # not of this version
            return number(self.history.last.get("share"))

    def _modified(self, name: str) -> float | None:
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_mtime
        return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file of a run; empty if it is missing or being replaced."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _get(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# --- showing -------------------------------------------------------------------------------------


class RunPanel:
    """A summary as a panel of the terminal.

    Args:
        summary: From `WatchedRun.summary`.
        height: Lines of the curves.
    """

    def __init__(self, summary: Mapping[str, Any], height: int = 8):
        self.summary, self.height = summary, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The panel, in the characters that the terminal has."""
        width, ascii_only = max(20, options.max_width - 4), options.ascii_only
        lines: list[Any] = [self._state()]
        if self.summary["state"] != "waiting":
            lines += [*self._progress(), *self._figures()]
        lines += self._curves(width, ascii_only)
        lines += self._latents("#" if ascii_only else "\N{FULL BLOCK}")
        lines += self._problems()
        yield Panel(Group(*lines), title=Text(self.summary["run"]), title_align="left")

    def _state(self) -> Text:
        state, model = self.summary["state"], self.summary["architecture"]
        text = Text(state, style=STYLES.get(state, "dim"))
        if state == "waiting":
            text.append(" for its first step")
        if state in ("silent", "stopped"):
            text.append(f" for {_duration(self.summary['silent'])}")
        if model:
            text.append(f"   {model} on {Path(str(self.summary['data'])).name}", "dim")
        return text

    def _progress(self) -> Iterator[Table]:
        share, left = self.summary["share"], self.summary["seconds_left"]
        if share is not None:
            text = f"{share:.0%}  {_duration(self.summary['seconds'])}"
            if left and self.summary["state"] == "running":
                text += f", {_duration(left)} left"
            grid = Table.grid(padding=(0, 1))
            grid.add_row(ProgressBar(total=1.0, completed=share, width=30), text)
            yield grid

    def _figures(self) -> Iterator[Text]:
        summary, best, final = self.summary, self.summary["best"], self.summary["evaluation"]
        bits = summary["bits_per_dim"]
        line = f"step {summary['step']:,}"
        yield Text(line if bits is None else f"{line}   {bits:.4f} bits/dim")
        if best:
            yield Text(f"{_figure(best)} on validation data, the best, at step {best['step']:,}")
        if final and number(final.get("bits_per_dim")) is not None:
            yield Text(f"{_figure(final)} on held-out data ({final.get('bound')})")
        rates = {
            "examples/s": summary["examples_per_second"],
            "gradient": summary["grad_norm"],
            "learning rate": summary["learning_rate"],
            "skipped steps": summary["skipped"] or None,
        }
        shown = [
            f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.3g}"
            for name, value in rates.items()
            if value is not None
        ]
        yield Text("   ".join(shown), style="dim")

    def _curves(self, width: int, ascii_only: bool) -> Iterator[Text]:
        train, validation = self.summary["train"], self.summary["validation"]
        if not train and not validation:
            return
        left, right, low, high = limits = _limits([*train, *validation])
        cells = draw(train, validation, limits, width - 10, self.height, ascii_only)
        for i, line in enumerate(cells):
            value = {0: f"{high:.3f}", len(cells) - 1: f"{low:.3f}"}.get(i, "")
            text = Text(f"{value:>9} ", style="dim")
            for character, is_mark in line:
                text.append(character, "bold magenta" if is_mark else "cyan")
            yield text
        start, end = f"{left:,.0f}", f"{right:,.0f}"
        middle = "steps; o is validation".center(width - 10 - len(start) - len(end))
        yield Text(f"{'':>10}{start}{middle}{end}", style="dim")

    def _latents(self, block: str, most: int = 8) -> Iterator[Text]:
        kl = [nats or 0.0 for nats in self.summary["kl"]]
        for i, nats in enumerate(kl[:most]):
            bar = block * math.ceil(20 * max(nats, 0.0) / max(*kl, 1e-9))
            yield Text.assemble(f"{f'z{i}':>9} ", (f"{bar:<20}", "blue"), f" {nats:.2f} nats")
        if len(kl) > most:
            rest = f"{len(kl) - most} more, {sum(kl[most:]):.2f} nats"
            yield Text(f"{'':>10}{rest}", style="dim")

    def _problems(self, most: int = 8) -> Iterator[Text]:
        recent = []
        for kind, name in PROBLEMS.items():
            last = self.summary[name][-2 if kind == "skipped" else -most :]
            recent += [(problem["step"], kind, problem) for problem in last]
        for step, kind, problem in sorted(recent, key=lambda entry: entry[0])[-most:]:
            when = f" at step {step:,}, {_duration(problem['seconds'])}: "
            yield Text.assemble((kind, STYLES[kind]), when, problem["message"])


def _figure(row: Mapping[str, Any]) -> str:
    error = number(row.get("standard_error"))
    return f"{row['bits_per_dim']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _limits(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """Left, right, low and high of a plot; high values early in training lie outside."""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    late = [y for x, y in points if x >= left + 0.2 * (right - left)]
    low, high = min(y for _, y in points), max(late)
    return left, right, low, high if high > low else low + 1e-3


def draw(
    line: Sequence[Point],
    marks: Sequence[Point],
    limits: tuple[float, float, float, float],
    width: int,
    height: int,
    ascii_only: bool = False,
) -> list[list[tuple[str, bool]]]:
    """Draw a line in braille, with eight dots per character, and marks over it.

    Args:
        line: Points from left to right.
        marks: Points, drawn as "o".
        limits: Left, right, low and high; points above are left out.
        width: Characters per line.
        height: Number of lines.
        ascii_only: Draw in ASCII instead of braille.

    Returns:
        Lines of (character, whether it is a mark), from the top.

    >>> cells = draw([(0, 0.0), (1, 1.0)], [(1, 0.0)], (0, 1, 0, 1), 4, 2, ascii_only=True)
    >>> print(*("".join(character for character, _ in row) for row in cells), sep="|")
      ..|.. o
    """
    import numpy as np

    left, right, low, high = limits
    weights = np.array([[1]] if ascii_only else [[1, 8], [2, 16], [4, 32], [64, 128]])
    down, across = weights.shape  # dots per character
    dots = np.zeros((height * down, width * across), bool)

    def row_of_dots(y: Any) -> Any:
        return np.round((high - y) / (high - low) * (len(dots) - 1)).astype(int)

    if line:
        x, y = np.asarray(line, np.float64).T
        at = np.linspace(left, right, dots.shape[1])
        inside = (at >= x[0]) & (at <= x[-1]) if len(x) > 1 else at == at[np.abs(at - x).argmin()]
        rows = row_of_dots(np.interp(at[inside], x, y))
        starts = rows[:1].tolist() + (rows[:-1] + np.sign(rows[1:] - rows[:-1])).tolist()
        for column, start, end in zip(np.flatnonzero(inside), starts, rows, strict=True):
            top, bottom = min(start, end), max(start, end)
            dots[max(top, 0) : max(bottom + 1, 0), column] = True
    codes = (dots.reshape(height, down, width, across) * weights[:, None]).sum((1, 3))
    ink = (lambda code: ".") if ascii_only else (lambda code: chr(0x2800 + code))
    cells = [[(ink(code) if code else " ", False) for code in row] for row in codes]
    for x, y in marks:
        if (row := int(row_of_dots(np.float64(y))) // down) >= 0:
            column = round((x - left) / (right - left) * (width - 1)) if right > left else 0
            cells[row][column] = "o", True
    return cells
