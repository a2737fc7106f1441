"""Runs that are killed, interrupted or out of disk space end as uninterrupted ones do."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from launched import LAUNCH
from musigma import checkpoint, data
from musigma.data import Dataset
from musigma.distributions import StandardNormal
from musigma.gaussian import GaussianHead
from musigma.model import VAE, Prior
from musigma.nets import MLP
from musigma.training import Progress, TrainConfig, TrainingError, fit, warning
from musigma.zoo import architecture, build


def rows(folder, kind):
    text = (folder / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def points(n=200):
    return Dataset(np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32), name="points")


def same_files(a, b):
    return all((a / f).read_bytes() == (b / f).read_bytes() for f in ("last.safetensors",))


# -- killed

KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import accelerate, torch, torch._dynamo  # once, and not in every process
    from musigma import data
    from musigma.training import TrainConfig, fit
    from musigma.training.state import STATE
    from musigma.zoo import build

    digits, folder, runs = data.load("digits"), Path(sys.argv[1]), int(sys.argv[2])
    parts = digits.split("train"), digits.split("validation")
    config = TrainConfig(steps=40, batch_size=16, evaluations=3, evaluate_on=20, save_every=2e-3)

    def train(name):
        torch.manual_seed(0)
        model = build("glow", (1, 8, 8), levels=1, depth=1, hidden=4)
        there = (folder / name / STATE).exists()
        fit(model, *parts, config, folder / name, device="cpu", resume=there)

    def forked(name):
        child = os.fork()
        if child == 0:
            try:
                train(name)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        return child

    def wait_for(step, log):
        for _ in range(100_000):
            if step == 0 or log.exists() and log.read_text().count('"train"') >= step:
                return
            time.sleep(1e-3)

    assert os.waitpid(forked("whole"), 0)[1] == 0
    kills, unfinished = random.Random(0), 0
    for run in range(runs):
        child = forked(f"killed{run}")
        wait_for(kills.randrange(40), folder / f"killed{run}/metrics.jsonl")
        time.sleep(kills.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        unfinished += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert os.waitpid(forked(f"killed{run}"), 0)[1] == 0, run
    print(unfinished)
"""


