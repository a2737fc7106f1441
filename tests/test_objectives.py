"""Objectives against closed forms, enumeration, and each other, in float64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, softplus

import musigma
from musigma import VAE, DiagonalGaussian, Prior, Recorder, objectives
from musigma.distributions import (
    DiscretizedLogisticMixture,
    OneHotHead,
    StandardNormal,
    UniformOneHot,
    likelihood,
)
from musigma.gaussian import GaussianHead
from musigma.nets import MLP
from musigma.objectives import OBJECTIVES, Chosen, aggregate, mmd, sliced_wasserstein
from musigma.testing import randomized

D, LATENTS = 4, 3


def gaussian_vae(width=D, latents=LATENTS, seed=1):
    """A VAE of vectors whose decoder has a learned standard deviation."""
    torch.manual_seed(0)
    encoder = GaussianHead(MLP(width, 2 * latents, hidden=[6]), event_ndims=1)
    decoder = GaussianHead(MLP(latents, 2 * width, hidden=[6]), event_ndims=1)
    return randomized(VAE(encoder, decoder, Prior(StandardNormal((latents,)))), seed=seed)


def deep_vae():
    """Two latents: the posterior of the second is given a draw of the first."""
    below = gaussian_vae(D, LATENTS)
    return VAE(below.encoder, below.decoder, gaussian_vae(LATENTS, 2, seed=2))


def flowing_vae():
    """A posterior that is a flow, whose parameters are in modules."""
    torch.manual_seed(0)
    options = {"latents": 2, "width": 5, "likelihood": "gaussian"}
    return randomized(musigma.build("vae", (D,), bits=None, posterior="iaf", **options), scale=0.5)


def data(n=5, seed=0):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def passed(model, x, k=1, *, seed=0, closed_form=False, share=1.0, examples=None):
    """A recorder of a pass with k draws per example."""
    torch.manual_seed(seed)
    record = Recorder(closed_form=closed_form)
    model(x.repeat_interleave(k, 0), trace=record)
    record.share, record.examples = share, examples
    return record


def gradient(nats, parameters):
    grads = torch.autograd.grad(
        nats.mean(), list(parameters), allow_unused=True, retain_graph=True
    )
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for g, p in zip(grads, parameters, strict=True)])  # fmt: skip


def gradients(objective, model, x, k, parameters, n):
    """Gradients of n batches (n, P)."""
    parameters = list(parameters)
    return torch.stack(
        [gradient(objective(passed(model, x, k, seed=i)), parameters) for i in range(n)]
    )


def same_mean(a, b):
    """Whether two samples (n, P) have equal means, within 4.5 standard errors of each number."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return bool(((a.mean(0) - b.mean(0)).abs() <= 4.5 * error + 1e-12).all())


class Fixed(nn.Module):
    """A head that returns one distribution."""

    def __init__(self, dist):
        super().__init__()
        self.dist = dist

    def forward(self, given=None, context=None):
        return self.dist


def fixed_posterior(mean, log_std):
    """A VAE whose posteriors are N(mean, exp(log_std)²), and a pass of it."""
    latents = mean.shape[1]
    decoder = GaussianHead(nn.Linear(latents, 2 * D).double(), event_ndims=1)
    prior = Prior(StandardNormal((latents,))).double()
    model = VAE(Fixed(DiagonalGaussian(mean, log_std.expand_as(mean), 1)), decoder, prior)
    return model, passed(model, data(len(mean)), examples=len(mean))


# -- the recorder


def test_a_recorder_knows_its_pass_and_repeats_it():
    model, x = gaussian_vae(), data()
    record = passed(model, x)
    assert record.model is model
    assert torch.equal(record.x, x)
    again = record.again(given=record.draws)
    assert torch.equal(again.terms.elbo, record.terms.elbo)
    assert not torch.equal(record.again().terms.elbo, record.terms.elbo)
    fixed = record.again(given=record.draws, fixed=True)
    assert torch.equal(fixed.terms.elbo, record.terms.elbo)
    assert all(p.requires_grad for p in model.parameters())
    detached = {site: z.detach() for site, z in record.draws.items()}
    assert not record.again(given=detached, fixed=True).terms.elbo.requires_grad


