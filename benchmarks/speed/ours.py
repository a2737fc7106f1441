"""musigma's side of every workload: one step as `fit` does it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.speed.harness import Contender, Subject
from benchmarks.speed.package import compile_blocks
from musigma import Model, objectives

__all__ = ["contenders", "subject", "trainable"]


def contenders(setup: Callable[..., Subject]) -> tuple[Contender, Contender]:
    """musigma in float32 and, in a separate process, with `fast=True`."""
    return (
        Contender("musigma", setup, "ours"),
        Contender("musigma, fast", functools.partial(setup, fast=True), "fast", environment={}),
    )


def trainable(parameters: Iterable[Tensor]) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def subject(
    model: Model,
    x: Tensor,
    *,
    lr: float,
    fast: bool = False,
    draws: int | None = None,
    temperature: float = 1.0,
    density: bool = False,
    note: str = "",
) -> Subject:
    """A musigma model, trained on one batch as `fit` trains it.

    Args:
        model: Left in the memory format that `fit` chooses.
        x: The batch.
        lr: Learning rate of Adam.
        fast: Train as `TrainConfig.fast` does: bfloat16 networks, compiled blocks.
        draws: Number of examples that `sample` draws; None: sampling is not timed.
        temperature: Sampling temperature.
        density: Whether `log_prob` is timed.
        note: Difference from the other contenders.
    """
    if x.ndim == 4:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    if fast and (problem := compile_blocks(model)):
        note = f"{note}, {problem}" if note else problem

    def cast():
        return torch.autocast(x.device.type, torch.bfloat16, enabled=fast)

    def loss() -> Tensor:
        with cast():
            return objectives.elbo(model(x)).mean()  # of a scalar, in earlier versions

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
        initialize=lambda: model.calibrate(x),
        parameters=trainable(model.parameters()),
        countable=not fast,
        note=note,
    )
