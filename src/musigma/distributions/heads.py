"""Modules whose output is a distribution: likelihoods of pixels, and priors.

A head is a module whose ``forward(given, context)`` returns a distribution with batch shape (B,),
or () where nothing is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import conditioned
from musigma.distributions.levels import (
    Bernoulli,
    BetaBinomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    LogitNormal,
    Uniform,
)
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead, at_least_float32
from musigma.nets.context import pooled

__all__ = [
    "LearnedNormal",
    "LikelihoodHead",
    "LogitNormalHead",
    "OptimalGaussianHead",
    "StandardNormal",
    "StandardUniform",
    "likelihood",
]


class StandardNormal(nn.Module):
    """N(0, I) over events of a shape, whatever is given."""

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape ()."""
        return DiagonalGaussian(self.zeros, self.zeros, self.zeros.ndim)


class StandardUniform(nn.Module):
    """Uniform on [0, 1) over events of a shape: noise for dequantisation, and the null model."""

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape () if nothing is given and (B,) otherwise."""
        zeros = self.zeros if given is None else self.zeros.expand(len(given), *self.zeros.shape)
        return Uniform(zeros, self.zeros.ndim)


class LearnedNormal(nn.Module):
    """A Gaussian with learned mean and log_std ("learn_top"), shifted by the context if any.

    Args:
        shape: Event shape.
        each: Of an image (C, H, W), whether each `channel` or each `pixel` has its own parameters.
        context: How many features the context has; 0 for none. It shifts whole channels.
        bounds: Of log_std, as in a `Format`.

    Raises:
        ValueError: For another `each`; or, on a forward pass, without the context declared.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        each: Literal["channel", "pixel"] = "channel",
        context: int = 0,
        bounds: tuple[float, float] | None = Format().bounds,
    ):
        super().__init__()
        if each not in ("channel", "pixel"):
            raise ValueError(f"each: expected 'channel' or 'pixel'; got {each!r}")
        self.shape, self.context = tuple(shape), context
        spread = () if each == "channel" else self.shape[1:]
        self.raw = nn.Parameter(torch.zeros(2 * shape[0], *spread))
        self.from_context = nn.Linear(context, 2 * shape[0], bias=False) if context else None
        if self.from_context is not None:
            nn.init.zeros_(self.from_context.weight)
        self.format = Format(dim=-len(self.shape), bounds=bounds)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None):
        """The distribution, of batch shape () without a context and (B,) with one.

        A prior's context is what it is given, so either argument serves.
        """
        context = given if context is None else context
        ones = (1,) * (len(self.shape) - 1)
        raw = self.raw if self.raw.ndim > 1 else self.raw.reshape(-1, *ones)
        if self.from_context is not None:
            if context is None:
                raise ValueError(f"context: this prior needs {self.context} features; got none")
            raw = raw + self.from_context(pooled(context)).reshape(len(context), -1, *ones)
        mean, log_std = (
            t.expand(*t.shape[: -len(self.shape)], *self.shape) for t in self.format.split(raw)
        )
        return DiagonalGaussian(mean, log_std, len(self.shape))


class LogitNormalHead(nn.Module):
    """A `LogitNormal` whose Gaussian is emitted by a head: learned noise for `Dequantize`.

    Args:
        base: A `GaussianHead` over events of the data's shape.
        levels: The head is given the data scaled from 0 .. levels - 1 to [-1, 1].
    """

    def __init__(self, base: GaussianHead, levels: int):
        super().__init__()
        self.base, self.levels = base, levels

    def forward(self, given: Tensor, context: Tensor | None = None) -> LogitNormal:
        """q(u | x)."""
        return LogitNormal(self.base(2 * given / max(1, self.levels - 1) - 1, context))


class OptimalGaussianHead(nn.Module):
    r"""A Gaussian likelihood whose one variance is at its optimum: the mean squared error.

    .. math:: \log p(x|z) = \log N(x; \mu(z), \sigma^2), \quad \sigma^2 = MSE

    While training, σ² is that of the batch, with its gradient; its running value is what sampling
    and evaluation use, where the likelihood is therefore an honest density of one example (Rybkin,
    Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021,
    arXiv:2006.13202).

    Args:
        net: Emits the mean.
        event_ndims: 1 for vectors, 3 for images.
        momentum: The share of the running log σ that a batch replaces.
        smallest: Lower bound of log σ.
    """

    log_std: Tensor

    def __init__(
        self, net: nn.Module, *, event_ndims: int, momentum: float = 0.05, smallest: float = -6.0
    ):
        super().__init__()
        self.net, self.event_ndims, self.momentum = net, event_ndims, momentum
        self.smallest = smallest
        self.register_buffer("log_std", torch.zeros(()))

    def forward(self, given: Tensor, context: Tensor | None = None) -> DiagonalGaussian:
        """The likelihood."""
        mean = at_least_float32(conditioned(self.net, given, context))
        if self.training:
            return _FittedGaussian(mean, self)
        return DiagonalGaussian(mean, self.log_std, self.event_ndims)


class _FittedGaussian(DiagonalGaussian):
    """A Gaussian that takes its variance from the value that it scores."""

    def __init__(self, mean: Tensor, head: OptimalGaussianHead):
        super().__init__(mean, head.log_std, head.event_ndims)
        self.head = head

    def log_prob(self, value: Tensor) -> Tensor:
        mse = (at_least_float32(value) - self.mean).square().mean()
        log_std = 0.5 * mse.clamp(min=math.exp(2 * self.head.smallest)).log()
        with torch.no_grad():  # a batch that is not finite must not stay in the running value
            kept = torch.where(log_std.isfinite(), log_std, self.head.log_std)
            self.head.log_std.lerp_(kept, self.head.momentum)
        return DiagonalGaussian(self.mean, log_std, self.event_ndims).log_prob(value)


