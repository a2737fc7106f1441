"""The input of a model: data that fit it, in batches, with their context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.data import Dataset
from musigma.data.batches import in_order
from musigma.model import Model
from musigma.processes import SINGLE_PROCESS, Processes
from musigma.spec import Variable
from musigma.tensors import channels_last

__all__ = ["batch", "batches", "check", "column", "evaluating", "noise", "tensors"]

Progress = Callable[[int, int], None]


def check(model: Model, data: Dataset) -> None:
    """Check that data fit a model.

    Raises:
        ValueError: If the shape or the levels do not fit, or a variable of the context is missing,
            of another kind, or has unknown classes. The message lists everything that does not
            fit.
    """
    spec, name = model.spec, data.name or "these data"
    if spec is None:
        return
    faults = []
    if tuple(data.shape) != spec.shape:
        hint = ""
        if len(data.shape) == len(spec.shape) == 3:
            channels, height, width = spec.shape
            if data.shape[0] != channels:
                names = {1: "gray", 3: "color"}
                kinds = [names.get(c, f"{c}-channel") for c in (channels, data.shape[0])]
                hint = f"; the model is for {kinds[0]} images, and these are {kinds[1]}"
            else:
                size = height if height == width else f"{height}x{width}"
                hint = f"; --size {size} resizes the images"
        faults.append(
            f"the model takes examples of shape {spec.shape}, and {name} have "
            f"{tuple(data.shape)}{hint}"
        )
    levels = None if data.bits is None else 2**data.bits
    if spec.levels != levels:
        wanted, got = (_kind(n) for n in (spec.levels, levels))
        faults.append(f"the model takes {wanted}, and {name} hold {got}")
    partly = any(getattr(module, "partly_labeled", False) for module in model.modules())
    if not partly and data.labels is not None and (data.labels < 0).any():
        n = int((data.labels < 0).sum())
        labeled = any(v.name == "label" for v in spec.context)
        faults += [f"{n:,} of {len(data):,} examples of {name} have no label"] * labeled
    faults += [fault for v in spec.context if (fault := _misfit(v, data, name))]
    if faults:
        raise ValueError(f"data: {'; '.join(faults)}")


def _kind(levels: int | tuple[int | None, ...] | None) -> str:
    if levels is None:
        return "continuous values"
    if isinstance(levels, tuple):
        return "elements with different numbers of levels"
    power = levels & (levels - 1) == 0
    return f"{levels.bit_length() - 1}-bit levels" if power else f"{levels} levels"


def _misfit(variable: Variable, data: Dataset, name: str) -> str | None:
    """The reason why data do not fit a variable of the context; None if they do."""
    available = {v.name: v for v in data.variables}.get(variable.name)
    if variable.classes:
        what = f"{variable.classes} classes of {variable.name!r}"
    else:
        what = f"{variable.name!r}, shape {variable.shape} per example"
    asked = f"the model is conditioned on {what}"
    if available is None:
        known = ", ".join(repr(v.name) for v in data.variables) or "nothing"
        return f"{asked}, and {name} come with {known}; give it (--given, or Dataset.given)"
    if variable.names and available.names:
        codes = np.unique(_stored(data, variable.name)[0])
        codes = codes[codes >= 0]
        unknown = sorted(set(np.array(available.names)[codes]) - set(variable.names))
        if not unknown:
            return None
        listed = ", ".join(unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        known = ", ".join(variable.names[:12]) + (", ..." if variable.classes > 12 else "")
        whose = f"classes of {variable.name!r}" if variable.name != "label" else "classes"
        return f"{name} have {whose} unknown to the model: {listed}{more} (known: {known})"
    if len(variable.shape) == len(available.shape) == 2:  # sequences of any number of rows
        fits = variable.shape[1] == available.shape[1]
    else:
        fits = (variable.classes, variable.shape) == (available.classes, available.shape)
    if not fits:
        got = f"{available.classes} classes" if available.classes else f"shape {available.shape}"
        if available.names and not variable.classes:
            got = f"text ({', '.join(map(repr, available.names[:3]))}): give numbers"
        return f"{asked}, and in {name} it has {got}"
    return None


def _stored(data: Dataset, name: str) -> tuple[Any, Any]:
    """All rows of a variable: indices of classes, numbers, or images; and the names of classes."""
    if name == "label" and data.labels is not None:
        return data.labels, data.label_names
    return data.given[name].values, data.given[name].names


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Set evaluation mode; afterwards restore the mode and the random state."""
    before, devices = model.training, {p.device for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.train(before)


def batch(
    data: Dataset, indices: np.ndarray, model: Model, *, seed: int = 0, step: int = 0
) -> tuple[Tensor, Context]:
    """Examples and their context, as `tensors` returns them for `Dataset.take`."""
    return tensors(model, data, data.take(indices, seed=seed, step=step), indices)


def tensors(
    model: Model, data: Dataset, x: np.ndarray, indices: np.ndarray
) -> tuple[Tensor, Context]:
    """Examples and their context on the device and in the dtype of a model.

    Args:
        model: The variables of its `spec.context` are looked up in the data by name.
        data: The source of the examples, which has passed `check`.
        x: The examples, as `Dataset.take` returns them.
        indices: The indices of the examples in `data`.

    Returns:
        Tensor (B, *event), and the context: None, one tensor (B, ...), or a mapping of several.
        Classes are one-hot, and matched by name if the model knows their names.
    """
    home = next(
        t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()
    )
    typed = model.spec is not None and model.spec.schema is not None  # rows keep their digits
    examples = torch.from_numpy(x).to(home.device)
    examples = examples.double() if typed else channels_last(examples.to(home.dtype))
    variables = model.spec.context if model.spec is not None else ()
    if not variables:
        return examples, None
    given = {v.name: _rows(v, data, indices, home) for v in variables}
    return examples, given if len(given) > 1 else given[variables[0].name]


def column(variable: Variable, data: Dataset, indices: np.ndarray) -> np.ndarray:
    """A variable of the context: numbers or images, or indices of the model's classes.

    Classes are matched by name if both the model and the data have names.
    """
    stored, names = _stored(data, variable.name)
    values = np.asarray(stored[indices])
    if variable.names and names and tuple(names) != variable.names:
        where = {name: i for i, name in enumerate(variable.names)}
        values = np.array([where[names[i]] if i >= 0 else -1 for i in values], np.int64)
    return values


def _rows(variable: Variable, data: Dataset, indices: np.ndarray, home: Tensor) -> Tensor:
    values = torch.from_numpy(column(variable, data, indices))
    if len(variable.shape) == 2:  # rows of NaN follow those of a sequence
        missing = max(0, variable.shape[0] - values.shape[1])
        return nn.functional.pad(values, (0, 0, 0, missing), value=torch.nan).to(home)
    if not variable.classes:
        return values.to(home).reshape(len(values), *variable.shape)
    one_hot = nn.functional.one_hot(values.clamp(min=0), variable.classes)
    return (one_hot * (values >= 0)[:, None]).to(home)  # no class where it is not known


def noise(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators with a function of seed, step and rank."""
    number = ((seed * 1_000_003 + step) * 4_099 + rank) % 2**63
    torch.default_generator.manual_seed(number)  # torch.manual_seed would start every device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def batches(
    model: Model,
    data: Dataset,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[tuple[Tensor, Any]]:
    """All examples in order, or the share of one process.

    For each batch, binarization and torch's generators are seeded by `seed` and the number of the
    batch, so draws do not depend on the number of processes.
    """
    count = math.ceil(len(data) / batch_size)
    steps = range(count)[processes.share(count)]
    with closing(in_order(data, batch_size, seed=seed, steps=steps)) as parts:
        for i, (x, indices) in zip(steps, parts, strict=True):
            examples = tensors(model, data, x, indices)
            noise(seed, i)
            yield examples
            if progress:
                progress(int(indices[-1]) + 1, len(data))
