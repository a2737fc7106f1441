"""``musigma train``: a command for each architecture, made from its builder's signature."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as python
import json
import math
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import App, Parameter

from musigma import __version__
from musigma.cli.shared import (
    USUAL,
    Common,
    CommonOptions,
    DataOptions,
    Reading,
    Screen,
    Trained,
    as_levels,
    device_named,
    pixels,
    read,
    register_plugin,
    said,
)
from musigma.training import TrainConfig

train_app = App(name="train", help="Train a model: `musigma train ARCH DATA`, or `--resume RUN`.")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """How the training data are treated, and where the run goes.

    Args:
        out: The run folder to make; by default runs/ARCH-DATA.
        overwrite: Replace a run that is there already.
        auto_resume: Go on with a run of the same options that is there already: so a command that
            was cut off is given again as it was, by a cluster or by `torchrun --max-restarts`.
        size: Bring images to this size: 32, or 48x64 (height x width).
        bits: Keep so many bits of each channel, 1 to 8.
        binarize: Make images black and white: at a threshold, or drawn anew at each step.
        reading: How data are read.
        conditional: Condition the model on the labels of the data.
    """

    out: Path | None = None
    overwrite: Annotated[bool, Parameter(negative="")] = False
    auto_resume: Annotated[bool, Parameter(negative="")] = False
    size: str | None = None
    bits: int = 8
    binarize: Literal["threshold", "dynamic"] | None = None
    reading: Annotated[Reading, Parameter(name="*")] = Reading()  # noqa: RUF009
    conditional: Annotated[bool, Parameter(negative="")] = False


FILLED_IN = ("bits", "context")  # options of builders that follow from the data


def add_architecture(name: str) -> None:
    """Make ``musigma train NAME`` from the signature of the builder."""
    from docstring_parser import parse

    from musigma.zoo import ARCHITECTURES

    builder = python.unwrap(ARCHITECTURES[name])
    types, doc = get_type_hints(builder), parse(builder.__doc__ or "")
    help_of = {p.arg_name: p.description or "" for p in doc.params}
    config_names = {
        f.name for kind in (TrainConfig, Prepare, Common) for f in dataclasses.fields(kind)
    }
    _, *options = python.signature(builder).parameters.values()
    options = [p for p in options if p.name not in FILLED_IN]
    for p in options:
        if p.name in config_names:
            raise ValueError(
                f"{p.name}: an option of {name} that `musigma train` has already; rename it"
            )
        if p.default is p.empty:
            raise ValueError(f"{p.name}: an option of {name} without a default; give it one")

    defaults = {"config": TrainConfig(), "prepare": Prepare(), "common": USUAL}

    def command(data: str, **given: Any) -> None:
        shared = (given.pop(key, usual) for key, usual in defaults.items())
        train(name, data, given, *shared)

    def parameter(name: str, default: Any, annotation: Any) -> python.Parameter:
        kind = python.Parameter.KEYWORD_ONLY
        return python.Parameter(name, kind, default=default, annotation=annotation)

    command.__signature__ = python.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [
            python.Parameter(
                "data",
                python.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=Annotated[str, Parameter(help="A folder, a file, or a name.")],
            ),
            *(
                parameter(
                    p.name,
                    p.default,
                    Annotated[types.get(p.name, str), Parameter(help=help_of.get(p.name, ""))],
                )
                for p in options
            ),
            parameter("config", TrainConfig(), Annotated[TrainConfig, Parameter(name="*")]),
            parameter("prepare", Prepare(), Annotated[Prepare, Parameter(name="*")]),
            parameter("common", USUAL, CommonOptions),
        ]
    )
    command.__doc__ = f"{doc.short_description or name}\n\n{doc.long_description or ''}"
    command.__annotations__ = {}
    train_app.command(command, name=name)


@train_app.default
def resume_training(*, resume: Path | None = None, common: CommonOptions = USUAL) -> None:
    """Train a model: `musigma train ARCH DATA`, or go on with one that was stopped.

    Args:
        resume: The run folder to go on with; its own configuration is used.
        common: Shared options.
    """
    if resume is None:
        raise ValueError("train: say what to train, `musigma train ARCH DATA`, or --resume RUN")
    if common.plugin:
        register_plugin(common.plugin)
    go_on(resume, common)


def go_on(resume: Path, common: Common, source: str | None = None) -> None:
    """Train on from the state in a run folder; `source` is its data as they were named now."""
    import torch

    from musigma import data
    from musigma.training import join, saved_state
    from musigma.zoo import ARCHITECTURES, build

    device_named(common.device)
    join(common.device)
    if resume.is_dir():
        saved_state(resume)
    try:
        saved = json.loads((resume / "config.json").read_text())
        about, config = saved["data"], TrainConfig(**saved["train"])
        name, shape, options = (saved["model"][k] for k in ("architecture", "shape", "options"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"resume: {resume} holds no readable config.json ({reason})") from error
    if name not in ARCHITECTURES:
        raise ValueError(
            f"resume: {resume} is of the architecture {name!r}, which is not in the zoo; give the "
            f"file that defines it (--plugin FILE.py:{name})"
        )
    if common.seed not in (USUAL.seed, config.seed):
        raise ValueError(
            f"seed: the run began with {config.seed}, and goes on with it; leave it out"
        )
    common = dataclasses.replace(common, seed=config.seed)
    screen = Screen(common)
    treat = data.Preprocess.from_json(about["preprocess"])
    reading = Reading(skip_bad=about["skip_bad"], in_memory=about.get("in_memory"))
    found = read(source or about["source"], treat, reading, screen)
    if len(found) != about["n"] or list(found.shape) != about["shape"]:
        raise ValueError(
            f"resume: {about['source']} had {about['n']} examples of shape {about['shape']} when "
            f"the run began, and has {len(found)} of {list(found.shape)} now"
        )
    if about.get("digest") not in (None, data.digest(found)):
        raise ValueError(
            f"resume: the examples or labels of {about['source']} are not those that the run "
            "began with; train anew, with another --out or --overwrite"
        )
    model = build(name, shape, **options).to(getattr(torch, saved.get("dtype", "float32")))
    run(model, found, config, resume, saved, screen, resume=True)


def finetune(
    start: str,
    source: Annotated[str, Parameter(name="data")],
    *,
    out: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    reading: Annotated[Reading, Parameter(name="*")] = Reading(),  # noqa: B008
    config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),  # noqa: B008
    common: CommonOptions = USUAL,
) -> None:
    """Train a model further, on other data or with another objective: a new run.

    Args:
        start: A run folder, or a .safetensors file: one that was converted, say.
        source: A folder, a file, or a name; treated as the model's own data were.
        out: The run folder to make; by default runs/ARCH-DATA.
        overwrite: Replace a run that is there already.
        reading: How data are read.
        config: Budget, optimiser, objective.
        common: Shared options.
    """
    from musigma.data import Preprocess
    from musigma.training import join

    trained = Trained(start, common)
    about = trained.extra.get("data", {})
    treat = Preprocess.from_json(about.get("preprocess", {}))
    prepare = Prepare(out=out, overwrite=overwrite)
    processes, name = join(common.device), trained.model.config["architecture"]
    folder, _ = _agreed(processes, lambda: _run_folder(prepare, name, source))
    screen = Screen(dataclasses.replace(common, seed=config.seed))
    found = trained.data(source, DataOptions(split="all", reading=reading), screen)
    kept = {name: trained.extra[name] for name in ("foreign",) if name in trained.extra}
    _begin(trained.model, found, source, treat, reading, config, folder, screen, kept)


def train(
    name: str, source: str, options: dict[str, Any], config: Any, prepare: Prepare, common: Common
) -> None:
    """``musigma train ARCH DATA``."""
    import torch

    from musigma import data
    from musigma.training import join
    from musigma.zoo import build

    common = dataclasses.replace(common, seed=config.seed)
    device_named(common.device)
    processes = join(common.device)
    screen = Screen(common)
    out, there = _agreed(processes, lambda: _run_folder(prepare, name, source))
    if there:
        _agreed(processes, lambda: _refuse_another(out, name, source, options, config, prepare))
        go_on(out, common, source)
        return
    size = pixels(prepare.size)
    treat = data.Preprocess(size=size, bits=prepare.bits, binarize=prepare.binarize)
    found = read(source, treat, prepare.reading, screen)
    if prepare.conditional and found.labels is None:
        raise ValueError(
            f"conditional: {source} has no labels; put images into class folders, or name a "
            "table's last column 'label'"
        )
    torch.manual_seed(config.seed)
    spec = found.spec(["label"] if prepare.conditional else [])
    model = build(name, spec, **options)
    _begin(model, found, source, treat, prepare.reading, config, out, screen)


def _agreed(processes: Any, decide: Callable[[], Any]) -> Any:
    """What the main process decides, or refuses, for all."""
    if processes.count == 1:
        return decide()
    answer = refusal = None
    if processes.is_main:
        try:
            answer = decide()
        except (ValueError, OSError) as error:
            refusal = str(error)
    answer, refusal = processes.gather((answer, refusal))[0]
    if refusal is not None:
        raise ValueError(refusal)
    return answer


def _run_folder(prepare: Prepare, name: str, source: str) -> tuple[Path, bool]:
    """Where a run goes, and whether it is there to go on with.

    Refuses what is there and not to be replaced, and what is no run.
    """
    from musigma.training import saved_state

    out = prepare.out or Path("runs") / f"{name}-{_called(source)}"
    held = out.is_dir() and not _bare(out)
    if prepare.auto_resume:
        if prepare.overwrite:
            raise ValueError("auto_resume: it goes on with what --overwrite replaces; keep one")
        with contextlib.suppress(ValueError):
            saved_state(out)
            return out, True
    replace = prepare.overwrite or (prepare.auto_resume and (out / "config.json").is_file())
    if (held or out.is_file()) and not replace:
        raise ValueError(
            f"out: {out} exists already; --resume {out}, --overwrite, or another --out"
        )
    if out.is_file() or (replace and not _replaceable(out)):
        raise ValueError(f"out: {out} is not a run, and will not be replaced by one")
    return out, False


def _called(source: str) -> str:
    """What a source is called in the name of a run's folder.

    >>> _called("photos.zip"), _called("shards-{00..31}.tar"), _called("https://host/x?key=1")
    ('photos', 'shards', 'x')
    """
    from musigma.data import readers

    whole = readers.plain(source) if readers.is_url(source) else source
    name = re.sub(r"[-_]?\{\d+\.\.\d+\}", "", Path(whole).name)
    return name.split(".")[0] or "data"


def _refuse_another(
    out: Path,
    name: str,
    source: str,
    options: dict[str, Any],
    config: TrainConfig,
    prepare: Prepare,
) -> None:
    """Refuse to go on with a run that was begun with other options."""
    from musigma import data

    saved = json.loads((out / "config.json").read_text())
    model, about = saved["model"], saved["data"]
    size, bits, binarize = pixels(prepare.size), prepare.bits, prepare.binarize
    was = {
        "ARCH": model["architecture"],
        "DATA": about["source"],
        **{option: value for option, value in model["options"].items() if option in options},
        **about["preprocess"],
        "skip_bad": about["skip_bad"],
        "conditional": bool(model["options"].get("context")),
        **saved["train"],
    }
    now = {
        "ARCH": name,
        "DATA": data.identity(source),
        **options,
        **data.Preprocess(size=size, bits=bits, binarize=binarize).to_json(),
        "skip_bad": prepare.reading.skip_bad,
        "conditional": prepare.conditional,
        **dataclasses.asdict(config),
    }
    now = json.loads(json.dumps(now))  # as it was saved: tuples are lists
    for option in now:
        if was.get(option) != now[option]:
            raise ValueError(
                f"auto_resume: {out} was begun with {option} {was.get(option)}, and not with "
                f"{now[option]}; --overwrite it, or name another --out"
            )


def _begin(
    model: Any,
    found: Any,
    source: str,
    treat: Any,
    reading: Reading,
    config: TrainConfig,
    out: Path,
    screen: Screen,
    kept: dict[str, Any] | None = None,
) -> None:
    """Write down what is to be trained, and train it; `kept` goes into the checkpoints."""
    import torch

    from musigma import data
    from musigma.training import check_run

    saved = {
        "model": model.config,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "data": {
            "source": data.identity(source),
            "preprocess": treat.to_json(),
            **dataclasses.asdict(reading),
            **{k: v for k, v in data.describe(found).items() if k in ("n", "shape", "bits")},
            "label_names": list(found.label_names),
            "digest": data.digest(found),
        },
        "train": dataclasses.asdict(config),
        "kept": kept or {},
        "versions": {
            "musigma": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    for part in ("train", "validation", "held-out"):
        saved["data"][part] = len(found.split(part))
    check_run(model, found, config)
    run(model, found, config, out, saved, screen)


def _emptied(out: Path) -> None:
    """Remove what is in a folder, and not the folder: it may be a link, or another disk."""
    from musigma.files import LOCK

    for inside in out.iterdir():
        if inside.name == LOCK:
            continue
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside)
        else:
            inside.unlink()


def _replaceable(out: Path) -> bool:
    """Whether a folder is a run, or empty, or not there: nobody's photographs."""
    return not out.is_dir() or (out / "config.json").is_file() or _bare(out)


