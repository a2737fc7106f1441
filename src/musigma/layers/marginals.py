"""Typed columns as normal variables: each by its own distribution function, with its log-det."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.distributions import Binning, StandardUniform
from musigma.distributions.cells import Tables
from musigma.layer import Layer
from musigma.schema import Cells, Column, Schema
from musigma.tensors import normal_quantile
from musigma.trace import Trace

__all__ = ["Marginals"]

CELLS = 128
"""Intervals of equal mass of a column without a schema; the tails have more."""
MOST = CELLS + 160
"""Cells that such a column has at most: each tail has log(n / 256) / log(1.25) of them."""
FARTHEST = 1e15
"""Distance beyond the last edge, in units of the scale of the tail, at which values are cut."""
EDGE = 1e-7
"""Noise keeps this distance from the ends of its interval, so that rounding leaves it inside."""
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Rows(Protocol):
    """What a layer measures its features on: a `musigma.data.Dataset` of vectors."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows at these indices, (N, D)."""
        ...

    def moments(
        self, of: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every feature, or of a function of rows, (D,) each."""
        ...


class Marginals(Layer):
    r"""Each column of a row to a variable that is about standard normal.

    .. math:: y_j = \Phi^{-1}(F_j(x_j)), \quad
        \log p(x) = \log p(y) + \sum_j \log f_j(x_j) - \log \varphi(y_j)

    F is the distribution function of the column in the training rows: linear in each of its cells
    (`musigma.schema.Cells`), exponential beyond the first and the last edge, with density f. A
    value that has a probability P is an interval of F of that length: it is mapped to a uniformly
    drawn point of the interval, and P takes the place of f (the distributional transform:
    Rüschendorf, "On the distributional transform, Sklar's theorem, and the empirical copula
    process", 2009). Then

    .. math:: \log p(x) \ge E_u\left[\log p(y) + \sum_j \log P_j(x_j) - \log \varphi(y_j)\right]

    and the result sums and integrates to one over all rows. Such values are atoms, levels, numbers
    of discrete columns, missing values, and numbers of a continuous column with a step: these
    have the density P / step, as if they had been rounded to the nearest multiple of the step.

    Values below all cells, and values above them (for levels, unknown ones), each have the
    probability 1 / (n + 2), where n is the number of training rows: that of a new value to be the
    largest of n + 1. A missing value of a column without a probability of missing values
    (`Column.missing`) is integrated out: any point of the unit interval stands for it.

    `generate` inverts `infer` up to the rounding of y: what has a probability is restored exactly
    if its interval is wider than that. Samples of rows with a schema lie in the range of the
    training rows, on the grid of their columns, and contain no unknown levels. Numbers are float64
    inside.

    Args:
        columns: The columns, measured on the training rows; rows are float64 (B, D), as
            `musigma.schema` describes them. Or the number D of columns of real numbers that are
            measured later, by `measure` or `calibrate`; until then the layer is the identity.
            All of these have densities, so the layer is a bijection, and keeps their cells in its
            state.

    Raises:
        ValueError: If a column of a schema has no cells; or, in use, if a value is missing and
            the layer is a bijection, so nothing is drawn for it.

    Example:
        >>> rows = np.array([[0.5, 0], [1.5, 1], [2.0, 0], [2.5, 0]])
        >>> columns = Column("a"), Column("b", "category", ("no", "yes"))
        >>> layer = Marginals(Schema(columns).measure(rows))
        >>> y = layer.infer(torch.tensor(rows), Trace(temperature=0.0))
        >>> y.dtype, bool((layer.generate(y, Trace(generating=True)).numpy() == rows)[:, 1].all())
        (torch.float32, True)
    """

    cells: Tensor

    def __init__(self, columns: Schema | int):
        super().__init__()
        self.typed = isinstance(columns, Schema)
        features = len(columns) if isinstance(columns, Schema) else columns
        self.noise = StandardUniform((features,))
        self.tables: _Slots | None = None
        if isinstance(columns, Schema):
            self.tables = _Slots(columns)
        else:
            packed = torch.zeros(features, 6 + 2 * MOST, dtype=torch.int64)
            self.register_buffer("cells", packed)  # bits of float64, which `to` must not round
            self.register_load_state_dict_post_hook(_unpacked)
        self.exact = not (self.tables and self.tables.draws)
        self.is_preprocessing = not self.exact

    @property
    def calibrated(self) -> bool:
        """Whether the columns have been measured."""
        return self.tables is not None

    def set(self, schema: Schema) -> None:
        """Set the cells of columns of real numbers, without atoms."""
        self.cells.copy_(_packed(schema))
        self.tables = _Slots(schema)

    def measure(self, data: Rows) -> None:
        """Measure the columns on all rows of a `Dataset`."""
        self._measure(data.take(np.arange(len(data))))

    def _measure(self, rows: np.ndarray) -> None:
        plain = Schema(tuple(Column(str(j)) for j in range(len(self.cells))))
        self.set(plain.measure(rows.astype(np.float64), CELLS, atoms=False))

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Measure the columns on a batch, once."""
        if not self.calibrated:
            self._measure(x.detach().cpu().numpy())

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Rows to normal variables."""
        u = None if self.exact else trace.q(self, self.noise(x))
        return trace.bijection(self, x, u)

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Normal variables to rows."""
        x = trace.bijection(self, z)
        if trace.scoring and not self.exact:
            assert self.tables is not None
            trace.q(self, self.noise(z), self.tables.down(z.double())[1].to(z))
        encoded = bool(trace.given) and self not in trace.below
        if self.tables is None or not self.typed or trace.scoring or encoded:
            return x
        return self.tables.seen(x)

    def forward(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)`` of rows and the places u of values in their intervals, or 0.5."""
        like = self.noise.zeros
        if self.tables is None:
            return x, x.new_zeros(len(x))
        x = x.double()
        if self.exact and not torch.compiler.is_compiling() and bool(x.isnan().any()):
            raise ValueError(
                "x: a value is missing, and no column has missing values; fill it in, or measure "
                "the schema on rows in which it is missing"
            )
        u = torch.full_like(x, 0.5) if u is None else u.double().clamp(EDGE, 1 - EDGE)
        y, log_det = self.tables.up(x, u)
        return y.to(like), log_det.to(like)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, -log_det)``."""
        if self.tables is None:
            return y, y.new_zeros(len(y))
        x, _, log_det = self.tables.down(y.double())
        return (x if self.typed else x.to(self.noise.zeros)), -log_det.to(self.noise.zeros)

    def extra_repr(self) -> str:
        """Names the number of columns."""
        return str(len(self.noise.zeros))


# --- the state of a layer without a schema -----------------------------------------------------


def _packed(schema: Schema) -> Tensor:
    """The cells of plain columns as the bits of float64, int64 (D, 6 + 2 `MOST`)."""
    rows = torch.zeros(len(schema), 6 + 2 * MOST, dtype=torch.float64)
    for row, column in zip(rows, schema.columns, strict=True):
        c = column.measured
        row[:5] = torch.tensor([len(c), c.left, c.right, column.low, column.high]).double()
        for at, values in ((5, c.counts), (5 + MOST, c.edges)):
            row[at : at + len(values)] = torch.tensor(values, dtype=torch.float64)
    return rows.view(torch.int64)


def _unpacked(layer: Marginals, *_: Any) -> None:
    """Read the cells that a layer has loaded."""
    columns = []
    for j, row in enumerate(layer.cells.cpu().view(torch.float64).tolist()):
        n, left, right, low, high = int(row[0]), *row[1:5]
        counts, edges = row[5 : 5 + n], row[5 + MOST : 6 + MOST + n]
        cells = Cells(tuple(edges), tuple(counts), 0.0, left, right)
        columns.append(Column(str(j), low=low, high=high, cells=cells))
    measured = all(len(column.measured) for column in columns)
    layer.tables = _Slots(Schema(tuple(columns))) if measured else None


# --- distribution functions --------------------------------------------------------------------


class _Slots:
    """The distribution functions of columns, and their inverses, in float64.

    The unit interval of each column is divided into slots, in the order of F: values below its
    cells, each of its cells, missing values, and values above the cells (for levels: unknown
    ones). A slot consists of steps of equal mass, or without end and of geometric mass in a tail;
    a step is noisy if all of it is one value, whose place is drawn from it. A last slot, for
    values that are integrated out, is the whole of the interval.
    """

    def __init__(self, schema: Schema):
        self.binning, columns = Binning(schema), schema.columns
        most = max(len(column.measured) for column in columns)
        tables = [_table(column, most) for column in columns]
        t = {name: torch.stack([table[name] for table in tables]) for name in tables[0]}
        mass = t["mass"]
        before = F.pad(mass.cumsum(1)[:, :-2], (1, 1))
        after = F.pad(mass.flip(1)[:, 1:].cumsum(1)[:, :-1], (2, 0)).flip(1)
        cut = _sign(before < 0.5) * normal_quantile(torch.minimum(before, after + mass).log())
        share = torch.where(t["noisy"], -torch.expm1(-t["decay"]), t["decay"])
        share = torch.where(t["tail"], share, 1 / t["steps"])
        self.tensors = Tables(
            **t,
            before=before,
            after=after,
            cut=cut[:, :-1].contiguous(),
            log_mass=mass.log(),
            log_rate=mass.log() + share.log() - t["unit"].log(),
            seen=torch.tensor([_seen(c) for c in columns], dtype=torch.float64),
        )
        modeled = (mass > 0)[:, :-1] & ~t["tail"][:, :-1]
        self.draws = bool((t["noisy"][:, :-1] & modeled).any()) or any(
            c.measured.missing for c in columns
        )

    def up(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Normal variables (B, D) of rows and places in steps; and the log-determinant (B,)."""
        code, x, u = self.binning.locate(x).T, x.T.contiguous(), u.T
        of = _Slot(self.tensors.on(x.device), self._slot(code, x))
        gap = torch.where(of.below, of["low"] - x, x - of["low"]) / of["size"]
        gap = gap.nan_to_num(0.0).clamp(0.0, FARTHEST)
        i = torch.where(of["noisy"], torch.minimum(gap.floor(), of["steps"] - 1), 0.0)
        p = ((i + torch.where(of["noisy"], u, gap)) / of["steps"]).clamp(0.0, 1.0)
        before, after = of["before"] + p * of["mass"], of["after"] + (1 - p) * of["mass"]
        inward = torch.where(of.below, 1 - u, u)
        far = torch.log1p(inward * torch.expm1(-of["decay"])) - i * of["decay"]
        far = of["log_mass"] + torch.where(of["noisy"], far, -gap)
        nearest = torch.minimum(before, after).clamp(min=1e-300)  # for the gradient in tails
        log_p = torch.where(of["tail"], far, nearest.log())
        lower = torch.where(of["tail"], of.below, before < after)
        y = _sign(lower) * normal_quantile(log_p)
        return y.T, of.log_det(i, gap, y)

    def _slot(self, code: Tensor, x: Tensor) -> Tensor:
        """The slots of values (D, B), from their codes."""
        t = self.binning.on(x.device)
        n, top = t["cells"][:, None], self.tensors["low"].shape[1] - 1
        slot = torch.where(code < n, code + 1, top - 2)
        slot = torch.where(code == Binning.absent, top, slot)
        unknown = (code == Binning.below) & t["levels"][:, None]
        return torch.where((code == Binning.above) | unknown, top - 1, slot)

    def down(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, places in steps, and the log-determinant of `up`."""
        t, y = self.tensors.on(y.device), y.T.clamp(-1e100, 1e100).contiguous()
        of = _Slot(t, torch.searchsorted(t["cut"], y, right=True) - 1)
        before, after = torch.special.ndtr(y) - of["before"], torch.special.ndtr(-y) - of["after"]
        p = torch.where(y < 0, before / of["mass"], 1 - after / of["mass"]).clamp(0.0, 1.0)
        far = (of["log_mass"] - torch.special.log_ndtr(-y.abs())).clamp(min=0.0) / of["decay"]
        gap = torch.where(of["tail"], far, p * of["steps"])
        i = torch.where(of["noisy"], torch.minimum(gap.floor(), of["steps"] - 1), 0.0)
        part = torch.expm1((i - gap) * of["decay"]) / torch.expm1(-of["decay"])
        part = torch.where(of.below, 1 - part, part)
        u = torch.where(of["tail"], part, gap - i).clamp(0.0, 1.0)
        at = of["size"] * torch.where(of["noisy"], i + of["middle"], gap)
        x = self.binning.on_grid((of["low"] + torch.where(of.below, -at, at)).T)
        return x, u.T, of.log_det(i, gap, y)

    def seen(self, x: Tensor) -> Tensor:
        """The nearest rows in the range of the training rows, without unknown values."""
        return x.clamp(*self.tensors.on(x.device)["seen"].unbind(1))


class _Slot(dict[str, Tensor]):
    """The entries of tables (D, S) at slots (D, B)."""

    def __init__(self, tables: Mapping[str, Tensor], slot: Tensor):
        self.tables, self.slot, self.below = tables, slot, slot == 0

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.tables[name].gather(1, self.slot)
        return self[name]

    def log_det(self, i: Tensor, gap: Tensor, y: Tensor) -> Tensor:
        """Log of the mass of each step, or of the density, less that of y; nats (B,)."""
        fall = torch.where(self["noisy"], i, gap) * self["decay"]
        rate = self["log_rate"] - torch.where(self["tail"], fall, 0.0)
        return (rate + y.square() / 2 + LOG_SQRT_2PI).sum(0)


def _table(column: Column, most: int) -> dict[str, Tensor]:
    """The slots of a column with up to `most` cells, each of shape (most + 4,).

    They are one below all cells, the cells, one for missing values, one above all cells, and the
    whole interval. Value number i of a slot is low + (i + middle) size; a slot that does not
    consist of single values is continuous, from low to low + size. The i-th step of a tail has a
    mass of exp(-decay i), up to a factor.
    """
    c, n, grid = column.measured, len(column.measured), column.grid
    edges = torch.tensor(c.edges, dtype=torch.float64)
    width = edges.diff()
    wide, cells = width > 0, slice(1, 1 + n)
    low, size, steps, decay, unit, mass, middle = torch.ones(7, most + 4, dtype=torch.float64)
    noisy, tail = torch.ones_like(low, dtype=torch.bool), torch.zeros_like(low, dtype=torch.bool)
    low.fill_(math.nan)
    middle.zero_()
    mass.zero_()
    low[cells] = edges[:-1]
    size[cells] = torch.where(wide, width.new_full((), grid) if grid else width, 1.0)
    if grid:
        steps[cells] = torch.where(wide, (width / grid).round(), 1.0)
        middle[cells] = torch.where(wide, 0.5, 0.0)
    else:
        noisy[cells] = ~wide
    if not column.is_discrete:
        unit[cells] = torch.where(wide, size[cells], 1.0)
    low[-2] = n  # the position of an unknown level
    if not column.has_levels:
        for at, edge, scale in ((0, edges[0], c.left), (-2, edges[-1], c.right)):
            low[at], size[at], steps[at], tail[at] = edge, grid or scale, math.inf, True
            decay[at], noisy[at], middle[at] = size[at] / scale, bool(grid), 0.5 * bool(grid)
            unit[at] = 1.0 if column.is_discrete else size[at]
    mass[cells] = torch.tensor(c.counts, dtype=torch.float64) + 0.5
    mass[-3] = c.missing + 0.5 if column.missing else 0.0
    mass *= (sum(c.counts) + c.missing * column.missing) / mass.sum().clamp(min=1.0)
    mass[0], mass[-2] = float(not column.has_levels), 1.0
    mass /= mass.sum()
    mass[-1] = 1.0
    return {
        "low": low,
        "size": size,
        "steps": steps,
        "middle": middle,
        "decay": decay,
        "noisy": noisy,
        "tail": tail,
        "unit": unit,
        "mass": mass,
    }


def _seen(column: Column) -> tuple[float, float]:
    """The range of a column in the training rows."""
    if column.has_levels:
        return 0.0, len(column.levels) - 1.0
    if math.isnan(column.low):
        return -math.inf, math.inf
    return column.low, column.high


def _sign(positive: Tensor) -> Tensor:
    return torch.where(positive, 1.0, -1.0)
