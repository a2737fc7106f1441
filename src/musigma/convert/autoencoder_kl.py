"""KL autoencoders of latent diffusion: diffusers' folders both ways, CompVis's state dicts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from musigma.convert.reading import ForeignError
from musigma.convert.weights import Family, Options, Weights, holds, is_count
from musigma.files import replacing, sync, usual_rights
from musigma.model import Model
from musigma.zoo import build

__all__ = ["COMPVIS", "DIFFUSERS", "to_diffusers"]

DEFAULTS = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "up_block_types": ["UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
"""Defaults of diffusers for entries that a config.json lacks."""

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of the attention layers in earlier versions of diffusers."""

COMPVIS_NAMES = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}
"""Parts of names in diffusers, and in CompVis."""


def from_diffusers(weights: Weights, options: Options) -> Model:
    """An `AutoencoderKL`: images in [-1, 1], halves, a log variance clamped to [-30, 20]."""
    file = weights.beside("config.json")
    if file is None:
        raise ForeignError(
            f"{weights.path}: an AutoencoderKL needs the config.json that was saved beside it"
        )
    config = DEFAULTS | file

    def named(name: str) -> str:
        for new, old in OLD.items():
            if name not in weights and name.replace(new, old) in weights:
                return name.replace(new, old)
        return name

    groups, side = config["norm_num_groups"], config["sample_size"]
    sides = side if isinstance(side, list) else [side, side]
    if not (is_count(groups) and len(sides) == 2 and all(map(is_count, sides))):
        raise ForeignError(
            f"{weights.path}: norm_num_groups and sample_size in config.json: expected numbers "
            f"from 1, two or one as a size; got {groups!r:.80} and {side!r:.80}"
        )
    structure = _structure(weights, named) | {
        "groups": groups,
        "quant": weights.any("quant_conv."),
        "post_quant": weights.any("post_quant_conv."),
    }
    channels = weights.size("encoder.conv_in.weight", 1)
    for name, wanted in _config_of(structure, (channels, *sides)).items():
        if repr(config[name]) != repr(wanted) and name != "sample_size":
            raise ForeignError(
                f"{weights.path}: {name} in config.json is {config[name]!r:.80}, but only "
                f"{wanted!r} can be represented with these weights"
            )
    return _built(weights, named, (channels, *(options.size or sides)), options, structure)


def from_compvis(weights: Weights, options: Options) -> Model:
    """A KL autoencoder's state dict, by itself or in a diffusion model's checkpoint."""
    last = max(weights.numbers(r"encoder\.down\.(\d+)\..*"), default=0)

    def named(name: str) -> str:
        for there, here in COMPVIS_NAMES.items():
            name = name.replace(there, here)
        # up-blocks are numbered from the top
        return re.sub(r"\.up\.(\d+)", lambda m: f".up.{last - int(m[1])}", name)

    size = weights.assume("size", options.size, (256, 256), "as in its configurations")
    structure = _structure(weights, named) | {
        "embedded": weights.size("post_quant_conv.weight", 1),
        "groups": weights.assume("groups", options.groups, 32, "as in its code"),
    }
    shape = weights.size("encoder.conv_in.weight", 1), *size
    return _built(weights, named, shape, options, structure)


def _structure(weights: Weights, named: Callable[[str], str]) -> dict[str, Any]:
    """Options of `autoencoder_kl` that tensors show, which are `named` as in diffusers."""

    def count(prefix: str) -> int:
        parts = itertools.count()
        return next(i for i in parts if not weights.any(named(f"{prefix}.{i}.")))

    levels = range(max(1, count("encoder.down_blocks")))
    at = [f"encoder.down_blocks.{i}" for i in levels]
    return {
        "widths": [weights.size(named(f"{level}.resnets.0.conv1.weight"), 0) for level in at],
        "blocks": count(f"{at[0]}.resnets"),
        "latents": weights.size("decoder.conv_in.weight", 1),
        "attend": [i for i in levels if weights.any(named(f"{at[i]}.attentions."))],
        "attend_middle": weights.any(named("encoder.mid_block.attentions.0.")),
    }


def _built(
    weights: Weights,
    named: Callable[[str], str],
    shape: tuple[int, ...],
    options: Options,
    structure: dict[str, Any],
) -> Model:
    """The zoo's model with these weights, built once all of them have the right shape."""
    structure["bits"] = weights.assume("bits", options.bits, 8, "as for images in bytes")
    structure["std"] = weights.assume("std", options.std, 0.1, "as it has no likelihood")
    try:
        with torch.device("meta"):  # sizes alone
            wanted = build("autoencoder_kl", shape, **structure).state_dict()
    except ValueError as error:
        raise ForeignError(f"{weights.path}: cannot be represented: {error}") from error
    taken = {}
    for name, tensor in wanted.items():
        theirs, sizes = named(_diffusers_name(name)), tuple(tensor.shape)
        if theirs in weights and weights.tensors[theirs].ndim == 4 and tensor.ndim == 2:
            sizes = (*sizes, 1, 1)  # attention by 1x1 convolutions
        taken[name] = weights.take(theirs, *sizes).reshape(tensor.shape)
    return weights.model("autoencoder_kl", shape, taken, **structure)


