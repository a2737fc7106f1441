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
        shape: (C, H, W), with sides that `levels` halvings divide.
        bits: Bits of each element; None for continuous images.
        levels: Number of scales, each of half the side of the one before; all but the last factor
            half of their channels out. None: as many as the sides allow, up to 3.
        depth: Steps of actnorm, permutation and coupling at each scale.
        hidden: Channels inside the coupling networks.
        coupling: Affine couplings, or additive ones (of volume 1).
        format: How an affine coupling reads its network's output, as `Format.parse` takes it. The
            paper's is "interleaved sigmoid+2", which can only shrink and learns more slowly.
        permutation: What mixes the channels: a 1x1 convolution (plain or by its LU factors), a
            fixed shuffle, or a reversal.
        learn_top: Learn mean and log_std of the top prior.
        dequantize: Uniform noise, as in the paper, or learned noise, logit-normal given the image
            (Ho et al., "Flow++", 2019, arXiv:1902.00275), with which a third of the steps do.
        alpha: Margin of a logit that maps [0, 1] to the real line before all other layers, for
            data with bits; None for no logit, as in the paper. With it, images that are mostly
            black or white are learned several times faster.
        context: Features of the context.
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
    """Scale by scale: a squeeze, steps on so many channels, and a split of all but the last.

    Returns:
        The layers, and the shape that is left at the top.
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
    """Factors half of the channels out, with a Gaussian prior given the other half."""
    net = ZeroConv2d(channels // 2, channels, context=context, edge=edge)
    return Split(GaussianHead(net, event_ndims=3, format=Format.parse(format)))


def coupling_map(name: str, format: str) -> Affine | Additive:
    """The map of a coupling by its name."""
    if name not in ("affine", "additive"):
        raise ValueError(f"coupling: expected 'affine' or 'additive'; got {name!r}")
    read = Format.parse(format)
    return Affine(read) if name == "affine" else Additive()


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        ValueError: For vectors.
    """
    if len(shape) != 3:
        raise ValueError(
            f"shape: this architecture is for images (C, H, W); got {tuple(shape)} "
            "(realnvp, maf, nsf and vae model vectors)"
        )
    return shape[0], shape[1], shape[2]


def halvings(height: int, width: int, wanted: int | None) -> int:
    """How often both sides are halved: as wanted, or else as often as they can be, up to 3 times.

    Raises:
        ValueError: If they cannot be halved so often, or not at all.
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
    """Integer levels to real numbers: in [low, low + 1], or by a logit if there is an alpha."""
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
