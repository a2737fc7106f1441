r"""The exact :math:`\log|\det J|` of a function, by autograd.

With few elements the whole Jacobian is computed. With many elements it is recognised where it has
one of these structures, which products with random vectors verify with probability one:

- a permutation: the outputs are the inputs in another order;
- a coupling: some outputs are inputs, and the others depend on one remaining input each, so J is
  triangular up to an order, and its determinant is the product of one slope per element;
- one matrix per pixel: every output depends on the channels of its own pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Volume", "differences", "jacobian", "volume"]

DENSE = 256  # elements up to which the whole Jacobian is computed
Function = Callable[[Tensor], Tensor]  # x (B, ...) to z (B, D), differentiable


class Volume(NamedTuple):
    """log |det J|, its sign (zero if unknown) and condition (NaN if unknown), (B,) each."""

    log_det: Tensor
    sign: Tensor
    condition: Tensor


def jacobian(function: Function, x: Tensor) -> Tensor:
    """The Jacobians of independent examples, (B, D, D), by D backward passes.

    Raises:
        RuntimeError: If the output does not depend on x in autograd's graph.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = function(x)
    d = z.shape[1]
    rows = []
    chunk = max(1, min(d, 2_000_000 // max(1, z.numel())))
    for start in range(0, d, chunk):
        ends = min(start + chunk, d)
        picks = torch.zeros(ends - start, *z.shape, dtype=z.dtype)
        picks[torch.arange(ends - start), :, torch.arange(start, ends)] = 1.0
        rows.append(_products(z, x, picks))
    return torch.cat(rows).transpose(0, 1).double()


def _products(z: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """Several vᵀ J, (n, B, D)."""
    try:
        if len(vectors) < 4:
            raise RuntimeError("not worth it")
        (g,) = torch.autograd.grad(
            z, x, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:  # operations that cannot be batched go one by one
        parts = [
            torch.autograd.grad(z, x, v, retain_graph=True, allow_unused=True)[0] for v in vectors
        ]
        g = None if parts[0] is None else torch.stack(parts)
    if g is None:
        raise RuntimeError("z does not depend on x in autograd's graph")
    return g.reshape(len(vectors), len(x), -1).detach()


def differences(function: Function, x: Tensor) -> Tensor:
    """The Jacobians by central differences, (B, D, D), where autograd's graph is broken."""
    b, d = len(x), x[0].numel()
    columns = []
    for row in x:
        step = 1e-5 * (1 + row.abs().reshape(-1))
        moved = row.reshape(1, -1) + torch.diag(step)
        other = row.reshape(1, -1) - torch.diag(step)
        ends = []
        for part in (moved, other):
            parts = part.split(max(1, b))
            values = []
            for piece in parts:  # in batches of the size that is accepted
                full = torch.cat([piece, piece[-1:].expand(b - len(piece), d)])
                values.append(function(full.reshape(b, *x.shape[1:])).detach()[: len(piece)])
            ends.append(torch.cat(values))
        columns.append(((ends[0] - ends[1]) / (2 * step[:, None])).T)
    return torch.stack(columns).double()


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
        whole = jacobian(function, x)
        if not whole.isfinite().all():
            nan = torch.full((len(x),), torch.nan, dtype=torch.float64)
            return Volume(nan, nan, nan)
        sign, log_det = torch.linalg.slogdet(whole)
        return Volume(log_det, sign, _condition(whole))
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = function(leaf)
    if not z.isfinite().all():
        return None
    return _coupling(z, leaf) or _pixelwise(z, leaf)


def _condition(whole: Tensor) -> Tensor:
    values = torch.linalg.svdvals(whole)
    return values[:, 0] / values[:, -1].clamp(min=1e-300)


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _coupling(z: Tensor, x: Tensor) -> Volume | None:
    """The determinant where outputs are inputs, or depend on one input each."""
    flat = x.detach().reshape(len(x), -1)
    out = z.detach()
    if flat.shape != out.shape:
        return None
    kept_out, kept_in = _same(out, flat)
    b, d = flat.shape
    left_out, left_in = ~kept_out, ~kept_in
    if left_out.sum() != left_in.sum():
        return None
    zero = torch.zeros(b, dtype=torch.float64)
    unknown = torch.full((b,), torch.nan, dtype=torch.float64)
    if not left_out.any():
        return Volume(zero, zero, torch.ones(b, dtype=torch.float64))
    n = int(left_out.sum())
    if z.requires_grad is False:
        return None
    vectors = torch.zeros(3, b, d, dtype=z.dtype)
    first, second, third = (_random((n,), seed).to(z) for seed in (1, 2, 3))
    vectors[0][:, left_out] = first
    vectors[1][:, left_out] = first * second
    vectors[2][:, left_out] = third
    products = _products(z, x, vectors)[:, :, left_in].double()
    if (products[0] == 0).any() or not products.isfinite().all():
        return None
    ratio = (products[1] / products[0])[0]
    order = second.double().argsort()
    values = second.double()[order]
    at = torch.searchsorted(values, ratio.contiguous()).clamp(1, n - 1) if n > 1 else order
    if n > 1:  # the nearer of two neighbours
        at = at - (ratio - values[at - 1] < values[at] - ratio).long()
    owner = order[at]
    if len(owner.unique()) != n:
        return None
    slopes = products[0] / first.double()[owner]
    expected = slopes * third.double()[owner]
    if not torch.allclose(products[2], expected, rtol=1e-4, atol=1e-10):
        return None
    log_det = slopes.abs().log().sum(1)
    return Volume(log_det, slopes.sign().prod(1), unknown)


def _same(out: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs equal inputs to the bit in every example, and which inputs these are."""
    out, flat = out.double(), flat.double()
    order = flat[0].argsort()
    values = flat[0][order]
    at = torch.searchsorted(values, out[0].contiguous()).clamp(max=len(values) - 1)
    source = order[at]
    kept = (flat[:, source] == out).all(0)
    kept_in = torch.zeros(flat.shape[1], dtype=torch.bool)
    kept_in[source[kept]] = True
    if kept_in.sum() != kept.sum():  # one input appears twice
        return torch.zeros_like(kept), torch.zeros_like(kept_in)
    return kept, kept_in


def _pixelwise(z: Tensor, x: Tensor) -> Volume | None:
    """The determinant where there is one matrix per pixel."""
    if x.ndim < 3 or z.shape[1] != x[0].numel():
        return None
    b, c = x.shape[:2]
    if c > 96:
        return None
    pixels = x[0, 0].numel()
    picks = torch.zeros(c, b, c, pixels, dtype=z.dtype)
    picks[torch.arange(c), :, torch.arange(c)] = 1.0
    check = _random((c, pixels), 5).to(z)
    vectors = torch.cat([picks, check.expand(1, b, c, pixels)]).reshape(c + 1, *z.shape)
    products = _products(z, x, vectors).reshape(c + 1, b, c, pixels)
    blocks, probe = products[:-1].double(), products[-1].double()
    expected = torch.einsum("op,obip->bip", check.double(), blocks)
    if not torch.allclose(probe, expected, rtol=1e-4, atol=1e-9):
        return None
    blocks = blocks.permute(1, 3, 0, 2)
    sign, log_det = torch.linalg.slogdet(blocks)
    condition = _condition(blocks.reshape(-1, c, c)).reshape(b, -1).amax(1)
    return Volume(log_det.sum(1), sign.prod(1), condition)
