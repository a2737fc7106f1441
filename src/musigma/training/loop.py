"""The training loop: any model, any objective, one budget; stopped and resumed at any step.

Everything random about a step is a function of (seed, step): its batch, its noise, its
binarization. So a resumed run needs the state of the model and of the optimiser and nothing else,
and on a CPU with the same number of threads it ends in the same bytes as one that was never
stopped. Several processes cut each batch among them, and go on with a run that any other number
of them began.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma import checkpoint
from musigma import context as contexts
from musigma.context import Context
from musigma.data import Dataset, batch_indices
from musigma.data.batches import stream
from musigma.evaluation import batch, check, evaluate, noise, tensors
from musigma.files import is_draft, replacing
from musigma.layers import Standardize, standardize
from musigma.memory import fallen, keep, recall, refuse
from musigma.model import Model
from musigma.processes import Processes, current_processes
from musigma.trace import Evidence, Trace
from musigma.training import machine
from musigma.training.config import TrainConfig
from musigma.training.distributed import (
    full_tensor,
    gather_shards,
    join,
    local_shard,
    shard,
    shard_like,
    uses_cpu,
)
from musigma.training.recovery import diagnose, health, news, spiked
from musigma.training.state import Log, Progress, Watch, described, load_state, save_state

__all__ = ["Run", "TrainingError", "check_run", "fit"]

SETBACK_AFTER, GIVE_UP_AFTER, MOST_SETBACKS = 5, 20, 10


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved before is whole."""


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
        signal: The number of the signal that stopped it, or None.
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
    extra: Mapping[str, Any] | None = None,
    device: str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    stop: Callable[[int], bool] | None = None,
) -> Run:
    """Train a model, and leave a run folder.

    The folder holds ``model.safetensors`` (averaged weights, best on the validation data),
    ``last.safetensors`` (of the last step), ``metrics.jsonl``, and ``state.safetensors``, from
    which a run is resumed.

    Where torch was told of several processes (`torchrun`), all of them call this with the same
    arguments; the run folder must be one that all can read, and the main process writes it.

    Args:
        model: Built by the zoo or another `architecture`. It is trained in place.
        train: What to train on.
        validation: What to choose the best weights by.
        config: Budget, optimiser, objective, and what the machine may do.
        out: The run folder; made if need be.
        extra: JSON values for the header of the checkpoints.
        device: As torch names it; None: the best there is.
        resume: Go on from the state in `out`.
        watch: Called with every row of ``metrics.jsonl``.
        stop: Called with the number of steps done; True stops and saves, as Ctrl-C does.

    Raises:
        ValueError: If data and model do not fit, or the configuration asks for what they have not.
        TrainingError: If steps go on failing though the run went back and took smaller ones, or
            the last state cannot be written.
    """
    join(device)
    check_run(model, train, config)
    job = _Job(model, train, validation, config, Path(out), extra, device, watch)
    with job, _interrupts() as interrupted, job.profiled() as tick:
        job.begin(resume)
        stopped = False
        while job.share < 1 and not stopped:
            job.step()
            tick()
            wish = bool(interrupted()) or bool(stop and stop(job.progress.step))
            stopped = job.agree(wish)
        job.finish()
        progress = job.progress
        return Run(
            job.averaged,
            progress.step,
            progress.seconds,
            job.share >= 1,
            progress.skipped,
            progress.best,
            interrupted() or None,
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
    refuse(model, config.memory)
    if (count := current_processes().count) > config.batch_size:
        raise ValueError(
            f"batch_size: {count} processes cannot share {config.batch_size} examples; "
            "give each at least one"
        )
    for tracker in config.track:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"track: {tracker} is not installed: pip install {tracker}")
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
    if config.memory_budget is not None:
        keep(model, config.memory)
        _parts(model, train, config)


def _parts(model: Model, train: Dataset, config: TrainConfig) -> int:
    """In how many parts this process works through its share of a batch."""
    own = current_processes().share(config.batch_size)
    few = batch(train, np.arange(min(4, len(train))), model)
    with torch.random.fork_rng():
        return machine.parts(model, *few, config, own.stop - own.start)


