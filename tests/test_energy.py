"""Training by an unnormalized density, its evidence, and importance weights."""

import json
import math

import numpy as np
import pytest
import torch

from musigma import Dataset, TrainConfig, build, checkpoint
from musigma.cli import main
from musigma.data import Given
from musigma.energy import EvidenceBound, fit_energy, weigh
from musigma.testing import randomized

MIX = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 1.5]])
CONFIG = {"batch_size": 256, "lr": 5e-3, "evaluations": 2, "ema": 0.98}


def skewed(x):
    """log p̃ of MIX times (u_0, u_1, u_2 + u_0² / 2), u standard normal; log Z is 1 + log norm."""
    u = torch.linalg.solve_triangular(MIX.to(x), x.T, upper=False).T
    u = torch.cat([u[:, :2], u[:, 2:] - u[:, :1] ** 2 / 2], 1)
    return 1 - u.square().sum(1) / 2


LOG_Z = 1 + 1.5 * math.log(2 * math.pi) + math.log(MIX.diagonal().prod())


def test_a_flow_learns_a_density_and_its_evidence(tmp_path):
    torch.manual_seed(0)
    flow = build("nsf", (3,), bits=None, depth=3, hidden=16)
    before = weigh(flow, skewed, 4000)
    run = fit_energy(
        flow, skewed, TrainConfig(steps=200, **(CONFIG | {"lr": 1e-2})), tmp_path / "run"
    )
    after = weigh(run.model, skewed, 4000)
    assert after.ess > 3000 > 4 * before.ess
    assert abs(after.log_evidence - LOG_Z) < 4 * after.log_evidence_error < 0.1
    second = after.mean(after.x.square())
    expected = (MIX @ MIX.T).diagonal() + torch.tensor([0.0, 0.0, MIX[2, 2] ** 2 * (3 / 4)])
    torch.testing.assert_close(second.float(), expected, rtol=0.15, atol=0.05)
    again = checkpoint.load(tmp_path / "run" / "model.safetensors")
    x = torch.randn(5, 3)
    assert torch.equal(again.log_prob(x), run.model.log_prob(x))


def test_the_bound_and_its_gradient_are_those_of_the_reverse_kl():
    """For a Gaussian target and a linear flow, all is in closed form."""
    torch.manual_seed(0)
    flow = randomized(build("maf", (3,), bits=None, depth=1, hidden=4, hidden_layers=0))
    bound = EvidenceBound(flow, skewed)
    evidence = bound(torch.zeros(20_000, 3, dtype=torch.float64))
    x, log_q = flow.sample_and_log_prob(20_000)
    direct, found = (skewed(x) - log_q).detach(), evidence.elbo.detach()
    error = math.sqrt(float(direct.var() + found.var()) / 20_000)
    assert abs(float(direct.mean() - found.mean())) < 5 * error
    assert float(found.mean()) < LOG_Z
    weights = [p for p in flow.parameters() if p.requires_grad]
    torch.manual_seed(1)
    x, log_q = flow.rsample_and_log_prob(50)
    expected = torch.autograd.grad((skewed(x) - log_q).mean(), weights, materialize_grads=True)
    torch.manual_seed(1)
    elbo = bound(torch.zeros(50, 3, dtype=torch.float64)).elbo.mean()
    found = torch.autograd.grad(elbo, weights, materialize_grads=True)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert any(bool(want.abs().sum() > 0) for want in expected)


def test_weights_of_the_target_itself_are_constant():
    flow = randomized(build("nsf", (3,), bits=None, depth=2, hidden=8))
    weighted = weigh(flow, lambda x: flow.log_prob(x) + 2.5, 500)
    assert weighted.log_evidence == pytest.approx(2.5, abs=1e-9)
    assert weighted.ess == pytest.approx(500)
    assert weighted.ess_error == pytest.approx(0, abs=1e-6)


def test_errors_of_evidence_and_effective_size_are_those_of_repetitions():
    """For q = N(0, 1)² and p = N(0, s²)², weights have a closed form."""
    torch.manual_seed(1)
    flow = build("nsf", (2,), bits=None, depth=1, hidden=4, norm=False, permutation="reverse")
    s = 0.8

    def target(x):
        return -x.square().sum(1) / (2 * s**2)

    runs = [weigh(flow, target, 500) for _ in range(200)]
    truth = 2 * math.log(s * math.sqrt(2 * math.pi))
    estimates = np.array([r.log_evidence for r in runs])
    assert abs(estimates.mean() - truth) < 0.01
    assert np.mean([r.log_evidence_error for r in runs]) == pytest.approx(estimates.std(), rel=0.2)
    sizes = np.array([r.ess for r in runs])
    share = s**2 * (2 - s**2)  # (E w)² / E w²
    assert sizes.mean() == pytest.approx(500 * share, rel=0.02)
    assert np.mean([r.ess_error for r in runs]) == pytest.approx(sizes.std(), rel=0.25)


