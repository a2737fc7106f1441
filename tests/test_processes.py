"""Several processes give the results of one: batches, figures and, up to rounding, weights."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from launched import LAUNCH
from musigma import checkpoint
from musigma.data import Dataset
from musigma.evaluation import evaluate, score
from musigma.processes import SINGLE_PROCESS, Processes, current_processes
from musigma.training import TrainConfig, fit
from musigma.zoo import build

# Data, models and configurations for both the test and its processes.
SHARED = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from musigma import data, memory
from musigma.data import Dataset
from musigma.evaluation import evaluate
from musigma.training import TrainConfig, fit, join, leave
from musigma.zoo import build

points = Dataset(np.random.default_rng(0).normal(size=(301, 5)).astype(np.float32) * 3 + 1)
digits = data.load("digits")

def flow():
    torch.manual_seed(0)
    return build("realnvp", (5,), bits=None, hidden=16)

def vae():
    torch.manual_seed(0)
    return build("vae", (1, 8, 8), net="mlp", width=16)

many = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32)
bad = int(data.batch_indices(1000, 15, seed=0, step=36)[2])  # after those that calibrate
many[bad] = 1e30

def train(out, steps=10, stop=None, points=points, **config):
    config = TrainConfig(
        steps=steps, batch_size=15, evaluations=2, optimizer="adam", lr=1e-3, **config
    )
    halt = lambda step: step == stop
    there = (out / "state.safetensors").exists()
    device = None if config.accumulate > 1 else "cpu"  # the best there is, or this
    return fit(flow(), points, points, config, out, device=device, resume=there, stop=halt)

class Means(torch.nn.Module):
    \"""The KL of a VAE's posterior, and a critic of its mean; the decoder has no gradient.\"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.critic = torch.nn.Linear(32, 1)

    def forward(self, record):
        (q,) = record.qs.values()
        kl = 0.5 * (q.mean**2 + q.variance - 1) - q.log_std
        return kl.sum(1) + self.critic(q.mean).sum(1).sigmoid()

    def critic_loss(self, record):
        (q,) = record.qs.values()
        return torch.nn.functional.softplus(-self.critic(q.mean)).sum(1)

    def critic_optimizer(self):
        return torch.optim.SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)

def train_means(out, **config):
    config = TrainConfig(steps=6, batch_size=15, evaluations=1, evaluate_on=20, lr=1e-3, **config)
    return fit(vae(), digits, digits, config, out, objective=Means(), device="cpu")

def train_optimal(out, **config):
    torch.manual_seed(0)
    options = {"width": 8, "likelihood": "gaussian", "std": "optimal"}
    model = build("vae", (1, 8, 8), net="conv", **options)
    config = TrainConfig(steps=4, batch_size=15, evaluations=1, evaluate_on=20, **config)
    fit(model, digits, digits, config, out, device="cpu")
    return next(b for name, b in model.named_buffers() if name.endswith("log_std")).item()
"""

PROCESS = """
processes = join("cpu")
figure = evaluate(vae(), digits, seed=3, processes=processes)
run = train(out / "two")
train(out / "parts", accumulate=3)
train(out / "shard", shard=True, save_every=1e-5)
train(out / "shard, parts", shard=True, accumulate=3, stop=4)
train(out / "shard, parts", shard=True, accumulate=3)
train(out / "resumed", shard=True, stop=4)
train(out / "shard, budget", shard=True, memory_budget="45KB")
train(out / "bad example", steps=40, shard=True, points=Dataset(many))
model = flow()

def fall_back(step):
    if processes.rank == 1 and step == 2:
        model.runner.fallbacks[0] = "made up"
    return step == 4

config = TrainConfig(steps=8, batch_size=15, memory="reversible")
fit(model, points, points, config, out / "fallbacks", device="cpu", stop=fall_back)
fallbacks = processes.gather(memory.fallbacks(model))
train_means(out / "means")
train_means(out / "means, parts", accumulate=2)
train_means(out / "means, shard", shard=True)
log_stds = [train_optimal(out / "optimal"), train_optimal(out / "optimal, shard", shard=True)]
calibrated = [p.tolist() for n, p in flow().named_parameters() if "bias" in n]
weights = [p.double().sum().item() for p in run.model.parameters()]
alike, gathered = processes.gather(weights), processes.gather(log_stds)
maxima = processes.maximum(processes.rank, -processes.rank)
if processes.is_main:
    (out / "fallbacks.json").write_text(json.dumps(fallbacks))
    (out / "results.json").write_text(json.dumps([figure, alike, maxima, processes.count]))
    (out / "log_stds.json").write_text(json.dumps(gathered))
leave()
"""

EACH = f"""
{SHARED}
{LAUNCH}
def each(out):
{textwrap.indent(PROCESS, "    ")}
launch(each, Path(sys.argv[1]))
"""

scope: dict = {}
exec(SHARED, scope)  # the very same definitions


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    command, env = [sys.executable, "-c", EACH, out], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return out


def weights(path):
    return torch.cat([p.flatten() for p in checkpoint.load(path).parameters()])


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_processes_end_with_the_same_weights(out):
    _, alike, maxima, count = json.loads((out / "results.json").read_text())
    assert count == 2
    assert alike[0] == alike[1]
    assert maxima == [1.0, 0.0]


