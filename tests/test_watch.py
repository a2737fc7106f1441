"""`musigma watch`: how it reads logs while they change, and what it shows."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from musigma.cli import main
from musigma.cli import watch as watch_module
from musigma.cli.watch import Curve, History, LogReader, RunPanel, WatchedRun, draw
from musigma.data import load
from musigma.training import TrainConfig, fit
from musigma.training.log import Log
from musigma.zoo import build


def row(step: int, kind: str = "train", **more) -> dict:
    """A row as training writes it, with the fields that are shown."""
    row = {"kind": kind, "step": step, "seconds": step / 2}
    if kind in ("train", "skipped"):
        row |= {"loss": 1.0, "grad_norm": 3.0, "share": step / 1000, "kl": [2.0, 0.5]}
        row |= {"bits_per_dim": 1 + 1 / step, "learning_rate": 1e-3, "examples_per_second": 500.0}
    if kind == "evaluation":
        row |= {"bits_per_dim": 1.5 + 1 / step, "standard_error": 0.01, "bound": "elbo"}
    return row | more


def folder(run: Path, rows: list[dict], budget: dict | None = None) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if budget is not None:
        saved = {
            "model": {"architecture": "vae"},
            "data": {"source": "/a/digits", "train": 320},
            "train": {"batch_size": 32, **budget},
        }
        (run / "config.json").write_text(json.dumps(saved))
    return run


def summary(run: Path) -> dict:
    watched = WatchedRun(run)
    while watched.read():
        pass
    return watched.summary()


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# -- reading


STEPS = st.one_of(
    st.tuples(st.just("rows"), st.integers(1, 6)),
    st.tuples(st.just("half a row"), st.integers(1, 40)),
    st.tuples(st.just("its other half"), st.just(0)),
    st.tuples(st.just("rewind"), st.integers(0, 8)),
    st.tuples(st.just("another"), st.integers(0, 6)),
    st.tuples(st.just("gone"), st.just(0)),
    st.tuples(st.just("look"), st.integers(1, 300)),
)


@given(st.lists(STEPS, max_size=30))
def test_all_rows_are_read_however_the_log_changes(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    reader, read, clock, rest = LogReader(path), [], iter(range(10**6)), b""

    def lines(n: int) -> bytes:  # all different: time passes
        rows = [row(i + 1, seconds=float(next(clock))) for i in range(n)]
        return "".join(json.dumps(r) + "\n" for r in rows).encode()

    def look(max_bytes: int = 2**23) -> None:
        restarted, rows = reader.read(max_bytes)
        read[:] = rows if restarted else [*read, *rows]

    for what, n in steps:
        text = path.read_bytes() if path.exists() else b""
        if what == "rows":
            path.write_bytes(text + lines(n))
        elif what == "half a row":
            line = lines(1)
            path.write_bytes(text + line[:n])
            rest = line[n:]
        elif what == "its other half":
            path.write_bytes(text + rest)
        elif what == "rewind":  # as training does it: a new file replaces the old one
            draft = path.with_name("draft")
            draft.write_bytes(b"".join(text.splitlines(keepends=True)[:n]))
            draft.replace(path)
        elif what == "another":
            path.write_bytes(lines(n))
        elif what == "gone":
            path.unlink(missing_ok=True)
        else:
            look(n)
    while (before := (reader.position, len(read))) and (
        look() or (reader.position, len(read)) != before
    ):
        pass
    whole = [line for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    wanted = []
    for line in whole:
        try:
            wanted.append(json.loads(line))
        except ValueError:
            continue  # damaged, and continued
    assert read == wanted


def test_a_log_that_training_rewinds_is_read_from_its_start(tmp_path):
    """After every row that the trainer's own log writes."""
    watched, written = WatchedRun(tmp_path), Log(tmp_path / "metrics.jsonl", None)
    written.rewind(0)
    for step in (1, 2, 3, 4):
        written.write(row(step, grad_norm=1.0))
        assert watched.read()
        assert watched.summary()["step"] == step
    written.rewind(2)
    assert watched.read()
    assert watched.summary()["step"] == 2
    for step in (3, 4, 5):
        written.write(row(step, grad_norm=2.0, seconds=9.0))
    watched.read()
    assert watched.summary()["train"] == [(s, 1 + 1 / s) for s in (1, 2, 3, 4, 5)]
    assert watched.summary()["grad_norm"] == 2.0
    written.close()


