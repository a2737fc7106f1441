"""Checkpoints of github.com/chaiyujin/glow-pytorch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musigma.convert.glow import (
    Conv,
    Level,
    Step,
    Top,
    assemble,
    checked,
    folded,
    image_channels,
    is_affine,
)
from musigma.convert.reading import ForeignError, read_json
from musigma.convert.weights import Options, Weights
from musigma.model import Model

__all__ = ["NAMES", "build"]

NAMES = (
    "prior_h",
    r"flow\.layers\.\d+\.actnorm\.(bias|logs)",
    r"flow\.layers\.\d+\.invconv\.(weight|p|sign_s|l|log_s|u)",
    r"flow\.layers\.\d+\.f\.[02]\.(weight|actnorm\.(bias|logs))",
    r"flow\.layers\.\d+\.(f\.4|conv)\.(weight|bias|logs)",
    r"(learn_top|project_ycond|project_class)\.(weight|bias|logs)",
)


def build(weights: Weights, options: Options) -> Model:
    """Its Glow: images in [0, 1], interleaved split priors, halves at the top."""
    at = weights.numbers(r"flow\.layers\.(\d+)\.(?:actnorm|invconv|f)\..*")
    if not at:
        raise ForeignError(f"{weights.path}: flow.layers.1.actnorm.bias is missing")
    settings = _settings(weights)
    runs = [[at[0]]]
    for before, here in itertools.pairwise(at):
        if here == before + 1:
            runs[-1].append(here)
        else:
            runs.append([here])
    first = f"flow.layers.{at[0]}"
    channels = image_channels(weights, f"{first}.actnorm.bias", 1)
    hidden = weights.size(f"{first}.f.2.weight", 0)
    affine = is_affine(weights, f"{first}.f.4.weight", 0, 4 * channels)
    scale = 2 ** len(runs)
    batch, twice, height, width = (weights.size("prior_h", axis) for axis in range(4))
    if bool((weights.take("prior_h", batch, twice, height, width) != 0).any()):
        weights.refuse("prior_h is not zero, as its code sets it")
    c = 4 * channels
    mixes = _mixes(
        weights,
        [(i, c * 2**level) for level, run in enumerate(runs) for i in run],
        settings,
        options,
    )
    levels = []
    for run in runs:
        steps = [_step(weights, i, c, hidden, affine, mixes[i]) for i in run]
        last = run is runs[-1]
        split = None if last else _zeros(weights, f"flow.layers.{run[-1] + 1}.conv", c // 2, c)
        levels.append(Level(steps, split))
        c = c if last else 2 * c
    top, classifier = _top(weights, c)
    pixels = height * width * scale**2
    about_classes = {} if classifier is None else _classes(weights, settings, options, pixels)
    return assemble(
        weights,
        levels,
        (channels, height * scale, width * scale),
        bits=weights.assume("bits", options.bits, 8, "as in its code"),
        low=0.0,
        top=top,
        classifier=classifier,
        **about_classes,
    )


def _settings(weights: Weights) -> Mapping[str, Any]:
    """The settings that its trainer saves beside the checkpoints, or in the folder above."""
    folder = weights.path.resolve().parent
    for path in sorted([*folder.glob("*.json"), *folder.parent.glob("*.json")]):
        with contextlib.suppress(ForeignError):  # other files may lie there
            found = read_json(path) or {}
            if isinstance(found.get("Glow"), dict):
                return found
    return {}


def _entry(settings: Mapping[str, Any], section: str, name: str) -> Any:
    inside = settings.get(section)
    return inside.get(name) if isinstance(inside, dict) else None


def _classes(
    weights: Weights, settings: Mapping[str, Any], options: Options, pixels: int
) -> dict[str, Any]:
    """What the classifier's labels are, and its weight in nats for each nat of log p(x)."""
    kinds = {"multi-classes": "sigmoid", "single-class": "softmax"}
    labels = options.labels or kinds.get(str(_entry(settings, "Criterion", "y_condition")))
    if labels is None:
        raise ForeignError(
            f"{weights.path}: project_class predicts one label or several, and the file does "
            "not say which: give --labels softmax or sigmoid, or put the training's settings "
            "(.json) beside it"
        )
    weight = _entry(settings, "Train", "weight_y")
    if not (isinstance(weight, (int, float)) and 0 <= weight < 1e6):
        weight = 0.5
    # there: nats of a class (their mean over several) for each bit of a pixel of all channels
    mean_over = weights.size("project_class.weight", 0) if labels == "sigmoid" else 1
    return {"labels": labels, "classifier_weight": weight * math.log(2) * pixels / mean_over}


