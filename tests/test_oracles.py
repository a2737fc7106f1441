"""Models and distributions against closed forms."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, kl_divergence

from musigma import objectives
from musigma.conditional import Conditional
from musigma.distributions import (
    LIKELIHOODS,
    DiscretizedLogisticMixture,
    FactorizedBernoulli,
    FactorizedBetaBinomial,
    FactorizedCategorical,
    FactorizedContinuousBernoulli,
    LearnedNormal,
    LikelihoodHead,
    LogitNormal,
    LogitNormalHead,
    OptimalGaussianHead,
    StandardNormal,
    StandardUniform,
    likelihood,
    register_likelihood,
)
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.ladder import Ladder, LadderBlock
from musigma.layers import (
    MADE,
    ActNorm,
    Dequantize,
    InvertibleConv,
    Permutation,
    Rescale,
    Split,
)
from musigma.model import VAE, Chain, Prior
from musigma.spec import Spec, Variable
from musigma.testing import randomized
from musigma.trace import Evidence, Trace
from musigma.zoo import build

D, K = 6, 3


@pytest.fixture(autouse=True)
def exact():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def linear(weight, bias):
    """A given affine map as a linear layer, or as a 1x1 convolution if the weight is 4-D."""
    outputs, inputs = weight.shape[:2]
    layer = nn.Linear(inputs, outputs) if weight.ndim == 2 else nn.Conv2d(inputs, outputs, 1)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def gaussian(weight, bias, std):
    """A head N(weight given + bias, diag std²)."""
    wide = torch.cat([weight, torch.zeros_like(weight)])
    net = linear(wide, torch.cat([bias, std.log()]))
    return GaussianHead(net, event_ndims=weight.ndim - 1 if weight.ndim == 2 else 3)


def max_error(a, b):
    return float((a - b).detach().abs().max())


# -- log p(x) of linear Gaussian models


class PPCA:
    """x = W z + μ + σ ε with orthogonal loadings, so that the posterior is diagonal."""

    def __init__(self, prior, spread=1.0):
        loadings = torch.linalg.qr(torch.randn(D, K))[0] * torch.tensor([2.0, 1.0, 0.3])
        mean, noise = torch.randn(D), 0.7
        start, scale = torch.zeros(K), torch.ones(K)
        model = Prior(StandardNormal((K,)))
        if prior == "learned":
            model = randomized(Prior(LearnedNormal((K,))))
            start, scale = (t.detach() for t in (model.head().mean, model.head().stddev))
        elif prior == "flow":  # z -> (z + b) e^s is standard
            model = randomized(Chain([ActNorm(K)], model))
            start = -model.layers[0].bias.detach()
            scale = (-model.layers[0].log_scale.detach()).exp()
        precision = loadings.square().sum(0) / noise**2 + scale**-2
        gain = loadings.T / noise**2 / precision[:, None]
        bias = start / scale**2 / precision - gain @ mean
        encoder = gaussian(gain, bias, spread * precision.rsqrt())
        decoder = GaussianHead(linear(loadings, mean), event_ndims=1, log_std=math.log(noise))
        self.model = VAE(encoder, decoder, model)
        covariance = loadings @ torch.diag(scale**2) @ loadings.T + noise**2 * torch.eye(D)
        self.truth = MultivariateNormal(mean + loadings @ start, covariance)
        self.rest = (loadings.square().sum(0) / precision).sum() * spread**2 / noise**2 / 2
        self.x = self.truth.sample((4,)) + torch.randn(4, D)
        self.log_p = self.truth.log_prob(self.x)


@pytest.mark.parametrize("prior", ["standard", "learned", "flow"])
def test_ppca_with_the_exact_posterior_has_a_constant_weight(prior):
    """With the exact posterior, log w = log p(x) for every draw."""
    ppca = PPCA(prior)
    for _ in range(5):
        assert max_error(ppca.model(ppca.x, closed_form=False).elbo, ppca.log_p) < 1e-10
    assert max_error(ppca.model.iwae(ppca.x, 7, at_once=12), ppca.log_p) < 1e-10


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_ppca_with_a_closed_form_kl(prior):
    """E[log p(x|z)] is that at the posterior mean, less tr(W S W') / 2σ²."""
    ppca = PPCA(prior)
    trace = Trace(temperature=0.0, closed_form=True)
    ppca.model.infer(ppca.x, trace)
    elbo = trace.evidence(ppca.model.latents()).elbo - ppca.rest
    assert max_error(elbo, ppca.log_p) < 1e-10


def test_bounds_of_a_wrong_posterior():
    """A posterior 1.3 times too wide: the ELBO's gap is its KL, and IWAE closes it."""
    ppca, n = PPCA("standard", spread=1.3), 4096
    gap = K * (0.5 * (1.3**2 - 1) - math.log(1.3))
    with torch.no_grad():
        log_w = ppca.model(ppca.x.repeat_interleave(n, 0), closed_form=False).elbo.reshape(4, n)
        closed = ppca.model(ppca.x.repeat_interleave(n, 0)).elbo.reshape(4, n)
    for draws in (log_w, closed):
        error = draws.std(1) / math.sqrt(n)
        assert ((draws.mean(1) - (ppca.log_p - gap)).abs() < 5 * error).all()
        assert (draws.mean(1) + 5 * error < ppca.log_p).all()

    def iwae(k):  # the mean of all disjoint groups of k
        return (log_w.reshape(4, -1, k).logsumexp(2) - math.log(k)).mean(1)

    bounds = torch.stack([iwae(4**i) for i in range(7)])  # 1, 4, ..., 4096 of the same draws
    assert (bounds.diff(dim=0) > 0).all()
    ratio = (log_w - ppca.log_p[:, None]).exp()  # E w = p(x), so this is 1 on average
    error = ratio.std(1) / math.sqrt(n)
    assert ((ratio.mean(1) - 1).abs() < 5 * error).all()
    assert ((bounds[-1] - ppca.log_p).abs() < 5 * error).all()
    assert (error < 0.02).all()
    with torch.no_grad():
        assert ((ppca.model.iwae(ppca.x, n) - ppca.log_p).abs() < 5 * error).all()
    bits = ppca.model.bits_per_dim(ppca.x, k=n) * D * math.log(2)
    assert ((bits + ppca.log_p).abs() < 5 * error).all()


def test_nested_vae_of_scalars():
    """X from z, z from y, all Gaussian: exact posteriors of both give log p(x)."""
    w, mu, noise = torch.randn(D, 1), torch.randn(D), 0.4 + torch.rand(D)
    a, c, s = torch.tensor(1.7), torch.tensor(-0.6), torch.tensor(0.8)
    # y ~ N(0, 1), z | y ~ N(a y + c, s²), so z ~ N(c, a² + s²)
    z_var = a**2 + s**2
    precision = 1 / z_var + (w[:, 0] / noise).square().sum()
    gain = (w / noise[:, None] ** 2).T / precision
    encoder = gaussian(gain, c / z_var / precision - gain @ mu, precision.rsqrt().reshape(1))
    inner = VAE(
        gaussian((a / z_var).reshape(1, 1), -(a * c / z_var).reshape(1), (s / z_var.sqrt())[None]),
        gaussian(a.reshape(1, 1), c.reshape(1), s.reshape(1)),
        Prior(StandardNormal((1,))),
    )
    model = VAE(encoder, gaussian(w, mu, noise), inner)
    truth = MultivariateNormal(mu + w[:, 0] * c, z_var * w @ w.T + torch.diag(noise**2))
    x = 2 * torch.randn(5, D)
    for _ in range(3):
        assert max_error(model(x, closed_form=False).elbo, truth.log_prob(x)) < 1e-10
    assert len(model.encode(x)) == 2


def affine_of(function, shape):
    """Matrix and offset of an affine function of one example."""
    size = math.prod(shape)
    start = function(torch.zeros(1, *shape)).detach().flatten()
    ends = function(torch.eye(size).reshape(size, *shape)).detach().flatten(1)
    return (ends - start).T, start


@pytest.mark.parametrize("shape", [(5,), (3, 2, 2)])
def test_linear_flow_is_a_multivariate_normal(shape):
    c = shape[0]
    layers = [
        ActNorm(c),
        InvertibleConv(c),
        Permutation.shuffle(c),
        InvertibleConv(c, lu=False),
        Rescale(-1.5, 0.3),
        ActNorm(c),
    ]
    model = randomized(Chain(layers, Prior(LearnedNormal(shape))))
    matrix, offset = affine_of(lambda x: model.encode(x)[0], shape)
    base = model.prior.head()
    inverse = torch.linalg.inv(matrix)
    covariance = inverse @ torch.diag(base.variance.flatten()) @ inverse.T
    truth = MultivariateNormal(inverse @ (base.mean.flatten() - offset), covariance)
    x = torch.randn(6, *shape)
    assert max_error(model.log_prob(x), truth.log_prob(x.flatten(1))) < 1e-10
    drawn = model.as_distribution()
    assert drawn.event_shape == shape
    assert max_error(drawn.log_prob(x.reshape(2, 3, *shape)).flatten(), model.log_prob(x)) == 0
    n = 20_000
    sample = drawn.sample((n,)).flatten(1)
    white = torch.linalg.solve(truth.scale_tril, (sample - truth.mean).T)
    assert (white.mean(1).abs() < 5 / math.sqrt(n)).all()
    assert ((white @ white.T / n - torch.eye(len(white))).abs() < 5 * math.sqrt(2 / n)).all()


@pytest.mark.parametrize("spec", [False, True])
def test_a_conditional_model_is_a_distribution_for_each_row_of_its_context(spec):
    model = Conditional(randomized(build("nsf", (3,), depth=1, hidden=6, context=4)), Joined())
    variables = Variable("a", shape=(2,)), Variable("b", shape=(2, 4, 4))
    model.spec = Spec((3,), context=variables) if spec else None
    context = {"a": torch.randn(5, 2), "b": torch.randn(5, 2, 4, 4)}
    dist = model.double().as_distribution(context)
    assert (dist.batch_shape, dist.event_shape) == ((5,), (3,))
    x = torch.randn(2, 5, 3)
    found = dist.log_prob(x)
    assert max_error(found, torch.stack([model.log_prob(part, context) for part in x])) < 1e-12
    torch.manual_seed(0)
    drawn = dist.sample((2,))
    torch.manual_seed(0)
    twice = {name: torch.cat([t, t]) for name, t in context.items()}
    assert max_error(drawn, model.sample(10, twice).reshape(2, 5, 3)) == 0


class Joined(nn.Module):
    def forward(self, context):
        return torch.cat([context["a"], context["b"].mean((2, 3))], 1)


def test_linear_split_is_a_multivariate_normal():
    """The latent half is Gaussian given the other half, so both are jointly Gaussian."""
    split = Split(GaussianHead(linear(torch.randn(6, 3), torch.randn(6)), event_ndims=1))
    with torch.no_grad():
        split.prior.net.weight[3:] = 0
    model = Chain([InvertibleConv(6), split, ActNorm(3)], Prior(LearnedNormal((3,))))
    model.layers[0] = randomized(model.layers[0])
    kept = randomized(Chain([ActNorm(3)], Prior(LearnedNormal((3,)))))
    model.layers[2], model.prior = kept.layers[0], kept.prior
    weight, bias = split.prior.net.weight[:3], split.prior.net.bias
    mix = torch.linalg.inv(model.layers[0].matrix())
    scale = (-model.layers[2].log_scale).exp()
    base = model.prior.head()
    mean1, var1 = base.mean * scale - model.layers[2].bias, base.variance * scale**2
    top = torch.cat([torch.eye(3), weight])  # (h, z) = top h + noise in z
    covariance = top @ torch.diag(var1) @ top.T
    covariance[3:, 3:] += torch.diag((2 * bias[3:]).exp())
    mean = torch.cat([mean1, weight @ mean1 + bias[:3]])
    covariance = mix @ covariance @ mix.T
    truth = MultivariateNormal(mix @ mean, 0.5 * (covariance + covariance.T))
    x = torch.randn(5, 6)
    assert max_error(model.log_prob(x), truth.log_prob(x)) < 1e-10


class Seen(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return [x] * self.blocks


class Add(nn.Module):
    def __init__(self, direction):
        super().__init__()
        self.register_buffer("direction", direction.reshape(-1, 1, 1))

    def forward(self, state, z):
        return state + self.direction * z


@pytest.mark.parametrize("spread", [1.0, 1.2])
def test_linear_gaussian_ladder(spread):
    """Scalar latents that add to the state; every posterior is the exact conditional."""
    levels, c, d = 3, 4, 5
    size = levels + d  # independent noises behind everything
    top, directions = torch.randn(c), torch.randn(levels, c)
    state, spans = top.clone(), torch.zeros(c, size)  # mean of the state, and its noises
    means, rows, priors = [], [], []
    for i in range(levels):
        weight, bias, std = torch.randn(c) / 2, torch.randn(1), 0.5 + torch.rand(1)
        priors.append(gaussian(weight.reshape(1, c, 1, 1), bias, std))
        means.append((weight @ state + bias).reshape(1))
        row = weight @ spans
        row[i] += std.item()
        rows.append(row.reshape(1, -1))
        state = state + directions[i] * means[-1]
        spans = spans + directions[i][:, None] * row
    weight, bias, std = torch.randn(d, c), torch.randn(d), 0.5 + torch.rand(d)
    means.append(weight @ state + bias)
    observed = weight @ spans
    observed[:, levels:] += torch.diag(std)
    rows.append(observed)
    mean, span = torch.cat(means), torch.cat(rows)
    covariance = span @ span.T  # of (z_1, ..., z_levels, x)

    blocks = []
    for i in range(levels):
        known = [*range(i), *range(levels, size)]  # the latents above, and x
        gain = torch.linalg.solve(covariance[known][:, known], covariance[known, i])
        std_i = (covariance[i, i] - gain @ covariance[known, i]).sqrt()
        offset = mean[i] - gain @ mean[known]
        # the latents above follow from the state: state = top + directions[:i].T z
        off_state = torch.linalg.pinv(directions[:i].T).T @ gain[:i] if i else torch.zeros(c)
        weights = torch.cat([off_state, gain[i:]]).reshape(1, -1, 1, 1)
        bias_i = (offset - off_state @ top).reshape(1)
        posterior = gaussian(weights, bias_i, spread * std_i.reshape(1))
        blocks.append(LadderBlock(priors[i], posterior, Add(directions[i])))
    decoder = gaussian(weight.reshape(d, c, 1, 1), bias, std)
    model = Ladder(Seen(levels), blocks, decoder, (c, 1, 1))
    with torch.no_grad():
        model.top.copy_(top.reshape(1, c, 1, 1))

    truth = MultivariateNormal(mean[levels:], covariance[levels:, levels:])
    x = truth.sample((3,)) + torch.randn(3, d)
    log_p, images = truth.log_prob(x), x.reshape(3, d, 1, 1)
    if spread == 1.0:
        for _ in range(4):
            assert max_error(model(images, closed_form=False).elbo, log_p) < 1e-10
        n = 20_000
        sample = model.sample(n).flatten(1)
        white = torch.linalg.solve(truth.scale_tril, (sample - truth.mean).T)
        assert (white.mean(1).abs() < 5 / math.sqrt(n)).all()
        assert ((white @ white.T / n - torch.eye(d)).abs() < 5 * math.sqrt(2 / n)).all()
        return
    n, gap = 4096, levels * (0.5 * (spread**2 - 1) - math.log(spread))
    with torch.no_grad():
        for closed_form in (False, True):
            elbo = model(images.repeat_interleave(n, 0), closed_form=closed_form).elbo
            elbo = elbo.reshape(3, n)
            error = elbo.std(1) / math.sqrt(n)
            assert ((elbo.mean(1) - (log_p - gap)).abs() < 5 * error).all()


class Pick(nn.Module):
    """The features of a linear-Gaussian ladder are the data themselves."""

    def forward(self, x):
        return [x, x]


class Carry(nn.Module):
    """The state is (z1, z2): each block writes its own part."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, state, z):
        parts = list(state.split(2, 1))
        parts[self.place] = z
        return torch.cat(parts, 1)


def test_linear_gaussian_ladder_of_vectors():
    """z1 ~ N(0, I), z2 ~ N(A z1, s²), x ~ N(B z1 + C z2, t²), with the exact posteriors."""
    s, t, d = 0.7, 0.5, 5
    a, b, c = (torch.randn(shape) for shape in ((2, 2), (d, 2), (d, 2)))
    # the joint of (z1, z2, x)
    top = torch.eye(2)
    cross = b + c @ a
    x_cov = cross @ cross.T + s**2 * c @ c.T + t**2 * torch.eye(d)
    # q(z1 | x) and q(z2 | z1, x): full-covariance, so rotate them to be diagonal
    gain = torch.linalg.solve(x_cov, cross).T
    q1 = top - gain @ cross
    noise = s**2 * c @ c.T + t**2 * torch.eye(d)
    gain2 = s**2 * torch.linalg.solve(noise, c).T
    q2 = s**2 * torch.eye(2) - gain2 @ c * s**2
    v1, v2 = torch.linalg.eigh(q1)[1], torch.linalg.eigh(q2)[1]
    zero = torch.zeros(2, 4)

    def head(mean_weight, cov):
        return GaussianHead(
            linear(mean_weight, torch.zeros(2)),
            event_ndims=1,
            log_std=0.5 * cov.diagonal().log(),
        )

    # in rotated coordinates u1 = V1' z1 and u2 = V2' z2 both posteriors are diagonal
    blocks = [
        LadderBlock(
            head(zero, torch.eye(2)),
            head(torch.cat([zero, v1.T @ gain], 1), v1.T @ q1 @ v1),
            Carry(0),
        ),
        LadderBlock(
            head(torch.cat([v2.T @ a @ v1, zero[:, :2]], 1), s**2 * torch.eye(2)),
            head(
                torch.cat([v2.T @ (a - gain2 @ cross) @ v1, zero[:, :2], v2.T @ gain2], 1),
                v2.T @ q2 @ v2,
            ),
            Carry(1),
        ),
    ]
    decoder = GaussianHead(
        linear(torch.cat([b @ v1, c @ v2], 1), torch.zeros(d)),
        event_ndims=1,
        log_std=math.log(t),
    )
    ladder = Ladder(Pick(), blocks, decoder, (4,))
    truth = MultivariateNormal(torch.zeros(d), x_cov)
    x = truth.sample((60,))
    for _ in range(3):
        log_w = ladder(x, closed_form=False).elbo
        assert (log_w - truth.log_prob(x)).abs().max() < 1e-9
    draws = ladder.sample(200_000)
    assert (draws.T.cov() - x_cov).abs().max() < 0.05 * x_cov.abs().max()
    kl = ladder(x).kl
    assert kl.shape == (60, 2)
    assert (kl > 0).all()


# -- masses that sum to one, densities that integrate to one


def every(levels, *shape):
    """All examples of a shape."""
    grid = itertools.product(range(levels), repeat=math.prod(shape))
    return torch.tensor(list(grid)).reshape(-1, *shape).double()


def total(dist_of, x):
    """Σ p(x) over the rows, for a distribution of one example."""
    return float(dist_of(len(x)).log_prob(x).logsumexp(0).exp())


def mixture(n, levels, channels, k, *, scale=0.0, shift=0.0, seed=0, dtype=torch.float64):
    """One random mixture for a single pixel, repeated n times."""
    torch.manual_seed(seed)
    logits, mean = torch.randn(1, k, 1, 1), torch.randn(1, k, channels, 1, 1) + shift
    log_scale = torch.randn(1, k, channels, 1, 1) / 2 + scale
    coefficients = torch.randn(1, k, channels * (channels - 1) // 2, 1, 1).tanh()
    parts = [logits, mean, log_scale, levels, coefficients if channels > 1 else None]
    parts = [
        p.to(dtype).expand(n, *p.shape[1:]) if isinstance(p, torch.Tensor) else p for p in parts
    ]
    return DiscretizedLogisticMixture(*parts)


@pytest.mark.parametrize("levels", [2, 7, 256])
def test_a_beta_binomial_equals_scipys_and_sums_to_one(levels):
    import scipy.stats

    torch.manual_seed(levels)
    log_alpha, log_beta = torch.randn(2, 1, 5, dtype=torch.float64) * 2
    grid = torch.arange(levels).double()
    for i in range(5):
        dist = FactorizedBetaBinomial(log_alpha[:, i : i + 1], log_beta[:, i : i + 1], levels)
        each = [p[:, i : i + 1].expand(levels, 1) for p in (log_alpha, log_beta)]
        ours = FactorizedBetaBinomial(*each, levels).log_prob(grid[:, None])
        a, b = float(log_alpha[0, i].exp()), float(log_beta[0, i].exp())
        theirs = scipy.stats.betabinom(levels - 1, a, b)
        assert (ours - torch.from_numpy(theirs.logpmf(grid.numpy()))).abs().max() < 1e-9
        assert abs(float(ours.logsumexp(0))) < 1e-9
        assert abs(float(dist.mean) - theirs.mean()) < 1e-9 * levels
        assert ours[int(dist.mode)] == ours.max()
    many = FactorizedBetaBinomial(log_alpha.expand(20_000, 5), log_beta.expand(20_000, 5), levels)
    drawn, mean = many.sample(), many.mean[0]
    error = drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - mean).abs() < 5 * error + 1e-12).all()


@pytest.mark.parametrize("scale", [-12.0, -7.0, -3.0, 0.0, 3.0, 7.0, 12.0])
@pytest.mark.parametrize(
    ("levels", "channels", "k"), [(256, 1, 1), (256, 1, 5), (16, 2, 2), (4, 3, 3), (2, 3, 1)]
)
def test_discretized_logistics_sum_to_one(levels, channels, k, scale):
    x = every(levels, channels, 1, 1)
    for shift in (0.0, 3.0, -20.0):
        dist = mixture(len(x), levels, channels, k, scale=scale, shift=shift)
        assert dist.log_prob(x).isfinite().all()
        assert abs(float(dist.log_prob(x).logsumexp(0).exp()) - 1) < 1e-12
        single = mixture(
            len(x), levels, channels, k, scale=scale, shift=shift, dtype=torch.float32
        )
        log_p = single.log_prob(x.float())
        assert log_p.isfinite().all()
        assert abs(float(log_p.double().logsumexp(0).exp()) - 1) < 1e-4


def test_extreme_logistics_are_finite_where_naive_differences_are_not():
    x = torch.tensor([[0.0], [7.0], [255.0]])
    dist = DiscretizedLogisticMixture(
        torch.zeros(3, 1), torch.full((3, 1, 1), 0.9), torch.full((3, 1, 1), -7.0), 256
    )
    log_prob = dist.log_prob(x)
    assert log_prob.isfinite().all()
    assert log_prob[1] < -500


def test_discrete_masses_sum_to_one():
    logits = 4 * torch.randn(1, 2, 1, 2)
    assert (
        abs(total(lambda n: FactorizedBernoulli(logits.expand(n, 2, 1, 2)), every(2, 2, 1, 2)) - 1)
        < 1e-12
    )
    logits = 4 * torch.randn(1, 5, 3)
    assert (
        abs(total(lambda n: FactorizedCategorical(logits.expand(n, 5, 3)), every(5, 3)) - 1)
        < 1e-12
    )


@pytest.mark.parametrize(
    ("dist_of", "x"),
    [
        (lambda n: mixture(n, 4, 3, 2), every(4, 3, 1, 1)),
        (lambda n: mixture(n, 16, 1, 3, scale=-1.0), every(16, 1, 1, 1)),
        (lambda n: FactorizedBernoulli(torch.tensor([0.3, -1.0, 1.5]).expand(n, 3)), every(2, 3)),
        (
            lambda n: FactorizedCategorical(
                torch.linspace(-1, 1, 8).reshape(4, 2).expand(n, 4, 2)
            ),
            every(4, 2),
        ),
    ],
    ids=["mixture", "mixture, gray", "bernoulli", "categorical"],
)
def test_draws_are_as_frequent_as_their_mass(dist_of, x):
    """Pearson's statistic over the levels with a large enough expected count; five sigma."""
    n = 100_000
    expected = dist_of(len(x)).log_prob(x).exp() * n
    dist = dist_of(n)
    torch.manual_seed(1)
    drawn = dist.sample().flatten(1)
    base = int(x.max()) + 1
    powers = base ** torch.arange(drawn.shape[1] - 1, -1, -1)
    counts = torch.bincount((drawn * powers).sum(1).long(), minlength=len(x))
    many = expected > 10
    assert many.sum() > 5
    statistic = ((counts - expected).square() / expected)[many].sum()
    freedom = int(many.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    rest = counts[~many].sum() - expected[~many].sum()
    assert abs(rest) <= 5 * expected[~many].sum().sqrt()


@pytest.mark.parametrize("kind", [FactorizedBernoulli, FactorizedCategorical])
def test_discrete_draws_follow_the_mass_at_any_temperature(kind):
    n, logits = 100_000, torch.tensor([0.4, -1.0, 1.5])
    if kind is FactorizedBernoulli:
        dist, mass = FactorizedBernoulli(logits.expand(n, 3)), lambda t: (logits / t).sigmoid()
        found = lambda x: x.mean(0)  # noqa: E731
    else:
        dist = FactorizedCategorical(logits.expand(n, 3).unsqueeze(-1))
        mass = lambda t: (logits / t).softmax(0)  # noqa: E731
        found = lambda x: torch.bincount(x[:, 0].long(), minlength=3) / n  # noqa: E731
    for t in (1.0, 0.5):
        error = (found(dist.sample(temperature=t)) - mass(t)).abs().max()
        assert error < 5 * 0.5 / math.sqrt(n)


def quadrature(n=4000):
    """Midpoints of the unit interval, graded toward its ends, with their weights."""
    t = (torch.arange(n) + 0.5) / n
    return t**3 * (10 - 15 * t + 6 * t**2), 30 * (t * (1 - t)).square() / n


LOGITS = [-40.0, -8.0, -1.0, -0.1001, -0.0999, -1e-3, 0.0, 1e-6, 0.05, 0.0999, 0.1001, 2.0, 40.0]


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli(logit):
    u, weight = quadrature()
    dist = FactorizedContinuousBernoulli(torch.full((len(u), 1), logit))
    density = dist.log_prob(u[:, None]).exp()
    assert abs(float((density * weight).sum()) - 1) < 1e-9
    assert abs(float((density * weight * u).sum() - dist.mean[0, 0])) < 1e-9
    n = 20_000
    torch.manual_seed(1)
    drawn = FactorizedContinuousBernoulli(torch.full((n, 1), logit)).sample()[:, 0].sort().values
    cdf = torch.special.expm1(logit * drawn) / math.expm1(logit) if logit else drawn
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2.2 / math.sqrt(n)  # Kolmogorov: one in ten thousand is larger
    if abs(logit) < 10:
        theirs = TorchContinuousBernoulli(logits=torch.tensor(logit))
        assert torch.allclose(dist.log_prob(u[:, None]), theirs.log_prob(u), atol=1e-6)
        assert torch.allclose(dist.mean[0, 0], theirs.mean, atol=1e-6)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-4.0, 0.3), (0.2, -3.0)])