def _bare(out: Path) -> bool:
    """Whether a folder holds nothing but what a process that was killed left."""
    from musigma.files import LOCK, is_draft

    return all(is_draft(p) or p.name == LOCK for p in out.iterdir())


def run(model, found, config, out: Path, saved, screen: Screen, *, resume: bool = False) -> None:
    """Train in a folder that no other process trains into."""
    from musigma.files import lock_run
    from musigma.processes import current_processes

    with contextlib.ExitStack() as stack:

        def enter() -> None:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_run(out))
            if not resume:
                _emptied(out)  # of a run that is to be replaced

        _agreed(current_processes(), enter)
        _run(model, found, config, out, saved, screen, resume)


def _run(model, found, config, out: Path, saved, screen: Screen, resume: bool) -> None:
    """Fit, evaluate on the held-out part, and draw what there is to see."""
    from musigma.evaluation import evaluate, ledger
    from musigma.files import write_json
    from musigma.processes import current_processes
    from musigma.training import fit, leave

    common = screen.common
    parameters = sum(p.numel() for p in model.parameters())
    training, validation = found.split("train"), found.split("validation")
    screen.say(
        f"{saved['model']['architecture']} with {parameters:,} parameters on {len(training):,} "
        f"examples of shape {'x'.join(map(str, found.shape))} from {found.name}"
    )
    told = {"notes": list(found.notes), "left_out": list(found.skipped)}
    processes = current_processes()
    if processes.is_main:
        write_json(out / "config.json", saved)
    with _Dashboard(screen, config) as watch:
        done = fit(
            model,
            training,
            validation,
            config,
            out,
            extra={"data": saved["data"], **saved.get("kept", {})},
            device=common.device,
            resume=resume,
            watch=watch,
        )
    if not done.finished:
        command = f"musigma train --resume {shlex.quote(str(out))}"
        screen.say(f"stopped after {done.steps:,} steps; go on with: {command}")
        screen.result({"run": str(out), "steps": done.steps, "finished": False, **told})
        leave()
        if done.signal:
            sys.exit(128 + done.signal)
        return
    trained = Trained(str(out), common)
    held = found.split("held-out")
    with screen.progress("evaluating") as progress:
        figure = evaluate(
            trained.model, held, seed=common.seed, progress=progress, processes=processes
        )
    leave()
    if not processes.is_main:
        return
    write_json(out / "evaluation.json", figure)
    write_json(out / "ledger.json", ledger(trained.model, held, seed=common.seed))
    try:
        pictures = draw(trained, held, out / "samples")
    except (ValueError, RuntimeError) as error:  # no matplotlib, or weights gone astray
        pictures = []
        screen.say(f"not all pictures could be drawn: {error}")
    flow = set(trained.model.latents()) == set(trained.model.variables())
    mode = "" if flow else " --mode"
    screen.result(
        {
            "run": str(out),
            "steps": done.steps,
            "finished": True,
            "seconds": done.seconds,
            "skipped": done.skipped,
            "parameters": parameters,
            **told,
            "evaluation": figure,
            "pictures": pictures,
        },
        f"{said(figure)}\nrun: {out}\npictures: {', '.join(pictures) or 'none'}\n"
        f"next: musigma sample {shlex.quote(str(out))} --n 64{mode} --out samples.png",
    )