def script(text, *words):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("runs", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_in_the_same_bytes(tmp_path, runs):
    done = script(KILLED, tmp_path, runs)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= runs / 2  # the others had finished
    for run in range(runs):
        assert same_files(tmp_path / "whole", tmp_path / f"killed{run}"), run
        steps = [row["step"] for row in rows(tmp_path / f"killed{run}", "train")]
        assert steps == list(range(1, 41))
        checkpoint.load(tmp_path / f"killed{run}" / "model.safetensors")


LOST = (
    LAUNCH
    + """
import os, signal, sys
from pathlib import Path
from musigma import data
from musigma.training import TrainConfig, fit
from musigma.training.state import STATE
from musigma.zoo import build

digits = data.load("digits")

def train(out, fatal):
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    os.write(1, f"{out.name} {again}\\n".encode())
    torch.manual_seed(0)
    model = build("realnvp", (1, 8, 8), levels=1, depth=1, hidden=4)

    def lose(step):
        if step == fatal and not again and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig(steps=20, batch_size=17, evaluations=2, evaluate_on=20, save_every=1e-5)
    parts = digits.split("train"), digits.split("validation")
    there = (out / STATE).exists()
    fit(model, *parts, config, out, device="cpu", resume=there, stop=lose)

for name, fatal in (("whole", 0), ("lost", 7)):
    launch(train, Path(sys.argv[1]) / name, fatal, restarts=1)
"""
)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_the_run_ends_in_the_same_bytes(tmp_path):
    done = script(LOST, tmp_path)
    assert done.returncode == 0, done.stderr
    starts = [*["lost 0"] * 2, *["lost 1"] * 2, *["whole 0"] * 2]
    assert sorted(done.stdout.splitlines()) == starts
    assert same_files(tmp_path / "whole", tmp_path / "lost")
    assert [row["step"] for row in rows(tmp_path / "lost", "train")] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_stops_the_run_and_sets_the_exit_code(tmp_path, number):
    def ask(row):
        if row["kind"] == "train" and row["step"] == 3:
            os.kill(os.getpid(), number)

    def train(folder, **how):
        model = build("realnvp", (4,), bits=None, hidden=8)
        return fit(model, points(), points(), TrainConfig(steps=6), folder, device="cpu", **how)

    torch.manual_seed(0)
    before = signal.getsignal(number)
    run = train(tmp_path, watch=ask)
    assert (run.finished, run.steps, run.signal) == (False, 3, number)
    assert signal.getsignal(number) is before
    assert train(tmp_path, resume=True).signal is None


# -- a full disk

FULL = """
    import json, os, subprocess, sys
    from pathlib import Path
    import torch
    from musigma import data
    from musigma.training import TrainConfig, TrainingError, fit
    from musigma.training.state import STATE
    from musigma.zoo import build

    disk, freed = Path(sys.argv[1]), sys.argv[2] == "freed"
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
    digits = data.load("digits")
    parts = digits.split("train"), digits.split("validation")
    ballast = disk / "ballast"

    def crowd(step):
        if step == 5:
            with ballast.open("wb", 0) as file:
                try:
                    while file.write(bytes(1024)):
                        pass
                except OSError:
                    pass
        if step == 15 and freed:
            ballast.unlink()

    said = []
    def train(**how):
        torch.manual_seed(0)
        model = build("realnvp", (1, 8, 8), levels=1, depth=1, hidden=4)
        config = TrainConfig(steps=20, batch_size=16, evaluations=2, save_every=1e-5)
        return fit(model, *parts, config, disk / "run", device="cpu", **how)

    try:
        train(stop=crowd, watch=lambda row: said.append(row))
    except TrainingError as error:
        said.append({"kind": "error", "message": str(error)})
    left = sorted(p.name for p in (disk / "run").iterdir())
    ballast.unlink(missing_ok=True)
    train(resume=True)
    (disk / "run/last.safetensors").rename(disk / "last.safetensors")
    last = (disk / "last.safetensors").read_bytes()
    print(json.dumps({
        "said": [[row["kind"], row["message"]] for row in said if "message" in row],
        "left": left,
        "last": last.hex(),
    }))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is made by Linux's tmpfs")
@pytest.mark.parametrize("how", [pytest.param("freed", marks=pytest.mark.slow), "never freed"])
def test_a_full_disk_causes_warnings_and_no_loss(tmp_path, how):
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    command = [*own, sys.executable, "-c", textwrap.dedent(FULL), str(disk), how]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert not any(name.endswith(".tmp") for name in answer["left"])
    kinds = [kind for kind, _ in answer["said"]]
    assert kinds == (["warning"] if how == "freed" else ["warning", "error"])
    assert "No space left on device" in answer["said"][0][1]
    torch.manual_seed(0)
    digits = data.load("digits")
    model = build("realnvp", (1, 8, 8), levels=1, depth=1, hidden=4)
    config = TrainConfig(steps=20, batch_size=16, evaluations=2)
    parts = digits.split("train"), digits.split("validation")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit(model, *parts, config, tmp_path / "whole", device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "whole/last.safetensors").read_bytes().hex() == answer["last"]


def test_best_weights_that_could_not_be_saved_do_not_count_as_saved(tmp_path, monkeypatch):
    """The third evaluation is the best, but the disk is full; later ones are worse."""
    figures = iter([6.0, 5.0, 3.0, 4.0, 4.5, 4.25])
    saved, real = [], checkpoint.save

    def look(*given, **how):
        return {"bits_per_dim": next(figures), "kl": []}

    def save(model, path, **how):
        if path.name == "model.safetensors":
            saved.append(len(rows(tmp_path, "evaluation")))
            if saved[-1] == 3:
                raise OSError(28, "No space left on device")
        real(model, path, **how)

    monkeypatch.setattr("musigma.training.loop.evaluate", look)
    monkeypatch.setattr(checkpoint, "save", save)
    model = build("realnvp", (4,), bits=None, hidden=8)
    config = TrainConfig(steps=6, evaluations=6)
    run = fit(model, points(), points(), config, tmp_path, device="cpu")
    assert saved == [1, 2, 3, 4]
    assert run.best == 4.0
    (full,) = [row for row in rows(tmp_path, "warning") if "not saved" in row["message"]]
    assert "No space left" in full["message"]


def test_incomplete_files_of_a_killed_process_are_removed(tmp_path):
    mine = tmp_path / ".notes"
    for name in (".state.safetensors.123.tmp", ".tmpa1B2c3", mine.name):
        (tmp_path / name).write_text("half")
    model = build("realnvp", (4,), bits=None, hidden=8)
    fit(model, points(), points(), TrainConfig(steps=1), tmp_path, device="cpu")
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [mine]


# -- steps that go on failing


@architecture
def moody(shape, *, bits: int | None = None, bad: list = ()):
    """A VAE whose decoder returns NaN in some training passes."""

    class Moody(nn.Module):
        passes = -1  # fit checks two examples first

        def __init__(self):
            super().__init__()
            self.net = MLP(3, 2 * shape[0], hidden=[8])

        def forward(self, z):
            if torch.is_grad_enabled():
                Moody.passes += 1
            return self.net(z) * (float("nan") if Moody.passes in bad else 1.0)

    encoder = GaussianHead(MLP(shape[0], 6, hidden=[8]), event_ndims=1)
    return VAE(encoder, GaussianHead(Moody(), event_ndims=1), Prior(StandardNormal((3,))))


def train_moody(folder, bad, **config):
    torch.manual_seed(0)
    both = points().split("train"), points().split("validation")
    config = TrainConfig(**{"steps": 40, "save_every": 1e-5, "evaluations": 1} | config)
    return fit(moody((4,), bad=bad), *both, config, folder, device="cpu")


def test_repeated_failures_cause_a_setback_and_smaller_steps(tmp_path):
    run = train_moody(tmp_path, [21, 22, 23, 24, 25])
    assert (run.finished, run.steps, run.skipped) == (True, 40, 5)
    (row,) = rows(tmp_path, "setback")
    assert row["step"] == 20
    assert "went back from step 25 to 20; the learning rate is multiplied by 0.5" in row["message"]
    assert rows(tmp_path, "skipped") == []  # the steps that were undone
    steps = {r["step"]: r["learning_rate"] for r in rows(tmp_path, "train")}
    assert sorted(steps) == list(range(1, 41))
    smooth = TrainConfig(steps=40)
    for step in (20, 21, 40):
        usual = smooth.learning_rate(step - 1, (step - 1) / 40)
        assert steps[step] == pytest.approx(usual * (0.5 if step > 20 else 1.0))


def test_four_failures_in_a_row_are_only_skipped(tmp_path):
    run = train_moody(tmp_path, [21, 22, 23, 24])
    assert (run.finished, run.skipped, rows(tmp_path, "setback")) == (True, 4, [])
    for row in rows(tmp_path, "skipped"):
        assert row["reason"].startswith("output of decoder.net")
        assert len(row["examples"]) == 8


def test_endless_failures_stop_the_run_at_the_last_good_state(tmp_path):
    with pytest.raises(TrainingError, match=r"20 steps in a row .* went back 3 times"):
        train_moody(tmp_path, list(range(21, 1000)))
    assert max(row["step"] for row in rows(tmp_path, "train")) == 20
    last = checkpoint.load(tmp_path / "last.safetensors")
    assert all(p.isfinite().all() for p in last.parameters())


def test_a_bad_example_is_named(tmp_path):
    values = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    bad = int(data.batch_indices(1000, 16, seed=0, step=40)[3])  # after those that calibrate
    values[bad] = 1e30
    config = TrainConfig(steps=60, batch_size=16, evaluations=1)
    model = build("realnvp", (4,), bits=None, hidden=16)
    fit(model, Dataset(values), Dataset(values[:100]), config, tmp_path, device="cpu")
    found = rows(tmp_path, "skipped")
    assert found
    for row in found:
        assert row["examples"] == [bad]


# -- warnings


def test_each_warning_is_logged_once(tmp_path):
    """A latent without information, and a nearly singular mixing."""
    torch.manual_seed(0)
    model = build("vae", (6,), bits=None, net="mlp", width=8, latents=4, prior="normal")
    nn.init.zeros_(model.encoder.net.layers[-1].weight)
    nn.init.zeros_(model.encoder.net.layers[-1].bias)
    data = Dataset(np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    config = TrainConfig(steps=8, lr=1e-9, evaluations=4)
    fit(model, data, data, config, tmp_path / "vae", device="cpu")
    (collapse,) = rows(tmp_path / "vae", "warning")
    assert "posterior collapse: the latent of prior carries 0.000 nats" in collapse["message"]

    flow = build("glow", (1, 8, 8), levels=1, depth=2, hidden=4)
    with torch.no_grad():
        flow.layers[5].log_scale[0] -= 12
    images = Dataset(np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), np.uint8))
    fit(flow, images, images, config, tmp_path / "glow", device="cpu")
    (conditioning,) = rows(tmp_path / "glow", "warning")
    assert "the matrix of layers.5 has condition number" in conditioning["message"]


def test_a_figure_worse_than_one_without_a_model_causes_a_warning():
    levels = Dataset(np.zeros((40, 1, 8, 8), np.uint8))
    assert warning.references(levels, levels) == {"raw": 8.0}
    x = np.random.default_rng(0).normal(size=(5000, 3)) * [1, 10, 0.1]
    columns = Dataset(x.astype(np.float32))
    found = warning.references(columns, columns)
    entropy = 0.5 * math.log2(2 * math.pi * math.e)  # of a Gaussian with unit variance
    assert found == {"gaussian": pytest.approx(entropy, abs=0.01)}
    for reference, kind in ((found, "gaussian"), ({"raw": 8.0}, "raw")):
        (level,) = reference.values()
        for above, step, share in ((1, 100, 0.5), (1, 99, 0.5), (1, 100, 0.4), (-0.1, 100, 0.5)):
            figure = {"bits_per_dim": level + above, "standard_error": 0.01}
            messages = warning.figure_warnings(figure, reference, Progress(step=step), share)
            expected = {kind} if (above, step, share) == (1, 100, 0.5) else set()
            assert messages.keys() == expected


def test_a_column_that_is_constant_in_training_gives_no_reference():
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    x[:, 1] = 3
    assert warning.references(Dataset(x), Dataset(x)) == {}


def with_figures(monkeypatch, *figures):
    """Evaluations of `fit` return these figures."""
    left = iter(figures)
    monkeypatch.setattr(
        "musigma.training.loop.evaluate",
        lambda *_, **__: {"bits_per_dim": next(left), "standard_error": 0.01, "kl": []},
    )


def test_overfitting_causes_one_warning(tmp_path, monkeypatch):
    with_figures(monkeypatch, 5.0, 3.0, 3.5, 3.6, 3.7, 3.8)
    model = build("realnvp", (4,), bits=None, hidden=8)
    config = TrainConfig(steps=6, evaluations=6)
    fit(model, points(), points(), config, tmp_path, device="cpu")
    (row,) = rows(tmp_path, "warning")
    assert row["step"] == 5
    assert "overfitting: the validation figure has not improved since step 2" in row["message"]


@pytest.mark.parametrize("stop", [None, 3])
def test_patience_stops_with_the_best_weights_and_resumes(tmp_path, monkeypatch, stop):
    with_figures(monkeypatch, 5.0, 3.0, 4.0, 4.5)

    def train(**how):
        model = build("realnvp", (4,), bits=None, hidden=8)
        config = TrainConfig(steps=6, evaluations=6, patience=2, lr=1e-2)
        return fit(model, points(), points(), config, tmp_path, device="cpu", **how)

    torch.manual_seed(0)
    if stop:
        assert not train(stop=lambda step: step == stop).finished
    run = train(resume=bool(stop))
    assert (run.finished, run.steps, run.best) == (True, 4, 3.0)
    best, last = (
        checkpoint.load(tmp_path / name).state_dict()
        for name in ("model.safetensors", "last.safetensors")
    )
    state = run.model.state_dict()
    assert all(torch.equal(t, best[name]) for name, t in state.items())
    assert any(not torch.equal(t, last[name]) for name, t in state.items())
    (row,) = rows(tmp_path, "info")
    assert row["message"].startswith("stopped early: 2 evaluations without improvement")
    assert train(resume=True).steps == 4


def test_a_loss_far_above_the_usual_causes_a_warning(tmp_path):
    values = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    values[3210] = 60
    config = TrainConfig(steps=240, batch_size=16, seed=1, evaluations=1, skip_above=1e9)
    fit(
        build("realnvp", (4,), bits=None, hidden=16),
        Dataset(values),
        Dataset(values[:100]),
        config,
        tmp_path,
        device="cpu",
    )
    steps = range(100, 240)
    hit = [s for s in steps if 3210 in data.batch_indices(4000, 16, seed=1, step=s)]
    warnings = rows(tmp_path, "warning")
    assert [row["step"] for row in warnings] == [s + 1 for s in hit]
