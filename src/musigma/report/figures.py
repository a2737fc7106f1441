"""Pictures: grids of examples, scatter plots beside data, training curves.

Grids need Pillow; plots need matplotlib, from the extra ``musigma[plots]``. Both are imported when
they are used, and their global state stays as it is: no pyplot, no backend, no style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from musigma.files import number, replacing

__all__ = [
    "PlotsMissing",
    "comparison",
    "curves",
    "grid",
    "pixels",
    "points",
    "rows",
]

CELL = 56
"""Pixels that the longer side of a cell is enlarged to, at least."""

Panel = Literal["figure", "latents"]


class PlotsMissing(ValueError):
    """Matplotlib is not installed."""


# --- grids of images -------------------------------------------------------------------------


def pixels(images: Any, levels: int = 256) -> np.ndarray:
    """Images of integer levels as 8-bit pixels: level 0 is black, the highest is white.

    Args:
        images: Levels, an array or tensor (N, C, H, W) of any numeric type. Values outside
            0..levels-1 are clipped. The first three channels are red, green and blue; with 1 or 2
            channels, the first is gray.
        levels: Number of levels.

    Returns:
        uint8 (N, H, W, 1) or (N, H, W, 3).

    Raises:
        ValueError: If the images have another shape, or values that are not finite.

    Example:
        >>> pixels(np.array([0, 1, 1, 0]).reshape(1, 1, 2, 2), levels=2)[0, :, :, 0].tolist()
        [[0, 255], [255, 0]]
    """
    values = _array(images, "images")
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(
            f"images: expected a non-empty array (N, C, H, W); got shape {values.shape}"
        )
    if levels < 2:
        raise ValueError(f"levels: expected 2 or more; got {levels}")
    values = values[:, : 3 if values.shape[1] >= 3 else 1].astype(np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
        raise ValueError(
            f"images: {len(bad)} of {len(values)} have values that are not finite, the first of "
            f"them image {bad[0]}"
        )
    scaled = np.rint(values.clip(0, levels - 1) * (255 / (levels - 1)))
    return scaled.astype(np.uint8).transpose(0, 2, 3, 1)


def grid(
    images: Any,
    path: str | Path | None = None,
    *,
    levels: int = 256,
    columns: int | None = None,
    scale: int | None = None,
) -> Any:
    """Arrange many images in one picture, in reading order, with transparent gaps of 2 pixels.

    Args:
        images: As in `pixels`.
        path: A .png file to write, if any.
        levels: Number of levels.
        columns: Images per row; by default the picture is about square.
        scale: Integer factor by which images are enlarged; by default the smallest that makes
            their longer side `CELL` pixels.

    Returns:
        A `PIL.Image.Image`, gray or color, with alpha.

    Raises:
        ValueError: As in `pixels`; or if a number is below 1.

    Example:
        >>> grid(np.zeros((6, 1, 8, 8), np.uint8), columns=3).size
        (172, 114)
    """
    cells = _cells(pixels(images, levels), scale)
    n, height, width = cells.shape[:3]
    columns = _at_least_one("columns", columns) or _columns(n, height / width)
    return _paste(cells, [i // columns for i in range(n)], columns, path)


def rows(
    sets: Sequence[Any],
    path: str | Path | None = None,
    *,
    levels: int = 256,
    columns: int | None = None,
    scale: int | None = None,
) -> Any:
    """Stack sets of images, one column per example: originals, reconstructions, ...

    Args:
        sets: Images as in `pixels`, all of one shape.
        path: A .png file to write, if any.
        levels: Number of levels.
        columns: Examples per line, 8 by default; further ones follow below, after a wider gap.
        scale: As in `grid`.

    Returns:
        A `PIL.Image.Image`, gray or color, with alpha.

    Raises:
        ValueError: If there are no sets, or they differ in shape.

    Example:
        >>> x = np.zeros((4, 3, 28, 28))
        >>> rows([x, x], scale=1).size
        (118, 58)
    """
    if not len(sets):
        raise ValueError("sets: expected at least one set of images; got none")
    shown = [pixels(images, levels) for images in sets]
    if len(shapes := {s.shape for s in shown}) > 1:
        raise ValueError(f"sets: expected images of one shape; got {sorted(shapes)}")
    n = len(shown[0])
    bands = math.ceil(n / (_at_least_one("columns", columns) or 8))
    columns = math.ceil(n / bands)
    order, lines = [], []
    for band in range(bands):
        for s in range(len(sets)):
            for i in range(band * columns, min(n, (band + 1) * columns)):
                order.append(shown[s][i])
                lines.append(band * len(sets) + s)
    return _paste(_cells(np.stack(order), scale), lines, columns, path, band=len(sets))


def _columns(n: int, aspect: float) -> int:
    """The number of columns of an about square grid with as few empty cells as possible."""
    square = math.ceil(math.sqrt(n * aspect))
    choices = range(square, min(n, math.ceil(square * 1.5)) + 1)
    return min(choices, key=lambda c: -n % c, default=n)


def _cells(cells: np.ndarray, scale: int | None) -> np.ndarray:
    """Images enlarged by an integer factor."""
    scale = _at_least_one("scale", scale) or max(1, math.ceil(CELL / max(cells.shape[1:3])))
    return cells.repeat(scale, 1).repeat(scale, 2)


def _paste(
    cells: np.ndarray, lines: list[int], columns: int, path: str | Path | None, band: int = 0
) -> Any:
    """Paste cells (N, H, W, C) on their lines, with a wider gap after every `band` lines."""
    from PIL import Image

    n, height, width, channels = cells.shape
    gap, wide = 2, 12
    count = max(lines) + 1
    tops = [i * (height + gap) + (i // band * (wide - gap) if band else 0) for i in range(count)]
    size = (tops[-1] + height, columns * (width + gap) - gap)
    canvas = np.zeros((*size, channels + 1), np.uint8)
    column = -1
    for i in range(n):
        column = column + 1 if i and lines[i] == lines[i - 1] else 0
        top, left = tops[lines[i]], column * (width + gap)
        canvas[top : top + height, left : left + width, :channels] = cells[i]
        canvas[top : top + height, left : left + width, channels] = 255
    image = Image.fromarray(canvas)  # two channels are LA, four are RGBA
    if path is not None:
        with replacing(path) as draft, draft.open("wb") as file:
            image.save(file, format="PNG", optimize=True)
    return image


# --- plots -----------------------------------------------------------------------------------


class _Colors(NamedTuple):
    paper: str
    ink: str
    muted: str
    faint: str
    data: str
    accent: str
    bad: str
    latents: tuple[str, ...]


LIGHT = _Colors(
    paper="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    faint="#e6e8eb",
    data="#5b84b8",
    accent="#c8502d",
    bad="#b3261e",
    latents=("#2b5c8a", "#2a8c82", "#8a9a2e", "#c98a1b", "#c8502d", "#8d4a8f"),
)
DARK = _Colors(
    paper="none",
    ink="#e4e6ea",
    muted="#98a0ab",
    faint="#2b3038",
    data="#7fa9de",
    accent="#f08a64",
    bad="#ff8a80",
    latents=("#7fb2e5", "#5cc4b8", "#b9c95c", "#e9b35a", "#f08a64", "#c98bcb"),
)


def curves(
    metrics: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    unit: Literal["bits", "nats"] | None = None,
    panels: Sequence[Panel] = ("figure", "latents"),
    title: str | None = None,
    dark: bool = False,
) -> None:
    """Plot the course of training from the rows of ``metrics.jsonl``.

    One panel shows the figure: on training batches (faint, and smoothed) and on validation data
    (marked, with a band of one standard error). The other shows the cost of each latent. Early
    values far above the rest lie outside the frame.

    Args:
        metrics: Rows of `kind` "train", "evaluation" and "skipped"; other kinds are ignored.
        path: A .png, .svg or .pdf file.
        unit: Bits per dimension or nats per example; by default bits if all rows have them.
        panels: Which of "figure" and "latents"; a panel without data is left out.
        title: Title above the panels.
        dark: Whether the plot is for a dark page: light ink on a transparent background.

    Raises:
        ValueError: If there is nothing to plot.
        PlotsMissing: If matplotlib is not installed.
    """
    training, evaluations, skipped = (
        [row for row in metrics if row.get("kind") == kind]
        for kind in ("train", "evaluation", "skipped")
    )
    if unit is None:
        all_bits = all(row.get("bits_per_dim") is not None for row in [*training, *evaluations])
        unit = "bits" if all_bits else "nats"
    latents = _latents(training)
    drawn = [p for p in panels if (len(latents) if p == "latents" else training or evaluations)]
    if not drawn:
        raise ValueError("metrics: there are no rows to plot")
    colors = DARK if dark else LIGHT
    figure, axes = _figure(len(drawn), colors, title)
    for panel, ax in zip(drawn, axes, strict=True):
        if panel == "figure":
            _figure_panel(ax, training, evaluations, skipped, unit, colors)
        else:
            _latents_panel(ax, training, latents, colors)
        _steps_axis(ax, "training step")
    _save(figure, path)


def comparison(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str | None = None,
    unit: str = "bits per dimension",
    dark: bool = False,
) -> None:
    """Compare runs: their figures over minutes of training.

    Args:
        runs: Points (seconds, figure) of each run, by name.
        path: A .png, .svg or .pdf file.
        title: Title above the panel.
        unit: Unit of the figures.
        dark: As in `curves`.

    Raises:
        ValueError: If no run has a point.
        PlotsMissing: If matplotlib is not installed.
    """
    tracks = {name: _finite(*zip(*points, strict=True)) for name, points in runs.items() if points}
    tracks = {name: track for name, track in tracks.items() if len(track[0])}
    if not tracks:
        raise ValueError("runs: there are no finite points to compare")
    colors = DARK if dark else LIGHT
    figure, (ax,) = _figure(1, colors, title, width=6.4)
    ends = []
    for i, (name, (seconds, values)) in enumerate(tracks.items()):
        color = colors.latents[i % len(colors.latents)]
        ax.plot(seconds / 60, values, "-o", color=color, lw=1.6, ms=3.5, mew=0)
        ends.append((seconds[-1] / 60, values[-1], f"{name}  {values[-1]:.3f}", color))
    _frame(ax, np.concatenate([values for _, values in tracks.values()]))
    ax.set_xlim(left=0)
    _label_ends(ax, ends)
    _name_axes(ax, "" if unit in (title or "") else unit, "minutes of training", colors)
    _save(figure, path)


def points(x: Any, path: str | Path, *, reference: Any = None) -> None:
    """Scatter plots of points in the plane: samples, and data beside them, on the same axes.

    Args:
        x: Samples (N, 2), array or tensor.
        path: A .png, .svg or .pdf file.
        reference: Data (M, 2), if any. They set the limits; samples outside are counted.

    Raises:
        ValueError: If the points are not two-dimensional.
        PlotsMissing: If matplotlib is not installed.
    """
    samples = _plane(x, "x")
    sets = [("samples", samples, LIGHT.accent)]
    if reference is not None:
        sets.insert(0, ("data", _plane(reference, "reference"), LIGHT.data))
    base = sets[0][1][np.isfinite(sets[0][1]).all(1)]
    if not len(base):
        raise ValueError("x: there are no finite points to plot")
    low, high = base.min(0), base.max(0)
    half = max(float((high - low).max()) * 0.56, 1e-6)
    middle = (low + high) / 2
    figure, axes = _figure(len(sets), LIGHT, None, width=3.4, height=3.6)
    for ax, (name, values, color) in zip(axes, sets, strict=True):
        inside = (np.abs(values - middle) <= half).all(1)  # NaN is not
        size = float(np.clip(2500 / max(len(values), 1), 2, 16))
        ax.scatter(*values[inside].T, s=size, color=color, alpha=0.55, linewidths=0)
        ax.set_xlim(middle[0] - half, middle[0] + half)
        ax.set_ylim(middle[1] - half, middle[1] + half)
        ax.set_aspect("equal")
        outside = len(values) - int(inside.sum())
        note = f", {outside:,} of them outside" if outside else ""
        _name_axes(ax, f"{name}: {len(values):,} points{note}", "$x_1$", LIGHT)
        ax.set_ylabel("$x_2$", color=LIGHT.muted, rotation=0, fontsize=9)
    _save(figure, path)


def _figure_panel(
    ax: Any,
    training: list[Mapping[str, Any]],
    evaluations: list[Mapping[str, Any]],
    skipped: list[Mapping[str, Any]],
    unit: str,
    colors: _Colors,
) -> None:
    """Plot training and validation figures, and mark skipped steps."""
    key = "bits_per_dim" if unit == "bits" else "nats"
    error = "standard_error" if unit == "bits" else "standard_error_nats"
    shown, ends = [], []
    steps, values = _series(training, key)
    if len(steps):
        smooth = _smooth(values)
        ax.plot(steps, values, color=colors.data, lw=0.7, alpha=0.28)
        ax.plot(steps, smooth, color=colors.data, lw=1.6, label="training, smoothed")
        late = smooth[steps >= 0.05 * steps[-1]]
        shown += [late, np.quantile(values[len(values) // 4 :], [0.01, 0.99])]
    steps, values = _series(evaluations, key)
    if len(steps):
        rows = [row for row in evaluations if number(row.get(key)) is not None]
        errors = np.array([number(row.get(error)) or 0.0 for row in rows])
        low, high = values - errors, values + errors
        ax.fill_between(steps, low, high, color=colors.accent, alpha=0.18, lw=0)
        label = "validation ± standard error" if errors.any() else "validation"
        ax.plot(steps, values, "-o", color=colors.accent, lw=1.6, ms=4.5, mew=0, label=label)
        last = f"{values[-1]:.3f}" if unit == "bits" else f"{values[-1]:.4g}"
        ends.append((steps[-1], values[-1], last, colors.accent))
        shown.append(values)
    _frame(ax, np.concatenate(shown) if shown else np.zeros(1))
    _label_ends(ax, ends)
    if skipped:
        at, label = [row["step"] for row in skipped], f"skipped steps: {len(skipped)}"
        axis = ax.get_xaxis_transform()
        ax.plot(at, [0.02] * len(at), "|", color=colors.bad, transform=axis, label=label)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, labelcolor=colors.ink, loc="upper right")
    name = "bits per dimension" if unit == "bits" else "nats per example"
    _name_axes(ax, name, "", colors)


def _latents(training: list[Mapping[str, Any]]) -> np.ndarray:
    """The cost of each latent (steps, latents), of rows with the largest number of latents."""
    rows = [row["kl"] for row in training if row.get("kl")]
    width = max(map(len, rows), default=0)
    rows = [kl for kl in rows if len(kl) == width]
    return np.array([[math.nan if v is None else v for v in kl] for kl in rows], np.float64)


def _latents_panel(
    ax: Any, training: list[Mapping[str, Any]], costs: np.ndarray, colors: _Colors
) -> None:
    """Plot the cost of each latent, top first."""
    from matplotlib.colors import LinearSegmentedColormap

    gradient = LinearSegmentedColormap.from_list("latents", colors.latents, N=1024)
    count = costs.shape[1]
    steps = np.array([r["step"] for r in training if len(r.get("kl") or ()) == count], float)
    ends, shown = [], []
    for i in range(count):
        at, values = _finite(steps, costs[:, i])
        if not len(at):
            continue
        color = gradient(i / (count - 1)) if count > 1 else colors.latents[0]
        smooth = _smooth(values)
        if count == 1:
            ax.plot(at, values, color=color, lw=0.7, alpha=0.28)
        ax.plot(at, smooth, color=color, lw=1.6 if count <= 8 else 1.0)
        shown.append(smooth[at >= 0.05 * at[-1]])
        if count <= 8 or i in (0, count - 1):
            name = f"z{i}" + (" top" if count > 1 and i == 0 else "")
            ends.append((at[-1], smooth[-1], f"{name}  {smooth[-1]:.3g}", color))
    _frame(ax, np.concatenate(shown) if shown else np.zeros(1))
    low, high = ax.get_ylim()
    if 0 < low < 0.5 * high:
        ax.set_ylim(bottom=0)
    _label_ends(ax, ends)
    flow = all(not row.get("log_px") for row in training)
    what = "−log p of each latent" if flow else "KL of each latent"
    _name_axes(ax, f"{what}, nats", "", colors)


# --- pieces of plots ---------------------------------------------------------------------------


def _figure(
    panels: int, colors: _Colors, title: str | None, width: float = 4.2, height: float = 2.75
) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, in a plain style."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise PlotsMissing("plots need matplotlib: pip install 'musigma[plots]'") from error
    figure = Figure(
        figsize=(width * panels, height + (0.3 if title else 0)),
        dpi=200,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.04),
        facecolor=colors.paper,
    )
    if title:
        figure.suptitle(title, x=0.02, ha="left", color=colors.ink, fontsize=11, parse_math=False)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
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


def _name_axes(ax: Any, y: str, x: str, colors: _Colors) -> None:
    """Name the y axis in the title, horizontally, and the x axis below."""
    ax.set_title(y, loc="left", color=colors.ink, fontsize=10, pad=8)
    ax.set_xlabel(x, color=colors.muted, fontsize=9)


def _steps_axis(ax: Any, name: str) -> None:
    """Label steps as 2k, 4k, ..."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:g}")
    )
    ax.set_xlabel(name, fontsize=9, color=ax.xaxis.get_ticklabels()[0].get_color())


