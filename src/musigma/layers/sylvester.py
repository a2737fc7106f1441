"""Sylvester bijections: planar ones of several directions at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.layers.planar import Bend
from musigma.model import Bijection
from musigma.nets import Amortized
from musigma.tensors import at_least_float32

__all__ = ["Sylvester"]

INSIDE = 1 - 1e-6
"""Largest absolute value of a diagonal entry."""


class Sylvester(Bijection):
    r"""A planar bijection with M directions.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \quad
        \log|\det| = \sum_i \log\big(1 + R_{ii} \tilde R_{ii}\,
        \tanh'(\tilde R Q^\top x + b)_i\big)

    Q (D, M) has orthonormal columns; R and R̃ (M, M) are upper triangular, with diagonals in
    (-1, 1), so that it is always invertible. The inverse solves M equations in one unknown, from
    the last to the first. (van den Berg, Hasenclever, Tomczak, Welling, "Sylvester Normalizing
    Flows for Variational Inference", 2018, arXiv:1803.05649.)

    Args:
        features: D.
        rank: M, at most D; None for D.
        reflections: Number of Householder reflections whose product is Q. With 0, Q is a free
            matrix whose columns are orthonormalized; the paper does that by an iteration, here it
            is exact (the QR decomposition).
        context: Number of features of the context; with it a network emits all matrices.
        hidden: Width of each hidden layer of that network.

    Raises:
        ValueError: If the rank is not in 1 .. D, or there is a negative number of reflections.

    Example:
        >>> layer, x = Sylvester(5, rank=2), torch.randn(4, 5)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    slow_inverse = "root finding of one number after another"

    def __init__(
        self,
        features: int,
        *,
        rank: int | None = None,
        reflections: int = 0,
        context: int = 0,
        hidden: Sequence[int] = (64,),
    ):
        super().__init__()
        rank = features if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank: expected 1 to {features}, the features; got {rank}")
        if reflections < 0:
            raise ValueError(f"reflections: expected 0 or more; got {reflections}")
        self.features, self.rank, self.reflections = features, rank, reflections
        self.sizes = [(reflections or rank) * features, rank, rank, rank]
        self.sizes += [rank * (rank - 1) // 2] * 2
        start = torch.randn(sum(self.sizes))
        start[self.sizes[0] :] *= 0.1
        self.numbers = Amortized(start, context=context, hidden=hidden)

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, R, R̃ and b, each with one matrix for all examples or one for each."""
        h = at_least_float32(self.numbers(x, context))
        free, r_diagonal, s_diagonal, b, r, s = h.split(self.sizes, 1)
        rows = free.reshape(len(h), -1, self.features)
        q = self._reflected(rows) if self.reflections else _orthonormal(rows.transpose(1, 2))
        return q, self._triangular(r, r_diagonal), self._triangular(s, s_diagonal), b

    def _reflected(self, vectors: Tensor) -> Tensor:
        """The first M columns of the product of the reflections along vectors (N, K, D)."""
        q = torch.eye(self.features, self.rank, dtype=vectors.dtype, device=vectors.device)
        q = q.expand(len(vectors), -1, -1)
        for v in F.normalize(vectors, dim=2).flip(1).unbind(1):
            q = q - 2 * v[:, :, None] * (v[:, None] @ q)
        return q

    def _triangular(self, upper: Tensor, diagonal: Tensor) -> Tensor:
        matrix = torch.diag_embed(INSIDE * torch.tanh(diagonal))
        i, j = torch.triu_indices(self.rank, self.rank, 1, device=upper.device)
        return matrix.index_put((torch.arange(len(upper), device=i.device)[:, None], i, j), upper)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        x = at_least_float32(x)
        q, r, s, b = self._read(x, context)
        t = torch.tanh(_times(s, _times(q.mT, x)) + b)
        centers = 1 + (r.diagonal(dim1=1, dim2=2) * s.diagonal(dim1=1, dim2=2))
        slopes = t.square() + centers * (1 - t.square())
        return x + _times(q, _times(r, t)), slopes.log().sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, by root finding."""
        y = at_least_float32(y)
        q, r, s, b = self._read(y, context)
        target, b = torch.broadcast_tensors(_times(q.mT, y), b)
        found, bent = torch.zeros_like(target), torch.zeros_like(target)
        log_det = torch.zeros_like(target[:, 0])
        for i in reversed(range(self.rank)):
            rest = target[:, i] - (r[:, i] * bent).sum(1)
            shift = b[:, i] + (s[:, i] * found).sum(1)
            h = torch.stack(torch.broadcast_tensors(r[:, i, i], s[:, i, i], shift), 1)
            root, log_slope = Bend().inverse(rest[:, None], h)
            found = torch.cat([found[:, :i], root, found[:, i + 1 :]], 1)
            t = torch.tanh(h[:, 1:2] * root + h[:, 2:])
            bent = torch.cat([bent[:, :i], t, bent[:, i + 1 :]], 1)
            log_det = log_det + log_slope[:, 0]
        return y - _times(q, _times(r, bent)), log_det

    def extra_repr(self) -> str:
        """Names the sizes."""
        return f"{self.features}, rank={self.rank}, reflections={self.reflections}"


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (N, I, J) times vectors (B, J), where N is 1 or B."""
    if len(matrix) == 1:
        return F.linear(vectors, matrix[0])
    return (matrix @ vectors[:, :, None])[:, :, 0]


def _orthonormal(columns: Tensor) -> Tensor:
    """The columns of matrices (N, D, M), orthonormalized one after another."""
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
