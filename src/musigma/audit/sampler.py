r"""Measuring a sampler: z = loc(m, b) + sigma(m, b) e, and its noise e.

At one seed a sampler draws the same noise whatever its arguments are. So its answers for different
arguments are compared draw by draw, and only rounding limits the accuracy of loc and sigma:

    sigma(b) / sigma(b0) = (z(b) - loc(b)) / (z(b0) - loc(b0))     for every draw.

Mostly the noise itself is known too, as what torch or NumPy return for that seed, and nothing is
statistical. Where a sampler draws from another source, its noise is measured once, from many
draws; where it cannot be seeded, every number is an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, TooSlowError

__all__ = ["Sampler"]

REPEATS = 6  # draws at each point, where the noise is known
MANY = 6000  # draws where it is not
SEED = 1000


class Sampler:
    """A sampler as a function of flat heads, (n, D) and (n, E), to draws (n, D).

    `reference` is a second tensor (E,) at which it draws; by default ones.

    Raises:
        AuditError: If it raises for every input, or returns no z of the mean's shape.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        sample: Callable[..., Any],
        latent: Sequence[int],
        second: Sequence[int],
        example_rows: int | None,
        reference: Tensor | None = None,
    ):
        self.sandbox, self.sample = sandbox, sample
        self.latent, self.second = tuple(latent), tuple(second)
        self.d, self.e = math.prod(self.latent), math.prod(self.second)
        self.reference = torch.ones(self.e) if reference is None else reference
        self.rows: int | None = None
        self.still = False  # it draws nothing
        self.scale_error = 0.0  # relative, common to every sigma, where noise is standardised
        self.notes: list[str] = []
        self.mode: Literal["known", "relative", "frozen", "moments"] = "moments"
        self.stream = ""  # source of the noise, if known
        self.rounding = 1e-9
        self._noise: Callable[[int, int], Tensor] | None = None
        self._fit_rows(example_rows)
        self._find_noise()

    # -- calling

    def draw(self, mean: Tensor, second: Tensor, seed: int | None = None) -> Tensor:
        """One draw for each row, (n, D), after seeding if a seed is given."""
        if seed is not None:
            self.sandbox.reseed(seed)
        n, rows = len(mean), self.rows
        if rows is None:
            return self._call(mean, second)
        short = -n % rows
        if short:
            mean = torch.cat([mean, mean[-1:].expand(short, -1)])
            second = torch.cat([second, second[-1:].expand(short, -1)])
        parts = [
            self._call(mean[i : i + rows], second[i : i + rows]) for i in range(0, n + short, rows)
        ]
        return torch.cat(parts)[:n]

    def _call(self, mean: Tensor, second: Tensor) -> Tensor:
        n = len(mean)
        m = self.sandbox.to_input(mean).reshape(n, *self.latent)
        b = self.sandbox.to_input(second).reshape(n, *self.second)
        inputs = m.clone(), b.clone()
        z = self.sandbox.call("sample", self.sample, *inputs)
        if isinstance(z, (tuple, list)):
            z = next((t for t in z if getattr(t, "shape", None) == m.shape), z[0] if z else z)
        value = self.sandbox.as_tensor("sample", z)
        if getattr(z, "dtype", None) in (torch.float32, np.float32) or m.dtype == torch.float32:
            self.rounding = max(self.rounding, 2e-5)
        elif getattr(z, "dtype", None) in (torch.float16, torch.bfloat16):
            self.rounding = max(self.rounding, 2e-2)
        if value.shape != m.shape and value.ndim == m.ndim + 1 and value.shape[1:] == m.shape:
            self._note("sample returns several draws for each example; the first was used")
            value = value[0]
        if value.shape != m.shape and value.numel() == m.numel():
            value = value.reshape(m.shape)
        if value.shape != m.shape:
            raise AuditError(
                f"sample: given mean {tuple(m.shape)} and second {tuple(b.shape)}, expected z of "
                f"shape {tuple(m.shape)}; got {tuple(value.shape)}"
            )
        if not (torch.equal(inputs[0], m) and torch.equal(inputs[1], b)):
            self._note("sample changes its arguments in place, for whatever uses them later")
        return value.reshape(n, -1)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _fit_rows(self, example_rows: int | None) -> None:
        """Find the number of rows that a call takes; None for any."""
        reasons = []
        for rows in dict.fromkeys((None, example_rows, 1)):
            self.rows = rows
            try:
                for n in (7, 3) if rows is None else (rows,):
                    self.reference_draw(n, SEED)
                return
            except TooSlowError:
                raise
            except AuditError as error:
                reasons.append(error)
        raise reasons[min(1, len(reasons) - 1)]

    # -- the noise

    def reference_draw(self, n: int, seed: int) -> Tensor:
        """A draw at mean 0 and the reference scale, (n, D)."""
        return self.draw(torch.zeros(n, self.d), self.reference.expand(n, -1), seed)

    def _find_noise(self) -> None:
        n = 8 if self.rows is None else self.rows
        if self.e not in (1, self.d):
            n = 2 * self.d + 8
        one, again, other = (self.reference_draw(n, seed) for seed in (SEED, SEED, SEED + 1))
        if not bool(one.isfinite().all()):
            return
        if torch.equal(one, again):
            self.mode = "frozen" if torch.equal(one, other) else "relative"
            self.still = self.mode == "frozen" and bool(one.std() < 1e-12)
        else:
            return
        if self.mode == "relative":
            for name, make in self._streams():
                if all(self._is(make(n, s), self.reference_draw(n, s)) for s in (SEED, SEED + 7)):
                    self.mode, self.stream = "known", name
                    self._noise = make
                    return
        big = self.reference_draw(self.many(), SEED + 2)
        loc, scale, count = big.mean(), big.std(), big.numel()
        if float(scale) < 1e-12:
            return
        if self.mode == "frozen":
            loc, scale, count = torch.zeros(()), one.square().mean().sqrt(), one.numel()
        else:  # each latent may have a factor of its own
            each = big.std(0)
            if float(each.max() / each.min().clamp(min=1e-300)) > 1 + 20 / math.sqrt(len(big)):
                loc, scale, count = big.mean(0), each, len(big)
        self._noise = lambda n, seed: (self.reference_draw(n, seed) - loc) / scale
        self.scale_error = 6 / math.sqrt(2 * count)

    def averaged(self, points: int) -> int:
        """Draws at each point, where every number is an average."""
        return max(200, min(MANY, 5_000_000 // max(1, points * self.d)))

    def many(self) -> int:
        """Rows for about a hundred thousand numbers, as far as calls allow."""
        rows = max(512, min(16384, 100_000 // self.d))
        return rows if self.rows is None else min(rows, 300 * self.rows)

    def _streams(self):
        """The noise of torch and of NumPy that a sampler may draw for n rows after seeding."""

        def chunked(make: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
            def noise(n: int, seed: int) -> Tensor:
                self.sandbox.reseed(seed)
                if self.rows is None:
                    return make(n).double()
                calls = -(-n // self.rows)
                return torch.cat([make(self.rows).double() for _ in range(calls)])[:n]

            return noise

        for dtype in (torch.float64, torch.float32):
            word = str(dtype).removeprefix("torch.")
            yield f"torch, {word}", chunked(lambda n, t=dtype: torch.randn(n, self.d, dtype=t))
        yield (
            "NumPy",
            chunked(lambda n: torch.from_numpy(np.random.standard_normal((n, self.d)))),
        )
        if len(self.latent) > 1 or self.d > 1:
            for dtype in (torch.float64, torch.float32):
                yield (
                    "torch, one number for all dimensions",
                    chunked(lambda n, t=dtype: torch.randn(n, 1, dtype=t).expand(n, self.d)),
                )
        for dtype in (torch.float64, torch.float32):
            yield (
                "torch, one row for all examples",
                chunked(lambda n, t=dtype: torch.randn(self.d, dtype=t).expand(n, -1)),
            )

    def _is(self, e: Tensor, z: Tensor) -> bool:
        """Whether z is a multiple of e plus a constant; for a matrix, linear in e."""
        if self.e not in (1, self.d):
            design = torch.cat([e, torch.ones(len(e), 1)], 1).double()
            solved = torch.linalg.lstsq(design, z, driver="gelsd").solution
            return bool((design @ solved - z).abs().max() <= 3e-6 * z.abs().max())
        by_latent = len(e) >= 4 and bool((e.std(0) > 1e-6).all())
        slope, loc = _line(e, z) if by_latent else _line(e.flatten(), z.flatten())
        off = (z - loc - slope * e).abs()
        return bool((off <= 3e-6 * slope.abs()).all()) and bool((slope.abs() > 0).all())

    def noise(self, n: int, seed: int) -> Tensor:
        """The noise e of a call with n rows, (n, D); standardised unless it is known."""
        if self._noise is None:
            raise AuditError("sample: its noise is unknown")
        return self._noise(n, seed)

    # -- loc and sigma

    def measure(self, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale and misfit of z = loc + sigma e at points, each (P, D).

        Sigma is negative where it negates the noise; the misfit is the distance of z from a
        straight line in e, relative to |m| + |sigma|.
        """
        points = len(mean)
        if self.mode == "moments" or self._noise is None:
            n = self.averaged(points)
            at_once = 1 if self.rows is not None else 100
            calls = [
                self.draw(mean.repeat(at_once, 1), second.repeat(at_once, 1), SEED + i)
                for i in range(-(-n // at_once))
            ]
            many = torch.cat(calls).reshape(-1, points, self.d)
            return many.mean(0), many.std(0), torch.zeros(points, self.d)
        seeds = range(SEED, SEED + REPEATS)
        e = torch.stack([self.noise(points, seed) for seed in seeds])
        z = torch.stack([self.draw(mean, second, seed) for seed in seeds])
        if self.mode == "frozen":
            sigma = ((z - mean) * e).mean(0) / (e * e).mean(0).clamp(min=1e-300)
            return mean.clone(), sigma, torch.zeros(points, self.d)
        sigma, loc = _line(e, z)
        off = (z - loc - sigma * e).abs().amax(0)
        return loc, sigma, off / (mean.abs() + sigma.abs() + 1e-300)

    def measure_full(self, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor, float]:
        """Location (P, D) and covariance factor (P, D, D) of z = loc + A e, and the misfit.

        Where the noise is not known, the covariance is that of many draws.
        """
        points = len(mean)
        if self.mode == "known":
            seeds = range(SEED, SEED + self.d + 4)
            e = torch.stack([self.noise(points, seed) for seed in seeds], 1)
            z = torch.stack([self.draw(mean, second, seed) for seed in seeds], 1)
            design = torch.cat([e, torch.ones(points, len(seeds), 1)], 2)
            solved = torch.linalg.lstsq(design, z, driver="gelsd").solution
            off = float((design @ solved - z).abs().max() / z.abs().max())
            if off < 1e-5:
                return solved[:, -1], solved[:, :-1].transpose(1, 2), 0.0
        n = self.averaged(points)
        many = torch.stack([self.draw(mean, second, SEED + i) for i in range(n)])
        centred = many - many.mean(0)
        covariance = torch.einsum("npi,npj->pij", centred, centred) / (n - 1)
        return many.mean(0), torch.linalg.cholesky(covariance), 1 / math.sqrt(n)


def _line(e: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of z in e, by least squares along the first dimension."""
    centre = e.mean(0)
    spread = ((e - centre) ** 2).sum(0).clamp(min=1e-300)
    slope = ((e - centre) * (z - z.mean(0))).sum(0) / spread
    return slope, z.mean(0) - slope * centre