def test_logit_normal(mean, log_std):
    u, weight = quadrature(20_000)
    base = DiagonalGaussian(*torch.tensor([mean, log_std]).expand(len(u), 1, 2).unbind(-1), 1)
    density = LogitNormal(base).log_prob(u[:, None]).exp()
    assert abs(float((density * weight).sum()) - 1) < 1e-9
    torch.manual_seed(1)
    drawn = LogitNormal(base).sample()[:, 0].sort().values
    cdf = Normal(mean, math.exp(log_std)).cdf(drawn.logit())
    assert (cdf - (torch.arange(len(u)) + 0.5) / len(u)).abs().max() < 2.2 / math.sqrt(len(u))


def test_flow_integrates_to_one():
    model = randomized(build("realnvp", (2,), bits=None, depth=4, hidden=8))
    axis = torch.linspace(-32, 32, 641)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(float(mass) - 1) < 1e-9


# -- figures of integer data


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_uniform_model_costs_exactly_its_bits(bits):
    shape = (3, 4, 2)
    model = Chain(
        [Dequantize(StandardUniform(shape), 2**bits), Rescale(2.0**-bits)],
        Prior(StandardUniform(shape)),
    )
    x = torch.randint(2**bits, (5, *shape))
    for _ in range(3):
        assert max_error(model.bits_per_dim(x), torch.full((5,), float(bits))) < 1e-10
    assert max_error(model.bits_per_dim(x, k=4), torch.full((5,), float(bits))) < 1e-10
    single = model.float().bits_per_dim(x)
    assert single.dtype == torch.float32
    assert max_error(single, torch.full((5,), float(bits))) < 1e-5
    assert torch.equal(model.decode(model.encode(x)).long(), x)


