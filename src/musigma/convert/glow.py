"""Assembling a Glow from foreign parts: what the converters of Glows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from musigma.convert.reading import ForeignError
from musigma.convert.weights import Weights
from musigma.gaussian import GaussianHead
from musigma.layers import ActNorm, Classifier, Coupling, InvertibleConv, Permutation, Split
from musigma.model import Chain, Model, Prior
from musigma.nets import CouplingNet, ZeroConv2d
from musigma.zoo import build

__all__ = [
    "Conv",
    "Level",
    "Step",
    "Top",
    "assemble",
    "checked",
    "folded",
    "halved",
    "image_channels",
    "is_affine",
]


@dataclass
class Conv:
    """A convolution, with the gain of a `ZeroConv2d` and the edge bias, if it has them."""

    weight: Tensor
    bias: Tensor
    logs: Tensor | None = None
    edge: Tensor | None = None


@dataclass
class Step:
    """Activation norm, mixing of channels and coupling; the rows of `leave` are interleaved."""

    bias: Tensor
    log_scale: Tensor
    mix: Mapping[str, Tensor]
    enter: Conv
    middle: Conv
    leave: Conv


@dataclass
class Level:
    """The steps at one scale, and the split prior after them (none at the top)."""

    steps: list[Step]
    split: Conv | None


@dataclass
class Top:
    """Mean and log_std of the top prior, halves (2 C) or (2 C, H, W), and their shift by class."""

    raw: Tensor
    from_context: Tensor | None = None


def folded(conv: Conv, bias: Tensor, log_scale: Tensor) -> Conv:
    """A convolution and the activation norm after it as one: exp(s) W, exp(s) (b + bias)."""
    gain = log_scale.exp()
    edge = None if conv.edge is None else conv.edge * gain.reshape(-1, 1, 1, 1)
    return Conv(conv.weight * gain.reshape(-1, 1, 1, 1), (conv.bias + bias) * gain, edge=edge)


def image_channels(weights: Weights, name: str, axis: int) -> int:
    """The images' channels: a fourth of those of the first activation norm, after a squeeze."""
    squeezed = weights.size(name, axis)
    if squeezed % 4:
        raise ForeignError(
            f"{weights.path}: {name} has {squeezed} channels, which is not a multiple of 4"
        )
    return squeezed // 4


