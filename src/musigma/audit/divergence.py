r"""The KL that a code computes, by regression on the KL of what is sampled.

For a sampler with location mu and standard deviation sigma, and a prior N(mu_p, sigma_p²),

    T(m, b) = sum log(sigma_p / sigma) + (sigma² + (mu - mu_p)²) / (2 sigma_p²) - 1/2.

The code's value F is regressed on T over a grid of head values: F = slope T + intercept. If there
is a residual, F is not a multiple of T, and the regression is repeated for every other reading of
the second tensor, to find the one that F was written for, and for single terms, to find the wrong
one.
A KL that takes draws is averaged over them by Gauss-Hermite quadrature, which leaves no
randomness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sampler import Sampler
from musigma.audit.sandbox import TooSlowError, first

__all__ = ["Divergence", "Regression", "formula", "gaussian_kl", "regress"]

NODES = 10
CHANCE_ROWS, CHANCE_SEEDS = 2048, 6


def gaussian_kl(loc: Tensor, sigma: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
    """T of the module's docstring, in nats: loc and sigma (P, D), prior a pair of (D,)."""
    mean, std = prior
    kl = (std / sigma.abs()).log() + (sigma**2 + (loc - mean) ** 2) / (2 * std**2) - 0.5
    return kl.sum(-1)


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


