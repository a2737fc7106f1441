"""Autoencoders whose latents are codes, with a prior of the codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import conditioned
from musigma.distributions import AutoregressiveCodes, PointMass
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["QuantizedVAE"]


class QuantizedVAE(Model):
    r"""A VAE of discrete latents that are a function of x: c ~ prior, x ~ decoder(vectors(c)).

    .. math:: c = quantizer(encoder(x)), \quad
        \log p(x) \ge \log p(x | c) + \log p(c)

    The posterior is a `PointMass`, so log w is an exact lower bound of log p(x), without draws.
    Gradients pass straight through the quantizer to the encoder; the prior learns the codes of
    every batch along with the rest, and has no influence on them. (van den Oord, Vinyals,
    Kavukcuoglu, "Neural Discrete Representation Learning", 2017, arXiv:1711.00937, where the prior
    is trained afterwards.)

    Args:
        encoder: From x to features (B, D, *size).
        quantizer: As `musigma.nets.quantizers` describes.
        decoder: A head: from vectors (B, D, *size) to the distribution of x.
        prior: The network of `AutoregressiveCodes`.
        size: The positions, (H, W) or (P,).
    """

    quantizer: Any
    slow_inverse = "one step per code"

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: nn.Module,
        decoder: nn.Module,
        prior: nn.Module,
        size: Sequence[int],
    ):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.prior, self.size = prior, tuple(size)

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """The codes of x, then p(x | codes)."""
        found = self.quantizer(self._features(x, context))
        codes = trace.latent(self.prior, PointMass(found.codes), self._codes(context))
        through = found.features - found.features.detach()  # zero, with the gradient of features
        trace.p(self, self._decoded(codes, context, through), x)
        trace.auxiliary(self.quantizer, -found.cost)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Codes from the prior, then x ~ p(x | codes)."""
        codes = trace.p(self.prior, self._codes(context))
        x = trace.p(self, self._decoded(codes, context))
        if trace.scoring:
            found = self.quantizer(self._features(x, context))
            trace.q(self.prior, PointMass(found.codes), codes)
        return x

    def _features(self, x: Tensor, context: Any) -> Tensor:
        return conditioned(self.encoder, x, context).flatten(2)

    def _codes(self, context: Any) -> AutoregressiveCodes:
        return AutoregressiveCodes(self.prior, self.quantizer, context)

    def _decoded(self, codes: Tensor, context: Any, through: Tensor | float = 0.0) -> Any:
        vectors = self.quantizer.vectors(codes).detach() + through
        return conditioned(self.decoder, vectors.unflatten(2, self.size), context)

    def latents(self) -> Iterator[nn.Module]:
        """The codes."""
        yield self.prior

    def variables(self) -> Iterator[nn.Module]:
        """The codes, then the observation."""
        yield from (self.prior, self)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate the quantizer on the features of a batch."""
        if hasattr(self.quantizer, "calibrate"):
            parts = contexts.in_parts(self.floating(x), context)
            self.quantizer.calibrate(torch.cat([self._features(*part) for part in parts]))
