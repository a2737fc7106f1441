"""One training step: the gradients of a batch, in parts and over processes, and the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from musigma import context as contexts
from musigma.context import Context
from musigma.evaluation import noise
from musigma.model import Model
from musigma.objectives import surrogate
from musigma.processes import Processes, current_processes
from musigma.trace import Evidence, Recorder
from musigma.training.config import TrainConfig
from musigma.training.distributed import full_tensor, local_shard
from musigma.training.state import RunState

__all__ = ["MakeOptimizer", "Objective", "ObjectivePass", "Result", "TrainingStep"]

Objective: TypeAlias = Callable[[Recorder], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], optim.Optimizer]


class ObjectivePass(nn.Module):
    """A model and its objective as one module, so that DDP and FSDP see the whole graph.

    Args:
        model: The model.
        config: Names the objective if none is given.
        objective: As in `fit`. Its parameters are not part of this module.
        autocast: A context for the networks' precision.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        objective: Objective | None,
        autocast: Callable[[], AbstractContextManager],
    ):
        super().__init__()
        self.model, self.config, self.autocast = model, config, autocast
        self._objective = (objective,)  # a module in a tuple is not registered

    @property
    def objective(self) -> Objective | None:
        """The objective that is given to `fit`."""
        return self._objective[0]

    def forward(
        self, x: Tensor, context: Context, share: float
    ) -> tuple[Tensor, Evidence, Recorder | None]:
        """Nats (B,), the terms without gradients, and the recorder if the objective takes one.

        Raises:
            ValueError: If the objective returns another shape.
        """
        n, k = len(x), self.config.k
        if k > 1:
            x, context = x.repeat_interleave(k, 0), contexts.repeat(context, k)
        if self.objective is None and self.config.objective_takes_evidence:
            with self.autocast():
                evidence = self.model(x, context, closed_form=k == 1)
            return self.config.nats(evidence, share), _detached(evidence), None
        record = Recorder(closed_form=k == 1)
        with self.autocast():
            evidence = self.model(x, context, trace=record)
        applies_surrogate = getattr(self.objective, "applies_surrogate", False)
        if not applies_surrogate:  # once, and not again by objectives that this one calls
            record.terms = evidence._replace(score=evidence.score.detach())
        with _frozen(self.objective):
            objective = self.objective or (lambda record: self.config.nats(record, share))
            nats = objective(record)
        if (shape := getattr(nats, "shape", None)) != (n,):
            what = type(nats).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"objective: returned {what} for {n} examples; expected ({n},), the nats of each"
            )
        nats = nats if applies_surrogate else surrogate(nats, evidence)
        return nats, _detached(evidence), record


def _detached(evidence: Evidence) -> Evidence:
    return Evidence(*(t.detach() for t in evidence))


