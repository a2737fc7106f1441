"""Architectures by name: functions from a data shape to a model.

The keyword-only parameters of a builder are its options, also on the command line, and its
docstring is their help. ``model.config`` holds the arguments, from which a checkpoint rebuilds the
model.

    >>> model = build("realnvp", (2,), bits=None, depth=2)
    >>> model.config["options"]["depth"]
    2
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from musigma.conditional import Conditional
from musigma.ensemble import Ensemble
from musigma.model import Model
from musigma.nets import embedding_of
from musigma.nets.embed import kind_of
from musigma.schema import Schema
from musigma.spec import Spec, Variable
from musigma.support import Support

__all__ = ["ARCHITECTURES", "Conditioning", "architecture", "build", "spec_of"]

ARCHITECTURES: dict[str, Callable[..., Model]] = {}
"""All registered builders, by name."""

ADDED_LATER = frozenset({"standardize", "squeeze", "posterior", "spline"})
"""Options that are newer than the first files. `config` omits them at their defaults, so that the
digest of a model, which identifies it in compressed files, does not change."""

SPECIFIED = ("columns", "context", "schema", "support")
"""What a config takes from the `Spec` of the data."""

WITH_DATA: Mapping[str, Any] = {"schema": Schema, "support": Support}
"""Options that are parts of a `Spec`."""

M = TypeVar("M", bound=Model)


WITH_NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "nsf": {"kind": "autoregressive", "permutation": "reverse", "embed": "quantile"}
}
"""Defaults of an architecture for vectors of real numbers, given numbers (`given_numbers`). They
hold together, unless the first of them is given."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Options of every architecture beside those of its builder.

    `Model.config` holds them only if they are not at their defaults.

    Args:
        embed: How the context is embedded: `none`, as it is; `quantile`: numbers, and their ranks
            in training, by a small perceptron (the default of nsf given numbers, whose kind is
            then autoregressive); `mlp`; `set`: sequences of any number of elements in any order;
            `conv`: series and images; `transformer`: sequences; or FILE.py:NAME. Options of the
            embedding may follow: 'set width=128 blocks=2'.
        ensemble: Number of models that are trained together from different initial weights, each
            with an embedding of its own. Their equal mixture is the model, and how much they
            differ is reported (`Ensemble`).
    """

    embed: str = "none"
    ensemble: int = 1

    @property
    def embeds(self) -> bool:
        """Whether even a context that needs no embedding has one."""
        return self.embed != Conditioning.embed

    @classmethod
    def parameters(cls, known: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
        """The options as parameters, for a builder with the parameters `known`."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(f.name, kind, default=f.default, annotation=f.type)
            for f in fields(cls)
            if f.name not in known and ("context" in known or f.name != "embed")
        ]