def _diffusers_name(name: str) -> str:
    """The name in diffusers of a parameter of `autoencoder_kl`."""
    part, rest = name.removeprefix("prior.").split(".net.", 1)
    return rest if "quant_conv" in rest else f"{part}.{rest}"


def to_diffusers(model: Model, source: Mapping[str, Any], out: Path) -> None:
    """Write a folder that ``AutoencoderKL.from_pretrained`` loads.

    Args:
        model: An `autoencoder_kl`.
        source: `config` and `dtype` of the folder that the model came from, if any; a
            half-precision type is kept where it still holds every number.
        out: The folder.

    Raises:
        ValueError: If it is not an `autoencoder_kl`, or diffusers cannot represent an option.
    """
    from safetensors.torch import save_file

    if model.config.get("architecture") != "autoencoder_kl":
        raise ValueError(
            "to: diffusers' AutoencoderKL is musigma's autoencoder_kl; got "
            f"{model.config.get('architecture', 'a model composed by hand')}"
        )
    options, shape = model.config["options"], model.config["shape"]
    if options["embedded"] not in (None, options["latents"]):
        raise ValueError(
            f"embedded: diffusers cannot represent {options['embedded']} channels of z beside "
            f"{options['latents']} of the networks"
        )
    config = source.get("config") or _config_of(options, shape)
    tensors = {
        _diffusers_name(n): t.detach().cpu().contiguous() for n, t in model.state_dict().items()
    }
    dtype = getattr(torch, source.get("dtype", "float32"))
    if holds(tensors.values(), dtype):
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "diffusion_pytorch_model.safetensors"
    with replacing(weights) as draft, usual_rights(draft):
        save_file(tensors, draft, metadata={"format": "pt"})
    with replacing(out / "config.json") as draft:
        draft.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(out)


def _config_of(options: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """A config.json for a model that was not converted."""
    attend = ["Attn" * (i in options["attend"]) for i in range(len(options["widths"]))]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(options["widths"]),
        "down_block_types": [f"{attn}DownEncoderBlock2D" for attn in attend],
        "in_channels": shape[0],
        "latent_channels": options["latents"],
        "layers_per_block": options["blocks"],
        "mid_block_add_attention": options["attend_middle"],
        "norm_num_groups": options["groups"],
        "out_channels": shape[0],
        "sample_size": max(shape[1:]),
        "up_block_types": [f"{attn}UpDecoderBlock2D" for attn in attend[::-1]],
        "use_post_quant_conv": options["post_quant"],
        "use_quant_conv": options["quant"],
    }


_LAYER = r"(norm[12]|conv[12]|conv_shortcut|nin_shortcut)\.(weight|bias)"
DIFFUSERS = Family(
    "diffusers AutoencoderKL, a folder with config.json",
    (
        r"(encoder|decoder)\.(conv_in|conv_norm_out|conv_out)\.(weight|bias)",
        rf"(encoder|decoder)\.((down|up)_blocks\.\d+|mid_block)\.resnets\.\d+\.{_LAYER}",
        r"(encoder|decoder)\.(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias)",
        r"(encoder|decoder)\.((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\."
        r"(group_norm|to_[qkv]|to_out\.0|query|key|value|proj_attn)\.(weight|bias)",
        r"(post_)?quant_conv\.(weight|bias)",
    ),
    from_diffusers,
    ("size", "bits", "std"),
)
COMPVIS = Family(
    "a KL autoencoder of CompVis/latent-diffusion, or inside Stable Diffusion",
    (
        r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(weight|bias)",
        rf"(encoder|decoder)\.((down|up)\.\d+\.block\.\d+|mid\.block_[12])\.{_LAYER}",
        r"(encoder|decoder)\.(down|up)\.\d+\.(down|up)sample\.conv\.(weight|bias)",
        r"(encoder|decoder)\.((down|up)\.\d+\.attn\.\d+|mid\.attn_1)\."
        r"(norm|[qkv]|proj_out)\.(weight|bias)",
        r"(post_)?quant_conv\.(weight|bias)",
    ),
    from_compvis,
    ("size", "bits", "std", "groups"),
    (r"loss\..*",),  # the perceptual network and the discriminator
)
