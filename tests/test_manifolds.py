"""Latents on the sphere and in hyperbolic space, positive ones, and products."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.distributions import Beta, Gamma, Independent, kl_divergence

from musigma.distributions import (
    FactorizedBeta,
    FactorizedGamma,
    HyperbolicNormal,
    OneHotLatents,
    Product,
    SphereUniform,
    VonMisesFisher,
)
from musigma.distributions.bessel import bessel_ratio, log_bessel
from musigma.distributions.hyperbolic import poincare
from musigma.distributions.sphere import log_area
from musigma.gaussian import DiagonalGaussian
from musigma.zoo import build

NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(400))


def on(low, high):
    """Nodes and weights of an integral."""
    half = 0.5 * (high - low)
    return low + half * (1 + NODES), half * WEIGHTS


# --- Bessel functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 0.5, 1, 2.5, 10, 14.5, 31, 60, 127])
def test_bessel_functions_agree_with_scipy(order):
    x = np.logspace(-3, 5, 300)
    known = [special.ive(order + k, x) for k in (0, 1)]
    sure = np.minimum(*known) > 1e-280
    assert sure.sum() > 120
    x, known = x[sure], [k[sure] for k in known]
    log = np.log(known[0]) + x - order * np.log(x / 2)
    ours = [f(torch.from_numpy(x), order).numpy() for f in (log_bessel, bessel_ratio)]
    assert (np.abs(ours[0] - log) / np.maximum(1, np.abs(log))).max() < 1e-12
    assert np.abs(ours[1] * known[0] / known[1] - 1).max() < 1e-10


def test_derivatives_of_bessel_functions():
    x = torch.tensor([1e-3, 3.0, 31.0, 200.0], dtype=torch.float64, requires_grad=True)
    for order in (0.0, 0.5, 40.0):
        assert torch.autograd.gradcheck(lambda x, k=order: log_bessel(x, k), x, atol=1e-6)
        assert torch.autograd.gradcheck(lambda x, k=order: bessel_ratio(x, k), x, atol=1e-6)
    assert log_bessel(torch.zeros(()), 500.0).isfinite()
    assert 0 < bessel_ratio(torch.tensor(1e5), 500.0) < 1


# --- the sphere ---------------------------------------------------------------------------------


def of_angles(q, m):
    """Angles from the direction with quadrature weights of the sphere, and log densities there."""
    t, weight = on(0.0, math.pi)
    points = torch.zeros(len(t), m, dtype=torch.float64)
    points[:, 0], points[:, 1] = t.cos(), t.sin()
    area = math.exp(log_area(m - 1)) if m > 2 else 2.0
    return t, area * weight * t.sin() ** (m - 2), q.log_prob(points)


def fisher(kappa, m):
    direction = torch.eye(m, dtype=torch.float64)[0]
    return VonMisesFisher(direction, torch.as_tensor(kappa, dtype=torch.float64))


@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 10.0, 300.0])
def test_von_mises_fisher_integrates_to_one_and_has_its_divergence(kappa, m):
    q = fisher(kappa, m)
    _, weight, log_q = of_angles(q, m)
    mass = weight * log_q.exp()
    assert abs(float(mass.sum()) - 1) < 1e-8
    kl = float((mass * (log_q + log_area(m))).sum())
    p = SphereUniform(q.direction)
    assert abs(float(kl_divergence(q, p)) - kl) < 1e-8
    assert abs(float(q.entropy()) + float((mass * log_q).sum())) < 1e-8
    assert float(p.log_prob(q.direction)) == -log_area(m)


def test_von_mises_fisher_agrees_with_scipy():
    direction = np.array([0.6, 0.0, -0.8])
    theirs = stats.vonmises_fisher(direction, 5.0)
    x = theirs.rvs(10, random_state=0)
    ours = VonMisesFisher(torch.from_numpy(direction), torch.tensor(5.0).double())
    assert np.allclose(ours.log_prob(torch.from_numpy(x)), theirs.logpdf(x), atol=1e-12)


@pytest.mark.parametrize(("m", "kappa"), [(2, 0.1), (2, 200.0), (3, 4.0), (5, 0.1), (40, 200.0)])
def test_draws_of_von_mises_fisher_have_its_density(kappa, m):
    torch.manual_seed(0)
    q = fisher(kappa, m)
    x = q.sample((4000,))
    assert torch.allclose(x.norm(dim=-1), torch.ones(4000, dtype=torch.float64))
    t, weight, log_q = of_angles(q, m)
    below = (weight * log_q.exp()).cumsum(0)

    def distribution(angle):
        return np.interp(angle, t, below - 0.5 * weight * log_q.exp())

    angles = x[:, 0].clamp(-1, 1).acos().numpy()
    assert stats.kstest(angles, distribution).pvalue > 1e-3
    wrong = fisher(1.5 * kappa + 0.5, m).sample((4000,))[:, 0].clamp(-1, 1).acos().numpy()
    assert stats.kstest(wrong, distribution).pvalue < 1e-3
    around = x[:, 1:] / x[:, 1:].norm(dim=-1, keepdim=True)
    assert around.mean(0).norm() < 4 / math.sqrt(4000)


@pytest.mark.parametrize(("m", "kappa"), [(2, 1.0), (2, 100.0), (3, 5.0), (10, 1.0), (10, 100.0)])
def test_the_gradient_in_the_concentration_is_unbiased(kappa, m):
    """E cos θ has the derivative A', and E cos² θ one that quadrature gives."""
    torch.manual_seed(0)
    at = torch.full((20_000,), kappa, dtype=torch.float64, requires_grad=True)
    direction = torch.eye(m, dtype=torch.float64)[0].expand(len(at), m)
    w = VonMisesFisher(direction, at).rsample()[:, 0]
    for power in (1, 2):
        (slopes,) = torch.autograd.grad((w**power).sum(), at, retain_graph=True)
        ends = []
        for k in (kappa * (1 - 1e-4), kappa * (1 + 1e-4)):
            t, weight, log_q = of_angles(fisher(k, m), m)
            ends.append(float((weight * log_q.exp() * t.cos() ** power).sum()))
        truth = (ends[1] - ends[0]) / (2e-4 * kappa)
        error = float(slopes.std()) / math.sqrt(len(slopes))
        assert abs(float(slopes.mean()) - truth) < 4.5 * error + 1e-6 * abs(truth)
        assert error < 0.1 * abs(truth) + 1e-3


