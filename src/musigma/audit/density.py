r"""The audit of a density: is it of single points, and does it integrate to one?

First `log_prob` must give each point a number that does not depend on the other points of the
batch: otherwise there is no density to integrate.

One dimension uses adaptive quadrature over the whole line: with :math:`x = \sinh t` an even grid
in t reaches from 1e-9 to 1e9, and tails that fall like a power of x vanish. Cells are halved
towards each peak, so that narrow ones are seen, and then until the integral is stable, which
resolves edges. Before a value other than one is reported, a finer grid must agree.

More dimensions use importance weights: draws from mixtures of Student's t that are adapted to the
modes give :math:`Z = E_q[p / q]` with its standard error. A Z above one is certain. A Z below one
may be due to a missed mode, so two searches from different starts must agree on a single mode:
where there are several, there may be another.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
    Finding,
    Missing,
    Outcome,
    Passed,
    bug,
    name_of,
    warning,
)
from musigma.audit.sandbox import FLOATS, Sandbox, TooSlowError, first_form

__all__ = ["audit_density", "integral"]

SECONDS = 8.0  # of CPU time
OFF = 5e-3  # smallest distance from one that is a finding
REACH = 21.0  # largest t: sinh(21) is 6.6e8
PLACES = (0.3, 0.0, 0.7, 0.05, -0.3, 1.5, -1.5, 5.0, -5.0, 20.0, 100.0, -20.0, 1000.0)
SOLVED = 1e-3  # relative error of a solver that adapts its steps to the batch
STANDARD_ERRORS = 8.0  # of an importance-sampled integral
STARTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of a search, as scales
FREEDOM = 5  # degrees of freedom of the Student's t that points are drawn from


class _Integral(NamedTuple):
    value: float
    error: float
    is_sure: bool
    points: np.ndarray = np.zeros(0)  # draws from the density, where it was integrated by draws


def audit_density(log_prob: Any, dim: int) -> AuditReport:
    """Whether exp(log_prob) is a density: of each point by itself, with an integral of one.

    Args:
        log_prob: x (N, dim) to nats (N,); or a distribution or model with such a method. Points
            at which it raises or returns NaN have no mass.
        dim: Dimensions of x.

    Returns:
        The report; `details` has the integral and its error.

    Raises:
        AuditError: If it cannot be called, returns something else, or has no mass anywhere.

    Example:
        >>> audit_density(torch.distributions.Laplace(0.0, 2.0), 1).verdict
        'correct'
        >>> audit_density(lambda x: -0.5 * (x**2).sum(1), 2).codes
        ('not_normalised',)
        >>> audit_density(lambda x: -0.5 * (x**2).sum(1) + x.sum(), 2).codes
        ('cross_sample',)
    """
    if dim < 1:
        raise AuditError(f"dim: expected 1 or more; got {dim}")
    method = getattr(log_prob, "log_prob", None)
    with Sandbox(log_prob) as sandbox, np.errstate(invalid="ignore", over="ignore"):
        density = _Density(sandbox, method if callable(method) else log_prob, dim)
        found = [*_check_shape(density)]
        if not any(isinstance(o, Finding) and o.severity == "bug" for o in found):
            found += _check_points(density)
        wrong = [o for o in found if isinstance(o, Finding) and _is_no_density(o)]
        if wrong:
            found.append(Missing("the integral: log_prob is not a function of one point"))
        else:
            found += _check_integral(density)
        return AuditReport.of(name_of(log_prob), (*density.notes, *found))


def _is_no_density(finding: Finding) -> bool:
    """Whether there is no density of one point to integrate."""
    return finding.severity == "bug" or finding.code == "stochastic"


def _check_integral(density: _Density) -> Iterator[Outcome]:
    """Whether the integral is one."""
    how = "quadrature" if density.dim == 1 else "importance weights"
    try:
        found = _quadrature(density) if density.dim == 1 else _weighted(density)
    except TooSlowError as late:
        yield Missing(f"the integral: {late}")
        return
    value, error, is_sure, _ = found
    yield Facts(details={"integral": value, "error": error, "evaluations": density.count})
    off = abs(value - 1) > max(OFF, STANDARD_ERRORS * error)
    if off and is_sure and density.has_nan:
        at = f"at some points; over the others, its density integrates to {value:.5g}"
        yield bug("not_finite", what="log_prob", at=at)
    elif off and is_sure:
        yield bug("not_normalised", integral=value, error=error, how=how)
    elif off:
        yield Missing(f"the integral: {value:.4g}, but there may be more mass elsewhere")
    elif not is_sure:
        yield Missing(f"the integral: {value:.4g} ± {error:.1g} is not accurate enough")
    else:
        yield Passed(f"the integral, by {how}: {value:.6g} ± {error:.1g}")


class _Density:
    """A log-density as a function of points (N, dim); -inf where it raises or is NaN.

    Attributes:
        notes: What was assumed of it.
        points: How many points it was first given.
        shape: That of what it returned for them.
        one_by_one: Whether a batch of points gives one number.
    """

    def __init__(self, sandbox: Sandbox, call: Callable[..., Any], dim: int):
        self.sandbox, self.call, self.dim = sandbox, call, dim
        self.notes: list[Outcome] = []
        self.count, self.has_nan, self.began, self.raises = 0, False, time.process_time(), 0
        self.one_by_one = False
        self.inside = 0.0  # a coordinate of a point that it takes
        self.box = np.full((2, dim), ((-np.inf,), (np.inf,)))  # it raises outside
        self._find_form()

    def _find_form(self) -> None:
        """Find the type and the shape of points that it takes, a point, and what it returns."""
        n = 11 if self.dim == 7 else 7  # no other size of a shape
        noise = np.random.default_rng(0).standard_normal((n, self.dim))

        def attempt(
            rows: int, dtype: torch.dtype, spread: float, place: float
        ) -> tuple[int, tuple[int, ...]]:
            self.sandbox.use_dtype(dtype)
            self.inside = place
            shape = tuple(self.value(place + spread * noise[:rows]).shape)
            if rows == 1 and not shape:
                raise AuditError(f"log_prob: of {n} points, expected ({n},); got {shape}")
            return rows, shape

        # first noise: layers that initialize themselves start from it
        rows, shape = first_form(product((n, 1), FLOATS, (1.0, 0.0), PLACES), attempt)[1]
        if self.sandbox.dtype == torch.float32:
            self.notes.append(Assumed("it computes in float32 only"))
        self.points, self.takes_batches, self.shape = n, rows == n, shape
        self.one_by_one = rows == n and math.prod(shape) == 1

    def value(self, x: np.ndarray, each: bool = False) -> Tensor:
        """What log_prob returns for points (N, dim): for all, or for each by itself."""
        points = torch.from_numpy(np.ascontiguousarray(x)).to(self.sandbox.dtype)
        call, points = (torch.vmap(self.call), points[:, None]) if each else (self.call, points)
        with torch.no_grad():
            return self.sandbox.ask("log_prob", call, points)

    def of_rows(self, x: np.ndarray) -> np.ndarray:
        """One number for each of some points (N, dim)."""
        value = self.value(x, self.one_by_one and len(x) > 1)
        if value.numel() not in (len(x), x.size):
            raise AuditError(
                f"log_prob: given {x.shape}, expected ({len(x)},); got {tuple(value.shape)}"
            )
        return value.reshape(len(x), -1).sum(1).numpy()

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.process_time() - self.began > SECONDS

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-densities of points (..., dim), in pieces."""
        points = x.reshape(-1, self.dim)
        self.count += len(points)
        parts = [self._ask(points[i : i + 20_000]) for i in range(0, len(points), 20_000)]
        return np.concatenate([np.zeros(0), *parts]).reshape(x.shape[:-1])

    def _ask(self, x: np.ndarray) -> np.ndarray:
        value = np.full(len(x), -np.inf)
        within = ((x >= self.box[0]) & (x <= self.box[1])).all(1)
        if not within.all():
            if within.any():
                value[within] = self._ask(x[within])
        elif (known := self._tried(x)) is not None:
            self.has_nan |= bool(np.isnan(known).any())
            value = np.where(np.isnan(known), -np.inf, known)
        elif not self.raises:
            self._find_box()
            return self._ask(x)
        elif len(x) > 1 and self.raises < 4000:
            self.raises += 1
            half = len(x) // 2  # it raises outside its support
            return np.concatenate([self._ask(x[:half]), self._ask(x[half:])])
        return value

    def _tried(self, x: np.ndarray) -> np.ndarray | None:
        """As `of_rows`; None where it raises."""
        try:
            return self.of_rows(x)
        except AuditError as error:
            if error.__cause__ is None:
                raise
            return None

    def _find_box(self) -> None:
        """Find how far along each axis it can be called."""
        self.raises = 1
        for axis, side in product(range(self.dim), (0, 1)):
            near, far, x = 0.0, 2e9, np.full((1, self.dim), self.inside)
            for _ in range(100):
                middle = (near + far) / 2
                x[0, axis] = self.inside + (-1, 1)[side] * middle
                near, far = (middle, far) if self._tried(x) is not None else (near, middle)
            if far < 2e9:
                self.box[side, axis] = self.inside + (-1, 1)[side] * near
        self.notes.append(Assumed("there is no mass where log_prob raises"))


