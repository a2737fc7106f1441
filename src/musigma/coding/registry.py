"""Coding rules by type: of a layer, of a map, of a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["register", "rule_of"]

R = TypeVar("R", bound=Callable[..., Any])
_RULES: dict[type, Any] = {}


def register(kind: type) -> Callable[[R], R]:
    """Register how objects of a type are coded; a decorator of the rule.

    A rule may stand in any file. There are three kinds:

    - The rule of a `Bijection` is a subclass of `Rule`, which maps integers to integers exactly.
    - The rule of a map (the ``map`` of a `Coupling`, an `Autoregressive` or an `Elementwise`) is
      a subclass of `MapRule`. `Intervals` serves every increasing map.
    - The rule of a distribution is a function ``rule(dist, quantizer)`` that returns a
      `musigma.coding.laws.Law`; a `Quantizer` turns parameters into integers.

    Models, and layers that draw and score (dequantization, splits), need no rule: what they draw,
    score and transform is coded by the rules above.

    A subclass shares the rule of its base class if it redefines nothing but `__init__`. Otherwise
    it needs a rule of its own.

    Args:
        kind: The type. A rule that it already has is replaced.

    Example:
        >>> import torch
        >>> from musigma import coding
        >>> from musigma.model import Bijection
        >>> class Flip(Bijection):
        ...     def forward(self, x, context=None):
        ...         return -x, x.new_zeros(len(x))
        ...     inverse = forward
        >>> @coding.register(Flip)
        ... class FlipRule(coding.Rule):
        ...     def up(self, x):
        ...         return -x
        ...     down = up
    """

    def decorate(rule: R) -> R:
        _RULES[kind] = rule
        return rule

    return decorate


def rule_of(subject: object) -> Any:
    """The rule of an object, by its type.

    Raises:
        ValueError: If there is none, by the name of the type.
    """
    kind = type(subject)
    base, reason = next((base for base in kind.__mro__ if base in _RULES), None), ""
    if base is not None:
        redefined = _redefined(kind, base)
        if not redefined:
            return _RULES[base]
        reason = f": it redefines {', '.join(redefined)} of {base.__name__}"
    raise ValueError(
        f"{kind.__name__} has no coding rule{reason}; register one with "
        f"@musigma.coding.register({kind.__name__}), or replace it in the model"
    )


def _redefined(kind: type, base: type) -> list[str]:
    """Attributes of a base class that classes between it and a subclass define anew."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    names = {name for cls in between for name in vars(cls) if hasattr(base, name)}
    harmless = {"extra_repr", "_abc_impl", "_is_protocol"}  # of which Python sets two itself
    return sorted(
        name for name in names - harmless if name == "__call__" or not name.startswith("__")
    )
