"""Loading of objects named as FILE.py:NAME or module:NAME, which executes the file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from musigma.named import REGISTRIES, Registry
from musigma.nets import EMBEDDINGS
from musigma.objectives import OBJECTIVES
from musigma.zoo import ARCHITECTURES, architecture

__all__ = ["PluginError", "load", "load_all", "register", "register_all"]


class PluginError(ValueError):
    """A file, module or name does not exist, or executing the file fails."""


def load(target: str, *, argument: str = "plugin") -> Any:
    """Load the object that ``FILE.py:NAME`` or ``module:NAME`` refers to.

    Args:
        target: NAME may be dotted. Modules are also looked up in the working directory; a file
            may import modules from its own folder.
        argument: What error messages call the target.

    Raises:
        PluginError: If the file, the module or the name does not exist, or the file fails.
    """
    return load_all({argument: target})[argument]


def load_all(targets: Mapping[str, str]) -> dict[str, Any]:
    """Load several objects as `load` does; a file that several of them name is executed once.

    Args:
        targets: What each refers to, by what error messages call it.

    Raises:
        PluginError: As `load`.
    """
    modules: dict[str, ModuleType] = {}
    return {argument: _load(target, argument, modules) for argument, target in targets.items()}


def _load(target: str, argument: str, modules: dict[str, ModuleType]) -> Any:
    """One object; `modules` holds those that are loaded, by their places."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise PluginError(f"{argument}: expected FILE.py:NAME or module:NAME; got {target!r}")
    if place.endswith(".py") and not Path(place).is_file():
        raise PluginError(
            f"{argument}: expected FILE.py:NAME of a file that exists; there is no {place}"
        )
    key = str(Path(place).resolve())
    if key not in modules:
        try:
            modules[key] = _imported(place)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"{argument}: {place} fails: {reason}") from error
    value: Any = modules[key]
    for part in name.split("."):
        if not hasattr(value, part):
            known = [
                n
                for n, v in vars(modules[key]).items()
                if n[0] != "_" and getattr(v, "__module__", None) == modules[key].__name__
            ]
            raise PluginError(
                f"{argument}: {place} defines no {name!r}; it has "
                f"{', '.join(known[:12]) or 'no functions or classes'}"
            )
        value = getattr(value, part)
    return value


def register(target: str, registry: Registry | None = None) -> str:
    """Register what FILE.py:NAME refers to, and return its name.

    Args:
        target: A function that executing the file registers, or one that is registered now.
        registry: Where it belongs. By default it is an embedding if its first parameter is called
            `variables`, and otherwise an architecture.

    Raises:
        PluginError: As `load`, or if NAME is an architecture already or not a function.
    """
    place, _, name = target.rpartition(":")
    key, known = (
        (str(Path(place).resolve()), name),
        [ARCHITECTURES, OBJECTIVES, *REGISTRIES.values()],
    )
    names = (name, name.replace("_", "-"))
    if key in _REGISTERED and any(n in functions for n in names for functions in known):
        return name  # this process has executed the file already
    value: Any = load(target)
    if not callable(value):
        raise PluginError(f"plugin: expected a function; {name!r} of {place} is {value!r}")
    if not any(functions.get(n) == value for n in names for functions in known):
        if registry is None and next(iter(inspect.signature(value).parameters), "") == "variables":
            registry = EMBEDDINGS
        if registry is not None:
            registry.register(value)
        elif name in ARCHITECTURES:
            raise PluginError(f"plugin: the zoo has a {name!r} already; rename the function")
        else:
            architecture(value)  # pyright: ignore[reportArgumentType]
    _REGISTERED.add(key)
    return name


def register_all(text: str, registry: Registry) -> str:
    """Register every FILE.py:NAME of a text such as ``"NAME option=FILE.py:NAME"``.

    Returns:
        The text with NAME in their places: a name of `registry`, or, as the value of an option, of
        the registry that the option chooses from.

    Raises:
        PluginError: As `register`.
    """
    words = []
    for word in text.split():
        option, sign, value = word.rpartition("=")
        if ".py:" in value:
            value = register(value, REGISTRIES.get(option, registry))
        words.append(f"{option}{sign}{value}")
    return " ".join(words)


_REGISTERED: set[tuple[str, str]] = set()
"""Files, with the names in them, that this process has registered."""


def _imported(place: str) -> ModuleType:
    """A module by its name, or a file, executed as a module of its own."""
    path = Path(place).resolve()
    folder = str(path.parent) if path.suffix == ".py" else ""
    sys.path.insert(0, folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        name = f"musigma_plugin_{path.stem}"
        spec: Any = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look classes up by their module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(folder)
