"""How well the dimensions of a code separate factors of the data that are known.

Every metric takes codes (N, D) and factors, a mapping from names to one value for each example.
Values that are real numbers are ordered; integers are classes. Mutual information is that of
histograms, with 20 bins of equal width for each dimension of the code: it is positive on average
also for independent variables, by about (bins - 1) (values - 1) / (2 N) nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from musigma.data import Dataset
from musigma.evaluation.inputs import Progress, batches, check, evaluating
from musigma.model import Model

__all__ = [
    "DCI",
    "dci",
    "disentanglement",
    "factor_score",
    "mig",
    "modularity",
    "mutual_information",
    "sap",
]

Factors = Mapping[str, np.ndarray]

BINS = 20
INACTIVE = 0.05
"""Variance of a latent's posterior mean below which it is not used; that of the prior is 1."""
DCI = ("disentanglement", "completeness", "informativeness")
"""The three numbers of `dci`."""


@torch.no_grad()
def disentanglement(
    model: Model,
    data: Dataset,
    factors: Sequence[str] | Factors = (),
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Metrics of the latents of a model, by the means of their posteriors.

    Dimensions whose mean has a variance below 0.05 over the data are left out as unused.

    Args:
        model: A model with latents; all of them together are the code.
        data: Examples with known factors; 2,000 or more, of all values of the factors.
        factors: Names of context variables of the data; by default all. Or the factors
            themselves, by name.
        batch_size: Examples per batch.
        seed: Random seed of classifiers.
        progress: Called with (done, total).

    Returns:
        `mig`, `sap`, `factor_score`, `modularity`, and the three numbers of `dci`, each from 0 to
        1 where 1 is best, and `active`, the number of dimensions that are used.

    Raises:
        ValueError: If the data have no such factors, a factor has one value, or no dimension of
            the code is used.
    """
    check(model, data)
    known = factors if isinstance(factors, Mapping) else _given(data, factors)
    codes = []
    with evaluating(model):
        for x, context in batches(
            model, data, batch_size=batch_size, seed=seed, progress=progress
        ):
            latents = model.encode(x, context, mode=True)
            codes.append(torch.cat([z.flatten(1) for z in latents], 1).double().cpu())
    code = torch.cat(codes).numpy()
    active = code.var(0) >= INACTIVE
    if not active.any():
        raise ValueError(
            "model: the means of its posteriors do not vary with the data (posterior collapse), "
            "so there is no code to measure"
        )
    code = code[:, active]
    return {
        "mig": mig(code, known),
        "sap": sap(code, known, seed=seed),
        **dci(code, known, seed=seed),
        "factor_score": factor_score(code, known, seed=seed),
        "modularity": modularity(code, known),
        "active": int(active.sum()),
    }


def _given(data: Dataset, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Context variables of data sets as factors."""
    known = {name: given.values for name, given in data.given.items() if given.values.ndim == 1}
    if data.labels is not None:
        known["label"] = data.labels
    if missing := [name for name in names if name not in known]:
        have = ", ".join(known) or "none"
        raise ValueError(f"factors: expected factors of the data, {have}; got {missing[0]!r}")
    return {name: known[name] for name in names or known}


def _checked(codes: np.ndarray, factors: Factors) -> tuple[np.ndarray, list[np.ndarray]]:
    """Codes in float64, and the index of each factor's value."""
    codes = np.asarray(codes, np.float64)
    if codes.ndim != 2 or not factors:
        raise ValueError(
            f"codes: expected an array (N, D), and factors; got shape {codes.shape} and "
            f"{len(factors)} factors"
        )
    found = []
    for name, values in factors.items():
        if np.shape(values) != (len(codes),):
            raise ValueError(
                f"factors: expected one value for each of {len(codes)} codes; {name!r} has shape "
                f"{np.shape(values)}"
            )
        values, index = np.unique(values, return_inverse=True)
        if len(values) < 2:
            raise ValueError(f"factors: {name!r} has one value; leave it out")
        found.append(index)
    return codes, found


def mutual_information(codes: np.ndarray, factors: Factors) -> np.ndarray:
    """Mutual information of each dimension of the code and each factor, in nats, (D, K)."""
    codes, indices = _checked(codes, factors)
    found = np.zeros((codes.shape[1], len(indices)))
    for d, column in enumerate(codes.T):
        edges = np.linspace(column.min(), column.max(), BINS + 1)[1:-1]
        binned = np.digitize(column, edges)
        for k, index in enumerate(indices):
            joint = np.zeros((BINS, index.max() + 1))
            np.add.at(joint, (binned, index), 1 / len(column))
            product = joint.sum(1, keepdims=True) * joint.sum(0)
            some = joint > 0
            found[d, k] = (joint[some] * np.log(joint[some] / product[some])).sum()
    return found.clip(0)


def _entropy(p: np.ndarray, axis: int = 0) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis)


