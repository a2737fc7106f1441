"""``musigma convert``: other people's checkpoints, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from musigma.cli.shared import USUAL, CommonOptions, Screen, Trained

commands = App()


@commands.command
def convert(
    source: str,
    out: Path,
    *,
    family: Annotated[str | None, Parameter(name="--from")] = None,
    to: Literal["musigma", "diffusers"] = "musigma",
    size: str | None = None,
    bits: int | None = None,
    permutation: str | None = None,
    labels: str | None = None,
    std: float | None = None,
    groups: int | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    common: CommonOptions = USUAL,
) -> None:
    """Bring another library's checkpoint, or write one.

    Known are the Glows of chaiyujin, rosinality and OpenAI, the VAEs of bits-back and pythae, and
    the KL autoencoders of diffusers and CompVis. Nothing in a file is run.

    Args:
        source: A file or a folder; with `--to diffusers`, a run or checkpoint of musigma's.
        out: The .safetensors file to write, or a folder for it; with `--to diffusers`, the folder.
        family: chaiyujin, rosinality, openai-glow, diffusers, compvis, bits-back or pythae; by
            default found by the names of the parameters.
        to: What to write.
        size: Side of the images, or HEIGHTxWIDTH, where the checkpoint does not say.
        bits: Bits of each element of the data, where its code can be set to others.
        permutation: Of a Glow without 1x1 convolutions: `reverse`, or a .json file with the order
            of every step.
        labels: Of a Glow's classifier, where nothing says it: softmax, or sigmoid for several.
        std: Standard deviation of p(x | z), where the original has no likelihood.
        groups: Of group normalisations, where the checkpoint does not say.
        dtype: Type of the weights; by default the source's, where it loses nothing.
        overwrite: Replace what is there.
        common: Shared options.
    """
    import torch

    from musigma import checkpoint
    from musigma import convert as foreign

    screen = Screen(common)
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not overwrite:
        raise ValueError(f"out: {out} exists already; --overwrite, or another name")
    options = foreign.Options(
        size=_size(size),
        bits=bits,
        permutation=_orders(permutation),
        labels=labels,
        std=std,
        groups=groups,
    )
    if to == "diffusers":
        if given := [*options.given(), *["from"] * bool(family), *["dtype"] * bool(dtype)]:
            raise ValueError(f"{given[0]}: is for reading a checkpoint; leave it out")
        trained = Trained(source, common)
        foreign.export(trained.model, trained.extra, out, family=to)
        screen.result({"out": str(out), "to": to}, f"a folder for diffusers: {out}")
        return
    if out.suffix not in ("", ".safetensors") or not out.parent.is_dir():
        raise ValueError(
            f"out: expected a .safetensors file, or a folder, in one that exists; got {out}"
        )
    kept = None if dtype is None else getattr(torch, dtype)
    model, found, about = foreign.convert(source, family=family, options=options, dtype=kept)
    if not out.suffix:
        out.mkdir(exist_ok=True)
    checkpoint.save(model, out if out.suffix else out / "model.safetensors", extra=about)
    parameters = sum(p.numel() for p in model.parameters())
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = "x".join(map(str, model.config["shape"]))
    answer = {
        "out": str(out),
        "from": found,
        "architecture": model.config["architecture"],
        "shape": model.config["shape"],
        "parameters": parameters,
        "dtype": kind,
    }
    screen.result(
        answer,
        f"{foreign.FAMILIES[found].what}: {model.config['architecture']} of {shape} with "
        f"{parameters:,} parameters in {kind}: {out}",
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if not (len(sides) <= 2 and all(side.isdecimal() and int(side) > 0 for side in sides)):
        raise ValueError(f"size: expected 64, or 64x48 (height by width); got {text!r}")
    return int(sides[0]), int(sides[-1])


def _orders(text: str | None) -> Any:
    if text is None or text == "reverse":
        return text
    try:
        orders = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"permutation: expected 'reverse', or a .json file of orders; got {text!r} ({error})"
        ) from error
    if not isinstance(orders, list) or not all(
        isinstance(order, list) and all(isinstance(i, int) for i in order) for order in orders
    ):
        raise ValueError(f"permutation: {text} holds no list of lists of numbers")
    return orders
