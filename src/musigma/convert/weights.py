"""Taking tensors out of a foreign state dict one by one, with a list of every difference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from musigma.convert.reading import ForeignError, printable, read_json
from musigma.gaussian import Format
from musigma.model import Model
from musigma.zoo import build

__all__ = ["Family", "Options", "Tensors", "Weights", "any_of", "holds", "is_count"]

LARGEST_SIDE = 16_384

T = TypeVar("T")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Properties of a model that some checkpoints do not determine.

    Args:
        size: (height, width) of the images.
        bits: Bits of each element of the data; None: the default of the original's code.
        format: How the scale of q(z | x) is read, in the words of `Format`: `log_var`, `log_std`,
            `softplus`, ...
        permutation: For a Glow without 1x1 convolutions: `reverse`, or the order of every step.
        labels: For a Glow's classifier: `softmax` for one label each, `sigmoid` for several.
        std: Standard deviation of p(x | z), where the original has no likelihood.
        groups: Groups of the group normalizations.

    Raises:
        ValueError: For a value that is out of range.
    """

    size: tuple[int, int] | None = None
    bits: int | None = None
    format: str | None = None
    permutation: str | Sequence[Sequence[int]] | None = None
    labels: str | None = None
    std: float | None = None
    groups: int | None = None

    def __post_init__(self):
        for side in self.size or ():
            if not 1 <= side <= LARGEST_SIDE:
                raise ValueError(f"size: expected 1 to {LARGEST_SIDE:,}; got {side}")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits: expected 1 to 8; got {self.bits}")
        if self.format is not None:
            Format.parse(f"two-heads {self.format}")
        if self.labels not in (None, "softmax", "sigmoid"):
            raise ValueError(f"labels: expected 'softmax' or 'sigmoid'; got {self.labels!r}")
        if self.std is not None and not 0 < self.std < math.inf:
            raise ValueError(f"std: expected a positive number; got {self.std}")
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups: expected 1 or more; got {self.groups}")

    def given(self) -> list[str]:
        """The names of the options that are not None."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


class Weights:
    """Named tensors that a converter takes out one by one, and the differences it finds.

    A tensor that is missing, of another shape or type, or not finite is noted, and zeros are
    returned in its place, so that `finish` names all differences at once. Converters call `finish`
    before they build a model, so that a size in a file is used only if its tensors confirm it.

    Args:
        tensors: By name.
        path: The file, for messages.
        notes: Notes for the user: how the file was read, and what was assumed.

    Attributes:
        kind: The family that the tensors are taken for.
        nearest: The known format that they are most like.
    """

    kind = nearest = ""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path, notes: list[str]):
        self.tensors, self.path, self.notes = dict(tensors), path, notes
        self.elements = sum(t.numel() for t in self.tensors.values())
        self.problems: dict[str, None] = {}
        self.left = set(self.tensors)

    def beside(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file next to the weights; None if there is none."""
        return read_json(self.path.parent / name)

    def share(self, family: Family) -> float:
        """The share of the names that a family knows, of all that it does not ignore: 0 to 1."""
        known, ignored = any_of(family.names), any_of(family.ignored)
        asked = [name for name in self.tensors if not ignored.fullmatch(name)]
        return sum(bool(known.fullmatch(name)) for name in asked) / max(1, len(asked))

    def unknown(self, family: Family) -> list[str]:
        """The names that a family neither knows nor ignores."""
        known = any_of((*family.names, *family.ignored))
        return [name for name in self.tensors if not known.fullmatch(name)]

    def ignore(self, names: Iterable[str]) -> None:
        """Ignore names that match a regular expression."""
        known = any_of(names)
        self.left = {name for name in self.left if not known.fullmatch(name)}

    def assume(self, option: str, given: T | None, default: T, why: str) -> T:
        """The value of an option: as given, or a default, which is noted with its reason."""
        if given is not None:
            return given
        text = "x".join(map(str, default)) if isinstance(default, tuple) else default
        self.notes.append(f"{option}: took {text}, {why} (--{option} for another)")
        return default

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def any(self, prefix: str) -> bool:
        """Whether a tensor's name begins with the prefix."""
        return any(name.startswith(prefix) for name in self.tensors)

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that a regular expression's one group matches in the names, ascending."""
        matches = (re.fullmatch(pattern, name) for name in self.tensors)
        return sorted({int(match[1]) for match in matches if match and len(match[1]) < 7})

    def size(self, name: str, axis: int) -> int:
        """The length of an axis of a tensor; a `ForeignError` if it has none."""
        shape = tuple(self.tensors[name].shape) if name in self else ()
        if not (-len(shape) <= axis < len(shape) and shape[axis]):
            got = f"has shape {shape}" if name in self else "is missing"
            raise ForeignError(f"{self.path}: {name} {got}, so the model's size is unknown")
        return shape[axis]

    def take(self, name: str, *shape: int, integer: bool = False) -> Tensor:
        """A tensor in float64, of a given shape; of integers where `integer` is true."""
        if math.prod(shape) > self.elements:
            self.refuse(f"{name} should have shape {shape}, which is more than the file holds")
            self.finish()
        nothing = torch.zeros((), dtype=torch.float64).expand(shape)
        if name not in self:
            self.refuse(f"{name} is missing")
            return nothing
        self.left.discard(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            self.refuse(f"{name} has shape {tuple(tensor.shape)} and not {shape}")
            return nothing
        if tensor.is_complex() or tensor.is_floating_point() == integer:
            kind = str(tensor.dtype).removeprefix("torch.")
            self.refuse(f"{name} is {kind} and not {'integer' if integer else 'floating'}")
            return nothing
        tensor = tensor.detach().double()
        if not bool(tensor.isfinite().all()):
            self.refuse(f"{name} holds values that are not finite")
        return tensor

    def linear(self, name: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer."""
        return self.take(f"{name}.weight", outputs, inputs), self.take(f"{name}.bias", outputs)

    def refuse(self, reason: str) -> None:
        """Note a difference, once."""
        self.problems[reason] = None

    def finish(self) -> None:
        """Raise a `ForeignError` of the first five differences, and of tensors that are left."""
        wrong = [*self.problems, *(f"{name} is not part of it" for name in sorted(self.left))]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ForeignError(
                f"{self.path}: not a checkpoint of {self.kind} that can be converted: "
                f"{'; '.join(map(printable, wrong[:5]))}{more}. The nearest known format is "
                f"{self.nearest}"
            )

    def model(
        self, architecture: str, shape: Sequence[int], tensors: Tensors, **options: Any
    ) -> Model:
        """A model of the zoo in float64 with these tensors, once `finish` has passed.

        Names omit the prefix `prior.` of a model below its dequantization. Parameters
        that are not named keep their first values.
        """
        self.finish()
        model = build(architecture, shape, **options).double()
        own = model.state_dict()
        below = "" if tensors.keys() <= own.keys() else "prior."
        model.load_state_dict(own | {below + name: tensor for name, tensor in tensors.items()})
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating type among the tensors."""
        present = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        widths = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return next((dtype for dtype in widths if dtype in present), torch.float32)

    def narrowest(self, model: nn.Module) -> torch.dtype:
        """The source's type, float32 at least, if it holds the model's numbers; else float64."""
        narrow = torch.promote_types(self.dtype, torch.float32)
        return narrow if holds(model.state_dict().values(), narrow) else torch.float64


@dataclass(frozen=True)
class Family:
    """A known kind of checkpoint.

    Attributes:
        what: A line for people.
        names: Regular expressions of its parameters' names.
        build: Weights and options to the model in float64, once `Weights.finish` has passed.
        asks: The options that it understands.
        ignored: Regular expressions of other names in the file, which are not part of the model.
        format: How its code reads the scale of q(z | x), where another family with the same names
            reads it differently.
    """

    what: str
    names: tuple[str, ...]
    build: Callable[[Weights, Options], Model]
    asks: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    format: str = ""


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches what any of the patterns matches; nothing if there are none."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def is_count(value: Any) -> bool:
    """Whether a value of a settings file is an integer that can be a size."""
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def holds(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether a floating type holds all these numbers without rounding."""
    floats = (t for t in tensors if t.is_floating_point())
    return all(bool((t.to(dtype).to(t.dtype) == t).all()) for t in floats)
