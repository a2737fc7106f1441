r"""Anomaly scores with a promise: conformal p-values, tests for drift, and figures with intervals.

All functions take arrays of scores, so they serve any detector. A higher score is stranger; for a
density, the score is -log p(x) in nats.

Let s_1 ... s_n be the scores of calibration rows: normal rows that the detector was not trained
on. The conformal p-value of a row with score s is

.. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1}

If the row and the calibration rows are exchangeable (independent draws from one distribution, for
instance), then P(p <= a) <= a for every a, whatever the detector and the distribution. Flagging
rows with p <= a therefore flags at most a share a of normal rows. This holds on average over
calibration sets; `rate_interval` states how far the share of one set may lie from it.

Sources: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005; Bates, Candès,
Lei, Romano, Sesia, "Testing for outliers with conformal p-values", 2023, arXiv:2104.08279.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from musigma.evaluation.intervals import auc, average_precision, exact_share
from musigma.schema import Schema

__all__ = [
    "calibration_rows",
    "column_drift",
    "detection",
    "holm",
    "mean_drift",
    "nan_as_strangest",
    "p_values",
    "rate_interval",
    "score_drift",
    "smallest_rate",
    "threshold",
]

ENOUGH, ABOVE = 10_000, 200  # calibration rows that suffice, if so many are above each threshold
FEW = 20  # distinct values of a numeric column up to which it is compared value by value
EXPECTED = 5.0  # rows of either sample in a class, below which it is rare
LEAST_PERMUTED, MOST_PERMUTED, CELLS = 199, 9_999, 5_000_000  # permutations; counts in all of them
BATCHES = 999  # random batches that a batch is compared with
BLOCK = 2**20  # counts that are held at once


# --- conformal p-values --------------------------------------------------------------------------


def p_values(
    scores: Any, calibration: Any, *, random: np.random.Generator | None = None
) -> np.ndarray:
    """Conformal p-values of scores: (1 + the number of calibration scores >= s) / (n + 1).

    A tie counts as stranger, so p-values err on the safe side: P(p <= a) <= a. With `random`, the
    row itself and its ties count by a uniform draw instead, and p is uniform on (0, 1) exactly.

    Args:
        scores: Scores (B,), higher is stranger; may be infinite.
        calibration: Scores (n,) of rows that the detector was not trained on.
        random: Generator of the draws; by default there are none.

    Returns:
        p-values (B,), none of them below 1 / (n + 1) without `random`.

    Raises:
        ValueError: If there is no calibration score, or any score is NaN.

    Example:
        >>> p_values([0.5, 2.0, 9.0], calibration=[0.0, 1.0, 2.0])
        array([0.75, 0.5 , 0.25])
    """
    new, known = _scores(scores, "scores"), np.sort(_scores(calibration, "calibration", least=1))
    stranger = len(known) - np.searchsorted(known, new, "right")
    ties = len(known) - np.searchsorted(known, new, "left") - stranger
    part = 1.0 if random is None else random.uniform(size=new.shape)
    return (stranger + part * (ties + 1)) / (len(known) + 1)


def threshold(calibration: Any, rate: float) -> float:
    """The score above which a row is flagged: score > threshold is the same as p <= rate.

    Args:
        calibration: Scores (n,) of rows that the detector was not trained on.
        rate: The largest share of normal rows to flag, between 0 and 1.

    Raises:
        ValueError: If rate is not between 0 and 1, or n < 1 / rate - 1, so that no p-value can be
            as small as the rate.

    Example:
        >>> threshold(range(99), 0.05)
        94.0
    """
    known = np.sort(_scores(calibration, "calibration", least=1))
    return float(known[-_rank(len(known), rate)])


def calibration_rows(content: np.ndarray, rates: Sequence[float] = ()) -> np.ndarray:
    """Indices of the rows to calibrate on, in increasing order: all, or as many as suffice.

    These are 10,000 rows, or 200 above each threshold, with the smallest hashes.

    Args:
        content: Hashes of the contents of the rows (n,), as `musigma.data.Dataset.content`.
        rates: The rates to promise.

    Example:
        >>> len(calibration_rows(np.arange(20_001))), len(calibration_rows(np.arange(99)))
        (10000, 99)
    """
    most = int(max([ENOUGH, *(ABOVE / rate for rate in rates)]))
    return np.sort(np.argsort(content, kind="stable")[:most])


def nan_as_strangest(scores: Any, name: str = "scores") -> tuple[np.ndarray, str]:
    """Scores in which NaN is infinity, the strangest, and a sentence about them if there are any.

    A model that cannot score an example finds it strange; nobody is to be told that it is usual.

    Example:
        >>> scores, note = nan_as_strangest([1.0, math.nan], "typicality")
        >>> scores, note
        (array([ 1., inf]), '1 of 2 scores (typicality) are NaN; they count as the strangest')
    """
    array = np.asarray(scores, np.float64)
    missing = np.isnan(array)
    note = ""
    if bad := int(missing.sum()):
        note = f"{bad:,} of {len(array):,} scores ({name}) are NaN; they count as the strangest"
    return np.where(missing, np.inf, array), note


def smallest_rate(n: int) -> float:
    """The smallest false-positive rate that n calibration rows can promise: 1 / (n + 1)."""
    return 1 / (n + 1)


def rate_interval(
    n: int, rate: float, rows: int | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of the share of normal rows that a threshold from n calibration rows flags.

    The promised rate is the mean over calibration sets. For scores without ties, the rate of one
    set is distributed as Beta(l, n + 1 - l), where l = floor(rate (n + 1)); the number of flagged
    rows among some new ones as BetaBinomial(rows, l, n + 1 - l).

    Args:
        n: Number of calibration rows.
        rate: The promised rate.
        rows: Number of new rows; by default infinitely many.
        confidence: Probability that the share lies in the interval.

    Raises:
        ValueError: As `threshold`.

    Example:
        >>> [round(end, 4) for end in rate_interval(1000, 0.01)]
        [0.0048, 0.017]
    """
    from scipy import stats

    rank = _rank(n, rate)
    ends = (1 - confidence) / 2, (1 + confidence) / 2
    if rows is None:
        low, high = stats.beta.ppf(ends, rank, n + 1 - rank)
    else:
        low, high = stats.betabinom.ppf(ends, rows, rank, n + 1 - rank) / rows
    return float(low), float(high)


