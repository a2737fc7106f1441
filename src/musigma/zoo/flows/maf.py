"""Masked autoregressive flow: affine maps of each feature, given earlier features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from musigma.distributions import StandardNormal, StandardUniform
from musigma.gaussian import Format
from musigma.layers import (
    MADE,
    ActNorm,
    Affine,
    Autoregressive,
    Dequantize,
    Logit,
    Rescale,
    Standardize,
)
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import mixing


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
    standardize: bool = False,
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
        standardize: Standardize continuous data in the first layer, by the mean and standard
            deviation of the training data; the log-determinant counts.
        alpha: Margin of the logit that maps [0, 1] to the real line, for data with bits.
        context: Number of features of the context; it conditions the transforms.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    affine, widths = Affine(Format.parse(format)), [hidden] * hidden_layers

    def transform(features: int) -> Bijection:
        net = MADE(affine.owners(features), hidden=widths, context=context, zero=True)
        return Autoregressive(net, map=affine)

    return vector_flow(
        "maf",
        shape,
        transform,
        bits=bits,
        depth=depth,
        permutation=permutation,
        norm=norm,
        standardize=standardize,
        alpha=alpha,
    )


def standardization(shape: Sequence[int], bits: int | None, wanted: bool) -> list[Layer]:
    """A `Standardize` layer if wanted, otherwise no layer.

    Raises:
        ValueError: For images, and for data with bits.
    """
    if not wanted:
        return []
    if len(shape) != 1 or bits is not None:
        kind = "images" if len(shape) != 1 else f"{bits}-bit levels"
        raise ValueError(f"standardize: expected continuous vectors (D,); got {kind}")
    return [Standardize(shape[0])]


def vector_flow(
    name: str,
    shape: Sequence[int],
    transform: Callable[[int], Bijection],
    *,
    bits: int | None,
    depth: int,
    permutation: str,
    norm: bool,
    standardize: bool,
    alpha: float,
) -> Chain:
    """Steps of normalization, permutation and a transform, over vectors.

    Raises:
        ValueError: For images.
    """
    if len(shape) != 1:
        raise ValueError(
            f"shape: {name} is for vectors (D,); got {tuple(shape)} (glow, realnvp, vae and "
            "ladder model images)"
        )
    layers = standardization(shape, bits, standardize)
    if bits is not None:
        layers += [Dequantize(StandardUniform(shape), 2**bits), Rescale(2.0**-bits), Logit(alpha)]
    features = shape[0]
    for _ in range(depth):
        layers += [ActNorm(features)] if norm else []
        layers += [mixing(permutation, features), transform(features)]
    return Chain(layers, Prior(StandardNormal(shape)))