def test_a_pass_with_constant_parameters_needs_all_activations():
    model = musigma.build("vae", (1, 8, 8), latents=2, width=4).double()
    musigma.memory.set_memory(model, "checkpoint")
    record = passed(model, torch.randint(256, (3, 1, 8, 8)).double())
    with pytest.raises(ValueError, match="memory: this objective needs a pass with constant"):
        objectives.stl(record)
    assert record.again(given=record.draws).terms.elbo.shape == (3,)


def test_a_dream_is_a_draw_of_the_model_with_its_latents():
    for model in (gaussian_vae(), deep_vae()):
        record = passed(model, data(4000))
        dream = record.dream()
        assert set(dream.draws) == set(record.draws)
        assert not any(t.requires_grad for t in (dream.x, *dream.draws.values()))
        again = record.again(dream.x, given=dream.draws)
        assert all(torch.equal(again.draws[site], z) for site, z in dream.draws.items())
        torch.manual_seed(1)
        with torch.no_grad():
            median = model.sample(4000).median(0).values
        assert (dream.x.median(0).values - median).abs().max() < 0.1


# -- bounds of several draws


def test_bounds_of_several_draws_in_special_cases():
    record = passed(gaussian_vae(), data(), 6)
    log_w = record.terms.elbo.reshape(-1, 6)
    iwae = objectives.iwae(record, 6)
    assert torch.allclose(iwae, math.log(6) - log_w.logsumexp(1))
    assert torch.allclose(objectives.miwae(record, 6, 1), iwae)
    assert torch.allclose(objectives.miwae(record, 1, 6), -log_w.mean(1))
    by_two = objectives.iwae(record, 2).reshape(-1, 3).mean(1)
    assert torch.allclose(objectives.miwae(record, 2, 3), by_two)
    assert torch.allclose(objectives.ciwae(record, 6, weight=0.0), iwae)
    assert torch.allclose(objectives.ciwae(record, 6, weight=1.0), -log_w.mean(1))
    with pytest.raises(ValueError, match="weight: expected a number from 0 to 1; got 2"):
        objectives.ciwae(record, 6, weight=2)
    assert torch.allclose(objectives.renyi(record, 6, alpha=0.0), iwae)
    assert torch.allclose(objectives.renyi(record, 6, alpha=1.0), -log_w.mean(1))
    near = objectives.renyi(record, 6, alpha=1 + 1e-7)
    assert torch.allclose(near, -log_w.mean(1), atol=1e-4)
    for function in (objectives.dreg, objectives.reweighted_wake_sleep):
        assert torch.allclose(function(record, k=6), iwae)
    assert torch.allclose(objectives.piwae(record, k=2, m=3), iwae)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_the_renyi_bound_of_gaussians(alpha):
    """z ~ N(0, 1), x ~ N(z, 1), q = N(m, s²): the integral by quadrature."""
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    x, mean, std = 0.7, 0.2, 0.8

    def normal(value, mean, std):
        return -0.5 * ((value - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)

    log_q = normal(grid, mean, std)
    log_p = normal(grid, 0, 1) + normal(x, grid, 1)
    exponent = log_q + (1 - alpha) * (log_p - log_q)
    truth = torch.trapezoid(exponent.exp(), grid).log().item() / (1 - alpha)
    n = 400_000
    torch.manual_seed(0)
    z = mean + std * torch.randn(n, dtype=torch.float64)
    log_w = normal(z, 0, 1) + normal(x, z, 1) - normal(z, mean, std)
    zero = torch.zeros(n, dtype=torch.float64)
    evidence = musigma.Evidence(log_w, zero[:, None], zero, zero)
    assert objectives.renyi(evidence, n, alpha=alpha).item() == pytest.approx(-truth, abs=0.01)


# -- gradients


def parts_of(model):
    encoder = [p for n, p in model.named_parameters() if "encoder" in n]
    decoder = [p for n, p in model.named_parameters() if "encoder" not in n]
    return encoder, decoder


@pytest.mark.parametrize("make", [gaussian_vae, deep_vae])
def test_parameters_of_p_get_the_gradient_of_the_bound_of_all_draws(make):
    model = make()
    _, decoder = parts_of(model)
    record = passed(model, data(), 6)
    truth = gradient(objectives.iwae(record, 6), decoder)
    for nats in (
        objectives.dreg(record, k=6),
        objectives.piwae(record, k=2, m=3),
        objectives.reweighted_wake_sleep(record, k=6),
    ):
        assert torch.allclose(gradient(nats, decoder), truth, rtol=1e-9)
    single = passed(model, data())
    truth = gradient(objectives.elbo(single), decoder)
    assert torch.allclose(gradient(objectives.stl(single), decoder), truth, rtol=1e-9)


@pytest.mark.parametrize("make", [gaussian_vae, deep_vae])
def test_piwae_trains_q_on_the_mean_of_bounds(make):
    model = make()
    encoder, _ = parts_of(model)
    record = passed(model, data(), 6)
    truth = gradient(objectives.miwae(record, 2, 3), encoder)
    found = gradient(objectives.piwae(record, k=2, m=3), encoder)
    assert torch.allclose(found, truth, rtol=1e-9)
    assert not torch.allclose(found, gradient(objectives.iwae(record, 6), encoder), rtol=1e-3)


@pytest.mark.parametrize("make", [gaussian_vae, deep_vae])
def test_doubly_reparameterized_gradients_have_the_mean_of_those_of_iwae(make):
    model, x = make(), data(20)
    encoder, _ = parts_of(model)
    plain = gradients(lambda r: objectives.iwae(r, 8), model, x, 8, encoder, 100)
    doubly = gradients(lambda r: objectives.dreg(r, k=8), model, x, 8, encoder, 100)
    assert same_mean(plain, doubly)
    assert not torch.allclose(plain[0], doubly[0], rtol=1e-3)


@pytest.mark.parametrize(
    "make", [gaussian_vae, deep_vae, pytest.param(flowing_vae, marks=pytest.mark.slow)]
)
def test_sticking_the_landing_has_the_gradient_of_the_elbo(make):
    model, x = make(), data(20)
    encoder, _ = parts_of(model)
    plain = gradients(objectives.elbo, model, x, 1, encoder, 120)
    landing = gradients(objectives.stl, model, x, 1, encoder, 120)
    assert same_mean(plain, landing)
    assert not torch.allclose(plain[0], landing[0], rtol=1e-3)


def conjugate_vae(off=0.0):
    """z ~ N(0, 1), x ~ N(z, 1): the posterior is N(x / 2, 1/2), from which q is off."""
    encoder = GaussianHead(nn.Linear(1, 2).double(), event_ndims=1)
    with torch.no_grad():
        encoder.net.weight.copy_(torch.tensor([[0.5], [0.0]]) + off)
        bias = [off, 0.5 * math.log(0.5) + off]
        encoder.net.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    decoder = GaussianHead(nn.Identity(), event_ndims=1, log_std=0.0)
    return VAE(encoder, decoder, Prior(StandardNormal((1,))).double())


def test_doubly_reparameterized_gradients_have_less_variance_near_the_posterior():
    model, x = conjugate_vae(0.1), torch.linspace(-2, 2, 10, dtype=torch.float64)[:, None]
    weights = list(model.parameters())
    for k in (2, 16):
        plain = gradients(lambda r, k=k: objectives.iwae(r, k), model, x, k, weights, 80)
        doubly = gradients(lambda r, k=k: objectives.dreg(r, k=k), model, x, k, weights, 80)
        assert same_mean(plain, doubly)
        assert (doubly.var(0) < 0.5 * plain.var(0)).all()


def test_sticking_the_landing_has_no_gradient_at_the_posterior():
    model, x = conjugate_vae(), torch.randn(6, 1, dtype=torch.float64)
    record = passed(model, x)
    weights = list(model.parameters())
    assert gradient(objectives.stl(record), weights).abs().max() < 1e-12
    assert gradient(objectives.elbo(record), weights).abs().max() > 1e-2


def categorical_vae(gradient=None):
    torch.manual_seed(0)
    encoder = OneHotHead(MLP(2, 6, hidden=[5]), 2, 3, gradient=gradient)
    net = MLP(6, 2, hidden=[5])
    decoder = likelihood("bernoulli", (2,), lambda _: net, levels=2)
    return randomized(VAE(encoder, decoder, Prior(UniformOneHot(2, 3))), seed=1)


def codes(n):
    for values in itertools.product(range(3), repeat=2):
        z = nn.functional.one_hot(torch.tensor(values), 3).double()
        yield z.expand(n, -1, -1)


def test_draws_that_are_not_reparameterized_are_refused_by_name():
    record = passed(categorical_vae("score"), torch.ones(2, 2, dtype=torch.float64))
    for name in ("stl", "dreg", "piwae"):
        with pytest.raises(ValueError, match=f"{name} needs reparameterized draws; .* use iwae"):
            Chosen(name).nats(record)


def test_wake_sleep_of_an_enumerable_model():
    """The expected gradients, by all values of the latents and the data."""
    model = categorical_vae("score")
    x = torch.tensor([[0, 1], [1, 1]], dtype=torch.float64)
    encoder, decoder = parts_of(model)
    q = model.encoder(x)
    wake = sum(
        -q.log_prob(z).exp().detach() * (model.decoder(z).log_prob(x) - 2 * math.log(3))
        for z in codes(2)
    )
    every = torch.tensor(list(itertools.product([0, 1], repeat=2)), dtype=torch.float64)
    sleep = sum(
        -(model.decoder(z).log_prob(every).exp() / 9).detach() * model.encoder(every).log_prob(z)
        for z in codes(4)
    )
    truth = torch.cat([gradient(sleep.sum(), encoder), gradient(wake, decoder)])
    both = [*encoder, *decoder]
    found = gradients(objectives.wake_sleep, model, x.repeat(50, 1), 1, both, 60)
    assert same_mean(found, truth.expand(2, -1))
    assert found.mean(0).abs().max() > 0.02


def test_wake_sleep_below_dequantization():
    """Draws of the model lie outside of the levels; only latents are learned from them."""
    torch.manual_seed(0)
    model = musigma.build("vae", (1, 8, 8), latents=2, width=4, likelihood="gaussian").double()
    record = passed(model, torch.randint(256, (3, 1, 8, 8)).double())
    encoder, decoder = parts_of(model)
    for nats in (objectives.wake_sleep(record), objectives.reweighted_wake_sleep(record, k=1)):
        assert nats.isfinite().all()
        assert gradient(nats, encoder).abs().max() > 0
        assert gradient(nats, decoder).abs().max() > 0


def test_reweighted_wake_sleep_is_consistent():
    """With many draws q follows the gradient of KL(p(z | x) || q(z | x))."""
    model = categorical_vae("score")
    x = torch.tensor([[0, 1], [1, 1]], dtype=torch.float64)
    encoder, _ = parts_of(model)
    joint = torch.stack([model.decoder(z).log_prob(x) for z in codes(2)]).detach()
    posterior = joint.softmax(0)
    inclusive = -sum(
        w * model.encoder(x).log_prob(z) for w, z in zip(posterior, codes(2), strict=True)
    )
    truth = gradient(inclusive, encoder)

    def wake(record):
        return objectives.reweighted_wake_sleep(record, k=3000, phase="wake")

    found = gradients(wake, model, x, 3000, encoder, 8).mean(0)
    assert torch.allclose(found, truth, atol=0.02)
    assert truth.abs().max() > 0.1


# -- functions of the rate


def test_capacity_and_free_dimensions():
    record = passed(gaussian_vae(), data(), closed_form=True, share=0.25)
    e = record.terms
    nats = objectives.capacity(record, capacity=8.0, gamma=3.0, anneal=0.5)
    assert torch.allclose(nats, 3 * (e.rate - 4.0).abs() - e.log_px)
    nats = objectives.capacity(record, capacity=8.0, gamma=3.0, anneal=0.0, over="batch")
    assert torch.allclose(nats, 3 * (e.rate.mean() - 8.0).abs() - e.log_px)
    q = next(iter(record.qs.values()))
    each = 0.5 * (q.mean**2 + q.variance - 1) - q.log_std
    assert torch.allclose(each.sum(1), e.kl[:, 0])
    free = float(each.mean(0).median().detach())
    truth = each.mean(0).clamp(min=free).sum() - e.log_px.mean()
    found = objectives.free_bits(record, free, per="dimension")
    assert torch.allclose(found.mean(), truth)
    assert torch.allclose(objectives.free_bits(record, 0.0, per="dimension"), -e.elbo)
    for per, message in (("pixel", "per: expected 'latent' or 'dimension'"),):
        with pytest.raises(ValueError, match=message):
            objectives.free_bits(record, 0.1, per=per)
    with pytest.raises(TypeError, match="record: expected a Recorder"):
        objectives.free_bits(e, 0.1, per="dimension")
    with pytest.raises(ValueError, match="over: expected 'example' or 'batch'"):
        objectives.capacity(record, over="row")


# -- total correlation


def test_stratified_sampling_is_unbiased_and_exact_for_whole_data():
    """The mean over all batches, by enumeration; weighted sampling as it is defined."""
    n, size = 5, 3
    log_q = torch.randn(n, n, dtype=torch.float64)  # of z_i given x_j
    truth = log_q.exp().mean(1)
    assert torch.allclose(aggregate(log_q, n).exp(), truth)
    found = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        others = itertools.combinations([j for j in range(n) if j != i], size - 1)
        batches = [torch.tensor([i, *rest]) for rest in others]
        values = [aggregate(log_q[b][:, b], n)[0].exp() for b in batches]
        found[i] = torch.stack(values).mean()
    assert torch.allclose(found, truth)
    part = log_q[:size, :size]
    weighted = (part.exp().sum(1) / (n * size)).log()
    assert torch.allclose(aggregate(part, n, "mws"), weighted)
    with pytest.raises(ValueError, match="estimator: expected 'mss' or 'mws'"):
        aggregate(part, n, "mean")


def test_the_total_correlation_of_a_gaussian():
    """Posterior means of covariance S - I/4 and variances 1/4: TC = -1/2 log |corr(S)|."""
    torch.manual_seed(0)
    n, r = 1000, 0.6
    mean = with_covariance(n, 0.75 * torch.tensor([[1, r], [r, 1]], dtype=torch.float64))
    covariance = 0.75 * r
    truth = -0.5 * math.log(1 - covariance**2)
    entropy = 0.5 * math.log(1 - covariance**2)  # of z, less that of N(0, I)

    def terms(**options):
        """The mean of beta-tc over the draws of several passes, less -ELBO."""
        return objectives.beta_tc(record, **({"beta": 1.0} | options)).mean().item() - plain

    found = []
    model, _ = fixed_posterior(mean, torch.tensor(math.log(0.5), dtype=torch.float64))
    for seed in range(4):
        record = passed(model, data(n), seed=10 + seed, examples=n)
        plain = objectives.elbo(record).mean().item()
        parts = terms(alpha=2.0), terms(beta=2.0), terms(gamma=2.0)
        q, z = next(iter(record.qs.values())), next(iter(record.draws.values()))
        log_ratio = q.log_prob(z) - StandardNormal((2,)).double()().log_prob(z)
        assert sum(parts) == pytest.approx(log_ratio.mean().item(), abs=1e-9)
        found.append((*parts, terms(beta=2.0, estimator="mws")))
    information, correlation, rest, weighted = torch.tensor(found).mean(0).tolist()
    assert correlation == pytest.approx(truth, abs=0.03)
    assert information == pytest.approx(entropy - 2 * math.log(0.5), abs=0.03)
    assert rest == pytest.approx(0.0, abs=0.03)
    assert weighted == pytest.approx(correlation + math.log(n), abs=1e-4)
    assert terms() == 0


def with_covariance(n, covariance):
    """Centered rows whose covariance over n is exactly this."""
    white = torch.randn(n, len(covariance), dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / n)).T
    return white @ torch.linalg.cholesky(covariance).T


