"""What a run leaves on disk: its state, from which it goes on, and its log.

The state is one safetensors file, written whole or not at all: weights, averaged weights, the
optimiser's moments by the names of their parameters, and where the run stands. It does not know
how many processes wrote it, so any number of them may go on with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musigma import checkpoint
from musigma.files import finite, replacing, row_of
from musigma.model import Model
from musigma.processes import current_processes
from musigma.trace import Evidence
from musigma.training.distributed import full_tensor, shard_like

__all__ = ["STATE", "Log", "Progress", "Watch", "load_state", "save_state", "saved_state"]

STATE, FORMAT = "state.safetensors", "musigma-state/1"
Watch = Callable[[Mapping[str, Any]], None]


@dataclass
class Progress:
    """Where a run stands: everything that is neither weights nor moments.

    Attributes:
        step: Steps done.
        seconds: Seconds of training.
        best: The lowest validation figure, in bits per dimension.
        usual_norm: Running average of the gradient's norm.
        usual_loss: Running average of the loss, and of its distance from that.
        skipped: Steps that were skipped.
        failing: How many of them in a row, now.
        setbacks: How often the run went back to its last good state.
        patience: Of these, how many more there may be.
        caution: What the learning rate is multiplied by: halved at each setback.
        fallen: Runs of bijections that are no longer done reversibly, and why.
        alerts: What has been warned of, and has not gone away.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = float("inf")
    usual_norm: float = 0.0
    usual_loss: list[float] = field(default_factory=list)
    skipped: int = 0
    failing: int = 0
    setbacks: int = 0
    caution: float = 1.0
    fallen: dict[str, str] = field(default_factory=dict)
    alerts: dict[str, str] = field(default_factory=dict)


def save_state(
    out: Path,
    progress: Progress,
    model: nn.Module,
    averaged: Model,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replace the state of a run. All processes call it, and the main one writes.

    Raises:
        OSError: If it cannot be written; the old one stays.
    """
    parts = {
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": _moments(model, optimizer),
    }
    tensors = {
        f"{part}/{name}": full_tensor(t)
        for part, named in parts.items()
        for name, t in named.items()
    }
    if current_processes().is_main:
        header = {"format": FORMAT, "progress": asdict(progress)}
        checkpoint.write(out / STATE, header, tensors)


def saved_state(out: Path) -> Path:
    """The file that a run is resumed from.

    Raises:
        ValueError: If there is none.
    """
    if not (out / STATE).is_file():
        raise ValueError(
            f"resume: {out} holds no state to go on from; train it anew with --overwrite"
        )
    return out / STATE


def load_state(
    out: Path, model: nn.Module, averaged: Model, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put the saved weights and moments in place, and tell where the run stood.

    Raises:
        ValueError: If there is no state, or it is damaged or of another model.
    """
    path = saved_state(out)
    try:
        header, tensors = checkpoint.verified(path)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']}, not {FORMAT}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
        for name, t in tensors.items():
            part, _, inner = name.partition("/")
            parts[part][inner] = t
        progress = Progress(**header["progress"])
        there = model.state_dict()
        model.load_state_dict({n: shard_like(t, there[n]) for n, t in parts["model"].items()})
        averaged.load_state_dict(parts["averaged"])
        _put_moments(model, optimizer, parts["optimizer"])
    except Exception as error:  # whatever a parser throws at a damaged file
        raise ValueError(
            f"resume: {path} is damaged ({type(error).__name__}: {error}); "
            "train it anew with --overwrite"
        ) from error
    return progress


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter: "name:moment" to a tensor."""
    return {
        f"{name}:{key}": torch.as_tensor(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _put_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    names = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in moments.items():
        parameter, _, key = name.rpartition(":")
        like = parameters[parameter]
        if t.shape == like.shape:  # a count of steps has no shape
            t = shard_like(t, like)
            t = torch.empty_like(like, dtype=t.dtype).copy_(t)  # fused optimisers ignore strides
        state.setdefault(names[parameter], {})[key] = t
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Log:
    """``metrics.jsonl``, which a resumed run continues from the step that it resumes at.

    A line that does not fit on a full disk is dropped: training goes on without it.

    Args:
        path: Of the file; `rewind` opens it.
        watch: Shown every row.
        write: False for one that shows nothing and writes nothing.
    """

    def __init__(self, path: Path, watch: Watch | None, *, write: bool = True):
        self.path, self.watch, self.last = path, watch, time.monotonic()
        self.file, self.writes = None, write

    def rewind(self, step: int) -> None:
        """Forget what came after a step, and lines cut short by a death; go on from there."""
        if not self.writes:
            return
        self.close()
        kept = []
        if step and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                row = row_of(line)
                if row and row["step"] <= step:
                    kept.append(line + b"\n")
        with replacing(self.path) as draft:
            draft.write_bytes(b"".join(kept))
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        if self.file:
            with contextlib.suppress(OSError):  # of what was not written yet: the disk is full
                self.file.close()
            self.file = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, and show it."""
        if not self.file:
            return
        with contextlib.suppress(OSError):
            self.file.write(json.dumps(finite(dict(row))) + "\n")
            self.file.flush()
        if self.watch:
            self.watch(row)

    def due(self, step: int, row: Mapping[str, Any]) -> bool:
        """Whether a step's row is written: the first hundred, every tenth, all skipped ones."""
        return step <= 100 or step % 10 == 0 or row["kind"] != "train"

    def rate(self, examples: int) -> float:
        """Examples per second since it was last asked for."""
        now = time.monotonic()
        speed = examples / max(now - self.last, 1e-9)
        self.last = now
        return speed


def described(evidence: Evidence, dims: int) -> dict[str, Any]:
    """The terms of a batch for its row of the log: means over it."""
    terms = {name: t.detach().float().mean(0) for name, t in evidence._asdict().items()}
    nats = -evidence.elbo.detach().mean().item()
    row = {
        "nats": nats,
        "bits_per_dim": nats / (dims * math.log(2)),
        "kl": terms["kl"].tolist(),
        "log_px": terms["log_px"].item(),
        "log_q": terms["log_q"].item(),
        "log_det": terms["log_det"].item(),
    }
    if auxiliary := terms["auxiliary"].item():  # a classifier's term
        row["auxiliary"] = auxiliary
    return row
