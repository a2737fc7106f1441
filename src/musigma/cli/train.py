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
from musigma.cli.options import (
    ALWAYS,
    BUDGET,
    DATA,
    FIRST,
    HARDWARE,
    MODEL,
    OBJECTIVE,
    OUTPUT,
    Common,
    DataOptions,
    Reading,
    Run,
    Source,
    application,
    image_size,
    with_headings,
)
from musigma.cli.runs import RunFolder, decided_by_main, refuse_other_run, reserved
from musigma.cli.screen import Screen, figure_text
from musigma.cli.threads import Threads
from musigma.cli.trained import Trained, device_named, of_pairs, read_data
from musigma.data.attach import is_source
from musigma.evaluation import batch, evaluate, ledger
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
from musigma.zoo import ARCHITECTURES, Conditioning, build, given_numbers, with_numbers

ROWS_DRAWN, COLUMNS_DRAWN = 2000, 24  # of a table, in pictures

threads = Threads()
train_app = application("train", group_commands=Group("Architectures", sort_key=-1))

if TYPE_CHECKING:
    import numpy as np

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
            times. Others are left out, unless they are given. By default all that are not given.
        given: Context of each example, to condition the model on: `label`, a column of the table
            or a pattern of columns ('x_*'), or a file or folder with a row or image for each
            example. May be given several times.
        bits: Bits of each channel of an image, 1 to 8.
        binarize: Make images black and white: at a threshold, or by a new draw at each step.
        conditional: Short for `--given label`.
        bounds: A file that says where the columns of a table lie (prior.toml): a table [bounds] of
            name = [low, high]; before it, positive = ["a", "b"], and lists of groups, simplex =
            [["a", "b", "c"]] and ordered = [["d", "e"]]. The model has no density outside. Rows
            outside are refused.
        observed: A file with the one observation that the simulations were proposed for (musigma
            propose). The run answers for it alone, and commands warn of others.
        schema: Types of the columns of a table: the path of a schema file, as `musigma schema`
            writes it; `infer`: from the data; `none`: plain numbers. By default inferred if the
            architecture takes types.
        missing: Missing values of a typed table have a probability of their own (model), or are
            left out of the density (ignore). A schema file says it by column.
        reading: How data are read.
    """

    size: Annotated[str | None, Parameter(group=FIRST)] = None
    of: Annotated[tuple[str, ...], Parameter(group=FIRST)] = ()
    given: Annotated[tuple[str, ...], Parameter(group=FIRST)] = ()
    bits: int = 8
    binarize: Literal["threshold", "dynamic"] | None = None
    conditional: bool = False
    bounds: Path | None = None
    observed: Path | None = None
    schema: str | None = None
    missing: Literal["model", "ignore"] = "model"
    reading: Reading = Reading()

    def typed(self, name: str, source: str) -> dict[str, Any]:
        """How the columns of a table are typed, for an architecture."""
        parameters = inspect.signature(ARCHITECTURES[name]).parameters
        parameter = parameters.get("schema")
        if self.bounds is not None and "support" not in parameters:
            raise ValueError(f"bounds: {name} takes none; leave them out, or train nsf or maf")
        if self.bounds is not None and self.schema not in (None, "none"):
            raise ValueError("bounds: they are for plain numbers; leave --bounds or --schema out")
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
        size = image_size(self.size)
        return data.Preprocess(size=size, bits=self.bits, binarize=self.binarize)


def described_data(
    source: str,
    preprocess: data.Preprocess,
    reading: Reading,
    given: Sequence[str],
    of: Sequence[str] = (),
) -> dict[str, Any]:
    """The entries of config.json about how data are read; paths are absolute."""
    return {
        "source": data.identity(source),
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

    def command(source: str, **given: Any) -> None:
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

    A FILE.py:NAME in place of an architecture, or of what a registry holds (an embedding), becomes
    its name.
    """
    NAMED.clear()
    NAMED.update(w[2:].partition("=")[0].replace("-", "_") for w in words if w[:2] == "--")
    for i, (word, after) in enumerate(zip(words, [*words[1:], ""], strict=True), 1):
        if word == "--plugin":
            plugins.register(after)
        registry = REGISTRIES.get(word[2:].replace("-", "_")) if word[:2] == "--" else None
        if registry is not None and ".py:" in after:
            target, *options = after.split()
            replaced = " ".join([plugins.register(target, registry), *options])
            words = [*words[:i], replaced, *words[i + 1 :]]
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
    common: Common = Common(),
) -> None:
    """Train a model (`musigma train ARCH DATA`), or continue a run (`--resume RUN`).

    Args:
        resume: Continue this run with its saved configuration.
    """
    if resume is None:
        raise ValueError(
            "train: give an architecture and data, `musigma train ARCH DATA`, or --resume RUN"
        )
    continue_run(resume, common)


