"""What training refuses before it writes anything."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from musigma.data import Dataset
from musigma.evaluation import batch, check, evaluating
from musigma.memory import check_memory, set_memory
from musigma.model import Model
from musigma.processes import current_processes
from musigma.trace import Recorder
from musigma.training import hardware
from musigma.training.config import TrainConfig
from musigma.training.step import evaluate_objective

__all__ = ["check_run"]


def check_run(model: Model, train: Dataset, config: TrainConfig, objective: Any = None) -> None:
    """Refuse what `fit` refuses; two examples pass through the model and the objective.

    Raises:
        ValueError: As `fit` says.
    """
    check(model, train)
    if config.weights_rate and model.is_flow:
        raise ValueError(
            "beta: beta, kl_warmup and free_bits weight the latents against a likelihood, and a "
            "flow has none; leave them out"
        )
    if objective is not None and (config.objective or config.weights_rate or config.k > 1):
        raise ValueError(
            "objective: given to fit, so the configuration must not name another; leave out "
            "objective, beta, kl_warmup, free_bits and k"
        )
    check_memory(model, config.memory)
    if (count := current_processes().count) > config.batch_size:
        raise ValueError(
            f"batch_size: {count} processes cannot share {config.batch_size} examples; give each "
            "at least one"
        )
    for tracker in config.track:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"track: {tracker} is not installed: pip install {tracker}")
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng():
        record = Recorder(closed_form=config.k == 1)
        x, context = batch(train, np.arange(min(2, len(train))), model)
        try:
            model(x, context, trace=record)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model: it cannot process these data: {reason}") from error
        if objective is not None:
            _check_objective(objective, record, len(x))
    if config.free_bits and any(site not in record.kl for site in model.latents()):
        raise ValueError(
            "free_bits: they apply to the KL of each latent, and with a flow prior latents have "
            "none; leave them out, or use a normal prior"
        )
    if config.memory_budget is not None:
        set_memory(model, config.memory)
        hardware.number_of_parts(model, train, config)


def _check_objective(objective: Any, record: Recorder, n: int) -> None:
    if isinstance(objective, torch.nn.Module):
        objective.to(next(iter(record.values.values())).device)
    nats = evaluate_objective(objective, record)
    got = getattr(nats, "shape", None)
    if got != (n,):
        what = f"shape {tuple(got)}" if got is not None else type(nats).__name__
        raise ValueError(
            f"objective: returned {what} for {n} examples; expected ({n},), the nats of each"
        )
    if not bool(nats.isfinite().all()):
        raise ValueError(
            f"objective: returned {nats.tolist()} for the first examples, which is not finite"
        )
    if not nats.requires_grad:
        raise ValueError(
            "objective: what it returned has no gradient; do not detach it or compute it under "
            "torch.no_grad"
        )