def test_invalid_lines_are_skipped(tmp_path):
    good = [json.dumps(row(1)), json.dumps(row(2, "evaluation"))]
    bad = ['{"kind": "train", "st', "[]", "7", "null", '{"step": 3}', '{"kind": "train"}']
    bad += ['{"kind": 1, "step": 3}', '{"kind": "train", "step": "3"}', "\udcff", "[" * 10**5]
    bad += ['{"kind": "later", "step": 4}']
    text = "\n".join([good[0], *bad, good[1], good[1][:20]])
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    found = summary(tmp_path)
    assert (found["step"], len(found["train"]), len(found["validation"])) == (2, 1, 1)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    lost = dict.fromkeys(("bits_per_dim", "grad_norm", "learning_rate", "examples_per_second"))
    rows = [row(1), row(2, **lost, kl=[None, 1.0]), row(3, "evaluation", bits_per_dim=None)]
    found = summary(folder(tmp_path / "run", rows))
    assert (found["bits_per_dim"], found["grad_norm"], found["best"]) == (2.0, None, None)
    assert (found["examples_per_second"], found["kl"]) == (500.0, [None, 1.0])
    shown(found)
    found = summary(folder(tmp_path / "run", [row(1, kl=None, **lost)]))
    assert (found["bits_per_dim"], found["kl"], found["train"]) == (None, [], [])
    shown(found)


def test_a_long_log_is_read_with_all_problems_and_some_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "LONG_LOG", 10**5)
    rows = [row(i, "warning" if i % 500 == 0 else "train", message=str(i)) for i in range(1, 4001)]
    folder(tmp_path, rows)
    watched, reads = WatchedRun(tmp_path), 0
    watched.log.read = lambda: LogReader.read(watched.log, 2 * 10**4)  # as for an even longer log
    while watched.read():
        reads += 1
    found = watched.summary()
    assert reads > 10
    assert [w["step"] for w in found["warnings"]] == list(range(500, 4001, 500))
    assert found["step"] == 4000
    assert 600 < watched.history.rows < 1000  # a sixteenth, and all of the last hundred kilobytes
    assert found["train"][0][0] < 200
    values = [v for s, v in found["train"] if s > 1000]
    np.testing.assert_allclose(values, 1, atol=2e-3)


@given(st.lists(st.floats(-9, 9), max_size=300), st.sampled_from([2, 4, 16]))
def test_a_curve_keeps_means_in_bounded_memory(values, most):
    curve = Curve(most)
    for x, y in enumerate(values):
        curve.add(x, y)
    assert len(curve.points) <= most
    assert len(values) <= most or len(curve.points) > most // 2 - 1
    width = curve.width
    pieces = [values[i : i + width] for i in range(0, len(values), width)]
    assert [x for x, _ in curve.points] == [
        min(i * width + width, len(values)) - 1 for i in range(len(pieces))
    ]
    np.testing.assert_allclose([y for _, y in curve.points], [np.mean(p) for p in pieces])


# -- the summary of a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("watch") / "run"
    words = f"train vae digits --net mlp --width 8 --latents 4 --steps 60 --out {run} --json"
    main([*words.split(), "--evaluations", "3"])
    return run


def test_the_summary_of_a_finished_run(trained):
    found = summary(trained)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    figures = [r for r in rows if r["kind"] == "evaluation"]
    steps = [r for r in rows if r["kind"] == "train"]
    assert (found["state"], found["share"], found["step"]) == ("finished", 1.0, 60)
    assert (found["architecture"], found["data"]) == ("vae", "digits")
    final = json.loads((trained / "evaluation.json").read_text())
    assert len(final.pop("scores")) > 100
    assert found["evaluation"] == final
    assert found["best"] == min(figures, key=lambda r: r["bits_per_dim"])
    assert found["validation"] == [(r["step"], r["bits_per_dim"]) for r in figures]
    assert found["train"] == [(r["step"], r["bits_per_dim"]) for r in steps]
    assert found["bits_per_dim"] == pytest.approx(
        np.mean([r["bits_per_dim"] for r in steps[-20:]])
    )
    for name in ("kl", "grad_norm", "learning_rate"):
        assert found[name] == steps[-1][name]
    assert found["setbacks"] == found["skips"] == found["warnings"] == []


def test_every_row_of_a_real_run_is_read(tmp_path):
    """The log is read after every row; the run has no config.json."""
    digits, states = load("digits"), []
    torch.manual_seed(0)
    model = build("vae", (1, 8, 8), net="mlp", width=8, latents=4)
    watched = WatchedRun(tmp_path)

    def row(row) -> None:
        assert watched.read()
        states.append(watched.summary()["state"])
        assert watched.summary()["step"] == row["step"]

    config = TrainConfig(steps=12, evaluations=2, evaluate_on=20)
    fit(model, digits.split("train"), digits.split("validation"), config, tmp_path, watch=row)
    assert watched.summary()["architecture"] is None
    assert set(states[:-2]) == {"running"}
    assert watched.summary()["state"] == "finished"
    assert not watched.read()


