r"""The integral of a density over the whole space.

One dimension uses adaptive quadrature over the whole line: with :math:`x = \sinh t` an even grid
in t reaches from 1e-9 to 1e9, and tails that fall like a power of x vanish. Cells are halved
towards each peak, so that narrow ones are seen, and then until the integral is stable, which
resolves edges. Before a value other than one is returned, a finer grid must agree.

More dimensions use importance weights: draws from mixtures of Student's t that are adapted to the
modes give :math:`Z = E_q[p / q]` with its standard error. A Z above one is certain. A Z below one
may be due to a missed mode, so two searches from different starts must agree on a single mode:
where there are several, there may be another.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["OFF", "Integral", "integrate"]

SECONDS = 8.0  # of CPU time
OFF = 5e-3  # smallest distance from one that matters
REACH = 21.0  # largest t: sinh(21) is 6.6e8
STARTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of a search, as scales
FREEDOM = 5  # degrees of freedom of the Student's t that points are drawn from
NODES, WEIGHTS = np.polynomial.legendre.leggauss(6)

LogDensity = Callable[[np.ndarray], np.ndarray]
Late = Callable[[], bool]


class Integral(NamedTuple):
    """An integral, its error, and whether two grids, or two searches, agree on it."""

    value: float
    error: float
    is_sure: bool


def integrate(log_p: LogDensity, dim: int, draws: int = 60_000) -> Integral:
    """The integral of exp(log_p); zero if no mass is found.

    Args:
        log_p: Points (N, dim) to nats (N,); -inf where there is no mass.
        dim: Dimensions of a point.
        draws: How many points are drawn in more than one dimension; in one, 4 / 15 of them are
            the finest grid that the search for peaks begins with.

    Example:
        >>> value, error, is_sure = integrate(lambda x: -0.5 * x[:, 0] ** 2, 1)
        >>> round(value**2 / math.pi, 9), is_sure
        (2.0, True)
    """
    return _by_quadrature(log_p, draws) if dim == 1 else _by_weights(log_p, dim, draws)


def _clock() -> Late:
    """Whether the time is up, from now on."""
    end = time.process_time() + SECONDS
    return lambda: time.process_time() > end


# --- one dimension -----------------------------------------------------------------------------


def _by_quadrature(log_p: LogDensity, draws: int) -> Integral:
    found: list[tuple[float, float]] = []
    for points in (draws // 15 + 1, 4 * draws // 15 + 1):
        late = _clock()
        value, error = _refined(log_p, _graded(log_p, points), late)
        if abs(value - 1) < 1e-4 and error < 1e-3:
            return Integral(value, error, True)
        found.append((value, error))
    (first, coarse), (value, error) = found
    scale = max(1.0, value)
    agrees = abs(first - value) <= 1e-3 * scale and coarse < 0.05 * scale
    return Integral(value, max(error, abs(first - value)), agrees and error < 0.1 * OFF * scale)


def _graded(log_p: LogDensity, points: int) -> np.ndarray:
    """The edges of cells that are even, and halved towards each peak that a finer grid has."""
    t = even = np.linspace(-REACH, REACH, points)
    y = log_p(np.sinh(t)[:, None])
    for _ in range(60):
        peaks = 1 + np.flatnonzero((y[1:-1] >= np.maximum(y[:-2], y[2:])) & np.isfinite(y[1:-1]))
        peaks = peaks[np.argsort(-y[peaks])][:40]
        middle = np.concatenate(
            [(t[peaks] + t[peaks + k])[y[peaks] - y[peaks + k] > 0.5] / 2 for k in (-1, 1)]
        )
        middle = np.setdiff1d(middle, t)
        if not len(middle):
            break
        t = np.concatenate([t, middle])
        y = np.concatenate([y, log_p(np.sinh(middle)[:, None])])[np.argsort(t)]
        t = np.sort(t)
    return np.union1d(even[::8], np.setdiff1d(t, even))


def _refined(log_p: LogDensity, t: np.ndarray, late: Late) -> tuple[float, float]:
    """The integral over the cells of a grid, which are halved until it is stable; its error."""

    def integrals(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        half = (high - low) / 2
        at = (low + half)[:, None] + half[:, None] * NODES
        y = log_p(np.sinh(at).reshape(-1, 1)).reshape(at.shape)
        y = y + np.logaddexp(at, -at) - math.log(2)
        return np.exp(np.minimum(y, 600.0)) @ WEIGHTS * half

    low, high, done, left = t[:-1], t[1:], 0.0, 0.0
    coarse = integrals(low, high)
    while len(low):
        middle = (low + high) / 2
        fine = np.stack([integrals(low, middle), integrals(middle, high)])
        total = fine.sum(0)
        off = np.abs(total - coarse)
        settled = off <= 1e-9 * max(1.0, done + total.sum())
        settled |= high - low < 1e-13 * (1 + np.abs(low))
        settled |= late() or len(low) > 60_000
        done += float(total[settled].sum())
        left += float(off[settled].sum())
        open_ = ~settled
        low = np.concatenate([low[open_], middle[open_]])
        high = np.concatenate([middle[open_], high[open_]])
        coarse = fine[:, open_].ravel()
    return done, left


# --- more dimensions ---------------------------------------------------------------------------


def _by_weights(log_p: LogDensity, dim: int, draws: int) -> Integral:
    late = _clock()
    found = [_search(log_p, dim, draws, np.random.default_rng(seed), late) for seed in (0, 1)]
    runs = [run for run, _ in found]
    best = max(runs, key=lambda run: (run.is_sure, -run.error))
    if best.value > 1 - 3 * best.error:  # no mass is missing; weights never overestimate
        return best
    both = math.hypot(*(run.error for run in runs))
    agree = abs(runs[0].value - runs[1].value) <= 6 * both + 0.01 * best.value
    unimodal = all(run.is_sure and _is_unimodal(log_p, points) for run, points in found)
    return best._replace(is_sure=agree and unimodal)


def _is_unimodal(log_p: LogDensity, points: np.ndarray) -> bool:
    """Whether the density never falls far on a line between two draws."""
    a, b = np.split(points, 2)
    between = [log_p((1 - share) * a + share * b) for share in (0.25, 0.5, 0.75)]
    return bool((np.min(between, 0) >= np.minimum(log_p(a), log_p(b)) - 2.0).all())


def _search(
    log_p: LogDensity, dim: int, draws: int, random: np.random.Generator, late: Late
) -> tuple[Integral, np.ndarray]:
    """Annealed importance sampling, from wide starts; the integral, and draws of the density."""
    count, n = 0, 6000
    centers = [np.full(dim, 0.5), *np.zeros((7, dim))]
    mixture = _Mixture([1.0] * 8, centers, [s**2 * np.eye(dim) for s in (0.3, *STARTS)])
    while True:
        x = mixture.draw(n, random)
        log_w = log_p(x) - mixture.log_density(x)
        if not np.isfinite(log_w).any():
            return Integral(0.0, 0.0, False), x
        if n == draws:
            break
        powers = 0.5 ** np.arange(0, 20, 0.5)  # the largest at which many draws count
        power = next((k for k in powers if _weights(k * log_w)[1] > 1500), powers[-1])
        mixture, count = _fitted(x, power * log_w, random), count + (power == 1)
        n = draws if count == 5 or late() else 6000
    ratios = np.exp(np.minimum(log_w, 600))
    weights, effective = _weights(log_w)
    is_sure = effective > draws / 20 and weights.max() < 0.005
    found = Integral(float(ratios.mean()), float(ratios.std()) / math.sqrt(n), is_sure)
    return found, x[random.choice(n, 600, p=weights)]


def _weights(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights that add up to one, and the number of draws that they are worth."""
    weights = np.exp(log_w - log_w.max())
    weights /= weights.sum()
    return weights, 1 / float((weights**2).sum())


