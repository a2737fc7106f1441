"""One training step: the gradients of a batch, the optimizers, the running average of weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from musigma import context as contexts
from musigma.context import Context
from musigma.evaluation import noise
from musigma.model import Model
from musigma.objectives import surrogate
from musigma.processes import (
    Processes,
    current_processes,
    full_tensor,
    gather_shards,
    local_shard,
    shard_like,
)
from musigma.tensors import frozen
from musigma.trace import Evidence, Recorder
from musigma.training.config import TrainConfig

__all__ = [
    "MakeOptimizer",
    "Objective",
    "ObjectivePass",
    "Result",
    "TrainingStep",
    "WeightAverage",
    "made_optimizer",
]

Objective: TypeAlias = Callable[[Recorder], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], optim.Optimizer]


class ObjectivePass(nn.Module):
    """A model and its objective as one module, so that DDP and FSDP see the whole graph.

    The parameters of an objective that is given are not part of it.
    """

    objective: Objective | None

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        objective: Objective | None,
        examples: int | None = None,
    ):
        super().__init__()
        self.model, self.config, self.examples = model, config, examples
        self.__dict__["objective"] = objective  # an attribute would be registered as a part

    def forward(
        self, x: Tensor, context: Context, share: float
    ) -> tuple[Tensor, Evidence, Recorder]:
        """Nats (B,), the terms without gradients, and the recorder of the pass.

        Raises:
            ValueError: If the objective returns another shape.
        """
        n, objective = len(x), self.objective
        record = self.recorder(share)
        if (k := self.config.chosen.draws) > 1:
            x, context = x.repeat_interleave(k, 0), contexts.repeat(context, k)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.bf16):
            evidence = self.model(x, context, trace=record)
        detached = Evidence(*(t.detach() for t in evidence))
        if objective is None:
            objective = partial(self.config.nats, share=share)
            applies_surrogate = self.config.applies_surrogate
        else:
            applies_surrogate = getattr(objective, "applies_surrogate", False)
        if not applies_surrogate:  # once, and not again by objectives that this one calls
            record.terms = evidence._replace(score=detached.score)
        criticized = isinstance(objective, nn.Module) and hasattr(objective, "critic_loss")
        with frozen(objective.parameters() if criticized else ()):  # pyright: ignore
            nats = objective(record)
        if (shape := getattr(nats, "shape", None)) != (n,):
            what = type(nats).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"objective: returned {what} for {n} examples; expected ({n},), the nats of each"
            )
        return nats if applies_surrogate else surrogate(nats, evidence), detached, record

    def recorder(self, share: float = 0.0) -> Recorder:
        """An empty recorder, for a pass of this objective."""
        closed_form = getattr(self.objective, "closed_form", True)
        record = Recorder(closed_form=self.config.chosen.closed_form and closed_form)
        record.share, record.examples = share, self.examples
        return record


def made_optimizer(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """The optimizer that a function makes.

    Raises:
        ValueError: If it is not an optimizer, needs a closure, or lacks a learning rate.
    """
    optimizer = make(list(parameters))
    name = type(optimizer).__name__
    if not isinstance(optimizer, optim.Optimizer):
        raise ValueError(
            "optimizer: expected a function of a list of parameters to a torch.optim.Optimizer; "
            f"it returned {name}"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: a step of {name} needs a closure, which training on batches does not "
            "have; use another"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {name} has groups of parameters without a learning rate, lr, which the "
            "schedule scales; use another"
        )
    return optimizer


class Result(NamedTuple):
    """The outcome of a batch."""

    evidence: Evidence
    """Its terms, without gradients."""
    loss: float
    """The mean of the objective over this process's examples, in nats."""
    norm: float
    """That of the model's gradient over all processes; NaN if a critic's is not finite."""


class TrainingStep:
    """Computes gradients of batches, each in several parts, and applies them.

    `forward` is the model, in training mode and perhaps sharded, with its objective; `accelerator`
    wraps it for several processes.
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
        self.weights = list(self.model.parameters())
        self.optimizer = made_optimizer(make_optimizer or self.config.make_optimizer, self.weights)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        wrapped = self.processes.count > 1 and not sharded
        self.trained = accelerator.prepare(forward) if wrapped else forward
        self.stateful: list[Any] = [m for m in self.model.modules() if hasattr(m, "after_step")]
        module = forward.objective if isinstance(forward.objective, nn.Module) else None
        self.critic: Any = module.train() if module else None
        self.critic_weights = list(module.parameters()) if module else []
        self.critic_optimizer: optim.Optimizer | None = None
        if self.critic_weights:
            adam = partial(optim.Adam, self.critic_weights, self.config.lr)
            self.critic_optimizer = getattr(module, "critic_optimizer", adam)()

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

    def _exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """A context in which a backward pass averages the gradients of all processes, or not."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(now)  # pyright: ignore
        elif not now and self.trained is not self.forward:
            return self.accelerator.no_sync(self.trained)
        return nullcontext()

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


class WeightAverage:
    """The running average of a model's weights, in a model of its own: evaluated and saved.

    It is made before weights are sharded. Then each process averages its shards, and `assemble`
    gathers them in `model`. With a decay of 0 the average is the last value.
    """

    def __init__(self, model: Model, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def follow(self, model: Model) -> None:
        """Average the weights of this model from now on."""
        self.weights, self.buffers = list(model.parameters()), list(model.buffers())
        self.reset()

    def reset(self) -> None:
        """Continue from the weights in `model`, which were replaced."""
        pairs = zip(self.model.parameters(), self.weights, strict=True)
        self.means = [local_shard(shard_like(mean, like)) for mean, like in pairs]

    def update(self, step: int) -> None:
        """Average in the weights after a step; the decay is smaller in early steps."""
        if self.decay:
            self._update(min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def _update(self, decay: float) -> None:
        values = [local_shard(p) for p in self.weights]
        torch._foreach_lerp_(self.means, values, 1 - decay)  # pyright: ignore
        for mean, value in zip(self.model.buffers(), self.buffers, strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def assemble(self) -> None:
        """Bring `model` up to date."""
        if not self.decay:
            self._update(0.0)
        for mean, shard, like in zip(
            self.model.parameters(), self.means, self.weights, strict=True
        ):
            mean.copy_(gather_shards(shard, like))
