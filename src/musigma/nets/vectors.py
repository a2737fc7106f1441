"""Networks for vectors.

Those for couplings and autoregressive layers compute on (units, B), so the batch of their output
(B, outputs) is last in memory. A `Spline` reads each parameter of all elements as one contiguous
block, and needs no copy.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import conditioned, join, one_row

__all__ = [
    "MADE",
    "MLP",
    "Amortized",
    "Conditioner",
    "Logarithm",
    "ResidualMLP",
    "Scaled",
    "residual_branch",
]


class Scaled(nn.Module):
    """A network whose input, levels 0 .. levels - 1, is scaled to [-1, 1].

    Args:
        net: The network.
        levels: Number of levels; 2 for values in [0, 1].
    """

    def __init__(self, net: nn.Module, levels: int):
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, x: Tensor, context: Tensor | None = None):
        """The output of the network for the scaled input."""
        return conditioned(self.net, 2 * x / (self.levels - 1) - 1, context)

    def extra_repr(self) -> str:
        """Names the range."""
        return f"0 .. {self.levels - 1} to -1 .. 1"


class Logarithm(nn.Module):
    """A network whose input, counts x, becomes log(1 + x).

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None):
        """The output of the network for the logarithms."""
        return self.net(x.clamp(min=0).log1p(), context)


class Periodic(nn.Module):
    """A network of the cosines and sines of its input, which are the same after every period.

    Args:
        net: A network of twice as many elements: all cosines, then all sines.
        period: The period.
    """

    def __init__(self, net: nn.Module, period: float):
        super().__init__()
        self.net, self.period = net, period

    def forward(self, x: Tensor, context: Tensor | None = None):
        """The output of the network."""
        turn = x * (2 * math.pi / self.period)
        return self.net(torch.cat([turn.cos(), turn.sin()], 1), context)

    def extra_repr(self) -> str:
        """Names the period."""
        return f"period={self.period:.6g}"


class MLP(nn.Module):
    """A multilayer perceptron (B, inputs, ...) to (B, ...outputs); extra input axes are flattened.

    Args:
        inputs: Elements of one example.
        outputs: A number, or a shape.
        hidden: Width of each hidden layer.
        context: Number of features of the context.
        zero: Initialize the last layer to zero, so that the output is zero.

    Example:
        >>> MLP(12, (3, 2, 2), hidden=[8])(torch.randn(5, 3, 4)).shape
        torch.Size([5, 3, 2, 2])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | Sequence[int],
        *,
        hidden: Sequence[int] = (256, 256),
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.context = context
        self.outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        widths = [inputs + context, *hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        last = nn.Linear(widths[-1], math.prod(self.outputs))
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output."""
        h = self.layers(join(x.flatten(1), context, self.context))
        return h.reshape(len(x), *self.outputs)


