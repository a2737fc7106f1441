"""Ensembles: the equal mixture of models that are trained independently."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import musigma
from musigma import Spec, Variable, build
from musigma.checkpoint import load, save
from musigma.cli import main
from musigma.data import Dataset, Given
from musigma.ensemble import Ensemble
from musigma.evaluation import conditioning, evaluate, saturation, score
from musigma.layers import Standardize
from musigma.model import Chain, Prior
from musigma.testing import randomized
from musigma.training import TrainConfig, fit

SPEC = Spec((3,), context=(Variable("a", (2,)), Variable("b")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(size=3, **options):
    return build("nsf", SPEC, depth=1, hidden=6, ensemble=size, **options)


def given(n):
    return {"a": torch.randn(n, 2).double(), "b": torch.randn(n, 1).double()}


def gaussians(means, stds):
    """An ensemble of known Gaussians, and torch's mixture of them."""
    members = []
    for mean, std in zip(means, stds, strict=True):
        layer = Standardize(means.shape[1])
        layer.set(mean, std)
        members.append(Chain([layer], Prior(musigma.StandardNormal(means.shape[1:]))))
    truth = MixtureSameFamily(
        Categorical(torch.ones(len(means))), Independent(Normal(means, stds), 1)
    )
    return Ensemble(members).eval(), truth


# --- the density ------------------------------------------------------------------------------


