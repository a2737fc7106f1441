"""Glow: multi-scale flow of activation normalization, 1x1 convolutions and couplings.

`glow` has the options that are worth tuning; `published_glow`, which `musigma.convert` builds, has
those of published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from musigma.distributions import LearnedNormal, LogitNormalHead, StandardNormal
from musigma.gaussian import Format, GaussianHead
from musigma.layers import (
    ActNorm,
    Additive,
    Affine,
    AutoregressiveConv,
    Classifier,
    Coupling,
    HaarSqueeze,
    Split,
    Squeeze,
)
from musigma.model import Bijection, Chain, Layer, Prior
from musigma.nets import CouplingNet, ResNet, ZeroConv2d
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import data_layers, halvings, image_shape, mixing

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
    permutation: Literal["conv", "lu", "shuffle", "reverse", "emerging"] = "lu",
    learn_top: bool = True,
    dequantize: Literal["uniform", "learned"] = "learned",
    squeeze: Literal["space", "haar"] = "space",
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
            fixed shuffle, or a reversal. `emerging` is a 1x1 convolution and two 3x3 convolutions,
            each over the pixels before or after one: better on images whose neighbors are alike,
            but samples take one step per pixel in each (Hoogeboom et al., 2019, arXiv:1901.11137).
        learn_top: Learn mean and log_std of the top prior.
        dequantize: Uniform noise, as in the paper, or learned noise, logit-normal given the image
            (Ho et al., "Flow++", 2019, arXiv:1902.00275), which needs a third of the steps.
        squeeze: How the sides are halved: the four values of each 2x2 block become channels in
            `space`, or their Haar wavelet coefficients.
        alpha: Margin of a logit that maps [0, 1] to the real line before all other layers, for
            data with bits; None for no logit, as in the paper. With a logit, training on images
            that are mostly black or white is several times faster.
        context: Number of features of the context.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    map = coupling_map(coupling, format)
    noise = dequantization(shape, bits, dequantize, hidden, context)
    layers = data_layers(shape, bits, alpha, low=-0.5, noise=noise)
    scales, top = multiscale(
        shape,
        levels,
        lambda c: steps(c, depth, hidden, map, permutation, context),
        lambda c: split(c, SPLIT, context),
        squeeze=halving(squeeze),
    )
    prior = StandardNormal(top)
    if learn_top or context:
        prior = LearnedNormal(top, context=context, bounds=Format.parse(SPLIT).bounds)
    return Chain([*layers, *scales], Prior(prior))


@architecture
def published_glow(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    levels: int | None = None,
    depth: int = 8,
    hidden: int = 128,
    coupling: Literal["affine", "additive"] = "affine",
    format: str = "interleaved sigmoid+2",
    split_format: str = "interleaved log_std",
    permutation: Literal["conv", "lu", "shuffle", "reverse"] = "conv",
    edge: bool = False,
    learn_top: bool = True,
    top_each: Literal["channel", "pixel"] = "channel",
    dequantize: Literal["uniform", "learned"] = "uniform",
    alpha: float | None = None,
    low: float = -0.5,
    conditioned: Literal["all", "top"] = "top",
    classifier: Literal["none", "softmax", "sigmoid"] = "none",
    classifier_weight: float = 1.0,
    context: int = 0,
) -> Chain:
    """Glow with the options of the code of chaiyujin, rosinality and OpenAI.

    Args:
        shape: (C, H, W), with sides that can be halved `levels` times.
        bits: As in `glow`.
        levels: As in `glow`.
        depth: As in `glow`.
        hidden: As in `glow`.
        coupling: As in `glow`.
        format: As in `glow`.
        split_format: How a split prior reads its network's output: "halves log_std" is the same
            model under a permutation of the last layer's rows.
        permutation: As in `glow`.
        edge: Mark the border of the image in 3x3 convolutions of couplings and split priors (the
            "edge bias" of OpenAI's code; padding with ones in rosinality's).
        learn_top: As in `glow`.
        top_each: Separate parameters of the top prior for each `channel`, or also each `pixel`.
        dequantize: As in `glow`.
        alpha: As in `glow`.
        low: Lower end of the range of width 1 to which images are scaled if there is no logit.
        conditioned: What the context conditions: couplings and `all` priors, or the `top` prior.
        classifier: Also train the top latent of a conditional model to predict the class:
            `softmax` for one label per example, `sigmoid` for several.
        classifier_weight: Weight of the classifier's term, in nats for each nat of log p(x).
        context: Number of features of the context.
    """
    at_least(1, levels=levels, depth=depth, hidden=hidden)
    if conditioned not in ("all", "top"):
        raise ValueError(f"conditioned: expected 'all' or 'top'; got {conditioned!r}")
    if classifier != "none" and not context:
        raise ValueError("classifier: needs a conditional model, with classes to predict")
    inner = context if conditioned == "all" else 0
    map = coupling_map(coupling, format)
    noise = dequantization(shape, bits, dequantize, hidden, inner)
    layers = data_layers(shape, bits, alpha, low=low, noise=noise)
    scales, top = multiscale(
        shape,
        levels,
        lambda c: steps(c, depth, hidden, map, permutation, inner, edge=edge),
        lambda c: split(c, split_format, inner, edge=edge),
    )
    if classifier != "none":
        weight = classifier_weight
        scales.append(Classifier(top[0], context, labels=classifier, weight=weight))
    prior = StandardNormal(top)
    if learn_top or context:
        bounds = Format.parse(split_format).bounds
        prior = LearnedNormal(top, each=top_each, context=context, bounds=bounds)
    return Chain([*layers, *scales], Prior(prior))


def multiscale(
    shape: Sequence[int],
    levels: int | None,
    steps: Callable[[int], list[Layer]],
    split: Callable[[int], Layer],
    before: Callable[[int], list[Layer]] = lambda channels: [],
    squeeze: Callable[[], Layer] = Squeeze,
) -> tuple[list[Layer], tuple[int, int, int]]:
    """For each scale a squeeze, ``steps(channels)``, and ``split(channels)`` but for the last.

    ``before(channels)`` come before each squeeze, which is ``squeeze()``.

    Returns:
        The layers, and the shape of their output.

    Raises:
        ValueError: If the shape is not that of an image, or its sides cannot be halved.
    """
    layers: list[Layer] = []
    channels, height, width = image_shape(shape)
    levels = halvings(height, width, levels)
    for level in range(levels):
        layers += before(channels)
        channels, height, width = 4 * channels, height // 2, width // 2
        layers += [squeeze(), *steps(channels)]
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
        emerging = permutation == "emerging"
        layers += [ActNorm(channels), mixing("lu" if emerging else permutation, channels)]
        if emerging:
            layers += [AutoregressiveConv(channels), AutoregressiveConv(channels, reverse=True)]
        layers.append(Coupling(net, map=map))
    return layers


def split(channels: int, format: str, context: int = 0, *, edge: bool = False) -> Split:
    """A `Split` with a Gaussian prior of one half of the channels given the other."""
    net = ZeroConv2d(channels // 2, channels, context=context, edge=edge)
    return Split(GaussianHead(net, event_ndims=3, format=Format.parse(format)))


def halving(name: str) -> type[Bijection]:
    """The layer that halves the sides of an image, by the name of what it returns."""
    if name not in ("space", "haar"):
        raise ValueError(f"squeeze: expected space or haar; got {name!r}")
    return HaarSqueeze if name == "haar" else Squeeze


def coupling_map(name: str, format: str) -> Affine | Additive:
    """The map of a coupling, by name."""
    if name not in ("affine", "additive"):
        raise ValueError(f"coupling: expected 'affine' or 'additive'; got {name!r}")
    read = Format.parse(format)
    return Affine(read) if name == "affine" else Additive()


def dequantization(
    shape: Sequence[int], bits: int | None, kind: str, hidden: int, context: int
) -> nn.Module | None:
    """The noise of dequantization: None for uniform noise."""
    if bits is None:
        return None
    if kind not in ("uniform", "learned"):
        raise ValueError(f"dequantize: expected uniform or learned; got {kind!r}")
    if kind == "uniform":
        return None
    net = ResNet(shape[0], 2 * shape[0], width=min(hidden, 32), context=context, zero=True)
    return LogitNormalHead(GaussianHead(net, event_ndims=3), 2**bits)


MOVED_OPTIONS = {
    "split_format": "interleaved log_std",
    "edge": False,
    "top_each": "channel",
    "low": -0.5,
    "conditioned": "all",
    "classifier": "none",
    "classifier_weight": 1.0,
}
"""Options that `glow` had in format 1, with their defaults."""


def from_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the config of a `glow` of format 1 to one of `glow` or `published_glow`."""
    options, moved = dict(config["options"]), MOVED_OPTIONS
    if config["architecture"] != "glow" or not moved.keys() & options.keys():
        return dict(config)
    if any(options.get(name, default) != default for name, default in moved.items()):
        return {**config, "architecture": "published_glow", "options": moved | options}
    return {**config, "options": {n: v for n, v in options.items() if n not in moved}}


def to_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `from_format_1`, to verify digests in files of format 1."""
    if config.get("architecture") not in ("glow", "published_glow"):
        return dict(config)
    options = MOVED_OPTIONS | config["options"]
    return {**config, "architecture": "glow", "options": options}
