"""Pictures of coverage: how far the distribution of ranks is from uniform."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from musigma.report.axes import DARK, LIGHT, plot, save

__all__ = ["differences", "levels"]


def differences(
    grid: np.ndarray,
    curves: Mapping[str, np.ndarray],
    band: tuple[np.ndarray, np.ndarray],
    path: str | Path,
    *,
    off: frozenset[str] = frozenset(),
    dark: bool = False,
) -> None:
    """Plot distribution functions of ranks minus that of uniform ranks, a panel for each.

    Args:
        grid: Points (K,).
        curves: Values at the points, by name.
        band: The two ends of the band that holds uniform ranks.
        path: A .png, .svg or .pdf file.
        off: Names of the curves to draw as wrong.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    figure, axes = plot(len(curves), colors, None, width=2.6, height=1.9, columns=4)
    apart = [np.abs(each - grid).max() for each in (*curves.values(), *band)]
    limit = 1.15 * float(max(apart))
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        _band(ax, grid, band, colors)
        color = colors.bad if name in off else colors.data
        ax.plot(grid, values - grid, color=color, lw=1.5)
        ax.set_ylim(-limit, limit)
        ax.set_xlim(0, 1)
        ax.tick_params(labelsize=7, pad=3)
        ax.set_title(name, loc="left", color=colors.ink, fontsize=9, parse_math=False)
    save(figure, path)


def levels(
    grid: np.ndarray,
    curves: Mapping[str, np.ndarray],
    band: tuple[np.ndarray, np.ndarray],
    path: str | Path,
    *,
    dark: bool = False,
) -> None:
    """Plot the share of true parameters in regions against the level of the regions.

    Args:
        grid: Levels (K,).
        curves: Shares at the levels, by name.
        band: The two ends of the band that holds the curves of calibrated draws.
        path: A .png, .svg or .pdf file.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    figure, (left, right) = plot(2, colors, None, width=4.0, height=3.6)
    inks = (colors.accent, colors.data, colors.latents[2])
    for ax, below in ((left, np.zeros_like(grid)), (right, grid)):
        ax.fill_between(grid, band[0] - below, band[1] - below, color=colors.faint, lw=0)
        ax.plot(grid, grid - below, color=colors.muted, lw=1, ls=(0, (4, 3)))
        for ink, (name, values) in zip(inks, curves.items(), strict=False):
            ax.plot(grid, values - below, color=ink, lw=1.6, label=name)
        ax.set_xlim(0, 1)
        ax.set_xlabel("level of the regions", color=colors.muted, fontsize=9)
    left.set_ylim(0, 1)
    left.legend(frameon=False, fontsize=8, labelcolor=colors.ink, loc="upper left")
    for ax, title in ((left, "share of true parameters inside"), (right, "share minus level")):
        ax.set_title(title, loc="left", color=colors.ink, fontsize=10, pad=8)
    save(figure, path)


def _band(ax: Any, grid: np.ndarray, band: tuple[np.ndarray, np.ndarray], colors: Any) -> None:
    """Shade the band around zero."""
    ax.fill_between(grid, band[0] - grid, band[1] - grid, color=colors.faint, lw=0)
    ax.axhline(0, color=colors.muted, lw=0.8, ls=(0, (4, 3)))
