"""Layers and checks that several architectures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from musigma.distributions import StandardUniform
from musigma.layers import (
    Dequantize,
    InvertibleConv,
    Logit,
    Marginals,
    Permutation,
    Rescale,
    Standardize,
    Unconstrain,
)
from musigma.model import Bijection, Layer
from musigma.schema import Schema
from musigma.support import Support


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


def mixing(kind: str, channels: int) -> Bijection:
    """A bijection that mixes or reorders the channels, by name."""
    if kind in ("conv", "lu"):
        return InvertibleConv(channels, lu=kind == "lu")
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