def _gap(scores: np.ndarray) -> np.ndarray:
    """The difference of the best and the second-best dimension, for each factor (K,)."""
    ordered = np.sort(np.vstack([scores, np.zeros(scores.shape[1])]), 0)
    return ordered[-1] - ordered[-2]


def mig(codes: np.ndarray, factors: Factors) -> float:
    """The mutual information gap: of the two dimensions that know most of each factor.

    The gap is divided by the factor's entropy, and averaged over factors (Chen et al., "Isolating
    Sources of Disentanglement in VAEs", 2018, arXiv:1802.04942).

    Example:
        >>> code = np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]])
        >>> mig(code, {"a": code[:, 0], "b": code[:, 1]})
        1.0
    """
    _, indices = _checked(codes, factors)
    entropies = [_entropy(np.bincount(index) / len(index)) for index in indices]
    return float((_gap(mutual_information(codes, factors)) / entropies).mean())


def sap(codes: np.ndarray, factors: Factors, *, seed: int = 0) -> float:
    """The separated attribute predictability: the gap of the two best predictors of each factor.

    Each predictor sees one dimension. Its score is the squared correlation, for factors that are
    real numbers; and for classes the balanced accuracy of thresholds, chosen on one half of the
    examples, on the other half (Kumar, Sattigeri, Balakrishnan, 2018, arXiv:1711.00848).
    """
    codes, indices = _checked(codes, factors)
    scores = np.zeros((codes.shape[1], len(indices)))
    for k, (values, index) in enumerate(zip(factors.values(), indices, strict=True)):
        values = np.asarray(values)
        if np.issubdtype(values.dtype, np.floating):
            scores[:, k] = _squared_correlation(codes, values)
        else:
            scores[:, k] = [_by_thresholds(column, index, seed) for column in codes.T]
    return float(_gap(scores).mean())