def test_total_correlation_needs_one_latent_and_the_number_of_examples():
    with pytest.raises(ValueError, match="examples: beta-tc needs the number of examples"):
        objectives.beta_tc(passed(gaussian_vae(), data()))
    with pytest.raises(ValueError, match=r"beta-tc is for models with one latent.*draws 2"):
        objectives.beta_tc(passed(deep_vae(), data(), examples=9))
    flow = musigma.build("maf", (D,), hidden=8, depth=1).double()
    with pytest.raises(ValueError, match="beta-tc is for models with a posterior"):
        objectives.beta_tc(passed(flow, data(), examples=9))
    for name in ("swae", "wae-mmd", "wake-sleep", "stl", "dip-i"):
        with pytest.raises(ValueError, match="for models with a posterior and a likelihood"):
            Chosen(name).nats(passed(flow, data()))


def test_the_critic_of_factor_vae():
    torch.manual_seed(0)
    model, x = gaussian_vae(), data(40)
    record = passed(model, x)
    objective = objectives.FactorVAE(record, gamma=3.0, width=8).double()
    seen = []
    objective.critic.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    loss = objective.critic_loss(record)
    z, permuted = seen
    assert not z.requires_grad
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)  # across the batch
    assert not (permuted == z).all(0).any()
    rows = {tuple(row) for row in z.tolist()}
    assert sum(tuple(row) in rows for row in permuted.tolist()) < 5
    logits = objective.critic(z)[:, 0], objective.critic(permuted)[:, 0]
    truth = 0.5 * (softplus(-logits[0]) + softplus(logits[1]))
    assert torch.allclose(loss, truth)
    assert torch.allclose(objective(record), objectives.elbo(record) + 3 * logits[0])
    encoder, _ = parts_of(model)
    assert torch.autograd.grad(loss.sum(), encoder, allow_unused=True) == (None,) * len(encoder)