def test_bits_of_identical_images_do_not_depend_on_their_number():
    model = randomized(build("glow", (1, 8, 8), bits=None, levels=1, depth=1, hidden=4))
    x = torch.rand(1, 1, 8, 8)
    assert torch.allclose(model.bits_per_dim(x), model.bits_per_dim(x.expand(8, -1, -1, -1))[0])


def test_log_prob_is_refused_for_models_with_bounds_only():
    model = build("vae", (1, 5, 5), width=4, latents=2)
    for call in (lambda: model.log_prob(torch.zeros(1, 1, 5, 5)), model.as_distribution):
        with pytest.raises(TypeError, match=r"use elbo\(x\), or iwae"):
            call()


@pytest.mark.parametrize("noise", ["uniform", "learned"])
def test_dequantization_bounds_the_mass_of_the_bin(noise):
    """P(x) is the density's integral over [x, x + 1): E w = P(x), E log w below it."""
    prior = Prior(GaussianHead(Constant(torch.tensor([1.2, -0.5])), event_ndims=1))
    head = StandardUniform((1,))
    if noise == "learned":
        net = linear(torch.tensor([[0.4], [0.3]]), torch.tensor([0.3, 0.5]))
        head = LogitNormalHead(GaussianHead(net, event_ndims=1), 4)
    model, n = Chain([Dequantize(head, 4)], prior), 40_000
    normal = Normal(1.2, math.exp(-0.5))
    for level in range(4):
        x = torch.full((n, 1), float(level))
        with torch.no_grad():
            log_w = model.elbo(x)
        mass = normal.cdf(torch.tensor(level + 1.0)) - normal.cdf(torch.tensor(float(level)))
        w = log_w.exp()
        assert abs(w.mean() - mass) < 5 * w.std() / math.sqrt(n)
        assert log_w.mean() + 5 * log_w.std() / math.sqrt(n) < mass.log()


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, given=None, context=None):
        return self.value[None]


