r"""The exact :math:`\log|\det J|` of a function, by autograd.

With few elements the whole Jacobian is computed. With many elements it is recognized where it has
one of these structures, which products with random vectors verify with probability one:

- a permutation: the outputs are the inputs in another order;
- a coupling: some outputs are inputs, and the others depend on one remaining input each, so J is
  triangular up to an order, and its determinant is the product of one slope per element;
- one matrix per pixel: every output depends on the channels of its own pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DENSE", "Volume", "by_autograd", "by_differences", "volume"]

DENSE = 256  # elements up to which the whole Jacobian is computed
Function = Callable[[Tensor], Tensor]  # x (B, ...) to z (B, D), differentiable


class Volume(NamedTuple):
    """log |det J|, its sign (zero if unknown) and condition (NaN if unknown), (B,) each."""

    log_det: Tensor
    sign: Tensor
    condition: Tensor


def volume(function: Function, x: Tensor, dense: int = DENSE) -> Volume | None:
    """The log-determinant of a function's Jacobian at each x, in nats.

    The whole Jacobian is computed up to `dense` elements. None: there are more, and no known
    structure. No example may depend on another.

    Example:
        >>> x = torch.randn(2, 3, dtype=torch.float64)
        >>> volume(lambda x: 2 * x, x).log_det
        tensor([2.0794, 2.0794], dtype=torch.float64)
    """
    if x[0].numel() <= dense:
        return by_autograd(function, x)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = function(leaf)
    if not z.isfinite().all():
        return None
    return _coupling(z, leaf) or _pixelwise(z, leaf)


def by_autograd(function: Function, x: Tensor) -> Volume:
    """As `volume`, by the whole Jacobian: D backward passes.

    Raises:
        RuntimeError: If the output does not depend on x in autograd's graph.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = function(x)
    d = z.shape[1]
    picks = torch.eye(d, dtype=z.dtype)[:, None].expand(d, *z.shape)
    parts = picks.split(max(1, 2_000_000 // z.numel()))
    return _of(torch.cat([_products(z, x, part) for part in parts]).transpose(0, 1))


def by_differences(function: Function, x: Tensor) -> Volume:
    """As `volume`, by central differences: where autograd's graph is broken."""
    flat = x.detach().flatten(1)
    columns = []
    for i in range(flat.shape[1]):
        step = torch.zeros_like(flat)
        step[:, i] = 1e-5 * (1 + flat[:, i].abs())
        ahead, behind = (function(moved.reshape(x.shape)) for moved in (flat + step, flat - step))
        columns.append((ahead - behind).detach() / (2 * step[:, i : i + 1]))
    return _of(torch.stack(columns, 2))


def _products(z: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """Several vᵀ J, (n, B, D)."""
    gradient = partial(torch.autograd.grad, z, x, retain_graph=True)
    try:
        (g,) = gradient(vectors, is_grads_batched=True)
    except RuntimeError:  # operations that cannot be batched go one by one
        g = torch.stack([gradient(v)[0] for v in vectors])
    return g.reshape(len(vectors), len(x), -1).detach().double()


def _of(whole: Tensor) -> Volume:
    """Of Jacobians (B, D, D)."""
    finite = whole.isfinite().flatten(1).all(1)
    whole = torch.where(finite[:, None, None], whole.double(), torch.eye(whole.shape[1]).double())
    sign, log_det = torch.linalg.slogdet(whole)
    values = torch.linalg.svdvals(whole)
    condition = values[:, 0] / values[:, -1].clamp(min=1e-300)
    return Volume(*(torch.where(finite, t, torch.nan) for t in (log_det, sign, condition)))


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
    vectors = torch.zeros(3, b, len(kept), dtype=z.dtype)
    vectors[:, :, ~kept] = torch.stack([first, first * second, third])[:, None].to(z)
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
    products = _products(z, x, vectors.reshape(c + 1, *z.shape).to(z))
    *blocks, probed = products.reshape(c + 1, b, c, pixels)
    blocks = torch.stack(blocks)
    expected = torch.einsum("op,obip->bip", probe, blocks)
    if not torch.allclose(probed, expected, rtol=1e-4, atol=1e-9):
        return None
    each = _of(blocks.permute(1, 3, 0, 2).reshape(-1, c, c))
    log_det, sign, condition = (part.reshape(b, -1) for part in each)
    return Volume(log_det.sum(1), sign.prod(1), condition.amax(1))
