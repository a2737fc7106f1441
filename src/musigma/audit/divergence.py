r"""The KL of what is sampled, and the KL that a code computes, at the same points.

For a sampler z = loc + scale e with normal noise e, and a prior with density p,

    T(m, b) = E_e[log q(z) - log p(z)],    log q(z) = log N(e; 0, 1) - log |scale|,

where a flow behind z is a part of p. The mean is over points e with exactly the mean and variance
of normal noise, so that T is exact for normal priors; for others they are many.
The code's value F is regressed on T: F = slope T + intercept. A KL that takes draws is averaged
over the same points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import TooSlowError, first
from musigma.audit.vae_state import LOG_2PI, FullPosterior, Points, Posterior, Prior, VAEAudit

__all__ = ["LOG_2PI", "OFF", "Comparison", "Regression", "noise_points", "regress"]

OFF = 0.02  # residual of the KL, relative to 1 + T, from which it is a bug
CHANCE_ROWS, CHANCE_SEEDS = 2048, 6


class Regression(NamedTuple):
    """F = slope T + intercept, in nats.

    `residual` is the largest (F - slope T - intercept) / (abs(slope) (1 + T)), at index `worst`.
    """

    slope: float
    intercept: float
    residual: float
    worst: int


def regress(f: Tensor, t: Tensor) -> Regression:
    """The regression of F on T (P,), each point weighted by 1 / (1 + T).

    Example:
        >>> t = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
        >>> fit = regress(0.5 * t + 1, t)
        >>> round(fit.slope, 9), round(fit.intercept, 9), fit.residual < 1e-12
        (0.5, 1.0, True)
    """
    weight = 1 / (1 + t.abs())
    design = torch.stack([t, torch.ones_like(t)], 1) * weight[:, None]
    solved = torch.linalg.lstsq(design, (f * weight)[:, None], driver="gelsd").solution[:, 0]
    slope, intercept = float(solved[0]), float(solved[1])
    off = ((f - slope * t - intercept) * weight).abs() / max(abs(slope), 1e-300)
    if float(t.max() - t.min()) < 1e-9:  # nothing to regress on
        off = torch.full_like(t, math.inf)
    worst = int(off.argmax())
    return Regression(slope, intercept, float(off[worst]), worst)


def noise_points(d: int, n: int, seed: int = 0) -> Tensor:
    """Points e (n, D), n even, with mean 0 and variance 1; uncorrelated if n is at least 2 D.

    Example:
        >>> e = noise_points(2, 8)
        >>> torch.allclose(e.T @ e / 8, torch.eye(2, dtype=torch.float64))
        True
    """
    if d <= 1000:
        u = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(
            n // 2, dtype=torch.float64
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(n // 2, d, generator=generator, dtype=torch.float64)
    half = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
    if d <= n // 2:
        half = torch.linalg.qr(half)[0] * (n // 2) ** 0.5
    half = half / (half**2).mean(0).sqrt()
    return torch.cat([half, -half])


class CodeKL:
    """A code's KL as a function of flat heads and z, with one number for each row.

    `at` is a mean, second output and z (D,), at which it can be called. `by_chance` is true if it
    draws itself, `alone` is false if the rows of a batch change each other's values.

    Raises:
        AuditError: If it raises for every input, or returns something other than a scalar, one
            number per example or one per dimension.
    """

    def __init__(self, audit: VAEAudit, q: Posterior | FullPosterior, at: tuple[Tensor, ...]):
        self.kl, self.sandbox, self.sampler = audit.functions["kl"], audit.sandbox, q.sampler
        self.prior, self.given = audit.prior, audit.kl_arguments
        self.copies, self.rounding, self.alone = 1, 1e-6, True
        self.undo: Callable[[], None] | None = None  # for a KL that keeps a count, say
        try:
            self._raw(*(t[None] for t in at))
        except AuditError:
            if audit.rows in (None, 1):
                raise
            self.copies = audit.rows or 1  # identical rows in one call
            self._raw(*(t.expand(self.copies, -1) for t in at))
        self.kind = self._kind(at)
        one, again = self._once(at, 1), self._once(at, 1)
        if one != again:
            self.undo = self.sandbox.snapshot()
            if (one := self._once(at, 1)) == (again := self._once(at, 1)):
                audit.assumed.append("the KL counts its calls; its state was restored before each")
            else:
                self.undo = None
        values = [one, again, self._once(at, 2), self._once(at, 3)]
        spread = max(values) - min(values)
        self.by_chance = self.given == 2 and spread > 1e-6 * (1 + max(map(abs, values)))
        self.error, self._summed = 0.0, 1  # standard error; rows that a call with many sums over
        if self.by_chance:
            fewer = self._total(at, CHANCE_ROWS // 16)
            sums = self.kind != "scalar" or abs(self._many(at)[0]) > 4 * abs(fewer)
            self._summed = CHANCE_ROWS if sums else 1

    def _raw(self, *heads: Tensor) -> Tensor:
        """Its result for mean, second output and z."""
        s, n = self.sampler, len(heads[0])
        if self.undo:
            self.undo()
        more = list(self.prior.pushed(heads[2])) if self.given == 5 else []
        shapes = (s.latent, s.second, s.latent, s.latent, ())
        given = [
            self.sandbox.to_input(t).reshape(n, *shape).clone()
            for t, shape in zip([*heads, *more], shapes[: 3 + len(more)], strict=True)
        ]
        value = first(self.sandbox.call("kl", self.kl, *given[: self.given]))
        single = (torch.float32, np.float32)
        if getattr(value, "dtype", None) in single or self.sandbox.dtype == torch.float32:
            self.rounding = 1e-4
        return self.sandbox.as_tensor("kl", value)

    def _total(self, row: tuple[Tensor, ...], rows: int, seed: int = 0) -> float:
        """The sum of its results for identical rows; NaN if it refuses a negative scale."""
        self.sandbox.reseed(seed)
        try:
            return float(self._raw(*(t.expand(rows, -1) for t in row)).sum())
        except AuditError as error:
            if isinstance(error, TooSlowError) or (row[1] > 0).all():
                raise
            return math.nan

    def _kind(self, at: tuple[Tensor, ...]) -> str:
        d = self.sampler.d
        n = self.copies if self.copies > 1 else (5 if d != 5 else 7)
        try:
            value = self._raw(*(t.expand(n, -1) for t in at))
        except AuditError:
            return "scalar of one example"
        sizes = {1: "scalar", d: "per dimension, reduced over the batch", n * d: "per dimension"}
        if value.numel() == n and n in value.shape:
            return "per example"
        if value.numel() in sizes:
            return sizes[value.numel()]
        if value.ndim and value.shape[0] == n and d % (value.numel() // n) == 0:
            return "per group of dimensions"
        raise AuditError(
            f"kl: given {n} examples of {d} latents, expected a scalar, one number per example or "
            f"one per dimension; got shape {tuple(value.shape)}"
        )

    def _once(self, row: tuple[Tensor, ...], seed: int = 0) -> float:
        return self._total(row, self.copies, seed) / (1 if self.kind == "scalar" else self.copies)

    def _many(self, row: tuple[Tensor, ...]) -> tuple[float, float]:
        """The average of calls with many rows, and its standard error."""
        values = [self._total(row, CHANCE_ROWS, seed) for seed in range(CHANCE_SEEDS)]
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(CHANCE_SEEDS))

    def values(self, at: Points, e: Tensor) -> Tensor:
        """F at points (P,), averaged over draws with noise e (N, D) if it takes z."""
        if self.by_chance:
            fits = [self._many(row) for row in zip(at.mean, at.second, at.loc, strict=True)]
            self.error = max(error for _, error in fits) * 3 / self._summed
            return torch.tensor([value / self._summed for value, _ in fits], dtype=torch.float64)
        if self.given == 2:
            return self.at_draws(at.mean, at.second, at.loc)
        return torch.stack([self.at_draws(at.mean, at.second, z) for z in at.draws(e)]).mean(0)

    def at_draws(self, *heads: Tensor) -> Tensor:
        """F of each row of mean, second and z, by one call if that gives the same as many."""
        n = len(heads[0])
        rows = list(zip(*heads, strict=True))
        if self.kind in ("per example", "per dimension") and self.copies == 1 and n > 4:
            with suppress(AuditError):
                value = self._raw(*heads).reshape(n, -1).sum(1)
                some = [0, n // 2, n - 1]
                single = torch.tensor([self._once(rows[i]) for i in some], dtype=torch.float64)
                if torch.allclose(value[some], single, 1e-4, 1e-6, equal_nan=True):
                    return value
                ratio = (value[some] * single).sum() / single.square().sum()  # as of a mean
                same = torch.allclose(value[some], ratio * single, 1e-2, 1e-2, equal_nan=True)
                self.alone = self.alone and same
        return torch.tensor([self._once(row) for row in rows], dtype=torch.float64)

    def growth(self, mean: Tensor, second: Tensor, z: Tensor) -> dict[int, float] | None:
        """F of identical examples over that of one, by their number; None if it is unreduced.

        A sum gives the number itself, a mean 1. Differences to a smaller mean are compared, so
        that constants do not matter.
        """
        if self.kind != "scalar" or self.copies > 1 or self.by_chance:
            return None

        def step(n: int) -> float:
            large = self._total((mean + 1, second, z + 1), n)
            return large - self._total((0.5 * mean, second, z - 0.5 * mean), n)

        one = step(1)
        return {n: step(n) / one for n in (2, 4, 8)} if one else None


class Comparison:
    """The code's KL F and that of what is sampled, T, at some points.

    `e` are the points of the noise, and residuals below `tight` rounding or chance.
    """

    f: Tensor
    t: Tensor

    def __init__(self, audit: VAEAudit, q: Posterior | FullPosterior):
        self.at, self.prior, d = q.points(audit.prior), audit.prior, q.sampler.d
        w = int(self.at.second.amin(1).argmax())
        self.code = CodeKL(audit, q, (self.at.mean[w], self.at.second[w], self.at.loc[w]))
        self.error = 0.0
        exact = self.prior.normal or self.code.given > 2
        few = 2 * d if self.at.scale.ndim > 2 else 2 if d > 1000 else 16 - 8 * self.prior.normal
        many = max(2, min(4096, 40_000_000 // (len(self.at.loc) * d) // 2 * 2))
        self.e = noise_points(d, few if exact else many)
        self.f, self.t = self.code.values(self.at, self.e), self.true()
        if not exact:
            other = self.true(e=noise_points(d, many, seed=1))
            self.error = 4 * float(
                ((other - self.t) / (1 + self.t.abs())).nan_to_num(0).abs().max()
            )
        self.fit = Regression(math.nan, math.nan, math.inf, 0)

    def true(
        self, at: Points | None = None, e: Tensor | None = None, prior: Prior | None = None
    ) -> Tensor:
        """T (P,), by default at the points of the comparison."""
        at, e = self.at if at is None else at, self.e if e is None else e
        return (at.log_q(e) - (prior or self.prior).log_prob(at.draws(e))).mean(0)

    def keep(self, usable: Tensor) -> None:
        """Drop the other points."""
        self.at, self.f, self.t = self.at[usable], self.f[usable], self.t[usable]

    def measure(self, audit: VAEAudit, q: Posterior | FullPosterior) -> None:
        """Regress F on T."""
        f, t, s = self.f[self.at.inside], self.t[self.at.inside], q.sampler
        self.fit, copies = regress(f, t), self.code.copies
        if copies > 1 and abs(self.fit.slope / copies - 1) < 1e-3:
            self.f = self.f / copies
            self.fit = regress(f / copies, t)
        slope = audit.kl_slope = self.fit.slope
        rounding = max(1e-5, 50 * self.code.rounding, 200 * s.rounding, 1.5 * s.scale_error)
        loose = 0.05 * (s.mode == "moments" and q.curve is not None and not q.curve.named)
        slack = 8 * self.code.error / max(abs(slope), 1e-300) + 20 * q.error
        self.tight = rounding + loose + slack + self.error

    @property
    def fits(self) -> bool:
        """Whether F is a multiple of T, plus a constant."""
        return self.fit.residual <= max(OFF, self.tight) and self.fit.slope != 0

    def numbers(self, i: int) -> dict[str, Any]:
        """Both values at a point, and its position."""
        position = {"mean": self.at.mean[i, 0], "second": self.at.second[i, 0]}
        values = {**position, "kl": self.f[i], "expected": self.t[i]}
        return {name: float(value) for name, value in values.items()}
