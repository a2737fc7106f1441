r"""Measuring a sampler: z = loc(m, b) + sigma(m, b) e, and its noise e.

At one seed a sampler draws the same noise whatever its arguments are. Its results for different
arguments are therefore compared draw by draw, and only rounding limits the accuracy of loc and
sigma:

    sigma(b) / sigma(b0) = (z(b) - loc(b)) / (z(b0) - loc(b0))     for every draw.

Usually the noise itself is known too, because torch or NumPy return it for that seed; then nothing
is statistical. Where a sampler draws from another source, its noise is measured once, from many
draws; where it cannot be seeded, every number is an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, first_form

__all__ = ["Packing", "Sampler", "find_packing"]

REPEATS = 6  # draws at each point, where the noise is known
MANY = 6000  # draws where it is not
SEED = 1000

Noise = Callable[[int, int], Tensor]


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
        self.is_matrix = self.e not in (1, self.d)
        self.reference = torch.ones(self.e) if reference is None else reference
        self.scale_error = 0.0  # relative, common to every sigma, where noise is standardized
        self.notes: dict[str, None] = {}
        self.mode: Literal["known", "relative", "frozen", "moments"] = "moments"
        self.still = False  # it draws nothing
        self.stream = ""  # source of the noise, if known
        self.rounding = 1e-9
        forms = [(rows,) for rows in dict.fromkeys((None, example_rows, 1))]
        self.rows = first_form(forms, self._takes, blame=1)[1]  # of a call; None for any
        self.noise = self._find_noise()

    # -- calling

    def draw(self, mean: Tensor, second: Tensor, seed: int | None = None) -> Tensor:
        """One draw for each row, (n, D), after seeding if a seed is given."""
        if seed is not None:
            self.sandbox.reseed(seed)
        rows = self.rows
        if rows is None:
            return self._call(mean, second)
        n = len(mean)
        at = torch.arange(n + -n % rows).clamp(max=n - 1)  # the last row fills the last call
        return torch.cat([self._call(mean[i], second[i]) for i in at.split(rows)])[:n]

    def reference_draw(self, n: int, seed: int) -> Tensor:
        """A draw at mean 0 and the reference scale, (n, D)."""
        return self.draw(torch.zeros(n, self.d), self.reference.expand(n, -1), seed)

    def _takes(self, rows: int | None) -> int | None:
        """The number of rows, if a call takes it."""
        self.rows = rows
        for n in (7, 3) if rows is None else (rows,):
            self.reference_draw(n, SEED)
        return rows

    def _call(self, mean: Tensor, second: Tensor) -> Tensor:
        n = len(mean)
        m = self.sandbox.to_input(mean).reshape(n, *self.latent)
        b = self.sandbox.to_input(second).reshape(n, *self.second)
        z = self.sandbox.call("sample", self.sample, m.clone(), b.clone())
        if isinstance(z, (tuple, list)):
            z = next((t for t in z if getattr(t, "shape", None) == m.shape), z[0] if z else z)
        value, dtype = self.sandbox.as_tensor("sample", z), getattr(z, "dtype", None)
        if dtype in (torch.float32, np.float32) or m.dtype == torch.float32:
            self.rounding = max(self.rounding, 2e-5)
        elif dtype in (torch.float16, torch.bfloat16):
            self.rounding = max(self.rounding, 2e-2)
        if value.ndim == m.ndim + 1 and value.shape[1:] == m.shape:
            self._note("sample returns several draws for each example; the first was used")
            value = value[0]
        if value.numel() != m.numel():
            raise AuditError(
                f"sample: given mean {tuple(m.shape)} and second {tuple(b.shape)}, expected z of "
                f"shape {tuple(m.shape)}; got {tuple(value.shape)}"
            )
        return value.reshape(n, -1)

    def _note(self, text: str) -> None:
        self.notes[text] = None

    # -- the noise

    def _find_noise(self) -> Noise | None:
        """The noise e (n, D) of a call with n rows and a seed; None if it is unknown.

        It is standardized unless it is that of torch or NumPy.
        """
        n = 2 * self.d + 8 if self.is_matrix else self.rows or 8
        one, again, other = (self.reference_draw(n, seed) for seed in (SEED, SEED, SEED + 1))
        if not one.isfinite().all() or not torch.equal(one, again):
            return None
        if torch.equal(one, other):
            self.mode, self.still = "frozen", bool(one.std() < 1e-12)
            loc, scale, count = torch.zeros(()), one.square().mean().sqrt(), one.numel()
        else:
            for name, make in self._streams():
                noise = self._chunked(make)
                if all(self._is(noise(n, s), self.reference_draw(n, s)) for s in (SEED, SEED + 7)):
                    self.mode, self.stream = "known", name
                    return noise
            self.mode = "relative"
            big = self.reference_draw(self.many(), SEED + 2)
            loc, scale, count = big.mean(), big.std(), big.numel()
            each = big.std(0)  # each latent may have a factor of its own
            if float(each.max() / each.min().clamp(min=1e-300)) > 1 + 20 / math.sqrt(len(big)):
                loc, scale, count = big.mean(0), each, len(big)
        if scale.max() < 1e-12:
            return None
        self.scale_error = 6 / math.sqrt(2 * count)
        return lambda n, seed: (self.reference_draw(n, seed) - loc) / scale

    def averaged(self, points: int) -> int:
        """Draws at each point, where every number is an average."""
        return max(200, min(MANY, 5_000_000 // max(1, points * self.d)))

    def many(self) -> int:
        """Rows for about a hundred thousand numbers, as far as calls allow."""
        rows = max(512, min(16384, 100_000 // self.d))
        return rows if self.rows is None else min(rows, 300 * self.rows)

    def _streams(self) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
        """The noise of torch and of NumPy that a sampler may draw for n rows after seeding."""
        d = self.d
        yield "NumPy", lambda n: torch.from_numpy(np.random.standard_normal((n, d)))
        for t in (torch.float64, torch.float32):
            yield (
                f"torch, {str(t).removeprefix('torch.')}",
                lambda n, t=t: torch.randn(n, d, dtype=t),
            )
            if d > 1:
                yield (
                    "torch, one number for all dimensions",
                    lambda n, t=t: torch.randn(n, 1, dtype=t).expand(n, d),
                )
            yield (
                "torch, one row for all examples",
                lambda n, t=t: torch.randn(d, dtype=t).expand(n, -1),
            )

    def _chunked(self, make: Callable[[int], Tensor]) -> Noise:
        """Noise by as many calls as the sampler needs."""

        def noise(n: int, seed: int) -> Tensor:
            self.sandbox.reseed(seed)
            rows = self.rows or n
            return torch.cat([make(rows).double() for _ in range(-(-n // rows))])[:n]

        return noise

    def _is(self, e: Tensor, z: Tensor) -> bool:
        """Whether z is a multiple of e plus a constant; for a matrix, linear in e."""
        if self.is_matrix:
            return _affine(e, z)[1] <= 3e-6 * float(z.abs().max())
        by_latent = len(e) >= 4 and bool((e.std(0) > 1e-6).all())
        slope, loc = _line(e, z) if by_latent else _line(e.flatten(), z.flatten())
        off = (z - loc - slope * e).abs()
        return bool((off <= 3e-6 * slope.abs()).all() and (slope != 0).all())

    # -- loc and sigma

    def measure(self, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale and misfit of z = loc + sigma e at points, each (P, D).

        Sigma is negative where it negates the noise; the misfit is the distance of z from a
        straight line in e, relative to |m| + |sigma|.
        """
        points = len(mean)
        if self.mode == "moments" or self.noise is None:
            at_once = 1 if self.rows is not None else 100
            calls = [
                self.draw(mean.repeat(at_once, 1), second.repeat(at_once, 1), SEED + i)
                for i in range(-(-self.averaged(points) // at_once))
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
        """Location (P, D) and covariance factor (P, D, D) of z = loc + A e, and its error.

        Where the noise is not known, the covariance is that of many draws.
        """
        points = len(mean)
        if self.mode == "known" and self.noise is not None:
            seeds = range(SEED, SEED + self.d + 4)
            e = torch.stack([self.noise(points, seed) for seed in seeds], 1)
            z = torch.stack([self.draw(mean, second, seed) for seed in seeds], 1)
            solved, off = _affine(e, z)
            if off < 1e-5 * float(z.abs().max()):
                return solved[:, -1], solved[:, :-1].transpose(1, 2), 0.0
        n = self.averaged(points)
        many = torch.stack([self.draw(mean, second, SEED + i) for i in range(n)])
        centered = many - many.mean(0)
        covariance = torch.einsum("npi,npj->pij", centered, centered) / (n - 1)
        return many.mean(0), torch.linalg.cholesky(covariance), 1 / math.sqrt(n)


def _line(e: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of z in e, by least squares along the first dimension."""
    center = e.mean(0)
    spread = ((e - center) ** 2).sum(0).clamp(min=1e-300)
    slope = ((e - center) * (z - z.mean(0))).sum(0) / spread
    return slope, z.mean(0) - slope * center


def _affine(e: Tensor, z: Tensor) -> tuple[Tensor, float]:
    """The matrix, and below it the constant, of z as an affine function of e; and the misfit."""
    design = torch.cat([e, torch.ones_like(e[..., :1])], -1).double()
    solved = torch.linalg.lstsq(design, z, driver="gelsd").solution
    return solved, float((design @ solved - z).abs().max())


# --- packed tensors -----------------------------------------------------------------------------

MOVED = 96  # numbers that are moved, one at a time
SEEDS = (3, 4, 5, 6)


class Packing(NamedTuple):
    """A layout of a packed tensor: flat positions (D,) of the means and of the scales.

    `shape` and `latent` are the shapes of one packed example and of one z.
    """

    name: str
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    mean: Tensor
    second: Tensor

    def packed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A callable of a packed tensor as one of mean, scale and its other arguments."""

        def of_two(mean: Tensor, second: Tensor, *more: Any) -> Any:
            n = len(mean)
            packed = mean.new_empty(n, math.prod(self.shape))
            packed[:, self.mean] = mean.reshape(n, -1)
            packed[:, self.second] = second.reshape(n, -1)
            return fn(packed.reshape(n, *self.shape), *more)

        return of_two

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Means and scales (n, *latent) in a packed tensor (n, *shape)."""
        mean, second = (packed.flatten(1)[:, at] for at in (self.mean, self.second))
        return mean.reshape(-1, *self.latent), second.reshape(-1, *self.latent)


def find_packing(sandbox: Sandbox, sample: Callable[..., Any], packed: Tensor) -> Packing:
    """The layout of a tensor that a sampler takes, by what moving one number does to z.

    At the same seed, moving a mean moves one z by as much, whatever the noise; moving a scale
    moves one z by a multiple of its noise.

    Raises:
        AuditError: If z is not half as large, or no layout is found.
    """
    rows, shape = len(packed), tuple(packed.shape[1:])
    n = math.prod(shape)

    def draw(h: Tensor, seed: int) -> Tensor:
        sandbox.reseed(seed)
        packed = sandbox.to_input(h).reshape(-1, *shape).clone()
        return sandbox.ask_first("sample", sample, packed)

    def draws(h: Tensor) -> Tensor:
        return torch.stack([draw(h, seed).reshape(rows, -1)[0] for seed in SEEDS])

    base = torch.full((rows, n), 0.3, dtype=torch.float64)
    latent = tuple(draw(base, 0).shape[1:])
    if 2 * math.prod(latent) != n:
        raise AuditError(
            f"sample: given a packed tensor {tuple(packed.shape)}, expected z with half as many "
            f"numbers; got shape {(rows, *latent)}"
        )
    positions = torch.linspace(0, n - 1, min(n, MOVED)).round().long().unique().tolist()
    still = draws(base)
    roles: dict[int, tuple[bool, int]] = {}  # by position: whether a mean, and of which z
    for j in positions:
        moved = base.clone()
        moved[0, j] += 0.5
        by = draws(moved) - still
        touched = int(by.abs().amax(0).argmax())
        move = by[:, touched]
        constant = float((move - move.mean()).abs().max()) < 1e-3 * float(move.abs().max())
        roles[j] = (constant, touched)
    for name, mean, second in _layouts(shape):
        where = {int(p): (True, i) for i, p in enumerate(mean)}
        where |= {int(p): (False, i) for i, p in enumerate(second)}
        if roles.items() <= where.items():
            return Packing(name, shape, latent, mean, second)
    if len(positions) == n and len(set(roles.values())) == n:
        position = {role: j for j, role in roles.items()}
        mean, second = (
            torch.tensor([position[k, i] for i in range(n // 2)]) for k in (True, False)
        )
        return Packing("permuted", shape, latent, mean, second)
    raise AuditError("sample: which numbers of the packed tensor are means is unknown")


def _layouts(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names of layouts, and the flat positions of means and scales."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    for dim, size in enumerate(shape):
        if size % 2:
            continue
        even = torch.arange(0, size, 2)
        for name, (a, b) in (
            ("halves", index.chunk(2, dim)),
            ("interleaved", (index.index_select(dim, even), index.index_select(dim, even + 1))),
        ):
            name += "" if dim == 0 else f" of dimension {dim + 1}"
            if dim == len(shape) - 1 > 0 and size == 2:
                name = "per feature"
            yield f"{name}, mean first", a.flatten(), b.flatten()
            yield f"{name}, scale first", b.flatten(), a.flatten()
