"""Maps one after the other."""

from __future__ import annotations

from torch import Tensor

from musigma.layers.maps.map import Map

__all__ = ["Composed"]


class Composed(Map):
    """Several maps of an element, one after the other, each with parameters of its own.

    Args:
        *maps: The maps, in the order in which they are applied to x.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import torch
        >>> from musigma.layers import Affine, MixtureLogisticCDF
        >>> flow_plus_plus = Composed(MixtureLogisticCDF(4), Affine())
        >>> flow_plus_plus.outputs
        14
    """

    def __init__(self, *maps: Map):
        if not maps:
            raise ValueError("maps: expected one or more; got none")
        self.maps = maps
        slow = {getattr(map, "slow_inverse", "") for map in maps}
        self.slow_inverse = ", ".join(sorted(slow - {""}))

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for each element: those of all maps."""
        return sum(map.outputs for map in self.maps)

    def owners(self, elements: int) -> list[int]:
        """The channel to which each entry of h on axis 1 belongs: map after map."""
        return [owner for map in self.maps for owner in map.owners(elements)]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        log_slopes = []
        for map, part in zip(self.maps, self._parts(x, h), strict=True):
            x, log_slope = map.forward(x, part)
            log_slopes.append(log_slope)
        return x, sum(log_slopes[1:], log_slopes[0])

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``."""
        log_slopes = []
        for map, part in reversed([*zip(self.maps, self._parts(y, h), strict=True)]):
            y, log_slope = map.inverse(y, part)
            log_slopes.append(log_slope)
        return y, sum(log_slopes[1:], log_slopes[0])

    def _parts(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        if h.shape[1] != (expected := self.outputs * x.shape[1]):
            raise ValueError(
                f"h: {self} takes {self.outputs} numbers for each element of x {tuple(x.shape)}, "
                f"{expected} on axis 1; got {tuple(h.shape)}"
            )
        return h.split([map.outputs * x.shape[1] for map in self.maps], 1)

    def __repr__(self) -> str:
        return f"Composed({', '.join(map(repr, self.maps))})"
