"""Models whose likelihood is known in closed form, and distributions that must sum to one."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli
from torch.distributions import MultivariateNormal

from musigma import objectives
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.heads import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    LogitNormal,
    OptimalGaussianHead,
    StandardNormal,
    StandardUniform,
)
from musigma.layers import ActNorm, Affine, Dequantize, InvertibleConv
from musigma.model import VAE, Chain, Ladder, LadderBlock, Prior
from musigma.testing import randomized
from musigma.trace import Evidence
from musigma.zoo import build


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


# -- probabilistic PCA: the posterior is diagonal where the loadings are orthogonal


def ppca(loosen=0.0):
    """x = W z + mu + noise, with the exact posterior as encoder, or one that is off."""
    d, k, sigma = 7, 3, 0.4
    scales = torch.tensor([2.0, 1.0, 0.5]).double()
    w = torch.linalg.qr(torch.randn(d, k).double())[0] * scales
    mu = torch.randn(d).double()
    precision = 1 + scales.square() / sigma**2
    posterior = (w / sigma**2 / precision).T
    encoder = GaussianHead(
        linear(posterior, -posterior @ mu + loosen),
        event_ndims=1,
        log_std=-0.5 * precision.log() + loosen,
    )
    decoder = GaussianHead(linear(w, mu), event_ndims=1, log_std=math.log(sigma))
    model = VAE(encoder, decoder, Prior(StandardNormal((k,)))).double()
    truth = MultivariateNormal(mu, w @ w.T + sigma**2 * torch.eye(d).double())
    return model, truth


def test_ppca_log_weight_is_constant_and_exact():
    model, truth = ppca()
    x = truth.sample((50,))
    for _ in range(4):
        log_w = model(x, closed_form=False).elbo
        assert (log_w - truth.log_prob(x)).abs().max() < 1e-10
    assert (model.iwae(x, 7) - truth.log_prob(x)).abs().max() < 1e-10


def test_ppca_elbo_is_exact_in_expectation():
    model, truth = ppca()
    x = truth.sample((20,))
    draws = torch.stack([model.elbo(x) for _ in range(4000)]).detach()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth.log_prob(x)).abs() < 5 * error).all()


def test_bounds_tighten_and_converge_to_the_truth():
    model, truth = ppca(loosen=0.3)
    x = truth.sample((400,))
    gaps, errors = [], []
    for k in (1, 5, 50, 1000):
        gap = (truth.log_prob(x) - model.iwae(x, k, at_once=100_000)).detach()
        gaps.append(gap.mean().item())
        errors.append(gap.std().item() / 20)
    for (a, b), e in zip(itertools.pairwise(gaps), errors[1:], strict=True):
        assert b < a + 3 * e
    assert gaps[0] > 0.5
    assert abs(gaps[-1]) < 5 * errors[-1] + 0.01
    assert gaps[0] > 10 * gaps[-1]


def test_closed_form_and_sampled_terms_agree_in_expectation():
    model, truth = ppca(loosen=0.2)
    x = truth.sample((1,)).expand(100_000, -1)
    closed, sampled = (model(x, closed_form=c).elbo.detach() for c in (True, False))
    error = math.hypot(closed.std().item(), sampled.std().item()) / math.sqrt(len(x))
    assert abs((closed.mean() - sampled.mean()).item()) < 5 * error


# -- a linear flow is a Gaussian


@pytest.mark.parametrize("lu", [True, False])
def test_linear_flow_is_a_multivariate_normal(lu):
    d = 6
    chain = Chain(
        [ActNorm(d), InvertibleConv(d, lu=lu), ActNorm(d), InvertibleConv(d, lu=lu)],
        Prior(StandardNormal((d,))),
    )
    chain = randomized(chain)
    with torch.no_grad():
        origin = chain.decode([torch.zeros(1, d).double()])
        columns = chain.decode([torch.eye(d).double()]) - origin
    truth = MultivariateNormal(origin[0], columns.T @ columns)
    x = torch.randn(40, d).double()
    assert chain.exact
    assert (chain.log_prob(x) - truth.log_prob(x)).abs().max() < 1e-10
    distribution = chain.as_distribution()
    assert distribution.event_shape == (d,)
    assert torch.equal(distribution.log_prob(x.reshape(8, 5, d)).flatten(), chain.log_prob(x))
    assert distribution.sample((3, 2)).shape == (3, 2, d)


# -- a linear-Gaussian ladder


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


def test_linear_gaussian_ladder():
    """z1 ~ N(0, I), z2 ~ N(A z1, s²), x ~ N(B z1 + C z2, t²), with the exact posteriors."""
    s, t, d = 0.7, 0.5, 5
    a, b, c = (torch.randn(shape).double() for shape in ((2, 2), (d, 2), (d, 2)))
    # the joint of (z1, z2, x)
    top = torch.eye(2).double()
    cross = b + c @ a
    x_cov = cross @ cross.T + s**2 * c @ c.T + t**2 * torch.eye(d).double()
    # q(z1 | x) and q(z2 | z1, x): full-covariance, so rotate them to be diagonal
    gain = torch.linalg.solve(x_cov, cross).T
    q1 = top - gain @ cross
    noise = s**2 * c @ c.T + t**2 * torch.eye(d).double()
    gain2 = s**2 * torch.linalg.solve(noise, c).T
    q2 = s**2 * torch.eye(2).double() - gain2 @ c * s**2
    v1, v2 = torch.linalg.eigh(q1)[1], torch.linalg.eigh(q2)[1]
    zero = torch.zeros(2, 4).double()

    def head(mean_weight, cov):
        return GaussianHead(
            linear(mean_weight, torch.zeros(2).double()),
            event_ndims=1,
            log_std=0.5 * cov.diagonal().log(),
        )

    # in rotated coordinates u1 = V1' z1 and u2 = V2' z2 both posteriors are diagonal
    blocks = [
        LadderBlock(
            head(zero, torch.eye(2).double()),
            head(torch.cat([zero, v1.T @ gain], 1), v1.T @ q1 @ v1),
            Carry(0),
        ),
        LadderBlock(
            head(torch.cat([v2.T @ a @ v1, zero[:, :2]], 1), s**2 * torch.eye(2).double()),
            head(
                torch.cat([v2.T @ (a - gain2 @ cross) @ v1, zero[:, :2], v2.T @ gain2], 1),
                v2.T @ q2 @ v2,
            ),
            Carry(1),
        ),
    ]
    decoder = GaussianHead(
        linear(torch.cat([b @ v1, c @ v2], 1), torch.zeros(d).double()),
        event_ndims=1,
        log_std=math.log(t),
    )
    ladder = Ladder(Pick(), blocks, decoder, (4,)).double()
    truth = MultivariateNormal(torch.zeros(d).double(), x_cov)
    x = truth.sample((60,))
    for _ in range(3):
        log_w = ladder(x, closed_form=False).elbo
        assert (log_w - truth.log_prob(x)).abs().max() < 1e-9
    draws = ladder.sample(200_000)
    assert (draws.T.cov() - x_cov).abs().max() < 0.05 * x_cov.abs().max()
    kl = ladder(x).kl
    assert kl.shape == (60, 2)
    assert (kl > 0).all()


# -- distributions over levels sum to one


@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 0.0, 5.0])
@pytest.mark.parametrize("levels", [2, 4, 256])
def test_discretised_logistic_sums_to_one(levels, log_scale):
    values = torch.arange(levels).double().reshape(-1, 1)
    for mean in (-3.0, -1.0, 0.1234, 1.0):
        dist = DiscretizedLogisticMixture(
            torch.zeros(levels, 1).double(),
            torch.full((levels, 1, 1), mean).double(),
            torch.full((levels, 1, 1), log_scale).double(),
            levels,
        )
        assert abs(dist.log_prob(values).exp().sum().item() - 1) < 1e-12


def test_discretised_logistic_mixture_over_three_channels_sums_to_one():
    levels, k, c = 4, 5, 3
    grid = torch.tensor(list(itertools.product(range(levels), repeat=c))).double()
    n = len(grid)
    logits, mean, log_scale, coefficients = (
        torch.randn(1, *shape).double().expand(n, *shape)
        for shape in ((k,), (k, c), (k, c), (k, c * (c - 1) // 2))
    )
    dist = DiscretizedLogisticMixture(logits, mean, log_scale - 2, levels, coefficients)
    assert abs(dist.log_prob(grid).exp().sum().item() - 1) < 1e-12


def test_discretised_logistic_mixture_samples_what_it_scores():
    levels, k, c, n = 3, 4, 2, 200_000
    grid = torch.tensor(list(itertools.product(range(levels), repeat=c)))
    one = [torch.randn(1, *shape) for shape in ((k,), (k, c), (k, c), (k, 1))]

    def dist(n):
        return DiscretizedLogisticMixture(
            *(t.expand(n, *t.shape[1:]) for t in one[:3]), levels, one[3].expand(n, k, 1)
        )

    mass = dist(len(grid)).log_prob(grid).exp()
    drawn = dist(n).sample().long()
    found = torch.bincount(drawn[:, 0] * levels + drawn[:, 1], minlength=len(grid)) / n
    assert ((found - mass).abs() < 5 * (mass * (1 - mass) / n).sqrt() + 1e-4).all()


def test_extreme_logistics_are_finite_where_naive_differences_are_not():
    x = torch.tensor([[0.0], [7.0], [255.0]]).double()
    dist = DiscretizedLogisticMixture(
        torch.zeros(3, 1), torch.full((3, 1, 1), 0.9), torch.full((3, 1, 1), -7.0), 256
    )
    log_prob = dist.log_prob(x)
    assert log_prob.isfinite().all()
    assert log_prob[1] < -500


def test_bernoulli_and_categorical_sum_to_one():
    grid = torch.tensor(list(itertools.product(range(2), repeat=3))).double()
    logits = 3 * torch.randn(1, 3).double()
    assert abs(Bernoulli(logits.expand(8, 3)).log_prob(grid).exp().sum() - 1) < 1e-12
    grid = torch.tensor(list(itertools.product(range(5), repeat=2))).double()
    logits = 3 * torch.randn(1, 5, 2).double()
    assert abs(Categorical(logits.expand(25, 5, 2)).log_prob(grid).exp().sum() - 1) < 1e-12


@pytest.mark.parametrize("kind", [Bernoulli, Categorical])
def test_discrete_draws_follow_the_mass_at_any_temperature(kind):
    n, logits = 100_000, torch.tensor([0.4, -1.0, 1.5])
    if kind is Bernoulli:
        dist, mass = Bernoulli(logits.expand(n, 3)), lambda t: (logits / t).sigmoid()
        found = lambda x: x.mean(0)  # noqa: E731
    else:
        dist = Categorical(logits.expand(n, 3).unsqueeze(-1))
        mass = lambda t: (logits / t).softmax(0)  # noqa: E731
        found = lambda x: torch.bincount(x[:, 0].long(), minlength=3) / n  # noqa: E731
    for t in (1.0, 0.5):
        error = (found(dist.sample(temperature=t)) - mass(t)).abs().max()
        assert error < 5 * 0.5 / math.sqrt(n)


# -- densities on the unit interval integrate to one


@pytest.mark.parametrize("logit", [-40.0, -3.0, -0.09, 0.0, 1e-4, 0.11, 5.0, 60.0])
def test_continuous_bernoulli(logit):
    logits = torch.full((1, 1), logit).double()
    x = torch.linspace(0, 1, 200_001).double().unsqueeze(1)
    density = ContinuousBernoulli(logits).log_prob(x).exp()
    assert abs(torch.trapezoid(density, x[:, 0]).item() - 1) < 1e-6
    mean = torch.trapezoid(density * x[:, 0], x[:, 0])
    assert abs(ContinuousBernoulli(logits).mean - mean).max() < 1e-6
    if abs(logit) < 10:
        theirs = TorchContinuousBernoulli(logits=logits[0])
        assert torch.allclose(density.log(), theirs.log_prob(x)[:, 0], atol=1e-6)
    draws = ContinuousBernoulli(logits.expand(100_000, 1)).sample()[:, 0]
    assert draws.min() >= 0
    assert draws.max() <= 1
    cumulative = torch.cumulative_trapezoid(density, x[:, 0])
    ranks = cumulative[(draws * 200_000).long().clamp(max=199_999)]
    assert (ranks.sort()[0] - torch.linspace(0, 1, 100_000)).abs().max() < 0.008


def test_logit_normal_integrates_to_one():
    dist = LogitNormal(
        DiagonalGaussian(torch.tensor([[0.7]]).double(), torch.tensor([[0.3]]).double(), 1)
    )
    x = torch.linspace(0, 1, 400_001).double()[1:-1].unsqueeze(1)
    assert abs(torch.trapezoid(dist.log_prob(x).exp(), x[:, 0]).item() - 1) < 1e-6


def test_two_moons_flow_integrates_to_one():
    """A density in two dimensions, by quadrature, with random parameters."""
    model = randomized(build("realnvp", (2,), bits=None, depth=4, hidden=16))
    axis = torch.linspace(-12, 12, 1201).double()
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = model.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass.item() - 1) < 1e-3


# -- bits


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_uniform_noise_under_the_uniform_model(bits):
    levels, shape = 2**bits, (3, 8, 8)
    uniform = Prior(StandardUniform(shape))
    model = Chain([Dequantize(StandardUniform(shape), levels), Affine(1 / levels)], uniform)
    x = torch.randint(0, levels, (16, *shape))
    assert (model.bits_per_dim(x) - bits).abs().max() < 1e-5
    assert (model.double().bits_per_dim(x.double()) - bits).abs().max() < 1e-12


def test_bits_of_identical_images_do_not_depend_on_how_many_there_are():
    model = randomized(build("glow", (1, 8, 8), bits=None, levels=1, depth=1, hidden=4))
    x = torch.rand(1, 1, 8, 8).double()
    assert torch.allclose(model.bits_per_dim(x), model.bits_per_dim(x.expand(8, -1, -1, -1))[0])


def test_log_prob_is_refused_where_it_is_a_bound():
    model = build("vae", (1, 5, 5), width=4, latents=2)
    for call in (lambda: model.log_prob(torch.zeros(1, 1, 5, 5)), model.as_distribution):
        with pytest.raises(TypeError, match=r"use elbo\(x\), or iwae"):
            call()


# -- the optimal variance


def test_optimal_variance():
    head = OptimalGaussianHead(nn.Linear(3, 6), event_ndims=1).double()
    z, x = torch.randn(40, 3).double(), torch.randn(40, 6).double()
    mean = head.net(z)
    mse = (x - mean).square().mean()
    log_prob = head(z).log_prob(x)
    best = DiagonalGaussian(mean, 0.5 * mse.log(), 1).log_prob(x)
    assert torch.allclose(log_prob, best)
    assert torch.allclose(
        log_prob.sum(), -0.5 * x.numel() * (1 + math.log(2 * math.pi) + mse.log())
    )
    for other in (-0.1, 0.1):
        worse = DiagonalGaussian(mean, 0.5 * mse.log() + other, 1).log_prob(x)
        assert worse.sum() < best.sum()
    for _ in range(400):
        head(z).log_prob(x)
    assert torch.allclose(head.log_std, 0.5 * mse.log())
    head.eval()
    fixed = DiagonalGaussian(mean, head.log_std, 1)
    assert torch.equal(head(z[:1]).log_prob(x[:1]), fixed.log_prob(x)[:1])


# -- a Glow of the usual size is inverted exactly


def big_glow(**options):
    model = build("glow", (3, 32, 32), levels=3, depth=8, hidden=32, **options)
    model = randomized(model, scale=0.25)
    mixings = [m.matrix() for m in model.modules() if isinstance(m, InvertibleConv)]
    assert len(mixings) == 24
    assert max(torch.linalg.cond(w) for w in mixings) > 1.3  # no longer rotations
    for p in model.parameters():
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_glow_decodes_what_it_encodes(dtype, tolerance):
    model = big_glow(bits=None).to(dtype)
    x = torch.randn(4, 3, 32, 32).to(dtype)
    model.calibrate(x)
    for whiten in (False, True):
        latents = model.encode(x, whiten=whiten)
        assert [z.shape[1:] for z in latents] == [(48, 4, 4), (12, 8, 8), (6, 16, 16)]
        assert (model.decode(latents, whiten=whiten) - x).abs().max() < tolerance


@pytest.mark.parametrize("published", [False, True])
def test_glow_decodes_images_to_the_pixel(published):
    options = {"alpha": None, "format": "cross sigmoid+2"} if published else {}
    model = big_glow(**options).float()
    x = torch.randint(0, 256, (8, 3, 32, 32))
    model.calibrate(x)
    assert (model.decode(model.encode(x, mode=True)) == x).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.decode(model.encode(x, mode=True)) == x).all()


def test_autocast_leaves_the_likelihood_almost_alone():
    model = build("glow", (3, 16, 16), levels=2, depth=4, hidden=16).eval()
    x = torch.randint(0, 256, (8, 3, 16, 16))
    model.calibrate(x)
    torch.manual_seed(0)
    truth = model.bits_per_dim(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.bits_per_dim(x)
    assert low.dtype == torch.float32
    assert (low - truth).abs().max() < 0.005


# -- interpolation


@pytest.mark.parametrize("path", ["spherical", "linear"])
def test_interpolation_begins_and_ends_at_its_ends(path):
    model = randomized(build("glow", (1, 8, 8), bits=None, levels=2, depth=2, hidden=8))
    a, b = torch.randn(2, 3, 1, 8, 8).double()
    walk = model.interpolate(a, b, 5, path=path)
    assert walk.shape == (3, 5, 1, 8, 8)
    assert (walk[:, 0] - a).abs().max() < 1e-9
    assert (walk[:, -1] - b).abs().max() < 1e-9


def test_spherical_interpolation_keeps_the_length():
    model = Prior(StandardNormal((100,))).double()
    a, b = torch.randn(2, 3, 100).double()
    norms = model.interpolate(a, b, 9).norm(dim=2)
    steps = torch.linspace(0, 1, 9).double()
    ends = a.norm(dim=1), b.norm(dim=1)
    assert torch.allclose(norms, torch.lerp(*(e[:, None] for e in ends), steps))
    same = model.interpolate(a, a, 3)
    assert torch.allclose(same, a[:, None].expand_as(same))


# -- objectives


def test_objectives_in_closed_form():
    log_px, kl, log_q, log_det = torch.randn(6), torch.rand(6, 3), torch.randn(6), torch.randn(6)
    e = Evidence(log_px, kl, log_q, log_det)
    assert torch.allclose(e.elbo, log_px - kl.sum(1) - log_q + log_det)
    assert torch.allclose(objectives.elbo(e), -e.elbo.mean())
    assert torch.allclose(objectives.beta_elbo(e, 1.0), objectives.elbo(e))
    rate = kl.sum(1) + log_q - log_det
    assert torch.allclose(objectives.beta_elbo(e, 3.0), (3 * rate - log_px).mean())
    assert torch.allclose(objectives.free_bits(e, 0.0), objectives.elbo(e))
    held = torch.maximum(kl.mean(0), torch.tensor(0.5)).sum()
    assert torch.allclose(
        objectives.free_bits(e, 0.5), held + (log_q - log_det).mean() - log_px.mean()
    )
    pairs = torch.stack([e.elbo[0::2], e.elbo[1::2]])
    assert torch.allclose(objectives.iwae(e, 2), -(pairs.exp().mean(0).log()).mean(), atol=1e-5)


def test_mixing_two_readings_is_what_this_library_is_about():
    """The KL of exp(s / 2), for a sampler of exp(s): it is less than half of what is owed."""
    s = torch.full((1, 1), 0.8)
    sampled = DiagonalGaussian(torch.zeros(1, 1), s, 1)
    read = Format(scale="log_var").split(torch.cat([torch.zeros(1, 1), s], 1))
    standard = DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1), 1)
    mixed = torch.distributions.kl_divergence(DiagonalGaussian(*read, 1), standard)
    truth = torch.distributions.kl_divergence(sampled, standard)
    assert torch.allclose(mixed, 0.5 * (s.exp() - 1 - s)[0])
    assert torch.allclose(truth, 0.5 * ((2 * s).exp() - 1 - 2 * s)[0])
    assert truth > 2 * mixed
