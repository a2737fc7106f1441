"""``musigma train``: a command for each architecture, made from its builder's signature.

This module imports PyTorch; it is imported when one of its commands is used.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import torch
from cyclopts import Group, Parameter
from docstring_parser import parse

from musigma import __version__, checkpoint, data, plugins
from musigma.cli.energy import density, figure_lines
from musigma.cli.energy import figures as figures_of_weights
from musigma.cli.options import (
    ALWAYS,
    BUDGET,
    DATA,
    FIRST,
    HARDWARE,
    MODEL,
    OBJECTIVE,
    OUTPUT,
    SOURCE,
    Common,
    DataOptions,
    Reading,
    Run,
    Source,
    application,
    image_size,
    with_headings,
)
from musigma.cli.pictures import ROWS_DRAWN, draw
from musigma.cli.runs import RunFolder, decided_by_main, refuse_other_run, reserved
from musigma.cli.screen import Screen, figure_text
from musigma.cli.threads import Threads
from musigma.cli.trained import Trained, device_named, of_pairs, read_data
from musigma.data.attach import is_source
from musigma.distributions import LIKELIHOODS, are_counted
from musigma.energy import EvidenceBound, LogDensity, check_density, start_rows, weigh
from musigma.evaluation import ledger, record
from musigma.files import write_json
from musigma.named import REGISTRIES
from musigma.objectives import OBJECTIVES
from musigma.processes import current_processes
from musigma.report import figures
from musigma.schema import Schema
from musigma.spec import Spec
from musigma.training import (
    TrainConfig,
    check_run,
    conditional_config,
    fit,
    given_options,
    join,
    leave,
    saved_state,
)
from musigma.zoo import (
    ARCHITECTURES,
    Conditioning,
    build,
    given_numbers,
    spec_of,
    with_numbers,
)

WEIGHED = 10_000
"""Number of draws that are weighed at the end of training by a density."""

threads = Threads()
train_app = application("train", group_commands=Group("Architectures", sort_key=-1))

if TYPE_CHECKING:
    MoreOptions = Common
    TrainOptions = TrainConfig
else:
    MoreOptions = with_headings(Common, {FIRST: ("device",), BUDGET: ("seed",)}, other=ALWAYS)
    TrainOptions = with_headings(
        TrainConfig,
        {
            FIRST: ("minutes",),
            OBJECTIVE: ("objective", "beta", "kl_warmup", "free_bits", "k"),
            HARDWARE: (
                *("precision", "fast", "memory", "memory_budget", "accumulate", "shard"),
                "workers",
            ),
            OUTPUT: ("save_every", "track", "profile"),
        },
        other=BUDGET,
        omit=("seed",),  # which `Common` has
    )


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """How the training data are read and prepared.

    Args:
        size: Resize images to this size: 32, or 48x64 (height x width).
        of: Columns of the table to model: a name or a pattern ('theta_*'). May be given several
            times. By default all columns but those of --given.
        given: Context of each example, to condition the model on: `label`, a column of the table
            or a pattern of columns ('x_*'), or a file or folder with a row or image for each
            example. May be given several times.
        bits: Bits of each channel of an image, 1 to 8.
        binarize: Make images black and white: at a threshold, or by a new draw at each step.
        perturb: Share of levels that random ones replace at each step, for a background model.
        conditional: Short for `--given label`.
        bounds: A file that says where the columns of a table lie (prior.toml): a table [bounds] of
            name = [low, high]; before it, positive = ["a", "b"], and lists of groups, simplex =
            [["a", "b", "c"]] and ordered = [["d", "e"]]. The model has no density outside. Rows
            outside are refused.
        observed: A file with the one observation that the simulations were proposed for (musigma
            propose). The posterior is then valid for it alone, and commands warn of others.
        schema: Types of the columns of a table: the path of a schema file, as `musigma schema`
            writes it; `infer`: from the data; `none`: plain numbers. By default inferred if the
            architecture takes types.
        missing: Missing values of a typed table: `model` gives them a probability, `ignore` leaves
            them out of the density. A schema file can set it for each column.
        energy: Train by an unnormalized density instead of data: FILE.py:NAME of a function of x
            (and of the context, if there is one) that returns the log density of each row by
            torch. DATA may then be left out, or be rows near its mass, such as draws from a prior.
        features: Number of features of x, with --energy and without DATA.
        reading: How data are read.
    """

    size: Annotated[str | None, Parameter(group=FIRST)] = None
    of: Annotated[tuple[str, ...], Parameter(group=FIRST)] = ()
    given: Annotated[tuple[str, ...], Parameter(group=FIRST)] = ()
    bits: int = 8
    binarize: Literal["threshold", "dynamic"] | None = None
    perturb: float = 0.0
    conditional: bool = False
    bounds: Path | None = None
    observed: Path | None = None
    schema: str | None = None
    missing: Literal["model", "ignore"] = "model"
    energy: str | None = None
    features: int | None = None
    reading: Reading = Reading()

    def without_data(self) -> data.Dataset:
        """Rows by which a flow is calibrated that is trained by a density alone."""
        from musigma.energy import start_rows

        if self.energy is None:
            raise ValueError(
                "data: expected a folder, a file, a URL or the name of a data set, `musigma train "
                "ARCH DATA`"
            )
        columns, support = (), None
        if self.bounds is not None:
            plain = data.read_bounds(self.bounds)
            columns = data.bounded_columns(plain)
            support = data.as_support(plain, columns)
        features = self.features or len(columns)
        if not features or (columns and len(columns) != features):
            named = f"; --bounds names {len(columns)}" if columns else ""
            raise ValueError(
                f"features: give the number of features of x (--features), bounds or rows{named}"
            )
        return start_rows(Spec((features,), columns=columns, support=support))

    def typed(self, name: str) -> dict[str, Any]:
        """How the columns of a table are typed, for an architecture."""
        parameters = inspect.signature(ARCHITECTURES[name]).parameters
        parameter = parameters.get("schema")
        if self.bounds is not None and "support" not in parameters:
            raise ValueError(f"bounds: {name} takes none; leave them out, or train nsf or maf")
        if self.bounds is not None and self.schema not in (None, "none"):
            raise ValueError("bounds: they are for plain numbers; leave --bounds or --schema out")
        if self.energy is not None:
            return {}
        if self.schema not in (None, "none") and parameter is None:
            raise ValueError(f"schema: {name} takes no types of columns; leave it out")
        if parameter is None or self.schema == "none":
            return {}
        chosen = self.schema or ("infer" if parameter.default == () else None)
        return {} if chosen is None else {"schema": chosen, "missing": self.missing}

    @property
    def context(self) -> tuple[str, ...]:
        """The items of `--given`, including the label for `--conditional`."""
        label = ("label",) if self.conditional and "label" not in self.given else ()
        return (*self.given, *label)

    @property
    def preprocess(self) -> data.Preprocess:
        """The preprocessing of the library."""
        size, perturb = image_size(self.size), self.perturb
        return data.Preprocess(size=size, bits=self.bits, binarize=self.binarize, perturb=perturb)


def described_data(
    source: str | None,
    preprocess: data.Preprocess,
    reading: Reading,
    given: Sequence[str],
    of: Sequence[str] = (),
) -> dict[str, Any]:
    """The entries of config.json about how data are read; paths are absolute."""
    return {
        "source": None if source is None else data.identity(source),
        "preprocess": preprocess.to_json(),
        **dataclasses.asdict(reading),
        "given": [
            data.identity(item) if item != "label" and is_source(item) else item for item in given
        ],
        **({"of": list(of)} if of else {}),
    }


FEWEST = 20
"""The fewest pairs of a row and its context that a model is trained on."""

PARTS: tuple[data.Part, ...] = ("train", "validation", "held-out")

FROM_DATA = ("bits", "context", "schema", "support")
"""Options of builders that follow from the data."""


def builder_options(name: str) -> list[inspect.Parameter]:
    """The options of an architecture that a user can choose."""
    _, *options = inspect.signature(ARCHITECTURES[name]).parameters.values()
    return [
        p.replace(default=True) if p.name == "standardize" else p  # wherever it can be
        for p in options
        if p.name not in FROM_DATA
    ]


def add_architecture(name: str) -> None:
    """Make ``musigma train NAME`` from the signature of the builder."""
    builder, options = inspect.unwrap(ARCHITECTURES[name]), builder_options(name)
    doc, added = parse(builder.__doc__ or ""), parse(Conditioning.__doc__ or "")
    types = get_type_hints(Conditioning) | get_type_hints(builder)
    help_of = {p.arg_name: p.description or "" for p in (*added.params, *doc.params)}
    taken = {
        f.name
        for kind in (TrainConfig, TrainingData, RunFolder, Common)
        for f in dataclasses.fields(kind)
    }
    parameters = inspect.signature(train, eval_str=True).parameters
    source, shared = parameters["source"], [p for p in parameters.values() if p.kind == KEYWORD]
    chosen = []
    for p in options:
        if p.name in taken:
            raise ValueError(
                f"{p.name}: an option of {name} that `musigma train` already has; rename it"
            )
        if p.default is p.empty:
            raise ValueError(f"{p.name}: an option of {name} without a default; give it one")
        negative = f"--no-{p.name.replace('_', '-')}" if p.default is True else None
        if p.name == "standardize":
            negative = ()  # vectors always are
        option = Parameter(help=help_of.get(p.name, ""), group=MODEL, negative=negative)
        chosen.append(p.replace(annotation=Annotated[types.get(p.name, str), option]))

    def command(source: str | None = None, **given: Any) -> None:
        train(name, source, **given)

    command.__signature__ = inspect.Signature([source, *chosen, *shared])  # pyright: ignore
    command.__doc__ = f"{doc.short_description or name}\n\n{doc.long_description or ''}"
    command.__annotations__ = {}
    train_app.command(command, name=name)


KEYWORD = inspect.Parameter.KEYWORD_ONLY


NAMED: set[str] = set()
"""Names of the options on the command line, also of those that are given their defaults."""


def prepare_words(words: list[str]) -> list[str]:
    """Register the architectures and plugins that the words name, before they are parsed.

    In training, a FILE.py:NAME in place of an architecture, or of what a registry holds (an
    embedding, a posterior), becomes its name.
    """
    NAMED.clear()
    NAMED.update(w[2:].partition("=")[0].replace("-", "_") for w in words if w[:2] == "--")
    for i, (word, after) in enumerate(zip(words, [*words[1:], ""], strict=True), 1):
        if word == "--plugin":
            plugins.register(after)
        option = word[2:].replace("-", "_") if words[0] == "train" and word[:2] == "--" else ""
        registry = REGISTRIES.get(option)
        if registry is not None and ".py:" in after:
            words = [*words[:i], plugins.register_all(after, registry), *words[i + 1 :]]
    if words[0] != "train":
        return words
    if len(words) > 1 and ".py:" in words[1]:
        words = [words[0], plugins.register(words[1]), *words[2:]]
    elif len(words) > 1 and not words[1].startswith("-") and words[1] not in ARCHITECTURES:
        build(words[1], ())  # raises, and suggests the nearest
    for name in ARCHITECTURES:
        if name not in train_app:
            add_architecture(name)
    return words


@train_app.default
def resume_training(
    *,
    resume: Annotated[Path | None, Parameter(group=FIRST)] = None,
    energy: Annotated[str | None, Parameter(group=DATA)] = None,
    common: Common = Common(),
) -> None:
    """Train a model (`musigma train ARCH DATA`), or continue a run (`--resume RUN`).

    Args:
        resume: Continue this run with its saved configuration.
        energy: FILE.py:NAME of the log density of the run, if it is trained by one.
    """
    if resume is None:
        raise ValueError(
            "train: give an architecture and data, `musigma train ARCH DATA`, or --resume RUN"
        )
    continue_run(resume, common, energy=energy)


def continue_run(
    folder: Path, common: Common, source: str | None = None, energy: str | None = None
) -> None:
    """Continue from the state in a run folder; `source` is where its data are now.

    `energy` is where the log density is now. A run never says which file to execute.
    """
    device_named(common.device)
    join(common.device)
    if folder.is_dir():
        saved_state(folder)
    try:
        saved = json.loads((folder / "config.json").read_text())
        name, about = saved["model"]["architecture"], saved["data"]
        text = saved["train"].get("objective")
        named = [part.split()[0] for part in (text or "elbo").split(" + ")]
        objective = next((n for n in named if n not in OBJECTIVES), None)
        config = TrainConfig(**saved["train"]) if objective is None else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"resume: {folder} does not hold a readable config.json ({reason})"
        ) from error
    if config is None or name not in ARCHITECTURES:
        kind, name = ("architecture", name) if config else ("objective", objective)
        raise ValueError(
            f"resume: {folder} has the {kind} {name!r}, which is not built in; give the file that "
            f"defines it (--plugin FILE.py:{str(name).replace('-', '_')})"
        )
    if common.seed not in (Common().seed, config.seed):
        raise ValueError(f"seed: the run began with {config.seed} and keeps it; leave --seed out")
    common = dataclasses.replace(common, seed=config.seed)
    screen = Screen(common)
    preprocess = data.Preprocess.from_json(about.get("preprocess", {}))
    reading = Reading(skip_bad=about.get("skip_bad", False), in_memory=about.get("in_memory"))
    chosen: dict[str, Any] = {n: tuple(about.get(n, ())) for n in ("given", "of")}
    chosen["unlabeled"] = getattr(ARCHITECTURES[name], "partly_labeled", False)
    schema = saved["model"].get("schema")
    typed = {} if schema is None else {"schema": Schema.from_json(schema)}
    if (energy is None) != ("energy" not in about):
        what = "was not trained by a density; leave --energy out"
        if energy is None:
            what = "is trained by a density; give the function (--energy FILE.py:NAME)"
        raise ValueError(f"energy: {folder} {what}")
    log_density = None if energy is None else density(energy)
    if (source := source or about["source"]) is None:
        found = start_rows(spec_of(saved["model"]))
    else:
        found = read_data(source, preprocess, reading, screen, **chosen, **typed)
    if len(found) != about["n"] or list(found.shape) != about["shape"]:
        raise ValueError(
            f"resume: {about['source']} had {about['n']} examples of shape {about['shape']} when "
            f"the run began; now it has {len(found)} of {list(found.shape)}"
        )
    if about.get("digest") not in (None, data.digest(found)):
        raise ValueError(
            f"resume: the examples or labels of {about['source']} have changed since the run "
            "began; train a new run, with another --out or --overwrite"
        )
    model = checkpoint.rebuild(saved["model"], {"data": about})
    model.to(getattr(torch, saved.get("dtype", "float32")))
    threads.choose(saved.get("threads"))
    run(model, found, config, folder, saved, screen, log_density, resume=True)


def finetune(
    start: Run,
    source: Source,
    *,
    given: Annotated[tuple[str, ...], Parameter(group=DATA)] = (),
    observed: Annotated[Path | None, Parameter(group=DATA)] = None,
    reading: Reading = Reading(),
    folder: RunFolder = RunFolder(),
    config: TrainOptions = TrainConfig(),
    common: Common = Common(),
) -> None:
    """Train a model further, on other data or with another objective, as a new run.

    Args:
        given: Context of each example, if the model is conditioned on it, as in `train`. By
            default as in its own training.
        observed: The one observation that the simulations were proposed for, as in `train`.
    """
    trained = Trained(start, common)
    processes, name = join(common.device), trained.model.config["architecture"]
    out, _ = decided_by_main(processes, lambda: folder.choose(name, source))
    options = DataOptions(split="all", reading=reading, given=given)
    found = trained.data(source, options)
    _enough(found, source)
    of = trained.about_data.get("of", ())
    about = described_data(source, trained.preprocess, reading, trained.given, of)
    about |= _observed(observed, trained.model)
    kept = {name: trained.extra[name] for name in ("foreign",) if name in trained.extra}
    _begin(trained.model, found, about, config, out, Screen(common), kept)


def train(
    name: str,
    source: Annotated[str | None, SOURCE] = None,
    *,
    config: TrainOptions = TrainConfig(),
    reading: TrainingData = TrainingData(),
    folder: RunFolder = RunFolder(),
    common: MoreOptions = Common(),
    **options: Any,
) -> None:
    """``musigma train ARCH DATA``, with the options of the architecture."""
    device_named(common.device)
    processes = join(common.device)
    screen = Screen(common)
    target = reading.energy
    log_density = None if target is None else density(target)
    where = source or (target or reading.without_data().name).rpartition(":")[2]
    out, there = decided_by_main(processes, lambda: folder.choose(name, where))
    about = described_data(
        source, reading.preprocess, reading.reading, reading.context, reading.of
    )
    if reading.bounds is not None:
        about["bounds"] = data.read_bounds(reading.bounds)
    if there:
        defaults = {p.name: p.default for p in builder_options(name)}
        now = {
            "model": {"architecture": name, "options": options},
            "data": about,
            "train": {**dataclasses.asdict(config), "seed": common.seed},
        }
        decided_by_main(processes, lambda: refuse_other_run(out, now, defaults))
        continue_run(out, common, source, target)
        return
    typed = reading.typed(name)
    chosen = {"given": reading.context, "of": reading.of, "bounds": reading.bounds}
    chosen["unlabeled"] = getattr(ARCHITECTURES[name], "partly_labeled", False)
    if source is None:
        found = reading.without_data()
    else:
        found = read_data(source, reading.preprocess, reading.reading, screen, **chosen, **typed)
        _enough(found, source)
    chosen = [v.name for v in found.variables if v.name != "label" or "label" in reading.context]
    scored = LIKELIHOODS.get(options.get("likelihood", ""))
    counts = scored is not None and scored.data == "counts"
    plain = found.bits is None and found.schema is None and not counts
    if plain and "standardize" in inspect.signature(ARCHITECTURES[name]).parameters:
        options.setdefault("standardize", True)
    torch.manual_seed(common.seed)
    spec = found.spec(chosen)
    model = build(name, spec, **options)
    about |= _observed(reading.observed, model)
    about |= {} if target is None else {"energy": data.identity(target)}
    asked = {"options": options, "train": dataclasses.asdict(config)}
    if given_numbers(spec) and log_density is None:
        filled = {k: v for k, v in with_numbers(name, spec, options).items() if k not in options}
        config = _conditional(config, spec, len(found.split("train")), filled, screen)
    _begin(model, found, about, config, out, screen, asked=asked, log_density=log_density)


def _conditional(
    config: TrainConfig, spec: Spec, examples: int, model: Mapping[str, Any], screen: Screen
) -> TrainConfig:
    """The options of training that are not given, as they suit vectors given numbers.

    Prints them, and those of the model.
    """
    features = sum(v.shape[-1 if len(v.shape) == 2 else 0] for v in spec.context if not v.classes)
    given = {n: v for n, v in dataclasses.asdict(config).items() if n in NAMED}
    given |= given_options(config)
    config = conditional_config(examples, features, **given)
    budget = next(n for n in ("steps", "epochs", "minutes") if getattr(config, n) is not None)
    text = f"at most {getattr(config, budget):,} {budget}"
    if config.patience is not None and config.patience < config.evaluations:
        text += (
            "; ends when the validation figure has not improved for "
            f"{config.patience} of {config.evaluations} evaluations"
        )
    screen.note(text)
    training = ("batch_size", "optimizer", "lr", "weight_decay", "ema")
    chosen = {**model, **{n: getattr(config, n) for n in training if n not in given}}
    words = [
        f"--{n.replace('_', '-')} {v if isinstance(v, str) else f'{v:g}'}"
        for n, v in chosen.items()
    ]
    if words:
        screen.note(f"for vectors given numbers: {' '.join(words)}")
    return config


def _observed(source: Path | None, model: Any) -> dict[str, str]:
    """The entry of config.json about the observation that simulations were proposed for."""
    if source is None:
        return {}
    if not model.spec.context:
        raise ValueError("observed: the model is conditioned on nothing; leave it out")
    found = data.fingerprints(data.given_rows([source], model.spec.context))
    if len(found) != 1:
        raise ValueError(f"observed: expected one observation; {source} has {len(found)} rows")
    return {"observed": found[0]}


def _enough(found: data.Dataset, source: str) -> None:
    """Refuse pairs of which too few would be left to train on, and to choose weights by."""
    if found.bits is None and found.given and len(found) < FEWEST:
        raise ValueError(
            f"data: {source} holds {len(found)} rows, which are too few to train on some and "
            f"validate on others; give {FEWEST} or more"
        )


def _begin(
    model: Any,
    found: data.Dataset,
    about: Mapping[str, Any],
    config: TrainConfig,
    out: Path,
    screen: Screen,
    kept: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    log_density: LogDensity | None = None,
) -> None:
    """Write the configuration of a new run, and train it.

    `about` describes the data; checkpoints will contain `kept`. `asked` are the options as they
    were given, where others follow from the data. With a log density, the model is trained by it.
    """
    if model.spec.support is not None:
        found = found.within(model.spec.support)
    config = TrainConfig(**{**dataclasses.asdict(config), "seed": screen.common.seed})
    described = data.describe(found)
    saved = {
        "model": model.config,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "data": {
            **about,
            **{k: described[k] for k in ("n", "shape", "bits")},
            "label_names": list(found.label_names),
            "digest": data.digest(found),
            **{part: len(found.split(part)) for part in PARTS},
            **({"ranges": data.ranges(found.split("train"))} if found.given else {}),
            **({"columns": known} if (known := data.column_ranges(found.split("train"))) else {}),
        },
        "train": dataclasses.asdict(config),
        "kept": dict(kept or {}),
        **({"asked": asked} if asked else {}),
        "versions": {
            "musigma": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": threads.choose(),
    }
    trained = _by_energy(model, log_density)
    if isinstance(trained, EvidenceBound):
        check_density(trained, found.split("train"))
    check_run(trained, found.split("train"), config)
    run(model, found, config, out, saved, screen, log_density)


def _by_energy(model: Any, log_density: LogDensity | None) -> Any:
    """What is trained: the model, or its evidence bound for a density."""
    return model if log_density is None else EvidenceBound(model, log_density)


def run(
    model: Any,
    found: data.Dataset,
    config: TrainConfig,
    out: Path,
    saved: Mapping[str, Any],
    screen: Screen,
    log_density: LogDensity | None = None,
    *,
    resume: bool = False,
) -> None:
    """Train in a folder reserved for this run, then evaluate and draw pictures."""
    processes = current_processes()
    with reserved(out, processes, empty=not resume):
        parameters = sum(p.numel() for p in model.parameters())
        found = dataclasses.replace(found, counts=are_counted(model))
        parts = {part: found.split(part) for part in PARTS}
        for line in data.summary(found, parts):
            screen.note(line)
        screen.note(f"{saved['model']['architecture']} with {parameters:,} parameters")
        if processes.is_main:
            write_json(out / "config.json", saved)
        with screen.dashboard(of_pairs(model.spec)) as watch:
            done = fit(
                _by_energy(model, log_density),
                parts["train"],
                parts["validation"],
                config,
                out,
                extra={"data": saved["data"], **saved.get("kept", {})},
                device=screen.common.device,
                resume=resume,
                watch=watch,
                # other threads change the last bits of sums; runs that are exact keep their number
                stop=None if config.minutes is None or config.fast else threads.adapt,
            )
        answer = {"run": str(out), "steps": done.steps, "finished": done.finished}
        about = {"notes": list(found.notes), "left_out": list(found.skipped)}
        about |= {"data": data.describe(found, parts)}
        if done.finished:
            answer |= {"seconds": done.seconds, "skipped": done.skipped, "parameters": parameters}
            if log_density is None:
                _finish(out, parts["held-out"], screen, answer | about)
            else:
                _finish_by_energy(out, log_density, parts["held-out"], screen, answer | about)
            return
        command = f"musigma train --resume {shlex.quote(str(out))}"
        screen.note(f"stopped after {done.steps:,} steps; continue with: {command}")
        screen.result(answer | about)
        leave()
        if done.signal:
            sys.exit(128 + done.signal)


def _finish(out: Path, held_out: data.Dataset, screen: Screen, answer: dict[str, Any]) -> None:
    """Evaluate a run on the held-out part, and draw its pictures."""
    processes, seed = current_processes(), screen.common.seed
    trained = Trained(str(out), screen.common)
    with screen.progress("evaluating") as progress:
        trained.part, trained.seen = "held-out", True
        how = {"progress": progress, "processes": processes, **trained.evaluated}
        found = record(trained.model, held_out, seed=seed, **how)
    leave()
    if not processes.is_main:
        return
    found.write(out / "evaluation.json")
    write_json(out / "ledger.json", ledger(trained.model, held_out, seed=seed))
    try:
        pictures = draw(trained, held_out, out / "samples")
    except (ValueError, RuntimeError) as error:  # matplotlib is missing, or weights diverged
        pictures = []
        screen.note(f"not all pictures could be drawn: {error}")
    how = "" if trained.model.is_flow else " --mode"
    how += " --given FILE" if trained.needs_given else ""
    example = "samples.csv" if trained.spec.columns else "samples.png"
    screen.result(
        {**answer, "evaluation": found.fields, "pictures": pictures},
        f"held-out: {figure_text(found.fields, trained.of_pairs)}\nrun: {out}\n"
        f"pictures: {', '.join(pictures) or 'none'}\n"
        f"next: musigma sample {shlex.quote(str(out))} --n 64{how} --out {example}",
    )


def _finish_by_energy(
    out: Path, log_density: LogDensity, rows: data.Dataset, screen: Screen, answer: dict[str, Any]
) -> None:
    """Weigh draws of a flow that was trained by a density, and show them if they are points."""
    trained = Trained(str(out), screen.common)
    leave()
    if not current_processes().is_main:
        return
    lines: list[str] = []
    shown: dict[str, Any] = {}
    if not trained.spec.context:
        weighted = weigh(trained.model, log_density, WEIGHED)
        shown = {"evaluation": figures_of_weights(weighted)}
        lines.append(figure_lines(weighted))
        if trained.shape == (2,):
            (out / "samples").mkdir(exist_ok=True)
            path = out / "samples" / "samples.png"
            figures.points(weighted.x[:ROWS_DRAWN], path)
            shown["pictures"] = [str(path)]
    lines.append(f"run: {out}")
    lines.append(f"next: musigma importance {shlex.quote(str(out))} --energy FILE.py:NAME")
    screen.result({**answer, **shown}, "\n".join(lines))
