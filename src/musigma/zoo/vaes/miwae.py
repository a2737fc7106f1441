"""A variational autoencoder of rows of numbers of which some are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.layers import Standardize
from musigma.model import VAE, Chain, Model
from musigma.nets import MLP
from musigma.schema import Schema
from musigma.tensors import at_least_float32
from musigma.zoo import architecture, at_least
from musigma.zoo.vaes.latents import Latents, chosen_prior

DENSE = Format(bounds=(-6.0, 3.0), offset=-1.0)
"""How the decoder's output is read."""


@architecture
def miwae(
    shape: Sequence[int],
    *,
    schema: Sequence[Mapping[str, Any]] = (),
    latents: int = 10,
    width: int = 128,
    blocks: int = 2,
    format: str = "halves log_std",
    prior: str = "auto",
    prior_depth: int = 4,
    context: int = 0,
) -> Model:
    """A VAE of rows with missing values (Mattei & Frellsen, 2019, arXiv:1812.02633).

    The encoder sees zeros in their place, and which they are; the likelihood is that of the
    others: the bound is one of log p of the observed part, valid if values are missing at random.
    ``--k 20`` trains the importance-weighted bound of the paper. `musigma.imputation.impute` fills
    them.

    Args:
        shape: (D,).
        schema: The columns, if they are typed; all of numbers, read with ``--missing ignore``.
        latents: Dimensions of z.
        width: Width of the hidden layers.
        blocks: Number of hidden layers of encoder and decoder.
        format: How the encoder's output is read as (mean, log_std), as `Format.parse` takes it.
        prior: As in `vae`.
        prior_depth: Number of couplings of the prior `flow`.
        context: Number of features of the context; it conditions encoder, decoder and prior.
    """
    at_least(1, latents=latents, width=width)
    at_least(0, blocks=blocks)
    if len(shape) != 1:
        raise ValueError(f"shape: expected vectors (D,); got {tuple(shape)}")
    for column in Schema.from_json(schema).columns if schema else ():
        if column.has_levels:
            raise ValueError(f"schema: expected columns of numbers; {column.name!r} has levels")
        if column.missing:
            raise ValueError(
                f"schema: missing values of {column.name!r} have a probability of their own; read "
                "the data with --missing ignore"
            )
    how: Any = {"hidden": [width] * blocks, "context": context}
    net = ObservedInput(MLP(2 * shape[0], 2 * latents, **how))
    encoder = GaussianHead(net, event_ndims=1, format=Format.parse(format))
    decoder = ObservedHead(MLP(latents, 2 * shape[0], **how))
    of_z = chosen_prior(prior, Latents(encoder, (latents,), tuple(shape), context, prior_depth))
    return Chain([StandardizeObserved(shape[0])], VAE(encoder, decoder, of_z))


class StandardizeObserved(Standardize):
    """`Standardize`, by the observed values of each column; NaN stay NaN and cost nothing."""

    def measure(self, data: Any) -> None:
        """Set μ and σ to those of all observed values of a `Dataset`."""
        x = np.concatenate([data.take(part) for part in np.array_split(np.arange(len(data)), 64)])
        self._observe(torch.from_numpy(x))

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set μ and σ from a batch, once."""
        if not bool(self.calibrated):
            self._observe(x)

    def _observe(self, x: Tensor) -> None:
        x = x.double()
        mean = x.nanmean(0)
        std = (x - mean).square().nanmean(0).sqrt()
        seen = std > 0
        self.set(mean.nan_to_num(), torch.where(seen, std, 1.0))

    def _log_det(self, x: Tensor) -> Tensor:
        return -torch.where(x.isnan(), 0.0, self.std.log()).sum(1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((x - μ) / σ, log_det)``, in the type of μ."""
        return super().forward(x.to(self.mean.dtype), context)


class ObservedInput(nn.Module):
    """A network of values, zero where they are missing, and of a mask of those that are not."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output of the network, for x (B, D) with NaN."""
        return self.net(torch.cat([x.nan_to_num(), (~x.isnan()).to(x)], 1), context)


class ObservedGaussian(DiagonalGaussian):
    """A Gaussian of independent elements that scores only those that are not NaN."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of the observed elements, in nats, (B,)."""
        seen = ~value.isnan()
        each = self.base_dist.log_prob(torch.where(seen, value, self.mean))
        return self._sum(torch.where(seen, each, 0.0))


class ObservedHead(nn.Module):
    """A network whose output is read as an `ObservedGaussian`."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, given: Tensor, context: Tensor | None = None) -> ObservedGaussian:
        """p(x | z)."""
        return ObservedGaussian(*DENSE.split(at_least_float32(self.net(given, context))), 1)

    def emitters(self) -> Any:
        """The network, and the share of its scales at a limit."""
        yield self.net, DENSE.saturation
