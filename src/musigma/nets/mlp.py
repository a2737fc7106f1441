"""Multilayer perceptrons, and the scaling of levels for the input of networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch  # noqa: F401  (for the example)
from torch import Tensor, nn

from musigma.nets.context import join

__all__ = ["MLP", "Scaled"]


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
        return self.net(2 * x / (self.levels - 1) - 1, context)

    def extra_repr(self) -> str:
        """Names the range."""
        return f"0 .. {self.levels - 1} to -1 .. 1"


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
