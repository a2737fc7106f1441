"""Defaults for vectors given numbers, and what users give in their place."""

import json
import re

import numpy as np
import pytest
import torch

from musigma import Spec, TrainConfig, Variable, build, checkpoint
from musigma.cli import main
from musigma.layers import Autoregressive, Coupling
from musigma.nets import Embedding, NormalScores, Quantiles
from musigma.training import conditional_config, given_options

NUMBERS = Spec((3,), context=(Variable("a", (2,)), Variable("b"), Variable("c", classes=3)))


def kinds(model):
    return {type(layer) for layer in model.model.layers} & {Autoregressive, Coupling}


def test_nsf_given_numbers():
    model = build("nsf", NUMBERS, depth=2)
    assert kinds(model) == {Autoregressive}
    assert isinstance(model.embedding, Quantiles)
    assert {"kind", "permutation", "embed"} <= model.config["options"].keys()
    again = checkpoint.rebuild(model.config)
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("options", [{"kind": "coupling"}, {"kind": "autoregressive"}])
def test_a_config_of_before_builds_what_it_did(options):
    model = build("nsf", NUMBERS, depth=1, **options)  # as `kind` is in every config
    assert isinstance(model.embedding, Embedding)
    assert model.config["options"]["permutation"] == "lu"
    assert "embed" not in model.config["options"]


def test_what_is_given_counts():
    model = build("nsf", NUMBERS, depth=1, embed="mlp features=5", permutation="lu")
    assert kinds(model) == {Autoregressive}
    assert model.embedding.features == 5
    assert model.config["options"]["permutation"] == "lu"


@pytest.mark.parametrize(
    "spec",
    [Spec((3,)), Spec((3,), context=(Variable("c", classes=3),)), Spec((3,), levels=4)],
    ids=["no context", "classes", "levels"],
)
def test_others_keep_their_defaults(spec):
    model = build("nsf", spec, depth=1)
    assert model.config["options"]["kind"] == "coupling"
    assert model.config["options"]["permutation"] == "lu"


def test_scores_are_normal_and_do_not_depend_on_units():
    torch.manual_seed(0)
    x = torch.randn(5000, 2)
    layer, other = NormalScores(2), NormalScores(2)
    layer.calibrate(x)
    other.calibrate(x.exp())
    y = layer(x)
    assert (y.mean(0).abs() < 0.03).all()
    assert ((y.std(0) - 1).abs() < 0.05).all()
    assert (y - x).abs().quantile(0.9) < 0.1
    assert (other(x.exp()) - y).abs().quantile(0.99) < 0.05


def test_scores_of_counts_are_those_of_mean_ranks():
    counts = torch.tensor([0.0] * 50 + [1.0] * 30 + [2.0] * 20)[:, None]
    layer = NormalScores(1, knots=100)
    layer.calibrate(counts)
    found = layer(torch.tensor([[0.0], [1.0], [2.0]])).flatten()
    expected = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.25, 0.65, 0.9]))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_a_constant_column_and_values_outside_are_finite():
    layer = NormalScores(2)
    layer.calibrate(torch.stack([torch.ones(100), torch.arange(100.0)], 1))
    y = layer(torch.tensor([[1.0, -1e30], [0.0, 1e30], [2.0, 50.0]]))
    assert y.isfinite().all()
    assert y[0, 1] < -2 < 2 < y[1, 1]


def test_weight_decay_falls_with_the_number_of_examples():
    assert conditional_config(1000, 8).weight_decay == pytest.approx(1.6)
    assert conditional_config(10_000, 8).weight_decay == pytest.approx(0.16)
    assert conditional_config(100, 100).weight_decay == 2.5
    assert conditional_config(1000, 8, optimizer="adam").weight_decay == 0
    assert conditional_config(1000, 8, weight_decay=0.0).weight_decay == 0
    timed = conditional_config(1000, 8, minutes=2.0, lr=1e-3)
    assert (timed.steps, timed.minutes, timed.lr) == (None, 2.0, 1e-3)


def test_options_that_are_given():
    assert given_options(TrainConfig()) == {}
    assert given_options(TrainConfig(minutes=2, lr=1e-3)) == {"minutes": 2, "lr": 1e-3}


@pytest.fixture
def pairs(tmp_path):
    random = np.random.default_rng(0)
    theta = random.uniform(-1, 1, (300, 2))
    x = theta @ random.normal(size=(2, 3)) + 0.1 * random.normal(size=(300, 3))
    path = tmp_path / "sims.csv"
    rows = np.concatenate([theta, x], 1)
    np.savetxt(path, rows, delimiter=",", header="a,b,x_0,x_1,x_2", comments="")
    return str(path)


def test_the_command_says_what_it_chose(pairs, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "nsf", pairs, "--of", "a", "--of", "b", "--given", "x_*"]
    command += ["--out", str(out), "--depth", "1", "--hidden", "16"]
    command += ["--steps", "30", "--lr", "0.01"]
    main([*command, "--device", "cpu"])
    text = capsys.readouterr()
    words = " ".join((text.out + text.err).split())
    assert "at most 30 steps; ends when the validation figure has not improved" in words
    assert re.search(
        r"given numbers: --kind autoregressive --permutation reverse --embed quantile "
        r"--batch-size 50 --optimizer adamw --weight-decay 2.\d+ --ema 0.99",
        words,
    )
    saved = json.loads((out / "config.json").read_text())
    assert saved["train"]["optimizer"] == "adamw"
    assert saved["train"]["lr"] == 0.01
    assert saved["model"]["options"]["kind"] == "autoregressive"
    assert saved["asked"]["train"]["batch_size"] == TrainConfig().batch_size
    main([*command, "--device", "cpu", "--auto-resume"])  # the same options continue the run


def test_an_option_that_is_given_its_usual_value_is_kept(pairs, tmp_path, capsys):
    out, usual = tmp_path / "run", TrainConfig()
    command = ["train", "nsf", pairs, "--of", "a", "--of", "b", "--given", "x_*"]
    command += ["--out", str(out), "--depth", "1", "--hidden", "16", "--steps", "4"]
    command += [f"--batch-size={usual.batch_size}", "--optimizer", usual.optimizer]
    main([*command, "--device", "cpu"])
    saved = json.loads((out / "config.json").read_text())["train"]
    assert (saved["batch_size"], saved["optimizer"]) == (usual.batch_size, usual.optimizer)
    assert (saved["weight_decay"], saved["ema"]) == (0, 0.99)
    capsys.readouterr()
