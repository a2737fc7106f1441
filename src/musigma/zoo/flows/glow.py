"""Glow: multi-scale flow of activation normalization, 1x1 convolutions and couplings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from musigma.distributions import LearnedNormal, LogitNormalHead, StandardNormal, StandardUniform
from musigma.gaussian import Format, GaussianHead
from musigma.layers import (
    ActNorm,
    Additive,
    Affine,
    Coupling,
    Dequantize,
    InvertibleConv,
    Logit,
    Permutation,
    Rescale,
    Split,
    Squeeze,
)
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.nets import CouplingNet, ResNet, ZeroConv2d
from musigma.zoo import architecture, at_least

SPLIT = "interleaved log_std"
"""How a split prior reads the output of its network."""


@architecture
def glow(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    levels: int | None = None,
    depth: int = 8,
    hidden: int = 128,
    coupling: Literal["affine", "additive"] = "affine",
    format: str = "interleaved softclip",
    permutation: Literal["conv", "lu", "shuffle", "reverse"] = "lu",
    learn_top: bool = True,
    dequantize: Literal["uniform", "learned"] = "learned",
    alpha: float | None = 1e-5,
    context: int = 0,
) -> Chain:
    """Glow (Kingma & Dhariwal, 2018, arXiv:1807.03039).

    Args:
        shape: (C, H, W), with sides that can be halved `levels` times.
        bits: Bits of each element; None for continuous images.
        levels: Number of scales. Each halves the sides, and all but the last factor out half of
            their channels. None: as many as the sides allow, up to 3.
        depth: Number of steps (actnorm, permutation, coupling) at each scale.
        hidden: Channels of the hidden layers of the coupling networks.
        coupling: Affine couplings, or additive ones, which preserve volume.
        format: How an affine coupling reads its network's output, as `Format.parse` takes it. The
            paper's is "interleaved sigmoid+2", which can only shrink, and learns more slowly.
        permutation: Mixing of the channels: a 1x1 convolution (plain or by its LU factors), a
            fixed shuffle, or a reversal.
        learn_top: Learn mean and log_std of the top prior.
        dequantize: Uniform noise, as in the paper, or learned noise, logit-normal given the image
            (Ho et al., "Flow++", 2019, arXiv:1902.00275), which needs a third of the steps.
        alpha: Margin of a logit that maps [0, 1] to the real line before all other layers, for
            data with bits; None for no logit, as in the paper. With a logit, training on images
            that are mostly black or white is several times faster.
        context: Number of features of the context.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    map, layers = coupling_map(coupling, format), []
    if bits is not None:
        layers = dequantized(shape, bits, dequantize, alpha, -0.5, hidden, context)
    scales, top = multiscale(
        shape,
        levels,
        lambda c: steps(c, depth, hidden, map, permutation, context),
        lambda c: split(c, SPLIT, context),
    )
    prior = StandardNormal(top)
    if learn_top or context:
        prior = LearnedNormal(top, context=context, bounds=Format.parse(SPLIT).bounds)
    return Chain([*layers, *scales], Prior(prior))


def multiscale(
    shape: Sequence[int],
    levels: int | None,
    steps: Callable[[int], list[Layer]],
    split: Callable[[int], Layer],
) -> tuple[list[Layer], tuple[int, int, int]]:
    """For each scale a squeeze, ``steps(channels)``, and ``split(channels)`` but for the last.

    Returns:
        The layers, and the shape of their output.

    Raises:
        ValueError: If the shape is not that of an image, or its sides cannot be halved.
    """
    layers: list[Layer] = []
    channels, height, width = image_shape(shape)
    levels = halvings(height, width, levels)
    for level in range(levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        layers += [Squeeze(), *steps(channels)]
        if level < levels - 1:
            layers.append(split(channels))
            channels //= 2
    return layers, (channels, height, width)


def steps(
    channels: int,
    depth: int,
    hidden: int,
    map: Affine | Additive,
    permutation: str,
    context: int = 0,
    *,
    edge: bool = False,
) -> list[Layer]:
    """Steps of actnorm, permutation and coupling; `edge` as in `published_glow`."""
    half, layers = channels // 2, []
    for _ in range(depth):
        net = CouplingNet(half, map.outputs * half, hidden=hidden, context=context, edge=edge)
        layers += [ActNorm(channels), mixing(permutation, channels), Coupling(net, map=map)]
    return layers


def split(channels: int, format: str, context: int = 0, *, edge: bool = False) -> Split:
    """A `Split` with a Gaussian prior of one half of the channels given the other."""
    net = ZeroConv2d(channels // 2, channels, context=context, edge=edge)
    return Split(GaussianHead(net, event_ndims=3, format=Format.parse(format)))


def coupling_map(name: str, format: str) -> Affine | Additive:
    """The map of a coupling, by name."""
    if name not in ("affine", "additive"):
        raise ValueError(f"coupling: expected 'affine' or 'additive'; got {name!r}")
    read = Format.parse(format)
    return Affine(read) if name == "affine" else Additive()


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
    """Number of halvings of both sides: as wanted; None: as many as possible, up to 3.

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


def mixing(kind: str, channels: int) -> Bijection:
    """A bijection that mixes or reorders the channels, by name."""
    if kind in ("conv", "lu"):
        return InvertibleConv(channels, lu=kind == "lu")
    if kind not in ("shuffle", "reverse"):
        raise ValueError(f"permutation: expected conv, lu, shuffle or reverse; got {kind!r}")
    return getattr(Permutation, kind)(channels)


def dequantized(
    shape: Sequence[int],
    bits: int,
    kind: str,
    alpha: float | None,
    low: float,
    hidden: int,
    context: int,
) -> list[Layer]:
    """Layers from integer levels to [low, low + 1], or by a logit if `alpha` is not None."""
    if kind not in ("uniform", "learned"):
        raise ValueError(f"dequantize: expected uniform or learned; got {kind!r}")
    levels = 2**bits
    noise: nn.Module = StandardUniform(shape)
    if kind == "learned":
        net = ResNet(shape[0], 2 * shape[0], width=min(hidden, 32), context=context, zero=True)
        noise = LogitNormalHead(GaussianHead(net, event_ndims=3), levels)
    if alpha is None:
        return [Dequantize(noise, levels), Rescale(1 / levels, low)]
    return [Dequantize(noise, levels), Rescale(1 / levels), Logit(alpha)]