def _check_shape(density: _Density) -> Iterator[Outcome]:
    """Whether log_prob returns one number for each point.

    Raises:
        AuditError: If what it returns has no entry for each point, or for each dimension.
    """
    n, dim, shape = density.points, density.dim, density.shape
    if not density.takes_batches:
        yield bug("log_prob_shape", "raises", n=n)
    elif shape in ((n,), (n, 1), (n, dim)):
        if shape != (n,) and dim > 1:
            yield warning("log_prob_shape", "each", shape=str(shape), n=n)
    elif not density.one_by_one:
        if shape[0] != n and shape != (dim,):
            raise AuditError(f"log_prob: of {n} points, expected ({n},); got {shape}")
        yield bug("log_prob_shape", shape=str(shape), n=n)


def _check_points(density: _Density) -> Iterator[Outcome]:
    """Whether the value of a point is the same alone, in a batch, and among other points."""
    random = np.random.default_rng(0)
    spreads = np.array([0.0, 0.1, 1.0, 10.0])[:, None, None]
    drawn = density.inside + spreads * random.standard_normal((4, 12, density.dim))
    points = drawn.reshape(-1, density.dim)
    points = points[[np.isfinite(density(x[None])).all() for x in points]]
    if not len(points) or (points[0] == points[-1]).all():
        yield Missing("whether points depend on each other: too few have mass")
        return

    def seeded(x: np.ndarray) -> np.ndarray:
        density.sandbox.reseed()
        return density.of_rows(x)

    rows, others = np.split(points[random.choice(len(points), 8, replace=len(points) < 8)], 2)
    alone = np.concatenate([seeded(row[None]) for row in rows])
    exact = density.sandbox.dtype == torch.float64
    limit = (1e-8 if exact else 1e-3) * (1 + np.abs(alone).max())
    if density.one_by_one:
        total, own = float(density.value(rows).sum()), {"sum": alone.sum(), "mean": alone.mean()}
        how = [name for name, value in own.items() if abs(total - value) <= limit]
        if not how:
            yield bug("log_prob_shape", "total", n=len(alone), how="neither sum nor mean")
        else:
            yield warning("log_prob_shape", "total", n=len(alone), how=f"the {how[0]}")
        return
    batch, again = seeded(rows), density.of_rows(rows)
    if stochastic := bool(np.abs(again - batch).max() > limit):
        yield warning("stochastic", "log_prob", value=batch[0], again=again[0])
    replaced = [np.where(np.arange(4)[:, None] == i, rows, others) for i in range(4)]
    among = np.array([seeded(x)[i] for i, x in enumerate(replaced)])
    off = np.abs([among - batch, (alone - batch) * (not stochastic)]).max(0)
    if (off > np.maximum(limit, SOLVED * (1 + np.abs(batch)))).any():
        i = int(off.argmax())
        numbers = {"alone": alone[i], "batch": batch[i], "among": among[i], "n": len(rows)}
        yield bug("cross_sample", "log_prob", **numbers)
        return
    yield Passed("the log-density of a point is the same in every batch")
    if off.max() > limit:
        yield Assumed(
            f"an adaptive solver: log-densities differ by {off.max():.1g} between batches"
        )


