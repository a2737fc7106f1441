"""Top-down hierarchies of latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import conditioned
from musigma.model import Model
from musigma.trace import Trace, refuse_twins

__all__ = ["Ladder", "LadderBlock"]


class LadderBlock(nn.Module):
    """One latent of a `Ladder`: its prior, its posterior, and its effect on the state.

    Each network may take the context as an additional last argument.

    Args:
        prior: A head: maps the state (B, C, H, W) to p(z | state).
        posterior: A head: maps the state and the bottom-up features, concatenated on axis 1, to
            q(z | state, x).
        merge: ``merge(state, z)`` is the state of the next block.
    """

    def __init__(self, prior: nn.Module, posterior: nn.Module, merge: nn.Module):
        super().__init__()
        self.prior, self.posterior, self.merge = prior, posterior, merge

    def propose(self, state: Tensor, context: Any = None) -> tuple[Any, Tensor]:
        """p(z | state), and the state that z is merged with: the same one, unless overridden."""
        return conditioned(self.prior, state, context), state


class Ladder(Model):
    r"""A top-down hierarchical VAE: every posterior sees the data and the state from above.

    .. math:: p(x, z) = p(x | h_L) \prod_l p(z_l | h_{l-1}), \quad h_l = merge(h_{l-1}, z_l)

    with q(z_l | h_{l-1}, x). Prior and posterior share their state, so the KL of two Gaussians has
    a closed form (Sønderby et al., "Ladder Variational Autoencoders", 2016, arXiv:1602.02282;
    Child, "Very Deep VAEs", 2021, arXiv:2011.10650).

    Args:
        bottom_up: Maps x to a sequence of features, one for each block, top first.
        blocks: The latents, top first.
        decoder: A head: maps the last state to the distribution of x.
        state: The shape (C, H, W) of the first state, which is a learned constant.

    Raises:
        ValueError: If a block is used twice.
    """

    blocks: Any  # a ModuleList of blocks

    def __init__(
        self,
        bottom_up: nn.Module,
        blocks: Iterable[LadderBlock],
        decoder: nn.Module,
        state: Sequence[int],
    ):
        super().__init__()
        self.bottom_up, self.blocks, self.decoder = bottom_up, nn.ModuleList(blocks), decoder
        self.top = nn.Parameter(torch.zeros(1, *state))
        refuse_twins(self.blocks)

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """From the top: z ~ q(z | state, x), paired with p(z | state); finally p(x | state)."""
        state = self._start(len(x))
        bottom_up = trace.encoding(self.bottom_up, x, context)
        for block, features in zip(self.blocks, bottom_up, strict=True):
            q = conditioned(block.posterior, torch.cat([state, features], 1), context)
            p, state = block.propose(state, context)
            state = conditioned(block.merge, state, trace.latent(block, q, p), context)
        trace.p(self, conditioned(self.decoder, state, context), x)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """From the top: z ~ p(z | state); finally x ~ p(x | state)."""
        n = trace.n if context is None else contexts.length(context)
        if n is None:
            raise ValueError("n: expected the number of examples to generate; got none")
        state = self._start(n)
        drawn = []
        for block in self.blocks:
            p, onward = block.propose(state, context)
            z = trace.p(block, p)
            drawn.append((block, state, z))
            state = conditioned(block.merge, onward, z, context)
        x = trace.p(self, conditioned(self.decoder, state, context))
        if trace.scoring:
            pairs = zip(drawn, conditioned(self.bottom_up, x, context), strict=True)
            for (block, state, z), features in reversed(list(pairs)):
                posterior = conditioned(block.posterior, torch.cat([state, features], 1), context)
                trace.q(block, posterior, z)
        return x

    def _start(self, n: int) -> Tensor:
        return self.top.expand(n, *self.top.shape[1:])

    def variables(self) -> Iterator[nn.Module]:
        """The blocks from the top, then the observation."""
        yield from self.blocks
        yield self

    def latents(self) -> Iterator[nn.Module]:
        """The blocks from the top."""
        yield from self.blocks
