"""Glow with the options of published code: the architecture that `musigma.convert` builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from musigma.distributions import LearnedNormal, StandardNormal
from musigma.gaussian import Format
from musigma.layers import Classifier
from musigma.model import Chain, Prior
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import coupling_map, dequantized, multiscale, split, steps


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
    map, layers = coupling_map(coupling, format), []
    inner = context if conditioned == "all" else 0
    if bits is not None:
        layers = dequantized(shape, bits, dequantize, alpha, low, hidden, inner)
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
