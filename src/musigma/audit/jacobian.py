r"""The exact :math:`\log|\det J|` of a function, by autograd.

With few elements the whole Jacobian is computed. With many elements a structure is recognized,
that of permutations, couplings and convolutions of single pixels: some outputs are inputs, and
each of the others depends on the remaining inputs of its own pixel alone. Then the determinant is
the product of one for each pixel. A product with a random vector verifies it with probability one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musigma.testing import jacobian, vector_products

__all__ = ["DENSE", "Volume", "by_differences", "volume"]

DENSE = 256  # elements up to which the whole Jacobian is computed
CHANNELS = 96  # up to which the determinants of pixels are computed
Function = Callable[[Tensor], Tensor]  # x (B, ...) to z (B, D), differentiable


class Volume(NamedTuple):
    """log |det J|, its sign and condition, (B,) each; the latter are NaN if they are not known."""

    log_det: Tensor
    sign: Tensor
    condition: Tensor

    @classmethod
    def of(cls, jacobians: Tensor, rows: Tensor | None = None, columns: Any = None) -> Volume:
        """Of Jacobians (B, D, D), without some rows (B, D) and as many columns (B, D).

        The condition of large ones is not computed.
        """
        finite = jacobians.isfinite().flatten(1).all(1)
        eye = torch.eye(jacobians.shape[1], dtype=torch.float64)
        whole = torch.where(finite[:, None, None], jacobians.double(), eye)
        if rows is not None:
            whole = whole.masked_fill(rows[:, :, None] | columns[:, None, :], 0.0)
            whole[(*rows.nonzero().T, columns.nonzero()[:, 1])] = 1.0
        sign, log_det = torch.linalg.slogdet(whole)
        condition = torch.full_like(log_det, math.nan)
        if whole.shape[1] <= DENSE:
            values = torch.linalg.svdvals(whole)
            condition = values[:, 0] / values[:, -1].clamp(min=1e-300)
        return cls(*(torch.where(finite, t, math.nan) for t in (log_det, sign, condition)))

    @property
    def worst(self) -> float:
        """The largest condition; zero if none is known."""
        return float(self.condition.nan_to_num(nan=0.0).max())

    def signs(self) -> tuple[int, int]:
        """How many determinants are positive, and negative, among those that are not near zero."""
        sure = self.log_det.isfinite() & ~(self.condition > 1e9)
        if sure.any():
            sure &= self.log_det > self.log_det[sure].median() + math.log(0.01)
        return int((self.sign[sure] > 0).sum()), int((self.sign[sure] < 0).sum())


def volume(function: Function, x: Tensor, seconds: float = 0.0) -> Volume | None:
    """The log-determinant of a function's Jacobian at each x, in nats.

    None if there are more than `DENSE` elements, no known structure, and the whole Jacobian would
    take more CPU time than `seconds`. No example may depend on another.

    Raises:
        RuntimeError: If the output does not depend on x in autograd's graph.

    Example:
        >>> x = torch.randn(2, 3, dtype=torch.float64)
        >>> volume(lambda x: 2 * x, x).log_det
        tensor([2.0794, 2.0794], dtype=torch.float64)
    """
    if x[0].numel() <= DENSE:
        return Volume.of(jacobian(function, x))
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = function(leaf)
    if not z.isfinite().all():
        return None
    found = _by_pixels(z, leaf)
    if found is None and seconds > 0:
        with suppress(TimeoutError):
            return Volume.of(jacobian(function, x, seconds=seconds))
    return found


def by_differences(function: Function, x: Tensor) -> Volume:
    """As `volume`, by central differences: where autograd's graph is broken."""
    flat = x.detach().reshape(len(x), -1)
    columns = []
    for i in range(flat.shape[1]):
        step = torch.zeros_like(flat)
        step[:, i] = 1e-5 * (1 + flat[:, i].abs())
        ahead, behind = (function(moved.reshape(x.shape)) for moved in (flat + step, flat - step))
        columns.append((ahead - behind).detach() / (2 * step[:, i : i + 1]))
    return Volume.of(torch.stack(columns, 2))


def _nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """The index of the nearest of some values (n,), for each number."""
    order = values.argsort()
    middles = (values[order[1:]] + values[order[:-1]]) / 2
    return order[torch.bucketize(numbers.contiguous(), middles)]


def _by_pixels(z: Tensor, x: Tensor) -> Volume | None:
    """The determinant where outputs are inputs, or depend on the rest of their own pixel."""
    flat, out = x.detach().flatten(1).double(), z.detach().double()
    if flat.shape != out.shape:
        return None
    source = _nearest(flat[0], out[0])
    kept = (flat[:, source] == out).all(0)  # equal to the bit in every example
    used = torch.zeros_like(kept)  # the inputs that these are
    used[source[kept]] = True
    if used.sum() < kept.sum():  # one input appears twice
        kept, used = torch.zeros_like(kept), torch.zeros_like(kept)
    b, c = x.shape[:2]
    if kept.all():
        zero = torch.zeros(b, dtype=torch.float64)
        return Volume(zero, zero * math.nan, zero + 1)
    kept, used = (t.reshape(c, -1) for t in (kept, used))
    if c > CHANNELS or (kept.sum(0) != used.sum(0)).any():
        return None
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(kept.shape, generator=generator, dtype=torch.float64) * ~kept
    picks = torch.eye(c, dtype=torch.float64)[:, :, None] * ~kept
    vectors = torch.cat([picks, probe[None]])[:, None].expand(c + 1, b, *kept.shape)
    products = vector_products(z, x, vectors.reshape(c + 1, *z.shape).to(z)).double()
    *blocks, probed = products.reshape(c + 1, b, *kept.shape) * ~used
    blocks = torch.stack(blocks)  # of an output channel, example, input channel and pixel
    if not torch.allclose(probed, torch.einsum("op,obip->bip", probe, blocks), 1e-4, 1e-9):
        return None
    rows, columns = (t.T.repeat(b, 1) for t in (kept, used))
    each = Volume.of(blocks.permute(1, 3, 0, 2).reshape(-1, c, c), rows, columns)
    log_det, _, condition = (part.reshape(b, -1) for part in each)
    total = log_det.sum(1)
    return Volume(total, total * math.nan, condition.amax(1))
