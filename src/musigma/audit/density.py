r"""The audit of a density: is it of single points, and does it integrate to one?

First `log_prob` must give each point a number that does not depend on the other points of the
batch: otherwise there is no density to integrate.

One and two dimensions use adaptive quadrature over the whole line: with :math:`x = \sinh t` an
even grid in t reaches from 1e-9 to 1e9, and tails that fall like a power of x vanish. Peaks are
found first, by climbing from the grid, so that narrow ones get their own points; cells are divided
until the integral is stable, which resolves edges. Before a value other than one is reported,
a finer grid at other points must agree.

More dimensions use importance weights: draws from mixtures of Student's t that are adapted to the
modes give :math:`Z = E_q[p / q]` with its standard error. A Z above one is certain. A Z below one
may be due to a missed mode, so two searches from different starts must agree on a single mode:
where there are several, there may be another.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.sandbox import Sandbox, TooSlowError, first_form

__all__ = ["audit_density"]

Shape = tuple[int, ...]

SECONDS = 8.0  # of CPU time
OFF = 5e-3  # smallest distance from one that is a finding
REACH = 21.0  # largest t: sinh(21) is 6.6e8
PLACES = (0.3, 0.0, 0.7, 0.05, -0.3, 1.5, -1.5, 5.0, -5.0, 20.0, 100.0, -20.0, 1000.0)
SOLVED = 1e-3  # relative error of a solver that adapts its steps to the batch
STANDARD_ERRORS = 8.0  # of an importance-sampled integral
FREEDOM = 5.0  # degrees of freedom of the Student's t that points are drawn from


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
    call = log_prob
    if hasattr(log_prob, "log_prob") and callable(log_prob.log_prob):
        call = log_prob.log_prob
    report = ReportBuilder(name_of(log_prob))
    with Sandbox(log_prob) as sandbox, np.errstate(invalid="ignore", over="ignore"):
        density = _Density(sandbox, call, dim, report)
        if density.is_of_points:
            density.check_rows()
        if not density.is_of_points:
            report.missing.append("the integral: log_prob is not a function of one point")
            return report.build()
        measure, how = (
            (_quadrature, "quadrature") if dim <= 2 else (_weighted, "importance weights")
        )
        try:
            value, error, sure = measure(density)
        except TooSlowError as late:
            report.missing.append(f"the integral: {late}")
            return report.build()
    report.details |= {"integral": value, "error": error, "evaluations": density.count}
    off = abs(value - 1) > max(OFF, STANDARD_ERRORS * error)
    if density.nan_inside:
        report.bug("not_finite", "density")
    elif off and sure:
        factor = _constant(value, dim)
        report.bug("not_normalised", integral=value, error=error, how=how, factor=factor)
    elif off:
        report.missing.append(f"the integral: {value:.4g}, but there may be more mass elsewhere")
    elif not sure:
        report.missing.append(f"the integral: {value:.4g} ± {error:.1g} is not accurate enough")
    else:
        report.checked.append(f"the integral, by {how}: {value:.6g} ± {error:.1g}")
    return report.build()


def _constant(value: float, dim: int) -> str:
    sizes = {"2 pi": 2 * math.pi, "2": 2.0, "pi": math.pi, "e": math.e}
    known = {f"sqrt({n})": math.sqrt(v) for n, v in sizes.items() if n != "e"} | sizes
    for (name, size), power in product(known.items(), {1, dim}):
        for word, factor in (("", size**power), ("1 / ", size**-power)):
            if math.isclose(value, factor, rel_tol=2e-3):
                return f": off by {word}{name}" + f" to the power {power}" * (power > 1)
    return ""


class _Density:
    """A log-density as a function of points (N, dim); -inf where it raises or is NaN."""

    def __init__(
        self, sandbox: Sandbox, call: Callable[..., Any], dim: int, report: ReportBuilder
    ):
        self.sandbox, self.call, self.dim, self.report = sandbox, call, dim, report
        self.count, self.nan_inside, self.began, self.raises = 0, False, time.process_time(), 0
        self.flat = False  # whether points are (N,)
        self.one_by_one = False  # whether a batch of points gives one number
        self.is_of_points = True  # so that there is a density to integrate
        self.inside = 0.0  # a coordinate of a point that it takes
        self.box: tuple[np.ndarray, np.ndarray] | None = None  # it raises outside, once it has
        self._find_form()

    def _find_form(self) -> None:
        """Find the type and the shape of points that it takes, a point, and what it returns."""
        n = 11 if self.dim == 7 else 7  # no other size of a shape

        noise = np.random.default_rng(0).standard_normal((n, self.dim))

        def attempt(
            rows: int, regular: bool, dtype: torch.dtype, spread: float, place: float, flat: bool
        ) -> Shape:
            self.sandbox.use_dtype(dtype)
            self.flat = flat
            shape = tuple(self._value(place + spread * noise[:rows]).shape)
            if (regular and shape != (n,)) or (rows == 1 and not shape):
                raise AuditError(f"log_prob: of {n} points, expected ({n},); got {shape}")
            return shape

        shapes = (False, True) if self.dim == 1 else (False,)
        types, reasons = (torch.float64, torch.float32), []
        forms = list(
            product(types, (1.0, 0.0), PLACES, shapes)
        )  # first noise: layers start from it
        for rows, regular in ((n, True), (n, False), (1, False)):
            try:
                (dtype, _, self.inside, self.flat), shape = first_form(
                    forms, partial(attempt, rows, regular)
                )
                break
            except TooSlowError:
                raise
            except AuditError as reason:
                reasons.append(reason)
        else:
            raise reasons[1]
        self.sandbox.use_dtype(dtype)
        if self.flat:
            self.report.assumed.append("log_prob takes points as (N,)")
        if dtype == torch.float32:
            self.report.assumed.append("it computes in float32 only")
        said = {"shape": str(shape), "n": n, "dim": self.dim}
        if rows == 1:
            self._refuse("log_prob_shape", "raises", n=n, error=str(reasons[1].__cause__))
        elif math.prod(shape) == 1:
            self.one_by_one = True
        elif shape in ((n, 1), (n, self.dim)):
            column = "column" if shape == (n, 1) else "each_dimension"
            self.report.warn("log_prob_shape", column, **said)
        elif shape != (n,) and (shape[0] == n or shape == (self.dim,)):
            self._refuse("log_prob_shape", "pairs" if shape == (n, n) else "", **said)
        elif shape != (n,):
            raise reasons[0]

    def _value(self, x: np.ndarray, each: bool = False) -> Tensor:
        """What log_prob returns for points (N, dim): for all, or for each by itself."""
        points = torch.from_numpy(np.ascontiguousarray(x)).to(self.sandbox.dtype)
        points = points[:, 0] if self.flat else points
        call, points = (torch.vmap(self.call), points[:, None]) if each else (self.call, points)
        with torch.no_grad():
            return self.sandbox.ask("log_prob", call, points)

    def _log_prob(self, x: np.ndarray) -> np.ndarray:
        """One number for each of some points (N, dim)."""
        value = self._value(x, self.one_by_one and len(x) > 1)
        if value.numel() not in (len(x), x.size):
            raise AuditError(
                f"log_prob: given {x.shape}, expected ({len(x)},); got {tuple(value.shape)}"
            )
        return value.reshape(len(x), -1).sum(1).numpy()

    def check_rows(self) -> None:
        """Whether the value of a point depends on the other points of its batch."""
        random, report = np.random.default_rng(0), self.report
        drawn = np.array([0.0, 0.1, 1.0, 10.0])[:, None, None, None]
        drawn = self.inside + drawn * random.standard_normal((4, 12, 1, self.dim))
        points = [x for x in drawn.reshape(-1, 1, self.dim) if np.isfinite(self(x)).all()]
        if not points or (points[0] == points[-1]).all():
            report.missing.append("whether points depend on each other: too few have mass")
            return
        places = random.choice(len(points), 8, replace=len(points) < 8)
        rows, others = np.split(np.concatenate([points[place] for place in places]), 2)
        alone = np.concatenate([self._seeded(row[None]) for row in rows])
        limit = (1e-8 if self.sandbox.dtype == torch.float64 else 1e-3) * (1 + np.abs(alone).max())
        if self.one_by_one:
            total, own = float(self._value(rows).sum()), {"sum": alone.sum(), "mean": alone.mean()}
            how = [name for name, value in own.items() if abs(total - value) <= limit]
            if how:
                report.warn("log_prob_shape", "total", n=len(alone), how=how[0])
            else:
                self._refuse("log_prob_shape", "other_total", n=len(alone), total=total)
            return
        batch, again = self._seeded(rows), self._log_prob(rows)
        if stochastic := bool(np.abs(again - batch).max() > limit):
            report.warn("stochastic", "log_prob", value=batch[0], again=again[0])
            self.is_of_points = False
        replaced = [np.where(np.arange(4)[:, None] == i, rows, others) for i in range(4)]
        among = np.array([self._seeded(x)[i] for i, x in enumerate(replaced)])
        off = np.abs([among - batch, (alone - batch) * (not stochastic)]).max(0)
        moved = (self._seeded(np.concatenate([rows[:3], others[:1]])) - batch)[:3]
        shared, i = bool(np.ptp(moved) <= limit), int(alone.argmax())
        if (off > (limit if shared else np.maximum(limit, SOLVED * (1 + np.abs(batch))))).any():
            numbers = {"alone": alone[i], "batch": batch[i], "among": among[i], "n": len(rows)}
            self._refuse("cross_sample", "term" if shared else "log_prob", **numbers)
            return
        report.checked.append("the log-density of a point is the same in every batch")
        if off.max() > limit:
            report.assumed.append(
                f"an adaptive solver: log-densities differ by {off.max():.1g} between batches"
            )

    def _refuse(self, code: str, variant: str, **numbers: Any) -> None:
        self.report.bug(code, variant, **numbers)
        self.is_of_points = False

    def _seeded(self, x: np.ndarray) -> np.ndarray:
        """The log-densities of points with the same draws at each call."""
        self.sandbox.reseed()
        return self._log_prob(x)

    def _tried(self, x: np.ndarray) -> np.ndarray | None:
        """As `_log_prob`; None where it raises."""
        try:
            return self._log_prob(x)
        except AuditError as error:
            if error.__cause__ is None:
                raise
            return None

    def _find_box(self) -> None:
        """Find how far along each axis it can be called."""
        low, high = np.full(self.dim, -np.inf), np.full(self.dim, np.inf)
        for axis, (sign, ends) in product(range(self.dim), ((-1.0, low), (1.0, high))):
            near, far, x = 0.0, 2e9, np.full((1, self.dim), self.inside)
            for _ in range(100):
                middle = (near + far) / 2
                x[0, axis] = self.inside + sign * middle
                near, far = (middle, far) if self._tried(x) is not None else (near, middle)
            if far < 2e9:
                ends[axis] = self.inside + sign * near
        self.box = low, high
        self.report.assumed.append("there is no mass where log_prob raises")

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.process_time() - self.began > SECONDS

    def ends(self, axis: int) -> np.ndarray:
        """The limits along an axis between which it can be called, in t."""
        both = np.array([] if self.box is None else [ends[axis] for ends in self.box])
        return np.arcsinh(both[np.isfinite(both)])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-densities of points (..., dim), in pieces."""
        points = x.reshape(-1, self.dim)
        self.count += len(points)
        parts = [self._ask(points[i : i + 20_000]) for i in range(0, len(points), 20_000)]
        return np.concatenate([np.zeros(0), *parts]).reshape(x.shape[:-1])

    def _ask(self, x: np.ndarray) -> np.ndarray:
        if self.box is not None:
            within = ((x >= self.box[0]) & (x <= self.box[1])).all(1)
            if not within.all():
                value = np.full(len(x), -np.inf)
                if within.any():
                    value[within] = self._ask(x[within])
                return value
        if (value := self._tried(x)) is None:
            if self.box is None:
                self._find_box()
                return self._ask(x)
            self.raises += 1
            if len(x) == 1 or self.raises > 4000:
                return np.full(len(x), -np.inf)
            half = len(x) // 2  # it raises outside its support
            return np.concatenate([self._ask(x[:half]), self._ask(x[half:])])
        bad = np.isnan(value)
        value = np.where(bad, -np.inf, value)
        if bad.any() and self.dim == 1 and len(x) > 50:
            order = np.argsort(x[:, 0])
            near = np.flatnonzero(~bad[order] & (value[order] > value.max() - 3))
            if len(near):
                self.nan_inside |= bool(bad[order][near[0] : near[-1]].any())
        return value


