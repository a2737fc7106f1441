"""Surjections: their laws, and closed forms of what they say about known densities."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Exponential, Independent, Normal
from torch.nn import functional as F

from musigma import build
from musigma.distributions import (
    FactorizedBernoulli,
    FactorizedCategorical,
    LikelihoodHead,
    PlackettLuce,
    StandardNormal,
)
from musigma.gaussian import DiagonalGaussian, EventDistribution, GaussianHead
from musigma.layers import (
    Abs,
    Augment,
    Coupling,
    Dequantize,
    InvertibleConv,
    MaxPool,
    Sort,
    Spline,
    Split,
    Swapped,
)
from musigma.model import Chain, Prior
from musigma.nets import MLP, ResNet
from musigma.testing import check_head, check_layer, check_model, randomized
from musigma.trace import Trace
from tests.families import nats_after


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def exponential(h):
    return Independent(Exponential(F.softplus(h) + 1e-3), h.ndim - 1)


def gaps(channels, context=0):
    return LikelihoodHead(ResNet(channels, 3 * channels, width=6, context=context), exponential)


def mlp(inputs, outputs, context=0):
    return MLP(inputs, outputs, hidden=[6], context=context)


PLACE = {"read": FactorizedCategorical.from_channels, "levels": 4}
LAYERS = {
    "abs": lambda: (Abs(), (5,), 0),
    "abs, image": lambda: (Abs(), (2, 3, 2), 0),
    "abs, signs": lambda: (Abs(LikelihoodHead(mlp(5, 5, 2), FactorizedBernoulli)), (5,), 2),
    "sort": lambda: (Sort(), (5,), 0),
    "sort, rows": lambda: (Sort(), (4, 3), 0),
    "sort, order": lambda: (Sort(LikelihoodHead(mlp(5, 5, 2), PlackettLuce)), (5,), 2),
    "pool": lambda: (MaxPool(gaps(2)), (2, 4, 6), 0),
    "pool, place": lambda: (
        MaxPool(gaps(2, 3), LikelihoodHead(ResNet(2, 8, width=6, context=3), **PLACE)),
        (2, 4, 6),
        3,
    ),
    "split": lambda: (Split(GaussianHead(mlp(3, 4), event_ndims=1), keep=3), (5,), 0),
    "augment": lambda: (Augment(GaussianHead(mlp(3, 4, 2), event_ndims=1), 3), (3,), 2),
    "augment, image": lambda: (
        Augment(GaussianHead(ResNet(3, 4, width=6), event_ndims=3), 3),
        (3, 2, 4),
        0,
    ),
    "swapped abs": lambda: (Swapped(Abs()), (5,), 0),
    "swapped sort": lambda: (Swapped(Sort()), (4, 2), 0),
    "swapped pool": lambda: (Swapped(MaxPool(gaps(2))), (2, 4, 6), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_surjections_obey_all_laws(name):
    layer, event, context = LAYERS[name]()
    check_layer(layer, event, context=context)
    assert layer.exact is not isinstance(layer, Swapped)


def test_what_draws_in_both_directions_is_not_swapped():
    with pytest.raises(ValueError, match="Dequantize draws in inference"):
        Swapped(Dequantize(StandardNormal((2,))))


def test_an_odd_image_is_refused():
    with pytest.raises(ValueError, match="even sides"):
        MaxPool(gaps(2)).infer(torch.zeros(1, 2, 3, 4), Trace())


class Known(EventDistribution):
    """A distribution of z with a given log density, to score with."""

    def __init__(self, log_density, event):
        super().__init__((), event)
        self.log_prob = log_density


class Head(nn.Module):
    """A head that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, given=None, context=None):
        return self.function(given)


NORMAL = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def scored(layer, log_density, x):
    """log w of x under a layer and a density of its output."""
    prior = Prior(Head(lambda _: Known(log_density, ())))
    trace = Trace()
    Chain([layer], prior).infer(x, trace)
    return trace.evidence([prior]).elbo


def test_abs_is_exact_for_symmetric_data():
    """|x| is half-normal, so z = log(exp |x| - 1) has a known density."""

    def half_normal(z):
        x = torch.logaddexp(z, torch.zeros_like(z))
        return (math.log(2) + NORMAL.log_prob(x) + F.logsigmoid(z)).sum(1)

    x = 2 * torch.randn(50, 3, dtype=torch.float64)
    x[0] = torch.tensor([1e-12, -30.0, 0.1])
    found = scored(Abs(), half_normal, x)
    torch.testing.assert_close(found, NORMAL.log_prob(x).sum(1), rtol=1e-12, atol=1e-10)