@pytest.mark.slow
def test_the_critic_estimates_the_total_correlation_of_a_gaussian():
    torch.manual_seed(0)
    r = 0.8
    mixing = torch.linalg.cholesky(torch.tensor([[1, r], [r, 1]], dtype=torch.float64))

    def record():
        mean = torch.randn(500, 2, dtype=torch.float64) @ mixing.T
        return fixed_posterior(mean, torch.tensor(-6.0, dtype=torch.float64))[1]

    objective = objectives.FactorVAE(record(), width=64, lr=2e-3).double()
    optimizer = objective.critic_optimizer()
    for _ in range(400):
        optimizer.zero_grad()
        objective.critic_loss(record()).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.stack([objective.total_correlation(record()).mean() for _ in range(20)])
    assert found.mean().item() == pytest.approx(-0.5 * math.log(1 - r**2), abs=0.08)


def test_dip_penalizes_the_distance_of_a_known_covariance():
    torch.manual_seed(0)
    n, target = 50, torch.tensor([[0.5, 0.2], [0.2, 1.5]], dtype=torch.float64)
    mean = 3.0 + with_covariance(n, target)
    _, record = fixed_posterior(mean, torch.tensor(math.log(0.3), dtype=torch.float64))
    plain = objectives.elbo(record)
    one = objectives.dip_i(record, off_diagonal=7.0, diagonal=11.0) - plain
    assert torch.allclose(one, torch.full_like(one, 7 * 2 * 0.2**2 + 11 * (0.5**2 + 0.5**2)))
    two = objectives.dip_ii(record, off_diagonal=7.0, diagonal=11.0) - plain
    truth = 7 * 2 * 0.2**2 + 11 * ((0.5 + 0.09 - 1) ** 2 + (1.5 + 0.09 - 1) ** 2)
    assert torch.allclose(two, torch.full_like(two, truth))


