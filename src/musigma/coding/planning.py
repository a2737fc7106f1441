"""Finds the grids of a model, and refuses a model that cannot code, by one pass each way.

The pass is the model's own `infer`, on an example: whatever it draws, scores and transforms is met
in its order, so no model and no layer needs a description of its own. A value lies on the grid of
what it was computed from (the finest, of several); that this is true is checked whenever a value
is coded. A pass of `generate` then tells whether it undoes those steps in reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from musigma.coding.coder import Coder, Grids, layer_rule
from musigma.coding.densities import grid_of
from musigma.coding.errors import CodingError
from musigma.coding.registry import rule_of
from musigma.model import Model

__all__ = ["find_grids", "latent_grids"]

FINEST = 20
"""Draws are on no finer grid than 2^-20."""
FINE = 12
"""Draws that other rules transform or score are on a grid of 2^-12, or of the finest value so far:
if they are joined with values on a finer grid, each lacking digit costs a bit."""
COARSE = 2
"""Draws that are paired with their prior are on a grid of 2^-2 or finer."""


@torch.no_grad()
def find_grids(model: Model, x: Tensor, context: Any, latents: Sequence[int]) -> Grids:
    """The grids of a model whose latents are on given ones.

    Args:
        model: The model.
        x: Integer data, shape (N, *event).
        context: One row for each, or None.
        latents: g of each draw from a distribution of real numbers, in the order of inference.

    Raises:
        ValueError: For a layer, a map or a distribution without a coding rule, by its name; for a
            model whose directions do not mirror each other; or for another number of latents.
    """
    left = iter(latents)
    planner = _Planner(model, len(x), lambda dist, least: next(left, 0))
    with planner.at_work():
        planner.infer(model, x, context)
        planner.generate(model, context)
    count = len(planner.grids.latents)
    if count != len(latents):
        raise ValueError(f"latents: expected {count} grids; got {len(latents)}")
    return planner.grids


@torch.no_grad()
def latent_grids(model: Model, x: Tensor, context: Any = None) -> list[int]:
    """A grid for each latent: about a quarter of its posterior's standard deviation.

    Args:
        model: The model.
        x: Some data.
        context: One row for each, or None.

    Returns:
        What `find_grids` takes as `latents`.

    Raises:
        CodingError: If a posterior is not finite.
    """
    planner = _Planner(model, len(x), _from_deviation)
    with planner.at_work():
        planner.infer(model, model.floating(x), context)
    return planner.grids.latents


def _from_deviation(dist: Distribution, least: int) -> int:
    log_std = dist.stddev.flatten().double().log()[:100_000]
    narrow = torch.quantile(log_std, 0.01).item()
    if not math.isfinite(narrow):
        raise CodingError(
            "the model's posterior is not finite for these data; evaluate the model on them"
        )
    return max(least, min(FINEST, math.ceil(2 - narrow / math.log(2))))


class _Planner(Coder):
    """Passes real numbers through a model, and writes down where they lie.

    Args:
        model: The model.
        n: Number of examples.
        choose: ``choose(dist, least)``: the grid of a draw of real numbers.
    """

    def __init__(self, model: Model, n: int, choose: Callable[[Distribution, int], int]):
        modules = {module: i for i, module in enumerate(model.modules())}
        stub: Any = None
        super().__init__(stub, Grids(modules), stub, n=n, dtype=torch.float64, generating=False)
        self.choose, self.paired, self.finest = choose, False, FINE
        self.steps: list[tuple[str, nn.Module, Tensor]] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Draws leave the global random state alone; results inherit their operands' grids."""
        with torch.random.fork_rng(devices=[]), _Inheritance():
            yield

    def infer(self, model: Model, x: Tensor, context: Any) -> None:
        """Data to latents."""
        model.infer(_put(x, 0), self, context)
        self.close()

    def generate(self, model: Model, context: Any) -> None:
        """Latents to data, with the values that were met; refuses what was not, or out of turn."""
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
        """Write down the grid of a draw, or of a value."""
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
        """Write down the grids on both sides of a layer."""
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
                f"{type(module).__name__} cannot be coded: it is no submodule of the model"
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
            f"{type(module).__name__} {problem}; it must state the terms of `infer` in the "
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
