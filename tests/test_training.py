"""Training: budgets, objectives, skipped steps, and resuming to the same bytes."""

import json
import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from musigma import checkpoint, data, objectives
from musigma.data import Dataset
from musigma.distributions import OptimalGaussianHead, StandardNormal
from musigma.evaluation import evaluate
from musigma.gaussian import GaussianHead
from musigma.model import VAE, Prior
from musigma.nets import MLP
from musigma.trace import Evidence
from musigma.training import Progress, TrainConfig, TrainingError, fit
from musigma.zoo import architecture, build


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def warnings_in(folder, *, figures=False):
    """The warnings of a run, except those about its validation figures."""
    messages = [row["message"] for row in rows(folder) if row["kind"] == "warning"]
    return [m for m in messages if figures or "validation" not in m]


def small(name: str, **options):
    torch.manual_seed(0)
    return build(name, (1, 8, 8), **options)


MODELS = {
    "vae": {"net": "mlp", "width": 16, "latents": 4},
    "vae-flow-prior": {"net": "mlp", "width": 16, "latents": 4, "prior": "flow"},
    "vae-optimal": {"net": "conv", "width": 8, "likelihood": "gaussian", "std": "optimal"},
    "ladder": {"levels": 3, "latents": 2, "width": 8},
    "realnvp": {"levels": 1, "depth": 1, "hidden": 8},
    "glow": {"levels": 2, "depth": 1, "hidden": 8, "dequantize": "learned"},
}


def train(digits, folder, *, stop=None, resume=False, name="vae", watch=None, **config):
    model = small(name.split("-")[0], **MODELS[name])
    config = {"steps": 24, "batch_size": 16, "evaluations": 4, "evaluate_on": 40, **config}
    return fit(
        model,
        digits.split("train"),
        digits.split("validation"),
        TrainConfig(**config),
        folder,
        device="cpu",
        resume=resume,
        stop=None if stop is None else (lambda step: step == stop),
        watch=watch,
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- resuming


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_equals_an_uninterrupted_one_byte_for_byte(tmp_path, digits, name):
    train(digits, tmp_path / "whole", name=name)
    stopped = train(digits, tmp_path / "parts", name=name, stop=5)
    assert (stopped.finished, stopped.steps) == (False, 5)
    train(digits, tmp_path / "parts", name=name, stop=17, resume=True)
    finished = train(digits, tmp_path / "parts", name=name, resume=True)
    assert (finished.finished, finished.steps) == (True, 24)
    for file in ("last.safetensors", "model.safetensors"):
        whole, parts = ((tmp_path / run / file).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, f"{file} differs"
    timed = {"seconds", "examples_per_second"}  # all that may differ
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_different_seed_gives_another_model(tmp_path, digits):
    for seed in (0, 1):
        train(digits, tmp_path / str(seed), seed=seed)
    a, b = ((tmp_path / s / "last.safetensors").read_bytes() for s in "01")
    assert a != b


def test_resuming_after_an_incomplete_log_line_and_an_incomplete_save(tmp_path, digits):
    train(digits, tmp_path, stop=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    (tmp_path / ".state.safetensors.77.tmp").write_bytes(b"cut short")
    assert train(digits, tmp_path, resume=True).finished
    assert [r["step"] for r in rows(tmp_path) if r["kind"] == "train"] == list(range(1, 25))


def test_resume_without_a_state_is_refused(tmp_path, digits):
    with pytest.raises(ValueError, match="holds no state"):
        train(digits, tmp_path, resume=True)


def test_interrupt_stops_cleanly_and_restores_the_handler(tmp_path, digits):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(row):
        if row["step"] == 3 and row["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    run = train(digits, tmp_path, watch=interrupt)
    assert (run.finished, run.steps) == (False, 3)
    assert signal.getsignal(signal.SIGINT) is before
    assert train(digits, tmp_path, resume=True).finished


# -- budgets and schedules


def test_budgets(tmp_path, digits):
    n = len(digits.split("train"))
    assert train(digits, tmp_path / "a", steps=None, epochs=0.1).steps == math.ceil(0.1 * n / 16)
    run = train(digits, tmp_path / "b", steps=None, minutes=0.02)
    assert run.finished
    assert 1.2 <= run.seconds < 10


def test_share_and_learning_rate_follow_the_budget():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    assert config.share(Progress(step=25), 999) == 0.25
    assert config.learning_rate(4, 0.0) == pytest.approx(0.5)
    assert config.learning_rate(50, 0.5) == pytest.approx(0.5)
    assert config.learning_rate(99, 1.0) == pytest.approx(0.0)
    constant = TrainConfig(minutes=2, schedule="constant", warmup=0, lr=1.0)
    assert constant.share(Progress(seconds=30), 999) == 0.25
    assert constant.learning_rate(0, 0.9) == 1.0
    assert TrainConfig(epochs=2, batch_size=10).share(Progress(step=5), 50) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 5, "epochs": 1}, "epochs: the budget is already given as steps"),
        ({"optimizer": "sgd"}, "optimizer: expected adam or adamw or adamax"),
        ({"schedule": "step"}, "schedule: expected cosine or constant"),
        ({"lr": 0}, "lr: expected a positive"),
        ({"lr": float("nan")}, "lr: expected a positive"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"ema": 1.0}, "ema: expected"),
        ({"weight_decay": 0.1}, "weight_decay: only adamw has one"),
        ({"accumulate": 99}, "accumulate: a batch of 64 cannot have 99 parts"),
        ({"memory": "none"}, "memory: expected store or checkpoint or reversible"),
        ({"memory_budget": "much"}, "memory_budget: expected a size such as 4GB"),
        (
            {"memory_budget": "4GB", "accumulate": 2},
            "memory_budget: it determines the number of parts",
        ),
        ({"track": ["mlflow"]}, "track: expected tensorboard or trackio or wandb"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"shard": True, "memory": "reversible"}, "with shard, use checkpoint"),
        ({"k": 5, "beta": 2.0}, "beta: the objective iwae has no such option"),
    ],
)
def test_configuration_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_beta_is_refused_for_a_flow_before_anything_is_written(tmp_path, digits):
    with pytest.raises(ValueError, match="a flow has none"):
        train(digits, tmp_path / "run", name="glow", beta=2.0)
    assert not (tmp_path / "run").exists()


