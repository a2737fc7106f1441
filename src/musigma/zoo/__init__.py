"""Architectures by name: functions from a data shape to a model.

A builder's keyword-only parameters are its configuration, its command-line options and its
documentation; what it was called with is kept on ``model.config``, which is all that a checkpoint
needs to build it again.

    >>> model = build("realnvp", (2,), bits=None, depth=2)
    >>> model.config["options"]["depth"]
    2
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from musigma.model import Model

__all__ = ["ARCHITECTURES", "architecture", "build"]

ARCHITECTURES: dict[str, Callable[..., Model]] = {}
"""Every known builder by its name."""

M = TypeVar("M", bound=Model)


def architecture(builder: Callable[..., M]) -> Callable[..., M]:
    """Make ``builder(shape, *, bits, ...)`` known by its name, and record what it is called with.

    Args:
        builder: Its first parameter is the event shape; all others are keyword-only and take plain
            JSON values. `bits` is filled in from the data: the bits of each element, or None for
            continuous data.

    Raises:
        TypeError: If the signature is another.
    """
    signature = inspect.signature(builder)
    first, *others = signature.parameters.values()
    if any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in others):
        raise TypeError(
            f"builder: {builder.__name__} must have the form (shape, *, option=default, ...), "
            f"with keyword-only options; got {signature}"
        )

    @functools.wraps(builder)
    def build(shape: Sequence[int], **options: Any) -> M:
        for name, value in options.items():
            if name not in signature.parameters or name == first.name:
                near = difflib.get_close_matches(name, [p.name for p in others], 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}: {builder.__name__} has no such option{hint}")
            if not _plain(value):
                raise ValueError(f"{name}: expected a number, a string or a list; got {value!r}")
        bound = signature.bind(tuple(shape), **options)
        bound.apply_defaults()
        model = builder(**bound.arguments)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        chosen = {p.name: bound.arguments[p.name] for p in others}
        model.config = {
            "architecture": builder.__name__,
            "shape": list(shape),
            "options": chosen,
        }
        return model

    own = [b.__name__ for b in ARCHITECTURES.values() if b.__module__.startswith(__name__)]
    if builder.__name__ in own and not builder.__module__.startswith(__name__):
        raise ValueError(f"builder: the zoo has a {builder.__name__!r} already; rename this one")
    ARCHITECTURES[builder.__name__] = build
    return build


def build(name: str, shape: Sequence[int], **options: Any) -> Model:
    """The model of an architecture for data of a shape.

    Args:
        name: A key of `ARCHITECTURES`.
        shape: Event shape: (C, H, W), or (D,).
        **options: The builder's own; anything left out has the builder's default.

    Raises:
        ValueError: For an unknown architecture or option, naming the nearest one, or a shape that
            the architecture cannot model.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"architecture: {hint}known are {', '.join(sorted(ARCHITECTURES))}; got {name!r}"
        )
    return ARCHITECTURES[name](shape, **options)


def at_least(least: int, **options: int | None) -> None:
    """Refuse options that are below a number, by their names; None is none of them."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more; got {value}")


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


from musigma.zoo.flows import glow, maf, nsf, realnvp  # noqa: E402, F401 (they register themselves)
from musigma.zoo.vaes import autoencoder_kl, ladder, mlp_vae, vae  # noqa: E402, F401
