"""The training loop: any model, any objective, one budget; stopped and resumed at any step.

Everything random about a step is a function of (seed, step): its batch, its noise, its
binarization. A resumed run therefore needs the state of the model, the objective and the
optimizers only, and on a CPU with the same number of threads it ends in the same bytes as a run
that was never stopped. Several processes share each batch; any other number of them can resume.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musigma import checkpoint
from musigma.data import Dataset, batch_indices
from musigma.data.batches import stream
from musigma.distributions import are_counted
from musigma.evaluation import batch, evaluate, tensors
from musigma.files import is_draft
from musigma.layers import standardizers
from musigma.memory import fallbacks, set_fallbacks, set_memory
from musigma.model import Model
from musigma.processes import current_processes
from musigma.training import hardware, recovery, warning
from musigma.training.checks import check_run, check_support
from musigma.training.config import TrainConfig
from musigma.training.hardware import join, uses_cpu
from musigma.training.log import Log, Watch, evidence_row, profiling
from musigma.training.recovery import TrainingError
from musigma.training.state import Progress, RunState
from musigma.training.step import (
    MakeOptimizer,
    Objective,
    ObjectivePass,
    TrainingStep,
    WeightAverage,
)

__all__ = ["Run", "fit"]


@dataclass(frozen=True)
class Run:
    """The result of `fit`.

    Attributes:
        model: The averaged weights of the last step, in evaluation mode; the best ones if the run
            stopped early (`TrainConfig.patience`).
        steps: Number of steps, since the beginning of the run.
        seconds: Seconds of training, since the beginning of the run.
        finished: False if training was stopped before its end.
        skipped: Number of skipped steps.
        best: Lowest validation figure, in bits per dimension.
        signal: Number of the signal that stopped it, or None.
    """

    model: Model
    steps: int
    seconds: float
    finished: bool
    skipped: int
    best: float
    signal: int | None = None


def fit(
    model: Model,
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
    out: str | Path,
    *,
    objective: Objective | None = None,
    optimizer: MakeOptimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    device: str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    stop: Callable[[int], bool] | None = None,
) -> Run:
    """Train a model, and write a run folder.

    The folder holds ``model.safetensors`` (averaged weights, best on the validation data),
    ``last.safetensors`` (of the last step), ``metrics.jsonl``, and ``state.safetensors``, from
    which a run is resumed.

    With several processes (`torchrun`), each calls this function with the same arguments. All of
    them must be able to read the run folder; the main process writes it.

    Args:
        model: Built by the zoo or another `architecture`. It is trained in place.
        train: Training data.
        validation: Data for choosing the best weights.
        config: Budget, optimizer, objective, and hardware options.
        out: Run folder; created if it does not exist.
        objective: A function of a `Recorder` to nats per example, shape (B,), whose mean is
            minimized; by default the one that `config` names. It may be a module with parameters:
            those have an optimizer of their own, ``critic_optimizer()`` (by default Adam), and
            minimize ``critic_loss(recorder)``, nats per example or a scalar, if it has this method
            (a critic of an adversarial objective, say), or the objective itself. They are saved
            and resumed with the run. With ``config.k`` draws, the recorder holds k consecutive
            rows for each example.
        optimizer: A function of the list of parameters to an optimizer; by default the one that
            `config` names. The schedule of `config` scales the learning rate it is made with.
        extra: JSON values for the header of the checkpoints.
        device: Name of a torch device; by default the best one available.
        resume: Whether to continue from the state in `out`.
        watch: Called with every row of ``metrics.jsonl``.
        stop: Called with the number of steps done; True stops and saves, like Ctrl-C.

    Raises:
        ValueError: If data and model do not fit, the configuration asks for what they do not have,
            or the objective does not return finite nats of shape (B,) with a gradient. Nothing has
            been written then.
        TrainingError: If steps keep failing although the run went back to earlier states and took
            smaller steps, or if the last state cannot be written.
    """
    join(device)
    objective = check_run(model, train, config, objective)
    check_support(model, validation)
    run = _Run(model, train, validation, config, Path(out), objective, extra, device, watch)
    with contextlib.closing(run), _interrupts() as interrupted:
        run.start(resume, optimizer)
        with run.profiled() as after_step:
            while not run.is_finished:
                run.step()
                after_step()
                halt = bool(interrupted() or (stop and stop(run.progress.step)))
                evaluation_due, save_due, halt = run.synchronize(stop=halt)
                if evaluation_due:
                    run.evaluate()
                if save_due:
                    run.save()
                if halt:
                    break
        run.finish()
    done = run.progress
    return Run(
        model=run.average.model,
        steps=done.step,
        seconds=done.seconds,
        finished=run.is_finished,
        skipped=done.skipped,
        best=done.best,
        signal=interrupted() or None,
    )


@dataclass(eq=False)
class _Run:
    """A run in progress. Its methods are the parts of the loop; the fields are those of `fit`."""

    model: Model
    train: Dataset
    validation: Dataset
    config: TrainConfig
    out: Path
    objective: Objective | None
    extra: Mapping[str, Any] | None
    requested: str | None  # the device
    watch: Watch | None

    def __post_init__(self) -> None:
        config, cpu = self.config, uses_cpu(self.requested)
        unused = self.objective is not None or config.objective is not None
        self.accelerator = hardware.accelerator(config, self.out, cpu=cpu, unused=unused)
        self.processes = current_processes()
        self.device = torch.device(self.requested or self.accelerator.device)
        n = len(self.validation)
        self.remarks = warning.start_warnings(config, len(self.train), n)
        self.validation = self.validation.subset(range(min(n, config.evaluate_on)))
        self.progress = Progress()
        self.log = Log(self.out / "metrics.jsonl", self.watch, write=self.processes.is_main)
        self.best = self.out / "model.safetensors"
        self.batches: Any = None

    def close(self) -> None:
        """Close files, trackers and the processes that load data."""
        self.log.finish()
        if self.batches:
            self.batches.close()

    def profiled(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A context for the profile that the configuration asks for."""
        if self.config.profile and self.processes.is_main:
            return profiling(self.out / "profile.json", self._warn)
        return contextlib.nullcontext(lambda: None)

    # -- start and finish

    def start(self, resume: bool, make_optimizer: MakeOptimizer | None) -> None:
        """Prepare everything for the first step."""
        config, model = self.config, self.model
        hardware.retain_heap()
        model.to(self.device)
        if not resume:
            self._calibrate()
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        set_memory(model, config.memory)
        parts = hardware.number_of_parts(model, self.train, config)  # while weights are whole
        self.average = WeightAverage(model, config.ema)
        if isinstance(self.objective, torch.nn.Module):
            self.objective.to(self.device)
        forward = ObjectivePass(model.train(), config, self.objective, len(self.train))
        sharded = config.shard and self.processes.count > 1
        if sharded:
            hardware.shard(forward, hardware.blocks(model))
        if config.fast:
            plain = self.objective is None and config.objective is None
            plain = plain and parts == self.processes.count == 1
            capture = plain and self.device.type == "cuda"
            if problem := hardware.compile_blocks(model, capture=capture):
                self.remarks.append(problem)
        step = TrainingStep(
            forward, self.accelerator, parts=parts, sharded=sharded, make_optimizer=make_optimizer
        )
        self.average.follow(model)
        self.training_step, averaged = step, self.average.model
        self.state = RunState(model, averaged, step.optimizer, step.critic, step.critic_optimizer)
        if self.processes.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            for path in self.out.iterdir():
                if is_draft(path) and path.is_file():  # left by a process that was killed
                    path.unlink(missing_ok=True)
        if resume:
            self._load()
        self._continue()
        plain = {
            n: v if isinstance(v, (int, float)) else str(v) for n, v in asdict(config).items()
        }
        self.accelerator.init_trackers("musigma", config=plain)
        self.log.trackers = list(self.accelerator.trackers)
        for message in self.remarks:
            self._warn(message)
        counted = are_counted(self.model)  # a mass is not to be compared with a density
        self.reference = {} if counted else warning.references(self.train, self.validation)
        self.started = time.monotonic() - self.progress.seconds
        self.last_save = time.monotonic()
        self.share = config.share(self.progress, len(self.train))
        if not resume:
            self.save()

    def _calibrate(self) -> None:
        """Set data-dependent parameters from the same examples on every process."""
        torch.manual_seed(self.config.seed)
        n = len(self.train)
        first = batch_indices(n, min(512, n), seed=self.config.seed, step=0)
        for units in standardizers(self.model):
            if not bool(units.calibrated):
                units.measure(self.train)
        self._measure_context()
        self.model.calibrate(*batch(self.train, first, self.model, seed=self.config.seed))

    def _measure_context(self) -> None:
        """Standardize a context that is summarized by all rows, or by as many as fit in memory."""
        parts = self.model.modules()
        summaries: list[Any] = [p for p in parts if getattr(p, "calibrates_on_all", False)]
        if not summaries:
            return
        n, spec = len(self.train), self.model.spec
        variables = () if spec is None else spec.context
        size = math.prod(self.train.shape) + sum(math.prod(v.shape) for v in variables)
        rows = batch_indices(n, min(n, max(512, (1 << 24) // size)), seed=self.config.seed, step=0)
        _, context = batch(self.train, rows, self.model, seed=self.config.seed)
        for summary in summaries:
            summary.calibrate(context)

    def _continue(self) -> None:
        """Deliver batches, and write the log, from the present step on."""
        if self.batches:
            self.batches.close()
        self.batches = stream(
            self.train,
            self.config.batch_size,
            seed=self.config.seed,
            start=self.progress.step,
            part=self.processes.share(self.config.batch_size),
            workers=self.config.workers,
        )
        self.log.rewind(self.progress.step)

    def finish(self) -> None:
        """Save the last state, and the weights even if there was no evaluation."""
        if not self.save():
            raise TrainingError(
                f"the last state of {self.out} could not be saved: "
                f"{self.progress.warnings.get('disk', 'steps were failing')}; earlier files are "
                "intact: make room, then --resume"
            )
        if self.processes.is_main and not self.best.exists():
            self._checkpoint(self.best)
        self.processes.wait()
        if self._is_out_of_patience:
            self.average.model.load_state_dict(checkpoint.verified(self.best)[1])

    # -- the parts of the loop

    @property
    def is_finished(self) -> bool:
        """Whether the budget or the patience is used up."""
        return self.share >= 1 or self._is_out_of_patience

    @property
    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.stale >= patience

    def step(self) -> None:
        """Compute the gradients of a batch, and take a step unless they are bad."""
        progress, config = self.progress, self.config
        step = progress.step
        examples = tensors(self.model, self.train, *next(self.batches))
        self.training_step.schedule(step, self.share, progress.lr_scale)
        result = self.training_step.gradients(*examples, step, self.share)
        row: dict[str, Any] = {"kind": "train", "step": step + 1, "loss": result.loss}
        row["grad_norm"] = result.norm
        limit = config.skip_above * progress.usual_norm if step >= 50 else math.inf
        sound = math.isfinite(result.norm) and result.norm <= limit
        if self.processes.count == 1:  # elsewhere a loss that is not finite spoils every norm
            sound = sound and math.isfinite(result.loss)
        if sound:
            clip = config.clip or 3 * progress.usual_norm or math.inf
            self.training_step.apply(result.norm, clip)
            self.average.update(step)
            weight = 0.02 if progress.usual_norm else 1.0
            progress.usual_norm += weight * (result.norm - progress.usual_norm)
            progress.failing = 0
        else:
            row |= recovery.skipped(
                self.training_step, self.train, step, examples, self.share, result, limit
            )
            progress.failing += 1
            progress.skipped += 1
        progress.step, progress.seconds = step + 1, time.monotonic() - self.started
        self.log.examples += config.batch_size
        self._warn_of(("spike",), warning.loss_spike(progress, result.loss) if sound else {})
        if step < 100 or (step + 1) % 10 == 0 or not sound:
            share = config.share(progress, len(self.train))
            row |= {"seconds": progress.seconds, "share": share}
            row |= evidence_row(result.evidence, math.prod(self.train.shape))
            row["learning_rate"] = self.training_step.optimizer.param_groups[0]["lr"]
            row["examples_per_second"] = self.log.examples_per_second()
            self.log.write(row)
        if not sound and progress.failing % recovery.SETBACK_AFTER == 0:
            self._set_back(row["reason"])

    def _set_back(self, reason: str) -> None:
        """Go back to the last saved state, and take smaller steps from there."""
        failed = self.progress
        recovery.check_setbacks(failed, reason, self.out)
        self.processes.wait()
        self._load()
        self.progress = recovery.restarted(self.progress, failed)
        self._continue()
        self.log.message(
            "setback",
            self.progress,
            f"{failed.failing} steps failed, the last because {reason}: went back from step "
            f"{failed.step} to {self.progress.step}; the learning rate is multiplied by "
            f"{self.progress.lr_scale:.3g}",
        )

    def synchronize(self, *, stop: bool) -> tuple[bool, bool, bool]:
        """Agree with the other processes on the clock, on fallbacks, and on what is due.

        Returns whether to evaluate, to save, and to stop.
        """
        wait = 60 * self.config.save_every
        if "disk" in self.progress.warnings:
            wait = min(wait, 60)
        due = time.monotonic() - self.last_save > wait and not self.progress.failing
        reversible = self.config.memory == "reversible"
        fell_back = reversible and fallbacks(self.model) != self.progress.fallbacks
        mine = self.progress.seconds, stop, due and self.processes.is_main, fell_back
        self.progress.seconds, *flags = self.processes.maximum(*mine)
        stop, save, fell_back = map(bool, flags)
        if fell_back:
            self._fall_back()
        before, times = self.share, self.config.evaluations
        self.share = self.config.share(self.progress, len(self.train))
        return int(self.share * times) > int(before * times), save, stop

    def _fall_back(self) -> None:
        """Make every process recompute what one of them cannot invert accurately enough."""
        runs: dict[str, str] = {}
        for others in self.processes.gather(fallbacks(self.model)):
            runs = others | runs
        for name in runs.keys() - self.progress.fallbacks.keys():
            self._warn(f"{name} is recomputed in segments from now on: {runs[name]}")
        self.progress.fallbacks = runs
        set_fallbacks(self.model, runs)

    def evaluate(self) -> None:
        """Evaluate the averaged weights on validation data, and save them if they are the best."""
        progress, averaged = self.progress, self.average.model
        self.average.assemble()
        figure = evaluate(
            averaged, self.validation, seed=self.config.seed, processes=self.processes
        )
        where = {"step": progress.step, "seconds": progress.seconds}
        self.log.write({"kind": "evaluation", **where, **figure})
        improved, saved = figure["bits_per_dim"] < progress.best, False
        if self.processes.is_main and (improved or not self.best.exists()):
            saved = self._write(lambda: self._checkpoint(self.best, by_validation=True))
        if not improved:
            progress.stale += 1
        elif self.processes.gather(saved)[0]:
            progress.best, progress.best_step = figure["bits_per_dim"], progress.step
            progress.stale = 0
        if self._is_out_of_patience:
            self.log.message(
                "info",
                progress,
                f"stopped early: {progress.stale} evaluations without improvement since step "
                f"{progress.best_step} ({progress.best:.4g} bits/dim)",
            )
        if self.processes.is_main:
            self._examine(figure)

    def _examine(self, figure: Mapping[str, Any]) -> None:
        """Warn about implausible figures and problems in the model."""
        progress, averaged = self.progress, self.average.model
        examples = batch(self.validation, np.arange(min(len(self.validation), 64)), averaged)
        warnings = warning.model_warnings(averaged, figure, *examples)
        warnings |= warning.figure_warnings(figure, self.reference, progress, self.share)
        self._warn_of(warning.KINDS, warnings)

    def save(self) -> bool:
        """Save the state. Returns False, and logs a warning, if the disk is full."""
        self.last_save = time.monotonic()
        self.average.assemble()

        def write() -> None:
            self.state.save(self.out, self.progress)
            if self.processes.is_main:
                self._checkpoint(self.out / "last.safetensors")

        return self._write(write)

    def _checkpoint(self, path: Path, *, by_validation: bool = False) -> None:
        """Write the averaged weights, and what they are."""
        about = {"ema": self.config.ema, "step": self.progress.step, "validation": by_validation}
        extra = {**(self.extra or {}), "weights": about}
        checkpoint.save(self.average.model, path, extra=extra)

    def _write(self, write: Callable[[], None]) -> bool:
        warned = self.progress.warnings.pop("disk", None)
        try:
            write()
        except OSError as error:
            self.progress.warnings["disk"] = str(error)
            if not warned:
                self._warn(f"not saved: {error}; the next attempt is in a minute")
            return False
        return True

    def _load(self) -> None:
        self.progress = self.state.load(self.out)
        set_fallbacks(self.model, self.progress.fallbacks)
        self.average.reset()

    def _warn(self, message: str) -> None:
        self.log.message("warning", self.progress, message)

    def _warn_of(self, kinds: tuple[str, ...], warnings: Mapping[str, str]) -> None:
        """Log the warnings that are new; others of these kinds no longer hold."""
        known = self.progress.warnings
        others = {name: text for name, text in known.items() if name.split(" ")[0] not in kinds}
        self.progress.warnings = {**others, **warnings}
        for name, message in warnings.items():
            if name not in known:
                kind = "info" if name == "unexamined" else "warning"
                self.log.message(kind, self.progress, message)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], int]]:
    """The signal that was received, or 0. The first Ctrl-C stops cleanly, the second at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