# -- a registered likelihood


@pytest.fixture
def laplace():
    @register_likelihood("laplace", data="real")
    def build_laplace(shape, net, std):
        return LikelihoodHead(net(shape[0]), lambda h: Independent(Laplace(h, std), len(shape)))

    yield
    del LIKELIHOODS["laplace"]


@pytest.mark.parametrize("bits", [None, 4])
def test_a_registered_likelihood_serves_the_zoo(laplace, bits):
    options = {"net": "mlp", "latents": 2, "width": 6, "likelihood": "laplace", "std": "0.5"}
    model = build("vae", (1, 4, 4), bits=bits, **options)
    head = next(m for m in model.modules() if isinstance(m, LikelihoodHead))
    z, x = torch.randn(3, 2), torch.randn(3, 1, 4, 4)
    assert (
        max_error(head(z).log_prob(x), Laplace(head.net(z), 0.5).log_prob(x).sum((1, 2, 3)))
        < 1e-12
    )
    x = x if bits is None else (16 * x.sigmoid()).floor()
    assert model.elbo(x).shape == (3,)
    with pytest.raises(ValueError, match="the library has a likelihood 'gaussian'"):
        register_likelihood("gaussian", data="real")(lambda shape, net: head)


def test_unknown_and_unsuitable_likelihoods_are_refused(laplace):
    with pytest.raises(ValueError, match=r"one of .*bernoulli.*, laplace; got 'gausian'"):
        likelihood("gausian", (2,), lambda c: nn.Linear(3, c))
    with pytest.raises(ValueError, match="'categorical' is not for continuous data; use 'gaussi"):
        build("vae", (3,), bits=None, likelihood="categorical")
    with pytest.raises(ValueError, match=r"one of .*; got 'gausian'"):
        build("vae", (3,), bits=None, likelihood="gausian")