Likelihood = Literal[
    "bernoulli", "categorical", "logistic", "logistic-mixture", "beta-binomial",
    "continuous-bernoulli", "gaussian",
]  # fmt: skip
CONTINUOUS = ("continuous-bernoulli", "gaussian")
"""Likelihoods that are densities: on integer data they need dequantisation."""


class LikelihoodHead(nn.Module):
    """A network whose output is read as one of this module's likelihoods; see `likelihood`."""

    def __init__(self, net: nn.Module, name: Likelihood, channels: int, levels: int, k: int):
        super().__init__()
        self.net, self.name, self.channels, self.levels, self.k = net, name, channels, levels, k
        self.format = Format(dim=2, bounds=(-7.0, 7.0), offset=-2.0)

    def forward(self, given: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x | given)."""
        h = at_least_float32(conditioned(self.net, given, context))
        if self.name == "bernoulli":
            return Bernoulli(h)
        if self.name == "continuous-bernoulli":
            return ContinuousBernoulli(h)
        if self.name == "categorical":
            return Categorical(h.unflatten(1, (self.levels, self.channels)))
        if self.name == "beta-binomial":
            log_alpha, log_beta = h.chunk(2, 1)
            return BetaBinomial(log_alpha, log_beta, self.levels)
        mean, log_scale = self.format.split(self.scales(h))
        h, c = h.unflatten(1, (self.k, -1)), self.channels
        mixes = c > 1 and self.name == "logistic-mixture"
        coefficients = h[:, :, 1 + 2 * c :].tanh() if mixes else None
        return DiscretizedLogisticMixture(h[:, :, 0], mean, log_scale, self.levels, coefficients)

    def scales(self, h: Tensor) -> Tensor:
        """What `format` reads of the network's output, in a logistic likelihood."""
        return h.unflatten(1, (self.k, -1))[:, :, 1 : 1 + 2 * self.channels]

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network of a logistic likelihood, with the share of its scales at a limit."""
        if self.name.startswith("logistic"):
            yield self.net, lambda h: self.format.saturation(self.scales(h))

    def extra_repr(self) -> str:
        """Names the likelihood."""
        return f"{self.name}, levels={self.levels}, components={self.k}"


def likelihood(
    name: Likelihood,
    shape: Sequence[int],
    net: Callable[[int], nn.Module],
    *,
    levels: int = 256,
    components: int = 10,
    std: Literal["emitted", "channel", "pixel", "optimal"] | float = "emitted",
) -> nn.Module:
    """The head of a decoder: p(x | z), by name.

    Args:
        name: `bernoulli` (levels 0 and 1), `categorical` (a probability for each level),
            `logistic`, `logistic-mixture` and `beta-binomial` (of levels); `continuous-bernoulli`
            and `gaussian` are densities of values scaled to [0, 1].
        shape: The event shape, (C, H, W) or (D,).
        net: Builds a network that emits as many channels as it is told.
        levels: How many levels the data have.
        components: Of a `logistic-mixture`.
        std: Of a `gaussian`: `emitted` for every pixel by the network, a learned parameter for
            each `channel` or each `pixel`, `optimal` (see `OptimalGaussianHead`), or a number.

    Raises:
        ValueError: For an unknown name, or a Bernoulli of data with more than two levels.

    Example:
        >>> head = likelihood("logistic", (3, 4, 4), lambda c: nn.Conv2d(8, c, 1), levels=256)
        >>> head(torch.randn(2, 8, 4, 4)).log_prob(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2])
    """
    c = shape[0]
    if name == "gaussian":
        if std == "optimal":
            return OptimalGaussianHead(net(c), event_ndims=len(shape))
        if std == "emitted":
            bounded = Format(bounds=(-6.0, 3.0), offset=-1.0)
            return GaussianHead(net(2 * c), event_ndims=len(shape), format=bounded)
        shared = {"channel": (c, *(1,) * (len(shape) - 1)), "pixel": tuple(shape)}
        if isinstance(std, str):
            if std not in shared:
                raise ValueError(
                    "std: expected 'emitted', 'channel', 'pixel', 'optimal' or a number; "
                    f"got {std!r}"
                )
            log_std = torch.full(shared[std], -1.0)
        elif std > 0:
            log_std = math.log(std)
        else:
            raise ValueError(f"std: expected a positive number; got {std}")
        return GaussianHead(net(c), event_ndims=len(shape), log_std=log_std)
    if name == "bernoulli" and levels != 2:
        raise ValueError(
            f"likelihood: a Bernoulli is of data with 2 levels, and these have {levels}; binarize "
            "them, or use 'logistic-mixture', or 'continuous-bernoulli' for grey values in [0, 1]"
        )
    if name in ("bernoulli", "continuous-bernoulli"):
        return LikelihoodHead(net(c), name, c, levels, 1)
    if name == "categorical":
        return LikelihoodHead(net(c * levels), name, c, levels, 1)
    if name == "beta-binomial":
        return LikelihoodHead(net(2 * c), name, c, levels, 1)
    if name == "logistic":
        return LikelihoodHead(net(1 + 2 * c), name, c, levels, 1)
    if name == "logistic-mixture":
        emitted = components * (1 + 2 * c + c * (c - 1) // 2)
        return LikelihoodHead(net(emitted), name, c, levels, components)
    raise ValueError(
        "likelihood: expected bernoulli, categorical, logistic, logistic-mixture, beta-binomial, "
        f"continuous-bernoulli or gaussian; got {name!r}"
    )
