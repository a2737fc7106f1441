"""KL autoencoders of latent diffusion: diffusers' folders both ways, CompVis's state dicts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from musigma.convert.reading import ForeignError
from musigma.convert.weights import Options, Weights, holds, is_count
from musigma.files import replacing, sync, usual_rights
from musigma.model import Model
from musigma.zoo import build

__all__ = [
    "COMPVIS",
    "COMPVIS_IGNORED",
    "DIFFUSERS",
    "from_compvis",
    "from_diffusers",
    "to_diffusers",
]

_LAYER = r"(norm[12]|conv[12]|conv_shortcut|nin_shortcut)\.(weight|bias)"
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

DIFFUSERS = (
    r"(encoder|decoder)\.(conv_in|conv_norm_out|conv_out)\.(weight|bias)",
    rf"(encoder|decoder)\.((down|up)_blocks\.\d+|mid_block)\.resnets\.\d+\.{_LAYER}",
    r"(encoder|decoder)\.(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias)",
    r"(encoder|decoder)\.((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\."
    r"(group_norm|to_[qkv]|to_out\.0|query|key|value|proj_attn)\.(weight|bias)",
    r"(post_)?quant_conv\.(weight|bias)",
)
COMPVIS = (
    r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(weight|bias)",
    rf"(encoder|decoder)\.((down|up)\.\d+\.block\.\d+|mid\.block_[12])\.{_LAYER}",
    r"(encoder|decoder)\.(down|up)\.\d+\.(down|up)sample\.conv\.(weight|bias)",
    r"(encoder|decoder)\.((down|up)\.\d+\.attn\.\d+|mid\.attn_1)\.(norm|[qkv]|proj_out)\.(weight|bias)",
    r"(post_)?quant_conv\.(weight|bias)",
)
COMPVIS_IGNORED = (r"loss\..*",)  # the perceptual network and the discriminator

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""The defaults of diffusers for entries that a config.json lacks."""


