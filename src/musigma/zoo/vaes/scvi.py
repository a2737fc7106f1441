"""A variational autoencoder of counts of unequal totals, such as genes in single cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from musigma import distributions
from musigma.context import conditioned
from musigma.distributions import (
    FactorizedNegativeBinomial,
    PointMass,
    StandardNormal,
    data_of,
)
from musigma.gaussian import Format, GaussianHead
from musigma.model import VAE, Model, Prior
from musigma.nets import MLP, Logarithm
from musigma.trace import Trace
from musigma.zoo import architecture, at_least


@architecture
def scvi(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    latents: int = 10,
    hidden: int = 128,
    hidden_layers: int = 1,
    format: str = "halves log_std",
    likelihood: Literal["zinb", "nb", "poisson"] = "zinb",
    dispersion: Literal["feature", "emitted"] = "feature",
    context: int = 0,
) -> Model:
    """The VAE of counts of scVI (Lopez et al., 2018, doi:10.1038/s41592-018-0229-2).

    The mean count of a gene is its share, which the decoder emits, of the total count of the cell.
    See `CountVAE`.

    Args:
        shape: (D,), the number of genes.
        bits: None.
        latents: Dimensions of z.
        hidden: Width of the hidden layers.
        hidden_layers: Number of hidden layers of encoder and decoder.
        format: How the encoder's output is read as (mean, log_std), as `Format.parse` takes it.
        likelihood: `zinb`, `nb` or `poisson`.
        dispersion: The inverse dispersion: a learned parameter for each `feature` (gene), or
            `emitted` by the decoder, for each gene of each cell.
        context: Number of features of the context (the batch of a cell, for instance); it
            conditions encoder and decoder.
    """
    at_least(1, latents=latents, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    if len(shape) != 1 or bits is not None:
        raise ValueError(
            f"shape: expected vectors of counts (D,); got {tuple(shape)}, {bits} bits"
        )
    if data_of(likelihood) != "counts":
        raise ValueError(f"likelihood: expected zinb, nb or poisson; got {likelihood!r}")
    size: Any = {"hidden": [hidden] * hidden_layers, "context": context}
    encoder = Logarithm(MLP(shape[0], 2 * latents, **size))
    head = distributions.likelihood(
        likelihood, shape, lambda c: MLP(latents, c, **size), dispersion=dispersion
    )
    return CountVAE(
        GaussianHead(encoder, event_ndims=1, format=Format.parse(format)),
        head,
        Prior(StandardNormal((latents,))),
        Prior(TotalCount(context)),
    )


class TotalCount(nn.Module):
    """A negative binomial of totals (1,), with learned mean and inverse dispersion.

    Args:
        context: Number of features of the context, which shifts both logarithms; 0 for none.
    """

    def __init__(self, context: int = 0):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([8.0, 1.0]))
        self.shift = nn.Linear(context, 2, bias=False) if context else None
        if self.shift is not None:
            nn.init.zeros_(self.shift.weight)

    def forward(self, context: Tensor | None = None) -> FactorizedNegativeBinomial:
        """The distribution, of batch shape () without a context and (B,) with one."""
        raw = self.raw
        if self.shift is not None:
            if context is None:
                raise ValueError(f"context: expected {self.shift.in_features} features; got none")
            raw = raw + self.shift(context)
        return FactorizedNegativeBinomial(*raw.split(1, -1), event_ndims=1)

    def emitters(self) -> tuple[()]:
        """None: both parameters are shared by all examples."""
        return ()


class CountVAE(VAE):
    r"""A VAE of counts with a total l, which is a latent variable.

    .. math:: l \sim p(l), \quad z \sim N(0, I), \quad x \sim p(x | z, l), \quad
        E[x_i | z, l] = l \, s_i(z), \quad \sum_i s_i = 1

    The posterior of l is a point mass at the total of x, the observed library size of scVI. Since
    l is discrete, log p(x | z, l) + log p(l) - KL is an exact lower bound of log p(x), and samples
    have totals of their own. (With the total as a mere constant, the sum of p(x | z, l(x)) over x
    would not be 1.)

    Args:
        encoder: A head of z.
        decoder: A `CountHead`.
        prior: A model of z.
        total: A model of l.
    """

    total: Any  # a Prior
    prior: Any

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Prior, total: Prior):
        super().__init__(encoder, decoder, prior)
        self.total = total

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """l is the total of x, z ~ q(z | x); then p(x | z, l)."""
        total = PointMass(x.sum(1, keepdim=True))
        total = trace.latent(self.total, total, self.total.head(context))
        z = trace.latent(self.prior, self._posterior(x, context), self.prior.head(context))
        trace.p(self, self._likelihood(z, context, total), x)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """l ~ p(l), z ~ p(z), then x ~ p(x | z, l)."""
        total, z = self.total.generate(trace, context), self.prior.generate(trace, context)
        x = trace.p(self, self._likelihood(z, context, total))
        if trace.scoring:
            trace.q(self.prior, self._posterior(x, context), z)
            trace.q(self.total, PointMass(x.sum(1, keepdim=True)), total)
        return x

    def _likelihood(self, z: Tensor, context: Any, total: Tensor) -> Any:
        return self.decoder(z, context, exposure=total)

    def _posterior(self, x: Tensor, context: Any) -> Any:
        return conditioned(self.encoder, x, context)

    def latents(self) -> Iterator[nn.Module]:
        """The total, then z."""
        yield from (self.total, self.prior)

    def variables(self) -> Iterator[nn.Module]:
        """The total, z, and the observation."""
        yield from (*self.latents(), self)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Set the distribution of the total to the moments of a batch."""
        total = self.floating(x).double().sum(1)
        excess = (total.var() - total.mean()).clamp(min=1e-3 * total.mean())
        moments = torch.stack([total.mean(), total.mean() ** 2 / excess])
        self.total.head.raw.copy_(moments.clamp(min=1e-3).log())
