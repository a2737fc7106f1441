"""VAEs of two hidden layers: bits-back's, PyTorch's example, pythae's default networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from musigma.convert.reading import ForeignError
from musigma.convert.weights import Family, Options, Tensors, Weights, is_count
from musigma.model import Model

__all__ = ["BITS_BACK", "PYTHAE", "PYTORCH_EXAMPLES"]


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
    weights.ignore([r"bn\d+\.num_batches_tracked"])
    layers = {
        "encoder.net.enter": ("1", pixels, hidden),
        "encoder.net.mean": ("21", hidden, latents),
        "encoder.net.scale": ("22", hidden, latents),
        "decoder.net.enter": ("3", latents, hidden),
        "decoder.net.leave": ("4", hidden, (2 if normed else 1) * pixels),
    }
    tensors: Tensors = {}
    for layer, (number, inputs, outputs) in layers.items():
        w, b = weights.linear(f"fc{number}", inputs, outputs)
        if normed and number != "4":
            norm = f"bn{number}"
            gain, shift, mean, var = (
                weights.take(f"{norm}.{part}", outputs)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            factor = gain / (var.clamp(min=0) + 1e-5).sqrt()
            w, b = w * factor.unsqueeze(1), (b - mean) * factor + shift
        tensors |= {f"{layer}.weight": w, f"{layer}.bias": b}
    if normed:
        _constants(weights)
    scale = options.format or scale
    weights.notes.append(f"format: fc22 is read as {scale} (--format for another)")
    return weights.model(
        "mlp_vae",
        shape,
        tensors,
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
    layers = {
        "encoder.net.enter": ("encoder.layers.0.0", d, 512),
        "encoder.net.mean": ("encoder.embedding", 512, latents),
        "encoder.net.scale": ("encoder.log_var", 512, latents),
        "decoder.net.enter": ("decoder.layers.0.0", latents, 512),
        "decoder.net.leave": ("decoder.layers.1.0", 512, d),
    }
    tensors: Tensors = {}
    for layer, theirs in layers.items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = weights.linear(*theirs)
    return weights.model(
        "mlp_vae",
        shape,
        tensors,
        bits=1 if binary else weights.assume("bits", options.bits, 8, "as for images in bytes"),
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


_LAYERS = r"fc(1|21|22|3|4)\.(weight|bias)"
BITS_BACK = Family(
    "a torch VAE of bits-back/bits-back",
    (
        _LAYERS,
        r"bn(1|21|22|3)\.(weight|bias|running_mean|running_var|num_batches_tracked)",
        r"prior_mean|prior_std|n",
    ),
    from_bits_back,
    ("format",),
    format="log_std",
)
PYTORCH_EXAMPLES = Family(
    "the VAE of pytorch/examples",
    (_LAYERS,),
    from_pytorch_examples,
    ("format", "size"),
    format="log_var",
)
PYTHAE = Family(
    "a pythae VAE or BetaVAE folder",
    (
        r"encoder\.(layers\.0\.0|embedding|log_var)\.(weight|bias)",
        r"decoder\.layers\.[01]\.0\.(weight|bias)",
    ),
    from_pythae,
    ("bits",),
)
