"""Draws with their density, modes and truncated proposals of conditional densities."""

import pytest
import torch
from torch import nn

import musigma
from musigma import Spec, Variable, build
from musigma.model import Chain, Prior
from musigma.testing import randomized

X = Variable("x", (3,))


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
