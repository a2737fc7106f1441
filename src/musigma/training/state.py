"""The state of a run, from which it resumes: one safetensors file, written whole or not at all.

It holds the weights, the averaged weights, the parameters of the objective, the state of the
optimizers by parameter name, and the run's progress. It does not depend on the number of processes
that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from musigma import checkpoint
from musigma.processes import current_processes, full_tensor, shard_like

__all__ = ["STATE", "Progress", "RunState", "saved_state"]

STATE = "state.safetensors"
FORMAT_1, FORMAT = "musigma-state/1", "musigma-state/2"
RENAMED = {"caution": "lr_scale", "fallen": "fallbacks", "alerts": "warnings"}  # since format 1


@dataclass
class Progress:
    """The progress of a run: all of its state but tensors."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training
    best: float = float("inf")  # lowest validation figure, in bits per dimension
    best_step: int = 0  # step of that figure
    stale: int = 0  # evaluations since that figure
    usual_norm: float = 0.0  # running average of the gradient's norm
    usual_loss: list[float] = field(default_factory=list)
    """Running average of the loss, and of its distance from that average."""
    skipped: int = 0  # skipped steps
    failing: int = 0  # steps skipped in a row, up to now
    setbacks: int = 0  # how often the run went back to its last saved state
    lr_scale: float = 1.0  # factor of the learning rate; halved at each setback
    fallbacks: dict[str, str] = field(default_factory=dict)
    """Runs of bijections that are no longer reversible, and why."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Conditions that were warned of and still hold, by name."""


def saved_state(out: Path) -> Path:
    """The file from which a run resumes.

    Raises:
        ValueError: If there is none.
    """
    if not (out / STATE).is_file():
        raise ValueError(
            f"resume: {out} holds no state to resume from; train it again with --overwrite"
        )
    return out / STATE


class RunState:
    """Everything with tensors that a run saves and resumes.

    The weights of `model` may be sharded; those of `averaged` are whole.
    """

    def __init__(
        self,
        model: nn.Module,
        averaged: nn.Module,
        optimizer: optim.Optimizer,
        objective: nn.Module | None,
        objective_optimizer: optim.Optimizer | None,
    ):
        self.modules = {"model": model, "averaged": averaged}
        self.optimizers = {"optimizer": (model, optimizer)}
        if objective is not None:
            self.modules["objective"] = objective
            if objective_optimizer is not None:
                self.optimizers["objective-optimizer"] = objective, objective_optimizer

    def save(self, out: Path, progress: Progress) -> None:
        """Replace the state in a run folder. All processes call this; the main one writes.

        Raises:
            OSError: If it cannot be written; the old one stays.
        """
        values: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for part, module in self.modules.items():
            tensors |= {f"{part}/{n}": full_tensor(t) for n, t in module.state_dict().items()}
        for part, (module, optimizer) in self.optimizers.items():
            for name, value in _optimizer_state(module, optimizer):
                if isinstance(value, Tensor):
                    tensors[f"{part}/{name}"] = full_tensor(value)
                else:
                    values[f"{part}/{name}"] = value
        if current_processes().is_main:
            header = {"format": FORMAT, "progress": asdict(progress)}
            checkpoint.write(out / STATE, header | ({"values": values} if values else {}), tensors)

    def load(self, out: Path) -> Progress:
        """Restore the state in a run folder, and return the run's progress.

        Raises:
            ValueError: If there is no state, it is damaged or of another model, or it holds an
                objective and this run has none.
        """
        path = saved_state(out)
        try:
            header, tensors = checkpoint.verified(path)
            if header["format"] not in (FORMAT_1, FORMAT):
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            if header["format"] == FORMAT_1:
                tensors = checkpoint.padded(self.modules["model"], tensors, _weight_name)
            parts: dict[str, dict[str, Any]] = {}
            for key, value in {**tensors, **header.get("values", {})}.items():
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = value
            saved = header["progress"].items()
            progress = Progress(**{str(RENAMED.get(name, name)): v for name, v in saved})
            for part, module in self.modules.items():
                like = module.state_dict()
                weights = {n: shard_like(t, like[n]) for n, t in parts.pop(part, {}).items()}
                module.load_state_dict(weights)
            for part, (module, optimizer) in self.optimizers.items():
                _restore_optimizer(module, optimizer, parts.pop(part, {}))
            if parts and "objective" not in parts:
                raise ValueError(f"it holds {', '.join(parts)}, which this run does not have")
        except Exception as error:  # whatever a parser raises for a damaged file
            raise ValueError(
                f"resume: {path} is damaged, or of another run ({type(error).__name__}: {error}); "
                "train it again with --overwrite"
            ) from error
        if parts:
            raise ValueError(
                f"objective: {path} holds the parameters of an objective; give fit the objective "
                "that the run was trained with"
            )
        return progress


def _weight_name(key: str) -> str:
    """The name of the weight in a key of a state: `w` in model/w and optimizer/w:exp_avg."""
    return key.partition("/")[2].rpartition(":")[0] or key.partition("/")[2]


def _optimizer_state(module: nn.Module, optimizer: optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Each entry of an optimizer's state, as "parameter:key".

    Settings of its groups that differ from the defaults follow, as "i:key".
    """
    for name, p in module.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
                raise ValueError(
                    f"optimizer: the state of {type(optimizer).__name__} has a "
                    f"{type(value).__name__} ({key}), which cannot be saved; use one whose state "
                    "is tensors and numbers"
                )
            if value is not None:
                yield f"{name}:{key}", value
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            plain = isinstance(value, (bool, int, float, str))
            if plain and key != "lr" and value != optimizer.defaults.get(key):
                yield f"{i}:{key}", value


def _restore_optimizer(
    module: nn.Module, optimizer: optim.Optimizer, saved: Mapping[str, Any]
) -> None:
    """Restore what `_optimizer_state` listed."""
    parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    indices = {identity: i for i, identity in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        owner, _, key = name.rpartition(":")
        if owner not in parameters:
            optimizer.param_groups[int(owner)][key] = value
            continue
        like = parameters[owner]
        if isinstance(value, Tensor) and value.shape == like.shape:  # not a count of steps
            value = shard_like(value, like)
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)  # strides as `like`'s
        state.setdefault(indices[id(like)], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
