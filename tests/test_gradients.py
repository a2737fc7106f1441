"""Gradient estimators of draws that cannot be reparameterized."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
)

import musigma
from musigma import VAE, DiagonalGaussian, Prior, Recorder, TrainConfig, objectives
from musigma.distributions import OneHotHead, OneHotLatents, UniformOneHot, likelihood
from musigma.gaussian import GaussianHead
from musigma.nets import MLP
from musigma.testing import check_head, check_model, randomized
from musigma.trace import Trace, closed_kl, with_gradient
from musigma.training.step import ObjectivePass

VARIABLES, CLASSES, WIDTH = 2, 3, 5


def categorical_vae(gradient=None):
    torch.manual_seed(0)
    emitted = VARIABLES * CLASSES
    encoder = OneHotHead(MLP(WIDTH, emitted, hidden=[7]), VARIABLES, CLASSES, gradient=gradient)
    net = MLP(emitted, WIDTH, hidden=[7])
    decoder = likelihood("bernoulli", (WIDTH,), lambda _: net, levels=2)
    return randomized(VAE(encoder, decoder, Prior(UniformOneHot(VARIABLES, CLASSES))), seed=1)


def data(n=6):
    return torch.randint(0, 2, (n, WIDTH), generator=torch.Generator().manual_seed(2)).double()


def exact_elbo(model, x):
    """The ELBO by brute force over all 9 values of the latents, shape (B,)."""
    q, p = model.encoder(x), model.prior.head()
    total = torch.zeros(len(x), dtype=x.dtype)
    for codes in itertools.product(range(CLASSES), repeat=VARIABLES):
        z = nn.functional.one_hot(torch.tensor(codes), CLASSES).to(x).expand(len(x), -1, -1)
        log_q = q.log_prob(z)
        total = total + log_q.exp() * (model.decoder(z).log_prob(x) + p.log_prob(z) - log_q)
    return total


def gradient_of(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_a_draw_without_a_gradient_is_refused_in_training_only():
    model, x = categorical_vae(), data()
    with pytest.raises(ValueError, match="OneHotLatents carries no gradient to the encoder"):
        model(x)
    with torch.no_grad():
        assert model(x).elbo.shape == (6,)
    model.encoder.requires_grad_(False)
    assert model(x).elbo.requires_grad  # the decoder has its full gradient


def test_enumeration_is_exact():
    model, x = categorical_vae("enumerate"), data()
    found = model(x).elbo
    truth = exact_elbo(model, x)
    torch.testing.assert_close(found, truth)
    with torch.no_grad():
        assert torch.equal(model(x).elbo, found)
        assert not torch.allclose(model(x, closed_form=False).elbo, found)  # one draw
    torch.testing.assert_close(
        gradient_of(objectives.elbo(model(x)).mean(), model),
        gradient_of(-truth.mean(), model),
    )


def test_the_score_function_estimator_is_unbiased():
    """The mean of 4,000 gradients lies within 4.5 standard errors of the exact one."""
    model, x = categorical_vae("score"), data()
    truth = gradient_of(-exact_elbo(model, x).mean(), model)
    n = 4000
    torch.manual_seed(3)
    draws = torch.stack([gradient_of(objectives.elbo(model(x)).mean(), model) for _ in range(n)])
    error = draws.std(0) / math.sqrt(n)
    assert ((draws.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all()
    pathwise = torch.stack(
        [gradient_of(-model(x).elbo.mean(), model) for _ in range(200)]
    )  # without the score term, the encoder's gradient differs
    assert ((pathwise.mean(0) - truth).abs() > 10 * pathwise.std(0) / math.sqrt(200)).any()


@pytest.mark.parametrize(
    "objective",
    [
        lambda record: objectives.elbo(record),
        functools.partial(objectives.beta_elbo, beta=1.0),
        lambda record: -record.terms.elbo,
    ],
    ids=["calls another", "partial", "of the evidence"],
)
def test_the_score_function_term_is_added_once(objective):
    model, x = categorical_vae("score"), data()

    torch.manual_seed(1)
    truth = gradient_of(objectives.elbo(model(x)).mean(), model)
    torch.manual_seed(1)
    nats = ObjectivePass(model, TrainConfig(steps=1), objective)(x, None, 0.0)[0]
    torch.testing.assert_close(gradient_of(nats.mean(), model), truth, rtol=0, atol=0)


def test_a_registered_objective_that_calls_another_adds_the_score_once(monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", {})
    nested = objectives.objective(lambda evidence: objectives.elbo(evidence))
    model, x = categorical_vae("score"), data()
    torch.manual_seed(1)
    evidence = model(x)
    torch.testing.assert_close(
        *(gradient_of_twice(f(evidence).mean(), model) for f in (nested, objectives.elbo))
    )


def gradient_of_twice(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def vae_over_a_vae(lower, upper):
    """q(z1 | x) has 3 values, q(z2 | z1) has 2."""
    torch.manual_seed(0)
    encoder = OneHotHead(MLP(4, 3, hidden=[5]), 1, 3, gradient=lower)
    net = MLP(3, 4, hidden=[5])
    decoder = likelihood("bernoulli", (4,), lambda _: net, levels=2)
    prior = VAE(
        OneHotHead(MLP(3, 2, hidden=[5]), 1, 2, gradient=upper),
        OneHotHead(MLP(2, 3, hidden=[5]), 1, 3),
        Prior(UniformOneHot(1, 2)),
    )
    return randomized(VAE(encoder, decoder, prior), seed=1)


@pytest.mark.parametrize(("lower", "upper"), [("score", "enumerate"), ("enumerate", "score")])
def test_estimators_of_several_latents_are_unbiased_together(lower, upper):
    x = torch.randint(0, 2, (3, 4), generator=torch.Generator().manual_seed(0)).double()
    exact = vae_over_a_vae("enumerate", "enumerate")
    truth = gradient_of(objectives.elbo(exact(x)).mean(), exact)
    model, n = vae_over_a_vae(lower, upper), 600
    torch.manual_seed(5)
    draws = torch.stack([gradient_of(objectives.elbo(model(x)).mean(), model) for _ in range(n)])
    assert ((draws.mean(0) - truth).abs() <= 4.5 * draws.std(0) / math.sqrt(n) + 1e-12).all()


def test_the_baseline_lowers_the_variance_and_keeps_the_value():
    model, x = categorical_vae("score"), data()
    torch.manual_seed(5)
    evidence = model(x)
    nats = -evidence.elbo
    assert torch.equal(objectives.surrogate(nats, evidence), nats)
    assert torch.equal(objectives.elbo(evidence), nats)
    plain = nats + nats.detach() * (evidence.score - evidence.score.detach())
    names = [p for p in model.encoder.parameters()]

    def size(loss):
        grads = torch.autograd.grad(loss.mean(), names, retain_graph=True)
        return sum(float(g.square().sum()) for g in grads)

    assert size(objectives.elbo(evidence)) < size(plain)


@pytest.mark.parametrize("gradient", ["relaxed", "straight-through"])
def test_relaxed_draws_carry_a_gradient(gradient):
    model, x = categorical_vae(gradient), data()
    grads = torch.autograd.grad(-model(x).elbo.mean(), list(model.encoder.parameters()))
    assert all(g.abs().max() > 0 for g in grads)
    z = model.encoder(x).rsample()
    one_hot = torch.allclose(z.max(-1).values, torch.ones(()).to(z))
    assert one_hot == (gradient == "straight-through")
    torch.testing.assert_close(z.sum(-1), torch.ones(6, VARIABLES).to(z))


def test_too_many_values_to_enumerate_are_refused():
    emitted = 9 * 4
    model = VAE(
        OneHotHead(nn.Linear(3, emitted), 9, 4, gradient="enumerate"),
        GaussianHead(MLP(emitted, 6, hidden=[4]), event_ndims=1),
        Prior(UniformOneHot(9, 4)),
    )
    with pytest.raises(ValueError, match="262,144 combinations of values, more than 4,096"):
        model(torch.randn(2, 3))


def test_values_are_counted_before_they_are_listed():
    q = OneHotLatents(torch.zeros(2, 32, 5), gradient="enumerate")
    with pytest.raises(ValueError, match="combinations of values, more than 4,096"):
        q.enumerate_support(expand=False)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient: expected score or enumerate; got 'magic'"):
        OneHotLatents(torch.zeros(2, 3), gradient="magic")


def test_the_laws_of_one_hot_latents():
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    head = OneHotHead(MLP(6, 12, hidden=[5], context=2), 3, 4)
    check_head(head, z, (3, 4), context=2)
    check_head(UniformOneHot(3, 4), None, (3, 4))
    q, p = OneHotLatents(torch.randn(5, 2, 3)), OneHotLatents(torch.randn(5, 2, 3))
    values = q.enumerate_support()
    log_q = q.log_prob(values)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(5))
    torch.testing.assert_close(
        (log_q.exp() * (log_q - p.log_prob(values))).sum(0),
        torch.distributions.kl_divergence(q, p),
    )


# -- q and p whose KL torch does not know


class Skewed(Normal):
    """A distribution whose registered KL has an error of its own."""


@torch.distributions.register_kl(Skewed, Skewed)
def skewed_kl(q, p):
    raise NotImplementedError("skewed_kl is not finished")


class Nested(Independent):
    def __init__(self, base):
        super().__init__(base, 1)


@torch.distributions.register_kl(Nested, Nested)
def nested_kl(p, q):
    return torch.distributions.kl_divergence(p.base_dist, q.base_dist).sum(-1)


def test_only_a_missing_kl_is_estimated():
    """An error in a KL that a user registered is raised, also as a NotImplementedError."""
    normal, student = Normal(torch.zeros(3), 1.0), StudentT(4 * torch.ones(3))
    for q, p in ((student, normal), (Independent(student, 1), Independent(normal, 1))):
        assert closed_kl(q, p) is None
    nested = Nested(student)  # a registered KL that needs one which is missing, as Pyro's do
    assert closed_kl(nested, nested) is None
    skewed = Skewed(torch.zeros(3), 1.0)
    with pytest.raises(NotImplementedError, match="skewed_kl is not finished"):
        Trace(closed_form=True).latent(nn.Identity(), skewed, skewed)


class MixturePrior(nn.Module):
    def __init__(self, components, width):
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, width))

    def forward(self, given=None, context=None):
        parts = Independent(Normal(self.means, torch.ones_like(self.means)), 1)
        weights = torch.zeros(len(self.means), dtype=self.means.dtype)
        return MixtureSameFamily(Categorical(logits=weights), parts)


class LaplaceHead(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.net = nn.Linear(inputs, 2 * width)

    def forward(self, given):
        mean, log_scale = self.net(given).chunk(2, 1)
        return Independent(Laplace(mean, log_scale.exp()), 1)


@pytest.mark.parametrize("which", ["mixture prior", "laplace posterior"])
def test_a_pair_without_a_closed_form_uses_the_sampled_kl(which):
    torch.manual_seed(0)
    prior = MixturePrior(4, 3) if which == "mixture prior" else MixturePrior(1, 3)
    encoder = (
        GaussianHead(nn.Linear(5, 6), event_ndims=1)
        if which == "mixture prior"
        else LaplaceHead(5, 3)
    )
    model = VAE(encoder, GaussianHead(nn.Linear(3, 10), event_ndims=1), Prior(prior))
    x = torch.randn(7, 5)
    record = Recorder(closed_form=True)
    evidence = model(x, trace=record)
    assert evidence.kl_sampled.all()
    assert evidence.kl_sampled.shape == evidence.kl.shape
    z, site = record.values[model.prior], model.prior
    truth = record.qs[site].log_prob(z) - record.ps[site].log_prob(z)
    torch.testing.assert_close(evidence.kl[:, 0], truth)
    assert model.iwae(x, 5).shape == (7,)


def test_a_closed_form_kl_is_not_marked_as_sampled():
    model = VAE(
        GaussianHead(nn.Linear(5, 6), event_ndims=1),
        GaussianHead(nn.Linear(3, 10), event_ndims=1),
        Prior(MixturePrior(1, 3)),
    )
    model.prior.head.forward = lambda *_: DiagonalGaussian(torch.zeros(3), torch.zeros(3), 1)
    assert not model(torch.randn(2, 5)).kl_sampled.any()
    assert model(torch.randn(2, 5), closed_form=False).kl_sampled.all()


def test_no_latent_of_an_exact_flow_is_reported_as_an_estimate():
    flow = musigma.build("realnvp", (4,), bits=None, depth=1)
    assert not flow(torch.randn(3, 4)).kl_sampled.any()
    dequantized = musigma.build("realnvp", (4,), bits=3, depth=1)
    assert dequantized(torch.zeros(3, 4)).kl_sampled.all()


# -- errors in a user's code


class Faulty(torch.distributions.Distribution):
    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self):
        super().__init__(torch.Size((2,)), torch.Size((3,)), validate_args=False)

    def rsample(self, sample_shape=(), *, temperature=1.0):
        raise TypeError("a fault of one's own")


def test_errors_of_a_users_sample_are_not_hidden():
    with pytest.raises(TypeError, match="a fault of one's own"):
        Trace(temperature=0.5).q(nn.Identity(), Faulty())


def test_a_distribution_without_temperature_is_refused_by_name():
    dist = with_gradient(Independent(Laplace(torch.zeros(2, 3), torch.ones(2, 3)), 1), "score")
    with pytest.raises(ValueError, match="Independent draws at temperatures 0 and 1 only"):
        Trace(temperature=0.5).q(nn.Identity(), dist)


@pytest.mark.parametrize("gradient", ["relaxed", "enumerate"])
def test_the_laws_hold_with_one_hot_latents(gradient):
    check_model(categorical_vae(gradient), (WIDTH,), x=data(4))
