"""VAEs of two hidden layers: those of bits-back's code, and pythae's with its default networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musigma.convert.weights import ForeignError, Options, Weights, is_count
from musigma.model import Model
from musigma.zoo import build

__all__ = ["BITS_BACK", "PYTHAE", "from_bits_back", "from_pythae"]

BITS_BACK = (
    r"fc(1|21|22|3|4)\.(weight|bias)",
    r"bn(1|21|22|3)\.(weight|bias|running_mean|running_var|num_batches_tracked)",
    r"prior_mean|prior_std|n",
)
PYTHAE = (
    r"encoder\.(layers\.0\.0|embedding|log_var)\.(weight|bias)",
    r"decoder\.layers\.[01]\.0\.(weight|bias)",
)


def from_bits_back(weights: Weights, options: Options) -> Model:
    """Its two VAEs of MNIST: two heads, the second a log_std; binary, or beta-binomial.

    (Townsend, Bird, Barber, "Practical lossless compression with latent variables using bits back
    coding", 2019, arXiv:1901.04866.) The batch norms of the second are as they are in evaluation,
    which is part of the linear layer before each.
    """
    hidden, latents = weights.size("fc1.weight", 0), weights.size("fc21.weight", 0)
    pixels = 28 * 28
    normed = weights.any("bn")

    def layer(name: str, norm: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        w, b = (
            weights.take(f"{name}.weight", outputs, inputs),
            weights.take(f"{name}.bias", outputs),
        )
        if not normed or not norm:
            return w, b
        weights.drop(f"{norm}.num_batches_tracked")
        gain, shift, mean, var = (
            weights.take(f"{norm}.{part}", outputs)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (var.clamp(min=0) + 1e-5).sqrt()
        return w * scale.unsqueeze(1), (b - mean) * scale + shift

    if normed:
        _constants(weights)
    per_pixel = 2 if normed else 1
    return _filled(
        weights,
        {
            "encoder.net.enter": layer("fc1", "bn1", pixels, hidden),
            "encoder.net.mean": layer("fc21", "bn21", hidden, latents),
            "encoder.net.scale": layer("fc22", "bn22", hidden, latents),
            "decoder.net.enter": layer("fc3", "bn3", latents, hidden),
            "decoder.net.leave": layer("fc4", "", hidden, per_pixel * pixels),
        },
        (1, 28, 28),
        bits=8 if normed else 1,
        hidden=hidden,
        latents=latents,
        format="two-heads log_std bounds=none",
        likelihood="beta-binomial" if normed else "bernoulli",
    )


def _constants(weights: Weights) -> None:
    """Buffers of the code that are no parameters, but must have the values that it gives them."""
    rows = weights.size("n", 0)  # the batch that its code was written for
    for name, shape, value in (
        ("prior_mean", (1,), 0.0),
        ("prior_std", (1,), 1.0),
        ("n", (rows, 28 * 28), 255.0),
    ):
        if bool((weights.take(name, *shape) != value).any()):
            weights.refuse(f"{name} is not {value:g} everywhere")


def from_pythae(weights: Weights, options: Options) -> Model:
    """A VAE or BetaVAE with the default networks: two heads, the second a log variance.

    Its `bce` is a Bernoulli of each element, which is a likelihood of binary data alone; its `mse`
    a Gaussian of standard deviation 1 around a sigmoid.
    """
    said = weights.beside("model_config.json")
    if said is None:
        raise ForeignError(
            f"{weights.path}: a pythae folder has a model_config.json, and this one lacks it"
        )
    _check_config(said, weights)
    shape, latents = tuple(said["input_dim"]), said["latent_dim"]
    binary = said["reconstruction_loss"] == "bce"
    if binary and options.bits not in (None, 1):
        raise ForeignError("bits: its loss is 'bce', a likelihood of data of 1 bit")
    d = math.prod(shape)

    def layer(name: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        return (
            weights.take(f"{name}.weight", outputs, inputs),
            weights.take(f"{name}.bias", outputs),
        )

    return _filled(
        weights,
        {
            "encoder.net.enter": layer("encoder.layers.0.0", d, 512),
            "encoder.net.mean": layer("encoder.embedding", 512, latents),
            "encoder.net.scale": layer("encoder.log_var", 512, latents),
            "decoder.net.enter": layer("decoder.layers.0.0", latents, 512),
            "decoder.net.leave": layer("decoder.layers.1.0", 512, d),
        },
        shape,
        bits=1 if binary else options.bits or 8,
        hidden=512,
        latents=latents,
        format="two-heads log_var bounds=none",
        squash=not binary,
        likelihood="bernoulli" if binary else "gaussian",
    )


def _check_config(said: Mapping[str, Any], weights: Weights) -> None:
    allowed = {
        "name": ("VAEConfig", "BetaVAEConfig"),
        "uses_default_encoder": (True,),
        "uses_default_decoder": (True,),
        "reconstruction_loss": ("mse", "bce"),
    }
    for name, values in allowed.items():
        if said.get(name) not in values:
            why = "; a custom network is a pickle, which is never run" if "uses" in name else ""
            raise ForeignError(
                f"{weights.path}: {name} in model_config.json is {said.get(name)!r}, and only "
                f"{' or '.join(map(repr, values))} can be converted{why}"
            )
    shape, latents = said.get("input_dim"), said.get("latent_dim")
    if not isinstance(shape, list) or not shape or not all(map(is_count, shape)):
        raise ForeignError(f"{weights.path}: input_dim in model_config.json is {str(shape)[:80]}")
    if not is_count(latents):
        raise ForeignError(f"{weights.path}: latent_dim in model_config.json is {latents!r}")


def _filled(
    weights: Weights,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    shape: tuple[int, ...],
    **options: Any,
) -> Model:
    weights.finish()
    model = build("mlp_vae", shape, **options).double()
    state = model.state_dict()
    prefix = "" if "encoder.net.enter.weight" in state else "prior."  # below dequantisation
    with torch.no_grad():
        for name, (weight, bias) in layers.items():
            state[f"{prefix}{name}.weight"].copy_(weight)
            state[f"{prefix}{name}.bias"].copy_(bias)
    return model
