"""A network whose Lipschitz constant is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join

__all__ = ["LipSwish", "LipschitzMLP", "spectral_bound"]


def spectral_bound(matrix: Tensor, *, squarings: int = 6) -> Tensor:
    r"""An upper bound of the largest singular value of a matrix, by repeated squaring.

    .. math:: \sigma_{\max}(W) \le \|W\|_p = \Big(\sum_i \sigma_i^p\Big)^{1/p}
        \le n^{1/p}\, \sigma_{\max}(W), \quad p = 2^{\text{squarings} + 1}

    Power iteration approaches the singular value from below, so what it normalizes may exceed
    its bound; this never does. It has no state, and its gradient is exact, but second derivatives
    are not. (Delattre, Barthélemy, Araujo, Allauzen, "Efficient Bound of Lipschitz Constant for
    Convolutional Layers by Gram Iteration", 2023, arXiv:2305.16173.)

    Args:
        matrix: W, of any shape; n is its smaller side.
        squarings: How often W^T W is squared; with 6, p = 128.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 2.9, 1.0]))
        >>> bound = spectral_bound(w)
        >>> bool(3 <= bound <= 3 * 3 ** (1 / 128))
        True
    """
    with torch.no_grad():
        scaled = matrix / matrix.abs().amax().clamp(min=1e-30)
        rest = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        gram = scaled.t() @ scaled + 1e-30 * rest
        log_gram = log_rest = torch.zeros((), dtype=gram.dtype, device=gram.device)
        for _ in range(squarings):  # with A = W^T W: from A^n and A^(n - 1) to A^2n and A^(2n - 1)
            size = gram.diagonal().sum()
            gram, log_gram = gram / size, log_gram + size.log()
            rest, log_rest = rest @ gram, log_rest + log_gram
            gram, log_gram = gram @ gram, 2 * log_gram
        log_sum = gram.diagonal().sum().log() + log_gram  # of all sigma^p
        log_factor = log_rest + log_sum * (2 ** -(squarings + 1) - 1)
        slope = scaled @ (rest * log_factor.exp())  # of the norm, which is linear along W
    return (matrix * slope).sum()


class LipSwish(nn.Module):
    r"""x · sigmoid(β x) / 1.1 with a learned β > 0, whose slope is at most 1.

    (Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative Modeling",
    2019, arXiv:1906.02735.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        return x * torch.sigmoid(F.softplus(self.raw) * x) / 1.1


class LipschitzMLP(nn.Module):
    r"""A perceptron (B, inputs) to (B, outputs) with a bounded Lipschitz constant in its input.

    .. math:: \|g(x) - g(y)\|_2 \le L\, \|x - y\|_2

    Every weight is divided by what its `spectral_bound` exceeds its share of L by; activations
    are `LipSwish`. How the output depends on the context is not bounded.

    Args:
        inputs: Features in.
        outputs: Features out.
        hidden: Width of each hidden layer.
        context: Number of features of the context.
        bound: L.

    Raises:
        ValueError: If the bound is not positive.

    Example:
        >>> net, x = LipschitzMLP(3, 3, hidden=[16, 16]), torch.randn(2, 3)
        >>> move = torch.randn(2, 3)
        >>> bool(((net(x + move) - net(x)).norm(dim=1) <= 0.97 * move.norm(dim=1)).all())
        True
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        bound: float = 0.97,
    ):
        super().__init__()
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number; got {bound}")
        self.context, self.bound = context, bound
        widths = [inputs, *hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.activations = nn.ModuleList(LipSwish() for _ in hidden)
        self.given_context = nn.Linear(context, widths[1], bias=False) if context else None

    def given(self, context: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The function of x that this network is, given a context; its weights are ready."""
        layers: Any = self.layers
        share = self.bound ** (1 / len(self.layers))
        weights = [
            layer.weight * (share / spectral_bound(layer.weight).clamp(min=share))
            for layer in layers
        ]
        biases = [layer.bias for layer in layers]

        def function(x: Tensor) -> Tensor:
            h = F.linear(x, weights[0], biases[0])
            if self.given_context is not None:
                h = h + self.given_context(join(x[:, :0], context, self.context))
            for weight, bias, activation in zip(
                weights[1:], biases[1:], self.activations, strict=True
            ):
                h = F.linear(activation(h), weight, bias)
            return h

        return function

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output."""
        return self.given(context)(x)
