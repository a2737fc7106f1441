"""The Hamiltonian VAE."""

import math

import pytest
import torch
from torch import nn

from musigma import build
from musigma.audit import audit_model, audit_step
from musigma.distributions import StandardNormal
from musigma.gaussian import Format, GaussianHead
from musigma.model import Prior
from musigma.testing import check_model, jacobian, randomized
from musigma.zoo.vaes.hamiltonian import HamiltonianHead, HamiltonianVAE, Leapfrog, Potential
from tests.families import nats_after, training_step
from tests.test_latents import circle


def small(**options):
    torch.manual_seed(0)
    options = {"posterior": "hamiltonian steps=3", "latents": 2, "width": 8, **options}
    return build("vae", (5,), bits=None, **options)


def test_the_laws():
    for context in (0, 2):
        check_model(small(context=context), (5,), context=context)
    check_model(small(prior="mixture components=3"), (5,))
    assert audit_model(small()).verdict == "correct"


def test_the_dynamics_change_the_volume_by_the_cooling_alone():
    model = randomized(small())
    x, pair = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    layer, force = model.encoder.leapfrog, Potential(model, x, None)
    y, log_det = layer(pair, force)
    beta = float(layer.logit_beta.detach().sigmoid())
    assert torch.allclose(log_det, torch.full((3,), math.log(beta)).double())  # D/2 = 1
    slopes = jacobian(lambda t: layer(t, force)[0], pair)
    assert torch.allclose(torch.linalg.slogdet(slopes)[1], log_det, atol=1e-10)
    assert torch.allclose(layer.inverse(y, force)[0], pair, atol=1e-10)
    factors = torch.stack(layer.coolings()).detach()
    assert (factors < 1).all()
    assert abs(float(factors.prod()) - math.sqrt(beta)) < 1e-12


def linear(steps=4):
    """z ~ N(0, I), x = W z + noise, whose evidence is known."""
    torch.manual_seed(1)
    decoder = GaussianHead(nn.Linear(2, 3), event_ndims=1, log_std=math.log(0.7)).double()
    leapfrog = Leapfrog(2, steps, 0.2, 0.4)
    head = HamiltonianHead(nn.Linear(3, 4), 2, Format(), leapfrog).double()
    for p in head.net.parameters():
        nn.init.zeros_(p)  # q(z_0) = N(0, I), so that the weights have a finite variance
    return HamiltonianVAE(head, decoder, Prior(StandardNormal((2,))).double()).double()


def test_the_evidence_of_a_linear_model_is_estimated_without_bias():
    model, x = linear(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    net = model.decoder.net
    weight = net.weight.detach()
    covariance = weight @ weight.T + 0.49 * torch.eye(3).double()
    truth = torch.distributions.MultivariateNormal(net.bias.detach(), covariance).log_prob(x)
    with torch.no_grad():
        log_w = model(x.repeat_interleave(20_000, 0)).elbo.reshape(4, -1)
    ratio = (log_w - truth[:, None]).exp()
    error = ratio.std(1) / math.sqrt(20_000)
    assert ((ratio.mean(1) - 1).abs() < 4.5 * error).all()
    assert error.max() < 0.05
    assert (log_w.mean(1) < truth).all()


def test_the_latents_are_those_after_the_dynamics():
    model, x = randomized(small()), torch.randn(4, 5).double()
    z, rho = model.encode(x, mode=True)
    start = model.encoder(x).mean
    pair = torch.cat([start, torch.zeros_like(start)], 1)
    moved, _ = model.encoder.leapfrog(pair, Potential(model, x, None))
    assert torch.allclose(torch.cat([z, rho], 1), moved)
    assert (z - start).abs().min() > 1e-6
    assert torch.equal(model.decode([z]), model.decode([z, rho]))


def test_a_prior_that_is_no_single_distribution_is_refused():
    with pytest.raises(ValueError, match="prior: the posterior 'hamiltonian' takes"):
        small(prior="nsf depth=1")


@pytest.mark.slow
def test_training_and_the_audit_of_a_step():
    report = audit_step(training_step(small()))
    assert not report.findings, report
    torch.manual_seed(0)
    model = build("vae", (5,), bits=None, latents=2, width=64, posterior="hamiltonian", std=0.1)
    assert nats_after(model, data=circle) < 2.0
