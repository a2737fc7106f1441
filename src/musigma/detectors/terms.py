"""Scores of the terms that -log p is the sum of: log-determinants, priors, KLs, the likelihood."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from musigma.data import Dataset
from musigma.detectors.reference import DETECTORS, Reference
from musigma.trace import Trace

__all__ = ["dose", "mahalanobis", "terms"]

AT_ONCE = 2**22
"""Differences of terms that are held together."""
CONSTANT = 1e-6
"""Standard deviation of a term, in nats, below which it says nothing."""


def terms(reference: Reference, data: Dataset, *, layers: bool = False) -> np.ndarray:
    """Every term of -log p of each example, in nats, float64 (N, T).

    They are those of `musigma.trace.Evidence`, with the sign of -log p: the likelihood, the KL or
    the prior of each latent, other draws, and the log-determinant of all layers. Their sum is
    -log p or its bound.

    Args:
        reference: The model.
        data: The examples.
        layers: Whether each layer has terms of its own (`musigma.trace.Trace.entries`).

    Raises:
        ValueError: If the data do not fit the model.
    """

    @torch.no_grad()
    def traced() -> np.ndarray:
        parts = []
        for x, context in reference.batches(data, "terms"):
            trace = Trace(closed_form=not reference.model.exact)
            found = reference.model(x, context, trace=trace)
            columns = [-found.log_px, *found.kl.unbind(1), found.log_q, -found.log_det]
            if layers:
                columns = [nats for _, _, nats in trace.entries()]
            parts.append(torch.stack([nats.cpu().double() for nats in columns], 1).numpy())
        return np.concatenate(parts)

    return reference.once(traced, f"terms {layers}", data)


@DETECTORS.register
def mahalanobis(reference: Reference, data: Dataset, *, layers: bool = False) -> np.ndarray:
    r"""The squared Mahalanobis distance of the terms from those of the training data.

    .. math:: (t(x) - m)^\top S^{-1} (t(x) - m)

    m and S are the mean and the covariance of the terms t of training examples. -log p, their
    sum, may be usual where its terms are not. Combinations of terms that do not vary are left
    out. (The statistics are those of Morningstar et al., "Density of States Estimation for
    Out-of-Distribution Detection", 2021, arXiv:2006.09273; see `dose`.)

    Args:
        reference: The model and its training data.
        data: The examples.
        layers: Whether each layer has terms of its own.

    Raises:
        ValueError: If there are fewer training examples than twice the number of terms, or their
            terms are not finite.
    """

    def fitted() -> tuple[np.ndarray, np.ndarray]:
        known = _training_terms(reference, "mahalanobis", layers)
        mean = known.mean(0)
        values, vectors = np.linalg.eigh(np.cov(known.T).reshape(len(mean), -1))
        kept = values > max(CONSTANT**2, values[-1] * 1e-12)
        return mean, vectors[:, kept] / np.sqrt(values[kept])

    mean, whiten = reference.once(fitted, f"mahalanobis {layers}")
    return (((terms(reference, data, layers=layers) - mean) @ whiten) ** 2).sum(1)


@DETECTORS.register
def dose(reference: Reference, data: Dataset, *, layers: bool = False) -> np.ndarray:
    r"""Minus the log density of the terms, by kernel estimates on the training data, in nats.

    .. math:: -\sum_j \log \hat p_j(t_j(x))

    The kernels are Gaussians with Scott's bandwidth, and terms count as independent; those that do
    not vary are left out. The tails are Gaussian, so scores grow without a limit. (DoSE with
    kernel density estimates: Morningstar et al., "Density of States Estimation for
    Out-of-Distribution Detection", 2021, arXiv:2006.09273.)

    Args:
        reference: The model and its training data.
        data: The examples.
        layers: Whether each layer has terms of its own.

    Raises:
        ValueError: As `mahalanobis`.
    """

    def fitted() -> list[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
        from scipy import stats

        known = _training_terms(reference, "dose", layers)
        varying = np.flatnonzero(known.std(0) > CONSTANT)
        return [(int(j), stats.gaussian_kde(known[:, j]).logpdf) for j in varying]

    found = terms(reference, data, layers=layers)
    kernels = reference.once(fitted, f"dose {layers}")
    score, rows = np.zeros(len(found)), max(1, AT_ONCE // len(reference.training("dose")))
    for j, log_density in kernels:
        for start in range(0, len(found), rows):
            part = slice(start, start + rows)
            score[part] -= log_density(found[part, j])
    return score


def _training_terms(reference: Reference, name: str, layers: bool) -> np.ndarray:
    """The terms of the training data, if they suffice to fit statistics."""
    known = terms(reference, reference.training(name), layers=layers)
    if bad := int((~np.isfinite(known).all(1)).sum()):
        raise ValueError(
            f"{name}: {bad:,} of {len(known):,} training examples have terms that are not finite; "
            "train the model again, or leave them out"
        )
    width = int((known.std(0) > CONSTANT).sum())
    if len(known) < 2 * width + 2:
        raise ValueError(
            f"{name}: {len(known):,} training examples are too few to fit statistics of {width} "
            f"terms; give {2 * width + 2:,} or more"
        )
    return known
