"""The configuration of a training run."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args, get_type_hints

from torch import Tensor, nn, optim

from musigma.memory import MemoryMode
from musigma.objectives import OBJECTIVES, Chosen
from musigma.trace import Evidence, Recorder
from musigma.training.state import Progress

__all__ = ["OPTIMIZERS", "TrainConfig", "conditional_config"]

Tracker = Literal["tensorboard", "trackio", "wandb"]
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda parameters, lr, decay: optim.Adam(parameters, lr=lr, fused=True),
    "adamw": lambda parameters, lr, decay: optim.AdamW(
        parameters, lr=lr, weight_decay=decay, fused=True
    ),
    "adamax": lambda parameters, lr, decay: optim.Adamax(parameters, lr=lr, foreach=True),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a training run.

    Args:
        steps: Budget in optimizer steps. The learning rate's schedule spans the budget.
        epochs: Budget in passes over the training data; 20 if no budget is given.
        minutes: Budget in minutes of training.
        batch_size: Examples per step, over all processes.
        objective: The objective, NAME option=value ..., of those that `musigma list` shows,
            or several that are joined by " + " (`musigma.objectives.Chosen`). By default the ELBO,
            or the objective that `beta`, `kl_warmup`, `free_bits` or `k` belongs to.
        optimizer: Optimizer: adam, adamw or adamax.
        lr: Peak learning rate, reached after the warm-up.
        weight_decay: Weight decay, for adamw.
        warmup: Number of steps over which the learning rate rises from zero.
        schedule: Learning rate after the warm-up: a cosine down to zero, or constant.
        clip: Largest gradient norm, in nats; a longer gradient is scaled down to it. By default
            three times the usual norm.
        skip_above: Gradient norm, as a multiple of the usual one, above which a step is skipped.
        ema: Decay of the running average of the weights that is evaluated and saved; 0: none.
        beta: Weight of the KL term, for models with a likelihood; 1 is the ELBO.
        kl_warmup: Fraction of the budget over which beta rises from zero.
        free_bits: Nats of each latent's KL that are not penalized.
        k: Draws per example; more than 1 trains on the importance-weighted bound.
        seed: Random seed.
        evaluations: Number of evaluations on the validation data.
        evaluate_on: Largest number of validation examples per evaluation.
        patience: Number of evaluations without improvement after which training stops, with the
            best weights. By default training spends its whole budget.
        save_every: Minutes between saves of the run's state.
        precision: Precision of the networks; densities, log-determinants and weights stay in
            float32.
        fast: Compute in bf16, and compile repeated blocks if there is a compiler.
        memory: Activations kept for the backward pass: all (store), those between recomputed
            segments (checkpoint), or, for flows, almost none (reversible).
        accumulate: Number of parts that each batch is processed in, one after another.
        memory_budget: Memory of each process, such as 4GB. It determines the number of parts.
        shard: Shard weights, gradients and moments over the processes (FSDP2), for large networks.
            The averaged weights stay whole on each.
        workers: Number of processes that load data in advance.
        track: Also log to tensorboard, trackio or wandb.
        profile: Write a profile of a few steps into the run: profile.json.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 64
    objective: str | None = None
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
    patience: int | None = None
    save_every: float = 5.0
    precision: Literal["fp32", "bf16"] = "fp32"
    fast: bool = False
    memory: MemoryMode = "store"
    accumulate: int = 1
    memory_budget: str | None = None
    shard: bool = False
    workers: int = 0
    track: tuple[Tracker, ...] = ()
    profile: bool = False

    def __post_init__(self):
        budgets = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if not budgets:
            object.__setattr__(self, "epochs", 20.0)
        object.__setattr__(self, "track", tuple(self.track))
        if faults := [*self._faults(budgets)]:
            raise ValueError("; ".join(faults))

    def _faults(self, budgets: list[str]) -> Iterator[str]:
        """Every fault of the options, as a sentence."""
        if len(budgets) > 1:
            yield f"{budgets[1]}: the budget is already given as {budgets[0]}; keep one"
        types = get_type_hints(TrainConfig)
        for field in fields(self):
            if (allowed := get_args(types[field.name])) and isinstance(allowed[0], str):
                yield from self._one_of(field.name, getattr(self, field.name), allowed)
        for tracker in self.track:
            yield from self._one_of("track", tracker, get_args(Tracker))
        least = dict.fromkeys(("steps", "batch_size", "k", "evaluations", "evaluate_on"), 1)
        least |= {"accumulate": 1, "patience": 1, "workers": 0}
        least |= dict.fromkeys(("warmup", "weight_decay", "beta", "kl_warmup", "free_bits"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                yield f"{name}: expected {low} or more; got {value}"
        for name in ("epochs", "minutes", "lr", "clip", "skip_above", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name}: expected a positive number; got {value}"
        if not 0 <= self.ema < 1:
            yield f"ema: expected a number from 0 to below 1; got {self.ema}"
        if self.weight_decay and self.optimizer != "adamw":
            yield f"weight_decay: only adamw has one; the optimizer is {self.optimizer}"
        try:
            name = OBJECTIVES.choice(self._objective_text.split(" + ")[0]).name
        except ValueError as error:
            yield str(error)
        else:
            unused = [*self._unused_options(name)]
            for option in unused:
                yield f"{option}: the objective {name} has no such option"
            if not unused:
                try:
                    functions = [choice.function for choice in self.chosen.choices]
                except ValueError as error:
                    yield str(error)
                else:
                    if self.shard and any(getattr(f, "whole_weights", False) for f in functions):
                        yield f"shard: the objective {name} needs whole weights"
        if self.accumulate > self.batch_size:
            yield f"accumulate: a batch of {self.batch_size} cannot have {self.accumulate} parts"
        if self.shard and self.memory == "reversible":
            yield "memory: reversible needs whole weights; with shard, use checkpoint"
        if self.memory_budget is not None:
            if self.accumulate > 1:
                yield "memory_budget: it determines the number of parts; leave out accumulate"
            try:
                bytes_of(self.memory_budget)
            except ValueError as error:
                yield str(error)

    @staticmethod
    def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
        if value not in allowed:
            yield f"{name}: expected {' or '.join(allowed)}; got {value!r}"

    @property
    def weights_rate(self) -> bool:
        """Whether rate and distortion have different weights in the objective."""
        return self.beta != 1 or self.kl_warmup > 0 or self.free_bits > 0

    @property
    def bf16(self) -> bool:
        """Whether networks compute in bfloat16."""
        return self.fast or self.precision == "bf16"

    def share(self, progress: Progress, examples: int) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        if self.minutes is not None:
            return min(1.0, progress.seconds / (60 * self.minutes))
        steps = self.steps or math.ceil((self.epochs or 0) * examples / self.batch_size)
        return min(1.0, progress.step / steps)

    def learning_rate(self, step: int, share: float, peak: float | None = None) -> float:
        """The learning rate of a step, given the share of the budget that is spent."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1.0
        return (self.lr if peak is None else peak) * rise * fall

    @property
    def _objective_text(self) -> str:
        if self.objective is not None:
            return self.objective
        if self.k > 1:
            return "iwae"
        return "free-bits" if self.free_bits else "beta-elbo" if self.weights_rate else "elbo"

    @cached_property
    def chosen(self) -> Chosen:
        """The objective that the configuration names, with its options."""
        given = {"beta": self.beta, "free": self.free_bits, "k": self.k}
        usual = {"beta": 1.0, "free": 0.0, "k": 1}
        options = {name: value for name, value in given.items() if value != usual[name]}
        return Chosen(self._objective_text, options, warmup=self.kl_warmup)

    @property
    def applies_surrogate(self) -> bool:
        """Whether the objective applies `musigma.objectives.surrogate` itself."""
        return getattr(self.chosen.choices[0].function, "applies_surrogate", False)

    def _unused_options(self, objective: str) -> Iterator[str]:
        """Options that are given and that the objective does not have."""
        options = OBJECTIVES.defaults(objective)
        fixed = inspect.isclass(OBJECTIVES[objective])  # its options do not change during a run
        for name, is_given, option in (
            ("beta", self.beta != 1, "beta"),
            ("kl_warmup", self.kl_warmup > 0, "" if fixed else "beta"),
            ("free_bits", self.free_bits > 0, "free"),
            ("k", self.k > 1, "k"),
        ):
            if is_given and option not in options:
                yield name

    def nats(self, record: Evidence | Recorder, share: float) -> Tensor:
        """The objective that the configuration names, in nats per example, shape (B,).

        It must be a single function (`musigma.objectives.Chosen.is_function`).
        """
        return self.chosen.nats(record, share)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> optim.Optimizer:
        """The optimizer; a fused one where there is one."""
        return OPTIMIZERS[self.optimizer](parameters, self.lr, self.weight_decay)