def _rank(n: int, rate: float) -> int:
    """The largest l with l / (n + 1) <= rate."""
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a number between 0 and 1; got {rate}")
    rank = math.floor(rate * (n + 1)) + 1  # one more, in case of rounding
    while rank / (n + 1) > rate:
        rank -= 1
    if rank < 1:
        raise ValueError(
            f"rate: {rate:g} cannot be guaranteed by {n:,} calibration rows, which allow rates "
            f"from {smallest_rate(n):.2g}; give a higher rate, or {math.ceil(1 / rate) - 1:,} or "
            "more rows"
        )
    return rank


def _scores(values: Any, name: str, least: int = 0) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least:
        raise ValueError(
            f"{name}: expected {'one or more' if least else 'a vector of'} scores; got shape "
            f"{array.shape}"
        )
    if bad := int(np.isnan(array).sum()):
        raise ValueError(
            f"{name}: {bad:,} of {len(array):,} scores are NaN; leave these rows out, or replace "
            "them by infinity to call them the strangest"
        )
    return array


# --- drift ---------------------------------------------------------------------------------------


def score_drift(scores: Any, calibration: Any) -> dict[str, float]:
    """Test whether a batch and the calibration rows have one distribution of scores.

    The two-sample test of Kolmogorov and Smirnov: the largest distance between the two
    distribution functions. It is two-sided, so rows that are too ordinary count as rows that are
    too strange. Rows must be independent; ties make p-values err on the safe side.

    Returns:
        `statistic`, from 0 to 1, and `p_value`.

    Raises:
        ValueError: If either has no scores, or any score is NaN.

    Example:
        >>> normal = np.random.default_rng(0).normal(size=(2, 500))
        >>> score_drift(normal[0], normal[1] + 1)["p_value"] < 1e-9
        True
    """
    new, known = (
        _scores(v, n, least=1) for v, n in ((scores, "scores"), (calibration, "calibration"))
    )
    return dict(zip(("statistic", "p_value"), _kolmogorov_smirnov(new, known), strict=True))