# -- divergences


def test_mmd_is_unbiased_and_has_the_closed_form_of_gaussians():
    torch.manual_seed(0)
    n, d, shift, scale, bandwidth = 12, 3, 0.7, 0.5, 0.8

    def draws(other):
        x, y = torch.randn(2, n, d, dtype=torch.float64)
        return x, (shift + scale * y if other else y)

    for kernel in ("rbf", "imq"):
        equal = torch.stack([mmd(*draws(other=False), kernel) for _ in range(700)])
        assert abs(equal.mean()) < 4 * equal.std() / 700**0.5
        assert equal.min() < 0
    h2 = bandwidth**2 * d

    def expected(distance2, variance):
        return (h2 / (h2 + variance)) ** (d / 2) * math.exp(-distance2 / (2 * (h2 + variance)))

    truth = expected(0, 2) + expected(0, 2 * scale**2) - 2 * expected(d * shift**2, 1 + scale**2)
    found = torch.stack([mmd(*draws(other=True), "rbf", bandwidth) for _ in range(700)])
    assert abs(found.mean() - truth) < 4 * found.std() / 700**0.5
    assert truth > 10 * found.std() / 700**0.5
    with pytest.raises(ValueError, match="kernel: expected 'imq' or 'rbf'"):
        mmd(*draws(other=True), "linear")
    with pytest.raises(ValueError, match="2 examples or more"):
        mmd(torch.zeros(1, 2), torch.zeros(5, 2))


