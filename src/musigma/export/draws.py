"""Random draws as inputs, and sizes of batches as symbols."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

__all__ = ["Draw", "Draws", "symbolic_sizes"]

LAWS = {
    "randn": "normal",
    "randn_like": "normal",
    "normal_": "normal",
    "rand": "uniform",
    "rand_like": "uniform",
    "uniform_": "uniform",
    "exponential_": "exponential",
}
"""Functions of torch that return noise of a law without parameters."""


class Draw(NamedTuple):
    """Noise that a model asked for.

    Attributes:
        law: `normal`, N(0, 1); `uniform`, on [0, 1); or `exponential`, of mean 1.
        noise: Its values.
        by: The distribution that asked for it.
    """

    law: str
    noise: Tensor
    by: str


class Draws(TorchFunctionMode):
    """While active, torch draws from given noise, in the order of the draws.

    Draws of Bernoulli and categorical variables, which torch makes of its random state, are made
    of uniform noise here.

    Args:
        given: The noise. None: torch draws it, and it is kept.

    Attributes:
        asked: The draws so far.

    Example:
        >>> with Draws() as first:
        ...     a = torch.randn(2), torch.rand(3)
        >>> with Draws([draw.noise for draw in first.asked]):
        ...     b = torch.randn(2), torch.rand(3)
        >>> [bool((s == t).all()) for s, t in zip(a, b)], [draw.law for draw in first.asked]
        ([True, True], ['normal', 'uniform'])
    """

    def __init__(self, given: Sequence[Tensor] | None = None):
        super().__init__()
        self.given, self.asked = given, list[Draw]()

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        """Replace functions that draw."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in LAWS and not _has_parameters(name, args, kwargs):
            return self._next(LAWS[name], lambda: func(*args, **kwargs))
        if name == "bernoulli":
            p = args[0]
            return (self._next("uniform", lambda: torch.rand_like(p)) < p).to(p.dtype)
        if name == "multinomial" and (args[1:2] or [kwargs.get("num_samples")])[0] == 1:
            p = args[0].cumsum(-1)
            u = self._next("uniform", lambda: torch.rand_like(p[..., :1]))
            return (p <= u * p[..., -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        return func(*args, **kwargs)

    def _next(self, law: str, draw: Any) -> Tensor:
        noise = draw() if self.given is None else self.given[builtins.len(self.asked)]
        self.asked.append(Draw(law, noise, _asking()))
        return noise


def _has_parameters(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an in-place draw is of another law than the usual one."""
    return name.endswith("_") and bool(args[1:] or kwargs)


def _asking() -> str:
    """The name of the outermost distribution that is drawing."""
    frame, name = sys._getframe(1), ""
    while frame is not None:
        drawing = frame.f_locals.get("self")
        name = type(drawing).__name__ if isinstance(drawing, Distribution) else name
        frame = frame.f_back
    return name


@contextlib.contextmanager
def symbolic_sizes(model: nn.Module) -> Iterator[None]:
    """Make ``len(t)`` of a tensor ``t.shape[0]`` in the code of a model and of this library.

    Python's `len` returns an integer, which would fix the size of the batch in what is traced.
    """
    owners = {type(module).__module__ for module in model.modules()}
    owners |= {name for name in sys.modules if name.partition(".")[0] == "musigma"}
    spaces = [vars(sys.modules[name]) for name in owners if name in sys.modules]
    spaces = [space for space in spaces if "len" not in space]
    for space in spaces:
        space["len"] = _size
    try:
        yield
    finally:
        for space in spaces:
            del space["len"]


def _size(of: Any) -> Any:
    return of.shape[0] if isinstance(of, Tensor) else builtins.len(of)