# -- the optimal variance


def test_optimal_gaussian():
    head = OptimalGaussianHead(nn.Linear(4, 6), event_ndims=1, momentum=0.25)
    given, x = torch.randn(5, 4), torch.randn(5, 6)
    mse = (x - head.net(given)).square().mean()
    log_prob = head(given).log_prob(x)
    closed = -0.5 * 6 * (math.log(2 * math.pi) + mse.log() + 1)
    assert max_error(log_prob.mean(), closed) < 1e-12
    best = Normal(head.net(given), mse.sqrt()).log_prob(x).sum(1)
    assert max_error(log_prob, best) < 1e-12
    for other in (0.9, 1.1):  # and no other variance is better
        assert Normal(head.net(given), other * mse.sqrt()).log_prob(x).sum() < best.sum()
    assert head.log_std == 0, "scoring must not move the running value"
    head.after_step()
    running = 0.25 * 0.5 * mse.log()
    assert max_error(head.log_std, running) < 1e-12
    head.after_step()
    assert max_error(head.log_std, running) < 1e-12, "nothing was scored since the last step"
    kept = copy.deepcopy(head.state_dict())
    head(given).log_prob(x)
    head.load_state_dict(kept)
    head.after_step()
    assert max_error(head.log_std, running) < 1e-12, "a loaded head has scored nothing"
    with torch.no_grad():
        head(given).log_prob(x + 100)  # scored, but not for training
    head(given).log_prob(torch.full_like(x, math.nan))
    for part in (slice(2), slice(2, 4)):  # the parts of one step's batch
        head(given[part]).log_prob(x[part])
    head.after_step()
    mse_of_parts = (x - head.net(given))[:4].square().mean()
    running = running.lerp(0.5 * mse_of_parts.log(), 0.25)
    assert max_error(head.log_std, running) < 1e-12
    head.eval()
    assert (
        max_error(
            head(given).log_prob(x), Normal(head.net(given), running.exp()).log_prob(x).sum(1)
        )
        < 1e-12
    )
    assert max_error(head.log_std, running) < 1e-12, "evaluation must not move it"
    assert max_error(head(given[:1]).log_prob(x[:1]), head(given).log_prob(x)[:1]) < 1e-12
    head.train()
    perfect = head(given).log_prob(head.net(given)).mean()
    assert (
        max_error(perfect, torch.tensor(6 * (6 - 0.5 * math.log(2 * math.pi)))) < 1e-9
    )  # log σ = -6


