"""Distributions of models as guides and priors of Pyro, and where zuko's flows are used."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import musigma
from musigma import Spec, Variable, testing
from musigma.support import Support


def conditional(shape=(2,), features=3, **options):
    spec = Spec(shape, context=(Variable("x", (features,)),))
    return musigma.build("nsf", spec, **{"depth": 2, "hidden": 16} | options)


# --- Pyro ----------------------------------------------------------------------------------------


@pytest.fixture
def pyro():
    pyro = pytest.importorskip("pyro", reason="pip install 'musigma[pyro]'")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return pyro


def test_a_model_is_a_distribution_of_pyro(pyro):
    model = testing.randomized(conditional())
    d = model.as_distribution(torch.randn(5, 3).double())
    assert isinstance(d, pyro.distributions.torch_distribution.TorchDistributionMixin)
    assert isinstance(d, torch.distributions.Distribution)
    assert d.shape((7,)) == (7, 5, 2)
    assert (d.event_dim, d.batch_shape, d.has_rsample) == (1, (5,), True)
    assert d.expand((4, 5))().shape == d.expand_by([4])().shape == (4, 5, 2)
    joint = d.to_event(1)
    theta = joint()
    assert (joint.batch_shape, joint.event_shape) == ((), (5, 2))
    torch.testing.assert_close(joint.log_prob(theta), d.log_prob(theta).sum())
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(d.mask(mask).log_prob(theta), d.log_prob(theta) * mask)


def test_plates_and_observed_values(pyro):
    model = testing.randomized(conditional())
    x, theta = torch.randn(5, 3).double(), torch.randn(4, 5, 2).double()

    def program():
        with pyro.plate("rows", 5), pyro.plate("more", 4, dim=-2):
            pyro.sample("theta", model.as_distribution(x), obs=theta)

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["theta"]["log_prob"].shape == (4, 5)
    expected = model.log_prob(theta.reshape(-1, 2), x.repeat(4, 1)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


# theta ~ N(0, I), x ~ N(A theta, 0.25 I): the posterior is Gaussian
MIXING = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.4]])


def exact_posterior(x):
    covariance = torch.linalg.inv(torch.eye(2) + MIXING.T @ MIXING / 0.25)
    return MultivariateNormal(x @ MIXING @ covariance / 0.25, covariance)


def test_an_amortized_guide_learns_the_posterior(pyro):
    dist = pyro.distributions
    net = conditional(hidden=32, depth=2)

    def model(x):
        with pyro.plate("rows", len(x)):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(theta @ MIXING.T, 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("posterior", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("theta", net.as_distribution(x))

    def data(n):
        return torch.randn(n, 2) @ MIXING.T + 0.5 * torch.randn(n, 3)

    net.calibrate(torch.randn(256, 2), data(256))
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.05 ** (1 / 150)})
    svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
    for _ in range(150):
        svi.step(data(128))
    x = data(2000)
    theta, log_q = net.as_distribution(x).sample_and_log_prob()
    kl = (log_q - exact_posterior(x).log_prob(theta)).mean()
    assert abs(kl) < 0.1
    # the loss is minus the evidence, plus that KL
    covariance = MIXING @ MIXING.T + 0.25 * torch.eye(3)
    evidence = MultivariateNormal(torch.zeros(3), covariance).log_prob(x).mean()
    assert abs(svi.evaluate_loss(x) / len(x) + evidence) < 0.15


def test_a_model_with_borders_as_prior_under_nuts(pyro):
    spec = Spec((2,), support=Support((0, -1), (1, math.inf)))
    prior = testing.randomized(musigma.build("nsf", spec, depth=1, hidden=8)).float()

    def model():
        theta = pyro.sample("theta", prior.as_distribution())
        pyro.sample("x", pyro.distributions.Normal(theta.sum(-1), 0.3), obs=torch.tensor(1.0))

    _, potential, transforms, _ = pyro.infer.mcmc.util.initialize_model(model)
    z = torch.randn(2)
    theta = transforms["theta"].inv(z)
    assert 0 < theta[0] < 1
    assert theta[1] > -1
    # in all of space, the density has the log-determinant of the bijection
    expected = prior.log_prob(theta[None])[0] + Normal(theta.sum(), 0.3).log_prob(torch.ones(()))
    expected -= transforms["theta"].log_abs_det_jacobian(theta, z)
    torch.testing.assert_close(-potential({"theta": z}), expected)
    kernel = pyro.infer.NUTS(model, max_tree_depth=3)
    chain = pyro.infer.MCMC(kernel, num_samples=6, warmup_steps=6, disable_progbar=True)
    chain.run()
    drawn = chain.get_samples()["theta"]
    assert drawn.shape == (6, 2)
    assert prior.as_distribution().support.check(drawn).all()


# --- zuko ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, (5,), (1,)])
@pytest.mark.parametrize("draws", [(), (7,), (4, 1)])
def test_shapes_are_those_of_zuko(rows, draws):
    zuko = pytest.importorskip("zuko", reason="pip install 'musigma[sbi]'")
    if rows is None:
        theirs = zuko.flows.NSF(2, hidden_features=(8,))()
        ours = musigma.build("nsf", (2,), depth=1).as_distribution()
    else:
        x = torch.randn(*rows, 3)
        theirs = zuko.flows.NSF(2, 3, hidden_features=(8,))(x)
        ours = conditional().as_distribution(x)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    assert ours.has_rsample == theirs.has_rsample
    assert ours.sample(draws).shape == theirs.sample(draws).shape
    for mine, other in zip(
        ours.rsample_and_log_prob(draws), theirs.rsample_and_log_prob(draws), strict=True
    ):
        assert mine.shape == other.shape
        assert mine.requires_grad
        assert other.requires_grad
    values = torch.randn(*draws, *(rows or ()), 2)
    assert ours.log_prob(values).shape == theirs.log_prob(values).shape
    if values.ndim > 1:  # one row for all of the batch
        values = values[..., :1, :]
        assert ours.log_prob(values).shape == theirs.log_prob(values).shape


def test_a_reparameterized_draw_has_the_gradient_of_its_expectation():
    """d/dx E[theta] by `rsample`, against finite differences with the same noise."""
    model = testing.randomized(conditional())
    x = torch.randn(1, 3).double().requires_grad_()

    def mean(x):
        torch.manual_seed(0)
        return model.as_distribution(x).rsample((200,)).mean((0, 1))[0]

    (gradient,) = torch.autograd.grad(mean(x), x)
    step = 1e-5
    for j in range(3):
        moved = torch.eye(3).double()[j : j + 1] * step
        with torch.no_grad():
            slope = (mean(x + moved) - mean(x - moved)) / (2 * step)
        assert math.isclose(gradient[0, j], slope, rel_tol=1e-4, abs_tol=1e-6)