class Divergence:
    """A code's KL as a function of flat heads and z, with one number for each row.

    `at` is a mean, second output and z (D,), at which it can be called.

    Raises:
        AuditError: If it raises for every input, or returns something other than a scalar, one
            number per example or one per dimension.
    """

    def __init__(
        self,
        kl: Callable[..., Any],
        sampler: Sampler,
        uses_sample: bool,
        example_rows: int | None,
        at: tuple[Tensor, Tensor, Tensor],
    ):
        self.kl, self.sampler, self.uses_sample = kl, sampler, uses_sample
        self.copies = 1  # identical rows in one call
        self.rounding = 1e-6
        try:
            self._raw(*(t[None] for t in at))
        except AuditError:
            if example_rows in (None, 1):
                raise
            self.copies = example_rows
            self._raw(*(t.expand(example_rows, -1) for t in at))
        self.kind = self._kind(at)
        values = [self._once(at, seed) for seed in (1, 1, 2, 3)]
        spread = max(values) - min(values)
        self.by_chance = not uses_sample and spread > 1e-6 * (1 + max(map(abs, values)))
        self.error = 0.0  # standard error of a value, where chance is left in it
        self._summed = 1  # rows that a call with many sums over
        if self.by_chance:
            fewer = self._total(at, CHANCE_ROWS // 16)
            sums = self.kind != "scalar" or abs(self._many(at)[0]) > 4 * abs(fewer)
            self._summed = CHANCE_ROWS if sums else 1

    def _raw(self, *heads: Tensor) -> Tensor:
        """Its result for mean, second output and z, for all of the latents or half of them."""
        sandbox, s, given = self.sampler.sandbox, self.sampler, []
        for t, shape in zip(heads, (s.latent, s.second, s.latent), strict=True):
            shape = (*shape[:-1], -1) if shape else ()
            given.append(sandbox.to_input(t).reshape(len(t), *shape).clone())
        value = first(sandbox.call("kl", self.kl, *given[: 2 + self.uses_sample]))
        single = (torch.float32, np.float32)
        if getattr(value, "dtype", None) in single or sandbox.dtype == torch.float32:
            self.rounding = 1e-4
        return sandbox.as_tensor("kl", value)

    def _total(self, row: tuple[Tensor, ...], rows: int, seed: int = 0) -> float:
        """The sum of its results for identical rows; NaN if it refuses a negative scale."""
        self.sampler.sandbox.reseed(seed)
        try:
            return float(self._raw(*(t.expand(rows, -1) for t in row)).sum())
        except AuditError as error:
            if isinstance(error, TooSlowError) or (row[1] > 0).all():
                raise
            return math.nan

    def _kind(self, at: tuple[Tensor, Tensor, Tensor]) -> str:
        d = self.sampler.d
        n = self.copies if self.copies > 1 else (5 if d != 5 else 7)
        try:
            value = self._raw(*(t.expand(n, -1) for t in at))
        except AuditError:
            return "scalar of one example"
        if value.numel() == 1:
            return "scalar"
        if value.numel() == n and n in value.shape:
            return "per example"
        if value.numel() == n * d:
            return "per dimension"
        if value.numel() == d:
            return "per dimension, reduced over the batch"
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

    def values(self, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor) -> Tensor:
        """F at points (P,): heads mean (P, D) and second (P, E), sampled loc and sigma (P, D)."""
        if self.by_chance:
            fits = [self._many(row) for row in zip(mean, second, loc, strict=True)]
            self.error = max(error for _, error in fits) * 3 / self._summed
            return torch.tensor([value / self._summed for value, _ in fits], dtype=torch.float64)
        if not self.uses_sample:
            return self.at_draws(mean, second, loc)
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        values = [self.at_draws(mean, second, loc + sigma * float(node)) for node in nodes]
        return torch.from_numpy(weights / weights.sum()) @ torch.stack(values)

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

    def by_latents(self, mean: Tensor, second: Tensor, z: Tensor) -> float | None:
        """F of half of the latents over that of all; None if it is unknown.

        A sum gives one half, a mean 1.
        """
        s = self.sampler
        if not s.latent or s.latent[-1] % 2 or s.second != s.latent or self.copies > 1:
            return None

        def total(d: int, shift: float) -> float:
            row = (mean + shift, second, z + shift)
            return self._total(tuple(t[:1].expand(d) for t in row), 1)

        try:
            half, whole = (total(d, 1.0) - total(d, 0.0) for d in (s.d // 2, s.d))
        except AuditError:
            return None
        return half / whole if whole else None


_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp(b)": torch.exp,
    "exp(2b)": lambda b: (2 * b).exp(),
    "exp(b/2)": lambda b: (b / 2).exp(),
    "b^2": lambda b: b**2,
    "exp(-b)": lambda b: (-b).exp(),
    "exp(4b)": lambda b: (4 * b).exp(),
    "b^4": lambda b: b**4,
    "softplus(b)^2": lambda b: F.softplus(b) ** 2,
    "softplus(b)": F.softplus,
    "b": lambda b: b,
    "log|b|": lambda b: b.abs().log(),
    "log softplus(b)": lambda b: F.softplus(b).log(),
}


def formula(f: Tensor, mean: Tensor, second: Tensor) -> str | None:
    """F (P,) of one latent as a formula in m and b (P,); None if it is not a sum of known terms.

    Example:
        >>> m, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).double()
        >>> formula(0.5 * (m**2 + b.exp() - b - 1), m, b)
        '0.5 m^2 + 0.5 exp(b) - 0.5 b - 0.5'
    """
    reach = float((f - f.mean()).abs().max())
    columns = {name: term(second) for name, term in _TERMS.items()}
    finite = [name for name, column in columns.items() if column.isfinite().all()]
    for pair in itertools.combinations(finite, 2):
        names = ["m^2", "m", *pair, ""]
        given = [mean**2, mean, *(columns[name] for name in pair), torch.ones_like(mean)]
        design = torch.stack(given, 1)
        size = design.abs().amax(0).clamp(min=1e-300)
        solved = torch.linalg.lstsq(design / size, f[:, None], driver="gelsd", rcond=1e-12)
        weights = solved.solution[:, 0]
        if (design / size @ weights - f).abs().max() > 1e-6 * reach:
            continue
        terms = ""
        for name, c in zip(names, (weights / size).tolist(), strict=True):
            if abs(c) >= 1e-6:
                number = "" if abs(abs(c) - 1) < 1e-6 and name else f"{abs(c):.4g}"
                terms += f" {'-' if c < 0 else '+'} " + " ".join(filter(None, (number, name)))
        return terms.strip().removeprefix("+ ")
    return None