# -- objectives


def test_objectives_are_chosen_by_the_configuration():
    torch.manual_seed(0)
    e = Evidence(torch.randn(6), torch.rand(6, 3), torch.randn(6), torch.randn(6))
    assert torch.equal(TrainConfig().nats(e, 0.3), objectives.elbo(e))
    warm = TrainConfig(beta=2.0, kl_warmup=0.5)
    assert torch.equal(warm.nats(e, 0.25), objectives.beta_elbo(e, 1.0))
    assert torch.equal(warm.nats(e, 0.75), objectives.beta_elbo(e, 2.0))
    assert torch.equal(TrainConfig(free_bits=0.4).nats(e, 0), objectives.free_bits(e, 0.4))
    assert torch.equal(TrainConfig(k=3).nats(e, 0), objectives.iwae(e, 3))


@pytest.mark.parametrize(
    "objective", [{}, {"beta": 4.0}, {"free_bits": 2.0}, {"k": 4}, {"kl_warmup": 0.5}], ids=str
)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax"])
def test_the_figure_improves_with_every_objective(tmp_path, digits, objective, optimizer):
    run = train(digits, tmp_path, steps=120, lr=5e-3, warmup=10, optimizer=optimizer, **objective)
    figures = [r["bits_per_dim"] for r in rows(tmp_path) if r["kind"] == "evaluation"]
    assert figures[-1] < figures[0] - 0.5
    assert run.best == min(figures)


def test_a_trained_model_reaches_the_expected_range(tmp_path, digits):
    run = train(digits, tmp_path, steps=600, lr=5e-3, batch_size=64)
    figure = evaluate(run.model, digits.split("held-out"))
    # an untrained model is above 9; uniform over the 17 levels of the digits, log2(17) = 4.09
    assert 3.0 < figure["bits_per_dim"] < 4.6


# -- weights


def test_best_weights_and_last_weights(tmp_path, digits):
    run = train(digits, tmp_path)
    validation = digits.split("validation").subset(range(40))
    best = checkpoint.load(tmp_path / "model.safetensors")
    last = checkpoint.load(tmp_path / "last.safetensors")
    assert evaluate(best, validation)["bits_per_dim"] == run.best
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, last.state_dict()[name])
    assert not run.model.training


