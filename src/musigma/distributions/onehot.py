"""Categorical latents, as one-hot vectors, with a named gradient estimator."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints, register_kl

from musigma.context import conditioned
from musigma.gaussian import EventDistribution, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example
from musigma.trace import check_enumerable, with_gradient

__all__ = ["OneHotHead", "OneHotLatents", "UniformOneHot"]

Gradient = Literal["relaxed", "straight-through", "score", "enumerate"]


class OneHotLatents(EventDistribution):
    r"""L independent categorical variables of K classes each, as one-hot rows (L, K).

    .. math:: \log p(z) = \sum_{lk} z_{lk} \log p_{lk}, \quad p_l = softmax(logits_l)

    The KL divergence between two of them is registered with torch, exact.

    Args:
        logits: Shape (\*batch, L, K).
        gradient: How draws carry a gradient to the logits: `relaxed`: Gumbel-softmax (Jang, Gu,
            Poole, 2017, arXiv:1611.01144; Maddison, Mnih, Teh, 2017, arXiv:1611.00712), whose
            draws are not one-hot, so the ELBO is not a bound; `straight-through`: one-hot draws
            with the gradient of the relaxed ones; `score` and `enumerate`: see
            `musigma.trace.with_gradient`. None: no gradient; training refuses such a posterior.
        relaxation: Temperature of the Gumbel-softmax.

    Raises:
        ValueError: For another gradient.

    Example:
        >>> q = OneHotLatents(torch.zeros(3, 2, 4), gradient="straight-through")
        >>> (q.rsample() > 0.5).sum(-1)
        tensor([[1, 1],
                [1, 1],
                [1, 1]])
    """

    def __init__(
        self, logits: Tensor, *, gradient: Gradient | None = None, relaxation: float = 0.5
    ):
        self.log_probs = at_least_float32(logits).log_softmax(-1)
        self.relaxation, self.relaxed = relaxation, gradient == "relaxed"
        self.has_rsample = gradient in ("relaxed", "straight-through")
        if gradient is not None and not self.has_rsample:
            with_gradient(self, gradient)
        super().__init__(logits.shape[:-2], logits.shape[-2:])

    @property
    def support(self) -> constraints.Constraint:
        """One-hot rows."""
        return constraints.independent(constraints.one_hot, 1)

    @property
    def mean(self) -> Tensor:
        """The probabilities."""
        return self.log_probs.exp()

    @property
    def mode(self) -> Tensor:
        """The most probable class of each variable."""
        return self._one_hot(self.log_probs)

    @staticmethod
    def _one_hot(scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)

    def _perturbed(self, shape: Shape, temperature: float | Tensor) -> Tensor:
        """Logits with Gumbel noise: their largest entry is a draw."""
        logits = self.log_probs.expand(*shape, *self.log_probs.shape)
        return logits + per_example(temperature, logits) * gumbel_like(logits)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw one-hot rows; the logits are divided by `temperature`."""
        with torch.no_grad():
            return self._one_hot(self._perturbed(sample_shape, temperature))

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw with the relaxed or the straight-through gradient."""
        perturbed = self._perturbed(sample_shape, temperature)
        soft = (perturbed / self.relaxation).softmax(-1)
        return soft if self.relaxed else self._one_hot(perturbed) + soft - soft.detach()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p in nats, of the batch shape. It is linear in the value, which may be relaxed."""
        return (at_least_float32(value) * self.log_probs).sum((-2, -1))

    def entropy(self) -> Tensor:
        """Entropy in nats, of the batch shape."""
        return -(self.mean * self.log_probs).sum((-2, -1))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        r"""All K^L values, shape (K^L, \*batch, L, K), or with batch dimensions of 1.

        Raises:
            ValueError: If there are too many.
        """
        variables, classes = self.event_shape
        check_enumerable(classes**variables)
        codes = torch.cartesian_prod(*[torch.arange(classes)] * variables)
        values = F.one_hot(codes.reshape(-1, variables), classes).to(self.log_probs)
        values = values.reshape(-1, *(1,) * len(self.batch_shape), variables, classes)
        return values.expand(-1, *self.batch_shape, -1, -1) if expand else values


@register_kl(OneHotLatents, OneHotLatents)
def one_hot_kl(q: OneHotLatents, p: OneHotLatents) -> Tensor:
    """KL(q || p) in nats, summed over the variables."""
    return (q.mean * (q.log_probs - p.log_probs)).sum((-2, -1))


class OneHotHead(nn.Module):
    """A network whose output (B, L K) is read as `OneHotLatents` of L variables.

    Args:
        net: ``net(given)`` or ``net(given, context)``.
        variables: L.
        classes: K.
        gradient: As in `OneHotLatents`.
        relaxation: As in `OneHotLatents`.

    Example:
        >>> OneHotHead(nn.Linear(5, 12), 3, 4, gradient="score")(torch.randn(2, 5)).event_shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        net: nn.Module,
        variables: int,
        classes: int,
        *,
        gradient: Gradient | None = None,
        relaxation: float = 0.5,
    ):
        super().__init__()
        self.net, self.event = net, (variables, classes)
        self.gradient: Gradient | None = gradient
        self.relaxation = relaxation

    def forward(self, given: Tensor, context: Tensor | None = None) -> OneHotLatents:
        """The distribution."""
        logits = conditioned(self.net, given, context).unflatten(1, self.event)
        return OneHotLatents(logits, gradient=self.gradient, relaxation=self.relaxation)

    def emitters(self) -> tuple[()]:
        """None: logits are not scales."""
        return ()


class UniformOneHot(nn.Module):
    """The prior of L variables of K classes in which all classes are equally likely."""

    zeros: Tensor

    def __init__(self, variables: int, classes: int):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(variables, classes), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> OneHotLatents:
        """The distribution, of batch shape ()."""
        return OneHotLatents(self.zeros)
