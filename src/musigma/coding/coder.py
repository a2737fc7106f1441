r"""The trace that codes: a draw pops bits off a stack, and a score pushes bits onto it.

While inferring, q pops and p pushes; while generating, p pops and q pushes. The same code of a
model that computes log w therefore codes x, at a cost of

.. math:: \text{bits} = -\log_2 w(x, z), \quad E[\text{bits}] = -\text{ELBO} / \ln 2

The bits of z are paid, and the bits that selected it are recovered (Townsend, Bird, Barber,
"Practical lossless compression with latent variables using bits back coding", 2019,
arXiv:1901.04866). Layers of latents are coded in the order of Kingma, Abbeel, Ho, "Bit-Swap",
2019, arXiv:1905.06845, where the model allows it, and top-down ladders in that of Townsend et al.,
"HiLLoC", 2020, arXiv:1912.09953.

Values are integers on grids, k · 2^-g. One pass of the model's own `infer`, on an example, finds
these grids: whatever it draws, scores and transforms is recorded in order, so no model and no
layer needs a description of its own. A value lies on the grid of what it was computed from (the
finest, if there are several); this is checked whenever a value is coded. A pass of `generate` then
checks that it undoes those steps in reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from musigma.coding.densities import Quantizer, grid_of, law_of
from musigma.coding.errors import CodingError
from musigma.coding.numerics import Rounding
from musigma.coding.rules import rule_of
from musigma.coding.stack import Stack
from musigma.model import Inverse, Model
from musigma.trace import Trace

__all__ = ["Coder", "Grids", "find_grids", "latent_grids"]

PLACES = 1 << 14
"""Numbers of parameters that one module may have: `Rounding` tells them apart."""
FINEST = 20
"""Draws are on no finer grid than 2^-20."""
FINE = 12
"""Draws that other rules transform or score are on a grid of 2^-12, or of the finest value so far:
if they are joined with values on a finer grid, each lacking digit costs a bit."""
COARSE = 2
"""Draws that are paired with their prior are on a grid of 2^-2 or finer."""


@dataclass(frozen=True)
class Grids:
    """The grids on which the variables of a model lie: values are k · 2^-g."""

    modules: Mapping[nn.Module, int]  # their numbers, by which files identify them
    scored: dict[nn.Module, int] = field(default_factory=dict)  # g of what p scores, by its site
    drawn: dict[nn.Module, int] = field(default_factory=dict)  # g of what q draws, by its site
    layers: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # g below and above
    latents: list[int] = field(default_factory=list)  # g of draws of real numbers, in order


def layer_rule(layer: Any) -> tuple[Any, Any, bool]:
    """The rule of a bijection, the layer that it is applied to, and whether it runs backwards."""
    inverted = False
    while type(layer) is Inverse:
        layer, inverted = layer.bijection, not inverted
    return rule_of(layer), layer, inverted


class Coder(Trace):
    """A trace that moves one batch onto a stack, or off it.

    Args:
        stack: The bits.
        grids: The grids of the model.
        rounding: The rounding of this batch, which tells the direction: that of an encoder puts
            the batch onto the stack.
        n: Number of examples.
        dtype: Type that the model computes in.
    """

    def __init__(
        self, stack: Stack, grids: Grids, rounding: Rounding, *, n: int, dtype: torch.dtype
    ):
        super().__init__(generating=not rounding.encoding, n=n)
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
        grid = self.grids.layers[layer]
        working = rule(inner, self.stack, self._integers(layer), grid, self._rounded, context)
        start, end = reversed(grid) if self.generating else grid
        step = working.down if self.generating != inverted else working.up
        return self._tensor(step(_integers_of(x, start, layer)), end)

    def bijections(self, layers: Sequence[nn.Module], x: Tensor, context: Any, run: Any) -> Tensor:
        """One layer after the other."""
        for layer in layers:
            x = self.bijection(layer, x, context)
        return x

    def auxiliary(self, site: nn.Module, term: Tensor) -> None:
        """An auxiliary loss is not part of log w, and costs no bits."""

    def _integers(
        self, module: nn.Module, first: int = 0
    ) -> Callable[[Tensor, float, int], np.ndarray]:
        base = self.grids.modules[module] * PLACES + first
        return lambda values, scale, which: self.rounding(values, scale, base + which)

    def _rounded(self, integers: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g as networks take it: rounded, if the type of the model is too short."""
        return torch.from_numpy(np.ldexp(integers.astype(np.float64), -grid)).to(self.dtype)

    def _tensor(self, integers: np.ndarray, grid: int) -> Tensor:
        """k · 2^-g, exactly: in float64, if the type of the model is too short."""
        if integers.size and np.abs(integers).max() >= 2**53:
            raise OverflowError("a value is larger than float64 holds exactly")
        real = torch.from_numpy(np.ldexp(integers.astype(np.float64), -grid))
        short = self._rounded(integers, grid)
        return short if bool((short == real).all()) else real


def _integers_of(value: Tensor, grid: int, module: nn.Module) -> np.ndarray:
    """The integers k of values k · 2^-g."""
    scaled = np.ldexp(value.detach().double().contiguous().numpy(), grid)
    integers = scaled.astype(np.int64)
    if not (integers == scaled).all():
        raise ValueError(
            f"{type(module).__name__} cannot be coded: it is given values that are not multiples "
            f"of 2^-{grid}. Between draws, scores and bijections a model may only rearrange, add "
            "and subtract values; what computes with them must be a Bijection with a coding rule"
        )
    return integers


# --- the grids of a model ----------------------------------------------------------------------


