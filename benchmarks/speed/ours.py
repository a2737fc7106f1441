"""Our side of every work: what `fit` does in a step, with nothing around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from benchmarks.speed.harness import Subject
from torch import Tensor

from musigma import objectives
from musigma.model import Model
from musigma.training import TrainConfig
from musigma.training.machine import casting, compiled

__all__ = ["subject", "trainable"]


def trainable(parameters: Iterable[Tensor]) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def subject(
    model: Model,
    x: Tensor,
    *,
    lr: float,
    best: bool = False,
    draws: int | None = None,
    temperature: float = 1.0,
    density: bool = False,
    note: str = "",
) -> Subject:
    """A model of ours, trained on one batch as `fit` trains it.

    Args:
        model: Left in the memory format that `fit` chooses.
        x: The batch.
        lr: Of Adam.
        best: As `TrainConfig.fast` has it: in bfloat16, and compiled.
        draws: How many examples `sample` draws; None: sampling is not asked for.
        temperature: At which it draws them.
        density: Whether `log_prob` is asked for.
        note: How this differs from the others.
    """
    if x.ndim == 4:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = x.contiguous(memory_format=torch.channels_last)
    config = TrainConfig(epochs=1, optimizer="adam", lr=lr, fast=best)
    optimizer, cast = config.optimizer_for(model), casting(config, x.device)
    if best and (why := compiled(model)):
        note = f"{note}, {why}" if note else why

    def loss() -> Tensor:
        with cast():
            return objectives.elbo(model(x)).mean()

    def step() -> None:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    def sample() -> Tensor:
        assert draws is not None
        with cast():
            return model.sample(draws, temperature=temperature)

    def log_prob() -> Tensor:
        with cast():
            return model.log_prob(x)

    calls: dict[str, Callable[[], object]] = {"step": step}
    if density:
        calls["log_prob"] = log_prob
    if draws is not None:
        calls["sample"] = sample
    return Subject(
        calls,
        model=model,
        loss=loss,
        warm=lambda: model.calibrate(x),
        parameters=trainable(model.parameters()),
        countable=not best,
        note=note,
    )
