"""Bounds of log p(x) against models whose log p(x) is known."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from musigma import data
from musigma.data import Dataset
from musigma.distributions import (
    FactorizedBernoulli,
    LikelihoodHead,
    OneHotHead,
    StandardNormal,
    StandardUniform,
    UniformOneHot,
)
from musigma.evaluation import (
    Annealing,
    Chains,
    evaluate,
    evaluating,
    gap,
    sandwich,
    score,
    weighed,
)
from musigma.evaluation.both_sides import averages
from musigma.evaluation.figures import mean
from musigma.gaussian import GaussianHead
from musigma.layers import Dequantize, Rescale
from musigma.model import VAE, Chain, Prior
from musigma.zoo import build
from test_oracles import PPCA, D, K, gaussian

FEW = Annealing(steps=8, leapfrogs=3)
FROM_PRIOR = Annealing(steps=25, leapfrogs=3, from_prior=True)


@pytest.fixture(autouse=True)
def exact():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Rows:
    """A hook that counts the rows that a network sees."""

    def __init__(self, net):
        self.most, self.all = 0, 0
        net.register_forward_pre_hook(self)

    def __call__(self, net, args):
        self.most, self.all = max(self.most, len(args[0])), self.all + len(args[0])


# -- importance weights


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2], [3, 8, 1]])
def test_bounds_are_means_over_groups_of_draws_however_they_come(sizes):
    log_w = 3 * torch.randn(2, 12)
    bounds, ess = weighed(log_w.split(sizes, 1), [1, 3, 5, 12])
    for k, bound in zip([1, 3, 5, 12], bounds.T, strict=True):
        groups = [log_w[:, i : i + k].exp().mean(1).log() for i in range(0, 13 - k, k)]
        torch.testing.assert_close(bound, torch.stack(groups).mean(0))
    w = log_w.exp()
    torch.testing.assert_close(ess, w.sum(1) ** 2 / (w**2).sum(1))


def test_equal_weights_have_as_many_effective_draws_as_there_are():
    assert weighed([torch.full((1, 6), -900.0)], [6]).ess.item() == pytest.approx(6)


@pytest.mark.parametrize("name", ["vae", "ladder"])
def test_memory_does_not_grow_with_the_draws_and_the_encoder_runs_for_the_first(name):
    digits, options = data.load("digits"), {"levels": 2} if name == "ladder" else {}
    model = build(name, digits.spec(), latents=1, width=2, **options).double()
    x = torch.from_numpy(digits.x[:2]).double()
    encoder = Rows(model.encoder if name == "vae" else model.bottom_up)
    decoder = Rows(model.decoder)
    with torch.no_grad(), evaluating(model):
        for k in (16, 5 * 16):
            encoder.all = decoder.all = 0
            assert model.iwae(x, k, at_once=32).isfinite().all()
            assert (decoder.most, decoder.all) == (32, 2 * k)
            assert encoder.all == 32


def test_the_encoding_of_other_data_is_not_reused():
    """In a VAE whose prior is a VAE, the inner encoder sees another draw in every pass."""
    inner = VAE(linear_head(2, 1), linear_head(1, 2), Prior(StandardNormal((1,))))
    model = VAE(linear_head(3, 2), linear_head(2, 3), inner)
    outside, within = Rows(model.encoder), Rows(inner.encoder)
    with torch.no_grad():
        model.iwae(torch.randn(1, 3), 6, at_once=2)
    assert (outside.all, within.all) == (2, 6)


def linear_head(inputs, outputs):
    return gaussian(torch.randn(outputs, inputs), torch.randn(outputs), torch.ones(outputs))


# -- both sides of known densities


def agrees(model, truth, annealing, *, n=64, k=4, spread=0.5):
    """Weights and their reciprocals average to one, and the bounds lie on their sides."""
    both = sandwich(model, n, k=k, annealing=annealing)
    log_p = truth(both.x)
    single = sandwich(model, n, k=1, annealing=annealing)
    log_one = truth(single.x)
    for log_ratio in (single.low - log_one, log_one - single.high):  # E w / p = E p / w = 1
        ratio = log_ratio.exp()
        error = ratio.std() / math.sqrt(len(ratio))
        assert abs(ratio.mean() - 1) < 4 * error + 1e-9
        assert error < spread / 2
    for bounds, p in ((both, log_p), (single, log_one)):
        low, high = p - bounds.low, bounds.high - p
        assert low.mean() > -4 * low.std() / math.sqrt(len(p))
        assert high.mean() > -4 * high.std() / math.sqrt(len(p))
    gaps = single.high - single.low, both.high - both.low
    error = math.hypot(*(t.std() / math.sqrt(len(t)) for t in gaps))
    assert gaps[1].mean() < gaps[0].mean() + 4 * error
    assert (both.high - both.low).mean() < spread
    return both


@pytest.mark.parametrize(
    ("prior", "annealing", "spread"),
    [
        ("standard", None, 0.5),
        ("flow", FEW, 0.5),
        ("flow", FROM_PRIOR, 1.0),
    ],
)
def test_bounds_of_probabilistic_pca(prior, annealing, spread):
    """A posterior 1.3 times too wide, without annealing, from q, and from the prior."""
    ppca = PPCA(prior, spread=1.3)
    both = agrees(ppca.model, ppca.truth.log_prob, annealing, spread=spread)
    if annealing is not None:
        assert 0.5 < both.figures["acceptance"].min() < both.figures["acceptance"].max() < 1


class Wiggle(nn.Module):
    """Logits of four bits, which are no linear function of one latent."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, z):
        return 3 * self.net(z)


