"""The base class of the distributions in this package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from musigma.tensors import sum_event

__all__ = ["EventDistribution"]


class EventDistribution(Distribution):
    """A distribution of events of known shape, without checks of its arguments.

    Draws take a `temperature`: a number, or one number for each entry of the first dimension. It
    shrinks a draw towards the center of the distribution, which it reaches at temperature 0.

    Attributes:
        element: The constraint that each element of an event meets.
    """

    element: constraints.Constraint = constraints.real

    def __init__(self, batch_shape: Sequence[int], event_shape: Sequence[int]):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None: any output of a network is valid."""
        return {}

    @property
    def support(self) -> constraints.Constraint:
        """Events whose elements each meet `element`."""
        return constraints.independent(self.element, len(self.event_shape))

    def _sum(self, terms: Tensor) -> Tensor:
        return sum_event(terms, len(self.event_shape))
