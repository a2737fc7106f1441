r"""The audit of a density: does it integrate to one?

One and two dimensions use adaptive quadrature over the whole line: with :math:`x = \sinh t` an
even grid in t reaches from 1e-9 to 1e9, and tails that fall like a power of x vanish. Peaks are
found first, by climbing from the grid, so that narrow ones get their own points; cells are divided
until the integral is stable, which resolves edges.

More dimensions use importance weights: draws from mixtures of Student's t that are adapted to the
modes give :math:`Z = E_q[p / q]` with its standard error. A Z above one is certain. A Z below one
may be due to a missed mode, so two searches from different starts must agree on a single mode:
where there are several, there may be another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.sandbox import Sandbox

__all__ = ["audit_density"]

SECONDS = 8.0  # of CPU time
OFF = 5e-3  # smallest distance from one that is a finding
REACH = 21.0  # largest t: sinh(21) is 6.6e8
PLACES = (0.3, 0.0, 0.7, 0.05, -0.3, 1.5, -1.5, 5.0, -5.0, 20.0, 100.0, -20.0, 1000.0)
STANDARD_ERRORS = 8.0  # of an importance-sampled integral


def audit_density(log_prob: Any, dim: int) -> AuditReport:
    """Whether exp(log_prob) integrates to one.

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
    """
    if dim < 1:
        raise AuditError(f"dim: expected 1 or more; got {dim}")
    call = log_prob
    if hasattr(log_prob, "log_prob") and callable(log_prob.log_prob):
        call = log_prob.log_prob
    report = ReportBuilder(name_of(log_prob))
    with Sandbox(log_prob) as sandbox, np.errstate(invalid="ignore", over="ignore"):
        density = _Density(sandbox, call, dim, report)
        if dim <= 2:
            value, error, sure = (_line if dim == 1 else _plane)(density)
            how = "quadrature"
        else:
            value, error, sure = _weighted(density)
            how = "importance weights"
    report.details |= {"integral": value, "error": error, "evaluations": density.count}
    if density.nan_inside:
        report.bug(
            "not_finite",
            "log_prob is NaN at points between others that have mass",
            "keep arguments of logarithms above zero, and arguments of inverses in their range",
        )
    elif abs(value - 1) > max(OFF, STANDARD_ERRORS * error):
        if sure:
            report.bug(
                "not_normalised",
                f"it integrates to {value:.5g} ± {error:.1g}, by {how}, not to one"
                + _constant(value, dim),
                "add the missing logarithm: the normalising constant, or a log |det|",
                integral=value,
                error=error,
            )
        else:
            report.unchecked.append(
                f"the integral: {value:.4g}, but there may be more mass elsewhere"
            )
    elif not sure:
        report.unchecked.append(f"the integral: {value:.4g} ± {error:.1g} is not accurate enough")
    else:
        report.checked.append(f"the integral, by {how}: {value:.6g} ± {error:.1g}")
    return report.build()


def _constant(value: float, dim: int) -> str:
    known = {
        "sqrt(2 pi)": math.sqrt(2 * math.pi),
        "2 pi": 2 * math.pi,
        "two": 2.0,
        "sqrt(2)": math.sqrt(2),
        "sqrt(pi)": math.sqrt(math.pi),
        "pi": math.pi,
        "e": math.e,
    }
    for name, size in known.items():
        for power in {1, dim}:
            for exponent, word in ((power, ""), (-power, "1 / ")):
                if math.isclose(value, size**exponent, rel_tol=2e-3):
                    return f": off by {word}{name}" + (f" to the power {power}" * (power > 1))
    return ""


class _Density:
    """A log-density as a function of points (N, dim); -inf where it raises or is NaN."""

    def __init__(
        self, sandbox: Sandbox, call: Callable[..., Any], dim: int, report: ReportBuilder
    ):
        self.sandbox, self.call, self.dim, self.report = sandbox, call, dim, report
        self.count, self.nan_inside, self.began = 0, False, time.process_time()
        self.flat, self.inside, self.raises = False, 0.0, 0
        self.low: np.ndarray | None = None  # the box outside of which it raises, once it has
        self.high: np.ndarray | None = None
        self.dtype = self._form()

    def _form(self) -> torch.dtype:
        """The type that it takes; finds its shape of points, and a point that it takes."""
        reason: AuditError | None = None
        for dtype in (torch.float64, torch.float32):
            self.sandbox.use_dtype(dtype)
            for place in PLACES:
                for flat in (False, True) if self.dim == 1 else (False,):
                    x = torch.full((7, self.dim), place, dtype=dtype)
                    try:
                        points = x[:, 0] if flat else x
                        value = self.sandbox.ask("log_prob", self.call, points)
                        if value.numel() != 7:
                            raise AuditError(
                                f"log_prob: given (7, {self.dim}), expected (7,); got "
                                f"{tuple(value.shape)}"
                            )
                    except AuditError as error:
                        reason = reason or error
                        continue
                    self.flat, self.inside = flat, place
                    if flat:
                        self.report.assumed.append("log_prob takes points as (N,)")
                    if dtype == torch.float32:
                        self.report.assumed.append("it computes in float32 only")
                    return dtype
        raise reason or AuditError("log_prob: it cannot be called")

    def _find_box(self) -> None:
        """Find how far along each axis it can be called."""
        self.low, self.high = np.full(self.dim, -np.inf), np.full(self.dim, np.inf)
        for axis in range(self.dim):
            for sign, ends in ((-1.0, self.low), (1.0, self.high)):

                def accepts(reach: float, axis: int = axis, sign: float = sign) -> bool:
                    x = torch.full((1, self.dim), self.inside, dtype=self.dtype)
                    x[0, axis] += sign * reach
                    try:
                        self.sandbox.call("log_prob", self.call, x[:, 0] if self.flat else x)
                    except AuditError as error:
                        if error.__cause__ is None:
                            raise
                        return False
                    return True

                if accepts(1e9):
                    continue
                near, far = 0.0, 1e9
                for reach in np.logspace(-9, 9, 19):
                    if not accepts(float(reach)):
                        far = float(reach)
                        break
                    near = float(reach)
                for _ in range(60):
                    middle = (near + far) / 2
                    near, far = (middle, far) if accepts(middle) else (near, middle)
                ends[axis] = self.inside + sign * near
        self.report.assumed.append("there is no mass where log_prob raises")

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.process_time() - self.began > SECONDS

    def ends(self, axis: int) -> list[np.ndarray]:
        """The limits along an axis between which it can be called, in t."""
        if self.low is None or self.high is None:
            return []
        both = np.array([self.low[axis], self.high[axis]])
        return [np.arcsinh(both[np.isfinite(both)])]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-densities of points (N, dim), in pieces."""
        parts = [self._ask(x[i : i + 20_000]) for i in range(0, len(x), 20_000)]
        self.count += len(x)
        return np.concatenate(parts) if parts else np.zeros(0)

    def _ask(self, x: np.ndarray) -> np.ndarray:
        if self.low is not None:
            within = ((x >= self.low) & (x <= self.high)).all(1)
            if not within.all():
                value = np.full(len(x), -np.inf)
                if within.any():
                    value[within] = self._ask(x[within])
                return value
        points = torch.from_numpy(np.ascontiguousarray(x)).to(self.dtype)
        try:
            with torch.no_grad():
                value = self.sandbox.call(
                    "log_prob", self.call, points[:, 0] if self.flat else points
                )
        except AuditError as error:
            if error.__cause__ is None:
                raise
            if self.low is None:
                self._find_box()
                return self._ask(x)
            self.raises += 1
            if len(x) == 1 or self.raises > 4000:
                return np.full(len(x), -np.inf)
            half = len(x) // 2  # it raises outside its support
            return np.concatenate([self._ask(x[:half]), self._ask(x[half:])])
        value = self.sandbox.as_tensor("log_prob", value).reshape(-1).numpy()
        if value.shape != (len(x),):
            raise AuditError(f"log_prob: given {tuple(points.shape)}, it returns {value.shape}")
        bad = np.isnan(value)
        if bad.any() and self.dim == 1 and len(x) > 50:
            order = np.argsort(x[:, 0])
            values, nan = value[order], bad[order]
            high = np.nanmax(np.where(nan, -np.inf, values)) if not nan.all() else -np.inf
            near = ~nan & (values > high - 3)
            if near.any():
                first, last = np.flatnonzero(near)[[0, -1]]
                self.nan_inside |= bool(nan[first:last].any())
        return np.where(bad, -np.inf, value)