def given_options(config: TrainConfig) -> dict[str, Any]:
    """The options of a configuration that are not at their defaults."""
    usual = TrainConfig()
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != getattr(usual, name)
    }


def conditional_config(examples: int, features: int, **options: Any) -> TrainConfig:
    """How to train the density of a vector of numbers, given others.

    Simulations are few, and the more features the context has, the easier it is to memorize
    them. Weight decay is therefore strong, and proportional to the number of features per example,
    up to 2.5. (With 4, given 40 numbers through the embedding `mlp`, 1,800 examples lost half a
    nat.)
    Training stops early by the figure of the validation data; the budget is a cap. The numbers
    were chosen on eight simulators at 1,000 and 10,000 simulations (`docs/figures.md`).

    Args:
        examples: Number of training examples.
        features: Number of features of the context; of a sequence, those of one element.
        **options: Options of `TrainConfig`, which replace these.

    Example:
        >>> config = conditional_config(10_000, 8)
        >>> config.steps, config.batch_size, config.weight_decay
        (4309, 200, 0.16)
        >>> conditional_config(10_000, 8, minutes=5).patience
        6
    """
    chosen: dict[str, Any] = {
        "steps": round(2000 * (examples / 1000) ** (1 / 3)),
        "batch_size": 50 if examples < 3000 else 200,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": min(200 * features / examples, 2.5),
        "warmup": 50,
        "ema": 0.99,
        "evaluations": 40,
        "patience": 6,
    }
    if {"epochs", "minutes"} & options.keys():
        del chosen["steps"]
    if options.get("optimizer", "adamw") != "adamw":
        del chosen["weight_decay"]
    return TrainConfig(**(chosen | options))


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def bytes_of(text: str) -> int:
    """The number of bytes that 4GB or 512MiB stands for.

    Raises:
        ValueError: For any other text.

    >>> bytes_of("1.5GB"), bytes_of("2 MiB")
    (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMG]?I?)B?\s*", text.upper())
    size = int(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if size <= 0:
        raise ValueError(f"memory_budget: expected a size such as 4GB or 512MiB; got {text!r}")
    return size