def test_the_sliced_wasserstein_distance_of_a_shift():
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = (x + shift)[torch.randperm(40)]
    found = sliced_wasserstein(x, moved, 20_000)
    assert found.item() == pytest.approx(shift.square().sum().item() / 3, rel=0.03)
    assert sliced_wasserstein(x, x[torch.randperm(40)]).item() == pytest.approx(0, abs=1e-20)


def test_divergences_are_added_to_the_distortion():
    record = passed(gaussian_vae(), data(8), closed_form=True)
    e = record.terms
    (z,) = record.draws.values()

    def prior():
        return torch.randn(8, LATENTS, dtype=torch.float64)

    torch.manual_seed(3)
    found = objectives.info_vae(record, alpha=0.25, scale=5.0, kernel="rbf")
    torch.manual_seed(3)
    truth = 0.75 * e.rate + 4.25 * mmd(z, prior(), "rbf") - e.log_px
    assert torch.allclose(found, truth)
    torch.manual_seed(3)
    found = objectives.wae_mmd(record, scale=5.0)
    torch.manual_seed(3)
    assert torch.allclose(found, 5 * mmd(z, prior()) - e.log_px)
    torch.manual_seed(3)
    found = objectives.swae(record, scale=5.0)
    torch.manual_seed(3)
    assert torch.allclose(found, 5 * sliced_wasserstein(z, prior()) - e.log_px)
    deep = passed(deep_vae(), data(8))
    assert objectives.wae_mmd(deep).shape == (8,)  # of both latents, by a pass of the model