def continue_run(folder: Path, common: Common, source: str | None = None) -> None:
    """Continue from the state in a run folder; `source` is where its data are now."""
    device_named(common.device)
    join(common.device)
    if folder.is_dir():
        saved_state(folder)
    try:
        saved = json.loads((folder / "config.json").read_text())
        name, about = saved["model"]["architecture"], saved["data"]
        if (objective := saved["train"].get("objective")) in (None, *OBJECTIVES):
            config = TrainConfig(**saved["train"])
        else:
            config = None
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
    chosen = {"given": tuple(about.get("given", ())), "of": tuple(about.get("of", ()))}
    schema = saved["model"].get("schema")
    typed = {} if schema is None else {"schema": Schema.from_json(schema)}
    found = read_data(source or about["source"], preprocess, reading, screen, **chosen, **typed)
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
    run(model, found, config, folder, saved, screen, resume=True)


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
    source: Source,
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
    out, there = decided_by_main(processes, lambda: folder.choose(name, source))
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
        continue_run(out, common, source)
        return
    typed = reading.typed(name, source)
    chosen = {"given": reading.context, "of": reading.of, "bounds": reading.bounds}
    found = read_data(source, reading.preprocess, reading.reading, screen, **chosen, **typed)
    _enough(found, source)
    chosen = [v.name for v in found.variables if v.name != "label" or "label" in reading.context]
    plain = found.bits is None and found.schema is None
    if plain and "standardize" in inspect.signature(ARCHITECTURES[name]).parameters:
        options.setdefault("standardize", True)
    torch.manual_seed(common.seed)
    spec = found.spec(chosen)
    model = build(name, spec, **options)
    about |= _observed(reading.observed, model)
    asked = {"options": options, "train": dataclasses.asdict(config)}
    if given_numbers(spec):
        filled = {k: v for k, v in with_numbers(name, spec, options).items() if k not in options}
        config = _conditional(config, spec, len(found.split("train")), filled, screen)
    _begin(model, found, about, config, out, screen, asked=asked)


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
) -> None:
    """Write the configuration of a new run, and train it.

    `about` describes the data; checkpoints will contain `kept`. `asked` are the options as they
    were given, where others follow from the data.
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
    check_run(model, found.split("train"), config)
    run(model, found, config, out, saved, screen)


def run(model, found, config, out: Path, saved, screen: Screen, *, resume: bool = False) -> None:
    """Train in a folder reserved for this run, then evaluate and draw pictures."""
    processes = current_processes()
    with reserved(out, processes, empty=not resume):
        parameters = sum(p.numel() for p in model.parameters())
        parts = {part: found.split(part) for part in PARTS}
        for line in data.summary(found, parts):
            screen.note(line)
        screen.note(f"{saved['model']['architecture']} with {parameters:,} parameters")
        if processes.is_main:
            write_json(out / "config.json", saved)
        with screen.dashboard(of_pairs(model.spec)) as watch:
            done = fit(
                model,
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
            _finish(out, parts["held-out"], screen, answer | about)
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
        figure = evaluate(
            trained.model, held_out, seed=seed, progress=progress, processes=processes
        )
    leave()
    if not processes.is_main:
        return
    write_json(out / "evaluation.json", figure)
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
        {**answer, "evaluation": figure, "pictures": pictures},
        f"{figure_text(figure, trained.of_pairs)}\nrun: {out}\n"
        f"pictures: {', '.join(pictures) or 'none'}\n"
        f"next: musigma sample {shlex.quote(str(out))} --n 64{how} --out {example}",
    )


def draw(trained: Trained, held_out: data.Dataset, folder: Path) -> list[str]:
    """Samples, reconstructions and interpolations as pictures, where they can be drawn."""
    import numpy as np

    model, typed = trained.model, trained.spec.schema is not None
    folder.mkdir(exist_ok=True)
    x, context = batch(held_out, np.arange(min(16, len(held_out))), model)
    some = np.random.default_rng(0).permutation(len(held_out))[:ROWS_DRAWN]
    some = some if typed else np.arange(64) % len(held_out)
    if trained.needs_given or (typed and trained.spec.context):  # the context of examples
        by = batch(held_out, some, model)[1]
    else:
        by = trained.context(len(some))
    if typed:
        samples = model.sample(len(some), by).numpy(force=True)
        return _draw_table(samples, held_out.take(some), trained, folder)
    samples = model.sample(64, by, mode=True)
    paths = [folder / f"{name}.png" for name in ("samples", "reconstructions", "interpolations")]
    if not trained.is_image:
        if trained.shape != (2,):
            return []
        figures.points(samples, paths[0], reference=held_out.x[:2000])
        return [str(paths[0])]
    trained.write(samples, paths[0])
    trained.reconstruct(x, context, paths[1])
    if len(x) > 1:
        trained.interpolate(x, context, paths[2])
    return [str(path) for path in paths[: 3 if len(x) > 1 else 2]]


def _draw_table(
    samples: np.ndarray, real: np.ndarray, trained: Trained, folder: Path
) -> list[str]:
    """Columns of samples over those of held-out rows, and the associations of their pairs."""
    from musigma.comparison import marginal, pairs
    from musigma.report import tables

    schema = trained.spec.schema
    assert schema is not None
    schema = Schema(schema.columns[:COLUMNS_DRAWN])
    paths = folder / "marginals.png", folder / "associations.png"
    shown = [marginal(real[:, j], samples[:, j], c) for j, c in enumerate(schema.columns)]
    tables.marginals(shown, paths[0])
    if len(schema) < 2:
        return [str(paths[0])]
    found = pairs(real, samples, schema)
    panels = {"held-out rows": found.real, "samples": found.synthetic}
    tables.matrices(found.names, panels, paths[1])
    return [str(path) for path in paths]
