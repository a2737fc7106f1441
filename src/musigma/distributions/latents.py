"""Posteriors and priors of the latents of a VAE, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import conditioned
from musigma.distributions.gaussian import StandardNormal
from musigma.gaussian import Format, GaussianHead
from musigma.named import Registry
from musigma.tensors import at_least_float32

__all__ = ["POSTERIORS", "PRIORS", "Latents", "PosteriorHead"]

POSTERIORS = Registry("posterior", "size, net, format", "and the flows of `musigma list flow`")
"""Posteriors by name: functions that return the head of an encoder, q(z | x).

They are called with the number of latent dimensions, a function that builds a network for a number
of outputs, and a `Format`. A head whose z is not a vector of this many real numbers is a
`PosteriorHead`, or has its attributes `event` and `prior`.
"""

PRIORS = Registry("prior", "latents", "auto, and the flows of `musigma list flow`")
"""Priors by name: functions of `Latents` that return a head, or a model, of z."""


@dataclass(frozen=True)
class Latents:
    """What a prior is built for.

    Attributes:
        encoder: The head of the posterior.
        event: The shape of z.
        data: The shape of the encoder's input.
        context: Number of features of the context, 0 for none.
        depth: The usual number of layers of a flow.
    """

    encoder: nn.Module
    event: tuple[int, ...]
    data: tuple[int, ...]
    context: int = 0
    depth: int = 4

    def vector(self, name: str) -> int:
        """The number of dimensions, for a prior that is a density of vectors of real numbers.

        Raises:
            ValueError: If z is something else.
        """
        if self.own_prior is not None:
            raise ValueError(
                f"prior: {name!r} is a density of real vectors, and the latents of this posterior "
                f"are of another kind; use 'auto', which is {self.own_prior()}, or 'vamp'"
            )
        return self.event[0]

    @property
    def own_prior(self) -> Callable[[], nn.Module] | None:
        """Builds the prior that belongs to the posterior; None if z is a real vector."""
        return getattr(self.encoder, "prior", None)


class PosteriorHead(nn.Module):
    """A network whose output, in float32 or better, is read as a posterior q(z | x).

    Args:
        net: ``net(x)`` or ``net(x, context)``.
        read: ``read(h)`` is the distribution for the network's output h.
        event: The shape of z.
        prior: Builds the head of the prior that belongs to the posterior, if z is not a vector of
            real numbers.
        saturation: Optionally, the share of the scales of ``h`` that are at a limit.
    """

    def __init__(
        self,
        net: nn.Module,
        read: Callable[[Tensor], Distribution],
        *,
        event: Sequence[int],
        prior: Callable[[], nn.Module] | None = None,
        saturation: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.net, self.read, self.event, self.prior = net, read, tuple(event), prior
        self.saturation = saturation

    def forward(self, given: Tensor, context: Tensor | None = None) -> Distribution:
        """q(z | given)."""
        return self.read(at_least_float32(conditioned(self.net, given, context)))

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if self.saturation is not None:
            yield self.net, self.saturation


def within(format: Format, low: float, high: float) -> Format:
    """A format whose bounds of log_std are at most these."""
    if format.bounds is not None:
        low, high = max(low, format.bounds[0]), min(high, format.bounds[1])
    return replace(format, bounds=(low, high))


@POSTERIORS.register
def diagonal(size: int, net: Callable[[int], nn.Module], format: Format) -> GaussianHead:
    """A Gaussian with independent coordinates (`DiagonalGaussian`)."""
    return GaussianHead(net(2 * size), event_ndims=1, format=format)


@PRIORS.register
def normal(latents: Latents) -> StandardNormal:
    """N(0, I)."""
    return StandardNormal((latents.vector("normal"),))
