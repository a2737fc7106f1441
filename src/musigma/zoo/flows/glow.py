"""Glow: multi-scale flow of activation normalisation, 1x1 convolutions and couplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from musigma.distributions import LearnedNormal, LogitNormalHead, StandardNormal, StandardUniform
from musigma.gaussian import Format, GaussianHead
from musigma.layers import (
    ActNorm,
    Additive,
    Affine,
    Classifier,
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
    split_format: str = "interleaved log_std",
    permutation: Literal["conv", "lu", "shuffle", "reverse"] = "lu",
    edge: bool = False,
    learn_top: bool = True,
    top_each: Literal["channel", "pixel"] = "channel",
    dequantize: Literal["uniform", "learned"] = "learned",
    alpha: float | None = 1e-5,
    low: float = -0.5,
    conditioned: Literal["all", "top"] = "all",
    classifier: Literal["none", "softmax", "sigmoid"] = "none",
    classifier_weight: float = 1.0,
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
        split_format: How a split prior reads its network's output: "halves log_std" is the same
            model under a permutation of the last layer's rows.
        permutation: What mixes the channels: a 1x1 convolution (plain or by its LU factors), a
            fixed shuffle, or a reversal.
        edge: 3x3 convolutions in couplings and split priors see where the image ends (the "edge
            bias" of OpenAI's code; what padding with ones does in rosinality's).
        learn_top: Learn mean and log_std of the top prior.
        top_each: For each `channel`, or for each `pixel` of each.
        dequantize: Uniform noise, as in the paper, or learned noise, logit-normal given the image
            (Ho et al., "Flow++", 2019, arXiv:1902.00275), with which a third of the steps do.
        alpha: Of a logit that maps [0, 1] to the real line before all else, for data with bits;
            None: none, as in the paper. With it, images that are mostly black or white are
            learned several times faster.
        low: Without a logit, images are brought to the range from here to one more.
        conditioned: What a context conditions: couplings and all priors, or the `top` prior alone.
        classifier: Train the top latent to tell the class (of a conditional model) as well:
            `softmax` for one label each, `sigmoid` for several.
        classifier_weight: Of that term, in nats for each nat of log p(x).
        context: Features of the context.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    if conditioned not in ("all", "top"):
        raise ValueError(f"conditioned: expected 'all' or 'top'; got {conditioned!r}")
    if classifier != "none" and not context:
        raise ValueError("classifier: there are no classes to tell; condition the model on them")
    inner = context if conditioned == "all" else 0
    maps = {"affine": Affine(Format.parse(format)), "additive": Additive()}
    if coupling not in maps:
        raise ValueError(f"coupling: expected 'affine' or 'additive'; got {coupling!r}")
    bend = maps[coupling]
    layers: list[Layer] = []
    if bits is not None:
        layers = dequantized(shape, bits, dequantize, alpha, low, hidden, inner)
    channels, height, width = image_shape(shape)
    levels = halvings(height, width, levels)
    for level in range(levels):
        layers.append(Squeeze())
        channels, height, width = 4 * channels, height // 2, width // 2
        half = channels // 2
        for _ in range(depth):
            emitted = bend.outputs * half
            net = CouplingNet(half, emitted, hidden=hidden, context=inner, edge=edge)
            layers += [
                ActNorm(channels),
                mixing(permutation, channels),
                Coupling(net, map=bend),
            ]
        if level < levels - 1:
            prior = GaussianHead(
                ZeroConv2d(half, channels, context=inner, edge=edge),
                event_ndims=3,
                format=Format.parse(split_format),
            )
            layers.append(Split(prior))
            channels = half
    top = (channels, height, width)
    if classifier != "none":
        weight = classifier_weight
        layers.append(Classifier(channels, context, labels=classifier, weight=weight))
    if learn_top or context:
        bounds = Format.parse(split_format).bounds
        head = LearnedNormal(top, each=top_each, context=context, bounds=bounds)
        return Chain(layers, Prior(head))
    return Chain(layers, Prior(StandardNormal(top)))


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