def test_the_density_is_that_of_the_mixture():
    model, truth = gaussians(torch.randn(4, 3), torch.randn(4, 3).exp())
    x = 2 * torch.randn(50, 3)
    torch.testing.assert_close(model.log_prob(x), truth.log_prob(x), rtol=1e-5, atol=1e-5)
    x, log_prob = model.sample_and_log_prob(50)
    torch.testing.assert_close(log_prob, truth.log_prob(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embed", ["none", "mlp"])
def test_a_conditional_ensemble_is_the_mean_of_its_members(embed):
    model = randomized(small(embed=embed)).eval()
    x, context = torch.randn(6, 3).double(), given(6)
    each = torch.stack([m.log_prob(x, context) for m in model.members], 1)
    assert each.std(1).min() > 1e-3
    expected = each.exp().mean(1).log()
    torch.testing.assert_close(model.log_prob(x, context), expected, rtol=1e-9, atol=1e-9)
    model.train()
    torch.testing.assert_close(model.log_prob(x, context), each.mean(1))


def test_a_distribution_embeds_once_for_every_member():
    model = randomized(small()).eval()
    rows = []
    for member in model.members:
        member.embedding.register_forward_hook(lambda m, i, out: rows.append(len(out)))
    context = given(4)
    dist = model.as_distribution(context)
    x, log_prob = dist.sample_and_log_prob((7,))
    torch.testing.assert_close(dist.log_prob(x), log_prob)
    assert rows == [4, 4, 4]
    expected = torch.stack([model.log_prob(part, context) for part in x])
    torch.testing.assert_close(log_prob, expected, rtol=1e-9, atol=1e-9)


def test_draws_are_stratified_and_each_row_takes_any_member():
    model, _ = gaussians(torch.tensor([[0.0], [100.0], [200.0]]), torch.ones(3, 1))
    which = (model.sample(3000) / 100).round()
    assert which.flatten().long().bincount().tolist() == [1000, 1000, 1000]
    assert 400 < int((which[1:] == which[:-1]).sum()) < 1600  # in random order
    first = torch.cat([(model.sample(2) / 100).round()[:1] for _ in range(900)])
    assert all(220 < n < 380 for n in first.flatten().long().bincount().tolist())


def test_rows_of_draws_keep_their_context():
    model = small(2)
    for member in model.members:
        member.eval()
    random = randomized(model)
    context = {"a": torch.randn(5, 2).double(), "b": torch.randn(5, 1).double()}
    many = {name: t.repeat_interleave(400, 0) for name, t in context.items()}
    means = random.sample(2000, many).reshape(5, 400, 3).mean(1)
    for i in range(5):
        row = {name: t[i : i + 1].expand(400, -1) for name, t in context.items()}
        alone = random.sample(400, row)
        error = alone.std(0) * math.sqrt(2 / 400)
        assert ((means[i] - alone.mean(0)).abs() < 5 * error).all()


def test_draws_are_reparameterized():
    model, _ = gaussians(torch.randn(2, 3), torch.ones(2, 3))
    dist = model.as_distribution()
    assert dist.has_rsample
    random = randomized(small(2)).eval()
    context = given(4)
    context["a"].requires_grad_()
    random.as_distribution(context).rsample((3,)).sum().backward()
    assert context["a"].grad.abs().min() > 0


# --- disagreement -----------------------------------------------------------------------------


def test_members_that_agree_do_not_disagree():
    member = randomized(build("nsf", (3,), depth=1, hidden=6))
    model = Ensemble([member, copy.deepcopy(member)]).eval()
    found = model.disagreement(torch.randn(20, 3).double())
    assert found.spread.max() < 1e-9
    assert found.information.abs().max() < 1e-9


def test_members_far_apart_disagree_by_the_logarithm_of_their_number():
    model, _ = gaussians(torch.tensor([[0.0], [90.0], [200.0]]), torch.ones(3, 1))
    found = model.disagreement(model.sample(30))
    torch.testing.assert_close(found.information, torch.full((30,), math.log(3)))


def test_disagreement_over_draws_is_the_mean_divergence_from_the_mixture():
    means, stds = torch.tensor([[0.0], [1.0], [-0.5]]), torch.tensor([[1.0], [0.7], [1.5]])
    model, truth = gaussians(means, stds)
    grid = torch.linspace(-12, 12, 20_001)[:, None].double()
    each = Normal(means.double().t(), stds.double().t()).log_prob(grid)
    log_ratio = each - truth.log_prob(grid)[:, None]
    expected = float((each.exp() * log_ratio).sum(0).mean() * (24 / 20_000))
    nats = model.disagreement(model.sample(20_000)).information
    assert abs(float(nats.mean()) - expected) < 5 * float(nats.std()) / math.sqrt(20_000)
    assert expected > 0.05


# --- training ---------------------------------------------------------------------------------


def linear(n=400):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    theta = x @ np.array([[1.0, 0.5], [-0.5, 1.0]]) + 0.3 * rng.normal(size=(n, 2))
    return Dataset(theta.astype(np.float32), given={"x": Given(x)})


def test_each_member_trains_as_it_would_alone(tmp_path):
    """With plain gradient steps the ensemble and a member alone end in the same weights."""
    data = linear()
    spec = data.spec(["x"])
    model = build("nsf", spec, depth=1, hidden=8, ensemble=3, standardize=True)
    alone = copy.deepcopy(model.members[1])
    config = {"steps": 5, "batch_size": 50, "ema": 0.0, "clip": 1e9, "evaluations": 1}

    def sgd(lr):
        return lambda parameters: torch.optim.SGD(parameters, lr)

    part = data.split("train"), data.split("validation")
    run = fit(model, *part, TrainConfig(**config), tmp_path / "all", optimizer=sgd(0.03))
    one = fit(alone, *part, TrainConfig(**config), tmp_path / "one", optimizer=sgd(0.01))
    found, wanted = run.model.members[1].state_dict(), one.model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    first, second = (m.model.layers[-1].net.stack.weights[0] for m in run.model.members[:2])
    assert (first - second).abs().max() > 0.1
    for member in run.model.members:
        assert bool(member.model.layers[0].calibrated)


def test_a_checkpoint_holds_an_ensemble_and_its_members(tmp_path):
    model = randomized(small(2, embed="mlp")).eval()
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert again.config["options"]["ensemble"] == 2
    x, context = torch.randn(4, 3).double(), given(4)
    torch.testing.assert_close(again.log_prob(x, context), model.log_prob(x, context))
    save(model.members[1], tmp_path / "one.safetensors")
    one = load(tmp_path / "one.safetensors")
    torch.testing.assert_close(one.log_prob(x, context), model.members[1].log_prob(x, context))
    assert "ensemble" not in one.config["options"]
    assert "ensemble" not in small(1).config["options"]


def test_diagnostics_see_every_member():
    model = randomized(build("maf", SPEC, depth=1, hidden=6, permutation="lu", ensemble=2)).float()
    context = {name: t.float() for name, t in given(4).items()}
    shares = saturation(model.eval(), torch.randn(4, 3), context)
    for m in range(2):
        assert any(name.startswith(f"members.{m}.") for name in shares)
        assert any(name.startswith(f"members.{m}.") for name in conditioning(model))
    assert None not in shares.values()


def test_figures_report_the_spread():
    data = linear(60)
    model = randomized(build("nsf", data.spec(["x"]), depth=1, hidden=6, ensemble=3)).float()
    table, figure = score(model.eval(), data), evaluate(model, data)
    x, context = torch.from_numpy(np.array(data.x)), torch.from_numpy(data.given["x"].values)
    each = model.log_prob_each(x, context).detach()
    np.testing.assert_allclose(table["spread"], each.std(1).numpy(), rtol=1e-3)
    np.testing.assert_allclose(table["nats"], -model.log_prob(x, context).detach(), rtol=1e-4)
    assert abs(figure["spread"] - table["spread"].mean()) < 1e-6
    assert figure["standard_error_spread"] > 0


# --- what is refused --------------------------------------------------------------------------


def test_an_ensemble_has_no_latents():
    model = small(2)
    x, context = torch.randn(2, 3), {name: t.float() for name, t in given(2).items()}
    calls = {
        "encode": lambda: model.encode(x, context),
        "decode": lambda: model.decode([x], context),
    }
    calls["reconstruct"] = lambda: model.reconstruct(x, context)
    calls["interpolate"] = lambda: model.interpolate(x, x, 3, context)
    for call in calls.values():
        with pytest.raises(TypeError, match="no latents in common"):
            call()
    with pytest.raises(ValueError, match="temperature: an ensemble has no center"):
        model.sample(2, context, temperature=0)
    assert model.sample(2, context, temperature=0.5).shape == (2, 3)


def test_members_must_be_exact_and_at_least_one():
    with pytest.raises(TypeError, match="ensemble: expected models with an exact"):
        build("vae", (3,), bits=None, latents=2, width=4, ensemble=2)
    with pytest.raises(ValueError, match="ensemble: expected 1 or more; got 0"):
        small(0)
    with pytest.raises(ValueError, match="members: expected one or more"):
        Ensemble([])


# --- the command line -------------------------------------------------------------------------


def test_the_command_line_trains_and_uses_an_ensemble(tmp_path, capsys):
    data = linear(300)
    table = np.concatenate([np.array(data.x), data.given["x"].values], 1)
    header = "t0,t1,x0,x1"
    np.savetxt(tmp_path / "sims.csv", table, delimiter=",", header=header, comments="")
    np.savetxt(tmp_path / "seen.csv", table[:2, 2:], delimiter=",", header="x0,x1", comments="")
    run, sims = str(tmp_path / "run"), str(tmp_path / "sims.csv")
    shared = ["--device", "cpu", "--json"]

    def answer(*words):
        main([*words, *shared])
        return json.loads(capsys.readouterr().out)

    train = f"train nsf {sims} --of t* --given x* --ensemble 2 --depth 1".split()
    done = answer(*train, "--hidden", "8", "--steps", "20", "--evaluations", "2", "--out", run)
    assert done["evaluation"]["spread"] > 0
    seen, out = str(tmp_path / "seen.csv"), str(tmp_path / "draws.csv")
    drawn = answer("sample", run, "--given", seen, "--n", "50", "--out", out)
    apart = drawn["disagreement"]
    assert apart["most"] == pytest.approx(math.log(2))
    assert 0 < apart["nats"] < apart["most"]
    assert apart["standard_error"] > 0
    main(["sample", run, "--given", seen, "--n", "50", "--out", out, "--device", "cpu"])
    assert "members disagree by" in capsys.readouterr().out
    assert answer("score", run, sims, "--out", str(tmp_path / "scores.csv"))["spread"] > 0
    main(["score", run, sims, "--out", str(tmp_path / "scores.csv"), "--device", "cpu"])
    assert "between members" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["options"]["ensemble"] == 2
    assert answer("inspect", run, sims)
    with pytest.raises(SystemExit) as stop:
        main(["encode", run, sims, "--out", str(tmp_path / "z.npz"), "--device", "cpu"])
    assert stop.value.code == 2
    assert "no latents in common" in capsys.readouterr().err
