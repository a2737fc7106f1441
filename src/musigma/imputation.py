"""Missing values: what draws of them say, and draws and means by a VAE of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma import context as contexts
from musigma.conditions import written
from musigma.context import Context
from musigma.model import Model
from musigma.schema import Schema
from musigma.trace import Trace

__all__ = ["Imputation", "draw_missing", "impute", "takes_missing"]


@dataclass(frozen=True)
class Imputation:
    """Draws of the missing values of rows.

    Attributes:
        schema: The columns.
        rows: The rows (N, D); NaN where a value is missing.
        cells: The row and the column of each missing value, (M, 2).
        draws: Draws of each missing value, (M, n).
    """

    schema: Schema
    rows: np.ndarray
    cells: np.ndarray
    draws: np.ndarray

    def filled(self, i: int) -> np.ndarray:
        """The rows with draw i of each missing value (N, D)."""
        return self._with(self.draws[:, i])

    def center(self) -> np.ndarray:
        """The rows with the mean of the draws of each missing value, or its most frequent level.

        Means of whole numbers are fractions.
        """
        values = self.draws.mean(1)
        for j in self._columns(levels=True):
            at = self.cells[:, 1] == j
            values[at] = self._modes(j)[0]
        return self._with(values)

    def summary(self) -> list[dict[str, Any]]:
        """What the draws say of each missing value.

        Each entry has `row` and `column`; for a number its `mean`, `std` (in days for a date, in
        seconds for a time) and the quantiles `q05`, `q50` and `q95`; for a level `mode`, the most
        frequent one, and its `share` of the draws.
        """
        columns = self.schema.columns
        found: list[dict[str, Any]] = [
            {"row": i, "column": columns[j].name} for i, j in self.cells.tolist()
        ]
        for j in self._columns(levels=True):
            at = np.flatnonzero(self.cells[:, 1] == j)
            for i, mode, share in zip(at, *map(np.ndarray.tolist, self._modes(j)), strict=True):
                found[i] |= {"mode": columns[j].levels[int(mode)], "share": share}
        for j in self._columns(levels=False):
            at, names = np.flatnonzero(self.cells[:, 1] == j), ("mean", "q05", "q50", "q95")
            draws, time = self.draws[at], columns[j].kind in ("date", "datetime")
            numbers = [draws.mean(1), *np.quantile(draws, [0.05, 0.5, 0.95], axis=1)]
            for i, std, *values in zip(at, draws.std(1).tolist(), *numbers, strict=True):
                shown = [written(columns[j], v) if time else float(v) for v in values]
                found[i] |= {"std": std, **dict(zip(names, shown, strict=True))}
        return found

    def _columns(self, *, levels: bool) -> list[int]:
        columns = self.schema.columns
        return [j for j in np.unique(self.cells[:, 1]).tolist() if columns[j].has_levels == levels]

    def _modes(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """The most frequent level of each missing value of a column, and its share."""
        draws = self.draws[self.cells[:, 1] == j]
        levels = np.arange(len(self.schema.columns[j].levels))
        counts = np.stack([(draws == level).sum(1) for level in levels], 1)
        return counts.argmax(1), counts.max(1) / draws.shape[1]

    def _with(self, values: np.ndarray) -> np.ndarray:
        rows = self.rows.copy()
        rows[tuple(self.cells.T)] = values
        return rows


@torch.no_grad()
def impute(
    model: Model, x: Tensor, k: int = 1000, context: Context = None, *, at_once: int = 20_000
) -> Tensor:
    r"""The mean of missing values given the observed ones, by importance sampling.

    .. math:: E[x_m | x_o] \approx \sum_i \frac{w_i}{\sum_j w_j} E[x_m | z_i], \quad
        z_i \sim q(z | x_o), \quad w_i = p(x_o, z_i) / q(z_i | x_o)

    The error vanishes as k grows. (Mattei & Frellsen, "MIWAE: Deep Generative Modelling and
    Imputation of Incomplete Data Sets", 2019, arXiv:1812.02633.)

    Args:
        model: A model that takes NaN, such as `musigma.build("miwae", (D,))`.
        x: Rows (B, D), NaN where a value is missing.
        k: Draws of z for each row.
        context: One row per example, or None.
        at_once: Number of draws per pass.

    Returns:
        x, with the missing values filled.

    Raises:
        ValueError: If k is below 1.

    Example:
        >>> import musigma
        >>> model = musigma.build("miwae", (3,), latents=2, width=8)
        >>> x = torch.tensor([[0.5, torch.nan, 1.0]])
        >>> filled = impute(model, x, k=10)
        >>> bool(filled.isnan().any()), bool(filled[0, 2] == 1)
        (False, True)
    """
    filled = []
    for rows, given, z, log_w in _weighted(model, x, k, context, at_once):
        mean = model.decode(z, given, mode=True).unflatten(0, (-1, k))
        weighed = torch.einsum("bk,bkd->bd", log_w.softmax(1).to(mean), mean)
        filled.append(torch.where(rows.isnan(), weighed.to(rows), rows))
    return torch.cat(filled)


@torch.no_grad()
def draw_missing(
    model: Model,
    x: Tensor,
    n: int,
    k: int = 1000,
    context: Context = None,
    *,
    at_once: int = 20_000,
) -> Tensor:
    """Draws of the missing values given the observed ones, by importance resampling.

    Each draw takes one of k values of z, with the probabilities w_i / Σ w_j of `impute`, and draws
    the missing values of a row together from p(x | z). It is exact as k grows. (Mattei &
    Frellsen, 2019, arXiv:1812.02633; Rubin, "Using the SIR algorithm to simulate posterior
    distributions", 1988.)

    Args:
        model: As for `impute`, and so are the others.
        x: Rows (B, D), NaN where a value is missing.
        n: Number of draws.
        k: Draws of z for each row.
        context: One row per example, or None.
        at_once: Number of draws per pass.

    Returns:
        Filled rows (B, n, D).

    Raises:
        ValueError: If k or n is below 1.

    Example:
        >>> import musigma
        >>> model = musigma.build("miwae", (3,), latents=2, width=8)
        >>> x = torch.tensor([[0.5, torch.nan, 1.0]])
        >>> filled = draw_missing(model, x, 4, k=10)
        >>> filled.shape, bool((filled[:, :, 2] == 1).all()), len(filled[0, :, 1].unique())
        (torch.Size([1, 4, 3]), True, 4)
    """
    if n < 1:
        raise ValueError(f"n: expected 1 or more draws; got {n}")
    filled = []
    for rows, given, z, log_w in _weighted(model, x, k, context, at_once):
        chosen = torch.multinomial(log_w.softmax(1), n, replacement=True)
        at = (chosen + k * torch.arange(len(rows), device=chosen.device)[:, None]).flatten()
        drawn = model.decode([part[at] for part in z], contexts.rows(given, at), mode=False)
        rows = rows[:, None].expand(-1, n, -1)
        filled.append(torch.where(rows.isnan(), drawn.unflatten(0, (-1, n)).to(rows), rows))
    return torch.cat(filled)


def _weighted(
    model: Model, x: Tensor, k: int, context: Context, at_once: int
) -> Iterator[tuple[Tensor, Context, list[Tensor], Tensor]]:
    """Some rows, their context k times, k draws of z for each, and log w (B, k)."""
    if k < 1:
        raise ValueError(f"k: expected 1 or more draws; got {k}")
    sites = list(model.latents())
    for rows, given in contexts.in_parts(model.floating(x), context, max(1, at_once // k)):
        given, trace = contexts.repeat(given, k), Trace()
        model.infer(rows.repeat_interleave(k, 0), trace, given)
        log_w = trace.evidence(sites).elbo.reshape(len(rows), k)
        yield rows, given, [trace.values[site] for site in sites], log_w


@torch.no_grad()
def takes_missing(model: Model, features: int) -> bool:
    """Whether a model scores rows of numbers in which values are missing (NaN)."""
    row = model.floating(torch.full((1, features), torch.nan))
    try:
        return bool(model(row).elbo.isfinite().all())
    except (ValueError, RuntimeError):  # distributions refuse NaN
        return False