# --- one and two dimensions --------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
STEPS = np.array([0.0, 0.5, 1, 2, 4, 8, 16, 64, 256])  # of edges around a peak, in its widths


def _quadrature(density: _Density) -> tuple[float, float, bool]:
    """The integral over one or two dimensions, its error, and whether two grids agree on it."""
    line = density.dim == 1
    grids = ((4001, 500), (16_007, 2001)) if line else ((97, 48), (135, 67))
    reach, most = (REACH, 40) if line else (0.6 * REACH, 4)  # of the search for peaks
    tolerance, enough, agreement = (2e-5, 1e-4, 1e-3) if line else (1e-3, 1e-3, 5e-3)
    found = []
    for points, cells in grids:
        density.began = time.process_time()
        edges = [
            [np.linspace(-REACH, REACH, cells + 1), density.ends(a)] for a in range(density.dim)
        ]
        for peak, width in _peaks(density, np.linspace(-reach, reach, points), most):
            for axis, at in enumerate(peak):
                around = np.arcsinh(at + width * np.concatenate([-STEPS, STEPS]))
                edges[axis].append(np.clip(around, -REACH, REACH))
        axes = [np.unique(np.concatenate(parts)) for parts in edges]
        low, high = _grid([axis[:-1] for axis in axes]), _grid([axis[1:] for axis in axes])
        value, error = _refined(density, low, high, tolerance)
        if abs(value - 1) < enough and error < (1e-3 if line else OFF):
            return value, error, True
        found.append((value, error))
    (first, coarse), (value, error) = found
    if value == 0:
        raise AuditError("log_prob: it has no mass at any point between -6e8 and 6e8")
    scale = max(1.0, value)
    agrees = abs(first - value) <= agreement * scale and coarse < 0.05 * scale
    sure = agrees and error < (0.1 if line else 2) * OFF * scale
    return value, max(error, abs(first - value)), sure


