"""Flows of other libraries, layer by layer, as `musigma.convert.from_flow` describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join
from musigma.distributions import StandardNormal
from musigma.layers import (
    ActNorm,
    Autoregressive,
    Coupling,
    InvertibleConv,
    Map,
    Permutation,
    Spline,
)
from musigma.model import Bijection, Chain, Inverse, Prior
from musigma.tensors import at_least_float32
from musigma.zoo import architecture


@architecture
def imported(
    shape: Sequence[int], *, layers: Sequence[Mapping[str, Any]] = (), context: int = 0
) -> Chain:
    """A flow of vectors that another library trained (`musigma convert`).

    Args:
        shape: (D,).
        layers: A description of each layer, from the data upwards; see `LAYERS`.
        context: Number of features of the context.

    Raises:
        ValueError: Without layers.
    """
    if not layers:
        raise ValueError("layers: this architecture is made by `musigma convert`")
    (features,) = shape
    built = [_layer(dict(described), features, context) for described in layers]
    return Chain(built, Prior(StandardNormal((features,))))


def _layer(described: dict[str, Any], features: int, context: int) -> Bijection:
    inverse = described.pop("inverse", False)
    layer = LAYERS[described.pop("layer")](features, context, **described)
    return Inverse(layer) if inverse else layer


def _coupling(features: int, context: int, map: Mapping[str, Any], kept: int, **net: Any):
    read = _map(map)
    outputs = read.outputs * (features - kept)
    return Coupling(Network(kept, outputs, context=context, **net), map=read, kept=kept)


def _autoregressive(features: int, context: int, map: Mapping[str, Any], **net: Any):
    read = _map(map)
    return Autoregressive(MaskedNetwork(read.owners(features), context=context, **net), map=read)


LAYERS: Mapping[str, Callable[..., Bijection]] = {
    "permutation": lambda features, context, order: Permutation(order),
    "linear": lambda features, context: InvertibleConv(features, lu=False),
    "scale": lambda features, context: ActNorm(features),
    "coupling": _coupling,
    "autoregressive": _autoregressive,
}
"""The layers by name; each takes the numbers of features, and the rest of its description."""


def _map(described: Mapping[str, Any]) -> Map:
    options = dict(described)
    return MAPS[options.pop("map")](**options)


# --- maps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleShift(Map):
    r""":math:`y = x\, e^{s(u)} + t`, with (t, u) the halves of h.

    Args:
        scale: How the log scale is read: `exp`: s = u; `softclip`: u / (1 + |u / log least|);
            `softplus`: log(softplus(u) + least); `sigmoid`: log(sigmoid(u + 2) + least);
            `inverse-sigmoid`: minus that.
        least: See `scale`.
    """

    scale: str
    least: float = 0.0

    outputs: ClassVar[int] = 2  # pyright: ignore[reportIncompatibleMethodOverride]
    SCALES: ClassVar[Mapping[str, Callable[[Tensor, float], Tensor]]] = {
        "exp": lambda u, least: u,
        "softclip": lambda u, least: u / (1 + (u / math.log(least)).abs()),
        "softplus": lambda u, least: (F.softplus(u) + least).log(),
        "sigmoid": lambda u, least: ((u + 2).sigmoid() + least).log(),
        "inverse-sigmoid": lambda u, least: -((u + 2).sigmoid() + least).log(),
    }

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = at_least_float32(h).chunk(2, 1)
        return shift, self.SCALES[self.scale](raw, self.least)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x exp(s) + t, s)``."""
        shift, log_scale = self._read(h)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``((y - t) exp(-s), -s)``."""
        shift, log_scale = self._read(h)
        return (y - shift) * (-log_scale).exp(), -log_scale


@dataclass(frozen=True)
class SoftclipSpline(Map):
    """A `Spline` whose parameters are softly clipped first, as zuko does.

    Args:
        bins: Number of bins.
        bound: The map is the identity outside [-bound, bound].
        slope: Log widths and heights are clipped to half of its logarithm, log slopes to all.
    """

    bins: int
    bound: float
    slope: float

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element."""
        return 3 * self.bins - 1

    def _spline(self, h: Tensor) -> tuple[Spline, Tensor]:
        """A spline without minima to speak of, and its parameters."""
        spline = Spline(self.bins, self.bound, self.slope / self.bins / 1000)
        raw = at_least_float32(h).unflatten(1, (self.outputs, -1))
        limit = -math.log(self.slope)
        sizes, slopes = raw[:, : 2 * self.bins], raw[:, 2 * self.bins :]
        sizes = sizes / (1 + 2 * sizes.abs() / limit)
        shares = sizes.unflatten(1, (2, self.bins)).softmax(2).flatten(1, 2)
        slopes = (slopes / (1 + slopes.abs() / limit)).exp() - spline.least
        inverse_softplus = slopes + torch.log(-torch.expm1(-slopes))
        offset = math.log(math.expm1(1 - spline.least))
        read = torch.cat([(shares - spline.least).log(), inverse_softplus - offset], 1)
        return spline, read.flatten(1, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """That of the spline."""
        spline, read = self._spline(h)
        return spline.forward(x, read)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """That of the spline."""
        spline, read = self._spline(h)
        return spline.inverse(y, read)


MAPS: Mapping[str, Callable[..., Map]] = {
    "spline": Spline,
    "softclip-spline": SoftclipSpline,
    "scale-shift": ScaleShift,
}
"""The maps by name."""


# --- networks ------------------------------------------------------------------------------------


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are zero."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return F.linear(input, self.weight * self.mask, self.bias)


class Block(nn.Module):
    """x + B(act(A(act(x)) + C context)), or x + that gated by a linear function of the context."""

    def __init__(self, width: int, activation: nn.Module, context: int, mixing: str):
        super().__init__()
        self.activation, self.mixing = activation, mixing
        self.enter, self.leave = MaskedLinear(width, width), MaskedLinear(width, width)
        self.context = nn.Linear(context, width) if context and mixing != "none" else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The block's output."""
        h = self.enter(self.activation(x))
        if self.context is not None and self.mixing == "add":
            h = h + self.context(context)
        h = self.leave(self.activation(h))
        if self.context is not None and self.mixing == "gate":
            h = h * self.context(context).sigmoid()
        return x + h


class Network(nn.Module):
    """A perceptron, or a residual network, of the kinds that these libraries have.

    Args:
        inputs: Number of inputs.
        outputs: Number of outputs.
        hidden: Widths of the hidden layers of a perceptron, or one width.
        blocks: Number of residual blocks of the one width.
        activation: Name of a module of `torch.nn`.
        slope: Slope of a LeakyReLU.
        context: Number of features of the context.
        enters: How the context enters: concatenated to the input (`concatenated`), or a linear
            function of it added to the first layer, plain (`added`) or `activated`.
        mixing: How it enters the blocks: `none`, `add` or `gate`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int],
        blocks: int = 0,
        activation: str = "ReLU",
        slope: float | None = None,
        context: int = 0,
        enters: str = "concatenated",
        mixing: str = "none",
    ):
        super().__init__()
        act = getattr(nn, activation)(*([] if slope is None else [slope]))
        self.activation, self.enters, self.features = act, enters, context
        sizes = [inputs + (context if enters == "concatenated" else 0), *hidden]
        self.layers = nn.ModuleList(map(MaskedLinear, sizes, sizes[1:]))
        apart = context and enters != "concatenated"
        self.context = nn.Linear(context, sizes[1]) if apart else None
        self.blocks = nn.ModuleList(Block(sizes[-1], act, context, mixing) for _ in range(blocks))
        self.out = MaskedLinear(sizes[-1], outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs."""
        joined = join(x, context, self.features)
        if self.enters == "concatenated":
            x = joined
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and self.context is not None:
                added = self.context(context)
                x = x + (self.activation(added) if self.enters == "activated" else added)
            if not len(self.blocks):
                x = self.activation(x)
        for block in self.blocks:
            x = block(x, context)
        return self.out(x)


class MaskedNetwork(Network):
    """A `Network` for `Autoregressive` layers; sampling takes one pass for each feature."""

    def __init__(self, owners: Sequence[int], **options: Any):
        super().__init__(max(owners) + 1, len(owners), **options)
        self.owners = list(owners)

    def unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Evaluate feature by feature, as in `AutoregressiveNet`."""
        features: list[Tensor] = []
        for i in range(like.shape[1]):
            x = torch.cat([*features, torch.zeros_like(like[:, i:])], 1)
            mine = [k for k, owner in enumerate(self.owners) if owner == i]
            features.append(fill(i, self(x, context)[:, mine]))