class _Mixture:
    """A mixture of Student's t."""

    def __init__(self, shares: Any, means: Any, covariances: Any):
        from scipy.stats import multivariate_t

        self.shares, self.dim = np.array(shares) / np.sum(shares), len(means[0])
        floor = (1e-12 + 1e-10 * np.trace(covariances[0]) / self.dim) * np.eye(self.dim)
        pairs = zip(means, covariances, strict=True)
        self.parts = [multivariate_t(mean, cov + floor, FREEDOM) for mean, cov in pairs]

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        counts = zip(self.parts, random.multinomial(n, self.shares), strict=True)
        drawn = [part.rvs(count, random_state=random) for part, count in counts]
        return np.concatenate([x.reshape(-1, self.dim) for x in drawn])

    def log_density(self, x: np.ndarray) -> np.ndarray:
        pairs = zip(self.shares, self.parts, strict=True)
        return np.logaddexp.reduce([math.log(share) + part.logpdf(x) for share, part in pairs])


def _fitted(x: np.ndarray, log_w: np.ndarray, random: np.random.Generator) -> _Mixture:
    """A mixture around clusters of weighted points, and around all of them."""
    from scipy.cluster.vq import kmeans2

    dim = x.shape[1]
    picks = x[random.choice(len(x), 1500, p=_weights(log_w)[0])]
    spread, whole = picks.std(0) + 1e-9, np.cov(picks.T)
    k = min(12, 1 + len(np.unique(picks, axis=0)) // (5 * dim))
    centers = picks[random.choice(len(picks), k, replace=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty clusters
        _, owner = kmeans2(picks / spread, centers / spread, 12, minit="matrix")
    shares, means, covariances = [0.1], [picks.mean(0)], [1.5 * whole]
    for group in (picks[owner == c] for c in np.unique(owner)):
        n = len(group)
        cov = np.cov(group.T) if n > dim + 1 else 0.1 * whole
        lean = min(1.0, 2.0 * dim / n)
        shares.append(0.9 * n / len(picks))
        means.append(group.mean(0))
        covariances.append(1.3 * ((1 - lean) * cov + lean * np.diag(np.diag(whole)) / k))
    return _Mixture(shares, means, covariances)
