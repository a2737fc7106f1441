"""Sequences of codes, each of which depends on those before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from musigma.gaussian import EventDistribution, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example

__all__ = ["AutoregressiveCodes"]


class AutoregressiveCodes(EventDistribution):
    r"""M codes 0 .. K - 1: :math:`\log p(c) = \sum_i \log p(c_i | c_0, \ldots, c_{i-1})`.

    Scoring takes one pass of a causal network; sampling takes one step per code.

    Args:
        net: From one-hot codes (B, K, M) to logits of the same shape, those of position i from the
            codes before i; with ``stream(like, context)``, as `musigma.nets.CausalTransformer`
            has. Its attribute `tokens` is M.
        quantizer: Its `parts` and `nearest` are `whiten` and `unwhiten`: interpolation is between
            the vectors of codes, and ends with the nearest codes.
        context: Of the network, one row per example; None: the batch shape is ().
    """

    element = constraints.nonnegative_integer

    def __init__(self, net: Any, quantizer: Any, context: Tensor | None = None):
        self.net, self.quantizer, self.context = net, quantizer, context
        super().__init__(() if context is None else context.shape[:1], (net.tokens,))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,)."""
        codes = value.long().reshape(-1, self.net.tokens)
        logits = at_least_float32(self.net(self._one_hot(codes), self._context(len(codes))))
        each = logits.log_softmax(1).gather(1, codes[:, None])[:, 0]
        return each.sum(1).reshape(value.shape[:-1])

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw codes, one after the other; logits are divided by the temperature."""
        return self.unrolled(
            sample_shape,
            lambda i, log_p: log_p + per_example(temperature, log_p) * gumbel_like(log_p),
        )

    @property
    def mode(self) -> Tensor:
        """The most probable code at each position, given those before."""
        return self.unrolled((), lambda i, log_p: log_p)

    @torch.no_grad()
    def unrolled(self, sample_shape: Shape, score: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The codes of the highest ``score(i, log_p)``, for i = 0 .. M - 1 and log_p (B, K)."""
        n = math.prod((*sample_shape, *self.batch_shape))
        home = next(self.net.parameters())
        like = home.new_zeros(n, self.net.owners[-1] + 1, self.net.tokens)
        outputs, last, codes = self.net.stream(like, self._context(n)), like[..., :1], []
        for i in range(self.net.tokens):
            log_p = at_least_float32(outputs(last, i)[..., 0]).log_softmax(1)
            codes.append(score(i, log_p).argmax(1))
            last = self._one_hot(codes[-1][:, None])
        shape = (*sample_shape, *self.batch_shape, self.net.tokens)
        return torch.stack(codes, 1).to(home).reshape(shape)

    def whiten(self, value: Tensor) -> Tensor:
        """The vectors of codes."""
        return self.quantizer.parts(value)

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The codes of the nearest vectors."""
        return self.quantizer.nearest(noise).to(noise)

    def _context(self, n: int) -> Tensor | None:
        """The context of n values: its rows, as often as there are values of each."""
        if self.context is None or n == len(self.context):
            return self.context
        return self.context.repeat(n // len(self.context), *(1,) * (self.context.ndim - 1))

    def _one_hot(self, codes: Tensor) -> Tensor:
        one_hot = F.one_hot(codes, self.net.owners[-1] + 1).mT
        return one_hot.to(next(self.net.parameters()).dtype)