def _grid(axes: Sequence[np.ndarray]) -> np.ndarray:
    """All points with these coordinates, (N, dim)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _cells(density: _Density, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The integral over each box of t, (n, dim) to (n,), by six Gauss points per axis."""
    dim, half = low.shape[1], (high - low) / 2
    t = (low + half)[:, None] + half[:, None] * _grid([_NODES] * dim)
    log_jacobian = (np.logaddexp(t, -t) - math.log(2)).sum(-1)
    values = np.exp(np.minimum(density(np.sinh(t)) + log_jacobian, 600.0))
    return (values * _grid([_WEIGHTS] * dim).prod(1)).sum(1) * half.prod(1)


def _refined(
    density: _Density, low: np.ndarray, high: np.ndarray, tolerance: float
) -> tuple[float, float]:
    """The integral over boxes, which are halved along every axis until it is stable."""
    dim = low.shape[1]
    upper = _grid([np.array([False, True])] * dim)  # of the parts of a box, along each axis
    coarse = _cells(density, low, high)
    done, left = 0.0, 0.0
    while len(low):
        middle = (low + high) / 2
        lows = np.where(upper, middle[:, None], low[:, None])
        highs = np.where(upper, high[:, None], middle[:, None])
        fine = _cells(density, lows.reshape(-1, dim), highs.reshape(-1, dim))
        fine = fine.reshape(len(low), -1)
        total = fine.sum(1)
        off = np.abs(total - coarse)
        order = np.argsort(off)
        settled = np.zeros(len(low), bool)  # the smallest errors, up to a small sum
        limit = 0.1 * tolerance * max(1e-300, done + total.sum())
        settled[order] = np.cumsum(off[order]) <= limit
        settled |= (high - low).max(1) < 1e-13 * (1 + np.abs(low).max(1))
        settled |= density.late or len(low) > 60_000
        done += float(total[settled].sum())
        left += float(off[settled].sum())
        low, high = lows[~settled].reshape(-1, dim), highs[~settled].reshape(-1, dim)
        coarse = fine[~settled].reshape(-1)
    return done, left


