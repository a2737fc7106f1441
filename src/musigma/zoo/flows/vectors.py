"""Flows of vectors: affine maps or splines of each feature, given other features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from musigma.distributions import StandardNormal
from musigma.gaussian import Format
from musigma.layers import MADE, ActNorm, Affine, Autoregressive, Conditioner, Coupling, Spline
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import data_layers, free_shape, mixing


@architecture
def maf(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    format: str = "halves softclip",
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "reverse",
    norm: bool = True,
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
    alpha: float = 1e-5,
    context: int = 0,
) -> Chain:
    """Masked autoregressive flow (Papamakarios, Pavlakou, Murray, 2017, arXiv:1705.07057).

    Activation normalization replaces the paper's batch normalization, so no density depends on the
    other examples of a batch. Densities take one pass; samples take one step per feature.

    Args:
        shape: (D,).
        bits: Bits of each element; None for continuous data.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        format: How each transform reads its network's output, as `Format.parse` takes it.
        permutation: Reordering of the features before each transform: a reversal, a fixed shuffle,
            or an invertible matrix (plain or by its LU factors).
        norm: Put an activation normalization before each transform.
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
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    affine, widths = Affine(Format.parse(format)), [hidden] * hidden_layers
    d, layers = vector_layers("maf", shape, bits, alpha, standardize, schema, support)
    for _ in range(depth):
        layers += step(d, norm, permutation)
        net = MADE(affine.owners(d), hidden=widths, context=context, zero=True)
        layers.append(Autoregressive(net, map=affine))
    return Chain(layers, Prior(StandardNormal((d,))))


@architecture
def nsf(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    kind: Literal["coupling", "autoregressive"] = "coupling",
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    bins: int = 8,
    bound: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "lu",
    norm: bool = True,
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
    alpha: float = 1e-5,
    context: int = 0,
) -> Chain:
    """Neural spline flow (Durkan, Bekasov, Murray, Papamakarios, 2019, arXiv:1906.04032).

    Args:
        shape: (D,).
        bits: Bits of each element; None for continuous data.
        kind: `coupling`: one half of the features, and the context, transforms the other; both
            directions cost one pass. `autoregressive`: all previous features transform each one;
            sampling takes one step per feature.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        bins: Number of bins of each spline.
        bound: Splines act on [-bound, bound]; outside they are the identity.
        permutation: Reordering of the features before each transform: an invertible matrix (by
            its LU factors, or plain), a fixed shuffle, or a reversal.
        norm: Put an activation normalization before each transform.
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
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    spline, widths = Spline(bins=bins, bound=bound), [hidden] * hidden_layers

    def coupling(features: int) -> Bijection:
        half = features // 2
        outputs = spline.outputs * (features - half)
        net = Conditioner(half, outputs, hidden=widths, context=context, zero=True)
        return Coupling(net, map=spline)

    def autoregressive(features: int) -> Bijection:
        net = MADE(spline.owners(features), hidden=widths, context=context, zero=True)
        return Autoregressive(net, map=spline)

    kinds = {"coupling": coupling, "autoregressive": autoregressive}
    if kind not in kinds:
        raise ValueError(f"kind: expected 'coupling' or 'autoregressive'; got {kind!r}")
    d, layers = vector_layers("nsf", shape, bits, alpha, standardize, schema, support)
    for _ in range(depth):
        layers += [*step(d, norm, permutation), kinds[kind](d)]
    return Chain(layers, Prior(StandardNormal((d,))))


def vector_layers(
    name: str,
    shape: Sequence[int],
    bits: int | None,
    alpha: float,
    standardize: str | bool,
    schema: Sequence[Mapping[str, Any]] | None,
    support: Mapping[str, Any] | None = None,
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
    how: Any = {"standardize": standardize, "schema": schema, "support": support}
    layers = data_layers(shape, bits, alpha, **how)
    return free_shape(shape, support)[0], layers


def step(features: int, norm: bool, permutation: str) -> list[Layer]:
    """Normalization, if wanted, and reordering, which come before each transform."""
    return [*([ActNorm(features)] if norm else []), mixing(permutation, features)]