def from_diffusers(weights: Weights, options: Options) -> Model:
    """An `AutoencoderKL`: images in [-1, 1], halves, a log variance clamped to [-30, 20]."""
    file = weights.beside("config.json")
    if file is None:
        raise ForeignError(
            f"{weights.path}: an AutoencoderKL needs the config.json that was saved beside it"
        )
    if file.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ForeignError(
            f"{weights.path}: _class_name is {file['_class_name']!r}; only AutoencoderKL is known"
        )
    config = _validated(weights, DEFAULTS | file)
    widths = list(config["block_out_channels"])
    blocks = weights.numbers(r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*")
    if config["layers_per_block"] != len(blocks):
        raise ForeignError(
            f"{weights.path}: layers_per_block in config.json is {config['layers_per_block']}, "
            f"and encoder.down_blocks.0 has {len(blocks)}"
        )
    attend = _attention_levels(weights, config, len(widths))
    for name, wanted in (("act_fn", "silu"), ("out_channels", config["in_channels"])):
        if config[name] != wanted:
            raise ForeignError(
                f"{weights.path}: {name} is {config[name]!r}, and only {wanted!r} can be "
                "represented"
            )
    side = config["sample_size"]
    size = options.size or ((side, side) if isinstance(side, int) else tuple(side))

    def named(name: str) -> str:
        theirs = _diffusers_name(name)
        for old, new in _OLD.items():
            if theirs not in weights and theirs.replace(new, old) in weights:
                return theirs.replace(new, old)
        return theirs

    return _build(
        weights,
        named,
        (config["in_channels"], *size),
        options,
        widths=widths,
        blocks=config["layers_per_block"],
        latents=config["latent_channels"],
        groups=config["norm_num_groups"],
        attend=attend,
        attend_middle=config["mid_block_add_attention"],
        quant=config["use_quant_conv"],
        post_quant=config["use_post_quant_conv"],
    )


def _validated(weights: Weights, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose used entries have the kind and range that they must have."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) < 16 and all(map(is_count, value))

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    def boolean(value: Any) -> bool:
        return isinstance(value, bool)

    def side(value: Any) -> bool:
        return is_count(value) or (counts(value) and len(value) == 2)

    expected = {
        is_count: (
            "a number from 1",
            "in_channels out_channels layers_per_block latent_channels norm_num_groups",
        ),
        side: ("a number, or two", "sample_size"),
        counts: ("a list of numbers", "block_out_channels"),
        names: ("a list of names", "down_block_types up_block_types"),
        boolean: ("true or false", "use_quant_conv use_post_quant_conv mid_block_add_attention"),
    }
    for fits, (kind, entries) in expected.items():
        for name in entries.split():
            if not fits(config[name]):
                raise ForeignError(
                    f"{weights.path}: {name} in config.json: expected {kind}; got "
                    f"{str(config[name])[:80]}"
                )
    return config


def _attention_levels(weights: Weights, config: Mapping[str, Any], levels: int) -> list[int]:
    """The levels with attention, by the block types, which must be the same on both sides."""
    types = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    attend = []
    for name, known in types.items():
        blocks = list(config[name])
        if len(blocks) != levels or any(block not in known for block in blocks):
            raise ForeignError(
                f"{weights.path}: {name} is {blocks}; expected {levels} of {' or '.join(known)}"
            )
        blocks = blocks if name[0] == "d" else blocks[::-1]
        attend.append([i for i, block in enumerate(blocks) if block.startswith("Attn")])
    if attend[0] != attend[1]:
        raise ForeignError(
            f"{weights.path}: down_block_types and up_block_types have attention at different "
            "sizes, which cannot be represented"
        )
    return attend[0]


def _diffusers_name(name: str) -> str:
    """The name in diffusers of a parameter of `autoencoder_kl`."""
    name = re.sub(r"^(prior\.)?", "", name)
    match = re.match(r"(encoder|decoder)\.net\.(.*)", name)
    assert match is not None, name
    part, rest = match.groups()
    return rest if "quant_conv" in rest else f"{part}.{rest}"


def _build(
    weights: Weights,
    named: Callable[[str], str],
    shape: tuple[int, ...],
    options: Options,
    **structure: Any,
) -> Model:
    """The zoo's model with these weights, built once all of them have the right shape."""
    structure["bits"] = weights.assume("bits", options.bits, 8, "as of images in bytes")
    structure["std"] = weights.assume("std", options.std, 0.1, "as it has no likelihood")
    try:
        with torch.device("meta"):  # sizes alone
            wanted = build("autoencoder_kl", shape, **structure).state_dict()
    except ValueError as error:
        raise ForeignError(f"{weights.path}: cannot be represented: {error}") from error
    taken = {}
    for name, tensor in wanted.items():
        theirs, sizes = named(name), tuple(tensor.shape)
        if theirs in weights and weights.tensors[theirs].ndim == 4 and tensor.ndim == 2:
            sizes = (*sizes, 1, 1)  # attention by 1x1 convolutions
        taken[name] = weights.take(theirs, *sizes).reshape(tensor.shape)
    weights.finish()
    model = build("autoencoder_kl", shape, **structure).double()
    model.load_state_dict(taken)
    return model


def from_compvis(weights: Weights, options: Options) -> Model:
    """A KL autoencoder's state dict, by itself or in a diffusion model's checkpoint."""
    levels = weights.numbers(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    if levels != list(range(len(levels))) or not levels:
        raise ForeignError(f"{weights.path}: encoder.down.0.block.0.conv1.weight is missing")
    return _build(
        weights,
        lambda name: _compvis_name(_diffusers_name(name), len(levels)),
        (
            weights.size("encoder.conv_in.weight", 1),
            *weights.assume("size", options.size, (256, 256), "as in its configurations"),
        ),
        options,
        widths=[weights.size(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in levels],
        blocks=len(weights.numbers(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")),
        latents=weights.size("decoder.conv_in.weight", 1),
        embedded=weights.size("post_quant_conv.weight", 1),
        groups=weights.assume("groups", options.groups, 32, "as in its code"),
        attend=[i for i in levels if weights.any(f"encoder.down.{i}.attn.")],
        attend_middle=weights.any("encoder.mid.attn_1."),
    )


_RENAMED = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    ("resnets", "block"),
    ("attentions", "attn"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
)


def _compvis_name(name: str, levels: int) -> str:
    """The name in CompVis of a parameter of diffusers; it numbers up-blocks from the top."""
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", name)


def to_diffusers(model: Model, source: Mapping[str, Any], out: Path) -> None:
    """Write a folder that ``AutoencoderKL.from_pretrained`` loads.

    Args:
        model: An `autoencoder_kl`.
        source: `config` and `dtype` of the folder that the model came from, if any; a
            half-precision type is kept where it still holds every number.
        out: The folder.

    Raises:
        ValueError: If the model is no `autoencoder_kl`, or diffusers cannot represent an option.
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
    levels, attend = range(len(options["widths"])), options["attend"]
    down = ["AttnDownEncoderBlock2D" if i in attend else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if i in attend else "UpDecoderBlock2D" for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(options["widths"]),
        "down_block_types": down,
        "in_channels": shape[0],
        "latent_channels": options["latents"],
        "layers_per_block": options["blocks"],
        "mid_block_add_attention": options["attend_middle"],
        "norm_num_groups": options["groups"],
        "out_channels": shape[0],
        "sample_size": max(shape[1:]),
        "up_block_types": up[::-1],
        "use_post_quant_conv": options["post_quant"],
        "use_quant_conv": options["quant"],
    }