def test_bounds_of_bits_that_a_quadrature_sums():
    """All 16 values of x have a probability by quadrature over z; they add up to one."""
    decoder = LikelihoodHead(Wiggle(), FactorizedBernoulli)
    encoder = gaussian(0.2 * torch.randn(1, 4), torch.randn(1), torch.ones(1))
    model = VAE(encoder, decoder, Prior(StandardNormal((1,)))).eval()
    with torch.no_grad():
        z = torch.linspace(-9, 9, 4001)
        cells = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
        p = model.decoder(z[:, None])
        log_px = torch.stack([p.log_prob(x.expand(len(z), 4)) for x in cells])
        table = (log_px + Normal(0, 1).log_prob(z)).logsumexp(1) + math.log(z[1] - z[0])
    assert table.exp().sum().item() == pytest.approx(1)
    places = torch.tensor([8, 4, 2, 1])

    def truth(x):
        return table[(x.long() * places).sum(1)]

    agrees(model, truth, Annealing(12, 3), spread=1.0)


def test_bounds_of_a_model_with_classes_that_a_sum_knows():
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    decoder, prior = GaussianHead(net, event_ndims=1, log_std=-0.5), UniformOneHot(1, 5)
    model = VAE(OneHotHead(nn.Linear(3, 5), 1, 5), decoder, Prior(prior)).eval()
    classes = torch.eye(5)[:, None]

    @torch.no_grad()
    def truth(x):
        rows = torch.stack([model.decoder(z[None]).log_prob(x) for z in classes], 1)
        return rows.logsumexp(1) - math.log(5)

    agrees(model, truth, None, n=400, k=6, spread=1.0)
    with pytest.raises(ValueError, match=r"annealing: OneHotLatents has no gradient .* leave"):
        sandwich(model, 3, annealing=FEW)


