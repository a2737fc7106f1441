"""Block autoregressive networks as bijections."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join
from musigma.layers.maps import Monotone
from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["BlockAutoregressive"]


class BlockLinear(nn.Module):
    """A linear layer of D blocks in and out, lower triangular in blocks.

    The blocks on the diagonal are positive, and each row has the norm exp(`log_norm`).

    Args:
        features: D.
        inputs: Units of each block below.
        outputs: Units of each block above.
    """

    diagonal: Tensor
    below: Tensor

    def __init__(self, features: int, inputs: int, outputs: int):
        super().__init__()
        blocks = torch.ones(features, features).repeat_interleave(outputs, 0)
        blocks = blocks.repeat_interleave(inputs, 1)
        row = torch.arange(features).repeat_interleave(outputs)[:, None]
        column = torch.arange(features).repeat_interleave(inputs)
        self.register_buffer("diagonal", row == column, persistent=False)
        self.register_buffer("below", row > column, persistent=False)
        limit = (6 / (features * (inputs + outputs))) ** 0.5
        self.weight = nn.Parameter(limit * (2 * torch.rand_like(blocks) - 1))
        self.log_norm = nn.Parameter(torch.rand(features * outputs, 1).log())
        limit = 1 / math.sqrt(features * outputs)
        self.bias = nn.Parameter(limit * (2 * torch.rand(features * outputs) - 1))

    def matrix(self) -> Tensor:
        """The weights (D outputs, D inputs)."""
        w = at_least_float32(self.weight)
        w = torch.where(self.diagonal, w.exp(), torch.where(self.below, w, 0))
        return self.log_norm.exp() * w / torch.linalg.vector_norm(w, dim=1, keepdim=True)


class BlockAutoregressive(Bijection):
    r"""A network whose output i increases with feature i, and depends on no later ones.

    .. math:: y = g x + (1 - g)\, f(x), \quad
        \log|\det| = \sum_i \log\big(g + (1 - g)\, \partial f_i / \partial x_i\big)

    f is a perceptron with tanh, in which every feature has a block of units; weights within a
    block are positive, and those from later blocks are zero. Its derivatives are products of
    positive matrices, which are computed with the network. The gate g in (0, 1) makes y reach
    every value: f alone is bounded, so that its density would not integrate to one. The inverse
    finds one feature after another. (De Cao, Titov, Aziz, "Block Neural Autoregressive Flow",
    2019, arXiv:1904.04676.)

    Args:
        features: D.
        hidden: Units of each hidden layer for each feature.
        context: Number of features of the context, which shifts the first layer.

    Raises:
        ValueError: If there is no hidden layer.

    Example:
        >>> layer, x = BlockAutoregressive(3), torch.randn(4, 3)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    repeated = True
    slow_inverse = "root finding, one feature after another"

    def __init__(self, features: int, *, hidden: Sequence[int] = (8, 8), context: int = 0):
        super().__init__()
        if not hidden:
            raise ValueError("hidden: expected at least one hidden layer; got none")
        self.features, self.context, self.sizes = features, context, [1, *hidden, 1]
        self.layers = nn.ModuleList(
            BlockLinear(features, a, b) for a, b in itertools.pairwise(self.sizes)
        )
        units = features * self.sizes[1]
        self.given_context = nn.Linear(context, units, bias=False) if context else None
        self.gate = nn.Parameter(torch.zeros(1))

    def _weights(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The weights and the bias of each layer; that of the first may have a row for each x."""
        layers: Any = self.layers
        pairs = [(layer.matrix(), layer.bias) for layer in layers]
        if self.given_context is not None:
            weight, bias = pairs[0]
            pairs[0] = weight, bias + self.given_context(join(x[:, :0], context, self.context))
        return pairs

    def _through(
        self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``(y, log dy_i/dx_i)`` (B, D), for the weights of D features and D columns x."""
        h, d = x, x.shape[1]
        log_slopes = torch.zeros_like(x)[:, :, None]
        for i, (weight, bias) in enumerate(layers):
            if i:
                log_slopes = log_slopes + _log_slope_of_tanh(h).unflatten(1, (d, -1))
                h = torch.tanh(h)
            h = F.linear(h, weight) + bias
            blocks = weight.unflatten(0, (d, -1)).unflatten(2, (d, -1))
            blocks = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)  # (D, units, units below)
            largest = log_slopes.detach().amax(2, keepdim=True)
            products = torch.einsum("doi,bdi->bdo", blocks, (log_slopes - largest).exp())
            log_slopes = products.log() + largest
        log_slopes = log_slopes[:, :, 0]
        keep, use = F.logsigmoid(self.gate), F.logsigmoid(-self.gate)
        log_slopes = torch.logaddexp(keep, log_slopes + use)
        return torch.lerp(h, x, torch.sigmoid(self.gate)), log_slopes

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, in one pass."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            y, log_slopes = self._through(x, self._weights(x, context))
        return y, log_slopes.sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, one feature after another, by root finding."""
        with torch.autocast(y.device.type, enabled=False):
            y = at_least_float32(y)
            weights = self._weights(y, context)
            known = [y[:, :0]] * len(weights)  # inputs of every layer, from the features so far
            log_det = torch.zeros_like(y[:, 0])
            for i in range(self.features):
                rows = [slice(i * n, (i + 1) * n) for n in self.sizes]
                feature = [
                    (w[out, into], b[..., out] + F.linear(h, w[out, : into.start]))
                    for (w, b), h, into, out in zip(weights, known, rows, rows[1:], strict=False)
                ]
                root, log_slope = _Feature(self, feature).inverse(y[:, i : i + 1], y[:, :0])
                log_det = log_det + log_slope[:, 0]
                h = root
                for j, (weight, bias) in enumerate(feature):
                    known[j] = torch.cat([known[j], h], 1)
                    h = torch.tanh(F.linear(h, weight) + bias)
        return known[0], log_det


class _Feature(Monotone):
    """One feature, given those before it."""

    @property
    def outputs(self) -> int:
        return 0

    def __init__(self, layer: BlockAutoregressive, weights: Sequence[tuple[Tensor, Tensor]]):
        self.layer, self.weights = layer, weights

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer._through(x, self.weights)


def _log_slope_of_tanh(h: Tensor) -> Tensor:
    """log (1 - tanh² h), without underflow."""
    return 2 * (math.log(2) - h - F.softplus(-2 * h))
