"""Pictures: grids of examples, scatter plots beside data, training curves.

Grids need Pillow; plots need matplotlib, from the extra ``musigma[plots]``. Both are imported when
they are used, and their global state stays as it is: no pyplot, no backend, no style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from musigma.files import number, replacing
from musigma.report.axes import DARK, LIGHT, PlotsMissing, frame, library, name_axes, plot, save

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
    cells = pixels(images, levels)
    n, height, width = cells.shape[:3]
    columns = _at_least_one("columns", columns) or _columns(n, height / width)
    lines = [cells[i : i + columns] for i in range(0, n, columns)]
    return _sheet(lines, n, columns, scale, path)


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
    lines = [images[i : i + columns] for i in range(0, n, columns) for images in shown]
    return _sheet(lines, len(sets), columns, scale, path)


def _columns(n: int, aspect: float) -> int:
    """The number of columns of an about square grid with as few empty cells as possible."""
    square = math.ceil(math.sqrt(n * aspect))
    choices = range(square, min(n, math.ceil(square * 1.5)) + 1)
    return min(choices, key=lambda c: -n % c, default=n)


def _sheet(lines: list[np.ndarray], band: int, columns: int, scale: int | None, path: Any) -> Any:
    """Lines of images (N, H, W, C), enlarged, with a wider gap after every `band` lines."""
    from PIL import Image

    height, width, channels = lines[0].shape[1:]
    scale = _at_least_one("scale", scale) or max(1, math.ceil(CELL / max(height, width)))
    height, width, gap, wide = height * scale, width * scale, 2, 12
    tops = [i * (height + gap) + i // band * (wide - gap) for i in range(len(lines))]
    size = (tops[-1] + height, columns * (width + gap) - gap)
    canvas = np.zeros((*size, channels + 1), np.uint8)
    for top, line in zip(tops, lines, strict=True):
        for i, cell in enumerate(line.repeat(scale, 1).repeat(scale, 2)):
            place = canvas[top : top + height, i * (width + gap) :][:, :width]
            place[..., :channels], place[..., channels] = cell, 255
    image = Image.fromarray(canvas)  # two channels are LA, four are RGBA
    if path is not None:
        with replacing(path) as draft, draft.open("wb") as file:
            image.save(file, format="PNG", optimize=True)
    return image


# --- plots -----------------------------------------------------------------------------------


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
    rows = {
        kind: [row for row in metrics if row.get("kind") == kind]
        for kind in ("train", "evaluation", "skipped")
    }
    figures, (steps, costs) = rows["train"] + rows["evaluation"], _latents(rows["train"])
    if unit is None:
        unit = "bits" if all(row.get("bits_per_dim") is not None for row in figures) else "nats"
    drawn = [p for p in panels if (costs.size if p == "latents" else figures)]
    if not drawn:
        raise ValueError("metrics: there are no rows to plot")
    colors, ticker = DARK if dark else LIGHT, library().ticker
    figure, axes = plot(len(drawn), colors, title)
    for panel, ax in zip(drawn, axes, strict=True):
        if panel == "figure":
            _figure_panel(ax, rows, unit, colors)
            name = "bits per dimension" if unit == "bits" else "nats per example"
        else:
            _latents_panel(ax, steps, costs, colors)
            flow = all(not row.get("log_px") for row in rows["train"])
            name = "−log p of each latent, nats" if flow else "KL of each latent, nats"
        name_axes(ax, name, "training step", colors)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 2k, 4k, ...
    save(figure, path)


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
    tracks = {name: _finite(np.array(points, np.float64)) for name, points in runs.items()}
    tracks = {name: track for name, track in tracks.items() if len(track)}
    if not tracks:
        raise ValueError("runs: there are no finite points to compare")
    colors = DARK if dark else LIGHT
    figure, (ax,) = plot(1, colors, title, width=6.4)
    ends = []
    for i, (name, track) in enumerate(tracks.items()):
        color, minutes, values = colors.latents[i % 6], track[:, 0] / 60, track[:, 1]
        ax.plot(minutes, values, "-o", color=color, lw=1.6, ms=3.5, mew=0)
        ends.append((minutes[-1], values[-1], f"{name}  {values[-1]:.3f}", color))
    frame(ax, [track[:, 1] for track in tracks.values()], ends)
    ax.set_xlim(left=0)
    name_axes(ax, "" if unit in (title or "") else unit, "minutes of training", colors)
    save(figure, path)


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
    base = _finite(sets[0][1])
    if not len(base):
        raise ValueError("x: there are no finite points to plot")
    low, high = base.min(0), base.max(0)
    half = max(float((high - low).max()) * 0.56, 1e-6)
    middle = (low + high) / 2
    figure, axes = plot(len(sets), LIGHT, None, width=3.4, height=3.6)
    for ax, (name, values, color) in zip(axes, sets, strict=True):
        inside = (np.abs(values - middle) <= half).all(1)  # NaN is not
        size = float(np.clip(2500 / max(len(values), 1), 2, 16))
        ax.scatter(*values[inside].T, s=size, color=color, alpha=0.55, linewidths=0)
        ax.set_xlim(middle[0] - half, middle[0] + half)
        ax.set_ylim(middle[1] - half, middle[1] + half)
        ax.set_aspect("equal")
        outside = len(values) - int(inside.sum())
        note = f", {outside:,} of them outside" if outside else ""
        name_axes(ax, f"{name}: {len(values):,} points{note}", "$x_1$", LIGHT)
        ax.set_ylabel("$x_2$", color=LIGHT.muted, rotation=0, fontsize=9)
    save(figure, path)


def _figure_panel(ax: Any, rows: Mapping[str, list[Any]], unit: str, colors: Any) -> None:
    """Plot training and validation figures, and mark skipped steps."""
    key = "bits_per_dim" if unit == "bits" else "nats"
    error = "standard_error" if unit == "bits" else "standard_error_nats"
    shown, ends = [], []
    steps, values, _ = _series(rows["train"], key, error)
    if len(steps):
        ax.plot(steps, values, color=colors.data, lw=0.7, alpha=0.28)
        smooth = _smooth(values)
        ax.plot(steps, smooth, color=colors.data, lw=1.6, label="training, smoothed")
        late = smooth[steps >= 0.05 * steps[-1]]
        shown += [late, np.quantile(values[len(values) // 4 :], [0.01, 0.99])]
    steps, values, errors = _series(rows["evaluation"], key, error)
    if len(steps):
        low, high = values - errors, values + errors
        ax.fill_between(steps, low, high, color=colors.accent, alpha=0.18, lw=0)
        label = "validation ± standard error" if errors.any() else "validation"
        ax.plot(steps, values, "-o", color=colors.accent, lw=1.6, ms=4.5, mew=0, label=label)
        last = f"{values[-1]:.3f}" if unit == "bits" else f"{values[-1]:.4g}"
        ends.append((steps[-1], values[-1], last, colors.accent))
        shown.append(values)
    frame(ax, shown, ends)
    if at := [row["step"] for row in rows["skipped"]]:
        label = f"skipped steps: {len(at)}"
        axis = ax.get_xaxis_transform()
        ax.plot(at, [0.02] * len(at), "|", color=colors.bad, transform=axis, label=label)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, labelcolor=colors.ink, loc="upper right")


def _series(rows: Sequence[Mapping[str, Any]], key: str, error: str) -> np.ndarray:
    """The steps at which a value is finite, the values, and their errors."""
    points = [
        (row["step"], value, number(row.get(error)) or 0.0)
        for row in rows
        if (value := number(row.get(key))) is not None
    ]
    return np.array(points, np.float64).reshape(-1, 3).T


def _latents(training: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The cost of each latent (steps, latents), of rows with the largest number of latents."""
    width = max((len(row.get("kl") or ()) for row in training), default=0)
    rows = [row for row in training if width and len(row.get("kl") or ()) == width]
    costs = np.array([row["kl"] for row in rows], np.float64)  # None is NaN
    return np.array([row["step"] for row in rows], np.float64), costs.reshape(len(rows), width)


def _latents_panel(ax: Any, steps: np.ndarray, costs: np.ndarray, colors: Any) -> None:
    """Plot the cost of each latent, top first."""
    gradient = library().colors.LinearSegmentedColormap.from_list(
        "latents", colors.latents, N=1024
    )
    count = costs.shape[1]
    ends, shown = [], []
    for i in range(count):
        track = _finite(np.stack([steps, costs[:, i]], 1))
        if not len(track):
            continue
        at, values = track.T
        color = gradient(i / (count - 1)) if count > 1 else colors.latents[0]
        if count == 1:
            ax.plot(at, values, color=color, lw=0.7, alpha=0.28)
        smooth = _smooth(values)
        ax.plot(at, smooth, color=color, lw=1.6 if count <= 8 else 1.0)
        shown.append(smooth[at >= 0.05 * at[-1]])
        if count <= 8 or i in (0, count - 1):
            name = f"z{i}" + (" top" if count > 1 and i == 0 else "")
            ends.append((at[-1], smooth[-1], f"{name}  {smooth[-1]:.3g}", color))
    frame(ax, shown, ends, near_zero=True)


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


def _finite(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) whose coordinates are both finite."""
    points = points.reshape(-1, 2)
    return points[np.isfinite(points).all(1)]


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
