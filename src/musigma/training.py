"""The training loop: any model, any objective, one budget; stopped and resumed at any step.

Everything random about a step is a function of (seed, step): its batch, its noise, its
binarization. So a resumed run needs the state of the model and of the optimiser and nothing else,
and on a CPU with the same number of threads it ends in the same bytes as one that was never
stopped.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma import checkpoint, objectives
from musigma.data import Dataset, batch_indices
from musigma.evaluation import batch, check, evaluate
from musigma.files import finite, replacing, sync
from musigma.model import Model
from musigma.trace import Evidence, Trace

__all__ = ["Run", "TrainConfig", "TrainingError", "fit"]

Watch = Callable[[Mapping[str, Any]], None]


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved before is whole."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Args:
        steps: Budget in optimiser steps; the learning rate's schedule follows the budget.
        epochs: Budget in passes over the data; 20 if no budget is given.
        minutes: Budget in minutes of training.
        batch_size: Examples per step.
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
        save_every: Minutes between saves of the state.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 32
    optimizer: Literal["adam", "adamw", "adamax"] = "adamax"
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

    def __post_init__(self):
        given = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: the budget is given as {given[0]} already; keep one")
        if not given:
            object.__setattr__(self, "epochs", 20.0)
        for name, allowed in (
            ("optimizer", ("adam", "adamw", "adamax")),
            ("schedule", ("cosine", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected {' or '.join(allowed)}; got {getattr(self, name)!r}"
                )
        least = {"steps": 1, "batch_size": 1, "k": 1, "evaluations": 1, "evaluate_on": 1}
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

    @property
    def weighs_rate(self) -> bool:
        """Whether the objective treats rate and distortion differently."""
        return self.beta != 1 or self.kl_warmup > 0 or self.free_bits > 0

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
            return objectives.iwae(evidence, self.k)
        if not self.weighs_rate:
            return objectives.elbo(evidence)
        beta = self.beta * (min(1.0, share / self.kl_warmup) if self.kl_warmup else 1.0)
        if self.free_bits:
            return objectives.free_bits(evidence, self.free_bits, beta=beta)
        return objectives.beta_elbo(evidence, beta)

    def optimizer_for(self, model: Model) -> torch.optim.Optimizer:
        """The optimiser, over all parameters alike."""
        parameters = list(model.parameters())
        if self.optimizer == "adamax":
            return torch.optim.Adamax(parameters, lr=self.lr)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, fused=True)
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True
        )


@dataclass
class Progress:
    """Where a run stands: everything that is neither weights nor moments."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    usual_norm: float = 0.0
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For the saved state."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the saved state."""
        for name, value in state.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Run:
    """What `fit` returns.

    Attributes:
        model: The averaged weights as they were at the last step, in evaluation mode.
        steps: Steps done in all.
        seconds: Seconds of training in all.
        finished: False if it was stopped before its budget was spent.
        skipped: How many steps were skipped.
        best: The lowest validation figure, in bits per dimension.
    """

    model: Model
    steps: int
    seconds: float
    finished: bool
    skipped: int
    best: float


