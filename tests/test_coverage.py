"""Calibrated draws pass, and every way of being wrong is found and named.

The posterior of a Gaussian parameter with a Gaussian likelihood is known in closed form.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from musigma import Spec, StandardNormal, Variable, coverage
from musigma.conditional import Conditional
from musigma.coverage import Coverage, Pairs, local_test, model_ranks, ranks
from musigma.coverage.drawing import chosen_draws, draw_parts, model_pairs
from musigma.coverage.ranks import rank
from musigma.coverage.uniformity import GRID, band, curve, detectable, p_value, power
from musigma.data import Dataset, Given
from musigma.evaluation.intervals import exact_share
from musigma.layer import Bijection
from musigma.model import Chain, Prior

D = 4


class Conjugate:
    """theta ~ N(0, P), x = A theta + N(0, S): posterior N(K x, C). Random, not diagonal."""

    def __init__(self, seed: int = 0, correlated: bool = False):
        random = np.random.default_rng(seed)
        factor = random.normal(size=(D, D))
        self.prior = factor @ factor.T / D + 0.2 * np.eye(D)
        self.a = random.normal(size=(D + 1, D))
        self.noise = np.diag(random.uniform(0.2, 2, D + 1))
        if correlated:
            self.prior, self.noise = np.full((D, D), 0.9) + 0.1 * np.eye(D), 9 * self.noise
        marginal = self.a @ self.prior @ self.a.T + self.noise
        self.gain = self.prior @ self.a.T @ np.linalg.inv(marginal)
        self.cov = self.prior - self.gain @ self.a @ self.prior
        self.std = np.sqrt(np.diag(self.cov))

    def pairs(self, n: int, seed: int):
        random = np.random.default_rng(seed)
        theta = random.multivariate_normal(np.zeros(D), self.prior, n)
        return theta, theta @ self.a.T + random.multivariate_normal(np.zeros(D + 1), self.noise, n)

    def ranks(
        self, n=500, draws=200, seed=0, *, width=1.0, shift=0.0, rho=1.0, prior=False, exact=True
    ):
        """Ranks among draws of a posterior that is wrong as the arguments say."""
        theta, x = self.pairs(n, seed)
        mean, cov = (0 * theta, self.prior) if prior else (x @ self.gain.T, self.cov)
        diagonal = np.diag(np.diag(cov))
        cov = (diagonal + rho * (cov - diagonal)) * width**2
        mean = mean + np.asarray(shift) * self.std
        random = np.random.default_rng(seed + 10_000)
        z = random.normal(size=(n, draws + 1, D))
        drawn = mean[:, None] + z @ np.linalg.cholesky(cov).T
        inverse, first = np.linalg.inv(cov), drawn[:, 0]

        def log_q(value):
            away = value - (mean[:, None] if value.ndim == 3 else mean)
            return -0.5 * np.einsum("...i,ij,...j", away, inverse, away)

        density = log_q(theta) if exact else None
        parts = [
            (drawn[rows, 1:], log_q(drawn)[rows, 1:] if exact else None)
            for rows in (slice(0, 100), slice(100, n))
        ]
        return ranks(Pairs(theta, x, first, density), parts, seed=seed)


class Affine(Bijection):
    """theta -> L^-1 (theta - K x): the flow whose density is the conjugate posterior."""

    def __init__(self, truth: Conjugate, width: float = 1.0):
        super().__init__()
        cholesky = np.linalg.cholesky(truth.cov) * width
        for name, value in (("gain", truth.gain), ("cholesky", cholesky)):
            self.register_buffer(name, torch.tensor(value))
        self.gain: torch.Tensor
        self.cholesky: torch.Tensor

    def forward(self, x, context=None):
        away = (x - context @ self.gain.T).T
        z = torch.linalg.solve_triangular(self.cholesky, away, upper=False).T
        return z, -self.cholesky.diag().log().sum().expand(len(x))

    def inverse(self, z, context=None):
        z = z.to(self.cholesky)
        return (
            z @ self.cholesky.T + context @ self.gain.T,
            self.cholesky.diag().log().sum().expand(len(z)),
        )


def posterior(truth: Conjugate, width: float = 1.0) -> Chain:
    model = Chain([Affine(truth, width)], Prior(StandardNormal((D,))))
    model.spec = Spec((D,), columns=tuple("abcd"), context=(Variable("x", (D + 1,)),))
    return model


def dataset(truth: Conjugate, n: int, seed: int = 0) -> Dataset:
    theta, x = (values.astype(np.float32) for values in truth.pairs(n, seed))
    return Dataset(theta, given={"x": Given(x)}, columns=tuple("abcd"))


def quantities(found):
    parts = [*found.parameters.T, found.region, found.random, found.near]
    return [u for u in parts if u is not None]


# -- uniformity


def test_p_values_of_uniform_numbers_are_uniform():
    random = np.random.default_rng(0)
    for n in (20, 237):
        p = np.array([p_value(random.uniform(size=n)) for _ in range(400)])
        for level in (0.01, 0.05, 0.2, 0.5):
            assert stats.binomtest(int((p <= level).sum()), len(p), level).pvalue > 1e-3, (
                n,
                level,
            )
        assert 0 < p.min() <= p.max() <= 1


def test_the_band_holds_whole_curves_as_often_as_it_says():
    random, n = np.random.default_rng(1), 150
    for level in (0.05, 0.3):
        low, high = band(n, level)
        inside = 0
        for _ in range(1500):
            found = curve(random.uniform(size=n))
            inside += bool(((low <= found) & (found <= high)).all())
        assert stats.binomtest(inside, 1500, 1 - level).pvalue > 1e-3
        assert (low <= GRID).all()
        assert (high >= GRID).all()


def test_the_test_and_the_band_agree():
    random, n = np.random.default_rng(2), 80
    low, high = band(n)
    for _ in range(300):
        u = random.beta(1.25, 1.0, size=n)
        inside = bool(((low <= curve(u)) & (curve(u) <= high)).all())
        assert inside == (p_value(u) > 0.05)


def test_power_and_the_detectable_deviation_are_those_of_simulations():
    random, n = np.random.default_rng(3), 200
    told, found = power(n, GRID**1.2), 0
    for _ in range(300):
        found += p_value(random.uniform(size=n) ** (1 / 1.2)) <= 0.05
    assert stats.binomtest(int(found), 300, told).pvalue > 1e-3
    least = detectable(n, 0.01)
    widths = np.linspace(0.3, 1, 2000)[:, None]
    narrow = 2 * stats.norm.cdf(widths * stats.norm.ppf((1 + GRID) / 2)) - 1
    which = np.abs((GRID - narrow).max(1) - least).argmin()
    z = widths[which] ** -1 * np.abs(random.normal(size=(300, n)))
    hits = sum(p_value(2 * stats.norm.cdf(row) - 1) <= 0.01 for row in z)
    assert stats.binomtest(hits, 300, 0.8).pvalue > 1e-3
    assert detectable(4 * n, 0.01) == pytest.approx(least / 2, rel=0.05)


def test_tiny_p_values_stay_positive_and_ordered():
    u = np.random.default_rng(4).uniform(size=2000)
    p = [p_value(u**power) for power in (1.1, 1.3, 1.7, 2.5)]
    assert all(a > b > 0 for a, b in itertools.pairwise(p))


# -- ranks


def test_every_quantity_of_an_exact_posterior_is_uniform_and_pairs_are_independent():
    found = Conjugate().ranks(6000, 30)
    for u in quantities(found):
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert p_value(u) > 1e-3
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(len(u))
    assert stats.kstest(found.error[:, 0], "norm").pvalue > 1e-8  # 30 draws: heavier tails
    assert found.draws == 30


def test_ties_are_broken_at_random():
    random = np.random.default_rng(0)
    values = random.poisson(1.2, size=(4000, 21, 3)).astype(float)
    values[values > 2] = np.nan
    theta, drawn = values[:, 0], values[:, 2:]
    found = ranks(Pairs(theta, random.normal(size=(4000, 2)), values[:, 1]), [(drawn, None)])
    for u in quantities(found):
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert len(np.unique(u)) > 3900


def test_ranks_are_those_of_a_loop():
    random = np.random.default_rng(5)
    draws, true = random.integers(0, 5, (7, 11, 3)), random.integers(0, 5, (7, 3))
    u = rank(draws, true, random)
    for i in range(7):
        for j in range(3):
            below = sum(d < true[i, j] for d in draws[i, :, j])
            ties = sum(d == true[i, j] for d in draws[i, :, j])
            assert below / 12 <= u[i, j] <= (below + ties + 1) / 12


def test_a_truth_outside_the_support_is_in_no_region():
    random = np.random.default_rng(6)
    z = random.uniform(size=(30, 52, 2))
    outside = Pairs(z[:, 0] + 2, z[:, 0], z[:, 1], np.full(30, -np.inf))
    found = ranks(outside, [(z[:, 2:], np.zeros((30, 50)))])
    assert found.region is not None
    assert (found.region > 50 / 51).all()


def test_similar_observations_are_found_among_those_before():
    from musigma.coverage.ranks import _nearest_before

    random = np.random.default_rng(7)
    x, order = random.normal(size=(2500, 3)), random.permutation(2500)
    found = _nearest_before(x, order)
    assert found[order[0]] == -1
    for k in (1, 2, 700, 1023, 1024, 1025, 2499):
        before = order[:k]
        nearest = before[np.square(x[before] - x[order[k]]).sum(1).argmin()]
        assert found[order[k]] == nearest


def test_wide_observations_are_projected():
    random = np.random.default_rng(8)
    theta, x = Conjugate().pairs(500, 0)
    wide = np.concatenate([x] * 100, 1)
    wide[:, 7] = 3.0
    wide[4, 9] = np.nan
    draws = random.normal(size=(500, 41, D))
    found = ranks(Pairs(theta, wide, draws[:, 0]), [(draws[:, 1:], None)])
    assert p_value(found.near) < 1e-6, "draws that ignore x are found by projections of x, too"


# -- verdicts


def test_the_verdict_of_an_exact_posterior_errs_in_one_case_of_twenty():
    truth, wrong, hold = Conjugate(), 0, np.zeros((3, 2))
    for seed in range(60):
        found = Coverage(truth.ranks(150, 40, seed), tolerance=0.3)
        wrong += found.judgment.verdict != "calibrated"
        region = next(test for test in found.tests if test.kind == "region")
        for k, level in enumerate((0.5, 0.8, 0.95)):
            hold[k] += region.coverage[k].low <= level <= region.coverage[k].high, 1
    assert stats.binom.sf(wrong - 1, 60, 0.05) > 1e-3
    assert (stats.binom.cdf(hold[:, 0], hold[:, 1], 0.95) > 1e-3).all()


WRONG = {
    "overconfident": {"width": 0.8},
    "underconfident": {"width": 1.25},
    "biased": {"shift": [0, 0, 0.25, 0]},
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_posterior_is_found_and_named(word, seed):
    found = Coverage(Conjugate(seed).ranks(800, 200, seed, **WRONG[word]))
    assert found.judgment.verdict == word
    text = str(found)
    assert text.startswith(word.capitalize())
    reasons = " ".join(found.judgment.reasons)
    if word == "biased":
        assert "theta_2: draws lie 0." in reasons
        assert "above the truth" in reasons
        assert not any(f"theta_{j}:" in reasons for j in (0, 1, 3))
    else:
        assert "too narrow" in reasons if word == "overconfident" else "too wide" in reasons
        level = found.tests[D].coverage[2]
        assert (level.high < 0.95) == (word == "overconfident")
        assert str(level) in text


def test_the_sides_of_a_bias():
    found = Coverage(Conjugate().ranks(800, 100, 1, shift=[0.4, 0, 0, -0.4]))
    above, below = found.judgment.reasons[:2]
    assert above.startswith("theta_0")
    assert "above the truth" in above
    assert below.startswith("theta_3")
    assert "below the truth" in below
    assert found.to_dict()["tests"][0]["shift"] < -3


def test_a_wrong_dependence_is_found_although_every_parameter_is_right():
    for seed in range(3):
        found = Coverage(Conjugate(correlated=True).ranks(1000, 200, seed, rho=0.0))
        alone, joint = found.tests[:D], found.tests[D:]
        assert not any(test.found for test in alone)
        assert joint[0].found
        assert joint[0].p_value < 1e-6
        assert "no parameter is found to deviate by itself" in " ".join(found.judgment.reasons)
        assert found.judgment.verdict == "underconfident", "the density of draws is too low"


def test_the_prior_is_calibrated_on_average_and_found_by_similar_observations():
    for seed in range(3):
        found = Coverage(Conjugate().ranks(500, 100, seed, prior=True))
        assert [test.kind for test in found.tests if test.found] == ["near"]
        assert found.judgment.verdict == "miscalibrated"
        assert "not given the observation" in found.judgment.reasons[0]
        assert all(0.9 < value < 1.1 for value in found.contraction.values())
        assert "say nothing about the parameters" in str(found)
    exact = Coverage(Conjugate().ranks(500, 100))
    truth = Conjugate()
    expected = truth.std / np.sqrt(np.diag(truth.prior))
    assert list(exact.contraction.values()) == pytest.approx(expected.tolist(), rel=0.15)
    assert "say nothing" not in str(exact)


def test_too_few_pairs_cannot_tell():
    found = Coverage(Conjugate().ranks(60, 100))
    judgment = found.judgment
    assert judgment.verdict == "cannot tell"
    assert judgment.detectable > 0.1
    needed = judgment.pairs_for(0.1, 60)
    level = 0.05 / len(found.tests)
    assert detectable(needed, level) == pytest.approx(0.1, rel=0.06)
    assert f"about {needed:,} pairs find it" in str(found)
    assert Coverage(Conjugate().ranks(60, 100), tolerance=0.4).judgment.verdict == "calibrated"
    with pytest.raises(ValueError, match="19 pairs tell nothing; expected 20 or more"):
        Coverage(Conjugate().ranks(19, 100))
    with pytest.raises(ValueError, match=r"tolerance: expected between 0 and 1; got 1\.5"):
        Coverage(Conjugate().ranks(60, 100), tolerance=1.5)


def test_many_pairs_find_what_does_not_matter_and_say_so():
    found = Coverage(Conjugate().ranks(8_000, 30, width=0.96))
    assert found.judgment.verdict == "overconfident"
    assert found.judgment.slight
    assert str(found).startswith("Slightly overconfident")


def test_missing_and_constant_parameters_are_ranked():
    random = np.random.default_rng(0)
    values = random.normal(size=(60, 42, 3))
    values[:, :, 0] = np.nan
    values[:, :, 1] = 2.0
    found = Coverage(
        ranks(
            Pairs(values[:, 0], random.normal(size=(60, 2)), values[:, 1]), [(values[:, 2:], None)]
        )
    )
    assert not any(test.found for test in found.tests)
    assert np.isnan(list(found.contraction.values())[:2]).all()
    assert "nan" not in str(found).split("Each parameter")[0]


def test_without_densities_there_are_no_regions():
    found = Coverage(Conjugate().ranks(800, 100, width=0.75, exact=False))
    assert found.judgment.verdict == "overconfident"
    plain = found.to_dict()
    assert plain["log_q"] is None
    assert [test["kind"] for test in plain["tests"]] == ["parameter"] * D + ["random", "near"]
    assert plain["worst"][0]["region"] is None
    assert "Highest" not in str(found)


def test_the_worst_pairs_are_the_implausible_ones():
    truth = Conjugate()
    theta, x = truth.pairs(100, 0)
    theta[17] += 9 * truth.std
    theta[17, 2] += 9 * truth.std[2]
    random = np.random.default_rng(0)
    drawn = (
        random.multivariate_normal(np.zeros(D), truth.cov, (100, 51)) + (x @ truth.gain.T)[:, None]
    )
    found = Coverage(
        ranks(Pairs(theta, x, drawn[:, 0]), [(drawn[:, 1:], None)]), rows=np.arange(100) * 3
    )
    worst = found.worst()[0]
    assert (worst["row"], worst["parameter"]) == (51, "theta_2")
    assert worst["error"] > 10


# -- models


def test_ranks_of_a_model_are_those_of_its_closed_form():
    truth = Conjugate()
    data = dataset(truth, 300)
    pairs, found = model_ranks(posterior(truth), data, draws=100)
    away = pairs.theta - pairs.x @ truth.gain.T
    expected = stats.chi2.cdf(np.einsum("bi,ij,bj->b", away, np.linalg.inv(truth.cov), away), D)
    assert found.region is not None
    assert np.abs(found.region - expected).max() < 0.2
    assert np.corrcoef(found.region, expected)[0, 1] > 0.98
    z = stats.norm.cdf(away / truth.std)
    assert np.abs(found.parameters - z).max() < 0.2
    log_q = stats.multivariate_normal(cov=truth.cov).logpdf(away)
    assert found.log_q == pytest.approx(log_q, rel=1e-5)
    assert found.names == tuple("abcd")


@pytest.mark.parametrize(("width", "word"), [(1.0, "calibrated"), (0.8, "overconfident")])
def test_a_model_is_checked(width, word):
    truth, steps = Conjugate(1), []
    found = coverage.check(
        posterior(truth, width),
        dataset(truth, 600),
        draws=100,
        local=0,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found.judgment.verdict == word
    assert steps[-1] == (600, 600)
    again = coverage.check(posterior(truth, width), dataset(truth, 600), draws=100, local=0)
    assert again.to_dict() == found.to_dict()
    other = coverage.check(
        posterior(truth, width), dataset(truth, 600), draws=100, local=0, seed=1
    )
    assert other.ranks.parameters.tolist() != found.ranks.parameters.tolist()


def test_draws_of_parts_differ_and_leave_the_random_state_alone(monkeypatch):
    from musigma.coverage import drawing

    truth = Conjugate()
    model, data = posterior(truth).train(), dataset(truth, 40)
    monkeypatch.setattr(drawing, "ROWS", 100)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts = list(draw_parts(model, data, 30))
    first = model_pairs(model, data).first
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert [len(draws) for draws, _ in parts] == [3] * 13 + [1]
    draws, log_q = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert len(np.unique(np.append(draws[..., 0], first[:, 0]))) == 40 * 31
    theta = torch.from_numpy(draws[5])
    context = torch.from_numpy(data.given["x"].values[5:6]).double().expand(30, -1)
    assert model.log_prob(theta, context).numpy() == pytest.approx(log_q[5])


def test_a_model_without_an_exact_density_is_ranked_without_regions():
    import musigma

    data = dataset(Conjugate(), 60)
    model = musigma.build("vae", data.spec(["x"]), net="mlp", width=8, latents=2)
    found = coverage.check(musigma.testing.randomized(model).float(), data, draws=40, local=0)
    assert found.ranks.region is None
    assert "no exact density" in str(found)


def test_one_embedding_serves_all_draws_of_an_observation():
    truth, rows = Conjugate(), []

    class Counting(torch.nn.Module):
        def forward(self, context):
            rows.append(len(context))
            return context

    model = Conditional(posterior(truth), Counting())
    model.spec = model.model.spec
    found = coverage.check(model, dataset(truth, 100), draws=50, local=0)
    assert found.judgment.reasons == ()
    assert sum(rows) <= 4 * 100


def test_more_pairs_than_wanted_are_chosen_at_random():
    truth = Conjugate()
    found = coverage.check(posterior(truth), dataset(truth, 200), draws=30, pairs=50, local=0)
    assert len(found.ranks) == 50
    assert "50 of 200" in str(found)
    rows = found.columns()["row"]
    assert (np.diff(rows) > 0).all()
    assert rows[-1] > 100
    assert found.ranks.theta == pytest.approx(dataset(truth, 200).x[rows])
    assert chosen_draws(10) == 1000


def test_what_cannot_be_checked_is_refused():
    truth = Conjugate()
    model, data = posterior(truth), dataset(truth, 30)
    plain = Chain([], Prior(StandardNormal((D,))))
    plain.spec = Spec((D,))
    with pytest.raises(ValueError, match="conditioned on nothing"):
        coverage.check(plain, data)
    with pytest.raises(ValueError, match=r"expected 20 pairs or more.*; got 12"):
        coverage.check(model, data.subset(np.arange(12)))
    with pytest.raises(ValueError, match="draws: expected 20 or more; got 3"):
        coverage.check(model, data, draws=3)
    with pytest.raises(ValueError, match="conditioned on 'x'"):
        coverage.check(model, Dataset(data.x))
    broken = posterior(truth)
    broken.layers[0].gain *= float("inf")
    with pytest.raises(ValueError, match="draws: 30 of 30 draws of the model are not finite"):
        coverage.check(broken, data, draws=30)


def test_arrays_that_do_not_fit_are_refused():
    random = np.random.default_rng(0)
    theta, x = random.normal(size=(2, 30, D))
    drawn = random.normal(size=(30, 20, D))
    with pytest.raises(ValueError, match=r"first: expected shape \(30, 4\); got \(30, 3\)"):
        Pairs(theta, x, theta[:, :3])
    with pytest.raises(ValueError, match="names: expected 4; got 1"):
        Pairs(theta, x, theta, names=("a",))
    with pytest.raises(ValueError, match="log_q: 30 of 30 are NaN"):
        Pairs(theta, x, theta, np.full(30, np.nan))
    with pytest.raises(ValueError, match="theta: 1 of 30 rows are infinite"):
        Pairs(np.where(np.arange(30)[:, None] == 3, np.inf, theta), x, theta)
    pairs = Pairs(theta, x, theta)
    with pytest.raises(ValueError, match="expected draws for 30 pairs; got 10"):
        ranks(pairs, [(drawn[:10], None)])
    with pytest.raises(ValueError, match=r"expected draws \(B, L, 4\) for 30 pairs; got shape"):
        ranks(pairs, [(drawn[:, :, :2], None)])
    with pytest.raises(ValueError, match="log q: expected shape"):
        ranks(Pairs(theta, x, theta, theta[:, 0]), [(drawn, None)])


def test_the_page_has_pictures_and_every_figure():
    pytest.importorskip("matplotlib")
    found = Coverage(Conjugate().ranks(300, 50, width=0.7), source="pairs.csv")
    page = found.to_html()
    assert page.count("data:image/png") >= 4, "light and dark pictures of ranks and of regions"
    assert "pairs.csv" in page
    for test in found.tests:
        assert test.name in page
        assert str(test.coverage[2]) in page
        assert test.coverage[2] == exact_share(round(test.coverage[2].value * 300), 300)


# -- local tests


def local(truth: Conjugate, seed: int, *, n=400, shift=0.0, **how):
    """A local test at four observations, with draws that are off by `shift`."""
    theta, x = truth.pairs(n, seed)
    at = truth.pairs(4, seed + 1000)[1]
    random = np.random.default_rng(seed + 2000)

    def drawn(x, count):
        z = random.normal(size=(len(x), count, D)) @ np.linalg.cholesky(truth.cov).T
        return (x @ truth.gain.T + shift * truth.std)[:, None] + z

    pairs = Pairs(theta, x, drawn(x, 1)[:, 0])
    return at, local_test(pairs, at, drawn(at, 200), seed=seed, **how)


def test_local_p_values_of_an_exact_posterior_are_at_least_uniform():
    found = [local(Conjugate(), seed, n=100, permutations=19)[1] for seed in range(16)]
    for level in (0.05, 0.25, 0.5):
        first = sum(result.p_values[0] <= level for result in found)
        assert stats.binom.sf(first - 1, 16, level) > 1e-3
        anywhere = sum(result.adjusted.min() <= level for result in found)
        assert stats.binom.sf(anywhere - 1, 16, level) > 1e-3
        assert stats.binom.cdf(anywhere, 16, level) > 1e-3, "not always one"


@functools.cache
def local_pair():
    """Local tests of a posterior that is wrong everywhere, and of the exact one."""
    how = {"n": 400, "permutations": 99}
    return local(Conjugate(), 0, shift=0.8, **how)[1], local(Conjugate(), 0, **how)[1]


def test_a_posterior_that_is_wrong_everywhere_is_found_at_every_observation():
    found, none = local_pair()
    assert (found.p_values == 1 / 100).all()
    assert (found.adjusted >= found.p_values).all()
    assert len(found.found) == 4
    assert found.labels == ("0", "1", "2", "3")
    assert none.found == []


def test_observations_outside_of_the_pairs_are_counted():
    theta, x = Conjugate().pairs(100, 0)
    x[:, 4] = np.nan  # padding that every sequence has
    at = np.stack([x[3], x[3]])
    at[1, :2] += 1e3
    found = local_test(Pairs(theta, x, theta), at, np.stack([theta, theta]), permutations=19)
    assert found.outside.tolist() == [0, 2]
    text = str(Coverage(Conjugate().ranks(100, 50), local=found))
    assert "Observation 1 lies outside the range of the pairs in 2 of its values" in text
    with pytest.raises(ValueError, match="x, draws: expected"):
        local_test(Pairs(theta, x, theta), at[:, :2], np.stack([theta, theta]))


def test_a_local_test_treats_parameters_and_draws_alike(monkeypatch):
    """What classifiers see is the same after an exchange, so the null hypothesis is exact."""
    seen = []

    class Stub:
        def __init__(self, networks, *_, **__):
            self.networks = networks

        def fit(self, rows, *_, **__):
            seen.append(rows)

        def probabilities(self, rows):
            return 0.5 + torch.arange(self.networks, 0, -1)[:, None].sqrt().expand(-1, len(rows))

    monkeypatch.setattr("musigma.coverage.local.Classifiers", Stub)
    random = np.random.default_rng(0)
    theta, first = random.normal(size=(50, 2)) * 7 + 3, random.normal(size=(50, 2))
    x = random.normal(size=(50, 1))
    for pair in (theta, first), (first, theta):
        found = local_test(Pairs(pair[0], x, pair[1]), x[:1], theta[None], permutations=19)
    a, b = (rows.numpy() for rows in seen)
    np.testing.assert_allclose(a, np.roll(b, 50, 0), rtol=1e-5)
    assert found.p_values[0] == found.adjusted[0] == 0.05


def test_what_local_tests_find_is_in_the_verdict():
    wrong, right = local_pair()
    ranks = Conjugate().ranks(500, 50)
    assert Coverage(ranks, local=right).judgment.verdict == "calibrated"
    found = Coverage(ranks, local=wrong)
    assert found.judgment.verdict == "miscalibrated"
    assert "at 4 of 4 observations: 0, 1, 2, 3" in found.judgment.reasons[0]
    assert found.to_dict()["local"]["adjusted"] == wrong.adjusted.tolist()
    assert "Single observations" in str(found)


def test_a_model_is_checked_at_given_observations():
    truth = Conjugate()
    data = dataset(truth, 60)
    at = torch.from_numpy(data.given["x"].values[:2]).double()
    found = coverage.check(posterior(truth), data, draws=50, at=at).local
    assert found is not None
    assert found.labels == ("0", "1")
    chosen = coverage.check(posterior(truth), data, draws=50, local=3).local
    assert chosen is not None
    assert all(label.startswith("row ") for label in chosen.labels)
    assert coverage.check(posterior(truth), data, draws=50, local=0).local is None