# -- a large Glow


def large_glow(x, **options):
    """Three levels of eight steps with couplings that matter, calibrated.

    The 1x1 convolutions get a quarter of the noise: a product of two dozen ill-conditioned
    matrices cannot be inverted in float32.
    """
    model = build("glow", (3, 32, 32), levels=3, depth=8, hidden=16, **options)
    calm, model = randomized(model, scale=0.25), randomized(model)
    for layer, other in zip(model.layers, calm.layers, strict=True):
        if isinstance(layer, InvertibleConv):
            layer.load_state_dict(other.state_dict())
            assert torch.linalg.cond(layer.matrix()) > 1.3  # not a rotation
    model.calibrate(x)
    return model


@pytest.fixture(scope="module")
def glows():
    """One for integers, and one for real numbers."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    integers = torch.randint(256, (8, 3, 32, 32))
    return large_glow(integers), large_glow(integers / 256 - 0.5, bits=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_glow_decodes_integers_exactly(glows, dtype):
    model, x = copy.deepcopy(glows[0]).to(dtype), torch.randint(256, (2, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x, mode=True)).long(), x)
        assert torch.equal(model.reconstruct(x).long(), x)
        if dtype == torch.float64:  # a draw may lie within float32 rounding of the next level
            assert torch.equal(model.decode(model.encode(x)).long(), x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_glow_decodes_real_numbers_to_rounding(glows, dtype, tolerance):
    model = copy.deepcopy(glows[1]).to(dtype)
    x = torch.rand(2, 3, 32, 32, dtype=dtype) - 0.5
    with torch.no_grad():
        for whiten in (False, True):
            latents = model.encode(x, whiten=whiten)
            assert max_error(model.decode(latents, whiten=whiten), x) < tolerance


def test_glow_in_bfloat16(glows):
    """Only the networks compute in half precision, so the bits are almost the same.

    Encoding and decoding disable autocast: the input of a network has a float32 rounding error
    when decoding, which can change its rounding to bfloat16, so pixels would be wrong.
    """
    model, x = copy.deepcopy(glows[0]).float(), torch.randint(256, (2, 3, 32, 32))
    with torch.no_grad():
        torch.manual_seed(0)
        truth = model.bits_per_dim(x)
        plain = model.encode(x, mode=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            bits = model.bits_per_dim(x)
            latents = model.encode(x, mode=True)
            again = model.decode(latents)
        assert bits.dtype == torch.float32
        assert not torch.equal(bits, truth)  # half precision was used
        assert ((bits - truth).abs() < 1e-3 * truth).all()
        assert all(torch.equal(a, b) for a, b in zip(latents, plain, strict=True))
        assert torch.equal(again.long(), x)


# -- interpolation


@pytest.mark.parametrize("path", ["spherical", "linear"])
@pytest.mark.parametrize("context", [0, 3])
def test_interpolation_ends_at_its_ends(path, context):
    model = randomized(build("realnvp", (4,), bits=None, depth=3, hidden=6, context=context))
    x0, x1 = torch.randn(2, 5, 4)
    given = torch.randn(2, 5, 3) if context else (None, None)
    with torch.no_grad():
        frames = model.interpolate(x0, x1, 5, *given, path=path)
        assert frames.shape == (5, 5, 4)
        assert max_error(frames[:, 0], x0) < 1e-9
        assert max_error(frames[:, -1], x1) < 1e-9
        still = model.interpolate(x0, x0, 3, given[0], path=path)
        assert max_error(still, x0[:, None]) < 1e-9
        if context:
            return
        ends = [model.encode(x, whiten=True)[0] for x in (x0, x1)]
        for i, t in enumerate(torch.linspace(0, 1, 5)):
            z = model.encode(frames[:, i], whiten=True)[0]
            if path == "linear":
                assert max_error(z, torch.lerp(*ends, t)) < 1e-9
                continue
            lengths = torch.lerp(ends[0].norm(dim=1), ends[1].norm(dim=1), t)
            assert max_error(z.norm(dim=1), lengths) < 1e-9
            angle = torch.acos(F.cosine_similarity(*ends))
            assert (
                max_error(torch.acos(F.cosine_similarity(ends[0], z).clamp(-1, 1)), t * angle)
                < 1e-6
            )


def test_interpolation_of_images_ends_at_its_ends():
    model = randomized(build("glow", (1, 8, 8), bits=4, levels=2, depth=2, hidden=6))
    x0, x1 = torch.randint(16, (2, 3, 1, 8, 8))
    with torch.no_grad():
        frames = model.interpolate(x0, x1, 4)
    assert torch.equal(frames[:, 0].long(), x0)
    assert torch.equal(frames[:, -1].long(), x1)


def test_spherical_interpolation_keeps_the_length():
    model = Prior(StandardNormal((100,)))
    a, b = torch.randn(2, 3, 100)
    norms = model.interpolate(a, b, 9).norm(dim=2)
    steps = torch.linspace(0, 1, 9)
    ends = a.norm(dim=1), b.norm(dim=1)
    assert torch.allclose(norms, torch.lerp(*(e[:, None] for e in ends), steps))
    same = model.interpolate(a, a, 3)
    assert torch.allclose(same, a[:, None].expand_as(same))


def test_interpolation_between_opposites_is_finite():
    model = Prior(StandardNormal((4,)))
    x = torch.randn(3, 4)
    assert model.interpolate(x, -x, 5).isfinite().all()
    with pytest.raises(ValueError, match="path: expected 'spherical' or 'linear'; got 'slerp'"):
        model.interpolate(x, -x, 5, path="slerp")


# -- objectives


def test_objectives_in_closed_form():
    log_px, log_q, log_det = torch.randn(3, 12)
    kl = torch.randn(12, 4).exp()
    e = Evidence(log_px, kl, log_q, log_det)
    free = 0.9
    assert torch.allclose(e.elbo, log_px - kl.sum(1) - log_q + log_det)
    assert torch.allclose(e.rate, kl.sum(1) + log_q - log_det)
    assert torch.allclose(objectives.elbo(e), -e.elbo)
    for beta in (0.0, 1.0, 2.5):
        rate = kl.sum(1) + log_q - log_det
        assert torch.allclose(objectives.beta_elbo(e, beta), beta * rate - log_px)
        bits = sum(max(free, float(kl[:, i].mean())) for i in range(4))
        truth = beta * (bits + (log_q - log_det).mean()) - log_px.mean()
        assert torch.allclose(objectives.free_bits(e, free, beta=beta).mean(), truth)
        assert torch.allclose(
            objectives.free_bits(e, 0.0, beta=beta), objectives.beta_elbo(e, beta)
        )
    groups = e.elbo.exp().reshape(4, 3).mean(1).log()
    assert torch.allclose(objectives.iwae(e, 3), -groups)
    assert torch.allclose(objectives.iwae(e, 1), objectives.elbo(e))


def test_auxiliary_terms_are_part_of_every_objective_and_of_no_figure():
    terms = (torch.randn(6), torch.randn(6, 3).exp(), *torch.randn(2, 6))
    auxiliary = torch.randn(6)
    plain, more = Evidence(*terms), Evidence(*terms, auxiliary)
    for loss in (
        objectives.elbo,
        lambda e: objectives.beta_elbo(e, 2.5),
        lambda e: objectives.free_bits(e, 0.4, beta=0.7),
        lambda e: objectives.iwae(e, 3),
    ):
        assert torch.allclose(loss(more).mean(), loss(plain).mean() - auxiliary.mean())
    assert torch.equal(more.elbo, plain.elbo)
    assert torch.equal(more.rate, plain.rate)


@pytest.mark.parametrize(("labels", "weight"), [("softmax", 0.3), ("sigmoid", 2.0)])
def test_the_classifier_of_a_glow(labels, weight):
    """It adds -weight · log q(y | z) to the objective, and does not change log p(x | y)."""
    options = {"bits": 4, "levels": 2, "depth": 1, "hidden": 6, "context": 3}
    torch.manual_seed(0)
    options["conditioned"] = "all"
    weighed = {"classifier": labels, "classifier_weight": weight}
    model = randomized(build("published_glow", (1, 8, 8), **weighed, **options))
    without = build("published_glow", (1, 8, 8), **options).double()
    state = {k: v for k, v in model.state_dict().items() if ".linear." not in k}
    without.load_state_dict(state)
    x = torch.randint(16, (5, 1, 8, 8))
    y = F.one_hot(torch.arange(5) % 3, 3).double()
    if labels == "sigmoid":
        y[0] = torch.tensor([1.0, 0.0, 1.0])
    torch.manual_seed(1)
    e = model(x, y)
    torch.manual_seed(1)
    assert max_error(e.elbo, without(x, y).elbo) < 1e-12
    torch.manual_seed(1)
    top = model.encode(x, y)[0]
    logits = top.mean((2, 3)) @ model.layers[-1].linear.weight.T + model.layers[-1].linear.bias
    if labels == "softmax":
        log_q = -F.cross_entropy(logits, y.argmax(1), reduction="none")
    else:
        log_q = -F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    assert max_error(e.auxiliary, weight * log_q) < 1e-12
    assert model.sample(3, y[:3]).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="classifier: needs a conditional model"):
        build("published_glow", (1, 8, 8), classifier=labels)


def test_a_class_may_condition_only_the_top_prior():
    options = {"bits": 4, "levels": 2, "depth": 1, "hidden": 6, "context": 3}
    model = randomized(build("published_glow", (1, 8, 8), **options))
    x = torch.randint(16, (3, 1, 8, 8))
    one, other = (F.one_hot(torch.full((3,), i), 3).double() for i in range(2))
    for a, b in zip(
        model.encode(x, one, mode=True), model.encode(x, other, mode=True), strict=True
    ):
        assert torch.equal(a, b)
    a, b = (model.encode(x, c, mode=True, whiten=True) for c in (one, other))
    assert max_error(a[0], b[0]) > 1e-3
    assert torch.equal(a[1], b[1])
    with pytest.raises(ValueError, match="conditioned: expected 'all' or 'top'"):
        build("published_glow", (1, 8, 8), conditioned="some")


def test_continuous_removes_preprocessing_layers():
    options = {"levels": 2, "depth": 1, "hidden": 6, "dequantize": "uniform", "alpha": None}
    glow = randomized(build("glow", (1, 8, 8), bits=4, **options))
    glow.eval()
    flow = glow.continuous()
    assert not flow.training
    assert glow.train().continuous().training
    assert flow.exact
    assert not glow.exact
    x = torch.randint(16, (3, 1, 8, 8))
    torch.manual_seed(0)
    figure = glow.elbo(x)
    torch.manual_seed(0)
    y = (x + torch.rand(3, 1, 8, 8, dtype=torch.float64)) / 16 - 0.5
    assert max_error(figure, flow.log_prob(y) - 64 * math.log(16)) < 1e-10
    assert {id(p) for p in flow.parameters()} == {id(p) for p in glow.parameters()}
    assert flow.continuous() is flow
    vae = build("vae", (1, 3, 3), bits=3, likelihood="gaussian", latents=3, width=6, net="mlp")
    assert vae.continuous() is vae.prior
    levels = build("vae", (1, 3, 3), bits=3, latents=3, width=6, net="mlp")
    assert levels.continuous() is levels
    kl = randomized(build("autoencoder_kl", (1, 8, 8), bits=4, widths=[4, 4], groups=2, latents=2))
    torch.manual_seed(0)
    figure = kl.elbo(x)
    torch.manual_seed(0)
    wide = (x + torch.rand(3, 1, 8, 8, dtype=torch.float64)) / 8 - 1  # images in [-1, 1]
    assert max_error(figure, kl.continuous().elbo(wide) - 64 * math.log(8)) < 1e-9
    logit = randomized(build("glow", (1, 8, 8), bits=4, levels=2, depth=1, hidden=6))
    assert max_error(logit.continuous().decode(logit.continuous().encode(y + 0.5)), y + 0.5) < 1e-9


def test_evidence_equals_the_terms_of_the_distributions():
    """Each term of a Gaussian VAE of levels, from its distributions."""
    model = randomized(
        build("vae", (1, 3, 3), bits=3, likelihood="gaussian", latents=3, width=6, net="mlp")
    )
    x = torch.randint(8, (4, 1, 3, 3))
    torch.manual_seed(0)
    e = model(x)
    torch.manual_seed(0)
    y = (x + torch.rand(4, 1, 3, 3)) / 8
    q, p = model.prior.encoder(y), StandardNormal((3,)).double()()
    z = q.rsample()
    levels = model.prior.decoder(z).log_prob(y) - 9 * math.log(8)
    assert max_error(e.elbo, e.log_px - e.kl.sum(1) - e.log_q + e.log_det) < 1e-12
    assert max_error(e.kl[:, 0], kl_divergence(q, p)) < 1e-12
    assert max_error(e.log_px, levels) < 1e-12, (
        "log p of the levels, with the constant of the units"
    )
    assert max_error(e.elbo, levels - kl_divergence(q, p)) < 1e-12
    z = model.encode(x)
    assert [t.shape for t in z] == [(4, 3)]
    with pytest.raises(TypeError, match=r"use elbo\(x\), or iwae"):
        model.log_prob(x)
    with pytest.raises(ValueError, match="k: expected 1 or more"):
        model.iwae(x, 0)


def test_mixing_two_formats_gives_a_wrong_kl():
    """The KL for exp(s / 2), with a sampler for exp(s), is less than half of the correct one."""
    s = torch.full((1, 1), 0.8)
    sampled = DiagonalGaussian(torch.zeros(1, 1), s, 1)
    read = Format(scale="log_var").split(torch.cat([torch.zeros(1, 1), s], 1))
    standard = DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1), 1)
    mixed = torch.distributions.kl_divergence(DiagonalGaussian(*read, 1), standard)
    truth = torch.distributions.kl_divergence(sampled, standard)
    assert torch.allclose(mixed, 0.5 * (s.exp() - 1 - s)[0])
    assert torch.allclose(truth, 0.5 * ((2 * s).exp() - 1 - 2 * s)[0])
    assert truth > 2 * mixed


def test_reordered_vectors_have_the_layout_that_networks_emit():
    layer, x = Permutation.shuffle(7), torch.randn(5, 7)
    net = MADE([*range(7), *range(7)], hidden=[8]).to(x)
    y = layer(x)[0]
    assert torch.equal(y, x[:, layer.order])
    assert y.stride() == layer.inverse(y)[0].stride() == net(x)[:, :7].stride()
    image = torch.randn(5, 7, 2, 2)
    assert layer(image)[0].stride() == image.stride()


@pytest.mark.parametrize("lu", [True, False])
@pytest.mark.parametrize("channels", [2, 3, 7])
def test_a_flow_of_vectors_begins_with_features_that_are_all_moved_and_not_mixed(channels, lu):
    kind = "lu" if lu else "conv"
    flow = build("nsf", (channels,), bits=None, depth=3, permutation=kind)
    layers = [layer for layer in flow.layers if isinstance(layer, InvertibleConv)]
    assert len(layers) == 3
    for layer in layers:
        matrix = layer.matrix()
        assert torch.equal(matrix.detach().sort(1).values[:, -1], torch.ones(channels))
        assert matrix.detach().abs().sum() == channels
        assert not matrix.diagonal().any()
        x = torch.randn(4, channels)
        y, log_det = layer(x)
        assert torch.equal(y.sort(1).values, x.sort(1).values)
        assert torch.equal(log_det, torch.zeros(4))
