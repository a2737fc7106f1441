"""Flows of data with Gaussian noise: the model that makes their figures bounds, and denoising."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.distributions import DiscretizedLogisticMixture, LikelihoodHead
from musigma.gaussian import GaussianHead
from musigma.model import VAE, Model
from musigma.nets import Scaled
from musigma.tensors import at_least_float32

__all__ = ["denoised", "noisy"]


def noisy(flow: Model, shape: Sequence[int], levels: int | None, std: float) -> VAE:
    r"""A model of data x whose only latent is x with noise, y, of which a flow has the density.

    .. math:: q(y|x) = N(y;\ x, \sigma^2), \quad
        \log p(x) \ge E_q[\log p(y) + \log p(x|y) - \log q(y|x)]

    Only the flow has parameters, so training maximizes E log p(y), the density of noisy data. That
    is not a figure of x: the other two terms make it one. For continuous data p(x | y) is
    N(x; y, σ²), and both cancel: the bound is E log p(y), of the density of the flow convolved
    with the noise. For integer levels, scaled to [-1, 1], p(x | y) is the discretized logistic
    around y with the standard deviation of the noise, and minus the bound is a code length.

    Args:
        flow: An exact model of y.
        shape: The event shape of x.
        levels: Number of levels; None for continuous data.
        std: σ, in units in which the levels run from -1 to 1, or in those of continuous data.

    Raises:
        ValueError: If σ is not positive.

    Example:
        >>> from musigma.distributions import StandardNormal
        >>> from musigma.model import Prior
        >>> noisy(Prior(StandardNormal((1, 2, 2))), (1, 2, 2), 256, 0.05).sample(3).shape
        torch.Size([3, 1, 2, 2])
    """
    if not std > 0:
        raise ValueError(f"std: expected a positive number; got {std}")
    same: dict[str, Any] = {"event_ndims": len(shape), "log_std": math.log(std)}
    if levels is None:
        return VAE(GaussianHead(nn.Identity(), **same), GaussianHead(nn.Identity(), **same), flow)
    decoder = LikelihoodHead(nn.Identity(), _levels_around, levels=levels, std=std)
    return VAE(GaussianHead(Scaled(nn.Identity(), levels), **same), decoder, flow)


def denoised(model: Model, n: int, context: Context = None) -> Tensor:
    r"""Draw n noisy examples y, and return the mean of x given each of them.

    .. math:: E[x|y] = y + \sigma^2 \nabla_y \log p(y)

    holds exactly if p(y) is the density of data with Gaussian noise (Tweedie's formula; Zhai et
    al., "Normalizing Flows are Capable Generative Models", 2024, arXiv:2412.06329). The results
    look better than `Model.sample`, which draws from p(x | y), but are no draws from the model.

    Args:
        model: What `noisy` returns, or a `Conditional` of it.
        n: Number of examples.
        context: As in `Model.sample`.

    Returns:
        Data (n, *event); levels are rounded.

    Raises:
        TypeError: For another model.
    """
    inner, given = model.given(context) if context is not None else (model, None)
    std = math.exp(inner.encoder.log_std) if _is_noisy(inner) else math.nan  # pyright: ignore
    if math.isnan(std):
        raise TypeError("model: expected a flow of noisy data, as tarflow with noise='gaussian'")
    flow: Any = inner.prior
    with torch.enable_grad():
        y = flow.sample(n, given).requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(y, given).sum(), y)
    x = y.detach() + std**2 * score
    levels = getattr(inner.encoder.net, "levels", None)  # pyright: ignore
    return x if levels is None else ((x + 1) * (levels - 1) / 2).round().clamp(0, levels - 1)


def _is_noisy(model: Model) -> bool:
    """Whether a model is what `noisy` makes: its encoder adds noise of a fixed size."""
    encoder = getattr(model, "encoder", None)
    net = getattr(encoder, "net", None)
    plain = isinstance(getattr(net, "net", net), nn.Identity)
    return isinstance(encoder, GaussianHead) and plain


def _levels_around(y: Tensor, levels: int, std: float) -> DiscretizedLogisticMixture:
    """The discretized logistic of each element around y, with a given standard deviation."""
    mean = at_least_float32(y)[:, None]
    log_scale = torch.full_like(mean, math.log(std * math.sqrt(3) / math.pi))
    return DiscretizedLogisticMixture(torch.zeros_like(mean[:, :, 0]), mean, log_scale, levels)
