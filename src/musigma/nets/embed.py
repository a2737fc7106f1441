"""Embeddings of a context: named numbers, classes, images and sequences as one vector.

An embedding is a function ``(variables, *, option=default, ...)`` that returns a module with the
number of its `features`, whose ``forward(context)`` gives a vector (B, features). If it has
``calibrate(context)``, it is called once, with 512 rows of the training data, or with all that fit
in memory if its attribute `calibrates_on_all` is true. `embedding` registers one, and
`embedding_of` builds it from a text such as ``"set width=128"``.

A sequence is a variable of shape (M, F): up to M elements of F numbers. A row that has fewer ends
with elements that are NaN, which no embedding depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.named import Registry
from musigma.nets.conv import ConvEncoder
from musigma.spec import Variable
from musigma.tensors import moments

__all__ = [
    "EMBEDDINGS",
    "Embedding",
    "embedding",
    "embedding_of",
    "kind_of",
    "named_parts",
    "refuse",
]

EMBEDDINGS = Registry("embed", "variables")
"""All registered embeddings, by name."""

E = TypeVar("E", bound=Callable[..., nn.Module])


def embedding(function: E) -> E:
    """Register ``function(variables, *, option=default, ...)`` under its name.

    Args:
        function: Takes the variables of a context, `musigma.Variable`, and plain options. The
            module that it returns has `features`, the length of the vector, and may have
            ``calibrate(context)``. It refuses variables that it does not take by a ValueError.

    Raises:
        TypeError: If the function has another signature.
        ValueError: If the name is that of an embedding of the library.

    Example:
        >>> @embedding
        ... def product(variables):
        ...     class Product(nn.Module):
        ...         features = 1
        ...
        ...         def forward(self, context):
        ...             return context["a"] * context["b"]
        ...
        ...     return Product()
        >>> import musigma
        >>> spec = musigma.Spec((2,), context=(Variable("a"), Variable("b")))
        >>> musigma.build("nsf", spec, embed="product").config["options"]["embed"]
        'product'
    """
    return EMBEDDINGS.register(function)


def embedding_of(text: str, variables: Sequence[Variable]) -> nn.Module:
    """The embedding that a text names, for the variables of a context.

    Args:
        text: A key of `EMBEDDINGS`, and options of it: ``"set width=128 blocks=2"``.
        variables: The variables.

    Raises:
        ValueError: As `Registry.choice`, or if the embedding does not take a variable.
        TypeError: If the embedding returns anything but a module with `features`.

    Example:
        >>> net = embedding_of("mlp features=5", [Variable("age"), Variable("sex", classes=2)])
        >>> net({"age": torch.randn(4, 1), "sex": torch.eye(2)[[0, 1, 1, 0]]}).shape
        torch.Size([4, 5])
    """
    choice = EMBEDDINGS.choice(text)
    net = choice(variables)
    if not isinstance(net, nn.Module) or not isinstance(getattr(net, "features", None), int):
        raise TypeError(
            f"embed: {choice.name} must return a torch module with `features`, the length of its "
            f"vector; got {type(net).__name__}"
        )
    return net


def kind_of(variable: Variable) -> str:
    """What the rows of a variable are: classes, numbers, sequences, images or other arrays."""
    if variable.classes:
        return "classes"
    return {1: "numbers", 2: "sequences", 3: "images"}.get(len(variable.shape), "arrays")


def refuse(kind: str, variables: Sequence[Variable], takes: Sequence[str]) -> None:
    """Raise a ValueError that names the variables which an embedding does not take.

    Every variable must be of one of the kinds that `takes` lists.
    """
    wrong = [v for v in variables if kind_of(v) not in takes]
    if not wrong:
        return
    named = ", ".join(f"{v.name!r} of shape {v.shape}" for v in wrong)
    hint = "leave it out, or write an embedding that takes it"
    if all(kind_of(v) == "sequences" for v in wrong):
        hint = "set, conv and transformer take sequences (--embed set)"
    *first, last = takes
    raise ValueError(f"embed: {kind} takes {', '.join(first)} and {last}; got {named}; {hint}")


def named_parts(
    variables: Sequence[Variable], context: Context, *, longer: bool = False
) -> list[Tensor]:
    """The tensor of each variable.

    Args:
        variables: The variables.
        context: A mapping from their names, or one tensor if there is one variable.
        longer: Accept sequences of more than M elements.

    Raises:
        ValueError: Naming every variable that is missing, unknown, or of another shape.
    """
    if isinstance(context, Tensor) and len(variables) == 1:
        context = {variables[0].name: context}
    names = ", ".join(variable.name for variable in variables)
    if context is None or isinstance(context, Tensor):
        got = "none" if context is None else f"one tensor of shape {tuple(context.shape)}"
        raise ValueError(f"context: expected a mapping with {names}; got {got}")
    known = {variable.name for variable in variables}
    wrong = [f"{name!r} is unknown" for name in context if name not in known]
    for variable in variables:
        t = context.get(variable.name)
        if t is None:
            wrong.append(f"{variable.name!r} is missing")
            continue
        shape, expected = tuple(t.shape[1:]), variable.shape
        if len(expected) == len(shape) == 2:
            most, features = expected
            if shape[1] != features or (shape[0] > most and not longer):
                up_to = "any number of" if longer else f"up to {most}"
                wrong.append(
                    f"{variable.name!r} has {shape[0]} elements of {shape[1]} numbers per row, "
                    f"and not {up_to} elements of {features}"
                )
        elif shape != expected:
            wrong.append(f"{variable.name!r} has shape {shape} per row, and not {expected}")
    if wrong:
        raise ValueError(f"context: {'; '.join(wrong)}; the model takes {names}")
    return [context[variable.name] for variable in variables]


class Embedding(nn.Module):
    """Numbers, classes and images to one vector (B, features), for `musigma.Conditional`.

    Numbers are standardized, by the statistics that `calibrate` computes. Classes are one-hot.
    Images pass through a `ConvEncoder`. The results are concatenated in the order of `variables`.

    Args:
        variables: The variables of the context.
        width: Number of features of each image.

    Attributes:
        features: Length of the vector.

    Raises:
        ValueError: If a variable is neither a vector nor an image.

    Example:
        >>> embed = Embedding([Variable("age"), Variable("class", classes=3)])
        >>> embed({"age": torch.randn(4, 1), "class": torch.eye(3)[[0, 1, 2, 1]]}).shape
        torch.Size([4, 4])
    """

    calibrated: Tensor

    def __init__(self, variables: Sequence[Variable], *, width: int = 32):
        super().__init__()
        refuse("none", variables, ("numbers", "classes", "images"))
        self.variables = tuple(variables)
        self.images = nn.ModuleDict()
        self.features = 0
        for i, variable in enumerate(self.variables):
            if len(variable.shape) == 3:
                side = min(variable.shape[1:])
                halvings = max(1, math.ceil(math.log2(max(side, 2) / 7)))
                self.images[str(i)] = ConvEncoder(
                    variable.shape, width, width=16, halvings=halvings
                )
                self.features += width
                continue
            self.features += variable.shape[0]
            if not variable.classes:
                self.register_buffer(f"mean{i}", torch.zeros(variable.shape))
                self.register_buffer(f"std{i}", torch.ones(variable.shape))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, context: Context) -> None:
        """Set mean and standard deviation of the numbers from a batch, once."""
        if bool(self.calibrated):
            return
        parts = named_parts(self.variables, context)
        for i, (variable, t) in enumerate(zip(self.variables, parts, strict=True)):
            if not variable.classes and len(variable.shape) == 1:
                mean, std = moments(t)
                self.get_buffer(f"mean{i}").copy_(mean)
                self.get_buffer(f"std{i}").copy_(std)
        self.calibrated.fill_(True)

    def forward(self, context: Context) -> Tensor:
        """The vector, (B, features).

        Raises:
            ValueError: Naming every variable that is missing, unknown, or of another shape.
        """
        parts, given = [], named_parts(self.variables, context)
        for i, (variable, t) in enumerate(zip(self.variables, given, strict=True)):
            if len(variable.shape) == 3:
                top = (variable.levels or 2) - 1
                net = self.images[str(i)]
                parts.append(net(2 * t.to(next(net.parameters()).dtype) / top - 1))
            elif variable.classes:
                parts.append(t)
            else:
                parts.append((t - self.get_buffer(f"mean{i}")) / self.get_buffer(f"std{i}"))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """Names the variables."""
        return ", ".join(variable.name for variable in self.variables)


@embedding
def none(variables: Sequence[Variable], *, width: int = 32) -> Embedding:
    """Numbers, standardized, classes and images, as they are, beside each other.

    Args:
        variables: The variables of the context.
        width: Number of features of each image.
    """
    return Embedding(variables, width=width)