# -- terms for reconstructions


def test_an_adversarial_term_and_its_critic():
    torch.manual_seed(0)
    model, x = gaussian_vae(), data()
    record = passed(model, x, share=0.5)
    objective = objectives.Adversarial(record, weight=2.0, start=0.4, width=8).double()
    (z,) = record.draws.values()
    mean = model.decoder(z).mean
    fake, real = (objective.critic(t)[:, 0] for t in (mean, x))
    truth = objectives.elbo(record) - 2 * logsigmoid(fake)
    assert torch.allclose(objective(record), truth)
    loss = objective.critic_loss(record)
    assert torch.allclose(loss, -0.5 * (logsigmoid(real) + logsigmoid(-fake)))
    assert all(
        g is None
        for g in torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    )
    record.share = 0.3
    assert torch.equal(objective(record), objectives.elbo(record))


def test_a_perceptual_term_by_features_of_the_user():
    torch.manual_seed(0)
    model = musigma.build("vae", (2, 8, 8), latents=2, width=8, likelihood="logistic-mixture")
    model = model.double()
    x = torch.randint(256, (3, 2, 8, 8)).double()
    record = passed(model, x)
    network = nn.Conv2d(2, 4, 3).double()
    objective = objectives.Perceptual(
        record, features=lambda t: [network(t), t.mean((2, 3))], weight=0.5
    )
    assert not list(objective.parameters())
    seen = record.ps[model]
    pairs = 2 * x / 255 - 1, 2 * seen.location / 255 - 1
    maps = [nn.functional.normalize(network(t), dim=1) for t in pairs]
    means = [nn.functional.normalize(t.mean((2, 3)), dim=1) for t in pairs]
    truth = (maps[0] - maps[1]).square().sum(1).mean((1, 2))
    truth = truth + (means[0] - means[1]).square().sum(1)
    assert torch.allclose(objective(record), objectives.elbo(record) + 0.5 * truth)
    with pytest.raises(ValueError, match="features: perceptual needs a feature network"):
        objectives.Perceptual(record)
    with pytest.raises(ValueError, match="features: there is no 'nothing'; known are"):
        objectives.Perceptual(record, features="nothing")


