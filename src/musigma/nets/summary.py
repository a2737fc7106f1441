"""Embeddings of sequences, sets and series: networks for each of them, and one over all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.nets.embed import Embedding, embedding, kind_of, named_parts, refuse
from musigma.nets.sequences import DeepSet, SequenceTransformer, SeriesNet
from musigma.nets.vectors import ResidualMLP
from musigma.spec import Variable
from musigma.tensors import moments

__all__ = ["Summary", "conv", "mlp", "set", "transformer"]


class _Elements(nn.Module):
    """Standardizes a sequence (B, L, F), and replaces elements that are NaN by 0.

    `each` element has a mean and a standard deviation of its own if there are M of them, and
    otherwise all share those of their features.
    """

    mean: Tensor
    std: Tensor
    calibrated: Tensor

    def __init__(self, length: int, channels: int, each: bool):
        super().__init__()
        shape = (length, channels) if each else (channels,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, t: Tensor) -> None:
        """Set mean and standard deviation from sequences, once, ignoring padding."""
        if bool(self.calibrated):
            return
        rows = t if self.mean.ndim == 2 else t[~t.isnan().all(2)]
        if len(rows):
            mean, std = moments(rows)
            self.mean.copy_(mean)
            self.std.copy_(std)
        self.calibrated.fill_(True)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The elements, and a mask (B, L) of those that are there."""
        mask = ~t.isnan().all(2)
        return ((t - self.mean) / self.std).where(mask[..., None], 0), mask


