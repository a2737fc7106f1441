"""Files of every released format load and give the same results. The golden files stay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from musigma import TrainConfig, build, checkpoint, fit
from musigma.cli import main
from musigma.data import Dataset

GOLDEN = Path(__file__).parent / "golden" / "formats"
MODELS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_format_1(name):
    """Format 1: latents, decoded data and nats equal those at the time of writing."""
    model, extra = checkpoint.read(GOLDEN / f"{name}.safetensors")
    assert extra == {"note": "made by format musigma/1"}
    expected = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    x, context = expected["x"], expected.get("context")
    latents = model.encode(x, context, mode=True)
    for i, z in enumerate(latents):
        torch.testing.assert_close(z, expected[f"latent_{i}"], rtol=1e-4, atol=1e-4)
    decoded = model.decode(latents, context)
    torch.testing.assert_close(decoded, expected["decoded"], rtol=1e-4, atol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(model.elbo(x, context), expected["nats"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_format_1_are_saved_in_the_present_format(name, tmp_path):
    model = checkpoint.load(GOLDEN / f"{name}.safetensors")
    checkpoint.save(model, tmp_path / "again.safetensors")
    again = checkpoint.load(tmp_path / "again.safetensors")
    assert again.spec == model.spec
    state = again.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_a_posterior_that_sbi_trained():
    model = checkpoint.load(GOLDEN.parent / "sbi" / "npe.safetensors")
    stored = np.load(GOLDEN.parent / "sbi" / "npe.npz")
    theta, x, log_prob = (torch.from_numpy(stored[name]) for name in ("theta", "x", "log_prob"))
    torch.testing.assert_close(model.log_prob(theta, x), log_prob, rtol=1e-4, atol=1e-3)
    given = model.as_distribution(x)
    assert given.support.check(given.sample((50,))).all()


# -- a run folder that the command line of format 1 wrote: 3 steps of a VAE on `digits`


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A copy of the run folder, in the working directory."""
    pytest.importorskip("sklearn")
    shutil.copytree(GOLDEN / "digits", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def call(words: str) -> None:
    main(words.split())


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_evaluates_to_the_figure_in_its_log(old_run, capsys):
    call("evaluate run digits --split validation --json")
    figure, logged = json.loads(capsys.readouterr().out), rows(old_run)[-1]
    assert logged["kind"] == "evaluation"
    assert (figure["n"], figure["bound"]) == (logged["n"], logged["bound"])
    for name in ("bits_per_dim", "nats", "standard_error"):
        assert figure[name] == pytest.approx(logged[name], rel=1e-6)


def test_latents_and_directions_of_an_old_run_do_not_change(old_run, capsys):
    call("encode run digits --out z.npz")
    call("direction run digits --positive 3 --out direction.npz")
    for name, old in (("z.npz", "latents.npz"), ("direction.npz", "direction.npz")):
        with np.load(name) as found, np.load(old_run / old) as expected:
            for key in expected.files:
                if expected[key].dtype.kind == "f":
                    np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-6)
                else:
                    assert np.array_equal(found[key], expected[key])


def test_old_latents_and_directions_are_usable(old_run, capsys):
    model, n = checkpoint.load(old_run / "model.safetensors"), 160
    call("decode run run/latents.npz --out x.npy")
    with np.load(old_run / "latents.npz") as latents, torch.no_grad():
        expected = model.decode([torch.from_numpy(latents["z0"])])
    assert np.array_equal(np.load("x.npy"), expected.numpy())
    assert expected.shape == (n, 1, 8, 8)
    call("edit run digits --n 3 --direction run/direction.npz --out edited.npy")
    assert np.load("edited.npy").shape == (3, 5, 1, 8, 8)
    call("info run")
    call("sample run --n 2 --out samples.npy")
    assert np.load("samples.npy").shape == (2, 1, 8, 8)
    assert "vae for 1x8x8" in capsys.readouterr().out


def test_resuming_a_finished_old_run_changes_nothing(old_run, capsys):
    before, log = load_file(old_run / "model.safetensors"), rows(old_run)
    call("train --resume run --device cpu")
    after = load_file(old_run / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows(old_run) == log


def test_an_old_run_is_resumed(old_run, capsys):
    log = rows(old_run)
    config = (old_run / "config.json").read_text()
    (old_run / "config.json").write_text(config.replace('"steps": 3', '"steps": 4'))
    call("train --resume run --device cpu")
    assert rows(old_run)[: len(log)] == log
    added = rows(old_run)[len(log) :]
    assert [(row["step"], row["kind"]) for row in added] == [(4, "train"), (4, "evaluation")]
    assert json.loads((old_run / "evaluation.json").read_text())["n"] == 160


def test_the_state_of_a_run_of_format_1_resumes(tmp_path):
    """State format 1: the second half of the run has the same losses as at the time."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "expected.json").read_text())
    i = np.arange(600, dtype=np.float32).reshape(-1, 3)
    x = np.sin(i * [0.7, 1.3, 0.31] + i**0.5).astype(np.float32)
    data = Dataset(x, name="sines")
    model = build("maf", (3,), bits=None, depth=2, hidden=8)
    config = TrainConfig(steps=12, batch_size=16, warmup=2, evaluations=2)
    parts = data.split("train"), data.split("validation")
    run = fit(model, *parts, config, tmp_path / "run", device="cpu", resume=True)
    assert (run.steps, run.finished) == (12, True)
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    figures = [r["bits_per_dim"] for r in rows(tmp_path / "run") if r["kind"] == "evaluation"]
    assert figures == pytest.approx(expected["evaluations"], rel=1e-4)


def test_an_old_run_of_a_conditional_model_is_resumed(tmp_path, monkeypatch, capsys):
    """Its split priors had no input for the context; they have one now, with weights of zero."""
    pytest.importorskip("sklearn")
    shutil.copytree(GOLDEN / "digits_conditional", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    call("evaluate run digits --split validation --json")
    figure, logged = json.loads(capsys.readouterr().out), rows(tmp_path / "run")[-1]
    assert figure["bits_per_dim"] == pytest.approx(logged["bits_per_dim"], rel=1e-6)
    config = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/config.json").write_text(config.replace('"steps": 3', '"steps": 4'))
    call("train --resume run --device cpu")
    assert [row["step"] for row in rows(tmp_path / "run")[-2:]] == [4, 4]
    assert abs(rows(tmp_path / "run")[-1]["bits_per_dim"] - logged["bits_per_dim"]) < 0.1
