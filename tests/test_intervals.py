"""Intervals hold the true value as often as they say, and agree with other libraries."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from musigma.evaluation.intervals import area, auc, share


def test_the_area_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for p, n in ((3, 5), (40, 7), (200, 300)):
        positive, negative = random.normal(0.5, 1, p).round(1), random.normal(size=n).round(1)
        value = metrics.roc_auc_score(np.repeat([1, 0], [p, n]), np.append(positive, negative))
        found, below, above = area(positive, negative)
        assert found == pytest.approx(value, abs=1e-12)
        assert below.mean() == pytest.approx(above.mean())
        brute = (positive[:, None] > negative).mean(1) + (positive[:, None] == negative).mean(
            1
        ) / 2
        np.testing.assert_allclose(below, brute, atol=1e-12)
        assert auc(positive, negative).value == pytest.approx(value)


@pytest.mark.parametrize("distance", [0.0, 0.7, 1.5])
def test_the_interval_of_the_area_covers_its_closed_form(distance):
    random, truth, covered = np.random.default_rng(1), norm.cdf(distance / np.sqrt(2)), 0
    for _ in range(400):
        found = auc(random.normal(distance, 1, 90), random.normal(size=140))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(("count", "total"), [(0, 30), (1, 200), (17, 50), (50, 50)])
def test_the_interval_of_a_share_agrees_with_scipy(count, total):
    theirs = binomtest(count, total).proportion_ci(method="wilson")
    assert share(count, total) == pytest.approx((count / total, *theirs), abs=1e-12)


def test_an_area_of_one_is_not_certain():
    found = auc(np.arange(10.0, 20), np.arange(5.0))
    assert found.value == found.high == 1
    assert 0.5 < found.low < 0.6


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match=r"negative: expected at least one score.*got 2.*1 of"):
        auc(np.ones(3), np.array([1, np.nan]))
    with pytest.raises(ValueError, match="positive: expected at least one"):
        auc(np.ones(0), np.ones(2))
