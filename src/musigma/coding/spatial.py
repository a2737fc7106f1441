"""Rules of bijections that mix the pixels of an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from musigma import layers
from musigma.coding.rules import SHIFT, InvertibleConvRule, Rule, decomposed, register
from musigma.layers.haar import haar

__all__ = ["AutoregressiveConvRule", "HaarRule"]


@register(layers.HaarSqueeze)
class HaarRule(InvertibleConvRule):
    """The matrix of the transform, on the four values of every block."""

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""
        blocks = layers.Squeeze()(torch.from_numpy(x))[0].unflatten(1, (-1, 4))
        y = super().up(blocks.transpose(1, 2).numpy())
        return y.reshape(len(y), -1, *y.shape[3:])

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        blocks = torch.from_numpy(super().down(y.reshape(len(y), 4, -1, *y.shape[2:])))
        return layers.Squeeze().inverse(blocks.transpose(1, 2).flatten(1, 2))[0].numpy()

    def _decomposed(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor]:
        return decomposed(torch.stack(haar(*torch.eye(4, dtype=torch.float64))).numpy())


@register(layers.AutoregressiveConv)
class AutoregressiveConvRule(Rule):
    """A shift of each pixel by those before it, one after the other in both directions."""

    def up(self, x: np.ndarray) -> np.ndarray:
        """Data to latents."""
        return self._unrolled(x, lambda pixel, shift: (pixel, pixel + shift))

    def down(self, y: np.ndarray) -> np.ndarray:
        """Latents to data."""
        return self._unrolled(y, lambda pixel, shift: (pixel - shift, pixel - shift))

    def _unrolled(
        self, k: np.ndarray, step: Callable[..., tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """``step(pixel, shift)`` is the pixel of x, and that of the result."""
        turned = self.layer.turned(torch.from_numpy(k)).numpy()
        result, fine = np.empty_like(turned), min(self.below, SHIFT)

        def fill(i: int, j: int, shift: Tensor) -> Tensor:
            whole = self.integers(shift, 2.0**fine, i * k.shape[3] + j) << (self.below - fine)
            x, result[:, :, i, j] = step(turned[:, :, i, j], whole)
            return self.tensor(x, self.below)

        self.layer.unroll(fill, self.tensor(k, self.below))
        return self.layer.turned(torch.from_numpy(result)).numpy()