def _peaks(density: _Density, t: np.ndarray, most: int) -> list[tuple[np.ndarray, float]]:
    """Local maxima with their widths, by a shrinking pattern search from the tops of a grid."""
    from scipy.ndimage import maximum_filter

    dim = density.dim
    grid = np.sinh(np.stack(np.meshgrid(*[t] * dim, indexing="ij"), -1))
    log_p = density(grid)
    highest = maximum_filter(log_p, 3, mode="constant", cval=np.inf)  # no edge is a top
    tops = np.argwhere((log_p >= highest) & np.isfinite(log_p))
    tops = tops[np.argsort(-log_p[tuple(tops.T)])][:most]
    if not len(tops):
        return []
    at, best = grid[tuple(tops.T)], log_p[tuple(tops.T)]
    step = np.abs(grid[tuple(tops.T + 1)] - at).max(1)
    directions = _grid([np.array([-1, 0, 1])] * dim)
    for _ in range(200):
        tried = at[:, None] + step[:, None, None] * directions
        values = density(tried)
        climbs = values.max(1) > best
        at = np.where(climbs[:, None], tried[np.arange(len(at)), values.argmax(1)], at)
        best, step = np.maximum(best, values.max(1)), np.where(climbs, step, step / 2)
        if (step < 1e-12 * (1 + np.abs(at).max(1))).all():
            break
    widths = np.logspace(-12, 8, 81)
    around = at[:, None, None] + widths[:, None, None] * np.eye(dim)
    beyond = np.any(best[:, None, None] - density(around) > 0.5, axis=2)
    return list(
        zip(at, np.where(np.any(beyond, axis=1), widths[beyond.argmax(1)], 1.0), strict=True)
    )


