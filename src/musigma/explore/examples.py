"""The examples that the page looks at: those of the data, and those that are uploaded."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma import data as datasets
from musigma.context import Context
from musigma.data.errors import printable
from musigma.data.readers import images
from musigma.evaluation import batch
from musigma.explore import answers
from musigma.model import Model
from musigma.report.figures import pixels

__all__ = ["Choice", "Examples", "spread"]

PIXELS = 2**25
"""Largest number of pixels of an uploaded image, which is checked before it is decoded."""

UPLOADS = 64
"""Uploads that are kept; the oldest is forgotten first."""

COLUMNS = 64
"""Columns of a row that are shown."""


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of n numbers from 0, evenly spread.

    >>> spread(9, 3).tolist()
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


@dataclass(frozen=True)
class Choice:
    """What is looked at: an example of the data, or an upload with the context of that example.

    Args:
        index: The number of the example.
        upload: The key of an upload, which replaces the example.
        label: Number of the class that replaces that of the example.
    """

    index: int = 0
    upload: str = ""
    label: int | None = None


class Examples:
    """The data of a model, and what was uploaded.

    Args:
        model: The model.
        data: Data that fit it.
        loading: Python lines that define `model` and `data`.
        seed: Random seed of binarization.

    Attributes:
        classes: Names of the classes, if the model is conditioned on them alone.
        columns: Names of the elements of a vector.
        flat: Whether examples are points of a plane, two numbers each, none of them missing.
    """

    def __init__(self, model: Model, data: datasets.Dataset, loading: str, seed: int):
        assert model.spec is not None
        self.model, self.data, self.loading, self.seed = model, data, loading, seed
        self.spec, self.lock = model.spec, threading.Lock()
        self.uploads: OrderedDict[str, tuple[Tensor, list[Any]]] = OrderedDict()
        variables = self.spec.context
        only = variables[0] if len(variables) == 1 and variables[0].classes else None
        self.classes = [] if only is None else list(only.names or map(str, range(only.classes)))
        vector = len(self.spec.shape) == 1
        named = self.spec.columns or [f"x{i}" for i in range(self.spec.dims * vector)]
        self.columns = list(named)
        typed = self.spec.schema.columns if self.spec.schema else ()
        self.flat = self.spec.shape == (2,) and not any(c.has_levels or c.missing for c in typed)

    def __getitem__(self, of: Choice) -> tuple[Tensor, Context, list[Any]]:
        """An example (1, *event), its context, and the lines that make them.

        Raises:
            ValueError: If there is no such example, upload or class.
        """
        if not 0 <= of.index < len(self.data):
            raise ValueError(f"index: expected 0 to {len(self.data) - 1}; got {of.index}")
        x, context = answers.example(self.model, self.data, of.index, self.seed)
        arguments = {"index": of.index, "seed": self.seed}
        parts: list[Any] = [self.loading, (answers.example, arguments)]
        if of.upload:
            with self.lock:
                kept = self.uploads.get(of.upload)
            if kept is None:
                raise ValueError("upload: it is no longer in memory; upload it again")
            x, parts = kept[0], [*parts, *kept[1]]
        if of.label is not None:
            if not 0 <= of.label < len(self.classes):
                raise ValueError(
                    f"label: expected a number below {len(self.classes)}; got {of.label}"
                )
            context = answers.of_class(context, of.label)
            parts.append((answers.of_class, {"number": of.label}))
        return x, context, parts

    def sample(self, most: int) -> np.ndarray:
        """Examples that are spread evenly over the data, (n, *event)."""
        return self.data.take(spread(len(self.data), most), seed=self.seed)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Context]:
        """Some examples, (n, *event), and their context."""
        return batch(self.data, np.array(indices), self.model, seed=self.seed)

    def colors(self) -> list[str]:
        """What a map can be colored by, beside the score: the label, columns, and context."""
        given = [n for n, v in self.data.given.items() if v.values.ndim == 1 and n != "label"]
        labeled = ["label"] if self.data.labels is not None else []
        return [*labeled, *(f"column {n}" for n in self.columns[:COLUMNS]), *given]

    def color(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Values of examples by one of `colors`, and the names of classes, if they are some.

        Raises:
            ValueError: For another name.
        """
        if name not in self.colors():
            raise ValueError(
                f"color: expected one of score, {', '.join(self.colors())}; got {name[:40]!r}"
            )
        if name == "label" and self.data.labels is not None:
            return self.data.labels[rows], list(self.data.label_names)
        if name in self.data.given:
            given = self.data.given[name]
            return given.values[rows], list(given.names)
        j = self.columns.index(name.removeprefix("column "))
        levels = self.spec.schema.columns[j].levels if self.spec.schema else ()
        return self.data.take(rows)[:, j], list(levels)

    def about(self, of: Choice) -> dict[str, Any]:
        """The name and the class of an example, if it has any."""
        data = self.data
        named = data.ids is not None and not of.upload
        labeled = data.labels is not None and not of.upload and data.labels[of.index] >= 0
        label = int(data.labels[of.index]) if labeled and data.labels is not None else None
        names = data.label_names
        return {
            "index": of.index,
            "id": printable(data.ids[of.index]) if named and data.ids else "",
            "label": "" if label is None else names[label] if names else str(label),
        }

    def shown(self, x: Tensor) -> dict[str, Any]:
        """Examples as the page draws them: pixels, or cells of a table.

        Raises:
            ValueError: If pixels are not finite.
        """
        if len(self.spec.shape) == 3:
            return shown(pixels(x, levels=2 ** (self.spec.bits or 8)))
        values = x.numpy(force=True)
        if self.spec.schema is not None:
            rows = [row[:COLUMNS] for row in self.cells(x)]
        else:
            rows = [[f"{v:.4g}" for v in row] for row in values[:, :COLUMNS].tolist()]
        points = {"points": values.tolist()} if self.flat else {}
        return {
            "names": self.columns[:COLUMNS],
            "rows": rows,
            "columns": len(self.columns),
            **points,
        }

    def cells(self, x: Tensor) -> list[list[str]]:
        """Rows as texts, which `row` reads as the same numbers, in the precision of the data."""
        values = x.numpy(force=True)
        if self.spec.schema is None:
            return [[str(v) for v in row] for row in values.astype(self.data.array.dtype)]
        columns = datasets.decode(values, self.spec.schema).to_pydict().values()
        return [["" if v is None else str(v) for v in row] for row in zip(*columns, strict=True)]

    # --- uploads ---------------------------------------------------------------------------------

    def picture(self, content: bytes, name: str) -> dict[str, str]:
        """Keep an image that was uploaded; returns its key.

        Raises:
            ValueError: If it is no image, too large, or of a kind that models do not represent.
        """
        name, shape = PurePath(name.replace("\\", "/")).name or "image.png", self.spec.shape
        if len(shape) != 3 or shape[0] not in (1, 3) or self.data.bits is None:
            raise ValueError("upload: this model takes no gray or color images of 8 bits")

        def opener() -> io.BytesIO:
            return io.BytesIO(content)

        x, _ = answers.example(self.model, self.data, 0, self.seed)
        try:
            with images.quiet():
                head = images.header(opener)
                if (n := head.width * head.height) > PIXELS:
                    raise images.Unusable(
                        f"has {head.width} x {head.height} = {n:,} pixels: give at most {PIXELS:,}"
                    )
                x = answers.picture(opener, x, self.data)
        except Exception as error:  # readers raise anything on a damaged file
            raise ValueError(f"upload: {name} {images.fault(error, opener)}") from error
        parts = [f"opener = lambda: open({name!r}, 'rb')", (answers.picture, {})]
        return self._keep(x, content, parts)

    def row(self, cells: Sequence[str]) -> dict[str, str]:
        """Keep a row that was typed; returns its key.

        Raises:
            ValueError: If a cell cannot be read, or there are too few or too many.
        """
        if len(self.spec.shape) != 1 or len(cells) != len(self.columns):
            raise ValueError(f"row: expected {len(self.columns)} cells; got {len(cells)}")
        x, _ = answers.example(self.model, self.data, 0, self.seed)
        parts: list[Any]
        if self.spec.schema is not None:
            table = {name: [cell] for name, cell in zip(self.columns, cells, strict=True)}
            x = answers.typed_row(table, self.model, x)
            parts = [(answers.typed_row, {"cells": table})]
        else:
            numbers = [_number(*pair) for pair in zip(cells, self.columns, strict=True)]
            x, parts = answers.row(numbers, x), [(answers.row, {"numbers": numbers})]
        return self._keep(x, json.dumps(list(cells)).encode(), parts)

    def _keep(self, x: Tensor, content: bytes, parts: list[Any]) -> dict[str, str]:
        key = hashlib.sha256(content).hexdigest()[:12]
        with self.lock:
            self.uploads[key] = x, parts
            self.uploads.move_to_end(key)
            while len(self.uploads) > UPLOADS:
                self.uploads.popitem(last=False)
        return {"upload": key}


def _number(cell: str, name: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e30:
        raise ValueError(f"row: {name}: expected a finite number; got {cell[:40]!r}")
    return value


def shown(levels: Any) -> dict[str, Any]:
    """Pixels (N, H, W, C), uint8, as the page draws them."""
    n, height, width, channels = levels.shape
    data = [base64.b64encode(levels[i].tobytes()).decode() for i in range(n)]
    return {"height": height, "width": width, "channels": channels, "images": data}


def planes(t: Tensor, most: int = 12) -> dict[str, Any]:
    """The channels of a map (1, C, H, W) as gray images from its lowest to its highest value."""
    t = t[0, :most].detach().double().cpu()
    low, high = float(t.min()), float(t.max())
    gray = ((t - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    return {**shown(gray[..., None].numpy()), "low": low, "high": high}
