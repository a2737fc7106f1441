r"""Ranks of true parameters among posterior draws: what all tests of calibration are made of.

For a pair (theta, x) and draws theta_1 ... theta_L from q(. | x), a test quantity f gives the rank

.. math:: u = \frac{\#\{l : f(\theta_l, x) < f(\theta, x)\} + V\,(T + 1)}{L + 1}

with the number T of ties and V uniform on (0, 1). If q is the posterior, theta and its draws are
exchangeable, so u is uniform on (0, 1) exactly, and those of different pairs are independent.

Sources: Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian inference algorithms
with simulation-based calibration", 2018, arXiv:1804.06788; Modrák, Moon, Kim, Bürkner, Huurre,
Faltejsková, Gelman, Vehtari, "Simulation-based calibration checking for Bayesian computation: the
choice of test quantities shapes sensitivity", 2023, arXiv:2211.02383.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Features", "Pairs", "Part", "Ranks", "rank", "ranks"]

MOST_FEATURES = 64
"""Numbers of an observation, above which it is projected at random to find its neighbors."""

BLOCK = 1024
"""Pairs whose neighbors are searched at once."""

Part = tuple[np.ndarray, "np.ndarray | None"]
"""Draws (B, L, D) of some pairs, and their log q (B, L), or None."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of N pairs with D parameters, by several test quantities; all lie in (0, 1).

    Attributes:
        names: Names of the parameters.
        draws: Number of draws for each pair.
        theta: True parameters (N, D).
        parameters: Ranks of each parameter (N, D).
        region: The mass of the smallest highest-density region that holds theta (N,): the share of
            the draws whose density is higher. None without densities.
        random: The share of the draws that lie closer to a reference than theta does (N,); the
            references are draws for other observations.
        near: The same for references that lie near theta: the true parameters of a pair with a
            similar observation.
        log_q: log q(theta | x) in nats (N,); None without densities.
        mean: Mean of the draws (N, D).
        std: Standard deviation of the draws (N, D).
    """

    names: tuple[str, ...]
    draws: int
    theta: np.ndarray
    parameters: np.ndarray
    region: np.ndarray | None
    random: np.ndarray
    near: np.ndarray
    log_q: np.ndarray | None
    mean: np.ndarray
    std: np.ndarray

    def __len__(self) -> int:
        return len(self.theta)

    @property
    def error(self) -> np.ndarray:
        """(theta - mean) / standard deviation of the draws (N, D); 0 where draws are constant."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((self.theta - self.mean) / self.std, posinf=0.0, neginf=0.0)


