"""Scores that are made of log p alone: of one model, of two, or of several."""

from __future__ import annotations

from typing import Any

import numpy as np

from musigma import anomaly
from musigma.data import Dataset
from musigma.detectors.reference import DETECTORS, Reference
from musigma.model import Model

__all__ = ["batch_typicality", "ensemble", "likelihood_ratio", "nats", "typicality", "waic"]


@DETECTORS.register
def nats(reference: Reference, data: Dataset) -> np.ndarray:
    r"""-log p(x), or its upper bound, in nats.

    Images that are smoother than the training data have a high density under most models of
    images, whatever they show (Nalisnick et al., "Do Deep Generative Models Know What They Don't
    Know?", 2019, arXiv:1810.09136). The other detectors are answers to this.
    """
    return reference.nats(data)


@DETECTORS.register
def typicality(reference: Reference, data: Dataset) -> np.ndarray:
    r"""The distance of -log p(x) from its mean over the training data, in nats.

    .. math:: |-\log p(x) - \hat H|, \quad \hat H = \tfrac1n \sum_i -\log p(x_i)

    An example is strange if it is less probable than training examples, or more.
    `batch_typicality` tests a batch as a whole. (Nalisnick, Matsukawa, Teh, Lakshminarayanan,
    "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality", 2019,
    arXiv:1906.02994.)

    Raises:
        ValueError: If there are no training data, or some have no finite -log p.
    """
    return np.abs(reference.nats(data) - _entropy(reference, "typicality"))


def batch_typicality(
    reference: Reference, data: Dataset, calibration: Dataset
) -> dict[str, float]:
    r"""Test whether a batch as a whole is as typical as calibration data are.

    .. math:: \left| \tfrac1B \sum_b -\log p(x_b) - \hat H \right|

    is compared with that of random batches of as many rows from both sets together. If the batch
    and the calibration data are exchangeable, P(p <= a) <= a. (The paper of `typicality` takes
    batches from validation data by the bootstrap, whose p-values are approximate.)

    Args:
        reference: As for `typicality`.
        data: The batch.
        calibration: Rows that the model was not trained on.

    Returns:
        `statistic`, in nats, and `p_value`.
    """
    mean = _entropy(reference, "typicality")
    return anomaly.mean_drift(reference.nats(data), reference.nats(calibration), mean)


typicality.drift = batch_typicality  # pyright: ignore[reportFunctionMemberAccess]


def _entropy(reference: Reference, name: str) -> float:
    """The mean of -log p over the training data."""
    train = reference.training(name)
    found = reference.nats(train, title="training data")
    if bad := int((~np.isfinite(found)).sum()):
        raise ValueError(
            f"{name}: {bad:,} of {len(found):,} training examples have no finite -log p, so there "
            "is no mean to compare with; train the model again, or leave them out"
        )
    return float(found.mean())


@DETECTORS.register
def likelihood_ratio(reference: Reference, data: Dataset) -> np.ndarray:
    r"""How much more probable the background model finds x than the model, in nats.

    .. math:: \log p_{background}(x) - \log p(x)

    The background model is trained on perturbed images (`Preprocess.perturb`), so it knows what
    images have in common, and the ratio leaves what is special to the training data. (Ren et al.,
    "Likelihood Ratios for Out-of-Distribution Detection", 2019, arXiv:1906.02845.)

    Raises:
        ValueError: If there is no background model, or it is of other data.
    """
    if reference.background is None:
        raise ValueError(
            "likelihood_ratio: it compares with a second model, trained on perturbed images "
            "(--perturb 0.2); give it as background (--background RUN)"
        )
    return reference.nats(data) - _nats(reference, reference.background, data, "background")


@DETECTORS.register
def ensemble(reference: Reference, data: Dataset) -> np.ndarray:
    r"""The mean over several models of -log p(x), in nats.

    Raises:
        ValueError: If there is only one model, or one is of other data.
    """
    return _each(reference, data, "ensemble").mean(1)


@DETECTORS.register
def waic(reference: Reference, data: Dataset) -> np.ndarray:
    r"""Minus the Watanabe-Akaike information criterion of x under several models, in nats.

    .. math:: -E_m[\log p_m(x)] + \mathrm{Var}_m[\log p_m(x)]

    The variance is that of the M models, with divisor M. (Choi, Jang, Alemi, "WAIC, but Why?
    Generative Ensembles for Robust Anomaly Detection", 2018, arXiv:1810.01392.)

    Raises:
        ValueError: As `ensemble`.
    """
    each = _each(reference, data, "waic")
    return each.mean(1) + each.var(1)


def _each(reference: Reference, data: Dataset, name: str) -> np.ndarray:
    """-log p under each of several models, (N, M)."""
    models: list[Any] = [reference.model, *reference.members]
    models = [member for model in models for member in getattr(model, "members", [model])]
    if len(models) < 2:
        raise ValueError(
            f"{name}: it compares several models of the same data, trained from different seeds; "
            "give further ones as members (--members RUN)"
        )
    return np.stack(
        [_nats(reference, model, data, f"member {m}") for m, model in enumerate(models)], 1
    )


def _nats(reference: Reference, model: Model, data: Dataset, name: str) -> np.ndarray:
    """-log p under another model, which must be of the same data."""
    try:
        return reference.nats(data, model, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
