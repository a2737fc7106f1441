"""The audit of a density: is it of single points, and does it integrate to one?

First `log_prob` must give each point a number that does not depend on the other points of the
batch: otherwise there is no density to integrate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

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
from musigma.audit.integral import OFF, integrate
from musigma.audit.sandbox import FLOATS, Sandbox, TooSlowError, first_form

__all__ = ["audit_density"]

PLACES = (0.3, 0.0, 0.7, 0.05, -0.3, 1.5, -1.5, 5.0, -5.0, 20.0, 100.0, -20.0, 1000.0)
SOLVED = 1e-3  # relative error of a solver that adapts its steps to the batch
STANDARD_ERRORS = 8.0  # of an importance-sampled integral


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
        if not any(o.severity == "bug" for o in _findings(found)):
            found += _check_points(density)
        no_density = (o.severity == "bug" or o.code == "stochastic" for o in _findings(found))
        if any(no_density):
            found.append(Missing("the integral: log_prob is not a function of one point"))
        else:
            found += _check_integral(density)
        return AuditReport.of(name_of(log_prob), (*density.notes, *found))


def _findings(outcomes: list[Outcome]) -> list[Finding]:
    return [o for o in outcomes if isinstance(o, Finding)]


def _check_integral(density: _Density) -> Iterator[Outcome]:
    """Whether the integral is one."""
    how = "quadrature" if density.dim == 1 else "importance weights"
    try:
        value, error, is_sure = integrate(density, density.dim)
    except TooSlowError as late:
        yield Missing(f"the integral: {late}")
        return
    if value == 0:
        raise AuditError("log_prob: it has no mass at any point that was tried")
    yield Facts(details={"integral": value, "error": error})
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
        self.has_nan, self.raises, self.one_by_one = False, 0, False
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

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-densities of points (N, dim), in pieces."""
        value = np.full(len(x), -np.inf)
        within = np.flatnonzero(((x >= self.box[0]) & (x <= self.box[1])).all(1))
        for start in range(0, len(within), 20_000):
            rows = within[start : start + 20_000]
            value[rows] = self._ask(x[rows])
        self.has_nan |= bool(np.isnan(value).any())
        return np.where(np.isnan(value), -np.inf, value)

    def _ask(self, x: np.ndarray) -> np.ndarray:
        if (known := self._tried(x)) is not None:
            return known
        if not self.raises:
            self._find_box()
            return self(x)
        self.raises += 1
        if len(x) == 1 or self.raises > 4000:
            return np.full(len(x), -np.inf)
        return np.concatenate([self._ask(half) for half in np.array_split(x, 2)])

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
