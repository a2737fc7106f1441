"""How a model is trained: a budget, an objective, an optimiser, and what the machine may do."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from musigma import objectives
from musigma.memory import Keep
from musigma.model import Model
from musigma.trace import Evidence
from musigma.training.state import Progress

__all__ = ["TrainConfig"]

Tracker = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Args:
        steps: Budget in optimiser steps; the learning rate's schedule follows the budget.
        epochs: Budget in passes over the data; 20 if no budget is given.
        minutes: Budget in minutes of training.
        batch_size: Examples per step, over all processes.
        optimizer: The rule that turns gradients into steps: adam, adamw or adamax.
        lr: Learning rate, after the warm-up.
        weight_decay: Of adamw; the others have none.
        warmup: Steps over which the learning rate rises from zero.
        schedule: After the warm-up: down to zero along a cosine, or constant.
        clip: Largest norm of the gradient, in nats; longer ones are shortened to it. None: three
            times the usual norm.
        skip_above: A step whose gradient is so many times longer than usual is skipped.
        ema: Decay of the running average of the weights that is evaluated and saved; 0: none.
        beta: Weight of the KL; 1 is the ELBO. For models with a likelihood.
        kl_warmup: Share of the budget over which beta rises from zero.
        free_bits: Nats that each latent's KL may cost for nothing.
        k: Draws per example; with more than 1, the importance-weighted bound is trained on.
        seed: Of everything random.
        evaluations: How often the validation data are looked at.
        evaluate_on: At most so many validation examples each time.
        save_every: Minutes between saves of the state: at most so many are lost.
        precision: Of the networks. Densities, log-determinants and weights are float32 at least.
        fast: What is fastest here: networks in bf16, and compiled where a compiler is found.
        memory: What is kept for the backward pass: all, the joints of what is recomputed, or, for
            flows, next to nothing.
        accumulate: Parts that a step's batch is worked through in, one after the other.
        memory_budget: Such as 4GB: a batch is worked through in as many parts as that takes.
        shard: Cut weights, gradients and moments over the processes (FSDP2), for large networks;
            the averaged weights stay whole on each.
        workers: Processes that read data ahead.
        track: Also log to tensorboard, trackio or wandb.
        profile: Write a trace of a few steps into the run: profile.json.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "adamax"] = "adam"
    lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = None
    skip_above: float = 50.0
    ema: float = 0.999
    beta: float = 1.0
    kl_warmup: float = 0.0
    free_bits: float = 0.0
    k: int = 1
    seed: int = 0
    evaluations: int = 10
    evaluate_on: int = 1000
    save_every: float = 5.0
    precision: Literal["fp32", "bf16"] = "fp32"
    fast: bool = False
    memory: Keep = "store"
    accumulate: int = 1
    memory_budget: str | None = None
    shard: bool = False
    workers: int = 0
    track: tuple[Tracker, ...] = ()
    profile: bool = False

    def __post_init__(self):
        given = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: the budget is given as {given[0]} already; keep one")
        if not given:
            object.__setattr__(self, "epochs", 20.0)
        object.__setattr__(self, "track", tuple(self.track))
        types = get_type_hints(TrainConfig)
        for field in fields(self):
            if (allowed := get_args(types[field.name])) and isinstance(allowed[0], str):
                self._one_of(field.name, getattr(self, field.name), allowed)
        for tracker in self.track:
            self._one_of("track", tracker, get_args(Tracker))
        least = {"steps": 1, "batch_size": 1, "k": 1, "evaluations": 1, "evaluate_on": 1}
        least |= {"accumulate": 1, "workers": 0}
        least |= dict.fromkeys(("warmup", "weight_decay", "beta", "kl_warmup", "free_bits"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}: expected {low} or more; got {value}")
        for name in ("beta", "kl_warmup", "free_bits", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number; got {getattr(self, name)}")
        for name in ("epochs", "minutes", "lr", "clip", "skip_above", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number; got {value}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 to below 1; got {self.ema}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay: is for adamw; the optimizer is {self.optimizer}")
        if self.k > 1 and self.weighs_rate:
            raise ValueError("k: the importance-weighted bound has no beta and no free bits")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: a batch of {self.batch_size} has no {self.accumulate} parts"
            )
        if self.shard and self.memory == "reversible":
            raise ValueError(
                "memory: weights that are cut are whole going forward only; with "
                "shard use checkpoint"
            )
        if self.memory_budget is not None:
            if self.accumulate > 1:
                raise ValueError("memory_budget: it chooses the parts; leave accumulate out")
            bytes_of(self.memory_budget)

    @staticmethod
    def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(allowed)}; got {value!r}")

    @property
    def weighs_rate(self) -> bool:
        """Whether the objective treats rate and distortion differently."""
        return self.beta != 1 or self.kl_warmup > 0 or self.free_bits > 0

    @property
    def bf16(self) -> bool:
        """Whether networks compute in bfloat16."""
        return self.fast or self.precision == "bf16"

    def share(self, progress: Progress, examples: int) -> float:
        """How much of the budget is spent, from 0 to 1."""
        if self.minutes is not None:
            return min(1.0, progress.seconds / (60 * self.minutes))
        steps = self.steps or math.ceil((self.epochs or 0) * examples / self.batch_size)
        return min(1.0, progress.step / steps)

    def learning_rate(self, step: int, share: float) -> float:
        """Of a step, when so much of the budget is spent."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1.0
        return self.lr * rise * fall

    def objective(self, evidence: Evidence, share: float) -> Tensor:
        """The loss: nats per example, averaged over the batch."""
        if self.k > 1:
            return objectives.iwae(evidence, self.k).mean()
        if not self.weighs_rate:
            return objectives.elbo(evidence).mean()
        beta = self.beta * (min(1.0, share / self.kl_warmup) if self.kl_warmup else 1.0)
        if self.free_bits:
            return objectives.free_bits(evidence, self.free_bits, beta=beta).mean()
        return objectives.beta_elbo(evidence, beta).mean()

    def optimizer_for(self, model: Model) -> torch.optim.Optimizer:
        """The optimiser, over all parameters alike; in one kernel where there is one."""
        parameters = list(model.parameters())
        if self.optimizer == "adamax":
            return torch.optim.Adamax(parameters, lr=self.lr, foreach=True)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, fused=True)
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True
        )


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def bytes_of(text: str) -> int:
    """How many bytes 4GB are, or 512MiB.

    Raises:
        ValueError: For any other text.

    >>> bytes_of("1.5GB"), bytes_of("2 MiB")
    (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?)B?\s*", text.upper())
    try:
        assert match
        size = int(float(match[1]) * UNITS[match[2]])
        assert size > 0
    except (AssertionError, ValueError, KeyError):
        raise ValueError(f"memory_budget: expected 4GB, or 512MiB; got {text!r}") from None
    return size


def text_of(size: float) -> str:
    """A number of bytes as `bytes_of` reads it, rounded up to two digits or more.

    >>> text_of(31_234), text_of(1_210_000), text_of(4e9)
    ('31.3KB', '1.3MB', '4.0GB')
    """
    unit = next((unit for unit in "GM" if size >= UNITS[unit]), "K")
    return f"{math.ceil(size / UNITS[unit] * 10) / 10}{unit}B"