def test_signs_that_depend_on_the_size_are_learned_exactly():
    """For x ~ N(1, 1), the logit of the sign is 2 |x|, and |x| is a folded normal."""
    shifted = Normal(torch.tensor(1.0, dtype=torch.float64), 1.0)

    def size(z):
        return torch.logaddexp(z, torch.zeros_like(z))

    def folded(z):
        both = torch.stack([shifted.log_prob(size(z)), shifted.log_prob(-size(z))])
        return (both.logsumexp(0) + F.logsigmoid(z)).sum(1)

    x = 1 + torch.randn(50, 3, dtype=torch.float64)
    signs = Head(lambda z: FactorizedBernoulli(2 * size(z)))
    torch.testing.assert_close(scored(Abs(signs), folded, x), shifted.log_prob(x).sum(1))


def test_sort_is_exact_for_exchangeable_data():
    """The sorted values of independent ones have N! times their joint density."""

    def ordered(z):
        gaps = torch.logaddexp(z[:, 1:], torch.zeros_like(z[:, 1:]))
        x = torch.cat([z[:, :1], gaps], 1).cumsum(1)
        return math.lgamma(5) + NORMAL.log_prob(x).sum(1) + F.logsigmoid(z[:, 1:]).sum(1)

    x = torch.randn(50, 4, dtype=torch.float64)
    found = scored(Sort(), ordered, x)
    torch.testing.assert_close(found, NORMAL.log_prob(x).sum(1), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("event", [(3,), (3, 2)])
def test_a_model_of_sorted_elements_is_exchangeable(event):
    flow = [Coupling(mlp(1, 10), map=Spline(bins=2))] if len(event) == 1 else []
    model = randomized(Chain([Sort(), *flow], Prior(StandardNormal(event))))
    x = torch.randn(20, *event, dtype=torch.float64)
    with torch.no_grad():
        each = [model.log_prob(x[:, list(p)]) for p in itertools.permutations(range(3))]
    for one in each:
        torch.testing.assert_close(one, each[0])


def over(layer):
    flow = Coupling(mlp(1, 23), map=Spline())
    return randomized(Chain([layer, flow], Prior(StandardNormal((2,)))))


def mass(model, points, weight):
    """The sum of densities at points (N, 2), times their weights (N,)."""
    with torch.no_grad():
        return float((model.log_prob(points).exp() * weight).sum())


def test_a_density_of_sorted_elements_integrates_to_one():
    """Over both orders, by points that are even in the log of the gap."""
    model = over(Sort(LikelihoodHead(mlp(2, 2), PlackettLuce)))
    u = torch.linspace(-14, 3, 400, dtype=torch.float64)
    low = torch.linspace(-14, 14, 400, dtype=torch.float64)
    first, log_gap = torch.cartesian_prod(low, u).unbind(1)
    weight = log_gap.exp() * (u[1] - u[0]) * (low[1] - low[0])
    x = torch.stack([first, first + log_gap.exp()], 1)
    assert mass(model, x, weight) + mass(model, x.flip(1), weight) == pytest.approx(1, abs=1e-4)


def test_a_density_of_absolute_values_integrates_to_one():
    """Over each of four quadrants, by points that are even in log |x|."""
    model = over(Abs(LikelihoodHead(mlp(2, 2), FactorizedBernoulli)))
    u = torch.linspace(-14, 3, 400, dtype=torch.float64)
    x = torch.cartesian_prod(u, u).exp()
    weight = x.prod(1) * (u[1] - u[0]) ** 2
    quadrants = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    assert sum(mass(model, x * q, weight) for q in quadrants) == pytest.approx(1, abs=1e-4)


def test_max_pooling_is_exact_for_four_independent_values():
    """The largest of four has density 4 φ Φ³; the others are normal, cut off above it."""

    def largest(z):
        return (math.log(4) + NORMAL.log_prob(z) + 3 * NORMAL.cdf(z).log()).sum((1, 2, 3))

    def below(z):
        def log_density(gaps):
            wide = z.repeat_interleave(3, 1)
            return (NORMAL.log_prob(wide - gaps) - NORMAL.cdf(wide).log()).sum((1, 2, 3))

        return Known(log_density, ())

    x = torch.randn(50, 2, 4, 6, dtype=torch.float64)
    found = scored(MaxPool(Head(below)), largest, x)
    torch.testing.assert_close(found, NORMAL.log_prob(x).sum((1, 2, 3)))
    pooled = MaxPool(Head(below)).infer(x, Trace(scoring=False))
    assert torch.equal(pooled, F.max_pool2d(x, 2))


def augmented(mean_of, log_std):
    """A linear flow of (x, e) over the noise e ~ N(mean_of(x), std²)."""
    matrix = torch.tensor([[1.0, 0.3], [-0.5, 0.8]], dtype=torch.float64)
    mix = InvertibleConv(2, lu=False).double()
    mix.weight.data = matrix
    noise = Head(lambda x: DiagonalGaussian(mean_of(x), torch.full_like(x, log_std), 1))
    return Chain([Augment(noise, 1), mix], Prior(StandardNormal((2,)).double())), matrix


def test_augmentation_is_tight_at_the_posterior_and_a_bound_elsewhere():
    matrix = augmented(lambda x: x, 0.0)[1]
    precision = matrix.T @ matrix
    slope, log_std = float(-precision[1, 0] / precision[1, 1]), float(-precision[1, 1].log() / 2)
    covariance = precision.inverse()
    x = torch.randn(200, 1, dtype=torch.float64)
    true = torch.from_numpy(stats.norm(0, float(covariance[0, 0]) ** 0.5).logpdf(x[:, 0].numpy()))
    tight, _ = augmented(lambda x: slope * x, log_std)
    torch.testing.assert_close(tight.elbo(x), true)
    loose, _ = augmented(lambda x: slope * x + 0.4, log_std + 0.3)
    drawn = loose.elbo(x.repeat(200, 1)).detach().reshape(200, -1)
    gap = 0.5 * (math.exp(0.6) + (0.4 * math.exp(-log_std)) ** 2 - 1) - 0.3  # KL(q || posterior)
    assert float((true - drawn.mean(0)).mean()) == pytest.approx(gap, abs=0.02)
    weight = (drawn.exp().mean(0) / true.exp()).mean()
    assert float(weight) == pytest.approx(1, abs=0.02)


def test_a_swapped_abs_sums_both_preimages():
    """Averaged over both signs of q, the weights are p(z) + p(-z), with the volume."""
    swapped = Swapped(Abs())
    x = torch.randn(20, 1, dtype=torch.float64)
    prior = Prior(Head(lambda _: DiagonalGaussian(torch.full((1,), 0.7).double(), x[0] * 0, 1)))
    weights = []
    for sign in (0.0, 1.0):
        trace = Trace(given={swapped: torch.full_like(x, sign)})
        Chain([swapped], prior).infer(x, trace)
        weights.append(trace.evidence([prior]).elbo.exp())
    size = F.softplus(x[:, 0])
    at = Normal(torch.tensor(0.7, dtype=torch.float64), 1.0)
    true = (at.log_prob(size).exp() + at.log_prob(-size).exp()) * x[:, 0].sigmoid()
    torch.testing.assert_close(torch.stack(weights).mean(0), true)


# -- a flow of more dimensions


@pytest.mark.parametrize(("extra", "context"), [(None, 0), (3, 2)])
def test_the_augmented_flow_obeys_all_laws(extra, context):
    model = build("vflow", (3,), extra=extra, depth=2, hidden=8, context=context)
    check_model(model, (3,), context=context)
    assert not model.exact
    (z,) = model.encode(torch.zeros(1, 3), torch.zeros(1, context) if context else None)
    assert z.shape == (1, 3 + (3 if extra is None else extra))


def test_the_bound_of_the_augmented_flow_integrates_to_less_than_one():
    """exp of the ELBO does, and the mean of the weights, which is unbiased, integrates to one."""
    model = randomized(build("vflow", (1,), depth=2, hidden=8), scale=0.5)
    x = torch.linspace(-12, 12, 600, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_w = model(x.repeat_interleave(300, 0), closed_form=False).elbo.reshape(600, -1)
    width = float(x[1] - x[0])
    assert float(log_w.exp().mean(1).sum()) * width == pytest.approx(1, abs=0.03)
    assert float(log_w.mean(1).exp().sum()) * width < 0.995


@pytest.mark.slow
def test_two_more_dimensions_fit_a_ring():
    """Two couplings; the same number of couplings of two variables reaches 2.78."""
    assert nats_after(build("vflow", (2,), depth=2, hidden=32)) < 2.6


# -- permutations


def test_the_masses_of_permutations_sum_to_one_and_are_those_of_draws():
    dist = PlackettLuce(torch.randn(1, 4, dtype=torch.float64))
    every = torch.tensor(list(itertools.permutations(range(4))))
    masses = dist.log_prob(every).exp()
    assert float(masses.sum()) == pytest.approx(1, abs=1e-12)
    drawn = dist.sample((20_000,))[:, 0]
    for p, mass in zip(every[::5].double(), masses[::5].tolist(), strict=True):
        share = float((drawn == p).all(1).double().mean())
        assert share == pytest.approx(mass, abs=5 * math.sqrt(mass / 20_000))


def test_the_head_of_permutations_obeys_all_laws():
    check_head(LikelihoodHead(mlp(3, 4), PlackettLuce), torch.randn(4, 3), (4,))
