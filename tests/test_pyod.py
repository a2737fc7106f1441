"""The detector of PyOD: its attributes, and its sign, which is opposite to scikit-learn's."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone

from musigma.sklearn import FlowDensity, OutlierDetector

pytest.importorskip("pyod", reason="needs pip install 'musigma[pyod]'")
from musigma.pyod import Detector

DENSITY = FlowDensity(steps=30, options={"hidden": 16, "blocks": 1}, random_state=0)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(400, 3)) * [1, 100, 0.01]


@pytest.fixture(scope="module")
def detector(x):
    return Detector(DENSITY, contamination=0.05).fit(x)


def test_outliers_are_high(x, detector):
    far = x[:5] + np.array([50, 0, 0])
    assert (detector.decision_function(far) > detector.decision_scores_.max()).all()
    assert detector.predict(far).tolist() == [1] * 5
    assert detector.predict_proba(far)[:, 1].tolist() == [1] * 5
    opposite = OutlierDetector(fpr=0.05, **DENSITY.get_params(deep=False)).fit(x)
    assert opposite.predict(far).tolist() == [-1] * 5
    assert (opposite.decision_function(far) < 0).all()


def test_scores_are_nats_and_labels_follow_from_the_contamination(x, detector):
    density = clone(DENSITY).fit(x)
    assert np.array_equal(detector.decision_function(x), -density.score_samples(x))
    assert np.array_equal(detector.decision_scores_, detector.decision_function(x))
    assert detector.labels_.sum() == 20
    assert np.array_equal(detector.labels_, detector.decision_scores_ > detector.threshold_)


def test_it_is_cloned_and_pickled(x, detector):
    again = clone(detector).set_params(density__steps=2)
    assert again.density.steps == 2
    assert detector.density.steps == 30
    loaded = pickle.loads(pickle.dumps(detector))
    assert np.array_equal(loaded.decision_function(x), detector.decision_function(x))