def test_the_gradient_in_the_direction_is_unbiased():
    torch.manual_seed(0)
    free = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    n, kappa = 40_000, torch.tensor(3.0, dtype=torch.float64)
    mean = bessel_ratio(kappa, 0.5) * torch.nn.functional.normalize(free, dim=0)
    (truth,) = torch.autograd.grad(mean[1], free)
    each = free.expand(n, 3).detach().requires_grad_()
    q = VonMisesFisher(torch.nn.functional.normalize(each, dim=-1), kappa.expand(n))
    (slopes,) = torch.autograd.grad(q.rsample()[:, 1].sum(), each)
    assert ((slopes.mean(0) - truth).abs() < 4.5 * slopes.std(0) / math.sqrt(n)).all()


def test_interpolation_on_the_sphere_is_along_the_geodesic():
    model = build("vae", (4,), bits=None, latents=2, width=8, posterior="von-mises-fisher")
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 4)
    model.interpolate(x[:1], x[1:], 5)
    path = torch.cat(seen[-5:])
    assert torch.allclose(path.norm(dim=1), torch.ones(5), atol=1e-5)
    steps = (path[1:] * path[:-1]).sum(1).clamp(-1, 1).acos()
    assert torch.allclose(steps, steps[:1].expand(4), atol=1e-3)


# --- hyperbolic space ---------------------------------------------------------------------------


def normal(location=(0.7, -1.1), log_std=(-0.3, 0.2)):
    return HyperbolicNormal(
        torch.tensor(location, dtype=torch.float64), torch.tensor(log_std, dtype=torch.float64)
    )


def mass(q, low=0.0, high=12.0):
    """The probability of a ring around the origin of the hyperbolic plane, by quadrature."""
    (r, of_r), (t, of_t) = on(low, high), on(0.0, 2 * math.pi)
    r, t = torch.meshgrid(r, t, indexing="ij")
    points = torch.stack([r.cosh(), r.sinh() * t.cos(), r.sinh() * t.sin()], -1)
    return float((of_r[:, None] * of_t * r.sinh() * q.log_prob(points).exp()).sum())


def test_a_hyperbolic_normal_integrates_to_one():
    assert abs(mass(normal()) - 1) < 1e-6


def test_draws_of_a_hyperbolic_normal_have_its_density():
    torch.manual_seed(0)
    q, edges = normal(), [0.0, 0.7, 1.0, 1.4, 2.0, 2.7, 12.0]
    expected = np.array([mass(q, *ends) for ends in itertools.pairwise(edges)]) * 20_000

    def chance(q):
        found = np.histogram(q.sample((20_000,))[:, 0].acosh().numpy(), edges)[0]
        return stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue

    assert chance(q) > 1e-3
    assert chance(normal((0.7, -1.3))) < 1e-3
    assert poincare(q.sample((100,))).norm(dim=-1).max() < 1