class Summary(nn.Module):
    """Named variables to one vector (B, features): networks, and a residual perceptron over them.

    Each sequence is standardized, by feature over all its elements, and passes through a network
    of its own. Without sequences and images, the numbers together, in the order of `variables`,
    are one sequence of elements of one number. The perceptron takes the results beside the other
    variables, which pass through an `Embedding`.

    Args:
        variables: The variables of the context.
        network: From the length M and the number of features of a sequence to its network, which
            maps values (B, L, F) and a mask (B, L) to (B, network.features); None: numbers are
            not taken as a sequence.
        features: Length of the vector.
        width: Width of the perceptron.
        blocks: Number of its residual blocks.
        longer: Whether the networks take sequences of more than M elements.
        each: Standardize numbers that form a sequence each by itself.

    Example:
        >>> variables = [Variable("events", (20, 2)), Variable("site", classes=3)]
        >>> net = Summary(variables, lambda length, channels: DeepSet(channels))
        >>> events = torch.randn(4, 20, 2)
        >>> events[0, 7:] = torch.nan  # the first row has 7 events
        >>> net({"events": events, "site": torch.eye(3)[[0, 1, 2, 1]]}).shape
        torch.Size([4, 32])
    """

    calibrates_on_all = True

    def __init__(
        self,
        variables: Sequence[Variable],
        network: Callable[[int, int], Any] | None = None,
        *,
        features: int = 32,
        width: int = 64,
        blocks: int = 2,
        longer: bool = False,
        each: bool = False,
    ):
        super().__init__()
        self.variables, self.features, self.longer = tuple(variables), features, longer
        kinds = [kind_of(variable) for variable in self.variables]
        self.groups = [[i] for i, kind in enumerate(kinds) if kind == "sequences"]
        columns = [i for i, kind in enumerate(kinds) if kind == "numbers"]
        from_columns = network is not None and not {"sequences", "images"} & {*kinds}
        if from_columns and columns:
            self.groups = [columns]
        used = {i for group in self.groups for i in group}
        self.others = [i for i in range(len(kinds)) if i not in used]
        self.rest = Embedding([self.variables[i] for i in self.others], width=features)
        self.elements, self.networks = nn.ModuleList(), nn.ModuleList()
        inputs = self.rest.features
        for group in self.groups:
            length = sum(self.variables[i].shape[0] for i in group)
            channels = 1 if from_columns else self.variables[group[0]].shape[1]
            self.elements.append(_Elements(length, channels, each and from_columns))
            net = network(length, channels)  # pyright: ignore[reportOptionalCall]
            self.networks.append(net)
            inputs += net.features
        self.head = ResidualMLP(inputs, features, width=width, blocks=blocks)

    def _parts(self, context: Context) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The sequences (B, L, F), and the other variables by name."""
        parts = named_parts(self.variables, context, longer=self.longer)
        sequences = [
            torch.cat([t if t.ndim == 3 else t[..., None] for t in (parts[i] for i in group)], 1)
            for group in self.groups
        ]
        return sequences, {self.variables[i].name: parts[i] for i in self.others}

    @torch.no_grad()
    def calibrate(self, context: Context) -> None:
        """Set the means and the standard deviations from a batch, once."""
        sequences, others = self._parts(context)
        for elements, t in zip(self.elements, sequences, strict=True):
            elements.calibrate(t)  # pyright: ignore[reportCallIssue]
        self.rest.calibrate(others)

    def forward(self, context: Context) -> Tensor:
        """The vector, (B, features).

        Raises:
            ValueError: Naming every variable that is missing, unknown, or of another shape.
        """
        sequences, others = self._parts(context)
        parts = [self.rest(others)] if self.others else []
        for elements, net, t in zip(self.elements, self.networks, sequences, strict=True):
            parts.append(net(*elements(t)))
        return self.head(torch.cat(parts, 1))

    def extra_repr(self) -> str:
        """Names the variables."""
        return ", ".join(variable.name for variable in self.variables)


@embedding
def mlp(
    variables: Sequence[Variable], *, features: int = 32, width: int = 64, blocks: int = 2
) -> Summary:
    """A residual perceptron of numbers, classes and images.

    Args:
        variables: The variables of the context.
        features: Length of the vector.
        width: Width of the perceptron.
        blocks: Number of residual blocks.
    """
    refuse("mlp", variables, ("numbers", "classes", "images"))
    return Summary(variables, features=features, width=width, blocks=blocks)


@embedding
def set(
    variables: Sequence[Variable], *, features: int = 32, width: int = 64, blocks: int = 1
) -> Summary:
    """Sequences as sets: any number of exchangeable elements, in any order (`DeepSet`).

    The number may be one that training has never seen. Without sequences and images, the numbers
    together are one set, standardized alike.

    Args:
        variables: The variables of the context.
        features: Length of the vector.
        width: Width of the networks.
        blocks: Number of residual blocks for each element.
    """
    _some_sequence("set", variables, ("sequences", "numbers"))

    def network(length: int, channels: int) -> DeepSet:
        return DeepSet(channels, width=width, blocks=blocks)

    return Summary(variables, network, features=features, width=width, longer=True)


@embedding
def conv(
    variables: Sequence[Variable],
    *,
    features: int = 32,
    width: int = 32,
    kernel: int = 5,
    blocks: int = 1,
) -> Summary:
    """Sequences as series, by 1-D convolutions (`SeriesNet`), and images by 2-D ones.

    Without sequences and images, the numbers together, in their order, are one series,
    standardized alike.

    Args:
        variables: The variables of the context.
        features: Length of the vector.
        width: Channels of the 1-D convolutions.
        kernel: Size of the 1-D convolutions, odd.
        blocks: Number of residual blocks of each stage, at each of which a series is halved.
    """
    _some_sequence("conv", variables, ("sequences", "numbers", "images"))
    if kernel % 2 == 0:
        raise ValueError(f"embed: conv takes an odd kernel; got {kernel}")

    def network(length: int, channels: int) -> SeriesNet:
        return SeriesNet(length, channels, width=width, kernel=kernel, blocks=blocks)

    return Summary(variables, network, features=features)


@embedding
def transformer(
    variables: Sequence[Variable],
    *,
    features: int = 32,
    width: int = 32,
    heads: int = 4,
    blocks: int = 2,
) -> Summary:
    """Sequences by a transformer encoder (`SequenceTransformer`).

    Without sequences and images, the numbers are its tokens, each standardized by itself.

    Args:
        variables: The variables of the context.
        features: Length of the vector.
        width: Width of a token.
        heads: Number of heads of the attention.
        blocks: Number of layers.
    """
    _some_sequence("transformer", variables, ("sequences", "numbers"))

    def network(length: int, channels: int) -> SequenceTransformer:
        return SequenceTransformer(length, channels, width=width, heads=heads, blocks=blocks)

    return Summary(variables, network, features=features, each=True)


def _some_sequence(kind: str, variables: Sequence[Variable], takes: Sequence[str]) -> None:
    """Raise a ValueError if no variable is of a kind that an embedding is made for."""
    kinds = {kind_of(variable) for variable in variables}
    if "images" in kinds and "sequences" not in kinds:  # numbers beside images are no sequence
        kinds -= {"numbers"}
    if not kinds & {*takes}:
        named = ", ".join(f"{v.name!r} ({kind_of(v)})" for v in variables)
        raise ValueError(
            f"embed: {kind} needs {' or '.join(takes)}, and the context is {named}; use mlp"
        )
