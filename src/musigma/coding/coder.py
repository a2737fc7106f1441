r"""The trace that codes: a draw pops bits off a stack, and a score pushes bits onto it.

While inferring, q pops and p pushes; while generating, p pops and q pushes. The same lines of a
model that state log w therefore code x, at a cost of

.. math:: \text{bits} = -\log_2 w(x, z), \quad E[\text{bits}] = -\text{ELBO} / \ln 2

The bits of z are paid, and the bits that selected it are recovered (Townsend, Bird, Barber,
"Practical lossless compression with latent variables using bits back coding", 2019,
arXiv:1901.04866). Layers of latents are coded in the order of Kingma, Abbeel, Ho, "Bit-Swap",
2019, arXiv:1905.06845, where the model allows it, and top-down ladders in that of Townsend et al.,
"HiLLoC", 2020, arXiv:1912.09953.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.coding.densities import Quantizer, grid_of, law_of
from musigma.coding.registry import rule_of
from musigma.coding.rounding import Rounding
from musigma.coding.stack import Stack
from musigma.model import Inverse
from musigma.trace import Trace

__all__ = ["Coder", "Grids"]

PLACES = 1 << 14
"""Numbers of parameters that one module may have: `Rounding` tells them apart."""


@dataclass(frozen=True)
class Grids:
    """The grids on which the variables of a model lie: values are k · 2^-g.

    Attributes:
        modules: The number of each module of the model, by which it is identified in files.
        scored: g of each variable that p scores, by its site.
        drawn: g of each variable that q draws, by its site.
        layers: g below and above each bijection.
        latents: g of the draws whose grid was chosen from their standard deviation, in order.
    """

    modules: Mapping[nn.Module, int]
    scored: dict[nn.Module, int] = field(default_factory=dict)
    drawn: dict[nn.Module, int] = field(default_factory=dict)
    layers: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    latents: list[int] = field(default_factory=list)


def layer_rule(layer: Any) -> tuple[Any, Any, bool]:
    """The rule of a bijection, the layer that it is applied to, and whether it runs backwards.

    Raises:
        ValueError: If it has none, by its name.
    """
    inverted = False
    while type(layer) is Inverse:
        layer, inverted = layer.bijection, not inverted
    return rule_of(layer), layer, inverted


class Coder(Trace):
    """One batch on its way onto a stack, or off it.

    Args:
        stack: The bits.
        grids: The grids of the model.
        rounding: The rounding of this batch.
        n: Number of examples.
        dtype: Type that the model computes in.
        generating: The direction: off the stack if true, onto it otherwise.
    """

    def __init__(
        self,
        stack: Stack,
        grids: Grids,
        rounding: Rounding,
        *,
        n: int,
        dtype: torch.dtype,
        generating: bool,
    ):
        super().__init__(generating=generating, n=n)
        self.stack, self.grids, self.rounding, self.dtype = stack, grids, rounding, dtype
        self.count = n
        self.later: list[Callable[[], object]] = []

    def p(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """Push `value` while inferring, pop one while generating."""
        return self.code(site, dist, None if self.generating else value, drawn=False)

    def q(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """Pop a value while inferring, push `value` while generating."""
        return self.code(site, dist, value if self.generating else None, drawn=True)

    def latent(self, site: nn.Module, q: Distribution, p: Distribution) -> Tensor:
        """Pop a value by q; `close` pushes it by p."""
        value = self.q(site, q)
        self.later.append(lambda: self.p(site, p, value))
        return value

    def close(self) -> None:
        """Push the paired latents: the topmost last, because it is generated first."""
        while self.later:
            self.later.pop()()

    def code(
        self, site: nn.Module, dist: Distribution, value: Tensor | None, *, drawn: bool
    ) -> Tensor:
        """Push `value`, or pop one if it is None."""
        grid = (self.grids.drawn if drawn else self.grids.scored)[site]
        integers = self._integers(site, 4 * drawn)
        law = law_of(dist, Quantizer(integers, grid, self.count, drawn))
        if value is not None:
            law.push(self.stack, _integers_of(value, grid, site))
            return value
        real = self._tensor(law.pop(self.stack), grid)
        return real.double() if drawn and grid_of(dist) else real  # a sum with x is exact

    def bijection(self, layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The rule of the layer, in the direction of this trace."""
        rule, inner, inverted = layer_rule(layer)
        below, above = self.grids.layers[layer]
        integers, grid = self._integers(layer), (below, above)
        working = rule(inner, self.stack, integers, grid, self._rounded, context)
        start, end = (above, below) if self.generating else (below, above)
        step = working.down if self.generating != inverted else working.up
        return self._tensor(step(_integers_of(x, start, layer)), end)

    def bijections(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        context: Tensor | None,
        run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    ) -> Tensor:
        """One layer after the other."""
        for layer in layers:
            x = self.bijection(layer, x, context)
        return x

    def auxiliary(self, site: nn.Module, term: Tensor) -> None:
        """An auxiliary loss is no part of log w and costs no bits."""

    def _integers(
        self, module: nn.Module, first: int = 0
    ) -> Callable[[Tensor, float, int], np.ndarray]:
        base = self.grids.modules[module] * PLACES + first
        return lambda values, scale, which: self.rounding(values, scale, base + which)

    def _rounded(self, integers: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g as networks take it: rounded, if the type of the model is too short."""
        return torch.from_numpy(np.ldexp(integers.astype(np.float64), -grid)).to(self.dtype)

    def _tensor(self, integers: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g, exactly: in float64, if the type of the model is too short.

        Raises:
            OverflowError: If float64 is too short, too.
        """
        if integers.size and np.abs(integers).max() >= 2**53:
            raise OverflowError("a value is larger than float64 holds exactly")
        real = torch.from_numpy(np.ldexp(integers.astype(np.float64), -grid))
        short = self._rounded(integers, grid)
        return short if bool((short == real).all()) else real


def _integers_of(value: Tensor, grid: int, module: nn.Module) -> np.ndarray:
    """The integers k of values k · 2^-g.

    Raises:
        ValueError: If a value does not lie on the grid.
    """
    scaled = np.ldexp(value.detach().double().contiguous().numpy(), grid)
    integers = scaled.astype(np.int64)
    if not (integers == scaled).all():
        raise ValueError(
            f"{type(module).__name__} cannot be coded: it is given values that are not multiples "
            f"of 2^-{grid}. Between draws, scores and bijections a model may only rearrange, add "
            "and subtract values; what computes with them must be a Bijection with a coding rule"
        )
    return integers
