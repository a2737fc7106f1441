"""Glow: multi-scale flow of activation normalisation, 1x1 convolutions and couplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from musigma.gaussian import Format, GaussianHead
from musigma.heads import LearnedNormal, LogitNormalHead, StandardNormal, StandardUniform
from musigma.layers import (
    ActNorm,
    Affine,
    Coupling,
    Dequantize,
    InvertibleConv,
    Logit,
    Permutation,
    Split,
    Squeeze,
)
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.nets import CouplingNet, ResNet, ZeroConv2d
from musigma.zoo import architecture, at_least


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
    dequantize: Literal["uniform", "learned"] = "uniform",
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
        learn_top: Learn mean and log_std of the top prior for each channel.
        dequantize: Uniform noise, or learned noise (logit-normal, given the image).
        alpha: Of a logit that maps [0, 1] to the real line before all else, for data with bits;
            None: none, as in the paper. With it, images that are mostly black or white are
            learned several times faster.
        context: Features of the context that conditions the couplings and the top prior.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    layers = [] if bits is None else dequantized(shape, bits, dequantize, alpha, hidden, context)
    channels, height, width = image_shape(shape)
    levels = halvings(height, width, levels)
    for level in range(levels):
        layers.append(Squeeze())
        channels, height, width = 4 * channels, height // 2, width // 2
        half = channels // 2
        for _ in range(depth):
            net = CouplingNet(
                half,
                channels if coupling == "affine" else half,
                hidden=hidden,
                context=context,
            )
            read = Format.parse(format)
            layers += [
                ActNorm(channels),
                mixing(permutation, channels),
                Coupling(net, kind=coupling, format=read),
            ]
        if level < levels - 1:
            prior = GaussianHead(
                ZeroConv2d(half, channels), event_ndims=3, format=Format("interleaved")
            )
            layers.append(Split(prior))
            channels = half
    top = (channels, height, width)
    if learn_top or context:
        return Chain(layers, Prior(LearnedNormal(top, context=context)))
    return Chain(layers, Prior(StandardNormal(top)))


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        ValueError: For vectors.
    """
    if len(shape) != 3:
        raise ValueError(
            f"shape: this architecture is for images (C, H, W); got {tuple(shape)} "
            "(realnvp and vae model vectors)"
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
    shape: Sequence[int], bits: int, kind: str, alpha: float | None, hidden: int, context: int
) -> list[Layer]:
    """Integer levels to real numbers: in [-0.5, 0.5], or by a logit if there is an alpha."""
    if kind not in ("uniform", "learned"):
        raise ValueError(f"dequantize: expected uniform or learned; got {kind!r}")
    levels = 2**bits
    noise: nn.Module = StandardUniform(shape)
    if kind == "learned":
        net = ResNet(shape[0], 2 * shape[0], width=min(hidden, 32), context=context, zero=True)
        noise = LogitNormalHead(GaussianHead(net, event_ndims=3), levels)
    if alpha is None:
        return [Dequantize(noise, levels), Affine(1 / levels, -0.5)]
    return [Dequantize(noise, levels), Affine(1 / levels), Logit(alpha)]
