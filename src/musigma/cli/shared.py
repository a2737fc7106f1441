"""What commands share: options, where they talk to, and a trained model opened for use."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect as python
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from musigma.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command.

    Args:
        json: Print one JSON document, and nothing else, on standard output.
        seed: Of everything random.
        device: As torch names it: cpu, cuda, mps; by default the best there is.
        plugin: FILE.py:NAME of an architecture that is not in the zoo. The file is run.
        debug: Show the traceback of an error.
    """

    json: Annotated[bool, Parameter(negative="")] = False
    seed: int = 0
    device: str | None = None
    plugin: str | None = None
    debug: Annotated[bool, Parameter(negative="")] = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1; got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read.

    Args:
        skip_bad: Leave out images that cannot be used, instead of stopping.
        in_memory: Read all examples into memory, or leave images on disk; by default what takes
            more than a quarter of the memory stays there.
    """

    skip_bad: Annotated[bool, Parameter(negative="")] = False
    in_memory: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data a trained model is given, and how.

    Args:
        split: Which part: all, train, validation or held-out. By default the held-out part of
            the data that the model was trained on, and all of any other; score and inspect take
            all of either.
        size: Bring images to this size first: 32, or 48x64 (height x width); by default as in
            training.
        reading: How data are read.
        batch_size: Examples at a time.
    """

    split: Literal["all", "train", "validation", "held-out"] | None = None
    size: str | None = None
    reading: Annotated[Reading, Parameter(name="*")] = Reading()
    batch_size: int = 64

    def __post_init__(self):
        at_least_one(batch_size=self.batch_size)


def sides(text: str, option: str, example: str) -> tuple[int, ...]:
    """The numbers of 3x32x32."""
    found = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if not all(found):
        raise ValueError(f"{option}: expected {example}; got {text!r}")
    return tuple(found)


def pixels(size: str | None) -> int | tuple[int, int] | None:
    """The size that 32, or 48x64, stands for."""
    if size is None:
        return None
    expected = "a side, as 32, or height x width: 48x64"
    height, *width = sides(size, "size", expected)
    if len(width) > 1:
        raise ValueError(f"size: expected {expected}; got {size!r}")
    return (height, width[0]) if width else height


