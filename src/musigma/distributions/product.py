"""Several independent latents as one vector: continuous next to discrete, for instance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence, register_kl

from musigma.distributions.gaussian import StandardNormal
from musigma.distributions.latents import POSTERIORS, PosteriorHead
from musigma.distributions.onehot import OneHotLatents, UniformOneHot
from musigma.gaussian import DiagonalGaussian, EventDistribution, Format, Shape
from musigma.trace import center_of, with_gradient

__all__ = ["Product", "ProductHead"]


class Product(EventDistribution):
    """Independent distributions; an event is a vector, their flattened events one after another.

    Args:
        parts: The distributions, of one batch shape. Its draws carry a gradient if those of all
            parts do; if one part is estimated by the score function, all are.

    Example:
        >>> numbers = DiagonalGaussian(torch.zeros(4, 2), torch.zeros(4, 2), 1)
        >>> classes = OneHotLatents(torch.zeros(4, 1, 3), gradient="straight-through")
        >>> Product(numbers, classes).rsample().shape
        torch.Size([4, 5])
    """

    def __init__(self, *parts: Any):
        self.parts = parts
        self.sizes = [math.prod(p.event_shape) for p in parts]
        self.has_rsample = all(p.has_rsample for p in parts)
        if any(getattr(p, "gradient", None) for p in parts):
            with_gradient(self, "score")
        super().__init__(parts[0].batch_shape, (sum(self.sizes),))

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        flat = [
            v.flatten(v.ndim - len(p.event_shape)) for v, p in zip(values, self.parts, strict=True)
        ]
        return torch.cat(flat, -1)

    def _split(self, value: Tensor) -> list[Tensor]:
        parts = value.split(self.sizes, -1)
        return [v.unflatten(-1, p.event_shape) for v, p in zip(parts, self.parts, strict=True)]

    @property
    def mean(self) -> Tensor:
        """The means."""
        return self._joined([p.mean for p in self.parts])

    @property
    def center(self) -> Tensor:
        """The centers."""
        return self._joined([center_of(p) for p in self.parts])

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw each part."""
        return self._joined([p.sample(sample_shape, temperature=temperature) for p in self.parts])

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw each part, with its gradient."""
        return self._joined([p.rsample(sample_shape, temperature=temperature) for p in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the log densities and masses, in nats, of the batch shape."""
        parts = zip(self.parts, self._split(value), strict=True)
        return sum((p.log_prob(v) for p, v in parts), torch.zeros((), device=value.device))

    def whiten(self, value: Tensor) -> Tensor:
        """Each part that can be whitened, and the others as they are."""
        return self._each("whiten", value)

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return self._each("unwhiten", noise)

    def _each(self, method: str, value: Tensor) -> Tensor:
        parts = zip(self.parts, self._split(value), strict=True)
        return self._joined([getattr(p, method, lambda v: v)(v) for p, v in parts])


@register_kl(Product, Product)
def product_kl(q: Product, p: Product) -> Tensor:
    """The sum of the divergences of the parts, in nats."""
    pairs = zip(q.parts, p.parts, strict=True)
    return torch.stack([kl_divergence(a, b) for a, b in pairs]).sum(0)


class ProductHead(nn.Module):
    """Heads whose distributions are the parts of a `Product`, as the head of a prior.

    Args:
        heads: The heads.
    """

    def __init__(self, *heads: nn.Module):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, *given: Any) -> Product:
        """The distribution."""
        return Product(*(head(*given) for head in self.heads))


@POSTERIORS.register
def categorical(
    size: int,
    net: Callable[[int], nn.Module],
    format: Format,
    *,
    classes: int = 10,
    gradient: str = "straight-through",
    relaxation: float = 0.5,
) -> PosteriorHead:
    """`OneHotLatents`, `size` variables of some classes, with a uniform prior."""
    if format != Format():
        raise ValueError(f"format: categorical latents have no mean and scale; got '{format}'")
    how: Any = {"gradient": gradient, "relaxation": relaxation}

    def read(h: Tensor) -> OneHotLatents:
        return OneHotLatents(h.unflatten(1, (size, classes)), **how)

    prior = partial(UniformOneHot, size, classes)
    return PosteriorHead(net(size * classes), read, event=(size, classes), prior=prior)


@POSTERIORS.register
def joint(
    size: int,
    net: Callable[[int], nn.Module],
    format: Format,
    *,
    variables: int = 1,
    classes: int = 10,
    gradient: str = "straight-through",
    relaxation: float = 0.5,
) -> PosteriorHead:
    """A diagonal Gaussian of `size` dimensions, next to categorical variables.

    The prior is N(0, I) next to uniform classes. (Dupont, "Learning Disentangled Joint Continuous
    and Discrete Representations", 2018, arXiv:1804.00104, with `gradient=relaxed`.)
    """
    how: Any = {"gradient": gradient, "relaxation": relaxation}

    def read(h: Tensor) -> Product:
        mean, log_std = format.split(h[:, : 2 * size])
        logits = h[:, 2 * size :].unflatten(1, (variables, classes))
        return Product(DiagonalGaussian(mean, log_std, 1), OneHotLatents(logits, **how))

    def prior() -> ProductHead:
        return ProductHead(StandardNormal((size,)), UniformOneHot(variables, classes))

    def saturation(h: Tensor) -> Tensor:
        return format.saturation(h[:, : 2 * size])

    outputs, event = 2 * size + variables * classes, (size + variables * classes,)
    return PosteriorHead(net(outputs), read, event=event, prior=prior, saturation=saturation)