def _mixes(
    weights: Weights,
    steps: Sequence[tuple[int, int]],
    settings: Mapping[str, Any],
    options: Options,
) -> dict[int, dict[str, Tensor]]:
    """How each step, given as (number, channels), mixes its channels: all in the same way."""
    names = {i: f"flow.layers.{i}.invconv" for i, _ in steps}
    if any(f"{at}.weight" in weights for at in names.values()):
        return {
            i: checked(weights, names[i], {"weight": weights.take(f"{names[i]}.weight", c, c)})
            for i, c in steps
        }
    if any(f"{at}.l" in weights for at in names.values()):
        return {i: checked(weights, names[i], _lu(weights, names[i], c)) for i, c in steps}
    kind = options.permutation or _entry(settings, "Glow", "flow_permutation")
    if kind == "reverse":
        return {i: {"order": torch.arange(c - 1, -1, -1)} for i, c in steps}
    if kind is None or isinstance(kind, str):
        raise ForeignError(
            f"{weights.path}: {names[steps[0][0]]} is missing, so the permutation was 'reverse' "
            "or 'shuffle', and checkpoints do not hold the order of a shuffle: give "
            "--permutation reverse, or a .json file with the order (`indices`) of each of the "
            f"{len(steps)} steps; got {kind!r}"
        )
    orders = options.permutation
    lengths = [c for _, c in steps]
    if orders is None or [sorted(order) for order in orders] != [list(range(c)) for c in lengths]:
        raise ForeignError(f"permutation: expected {len(steps)} orders of {lengths} channels")
    return {i: {"order": torch.tensor(list(o))} for (i, _), o in zip(steps, orders, strict=True)}


def _lu(weights: Weights, at: str, c: int) -> dict[str, Tensor]:
    return {
        "permutation": weights.take(f"{at}.p", c, c),
        "sign": weights.take(f"{at}.sign_s", c),
        "lower": weights.take(f"{at}.l", c, c).tril(-1),
        "upper": weights.take(f"{at}.u", c, c).triu(1),
        "log_scale": weights.take(f"{at}.log_s", c),
    }


def _step(
    weights: Weights, i: int, c: int, hidden: int, affine: bool, mix: dict[str, Tensor]
) -> Step:
    at = f"flow.layers.{i}"
    return Step(
        weights.take(f"{at}.actnorm.bias", 1, c, 1, 1).flatten(),
        weights.take(f"{at}.actnorm.logs", 1, c, 1, 1).flatten(),
        mix,
        _normed(weights, f"{at}.f.0", hidden, c // 2, 3),
        _normed(weights, f"{at}.f.2", hidden, hidden, 1),
        _zeros(weights, f"{at}.f.4", hidden, c if affine else c // 2),
    )


def _normed(weights: Weights, at: str, out: int, inputs: int, side: int) -> Conv:
    """A convolution with an activation norm in place of its bias."""
    weight = weights.take(f"{at}.weight", out, inputs, side, side)
    bias, logs = (
        weights.take(f"{at}.actnorm.{n}", 1, out, 1, 1).flatten() for n in ("bias", "logs")
    )
    return folded(Conv(weight, torch.zeros_like(bias)), bias, logs)


def _zeros(weights: Weights, at: str, inputs: int, out: int) -> Conv:
    return Conv(
        weights.take(f"{at}.weight", out, inputs, 3, 3),
        weights.take(f"{at}.bias", out),
        weights.take(f"{at}.logs", out, 1, 1),
    )


def _top(weights: Weights, c: int) -> tuple[Top | None, tuple[Tensor, Tensor] | None]:
    raw = torch.zeros(2 * c, dtype=torch.float64)
    learned = weights.any("learn_top.")
    if learned:  # its input is zero, padded with zeros: only its bias counts
        conv = _zeros(weights, "learn_top", 2 * c, 2 * c)
        assert conv.logs is not None
        raw = conv.bias * (3 * conv.logs).exp().flatten()
    if not weights.any("project_"):
        return Top(raw) if learned else None, None
    classes = weights.size("project_ycond.weight", 1)
    weight, bias = _linear(weights, "project_ycond", classes, 2 * c)
    return Top(raw + bias, weight), _linear(weights, "project_class", c, classes)


def _linear(weights: Weights, at: str, inputs: int, out: int) -> tuple[Tensor, Tensor]:
    gain = (3 * weights.take(f"{at}.logs", out)).exp()
    weight = weights.take(f"{at}.weight", out, inputs) * gain.unsqueeze(1)
    return weight, weights.take(f"{at}.bias", out) * gain