@pytest.mark.parametrize(
    ("budget", "share", "left"),
    [
        ({"steps": 800}, 0.25, 300),
        ({"epochs": 40}, 0.5, 100),  # 10 steps each
        ({"minutes": 5}, 1 / 3, 200),
    ],
)
def test_share_of_the_budget_and_time_left(tmp_path, budget, share, left):
    found = summary(folder(tmp_path / "run", [row(i) for i in range(1, 201)], budget))
    assert found["share"] == pytest.approx(share)
    assert found["seconds_left"] == pytest.approx(left)
    assert "left" in shown(found)
    no_config = summary(folder(tmp_path / "other", [row(200)]))
    assert (no_config["share"], no_config["seconds_left"]) == (0.2, 400)


def test_states(tmp_path):
    run = tmp_path / "run"
    assert summary(run)["state"] == "waiting"
    folder(run, [], {"steps": 100})
    assert summary(run)["state"] == "waiting"
    folder(run, [row(49), row(50)], {"steps": 100})
    assert summary(run)["state"] == "running"
    aged(run / "metrics.jsonl", 100)
    assert summary(run)["state"] == "silent"
    assert summary(run)["silent"] == pytest.approx(100, abs=10)
    (run / "state.safetensors").touch()
    aged(run / "state.safetensors", 99)
    assert summary(run)["state"] == "stopped"
    aged(run / "state.safetensors", 101)  # an earlier state: there were steps after it
    assert summary(run)["state"] == "silent"
    folder(run, [row(1), row(50, seconds=1000.0)])  # a slow one
    aged(run / "metrics.jsonl", 100)
    assert summary(run)["state"] == "running"
    folder(run, [row(90), row(100, "evaluation")])
    assert summary(run)["state"] == "running"  # the held-out figure is yet to come
    (run / "evaluation.json").write_text('{"bits_per_dim": 1.25, "bound": "exact"}')
    assert summary(run)["state"] == "finished"
    assert "1.2500 on held-out data (exact)" in shown(summary(run))
    for name in ("config.json", "evaluation.json"):
        (run / name).write_text("{cut")
    assert summary(run)["state"] == "running"  # 90 of 1000, says the last step


def test_problems_and_their_times(tmp_path):
    rows = [row(i, "skipped", reason=f"loss {i}") for i in range(1, 41)]
    rows += [row(41, "warning", message="it [bold]collapses[/bold]")]
    rows += [row(42, "notice", message="a"), row(42, "alert", message="b")]  # of earlier versions
    rows += [row(43, "setback", message="back from step 43 to 7")]
    found = summary(folder(tmp_path / "run", rows))
    assert found["skipped"] == 40
    assert [s["message"] for s in found["skips"]] == [f"loss {i}" for i in range(21, 41)]
    assert found["setbacks"] == [
        {"step": 43, "seconds": 21.5, "message": "back from step 43 to 7"}
    ]
    text = shown(found, width=100)
    assert [w["message"] for w in found["warnings"]][1:] == ["a", "b"]
    assert "warning at step 41, 0:00:20: it [bold]collapses[/bold]" in text
    assert "setback at step 43, 0:00:22: back from" in text
    assert text.count("skipped at step") == 2  # many of them hide nothing else
    assert "skipped steps 40" in text


# -- the display


def shown(found: dict, width: int = 80, encoding: str = "utf-8", **how) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    Console(file=file, width=width, **how).print(RunPanel(found))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_the_panel_shows_everything(trained):
    text = shown(summary(trained), width=100)
    final = json.loads((trained / "evaluation.json").read_text())
    for wanted in ("finished", "vae on digits", "100%", "step 60", "held-out", "examples/s", "o"):
        assert wanted in text
    assert f"{final['bits_per_dim']:.4f}" in text
    assert re.search(r"z0 █+ +[\d.]+ nats", text)
    assert re.search("[\u2801-\u28ff]", text)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_terminals_without_unicode_or_colors_or_room(trained, width):
    found = summary(trained) | {"warnings": [{"step": 1, "seconds": 1.0, "message": "σ ± π"}]}
    plain = shown(found, width=width, encoding="ascii")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= width
    lines = plain.splitlines()
    assert sum("." in line for line in lines) > 3
    assert any("# " in line or "#|" in line for line in lines)
    colored = shown(found, width=width, force_terminal=True, color_system="standard")
    assert "\x1b[3" in colored


def test_many_latents_are_summed_up(tmp_path):
    found = summary(folder(tmp_path / "run", [row(1, kl=[1.0] * 30)]))
    text = shown(found)
    assert "z7" in text
    assert "z8" not in text
    assert "22 more, 22.00 nats" in text


LEVEL = st.floats(-5, 5)


