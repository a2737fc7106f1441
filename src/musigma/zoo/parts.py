"""What several architectures share: layers next to the data, flows of vectors, checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from musigma.distributions import StandardNormal, StandardUniform
from musigma.layers import (
    MADE,
    ActNorm,
    Autoregressive,
    Conditioner,
    Coupling,
    Dequantize,
    InvertibleConv,
    Logit,
    Map,
    Marginals,
    Permutation,
    Rescale,
    Standardize,
    Unconstrain,
)
from musigma.layers.linear import reordering, rotation
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.named import Registry
from musigma.schema import Schema
from musigma.support import Support
from musigma.trace import Trace
from musigma.zoo import architecture, at_least


def data_layers(
    shape: Sequence[int],
    bits: int | None,
    alpha: float | None,
    *,
    low: float = 0.0,
    noise: nn.Module | None = None,
    standardize: str | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
) -> list[Layer]:
    """The layers next to the data.

    Integer levels are dequantized by `noise`, uniform by default, and mapped to the real line by
    a logit with margin `alpha`, or to [low, low + 1] if it is None. Columns of a schema are mapped
    by their distribution functions, and vectors in a support to all of space, whether or not they
    are to be standardized.

    Raises:
        ValueError: If images or data with bits are to be standardized, or have a schema or a
            support; if one of these has another number of columns; or if two exclude each other.
    """
    option = "standardize" if schema is None else "schema"
    option = option if support is None else "support"
    special = standardize or schema is not None or support is not None
    if special and (len(shape) != 1 or bits is not None):
        kind = "images" if len(shape) != 1 else f"{bits}-bit levels"
        raise ValueError(f"{option}: expected continuous vectors (D,); got {kind}")
    if standardize not in (False, True, "quantile"):
        raise ValueError(f"standardize: expected True, False or 'quantile'; got {standardize!r}")
    if support is not None:
        if schema is not None or standardize == "quantile":
            other = "typed columns" if schema is not None else "standardize='quantile'"
            raise ValueError(f"support: it does not go with {other}; leave one of them out")
        within = Support.from_json(support)
        if len(within) != shape[0]:
            raise ValueError(f"support: expected {shape[0]} elements; got {len(within)}")
        return [Unconstrain(within)]
    if schema is not None:
        if len(schema) != shape[0]:
            raise ValueError(f"schema: expected {shape[0]} columns; got {len(schema)}")
        return [Marginals(Schema.from_json(schema))]
    if standardize == "quantile":
        return [Marginals(shape[0])]
    if bits is None:
        return [Standardize(shape[0])] if standardize else []
    dequantized = Dequantize(noise or StandardUniform(shape), 2**bits)
    if alpha is None:
        return [dequantized, Rescale(1 / 2**bits, low)]
    return [dequantized, Rescale(1 / 2**bits), Logit(alpha)]


def free_shape(shape: Sequence[int], support: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The shape of what `data_layers` return: a simplex has one element less."""
    return tuple(shape) if support is None else (Support.from_json(support).freedom,)


