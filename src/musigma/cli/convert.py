"""``musigma convert``: checkpoints of other codebases, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from musigma.cli.options import CONVERT, Common, app, image_size
from musigma.cli.screen import Screen
from musigma.cli.trained import Trained


@app.command(group=CONVERT)
def convert(
    source: str,
    out: Path,
    *,
    family: Annotated[str | None, Parameter(name="--from")] = None,
    to: Literal["musigma", "diffusers"] = "musigma",
    size: str | None = None,
    bits: int | None = None,
    format: str | None = None,
    weights: str | None = None,
    permutation: str | None = None,
    labels: str | None = None,
    std: float | None = None,
    groups: int | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    overwrite: bool = False,
    common: Common = Common(),
) -> None:
    """Import a checkpoint from another codebase, or export one.

    It reads the Glows of chaiyujin, rosinality and OpenAI, the VAEs of bits-back, pythae and
    pytorch/examples, and the KL autoencoders of diffusers and CompVis. No checkpoint is ever run.
    Flows of zuko, nflows and normflows are given as objects, FILE.py:NAME, which executes FILE.py.

    Args:
        source: A file or a folder, or FILE.py:NAME of a flow (or of a function that returns one);
            with `--to diffusers`, a run or checkpoint of musigma.
        out: The .safetensors file to write, or a folder for it; with `--to diffusers`, the folder.
        family: Codebase of the checkpoint: chaiyujin, rosinality, openai-glow, diffusers, compvis,
            bits-back, pytorch-examples or pythae; by default recognized by parameter names.
        to: Format to write.
        size: Side of the images, or HEIGHTxWIDTH, where the checkpoint does not say.
        bits: Bits of each element of the data, where its code leaves them open.
        format: How a VAE's scale is read, where codes with the same parameter names differ:
            log_var (pytorch/examples), log_std (bits-back), or another scale of a format.
        weights: Which weights to take where the file holds several sets: raw, averaged, or a
            prefix that the command lists. By default the raw ones.
        permutation: Channel order of a Glow without 1x1 convolutions: `reverse`, or a .json file
            with the order of every step.
        labels: Labels of a Glow's classifier, where the file does not say: softmax for one each,
            sigmoid for several.
        std: Standard deviation of p(x | z), where the original has no likelihood.
        groups: Groups of the group normalizations, where the checkpoint does not say.
        dtype: Type of the weights; by default the source's, if it holds them without rounding.
        overwrite: Replace an existing file.
        common: Shared options.
    """
    import torch

    from musigma import checkpoint
    from musigma import convert as foreign

    screen, sides = Screen(common), image_size(size)
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not overwrite:
        raise ValueError(f"out: {out} already exists; pass --overwrite or another name")
    options = foreign.Options(
        size=(sides, sides) if isinstance(sides, int) else sides,
        bits=bits,
        format=format,
        permutation=_orders(permutation),
        labels=labels,
        std=std,
        groups=groups,
    )
    if to == "diffusers":
        others = {"from": family, "weights": weights, "dtype": dtype}
        if given := [*options.given(), *(name for name, value in others.items() if value)]:
            raise ValueError(f"{given[0]}: applies to importing a checkpoint; leave it out")
        trained = Trained(source, common)
        foreign.export(trained.model, trained.extra, out, family=to)
        screen.result({"out": str(out), "to": to}, f"a folder for diffusers: {out}")
        return
    if out.suffix not in ("", ".safetensors") or not out.parent.is_dir():
        raise ValueError(
            f"out: expected a .safetensors file or a folder, in a folder that exists; got {out}"
        )
    kind = None if dtype is None else getattr(torch, dtype)
    if ".py:" in source:
        others = {"from": family, "weights": weights}
        if given := [*options.given(), *(name for name, value in others.items() if value)]:
            raise ValueError(f"{given[0]}: applies to checkpoints; leave it out")
        flow = _object(source)
        model = foreign.from_flow(flow).to(kind)
        library = type(flow).__module__.partition(".")[0]
        origin = {"family": library, "source": Path(source).name, "notes": []}
        result = foreign.Converted(model, "flow", {"foreign": origin})
    else:
        result = foreign.convert(
            source, family=family, options=options, weights=weights, dtype=kind
        )
    model, found, about = result
    if not out.suffix:
        out.mkdir(exist_ok=True)
    checkpoint.save(model, out if out.suffix else out / "model.safetensors", extra=about)
    parameters = sum(p.numel() for p in model.parameters())
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = "x".join(map(str, model.config["shape"]))
    answer = {"out": str(out), "from": found}
    answer |= {name: model.config[name] for name in ("architecture", "shape")}
    answer |= {"parameters": parameters, "dtype": kind, "notes": result.notes}
    for note in result.notes:
        screen.note(note)
    what = foreign.FAMILIES[found].what if found in foreign.FAMILIES else source
    screen.result(
        answer,
        f"{what}: {model.config['architecture']} of {shape} with "
        f"{parameters:,} parameters in {kind}: {out}",
    )


def _object(target: str) -> Any:
    """The flow that FILE.py:NAME refers to: a torch module, or a function that returns one."""
    from torch import nn

    from musigma import plugins

    found = plugins.load(target, argument="source")
    if isinstance(found, nn.Module) or not callable(found):
        return found
    return found()


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
        raise ValueError(f"permutation: {text} does not hold a list of lists of numbers")
    return orders
