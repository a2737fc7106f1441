"""Pictures of tables: figures with intervals, marginals, associations, distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musigma.report.axes import DARK, LIGHT, library, name_axes, plot, save

__all__ = ["cumulative", "intervals", "marginals", "matrices"]

NAMED = 30
"""Columns of a matrix, above which they have no names."""


def intervals(
    rows: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    dark: bool = False,
) -> None:
    """Plot figures with their intervals, one below another.

    Args:
        rows: A figure and the ends of its interval, by name.
        path: A .png, .svg or .pdf file.
        title: What the figures are.
        reference: Where a line is drawn.
        limits: Values that the axis shows at least.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    figure, (ax,) = plot(1, colors, None, width=6.4, height=0.8 + 0.36 * len(rows))
    for i, (value, low, high) in enumerate(rows.values()):
        ax.plot([low, high], [i, i], color=colors.data, lw=5, alpha=0.45, solid_capstyle="butt")
        ax.plot([value], [i], "o", color=colors.accent, ms=6)
    if reference is not None:
        ax.axvline(reference, color=colors.muted, lw=1, ls=(0, (4, 3)))
    if limits is not None:
        (low, high), (least, most) = ax.get_xlim(), limits
        ax.set_xlim(min(low, least), max(high, most))
    name_axes(ax, title, "", colors)
    ax.set_yticks(range(len(rows)), list(rows), color=colors.ink, parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False)
    save(figure, path)


def marginals(columns: Sequence[Any], path: str | Path, *, dark: bool = False) -> None:
    """Plot columns of two tables over each other, a panel for each.

    Args:
        columns: Objects with `column`, a name; `bins`, the edges of intervals or the names of
            levels; `real` and `synthetic`, the share of the rows in each.
        path: A .png, .svg or .pdf file.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    figure, axes = plot(len(columns), colors, None, width=2.6, height=1.75, columns=4)
    for ax, one in zip(axes, columns, strict=True):
        if one.bins and isinstance(one.bins[0], str):
            at = np.arange(len(one.bins))
            ax.bar(at - 0.2, one.real, 0.4, color=colors.data, alpha=0.8)
            ax.bar(at + 0.2, one.synthetic, 0.4, color=colors.accent, alpha=0.8)
            ax.set_xticks(at, [_short(name) for name in one.bins], rotation=45, ha="right")
            for label in ax.get_xticklabels():
                label.set_parse_math(False)
        elif one.bins:
            ax.stairs(one.real, one.bins, color=colors.data, fill=True, alpha=0.45)
            ax.stairs(one.synthetic, one.bins, color=colors.accent, lw=1.4)
            ax.locator_params(axis="x", nbins=3)
        ax.tick_params(labelsize=7, pad=3)
        ax.set_yticks([])
        ax.set_title(
            _short(one.column, 30), loc="left", color=colors.ink, fontsize=9, parse_math=False
        )
    save(figure, path)


def matrices(
    names: Sequence[str],
    panels: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    dark: bool = False,
) -> None:
    """Plot matrices (D, D) of values from -1 to 1, side by side, each with colors of its range.

    Args:
        names: Names of the D columns.
        panels: Matrices by title.
        path: A .png, .svg or .pdf file.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    matplotlib = library()
    middle = "#171b20" if dark else "#ffffff"
    scale = matplotlib.colors.LinearSegmentedColormap.from_list(
        "associations", [colors.data, middle, colors.accent]
    )
    size = min(4.6, 2.4 + 0.12 * len(names))
    figure, axes = plot(len(panels), colors, None, width=size, height=size)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        limit = max(0.01, float(np.abs(values).max()))
        norm = matplotlib.colors.Normalize(-limit, limit)
        ax.imshow(values, cmap=scale, norm=norm, interpolation="nearest")
        at, texts = range(len(names)), [_short(name) for name in names]
        at, texts = (at, texts) if len(names) <= NAMED else ((), ())
        ax.set_xticks(at, texts, rotation=90, parse_math=False)
        ax.set_yticks(at, texts if ax is axes[0] else [""] * len(at), parse_math=False)
        ax.tick_params(labelsize=7, length=0)
        ax.grid(visible=False)
        ax.spines["bottom"].set_visible(False)
        name_axes(ax, title, "", colors)
        mappable = matplotlib.cm.ScalarMappable(norm, scale)
        bar = figure.colorbar(mappable, ax=ax, shrink=0.7, pad=0.01)
        bar.ax.locator_params(nbins=5)
        bar.ax.tick_params(colors=colors.muted, labelsize=7)
        bar.outline.set_visible(False)
    save(figure, path)


def cumulative(
    samples: Mapping[str, np.ndarray], path: str | Path, *, title: str, x: str, dark: bool = False
) -> None:
    """Plot the share of values up to each value, for several samples.

    Args:
        samples: Values by name, two sets of them.
        path: A .png, .svg or .pdf file.
        title: What the values are.
        x: Name of the axis.
        dark: As in `musigma.report.figures.curves`.
    """
    colors = DARK if dark else LIGHT
    figure, (ax,) = plot(1, colors, None, width=6.4)
    inks = (colors.accent, colors.data)
    for color, (name, values) in zip(inks, samples.items(), strict=True):
        values = np.sort(values)
        shares = np.arange(1, len(values) + 1) / len(values)
        ax.step(values, shares, where="post", color=color, lw=1.6, label=name)
    ax.set_xlim(0, max(float(np.quantile(values, 0.995)) for values in samples.values()) or 1.0)
    ax.legend(frameon=False, fontsize=9, labelcolor=colors.ink, loc="lower right")
    name_axes(ax, title, x, colors)
    save(figure, path)


def _short(name: str, most: int = 12) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