def architecture(builder: Callable[..., M]) -> Callable[..., M]:
    """Register ``builder(shape, *, bits, ...)`` under its name, and record its arguments.

    Args:
        builder: Its first parameter is the event shape; all others are keyword-only and take plain
            JSON values. `bits` is filled in from the data: the bits of each element, or None for
            continuous data.

    Returns:
        The builder, which also accepts a `Spec` as shape, and sets `config` and `spec` of the
        model.

    Raises:
        TypeError: If the builder has another signature.
        ValueError: If the zoo has a builder of this name.
    """
    signature = inspect.signature(builder)
    first, *others = signature.parameters.values()
    if any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in others):
        raise TypeError(
            f"builder: {builder.__name__} must have the form (shape, *, option=default, ...), "
            f"with keyword-only options; got {signature}"
        )
    added = Conditioning.parameters(signature.parameters)

    @functools.wraps(builder)
    def build(shape: Sequence[int] | Spec, **options: Any) -> M:
        _check_options(builder, [p.name for p in (*others, *added)], options)
        if isinstance(shape, Spec) and given_numbers(shape):
            options = with_numbers(builder.__name__, shape, options)
        asked = {p.name: options.pop(p.name) for p in added if p.name in options}
        how = Conditioning(**asked)
        if how.ensemble != 1:
            return _ensemble(build, shape, how.ensemble, options | asked)
        spec, embedding = shape if isinstance(shape, Spec) else None, None
        if spec is None:
            spec = _implied(tuple(shape), how, options, signature.parameters)  # pyright: ignore
        elif given := _with_data(options, spec):
            spec = replace(spec, **given)
        if spec is not None:
            options, embedding = _from_spec(builder, signature.parameters, spec, how, options)
            shape = spec.shape
        bound = signature.bind(tuple(shape), **options)  # pyright: ignore[reportArgumentType]
        bound.apply_defaults()
        model: Any = builder(**bound.arguments)
        if embedding is not None:
            model = Conditional(model, embedding)
        model.to(memory_format=torch.channels_last)
        chosen = {
            p.name: bound.arguments[p.name]
            for p in others
            if p.name not in WITH_DATA
            and (p.name not in ADDED_LATER or bound.arguments[p.name] != p.default)
        }
        chosen |= {
            name: value for name, value in asked.items() if value != getattr(Conditioning, name)
        }
        model.config = {
            "architecture": builder.__name__,
            "shape": list(bound.arguments[first.name]),
            "options": chosen,
        }
        if spec is not None:
            plain = spec.to_json()
            model.config |= {k: plain[k] for k in SPECIFIED if k in plain}
        model.spec = spec_of(model.config)
        return model

    build.__signature__ = signature.replace(parameters=[first, *others, *added])  # pyright: ignore
    built_in = [b.__name__ for b in ARCHITECTURES.values() if b.__module__.startswith(__name__)]
    if builder.__name__ in built_in and not builder.__module__.startswith(__name__):
        raise ValueError(f"builder: the zoo has a {builder.__name__!r} already; rename this one")
    ARCHITECTURES[builder.__name__] = build
    return build


def _ensemble(
    build: Callable[..., Any], shape: Sequence[int] | Spec, size: int, options: Mapping[str, Any]
) -> Any:
    """An ensemble of models that a builder makes, each with a configuration of its own."""
    at_least(1, ensemble=size)
    members = [build(shape, **{**options, "ensemble": 1}) for _ in range(size)]
    model = Ensemble(members)
    config = members[0].config
    model.config = {**config, "options": {**config["options"], "ensemble": size}}
    model.spec = members[0].spec
    return model


def build(name: str, shape: Sequence[int] | Spec, **options: Any) -> Model:
    """Build a model of an architecture for data of a given shape.

    Args:
        name: A key of `ARCHITECTURES`.
        shape: Event shape, (C, H, W) or (D,); or a `Spec`, which also sets `bits` and the context.
            Unless the context consists of the classes of one variable, it passes through an
            embedding, whose parameters are part of the model (`Conditional`).
        **options: Options of the builder, and those of `Conditioning`.

    Raises:
        ValueError: If an architecture or option is unknown (the message suggests the nearest one),
            or the architecture cannot model this shape.

    Example:
        >>> from musigma.spec import Spec, Variable
        >>> spec = Spec((2,), context=(Variable("age"), Variable("sex", classes=2)))
        >>> model = build("nsf", spec, depth=1)
        >>> given = {"age": torch.randn(5, 1), "sex": torch.eye(2)[[0, 1, 1, 0, 1]]}
        >>> model.log_prob(torch.randn(5, 2), given).shape
        torch.Size([5])
    """
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"architecture: there is no {name!r}; {hint}known are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name](shape, **options)


def spec_of(config: Mapping[str, Any]) -> Spec:
    """The `Spec` of a model, from its config.

    If the context is given only by the option `context`, a number of features, it becomes one
    variable of that name.
    """
    options = config["options"]
    bits, features = options.get("bits"), options.get("context") or 0
    context = config.get("context") or (
        [{"name": "context", "shape": [features]}] if features else []
    )
    return Spec.from_json(
        {
            "shape": config["shape"],
            "levels": None if bits is None else 2**bits,
            "columns": config.get("columns", ()),
            "context": context,
            "schema": config.get("schema"),
            "support": config.get("support"),
        }
    )


def _check_options(builder: Callable[..., Any], known: list[str], options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name}: {builder.__name__} has no such option{hint}")
        if not _plain(value):
            raise ValueError(f"{name}: expected a number, a string or a list; got {value!r}")


