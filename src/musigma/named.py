"""Registries of functions that a text chooses, such as ``"set width=128 blocks=2"``."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

__all__ = ["REGISTRIES", "Choice", "Registry", "is_built_in"]

F = TypeVar("F", bound=Callable[..., Any])


class Choice(NamedTuple):
    """A function of a registry with the options that a text gives it."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, *args: Any) -> Any:
        """Call the function with the options."""
        return self.function(*args, **self.options)


class Registry(dict[str, Callable[..., Any]]):
    """Functions by name, whose keyword-only parameters are their options.

    The functions of the library cannot be replaced. Everything that is registered can be named on
    the command line and in Python by the same text.

    Args:
        option: The option of models, training or the command line that chooses from it; error
            messages begin with it.
        form: The positional parameters of its functions, for example ``"variables"``.
        others: What the option takes beyond these functions, for messages.

    Example:
        >>> shapes = Registry("shape", "size")
        >>> @shapes.register
        ... def box(size, *, sides=4):
        ...     return size * sides
        >>> shapes.choice("box sides=3")(2)
        6
        >>> del REGISTRIES["shape"]
    """

    def __init__(self, option: str, form: str, others: str = ""):
        super().__init__()
        self.option, self.form, self.others = option, form, others
        REGISTRIES[option] = self

    def register(self, function: F, name: str | None = None) -> F:
        """Register a function under its name, or another one.

        Raises:
            TypeError: If a parameter beyond the positional ones is not keyword-only with a
                default.
            ValueError: If the library has a function of this name.
        """
        name, positional = name or function.__name__, len(self.form.split(", "))
        options = [*inspect.signature(function).parameters.values()][positional:]
        if any(p.kind is not p.KEYWORD_ONLY or p.default is p.empty for p in options):
            raise TypeError(
                f"{self.option}: {name} must have the form ({self.form}, *, option=default, ...), "
                f"with keyword-only options; got {inspect.signature(function)}"
            )
        known = self.get(name)
        if known is not None and is_built_in(known) and not is_built_in(function):
            raise ValueError(f"{self.option}: the library has a {name!r} already; rename this one")
        self[name] = function
        return function

    def choice(self, text: str) -> Choice:
        """The function that a text names, and its options.

        Args:
            text: A name, and options: ``"set width=128 blocks=2"``. Hyphens and underscores in
                names are the same.

        Raises:
            ValueError: If there is no such function or option, or an option is of another type
                than its default. Integers that are positive by default must be positive.
        """
        name, *words = text.split() or [""]
        found = next((n for n in self if n.replace("-", "_") == name.replace("-", "_")), None)
        if found is None:
            names = [n.replace("_", "-") for n in self]
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join([*names, *filter(None, [self.others])])
            raise ValueError(
                f"{self.option}: there is no {name!r}; {hint}known are {known} (if a file "
                f"defines it, give it: --plugin FILE.py:{name or 'NAME'})"
            )
        defaults, chosen, wrong = self.defaults(found), {}, []
        for word in words:
            key, sign, value = word.partition("=")
            chosen[key] = _plain(value)
            if not sign or key not in defaults or not _alike(chosen[key], defaults[key]):
                wrong.append(repr(word))
        if wrong:
            takes = " ".join(f"{key}={value}" for key, value in defaults.items()) or "no options"
            raise ValueError(f"{self.option}: {found} takes {takes}; got {', '.join(wrong)}")
        return Choice(found, self[found], chosen)

    def defaults(self, name: str) -> dict[str, Any]:
        """The options of a function, with their defaults."""
        parameters = inspect.signature(self[name]).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


REGISTRIES: dict[str, Registry] = {}
"""All registries, by the option that chooses from each."""


def is_built_in(function: Callable[..., Any]) -> bool:
    """Whether a function belongs to the library."""
    return function.__module__.startswith("musigma.")


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default, and is positive if it is a positive integer."""
    if type(default) is int:
        return type(value) is int and value >= min(default, 1)
    like = (int, float) if type(default) is float else type(default)
    return default is None or isinstance(value, like)
