"""A density as a detector of PyOD.

pip install 'musigma[pyod]'
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pyod.models.base import BaseDetector  # pyright: ignore[reportMissingImports]
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from musigma.sklearn import FlowDensity

__all__ = ["Detector"]


class Detector(BaseDetector):
    """Outliers by an exact density, with the interface of PyOD.

    The score of a row is -log p in nats. The sign is that of PyOD: outliers are **high**, and
    their label is 1. It is opposite to that of `musigma.sklearn.OutlierDetector` and of
    scikit-learn, in which outliers are negative and labeled -1.

    The threshold is PyOD's: the share `contamination` of the training rows lies above it. A
    density gives rows that it was trained on higher probabilities than new ones, so of new rows a
    larger share may be flagged; `OutlierDetector` promises a rate for new rows.

    Args:
        density: A `FlowDensity` that is not fitted; by default ``FlowDensity()``. Its parameters
            are set as ``density__steps``.
        contamination: Share of outliers in the training rows.

    Attributes:
        density_: The fitted density.
        decision_scores_: -log p of the training rows, nats.
        threshold_: The score above which a row is an outlier.
        labels_: 1 for outliers among the training rows, 0 for the others.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 3))
        >>> density = FlowDensity(steps=5, options={"hidden": 16}, random_state=0)
        >>> detector = Detector(density, contamination=0.05).fit(x)
        >>> detector.predict(np.array([[0, 0, 0], [40, -40, 40]]))
        array([0, 1])
    """

    def __init__(self, density: FlowDensity | None = None, *, contamination: float = 0.1):
        super().__init__(contamination=contamination)
        self.density = density

    def fit(self, X: Any, y: Any = None) -> Detector:
        """Train on rows (n_samples, n_features); y is ignored.

        Raises:
            ValueError: If the rows cannot be used.
        """
        self._set_n_classes(None)
        density: Any = FlowDensity() if self.density is None else clone(self.density)
        self.density_ = density.fit(X)
        self.decision_scores_ = -self.density_.score_samples(X)
        self._process_decision_scores()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """-log p of each row in nats, (n_samples,): high for outliers."""
        check_is_fitted(self, "density_")
        return -self.density_.score_samples(X)