def _squared_correlation(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    a, b = codes - codes.mean(0), values - values.mean()
    variances = a.var(0) * b.var()
    covariance = (a * b[:, None]).mean(0)
    return np.where(variances > 0, covariance**2 / np.where(variances > 0, variances, 1), 0)


def _by_thresholds(column: np.ndarray, index: np.ndarray, seed: int) -> float:
    tree, metrics = _sklearn("tree"), _sklearn("metrics")
    test = _half(len(column), seed)
    classifier = tree.DecisionTreeClassifier(
        max_leaf_nodes=2 * (index.max() + 1), class_weight="balanced", random_state=seed
    ).fit(column[~test, None], index[~test])
    predicted = classifier.predict(column[test, None])
    return float(metrics.balanced_accuracy_score(index[test], predicted))


def _half(n: int, seed: int) -> np.ndarray:
    """A mask of a random half of n examples."""
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[: n // 2]] = True
    return chosen


def _sklearn(part: str) -> Any:
    try:
        import sklearn.ensemble
        import sklearn.metrics
        import sklearn.tree
    except ImportError:
        raise ValueError(
            "disentanglement: needs scikit-learn: pip install 'musigma[data]'"
        ) from None
    return getattr(sklearn, part)


def dci(codes: np.ndarray, factors: Factors, *, seed: int = 0) -> dict[str, float]:
    r"""Disentanglement, completeness and informativeness, by the importances of random forests.

    A forest predicts each factor from the code on one half of the examples. With R its importances
    (D, K), each dimension's row and each factor's column, as distributions, are concentrated by

    .. math:: D = \sum_d \rho_d (1 - H_K(R_{d\cdot})), \quad
        C = \frac1K \sum_k (1 - H_D(R_{\cdot k}))

    with entropies to base K and D, and ρ the share of a dimension in all importances.
    Informativeness is the accuracy on the other half, averaged over factors (Eastwood & Williams,
    "A Framework for the Quantitative Evaluation of Disentangled Representations", 2018).
    """
    codes, indices = _checked(codes, factors)
    test = _half(len(codes), seed)
    importances, accuracies = [], []
    for index in indices:
        forest = _sklearn("ensemble").RandomForestClassifier(
            30, max_features=None, max_depth=12, random_state=seed
        )
        forest.fit(codes[~test], index[~test])
        importances.append(forest.feature_importances_)
        accuracies.append(forest.score(codes[test], index[test]))
    found = np.stack(importances, 1)
    by_dimension, by_factor = found.sum(1), found.sum(0)
    shares = by_dimension / by_dimension.sum()
    rows = found / np.where(by_dimension > 0, by_dimension, 1)[:, None]
    columns = found / np.where(by_factor > 0, by_factor, 1)
    d, k = (max(n, 2) for n in found.shape)  # of one dimension or factor, the entropy is zero
    numbers = (
        (shares * (1 - _entropy(rows, 1) / np.log(k))).sum(),
        (1 - _entropy(columns, 0) / np.log(d)).mean(),
        np.mean(accuracies),
    )
    return dict(zip(DCI, map(float, numbers), strict=True))


def factor_score(
    codes: np.ndarray,
    factors: Factors,
    *,
    votes: int = 800,
    size: int = 64,
    seed: int = 0,
) -> float:
    """The score of FactorVAE: whether the dimension that varies least tells which factor is fixed.

    In each vote one factor is fixed to the value of a random example, and `size` examples with
    this value are drawn. The dimension with the least variance, relative to that over all
    examples, votes for the factor. The score is the accuracy of the majority for each dimension,
    chosen on one half of the votes, on the other half; at chance it is 1 / K (Kim & Mnih,
    "Disentangling by Factorising", 2018, arXiv:1802.05983).
    """
    codes, indices = _checked(codes, factors)
    variance = codes.var(0)
    codes, variance = codes[:, variance > 0], variance[variance > 0]
    if not len(variance):
        return 1 / len(indices)
    random = np.random.default_rng(seed)
    counts = np.zeros((2, codes.shape[1], len(indices)), int)
    for i in range(2 * votes):
        k = random.integers(len(indices))
        value = indices[k][random.integers(len(codes))]
        rows = random.choice(np.flatnonzero(indices[k] == value), size)
        counts[i % 2, (codes[rows].var(0) / variance).argmin(), k] += 1
    majority = counts[0].argmax(1)
    return float(counts[1][np.arange(len(majority)), majority].sum() / counts[1].sum())


def modularity(codes: np.ndarray, factors: Factors) -> float:
    r"""Whether each dimension knows of one factor only.

    .. math:: 1 - \frac{\sum_{k \ne k^*} I_{dk}^2}{I_{dk^*}^2 (K - 1)}

    averaged over dimensions, with k* the factor that a dimension knows most of (Ridgeway & Mozer,
    "Learning Deep Disentangled Embeddings with the F-Statistic Loss", 2018, arXiv:1802.05312).
    Dimensions that know of none are left out. Several dimensions may know of the same factor.

    Raises:
        ValueError: If there is only one factor.
    """
    if len(factors) < 2:
        raise ValueError("factors: modularity compares several; got one")
    squared = mutual_information(codes, factors) ** 2
    best = squared.max(1)
    squared, best = squared[best > 0], best[best > 0]
    if not len(best):
        return 0.0
    return float((1 - (squared.sum(1) - best) / (best * (len(factors) - 1))).mean())
