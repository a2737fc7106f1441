"""What a model codes: integer levels, with their context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.coding.batch import Batch, storable
from musigma.context import Context
from musigma.model import Model
from musigma.spec import Spec, Variable


def bits_of(model: Model) -> int:
    """Bits of each element of a model's data.

    Raises:
        ValueError: If the model was not built by an architecture, or its data are continuous.
    """
    if not model.config or model.spec is None:
        raise ValueError(
            "model: it was composed by hand, so a file could not name it; build it by an "
            "architecture (@musigma.architecture)"
        )
    return int(_levels(model).max() - 1).bit_length()


def spec_of(model: Model) -> Spec:
    """The specification of a model that was built by an architecture."""
    assert model.spec is not None
    return model.spec


def _levels(model: Model) -> np.ndarray:
    """Number of levels of every element, or of each."""
    levels = np.array(spec_of(model).levels)
    if levels.dtype == object:  # some are None
        raise ValueError(
            "model: its data are continuous, which no file holds exactly at its rate; train a "
            "model of integer levels (--bits)"
        )
    return levels


def check_levels(model: Model, x: np.ndarray) -> None:
    """Refuse what are not levels of a model's data.

    Raises:
        ValueError: For another shape, type or range.
    """
    shape, levels = spec_of(model).shape, _levels(model)
    if x.shape[1:] != shape or x.dtype.kind not in "iub":
        raise ValueError(
            f"data: the model takes integers of shape (N, {', '.join(map(str, shape))}); got "
            f"{x.dtype} of shape {x.shape}"
        )
    flat = x.reshape(-1, math.prod(shape))
    if x.size and (flat.min() < 0 or (flat.max(0) >= levels).any()):
        raise ValueError(
            f"data: the model takes levels 0 to {levels.max() - 1}; got {x.min()} to {x.max()}"
        )


def context_of(model: Model, batch: Batch) -> Context:
    """The context of images, as the model takes it.

    A vector without a name of its own, `context`, is one-hot where there are only labels.

    Raises:
        ValueError: Naming a variable that is missing, or is not what the model is conditioned on.
    """
    variables = spec_of(model).context
    if unknown := sorted(set(batch.given) - {variable.name for variable in variables}):
        raise ValueError(f"given: the model is not conditioned on {', '.join(unknown)}")
    return _context({variable.name: _rows(variable, batch) for variable in variables})


def _rows(variable: Variable, batch: Batch) -> Tensor:
    name, classes = variable.name, variable.classes
    values = batch.about.get("labels") if name == "label" else batch.given.get(name)
    if values is None and name == "context" and len(variable.shape) == 1:
        classes, values = variable.shape[0], batch.about.get("labels")
    what = f"{classes} classes" if classes else f"shape {variable.shape} for each example"
    if values is None:
        raise ValueError(
            f"{name}: the model is conditioned on it ({what}), and the data lack it; give it"
        )
    array = np.asarray(values)
    if not classes:
        if array.shape[1:] != variable.shape and (*array.shape[1:], 1) != variable.shape:
            raise ValueError(f"{name}: the model takes {what}; got shape {array.shape}")
        return torch.from_numpy(array).reshape(len(array), *variable.shape)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected an integer for each example; got {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() < classes:
        raise ValueError(
            f"{name}: expected 0 to {classes - 1}; got {array.min()} to {array.max()}"
        )
    return torch.eye(classes, dtype=torch.float64)[torch.from_numpy(array.astype(np.int64))]


def with_context(model: Model, levels: np.ndarray, given: Any) -> Batch:
    """Levels with the context that `compress` was given."""
    variables = spec_of(model).context
    if given is not None and not isinstance(given, Mapping):
        if len(variables) != 1:
            names = ", ".join(repr(v.name) for v in variables) or "nothing"
            raise ValueError(
                f"given: the model is conditioned on {names}; give a mapping of names"
            )
        given = {variables[0].name: given}
    about: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    classes = {variable.name for variable in variables if variable.classes}
    for name, rows in (given or {}).items():
        array = np.asarray(rows)
        if len(array) != len(levels):
            raise ValueError(f"given: {name!r} has {len(array)} rows for {len(levels)} examples")
        if name in classes and array.ndim == 2:
            if not ((array == 0) | (array == 1)).all() or not (array.sum(1) == 1).all():
                raise ValueError(f"given: {name!r} must hold indices of classes, or one-hot rows")
            array = array.argmax(1)
        if name == "label":
            about["labels"] = array.tolist()
        else:
            arrays[name] = storable(name, array)
    return Batch(levels, about, arrays)


def example(model: Model) -> tuple[np.ndarray, Context]:
    """Two images that are always the same, with their context: what fingerprints are made of."""
    x = _pattern(spec_of(model).shape, 2 ** bits_of(model))
    return x, _context({v.name: _example_rows(v) for v in spec_of(model).context})


def _pattern(shape: tuple[int, ...], levels: int) -> np.ndarray:
    return np.arange(2 * math.prod(shape)).reshape(2, *shape) * 7 // 3 % levels


def _example_rows(variable: Variable) -> Tensor:
    if variable.classes or (variable.name == "context" and len(variable.shape) == 1):
        return torch.eye(2, variable.shape[0], dtype=torch.float64)
    scale = 1 if variable.levels else 256
    return torch.from_numpy(_pattern(variable.shape, variable.levels or 256) / scale)


def _context(rows: dict[str, Tensor]) -> Context:
    return rows if len(rows) > 1 else next(iter(rows.values()), None)