def fit(
    model: Model,
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
    out: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    device: str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    stop: Callable[[int], bool] | None = None,
) -> Run:
    """Train a model, and leave a run folder.

    The folder holds ``model.safetensors`` (averaged weights, best on the validation data),
    ``last.safetensors`` (of the last step), ``metrics.jsonl``, and ``state/``, from which a run is
    resumed and which nothing else reads.

    Args:
        model: Built by the zoo or another `architecture`. It is trained in place.
        train: What to train on.
        validation: What to choose the best weights by.
        config: Budget, optimiser, objective.
        out: The run folder; made if need be.
        extra: JSON values for the header of the checkpoints.
        device: As torch names it; None: the best there is.
        resume: Go on from ``out/state``.
        watch: Called with every row of ``metrics.jsonl``.
        stop: Called with the number of steps done; True stops and saves, as Ctrl-C does.

    Raises:
        ValueError: If data and model do not fit, or the objective weighs the rate of a model that
            has no distortion.
        TrainingError: If 20 steps in a row fail.
    """
    from accelerate import Accelerator

    check_run(model, train, config)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(device_placement=False)
    model.to(torch.device(device) if device else accelerator.device)
    if not resume:
        torch.manual_seed(config.seed)
        first = batch_indices(len(train), min(512, len(train)), seed=config.seed, step=0)
        model.calibrate(*batch(train, first, model, seed=config.seed))
    layout = torch.channels_last if len(train.shape) == 3 else torch.contiguous_format
    model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    progress = Progress()
    trained, optimizer = accelerator.prepare(model, config.optimizer_for(model))
    if resume:
        _load_state(accelerator, out, progress, averaged)
    shown = validation.subset(range(min(len(validation), config.evaluate_on)))

    def assess() -> None:
        figure = evaluate(averaged, shown, seed=config.seed)
        where = {"step": progress.step, "seconds": progress.seconds}
        log.write({"kind": "evaluation", **where, **figure})
        if figure["bits_per_dim"] < progress.best or not (out / "model.safetensors").exists():
            progress.best = min(progress.best, figure["bits_per_dim"])
            checkpoint.save(averaged, out / "model.safetensors", extra=extra)

    def save() -> None:
        _save_state(accelerator, out, progress, averaged)
        checkpoint.save(averaged, out / "last.safetensors", extra=extra)

    began = saved = time.monotonic()
    began -= progress.seconds
    share, failing, stopped = config.share(progress, len(train)), 0, False
    with _Log(out / "metrics.jsonl", progress.step, watch) as log, _interrupts() as interrupted:
        while share < 1 and not stopped:
            step = progress.step
            indices = batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
            x, context = batch(train, indices, model, seed=config.seed, step=step)
            x = x.contiguous(memory_format=layout)
            lr = config.learning_rate(step, share)
            for group in optimizer.param_groups:
                group["lr"] = lr
            evidence = _forward(trained.train(), x, context, config, step)
            loss = config.objective(evidence, share)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            row = {"kind": "train", "step": step + 1, "loss": loss.item(), "grad_norm": norm}

            limit = config.skip_above * progress.usual_norm if step >= 50 else math.inf
            if math.isfinite(row["loss"]) and math.isfinite(norm) and norm <= limit:
                longest = config.clip or 3 * progress.usual_norm or math.inf
                nn.utils.clip_grads_with_norm_(model.parameters(), longest, torch.tensor(norm))
                optimizer.step()
                _average(averaged, model, config.ema, step)
                weight = 0.02 if progress.usual_norm else 1.0
                progress.usual_norm += weight * (norm - progress.usual_norm)
                failing = 0
            else:
                again = functools.partial(_forward, model, x, context, config, step)
                reason = diagnose(model, again, row["loss"], norm, limit)
                row |= {"kind": "skipped", "reason": reason}
                failing, progress.skipped = failing + 1, progress.skipped + 1
            progress.step, progress.seconds = step + 1, time.monotonic() - began
            before, share = share, config.share(progress, len(train))
            log.step(row, evidence, progress, share, lr, len(x), math.prod(train.shape))
            if failing == 20:
                raise TrainingError(
                    f"20 steps in a row were skipped, the last because {row['reason']}; {out} is "
                    "as it was last saved. Try a smaller --lr, or look at the data"
                )
            if int(share * config.evaluations) > int(before * config.evaluations):
                assess()
            stopped = interrupted() or bool(stop and stop(progress.step))
            if time.monotonic() - saved > 60 * config.save_every:
                save()
                saved = time.monotonic()
        save()
        if not (out / "model.safetensors").exists():
            checkpoint.save(averaged, out / "model.safetensors", extra=extra)
    return Run(
        averaged, progress.step, progress.seconds, share >= 1, progress.skipped, progress.best
    )


def check_run(model: Model, train: Dataset, config: TrainConfig) -> None:
    """What `fit` refuses before it writes anything; two examples go through the model.

    Raises:
        ValueError: As `fit` says.
    """
    check(model, train)
    if config.weighs_rate and set(model.latents()) == set(model.variables()):
        raise ValueError(
            "beta: beta, kl_warmup and free_bits weigh the latents against a likelihood, and a "
            "flow has none; leave them out"
        )
    with torch.no_grad(), torch.random.fork_rng():
        trace = Trace(closed_form=True)
        try:
            x, context = batch(train, np.arange(min(2, len(train))), model)
            model.infer(x, trace, context)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model: it cannot take these data: {reason}") from error
    if config.free_bits and any(site not in trace.kl for site in model.latents()):
        raise ValueError(
            "free_bits: they hold up the KL of each latent, and under a flow prior there is none "
            "to hold; leave them out, or take a normal prior"
        )


def _forward(
    model: nn.Module,
    x: Tensor,
    context: Tensor | None,
    config: TrainConfig,
    step: int,
) -> Evidence:
    """The evidence of a batch, with noise that is a function of (seed, step)."""
    torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)
    if config.k > 1:
        x = x.repeat_interleave(config.k, 0)
        context = None if context is None else context.repeat_interleave(config.k, 0)
    return model(x, context, closed_form=config.k == 1)