class Amortized(nn.Module):
    """Numbers that a layer needs: learned constants, or the output of a network of the context.

    Args:
        start: The constants, or what the network emits before it is trained, (P,).
        context: Number of features of the context; with 0 the numbers are constants.
        hidden: Width of each hidden layer of the network.

    Example:
        >>> Amortized(torch.zeros(4))(torch.randn(5, 3)).shape
        torch.Size([1, 4])
        >>> Amortized(torch.zeros(4), context=2)(torch.randn(5, 3), torch.randn(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, start: Tensor, *, context: int = 0, hidden: Sequence[int] = (64,)):
        super().__init__()
        self.context = context
        if not context:
            self.constants = nn.Parameter(start.clone())
            return
        self.net = MLP(0, len(start), hidden=hidden, context=context, zero=True)
        with torch.no_grad():
            self.net.layers[-1].bias.copy_(start)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """One row for all examples of x (B, ...), (1, P), or one for each, (B, P)."""
        if not self.context:
            return self.constants[None]
        return self.net(x.flatten(1)[:, :0], context)


def residual_branch(width: int, hidden: int | None = None) -> nn.Sequential:
    """What a residual block adds to its input: normalization and two layers.

    Args:
        width: Features in and out.
        hidden: Features between; None: `width`.
    """
    hidden = hidden or width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
    )


class ResidualMLP(nn.Module):
    """A residual multilayer perceptron (B, inputs) to (B, outputs).

    A linear path leads from its input to its output; only the branches normalize.

    Args:
        inputs: Features in.
        outputs: Features out.
        width: Features between.
        blocks: Number of residual blocks, of two layers each.

    Example:
        >>> ResidualMLP(3, 8)(torch.randn(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 64, blocks: int = 2):
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(residual_branch(width) for _ in range(blocks))
        self.leave = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


class _Stack(nn.Module):
    """Affine layers with ReLUs between them, some of whose weights are masked.

    Args:
        masks: For each layer (units, units below), 1 where there is a weight and 0 elsewhere.
        zero: Initialize the last layer to zero.
    """

    def __init__(self, masks: Sequence[Tensor], zero: bool):
        super().__init__()
        self.weights, self.biases, self.masked = nn.ParameterList(), nn.ParameterList(), set()
        for i, mask in enumerate(masks):
            scale = mask.sum(1, keepdim=True).clamp(min=1).rsqrt()  # as in nn.Linear
            if zero and i == len(masks) - 1:
                scale.zero_()
            if mask.numel():  # otherwise the layer has only a bias
                self.weights.append(nn.Parameter((2 * torch.rand_like(mask) - 1) * scale))
            self.biases.append(nn.Parameter((2 * torch.rand(len(mask)) - 1) * scale[:, 0]))
            if not (mask.numel() and mask.all()):
                self.masked.add(i)
                self.register_buffer(f"mask{i}", mask, persistent=False)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """The weight of every layer, zero where masked, and its bias as a column."""
        given: list[Any] = [*self.weights._parameters.values()]  # ten times as fast as by index
        biases: list[Any] = [*self.biases._parameters.values()]
        masks: dict[str, Any] = self._buffers
        without = len(biases) - len(given)  # the first layer has no inputs
        weights = [masks["mask0"]] if without else []
        weights += [
            w * masks[f"mask{i}"] if i in self.masked else w for i, w in enumerate(given, without)
        ]
        return [(w, b[:, None]) for w, b in zip(weights, biases, strict=True)]

    def forward(self, x: Tensor, context: Tensor | None, features: int) -> Tensor:
        """The output (B, outputs), for x (B, inputs) and a context of some features, joined."""
        layers = self.layers()
        row = one_row(context) if features else None
        if row is None:
            h = join(x, context, features).t()
        else:
            h = x.t()
            layers[0] = _given(*layers[0], join(x[:1, :0], row, features))
        *layers, (weight, bias) = layers
        for w, b in layers:
            h = F.relu(torch.addmm(b, w, h), inplace=True)
        return torch.addmm(bias, weight, h).t()


def _given(weight: Tensor, bias: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer for the inputs that come before a context (B, F)."""
    inputs = weight.shape[1] - context.shape[1]
    return weight[:, :inputs], torch.addmm(bias, weight[:, inputs:], context.t())


class Conditioner(nn.Module):
    """A multilayer perceptron (B, inputs) to (B, outputs) with ReLUs, for couplings of vectors.

    Args:
        inputs: Number of elements of one example.
        outputs: Number of outputs for each example.
        hidden: Width of each hidden layer.
        context: Number of features of the context.
        zero: Initialize the last layer to zero, so that the output is zero.

    Example:
        >>> Conditioner(3, 8, hidden=[16], context=2)(torch.randn(5, 3), torch.randn(5, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (128, 128),
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.context = context
        widths = [inputs + context, *hidden, outputs]
        self.stack = _Stack([torch.ones(b, a) for a, b in itertools.pairwise(widths)], zero)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output."""
        return self.stack(x, context, self.context)


class MADE(nn.Module):
    r"""A multilayer perceptron whose outputs for feature i depend on features 0 .. i - 1 only.

    Every unit has a degree: a unit of degree d depends on the first d features and the context.
    A weight connects two units if the degree of the upper is at least that of the lower; the
    outputs for feature i have degree i. Hidden units are sorted by degree, so that `unroll`
    computes each of them once. (Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder
    for Distribution Estimation", 2015, arXiv:1502.03509.)

    Args:
        owners: The feature 0 .. D - 1 to which each output belongs; each occurs equally often.
        hidden: Width of each hidden layer.
        context: Number of features of the context.
        zero: Initialize the last layer to zero, so that the output is zero.

    Raises:
        ValueError: If some features have more outputs than others.

    Example:
        >>> net, x = MADE([0, 1, 2, 0, 1, 2], hidden=[16]), torch.randn(1, 3)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0, :3], x)[:, 0]
        >>> bool((jacobian.triu() == 0).all())
        True
    """

    order: Tensor

    def __init__(
        self,
        owners: Sequence[int],
        *,
        hidden: Sequence[int] = (128, 128),
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.features, self.context, self.owners = max(owners) + 1, context, list(owners)
        each = len(owners) // self.features
        if sorted(owners) != sorted([*range(self.features)] * each):
            raise ValueError(
                f"owners: expected each of 0 .. {self.features - 1} equally often; got {owners}"
            )
        seen = [*range(1, self.features)]  # no output depends on the last feature
        least = 0 if context else 1
        steps = self.features - least
        inner = [[least + i * steps // n for i in range(n)] for n in hidden if seen or context]
        degrees = [torch.tensor(d) for d in (seen + [0] * context, *inner, self.owners)]
        masks = [(b[:, None] >= a).float() for a, b in itertools.pairwise(degrees)]
        self.stack = _Stack(masks, zero)
        self.register_buffer("order", degrees[-1].argsort(stable=True), persistent=False)
        layers = [seen, *inner, sorted(owners)]
        self.sizes = [[*Counter(layer).values()] for layer in layers[1:]]
        self.plan = [_steps(layers, i) for i in range(self.features)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs (B, len(owners)), for x (B, D)."""
        seen = x.t()[:-1].t()  # gradients are batch last too
        return self.stack(seen, context, self.context)

    def unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Evaluate feature by feature, as `musigma.layers.AutoregressiveNet` describes.

        Step i computes only the hidden units of degree i and the outputs of feature i, so all
        steps together cost less than one pass. They compute in the dtype of `like`: autocast
        does not take results that are written in place.
        """
        with torch.autocast(like.device.type, enabled=False):
            self._unroll(fill, like, context)

    def _unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None
    ) -> None:
        layers, batch = self.stack.layers(), len(like)
        weight, bias = layers[-1]
        layers[-1] = weight.index_select(0, self.order), bias.index_select(0, self.order)
        row = one_row(context) if self.context else None
        context, n = (context, batch) if row is None else (row, 1)
        layers[0] = _given(*layers[0], join(like[:n, :0], context, self.context))
        known = [_Units(sizes, like) for sizes in ([1] * self.features, *self.sizes[:-1])]
        parts = [  # as views of all parts at once
            zip(weight.split(sizes), bias.split(sizes), strict=True)
            for (weight, bias), sizes in zip(layers, self.sizes, strict=True)
        ]
        for i, steps in enumerate(self.plan):
            n = batch if i else n  # what depends on one row of context alone is one column
            h = like
            for j, below in steps:
                weight, bias = next(parts[j])
                inputs = known[j].values[:below]
                inputs = inputs if n == batch else inputs[:, :n]
                above = known[j + 1] if j + 1 < len(known) else None
                out = above.place if above and n == batch else None
                h = torch.addmm(bias, weight[:, :below], inputs, out=out)
                if above:
                    above.put(h.relu_())
            h = h if n == batch else h.expand(-1, batch)
            known[0].put(fill(i, h.t()).t())


class _Units:
    """The values of a layer (units, B), which become known in groups.

    They are written in place, or with gradients into a copy.

    Attributes:
        values: The known values, with room for the others.
        place: The room of the next group; None with gradients.
    """

    def __init__(self, sizes: list[int], like: Tensor):
        copied = torch.is_grad_enabled()
        self.values = like.new_empty(0 if copied else sum(sizes), len(like))
        self.places = iter([None] * len(sizes) if copied else self.values.split(sizes))
        self.place = next(self.places)

    def put(self, group: Tensor) -> None:
        """The values of the next group (units, B), or (units, 1) if they are all the same."""
        if self.place is None:
            self.values = torch.cat([self.values, group.expand(-1, self.values.shape[1])])
        elif group is not self.place:
            self.place.copy_(group)
        self.place = next(self.places, None)


def _steps(layers: Sequence[Sequence[int]], degree: int) -> list[tuple[int, int]]:
    """The layers with units of a degree, and the number of units below that these depend on."""
    return [
        (j, bisect_right(below, degree))
        for j, (below, layer) in enumerate(itertools.pairwise(layers))
        if degree in layer
    ]