def _frame(ax: Any, values: np.ndarray) -> None:
    """Set limits that hold the values, with a margin."""
    low, high = float(values.min()), float(values.max())
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    ax.set_ylim(low - margin, high + margin)


def _label_ends(ax: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Label each line at its end, and move overlapping labels apart."""
    low, high = ax.get_ylim()
    needed = 0.085 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    heights = [min(max(y, low), high) for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + needed)
    if heights and (over := heights[-1] - high) > 0:
        heights[-1] -= over
        for i in reversed(range(len(heights) - 1)):
            heights[i] = min(heights[i], heights[i + 1] - needed)
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


def _save(figure: Any, path: str | Path) -> None:
    """Save a figure in the format of the suffix, without a date in the file."""
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    stamps = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    if kind not in stamps:
        raise ValueError(f"path: expected a .png, .svg or .pdf file; got {path}")
    with replacing(path) as draft:
        figure.savefig(draft, format=kind, metadata=stamps[kind])


# --- numbers -----------------------------------------------------------------------------------


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a thirtieth of the values, and over fewer at both ends.

    >>> _smooth(np.array([4.0, 1.0, 1.0, 4.0])).tolist()
    [4.0, 2.0, 2.0, 2.5]
    """
    n, half = len(values), max(1, len(values) // 60)
    i = np.arange(n)
    first, last = i - np.minimum(i, half), i + np.minimum(np.minimum(i, half), n - 1 - i)
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a value is finite, and the values."""
    pairs = [(row["step"], v) for row in rows if (v := number(row.get(key))) is not None]
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _finite(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The pairs in which both are finite."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]


def _plane(x: Any, name: str) -> np.ndarray:
    values = _array(x, name).astype(np.float64)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"{name}: expected points in the plane, (N, 2); got {values.shape}")
    return values


def _array(x: Any, name: str) -> np.ndarray:
    """A tensor on any device, or anything NumPy accepts, as an array of numbers."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu() if x.is_floating_point() else x.detach().cpu()
    values = np.asarray(x)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers; got {values.dtype}")
    return values


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name}: expected 1 or more; got {value}")
    return value
