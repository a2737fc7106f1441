"""Values of typed columns as cells, and the place of each value inside its cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from musigma.schema import Column, Schema, fraction

__all__ = ["Binning", "Tables", "multiples"]


FARTHEST = 1e-3
"""Share of the rows at each end of a column that have the same normal quantile."""


def multiples(steps: Tensor, grid: float) -> Tensor:
    """Multiples of a grid; those of 0.01 are the numbers that two decimals write."""
    numerator, denominator = fraction(grid)
    return steps * numerator / denominator


class Tables(dict[str, Tensor]):
    """Tensors by name, with copies on other devices.

    They are no buffers of a module, so a module that is converted to another type keeps them.
    """

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self._home: dict[torch.device, dict[str, Tensor]] = {}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device."""
        if device not in self._home:
            self._home[device] = {k: t.to(device) for k, t in self.items()}
        return self._home[device]


class Binning:
    """The cells of all columns of a schema, for tensors of rows (B, D), float64.

    The code of a value is the number of its cell; a missing value has the code after the last
    cell. Codes of values outside all cells are `below` and `above`, and `absent` is that of a
    missing value in a column that has none.

    Args:
        schema: A schema that has been measured.

    Attributes:
        sizes: Number of codes of each column: its cells, and one for missing; this one alone if
            all values were missing in training.
    """

    below, above, absent = -1, -2, -3

    def __init__(self, schema: Schema):
        self.schema = schema
        self.sizes = [len(c.measured) + c.missing or 1 for c in schema.columns]
        self.tensors = self._tensors(schema.columns)
        self._columns: dict[int, Binning] = {}

    def column(self, j: int) -> Binning:
        """The cells of column j alone."""
        if len(self.sizes) == 1:
            return self
        if j not in self._columns:
            self._columns[j] = Binning(Schema(self.schema.columns[j : j + 1]))
        return self._columns[j]

    @staticmethod
    def _tensors(columns: Sequence[Column]) -> Tables:
        def padded(rows: list[Sequence[float]], value: float) -> Tensor:
            width = max([1, *map(len, rows)])
            full = torch.full((len(rows), width), value, dtype=torch.float64)
            for row, values in zip(full, rows, strict=True):
                row[: len(values)] = torch.as_tensor(values, dtype=torch.float64)
            return full

        real = partial(torch.tensor, dtype=torch.float64)
        cells = [c.measured for c in columns]
        edges = padded([c.edges for c in cells], math.inf)
        low = padded([c.edges[:-1] for c in cells], 0.0)
        width = padded([real(c.edges).diff().tolist() for c in cells], 0.0)
        unit = real([c.grid if c.is_discrete else 1.0 for c in columns])
        grid = real([c.grid or 0.0 for c in columns])
        counts = [real(c.counts) + 0.5 for c in cells]
        mass = padded([(c / c.sum()).tolist() for c in counts], 0.0)
        scale = real([[c.left, c.right] for c in cells])
        exact = real([fraction(c.grid or 1.0) for c in columns])
        return Tables(
            edges=edges,
            low=low,
            width=width,
            log_width=torch.where(width > 0, width / unit[:, None], 1.0).log(),
            mass=mass,
            start=mass.cumsum(1) - mass,
            cells=torch.tensor([len(c) for c in cells]),
            missing=torch.tensor([c.missing for c in columns]),
            levels=torch.tensor([c.has_levels for c in columns]),
            grid=grid,
            numerator=exact[:, 0],
            denominator=exact[:, 1],
            discrete=torch.tensor([c.is_discrete for c in columns]),
            scale=scale,
        )

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device."""
        return self.tensors.on(device)

    def locate(self, x: Tensor) -> Tensor:
        """The code of every value, int64 (B, D)."""
        t = self.on(x.device)
        columns = x.T.double().contiguous()
        first = torch.searchsorted(t["edges"], columns)
        after = torch.searchsorted(t["edges"], columns, right=True)
        code = torch.where(after - first == 2, first, after - 1)
        n = t["cells"][:, None]
        code = torch.where(code >= n, self.above, code)  # also -1, which is `below`
        missing = columns.isnan()
        unknown = torch.where(t["missing"][:, None], n, self.absent)
        return torch.where(missing, unknown.expand_as(code), code).T

    def on_grid(self, x: Tensor) -> Tensor:
        """Rows (B, D) with every value on the grid of its column, as `Column.on_grid`."""
        t = self.on(x.device)
        gridded, k = t["grid"] > 0, (x / t["grid"]).round()
        return torch.where(gridded, k * t["numerator"] / t["denominator"], x)

    def place(self, x: Tensor, code: Tensor) -> Tensor:
        """The place of every value in its cell, from 0 to 1, float64 (B, D); 0.5 outside."""
        t = self.on(x.device)
        inside = (code >= 0) & (code < t["cells"])
        at = torch.where(inside, code, 0).T
        low, width = (t[k].gather(1, at).T for k in ("low", "width"))
        place = (x.double() - low) / torch.where(width > 0, width, 1.0)
        return torch.where(inside & (width > 0), place.clamp(0, 1), 0.5)

    def rank(self, x: Tensor, code: Tensor) -> Tensor:
        """The share of training rows below every value, from 0 to 1, float32 (B, D)."""
        t = self.on(x.device)
        inside = (code >= 0) & (code < t["cells"])
        at = torch.where(inside, code, 0).T
        start, mass = (t[k].gather(1, at).T for k in ("start", "mass"))
        rank = start + self.place(x, code) * mass
        return torch.where(inside, rank, torch.where(code == self.above, 1.0, 0.0)).float()

    @staticmethod
    def quantile(rank: Tensor) -> Tensor:
        """The normal quantile of a rank, bounded at both ends."""
        return torch.special.ndtri(rank.clamp(FARTHEST, 1 - FARTHEST))

    def log_density(self, x: Tensor, code: Tensor) -> Tensor:
        """Log density of every value given its code, nats (B, D): a probability if discrete.

        Inside a cell the density is uniform. Outside, it falls exponentially with the distance;
        all levels that are unknown are one.
        """
        t = self.on(x.device)
        inside = (code >= 0) & (code < t["cells"])
        within = -t["log_width"].gather(1, torch.where(inside, code, 0).T).T
        above, below = code == self.above, code == self.below
        last = t["edges"].gather(1, t["cells"][:, None])[:, 0]
        far = torch.where(above, x.double() - last, t["edges"][:, 0] - x.double())
        scale = torch.where(above, t["scale"][:, 1], t["scale"][:, 0])
        steps = (far / t["grid"].clamp(min=1e-300)).floor()
        ratio = -t["grid"] / scale
        geometric = steps * ratio + torch.log(-torch.expm1(ratio))
        outside = torch.where(t["discrete"], geometric, -far / scale - scale.log())
        outside = torch.where(t["levels"], 0.0, outside)
        zero = torch.zeros_like(within)
        return torch.where(inside, within, torch.where(above | below, outside, zero)).float()

    def basis(self, j: int, cosines: int, smoothness: float = 1.0) -> Tensor | None:
        """Functions of the codes of column j that a smooth distribution is made of, (R, codes).

        With u the share of training rows below the middle of a cell and z its normal quantile,
        they are z, (z² - 1) / √2, and √2 cos(π k u) / k^s for k = 1, ..., `cosines`, where s is
        the smoothness: a conditional that is normal in z takes two of them, and finer detail has
        to be learned against small factors.
        Atoms and missing have a function of their own. It is None for a column of levels, each of
        which has one.
        """
        t, column, size = self.tensors, self.schema.columns[j], self.sizes[j]
        if column.has_levels:
            return None
        n = len(column.measured)
        wide = torch.zeros(size, dtype=torch.bool)
        wide[:n] = t["width"][j, :n] > 0
        u = (t["start"][j, :n] + t["mass"][j, :n] / 2)[wide[:n]]
        z = self.quantile(u)
        k = torch.arange(1, min(cosines, len(u)) + 1, dtype=torch.float64)[:, None]
        waves = math.sqrt(2) * torch.cos(math.pi * k * u) / k**smoothness
        smooth = torch.zeros(len(k) + 2, size, dtype=torch.float64)
        smooth[:, wide] = torch.cat([z[None], (z * z - 1)[None] / math.sqrt(2), waves])
        return torch.cat([smooth, torch.eye(size, dtype=torch.float64)[~wide]]).float()

    def ordinary(self) -> Tensor:
        """Which codes are intervals of numbers, bool (codes,); columns one after another."""
        parts = []
        for j, (column, size) in enumerate(zip(self.schema.columns, self.sizes, strict=True)):
            part, n = torch.zeros(size, dtype=torch.bool), len(column.measured)
            part[:n] = (self.tensors["width"][j, :n] > 0) & (not column.has_levels)
            parts.append(part)
        return torch.cat(parts)

    def marginals(self) -> Tensor:
        """Log shares of the training rows in each code, smoothed; columns one after another."""
        parts = []
        for column in self.schema.columns:
            cells = column.measured
            missing = [cells.missing] if column.missing or not len(cells) else []
            counts = torch.tensor([*cells.counts, *missing]) + 0.5
            parts.append((counts / counts.sum()).log())
        return torch.cat(parts)

    def random(self, n: int) -> Tensor:
        """Rows without missing values, float64 (n, D), each cell equally probable: for checks."""
        cells = [torch.zeros(n, len(c.measured)) for c in self.schema.columns]
        return torch.stack([self.draw(j, logits) for j, logits in enumerate(cells)], 1)

    def draw(self, j: int, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """Values of column j, float64 (B,), with cells drawn from logits (B, cells).

        Args:
            j: Number of the column.
            logits: Logits of its codes.
            temperature: Divides the logits; at 0 the middle of the most probable cell is taken.
        """
        best = logits.argmax(1)
        heat = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        cold = (heat == 0).expand(len(logits))
        if cold.all():
            return self.values(j, best, torch.full(best.shape, 0.5, device=best.device))
        heat = torch.where(cold, 1.0, heat)
        code = torch.multinomial((logits / heat[:, None]).softmax(1), 1)[:, 0]
        place = torch.rand(code.shape, device=code.device)
        return self.values(j, torch.where(cold, best, code), torch.where(cold, 0.5, place))

    def values(self, j: int, code: Tensor, place: Tensor) -> Tensor:
        """The values of column j with these codes, at these places in their cells, float64 (B,).

        They lie on the grid of the column, if it has one, and in the range of the training rows.
        """
        t, column = self.on(code.device), self.schema.columns[j]
        at = code.clamp(0, len(column.measured) - 1)
        low, width = t["low"][j][at], t["width"][j][at]
        if grid := column.grid:
            steps = (width / grid).round()
            x = low + grid * ((place.double() * steps).floor().clamp(max=steps - 1) + 0.5)
            x = multiples((x / grid).round(), grid)
        else:
            x = low + place.double() * width
        if not column.has_levels:
            x = x.clamp(column.low, column.high)
        return torch.where(code < len(column.measured), x, math.nan)