def mixing(kind: str, channels: int, start: Callable[[int], Tensor] = rotation) -> Bijection:
    """A bijection that mixes or reorders the channels, by name; `start` is its first matrix."""
    if kind in ("conv", "lu"):
        return InvertibleConv(channels, lu=kind == "lu", start=start)
    if kind not in ("shuffle", "reverse"):
        raise ValueError(f"permutation: expected conv, lu, shuffle or reverse; got {kind!r}")
    return getattr(Permutation, kind)(channels)


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Check that a shape is (C, H, W), and return it.

    Raises:
        ValueError: If it is not.
    """
    if len(shape) != 3:
        raise ValueError(
            f"shape: this architecture is for images (C, H, W); got {tuple(shape)} "
            "(realnvp, maf, nsf and vae model vectors)"
        )
    return shape[0], shape[1], shape[2]


def patches(shape: Sequence[int], side: int) -> tuple[int, int, int]:
    """The shape of an image (C, H, W) of patches, (C side², H / side, W / side).

    Raises:
        ValueError: If the shape is not that of an image, or `side` is below 2 or does not divide
            both sides of the image.
    """
    channels, height, width = image_shape(shape)
    if side < 2 or height % side or width % side:
        raise ValueError(
            f"patch: expected 2 or more, a divisor of both sides of {height}x{width}; got {side}"
        )
    return channels * side**2, height // side, width // side


def halvings(height: int, width: int, wanted: int | None) -> int:
    """Number of times both sides are halved: `wanted`, or as often as possible, up to 3.

    Raises:
        ValueError: If the sides cannot be halved that often.
    """
    for n in [wanted] if wanted is not None else [3, 2, 1]:
        if height % 2**n == 0 and width % 2**n == 0:
            return n
    raise ValueError(
        f"levels: sides of {height}x{width} cannot be halved {wanted or 1} times; use fewer "
        "levels, or resize the images (--size)"
    )


# --- flows of vectors ---------------------------------------------------------------------------

FLOWS = Registry("flow", "features, context")
"""Families of flows of vectors, by name: functions that yield layers from the data upwards."""


def _about_data(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
    alpha: float = 1e-5,
    context: int = 0,
) -> None:
    """The options that every flow of vectors has.

    Args:
        shape: (D,).
        bits: Bits of each element; None for continuous data.
        standardize: Standardize continuous data in the first layer: by the mean and the standard
            deviation of each feature of the training data, or by its distribution function
            (`quantile`), after which each is about normal. The log-determinant is included.
        schema: The columns of a table, measured on the training rows, for rows of any types: the
            first layer maps each by its distribution function to a variable that is about normal
            (`Marginals`).
        support: The set in which rows lie, as `Support.to_json` makes it: the first layer maps it
            to all of space, and standardizes the result (`Unconstrain`), so that no density and no
            sample is outside.
        alpha: Margin of the logit that maps [0, 1] to the real line, for data with bits.
        context: Number of features of the context; it conditions the transforms.
    """


def vector_flow(family: Callable[..., Iterable[Layer]]) -> Callable[..., Chain]:
    """Register a family of flows of vectors as an architecture.

    The flow consists of the layers next to the data, those of the family, and a standard normal
    prior of what they return, which may have other features than the data (`Augment`). All options
    about data (types, bounds, standardization, context) come from here.

    Args:
        family: ``family(features, context, *, option=default, ...)`` yields the layers from the
            data upwards, for a number of features of the data and of the context. Its docstring
            is the help of the architecture, and describes its own options under ``Args:``.

    Returns:
        The architecture, a function of the shape of the data and the options.

    Example:
        >>> from musigma.layers import Coupling, Spline
        >>> from musigma.nets import MLP
        >>> @vector_flow
        ... def one_coupling(features, context, *, bins: int = 8):
        ...     '''A coupling by splines.
        ...
        ...     Args:
        ...         bins: Number of bins.
        ...     '''
        ...     spline, half = Spline(bins=bins), features // 2
        ...     outputs = spline.outputs * (features - half)
        ...     yield Coupling(MLP(half, outputs, hidden=[8], context=context), map=spline)
        >>> one_coupling((3,), bins=4).config["options"]["bins"]
        4
    """
    _, _, *own = inspect.signature(family, eval_str=True).parameters.values()
    shape, bits, *shared = inspect.signature(_about_data, eval_str=True).parameters.values()
    signature = inspect.Signature([shape, bits, *own, *shared], return_annotation=Chain)
    name = family.__name__

    def build(*args: Any, **given: Any) -> Chain:
        options = signature.bind(*args, **given).arguments
        chosen = {p.name: options.pop(p.name, p.default) for p in own}
        context = options.pop("context", 0)
        features, layers = _vector_layers(name, **options)
        above = list(family(features, context, **chosen))
        top = _output_shape(above, features, context)
        return Chain([*layers, *above], Prior(StandardNormal(top)))

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = family.__module__, _with_options(family, _about_data)
    build.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    build.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    FLOWS.register(family)
    return architecture(build)


@torch.no_grad()
def _output_shape(layers: Sequence[Layer], features: int, context: int) -> tuple[int, ...]:
    """The shape of what layers return: that of their input, unless some are no bijections."""
    x, given = torch.zeros(2, features), torch.zeros(2, context) if context else None
    if not all(isinstance(layer, Bijection) for layer in layers):
        with torch.random.fork_rng(devices=[]):
            for layer in layers:
                x = layer.infer(x, Trace(scoring=False), given)
    return tuple(x.shape[1:])


def _with_options(family: Callable[..., Any], shared: Callable[..., Any]) -> str:
    """The docstring of a family, with the options that several share."""
    text, _, own = (inspect.getdoc(family) or "").partition("\nArgs:\n")
    _, _, added = (inspect.getdoc(shared) or "").partition("\nArgs:\n")
    own, *rest = own.split("\n\n", 1)
    return "\n".join([text, "Args:", *filter(None, [own.rstrip("\n"), added, *rest])])


def _vector_layers(
    name: str, shape: Sequence[int], bits: int | None = None, alpha: float = 1e-5, **how: Any
) -> tuple[int, list[Layer]]:
    """The number of features behind the layers next to the data, and these layers.

    Raises:
        ValueError: For images.
    """
    if len(shape) != 1:
        raise ValueError(
            f"shape: {name} is for vectors (D,); got {tuple(shape)} (glow, realnvp, vae and "
            "ladder model images)"
        )
    return free_shape(shape, how.get("support"))[0], data_layers(shape, bits, alpha, **how)


def step(features: int, norm: bool, permutation: str) -> list[Layer]:
    """Normalization, if wanted, and reordering, which come before each transform.

    A matrix begins as a reordering, as in Durkan et al., 2019, arXiv:1906.04032: the features of a
    table often say more one by one than their rotations do.
    """
    return [*([ActNorm(features)] if norm else []), mixing(permutation, features, reordering)]


def transform(
    map: Map,
    kind: str,
    features: int,
    context: int,
    widths: Sequence[int],
    *,
    zero: bool = True,
) -> Bijection:
    """A layer of a flow of vectors that applies a map to features, given others and the context.

    Args:
        map: The map.
        kind: `coupling`: given the first half of the features, or `autoregressive`: given all
            previous ones.
        features: Number of features.
        context: Number of features of the context.
        widths: Width of each hidden layer of the network.
        zero: Begin with parameters of zero.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == "coupling":
        half = features // 2
        outputs = map.outputs * (features - half)
        net = Conditioner(half, outputs, hidden=widths, context=context, zero=zero)
        return Coupling(net, map=map)
    if kind == "autoregressive":
        net = MADE(map.owners(features), hidden=widths, context=context, zero=zero)
        return Autoregressive(net, map=map)
    raise ValueError(f"kind: expected 'coupling' or 'autoregressive'; got {kind!r}")