def at_least_one(**counts: int) -> None:
    """Refuse counts below 1, by their names."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected 1 or more; got {count}")


CommonOptions = Annotated[Common, Parameter(name="*")]
Data = Annotated[DataOptions, Parameter(name="*")]
USUAL, USUAL_DATA = Common(), DataOptions()


def told() -> Processes:
    """Which process of how many this is, as a launcher says it in the environment.

    Raises:
        ValueError: If what it says cannot be.
    """
    words = [os.environ.get(*usual) for usual in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    rank, count = (int(word) if word.isdecimal() else -1 for word in words)
    if not 0 <= rank < count:
        raise ValueError(
            f"RANK, WORLD_SIZE: expected a number from 0 and a larger one; got {words[0]!r} and "
            f"{words[1]!r}; let a launcher set both, or unset them"
        )
    return Processes(rank, count)


class Screen:
    """Where a command talks: to people, or, with --json, to a program.

    Of several processes the main one does.
    """

    def __init__(self, common: Common):
        from rich.console import Console

        self.common, self.main = common, told().is_main
        quiet = common.json or not self.main
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False)

    def result(self, value: dict[str, Any], text: str = "") -> None:
        """The command's answer: JSON if asked for, the text otherwise, on standard output."""
        from musigma.files import finite

        if not self.main:
            return
        print(json.dumps(finite(value), indent=2) if self.common.json else text)

    @contextmanager
    def progress(self, what: str):
        """A progress bar that is updated by ``(done, total)``, and a note if there is one."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn())
        if self.console.quiet or not self.console.is_terminal:
            yield None
            return
        with Progress(
            *columns,
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, note="": bar.update(
                task, completed=done, total=total, description=f"{what} {note}".strip()
            )


def read(
    source: str, treat: Any, reading: Reading, screen: Screen, *, allow_constant: bool = False
) -> Any:
    """A data set, with progress; what was left out, and what else there is to know, is told."""
    from musigma import data

    with screen.progress("reading") as progress:
        found = data.load(
            source,
            preprocess=treat,
            skip_bad=reading.skip_bad,
            in_memory=reading.in_memory,
            allow_constant=allow_constant,
            progress=progress,
        )
    for name in found.skipped:
        screen.say(f"skipped {name}: it cannot be used")
    for note in found.notes:
        screen.say(note)
    return found


class Trained:
    """A run folder or a checkpoint file, opened for use."""

    def __init__(self, run: str, common: Common):
        import torch

        from musigma import checkpoint

        self.device = device_named(common.device)
        if common.plugin:
            register_plugin(common.plugin)
        path = Path(run)
        self.folder, self.part = path if path.is_dir() else None, "all"
        if self.folder and not (path / "model.safetensors").is_file():
            raise ValueError(
                f"RUN: the folder {run} holds no model.safetensors; train one into it"
            )
        if not path.exists():
            raise ValueError(f"RUN: there is no run folder or checkpoint file {run}")
        if path.suffix == ".mus":
            raise ValueError(f"RUN: {run} holds data, not a model; see `musigma inspect {run}`")
        self.path = path / "model.safetensors" if self.folder else path
        self.model, self.extra = checkpoint.read(self.path)
        self.model.to(self.device)
        self.common = common
        torch.manual_seed(common.seed)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.model.config["shape"])

    @property
    def dtype(self) -> Any:
        """The type that the model computes in."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return next(t.dtype for t in tensors if t.is_floating_point())

    @property
    def bits(self) -> int | None:
        """Bits of each element; None for continuous data."""
        return self.model.config["options"].get("bits", 8)

    @property
    def levels(self) -> int:
        """Levels of each element, for pictures."""
        return 2 ** (self.bits or 8)

    def data(self, source: str, options: DataOptions, screen: Screen, label: str | None = None):
        """Data treated as those that the model was trained on; all of one class, if told."""
        import numpy as np

        from musigma import data
        from musigma.evaluation import check

        saved = self.extra.get("data", {})
        prepare = data.Preprocess.from_json(saved.get("preprocess", {}))
        if options.size is not None:
            prepare = dataclasses.replace(prepare, size=pixels(options.size))
        loaded = read(source, prepare, options.reading, screen, allow_constant=True)
        names = saved.get("label_names")
        found = loaded
        if label is not None:
            classes = self._classes()
            number = np.full(len(found), class_number(label, names or [], classes), np.int64)
            known = tuple(names or map(str, range(classes)))
            found = dataclasses.replace(found, labels=number, label_names=known)
        check(self.model, found)
        same = data.digest(loaded) == saved.get("digest")
        here, there = data.identity(source), saved.get("source")
        own = same or (there is not None and Path(here).is_relative_to(there))
        if here == there and not same and saved.get("digest"):
            screen.say(f"{source} has changed since this model was trained on it")
        self.part = options.split or ("held-out" if own else "all")
        return found.split(self.part)

    def examples(
        self,
        source: str,
        options: DataOptions,
        screen: Screen,
        n: int,
        label: str | None = None,
    ):
        """The first n examples of the data, with their context."""
        import numpy as np

        from musigma.evaluation import batch

        at_least_one(n=n)
        found = self.data(source, options, screen, label)
        return batch(found, np.arange(min(n, len(found))), self.model, seed=self.common.seed)

    def context(self, n: int, label: str | None):
        """One-hot rows for n samples of a class, or of all classes in turn; None without any."""
        import torch

        from musigma.evaluation import context_size

        if label is None and not context_size(self.model):
            return None
        classes = self._classes()
        if label is None:
            which = torch.arange(n) % classes
        else:
            names = self.extra.get("data", {}).get("label_names") or []
            which = torch.full((n,), class_number(label, names, classes))
        return torch.nn.functional.one_hot(which, classes).to(self.device, self.dtype)

    def latents(self) -> list[Any]:
        """The latents of no examples, top first: tensors of shapes (0, *s)."""
        import torch

        blank = torch.zeros(1, *self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return [z[:0] for z in self.model.encode(blank, self.context(1, None))]

    def _classes(self) -> int:
        """How many classes the model is conditioned on; refuses one that is not."""
        from musigma.evaluation import context_size

        classes = context_size(self.model)
        if not classes:
            raise ValueError("label: this model is not conditioned on classes; leave it out")
        return classes

    def check_out(self, out: Path) -> None:
        """Refuse a file that `write` could not write, before anything is computed for it."""
        check_out(out, ".png", ".npy", ".npz")
        if out.suffix == ".png" and len(self.shape) != 3 and self.shape != (2,):
            raise ValueError(
                f"out: examples of shape {self.shape} are no picture; name a .npy or .npz file"
            )

    def write_rows(self, rows: Any, out: Path) -> None:
        """Rows of examples (R, C, *event) as a picture of so many columns, or as an array."""
        if out.suffix == ".png":
            self.write(rows.flatten(0, 1), out, columns=rows.shape[1])
        else:
            self.write(rows, out)

    def write(self, x: Any, out: Path, columns: int | None = None) -> None:
        """Examples as a picture, or as an array, by the suffix of the file."""
        import numpy as np

        from musigma.files import replacing
        from musigma.report import figures

        self.check_out(out)
        values = x.detach().cpu().numpy()
        one = math.prod(values.shape[1:])
        if bad := int((~np.isfinite(values.reshape(len(values), one)).all(1)).sum()):
            raise ValueError(
                f"out: {bad} of {len(values)} examples are not finite, so nothing "
                "is written; a lower --temperature (of edit: a smaller --strength) may help"
            )
        if self.bits is not None:
            values = values.astype(np.uint8)
        if out.suffix == ".png":
            if len(self.shape) == 3:
                figures.grid(values, out, levels=self.levels, columns=columns)
            else:
                figures.points(values, out)
            return
        with replacing(out) as draft, draft.open("wb") as file:
            if out.suffix == ".npy":
                np.save(file, values)
            else:
                np.savez_compressed(file, x=values)


def class_number(label: str, names: Sequence[str], classes: int) -> int:
    """A class by its name, or else by its number."""
    if label in names:
        return list(names).index(label)
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f", or one of {', '.join(names)}" if names else ""
    raise ValueError(f"label: expected 0 to {classes - 1}{known}; got {label!r}")


def best_device() -> str:
    """Cuda or mps where there is one, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_named(name: str | None) -> Any:
    """The device of a name, or the best one; refuses one that is not there."""
    import torch

    try:
        device = torch.device(name or best_device())
        if device == torch.device("cuda") and (own := os.environ.get("LOCAL_RANK")):
            device = torch.device("cuda", int(own) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def check_out(out: Path, *suffixes: str) -> None:
    """Refuse a file of another kind, or in a folder that does not exist."""
    if out.suffix not in suffixes:
        kinds = ", ".join(suffixes[:-1]) + " or " * (len(suffixes) > 1) + suffixes[-1]
        raise ValueError(f"out: expected a {kinds} file; got {out}")
    if out.is_dir() or not out.parent.is_dir():
        reason = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"out: {out} cannot be written: {reason}")


def register_plugin(spec: str) -> str:
    """Run FILE.py and make its function NAME an architecture; returns NAME."""
    from musigma.zoo import ARCHITECTURES, architecture

    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"plugin: expected FILE.py:NAME of a file that exists; got {spec!r}")
    path = path.resolve()
    if name in ARCHITECTURES and _defined_in(ARCHITECTURES[name]) == str(path):
        return name
    loading = importlib.util.spec_from_file_location(f"musigma_plugin_{path.stem}", path)
    if loading is None or loading.loader is None:
        raise ValueError(f"plugin: {path} is no Python file")
    module = importlib.util.module_from_spec(loading)
    sys.modules[loading.name] = module
    try:
        loading.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"plugin: {path} fails: {type(error).__name__}: {error}") from error
    builder: Any = getattr(module, name, None)
    if not callable(builder):
        have = [n for n, v in vars(module).items() if python.isfunction(v) and n[0] != "_"]
        raise ValueError(f"plugin: {path} defines no function {name!r}; it has {', '.join(have)}")
    if ARCHITECTURES.get(name) is not builder:
        if name in ARCHITECTURES:
            raise ValueError(f"plugin: the zoo has a {name!r} already; rename the function")
        architecture(builder)  # pyright: ignore[reportArgumentType]
    return name


def _defined_in(function: Any) -> str:
    return python.unwrap(function).__code__.co_filename


def said(figure: dict[str, Any]) -> str:
    """A figure with its error, its kind and its size, as a line."""
    bound = {"exact": "exact"}.get(figure["bound"], f"upper bound, {figure['bound']}")
    error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
    bits, nats = (math.nan if figure[n] is None else figure[n] for n in ("bits_per_dim", "nats"))
    return (
        f"{bits:.4f}{error} bits/dim, {nats:.2f} nats per example ({bound}; n = {figure['n']:,})"
    )


def as_levels(x: Any) -> Any:
    """A tensor of examples as an array on the CPU."""
    return x.detach().cpu().numpy()