# --- more dimensions ---------------------------------------------------------------------------


class _Run(NamedTuple):
    value: float
    error: float
    good: bool
    points: np.ndarray  # draws from the density


def _weighted(density: _Density) -> tuple[float, float, bool]:
    """The integral by importance weights, its error, and whether two searches are sure of it."""
    runs = [_search(density, seed) for seed in (0, 1)]
    value, error, good, _ = max(runs, key=lambda run: (run.good, -run.error))
    if value == 0:
        raise AuditError("log_prob: no mass was found")
    if value > 1 - 3 * error:  # no mass is missing; importance weights never overestimate
        return value, error, good
    both = math.hypot(runs[0].error, runs[1].error)
    agree = abs(runs[0].value - runs[1].value) <= 6 * both + 0.01 * value
    sure = agree and all(run.good and _is_unimodal(density, run.points) for run in runs)
    return value, error, sure


def _is_unimodal(density: _Density, points: np.ndarray) -> bool:
    """Whether the density never falls far on a line between two draws."""
    a, b = np.split(points, 2)
    between = [density((1 - share) * a + share * b) for share in (0.25, 0.5, 0.75)]
    return bool((np.min(between, 0) >= np.minimum(density(a), density(b)) - 2.0).all())


def _weights(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights that add up to one, and the number of draws that they are worth."""
    weights = np.exp(log_w - log_w.max())
    weights /= weights.sum()
    return weights, 1 / float((weights**2).sum())


def _search(density: _Density, seed: int) -> _Run:
    """Adaptive importance sampling: the estimate, its standard error, its reliability."""
    random = np.random.default_rng(seed)
    dim = density.dim
    scales = 10.0 ** random.uniform(-1.5, 1.5, (256, 1))
    starts = [scales * random.standard_normal((256, dim)), random.uniform(0, 1, (64, dim))]
    x = _walked(density, np.concatenate(starts), random)
    mixture = _Mixture(x, np.zeros(len(x)), random)
    for _ in range(8):
        x = mixture.draw(6000, random)
        log_w = density(x) - mixture.log_density(x)
        if not np.isfinite(log_w).any():
            return _Run(0.0, 0.0, False, x)
        effective = _weights(log_w)[1]
        mixture = _Mixture(x, log_w * np.clip(effective / 300, 0.1, 1.0), random)
        if density.late:
            break
    x = mixture.draw(60_000, random)
    log_w = density(x) - mixture.log_density(x)
    ratios = np.exp(np.minimum(log_w, 600))
    weights, effective = _weights(log_w)
    return _Run(
        value=float(ratios.mean()),
        error=float(ratios.std()) / math.sqrt(len(x)),
        good=effective > 3000 and weights.max() < 0.005,
        points=x[random.choice(len(x), 600, p=weights)],
    )


def _walked(density: _Density, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Metropolis walks from wide starts to where there is mass."""
    log_p = density(x)
    step = np.maximum(0.3 * np.abs(x).mean(1, keepdims=True), 0.05)
    for i in range(150):
        proposal = x + step * random.standard_normal(x.shape)
        other = density(proposal)
        accept = np.log(random.uniform(size=len(x))) < other - log_p  # false for -inf - -inf
        x, log_p = np.where(accept[:, None], proposal, x), np.where(accept, other, log_p)
        step = np.where(accept[:, None], step * 1.2, step * 0.9)
        if density.late and i > 30:
            break
    inside = np.isfinite(log_p)
    return x[inside] if inside.any() else x


class _Mixture:
    """A mixture of Student's t around clusters of weighted points."""

    def __init__(self, x: np.ndarray, log_w: np.ndarray, random: np.random.Generator):
        from scipy.cluster.vq import kmeans2

        dim = x.shape[1]
        picks = x[random.choice(len(x), 1500, p=_weights(log_w)[0])]
        spread = picks.std(0) + 1e-9
        k = int(min(12, max(1, len(np.unique(picks, axis=0)) // (5 * dim))))
        centers = picks[random.choice(len(picks), k, replace=False)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty clusters
            _, owner = kmeans2(picks / spread, centers / spread, 12, minit="matrix")
        groups = [picks[owner == c] for c in np.unique(owner)]
        k = len(groups)
        whole = np.cov(picks.T).reshape(dim, dim)
        clusters = [(0.1, picks.mean(0), 1.5 * whole)]
        for group in groups:
            n = len(group)
            cov = np.cov(group.T).reshape(dim, dim) if n > dim + 1 else 0.1 * whole
            lean = min(1.0, 2.0 * dim / n)
            cov = (1 - lean) * cov + lean * np.diag(np.diag(whole)) / k
            clusters.append((0.9 * n / len(picks), group.mean(0), 1.3 * cov))
        shares, means, covariances = zip(*clusters, strict=True)
        self.shares, self.means = np.array(shares), np.stack(means)
        floors = [(1e-12 + 1e-10 * np.trace(cov) / dim) * np.eye(dim) for cov in covariances]
        self.roots = np.linalg.cholesky(np.stack(covariances) + np.stack(floors))

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        which = random.choice(len(self.shares), n, p=self.shares)
        noise = random.standard_normal((n, self.means.shape[1]))
        noise /= np.sqrt(random.chisquare(FREEDOM, (n, 1)) / FREEDOM)
        return self.means[which] + np.einsum("nij,nj->ni", self.roots[which], noise)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        half = (FREEDOM + x.shape[1]) / 2
        constant = math.lgamma(half) - math.lgamma(FREEDOM / 2)
        constant -= 0.5 * x.shape[1] * math.log(FREEDOM * math.pi)
        terms = []
        for share, mean, root in zip(self.shares, self.means, self.roots, strict=True):
            y = np.linalg.solve(root, (x - mean).T)
            height = constant + math.log(share) - np.log(np.diag(root)).sum()
            terms.append(height - half * np.log1p((y**2).sum(0) / FREEDOM))
        return np.logaddexp.reduce(terms, axis=0)