def test_a_conditional_flow_is_trained_over_its_contexts(tmp_path):
    torch.manual_seed(0)
    flow = build("nsf", (2,), bits=None, depth=2, hidden=16, context=1)
    shift = np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32)
    rows = np.random.default_rng(1).normal(size=(1000, 2)).astype(np.float32)
    data = Dataset(rows, given={"context": Given(shift)})
    run = fit_energy(
        flow,
        lambda x, c: -(x - c).square().sum(1) / 2,
        TrainConfig(steps=250, **CONFIG),
        tmp_path / "run",
        start=data,
    )
    for at in (-1.0, 1.0):
        context = torch.tensor([[at]])
        weighted = weigh(run.model, lambda x, c: -(x - c).square().sum(1) / 2, 2000, context)
        assert weighted.ess > 1800
        assert float(weighted.mean(weighted.x).mean()) == pytest.approx(at, abs=0.1)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (lambda x: x.sum(), "shape \\(256,\\)"),
        (lambda x: -x.square().sum(1).detach(), "no gradient"),
        (lambda x: x[:, 0].log(), "is nan for"),
        (lambda x: torch.where(x[:, 0] > 0, x.sum(1), -math.inf), "--bounds"),
    ],
)
def test_densities_that_cannot_be_trained_on_are_refused(density, message, tmp_path):
    flow = build("nsf", (2,), bits=None, depth=1, hidden=4)
    with pytest.raises(ValueError, match=message):
        fit_energy(flow, density, TrainConfig(steps=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_a_bound_only_is_refused():
    with pytest.raises(TypeError, match="energy"):
        EvidenceBound(build("vae", (3,), bits=None, latents=2, width=4), skewed)


def test_weights_that_are_zero_or_not_finite():
    flow = build("nsf", (2,), bits=None, depth=1, hidden=4)
    with pytest.raises(ValueError, match="all zero"):
        weigh(flow, lambda x: torch.full((len(x),), -math.inf), 10)
    with pytest.raises(ValueError, match="not finite"):
        weigh(flow, lambda x: torch.full((len(x),), math.nan), 10)
    half = weigh(flow, lambda x: torch.where(x[:, 0] > 0, 0.0, -math.inf), 1000)
    assert 0 < half.ess < 900


DENSITY = '''
import torch


def box(x):
    """The log density of a normal and a beta variable, unnormalized."""
    return -(((x[:, 0] - 3) / 0.2) ** 2) / 2 + 2 * torch.log(x[:, 1]) + torch.log(2 - x[:, 1])


nothing = 3
'''
BOUNDS = "[bounds]\na = [2.0, 4.0]\nb = [0.0, 2.0]\n"
BOX = math.log(0.2 * math.sqrt(2 * math.pi)) + math.log(2**4 / 12)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "density.py").write_text(DENSITY)
    (tmp_path / "prior.toml").write_text(BOUNDS)
    words = ["--bounds", "prior.toml", "--depth", "2", "--hidden", "16", "--lr", "0.01"]
    target = ["--energy", "density.py:box"]
    main(["train", "nsf", *target, *words, "--steps", "150", "--ema", "0.95", "--json"])
    figures = json.loads(capsys.readouterr().out)["evaluation"]
    assert abs(figures["log_evidence"] - BOX) < 5 * figures["log_evidence_error"] + 1e-3
    assert figures["ess"] > 5000
    main(["importance", "runs/nsf-box", *target, "--n", "2000", "--out", "draws.csv", "--json"])
    assert json.loads(capsys.readouterr().out)["ess"] > 1000
    main(["info", "runs/nsf-box"])
    shown = capsys.readouterr().out
    assert "trained by the density" in shown
    assert "None" not in shown.splitlines()[-1]
    rows = (tmp_path / "draws.csv").read_text().splitlines()
    assert rows[0] == "a,b,log_weight"
    assert len(rows) == 2001
    assert main_fails(["train", "--resume", "runs/nsf-box"], capsys) == (
        "musigma: energy: runs/nsf-box is trained by a density; give the function (--energy "
        "FILE.py:NAME)"
    )
    assert "features: give" in main_fails(["train", "maf", *target], capsys)
    assert "data: expected a folder" in main_fails(["train", "maf"], capsys)
    assert "expected a function" in main_fails(
        ["train", "maf", "--energy", "density.py:nothing", "--features", "2"], capsys
    )


def test_a_stopped_run_continues_to_the_same_weights(tmp_path):
    config = TrainConfig(steps=12, **CONFIG)
    runs = []
    for name, stop in (("whole", None), ("stopped", lambda step: step == 5)):
        torch.manual_seed(0)
        flow = build("nsf", (3,), bits=None, depth=1, hidden=8)
        runs.append(fit_energy(flow, skewed, config, tmp_path / name, stop=stop))
    assert runs[1].steps == 5
    flow = build("nsf", (3,), bits=None, depth=1, hidden=8)
    fit_energy(flow, skewed, config, tmp_path / "stopped", resume=True)
    files = [tmp_path / name / "last.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def main_fails(words, capsys):
    """The message of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(words)
    return capsys.readouterr().err.strip()
