"""Draws with their density, modes and truncated proposals of conditional densities."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import musigma
from musigma import Spec, Variable, build
from musigma.cli import main
from musigma.model import Chain, Prior
from musigma.posterior import mode, truncated
from musigma.testing import randomized

X = Variable("x", (3,))
QUICK = ["--depth", "2", "--hidden", "16", "--steps", "150", "--evaluations", "3"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- draws with their density ----------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("nsf", (4,), {"depth": 2, "hidden": 8}),
        ("nsf", (4,), {"depth": 2, "hidden": 8, "kind": "autoregressive"}),
        ("maf", (4,), {"depth": 2, "hidden": 8, "standardize": True}),
        ("glow", (2, 4, 4), {"depth": 1, "hidden": 6, "bits": None}),
    ],
)
def test_draws_come_with_their_density(name, shape, options, context):
    model = randomized(build(name, shape, context=context, **options))
    given = torch.randn(6, 3).double() if context else None
    x, log_prob = model.sample_and_log_prob(6, given)
    assert x.shape == (6, *shape)
    assert len(log_prob.unique()) == 6
    assert not x.requires_grad
    torch.testing.assert_close(log_prob, model.log_prob(x, given), rtol=0, atol=1e-6)
    torch.manual_seed(1)
    drawn = model.sample(6, given)
    torch.manual_seed(1)
    torch.testing.assert_close(model.sample_and_log_prob(6, given)[0], drawn)


def test_typed_rows_come_with_their_density():
    rows = torch.randn(300, 3).double().numpy()
    schema = musigma.schema.Schema([musigma.schema.Column(c) for c in "abc"]).measure(rows)
    model = randomized(build("table", Spec((3,), schema=schema), hidden=8)).eval()
    x, log_prob = model.sample_and_log_prob(5)
    torch.testing.assert_close(log_prob, model.log_prob(x))
    dist = model.as_distribution()
    assert not dist.has_rsample
    with pytest.raises(NotImplementedError, match="rsample"):
        dist.rsample()


def test_gradients_of_draws_are_those_of_finite_differences():
    model = randomized(build("nsf", (3,), depth=2, hidden=6, context=2))
    given = torch.randn(4, 2).double()

    def drawn(given):
        torch.manual_seed(3)
        x, log_prob = model.rsample_and_log_prob(4, given)
        return (x.sin().sum(1) - log_prob).sum()

    (gradient,) = torch.autograd.grad(drawn(given.requires_grad_()), given)
    step = torch.zeros_like(given)
    for i, j in ((0, 0), (1, 1), (3, 0)):
        step.zero_()[i, j] = 1e-5
        with torch.no_grad():
            slope = (drawn(given + step) - drawn(given - step)) / 2e-5
        assert abs(float(slope - gradient[i, j])) < 1e-4 * (1 + abs(float(slope)))


def test_a_bound_has_no_density_of_draws():
    for model in (build("vae", (3,), bits=None, latents=2, width=4), build("nsf", (3,), bits=8)):
        for call in (lambda m=model: m.sample_and_log_prob(2), model.as_distribution):
            with pytest.raises(TypeError, match="no exact log p"):
                call()


class Counting(nn.Module):
    features = 2

    def __init__(self):
        super().__init__()
        self.rows, self.net = [], nn.Linear(3, 2)

    def forward(self, context):
        self.rows.append(len(context))
        return self.net(context)


def test_a_distribution_embeds_every_row_of_its_context_once():
    model = randomized(build("nsf", (2,), depth=1, hidden=6, context=2))
    model = musigma.Conditional(model, Counting().double())
    model.spec = Spec((2,), context=(X,))
    given = torch.randn(5, 3).double()
    dist = model.as_distribution(given)
    x, log_prob = dist.sample_and_log_prob((7,))
    assert x.shape == (7, 5, 2)
    assert dist.has_rsample
    torch.testing.assert_close(dist.log_prob(x), log_prob, rtol=0, atol=1e-9)
    assert dist.event_shape == (2,)
    assert model.embedding.rows == [5]
    torch.testing.assert_close(
        log_prob[3], model.log_prob(x[3], given), rtol=0, atol=1e-9
    )  # rows of the context and of draws belong together
    dist.rsample((2,)).sum().backward()
    assert model.embedding.net.weight.grad.abs().min() > 0


def test_a_distribution_expands_like_those_of_torch():
    model = randomized(build("nsf", (2,), depth=1, hidden=6, context=3))
    dist = model.as_distribution(torch.randn(1, 3).double())
    wide = dist.expand((4, 6))
    x = wide.sample((3,))
    assert x.shape == (3, 4, 6, 2)
    assert wide.log_prob(x).shape == (3, 4, 6)
    torch.testing.assert_close(wide.log_prob(x), dist.log_prob(x))
    assert wide.support.check(x).all()
    assert wide.support.event_dim == 1


def test_draws_of_a_flow_of_known_layers_have_the_density_of_their_gaussian():
    layer = musigma.layers.Standardize(3)
    mean, std = torch.randn(3), torch.randn(3).exp()
    layer.set(mean, std)
    model = Chain([layer], Prior(musigma.StandardNormal((3,))))
    x, log_prob = model.sample_and_log_prob(50)
    truth = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    torch.testing.assert_close(log_prob, truth.log_prob(x))


# --- modes and truncated proposals ------------------------------------------------------------


class Linear(nn.Module):
    """theta | x = matrix (W x + b + e), e with standard deviations of its own: a Gaussian."""

    def __init__(self, d, features):
        super().__init__()
        conv = randomized(musigma.layers.InvertibleConv(d, lu=False)).float()
        net = nn.Linear(features, d)
        head = musigma.GaussianHead(net, event_ndims=1, log_std=0.3 * torch.randn(d))
        self.model = Chain([conv], Prior(head)).float()
        self.model.spec = Spec((d,), context=(Variable("x", (features,)),))
        self.net, self.log_std = net, head.log_std
        self.inverse = torch.linalg.inv(conv.matrix()).detach().float()

    def mean(self, x):
        return (self.net(x) @ self.inverse.T).detach()

    def covariance(self):
        return (self.inverse * (2 * self.log_std).exp()) @ self.inverse.T.detach()


def test_the_mode_of_a_gaussian_is_its_mean():
    truth = Linear(3, 2)
    x = torch.randn(4, 2)
    found = mode(truth.model, x, restarts=8, n=200)
    std = truth.covariance().diagonal().sqrt()
    assert ((found.theta - truth.mean(x)).abs() < 0.01 * std).all()
    assert (found.agree == 8).all()
    assert found.restarts == 8
    exact = torch.distributions.MultivariateNormal(truth.mean(x), truth.covariance().detach())
    torch.testing.assert_close(found.log_prob, exact.log_prob(truth.mean(x)), rtol=0, atol=1e-3)
    torch.testing.assert_close(truth.model.log_prob(found.theta, x), found.log_prob)


def test_the_mode_of_a_mixture_is_the_higher_one():
    members = []
    for mean, std in (([2.0, 1.0], [0.4, 0.4]), ([-2.0, 0.0], [0.35, 0.35])):
        layer = musigma.layers.Standardize(2)
        layer.set(torch.tensor(mean), torch.tensor(std))
        members.append(Chain([layer], Prior(musigma.StandardNormal((2,)))))
    found = mode(musigma.ensemble.Ensemble(members).eval(), restarts=16, n=32)
    torch.testing.assert_close(found.theta, torch.tensor([[-2.0, 0.0]]), rtol=0, atol=0.02)
    assert 0 < int(found.agree) < 16  # others ended at the lower mode


def test_the_mode_within_a_support_maximizes_the_density_of_theta():
    box = musigma.support.Support([0.0, -1.0], [2.0, 1.0])
    spec = Spec((2,), context=(Variable("x", (2,)),), support=box)
    model = randomized(build("maf", spec, depth=1, hidden=6)).float().eval()
    x = torch.randn(2, 2)
    found = mode(model, x, restarts=10, n=400)
    assert box.inside(found.theta.numpy()).all()
    side = [torch.linspace(low, high, 301)[1:-1] for low, high in ((0, 2), (-1, 1))]
    grid = torch.cartesian_prod(*side)
    for i in range(2):
        with torch.no_grad():
            density = model.log_prob(grid, x[i : i + 1].expand(len(grid), -1))
        assert found.log_prob[i] > density.max() - 1e-3


def test_no_mode_is_worse_than_the_best_draw():
    model = randomized(build("nsf", (3,), depth=2, hidden=6, context=2)).float()
    x = torch.randn(3, 2)
    values = []
    for steps in (0, 30):
        torch.manual_seed(5)
        values.append(mode(model, x, restarts=7, n=100, steps=steps).log_prob)
    torch.manual_seed(5)
    drawn = model.sample_and_log_prob(300, x.repeat_interleave(100, 0))[1].view(3, 100)
    assert (values[0] >= drawn.max(1).values).all()
    assert (values[1] > values[0]).all()


@pytest.mark.parametrize("prior", ["wide", "narrow", "function"])
def test_a_truncated_proposal_is_uniform_where_the_posterior_is(prior):
    truth, epsilon = Linear(2, 3), 0.02
    x = torch.randn(1, 3)
    mean, covariance = truth.mean(x)[0], truth.covariance().detach()
    radius = -2 * math.log(epsilon)  # the squared Mahalanobis distance of the border
    reach = (radius * covariance.diagonal()).sqrt() * {"wide": 40, "narrow": 1.5, "function": 1.5}[
        prior
    ]
    low, high = mean - reach, mean + reach
    box = musigma.support.Support(low.tolist(), high.tolist())
    source = box if prior != "function" else lambda n: low + (high - low) * torch.rand(n, 2)
    found = truncated(truth.model, x, source, 2000, epsilon=epsilon)
    assert found.candidates == ("posterior" if prior == "wide" else "prior")
    assert (truth.model.log_prob(found.theta, x.expand(2000, -1)) > found.threshold - 1e-5).all()
    white = torch.linalg.solve(torch.linalg.cholesky(covariance), (found.theta - mean).T)
    share = white.square().sum(0) / radius
    assert scipy.stats.kstest(share.numpy() / share.max().item(), "uniform").pvalue > 1e-3
    angle = torch.atan2(*white) / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3
    area = math.pi * radius * float(covariance.det().sqrt())
    assert found.share == pytest.approx(area / float((high - low).prod()), rel=0.25)


def test_proposals_that_cannot_be_drawn_say_why():
    truth = Linear(2, 3)
    x = torch.randn(1, 3)
    far = musigma.support.Support([1e3, 1e3], [1e3 + 1, 1e3 + 1])
    with pytest.raises(ValueError, match=r"n: expected 10 draws, but of 3,000 candidates"):
        truncated(truth.model, x, far, 10, epsilon=0.1, most=3000)
    with pytest.raises(ValueError, match=r"elements \[1\] have no bounds"):
        truncated(truth.model, x, musigma.support.Support([0, 0], [1, None]), 10)
    with pytest.raises(ValueError, match="one observation, one row; got 4"):
        truncated(truth.model, torch.randn(4, 3), far, 10)
    with pytest.raises(ValueError, match="at least as many draws as restarts"):
        mode(truth.model, x, restarts=20, n=10)
    vae = build("vae", (3,), bits=None, latents=2, width=4)
    for call in (lambda: mode(vae), lambda: truncated(vae, None, far, 10)):
        with pytest.raises(TypeError, match="no exact log p"):
            call()


# --- rounds of simulations ----------------------------------------------------------------------


@pytest.mark.slow
def test_rounds_of_truncated_proposals(tmp_path, capsys):
    """Two rounds about one observation: the second has its simulations where they matter."""
    rng, noise = np.random.default_rng(0), 0.2

    def simulate(theta):
        return theta + noise * rng.normal(size=theta.shape)

    def table(name, theta, x):
        rows, header = np.concatenate([theta, x], 1), "theta_0,theta_1,x_0,x_1"
        np.savetxt(tmp_path / name, rows, delimiter=",", header=header, comments="")
        return str(tmp_path / name)

    def run(*words):
        main([*words, "--device", "cpu", "--json"])
        return json.loads(capsys.readouterr().out)

    (tmp_path / "prior.toml").write_text("[bounds]\ntheta_0 = [-5, 5]\ntheta_1 = [-5, 5]\n")
    (tmp_path / "seen.csv").write_text("x_0,x_1\n1.5,-2\n")
    (tmp_path / "other.csv").write_text("x_0,x_1\n1.5,-2\n0,0\n")
    seen, folder = str(tmp_path / "seen.csv"), str(tmp_path / "run")
    theta = rng.uniform(-5, 5, size=(400, 2))
    first = table("first.csv", theta, x := simulate(theta))
    columns = ["--of", "theta_*", "--given", "x_*", "--bounds", str(tmp_path / "prior.toml")]
    how = [*columns, *QUICK]
    about = ["--given", seen, "--n", "300", "--epsilon", "0.01"]
    run("train", "nsf", first, *how, "--out", folder)
    out = str(tmp_path / "theta.csv")
    answer = run("propose", folder, *about, "--out", out)
    proposed = np.genfromtxt(out, delimiter=",", names=True)
    assert proposed.dtype.names == ("theta_0", "theta_1")
    proposed = np.stack([proposed[name] for name in proposed.dtype.names], 1)
    assert len(proposed) == 300
    assert (np.abs(proposed) <= 5).all()
    assert answer["share_of_prior"] < 0.6
    assert (np.abs(proposed - [1.5, -2]).mean(0) < np.abs(theta - [1.5, -2]).mean(0)).all()

    theta, x = np.concatenate([theta, proposed]), np.concatenate([x, simulate(proposed)])
    both, second = table("both.csv", theta, x), str(tmp_path / "second")
    run("train", "nsf", both, *how, "--observed", seen, "--out", second)
    found = run("map", second, "--given", seen, "--n", "200")
    assert "other_observations" not in found
    (row,) = found["modes"]
    assert abs(row["theta_0"] - 1.5) < 3 * noise
    assert abs(row["theta_1"] + 2) < 3 * noise
    assert 1 <= row["agree"] <= found["restarts"] == 20
    modes = str(tmp_path / "modes.csv")
    other = ["map", second, "--given", str(tmp_path / "other.csv"), "--n", "50", "--steps", "20"]
    assert run(*other, "--out", modes)["other_observations"] == 1
    lines = (tmp_path / "modes.csv").read_text().splitlines()
    assert lines[0] == "observation,theta_0,theta_1,log_prob,agree"
    assert len(lines) == 3
    prior = table("prior.csv", rng.uniform(-5, 5, size=(50, 2)), np.zeros((50, 2)))
    with pytest.raises(SystemExit) as stop:
        main(["propose", second, "--given", seen, "--prior", prior, "--out", out])
    assert stop.value.code == 2
    assert "of 50 candidates from the prior only" in capsys.readouterr().err
    main([*other, "--device", "cpu"])
    captured = capsys.readouterr()
    assert "1 of 2 given here are others" in captured.err + captured.out
    assert captured.out.count(" of 20") == 2


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_one_row_of_context_for_many_examples_is_multiplied_once(kind, layers):
    options = {"kind": kind, "hidden": 9, "hidden_layers": layers, "depth": 2, "context": 4}
    model = randomized(build("nsf", (3,), **options)).double()
    x, row = torch.randn(7, 3).double(), torch.randn(1, 4).double().requires_grad_()
    many, one = row.repeat(7, 1), row.expand(7, 4)
    gradients = []
    for context in (many, one):
        z, log_prob = model.encode(x, context)[0], model.log_prob(x, context)
        back = model.decode([z], context)
        torch.testing.assert_close(back, x)
        total = log_prob.sum() + back.sin().sum()
        gradients.append(torch.autograd.grad(total, [row, *model.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with FlopCounterMode(display=False) as counted:
        model.log_prob(x, one.detach())
    fewer = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        model.log_prob(x, many.detach())
    assert fewer < counted.get_total_flops()


def test_an_ensemble_in_training_mode_is_asked_for_its_mixture():
    model = musigma.testing.randomized(
        musigma.build("maf", (2,), depth=1, hidden=8, context=3, ensemble=3)
    ).float()
    x, box = torch.randn(1, 3), musigma.support.Support([-9, -9], [9, 9])
    found = []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(2)
        proposal = truncated(model, x, box, 200, epsilon=0.05)
        best = mode(model, x, restarts=2, n=50, steps=5)
        assert all(member.training == training for member in model.members)
        found.append((proposal.threshold, proposal.theta.sum(), best.log_prob[0]))
    assert torch.equal(*map(torch.tensor, found))
