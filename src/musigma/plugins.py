"""Objects that users name as FILE.py:NAME or module:NAME. Loading one executes the file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from musigma.zoo import ARCHITECTURES, architecture

__all__ = ["PluginError", "load", "register_architecture"]


class PluginError(ValueError):
    """There is no such file, module or name, or the file fails."""


def load(target: str, *, argument: str = "plugin") -> Any:
    """The object that ``FILE.py:NAME`` or ``module:NAME`` stands for.

    Args:
        target: NAME may be dotted. Modules are looked up in the working directory as well; a file
            may import what lies beside it.
        argument: What error messages call the target.

    Raises:
        PluginError: If the file, the module or the name does not exist, or the file fails.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise PluginError(f"{argument}: expected FILE.py:NAME or module:NAME; got {target!r}")
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise PluginError(
            f"{argument}: expected FILE.py:NAME of a file that exists; there is no {place}"
        )
    try:
        module = _run(path.resolve()) if path.suffix == ".py" else _import(place)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{argument}: {place} fails: {reason}") from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [n for n, v in vars(module).items() if n[0] != "_" and _defined_in(v, module)]
            raise PluginError(
                f"{argument}: {place} defines no {name!r}; it has "
                f"{', '.join(known[:12]) or 'no functions or classes'}"
            )
        value = getattr(value, part)
    return value


def register_architecture(target: str) -> str:
    """Make the builder that FILE.py:NAME stands for an architecture; returns its name.

    Raises:
        PluginError: As `load`, or if NAME is an architecture already or not a builder.
    """
    place, _, name = target.rpartition(":")
    if name in ARCHITECTURES and _source(ARCHITECTURES[name]) == str(Path(place).resolve()):
        return name  # this process has executed the file already
    builder: Any = load(target)
    if not callable(builder):
        raise PluginError(f"plugin: expected a function; {name!r} of {place} is {builder!r}")
    if ARCHITECTURES.get(name) is not builder:  # @musigma.architecture registers it by itself
        if name in ARCHITECTURES:
            raise PluginError(f"plugin: the zoo has a {name!r} already; rename the function")
        architecture(builder)  # pyright: ignore[reportArgumentType]
    return name


def _import(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove("")


def _run(path: Path) -> ModuleType:
    name = f"musigma_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look classes up by their module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _defined_in(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _source(function: Any) -> str:
    return inspect.unwrap(function).__code__.co_filename
