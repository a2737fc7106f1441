"""Variational autoencoders, for vectors and for images of any size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from musigma.distributions import LIKELIHOODS, Latents, are_counted, data_of, likelihood
from musigma.gaussian import Format
from musigma.model import VAE, Chain, Model
from musigma.nets import MLP, ConvDecoder, ConvEncoder, Logarithm, Scaled
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import data_layers, free_shape
from musigma.zoo.vaes.latents import chosen_posterior, chosen_prior


@architecture
def vae(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    net: Literal["auto", "mlp", "conv"] = "auto",
    latents: int = 32,
    width: int | None = None,
    blocks: int = 1,
    format: str = "halves log_std",
    posterior: str = "diagonal",
    prior: str = "auto",
    prior_depth: int = 4,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "emitted",
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
    context: int = 0,
) -> Model:
    """A variational autoencoder (Kingma & Welling, 2014, arXiv:1312.6114).

    Args:
        shape: (C, H, W) of any size, or (D,).
        bits: Bits of each element; None for continuous data.
        net: `mlp` or `conv` networks; `auto`: `conv` for images whose smaller side is at least 8.
        latents: Dimensions of z.
        width: Width of the networks; None: 400 for `mlp`, 48 channels for `conv`.
        blocks: Hidden layers (`mlp`), or residual blocks at each size (`conv`).
        format: How the encoder's output is read as (mean, log_std), as `Format.parse` takes it.
        posterior: The distribution that the encoder emits: a Gaussian, `diagonal`, `low-rank` or
            `full`; `mixture`, of Gaussians; `von-mises-fisher`, on the sphere; `hyperbolic`;
            `gamma`; `beta`; `categorical`; `joint`, continuous and discrete; any flow of vectors
            given features of x, such as `nsf` or `iaf`; or one of your own
            (`musigma.distributions.POSTERIORS`). Options follow the name: 'low-rank rank=8'.
        prior: `normal`: N(0, I); `conditional`: a Gaussian whose mean and scale a network
            computes from the context (Sohn, Yan, Lee, "Learning Structured Output
            Representation using Deep Conditional Generative Models", 2015); `flow`: a coupling
            flow over N(0, I), trained with the model; `mixture`, of Gaussians; `vamp`: the mean
            of the posteriors of learned inputs; any flow of vectors, such as `maf`;
            `autoregressive`, of categorical latents; or one of your own
            (`musigma.distributions.PRIORS`); `auto`: that of the posterior, and for real vectors
            `conditional` with a context, `normal` without.
        prior_depth: Number of couplings of the prior `flow`.
        likelihood: A name that `musigma.likelihood` takes; `auto` is `bernoulli` for
            1 bit, `gaussian` for continuous data, and `logistic-mixture` otherwise. `poisson`,
            `nb` and `zinb` are for counts, whose logarithms, log(1 + x), the encoder takes.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood: `emitted` by the network, one for each
            `channel` or `pixel`, `optimal` (the root mean squared error), or a number.
        standardize: Standardize continuous data in the first layer: by the mean and the standard
            deviation of each feature of the training data, or by its distribution function
            (`quantile`), after which each is about normal. The log-determinant is included.
        schema: The columns of a table, measured on the training rows, for rows of any types: the
            first layer maps each by its distribution function to a variable that is about normal
            (`Marginals`).
        support: The set in which rows lie, as `Support.to_json` makes it: the first layer maps it
            to all of space, and standardizes the result (`Unconstrain`), so that no density and no
            sample is outside.
        context: Number of features of the context; it conditions encoder, decoder and prior.
    """
    at_least(1, latents=latents, width=width, prior_depth=prior_depth, components=components)
    at_least(0, blocks=blocks)
    levels = None if bits is None else 2**bits
    name = chosen_likelihood(likelihood, bits)
    continuous = data_of(name) not in ("levels", "counts")
    scaled = 2 if continuous or levels is None else levels
    if net == "auto":
        net = "conv" if len(shape) == 3 and min(shape[1:]) >= 8 else "mlp"
    if net == "conv" and len(shape) != 3:
        raise ValueError(f"net: 'conv' is for images (C, H, W); got shape {tuple(shape)}")
    free = free_shape(shape, support)
    build = (_conv if net == "conv" else _mlp)(free, width, blocks, context)

    def encode(outputs: int) -> nn.Module:
        net = build.encoder(outputs)
        if levels is not None:
            return Scaled(net, scaled)
        return Logarithm(net) if data_of(name) == "counts" else net

    encoder = chosen_posterior(posterior, latents, encode, Format.parse(format))
    event = getattr(encoder, "event", (latents,))
    size = math.prod(event)
    decoder = named_likelihood(
        name, free, lambda channels: build.decoder(size, channels), levels or 2, components, std
    )
    of_z = chosen_prior(prior, Latents(encoder, event, free, context, prior_depth))
    model = getattr(encoder, "model", VAE)(encoder, decoder, of_z)
    return over_data(model, shape, bits, continuous, standardize, schema, support)


def chosen_likelihood(name: str, bits: int | None) -> str:
    """The name of the likelihood; for `auto`, the default for this number of bits.

    Raises:
        ValueError: For an unknown name, or one that does not fit continuous data.
    """
    if name == "auto":
        return {None: "gaussian", 1: "bernoulli"}.get(bits, "logistic-mixture")
    if bits is None and data_of(name) not in ("real", "counts"):
        fit = " or ".join(repr(n) for n, entry in LIKELIHOODS.items() if entry.data == "real")
        raise ValueError(f"likelihood: {name!r} is not for continuous data; use {fit}")
    return name


def named_likelihood(name, shape, net, levels, components, std) -> nn.Module:
    """`musigma.likelihood`; `std` may be a number as text, from the command line."""
    with contextlib.suppress(ValueError):
        std = float(std)
    return likelihood(name, shape, net, levels=levels, components=components, std=std)


def over_data(
    model: Model,
    shape: Sequence[int],
    bits: int | None,
    continuous: bool,
    standardize: str | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
) -> Model:
    """The model below standardization, or dequantization if its likelihood is a density.

    Raises:
        ValueError: As `data_layers`, or if counts are to be mapped by a layer.
    """
    if are_counted(model):
        if standardize or schema is not None or support is not None:
            raise ValueError(
                "likelihood: counts are modeled as they are; leave standardize, schema and "
                "support (--bounds) out"
            )
        return model
    how: Any = {"standardize": standardize, "schema": schema, "support": support}
    layers = data_layers(shape, bits, None, **how)
    return Chain(layers, model) if layers and (continuous or bits is None) else model


class _Networks(NamedTuple):
    """Encoders of a number of outputs, and decoders from a number of latents to channels."""

    encoder: Callable[[int], nn.Module]
    decoder: Callable[[int, int], nn.Module]


def _mlp(shape: Sequence[int], width: int | None, blocks: int, context: int) -> _Networks:
    how: Any = {"hidden": [width or 400] * blocks, "context": context}
    return _Networks(
        lambda outputs: MLP(math.prod(shape), outputs, **how),
        lambda size, channels: MLP(size, (channels, *shape[1:]), **how),
    )


def _conv(shape: Sequence[int], width: int | None, blocks: int, context: int) -> _Networks:
    down = max(1, math.ceil(math.log2(min(shape[1:]) / 7)))
    how: Any = {"width": width or 48, "halvings": down, "blocks": blocks, "context": context}
    return _Networks(
        lambda outputs: ConvEncoder(shape, outputs, **how),
        lambda size, channels: ConvDecoder(size, (channels, *shape[1:]), **how),
    )
