"""Categorical variables of which each depends on the previous ones, as a prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.context import conditioned
from musigma.distributions.latents import PRIORS, Latents
from musigma.gaussian import EventDistribution, Shape
from musigma.nets import MLP
from musigma.tensors import gumbel_like, per_example

__all__ = ["AutoregressiveOneHot", "AutoregressivePrior"]


class AutoregressiveOneHot(EventDistribution):
    r"""L categorical variables of K classes, as one-hot rows (L, K), one given the previous ones.

    .. math:: \log p(z) = \sum_l z_l \cdot \log\mathrm{softmax}(f_l(z_1, \ldots, z_{l-1}))

    Args:
        nets: L networks; f_l takes the previous rows (B, 1 + (l - 1) K), behind a one.
        classes: K.
        context: One row for each distribution of the batch, or None.
        like: A tensor of the type and the device of z.
    """

    def __init__(
        self, nets: Sequence[nn.Module], classes: int, context: Tensor | None, like: Tensor
    ):
        self.nets, self.classes, self.context, self.like = nets, classes, context, like
        super().__init__(() if context is None else (len(context),), (len(nets), classes))

    @property
    def support(self) -> constraints.Constraint:
        """One-hot rows."""
        return constraints.independent(constraints.one_hot, 1)

    @property
    def center(self) -> Tensor:
        """The most probable class of each variable, given those of the previous ones."""
        n = 1 if self.context is None else len(self.context)
        z = self._drawn(n, self.context, 0.0)
        return z[0] if self.context is None else z

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw one variable after the other; log probabilities are divided by `temperature`."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        context, batch = self.context, shape[len(sample_shape) :]
        if context is not None:
            context = context.expand(*sample_shape, *context.shape).flatten(0, -2)
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.repeat_interleave(shape.numel() // len(temperature))
        z = self._drawn(shape.numel(), context, temperature)
        return z.reshape(*sample_shape, *batch, *self.event_shape)

    @torch.no_grad()
    def _drawn(self, n: int, context: Tensor | None, temperature: float | Tensor) -> Tensor:
        z = self.like.new_ones(n, 1)
        for net in self.nets:
            log_probs = conditioned(net, z, context).log_softmax(-1)
            scores = log_probs + per_example(temperature, log_probs) * gumbel_like(log_probs)
            z = torch.cat([z, F.one_hot(scores.argmax(-1), self.classes).to(z)], 1)
        return z[:, 1:].unflatten(1, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, shape (B,) for a value (B, L, K)."""
        rows = torch.cat([value.new_ones(len(value), 1), value.flatten(1)], 1)
        total = value.new_zeros(len(value))
        for i, net in enumerate(self.nets):
            logits = conditioned(net, rows[:, : 1 + i * self.classes], self.context)
            total = total + (value[:, i] * logits.log_softmax(-1)).sum(-1)
        return total


class AutoregressivePrior(nn.Module):
    """The head of a prior that is `AutoregressiveOneHot`, with a perceptron for each variable.

    Args:
        variables: L.
        classes: K.
        hidden: Width of the hidden layer of each network.
        context: Number of features of the context.

    Example:
        >>> p = AutoregressivePrior(3, 4)()
        >>> p.log_prob(p.sample((5,))).shape
        torch.Size([5])
    """

    like: Tensor
    slow_inverse = "one step per variable"

    def __init__(self, variables: int, classes: int, *, hidden: int = 64, context: int = 0):
        super().__init__()
        self.classes, self.context = classes, context
        self.nets = nn.ModuleList(
            MLP(1 + i * classes, classes, hidden=[hidden], context=context)
            for i in range(variables)
        )
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> AutoregressiveOneHot:
        """The distribution; a prior is called with its context as the only argument."""
        context = given if context is None else context
        if self.context and context is None:
            raise ValueError(f"context: this prior needs {self.context} features; got none")
        given = context if self.context else None
        return AutoregressiveOneHot([*self.nets], self.classes, given, self.like)


@PRIORS.register
def autoregressive(latents: Latents, *, hidden: int = 64) -> AutoregressivePrior:
    """`AutoregressiveOneHot`, for categorical latents.

    Raises:
        ValueError: For other latents; those of real numbers have autoregressive flows.
    """
    if len(latents.event) != 2:
        raise ValueError(
            "prior: 'autoregressive' is for the posterior 'categorical'; for real vectors use "
            "'maf', or 'nsf kind=autoregressive'"
        )
    return AutoregressivePrior(*latents.event, hidden=hidden, context=latents.context)
