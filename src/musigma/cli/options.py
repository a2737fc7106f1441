"""The application, and the options that several commands share.

Neither this module nor a module that defines a command imports a heavy library at its top, so
`musigma --help` answers in less time than importing PyTorch takes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import App, Group, Parameter

from musigma import __version__


def _headings(names: str, first: int = 0) -> list[Group]:
    return [Group(name, sort_key=first + i) for i, name in enumerate(names.split(", "))]


# Headings of the list of commands, before all others
TRAIN, USE, INSPECT, CONVERT, COMPRESS, AUDIT = _headings(
    "Train, Use, Inspect, Convert, Compress, Audit", first=-6
)

# Headings of the options of a command
ARGUMENTS, FIRST, OPTIONS, MODEL, OBJECTIVE, BUDGET, DATA, HARDWARE, OUTPUT, ALWAYS = _headings(
    "Arguments, Most used, Options, Model, Objective, Budget and optimizer, Data, Hardware, "
    "Output, Every command"
)


def _default(value: Any) -> Any:
    """A default value as help shows it; None if it is an absent value or a flag that is off."""
    return None if value is None or value is False or value == () else str(value)


def application(name: str, **settings: Any) -> App:
    """An application, or a command with commands of its own."""
    return App(
        name=name,
        version=__version__,
        group_arguments=ARGUMENTS,
        group_parameters=OPTIONS,
        default_parameter=Parameter(negative="", show_default=_default),
        **settings,
    )


app = application(
    "musigma", help="Train, sample, score, edit, compress and audit VAEs and normalizing flows."
)
for flag in ("--help", "--version"):
    app[flag].group = OPTIONS


WHAT_DATA = "A folder, a file, a URL, or the name of a data set."
Run = Annotated[str, Parameter(group=ARGUMENTS, help="A run folder or a .safetensors file.")]
SOURCE = Parameter(name="data", group=ARGUMENTS, help=WHAT_DATA)
Source = Annotated[str, SOURCE]
Argument = Parameter(group=ARGUMENTS)


def at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1, by their names."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected 1 or more; got {count}")


@Parameter(name="*", group=ALWAYS)
@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command.

    Args:
        device: Device to compute on, as PyTorch names it: cpu, cuda, cuda:1, mps. By default the
            GPU if there is one.
        seed: Random seed.
        json: Print one JSON document on standard output, and nothing else.
        plugin: FILE.py:NAME of an architecture or an objective that is not built in. The file is
            executed.
        debug: Show the traceback of an error.
    """

    device: str | None = None
    seed: int = 0
    json: bool = False
    plugin: str | None = None
    debug: bool = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1; got {self.seed}")
        if self.device is not None:
            object.__setattr__(self, "device", self.device.lower())


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read.

    Args:
        skip_bad: Leave out files that cannot be read, instead of stopping.
        in_memory: Read all examples into memory, or leave images on disk. By default images stay
            on disk if they would take more than a quarter of the memory.
    """

    skip_bad: bool = False
    in_memory: Annotated[bool | None, Parameter(negative="--no-in-memory")] = None


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data that a trained model is applied to.

    Args:
        given: Context of each example, if the model is conditioned on it: `label`, a column of
            the table or a pattern of columns ('x_*'), or a file or folder with a row or image for
            each example. May be given several times. By default as in training.
        split: Part of the data to use. By default the held-out part of the data that the model was
            trained on, and all of any other data.
        size: Resize images to this size first: 32, or 48x64 (height x width). By default the size
            used in training.
        unseen: What to do about categories of a table that are not in the training data: score
            them by the probability that the model reserves for them, or refuse the data.
        reading: How data are read.
        batch_size: Number of examples per batch. For an exact density of rows, `score` takes
            1024 or more, since no figure then depends on the batch.
    """

    given: tuple[str, ...] = ()
    split: Literal["all", "train", "validation", "held-out"] | None = None
    size: str | None = None
    unseen: Literal["probability", "refuse"] = "probability"
    reading: Reading = Reading()
    batch_size: int = 64

    def __post_init__(self):
        at_least_one(batch_size=self.batch_size)

    def everything(self) -> DataOptions:
        """The same options, with all of the data as the default."""
        return dataclasses.replace(self, split=self.split or "all")


@Parameter(name="*")
@dataclass(frozen=True)
class RunOnData:
    """A run, and data to use it on."""

    run: Run
    source: Source
    options: DataOptions = DataOptions()
    common: Common = Common()


def with_headings(
    kind: type, headings: dict[Group, tuple[str, ...]], other: Group, omit: tuple[str, ...] = ()
) -> Any:
    """A dataclass as options, each under its heading; `omit` are not options."""
    types = get_type_hints(kind, include_extras=True)
    group = {name: heading for heading, names in headings.items() for name in names}
    fields = [
        (
            f.name,
            Annotated[
                types[f.name],
                Parameter(group=group.get(f.name, other), parse=False if f.name in omit else None),
            ],
            dataclasses.field(default=f.default),
        )
        for f in dataclasses.fields(kind)
    ]
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    grouped = dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), namespace=namespace, frozen=True, kw_only=True
    )
    return Annotated[grouped, Parameter(name="*")]


def numbers(
    text: str, option: str, expected: str, *, by: str = ",", kind: type = int, least: float = 0
) -> tuple[Any, ...]:
    """The numbers that a text such as 3x32x32 or 0.7,0.8 lists, none of them below `least`."""
    try:
        values = tuple(kind(word) for word in text.lower().split(by))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) and value >= least for value in values):
        raise ValueError(f"{option}: expected {expected}; got {text!r}")
    return values


def image_size(size: str | None) -> int | tuple[int, int] | None:
    """The size that 32 or 48x64 stands for."""
    if size is None:
        return None
    expected = "a side such as 32, or height x width such as 48x64"
    height, *width = numbers(size, "size", expected, by="x", least=1)
    if len(width) > 1:
        raise ValueError(f"size: expected {expected}; got {size!r}")
    return (height, width[0]) if width else height


def temperatures(text: str) -> tuple[float, ...]:
    """One number, or one for each latent: 0.7, or 0.7,0.8,1."""
    return numbers(text, "temperature", "numbers from 0, such as 0.7 or 0.7,0.8,1", kind=float)


def latent_numbers(text: str | None) -> list[int] | None:
    """The numbers of latents, top first: 0,1."""
    expected = "numbers separated by commas, such as 0,1"
    return None if text is None else list(numbers(text, "levels", expected))