@pytest.mark.parametrize("annealing", [None, FEW])
def test_bounds_of_a_flow_of_levels_that_a_distribution_function_knows(annealing):
    """Noise of dequantization is a latent: its weights average to the mass of a cell."""
    scale, shift = 0.75, -1.5
    layers = [Dequantize(StandardUniform((2,)), levels=5), Rescale(scale, shift)]
    model = Chain(layers, Prior(StandardNormal((2,)))).eval()

    def truth(x):
        ends = torch.stack([x, x + 1]) * scale + shift
        return Normal(0, 1).cdf(ends).diff(dim=0)[0].log().sum(1)

    both = agrees(model, truth, annealing, n=300)
    assert 200 < len(both.x) < 300  # without those that were clamped to a level


def test_rates_and_distortions_of_probabilistic_pca():
    """The tempered posterior of a linear Gaussian model has both in closed form."""
    ppca = PPCA("standard", spread=1.3)
    x, noise, net = ppca.truth.sample((12,)), 0.7, ppca.model.decoder.get_submodule("net")
    bias, loadings = (p.detach() for p in (net.get_parameter("bias"), net.get_parameter("weight")))
    rest, rows = x - bias, list(Chains(ppca.model, x, annealing=FROM_PRIOR).tempered(20))
    assert [beta for beta, _, _ in rows] == FROM_PRIOR.betas[1:]
    with torch.no_grad():
        for beta, log_z, log_px in rows:
            precision = 1 + beta * loadings.square().sum(0) / noise**2
            center = beta * rest @ loadings / noise**2 / precision
            square = (rest - center @ loadings.T).square().sum(1)
            square += (loadings.square().sum(0) / precision).sum()
            distortion = D * math.log(2 * math.pi * noise**2) / 2 + square / noise**2 / 2
            rate = (center.square() + 1 / precision - 1 + precision.log()).sum(1) / 2
            for found, truth in ((-log_px, distortion), (beta * log_px - log_z, rate)):
                error = found - truth
                assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(x)) + 0.02
                assert error.std() < (1.0 if beta > 0.5 else 4.0)  # wide densities, and 20 chains
    assert abs(rows[-1][1] - ppca.truth.log_prob(x)).max() < 0.8


# -- what is refused


class Rough(nn.Module):
    """A mean whose gradient is far from that of any quadratic."""

    def forward(self, z):
        return (1e7 * z).sin() + 3 * z


def test_chains_that_do_not_move_are_an_error():
    decoder = GaussianHead(Rough(), event_ndims=1, log_std=-7.0)
    model = VAE(linear_head(2, 2), decoder, Prior(StandardNormal((2,)))).eval()
    with pytest.raises(ValueError, match=r"annealing: the chains of 3 of 3 examples do not move"):
        sandwich(model, 3, annealing=Annealing(steps=20))


def test_an_exact_model_has_nothing_to_anneal_and_no_gap():
    model, points = build("nsf", (2,), bits=None, depth=1, hidden=4).eval(), torch.randn(3, 2)
    with pytest.raises(ValueError, match="annealing: this Chain draws nothing"):
        list(Chains(model, points).log_weights(1))
    with pytest.raises(TypeError, match="gap: log p"):
        gap(model, data.load("two-moons").subset(range(3)))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"leapfrogs": 0}])