@torch.no_grad()
def _average(averaged: Model, model: Model, decay: float, step: int) -> None:
    """Move the running average; early on it forgets faster, so that it never lags the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(averaged.buffers(), model.buffers(), strict=True):
        mean.copy_(value)


# --- what went wrong ---------------------------------------------------------------------------


def diagnose(
    model: Model, run: Callable[[], object], loss: float, norm: float, limit: float
) -> str:
    """Why a step cannot be taken: the first tensor that is not finite, or the longest gradient.

    Args:
        model: With the gradients of the failed step.
        run: Repeats its forward pass.
        loss: Of the failed step.
        norm: Of its gradient.
        limit: What the norm may be.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and not t.isfinite().all():
            return f"{name} is not finite"
    if not math.isfinite(loss):
        return _first_bad_output(model, run) or f"the loss is {loss}"
    sizes = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    if not math.isfinite(norm):
        bad = [name for name, size in sizes.items() if not math.isfinite(size)]
        return f"the gradient of {bad[-1]} is not finite"  # the nearest to the output
    longest = max(sizes, key=lambda name: sizes[name])
    return f"the gradient has norm {norm:.3g}, above {limit:.3g}, most of it in {longest}"


def _first_bad_output(model: Model, run: Callable[[], object]) -> str | None:
    found: list[str] = []

    def tensors(value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield "output", value
        elif isinstance(value, Distribution):
            for name, t in vars(value).items():
                if isinstance(t, Tensor):
                    yield name.strip("_"), t
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    def watch(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            for part, t in tensors(output):
                if not found and t.is_floating_point() and not t.isfinite().all():
                    bad = t[~t.isfinite()].flatten()[0]
                    whose = f"{name or 'the model'} ({type(module).__name__})"
                    found.append(f"{part} of {whose} has {bad}")

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


# --- files and signals -------------------------------------------------------------------------


class _Log:
    """``metrics.jsonl``, which a resumed run continues from the step that it resumes at."""

    def __init__(self, path: Path, step: int, watch: Watch | None):
        self.watch, self.last, self.seen = watch, time.monotonic(), 0
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that was cut off when its process died
                if row["step"] <= step:
                    kept.append(line + "\n")
        with replacing(path) as draft:
            draft.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, and show it."""
        self.file.write(json.dumps(finite(dict(row))) + "\n")
        self.file.flush()
        if self.watch:
            self.watch(row)

    def step(
        self,
        row: dict[str, Any],
        evidence: Evidence,
        progress: Progress,
        share: float,
        lr: float,
        examples: int,
        dims: int,
    ) -> None:
        """Write a step's row: each of the first hundred, every tenth, and all that are skipped."""
        self.seen += examples
        if progress.step > 100 and progress.step % 10 and row["kind"] != "skipped":
            return
        now = time.monotonic()
        terms = {name: t.detach().mean(0) for name, t in evidence._asdict().items()}
        nats = -evidence.elbo.detach().mean().item()
        row |= {
            "seconds": progress.seconds,
            "share": share,
            "nats": nats,
            "bits_per_dim": nats / (dims * math.log(2)),
            "kl": terms["kl"].tolist(),
            "log_px": terms["log_px"].item(),
            "log_q": terms["log_q"].item(),
            "log_det": terms["log_det"].item(),
            "learning_rate": lr,
            "examples_per_second": self.seen / max(now - self.last, 1e-9),
        }
        if aside := terms["aside"].item():  # a classifier's term
            row["aside"] = aside
        self.last, self.seen = now, 0
        self.write(row)


def _save_state(accelerator: Any, out: Path, progress: Progress, averaged: Model) -> None:
    """Save beside the old state, then take its place: one of the two is always whole."""
    from safetensors.torch import save_file

    draft, state, old = out / "state.tmp", out / "state", out / "state.old"
    shutil.rmtree(draft, ignore_errors=True)
    accelerator.save_state(str(draft))
    (draft / "progress.json").write_text(json.dumps(progress.state_dict()))
    tensors = {name: t.cpu().contiguous() for name, t in averaged.state_dict().items()}
    save_file(tensors, draft / "averaged.safetensors")
    sync(draft)
    shutil.rmtree(old, ignore_errors=True)
    if state.exists():
        state.rename(old)
    draft.rename(state)
    shutil.rmtree(old, ignore_errors=True)


def saved_state(out: Path) -> Path:
    """The folder that a run is resumed from.

    Raises:
        ValueError: If there is none.
    """
    for state in (out / "state", out / "state.old"):
        if state.is_dir():
            return state
    raise ValueError(f"resume: {out} holds no state to go on from; train it anew with --overwrite")


def _load_state(accelerator: Any, out: Path, progress: Progress, averaged: Model) -> None:
    from safetensors.torch import load_file

    state = saved_state(out)
    try:
        accelerator.load_state(str(state))
        progress.load_state_dict(json.loads((state / "progress.json").read_text()))
        averaged.load_state_dict(load_file(state / "averaged.safetensors"))
    except Exception as error:  # whatever a parser throws at a damaged file
        raise ValueError(
            f"resume: {state} is damaged ({type(error).__name__}: {error}); "
            "train it anew with --overwrite"
        ) from error


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a request to end came: the first stops cleanly, the second at once."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return

    def note(number: int, frame: object) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