def _about_transforms(
    *,
    kind: Literal["autoregressive", "coupling"] = "autoregressive",
    depth: int = 3,
    hidden: int = 128,
    hidden_layers: int = 2,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
) -> None:
    """The options that every family of flows has that differ in their map.

    Args:
        kind: `autoregressive`: all previous features transform each one; `coupling`: one half of
            the features, and the context, transforms the other.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors), which begins as a shuffle.
        norm: Put an activation normalization before each transform.
    """


def map_flow(*, zero: bool) -> Callable[[Callable[..., Map]], Callable[..., Chain]]:
    """Register a map as a family of flows of vectors: a decorator of the function that makes it.

    Args:
        zero: Begin with networks whose outputs are zero.

    Example:
        >>> from musigma.layers import Spline
        >>> @map_flow(zero=True)
        ... def coarse(*, bins: int = 3) -> Spline:
        ...     '''Coarse splines.
        ...
        ...     Args:
        ...         bins: Number of bins.
        ...     '''
        ...     return Spline(bins=bins)
        >>> coarse((3,), kind="coupling", bins=4).config["options"]["depth"]
        3
    """

    def register(family: Callable[..., Map]) -> Callable[..., Chain]:
        own = inspect.signature(family, eval_str=True).parameters
        shared = inspect.signature(_about_transforms, eval_str=True).parameters.values()
        first = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
            for name in ("features", "context")
        ]
        signature = inspect.Signature([*first, *shared, *own.values()])

        def layers(*args: Any, **given: Any) -> Iterator[Layer]:
            bound = signature.bind(*args, **given)
            bound.apply_defaults()
            of_map = {name: bound.arguments.pop(name) for name in own}
            yield from _transforms(lambda: family(**of_map), zero, **bound.arguments)

        layers.__name__ = layers.__qualname__ = family.__name__
        layers.__module__ = family.__module__
        layers.__doc__ = _with_options(family, _about_transforms)
        layers.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return vector_flow(layers)

    return register


def _transforms(
    map: Callable[[], Map],
    zero: bool,
    features: int,
    context: int,
    kind: str,
    depth: int,
    hidden: int,
    hidden_layers: int,
    permutation: str,
    norm: bool,
) -> Iterator[Layer]:
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    for _ in range(depth):
        yield from step(features, norm, permutation)
        yield transform(map(), kind, features, context, [hidden] * hidden_layers, zero=zero)