@contextmanager
def _frozen(objective: Any) -> Iterator[None]:
    """Without gradients for the parameters of an objective that has a loss for them."""
    frozen = []
    if hasattr(objective, "critic_loss"):
        frozen = [p for p in objective.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


@dataclass
class Result:
    """The outcome of a batch.

    Attributes:
        evidence: Its terms, without gradients.
        loss: The mean of the objective over this process's examples, in nats.
        norm: The norm of the model's gradient over all processes; NaN if the gradient of the
            objective's own parameters is not finite.
    """

    evidence: Evidence
    loss: float
    norm: float


class TrainingStep:
    """Computes gradients of batches, and applies them.

    Args:
        forward: The model, in training mode and perhaps sharded, with its objective.
        accelerator: Wraps the model for several processes.
        parts: Number of parts that each batch is processed in.
        sharded: Whether the weights are sharded.
        make_optimizer: As in `fit`.
    """

    def __init__(
        self,
        forward: ObjectivePass,
        accelerator: Any,
        *,
        parts: int,
        sharded: bool,
        make_optimizer: MakeOptimizer | None,
    ):
        self.forward, self.accelerator = forward, accelerator
        self.model, self.config = forward.model, forward.config
        self.parts, self.sharded, self.processes = parts, sharded, current_processes()
        make_optimizer = make_optimizer or self.config.make_optimizer
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        wrapped = self.processes.count > 1 and not sharded
        self.trained = accelerator.prepare(forward) if wrapped else forward
        self.weights: list[Tensor] = list(self.model.parameters())
        self.stateful: list[Any] = [m for m in self.model.modules() if hasattr(m, "after_step")]
        module = forward.objective if isinstance(forward.objective, nn.Module) else None
        self.critic: Any = module.train() if module else None
        self.critic_weights = list(module.parameters()) if module else []
        self.critic_optimizer: optim.Optimizer | None = None
        if self.critic_weights:
            adam = partial(optim.Adam, self.critic_weights, self.config.lr)
            self.critic_optimizer = getattr(module, "critic_optimizer", adam)()

    def state(self, averaged: Model) -> RunState:
        """What a run saves and resumes."""
        return RunState(self.model, averaged, self.optimizer, self.critic, self.critic_optimizer)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    # -- gradients

    def gradients(self, x: Tensor, context: Context, step: int, share: float) -> Result:
        """Compute gradients of the mean over the whole batch, over all processes and parts."""
        for p in (*self.weights, *self.critic_weights):
            p.grad = None
        noise(self.config.seed, step, self.processes.rank)
        evidences: list[Evidence] = []
        total = 0.0
        for i in range(self.parts):
            part = Processes(i, self.parts).share(len(x))
            weight = (part.stop - part.start) / self.config.batch_size
            with self._exchanging(i == self.parts - 1):
                rows = contexts.rows(context, part)
                nats, evidence, record = self.trained(x[part], rows, share)
                loss = nats.mean() * weight
                (loss * self.processes.count).backward()  # gradients of processes are averaged
            if hasattr(self.critic, "critic_loss"):
                critic_loss = self.critic.critic_loss(record).mean() * weight
                (critic_loss * self.processes.count).backward(inputs=self.critic_weights)
            evidences.append(evidence)
            total += loss.item()
        self._average(p.grad for p in self.critic_weights)
        return Result(
            evidence=Evidence(*map(torch.cat, zip(*evidences, strict=True))),
            loss=total * self.config.batch_size / len(x),
            norm=self._norm(),
        )

    def _average(self, tensors: Iterable[Tensor | None]) -> None:
        """Average tensors over all processes."""
        for t in tensors:
            if self.processes.count > 1 and t is not None:
                dist.all_reduce(t)
                t /= self.processes.count

    def _norm(self) -> float:
        if not self.critic_is_finite():
            return float("nan")
        return float(full_tensor(nn.utils.get_total_norm(self._weight_gradients())))

    def critic_is_finite(self) -> bool:
        """Whether the gradients of the objective's own parameters are finite."""
        gradients = [p.grad for p in self.critic_weights if p.grad is not None]
        return all(bool(g.isfinite().all()) for g in gradients)

    def _weight_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.weights if p.grad is not None]

    @contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Whether a backward pass averages the gradients of all processes."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(now)  # pyright: ignore
            yield
        elif now or self.trained is self.forward:
            yield
        else:
            with self.accelerator.no_sync(self.trained):
                yield

    def repeat(self, x: Tensor, context: Context, step: int, share: float) -> None:
        """The forward pass of a step again, with the same noise."""
        noise(self.config.seed, step, self.processes.rank)
        self.forward(x, context, share)

    # -- optimizers

    def schedule(self, step: int, share: float, lr_scale: float) -> None:
        """Set the learning rates of a step, given the share of the budget that is spent."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = self.config.learning_rate(step, share, peak) * lr_scale

    def apply(self, norm: float, clip: float) -> None:
        """Take a step; a gradient whose norm is above `clip` is scaled down to it."""
        if norm > clip:
            shards = [local_shard(g) for g in self._weight_gradients()]
            torch._foreach_mul_(shards, clip / norm)  # pyright: ignore
        self.optimizer.step()
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
        for module in self.stateful:
            module.after_step()
            self._average(b for b in module.buffers(recurse=False) if b.is_floating_point())

    def skip(self) -> None:
        """Let modules drop what they recorded for `after_step`."""
        for module in self.stateful:
            if hasattr(module, "skip_step"):
                module.skip_step()
