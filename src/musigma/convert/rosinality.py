"""Checkpoints of github.com/rosinality/glow-pytorch."""

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
    halved,
    image_channels,
    is_affine,
)
from musigma.convert.weights import Options, Weights
from musigma.gaussian import Format
from musigma.model import Model
from musigma.nets import edge_bias

__all__ = ["NAMES", "build"]

NAMES = (
    r"blocks\.\d+\.flows\.\d+\.actnorm\.(loc|scale|initialized)",
    r"blocks\.\d+\.flows\.\d+\.invconv\.(weight|w_[plsu]|[ul]_mask|s_sign|l_eye)",
    r"blocks\.\d+\.flows\.\d+\.coupling\.net\.[02]\.(weight|bias)",
    r"blocks\.\d+\.(flows\.\d+\.coupling\.net\.4|prior)\.(scale|conv\.(weight|bias))",
)

COUPLING = Format("halves", "scale-first")
PRIOR, OURS = Format("halves"), Format("interleaved")


def build(weights: Weights, options: Options) -> Model:
    """Its Glow: images in [-0.5, 0.5], halves everywhere, the scale first in couplings.

    Its last convolutions pad with ones: an edge bias, summed over the input channels. Its scales
    may be negative: the sign moves into the 1x1 convolution that follows.
    """
    blocks = weights.numbers(r"blocks\.(\d+)\..*")
    first = "blocks.0.flows.0"
    channels = image_channels(weights, f"{first}.actnorm.loc", 1)
    hidden = weights.size(f"{first}.coupling.net.2.weight", 0)
    affine = is_affine(weights, f"{first}.coupling.net.4.conv.weight", 0, 4 * channels)
    height, width = halved(weights, options.size, len(blocks))
    scale = 2 ** len(blocks)
    as_plain = any(
        n.endswith("invconv.weight") for n in weights.tensors
    )  # the last block never is
    levels, c, top = [], 4 * channels, None
    for b in blocks:
        flows = weights.numbers(rf"blocks\.{b}\.flows\.(\d+)\..*")
        plain = as_plain and b != blocks[-1]
        steps = [
            _step(weights, f"blocks.{b}.flows.{k}", c, hidden, affine, (plain, as_plain))
            for k in flows
        ]
        last = b == blocks[-1]
        inputs, out = (c, 2 * c) if last else (c // 2, c)
        prior = _zeros(weights, f"blocks.{b}.prior", inputs, out)
        levels.append(Level(steps, None if last else _relaid(prior, PRIOR)))
        if last:  # its input is zero, padded with ones
            assert prior.edge is not None
            assert prior.logs is not None
            around = edge_bias(prior.edge, (height // scale, width // scale))[0]
            raw = (around + prior.bias.reshape(-1, 1, 1)) * (3 * prior.logs).exp()
            top = Top(raw)
        c = 2 * c
    shape = (channels, height, width)
    bits = weights.assume("bits", options.bits, 5, "the default of its training script")
    return assemble(weights, levels, shape, bits=bits, low=-0.5, top=top)


def _step(
    weights: Weights, at: str, c: int, hidden: int, affine: bool, plain: tuple[bool, bool]
) -> Step:
    scale = weights.take(f"{at}.actnorm.scale", 1, c, 1, 1).flatten()
    if bool((scale == 0).any()):
        weights.refuse(f"{at}.actnorm.scale holds a zero, which has no inverse")
        scale = scale + (scale == 0)
    if not bool(weights.take(f"{at}.actnorm.initialized", integer=True)):
        weights.refuse(f"{at}.actnorm.initialized is 0: the model was never initialised")
    last = _zeros(weights, f"{at}.coupling.net.4", hidden, c if affine else c // 2)
    mix = _mix(weights, f"{at}.invconv", c, scale.sign(), *plain)
    return Step(
        weights.take(f"{at}.actnorm.loc", 1, c, 1, 1).flatten(),
        scale.abs().log(),
        checked(weights, f"{at}.invconv", mix),
        _conv(weights, f"{at}.coupling.net.0", hidden, c // 2, 3),
        _conv(weights, f"{at}.coupling.net.2", hidden, hidden, 1),
        _relaid(last, COUPLING) if affine else last,
    )


def _mix(
    weights: Weights, at: str, c: int, sign: Tensor, plain: bool, as_plain: bool
) -> dict[str, Tensor]:
    """The 1x1 convolution of inputs with these signs, which multiply its columns."""
    if plain:
        return {"weight": weights.take(f"{at}.weight", c, c, 1, 1).flatten(1) * sign}
    for name, constant in (
        ("u_mask", torch.ones(c, c).triu(1)),
        ("l_mask", torch.ones(c, c).tril(-1)),
        ("l_eye", torch.eye(c)),
    ):
        if bool((weights.take(f"{at}.{name}", c, c) != constant).any()):
            weights.refuse(f"{at}.{name} is not the constant of its code")
    factors = {
        "permutation": weights.take(f"{at}.w_p", c, c),
        "sign": weights.take(f"{at}.s_sign", c) * sign,
        "lower": weights.take(f"{at}.w_l", c, c).tril(-1),
        "upper": weights.take(f"{at}.w_u", c, c).triu(1) * sign,
        "log_scale": weights.take(f"{at}.w_s", c),
    }
    if not as_plain:
        return factors
    diagonal = torch.diag(factors["sign"] * factors["log_scale"].exp())
    lower = factors["lower"] + torch.eye(c, dtype=torch.float64)
    return {"weight": factors["permutation"] @ lower @ (factors["upper"] + diagonal)}


def _conv(weights: Weights, at: str, out: int, inputs: int, side: int) -> Conv:
    return Conv(
        weights.take(f"{at}.weight", out, inputs, side, side), weights.take(f"{at}.bias", out)
    )


def _zeros(weights: Weights, at: str, inputs: int, out: int) -> Conv:
    conv = _conv(weights, f"{at}.conv", out, inputs, 3)
    logs = weights.take(f"{at}.scale", 1, out, 1, 1).reshape(out, 1, 1)
    return Conv(conv.weight, conv.bias, logs, conv.weight.sum(1, keepdim=True))


def _relaid(conv: Conv, layout: Format) -> Conv:
    """The convolution with its rows interleaved, the mean or shift first."""

    def relaid(rows: Tensor) -> Tensor:
        again = layout.relayout(rows, OURS)
        assert isinstance(again, Tensor)
        return again

    assert conv.logs is not None
    assert conv.edge is not None
    return Conv(*map(relaid, (conv.weight, conv.bias, conv.logs, conv.edge)))