def test_the_location_of_a_logistic_mixture_is_the_mean_of_its_draws():
    torch.manual_seed(0)
    means = 0.4 * torch.randn(1, 3, 2, 1, 1, dtype=torch.float64).clamp(-1, 1)
    scales = torch.full_like(means, -4.0)
    logits, shift = torch.randn(1, 3, 1, 1).double(), 0.3 * torch.randn(1, 3, 1, 1, 1).double()
    dist = DiscretizedLogisticMixture(logits, means, scales, 256, shift)
    draws = dist.sample((4000,))
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - dist.location).abs() < 4 * error).all()


def test_a_likelihood_without_a_mean_is_refused_by_name():
    class Meanless(DiagonalGaussian):
        @property
        def mean(self):
            raise NotImplementedError

    model = gaussian_vae()
    model.decoder = Fixed(Meanless(torch.zeros(5, D), torch.zeros(5, D), 1))
    with pytest.raises(ValueError, match="adversarial needs a likelihood whose mean has a grad"):
        objectives.Adversarial(passed(model, data()))


def test_equivariance_scores_turned_data_given_turned_latents(monkeypatch):
    torch.manual_seed(0)
    model = musigma.build(
        "autoencoder_kl", (1, 8, 8), latents=2, widths=(4, 8), groups=4, attend_middle=False
    ).double()  # fmt: skip
    x = torch.randint(256, (3, 1, 8, 8)).double()
    record = passed(model, x)
    vae = model.prior
    (z,) = (t for site, t in record.draws.items() if site is not model.layers[0])
    seen = record.values[vae]
    for turns in range(4):
        monkeypatch.setattr(
            torch, "randint", lambda *args, t=turns: torch.tensor(t if len(args) == 2 else 4)
        )
        found = objectives.equivariance(record, weight=0.5, smallest=1.0)
        other = vae.decoder(z.rot90(turns, (2, 3))).log_prob(seen.rot90(turns, (2, 3)))
        assert torch.allclose(found, objectives.elbo(record) - 0.5 * other)
    monkeypatch.undo()
    assert objectives.equivariance(record).isfinite().all()
    with pytest.raises(ValueError, match="latents with height and width"):
        objectives.equivariance(passed(gaussian_vae(), data()))


# -- by name


def test_a_sum_adds_what_each_objective_adds_to_the_elbo():
    record = passed(gaussian_vae(), data(8), closed_form=True, examples=100)
    found = Chosen("beta-elbo beta=0.5 + beta-tc beta=3.0 + dip-i").module(record)(record)
    e = record.terms
    more = objectives.beta_tc(record, beta=3.0) + objectives.dip_i(record) + 2 * e.elbo
    assert torch.allclose(found, 0.5 * e.rate - e.log_px + more)
    torch.manual_seed(0)
    both = Chosen("factor-vae width=4 + adversarial width=4").module(record).double()
    losses = [part.critic_loss for part in both.parts]
    torch.manual_seed(1)
    loss = both.critic_loss(record)
    torch.manual_seed(1)
    assert torch.allclose(loss, losses[0](record) + losses[1](record))
    assert len(both.critic_optimizer().param_groups) == 2
    assert not hasattr(Chosen("dip-i + swae").module(record), "critic_loss")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta-ct", "objective: there is no .*; did you mean 'beta-tc'"),
        ("beta-tc bata=2", "objective: beta-tc takes beta=6.0 .* got 'bata=2'"),
        ("beta-tc beta=much", "got 'beta=much'"),
        ("iwae k=5 + elbo", "a sum needs as many draws for each; got iwae 5, elbo 1"),
        ("iwae k=5 + iwae k=5", "a sum is for one draw per example; got 5"),
    ],
)
def test_what_cannot_be_chosen_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Chosen(text)


def test_draws_and_closed_forms_follow_the_name():
    assert (Chosen("piwae k=3 m=4").draws, Chosen("elbo").draws) == (12, 1)
    assert [Chosen(n).closed_form for n in ("elbo", "stl", "iwae", "iwae k=2")] == [1, 0, 1, 0]


def test_every_objective_states_its_equation_and_unit():
    built_in = [f for f in OBJECTIVES.values() if f.__module__.startswith("musigma")]
    for function in built_in:
        assert "Nats, (B,)." in function.__doc__
        assert len(function.__doc__.splitlines()[0]) > 10
