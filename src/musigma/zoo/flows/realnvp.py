"""Real NVP: affine couplings, on images by checkerboard and by channel, on vectors by halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from musigma.distributions import StandardNormal
from musigma.gaussian import Format
from musigma.layers import ActNorm, Affine, Checkerboard, Coupling, Permutation
from musigma.model import Chain, Inverse, Layer, Prior
from musigma.nets import MLP, ResNet
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import halving, multiscale, split
from musigma.zoo.parts import data_layers, free_shape


@architecture
def realnvp(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    levels: int | None = None,
    depth: int = 4,
    hidden: int = 32,
    blocks: int = 1,
    standardize: Literal["quantile"] | bool = False,
    schema: Sequence[Mapping[str, Any]] | None = None,
    support: Mapping[str, Any] | None = None,
    squeeze: Literal["space", "haar"] = "space",
    alpha: float = 1e-5,
    context: int = 0,
) -> Chain:
    """Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017, arXiv:1605.08803).

    Activation normalization replaces the paper's batch normalization, so no density depends on the
    other examples of a batch. Checkerboard couplings work on half-width images.

    Args:
        shape: (C, H, W) with an even width, or (D,) with D of at least 2.
        bits: Bits of each element; None for continuous data.
        levels: Number of scales of an image; None: as many as the sides allow, up to 3.
        depth: Number of couplings of each kind at each scale; for vectors, of all couplings.
        hidden: Width of the coupling networks.
        blocks: Number of residual blocks in each coupling network, for images.
        standardize: Standardize continuous data in the first layer: by the mean and the standard
            deviation of each feature of the training data, or by its distribution function
            (`quantile`), after which each is about normal. The log-determinant is included.
        schema: The columns of a table, measured on the training rows, for rows of any types: the
            first layer maps each by its distribution function to a variable that is about normal
            (`Marginals`).
        support: The set in which rows lie, as `Support.to_json` makes it: the first layer maps it
            to all of space, and standardizes the result (`Unconstrain`), so that no density and no
            sample is outside.
        squeeze: How the sides of images are halved, as in `glow`.
        alpha: Margin of the logit that maps [0, 1] to the real line, for data with bits (0.05 in
            the paper, with which training on black and white images is slower).
        context: Number of features of the context; it conditions couplings and split priors.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    at_least(0, blocks=blocks)
    how: Any = {"standardize": standardize, "schema": schema, "support": support}
    layers = data_layers(shape, bits, alpha, **how)
    if len(shape) == 1:
        (d,) = free_shape(shape, support)
        if d < 2:
            raise ValueError(f"shape: a coupling needs vectors of at least 2 elements; got {d}")
        for _ in range(depth):
            layers += step(d, hidden, context, blocks=None)
        return Chain(layers, Prior(StandardNormal((d,))))

    def before_squeeze(channels: int) -> list[Layer]:
        board = Checkerboard()
        return [board, *steps(2 * channels), Inverse(board)]

    def steps(channels: int) -> list[Layer]:
        return [
            layer for _ in range(depth) for layer in step(channels, hidden, context, blocks=blocks)
        ]

    def split_of(channels: int) -> Layer:
        return split(channels, "halves log_std", context)

    scales, top = multiscale(
        shape, levels, steps, split_of, before_squeeze, squeeze=halving(squeeze)
    )
    return Chain([*layers, *scales], Prior(StandardNormal(top)))


def step(channels: int, hidden: int, context: int, *, blocks: int | None) -> list[Layer]:
    """ActNorm, an affine coupling with a ResNet (an MLP if `blocks` is None), and a reversal."""
    half = channels // 2
    outputs = 2 * (channels - half)
    if blocks is None:
        net: nn.Module = MLP(half, outputs, hidden=[hidden] * 2, context=context, zero=True)
    else:
        net = ResNet(half, outputs, width=hidden, blocks=blocks, context=context, zero=True)
    coupling = Coupling(net, map=Affine(Format(scale="tanh")))
    return [ActNorm(channels), coupling, Permutation.reverse(channels)]