# --- one dimension -----------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


def _quadrature(density: _Density) -> _Integral:
    """The integral over the line, its error, and whether two grids agree on it."""
    found: list[tuple[float, float]] = []
    for points in (4001, 16_001):
        density.began = time.process_time()
        value, error = _refined(density, _graded(density, points))
        if abs(value - 1) < 1e-4 and error < 1e-3:
            return _Integral(value, error, True)
        found.append((value, error))
    (first, coarse), (value, error) = found
    if value == 0:
        raise AuditError("log_prob: it has no mass at any point between -6e8 and 6e8")
    scale = max(1.0, value)
    agrees = abs(first - value) <= 1e-3 * scale and coarse < 0.05 * scale
    return _Integral(value, max(error, abs(first - value)), agrees and error < 0.1 * OFF * scale)


def _graded(density: _Density, points: int) -> np.ndarray:
    """The edges of cells that are even, and halved towards each peak that a finer grid has."""
    t = even = np.linspace(-REACH, REACH, points)
    y = density(np.sinh(t)[:, None])
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
        y = np.concatenate([y, density(np.sinh(middle)[:, None])])[np.argsort(t)]
        t = np.sort(t)
    return np.union1d(even[::8], np.setdiff1d(t, even))


def _refined(density: _Density, t: np.ndarray) -> tuple[float, float]:
    """The integral over the cells of a grid, which are halved until it is stable; its error."""

    def integrals(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        half = (high - low) / 2
        at = (low + half)[:, None] + half[:, None] * _NODES
        log_p = density(np.sinh(at)[..., None]) + np.logaddexp(at, -at) - math.log(2)
        return np.exp(np.minimum(log_p, 600.0)) @ _WEIGHTS * half

    low, high, done, left = t[:-1], t[1:], 0.0, 0.0
    coarse = integrals(low, high)
    while len(low):
        middle = (low + high) / 2
        fine = np.stack([integrals(low, middle), integrals(middle, high)])
        total = fine.sum(0)
        off = np.abs(total - coarse)
        settled = off <= 1e-9 * max(1.0, done + total.sum())
        settled |= high - low < 1e-13 * (1 + np.abs(low))
        settled |= density.late or len(low) > 60_000
        done += float(total[settled].sum())
        left += float(off[settled].sum())
        open_ = ~settled
        low = np.concatenate([low[open_], middle[open_]])
        high = np.concatenate([middle[open_], high[open_]])
        coarse = fine[:, open_].ravel()
    return done, left


# --- more dimensions ---------------------------------------------------------------------------


class _Function(NamedTuple):
    """A log-density of points (N, dim) that returns one number for each."""

    log_p: Callable[[Tensor], Tensor]
    dim: int
    late: bool = False

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.log_p(torch.from_numpy(x)).nan_to_num(-math.inf).numpy()


def integral(log_p: Callable[[Tensor], Tensor], dim: int) -> _Integral:
    """The integral of a density of points (N, dim), by fewer draws than an audit of it takes."""
    return _weighted(_Function(log_p, dim), draws=12_000)


def _weighted(density: _Density | _Function, draws: int = 60_000) -> _Integral:
    """The integral by importance weights, its error, and whether two searches are sure of it."""
    runs = [_search(density, np.random.default_rng(seed), draws) for seed in (0, 1)]
    best = max(runs, key=lambda run: (run.is_sure, -run.error))
    if best.value == 0:
        raise AuditError("log_prob: no mass was found")
    if best.value > 1 - 3 * best.error:  # no mass is missing; weights never overestimate
        return best
    both = math.hypot(runs[0].error, runs[1].error)
    agree = abs(runs[0].value - runs[1].value) <= 6 * both + 0.01 * best.value
    unimodal = all(run.is_sure and _is_unimodal(density, run.points) for run in runs)
    return best._replace(is_sure=agree and unimodal)


def _is_unimodal(density: _Density | _Function, points: np.ndarray) -> bool:
    """Whether the density never falls far on a line between two draws."""
    a, b = np.split(points, 2)
    between = [density((1 - share) * a + share * b) for share in (0.25, 0.5, 0.75)]
    return bool((np.min(between, 0) >= np.minimum(density(a), density(b)) - 2.0).all())


def _search(density: _Density | _Function, random: np.random.Generator, draws: int) -> _Integral:
    """Annealed importance sampling: mixtures approach the density from wide starts, in steps."""
    dim, count, n = density.dim, 0, 6000
    centers = [np.full(dim, 0.5), *np.zeros((7, dim))]
    mixture = _Mixture([1.0] * 8, centers, [s**2 * np.eye(dim) for s in (0.3, *STARTS)])
    while True:
        x = mixture.draw(n, random)
        log_w = density(x) - mixture.log_density(x)
        if not np.isfinite(log_w).any():
            return _Integral(0.0, 0.0, False)
        if n == draws:
            break
        powers = 0.5 ** np.arange(0, 20, 0.5)  # the largest at which many draws count
        power = next((k for k in powers if _weights(k * log_w)[1] > 1500), powers[-1])
        mixture, count = _fitted(x, power * log_w, random), count + (power == 1)
        n = draws if count == 5 or density.late else 6000
    ratios = np.exp(np.minimum(log_w, 600))
    weights, effective = _weights(log_w)
    return _Integral(
        value=float(ratios.mean()),
        error=float(ratios.std()) / math.sqrt(n),
        is_sure=effective > draws / 20 and weights.max() < 0.005,
        points=x[random.choice(n, 600, p=weights)],
    )


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