def test_evaluation_does_not_depend_on_the_number_of_processes(out):
    figure, *_ = json.loads((out / "results.json").read_text())
    expected = evaluate(scope["vae"](), scope["digits"], seed=3)
    assert figure == json.loads(json.dumps(expected))
    assert figure["n"] == len(scope["digits"])


@pytest.mark.parametrize("several", ["two", "parts", "shard", "shard, parts", "shard, budget"])
def test_a_flow_without_noise_gets_the_same_weights(out, tmp_path, several):
    """15 examples per step are divided into 7 and 8; with "parts", each share into 3 parts."""
    start = torch.cat([p.flatten() for p in scope["flow"]().parameters()])
    scope["train"](tmp_path / "one")
    one, two = (
        weights(tmp_path / "one/last.safetensors"),
        weights(out / several / "last.safetensors"),
    )
    assert (one - start).abs().max() > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=2e-6)


def test_another_number_of_processes_resumes_with_the_same_batches(out, tmp_path):
    scope["train"](tmp_path / "one")
    assert len(losses(out / "resumed")) == 4
    run = scope["train"](out / "resumed")
    assert (run.finished, run.steps) == (True, 10)
    expected = weights(tmp_path / "one/last.safetensors")
    torch.testing.assert_close(
        weights(out / "resumed/last.safetensors"), expected, rtol=1e-4, atol=2e-6
    )
    assert losses(out / "resumed")[4:] == pytest.approx(losses(tmp_path / "one")[4:], rel=1e-5)


def test_a_bad_example_is_traced_with_sharded_weights(out):
    rows = map(json.loads, (out / "bad example/metrics.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if row["kind"] == "skipped")
    assert row["step"] == 37
    assert row["reason"].startswith("output of ")
    assert row["examples"] == [scope["bad"]]


def test_a_fallback_of_one_process_applies_to_all(out):
    made_up = {"layers.0": "made up"}
    assert json.loads((out / "fallbacks.json").read_text()) == [made_up, made_up]
    rows = map(json.loads, (out / "fallbacks/metrics.jsonl").read_text().splitlines())
    (warning,) = (row for row in rows if row["kind"] == "warning")
    assert (warning["step"], warning["message"][:9]) == (2, "layers.0 ")
    header, _ = checkpoint.verified(out / "fallbacks/state.safetensors")
    assert header["progress"]["fallbacks"] == made_up


@pytest.mark.parametrize("several", ["means", "means, parts", "means, shard"])
def test_an_objective_with_a_critic_gets_the_same_weights(out, tmp_path, several):
    """The objective does not use the evidence, and no gradient reaches the decoder."""
    scope["train_means"](tmp_path)
    _, one = checkpoint.verified(tmp_path / "state.safetensors")
    _, two = checkpoint.verified(out / several / "state.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6, msg=name)
    start = scope["Means"]().critic.weight
    assert (one["objective/critic.weight"] - start).abs().max() > 1e-4
    assert "objective-optimizer/critic.weight:momentum_buffer" in one


def test_after_step_has_the_same_effect_in_all_processes(out):
    first, second = json.loads((out / "log_stds.json").read_text())
    assert first == second
    assert 0 not in first


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_scores_of_all_shares_are_the_scores_of_one_process(count):
    model, some = scope["vae"](), scope["digits"].subset(range(333))
    whole = score(model, some, seed=5)
    parts = [score(model, some, seed=5, processes=Processes(r, count)) for r in range(count)]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts if part])
        assert np.array_equal(joined, values), name


def test_parts_of_a_batch_add_up(tmp_path):
    scope["train"](tmp_path / "one")
    scope["train"](tmp_path / "four", accumulate=4)
    torch.testing.assert_close(
        weights(tmp_path / "four/last.safetensors"),
        weights(tmp_path / "one/last.safetensors"),
        rtol=1e-4,
        atol=2e-6,
    )


def test_a_memory_budget_chooses_the_parts(tmp_path):
    from musigma.training.hardware import number_of_parts

    model = build("glow", (3, 16, 16), levels=2, depth=2, hidden=32)
    levels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)

    def parts(**options):
        return number_of_parts(model, Dataset(levels), TrainConfig(**options))

    counts = [
        parts(batch_size=64, memory_budget=budget) for budget in ("10GB", "30MB", "4MB", "2MB")
    ]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] > 8
    refusal = r"weights and one example take ([\d.]+MB), more than 100KB"
    with pytest.raises(ValueError, match=refusal) as refused:
        parts(batch_size=32, memory_budget="100KB")
    (least,) = re.findall(refusal, str(refused.value))
    assert parts(batch_size=32, memory_budget=least) == 32


def test_a_single_process_does_not_communicate():
    assert current_processes() == SINGLE_PROCESS
    assert SINGLE_PROCESS.gather("x") == ["x"]
    assert SINGLE_PROCESS.maximum(1.0, 2.0) == (1.0, 2.0)
    shares = [Processes(rank, 7).share(23) for rank in range(7)]
    assert np.concatenate([np.arange(23)[share] for share in shares]).tolist() == list(range(23))


def test_too_many_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("musigma.training.checks.current_processes", lambda: Processes(0, 9))
    points = Dataset(np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32))
    with pytest.raises(ValueError, match="batch_size: 9 processes cannot share 8 examples"):
        fit(scope["flow"](), points, points, TrainConfig(batch_size=8), tmp_path, device="cpu")