@torch.no_grad()
def find_grids(model: Model, x: Tensor, context: Any, latents: Sequence[int]) -> Grids:
    """The grids of a model, for some data (N, *event) and given grids of its `latent_grids`.

    Raises:
        ValueError: For a layer, a map or a distribution without a coding rule, by its name; for a
            model whose directions do not mirror each other; or for another number of latents.
    """
    left = iter(latents)
    planner = _Planner(model, x, context, lambda dist, least: next(left, 0))
    planner.generate(model, context)
    count = len(planner.grids.latents)
    if count != len(latents):
        raise ValueError(f"latents: expected {count} grids; got {len(latents)}")
    return planner.grids


@torch.no_grad()
def latent_grids(model: Model, x: Tensor, context: Any = None) -> list[int]:
    """A grid for each draw of real numbers: about a quarter of its standard deviation.

    Raises:
        CodingError: If a posterior is not finite.
    """
    return _Planner(model, model.floating(x), context, _from_deviation).grids.latents


def _from_deviation(dist: Distribution, least: int) -> int:
    log_std = dist.stddev.flatten().double().log()[:100_000]
    narrow = torch.quantile(log_std, 0.01).item()
    if not math.isfinite(narrow):
        raise CodingError(
            "the model's posterior is not finite for these data; evaluate the model on them"
        )
    return max(least, min(FINEST, math.ceil(2 - narrow / math.log(2))))


class _Planner(Coder):
    """Passes real numbers through a model, and records their grids.

    ``choose(dist, least)`` is the grid of a draw of real numbers.
    """

    def __init__(
        self, model: Model, x: Tensor, context: Any, choose: Callable[[Distribution, int], int]
    ):
        grids = Grids({module: i for i, module in enumerate(model.modules())})
        stack: Any = None
        super().__init__(stack, grids, Rounding(), n=len(x), dtype=torch.float64)
        self.choose, self.paired, self.finest = choose, False, FINE
        self.steps: list[tuple[str, nn.Module, Tensor]] = []
        with torch.random.fork_rng(devices=[]), _Inheritance():
            model.infer(_put(x, 0), self, context)
            self.close()

    def generate(self, model: Model, context: Any) -> None:
        """Latents to data, with the recorded values; refuses others, and a wrong order."""
        self.generating, self.name = True, type(model).__name__
        model.generate(self, context)
        if self.steps:
            self._refuse(*self.steps[-1][:2], "is missing")

    def latent(self, site: nn.Module, q: Distribution, p: Distribution) -> Tensor:
        """A draw that is scored on its own grid, by p."""
        self.paired = True
        value = super().latent(site, q, p)
        self.paired = False
        return value

    def code(
        self, site: nn.Module, dist: Distribution, value: Tensor | None, *, drawn: bool
    ) -> Tensor:
        """Record the grid of a draw, or of a value."""
        step = "q" if drawn else "p"
        if self.generating:
            return self._undone(step, site)
        rule_of(dist)
        grid = grid_of(dist)
        if drawn:
            value = dist.sample(() if dist.batch_shape else (self.count,))
            if grid is None:
                grid = self.choose(dist, COARSE if self.paired else self.finest)
                self.grids.latents.append(grid)
            value = _put(value, grid)
        elif value is None:
            raise ValueError(f"value: {type(site).__name__} must give p a value while inferring")
        elif grid is None:
            grid = self._grid(value, site)
        table = self.grids.drawn if drawn else self.grids.scored
        table[self._known(site)] = grid
        self.steps.append((step, site, value))
        return value

    def bijection(self, layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Record the grids on both sides of a layer."""
        if self.generating:
            return self._undone("bijection", layer)
        rule, inner, inverted = layer_rule(layer)
        below = self._grid(x, layer)
        above = rule.grid_above(inner, below)
        if inverted and above != below:
            raise ValueError(
                f"Inverse({type(inner).__name__}) has no coding rule: it changes grids"
            )
        self.grids.layers[self._known(layer)] = below, above
        self.finest = max(self.finest, min(above, FINEST))
        self.steps.append(("bijection", layer, x))
        return _put(layer(x, context)[0], above)

    def _known(self, module: nn.Module) -> nn.Module:
        if module not in self.grids.modules:
            raise ValueError(
                f"{type(module).__name__} cannot be coded: it is not a submodule of the model"
            )
        return module

    def _grid(self, value: Tensor, module: nn.Module) -> int:
        grid = getattr(value, "_grid", None)
        if grid is None:
            raise ValueError(
                f"{type(module).__name__} cannot be coded: it is given a value that was computed "
                "neither from the data nor from draws"
            )
        return grid

    def _undone(self, step: str, module: nn.Module) -> Tensor:
        if not self.steps or self.steps[-1][:2] != (step, module):
            self._refuse(step, module, "is out of turn")
        return self.steps.pop()[2]

    def _refuse(self, step: str, module: nn.Module, problem: str) -> None:
        raise ValueError(
            f"{self.name} cannot be coded: in `generate`, the term {step} of "
            f"{type(module).__name__} {problem}; it must report the terms of `infer` in the "
            "reverse order (musigma.testing.check_model)"
        )


class _Inheritance(TorchFunctionMode):
    """Results lie on the finest grid of their operands."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run an operation and pass the grid on."""
        result = func(*args, **(kwargs or {}))
        grids = [t._grid for t in tree_leaves((args, kwargs)) if hasattr(t, "_grid")]
        changed = args[0] if func is Tensor.__setitem__ else result
        for out in tree_leaves(changed) if grids else ():
            if isinstance(out, Tensor):
                _put(out, max(grids))
        return result


def _put(value: Tensor, grid: int) -> Tensor:
    value._grid = grid  # pyright: ignore[reportAttributeAccessIssue]
    return value
