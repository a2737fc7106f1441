"""Gaussian priors and likelihoods."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from musigma.context import conditioned, pooled
from musigma.distributions.likelihood import register_likelihood
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.tensors import at_least_float32

__all__ = ["LearnedNormal", "OptimalGaussianHead", "StandardNormal"]


class StandardNormal(nn.Module):
    """N(0, I) over events of a shape, as a head that ignores its arguments.

    Args:
        shape: The event shape.
    """

    zeros: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(*shape), persistent=False)

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> DiagonalGaussian:
        """The distribution, of batch shape ()."""
        return DiagonalGaussian(self.zeros, self.zeros, self.zeros.ndim)


class LearnedNormal(nn.Module):
    """A Gaussian with learned mean and log_std ("learn_top" in Glow), shifted by a context.

    Args:
        shape: The event shape.
        each: Whether each `channel` or each `pixel` of an image (C, H, W) has its own parameters.
        context: Features of the context; 0 for none. It shifts whole channels.
        bounds: Bounds of log_std, as in a `Format`.

    Raises:
        ValueError: For another `each`; or, on a forward pass, if the declared context is missing.
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

    def forward(
        self, given: Tensor | None = None, context: Tensor | None = None
    ) -> DiagonalGaussian:
        """The distribution, of batch shape () without a context and (B,) with one.

        A prior is called with its context as the only argument, so `given` is taken as the
        context if `context` is None.
        """
        context, shift = given if context is None else context, None
        if self.from_context is not None:
            if context is None:
                raise ValueError(f"context: this prior needs {self.context} features; got none")
            shift = self.from_context(pooled(context))
        mean, log_std = (
            t.expand(*t.shape[: -len(self.shape)], *self.shape)
            for t in self.format.split(self._parameters_for(shift))
        )
        return DiagonalGaussian(mean, log_std, len(self.shape))

    def _parameters_for(self, shift: Tensor | None) -> Tensor:
        """The input of `format`: the parameters, plus a shift (B, 2 C) per example if given."""
        ones = (1,) * (len(self.shape) - 1)
        raw = self.raw if self.raw.ndim > 1 else self.raw.reshape(-1, *ones)
        return raw if shift is None else raw + shift.reshape(len(shift), -1, *ones)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        """This module, or its map of the context, with the share of scales at a bound."""
        net = self if self.from_context is None else self.from_context
        yield (
            net,
            lambda h: self.format.saturation(self._parameters_for(None if net is self else h)),
        )


class OptimalGaussianHead(nn.Module):
    r"""A Gaussian likelihood with one shared variance at its optimum, the mean squared error.

    .. math:: \log p(x|z) = \log N(x; \mu(z), \sigma^2), \quad \sigma^2 = MSE

    In training mode σ² is the mean squared error of the batch, with its gradient. In evaluation
    mode, and for sampling, it is a running value, so an example's likelihood does not depend on
    its batch. `after_step` updates the running value; scoring does not. `musigma.training.fit`
    calls it; in your own training loop, call it after every optimizer step. (Rybkin, Daniilidis,
    Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021, arXiv:2006.13202.)

    Args:
        net: Emits the mean.
        event_ndims: 1 for vectors, 3 for images.
        momentum: Share of the running log σ that one step replaces.
        smallest: Lower bound of log σ.
    """

    log_std: Tensor
    error: Tensor
    batches: Tensor

    def __init__(
        self, net: nn.Module, *, event_ndims: int, momentum: float = 0.05, smallest: float = -6.0
    ):
        super().__init__()
        self.net, self.event_ndims, self.momentum = net, event_ndims, momentum
        self.smallest = smallest
        self.register_buffer("log_std", torch.zeros(()))
        for name in ("error", "batches"):  # sum and number of errors since the last step
            self.register_buffer(name, torch.zeros(()), persistent=False)
        self.register_load_state_dict_post_hook(OptimalGaussianHead.skip_step)
        self.trained = self.stepped = False

    def forward(self, given: Tensor, context: Tensor | None = None) -> DiagonalGaussian:
        """The likelihood."""
        mean = at_least_float32(conditioned(self.net, given, context))
        if self.training:
            return _FittedGaussian(mean, self)
        if self.trained and not self.stepped:
            warnings.warn(
                "OptimalGaussianHead: its sigma has not been fitted; call head.after_step() after "
                "every optimizer step, as musigma.training.fit does",
                stacklevel=2,
            )
        return DiagonalGaussian(mean, self.log_std, self.event_ndims)

    def log_std_of(self, mse: Tensor) -> Tensor:
        """Log σ of a mean squared error, within its bound."""
        return 0.5 * mse.clamp(min=math.exp(2 * self.smallest)).log()

    def emitters(self) -> tuple[()]:
        """None: the network emits only the mean."""
        return ()

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the running log σ toward that of the batches scored since the last call."""
        log_std = self.log_std_of(self.error / self.batches)
        moved = torch.lerp(self.log_std, log_std, self.momentum)
        self.log_std.copy_(torch.where(log_std.isfinite(), moved, self.log_std))
        self.skip_step()
        self.stepped = True

    def skip_step(self, *_: object) -> None:
        """Drop the batches scored since the last call: after a step, or if it is not taken."""
        self.error.zero_()
        self.batches.zero_()


class _FittedGaussian(DiagonalGaussian):
    """A Gaussian whose variance is the mean squared error of the value that it scores."""

    def __init__(self, mean: Tensor, head: OptimalGaussianHead):
        super().__init__(mean, head.log_std, head.event_ndims)
        self.head = head

    def log_prob(self, value: Tensor) -> Tensor:
        mse = (at_least_float32(value) - self.mean).square().mean()
        if torch.is_grad_enabled():
            with torch.no_grad():
                finite = mse.isfinite()  # exclude bad batches from the running value
                self.head.error.add_(torch.where(finite, mse, 0.0))
                self.head.batches.add_(finite)
            self.head.trained = True
        log_std = self.head.log_std_of(mse)
        return DiagonalGaussian(self.mean, log_std, self.event_ndims).log_prob(value)


@register_likelihood("gaussian", data="real")
def gaussian(
    shape: Sequence[int], net: Callable[[int], nn.Module], std: str | float
) -> OptimalGaussianHead | GaussianHead:
    """A `DiagonalGaussian`, with the standard deviation that `std` selects; see `likelihood`.

    Raises:
        ValueError: For another `std`.
    """
    channels, event_ndims = shape[0], len(shape)
    if std == "optimal":
        return OptimalGaussianHead(net(channels), event_ndims=event_ndims)
    if std == "emitted":
        bounded = Format(bounds=(-6.0, 3.0), offset=-1.0)
        return GaussianHead(net(2 * channels), event_ndims=event_ndims, format=bounded)
    shared = {"channel": (channels, *(1,) * (event_ndims - 1)), "pixel": tuple(shape)}
    if isinstance(std, str):
        if std not in shared:
            raise ValueError(
                f"std: expected 'emitted', 'channel', 'pixel', 'optimal' or a number; got {std!r}"
            )
        log_std = torch.full(shared[std], -1.0)
    elif std > 0:
        log_std = math.log(std)
    else:
        raise ValueError(f"std: expected a positive number; got {std}")
    return GaussianHead(net(channels), event_ndims=event_ndims, log_std=log_std)
