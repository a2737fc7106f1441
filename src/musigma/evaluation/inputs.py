"""What a model is given: data that fit it, in batches, with their context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from musigma.data import Dataset
from musigma.gaussian import channels_last
from musigma.model import Model
from musigma.processes import SINGLE_PROCESS, Processes

__all__ = ["at_home", "batch", "batches", "check", "context_size", "evaluating", "noise"]

Progress = Callable[[int, int], None]


def check(model: Model, data: Dataset) -> None:
    """Refuse data that a model from the zoo was not built for.

    Raises:
        ValueError: If shapes or bits differ, or labels are needed that the data lack.
    """
    shape, bits = model.config.get("shape"), model.config.get("options", {}).get("bits", data.bits)
    if shape is not None and list(data.shape) != list(shape):
        hint = ""
        if len(data.shape) == len(shape) == 3:
            if data.shape[0] != shape[0]:
                names = {1: "grey", 3: "colour"}
                kinds = [names.get(c, f"{c}-channel") for c in (shape[0], data.shape[0])]
                hint = f"; the model is for {kinds[0]} images, and these are {kinds[1]}"
            else:
                size = shape[1] if shape[1] == shape[2] else f"{shape[1]}x{shape[2]}"
                hint = f"; --size {size} resizes the images"
        raise ValueError(
            f"data: the model takes examples of shape {tuple(shape)}, and {data.name or 'these'} "
            f"have {tuple(data.shape)}{hint}"
        )
    if bits != data.bits:
        wanted, got = (
            "continuous values" if b is None else f"{b}-bit levels" for b in (bits, data.bits)
        )
        raise ValueError(
            f"data: the model takes {wanted}, and {data.name or 'these data'} hold {got}"
        )
    classes = context_size(model)
    if classes and (data.labels is None or len(data.label_names) != classes):
        raise ValueError(
            f"data: the model is conditioned on {classes} classes, and {data.name or 'this'} "
            f"have {len(data.label_names) if data.labels is not None else 'no labels'}"
        )


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode, and then in the mode it was in."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def context_size(model: Model) -> int:
    """How many classes a model from the zoo is conditioned on; 0: none."""
    return int(model.config.get("options", {}).get("context", 0))


def batch(
    data: Dataset, indices: np.ndarray, model: Model, *, seed: int = 0, step: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Examples and their context (one-hot labels, if the model wants any), where the model is."""
    labels = None if data.labels is None else data.labels[indices]
    return at_home(data.take(indices, seed=seed, step=step), labels, model)


def at_home(
    x: np.ndarray, labels: np.ndarray | None, model: Model
) -> tuple[Tensor, Tensor | None]:
    """Examples and context for a model, on its device and in its type; levels travel as bytes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    home = next(t for t in tensors if t.is_floating_point())
    examples = channels_last(torch.from_numpy(x).to(home.device).to(home.dtype))
    if not (classes := context_size(model)):
        return examples, None
    assert labels is not None  # `check` has seen to it
    given = torch.from_numpy(labels).to(home.device)
    return examples, nn.functional.one_hot(given, classes).to(home)


def noise(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generator for a step, as a function of the seed and of these."""
    number = ((seed * 1_000_003 + step) * 4_099 + rank) % 2**63
    torch.default_generator.manual_seed(number)  # manual_seed wakes all other devices, each time
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
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All examples in order, or one process's share of these batches.

    Binarization, and torch's generator while a batch is worked on, are functions of the seed and
    the number of the batch: what is drawn does not depend on who draws it.
    """
    starts = range(0, len(data), batch_size)
    for i in range(len(starts))[processes.share(len(starts))]:
        indices = np.arange(starts[i], min(starts[i] + batch_size, len(data)))
        examples = batch(data, indices, model, seed=seed, step=i)
        noise(seed, i)
        yield examples
        if progress:
            progress(int(indices[-1]) + 1, len(data))
