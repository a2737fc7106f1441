"""Whether samples copy the training data: a test of distances to the nearest training rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from musigma.evaluation.intervals import Interval, area, auc, plain
from musigma.evaluation.neighbors import checked_features, nearest

__all__ = ["Memorization", "memorization"]

IN_CELL = 10
"""Samples, and held-out rows, that a cell needs."""


@dataclass(frozen=True)
class Memorization:
    """Whether samples are nearer to the training data than held-out data are.

    Attributes:
        p_value: Probability of such a statistic or a smaller one if samples are as near as
            held-out rows, everywhere; small values are evidence of copying.
        statistic: C_T, the mean over cells of the standardized rank-sum statistic of distances;
            negative if samples are nearer, positive if they are farther.
        nearer: P(a sample is nearer to its nearest training row than a held-out row is to its);
            1/2 without copying, with the interval of DeLong.
        cells: Number of cells with enough rows.
        distances: Distance of each sample to the nearest training row (M,).
        neighbors: Number of that row (M,).
    """

    p_value: float
    statistic: float
    nearer: Interval
    cells: int
    distances: np.ndarray = field(repr=False)
    neighbors: np.ndarray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what belongs to single samples."""
        return plain(self)


def memorization(
    train: np.ndarray,
    held_out: np.ndarray,
    generated: np.ndarray,
    *,
    cells: int | None = None,
    seed: int = 0,
) -> Memorization:
    r"""A test of copying: are samples nearer to the training data than held-out data are?

    Space is divided into cells: those of random training rows, each with all points that are
    nearest to it. In each cell, the distances of samples and of held-out rows to their nearest
    training rows are compared by their ranks,

    .. math:: Z = (A - 1/2) / \sqrt{(n + m + 1 - t) / (12 n m)},

    where A is the share of pairs in which the sample is farther, and t corrects for ties. C_T is
    the mean of Z, weighted by the numbers of held-out rows. If held-out rows and samples have one
    distribution, whatever it is, the Z are about standard normal and independent, so C_T has the
    variance of the squared weights, and the p-value is uniform.

    Cells keep samples of a dense region from being compared with held-out rows of a sparse one.
    C_T is a mean over cells: copies in few cells can be hidden by samples that are too far from
    the data in the others.

    Args:
        train: Features of the training examples (T, F).
        held_out: Features of examples (N, F) of the same distribution that were not trained on.
        generated: Features of samples (M, F).
        cells: Number of cells; by default one for each 100 rows of the smaller of the last two
            sets, at most 20. Cells with fewer than 10 rows of one of these are left out.
        seed: Random seed of the cells.

    Raises:
        ValueError: As `sample_quality`, and if there are no cells.

    Source: Meehan, Chaudhuri & Dasgupta, "A non-parametric test to detect data-copying in
    generative models", 2020, arXiv:2004.05675, who divide space by k-means.

    Example:
        >>> train, held_out, new = np.random.default_rng(0).normal(size=(3, 400, 2))
        >>> memorization(train, held_out, new).p_value > 0.05
        True
        >>> memorization(train, held_out, train + 0.01).p_value < 1e-6
        True
    """
    train, held_out, generated = checked_features(
        train=train, held_out=held_out, generated=generated
    )
    if cells is None:
        cells = min(20, min(len(held_out), len(generated)) // 100)
    if not 1 <= cells <= len(train):
        raise ValueError(f"cells: expected 1 to {len(train)}, the training rows; got {cells}")
    center = train.mean(0)
    train, held_out, generated = (rows - center for rows in (train, held_out, generated))
    random = np.random.default_rng(seed)
    seeds = train[random.choice(len(train), cells, replace=False)]
    far, _ = nearest(held_out, train)
    near, which = nearest(generated, train)
    far, near = far[:, 0], near[:, 0]
    places = [nearest(rows, seeds)[1][:, 0] for rows in (held_out, generated)]
    weights, scores = [], []
    for cell in range(cells):
        x, y = far[places[0] == cell], near[places[1] == cell]
        if min(len(x), len(y)) >= IN_CELL:
            weights.append(len(x))
            scores.append(_ranked(x, y))
    if not weights:  # no cell has enough of both
        weights, scores = [len(far)], [_ranked(far, near)]
    from scipy.special import ndtr

    w = np.array(weights) / np.sum(weights)
    statistic = float(w @ scores)
    p_value = float(ndtr(statistic / np.sqrt((w**2).sum())))
    return Memorization(p_value, statistic, auc(-near, -far), len(w), near, which[:, 0])


def _ranked(held_out: np.ndarray, generated: np.ndarray) -> float:
    """The standardized rank-sum statistic of distances; negative if samples are nearer."""
    n, m = len(held_out), len(generated)
    _, times = np.unique(np.concatenate([held_out, generated]), return_counts=True)
    ties = float((times.astype(float) ** 3 - times).sum()) / ((n + m) * (n + m - 1))
    variance = (n + m + 1 - ties) / (12 * n * m)
    return (area(generated, held_out)[0] - 0.5) / np.sqrt(variance) if variance > 0 else 0.0