def test_the_average_is_a_running_average(tmp_path, digits):
    averaged = train(digits, tmp_path / "a", ema=0.99)
    plain = train(digits, tmp_path / "b", ema=0.0)
    pairs = zip(averaged.model.parameters(), plain.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_after_step_is_called_after_each_step_and_before_the_average(tmp_path, digits):
    model, calls = small("vae", **MODELS["vae-optimal"]), []
    head = next(m for m in model.modules() if isinstance(m, OptimalGaussianHead))
    head.after_step = lambda: calls.append(0) or OptimalGaussianHead.after_step(head)
    config = TrainConfig(steps=3, batch_size=16, evaluations=1, evaluate_on=40, ema=0.9)
    run = fit(model, digits.split("train"), digits.split("validation"), config, tmp_path)
    assert len(calls) == 3
    averaged = next(m for m in run.model.modules() if isinstance(m, OptimalGaussianHead))
    assert head.log_std == averaged.log_std != 0


def test_actnorm_is_calibrated_once_and_then_trained(tmp_path, digits):
    run = train(digits, tmp_path, name="glow", steps=2)
    flags = [m.calibrated for m in run.model.modules() if hasattr(m, "calibrated")]
    assert flags
    assert all(flags)


# -- steps that cannot be taken


@architecture
def brittle(shape, *, bits: int | None = None, often: float = 0.02):
    """A VAE whose decoder returns NaN for some latents."""

    class Brittle(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MLP(3, 2 * shape[0], hidden=[8])

        def forward(self, z):
            bad = torch.rand(()) < often
            return torch.where(bad, math.nan, 1.0) * self.net(z)

    encoder = GaussianHead(MLP(shape[0], 6, hidden=[8]), event_ndims=1)
    decoder = GaussianHead(Brittle(), event_ndims=1)
    return VAE(encoder, decoder, Prior(StandardNormal((3,))))


def points(n=200):
    return Dataset(np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32), name="points")


def test_a_step_that_is_not_finite_is_skipped_and_explained(tmp_path):
    both = points().split("train"), points().split("validation")
    run = fit(brittle((4,), often=0.1), *both, TrainConfig(steps=80), tmp_path, device="cpu")
    skipped = [r for r in rows(tmp_path) if r["kind"] == "skipped"]
    assert run.skipped == len(skipped) > 0
    assert run.steps == 80
    for row in skipped:
        assert row["reason"] == "output of decoder.net (Brittle) has nan"
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_training_stops_if_steps_keep_failing(tmp_path):
    both = points().split("train"), points().split("validation")
    with pytest.raises(
        TrainingError, match=r"20 steps in a row .* decoder\.net.* went back 3 times"
    ):
        fit(brittle((4,), often=1.0), *both, TrainConfig(steps=80), tmp_path, device="cpu")


def test_a_step_with_an_unusually_long_gradient_is_skipped(tmp_path):
    values = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    values[1234] = 1e7
    both = Dataset(values), Dataset(values[:100])
    config = TrainConfig(steps=260, batch_size=16, seed=1, evaluations=1)
    hits = [
        step
        for step in range(260)
        if 1234 in data.batch_indices(2000, 16, seed=1, step=step) and step >= 50
    ]
    run = fit(build("realnvp", (4,), bits=None, hidden=16), *both, config, tmp_path, device="cpu")
    skipped = [r for r in rows(tmp_path) if r["kind"] == "skipped"]
    assert [r["step"] - 1 for r in skipped] == hits
    assert run.skipped == len(hits) > 0
    assert all("the gradient has norm" in r["reason"] for r in skipped)


# -- conditioning


def test_labels_become_the_context(tmp_path, digits):
    model = build("glow", digits.spec(["label"]), levels=1, depth=1, hidden=8)
    run = fit(
        model,
        digits.split("train"),
        digits.split("validation"),
        TrainConfig(steps=3, evaluate_on=20),
        tmp_path,
        device="cpu",
    )
    assert run.finished
    unlabeled = Dataset(digits.x, name="plain")
    with pytest.raises(ValueError, match="conditioned on 10 classes"):
        fit(model, unlabeled, unlabeled, TrainConfig(steps=1), tmp_path / "x", device="cpu")


# -- hardware options


def test_low_precision_affects_only_networks(tmp_path, digits):
    seen = set()

    def spy(row):
        seen.add(row["kind"])

    run = train(digits, tmp_path / "low", name="vae-flow-prior", precision="bf16", watch=spy)
    full = train(digits, tmp_path / "full", name="vae-flow-prior")
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.skipped == 0
    assert run.best == pytest.approx(full.best, abs=0.1)
    low, high = ((tmp_path / f / "last.safetensors").read_bytes() for f in ("low", "full"))
    assert low != high


def test_fast_without_a_compiler_warns_and_continues(tmp_path, digits, monkeypatch):
    def nothing(*args, **how):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", nothing)
    run = train(digits, tmp_path, fast=True)
    assert run.finished
    assert warnings_in(tmp_path) == ["not compiled: no compiler here"]


def test_options_without_effect_cause_warnings_at_the_start(tmp_path, digits):
    few = digits.subset(range(40))
    n = len(few.split("train"))
    train(few, tmp_path, shard=True, steps=1)
    (message,) = warnings_in(tmp_path)
    assert message.startswith("shard: there are no other processes")
    for more in (0, 1):
        train(few, tmp_path, batch_size=n + more, steps=1)
        assert warnings_in(tmp_path) == more * [
            f"a batch of {n + 1} is more than all {n} training examples, so some occur more than "
            "once in every step"
        ]


def test_blocks_are_compiled_separately_and_other_models_as_a_whole(monkeypatch):
    from musigma.layers import Coupling
    from musigma.nets import ResBlock
    from musigma.training import hardware

    done = {}
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: done.update({self: how}))
    glow = small("glow", levels=1, depth=3, hidden=4)
    assert hardware.compile_blocks(glow, capture=True) is None
    assert [*done] == [m for m in glow.modules() if isinstance(m, Coupling | ResBlock)]
    assert not any(how.get("mode") for how in done.values())
    for capture, mode in ((False, None), (True, "reduce-overhead")):
        done.clear()
        vae = small("vae", net="mlp")
        assert hardware.compile_blocks(vae, capture=capture) is None
        assert {module: how["mode"] for module, how in done.items()} == {vae: mode}


