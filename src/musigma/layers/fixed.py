"""Bijections without parameters: changes of units, the logit, and reorderings of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.model import Bijection
from musigma.tensors import at_least_float32, sum_event

__all__ = ["Checkerboard", "Circle", "Flip", "Logit", "Permutation", "Rescale", "Squeeze"]


class Rescale(Bijection):
    r"""A fixed change of units, :math:`y = a x + b`; :math:`\log|\det| = D \log|a|`.

    As a layer, its constant log-determinant, which is often forgotten, is part of every figure.

    Args:
        scale: a, not zero.
        shift: b.

    Example:
        >>> Rescale(1 / 256, -0.5)(torch.full((1, 3), 128.0))
        (tensor([[0., 0., 0.]]), tensor([-16.6355]))
    """

    is_preprocessing = True

    def __init__(self, scale: float, shift: float = 0.0):
        super().__init__()
        if scale == 0:
            raise ValueError("scale: expected a number other than zero")
        self.scale, self.shift = scale, shift

    def _log_det(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), x[0].numel() * math.log(abs(self.scale)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(a x + b, log_det)``."""
        x = at_least_float32(x)
        return x * self.scale + self.shift, self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((y - b) / a, -log_det)``."""
        y = at_least_float32(y)
        return (y - self.shift) / self.scale, -self._log_det(y)

    def extra_repr(self) -> str:
        """Names the constants."""
        return f"scale={self.scale:.6g}, shift={self.shift:.6g}"


class Logit(Bijection):
    r"""The unit interval to the real line, :math:`y = \mathrm{logit}(\alpha + (1 - 2\alpha) x)`.

    (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv:1605.08803.)

    Args:
        alpha: Margin α in (0, 0.5), which keeps the logit of 0 and of 1 finite.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number in (0, 0.5); got {alpha}")
        self.alpha = alpha

    def _log_det(self, y: Tensor) -> Tensor:
        log_slope = math.log(1 - 2 * self.alpha) - F.logsigmoid(y) - F.logsigmoid(-y)
        return sum_event(log_slope, log_slope.ndim - 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, Σ log(1 - 2α) - log u (1 - u))`` at u = α + (1 - 2α) x."""
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * at_least_float32(x))
        return y, self._log_det(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((sigmoid(y) - α) / (1 - 2α), -log_det)``."""
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha), -self._log_det(y)

    def extra_repr(self) -> str:
        """Names the constant."""
        return f"alpha={self.alpha}"


class Permutation(Bijection):
    """A fixed reordering of the channels; log_det is zero.

    Args:
        order: ``y[:, i] = x[:, order[i]]``. It is part of the state.

    Raises:
        ValueError: If `order` is not a permutation.

    Example:
        >>> Permutation.reverse(3)(torch.tensor([[1.0, 2.0, 3.0]]))[0]
        tensor([[3., 2., 1.]])
    """

    order: Tensor

    def __init__(self, order: Sequence[int]):
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order: expected each of 0 .. {len(order) - 1} once; got {order}")
        self.register_buffer("order", torch.tensor(list(order)))

    @classmethod
    def reverse(cls, channels: int) -> Permutation:
        """The last channel first."""
        return cls(range(channels)[::-1])

    @classmethod
    def shuffle(cls, channels: int) -> Permutation:
        """A random order, from torch's generator."""
        return cls(torch.randperm(channels).tolist())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reordered channels."""
        return _ordered(x, self.order), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The original order."""
        return _ordered(y, self.order.argsort()), y.new_zeros(len(y))


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """The channels in an order; vectors become contiguous along the batch, as networks emit them.

    Operations on tensors of different layouts take several times as long.
    """
    if x.ndim == 2:
        return x.t().index_select(0, order).t()
    return x.index_select(1, order)


