"""Plots in a plain style, for light and for dark pages.

Matplotlib, from the extra ``musigma[plots]``, is imported when it is used, and its global state
stays as it is: no pyplot, no backend, no style.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from musigma.files import replacing

__all__ = ["DARK", "LIGHT", "PlotsMissing", "frame", "library", "name_axes", "plot", "save"]


class PlotsMissing(ValueError):
    """Matplotlib is not installed."""


_COLORS = {
    "paper": ("#ffffff", "none"),
    "ink": ("#1f2328", "#e4e6ea"),
    "muted": ("#656d76", "#98a0ab"),
    "faint": ("#e6e8eb", "#2b3038"),
    "data": ("#5b84b8", "#7fa9de"),
    "accent": ("#c8502d", "#f08a64"),
    "bad": ("#b3261e", "#ff8a80"),
    "latents": (
        ("#2b5c8a", "#2a8c82", "#8a9a2e", "#c98a1b", "#c8502d", "#8d4a8f"),
        ("#7fb2e5", "#5cc4b8", "#b9c95c", "#e9b35a", "#f08a64", "#c98bcb"),
    ),
}
LIGHT, DARK = (
    SimpleNamespace(**{name: pair[dark] for name, pair in _COLORS.items()}) for dark in (0, 1)
)
"""Colors on light and on dark pages."""


def library() -> Any:
    """Matplotlib, with the modules that plots need."""
    try:
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.layout_engine
        import matplotlib.ticker
    except ImportError as error:
        raise PlotsMissing("plots need matplotlib: pip install 'musigma[plots]'") from error
    return matplotlib


def plot(
    panels: int,
    colors: Any,
    title: str | None,
    width: float = 4.2,
    height: float = 2.75,
    columns: int | None = None,
) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, in rows of `columns`, in a plain style."""
    matplotlib = library()
    columns = min(panels, columns or panels)
    lines = -(-panels // columns)
    figure = matplotlib.figure.Figure(
        figsize=(width * columns, height * lines + (0.3 if title else 0)),
        dpi=200,
        layout=matplotlib.layout_engine.ConstrainedLayoutEngine(
            w_pad=0.1, h_pad=0.08, wspace=0.04
        ),
        facecolor=colors.paper,
    )
    if title:
        figure.suptitle(title, x=0.02, ha="left", color=colors.ink, fontsize=11, parse_math=False)
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(panels)]
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(colors.muted)
        ax.tick_params(colors=colors.muted, labelsize=9, length=0, pad=5)
        ax.tick_params(axis="x", length=3)
        ax.grid(axis="y", color=colors.faint, lw=0.9)
        ax.set_axisbelow(True)
        ax.locator_params(nbins=5)
        ax.margins(x=0.01)
    return figure, axes


def name_axes(ax: Any, y: str, x: str, colors: Any) -> None:
    """Name the y axis in the title, horizontally, and the x axis below."""
    ax.set_title(y, loc="left", color=colors.ink, fontsize=10, pad=8)
    ax.set_xlabel(x, color=colors.muted, fontsize=9)


def frame(
    ax: Any, shown: list[np.ndarray], ends: list[tuple[float, float, str, Any]], near_zero=False
) -> None:
    """Set limits that hold the values shown, and label each line at its end.

    Args:
        ax: The axes.
        shown: Values.
        ends: x, y, text and color at the end of each line; overlapping texts are moved apart.
        near_zero: Whether the axis begins at 0 if that is not far below the values.
    """
    values = np.concatenate(shown) if shown else np.zeros(1)
    low, high = float(values.min()), float(values.max())
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    low = 0.0 if near_zero and 0 < low < 0.5 * high else low
    ax.set_ylim(low, high)
    ends = sorted(ends, key=lambda end: end[1])
    apart = np.arange(len(ends)) * 0.085 * (high - low)
    heights = np.clip([y for _, y, _, _ in ends], low, high)
    heights = np.maximum.accumulate(heights - apart) + apart
    heights = np.minimum(heights, high - apart[::-1])
    last = max((x for x, *_ in ends), default=0.0)
    for (_, _, text, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            text,
            (last, height),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
            parse_math=False,
        )


def save(figure: Any, path: str | Path) -> None:
    """Save a figure in the format of the suffix, without a date in the file."""
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    stamps = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    if kind not in stamps:
        raise ValueError(f"path: expected a .png, .svg or .pdf file; got {path}")
    with replacing(path) as draft:
        figure.savefig(draft, format=kind, metadata=stamps[kind])
