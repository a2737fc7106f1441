"""Failed steps: their diagnosis, and the return to the saved state after several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_hook

from musigma.data import Dataset, batch_indices
from musigma.evaluation import noise
from musigma.model import Model
from musigma.processes import local_shard
from musigma.training.state import Progress
from musigma.training.step import Result, TrainingStep

__all__ = ["SETBACK_AFTER", "TrainingError", "check_setbacks", "diagnose", "restarted", "skipped"]

SETBACK_AFTER = 5
"""Skipped steps in a row after which the run goes back."""
GIVE_UP_AFTER = 20
"""Skipped steps in a row after which training ends."""
MOST_SETBACKS = 10


class TrainingError(RuntimeError):
    """Training cannot continue; what was saved before is intact."""


def skipped(
    training_step: TrainingStep,
    train: Dataset,
    step: int,
    examples: tuple[Tensor, Any],
    share: float,
    result: Result,
    limit: float,
) -> dict[str, Any]:
    """Skip a step of all processes. Returns why it failed, and for which examples, for the log.

    `training_step` holds the gradients of the failed step, and its forward pass is repeated;
    `examples` are those of this process, and `limit` is the largest norm allowed.
    """
    config, processes = training_step.config, training_step.processes
    failed = not math.isfinite(result.loss)
    if training_step.sharded:  # forward passes take all processes
        failed = any(processes.gather(failed))

    def repeat() -> None:
        noise(config.seed, step, processes.rank)
        training_step.forward(*examples, share)

    for module in training_step.stateful:
        if hasattr(module, "skip_step"):  # it drops what it recorded for after_step
            module.skip_step()
    model = training_step.model
    reason = diagnose(model, repeat if failed else None, result.loss, result.norm, limit)
    if reason is None and not training_step.critic_is_finite():
        reason = "the gradient of the objective's own parameters is not finite"
    log_w = result.evidence.elbo.reshape(len(examples[0]), -1).sum(1)
    indices = batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
    bad = indices[processes.share(config.batch_size)][(~log_w.isfinite()).cpu().numpy()]
    results = processes.gather((reason, bad.tolist()))
    reasons = [reason for reason, _ in results if reason]
    row: dict[str, Any] = {"kind": "skipped", "reason": (reasons or ["unknown"])[0]}
    named = [int(i) for _, bad in results for i in bad]
    return row | ({"examples": named[:8]} if named else {})


def check_setbacks(progress: Progress, reason: str, out: Path) -> None:
    """Give up if going back has not helped.

    Raises:
        TrainingError: After too many skipped steps in a row, or too many setbacks.
    """
    if progress.failing >= GIVE_UP_AFTER or progress.setbacks >= MOST_SETBACKS:
        raise TrainingError(
            f"{progress.failing} steps in a row were skipped, the last because {reason}, "
            f"although the run went back {progress.setbacks} times and took smaller steps; "
            f"{out} is as it was last saved. Try a smaller --lr, or inspect the data"
        )


def restarted(saved: Progress, failed: Progress) -> Progress:
    """The progress of a run that went back to its saved state, with smaller steps."""
    return replace(
        failed,  # model.safetensors still holds the best weights
        step=saved.step,
        usual_norm=saved.usual_norm,
        usual_loss=saved.usual_loss,
        fallbacks=saved.fallbacks,
        warnings=saved.warnings,
        setbacks=failed.setbacks + 1,
        lr_scale=failed.lr_scale / 2,
    )


def diagnose(
    model: Model, run: Callable[[], object] | None, loss: float, norm: float, limit: float
) -> str | None:
    """Why a step failed: the first tensor that is not finite, or the longest gradient.

    `model` has the gradients of the step, and `run` repeats its forward pass; it is None if every
    loss was finite. Returns None if the reason lies in another process.
    """
    output = _first_bad_output(model, run) if run else None
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and not local_shard(t).isfinite().all():
            return f"{name} is not finite"
    if not math.isfinite(loss):
        return output or f"the loss is {loss}"
    if math.isfinite(norm) and norm <= limit:
        return None
    gradients = {n: local_shard(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    sizes = {name: float(g.norm()) for name, g in gradients.items()}
    if not math.isfinite(norm):
        bad = [name for name, size in sizes.items() if not math.isfinite(size)]
        return f"the gradient of {bad[-1]} is not finite" if bad else None  # nearest to the output
    longest = max(sizes, key=lambda name: sizes[name])
    return f"the gradient has norm {norm:.3g}, above {limit:.3g}, most of it in {longest}"


def _first_bad_output(model: Model, run: Callable[[], object]) -> str | None:
    names = {module: name or "the model" for name, module in model.named_modules()}
    reasons: list[str] = []

    def tensors(value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield "output", value
        elif isinstance(value, Distribution):
            for name, t in vars(value).items():
                if isinstance(t, Tensor):
                    yield name.strip("_"), t
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    def observe(module: nn.Module, args: object, output: object) -> None:
        if module in names and not reasons:
            for part, t in tensors(output):
                if t.is_floating_point() and not t.isfinite().all():
                    bad = t[~t.isfinite()].flatten()[0]
                    reasons.append(
                        f"{part} of {names[module]} ({type(module).__name__}) has {bad}"
                    )

    with torch.no_grad(), register_module_forward_hook(observe):
        run()
    return reasons[0] if reasons else None
