"""Regularized autoencoders: deterministic, with a prior that is fitted to the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.parametrizations import spectral_norm

from musigma.model import Model
from musigma.named import Registry
from musigma.zoo import architecture, at_least
from musigma.zoo.vaes.two_stage import TwoStageVAE, recomposed
from musigma.zoo.vaes.vae import vae

Penalty = Callable[[Tensor, Distribution], Tensor]

PENALTIES = Registry("penalty", "decoder")
"""Penalties of a decoder by name: functions of it that return nats per example (B,) for z and
p(x | z); they may also change it."""


@PENALTIES.register
def none(decoder: nn.Module) -> Penalty:
    """No penalty: a plain autoencoder."""
    return lambda z, p: z.new_zeros(len(z))


@PENALTIES.register
def l2(decoder: nn.Module, *, weight: float = 1e-4) -> Penalty:
    """The sum of the squares of all parameters, times `weight`."""
    return lambda z, p: (
        weight * torch.stack([t.square().sum() for t in decoder.parameters()]).sum().expand(len(z))
    )


@PENALTIES.register
def gradient(decoder: nn.Module, *, weight: float = 1e-2) -> Penalty:
    """The squared norm of the Jacobian of the mean, estimated by one random product."""

    def penalty(z: Tensor, p: Distribution) -> Tensor:
        product = (p.mean * torch.randn_like(p.mean)).sum()
        (slope,) = torch.autograd.grad(product, z, create_graph=True)
        return weight * slope.square().flatten(1).sum(1)

    return penalty


@PENALTIES.register
def spectral(decoder: nn.Module) -> Penalty:
    """Weights divided by their largest singular values (`spectral_norm`)."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            spectral_norm(layer)
    return none(decoder)


@architecture
def rae(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    net: Literal["auto", "mlp", "conv"] = "auto",
    latents: int = 32,
    width: int | None = None,
    blocks: int = 1,
    penalty: str = "l2",
    noise: float = 0.05,
    prior: str = "mixture",
    prior_depth: int = 4,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "channel",
    standardize: Literal["quantile"] | bool = False,
    context: int = 0,
) -> Model:
    """A regularized autoencoder (Ghosh et al., 2020, arXiv:1903.12436).

    Training minimizes -log p(x | z) + β ½ |z|² + a penalty of the decoder, with
    z = f(x); β is ``--beta``, 1 by default, and `--penalty none --beta 0` is a plain autoencoder.
    The prior is fitted to z along the way, and has no influence on it. Since a deterministic z has
    no bound of log p(x), scores are those of q(z | x) = N(f(x), noise² I).

    Args:
        shape: (C, H, W) of any size, or (D,).
        bits: Bits of each element; None for continuous data.
        net: As in `vae`, and so are the next three.
        latents: Dimensions of z.
        width: Width of the networks.
        blocks: Hidden layers, or residual blocks at each size.
        penalty: Of the decoder: 'l2 weight=1e-4', 'gradient weight=1e-2', `spectral` or `none`.
        noise: Standard deviation of q outside of training.
        prior: The model of z, as in `vae`.
        prior_depth: Number of couplings of the prior `flow`.
        likelihood: As in `vae`.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood, as in `vae`.
        standardize: As in `vae`.
        context: Number of features of the context; it conditions all networks.
    """
    at_least(1, latents=latents)
    model = vae(
        shape,
        bits=bits,
        net=net,
        latents=latents,
        width=width,
        blocks=blocks,
        posterior=f"deterministic noise={noise}",
        prior=prior,
        prior_depth=prior_depth,
        likelihood=likelihood,
        components=components,
        std=std,
        standardize=standardize,
        context=context,
    )
    chosen = PENALTIES.choice(penalty)
    return recomposed(
        model,
        lambda m: TwoStageVAE(m.encoder, m.decoder, m.prior, latents, chosen(m.decoder)),
    )
