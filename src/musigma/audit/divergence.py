r"""The KL that a code computes, by regression on the KL of what is sampled.

For a sampler with location mu and standard deviation sigma, and a prior N(mu_p, sigma_p²),

    T(m, b) = sum log(sigma_p / sigma) + (sigma² + (mu - mu_p)²) / (2 sigma_p²) - 1/2.

The code's value F is regressed on T over a grid of heads: F = slope T + intercept. If there is a
residual, F is no multiple of T, and the regression is repeated for every other reading of the
second tensor, to find the one that F was written for, and for single terms, to find the wrong one.
A KL that takes draws is averaged over them by Gauss-Hermite quadrature, which leaves no
randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox
from musigma.audit.scales import READINGS

__all__ = ["Divergence", "Regression", "formula", "gaussian_kl", "read", "regress"]

NODES = 10
CHANCE_ROWS, CHANCE_SEEDS = 2048, 6


def gaussian_kl(loc: Tensor, sigma: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
    """T of the module's docstring, in nats: loc and sigma (P, D), prior a pair of (D,)."""
    mean, std = prior
    kl = (std / sigma.abs()).log() + (sigma**2 + (loc - mean) ** 2) / (2 * std**2) - 0.5
    return kl.sum(-1)


@dataclass(frozen=True)
class Regression:
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
    """A code's KL as a function of flat heads, with one number for each row.

    `at` is a mean, second output and z (D,), at which it can be called.

    Raises:
        AuditError: If it raises for every input, or returns something other than a scalar, one
            number per example or one per dimension.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        kl: Callable[..., Any],
        latent: Sequence[int],
        second: Sequence[int],
        uses_sample: bool,
        example_rows: int | None,
        at: tuple[Tensor, Tensor, Tensor],
    ):
        self.sandbox, self.kl, self.uses_sample = sandbox, kl, uses_sample
        self.latent, self.second = tuple(latent), tuple(second)
        self.d = math.prod(self.latent)
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
        values = [float(self._once(*at, seed)) for seed in (1, 1, 2, 3)]
        spread = max(values) - min(values)
        self.by_chance = not uses_sample and spread > 1e-6 * (1 + max(map(abs, values)))
        self.error = 0.0  # standard error of a value, where chance is left in it
        self._factor = self._chance_factor(at) if self.by_chance else 1.0

    def _raw(
        self,
        mean: Tensor,
        second: Tensor,
        z: Tensor | None,
        *,
        latent: Sequence[int] | None = None,
    ) -> Tensor:
        n, dtype = len(mean), self.sandbox.dtype
        latent = self.latent if latent is None else latent
        same = latent != self.latent and self.second == self.latent
        given = [self.sandbox.to_input(mean).reshape(n, *latent).clone()]
        given.append(
            self.sandbox.to_input(second).reshape(n, *(latent if same else self.second)).clone()
        )
        if self.uses_sample and z is not None:
            given.append(self.sandbox.to_input(z).reshape(n, *latent).clone())
        value = self.sandbox.call("kl", self.kl, *given)
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if getattr(value, "dtype", None) in (torch.float32, np.float32) or dtype == torch.float32:
            self.rounding = 1e-4
        return self.sandbox.as_tensor("kl", value)

    def _kind(self, at: tuple[Tensor, Tensor, Tensor]) -> str:
        n = self.copies if self.copies > 1 else (5 if self.d != 5 else 7)
        try:
            value = self._raw(*(t.expand(n, -1) for t in at))
        except AuditError:
            return "scalar of one example"
        if value.numel() == 1:
            return "scalar"
        if value.numel() == n and n in value.shape:
            return "per example"
        if value.numel() == n * self.d:
            return "per dimension"
        if value.numel() == self.d:
            return "per dimension, reduced over the batch"
        if value.ndim and value.shape[0] == n and self.d % (value.numel() // n) == 0:
            return "per group of dimensions"
        raise AuditError(
            f"kl: given {n} examples of {self.d} latents, expected a scalar, one number per "
            f"example or one per dimension; got shape {tuple(value.shape)}"
        )

    def _once(self, mean: Tensor, second: Tensor, z: Tensor | None, seed: int = 0) -> Tensor:
        self.sandbox.reseed(seed)
        rows = self.copies
        given = [None if t is None else t.expand(rows, -1) for t in (mean, second, z)]
        value = self._raw(given[0], given[1], given[2]).sum()  # pyright: ignore
        return value / rows if self.kind not in ("scalar",) else value

    def _chance_factor(self, at: tuple[Tensor, Tensor, Tensor]) -> float:
        """The value of a call with many rows over that of the average row."""
        if self.kind != "scalar":
            return float(CHANCE_ROWS)
        many = self._many(*at)[0]
        few = sum(float(self._once(*at, seed)) for seed in range(200)) / 200
        ratio = abs(many / few) if few else 1.0
        return float(CHANCE_ROWS) if ratio > math.sqrt(CHANCE_ROWS) else 1.0

    def _many(self, mean: Tensor, second: Tensor, z: Tensor | None) -> tuple[float, float]:
        values = []
        for seed in range(CHANCE_SEEDS):
            self.sandbox.reseed(seed)
            rows = [t if t is None else t.expand(CHANCE_ROWS, -1) for t in (mean, second, z)]
            values.append(float(self._raw(rows[0], rows[1], rows[2]).sum()))  # pyright: ignore
        both = torch.tensor(values)
        return float(both.mean()), float(both.std() / math.sqrt(CHANCE_SEEDS))

    def values(self, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor) -> Tensor:
        """F at points (P,): heads mean (P, D) and second (P, E), sampled loc and sigma (P, D)."""
        if self.by_chance:
            fits = [
                [v / self._factor for v in self._many(mean[i], second[i], None)]
                for i in range(len(mean))
            ]
            self.error = max(error for _, error in fits) * 3
            return torch.tensor([value for value, _ in fits])
        if not self.uses_sample:
            return self._rows(mean, second, None)
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        total = torch.zeros(len(mean))
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            z = loc + sigma * float(node)
            total += float(weight) * self._rows(mean, second, z)
        return total

    def at_draws(self, mean: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """F at given draws (P,)."""
        return self._rows(mean, second, z)

    def _rows(self, mean: Tensor, second: Tensor, z: Tensor | None) -> Tensor:
        """F of each row: by one call, if it gives the same as a call for each."""
        n = len(mean)

        def one_row(i: int) -> Tensor:
            return self._once(mean[i], second[i], None if z is None else z[i])

        if self.kind in ("per example", "per dimension") and self.copies == 1 and n > 4:
            value = self._raw(mean, second, z).reshape(n, -1).sum(1)
            rows = [0, n // 2, n - 1]
            single = torch.stack([one_row(i) for i in rows])
            if torch.allclose(value[rows], single, 1e-4, 1e-6, equal_nan=True):
                return value
        return torch.stack([one_row(i) for i in range(n)])

    def growth(self, mean: Tensor, second: Tensor, z: Tensor) -> dict[int, float] | None:
        """F of identical examples over that of one, by their number; None if it is unreduced.

        A sum gives the number itself, a mean 1. Differences to a smaller mean are compared, so
        that constants do not matter.
        """
        if self.kind != "scalar" or self.copies > 1 or self.by_chance:
            return None

        def total(n: int) -> float:
            values = []
            for m in (mean + 1, 0.5 * mean):
                self.sandbox.reseed(0)
                values.append(self._raw(*(t.expand(n, -1) for t in (m, second, z + m - mean))))
            return float(values[0].sum() - values[1].sum())

        one = total(1)
        return {n: total(n) / one for n in (2, 4, 8)} if one else None

    def by_latents(self, mean: Tensor, second: Tensor, z: Tensor) -> float | None:
        """F of half of the latents over that of all; None if it is unknown.

        A sum gives one half, a mean 1.
        """
        if not self.latent:
            return None
        *front, last = self.latent
        if last < 2 or last % 2 or self.second != self.latent or self.copies > 1:
            return None
        latent = (*front, last // 2)
        differences = []
        for d, shape in ((self.d // 2, latent), (self.d, None)):
            values = []
            for step in (1.0, 0.0):
                row = [t[:1].expand(1, d) for t in (mean + step, second, z + step)]
                try:
                    values.append(float(self._raw(*row, latent=shape).sum()))
                except AuditError:
                    return None
            differences.append(values[0] - values[1])
        return differences[0] / differences[1] if differences[1] else None


# --- the KL that F was written for -------------------------------------------------------------


def read(
    f: Tensor,
    mean: Tensor,
    second: Tensor,
    loc: Tensor,
    sigma: Tensor,
    prior: tuple[Tensor, Tensor],
    uses_sample: bool,
    tolerance: float,
) -> list[tuple[str, Regression]]:
    """The readings of the second tensor that explain F (P,), best first.

    `uses_sample` says that F is an average over draws, and so depends on what is sampled: `loc`
    and `sigma`, as the heads (P, D).
    """
    fits = []
    for name, g in READINGS.items():
        s = g(second)
        if not bool((s.isfinite() & (s > 0)).all()):
            continue
        if uses_sample:
            cross = ((sigma**2 + (loc - mean) ** 2) / (2 * s**2) + s.log()).sum(-1)
            from_prior = ((sigma**2 + (loc - prior[0]) ** 2) / (2 * prior[1] ** 2)).sum(-1)
            t = from_prior - cross + prior[1].log().sum()
        else:
            t = gaussian_kl(mean, s, prior)
        fit = regress(f, t)
        if name == "unit variance" and abs(fit.intercept) > 1e-3:
            continue  # rather a KL without one of its terms
        if fit.residual <= tolerance:
            fits.append((name, fit))
    return sorted(fits, key=lambda entry: (abs(entry[1].slope - 1) > 1e-3, entry[1].residual))


Terms = dict[str, Callable[[Tensor], Tensor]]

_SQUARES: Terms = {
    "exp(b)": torch.exp,
    "exp(2b)": lambda b: (2 * b).exp(),
    "exp(b/2)": lambda b: (b / 2).exp(),
    "b^2": lambda b: b**2,
    "b": lambda b: b,
    "exp(-b)": lambda b: (-b).exp(),
    "exp(4b)": lambda b: (4 * b).exp(),
    "b^4": lambda b: b**4,
    "softplus(b)^2": lambda b: F.softplus(b) ** 2,
    "softplus(b)": F.softplus,
}
_LOGARITHMS: Terms = {
    "b": lambda b: b,
    "log|b|": lambda b: b.abs().log(),
    "b^2": lambda b: b**2,
    "log softplus(b)": lambda b: F.softplus(b).log(),
    "exp(b)": torch.exp,
    "nothing": torch.zeros_like,
}


def formula(f: Tensor, mean: Tensor, second: Tensor) -> str | None:
    """F of one latent as a formula in m and b; None if it is no sum of known terms.

    Args:
        f: Values (P,).
        mean: m (P,).
        second: b (P,).

    Example:
        >>> m, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).double()
        >>> formula(0.5 * (m**2 + b.exp() - b - 1), m, b)
        '0.5 m^2 + 0.5 exp(b) - 0.5 b - 0.5'
    """
    reach = float((f - f.mean()).abs().max())
    for square, s in _SQUARES.items():
        for logarithm, g in _LOGARITHMS.items():
            if square == logarithm:
                continue
            names = ["m^2", "m", square, logarithm, ""]
            columns = [mean**2, mean, s(second), g(second), torch.ones_like(mean)]
            design = torch.stack(columns, 1)
            if not bool(design.isfinite().all()):
                continue
            size = design.abs().amax(0).clamp(min=1e-300)
            solved = torch.linalg.lstsq(
                design / size, f[:, None], driver="gelsd", rcond=1e-12
            ).solution[:, 0]
            if float((design / size @ solved - f).abs().max()) > 1e-6 * reach:
                continue
            terms = ""
            for name, c in zip(names, (solved / size).tolist(), strict=True):
                if abs(c) < 1e-6 or name == "nothing":
                    continue
                sign = "-" if c < 0 else "+"
                number = "" if abs(abs(c) - 1) < 1e-6 and name else f"{abs(c):.4g}"
                terms += f" {sign} " + " ".join(w for w in (number, name) if w)
            terms = terms.strip()
            return terms[2:] if terms.startswith("+ ") else terms
    return None