def _implied(
    shape: tuple[int, ...],
    how: Conditioning,
    options: dict[str, Any],
    known: Mapping[str, inspect.Parameter],
) -> Spec | None:
    """The spec of data of which only the shape is given, if options ask for one.

    It takes the place of the options `schema`, `support` and, if the context is to be embedded,
    `context`.
    """
    given = _with_data(options)
    if not given and not how.embeds:
        return None
    features = options.pop("context", 0) if how.embeds else 0
    context = (Variable("context", (features,)),) if features else ()
    bits = options.get("bits", known["bits"].default) if "bits" in known else None
    levels = None if bits is None or given else 2**bits
    return Spec(shape, levels, context=context, **given)


def _with_data(options: dict[str, Any], spec: Spec | None = None) -> dict[str, Any]:
    """Take options that are parts of a spec, unless it has them, and read them."""
    return {
        name: kind.from_json(options.pop(name))
        for name, kind in WITH_DATA.items()
        if options.get(name) and getattr(spec, name, None) is None
    }


def _from_spec(
    builder: Callable[..., Any],
    known: Mapping[str, Any],
    spec: Spec,
    how: Conditioning,
    options: dict[str, Any],
) -> tuple[dict[str, Any], torch.nn.Module | None]:
    """Options that follow from a spec, and the embedding of its context, if it needs one."""
    if spec.levels is not None and spec.bits is None:
        raise ValueError(
            f"levels: {builder.__name__} takes one power of two for all elements; got "
            f"{spec.levels}"
        )
    follow: dict[str, Any] = {"bits": spec.bits} if "bits" in known else {}
    if spec.schema is not None:
        if "schema" not in known:
            takes = ", ".join(n for n, b in ARCHITECTURES.items() if "schema" in signature_of(b))
            raise ValueError(f"schema: {builder.__name__} takes no typed columns; {takes} do")
        follow["schema"] = spec.schema.to_json()
    if spec.support is not None:
        if "support" not in known:
            takes = ", ".join(n for n, b in ARCHITECTURES.items() if "support" in signature_of(b))
            raise ValueError(f"support: {builder.__name__} takes no bounds; {takes} do")
        follow["support"] = spec.support.to_json()
    embedding = None
    if spec.context:
        if "context" not in known:
            raise ValueError(f"context: {builder.__name__} takes no context")
        if how.embeds or not direct(spec.context):
            embedding = embedding_of(how.embed, spec.context)
        follow["context"] = embedding.features if embedding else spec.context[0].shape[0]
    elif how.embeds:
        raise ValueError(
            f"embed: {how.embed!r} has no context to embed; give one (--given, or a Spec with a "
            "context)"
        )
    for name, value in follow.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, as in the spec; got {options[name]}")
    return options | follow, embedding


def given_numbers(spec: Spec) -> bool:
    """Whether a spec is of vectors of real numbers, given anything but classes."""
    real = len(spec.shape) == 1 and spec.levels is None and spec.schema is None
    return real and any(not v.classes for v in spec.context) and not direct(spec.context)


def with_numbers(name: str, spec: Spec, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an architecture, and its `WITH_NUMBERS` for those that are not given."""
    defaults = dict(WITH_NUMBERS.get(name, {}))
    if any(kind_of(v) not in ("numbers", "classes") for v in spec.context):
        defaults.pop("embed", None)
    return dict(options) if options.keys() & [*defaults][:1] else defaults | dict(options)


def direct(variables: Sequence[Variable]) -> bool:
    """Whether a context needs no embedding: the classes of one variable, or a plain vector."""
    only = variables[0]
    plain = only.name == "context" and len(only.shape) != 2
    return len(variables) == 1 and (bool(only.classes) or plain)


def at_least(least: int, **options: int | None) -> None:
    """Raise a ValueError for options below a number; None is accepted."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more; got {value}")


def signature_of(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a builder, by name."""
    return inspect.signature(builder).parameters


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _import_families() -> None:
    """Import every module of the zoo; each registers its architectures."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)


_import_families()
