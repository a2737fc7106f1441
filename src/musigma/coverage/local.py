"""Are draws right at one observation? The local classifier two-sample test (L-C2ST)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from musigma.comparison.networks import Classifiers
from musigma.coverage.ranks import Features, Pairs

__all__ = ["LOCAL_LEVEL", "Local", "local_test"]

LOCAL_LEVEL = 0.01
"""A local test with a smaller adjusted p-value has found a difference."""

MOST_PAIRS = 2_000
"""Pairs that classifiers are trained on."""

HIDDEN, EPOCHS, BATCH, LR = (32, 32), 20, 200, 1e-2


@dataclass(frozen=True, eq=False)
class Local:
    """Local tests at O observations.

    Attributes:
        labels: What each observation is called.
        statistic: Mean of (P(drawn | theta, x) - 1/2)^2 over draws, by the classifier (O,); 0 if
            draws cannot be told from true parameters.
        chance: Mean of the same under the null hypothesis (O,).
        p_values: P-value of each observation (O,).
        adjusted: The same, adjusted for the number of observations (O,).
        outside: Number of values of each observation that lie outside the range of the pairs (O,),
            where the classifier has seen nothing.
        pairs: Number of pairs.
        permutations: Number of permutations.
    """

    labels: tuple[str, ...]
    statistic: np.ndarray
    chance: np.ndarray
    p_values: np.ndarray
    adjusted: np.ndarray
    outside: np.ndarray
    pairs: int
    permutations: int

    @property
    def found(self) -> list[str]:
        """The observations at which draws differ from the posterior."""
        wrong = zip(self.labels, self.adjusted, strict=True)
        return [label for label, p in wrong if p <= LOCAL_LEVEL]


def local_test(
    pairs: Pairs,
    x: np.ndarray,
    draws: np.ndarray,
    *,
    labels: tuple[str, ...] = (),
    permutations: int = 199,
    seed: int = 0,
) -> Local:
    r"""Test at some observations whether draws are from the posterior.

    A classifier learns to tell (theta, x) of the pairs from (draw, x). Its answer for draws at one
    observation is 1/2 if they are from the posterior there. The statistic is compared with that of
    classifiers for which theta and its draw are exchanged in half of the pairs, at random:

    .. math:: p = \frac{1 + \#\{m : t_m \ge t\}}{M + 1}

    If all draws are from the posterior, P(p <= a) <= a exactly. The adjusted p-values compare the
    statistic, in units of its mean, with the largest one of all observations.

    Source: Linhart, Gramfort, Rodrigues, "L-C2ST: local diagnostics for posterior approximations
    in simulation-based inference", 2023, arXiv:2306.03580.

    Args:
        pairs: Pairs with one draw for each; 2,000 of them at most are used.
        x: Observations (O, F), as numbers in the order of `pairs.x`.
        draws: Draws at each of them (O, L, D).
        labels: What each observation is called; by default its number.
        permutations: M.
        seed: Random seed.

    Raises:
        ValueError: If shapes disagree.

    Example:
        >>> random = np.random.default_rng(0)
        >>> theta, first = random.normal(size=(2, 300, 2)) * [[[1.0]], [[3.0]]]
        >>> x = random.normal(size=(300, 1))
        >>> found = local_test(Pairs(theta, x, first), x[:1], first[None])
        >>> found.p_values
        array([0.005])
    """
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    count, d = len(x), pairs.theta.shape[1]
    if x.shape[1:] != pairs.x.shape[1:] or draws.ndim != 3 or draws.shape[::2] != (count, d):
        raise ValueError(
            f"x, draws: expected (O, {pairs.x.shape[1]}) and (O, L, {d}); got {x.shape} and "
            f"{draws.shape}"
        )
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(pairs))[:MOST_PAIRS]
    n, networks = len(chosen), permutations + 1
    features = Features(pairs.x, random)
    scale = Features(np.concatenate([pairs.theta, pairs.first]), random, most=d)
    known = features(pairs.x[chosen])
    both = [np.hstack([scale(t[chosen]), known]) for t in (pairs.theta, pairs.first)]
    exchanged = random.uniform(size=(networks, n)) < 0.5
    exchanged[0] = False  # the first network tests; all others are the null hypothesis
    drawn = torch.from_numpy(np.concatenate([exchanged, ~exchanged], 1))
    nets = Classifiers(networks, d + known.shape[1], hidden=HIDDEN, seed=seed)
    rows = torch.from_numpy(np.concatenate(both)).float()
    nets.fit(rows, drawn, epochs=EPOCHS, batch_size=BATCH, lr=LR)
    found = np.empty((networks, count))
    for i, row in enumerate(features(x)):
        given = np.hstack([scale(draws[i]), np.tile(row, (draws.shape[1], 1))])
        p = nets.probabilities(torch.from_numpy(given).float())
        found[:, i] = (p - 0.5).square().mean(1).numpy()
    ratio = found / found.mean(0)  # of all networks, which are exchangeable
    low, high = np.fmin.reduce(pairs.x), np.fmax.reduce(pairs.x)  # NaN is missing
    return Local(
        labels or tuple(map(str, range(count))),
        found[0],
        found[1:].mean(0),
        (1 + (found[1:] >= found[0]).sum(0)) / networks,
        (1 + (ratio[1:].max(1, keepdims=True) >= ratio[0]).sum(0)) / networks,
        ((x < low) | (x > high)).sum(1),
        n,
        permutations,
    )
