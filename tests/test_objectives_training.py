"""Objectives by name, through `fit`: they train, are refused where they do not fit, resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from musigma import Dataset, TrainConfig, build, fit, objectives
from musigma.cli import main
from musigma.named import REGISTRIES
from musigma.objectives import FEATURES, OBJECTIVES
from musigma.trace import Evidence

STEPS = 100


@objectives.features
def edges():
    return nn.Conv2d(1, 4, 3)


def teardown_module():
    FEATURES.pop("edges")


def vectors():
    """Rows of rank two in five dimensions, with noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 2)) @ random.normal(size=(2, 5))
    return Dataset((x + 0.1 * random.normal(size=(300, 5))).astype(np.float32))


def pictures():
    """Bright squares on a dark ground."""
    random = np.random.default_rng(0)
    x = random.integers(0, 40, (200, 1, 8, 8))
    for image, i, j in zip(x, *random.integers(0, 5, (2, 200)), strict=True):
        image[0, i : i + 3, j : j + 3] += 180
    return Dataset(x.astype(np.uint8))


def train(objective, out, steps=STEPS, rows=None, stop=None, resume=False, **config):
    first = objective.split()[0]
    data = pictures() if first in ("adversarial", "perceptual", "equivariance") else vectors()
    torch.manual_seed(0)
    if first == "equivariance":
        options = {"latents": 2, "widths": (8, 8), "groups": 4, "attend_middle": False}
        model = build("autoencoder_kl", data.spec(), **options)
    elif data.bits:
        model = build("vae", data.spec(), latents=3, width=4)
    else:
        model = build("vae", data.spec(), latents=3, width=16)
    options = {"steps": steps, "batch_size": 32, "evaluations": 2, "lr": 5e-3, "warmup": 5}
    return fit(
        model, data.split("train"), data.split("validation"),
        TrainConfig(objective=objective, **{**options, **config}), out,
        device="cpu", watch=(rows if rows is not None else []).append, resume=resume, stop=stop,
    )  # fmt: skip


OPTIONS = {
    "capacity": " gamma=5.0 capacity=3.0",
    "equivariance": " weight=0.5",
    "factor-vae": " width=16",
    "free-bits": " free=0.2 per=dimension",
    "info-vae": " scale=20.0",
    "iwae": " k=4",
    "perceptual": " features=edges",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_steps(name, tmp_path):
    rows = []
    run = train(name + OPTIONS.get(name, ""), tmp_path, steps=4, rows=rows)
    assert run.skipped == 0
    assert all(np.isfinite(row["loss"]) for row in rows if row["kind"] == "train")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        *(name + OPTIONS.get(name, "") for name in OBJECTIVES),
        "adversarial weight=0.5 width=8 + perceptual features=edges + beta-elbo beta=0.5",
        "dip-ii + factor-vae width=16",
        "beta-tc estimator=mws",
        "reweighted-wake-sleep phase=sleep",
    ],
)
def test_every_objective_falls_in_a_hundred_steps(text, tmp_path):
    rows = []
    run = train(text, tmp_path, rows=rows)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert run.skipped == 0
    assert np.mean(losses[-5:]) < losses[0] - 5