def draw(trained: Trained, held: Any, folder: Path) -> list[str]:
    """Samples, reconstructions and interpolations as pictures, where they are any."""
    import numpy as np
    import torch

    from musigma.evaluation import batch
    from musigma.report import figures

    model, levels = trained.model, trained.levels
    folder.mkdir(exist_ok=True)
    x, context = batch(held, np.arange(min(16, len(held))), model)
    drawn = folder / "samples.png"
    samples = model.sample(64, trained.context(64, None), mode=True)
    if len(trained.shape) == 1:
        if trained.shape != (2,):
            return []
        figures.points(samples.cpu().numpy(), drawn, reference=held.x[:2000])
        return [str(drawn)]
    trained.write(samples, drawn)
    with torch.no_grad():
        again = model.reconstruct(x, context)
    mirrored, between = folder / "reconstructions.png", folder / "interpolations.png"
    figures.rows([as_levels(x), as_levels(again)], mirrored, levels=levels)
    if len(x) < 2:
        return [str(drawn), str(mirrored)]
    even, odd = slice(0, len(x) // 2 * 2, 2), slice(1, None, 2)
    ends = (None, None) if context is None else (context[even], context[odd])
    with torch.no_grad():
        walks = model.interpolate(x[even], x[odd], 9, *ends)
    trained.write_rows(walks, between)
    return [str(drawn), str(mirrored), str(between)]


class _Dashboard:
    """The state of training, as a bar on a terminal and as a line per evaluation elsewhere."""

    def __init__(self, screen: Screen, config: Any):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.screen, self.bits, self.speed = screen, math.nan, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=screen.console,
            transient=True,
            disable=screen.common.json or not screen.console.is_terminal,
        )

    def __enter__(self) -> Callable[[Any], None]:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=1.0)
        return self.show

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, row: Any) -> None:
        """Take in a row of metrics."""
        if row["kind"] == "evaluation":
            self.screen.say(f"step {row['step']:,}: {said(row)}")
            return
        if row["kind"] == "skipped":
            self.screen.say(f"step {row['step']:,} skipped: {row['reason']}")
            return
        if row["kind"] != "train":
            self.screen.say(f"step {row['step']:,}: {row['message']}")
            return
        weight = 0.05 if self.bits == self.bits else 1.0
        self.bits = row["bits_per_dim"] * weight + (self.bits * (1 - weight) if weight < 1 else 0)
        self.speed += weight * (row["examples_per_second"] - self.speed)
        kl = sum(row["kl"])
        text = f"{self.bits:.3f} bits/dim  latents {kl:.1f} nats  {self.speed:,.0f} examples/s"
        self.bar.update(self.task, completed=row["share"], description=text)
