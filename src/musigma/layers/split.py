"""Splits, which factor out channels as a latent."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.model import Layer
from musigma.trace import Trace

__all__ = ["Split"]


class Split(Layer):
    """Factor out half of the channels as a latent, with a prior given the other half.

    The second half becomes a latent with p(second | first) = prior(first); the first half
    continues through the flow. `encode` returns every latent, so `decode` restores the data. (Dinh
    et al., 2017, arXiv:1605.08803; Split2d in Kingma & Dhariwal, 2018, arXiv:1807.03039.)

    Args:
        prior: A head: maps the first half (B, C / 2, ...), and the context if there is one, to the
            distribution of the second half.
    """

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.prior = prior

    def variables(self) -> Iterator[nn.Module]:
        """Itself."""
        yield self

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return the first half; score the second."""
        h, z = x.chunk(2, dim=1)
        trace.p(self, conditioned(self.prior, h, context), z)
        return h

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Draw the second half, and append it."""
        return torch.cat([z, trace.p(self, conditioned(self.prior, z, context))], 1)