@pytest.mark.parametrize("text", ["factor-vae width=8", "adversarial width=4 + dip-i"])
def test_a_critic_by_name_is_saved_and_resumed(text, tmp_path):
    for folder, stop, resume in (("whole", 99, False), ("parts", 3, False), ("parts", 99, True)):
        train(
            text, tmp_path / folder, steps=6, resume=resume,
            stop=lambda step, stop=stop: step >= stop, ema=0.9,
        )  # fmt: skip
    for file in ("last.safetensors", "model.safetensors"):
        whole, parts = (tmp_path / folder / file for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_shortcuts_are_options_of_the_objective():
    torch.manual_seed(0)
    e = Evidence(torch.randn(6), torch.rand(6, 3), torch.randn(6), torch.randn(6))
    found = TrainConfig(objective="renyi alpha=0.3", k=3).nats(e, 0.0)
    assert torch.equal(found, objectives.renyi(e, 3, alpha=0.3))
    found = TrainConfig(objective="free_bits free=0.4", beta=2.0, kl_warmup=0.5).nats(e, 0.25)
    assert torch.equal(found, objectives.free_bits(e, 0.4, beta=1.0))
    assert TrainConfig(objective="miwae m=3", k=4).chosen.draws == 12


def test_the_rate_warms_up_in_a_sum(tmp_path):
    """Its weight is zero at the first step, so the loss is that of the distortion alone."""
    losses = []
    for objective in ("beta-elbo beta=0.0 + beta-elbo", "beta-elbo beta=0.5 + beta-elbo"):
        rows = []
        train(objective, tmp_path / str(len(losses)), steps=2, rows=rows, kl_warmup=1.0)
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] < losses[1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "beta-tc beta=6", "beta": 2.0}, "objective: beta is given twice"),
        ({"objective": "factor-vae", "beta": 2.0}, "beta: the objective factor-vae has no such"),
        ({"objective": "dip-i", "kl_warmup": 0.1}, "kl_warmup: the objective dip-i has no such"),
        ({"objective": "stl", "k": 4}, "k: the objective stl has no such option"),
        ({"objective": "beta-tc free=1"}, "objective: beta-tc takes .* got 'free=1'"),
        ({"objective": "betatc"}, "objective: there is no .*; did you mean 'beta-tc'"),
        ({"objective": "dreg", "shard": True}, "shard: the objective dreg needs whole weights"),
        ({"objective": "elbo + beta-ct"}, "objective: there is no .*; did you mean 'beta-tc'"),
    ],
)
def test_options_that_an_objective_lacks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta-tc estimator=mean", "estimator: expected 'mss' or 'mws'"),
        ("perceptual", "features: perceptual needs a feature network"),
        ("wae-mmd kernel=linear", "kernel: expected 'imq' or 'rbf'"),
        ("equivariance", "latents with height and width"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(text, message, tmp_path):
    data = vectors()
    model = build("vae", data.spec(), latents=3, width=16)
    config = TrainConfig(steps=2, objective=text)
    both = data.split("train"), data.split("validation")
    with pytest.raises(ValueError, match=message):
        fit(model, *both, config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_objective_is_tried_on_the_posterior_that_training_has(tmp_path):
    data = vectors()
    model = build("rae", data.spec(), latents=3, width=16, penalty="spectral")
    before = {name: t.clone() for name, t in model.named_buffers()}
    both, config = (data.split("train"), data.split("validation")), TrainConfig(steps=2)
    with pytest.raises(ValueError, match=r"beta-tc needs latents .* of PointMass"):
        fit(model, *both, replace(config, objective="beta-tc"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert before
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def test_a_flow_refuses_objectives_of_posteriors(tmp_path):
    data = vectors()
    model = build("maf", data.spec(), hidden=8, depth=1)
    config = TrainConfig(steps=2, objective="swae")
    both = data.split("train"), data.split("validation")
    with pytest.raises(ValueError, match="swae is for models with a posterior and a likelihood"):
        fit(model, *both, config, tmp_path / "run", device="cpu")


def test_objectives_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = vectors().take(np.arange(120))
    np.savetxt("table.csv", x, "%.5f", ",", header="a,b,c,d,e", comments="")
    words = ["train", "vae", "table.csv", "--latents", "2", "--width", "8", "--steps", "4"]
    words += ["--evaluations", "1", "--out", "run"]
    main([*words, "--objective", "factor-vae width=8 gamma=2.5"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["train"]["objective"] == "factor-vae width=8 gamma=2.5"
    main(["train", "--resume", "run"])
    capsys.readouterr()
    main(["list", "objective", "--json"])
    listed = json.loads(capsys.readouterr().out)["objective"]
    assert [entry["name"] for entry in listed] == sorted(OBJECTIVES)
    about = {entry["name"]: entry["about"] for entry in listed}
    built_in = [n for n, f in OBJECTIVES.items() if f.__module__.startswith("musigma")]
    assert all(about[name] for name in built_in)
    with pytest.raises(SystemExit):
        main(["list", "nothing"])
    assert "list: expected one of" in capsys.readouterr().err
    main(["list", "posteriors"])
    listed = capsys.readouterr().out
    assert "low-rank rank=4" in listed
    assert "musigma list flow" in listed
    for name in list(FEATURES):
        monkeypatch.delitem(FEATURES, name)
    main(["list", "features"])
    assert "FILE.py:NAME" in capsys.readouterr().out
    assert main(["list", "--help"]) is None
    shown = capsys.readouterr().out
    assert all(name in shown for name in REGISTRIES)
    with pytest.raises(SystemExit):
        main([*words[:-1], "other", "--prior", "ncsf"])
    shown = capsys.readouterr().err
    assert "prior: there is no 'ncsf'; known are" in shown
    assert "auto, and the flows of `musigma list flow`" in shown
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef waves():\n    return torch.sin\n\n\n"
        "def shifted(record, *, by=1.0):\n    return by - record.terms.elbo\n"
    )
    try:
        words[-1] = "mine"
        main([*words, "--objective", "perceptual features=mine.py:waves weight=2 + elbo"])
        saved = json.loads((tmp_path / "mine" / "config.json").read_text())
        assert saved["train"]["objective"] == "perceptual features=waves weight=2 + elbo"
        words[-1] = "shifted"
        main([*words, "--objective", "mine.py:shifted by=3.0"])
    finally:
        FEATURES.pop("waves", None)
        OBJECTIVES.pop("shifted", None)