class Squeeze(Bijection):
    """Trade space for channels: (C, H, W) to (4 C, H / 2, W / 2), as in Real NVP and Glow.

    Channel ``4 c + 2 i + j`` of the output holds row i, column j of each 2x2 block of channel c.
    With another factor f than 2, the blocks are f x f, and the positions of the output are the
    patches of a vision transformer.

    Args:
        factor: Side of the blocks.

    Raises:
        ValueError: For a factor below 2; on a pass, if it does not divide both sides.

    Example:
        >>> Squeeze(4)(torch.randn(1, 3, 8, 12))[0].shape
        torch.Size([1, 48, 2, 3])
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        if factor < 2:
            raise ValueError(f"factor: expected 2 or more; got {factor}")
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The squeezed image."""
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            sides = "even sides" if self.factor == 2 else f"sides that {self.factor} divides"
            raise ValueError(
                f"x: Squeeze needs images (B, C, H, W) of {sides}; got {tuple(x.shape)}"
            )
        return F.pixel_unshuffle(x, self.factor), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image."""
        return F.pixel_shuffle(y, self.factor), y.new_zeros(len(y))

    def extra_repr(self) -> str:
        """Names the factor."""
        return f"factor={self.factor}"


class Flip(Bijection):
    """The positions of a sequence (C, T) or an image (C, H, W) in reverse order; its own inverse.

    Between `Autoregressive` layers, each step then depends on those after it in the layer before.

    Example:
        >>> Flip()(torch.arange(6.0).reshape(1, 2, 3))[0]
        tensor([[[2., 1., 0.],
                 [5., 4., 3.]]])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The positions in reverse order."""
        return x.flip([*range(2, x.ndim)]), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The positions in their order."""
        return self(y)


class Checkerboard(Bijection):
    """The black squares of a checkerboard, then its white ones: (C, H, W) to (2 C, H, W / 2).

    A `Coupling` between a checkerboard and its inverse is Real NVP's checkerboard coupling at half
    the cost, since its network sees no masked image. Even rows keep their even columns first, odd
    rows their odd ones.

    Args:
        white: Whether the white squares come first.

    Raises:
        ValueError: For an odd width.
    """

    def __init__(self, *, white: bool = False):
        super().__init__()
        self.white = white

    def _swap(self, pairs: Tensor) -> Tensor:
        """Swap the two halves (2, B, C, H, W / 2) on every second row; its own inverse."""
        odd = torch.arange(pairs.shape[3], device=pairs.device) % 2 == (0 if self.white else 1)
        return torch.where(odd[:, None], pairs.flip(0), pairs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two halves, as channels."""
        if x.ndim != 4 or x.shape[3] % 2:
            raise ValueError(
                f"x: Checkerboard needs images (B, C, H, W) of even width; got {tuple(x.shape)}"
            )
        first, second = self._swap(torch.stack([x[..., 0::2], x[..., 1::2]]))
        return torch.cat([first, second], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image."""
        even, odd = self._swap(torch.stack(y.chunk(2, 1)))
        return torch.stack([even, odd], -1).flatten(-2), y.new_zeros(len(y))


class Circle(Bijection):
    r"""Points of a circle, of which each number is one: both directions wrap x.

    .. math:: y = x - p \lfloor (x - a) / p \rfloor \in [a, a + p), \quad \log|\det| = 0

    Numbers that differ by a multiple of the period p are the same point, so as a map of numbers it
    is one to one only within one period; densities are those of the points.

    Args:
        period: p.
        low: a.

    Raises:
        ValueError: If the period is not positive.

    Example:
        >>> Circle(360.0, -180.0)(torch.tensor([[190.0, -170.0, 10.0]]))[0]
        tensor([[-170., -170.,   10.]])
    """

    def __init__(self, period: float, low: float = 0.0):
        super().__init__()
        if not 0 < period < math.inf:
            raise ValueError(f"period: expected a positive number; got {period}")
        self.period, self.low = period, low

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, 0)``."""
        x = at_least_float32(x)
        turns = ((x.detach() - self.low) / self.period).floor()
        return x - self.period * turns, x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`."""
        return self.forward(y)

    def extra_repr(self) -> str:
        """Names the ends."""
        return f"{self.low:.6g} to {self.low + self.period:.6g}"
