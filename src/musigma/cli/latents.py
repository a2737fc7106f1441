"""Commands that work in latent space: directions of attributes, edits, mixtures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from musigma.cli.shared import (
    USUAL,
    USUAL_DATA,
    CommonOptions,
    Data,
    Screen,
    Trained,
    at_least_one,
    check_out,
    class_number,
)

commands = App()


@commands.command
def direction(
    run: str,
    data: str,
    *,
    positive: str,
    negative: str | None = None,
    method: Literal["mean", "probe"] = "mean",
    levels: str | None = None,
    at_most: int = 10_000,
    out: Path,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Find the direction in the latents that stands for a class of labelled data.

    Args:
        run: A run folder, or a .safetensors file.
        data: Data with labels: a folder of class folders, a file, or a name.
        positive: The class that has the attribute, by its name or number.
        negative: The class that lacks it; by default all others.
        method: Difference of means, or a linear probe (a logistic regression).
        levels: Latents to use, top first: 0,1; by default all.
        at_most: How many examples to look at.
        out: The .npz file to write.
        options: Which data; all of them unless --split says otherwise.
        common: Shared options.
    """
    import numpy as np

    from musigma import editing

    at_least_one(at_most=at_most)
    check_out(out, ".npz")
    screen, trained = Screen(common), Trained(run, common)
    editing.checked_levels(trained.model, _levels(levels))
    options = dataclasses.replace(options, split=options.split or "all")
    found = trained.data(data, options, screen)
    if found.labels is None:
        raise ValueError(f"data: {data} has no labels; put images into class folders")
    labels, names = np.asarray(found.labels), list(found.label_names)
    wanted = class_number(positive, names, len(names))
    has = labels == wanted
    if negative is not None:
        rows = np.flatnonzero(has | (labels == class_number(negative, names, len(names))))
        found, has = found.subset(rows), has[rows]
    with screen.progress("encoding") as progress:
        step = editing.direction(
            trained.model,
            found,
            has,
            attribute=names[wanted],
            method=method,
            levels=_levels(levels),
            at_most=at_most,
            batch_size=options.batch_size,
            seed=common.seed,
            progress=progress,
        )
    step.save(out)
    length = math.sqrt(sum(float(t.square().sum()) for t in step.latents))
    answer = {
        "out": str(out),
        "attribute": step.attribute,
        "method": method,
        "with": int(has.sum()),
        "without": int((~has).sum()),
        "length": length,
        "auc": step.auc,
    }
    screen.result(
        answer,
        f"{step.attribute}: {answer['with']:,} with it, {answer['without']:,} without; length "
        f"{length:.3g}, area under the ROC curve {step.auc:.3f}: {out}",
    )


@commands.command
def edit(
    run: str,
    data: str,
    *,
    direction: Path,
    strength: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-2..2",
    n: int = 8,
    label: str | None = None,
    out: Path = Path("edited.png"),
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Give examples more and less of an attribute, a row for each.

    Args:
        run: A run folder, or a .safetensors file.
        data: An image, a folder, a file, or a name.
        direction: A .npz file that `musigma direction` wrote.
        strength: -2..2 for five steps, -2..2:9 for nine, or numbers with commas; 1 goes from
            examples without the attribute to those with it.
        n: How many examples.
        label: Their class, by name or number, if the model is conditional and the data do not say.
        out: A .png grid, or an .npy or .npz array.
        options: Which data; all of them unless --split says otherwise.
        common: Shared options.
    """
    from musigma import editing

    strengths = _strengths(strength)
    if not direction.is_file():
        raise ValueError(f"direction: there is no file {direction}")
    screen, trained = Screen(common), Trained(run, common)
    trained.check_out(out)
    step = editing.Direction.load(direction)
    options = dataclasses.replace(options, split=options.split or "all")
    x, context = trained.examples(data, options, screen, n, label)
    edited = editing.edit(trained.model, x, step, strengths, context)
    trained.write_rows(edited, out)
    answer = {"out": str(out), "n": len(x), "attribute": step.attribute, "strengths": strengths}
    screen.result(answer, f"{len(x)} rows, {step.attribute or 'direction'} {strength}: {out}")


@commands.command
def mix(
    run: str,
    data: str,
    *,
    levels: str = "0",
    n: int = 6,
    out: Path = Path("mixed.png"),
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Mix examples: some levels of the latents from one, the rest from another.

    The first n examples stand in the left column, the next n in the top row; each picture has the
    chosen levels from the top, and all others from the left.

    Args:
        run: A run folder, or a .safetensors file, of a model with several latents.
        data: A folder, a file, or a name.
        levels: Latents that come from the top row, the topmost is 0: 0,1.
        n: How many of each.
        out: A .png grid, or an .npy or .npz array of the mixtures alone.
        options: Which data.
        common: Shared options.
    """
    import torch

    from musigma import editing

    at_least_one(n=n)
    screen, trained = Screen(common), Trained(run, common)
    trained.check_out(out)
    x, context = trained.examples(data, options, screen, 2 * n)
    half = len(x) // 2
    if not half:
        raise ValueError(f"data: {data} holds {len(x)} examples, and a mixture needs two")
    x, style = x[:half], x[half : 2 * half]
    contexts = (None, None) if context is None else (context[:half], context[half : 2 * half])
    mixed = editing.mix(trained.model, x, style, _levels(levels) or [], *contexts)
    if out.suffix == ".png":
        blank = torch.zeros_like(x[:1])
        sheet = torch.cat([x.unsqueeze(1), mixed], 1).flatten(0, 1)
        trained.write(torch.cat([blank, style, sheet]), out, columns=half + 1)
    else:
        trained.write(mixed, out)
    screen.result(
        {"out": str(out), "n": half, "levels": _levels(levels)}, f"{half * half} mixtures: {out}"
    )


def _levels(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"levels: expected numbers with commas, 0,1; got {text!r}")
    return [int(word) for word in words]


def _strengths(text: str) -> list[float]:
    wanted = "strength: expected -2..2, -2..2:9 or -1,0,0.5"
    try:
        if ".." not in text:
            values = [float(word) for word in text.split(",")]
        else:
            ends, _, count = text.partition(":")
            low, high = (float(end) for end in ends.split(".."))
            if not math.isfinite(high - low):
                raise ValueError
            steps = int(count) if count else max(2, round(abs(high - low)) + 1)
            if not 2 <= steps <= 1000:
                raise ValueError
            values = [low + (high - low) * i / (steps - 1) for i in range(steps)]
    except ValueError:
        raise ValueError(f"{wanted}; got {text!r}") from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{wanted}; got {text!r}")
    return values
