"""One training step: the gradients of a batch, in parts and over processes, and the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from musigma import context as contexts
from musigma.context import Context
from musigma.evaluation import noise
from musigma.model import Model
from musigma.objectives import surrogate, terms_of
from musigma.processes import Processes, current_processes
from musigma.trace import Evidence, Recorder
from musigma.training import hardware
from musigma.training.config import TrainConfig
from musigma.training.distributed import full_tensor, local_shard
from musigma.training.state import RunState

__all__ = ["MakeOptimizer", "Objective", "Result", "TrainingStep", "evaluate_objective"]

Objective: TypeAlias = Callable[[Recorder], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], optim.Optimizer]


def evaluate_objective(objective: Objective, record: Recorder) -> Tensor:
    """An objective's nats (B,), with the score-function term if it does not add it itself."""
    nats = objective(record)
    if getattr(objective, "applies_surrogate", False):
        return nats
    return surrogate(nats, terms_of(record))


@dataclass
class Result:
    """The outcome of a batch.

    Attributes:
        evidence: Its terms, without gradients.
        loss: The mean of the objective over this process's examples, in nats.
        norm: The norm of the gradient over all processes.
        gradients: The gradients, of this process's shards.
        critic: Gradients of the objective's own parameters.
    """

    evidence: Evidence
    loss: float
    norm: float
    gradients: list[Tensor]
    critic: list[Tensor]


class TrainingStep:
    """Computes gradients of batches, and applies them.

    Args:
        model: The model, in training mode; perhaps sharded.
        config: Objective, optimizer, precision.
        accelerator: Wraps the model for several processes.
        parts: Number of parts that each batch is processed in.
        sharded: Whether the weights are sharded.
        wrapped: Whether several processes average their gradients (DDP).
        objective: As in `fit`.
        make_optimizer: As in `fit`.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        accelerator: Any,
        *,
        parts: int,
        sharded: bool,
        wrapped: bool,
        objective: Objective | None,
        make_optimizer: MakeOptimizer | None,
    ):
        self.model, self.config, self.accelerator = model, config, accelerator
        self.parts, self.sharded, self.processes = parts, sharded, current_processes()
        make_optimizer = make_optimizer or config.make_optimizer
        self.optimizer = make_optimizer(list(model.parameters()))
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = accelerator.prepare(model) if wrapped else model
        self.weights: list[Tensor] = list(model.parameters())
        self.after_step: list[Any] = [
            m.after_step for m in model.modules() if hasattr(m, "after_step")
        ]
        device = next(iter(self.weights)).device if self.weights else torch.device("cpu")
        self.autocast = hardware.autocast(config, device)
        self.objective = objective
        self.critic: nn.Module | None = None
        self.critic_weights: list[nn.Parameter] = []
        self.critic_optimizer: optim.Optimizer | None = None
        if isinstance(objective, nn.Module) and list(objective.parameters()):
            self.critic = objective.to(device).train()
            self.critic_weights = list(objective.parameters())
            make = getattr(objective, "critic_optimizer", None)
            self.critic_optimizer = make() if make else optim.Adam(self.critic_weights, config.lr)

    def state(self, averaged: Model) -> RunState:
        """What a run saves and resumes."""
        return RunState(self.model, averaged, self.optimizer, self.critic, self.critic_optimizer)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    # -- gradients

    def gradients(self, x: Tensor, context: Context, step: int, share: float) -> Result:
        """Gradients of the mean over the whole batch, over all processes and parts."""
        self.optimizer.zero_grad(set_to_none=True)
        critic = [torch.zeros_like(p) for p in self.critic_weights]
        noise(self.config.seed, step, self.processes.rank)
        found: list[Evidence] = []
        total = 0.0
        for i in range(self.parts):
            part = Processes(i, self.parts).share(len(x))
            weight = (part.stop - part.start) / self.config.batch_size
            with self._exchanging(i == self.parts - 1):
                record, evidence = self._forward(
                    self.trained, x[part], contexts.rows(context, part)
                )
                loss = self._nats(record, share).mean() * weight
                for p in self.critic_weights:
                    p.grad = None
                (loss * self.processes.count).backward()  # gradients of processes are averaged
                self._add_critic_gradients(critic, record, weight)
            found.append(Evidence(*(t.detach() for t in evidence)))
            total += loss.item()
        gradients = [p.grad for p in self.weights if p.grad is not None]
        if self.processes.count > 1:
            for g in critic:
                dist.all_reduce(g)
                g /= self.processes.count
        return Result(
            evidence=Evidence(*map(torch.cat, zip(*found, strict=True))),
            loss=total * self.config.batch_size / len(x),
            norm=self._norm(gradients, critic),
            gradients=gradients,
            critic=critic,
        )

    @staticmethod
    def _norm(gradients: list[Tensor], critic: list[Tensor]) -> float:
        """The norm of the model's gradient; NaN if that of a critic is not finite."""
        sound = all(bool(g.isfinite().all()) for g in critic)
        return float(full_tensor(nn.utils.get_total_norm(gradients))) if sound else float("nan")

    def _forward(self, model: nn.Module, x: Tensor, context: Context) -> tuple[Recorder, Evidence]:
        if (k := self.config.k) > 1:
            x, context = x.repeat_interleave(k, 0), contexts.repeat(context, k)
        record = Recorder(closed_form=k == 1)
        with self.autocast():
            return record, model(x, context, trace=record)

    def _nats(self, record: Recorder, share: float) -> Tensor:
        if self.objective is None:
            return self.config.nats(record, share)
        return evaluate_objective(self.objective, record)

    def _add_critic_gradients(self, critic: list[Tensor], record: Recorder, weight: float) -> None:
        """Gradients of the critic's own loss; of the objective, if it has none."""
        if self.critic is None:
            return
        critic_loss = getattr(self.critic, "critic_loss", None)
        if critic_loss is None:
            new = [p.grad for p in self.critic_weights]
        else:
            loss = critic_loss(record).mean() * weight * self.processes.count
            new = torch.autograd.grad(loss, self.critic_weights, allow_unused=True)
        for total, g in zip(critic, new, strict=True):
            if g is not None:
                total += g

    @contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Whether a backward pass averages the gradients of all processes."""
        if self.sharded:
            self.trained.set_requires_gradient_sync(now)  # pyright: ignore
            yield
        elif now or self.trained is self.model:
            yield
        else:
            with self.accelerator.no_sync(self.trained):
                yield

    def repeat(self, x: Tensor, context: Context, step: int) -> None:
        """The forward pass of a step again, with the same noise."""
        noise(self.config.seed, step, self.processes.rank)
        self._forward(self.model, x, context)

    # -- optimizers

    def apply(self, result: Result, step: int, share: float, lr_scale: float, clip: float) -> None:
        """Take a step.

        Args:
            result: Its gradients.
            step: Number of steps done before.
            share: The share of the budget that is spent.
            lr_scale: Factor of the learning rate.
            clip: Norm to which a longer gradient is scaled down.
        """
        if result.norm > clip:
            shards = [local_shard(g) for g in result.gradients]
            torch._foreach_mul_(shards, clip / result.norm)  # pyright: ignore
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = self.config.learning_rate(step, share, peak) * lr_scale
        self.optimizer.step()
        if self.critic_optimizer is not None:
            for p, g in zip(self.critic_weights, result.critic, strict=True):
                p.grad = g
            self.critic_optimizer.step()
        for after_step in self.after_step:
            after_step()
