r"""The trace that codes: what a model draws comes off a stack of bits, what it scores goes there.

While inferring, q pops and p pushes; while generating, p pops and q pushes. So the same lines of
a model that state log w also code x, with

.. math:: \text{bits} = -\log_2 w(x, z), \quad E[\text{bits}] = -\text{ELBO} / \ln 2

in all: the bits that z takes are paid, and those that chose it are got back (Townsend, Bird,
Barber, "Practical lossless compression with latent variables using bits back coding", 2019,
arXiv:1901.04866). Layers over layers go in the order of Kingma, Abbeel, Ho, "Bit-Swap", 2019,
arXiv:1905.06845, where the model allows it, and top-down ladders in that of Townsend et al.,
"HiLLoC", 2020, arXiv:1912.09953. Bijections have rules of their own: `musigma.coding.moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.coding.densities import Codable, codable
from musigma.coding.moves import move
from musigma.coding.rounding import Rounding
from musigma.coding.stack import Stack
from musigma.layers import Classifier, Dequantize, Split
from musigma.model import VAE, Bijection, Chain, Ladder, Model, Prior
from musigma.trace import Trace

__all__ = ["Coder", "Grids", "drawn_sites", "grids"]

NOISE = 12
"""The grid of the noise that makes levels real numbers."""
PLACES = 1 << 14
"""Parameters that one module may have: numbers that `Rounding` tells apart."""


@dataclass(frozen=True)
class Grids:
    """The grids on which a model's variables lie: values are k · 2^-g.

    Attributes:
        modules: All modules, which are known by their numbers.
        sites: g of each variable that p generates, by its site.
        drawn: g of what q draws at a site.
        layers: g below and above each bijection.
    """

    modules: Mapping[nn.Module, int]
    sites: dict[nn.Module, int]
    drawn: dict[nn.Module, int]
    layers: dict[nn.Module, tuple[int, int]]


def grids(model: Model, latents: Sequence[int]) -> Grids:
    """Where a model's variables lie, data on whole numbers.

    Args:
        model: Any that has a coding rule for every layer.
        latents: g of each latent of VAEs and ladders in it, the outermost first.

    Raises:
        ValueError: For a layer or a model without one, by its name.
    """
    numbers = {module: i for i, module in enumerate(model.modules())}
    found = Grids(numbers, {}, {}, {})
    left = iter(latents)
    _model_grids(model, 0, found, left)
    return found


def drawn_sites(model: Model) -> Iterator[nn.Module]:
    """The sites of the latents of the VAEs and ladders in a model, as `grids` takes them."""
    if isinstance(model, Chain):
        yield from drawn_sites(model.prior)
    elif isinstance(model, VAE):
        yield _drawn_site(model)
        yield from drawn_sites(model.prior)
    elif isinstance(model, Ladder):
        yield from model.blocks


def _drawn_site(model: VAE) -> nn.Module:
    return model.prior if isinstance(model.prior, Prior) else model


def _model_grids(model: Model, grid: int, found: Grids, latents: Iterator[int]) -> None:
    if isinstance(model, Prior):
        found.sites[model] = grid
    elif isinstance(model, Chain):
        for layer in model.layers:
            grid = _layer_grid(layer, grid, found)
        _model_grids(model.prior, grid, found, latents)
    elif isinstance(model, VAE):
        found.sites[model] = grid
        found.drawn[_drawn_site(model)] = inner = next(latents)
        _model_grids(model.prior, inner, found, latents)
    elif isinstance(model, Ladder):
        found.sites[model] = grid
        for block in model.blocks:
            found.sites[block] = found.drawn[block] = next(latents)
    else:
        raise ValueError(
            f"{type(model).__name__} has no coding rule; there are rules for Prior, Chain, VAE "
            "and Ladder: make it one of these"
        )


def _layer_grid(layer: nn.Module, grid: int, found: Grids) -> int:
    if isinstance(layer, Dequantize):
        found.drawn[layer] = NOISE
        return grid + NOISE
    if isinstance(layer, Split):
        found.sites[layer] = grid
    elif isinstance(layer, Bijection):
        rule, inner, inverted = move(layer)
        above = rule.grid_above(inner, grid)
        if inverted and above != grid:
            raise ValueError(f"Inverse({type(inner).__name__}) has no coding rule: it moves grids")
        found.layers[layer] = grid, above
        return above
    elif not isinstance(layer, Classifier):
        raise ValueError(
            f"{type(layer).__name__} has no coding rule; there are rules for bijections, "
            "Dequantize and Split"
        )
    return grid


class Coder(Trace):
    """One batch on its way onto a stack, or back.

    Args:
        stack: Of bits.
        grids: Of the model.
        rounding: Of this batch.
        n: How many examples it has.
        dtype: What the model computes in.
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
        """Push `value` while inferring, pop one otherwise."""
        code, grid = self._codable(site, dist, drawn=False)
        return self._pop(code, grid) if self.generating else self._push(code, grid, value)

    def q(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """Pop a value while inferring, push `value` otherwise."""
        code, grid = self._codable(site, dist, drawn=True)
        if self.generating:
            return self._push(code, grid, value)
        drawn = self._pop(code, grid)
        return drawn.double() if isinstance(site, Dequantize) else drawn  # a sum with x is exact

    def latent(self, site: nn.Module, q: Distribution, p: Distribution) -> Tensor:
        """Pop a value by q; what it costs by p is pushed at the end, by `close`."""
        value = self.q(site, q)
        self.later.append(lambda: self.p(site, p, value))
        return value

    def close(self) -> None:
        """Push what was left for later: the topmost latent last, as it is generated first."""
        while self.later:
            self.later.pop()()

    def bijection(self, layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The layer's rule, in the direction of this trace."""
        assert isinstance(layer, Bijection)
        rule, inner, inverted = move(layer)
        below, above = self.grids.layers[layer]

        def whole(values: Tensor, scale: float, which: int) -> np.ndarray:
            return self.rounding(values, scale, self.grids.modules[layer] * PLACES + which)

        working = rule(inner, self.stack, whole, (below, above), self._given, context)
        start, end = (above, below) if self.generating else (below, above)
        step = working.down if self.generating != inverted else working.up
        return self._tensor(step(_whole(x, start)), end)

    def bijections(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        context: Tensor | None,
        run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    ) -> Tensor:
        """One after the other."""
        for layer in layers:
            x = self.bijection(layer, x, context)
        return x

    def auxiliary(self, site: nn.Module, term: Tensor) -> None:
        """What is no part of log w costs no bits."""

    def _codable(self, site: nn.Module, dist: Distribution, *, drawn: bool) -> tuple[Codable, int]:
        grid = (self.grids.drawn if drawn else self.grids.sites)[site]
        base = self.grids.modules[site] * PLACES + 4 * drawn

        def whole(values: Tensor, scale: float, which: int) -> np.ndarray:
            return self.rounding(values, scale, base + which)

        return codable(dist, self.count, grid, whole, drawn=drawn), grid

    def _push(self, code: Codable, grid: int, value: Tensor | None) -> Tensor:
        assert value is not None
        code.push(self.stack, _whole(value, grid))
        return value

    def _pop(self, code: Codable, grid: int) -> Tensor:
        return self._tensor(code.pop(self.stack), grid)

    def _given(self, whole: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g as a network is given it: rounded, where the model's type is too short."""
        return torch.from_numpy(np.ldexp(whole.astype(np.float64), -grid)).to(self.dtype)

    def _tensor(self, whole: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g, exactly: in float64, where the model's type is too short for it.

        Raises:
            OverflowError: If that is too short, too.
        """
        if whole.size and np.abs(whole).max() >= 2**53:
            raise OverflowError("a value is further out than float64 holds exactly")
        real = torch.from_numpy(np.ldexp(whole.astype(np.float64), -grid))
        short = self._given(whole, grid)
        return short if bool((short == real).all()) else real


def _whole(value: Tensor, grid: int) -> np.ndarray:
    return np.ldexp(value.detach().double().contiguous().numpy(), grid).astype(np.int64)
