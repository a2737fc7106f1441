"""Checkpoints of github.com/openai/glow: the variables of its TensorFlow graph in an .npz file."""

from __future__ import annotations

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
    halved,
    image_channels,
    is_affine,
)
from musigma.convert.weights import Options, Weights
from musigma.model import Model
from musigma.nets import edge_bias

__all__ = ["IGNORED", "NAMES", "build"]

NAMES = (
    r"model/\d+/\d+/actnorm_(center/b|scale/logs)",
    r"model/\d+/\d+/(invconv/W|shuffle/indices|shuffle/indices_inverse)",
    r"model/\d+/\d+/f1/l_[12]/(W|actnorm_center/b|actnorm_scale/logs)",
    r"model/(\d+/\d+/f1/l_last|pool\d+/conv|prior/p)/(W|b|logs)",
    r"model/(prior/y_emb|classifier)/(W|b|logs)",
)
IGNORED = (r"Variable(_\d+)?|global_step|beta\d_power",)


def build(weights: Weights, options: Options) -> Model:
    """Its Glow: images in [-0.5, 0.5], edge biases, interleaved splits, halves at the top."""
    at = weights.numbers(r"model/(\d+)/\d+/.*")
    channels = image_channels(weights, "model/0/0/actnorm_center/b", 3)
    hidden = weights.size("model/0/0/f1/l_2/W", 3)
    affine = is_affine(weights, "model/0/0/f1/l_last/W", 3, 4 * channels)
    height, width = halved(weights, options.size, len(at))
    scale = 2 ** len(at)
    kinds = ("invconv/W", "shuffle/indices")  # or neither: a reversal
    kind = next((k for k in kinds if any(n.endswith(k) for n in weights.tensors)), None)
    levels, c = [], 4 * channels
    for i in at:
        depth = weights.numbers(rf"model/{i}/(\d+)/.*")
        steps = [_step(weights, f"model/{i}/{j}", c, hidden, affine, kind) for j in depth]
        last = i == at[-1]
        split = None if last else _zeros(weights, f"model/pool{i}/conv", c // 2, c)
        levels.append(Level(steps, split))
        c = c if last else 2 * c
    top, classifier = _top(weights, c, (height // scale, width // scale))
    shape = (channels, height, width)
    bits = weights.assume("bits", options.bits, 8, "the default of its training script")
    return assemble(weights, levels, shape, bits=bits, low=-0.5, top=top, classifier=classifier)


def _step(weights: Weights, at: str, c: int, hidden: int, affine: bool, kind: str | None) -> Step:
    bias, log_scale = _actnorm(weights, at, c)
    return Step(
        bias,
        log_scale,
        _mix(weights, at, c, kind),
        _normed(weights, f"{at}/f1/l_1", c // 2, hidden, 3),
        _normed(weights, f"{at}/f1/l_2", hidden, hidden, 1),
        _zeros(weights, f"{at}/f1/l_last", hidden, c if affine else c // 2),
    )


def _mix(weights: Weights, at: str, c: int, kind: str | None) -> dict[str, Tensor]:
    if kind is None:
        return {"order": torch.arange(c - 1, -1, -1)}
    if kind == "invconv/W":  # rows of pixels times W there, W times columns here
        weight = weights.take(f"{at}/invconv/W", c, c).T
        return checked(weights, f"{at}/invconv/W", {"weight": weight})
    order, inverse = (
        weights.take(f"{at}/shuffle/{name}", c, integer=True).long()
        for name in ("indices", "indices_inverse")
    )
    if order.sort().values.tolist() != list(range(c)) or bool((order.argsort() != inverse).any()):
        weights.refuse(
            f"{at}/shuffle/indices is no permutation, or not the inverse of indices_inverse"
        )
    return {"order": order}


def _actnorm(weights: Weights, at: str, c: int, name: str = "actnorm") -> tuple[Tensor, Tensor]:
    """Bias and log scale; the file holds a third of the latter."""
    bias = weights.take(f"{at}/{name}_center/b", 1, 1, 1, c).flatten()
    return bias, 3 * weights.take(f"{at}/{name}_scale/logs", 1, 1, 1, c).flatten()


def _kernel(weights: Weights, at: str, inputs: int, out: int, side: int) -> Conv:
    """(height, width, in, out) to (out, in, height, width); the last input is the edge bias."""
    more = 1 if side > 1 else 0
    weight = weights.take(f"{at}/W", side, side, inputs + more, out).permute(3, 2, 0, 1)
    edge = weight[:, inputs:] if more else None
    return Conv(weight[:, :inputs], torch.zeros(out, dtype=torch.float64), edge=edge)


def _normed(weights: Weights, at: str, inputs: int, out: int, side: int) -> Conv:
    return folded(_kernel(weights, at, inputs, out, side), *_actnorm(weights, at, out))


def _zeros(weights: Weights, at: str, inputs: int, out: int) -> Conv:
    kernel = _kernel(weights, at, inputs, out, 3)
    bias = weights.take(f"{at}/b", 1, 1, 1, out).flatten()
    logs = weights.take(f"{at}/logs", 1, out).reshape(out, 1, 1)
    return Conv(kernel.weight, bias, logs, kernel.edge)


def _top(
    weights: Weights, c: int, size: tuple[int, int]
) -> tuple[Top | None, tuple[Tensor, Tensor] | None]:
    raw = torch.zeros(2 * c, dtype=torch.float64)
    learned = weights.any("model/prior/p/")
    if learned:  # its input is zero: only its bias and its edge bias count
        conv = _zeros(weights, "model/prior/p", 2 * c, 2 * c)
        assert conv.edge is not None
        assert conv.logs is not None
        around = edge_bias(conv.edge, size)[0]
        raw = (around + conv.bias.reshape(-1, 1, 1)) * (3 * conv.logs).exp()
    from_context = None
    classified = weights.any("model/classifier/")
    if classified or weights.any("model/prior/y_emb/"):
        some = ("model/classifier/W", 1) if classified else ("model/prior/y_emb/W", 0)
        classes = weights.size(*some)
        from_context, bias = _linear(weights, "model/prior/y_emb", classes, 2 * c)
        raw = raw + bias.reshape(-1, *(1,) * (raw.ndim - 1))
    top = Top(raw, from_context) if learned or from_context is not None else None
    if not classified:
        return top, None
    classes = weights.size("model/classifier/W", 1)
    return top, _linear(weights, "model/classifier", c, classes)


def _linear(weights: Weights, at: str, inputs: int, out: int) -> tuple[Tensor, Tensor]:
    gain = (3 * weights.take(f"{at}/logs", 1, out)).exp().flatten()
    weight = weights.take(f"{at}/W", inputs, out).T * gain.unsqueeze(1)
    return weight, weights.take(f"{at}/b", 1, out).flatten() * gain
