"""Promises about anomalies hold on exchangeable data, and figures agree with scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from musigma import anomaly
from musigma.evaluation.intervals import average_precision, exact_share
from musigma.schema import Column, Schema

RATES = (0.05, 0.01, 0.001)


def lies_in(count: int, n: int, rate: float, chance: float = 1e-4) -> bool:
    """Whether a count is plausible for a binomial distribution."""
    return chance / 2 < stats.binom.cdf(count, n, rate) and (
        stats.binom.sf(count - 1, n, rate) > chance / 2
    )


# -- conformal p-values


def test_the_promise_holds_over_many_repetitions():
    random, found = np.random.default_rng(0), []
    for _ in range(20_000):
        scores = random.standard_exponential(1000)
        found += anomaly.p_values(scores[:1], scores[1:]).tolist()
    p = np.array(found)
    for rate in RATES:
        assert lies_in(int((p <= rate).sum()), len(p), rate), rate
        assert not lies_in(int((p <= 1.5 * rate).sum()), len(p), rate) or rate == 0.001
    assert p.min() == 0.001
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [20, 99])
def test_ties_err_on_the_safe_side_and_randomization_is_exact(n):
    random = np.random.default_rng(1)
    plain, randomized = [], []
    for _ in range(4000):
        scores = random.poisson(1.5, n + 1)
        plain += anomaly.p_values(scores[:1], scores[1:]).tolist()
        randomized += anomaly.p_values(scores[:1], scores[1:], random=random).tolist()
    assert np.mean(np.array(plain) <= 0.1) < 0.1 + 3 * math.sqrt(0.09 / 4000)
    assert np.mean(np.array(plain) <= 0.5) < 0.45, "half of the scores are tied"
    assert stats.kstest(randomized, "uniform").pvalue > 1e-3


def test_the_promise_holds_for_a_detector_of_another_library():
    ensemble = pytest.importorskip("sklearn.ensemble")
    random = np.random.default_rng(2)
    x = random.standard_t(3, (3300, 4)) @ random.normal(size=(4, 4))
    forest = ensemble.IsolationForest(n_estimators=10, random_state=0).fit(x[:300])
    scores, count, trials = -forest.score_samples(x[300:]), {rate: 0 for rate in RATES}, 2000
    for _ in range(trials):
        random.shuffle(scores)
        p = anomaly.p_values(scores[:1], scores[1:])
        for rate in RATES:
            count[rate] += int(p[0] <= rate)
    assert all(lies_in(count[rate], trials, rate) for rate in RATES), count
    strange = -forest.score_samples(np.full((5, 4), 99.0))
    assert (anomaly.p_values(strange, scores) < 0.02).all()


def test_a_flag_is_a_score_above_the_threshold():
    random = np.random.default_rng(3)
    for n in (9, 19, 99, 100, 57):
        known = random.integers(0, 30, n).astype(float)
        new = np.append(random.integers(-5, 40, 200), [np.inf, -np.inf])
        p = anomaly.p_values(new, known)
        for rate in [*(k / (n + 1) for k in range(1, n + 1)), 0.29, 0.1, 0.7, 0.999]:
            if rate >= anomaly.smallest_rate(n):
                flag = new > anomaly.threshold(known, rate)
                np.testing.assert_array_equal(flag, p <= rate)


def test_the_rate_of_one_threshold_lies_in_its_interval():
    random, n, m, rate = np.random.default_rng(4), 300, 400, 0.02
    wide, narrow = anomaly.rate_interval(n, rate, m), anomaly.rate_interval(n, rate)
    true, seen = [], []
    for _ in range(3000):
        limit = anomaly.threshold(random.normal(size=n), rate)
        true.append(stats.norm.sf(limit))
        seen.append(random.binomial(m, true[-1]) / m)
    assert abs(np.mean(true) - 6 / 301) < 4 * np.std(true) / math.sqrt(3000)
    assert 0.935 < np.mean([narrow[0] <= share <= narrow[1] for share in true]) < 0.965
    assert 0.945 < np.mean([wide[0] <= share <= wide[1] for share in seen]) < 0.98
    assert np.mean([narrow[0] <= share <= narrow[1] for share in seen]) < 0.9


def test_too_few_rows_promise_nothing():
    known = np.arange(98.0)
    with pytest.raises(ValueError, match=r"0\.01 cannot be promised by 98 .* from 0\.01: .* 99 "):
        anomaly.threshold(known, 0.01)
    assert anomaly.threshold(np.arange(99.0), 0.01) == 98
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="rate: expected a number between 0 and 1"):
            anomaly.threshold(known, rate)


@pytest.mark.parametrize(
    ("scores", "calibration", "message"),
    [
        ([1.0, math.nan], [0.0], "scores: 1 of 2 scores are NaN"),
        ([1.0], [0.0, math.nan], "calibration: 1 of 2 scores are NaN"),
        ([1.0], [], "calibration: expected one or more scores"),
        ([[1.0]], [0.0], r"scores: expected a vector of scores; got shape \(1, 1\)"),
    ],
)
def test_scores_without_a_rank_are_refused(scores, calibration, message):
    with pytest.raises(ValueError, match=message):
        anomaly.p_values(scores, calibration)


# -- drift


SCHEMA = Schema(
    [
        Column("height"),
        Column("count", "count"),
        Column("color", "category", ("red", "green", "blue")),
        Column("rare", "category", tuple(map(str, range(60)))),
        Column("weight", missing=True),
    ]
)


def rows(random: np.random.Generator, n: int) -> np.ndarray:
    height = random.normal(size=n)
    rare = np.minimum(random.geometric(0.2, n) - 1, 59)
    weight = np.where(random.uniform(size=n) < 0.1, np.nan, height + random.normal(size=n))
    columns = [height, random.poisson(2, n), random.integers(0, 3, n), rare, weight]
    return np.stack(columns, 1).astype(float)


def test_nothing_has_drifted_where_nothing_has():
    random, repetitions = np.random.default_rng(5), 300
    found = [
        anomaly.column_drift(rows(random, 150), rows(random, 400), SCHEMA)
        for _ in range(repetitions)
    ]
    assert {(t["column"], t["test"]) for t in found[0]} == {
        ("height", "Kolmogorov-Smirnov"),
        ("count", "chi-squared"),
        ("color", "chi-squared"),
        ("rare", "chi-squared"),
        ("weight", "Kolmogorov-Smirnov"),
        ("weight", "missing"),
    }
    for name, test in {(t["column"], t["test"]) for t in found[0]}:
        p = [
            t["p_value"]
            for each in found
            for t in each
            if (t["column"], t["test"]) == (name, test)
        ]
        assert np.mean(np.array(p) <= 0.1) < 0.1 + 3 * math.sqrt(0.09 / repetitions), (name, test)
        assert np.mean(p) < 0.75, "p-values of one are no test"
    false = sum(each[0]["adjusted"] <= 0.05 for each in found)
    assert false <= stats.binom.ppf(0.999, repetitions, 0.05)


def moved(name: str, x: np.ndarray) -> np.ndarray:
    j, x = SCHEMA.index(name), x.copy()
    some = np.arange(len(x)) % 3 == 0
    new = {"height": x[:, j] * 2, "count": x[:, j] + 2, "color": np.where(some, 1, x[:, j])}
    new |= {"rare": np.where(some, 60, x[:, j]), "weight": np.where(some, np.nan, x[:, j])}
    x[:, j] = new[name]
    return x


@pytest.mark.parametrize("name", SCHEMA.names)
def test_the_column_that_drifts_is_named(name):
    random = np.random.default_rng(6)
    found = anomaly.column_drift(moved(name, rows(random, 300)), rows(random, 900), SCHEMA)
    assert {t["column"] for t in found if t["adjusted"] < 1e-4} == {name}
    assert found[0]["column"] == name
    assert all(set(t) == {"column", "test", "statistic", "p_value", "adjusted"} for t in found)


def test_scores_that_are_too_ordinary_have_drifted_too():
    random = np.random.default_rng(7)
    known = random.normal(size=500)
    p = [anomaly.score_drift(random.normal(size=80), random.normal(size=300)) for _ in range(300)]
    assert stats.kstest([each["p_value"] for each in p], "uniform").pvalue > 1e-3
    for scale in (0.4, 2.5):
        assert anomaly.score_drift(scale * random.normal(size=300), known)["p_value"] < 1e-6
    theirs = stats.ks_2samp(known[:90], known[90:])
    ours = anomaly.score_drift(known[:90], known[90:])
    assert (ours["statistic"], ours["p_value"]) == pytest.approx(tuple(theirs))


def test_holm_is_the_closed_test_of_bonferroni():
    random = np.random.default_rng(8)
    for n in (1, 2, 5):
        p = random.uniform(size=n) ** 3
        closed = [
            max(
                min(1, len(s) * p[list(s)].min())
                for size in range(1, n + 1)
                for s in itertools.combinations(range(n), size)
                if i in s
            )
            for i in range(n)
        ]
        np.testing.assert_allclose(anomaly.holm(p), closed)


def test_rows_of_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"reference: expected rows of 2 columns; got shape \(4,"):
        anomaly.column_drift(np.ones((3, 2)), np.ones((4, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="rows: expected rows of 2 columns"):
        anomaly.column_drift(np.ones((0, 2)), np.ones((4, 2)), ["a", "b"])


# -- figures on labeled rows


def test_figures_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(9)
    for strange, normal in ((1, 1), (4, 30), (50, 20), (300, 2000)):
        label = np.repeat([True, False], [strange, normal])
        for digits in (0, 1, 9):
            scores = (random.normal(size=len(label)) + label).round(digits)
            found = anomaly.detection(scores, label)
            for name, theirs in (
                ("auroc", metrics.roc_auc_score),
                ("average_precision", metrics.average_precision_score),
            ):
                assert found[name].value == pytest.approx(theirs(label, scores), abs=1e-12)
                assert found[name].low - 1e-12 <= found[name].value <= found[name].high + 1e-12
    assert (found["normal"], found["anomalies"], "at" in found) == (2000, 300, False)
    assert exact_share(3, 40)[1:] == pytest.approx(tuple(stats.binomtest(3, 40).proportion_ci()))


def test_recall_and_flags_are_shares_at_the_promised_rate():
    random = np.random.default_rng(10)
    scores, label = random.normal(size=5000), np.arange(5000) % 10 == 0
    scores[label] += 3
    known = random.normal(size=4000)
    found = anomaly.detection(scores, label, calibration=known, rates=(0.05, 0.01))
    for rate, at in zip((0.05, 0.01), found["at"], strict=True):
        flag = anomaly.p_values(scores, known) <= rate
        assert at["recall"].value == flag[label].mean()
        assert at["flagged"].value == flag[~label].mean()
        assert at["recall"].low < stats.norm.sf(stats.norm.isf(rate) - 3) < at["recall"].high
        assert at["promised"][0] <= at["flagged"].value <= at["promised"][1]
        assert at["promised"][0] < rate < at["promised"][1]


def test_the_interval_of_average_precision_covers_it():
    random = np.random.default_rng(11)
    large = average_precision(
        random.normal(1.5, 1, 200_000), random.normal(size=400_000), resamples=2
    ).value
    covered = 0
    for i in range(100):
        found = average_precision(
            random.normal(1.5, 1, 100), random.normal(size=200), resamples=150, seed=i
        )
        covered += found.low <= large <= found.high
    assert 0.88 < covered / 100 < 0.99


def test_labels_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="anomaly: expected rows of both kinds; 0 of 3 rows"):
        anomaly.detection([1.0, 2.0, 3.0], np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"anomaly: expected bool of shape \(3,\); got int64"):
        anomaly.detection([1.0, 2.0, 3.0], np.array([0, 1, 1]))