def mean_drift(scores: Any, calibration: Any, center: float, seed: int = 0) -> dict[str, float]:
    """Test whether the mean score of a batch is as near to a center as that of usual batches.

    The distance of the mean from the center is compared with that of 999 random batches of as many
    rows of both sets together. If the rows are exchangeable, P(p <= a) <= a.

    Args:
        scores: Scores (B,) of the batch.
        calibration: Scores (n,) of usual rows.
        center: Where the mean of usual scores lies, from other rows than these.
        seed: Random seed of the batches.

    Returns:
        `statistic`, the distance, and `p_value`, at least 1 / 1000.

    Raises:
        ValueError: If either has no scores, or any score is not finite.

    Example:
        >>> normal = np.random.default_rng(0).normal(size=(2, 500))
        >>> mean_drift(normal[0, :50] + 1, normal[1], center=0.0)["p_value"]
        0.001
    """
    new, known = (
        _scores(v, n, least=1) for v, n in ((scores, "scores"), (calibration, "calibration"))
    )
    both, random = np.concatenate([new, known]), np.random.default_rng(seed)
    if bad := int((~np.isfinite(both)).sum()):
        raise ValueError(
            f"scores: {bad:,} of {len(both):,} scores are infinite, so batches have no mean"
        )

    observed, at_once, as_far = abs(float(new.mean()) - center), max(1, BLOCK // len(both)), 0
    for start in range(0, BATCHES, at_once):
        copies = np.tile(both, (min(at_once, BATCHES - start), 1))
        means = random.permuted(copies, axis=1)[:, : len(new)].mean(1)
        as_far += int((np.abs(means - center) >= observed * (1 - 1e-9)).sum())
    return {"statistic": observed, "p_value": (1 + as_far) / (1 + BATCHES)}


def column_drift(
    rows: np.ndarray, reference: np.ndarray, columns: Schema | Sequence[str]
) -> list[dict[str, Any]]:
    """Test column by column whether a batch has the distribution of reference rows.

    Numbers are compared by Kolmogorov and Smirnov's test; levels, and numbers of at most 20
    different values, by a chi-squared test of homogeneity, with random permutations if fewer than
    5 rows are expected of a class; the shares of missing values, and those of levels that the
    schema lacks, by Fisher's exact test. The p-values of all tests are adjusted by Holm's method:
    if nothing has drifted, the probability that any adjusted p-value is at most a is at most a,
    however the columns depend on each other.

    Args:
        rows: The batch, float64 (B, D), NaN where a value is missing.
        reference: The rows to compare with, (N, D).
        columns: The schema of the columns, or the names of columns of numbers.

    Returns:
        For each test `column`, `test`, `statistic`, `p_value` and `adjusted`, the most significant
        first.

    Raises:
        ValueError: If the shapes do not fit, or there are no rows.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    schema = columns if isinstance(columns, Schema) else None
    names = schema.names if schema else tuple(columns)  # pyright: ignore[reportArgumentType]
    for name, values in (("rows", rows), ("reference", reference)):
        if values.ndim != 2 or values.shape[1] != len(names) or not len(values):
            raise ValueError(
                f"{name}: expected rows of {len(names)} columns; got shape {values.shape}"
            )
    tests: list[dict[str, Any]] = []

    def add(column: str, test: str, result: tuple[float, float]) -> None:
        tests.append(
            {"column": column, "test": test, "statistic": result[0], "p_value": result[1]}
        )

    for j, name in enumerate(names):
        column = schema.columns[j] if schema and schema.columns[j].has_levels else None
        both = [values[:, j] for values in (rows, reference)]
        unknown = math.nan if column is None else len(column.levels)
        for test, special in (
            ("missing", [np.isnan(x) for x in both]),
            ("unseen", [x == unknown for x in both]),
        ):
            if any(which.any() for which in special):
                add(name, test, _shares(*special))
        present = [x[~np.isnan(x)] for x in both]
        if not all(map(len, present)):
            continue
        values, codes = np.unique(np.concatenate(present), return_inverse=True)
        if column is not None or len(values) <= FEW:
            parts = np.split(codes, [len(present[0])])
            counts = np.stack([np.bincount(part, minlength=len(values)) for part in parts])
            add(name, "chi-squared", _homogeneity(counts))
        else:
            add(name, "Kolmogorov-Smirnov", _kolmogorov_smirnov(*present))
    for test, adjusted in zip(tests, holm([t["p_value"] for t in tests]), strict=True):
        test["adjusted"] = float(adjusted)
    return sorted(tests, key=lambda test: test["p_value"])


def holm(p: Any) -> np.ndarray:
    """p-values adjusted for their number, by Holm's step-down method.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, np.float64)
    order, n = np.argsort(values), len(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(n, 0, -1))
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    method = "exact" if len(a) * len(b) <= 10**6 else "asymp"
    result: Any = stats.ks_2samp(a, b, method=method)
    return float(result.statistic), float(result.pvalue)


def _shares(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Difference of the shares of two masks, and the p-value of Fisher's exact test."""
    from scipy import stats

    table = [[int(mask.sum()), int((~mask).sum())] for mask in (a, b)]
    return float(a.mean() - b.mean()), float(stats.fisher_exact(table).pvalue)  # pyright: ignore


def _homogeneity(counts: np.ndarray) -> tuple[float, float]:
    """Statistic and p-value of a test that two rows of counts, (2, classes), have one law.

    If there are rare classes, it is the smaller p-value of two tests, doubled: that in which they
    are one class, and that of the same statistic of all classes under random permutations.
    """
    expected = counts.sum(0) * counts.sum(1).min() / counts.sum()
    rare = expected < EXPECTED
    merged = counts
    if rare.any():
        merged = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], 1)
    found = _chi_squared(merged) if merged.shape[1] > 1 else (0.0, 1.0)
    if merged.shape[1] == counts.shape[1]:
        return found
    statistic, p = _permuted(counts)
    return (found[0] if found[1] < p else statistic), min(1.0, 2 * min(found[1], p))


