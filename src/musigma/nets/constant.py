"""A network of no input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musigma.context import pooled

__all__ = ["Constant"]


class Constant(nn.Module):
    """Learned numbers in place of the output of a network: the parameters of a prior.

    They start at zero. A context shifts whole channels, by a linear map that starts at zero.

    Args:
        shape: (C, ...) of the output.
        context: Number of features of the context; 0 for none.

    Example:
        >>> Constant((6, 2, 2))().shape, Constant((6, 2, 2), context=3)(torch.ones(5, 3)).shape
        (torch.Size([6, 2, 2]), torch.Size([5, 6, 2, 2]))
    """

    def __init__(self, shape: Sequence[int], *, context: int = 0):
        super().__init__()
        self.values, self.context = nn.Parameter(torch.zeros(*shape)), context
        self.from_context = nn.Linear(context, shape[0], bias=False) if context else None
        if self.from_context is not None:
            nn.init.zeros_(self.from_context.weight)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The numbers, of this shape without a context, and (B, *shape) with one.

        A prior is called with its context as the only argument, so `given` is taken as the
        context if `context` is None.

        Raises:
            ValueError: If the declared context is missing.
        """
        context = given if context is None else context
        if self.from_context is None:
            return self.values
        if context is None:
            raise ValueError(f"context: this prior needs {self.context} features; got none")
        shift = self.from_context(pooled(context))
        return self.values + shift.reshape(*shift.shape, *(1,) * (self.values.ndim - 1))
