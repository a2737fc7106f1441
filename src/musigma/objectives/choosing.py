"""Objectives that a text names, such as ``"beta-elbo beta=0.1 + adversarial weight=0.5"``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from musigma.named import Choice
from musigma.objectives.base import OBJECTIVES
from musigma.objectives.bounds import elbo
from musigma.trace import Evidence, Recorder

__all__ = ["Chosen", "Sum"]


class Chosen:
    """What a text names: an objective with its options, or the sum of several.

    Args:
        text: ``NAME option=value ...``. Several are joined by " + ": their sum is -ELBO, and what
            each of them adds to it.
        given: Further options of the first.
        warmup: Share of the training budget over which `beta` of the first rises from zero.

    Attributes:
        choices: The objectives, with their options.
        draws: Draws per example, k · m.
        closed_form: Whether KL divergences are in closed form.

    Raises:
        ValueError: For an unknown name or option, an option that is given twice, or a sum of
            objectives that differ in their draws.

    Example:
        >>> Chosen("miwae k=4 m=3").draws
        12
        >>> Chosen("miwae k=4 temperature=3")
        Traceback (most recent call last):
        ...
        ValueError: objective: miwae takes k=5 m=2; got 'temperature=3'
    """

    def __init__(self, text: str, given: Mapping[str, Any] | None = None, *, warmup: float = 0.0):
        self.warmup = warmup
        self.choices: Sequence[Choice] = [OBJECTIVES.choice(part) for part in text.split(" + ")]
        first = self.choices[0]
        for name, value in (given or {}).items():
            if name in first.options:
                raise ValueError(f"objective: {name} is given twice for {first.name}; keep one")
            first.options[name] = value
        draws = [self._draws(choice) for choice in self.choices]
        forms = [getattr(choice.function, "closed_form", True) for choice in self.choices]
        if len(set(draws)) > 1:
            counts = ", ".join(f"{c.name} {n}" for c, n in zip(self.choices, draws, strict=True))
            raise ValueError(f"objective: a sum needs as many draws for each; got {counts}")
        if len(draws) > 1 and draws[0] > 1:
            raise ValueError(f"objective: a sum is for one draw per example; got {draws[0]}")
        self.draws = draws[0]
        self.closed_form = self.draws == 1 and all(forms)

    @staticmethod
    def _draws(choice: Choice) -> int:
        options = OBJECTIVES.defaults(choice.name) | choice.options
        return math.prod(options.get(name, 1) for name in ("k", "m"))

    @property
    def is_function(self) -> bool:
        """Whether this is a single function, without parameters."""
        return len(self.choices) == 1 and not inspect.isclass(self.choices[0].function)

    def nats(self, record: Evidence | Recorder, share: float = 1.0, part: int = 0) -> Tensor:
        """The value (B,) of a function, given the share of the training budget that is spent.

        Args:
            record: The terms of a pass.
            share: From 0 to 1.
            part: Which of the objectives.
        """
        name, function, options = self.choices[part]
        if self.warmup and part == 0:
            beta = (OBJECTIVES.defaults(name) | options)["beta"]
            options = options | {"beta": beta * min(1.0, share / self.warmup)}
        return function(record, **options)

    def module(self, record: Recorder) -> nn.Module:
        """The objective as a module, made from a pass of a few examples."""
        parts = [
            choice(record) if inspect.isclass(choice.function) else _Part(self, i)
            for i, choice in enumerate(self.choices)
        ]
        return parts[0] if len(parts) == 1 else Sum(parts)


class _Part(nn.Module):
    """A function of those that are chosen."""

    def __init__(self, chosen: Chosen, part: int):
        super().__init__()
        self.chosen, self.part = chosen, part

    def forward(self, record: Recorder) -> Tensor:
        return self.chosen.nats(record, record.share, self.part)


class Sum(nn.Module):
    """-ELBO, and what each objective adds to it. Nats, (B,).

    Args:
        parts: The objectives; those that are modules may have critics.
    """

    def __init__(self, parts: Sequence[Any]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, record: Recorder) -> Tensor:
        """The objective."""
        base = elbo(record)
        return base + torch.stack([part(record) - base for part in self.parts]).sum(0)

    def __getattr__(self, name: str) -> Any:
        """`critic_loss` and `critic_optimizer` are those of the parts, if they have any."""
        if name in ("critic_loss", "critic_optimizer"):
            critics = [part for part in self.parts if hasattr(part, "critic_loss")]
            if critics:
                return partial(getattr(self, f"_{name}"), critics)
        return super().__getattr__(name)

    @staticmethod
    def _critic_loss(critics: Sequence[Any], record: Recorder) -> Tensor:
        return torch.stack([critic.critic_loss(record) for critic in critics]).sum(0)

    @staticmethod
    def _critic_optimizer(critics: Sequence[Any]) -> torch.optim.Optimizer:
        groups = [group for c in critics for group in c.critic_optimizer().param_groups]
        return torch.optim.Adam(groups)