def _chi_squared(counts: np.ndarray) -> tuple[float, float]:
    """Statistic and p-value of the chi-squared test; of Fisher's for few rows of two classes."""
    from scipy import stats

    result: Any = stats.chi2_contingency(counts, correction=False)
    if counts.shape[1] == 2 and result.expected_freq.min() < EXPECTED:
        return float(result.statistic), float(stats.fisher_exact(counts).pvalue)  # pyright: ignore
    return float(result.statistic), float(result.pvalue)


def _permuted(counts: np.ndarray) -> tuple[float, float]:
    """The chi-squared statistic, and its p-value among random permutations of the rows."""
    classes, sizes = counts.sum(0), counts.sum(1)
    few, total = int(sizes.min()), int(sizes.sum())
    part, random = counts[sizes.argmin()], np.random.default_rng(0)

    def statistic(part: np.ndarray) -> np.ndarray:
        square = (part.astype(np.float64) ** 2 / classes).sum(-1)
        return total * (total * square / few - few) / (total - few)

    left, as_large = max(LEAST_PERMUTED, min(MOST_PERMUTED, CELLS // len(classes))), 1
    n, observed = left, float(statistic(part))
    while left:
        k = max(1, min(left, BLOCK // len(classes)))
        drawn = random.multivariate_hypergeometric(classes, few, size=k, method="marginals")
        as_large += int((statistic(drawn) >= observed * (1 - 1e-9)).sum())
        left -= k
    return observed, as_large / (n + 1)


# --- figures on labeled rows ---------------------------------------------------------------------


def detection(
    scores: Any,
    anomaly: Any,
    *,
    calibration: Any = None,
    rates: Sequence[float] = (0.01,),
    seed: int = 0,
) -> dict[str, Any]:
    """How well scores tell anomalies from normal rows, with 95 % intervals.

    Args:
        scores: Scores (B,), higher is stranger.
        anomaly: Whether each row is an anomaly, bool (B,).
        calibration: Scores of normal rows that the detector was not trained on, and that are not
            among the scored rows; by default there are no thresholds.
        rates: False-positive rates to promise.
        seed: Random seed of the bootstrap.

    Returns:
        `normal` and `anomalies`, the numbers of rows; `auroc` and `average_precision`; and `at`,
        for each rate, with `rate`, `threshold`, `recall` (the share of anomalies that is flagged),
        `flagged` (the share of normal rows), and `promised`: the two ends between which that share
        lies if the normal rows and the calibration rows are exchangeable.

    Raises:
        ValueError: If there are no anomalies, or nothing else; as `threshold`.

    Example:
        >>> normal, strange = np.random.default_rng(0).normal(size=(2, 1000))
        >>> scores, anomaly = np.append(normal[500:], strange + 3), np.arange(1500) >= 500
        >>> found = detection(scores, anomaly, calibration=normal[:500])
        >>> print(found["auroc"], found["at"][0]["recall"])
        0.986 (0.981 to 0.990) 0.741 (0.713 to 0.768)
    """
    s, y = _scores(scores, "scores"), np.asarray(anomaly)
    if y.shape != s.shape or y.dtype != bool:
        raise ValueError(
            f"anomaly: expected bool of shape {s.shape}; got {y.dtype} of shape {y.shape}"
        )
    if y.all() or not y.any():
        raise ValueError(
            f"anomaly: expected rows of both kinds; {int(y.sum()):,} of {len(y):,} rows are "
            "anomalies"
        )
    strange, normal = s[y], s[~y]
    found: dict[str, Any] = {"normal": len(normal), "anomalies": len(strange)}
    found["auroc"] = auc(strange, normal)
    found["average_precision"] = average_precision(strange, normal, seed=seed)
    if calibration is not None:
        known = _scores(calibration, "calibration", least=1)
        found["at"] = [_at(rate, known, strange, normal) for rate in rates]
    return found


def _at(rate: float, known: np.ndarray, strange: np.ndarray, normal: np.ndarray) -> dict[str, Any]:
    limit = threshold(known, rate)
    return {
        "rate": rate,
        "threshold": limit,
        "recall": exact_share(int((strange > limit).sum()), len(strange)),
        "flagged": exact_share(int((normal > limit).sum()), len(normal)),
        "promised": rate_interval(len(known), rate, len(normal)),
    }
