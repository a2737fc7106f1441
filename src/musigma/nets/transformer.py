"""Transformers over the positions of sequences and images, plain and causal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import join
from musigma.memory import recomputed
from musigma.nets.attention import attend
from musigma.nets.vectors import residual_branch

__all__ = ["Attention", "CausalTransformer", "Transformer", "waves"]


class Cache:
    """Keys and values of the earlier tokens of one attention layer, (B, heads, length, width)."""

    def __init__(self, length: int):
        self.length, self.kept = length, []

    def extended(self, new: Sequence[Tensor], start: int) -> list[Tensor]:
        """Keys and values of tokens 0 .. end - 1, for those of start .. end - 1."""
        if torch.is_grad_enabled():
            self.kept = [
                torch.cat([old[:, :, :start], t], 2)
                for old, t in zip(self.kept or new, new, strict=True)
            ]
            return self.kept
        if not self.kept:
            self.kept = [t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in new]
        end = start + new[0].shape[2]
        for room, t in zip(self.kept, new, strict=True):
            room[:, :, start:end] = t
        return [room[:, :, :end] for room in self.kept]


class Attention(nn.Module):
    """Normalization, and self-attention of several heads.

    Args:
        width: Width of a token.
        heads: Number of heads, a divisor of `width`.

    Raises:
        ValueError: If `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}; got {heads}")
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, h: Tensor, mask: Tensor | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """What is added to the tokens h (B, L, width), those from `start` if there is a cache.

        Args:
            h: The tokens.
            mask: Where a token (rows) sees another (columns), up to (B, heads, L, L).
            cache: Keys and values of the tokens before.
            start: Index of the first token.
        """
        q, k, v = self.enter(self.norm(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extended((k, v), start)
        return self.leave(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, and a perceptron of each token (Vaswani et al., 2017, arXiv:1706.03762).

    Normalization comes first in each branch. The arguments are those of `Attention`.

    Attributes:
        recompute: Whether the backward pass recomputes the block from its input
            (`musigma.memory`).
    """

    recompute = False
    repeated = True

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.branch = Attention(width, heads), residual_branch(width, 4 * width)

    @recomputed
    def forward(
        self, h: Tensor, mask: Tensor | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """The tokens, of the input's shape."""
        h = h + self.attention(h, mask, cache, start)
        return h + self.branch(h)


class Transformer(nn.Module):
    """A transformer from (B, inputs, ...) to (B, outputs, ...), whose tokens are the positions.

    Positions are learned, and start as sines and cosines. (Dosovitskiy et al., "An Image is Worth
    16x16 Words", 2021, arXiv:2010.11929, of patches, which `musigma.layers.Squeeze` makes.)

    Args:
        inputs: Channels in.
        outputs: Channels out.
        tokens: Number of positions.
        width: Width of a token.
        heads: Number of heads of the attention, a divisor of `width`.
        blocks: Number of blocks, each an attention and a perceptron.
        context: Number of features of the context, joined as channels.
        zero: Initialize the last layer to zero, so that the output is zero.

    Raises:
        ValueError: If `width` is not a multiple of `heads`; on a forward pass, for another number
            of positions.

    Example:
        >>> net = Transformer(3, 8, 4 * 4, width=8, heads=2, blocks=1)
        >>> net(torch.randn(5, 3, 4, 4)).shape
        torch.Size([5, 8, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tokens: int,
        *,
        width: int = 128,
        heads: int = 4,
        blocks: int = 2,
        context: int = 0,
        zero: bool = False,
    ):
        super().__init__()
        self.tokens, self.context = tokens, context
        self.enter = nn.Linear(inputs + context, width)
        self.positions = nn.Parameter(waves(tokens, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, outputs)
        if zero:
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def _sequence(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Channels and context (B, inputs + context, tokens)."""
        if math.prod(x.shape[2:]) != self.tokens or x.ndim < 3:
            raise ValueError(
                f"x: this network is for {self.tokens} positions; got {tuple(x.shape)}"
            )
        return join(x, context, self.context).flatten(2)

    def _tokens(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        caches: Sequence[Cache | None] = (),
        start: int = 0,
    ) -> Tensor:
        """The outputs (B, outputs, L) of the tokens from `start`, for inputs (B, inputs, L)."""
        h = self.enter(inputs.mT) + self.positions[start : start + inputs.shape[2]]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            h = block(h, mask, cache, start)
        return self.leave(self.norm(h)).mT

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (B, outputs, ...)."""
        return self._tokens(self._sequence(x, context)).unflatten(2, x.shape[2:])


class CausalTransformer(Transformer):
    """A transformer whose output at position i depends on the positions 0 .. i - 1 only.

    The positions of images are taken row by row. It is a `musigma.layers.StreamedNet`.

    Args:
        owners: The channel to which each output belongs, from `Map.owners`, as in `MADE`.
        tokens: Number of positions.
        **options: As in `Transformer`.

    Example:
        >>> net, x = CausalTransformer([0, 1, 0, 1], 5, width=8, heads=2), torch.randn(3, 2, 5)
        >>> y, other = net(x), net(torch.cat([x[..., :3], -x[..., 3:]], 2))
        >>> y.shape, torch.allclose(y[..., :4], other[..., :4], atol=1e-6)
        (torch.Size([3, 4, 5]), True)
    """

    def __init__(self, owners: Sequence[int], tokens: int, **options):
        super().__init__(max(owners) + 1, len(owners), tokens, **options)
        self.owners = list(owners)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs (B, len(owners), ...), for x (B, channels, ...)."""
        given = self._sequence(x[:, :0], context)
        before = F.pad(x.flatten(2), (1, -1))
        mask = _causal(self.tokens, 0, x.device)
        return self._tokens(torch.cat([before, given], 1), mask).unflatten(2, x.shape[2:])

    def stream(
        self, like: Tensor, context: Tensor | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """A function from some tokens to outputs, as `musigma.layers.StreamedNet` describes.

        Keys and values of all tokens so far are cached.
        """
        given = self._sequence(like[:, :0], context)
        caches = [Cache(self.tokens) for _ in self.blocks]

        def outputs(before: Tensor, start: int) -> Tensor:
            length = before.shape[2]
            inputs = torch.cat([before, given[..., start : start + length]], 1)
            mask = _causal(length, start, like.device) if length > 1 else None
            return self._tokens(inputs, mask, caches, start)

        return outputs

    def unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Evaluate token by token, as `musigma.layers.AutoregressiveNet` describes."""
        outputs = self.stream(like, context)
        last = torch.zeros_like(like.flatten(2)[..., :1])
        for i in range(self.tokens):
            last = fill(i, outputs(last, i))


def _causal(length: int, start: int, device: torch.device) -> Tensor:
    """Where tokens start .. start + length - 1 see tokens 0 .. start + length - 1."""
    mask = torch.ones(length, start + length, dtype=torch.bool, device=device)
    return mask.tril(start)


def waves(length: int, width: int) -> Tensor:
    """Sines and cosines of positions (Vaswani et al., 2017, arXiv:1706.03762), (L, width)."""
    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]
