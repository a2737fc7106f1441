"""The VAE of common examples: one hidden layer in each network, two linear heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from musigma.distributions import StandardNormal, data_of
from musigma.gaussian import Format, GaussianHead
from musigma.model import VAE, Model, Prior
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import free_shape
from musigma.zoo.vaes.vae import chosen_likelihood, named_likelihood, over_data


@architecture
def mlp_vae(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    hidden: int = 400,
    latents: int = 20,
    format: str = "two-heads log_var",
    squash: bool = False,
    likelihood: str = "auto",
    std: str | float = 1.0,
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
) -> Model:
    """The VAE of common examples: one ReLU layer in each network, and two linear heads.

    This is the VAE of pythae, of the bits-back code, and of the examples of PyTorch and Keras
    (Kingma & Welling, 2014, arXiv:1312.6114). The network's input is the level divided by the
    highest level.

    Args:
        shape: (C, H, W), or (D,).
        bits: Bits of each element; None for continuous data.
        hidden: Width of the hidden layers.
        latents: Dimensions of z.
        format: How the two heads are read as (mean, log_std), as `Format.parse` takes it.
        squash: Apply a sigmoid to the mean of a `gaussian` likelihood.
        likelihood: A name that `musigma.likelihood` takes; `auto` is `bernoulli` for
            1 bit, `gaussian` for continuous data, and `logistic-mixture` otherwise.
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
    """
    at_least(1, hidden=hidden, latents=latents)
    read = Format.parse(format)
    if read.layout != "two-heads":
        raise ValueError(f"format: this encoder has two heads; got a format of {read.layout!r}")
    name = chosen_likelihood(likelihood, bits)
    if squash and name != "gaussian":
        raise ValueError(f"squash: expected a 'gaussian' likelihood; got {name!r}")
    levels = None if bits is None else 2**bits
    continuous = data_of(name) not in ("levels", "counts")
    top = 1 if continuous or levels is None else levels - 1
    free = free_shape(shape, support)
    encoder = GaussianHead(
        TwoHeads(math.prod(free), hidden, latents, top), event_ndims=1, format=read
    )

    def decoder(channels: int) -> nn.Module:
        return ToImage(latents, hidden, (channels, *free[1:]), squash)

    head = named_likelihood(name, free, decoder, levels or 2, 5, std)
    model = VAE(encoder, head, Prior(StandardNormal((latents,))))
    return over_data(model, shape, bits, continuous, standardize, schema, support)


class TwoHeads(nn.Module):
    """(B, ...) to two tensors (B, outputs), from one hidden layer of ReLUs; see `mlp_vae`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, top: int):
        super().__init__()
        self.top = top
        self.enter = nn.Linear(inputs, hidden)
        self.mean, self.scale = nn.Linear(hidden, outputs), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean, and the raw scale that the format reads."""
        x = x.flatten(1)
        h = self.enter(x if self.top == 1 else x / self.top).relu()
        return self.mean(h), self.scale(h)


class ToImage(nn.Module):
    """(B, inputs) to (B, *shape), by one hidden layer of ReLUs."""

    def __init__(self, inputs: int, hidden: int, shape: Sequence[int], squash: bool):
        super().__init__()
        self.shape, self.squash = tuple(shape), squash
        self.enter, self.leave = nn.Linear(inputs, hidden), nn.Linear(hidden, math.prod(shape))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The input of the likelihood."""
        h = self.leave(self.enter(z).relu()).unflatten(1, self.shape)
        return h.sigmoid() if self.squash else h
