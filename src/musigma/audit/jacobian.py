r"""The exact :math:`\log|\det J|` of a function, by autograd.

With few elements the whole Jacobian is computed. With many elements it is recognized where it has
one of these structures, which products with random vectors verify with probability one:

- a permutation: the outputs are the inputs in another order;
- a coupling: some outputs are inputs, and the others depend on one remaining input each, so J is
  triangular up to an order, and its determinant is the product of one slope per element;
- one matrix per pixel: every output depends on the channels of its own pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.testing import jacobian, vector_products

__all__ = ["DENSE", "Volume", "by_differences", "volume"]

DENSE = 256  # elements up to which the whole Jacobian is computed
Function = Callable[[Tensor], Tensor]  # x (B, ...) to z (B, D), differentiable


class Volume(NamedTuple):
    """log |det J|, its sign and condition, (B,) each; the latter are NaN if they are not known."""

    log_det: Tensor
    sign: Tensor
    condition: Tensor

    @classmethod
    def of(cls, jacobians: Tensor) -> Volume:
        """Of Jacobians (B, D, D); of large ones, the condition is not computed."""
        finite = jacobians.isfinite().flatten(1).all(1)
        eye = torch.eye(jacobians.shape[1], dtype=torch.float64)
        whole = torch.where(finite[:, None, None], jacobians.double(), eye)
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
    found = _coupling(z, leaf) or _pixelwise(z, leaf)
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


def _products(z: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    return vector_products(z, x, vectors.to(z)).double()


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """The index of the nearest of some values (n,), for each number."""
    order = values.argsort()
    middles = (values[order[1:]] + values[order[:-1]]) / 2
    return order[torch.bucketize(numbers.contiguous(), middles)]


def _coupling(z: Tensor, x: Tensor) -> Volume | None:
    """The determinant where outputs are inputs, or depend on one input each."""
    flat, out = x.detach().flatten(1).double(), z.detach().double()
    if flat.shape != out.shape:
        return None
    source = _nearest(flat[0], out[0])
    kept = (flat[:, source] == out).all(0)  # equal to the bit in every example
    if len(source[kept].unique()) < kept.sum():  # one input appears twice
        kept[:] = False
    moved = torch.ones_like(kept)  # the inputs that are not kept
    moved[source[kept]] = False
    b, n = len(z), int(moved.sum())
    zero = torch.zeros(b, dtype=torch.float64)
    if n == 0:
        return Volume(zero, zero, zero + 1)
    first, second, third = (_random((n,), seed) for seed in (1, 2, 3))
    vectors = torch.zeros(3, b, len(kept), dtype=torch.float64)
    vectors[:, :, ~kept] = torch.stack([first, first * second, third])[:, None]
    products = _products(z, x, vectors)[:, :, moved]
    if (products[0] == 0).any() or not products.isfinite().all():
        return None
    owner = _nearest(second, (products[1] / products[0])[0])  # the output that an input moves
    slopes = products[0] / first[owner]
    expected = slopes * third[owner]
    if len(owner.unique()) < n or not torch.allclose(products[2], expected, 1e-4, 1e-10):
        return None
    return Volume(slopes.abs().log().sum(1), slopes.sign().prod(1), zero * torch.nan)


def _pixelwise(z: Tensor, x: Tensor) -> Volume | None:
    """The determinant where there is one matrix per pixel."""
    if x.ndim < 3 or z.shape[1] != x[0].numel() or x.shape[1] > 96:
        return None
    b, c, *_ = x.shape
    pixels = x[0, 0].numel()
    probe = _random((c, pixels), 5)
    picks = torch.eye(c, dtype=torch.float64)[:, :, None].expand(c, c, pixels)
    vectors = torch.cat([picks, probe[None]])[:, None].expand(c + 1, b, c, pixels)
    products = _products(z, x, vectors.reshape(c + 1, *z.shape))
    *blocks, probed = products.reshape(c + 1, b, c, pixels)
    blocks = torch.stack(blocks)
    expected = torch.einsum("op,obip->bip", probe, blocks)
    if not torch.allclose(probed, expected, rtol=1e-4, atol=1e-9):
        return None
    each = Volume.of(blocks.permute(1, 3, 0, 2).reshape(-1, c, c))
    log_det, sign, condition = (part.reshape(b, -1) for part in each)
    return Volume(log_det.sum(1), sign.prod(1), condition.amax(1))