def rank(draws: np.ndarray, true: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Ranks (B, ...) of values (B, ...) among draws (B, L, ...) of them, with random ties.

    Example:
        >>> drawn = np.array([[1.0, 2.0, 3.0, 4.0]])
        >>> rank(drawn, np.array([2.5]), np.random.default_rng(0)).round(2)
        array([0.53])
    """
    true = np.expand_dims(true, 1)
    below, ties = (draws < true).sum(1), (draws == true).sum(1)
    return (below + random.uniform(size=below.shape) * (ties + 1)) / (draws.shape[1] + 1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """True parameters and observations, with one draw for each.

    Args:
        theta: True parameters (N, D). Missing values (NaN) are below all others.
        x: Observations (N, ...), by which similar ones are found.
        first: One draw for each pair (N, D), from which the references and the scale of distances
            are taken. It must not be one of those that theta is ranked among.
        log_q: log q(theta | x) in nats (N,), or None.
        names: Names of the parameters.

    Raises:
        ValueError: If shapes disagree, or values are infinite or log_q is NaN.
    """

    theta: np.ndarray
    x: np.ndarray
    first: np.ndarray
    log_q: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        shape = np.shape(self.theta)
        if len(shape) != 2:
            raise ValueError(f"theta: expected an array (N, D); got shape {shape}")
        n, d = shape
        values = {
            "theta": _floats(self.theta, shape, "theta"),
            "x": np.asarray(self.x, np.float64).reshape(n, -1),
            "first": _floats(self.first, shape, "first"),
            "log_q": None if self.log_q is None else _floats(self.log_q, (n,), "log_q"),
            "names": tuple(self.names) or tuple(f"theta_{j}" for j in range(d)),
        }
        if len(values["names"]) != d:
            raise ValueError(f"names: expected {d}; got {len(values['names'])}")
        for name in ("theta", "first"):
            if bad := int(np.isinf(values[name]).any(1).sum()):
                raise ValueError(f"{name}: {bad} of {n} rows are infinite")
        if self.log_q is not None and (bad := int(np.isnan(values["log_q"]).sum())):
            raise ValueError(f"log_q: {bad} of {n} are NaN")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.theta)


def ranks(
    pairs: Pairs,
    parts: Iterable[Part],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ranks:
    """The ranks of true parameters among posterior draws, from whatever drew them.

    Args:
        pairs: The pairs.
        parts: Draws (B, L, D) for some of the pairs at a time, in order, and their log q (B, L) or
            None. Only one part is held in memory.
        seed: Random seed of ties and references.
        progress: Called with the number of pairs that are done, and N.

    Raises:
        ValueError: If shapes disagree, or draws are infinite or their densities NaN.

    Example:
        >>> random = np.random.default_rng(0)
        >>> x = random.normal(size=(200, 1))
        >>> draws = x[:, None] + random.normal(size=(200, 102, 1))  # one more is the truth
        >>> found = ranks(Pairs(draws[:, 0], x, draws[:, 1]), [(draws[:, 2:], None)])
        >>> found.draws, found.parameters.shape, round(float(found.parameters.mean()), 1)
        (100, (200, 1), 0.5)
    """
    theta, density, n = pairs.theta, pairs.log_q, len(pairs)
    random = np.random.default_rng(seed)
    distances = _Distances(pairs, random)
    found: dict[str, list[Any]] = {name: [] for name in _PARTS}
    start, count = 0, 0
    for draws, drawn_q in parts:
        rows, drawn = slice(start, start + len(draws)), np.asarray(draws)
        true, where = theta[rows], f"of pairs {start} to {start + len(draws) - 1} (from 0)"
        if drawn.ndim != 3 or drawn.shape[::2] != true.shape:
            raise ValueError(
                f"parts: expected draws (B, L, {theta.shape[1]}) for {n} pairs; got shape "
                f"{drawn.shape} after {start} pairs"
            )
        if bad := int(np.isinf(drawn).any(2).sum()):
            raise ValueError(f"parts: {bad} draws {where} are infinite")
        count = drawn.shape[1]
        found["parameters"].append(rank(_lowest(drawn), _lowest(true), random))
        if density is not None:
            each = _floats(drawn_q, drawn.shape[:2], "parts: log q")
            if bad := int(np.isnan(each).sum()):
                raise ValueError(f"parts: the densities of {bad} draws {where} are NaN")
            found["region"].append(rank(-each, -density[rows], random))
        for name in ("random", "near"):
            drawn_away, away = distances(rows, drawn, name)
            found[name].append(rank(drawn_away, away, random))
        known = np.where(np.isnan(drawn), distances.mean, drawn)
        found["mean"].append(known.mean(1, dtype=np.float64))
        found["std"].append(known.std(1, dtype=np.float64))
        start = rows.stop
        progress(start, n)
    if start != n:
        raise ValueError(f"parts: expected draws for {n} pairs; got {start}")
    joined: dict[str, Any] = {k: np.concatenate(v) if v else None for k, v in found.items()}
    return Ranks(pairs.names, count, theta, log_q=density, **joined)


_PARTS = ("parameters", "region", "random", "near", "mean", "std")


def _lowest(values: np.ndarray) -> np.ndarray:
    """Values with missing ones below all others."""
    return np.where(np.isnan(values), -np.inf, values)


def _floats(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}; got {found.shape}")
    return found


class _Distances:
    """Squared distances of theta and its draws to references, in standardized parameters.

    Each reference is independent of theta and its draws, given x. `random`: the first draw of
    another pair. `near`: the theta of the pair with the most similar x among those that come
    before this one in a random order, so that the ranks of all pairs are independent.

    Source: Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-based accuracy testing of
    posterior estimators for general inference" (TARP), 2023, arXiv:2302.03026.
    """

    def __init__(self, pairs: Pairs, random: np.random.Generator):
        n, first = len(pairs), pairs.first
        filled = np.where(np.isnan(first).all(0), 0.0, first)
        self.mean, std = np.nanmean(filled, 0), np.nanstd(filled, 0)
        self.std = np.where(std > 0, std, 1.0)
        self.theta = self._standard(pairs.theta)
        order = random.permutation(n)
        cycle = np.empty(n, int)
        cycle[order] = np.roll(order, 1)
        before = _nearest_before(Features(pairs.x, random)(pairs.x), order)
        near = np.where(before[:, None] < 0, self._standard(first)[cycle], self.theta[before])
        self.references = {"random": self._standard(first)[cycle], "near": near}

    def _standard(self, values: np.ndarray) -> np.ndarray:
        return (np.where(np.isnan(values), self.mean, values) - self.mean) / self.std

    def __call__(self, rows: slice, draws: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances of draws (B, L) and of theta (B,)."""
        to = self.references[kind][rows]
        away = self._standard(draws) - to[:, None]
        return np.square(away).sum(2), np.square(self.theta[rows] - to).sum(1)


class Features:
    """Rows as a few standardized numbers; those with many are projected at random.

    Args:
        x: Rows (N, F) that the scale is taken from; values that are not finite count as missing.
        random: Generator of the projection.
        most: Largest number of values that is not projected.
    """

    def __init__(self, x: np.ndarray, random: np.random.Generator, most: int = MOST_FEATURES):
        known = np.where(np.isfinite(x), x, 0.0)
        std = known.std(0)
        self.mean, self.std = known.mean(0), np.where(std > 0, std, 1.0)
        self.matrix = None
        if x.shape[1] > most:
            scale = x.shape[1] ** -0.5
            self.matrix = random.normal(scale=scale, size=(x.shape[1], most))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The numbers (N, F), or (N, most)."""
        standard = np.where(np.isfinite(x), x - self.mean, 0.0) / self.std
        return standard if self.matrix is None else standard @ self.matrix


def _nearest_before(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The index of the row (N,) that is nearest among those before it in an order; -1: none."""
    rows, found = x[order], np.full(len(x), -1)
    length = np.square(rows).sum(1)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        distance = length[None, :stop] - 2 * rows[start:stop] @ rows[:stop].T
        later = np.arange(stop)[None] >= np.arange(start, stop)[:, None]
        distance[later] = np.inf
        nearest = distance.argmin(1)
        found[order[start:stop]] = np.where(later.all(1), -1, order[nearest])
    return found