def test_annealing_takes_steps(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more; got 0"):
        Annealing(**wrong)


# -- figures


@pytest.fixture
def digits():
    return data.load("digits").subset(range(20))


@pytest.fixture
def model(digits):
    return build("mlp_vae", digits.spec(), latents=3, hidden=8).eval()


def test_a_curve_has_a_figure_for_each_number_of_draws_from_the_same_draws(digits, model):
    figure = evaluate(model, digits, k=(12, 1, 4))
    curve = figure["curve"]
    assert [row["k"] for row in curve] == [1, 4, 12]
    nats = [row["nats"] for row in curve]
    assert nats[0] > nats[1] > nats[2] == figure["nats"]
    assert curve[2]["standard_error"] == figure["standard_error"] > 0
    assert curve[0]["bits_per_dim"] == pytest.approx(nats[0] / 64 / math.log(2))
    assert figure["bound"] == "iwae-12"
    assert 1 <= figure["ess_lowest"] <= figure["ess"] <= 12
    assert "figures" not in figure
    alone = evaluate(model, digits, k=12)
    assert alone["nats"] == figure["nats"]
    assert "curve" not in alone


def test_annealed_figures_are_tighter_and_state_the_acceptance(digits, model):
    plain = evaluate(model, digits, k=2)
    figure = evaluate(model, digits, k=(1, 2), annealing=FEW)
    assert figure["nats"] < plain["nats"]
    assert figure["bound"] == "ais-2"
    assert 0.3 < figure["acceptance"] <= 1
    assert [row["k"] for row in figure["curve"]] == [1, 2]


def test_the_gap_of_a_bound_has_its_error(digits, model):
    found = gap(model, digits, k=3, seed=1)
    assert found == gap(model, digits, k=3, seed=1)
    assert found["n"] == 20
    assert found["gap"] == pytest.approx(found["high"] - found["low"])
    assert 0 < found["gap"] < 20
    assert found["standard_error_gap"] > 0


# -- intervals


def covered(means, errors, truth):
    """Whether intervals of 1.96 standard errors hold the truth in 93 % of 200 data sets."""
    inside = abs(torch.tensor(means) - truth) < 1.96 * torch.tensor(errors)
    assert len(inside) == 200
    return inside.sum() >= 186


@pytest.mark.slow
@pytest.mark.parametrize("annealing", [None, FEW])
def test_intervals_of_bounds_hold_what_they_estimate(annealing):
    """The bound of each k, on average over data, in 200 data sets of 100 rows."""
    ppca, sets, n, ks = PPCA("standard", spread=1.3), 200, 100, (1, 4, 16)
    model = ppca.model.eval()
    rows = ppca.truth.sample((sets * n,)).float()
    table = score(model, Dataset(rows.numpy()), k=ks, annealing=annealing, batch_size=len(rows))
    log_p = ppca.truth.log_prob(rows.double()).numpy()
    entropy = float(ppca.truth.entropy())
    for k, column in zip(ks, ("nats_1", "nats_4", "nats"), strict=True):
        loss = (table[column] + log_p).mean()  # how far the bound is: of all sets, so certain
        figures = [
            mean(model, {name: values[i : i + n] for name, values in table.items()}, ks, annealing)
            for i in range(0, sets * n, n)
        ]
        found = [next(r for r in f["curve"] if r["k"] == k) for f in figures]
        means, errors = ([r[name] for r in found] for name in ("nats", "standard_error_nats"))
        assert covered(means, errors, entropy + loss)
        assert loss > -0.01
        if annealing is None and k == 1:
            assert loss == pytest.approx(K * (0.5 * (1.3**2 - 1) - math.log(1.3)), abs=0.01)
        if annealing is not None and k == 16:
            assert covered(means, errors, entropy)  # of log p(x) itself


@pytest.mark.slow
@pytest.mark.parametrize("annealing", [None, FEW])
def test_intervals_from_both_sides_hold_log_p(annealing):
    ppca, sets, n = PPCA("standard", spread=1.3), 200, 100
    both = sandwich(ppca.model.eval(), sets * n, k=4, annealing=annealing)
    table = {"low": both.low, "high": both.high, "gap": both.high - both.low}
    table = {name: values.numpy() for name, values in table.items()}
    found = [
        averages({name: values[i : i + n] for name, values in table.items()})
        for i in range(0, sets * n, n)
    ]
    gaps, errors = ([f[name] for f in found] for name in ("gap", "standard_error_gap"))
    assert covered(gaps, errors, table["gap"].mean())
    truth = -float(ppca.truth.entropy())
    low, high = (
        [f[side] + sign * 1.96 * f[f"standard_error_{side}"] for f in found]
        for side, sign in (("low", -1), ("high", 1))
    )
    held = [a <= truth <= b for a, b in zip(low, high, strict=True)]
    assert sum(held) >= 186
