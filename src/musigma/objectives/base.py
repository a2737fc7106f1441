"""What every objective shares: the registry, the terms of a pass, and gradients of its draws."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from musigma.named import Registry
from musigma.trace import Evidence, Recorder

__all__ = ["OBJECTIVES", "objective", "register", "straight", "surrogate", "terms_of"]

OBJECTIVES = Registry("objective", "record")
"""Registered objectives by name; their keyword arguments are their options."""

F = TypeVar("F", bound=Callable[..., Any])


def terms_of(record: Evidence | Recorder) -> Evidence:
    """The evidence itself, or that of a recorder.

    Raises:
        ValueError: If the recorder is empty.
    """
    if isinstance(record, Evidence):
        return record
    if record.terms is None:
        raise ValueError("record: it is empty; pass it through a model, model(x, trace=record)")
    return record.terms


def straight(value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient`."""
    return value.detach() + (gradient - gradient.detach())


def surrogate(nats: Tensor, evidence: Evidence) -> Tensor:
    r"""``nats``, with a gradient that includes the score-function estimator where needed.

    .. math:: \nabla E_q[f] = E_q[\nabla f + (f - b) \nabla \log q]

    with b the mean of f over the other examples of the batch (Mnih & Rezende, 2016,
    arXiv:1602.06725). The value does not change. If every draw is reparameterized, `nats` is
    returned unchanged. `evidence.score` may have several consecutive rows for each entry of `nats`
    (several draws of one example).
    """
    if not evidence.score.requires_grad:
        return nats
    score = evidence.score.reshape(len(nats), -1).sum(1)
    fixed, n = nats.detach(), len(nats)
    baseline = (fixed.sum() - fixed) / (n - 1) if n > 1 else fixed.new_zeros(n)
    return nats + (fixed - baseline) * (score - score.detach())


def register(function: F, name: str | None = None, **attributes: bool) -> F:
    """Register a function of a `Recorder`, or a class, as an objective.

    Its name is that of the function or the class, with hyphens for underscores, or `name`. A class
    is called once, with the recorder of a pass of a few examples and the options, before training;
    the result is called with the recorder of every step. These attributes are optional; those of
    a function may be given as arguments:

    | attribute           | meaning                                                          |
    |---------------------|------------------------------------------------------------------|
    | `closed_form`       | false if KL divergences are not to be in closed form             |
    | `applies_surrogate` | whether it applies `surrogate` itself, or needs none             |
    | `whole_weights`     | whether it cannot be used if weights are sharded                 |
    | `critic_loss`       | the loss (B,) that its own parameters minimize, given a recorder |
    | `critic_optimizer`  | makes their optimizer; by default Adam                           |

    An option `k`, and an option `m`, are numbers of draws: the recorder has k · m consecutive rows
    for each example.
    """
    for attribute, value in attributes.items():
        setattr(function, attribute, value)
    return OBJECTIVES.register(function, name or function.__name__.replace("_", "-"))


def objective(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a function into an objective, and register it.

    The function takes an `Evidence`, if its first parameter is called `evidence`, and a `Recorder`
    otherwise. The objective takes either, and applies `surrogate`. Its name on the command line
    (``--objective NAME``) is that of the function, with hyphens for underscores.
    """
    signature = inspect.signature(function)
    first, *options = signature.parameters.values()

    @functools.wraps(function)
    def wrapped(record: Evidence | Recorder, *args: Any, **options: Any) -> Tensor:
        evidence = terms_of(record)
        within = evidence._replace(score=evidence.score.detach())  # an objective may call another
        if first.name == "evidence" or isinstance(record, Evidence):
            return surrogate(function(within, *args, **options), evidence)
        record.terms = within
        try:
            nats = function(record, *args, **options)
        finally:
            record.terms = evidence
        return surrogate(nats, evidence)

    named = [p.replace(kind=p.KEYWORD_ONLY) for p in options]  # in a text all options are named
    wrapped.__signature__ = signature.replace(parameters=[first, *named])  # pyright: ignore
    return register(wrapped, applies_surrogate=True)
