"""Checkpoints of github.com/chaiyujin/glow-pytorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musigma.foreign.glow import Conv, Level, Step, Top, assemble, folded
from musigma.foreign.weights import ForeignError, Options, Weights
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
    said = _hparams(weights)
    runs = [[at[0]]]
    for before, here in itertools.pairwise(at):
        if here == before + 1:
            runs[-1].append(here)
        else:
            runs.append([here])
    channels = weights.size(f"flow.layers.{at[0]}.actnorm.bias", 1) // 4
    scale = 2 ** len(runs)
    batch, twice, height, width = (weights.size("prior_h", axis) for axis in range(4))
    if bool((weights.take("prior_h", batch, twice, height, width) != 0).any()):
        weights.refuse("prior_h is not zero, as its code demands")
    orders = _orders(weights, at, said, options)
    levels, c = [], 4 * channels
    for run in runs:
        steps = [_step(weights, i, c, orders.get(i)) for i in run]
        last = run is runs[-1]
        split = None if last else _zeros(weights, f"flow.layers.{run[-1] + 1}.conv", c // 2, c)
        levels.append(Level(steps, split))
        c = c if last else 2 * c
    top, classifier = _top(weights, c)
    sigmoid = said.get("Criterion", {}).get("y_condition") == "multi-classes"
    pixels, weight = height * width * scale**2, said.get("Train", {}).get("weight_y", 0.5)
    classes = 1 if classifier is None else len(classifier[1])
    return assemble(
        levels,
        (channels, height * scale, width * scale),
        bits=options.bits or 8,
        low=0.0,
        top=top,
        classifier=classifier,
        labels="sigmoid" if sigmoid else "softmax",
        # there in nats of one class, for each bit of a pixel of all channels
        classifier_weight=weight * math.log(2) * pixels / (classes if sigmoid else 1),
    )


def _hparams(weights: Weights) -> dict[str, Any]:
    """The settings file beside the checkpoint, if there is one."""
    return next((c for c in weights.config.values() if isinstance(c.get("Glow"), dict)), {})


def _orders(
    weights: Weights, at: Sequence[int], said: Mapping[str, Any], options: Options
) -> dict[int, Tensor]:
    """The order of the channels in every step that has no 1x1 convolution."""
    bare = [
        i
        for i in at
        if not any(f"flow.layers.{i}.invconv.{name}" in weights for name in ("weight", "l"))
    ]
    if not bare:
        return {}
    lengths = [weights.size(f"flow.layers.{i}.actnorm.bias", 1) for i in bare]
    kind = options.permutation or said.get("Glow", {}).get("flow_permutation")
    if kind == "reverse":
        return {i: torch.arange(c - 1, -1, -1) for i, c in zip(bare, lengths, strict=True)}
    if kind is None or isinstance(kind, str):
        raise ForeignError(
            f"{weights.path}: flow.layers.{bare[0]}.invconv is missing, so the permutation was "
            "'reverse' or 'shuffle', and its checkpoints do not hold the order of a shuffle: say "
            "--permutation reverse if it was that, or name a .json file with the order "
            f"(`indices`) of each of the {len(bare)} steps; got {kind!r}"
        )
    if [sorted(order) for order in kind] != [list(range(c)) for c in lengths]:
        raise ForeignError(f"permutation: expected {len(bare)} orders, of {lengths} channels")
    return {i: torch.tensor(list(order)) for i, order in zip(bare, kind, strict=True)}


def _step(weights: Weights, i: int, c: int, order: Tensor | None) -> Step:
    at = f"flow.layers.{i}"
    hidden = weights.size(f"{at}.f.2.weight", 0)
    out = weights.size(f"{at}.f.4.weight", 0)
    if out not in (c, c // 2):
        weights.refuse(f"{at}.f.4.weight emits {out} channels, and not {c} or {c // 2}")
        out = c
    return Step(
        weights.take(f"{at}.actnorm.bias", 1, c, 1, 1).flatten(),
        weights.take(f"{at}.actnorm.logs", 1, c, 1, 1).flatten(),
        _mix(weights, f"{at}.invconv", c) if order is None else {"order": order},
        _normed(weights, f"{at}.f.0", hidden, c // 2, 3),
        _normed(weights, f"{at}.f.2", hidden, hidden, 1),
        _zeros(weights, f"{at}.f.4", hidden, out),
    )


def _mix(weights: Weights, at: str, c: int) -> dict[str, Tensor]:
    if f"{at}.weight" in weights:
        return {"weight": weights.take(f"{at}.weight", c, c)}
    return {
        "permutation": weights.take(f"{at}.p", c, c),
        "sign": weights.take(f"{at}.sign_s", c),
        "lower": weights.take(f"{at}.l", c, c).tril(-1),
        "upper": weights.take(f"{at}.u", c, c).triu(1),
        "log_scale": weights.take(f"{at}.log_s", c),
    }


def _normed(weights: Weights, at: str, out: int, inputs: int, side: int) -> Conv:
    """A convolution without a bias, and the activation norm in its place."""
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
    learned = "learn_top.weight" in weights
    if learned:  # of zeros, with zeros around: nothing but its bias is seen
        conv = _zeros(weights, "learn_top", 2 * c, 2 * c)
        assert conv.logs is not None
        raw = conv.bias * (3 * conv.logs).exp().flatten()
    if "project_ycond.weight" not in weights:
        return Top(raw) if learned else None, None
    classes = weights.size("project_ycond.weight", 1)
    weight, bias = _linear(weights, "project_ycond", classes, 2 * c)
    return Top(raw + bias, weight), _linear(weights, "project_class", c, classes)


def _linear(weights: Weights, at: str, inputs: int, out: int) -> tuple[Tensor, Tensor]:
    gain = (3 * weights.take(f"{at}.logs", out)).exp()
    weight = weights.take(f"{at}.weight", out, inputs) * gain.unsqueeze(1)
    return weight, weights.take(f"{at}.bias", out) * gain