def is_affine(weights: Weights, name: str, axis: int, c: int) -> bool:
    """Whether a coupling is affine: its last convolution emits c channels; additive ones c / 2."""
    rows = weights.size(name, axis)
    if rows not in (c, c // 2):
        weights.refuse(f"{name} emits {rows} channels, not {c} or {c // 2}")
    return rows != c // 2


def halved(weights: Weights, size: tuple[int, int] | None, times: int) -> tuple[int, int]:
    """The size of the images, which must be given and divisible by two so many times."""
    if size is None:
        raise ForeignError(f"{weights.path}: does not hold the image size; give it (--size 64)")
    if size[0] % 2**times or size[1] % 2**times:
        raise ForeignError(f"size: {size[0]}x{size[1]} cannot be halved {times} times")
    return size


def checked(weights: Weights, at: str, mix: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mixing of channels, checked: it must be invertible, its permutation a permutation."""
    if "weight" in mix:
        stretch = torch.linalg.svdvals(mix["weight"].nan_to_num())
        if not bool(stretch[-1] > 1e-12 * stretch[0]):
            weights.refuse(f"{at} holds a singular matrix")
    if "sign" in mix and bool((mix["sign"].abs() != 1).any()):
        weights.refuse(f"{at} holds signs that are not 1 or -1")
    if "permutation" in mix:
        p = mix["permutation"]
        ones = ((p == 0) | (p == 1)).all() & (p.sum(0) == 1).all() & (p.sum(1) == 1).all()
        if not bool(ones):
            weights.refuse(f"{at} holds something other than a permutation")
    return mix


def assemble(
    weights: Weights,
    levels: Sequence[Level],
    shape: tuple[int, int, int],
    *,
    bits: int,
    low: float,
    top: Top | None = None,
    classifier: tuple[Tensor, Tensor] | None = None,
    labels: Literal["softmax", "sigmoid"] = "softmax",
    classifier_weight: float = 1.0,
) -> Model:
    """The `published_glow` with these parts, in float64.

    Args:
        weights: Where the parts were taken from.
        levels: From the data upwards.
        shape: (C, H, W) of the images.
        bits: Bits of each element.
        low: Lower end of the range of width 1 that images were brought to.
        top: None for N(0, I).
        classifier: Weight and bias, or None.
        labels: Of the classifier: `softmax` for one each, `sigmoid` for several.
        classifier_weight: Weight of its term in training.

    Raises:
        ForeignError: By `Weights.finish`, before anything is built.
    """
    depths = [len(level.steps) for level in levels]
    if len(set(depths)) != 1:
        weights.refuse(f"the scales have {depths} steps, where all need the same number")
    weights.finish()
    first = levels[0].steps[0]
    convs = [c for level in levels for s in level.steps for c in (s.enter, s.middle, s.leave)]
    convs += [level.split for level in levels if level.split is not None]
    kind = "lu" if "lower" in first.mix else "conv" if "weight" in first.mix else "reverse"
    per_pixel = top is not None and top.raw.ndim > 1
    context = 0 if top is None or top.from_context is None else top.from_context.shape[1]
    model = build(
        "published_glow",
        shape,
        bits=bits,
        levels=len(levels),
        depth=len(levels[0].steps),
        hidden=len(first.middle.bias),
        coupling="affine" if len(first.leave.bias) == len(first.bias) else "additive",
        format="interleaved sigmoid+2 bounds=none",
        split_format="interleaved log_std bounds=none",
        permutation=kind,
        edge=any(conv.edge is not None for conv in convs),
        learn_top=top is not None,
        top_each="pixel" if per_pixel else "channel",
        low=low,
        classifier="none" if classifier is None else labels,
        classifier_weight=classifier_weight,
        context=context,
    ).double()
    assert isinstance(model, Chain)
    assert isinstance(model.prior, Prior)
    steps = iter([step for level in levels for step in level.steps])
    splits = iter([level.split for level in levels if level.split is not None])
    step = first
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, ActNorm):
                step = next(steps)
                layer.bias.copy_(step.bias)
                layer.log_scale.copy_(step.log_scale)
                layer.calibrated.fill_(True)
            elif isinstance(layer, (InvertibleConv, Permutation)):
                for name, tensor in step.mix.items():
                    _copy(layer, name, tensor)
            elif isinstance(layer, Coupling):
                assert isinstance(layer.net, CouplingNet)
                _fill(layer.net.enter, step.enter)
                _fill(layer.net.mix, step.middle)
                _fill(layer.net.leave, step.leave)
            elif isinstance(layer, Split):
                assert isinstance(layer.prior, GaussianHead)
                _fill(layer.prior.net, next(splits))
            elif isinstance(layer, Classifier) and classifier is not None:
                layer.linear.weight.copy_(classifier[0])
                layer.linear.bias.copy_(classifier[1])
        if top is not None:
            _copy(model.prior.head, "raw", top.raw)
            if top.from_context is not None:
                _copy(model.prior.head, "from_context.weight", top.from_context)
    return model


def _copy(module: nn.Module, name: str, tensor: Tensor) -> None:
    module.state_dict()[name].copy_(tensor)


def _fill(module: nn.Module, conv: Conv | None) -> None:
    assert conv is not None
    if isinstance(module, ZeroConv2d):
        assert conv.logs is not None
        module.logs.copy_(conv.logs.reshape(-1, 1, 1))
        module = module.conv
    for name in ("weight", "bias", "edge"):
        tensor = getattr(conv, name)
        if tensor is not None:
            _copy(module, name, tensor)