# --- one and two dimensions --------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


def _cells(density: _Density, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The integral over each box of t, (n, dim) to (n,), by six Gauss points per axis."""
    dim, half = low.shape[1], (high - low) / 2
    grids = np.meshgrid(*[_NODES] * dim, indexing="ij")
    nodes = np.stack([g.ravel() for g in grids], 1)
    weights = np.prod(np.stack(np.meshgrid(*[_WEIGHTS] * dim, indexing="ij")).reshape(dim, -1), 0)
    t = (low + half)[:, None] + half[:, None] * nodes
    log_p = density(np.sinh(t).reshape(-1, dim)).reshape(t.shape[:2])
    log_jacobian = (np.logaddexp(t, -t) - math.log(2)).sum(-1)
    with np.errstate(over="ignore"):
        values = np.exp(np.minimum(log_p + log_jacobian, 600.0))
    return (values * weights).sum(1) * half.prod(1)


def _refined(
    density: _Density, low: np.ndarray, high: np.ndarray, tolerance: float = 2e-5
) -> tuple[float, float]:
    """The integral over boxes, which are halved along every axis until it is stable."""
    dim = low.shape[1]
    done, left = 0.0, 0.0
    coarse = _cells(density, low, high)
    corners = np.stack([c.ravel() for c in np.meshgrid(*[[0, 1]] * dim, indexing="ij")], 1)
    while len(low):
        middle = (low + high) / 2
        lows = np.where(corners[None] == 0, low[:, None], middle[:, None])
        highs = np.where(corners[None] == 0, middle[:, None], high[:, None])
        fine = _cells(density, lows.reshape(-1, dim), highs.reshape(-1, dim))
        fine = fine.reshape(len(low), -1)
        total = fine.sum(1)
        off = np.abs(total - coarse)
        scale = max(1e-300, done + total.sum())
        order = np.argsort(off)
        settled = np.zeros(len(low), bool)  # the smallest errors, up to a small sum
        settled[order] = np.cumsum(off[order]) <= tolerance * scale * 0.1
        settled |= (high - low).max(1) < 1e-13 * (1 + np.abs(low).max(1))
        done += total[settled].sum()
        left += off[settled].sum()
        if density.late or len(low) > 60_000:
            done += total[~settled].sum()
            left += off[~settled].sum()
            break
        low, high = lows[~settled].reshape(-1, dim), highs[~settled].reshape(-1, dim)
        coarse = fine[~settled].reshape(-1)
    return float(done), float(left)


def _line(density: _Density) -> tuple[float, float, bool]:
    points = 4001
    values = []
    for _ in range(2):
        t = np.linspace(-REACH, REACH, points)
        x = np.sinh(t)[:, None]
        log_p = density(x)
        peaks = _climbed(density, x[:, 0], log_p)
        around = [_around(peak, width) for peak, width in peaks]
        edges = np.unique(np.concatenate([t[::8], *around, *density.ends(0)]))
        values.append(_refined(density, edges[:-1, None], edges[1:, None]))
        if abs(values[-1][0] - 1) < 1e-4 and values[-1][1] < 1e-3:
            return *values[-1], True
        points = 4 * points + 3  # a finer grid at other points, before it is reported
    (first, _), (second, error) = values
    if second == 0:
        raise AuditError("log_prob: it has no mass anywhere between -6e8 and 6e8")
    agrees = abs(first - second) <= 1e-3 * max(1.0, second)
    return second, max(error, abs(first - second)), agrees and error < 0.1 * OFF * max(1, second)


def _climbed(density: _Density, x: np.ndarray, log_p: np.ndarray) -> list[tuple[float, float]]:
    """Local maxima between the points of a grid, by golden section, with their widths."""
    inner = np.flatnonzero((log_p[1:-1] >= log_p[:-2]) & (log_p[1:-1] >= log_p[2:])) + 1
    inner = inner[np.isfinite(log_p[inner])]
    inner = inner[np.argsort(-log_p[inner])][:40]
    found = []
    ratio = (math.sqrt(5) - 1) / 2
    a, b = x[inner - 1], x[inner + 1]
    for _ in range(60):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        upper = density(c[:, None]) >= density(d[:, None])
        a, b = np.where(upper, a, c), np.where(upper, d, b)
    for peak in (a + b) / 2:
        height = density(np.array([[peak]]))[0]
        widths = np.logspace(-12, 8, 81) * (1 + 0 * abs(peak))
        drop = height - density((peak + widths)[:, None])
        beyond = np.flatnonzero(drop > 0.5)
        found.append((float(peak), float(widths[beyond[0]]) if len(beyond) else 1.0))
    return found


def _around(peak: float, width: float) -> np.ndarray:
    steps = width * np.array([0, 0.5, 1, 2, 4, 8, 16, 64, 256])
    return np.clip(np.arcsinh(np.concatenate([peak - steps, peak + steps])), -REACH, REACH)


def _plane(density: _Density) -> tuple[float, float, bool]:
    values = []
    for n in (48, 67):
        edges = np.linspace(-REACH, REACH, n + 1)
        extra: list[list[float]] = [[], []]
        for mode, width in _modes_of_plane(density, n):
            for axis in (0, 1):
                extra[axis] += _around(mode[axis], width).tolist()
        axes = [
            np.unique(np.concatenate([edges, extra[axis], *density.ends(axis)])) for axis in (0, 1)
        ]
        i, j = np.meshgrid(np.arange(len(axes[0]) - 1), np.arange(len(axes[1]) - 1), indexing="ij")
        low = np.stack([axes[0][i.ravel()], axes[1][j.ravel()]], 1)
        high = np.stack([axes[0][i.ravel() + 1], axes[1][j.ravel() + 1]], 1)
        values.append(_refined(density, low, high, 1e-3))
        if abs(values[-1][0] - 1) < 1e-3 and values[-1][1] < OFF:
            return *values[-1], True
        if density.late:
            break
        density.began = time.process_time()  # the second grid has its own time
    if values[-1][0] == 0:
        raise AuditError("log_prob: it has no mass at any point tried")
    value, error = values[-1]
    agrees = len(values) > 1 and abs(values[0][0] - value) <= 5e-3 * max(1.0, value)
    sure = agrees and error < 2 * OFF * max(1.0, value) and max(v[1] for v in values) < 0.05
    return value, max(error, abs(values[0][0] - value)), sure


def _modes_of_plane(density: _Density, n: int) -> list[tuple[np.ndarray, float]]:
    """Local maxima, by a shrinking pattern search from the highest points of a grid."""
    t = np.linspace(-0.6 * REACH, 0.6 * REACH, 2 * n + 1)
    grid = np.stack(np.meshgrid(np.sinh(t), np.sinh(t), indexing="ij"), -1)
    log_p = density(grid.reshape(-1, 2)).reshape(len(t), len(t))
    inside = log_p[1:-1, 1:-1]
    around = np.stack(
        [
            log_p[1 + i : len(t) - 1 + i, 1 + j : len(t) - 1 + j]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
    )
    tops = np.argwhere((inside >= around.max(0)) & np.isfinite(inside)) + 1
    tops = tops[np.argsort(-log_p[tops[:, 0], tops[:, 1]])][:4]
    directions = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]])
    modes = []
    for i, j in tops:
        at, step = grid[i, j], float(np.abs(grid[i + 1, j + 1] - grid[i, j]).max())
        best = log_p[i, j]
        for _ in range(200):
            tried = at + step * directions
            values = density(tried)
            if values.max() > best:
                best, at = values.max(), tried[values.argmax()]
            else:
                step /= 2
            if step < 1e-10 * (1 + np.abs(at).max()):
                break
        widths = np.logspace(-8, 6, 57)
        drop = best - density(at + widths[:, None] * np.array([[1.0, 0.0]]))
        other = best - density(at + widths[:, None] * np.array([[0.0, 1.0]]))
        beyond = np.flatnonzero(np.maximum(drop, other) > 0.5)
        modes.append((at, float(widths[beyond[0]]) if len(beyond) else 1.0))
    return modes


# --- more dimensions ---------------------------------------------------------------------------


class _Run(NamedTuple):
    value: float
    error: float
    good: bool
    points: np.ndarray  # draws from the density
    density: _Density


def _weighted(density: _Density) -> tuple[float, float, bool]:
    runs = [_search(density, seed) for seed in (0, 1)]
    value, error, good, *_ = max(runs, key=lambda run: (run.good, -run.error))
    if value == 0:
        raise AuditError("log_prob: no mass was found")
    both = math.hypot(runs[0][1], runs[1][1])
    agrees = abs(runs[0][0] - runs[1][0]) <= 6 * both + 0.01 * value
    if value > 1:  # importance weights never overestimate
        return value, error, good
    return value, error, good and runs[0][2] and runs[1][2] and agrees and _is_unimodal(runs)


def _is_unimodal(runs: list[_Run]) -> bool:
    """Whether the density never falls far on a line between two draws."""
    for run in runs:
        half = len(run.points) // 2
        a, b = run.points[:half], run.points[half : 2 * half]
        ends = np.minimum(run.density(a), run.density(b))
        for share in (0.25, 0.5, 0.75):
            if (run.density((1 - share) * a + share * b) < ends - 2.0).any():
                return False
    return True


def _search(density: _Density, seed: int) -> _Run:
    """Adaptive importance sampling: the estimate, its standard error, its reliability."""
    random = np.random.default_rng(seed)
    dim = density.dim
    scales = 10.0 ** random.uniform(-1.5, 1.5, 256)
    starts = scales[:, None] * random.standard_normal((256, dim))
    starts = np.concatenate([starts, random.uniform(0, 1, (64, dim))])
    points = _walked(density, starts, random)
    mixture = _Mixture(points, np.zeros(len(points)), random)
    for _ in range(8):
        x = mixture.draw(6000, random)
        log_w = density(x) - mixture.log_density(x)
        if not np.isfinite(log_w).any():
            return _Run(0.0, 0.0, False, x, density)
        weights = np.exp(log_w - log_w.max())
        effective = weights.sum() ** 2 / (weights**2).sum()
        tempered = log_w if effective > 300 else log_w * max(0.1, effective / 300)
        mixture = _Mixture(x, tempered, random)
        if density.late:
            break
    x = mixture.draw(60_000, random)
    log_w = density(x) - mixture.log_density(x)
    with np.errstate(over="ignore"):
        weights = np.exp(np.minimum(log_w, 600))
    value, error = float(weights.mean()), float(weights.std() / math.sqrt(len(weights)))
    share = float(weights.max() / max(weights.sum(), 1e-300))
    effective = float(weights.sum() ** 2 / max((weights**2).sum(), 1e-300))
    known = np.exp(log_w - log_w.max())
    points = x[random.choice(len(x), 600, p=known / known.sum())]
    return _Run(value, error, effective > 3000 and share < 0.005, points, density)


def _walked(density: _Density, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Metropolis walks from wide starts to where there is mass."""
    log_p = density(x)
    step = np.maximum(0.3 * np.abs(x).mean(1, keepdims=True), 0.05)
    for i in range(150):
        proposal = x + step * random.standard_normal(x.shape)
        other = density(proposal)
        with np.errstate(invalid="ignore"):
            accept = np.log(random.uniform(size=len(x))) < other - log_p
        accept |= np.isfinite(other) & ~np.isfinite(log_p)
        x, log_p = np.where(accept[:, None], proposal, x), np.where(accept, other, log_p)
        step = np.where(accept[:, None], step * 1.2, step * 0.9)
        if density.late and i > 30:
            break
    inside = np.isfinite(log_p)
    return x[inside] if inside.any() else x


class _Mixture:
    """A mixture of Student's t with 5 degrees of freedom, around clusters of weighted points."""

    def __init__(self, x: np.ndarray, log_w: np.ndarray, random: np.random.Generator):
        weights = np.where(np.isfinite(log_w), np.exp(log_w - log_w[np.isfinite(log_w)].max()), 0)
        weights = weights / weights.sum()
        dim = x.shape[1]
        picks = x[random.choice(len(x), 1500, p=weights)]
        k = int(min(12, max(1, len(np.unique(picks, axis=0)) // (5 * dim))))
        centres = picks[random.choice(len(picks), k, replace=False)]
        spread = picks.std(0) + 1e-9
        owner = np.zeros(len(picks), int)
        for _ in range(12):
            owner = (((picks[:, None] - centres) / spread) ** 2).sum(-1).argmin(1)
            centres = np.stack(
                [picks[owner == c].mean(0) if (owner == c).any() else centres[c] for c in range(k)]
            )
        whole = np.cov(picks.T).reshape(dim, dim) + 1e-12 * np.eye(dim)
        self.means, factors, shares = [picks.mean(0)], [1.5 * whole], [0.1]
        for c in range(k):
            members = picks[owner == c]
            n = len(members)
            if not n:
                continue
            cov = np.cov(members.T).reshape(dim, dim) if n > dim + 1 else 0.1 * whole
            lean = min(1.0, 2.0 * dim / n)
            cov = (1 - lean) * cov + lean * np.diag(np.diag(whole)) / k
            self.means.append(centres[c])
            factors.append(1.3 * cov + 1e-12 * np.eye(dim))
            shares.append(0.9 * n / len(picks))
        self.shares = np.array(shares) / sum(shares)
        self.roots = [
            np.linalg.cholesky(f + 1e-10 * np.trace(f) / dim * np.eye(dim)) for f in factors
        ]
        self.dim = dim

    def draw(self, n: int, random: np.random.Generator) -> np.ndarray:
        which = random.choice(len(self.shares), n, p=self.shares)
        noise = random.standard_normal((n, self.dim))
        noise /= np.sqrt(random.chisquare(5, (n, 1)) / 5)
        roots, means = np.stack(self.roots), np.stack(self.means)
        return means[which] + np.einsum("nij,nj->ni", roots[which], noise)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        d, nu = self.dim, 5.0
        constant = (
            math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - 0.5 * d * math.log(nu * math.pi)
        )
        terms = []
        for share, mean, root in zip(self.shares, self.means, self.roots, strict=True):
            y = np.linalg.solve(root, (x - mean).T)
            terms.append(
                math.log(share)
                + constant
                - np.log(np.diag(root)).sum()
                - 0.5 * (nu + d) * np.log1p((y**2).sum(0) / nu)
            )
        return np.logaddexp.reduce(terms, axis=0)