@pytest.mark.slow
def test_steps_that_a_gpu_would_capture_are_the_same(monkeypatch, tmp_path, digits):
    from musigma.training import hardware

    train(digits, tmp_path / "plain", precision="bf16", steps=3)
    captured = partial(hardware.compile_blocks, capture=True)
    monkeypatch.setattr(hardware, "compile_blocks", lambda model, *, capture: captured(model))
    train(digits, tmp_path / "captured", fast=True, steps=3)
    losses = [
        [row["loss"] for row in rows(tmp_path / name) if row["kind"] == "train"]
        for name in ("plain", "captured")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_profile_is_written(tmp_path, digits):
    train(digits, tmp_path, profile=True)
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    assert any("aten::addmm" in event.get("name", "") for event in events)


@pytest.mark.parametrize(("steps", "error", "said"), [(5, None, "step 8"), (24, OSError, "full")])
def test_a_profile_that_cannot_be_written_causes_a_warning(
    monkeypatch, tmp_path, digits, steps, error, said
):
    def fail(profiler, path):
        raise error("the disk is full")

    if error:
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    assert train(digits, tmp_path, profile=True, steps=steps).steps == steps
    (message,) = warnings_in(tmp_path)
    assert said in message
    assert not (tmp_path / "profile.json").exists()


def test_trackers_receive_the_figures(tmp_path, digits):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(digits, tmp_path, track=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "musigma")).Reload()
    scalars = events.Scalars("train/bits_per_dim")
    logged = {r["step"]: r["bits_per_dim"] for r in rows(tmp_path) if r["kind"] == "train"}
    assert {s.step: s.value for s in scalars} == pytest.approx(logged, rel=1e-6)
    assert "evaluation/kl_0" in events.Tags()["scalars"]


def test_a_run_continues_without_a_tracker_that_fails(tmp_path, digits, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(tracker, values, step=None, **more):
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    assert train(digits, tmp_path, track=["tensorboard"]).steps == 24
    expected = ["tensorboard failed, so it is no longer used: no space left on device"]
    assert warnings_in(tmp_path) == expected


def test_a_tracker_that_is_not_installed_is_named(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="track: wandb is not installed: pip install wandb"):
        train(digits, tmp_path / "run", track=["wandb"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vae-conditional", "glow"])
def test_workers_change_nothing(tmp_path, digits, name):
    options, spec = {"net": "mlp", "width": 16, "latents": 4}, digits.spec(["label"])
    for workers in (0, 2):
        torch.manual_seed(0)
        model = build("vae", spec, **options) if "-" in name else small(name, **MODELS[name])
        config = TrainConfig(steps=12, batch_size=16, workers=workers, evaluate_on=20)
        parts = digits.split("train"), digits.split("validation")
        fit(model, *parts, config, tmp_path / str(workers), device="cpu")
    a, b = ((tmp_path / w / "last.safetensors").read_bytes() for w in "02")
    assert a == b


def test_a_reversible_run_with_fallbacks_resumes_to_the_same_bytes(tmp_path, digits):
    """A nearly singular mixing has no accurate inverse; the fallback is resumed too."""

    def flow():
        model = small("glow", levels=1, depth=2, hidden=4)
        with torch.no_grad():
            model.layers[5].log_scale[0] -= 9
        return model

    parts = digits.split("train"), digits.split("validation")
    config = TrainConfig(steps=8, batch_size=16, evaluate_on=20, memory="reversible")
    fit(flow(), *parts, config, tmp_path / "whole", device="cpu")
    for halt, resume in ((5, False), (99, True)):
        fit(
            flow(),
            *parts,
            config,
            tmp_path / "parts",
            device="cpu",
            resume=resume,
            stop=lambda step, halt=halt: step == halt,
        )
    (message,) = warnings_in(tmp_path / "parts")
    assert message.startswith("layers.1 is recomputed in segments from now on: inverted")
    whole, again = ((tmp_path / f / "last.safetensors").read_bytes() for f in ("whole", "parts"))
    assert whole == again
