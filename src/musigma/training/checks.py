"""Checks of model, data and configuration before training writes anything."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from musigma.checkpoint import require_config
from musigma.context import Context
from musigma.data import Dataset, batch_indices
from musigma.distributions import are_counted
from musigma.evaluation import batch, check, evaluating
from musigma.layers import standardizers
from musigma.memory import set_memory
from musigma.model import Model
from musigma.processes import current_processes
from musigma.training import hardware
from musigma.training.config import TrainConfig
from musigma.training.step import MakeOptimizer, Objective, ObjectivePass, made_optimizer

__all__ = ["check_run", "check_support"]


def check_run(
    model: Model,
    train: Dataset,
    config: TrainConfig,
    objective: Objective | None = None,
    optimizer: MakeOptimizer | None = None,
) -> Objective | None:
    """Check the arguments of `fit`, with a pass of a few examples through model and objective.

    `optimizer` is called once, and its result is discarded.

    Returns:
        The objective that is given; or a module, if the configuration names an objective with
        parameters or several objectives; None if it names a function (`TrainConfig.nats`).

    Raises:
        ValueError: As in `fit`.
    """
    require_config(model)
    check(model, train)
    check_support(model, train)
    if config.weights_rate and model.is_flow:
        raise ValueError(
            "beta: beta, kl_warmup and free_bits weight the latents against a likelihood, and a "
            "flow has none; leave them out"
        )
    if objective is not None and (config.objective or config.weights_rate):
        raise ValueError(
            "objective: given to fit, so the configuration must not name another; leave out "
            "objective, beta, kl_warmup and free_bits"
        )
    set_memory(model, config.memory)  # refuses a mode that does nothing
    set_memory(model, "store")
    if (count := current_processes().count) > config.batch_size:
        raise ValueError(
            f"batch_size: {count} processes cannot share {config.batch_size} examples; give each "
            "at least one"
        )
    if standardizers(model):
        train.moments()  # refuses columns that are constant here
    for tracker in config.track:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"track: {tracker} is not installed: pip install {tracker}")
    if optimizer is not None:
        made_optimizer(optimizer, model.parameters())
    first = batch_indices(len(train), config.batch_size, seed=config.seed, step=0)
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng():
        trace = ObjectivePass(model, config, objective, len(train)).recorder()
        x, context = batch(train, first[:2], model)
        try:
            model(x, context, trace=trace)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model: it cannot process these data: {reason}") from error
        if context is not None and (ignored := _ignored(model, x, context)):
            raise ValueError(
                f"context: no network of this {type(model).__name__} takes {', '.join(ignored)}, "
                "so training would ignore it; a network takes the context by a parameter "
                "`context` of its forward method (torch.nn.Sequential has none)"
            )
        if objective is None and not config.chosen.is_function:
            torch.manual_seed(config.seed)
            objective = config.chosen.module(trace)
        if objective is not None or config.objective:
            forward = ObjectivePass(model, config, objective, len(train))
            with _rehearsing(model):
                _check_objective(forward, *batch(train, first[:64], model))
    if config.free_bits and any(site not in trace.kl for site in model.latents()):
        raise ValueError(
            "free_bits: they apply to the KL of each latent, and with a flow prior latents have "
            "none; leave them out, or use a normal prior"
        )
    if config.memory_budget is not None:
        set_memory(model, config.memory)
        hardware.number_of_parts(model, train, config)
    return objective


def check_support(model: Model, data: Dataset) -> None:
    """Refuse data outside the support of a model.

    Raises:
        ValueError: Naming columns and rows.
    """
    if are_counted(model) and (fault := data.not_counts()):
        raise ValueError(f"likelihood: it is for counts 0, 1, 2, ...; {fault}")
    support = None if model.spec is None else model.spec.support
    if support is not None and data.support != support:
        data.within(support)


def _ignored(model: Model, x: Tensor, context: Context) -> list[str]:
    """Names of the variables of the context on which no term depends.

    A term depends on a variable if it has a gradient with respect to it, even one of zero, or, for
    networks that look classes up, if another value changes it in a copy with random weights.
    """
    variables = model.spec.context if model.spec is not None else ()
    names = [variable.name for variable in variables]
    parts = [context] if isinstance(context, Tensor) else [context[name] for name in names]  # pyright: ignore
    parts = [t.detach().requires_grad_() for t in parts]

    def total(model: Model, parts: list[Tensor]) -> Tensor:
        torch.manual_seed(0)
        given = dict(zip(names, parts, strict=True)) if len(parts) > 1 else parts[0]
        terms = model(x, given)
        return (terms.elbo + terms.auxiliary).sum()

    nats = total(model, parts)
    grads = torch.autograd.grad(nats, parts, allow_unused=True) if nats.requires_grad else ()
    without = [i for i in range(len(parts)) if not grads or grads[i] is None]
    if not without:
        return []
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        before = total(model, parts)
        others = [
            t.roll(1, 1) if v.classes else t + 1 for v, t in zip(variables, parts, strict=True)
        ]
        changed = [total(model, [*parts[:i], others[i], *parts[i + 1 :]]) for i in without]
    return [repr(names[i]) for i, after in zip(without, changed, strict=True) if after == before]


@contextmanager
def _rehearsing(model: Model) -> Iterator[None]:
    """Set training mode, in which posteriors may differ; afterwards restore it and the buffers."""
    mode, before = model.training, [(t, t.clone()) for t in model.buffers()]
    model.train()
    try:
        yield
    finally:
        model.train(mode)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _check_objective(forward: ObjectivePass, x: Tensor, context: object) -> None:
    """Refuse an objective whose value on the first batch cannot be minimized."""
    model, objective = forward.model, forward.objective
    if isinstance(objective, nn.Module):
        objective.to(x.device)
    nats, evidence, record = forward(x, context, 0.0)  # pyright: ignore[reportArgumentType]
    sound = bool(evidence.elbo.isfinite().all())  # otherwise it is the model that is at fault
    _check_value("objective", nats, model.parameters(), sound)
    if hasattr(objective, "critic_loss"):
        if not isinstance(objective, nn.Module) or not list(objective.parameters()):
            raise ValueError(
                "objective: it defines critic_loss, so it must be a module with parameters, which "
                "that loss trains"
            )
        loss = objective.critic_loss(record)  # pyright: ignore[reportCallIssue]
        _check_value("objective.critic_loss", loss, objective.parameters(), sound)


def _check_value(
    name: str, value: Tensor, parameters: Iterable[nn.Parameter], finite: bool
) -> None:
    """Refuse a value that is not finite, or has no gradient for any of the parameters."""
    if finite and not bool(value.isfinite().all()):
        bad = value[~value.isfinite()].flatten()[0].item()
        raise ValueError(f"{name}: returned {bad} for the first batch, which is not finite")
    trained = [p for p in parameters if p.requires_grad] if value.requires_grad else []
    gradients = torch.autograd.grad(value.sum(), trained, allow_unused=True) if trained else ()
    if all(g is None for g in gradients):
        raise ValueError(
            f"{name}: its value has no gradient for the parameters that it trains; do not "
            "detach it or compute it under torch.no_grad"
        )