def test_points_of_hyperbolic_space():
    q = normal()
    noise = torch.randn(100, 2, dtype=torch.float64)
    x = q.unwhiten(noise)
    lorentz = x[:, 1:].square().sum(1) - x[:, 0].square()
    assert torch.allclose(lorentz, -torch.ones(100, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(q.whiten(x), noise, atol=1e-8)
    distance = (-(x[:, 1:] * q.center[1:]).sum(1) + x[:, 0] * q.center[0]).acosh()
    length = (noise * q.noise.stddev).norm(dim=1)
    assert torch.allclose(distance, length, atol=1e-6)  # along geodesics
    single = HyperbolicNormal(*(t.float() for t in (q.noise.mean, q.noise.log_std)))
    assert torch.allclose(single.whiten(single.unwhiten(noise.float())), noise.float(), atol=1e-4)


def test_the_gradient_of_hyperbolic_draws():
    location = torch.tensor([0.7, -1.1], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def drawn(location, log_std):
        torch.manual_seed(0)
        q = HyperbolicNormal(location, log_std)
        x = q.rsample((5,))
        return x, q.log_prob(x)

    assert torch.autograd.gradcheck(drawn, (location, log_std))


# --- positive latents, and products -------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(FactorizedGamma, Gamma), (FactorizedBeta, Beta)])
def test_gamma_and_beta_agree_with_torch(ours, theirs):
    torch.manual_seed(0)
    a, b, c, d = (0.3 + 3 * torch.rand(4, 3, dtype=torch.float64) for _ in range(4))
    q, p = ours(a, b), ours(c, d)
    same, other = Independent(theirs(a, b), 1), Independent(theirs(c, d), 1)
    x = same.sample()
    assert torch.equal(q.log_prob(x), same.log_prob(x))
    assert torch.equal(kl_divergence(q, p), kl_divergence(same, other))
    assert torch.equal(q.entropy(), same.entropy())
    assert torch.allclose(q.unwhiten(q.whiten(x)), x, atol=1e-9)
    noise = q.whiten(q.sample((20_000,)))
    assert noise.mean(0).abs().max() < 0.05
    assert (noise.std(0) - 1).abs().max() < 0.05
    assert torch.allclose(q.sample((3,), temperature=0.0), q.center.expand(3, 4, 3))


def test_the_gradient_of_gamma_draws_is_unbiased():
    """E z² = (α + α²) / β² for a gamma variable, E z = a / (a + b) for a beta variable."""
    torch.manual_seed(0)
    a = torch.full((40_000, 1), 1.7, dtype=torch.float64, requires_grad=True)
    b = torch.full((40_000, 1), 0.8, dtype=torch.float64, requires_grad=True)
    for value, truth in [
        (FactorizedGamma(a, b).rsample() ** 2, ((1 + 3.4) / 0.64, -2 * (1.7 + 1.7**2) / 0.8**3)),
        (FactorizedBeta(a, b).rsample(), (0.8 / 2.5**2, -1.7 / 2.5**2)),
    ]:
        for slopes, expected in zip(torch.autograd.grad(value.sum(), (a, b)), truth, strict=True):
            assert abs(slopes.mean() - expected) < 4.5 * slopes.std() / math.sqrt(len(slopes))


def test_a_product_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    parts = [DiagonalGaussian(*torch.randn(2, 4, 2), 1), OneHotLatents(torch.randn(4, 2, 3))]
    others = [DiagonalGaussian(*torch.randn(2, 4, 2), 1), OneHotLatents(torch.randn(4, 2, 3))]
    q, p = Product(*parts), Product(*others)
    x = q.sample()
    assert x.shape == (4, 8)
    expected = parts[0].log_prob(x[:, :2]) + parts[1].log_prob(x[:, 2:].unflatten(1, (2, 3)))
    assert torch.equal(q.log_prob(x), expected)
    pairs = [kl_divergence(*pair) for pair in zip(parts, others, strict=True)]
    assert torch.allclose(kl_divergence(q, p), sum(pairs))
    assert torch.equal(q.unwhiten(q.whiten(x))[:, 2:], x[:, 2:])
    assert torch.equal(q.center[:, 2:], parts[1].mode.flatten(1))