@given(st.lists(LEVEL, min_size=1, max_size=60), st.integers(2, 60), st.integers(1, 9))
def test_a_drawn_curve_passes_through_its_points(values, width, height):
    line = [(float(x), y) for x, y in enumerate(values)]
    low, high = min(values), max(values)
    limits = (0.0, max(1.0, len(line) - 1.0), low, high if high > low else low + 1)
    mark = (limits[1], low)
    for plain in (True, False):
        cells = draw(line, [mark], limits, width, height, plain)
        assert {len(row) for row in cells} == {width}
        assert len(cells) == height
        assert cells[-1][-1] == ("o", True)
        columns = [[row[i][0] not in " o" for row in cells] for i in range(width)]
        if len(line) > 1:  # a line without gaps
            assert all(any(column) for column in columns[:-1])
        first = columns[0].index(True) if any(columns[0]) else height - 1
        expected = (limits[3] - values[0]) / (limits[3] - low) * (height - 1)
        if len(line) == 1 or all(v == values[0] for v in values):
            assert abs(first - expected) <= 1


def test_braille_dots():
    cells = draw([(0, 0.0), (1, 1.0)], [], (0, 1, 0, 1), 1, 1)
    assert cells == [[("\N{BRAILLE PATTERN DOTS-4567}", False)]]


def test_early_values_far_above_the_rest_are_outside_the_plot(tmp_path):
    rows = [row(i, bits_per_dim=1000.0 if i < 10 else 2 - i / 1000) for i in range(1, 400)]
    text = shown(summary(folder(tmp_path / "run", rows)))
    assert "1000" not in text
    assert "1.919" in text  # at a fifth of the way


# -- the command


def test_the_command_once_and_as_json(trained, tmp_path, capsys):
    main(["watch", str(trained), str(tmp_path / "none"), "--once"])
    text = capsys.readouterr().out
    assert "finished" in text
    assert "waiting for its first step" in text
    main(["watch", str(trained), str(tmp_path / "none")])  # not a terminal: like --once
    assert capsys.readouterr().out == text
    main(["watch", str(trained), str(tmp_path / "none"), "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert [one["state"] for one in document["runs"]] == ["finished", "waiting"]
    wanted = json.loads(json.dumps(summary(trained)))
    assert document["runs"][0] == wanted | {"silent": pytest.approx(wanted["silent"], abs=20)}
    assert not (tmp_path / "none").exists()


def test_output_in_ascii(tmp_path, monkeypatch):
    folder(tmp_path / "run", [row(1), row(2, "warning", message="σ is tiny")])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    main(["watch", str(tmp_path / "run")])
    out.flush()
    assert b"? is tiny" in out.buffer.getvalue()


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, run: Path):
        code = (
            "import sys; from musigma.cli import main, watch; "
            "watch.INTERVAL = 0.05; main(sys.argv[1:])"
        )
        self.near, far = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "watch", run],
            stdout=far,
            stderr=far,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"},
        )
        os.close(far)

    def until(self, text: str | None) -> None:
        """Read until a text appears; None: until the end."""
        deadline = time.monotonic() + 60
        while text is None or text not in self.text:
            assert time.monotonic() < deadline, self.text
            if not select.select([self.near], [], [], 0.1)[0]:
                continue
            try:
                self.text += os.read(self.near, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                assert text is None, self.text
                return

    def end(self) -> int:
        self.until(None)
        os.close(self.near)
        assert self.text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
        assert "Traceback" not in self.text
        return self.process.wait()


def test_watch_follows_a_run_on_a_terminal_until_its_end(tmp_path):
    terminal = Terminal(tmp_path / "run")
    terminal.until("waiting")
    folder(tmp_path / "run", [row(i) for i in range(1, 51)], {"steps": 100})
    terminal.until("50%")
    with (tmp_path / "run/metrics.jsonl").open("a") as log:
        log.write(json.dumps(row(100, "evaluation")) + "\n")
    terminal.until("100%")
    (tmp_path / "run/evaluation.json").write_text('{"bits_per_dim": 1.25, "bound": "exact"}')
    assert terminal.end() == 0
    assert "finished" in terminal.text


def test_ctrl_c_stops_watch(tmp_path):
    terminal = Terminal(folder(tmp_path / "run", [row(1)]))
    terminal.until("step 1")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0


def test_a_history_stays_small():
    history = History()
    for step in range(1, 20_001):
        history.add(row(step, "skipped" if step % 7 == 0 else "train", reason="r" * 100))
    assert history.skipped == 20_000 // 7
    assert len(history.problems["skipped"]) == 20
    assert len(history.train.points) <= 512
    np.testing.assert_allclose([y for _, y in history.train.points][9:], 1, atol=1e-2)