class _Job:
    """A run while it runs: the loop's parts, each of them a method."""

    def __init__(
        self,
        model: Model,
        train: Dataset,
        validation: Dataset,
        config: TrainConfig,
        out: Path,
        extra: Mapping[str, Any] | None,
        device: str | None,
        watch: Watch | None,
    ):
        self.model, self.train, self.config, self.out = model, train, config, out
        self.extra = extra
        self.accelerator = machine.accelerator(config, out, cpu=uses_cpu(device))
        self.processes = current_processes()
        self.device = torch.device(device) if device else self.accelerator.device
        self.shown = validation.subset(range(min(len(validation), config.evaluate_on)))
        self.cast = machine.casting(config, self.device)
        self.progress = Progress()
        self.feed: Any = None
        self.log = Log(out / "metrics.jsonl", watch, write=self.processes.is_main)

    # -- beginning and end

    def begin(self, resume: bool) -> None:
        """Everything up to the first step."""
        config, model = self.config, self.model
        if self.processes.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            for path in self.out.iterdir():
                if is_draft(path) and path.is_file():  # of a process that was killed
                    path.unlink(missing_ok=True)
        machine.retain_heap()
        model.to(self.device)
        if not resume:
            torch.manual_seed(config.seed)
            first = batch_indices(
                len(self.train), min(512, len(self.train)), seed=config.seed, step=0
            )
            if any(isinstance(layer, Standardize) for layer in model.modules()):
                standardize(model, *self.train.moments())
            model.calibrate(*batch(self.train, first, model, seed=config.seed))  # alike for all
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        keep(model, config.memory)
        self.parts = _parts(model, self.train, config)  # of whole weights: before they are cut
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        several = self.processes.count > 1
        self.cut = config.shard and several
        if self.cut:
            shard(model, machine.blocks(model))
        notices = machine.notices(config, len(self.train))
        if config.fast and (problem := machine.compiled(model)):
            notices.append(problem)
        self.optimizer = config.optimizer_for(model.train())
        wrapped = several and not self.cut
        self.trained = self.accelerator.prepare(model) if wrapped else model
        self.weights: list[Tensor] = list(model.parameters())
        self.buffers = list(model.buffers())
        self.followers = [m.after_step for m in model.modules() if hasattr(m, "after_step")]
        self.means: list[Tensor] = list(self.averaged.parameters())
        if resume:
            self._load()
        elif self.cut:
            self._recut()
        self._feed()
        self.log.rewind(self.progress.step)
        self.accelerator.init_trackers("musigma", config=machine.plain(config))
        for message in notices:
            self._say("notice", message)
        self.began = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()
        self.share = config.share(self.progress, len(self.train))
        self.seen = 0
        if not resume:
            self._save()

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.close()
        if self.feed:
            self.feed.close()
        for tracker in self.accelerator.trackers:
            with contextlib.suppress(Exception):  # what it failed at is in the run's own log
                tracker.finish()

    def finish(self) -> None:
        """Leave the last state, and weights even if there was no evaluation."""
        if not self._save():
            raise TrainingError(
                f"the last state of {self.out} could not be saved: "
                f"{self.progress.alerts.get('disk', 'steps were failing')}; what was saved before "
                "is whole: make room, and --resume"
            )
        if self.processes.is_main and not (self.out / "model.safetensors").exists():
            checkpoint.save(self.averaged, self.out / "model.safetensors", extra=self.extra)
        self.processes.wait()

    def agree(self, wish: bool) -> bool:
        """Whether any process wants to stop; after that all have the same clock."""
        wait = 60 * self.config.save_every
        if "disk" in self.progress.alerts:
            wait = min(wait, 60)
        due = time.monotonic() - self.saved > wait and not self.progress.failing
        reversible = self.config.memory == "reversible"
        fell = reversible and fallen(self.model) != self.progress.fallen
        mine = (
            self.progress.seconds,
            float(wish),
            float(due and self.processes.is_main),
            float(fell),
        )
        seconds, wanted, due, fell = self.processes.maximum(*mine)
        if fell:
            self._fall()
        before = self.share
        self.progress.seconds = seconds
        self.share = self.config.share(self.progress, len(self.train))
        times = self.config.evaluations
        if int(self.share * times) > int(before * times):
            self._assess()
        if due:
            self._save()
        return wanted > 0

    def _fall(self) -> None:
        """What one process can no longer do reversibly, none does from now on."""
        found: dict[str, str] = {}
        for own in self.processes.gather(fallen(self.model)):
            found = own | found
        for name in found.keys() - self.progress.fallen.keys():
            self._say("notice", f"{name} is recomputed by parts from now on: {found[name]}")
        self.progress.fallen = found
        recall(self.model, found)

    # -- one step

    def step(self) -> None:
        """Gradients of a batch, and a step if they are fit for one."""
        config, progress = self.config, self.progress
        step = progress.step
        lr = config.learning_rate(step, self.share) * progress.caution
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, context = self._examples()
        evidence, loss = self._gradients(x, context, step)
        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = float(full_tensor(nn.utils.get_total_norm(gradients)))
        row: dict[str, Any] = {"kind": "train", "step": step + 1, "loss": loss, "grad_norm": norm}
        limit = config.skip_above * progress.usual_norm if step >= 50 else math.inf
        fit = math.isfinite(norm) and norm <= limit
        if self.processes.count == 1:
            fit = fit and math.isfinite(
                loss
            )  # elsewhere such a loss has made the norm so, for all
        if fit:
            longest = config.clip or 3 * progress.usual_norm or math.inf
            if norm > longest:
                pieces = [local_shard(g) for g in gradients]
                torch._foreach_mul_(pieces, longest / norm)  # pyright: ignore
            self.optimizer.step()
            for after_step in self.followers:
                after_step()  # pyright: ignore[reportCallIssue]
            if config.ema:
                self._average(step)
            weight = 0.02 if progress.usual_norm else 1.0
            progress.usual_norm += weight * (norm - progress.usual_norm)
            progress.failing = 0
        else:
            row |= self._failed(x, context, step, evidence, loss, norm, limit)
        progress.step, progress.seconds = step + 1, time.monotonic() - self.began
        self.seen += config.batch_size
        self._note(row, evidence, lr)
        if not fit:
            self._set_back(row["reason"])

    def _feed(self) -> None:
        """Have batches from the present step on, and none of those ahead before."""
        if self.feed:
            self.feed.close()
        config = self.config
        self.feed = stream(
            self.train,
            config.batch_size,
            seed=config.seed,
            start=self.progress.step,
            part=self.processes.share(config.batch_size),
            workers=config.workers,
        )

    def _examples(self) -> tuple[Tensor, Context]:
        """This process's share of the next batch."""
        x, rows = next(self.feed)
        return tensors(self.model, self.train, x, rows)

    def _forward(self, model: nn.Module, x: Tensor, context: Context) -> Evidence:
        if (k := self.config.k) > 1:
            x = x.repeat_interleave(k, 0)
            context = contexts.repeat(context, k)
        with self.cast():
            return model(x, context, closed_form=k == 1)

    def _gradients(self, x: Tensor, context: Context, step: int) -> tuple[Evidence, float]:
        """Of the mean over the whole batch, whoever has which part of it."""
        self.optimizer.zero_grad(set_to_none=True)
        noise(self.config.seed, step, self.processes.rank)
        found: list[Evidence] = []
        total = 0.0
        for i in range(self.parts):
            part = Processes(i, self.parts).share(len(x))
            given = contexts.rows(context, part)
            last = i == self.parts - 1
            with self._exchanging(last):
                evidence = self._forward(self.trained, x[part], given)
                weight = (part.stop - part.start) / self.config.batch_size
                loss = self.config.objective(evidence, self.share) * weight
                (loss * self.processes.count).backward()  # their mean is taken
            found.append(Evidence(*(t.detach() for t in evidence)))
            total += loss.item()
        joined = Evidence(*map(torch.cat, zip(*found, strict=True)))
        return joined, total * self.config.batch_size / len(x)

    @contextlib.contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Whether a backward pass brings the gradients of all processes together."""
        if self.cut:
            self.trained.set_requires_gradient_sync(now)  # pyright: ignore
            yield
        elif now or self.trained is self.model:
            yield
        else:
            with self.accelerator.no_sync(self.trained):
                yield

    def _failed(
        self,
        x: Tensor,
        context: Context,
        step: int,
        evidence: Evidence,
        loss: float,
        norm: float,
        limit: float,
    ) -> dict[str, Any]:
        """What is said of a step that is skipped: why, and for which examples."""

        def again() -> None:
            noise(self.config.seed, step, self.processes.rank)
            self._forward(self.model, x, context)

        astray = not math.isfinite(loss)
        if self.cut:  # all go forward together, or none
            astray = any(self.processes.gather(astray))
        own = diagnose(self.model, again if astray else None, loss, norm, limit)
        log_w = evidence.elbo.reshape(len(x), -1).sum(1)
        config = self.config
        indices = batch_indices(len(self.train), config.batch_size, seed=config.seed, step=step)
        bad = indices[self.processes.share(config.batch_size)][(~log_w.isfinite()).cpu().numpy()]
        everyone = self.processes.gather((own, bad.tolist()))
        self.progress.failing += 1
        self.progress.skipped += 1
        reasons = [reason for reason, _ in everyone if reason]
        examples = [int(i) for _, some in everyone for i in some]
        row: dict[str, Any] = {"kind": "skipped", "reason": (reasons or ["unknown"])[0]}
        return row | ({"examples": examples[:8]} if examples else {})

    def _set_back(self, reason: str) -> None:
        """After repeated trouble: the last good state, and smaller steps from there."""
        progress = self.progress
        if progress.failing % SETBACK_AFTER:
            return
        if progress.failing >= GIVE_UP_AFTER or progress.setbacks >= MOST_SETBACKS:
            raise TrainingError(
                f"{progress.failing} steps in a row were skipped, the last because {reason}, "
                f"though the run went back {progress.setbacks} times and took smaller steps; "
                f"{self.out} is as it was last saved. Try a smaller --lr, or look at the data"
            )
        lost, kept = progress.step, progress
        self.processes.wait()
        self._load()
        self.progress = replace(
            self.progress,
            seconds=kept.seconds,
            best=kept.best,  # it is still there
            skipped=kept.skipped,
            failing=kept.failing,
            setbacks=kept.setbacks + 1,
            caution=kept.caution / 2,
        )
        self._feed()
        self.log.rewind(self.progress.step)
        self._say(
            "setback",
            f"{SETBACK_AFTER} steps failed, the last because {reason}: back from step {lost} to "
            f"{self.progress.step}, and on with steps of {self.progress.caution:.3g} the size",
        )

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the running average; early on it forgets faster, and never lags the start."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        values = [local_shard(p) for p in self.weights]
        torch._foreach_lerp_(self.means, values, 1 - decay)  # pyright: ignore
        for mean, value in zip(self.averaged.buffers(), self.buffers, strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def _complete(self) -> None:
        """Bring the averaged model up to date, where it is not kept so at each step."""
        if not self.config.ema:
            self._average(self.progress.step)
        if self.cut:
            trio = zip(self.averaged.parameters(), self.means, self.weights, strict=True)
            for mean, piece, like in trio:
                mean.copy_(gather_shards(piece, like))

    def _recut(self) -> None:
        """Of the averaged weights, take the pieces that belong to those of the model."""
        pairs = zip(self.averaged.parameters(), self.weights, strict=True)
        self.means = [local_shard(shard_like(mean, like)).clone() for mean, like in pairs]

    # -- looking on

    def _note(self, row: dict[str, Any], evidence: Evidence, lr: float) -> None:
        """A step's row, and what there is to be warned of."""
        progress = self.progress
        found = {}
        if row["kind"] == "train" and (message := spiked(progress, row["loss"])):
            found["spike"] = message
        for message in news(progress, ("spike",), found):
            self._say("alert", message)
        if not self.log.due(progress.step, row):
            return
        row |= {"seconds": progress.seconds, "share": self.config.share(progress, len(self.train))}
        row |= described(evidence, math.prod(self.train.shape)) | {"learning_rate": lr}
        row["examples_per_second"] = self.log.rate(self.seen)
        self.seen = 0
        self._write(row)

    def _assess(self) -> None:
        """The validation figure of the averaged weights, which are kept if they are the best."""
        progress = self.progress
        self._complete()
        figure = evaluate(
            self.averaged, self.shown, seed=self.config.seed, processes=self.processes
        )
        self._write({"kind": "evaluation", **self._where(), **figure})
        path = self.out / "model.safetensors"
        before = progress.best
        progress.best = min(progress.best, figure["bits_per_dim"])
        if not self.processes.is_main:
            return
        due = progress.best < before or not path.exists()
        if due and not self._written(
            lambda: checkpoint.save(self.averaged, path, extra=self.extra)
        ):
            progress.best = before  # what is there is no better
        names = {module: name or "model" for name, module in self.averaged.named_modules()}
        paired = set(self.averaged.latents()) != set(self.averaged.variables())
        sites = [names[site] for site in self.averaged.latents()] if paired else []
        few = batch(self.shown, np.arange(min(len(self.shown), 64)), self.averaged)
        with torch.random.fork_rng():
            found = health(self.averaged, dict(zip(sites, figure["kl"], strict=False)), *few)
        for message in news(progress, ("collapse", "saturation", "conditioning"), found):
            self._say("alert", message)

    def _where(self) -> dict[str, Any]:
        return {"step": self.progress.step, "seconds": self.progress.seconds}

    def _say(self, kind: str, message: str) -> None:
        self._write({"kind": kind, **self._where(), "message": message})

    def _write(self, row: dict[str, Any]) -> None:
        self.log.write(row)
        if self.config.track and row["kind"] in ("train", "evaluation"):
            values = {
                f"{row['kind']}/{name}": value
                for name, value in row.items()
                if isinstance(value, (int, float)) and name != "step"
            }
            values |= {f"{row['kind']}/kl_{i}": value for i, value in enumerate(row["kl"])}
            self._track(values, row["step"])

    def _track(self, values: dict[str, Any], step: int) -> None:
        """Tell the trackers; one that fails (a full disk, a server away) is told no more."""
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                reason = str(error) or type(error).__name__
                self._say("alert", f"{tracker.name} takes nothing more, and is left out: {reason}")

    @contextlib.contextmanager
    def profiled(self) -> Iterator[Callable[[], None]]:
        """Told of each step; writes a trace of the eighth to the twelfth, if that is wished."""
        if not (self.config.profile and self.processes.is_main):
            yield lambda: None
            return
        from torch.profiler import profile, schedule

        problem = "it ended before step 8"

        def ready(profiler: Any) -> None:
            nonlocal problem
            try:
                with replacing(self.out / "profile.json") as draft:
                    profiler.export_chrome_trace(str(draft))
                problem = ""
            except (OSError, RuntimeError) as error:
                problem = str(error)

        plan = schedule(wait=5, warmup=2, active=5, repeat=1)
        with profile(schedule=plan, on_trace_ready=ready) as profiler:
            yield profiler.step
        if problem:
            self._say("notice", f"no profile.json was written: {problem}")

    # -- keeping

    def _save(self) -> bool:
        """Save the state; whether that was done. A full disk is told of, and training goes on."""
        self.saved = time.monotonic()
        self._complete()

        def write() -> None:
            save_state(self.out, self.progress, self.model, self.averaged, self.optimizer)
            if self.processes.is_main:
                last = self.out / "last.safetensors"
                checkpoint.save(self.averaged, last, extra=self.extra)

        return self._written(write)

    def _written(self, write: Callable[[], None]) -> bool:
        known = self.progress.alerts.pop("disk", None)
        try:
            write()
        except OSError as error:
            self.progress.alerts["disk"] = str(error)
            if not known:
                self._say("alert", f"not saved: {error}; it is tried again every minute")
            return False
        return True

    def _load(self) -> None:
        self.progress = load_state(self.out, self.model, self.averaged, self.optimizer)
        recall(self.model, self.progress.fallen)
        if self.cut:
            self._recut()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], int]]:
    """The signal that came, or 0: the first Ctrl-C stops cleanly, the second at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: object) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
