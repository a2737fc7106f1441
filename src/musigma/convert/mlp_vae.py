"""VAEs of two hidden layers: bits-back's, PyTorch's example, pythae's default networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musigma.convert.reading import ForeignError
from musigma.convert.weights import Options, Weights, is_count
from musigma.model import Model
from musigma.zoo import build

__all__ = [
    "BITS_BACK",
    "PYTHAE",
    "PYTORCH_EXAMPLES",
    "from_bits_back",
    "from_pythae",
    "from_pytorch_examples",
]

PYTORCH_EXAMPLES = (r"fc(1|21|22|3|4)\.(weight|bias)",)
BITS_BACK = (
    *PYTORCH_EXAMPLES,
    r"bn(1|21|22|3)\.(weight|bias|running_mean|running_var|num_batches_tracked)",
    r"prior_mean|prior_std|n",
)
PYTHAE = (
    r"encoder\.(layers\.0\.0|embedding|log_var)\.(weight|bias)",
    r"decoder\.layers\.[01]\.0\.(weight|bias)",
)


def from_pytorch_examples(weights: Weights, options: Options) -> Model:
    """The VAE of github.com/pytorch/examples: two heads, the second a log variance.

    Its likelihood is binary cross-entropy, so a Bernoulli of each pixel.
    """
    pixels = weights.size("fc1.weight", 1)
    if options.size is None and pixels != 28 * 28:
        raise ForeignError(
            f"{weights.path}: fc1.weight takes {pixels} numbers; give the images' size (--size)"
        )
    height, width = options.size or (28, 28)
    if pixels % (height * width):
        raise ForeignError(
            f"size: fc1.weight takes {pixels} numbers, not images of {height}x{width}"
        )
    return _fc_vae(weights, options, (pixels // (height * width), height, width), "log_var")


def from_bits_back(weights: Weights, options: Options) -> Model:
    """The two VAEs of MNIST of bits-back: two heads, the second a log_std.

    (Townsend, Bird, Barber, "Practical lossless compression with latent variables using bits back
    coding", 2019, arXiv:1901.04866.) One is binary, the other beta-binomial, with batch norms,
    which are folded, as they are in evaluation, into the linear layer before each.
    """
    return _fc_vae(weights, options, (1, 28, 28), "log_std")


def _fc_vae(weights: Weights, options: Options, shape: tuple[int, int, int], scale: str) -> Model:
    """The layers fc1, fc21, fc22, fc3 and fc4, with batch norms if there are any."""
    hidden, latents = weights.size("fc1.weight", 0), weights.size("fc21.weight", 0)
    normed, pixels = weights.any("bn"), math.prod(shape)

    def layer(name: str, norm: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        w, b = weights.linear(name, inputs, outputs)
        if not normed or not norm:
            return w, b
        weights.drop(f"{norm}.num_batches_tracked")
        gain, shift, mean, var = (
            weights.take(f"{norm}.{part}", outputs)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / (var.clamp(min=0) + 1e-5).sqrt()
        return w * factor.unsqueeze(1), (b - mean) * factor + shift

    if normed:
        _constants(weights)
    scale = options.format or scale
    weights.notes.append(f"format: fc22 is read as {scale} (--format for another)")
    return _filled(
        weights,
        {
            "encoder.net.enter": layer("fc1", "bn1", pixels, hidden),
            "encoder.net.mean": layer("fc21", "bn21", hidden, latents),
            "encoder.net.scale": layer("fc22", "bn22", hidden, latents),
            "decoder.net.enter": layer("fc3", "bn3", latents, hidden),
            "decoder.net.leave": layer("fc4", "", hidden, (2 if normed else 1) * pixels),
        },
        shape,
        bits=8 if normed else 1,
        hidden=hidden,
        latents=latents,
        format=f"two-heads {scale}" + ("" if "bounds=" in scale else " bounds=none"),
        likelihood="beta-binomial" if normed else "bernoulli",
    )


def _constants(weights: Weights) -> None:
    """Check buffers that are not parameters, but must have the values that the code gives them."""
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

    Its `bce` is a Bernoulli of each element, a likelihood of binary data only; its `mse` is a
    Gaussian of standard deviation 1 around a sigmoid.
    """
    config = weights.beside("model_config.json")
    if config is None:
        raise ForeignError(
            f"{weights.path}: a pythae folder has a model_config.json, and this one lacks it"
        )
    _check_config(config, weights)
    shape, latents = tuple(config["input_dim"]), config["latent_dim"]
    binary = config["reconstruction_loss"] == "bce"
    if binary and options.bits not in (None, 1):
        raise ForeignError(
            f"bits: its loss is 'bce', a likelihood of data of 1 bit; got {options.bits}"
        )
    d = math.prod(shape)

    return _filled(
        weights,
        {
            "encoder.net.enter": weights.linear("encoder.layers.0.0", d, 512),
            "encoder.net.mean": weights.linear("encoder.embedding", 512, latents),
            "encoder.net.scale": weights.linear("encoder.log_var", 512, latents),
            "decoder.net.enter": weights.linear("decoder.layers.0.0", latents, 512),
            "decoder.net.leave": weights.linear("decoder.layers.1.0", 512, d),
        },
        shape,
        bits=1 if binary else weights.assume("bits", options.bits, 8, "as of images in bytes"),
        hidden=512,
        latents=latents,
        format="two-heads log_var bounds=none",
        squash=not binary,
        likelihood="bernoulli" if binary else "gaussian",
    )


def _check_config(config: Mapping[str, Any], weights: Weights) -> None:
    allowed = {
        "name": ("VAEConfig", "BetaVAEConfig"),
        "uses_default_encoder": (True,),
        "uses_default_decoder": (True,),
        "reconstruction_loss": ("mse", "bce"),
    }
    for name, values in allowed.items():
        if config.get(name) not in values:
            why = "; a custom network is a pickle, which is never run" if "uses" in name else ""
            raise ForeignError(
                f"{weights.path}: {name} in model_config.json is {config.get(name)!r}, and only "
                f"{' or '.join(map(repr, values))} can be converted{why}"
            )
    shape, latents = config.get("input_dim"), config.get("latent_dim")
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
