"""The specification of a model: shape, levels and columns of its data, and its context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from musigma.schema import Schema
from musigma.support import Support

__all__ = ["Spec", "Variable", "bits_per_dim"]

Nats = TypeVar("Nats")


def bits_per_dim(nats: Nats, dims: int) -> Nats:
    """Nats per example as bits per dimension, ``nats / (dims ln 2)``.

    Every figure in bits per dimension comes from here.

    Args:
        nats: A number, an array or a tensor.
        dims: Number of elements of one example.

    Example:
        >>> bits_per_dim(math.log(256) * 3072, 3072)
        8.0
    """
    return nats / (dims * math.log(2))  # pyright: ignore[reportOperatorIssue]


@dataclass(frozen=True)
class Variable:
    """One part of a context, by its name.

    Args:
        name: Its name, for example that of a column. `label` is the class of each example.
        shape: Shape of one row of the model's input: (F,) for F numbers, (M, F) for a sequence of
            up to M rows of F numbers (rows of NaN follow its last row), (C, H, W) for an image.
            A variable of n classes has shape (n,): its rows are one-hot.
        classes: Number of classes; 0 for numbers and images.
        names: Names of the classes, if known.
        levels: Number of integer levels of each element of an image; None for real numbers.

    Raises:
        ValueError: If shape, classes and names disagree.
    """

    name: str
    shape: tuple[int, ...] = ()
    classes: int = 0
    names: tuple[str, ...] = ()
    levels: int | None = None

    def __post_init__(self):
        set_ = object.__setattr__
        set_(self, "names", tuple(self.names))
        set_(self, "classes", self.classes or len(self.names))
        shape = tuple(self.shape) or ((self.classes,) if self.classes else (1,))
        set_(self, "shape", shape)
        if self.names and len(self.names) != self.classes:
            raise ValueError(f"names: expected {self.classes} of them; got {len(self.names)}")
        if self.classes and shape != (self.classes,):
            raise ValueError(f"shape: {self.classes} classes have {(self.classes,)}; got {shape}")


@dataclass(frozen=True)
class Spec:
    """The data that a model describes, and the context it is conditioned on.

    Args:
        shape: Shape of one example: (C, H, W) or (D,).
        levels: Number of integer levels of every element, or a sequence with one entry for each
            element; None: real numbers.
        columns: Names of the elements of a vector, if it is a row of a table.
        context: What the model is conditioned on.
        schema: The types of the columns of a table, and their cells; None for plain numbers.
        support: The set in which vectors of real numbers lie; None: all of space.

    Raises:
        ValueError: If the number of levels, of columns or of elements of the support does not fit
            the shape.

    Example:
        >>> spec = Spec((3, 32, 32), levels=256, context=(Variable("label", classes=10),))
        >>> spec.bits, spec.dims
        (8, 3072)
        >>> Spec.from_json(spec.to_json()) == spec
        True
    """

    shape: tuple[int, ...]
    levels: int | tuple[int | None, ...] | None = None
    columns: tuple[str, ...] = ()
    context: tuple[Variable, ...] = ()
    schema: Schema | None = None
    support: Support | None = None

    def __post_init__(self):
        set_ = object.__setattr__
        set_(self, "shape", tuple(self.shape))
        if self.schema is not None:
            set_(self, "columns", self.schema.names)
        set_(self, "columns", tuple(self.columns))
        set_(self, "context", tuple(self.context))
        if isinstance(self.levels, Sequence):
            set_(self, "levels", tuple(self.levels))
            if len(self.levels) != self.dims:  # pyright: ignore[reportArgumentType]
                raise ValueError(f"levels: expected one number, or {self.dims}; got {self.levels}")
        if self.columns and (len(self.shape) != 1 or len(self.columns) != self.dims):
            raise ValueError(f"columns: shape {self.shape} does not have {len(self.columns)}")
        if self.support is not None and self.shape != (len(self.support),):
            raise ValueError(
                f"support: it has {len(self.support)} elements, which shape {self.shape} has not"
            )

    @property
    def dims(self) -> int:
        """Number of elements of one example."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int | None:
        """Bits of each element if all have the same power of two as levels; None otherwise."""
        if not isinstance(self.levels, int) or self.levels & (self.levels - 1):
            return None
        return self.levels.bit_length() - 1

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back, without empty fields."""
        plain: dict[str, Any] = {"shape": list(self.shape), "levels": self.levels}
        if self.columns:
            plain["columns"] = list(self.columns)
        if self.context:
            plain["context"] = [
                {k: list(v) if isinstance(v, tuple) else v for k, v in vars(variable).items()}
                for variable in self.context
            ]
        if self.schema is not None:
            plain["schema"] = self.schema.to_json()
        if self.support is not None:
            plain["support"] = self.support.to_json()
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Spec:
        """Read what `to_json` wrote."""
        variables = tuple(Variable(**each) for each in plain.get("context", ()))
        schema = Schema.from_json(plain["schema"]) if plain.get("schema") else None
        support = Support.from_json(plain["support"]) if plain.get("support") else None
        columns = plain.get("columns", ())
        return cls(plain["shape"], plain.get("levels"), columns, variables, schema, support)
