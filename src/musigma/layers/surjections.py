"""Surjections: maps that lose something, which the other direction draws.

An inference surjection computes z = f(x) and scores what f loses, p(lost | z); generation draws
it. log w is exact, since x determines both. `Swapped` exchanges the directions: then inference
draws, by q(lost | x), and log w is a bound. (Nielsen et al., "SurVAE Flows: Surjections to Bridge
the Gap between VAEs and Flows", 2020, arXiv:2007.02731.)

Values z of `Abs` and `Sort` cover all of space, so that any prior of z fits and no mass is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import conditioned
from musigma.distributions import FactorizedBernoulli, FactorizedCategorical, PlackettLuce
from musigma.layers.draws import Split
from musigma.model import Bijection, Inverse, Layer
from musigma.tensors import at_least_float32, sum_event
from musigma.trace import Trace

__all__ = ["Abs", "Augment", "MaxPool", "Sort", "Swapped"]


class _Positive(Bijection):
    """Positive numbers to all numbers, the inverse of softplus: y = x + log(1 - exp(-x))."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.clamp(min=torch.finfo(x.dtype).tiny)
        log_loss = torch.log(-torch.expm1(-x))
        return x + log_loss, -sum_event(log_loss, x.ndim - 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(y, torch.zeros_like(y)), sum_event(F.logsigmoid(y), y.ndim - 1)


class _Increasing(Bijection):
    """Rows whose first features increase, to all of space: gaps go through `_Positive`."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = _Positive()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = x.unsqueeze(-1) if x.ndim == 2 else x
        gaps, log_det = self.positive(rows[:, 1:, 0] - rows[:, :-1, 0])
        first = torch.cat([rows[:, :1, 0], gaps], 1).unsqueeze(-1)
        return torch.cat([first, rows[:, :, 1:]], -1).view_as(x), log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = y.unsqueeze(-1) if y.ndim == 2 else y
        gaps, log_det = self.positive.inverse(rows[:, 1:, 0])
        first = torch.cat([rows[:, :1, 0], gaps], 1).cumsum(1).unsqueeze(-1)
        return torch.cat([first, rows[:, :, 1:]], -1).view_as(y), log_det


class Abs(Layer):
    r"""Absolute values, for data that are symmetric about zero; what is lost are the signs.

    .. math:: |x| = \log(1 + e^z), \quad
        \log w = \log p(z) + \log p(\mathrm{signs} | z) - \sum_i \log(1 - e^{-|x_i|})

    Args:
        signs: A head: z, and the context if there is one, to the distribution of zeros (negative)
            and ones of the shape of z. None: both are equally likely.

    Example:
        >>> layer = Abs()
        >>> z = layer.infer(torch.tensor([[-2.0, 2.0]]), Trace(scoring=False))
        >>> z
        tensor([[1.8546, 1.8546]])
    """

    def __init__(self, signs: nn.Module | None = None):
        super().__init__()
        self.signs, self.positive = signs, _Positive()

    def variables(self) -> Iterator[nn.Module]:
        """This layer itself: the signs."""
        yield self

    def _signs(self, z: Tensor, context: Any) -> Distribution:
        if self.signs is None:
            return FactorizedBernoulli(torch.zeros_like(z))
        return conditioned(self.signs, z, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return z; score the signs."""
        x = at_least_float32(x)
        z = trace.bijection(self.positive, x.abs(), context)
        trace.p(self, self._signs(z, context), (x > 0).to(z))
        return z

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Draw the signs."""
        signs = 2 * trace.p(self, self._signs(z, context)) - 1
        return signs * trace.bijection(self.positive, z, context)


class Sort(Layer):
    r"""Sorted elements, for data whose elements are exchangeable; what is lost is their order.

    Elements are the numbers of a vector (B, N), or the rows of (B, N, F), sorted by their first
    feature. z has the least of them and, for the gaps g between neighbours, log(exp(g) - 1). If
    all orders are equally likely, log w is the same for every order of the elements.

    .. math:: \log w = \log p(z) + \log p(\mathrm{order} | z) - \sum_i \log(1 - e^{-g_i})

    Args:
        order: A head: z, and the context if there is one, to a distribution of permutations (N,),
            such as `PlackettLuce`: the place of the least element, then of the next. None: all
            are equally likely.
    """

    def __init__(self, order: nn.Module | None = None):
        super().__init__()
        self.order, self.increasing = order, _Increasing()

    def variables(self) -> Iterator[nn.Module]:
        """This layer itself: the order."""
        yield self

    def _order(self, z: Tensor, context: Any) -> Distribution:
        if self.order is None:
            return PlackettLuce(z.new_zeros(z.shape[:2]))
        return conditioned(self.order, z, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return z; score the order."""
        x = at_least_float32(x)
        order = (x if x.ndim == 2 else x[..., 0]).argsort(1)
        z = trace.bijection(self.increasing, x.gather(1, _like(order, x)), context)
        trace.p(self, self._order(z, context), order.to(z))
        return z

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Draw the order."""
        order = trace.p(self, self._order(z, context)).long()
        x = trace.bijection(self.increasing, z, context)
        return torch.empty_like(x).scatter(1, _like(order, x), x)


def _like(order: Tensor, x: Tensor) -> Tensor:
    """Positions (B, N) of rows as positions of all their features."""
    return order if x.ndim == 2 else order.unsqueeze(-1).expand_as(x)


class MaxPool(Layer):
    r"""The largest value of each 2x2 block; what is lost are its place and the other three.

    .. math:: \log w = \log p(z) + \log p(\mathrm{place} | z) + \log p(\mathrm{gaps} | z)

    where the gaps, z minus the other values in reading order, are not negative.

    Args:
        gaps: A head: z (B, C, H / 2, W / 2), and the context if there is one, to the distribution
            of the gaps (3 C, H / 2, W / 2); channels 3 c to 3 c + 2 are those of channel c.
        place: A head: z to the distribution of levels 0 to 3, of the shape of z: the places
            0 1 / 2 3. None: all are equally likely.

    Raises:
        ValueError: For an odd height or width.
    """

    def __init__(self, gaps: nn.Module, place: nn.Module | None = None):
        super().__init__()
        self.gaps, self.place = gaps, place

    def variables(self) -> Iterator[nn.Module]:
        """This layer itself, the places; then the head of the gaps."""
        yield self
        yield self.gaps

    def _place(self, z: Tensor, context: Any) -> Distribution:
        if self.place is None:
            return FactorizedCategorical(z.new_zeros(len(z), 4, *z.shape[1:]))
        return conditioned(self.place, z, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return the largest values; score the gaps and the places."""
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x: MaxPool needs images (B, C, H, W) of even sides; got {tuple(x.shape)}"
            )
        blocks = F.pixel_unshuffle(at_least_float32(x), 2).unflatten(1, (-1, 4))
        z, place = blocks.max(2)
        gaps = z.unsqueeze(2) - blocks.gather(2, _others(place))
        trace.p(self.gaps, conditioned(self.gaps, z, context), gaps.flatten(1, 2))
        trace.p(self, self._place(z, context), place.to(z))
        return z

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Draw the places, then the gaps."""
        place = trace.p(self, self._place(z, context)).long()
        gaps = trace.p(self.gaps, conditioned(self.gaps, z, context)).unflatten(1, (-1, 3))
        largest = z.unsqueeze(2)
        blocks = largest.expand(-1, -1, 4, -1, -1).scatter(2, _others(place), largest - gaps)
        return F.pixel_shuffle(blocks.flatten(1, 2), 2)


def _others(place: Tensor) -> Tensor:
    """The three places of a block (B, C, H, W) other than this one, (B, C, 3, H, W)."""
    three = torch.arange(3, device=place.device).reshape(3, 1, 1)
    return three + (three >= place.unsqueeze(2))


class Swapped(Layer):
    """A surjection with its directions exchanged: what it draws in generation, q draws.

    log w is a bound of log p(x), -log q(lost | z) in place of log p(lost | z).

    Args:
        layer: A layer that draws only in generation, such as `Abs`, `Sort`, `MaxPool` or `Split`.

    Raises:
        ValueError: If the layer draws in inference.
    """

    exact = False

    def __init__(self, layer: Layer):
        super().__init__()
        if not layer.exact:
            raise ValueError(f"layer: {type(layer).__name__} draws in inference as well")
        self.layer = layer
        bijections = (m for m in layer.modules() if isinstance(m, Bijection))
        self.inverses = nn.ModuleList(map(Inverse, bijections))

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """What the layer generates."""
        return self.layer.generate(x, _Exchanged(trace, self), context)  # pyright: ignore

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """What the layer infers."""
        return self.layer.infer(z, _Exchanged(trace, self), context)  # pyright: ignore


class _Exchanged:
    """A trace in which p and q, and both directions, are exchanged, for one layer."""

    def __init__(self, trace: Trace, owner: Swapped):
        self.trace, self.owner = trace, owner

    def p(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """A draw of q while inferring, and its score while generating."""
        return self.trace.q(self.owner if site is self.owner.layer else site, dist, value)

    def bijection(self, layer: Bijection, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The other direction of a bijection."""
        inverse = next(i for i in self.owner.inverses if i.bijection is layer)
        return self.trace.bijection(inverse, x, context)


class Augment(Swapped):
    """More channels: e ~ q(e | x) is appended, and dropped in generation.

    A flow of more dimensions is more flexible (Huang, Dinh, Courville, "Augmented Normalizing
    Flows", 2020, arXiv:2002.07101; Chen et al., "VFlow", 2020, arXiv:2002.09741). It bounds
    log p(x) by log p(x, e) - log q(e | x), and is tight if q is the posterior of e. It is a
    `Split` with its directions exchanged.

    Args:
        noise: A head: x, and the context if there is one, to the distribution of e, (E, ...) for
            data (C, ...).
        channels: C.

    Example:
        >>> from musigma.gaussian import GaussianHead
        >>> layer = Augment(GaussianHead(nn.Linear(2, 6), event_ndims=1), channels=2)
        >>> layer.infer(torch.zeros(4, 2), Trace()).shape
        torch.Size([4, 5])
    """

    def __init__(self, noise: nn.Module, channels: int):
        super().__init__(Split(noise, keep=channels))
