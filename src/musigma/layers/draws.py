"""Layers that draw: dequantization, and splits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.model import Layer
from musigma.tensors import at_least_float32
from musigma.trace import Trace

__all__ = ["Dequantize", "Split"]


class Dequantize(Layer):
    r"""Integer levels to real numbers, :math:`y = x + u` with u ~ noise(x) in [0, 1).

    .. math:: \log P(x) \ge E_u[\log p(x + u) - \log q(u|x)]

    holds for *any* noise, so log q - log p of the real numbers is an upper bound of the code
    length of the integers (Theis et al., 2016, arXiv:1511.01844; learned noise: Ho et al.,
    "Flow++", 2019, arXiv:1902.00275). Generating takes the floor, clamped to 0 .. levels - 1: a
    surjection (Nielsen et al., "SurVAE Flows", 2020, arXiv:2007.02731).

    Args:
        noise: A head over events of the data's shape: `StandardUniform`, or `LogitNormalHead`.
        levels: Number of levels.
    """

    exact = False
    is_preprocessing = True

    def __init__(self, noise: nn.Module, levels: int = 256):
        super().__init__()
        self.noise, self.levels = noise, levels

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Add noise, clamped below 1 so that rounding cannot reach the next level."""
        x = at_least_float32(x)
        u = at_least_float32(trace.q(self, conditioned(self.noise, x, context)))
        return x + u.clamp(max=1 - self.levels * torch.finfo(u.dtype).eps)

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Drop the fraction."""
        x = z.floor().clamp(0, self.levels - 1)
        if trace.scoring:
            trace.q(self, conditioned(self.noise, x, context), z - x)
        return x

    def extra_repr(self) -> str:
        """Names the number of levels."""
        return f"levels={self.levels}"


class Split(Layer):
    """Factor out half of the channels as a latent, with a prior given the other half.

    The second half becomes a latent with p(second | first) = prior(first); the first half
    continues through the flow. `encode` returns every latent, so `decode` restores the data. (Dinh
    et al., 2017, arXiv:1605.08803; Split2d in Kingma & Dhariwal, 2018, arXiv:1807.03039.)

    Args:
        prior: A head: maps the first half (B, C / 2, ...), and the context if there is one, to the
            distribution of the second half.
        keep: Number of channels that continue, if not half of them.
    """

    def __init__(self, prior: nn.Module, *, keep: int | None = None):
        super().__init__()
        self.prior, self.keep = prior, keep

    def variables(self) -> Iterator[nn.Module]:
        """This layer itself."""
        yield self

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Calibrate the head on the second half, if it has a `calibrate(z)`."""
        if (calibrate := getattr(self.prior, "calibrate", None)) is not None:
            calibrate(self._halves(x)[1])

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = self.keep or -(-x.shape[1] // 2)
        return x[:, :keep], x[:, keep:]

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return the first half; score the second."""
        h, z = self._halves(x)
        trace.p(self, conditioned(self.prior, h, context), z)
        return h

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Draw the second half, and append it."""
        return torch.cat([z, trace.p(self, conditioned(self.prior, z, context))], 1)
