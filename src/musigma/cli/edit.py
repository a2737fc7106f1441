"""Commands that work in latent space: directions of attributes, edits, mixtures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from musigma.cli.options import (
    USE,
    Common,
    CommonOptions,
    Data,
    DataOptions,
    Run,
    Source,
    app,
    at_least_one,
    latent_numbers,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import count
from musigma.cli.trained import Trained, class_number


@app.command(group=USE)
def direction(
    run: Run,
    source: Source,
    *,
    positive: str,
    negative: str | None = None,
    method: Literal["mean", "probe"] = "mean",
    levels: str | None = None,
    at_most: int = 10_000,
    out: Path,
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Find the direction in latent space that stands for a class of labelled data.

    All of the data are used unless --split says otherwise.

    Args:
        positive: Class that has the attribute, by name or number.
        negative: Class that lacks it. By default all other classes.
        method: Difference of the class means, or a linear probe (logistic regression).
        levels: Latents to use, top first: 0,1. By default all of them.
        at_most: Largest number of examples to encode.
        out: The .npz file to write.
    """
    import numpy as np

    from musigma import editing

    at_least_one(at_most=at_most)
    check_out(out, ".npz")
    trained, numbers = Trained(run, common), latent_numbers(levels)
    editing.checked_levels(trained.model, numbers)
    found = trained.data(source, options.everything())
    if found.labels is None:
        raise ValueError(f"data: {source} has no labels; put images into class folders")
    labels, names = np.asarray(found.labels), list(found.label_names)
    wanted = class_number(positive, names, len(names))
    has = labels == wanted
    if negative is not None:
        rows = np.flatnonzero(has | (labels == class_number(negative, names, len(names))))
        found, has = found.subset(rows), has[rows]
    with trained.screen.progress("encoding") as progress:
        step = editing.direction(
            trained.model,
            found,
            has,
            attribute=names[wanted],
            method=method,
            levels=numbers,
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
    trained.screen.result(
        answer,
        f"{step.attribute}: {answer['with']:,} examples with it, {answer['without']:,} without; "
        f"length {length:.3g}, area under the ROC curve {step.auc:.3f}: {out}",
    )


@app.command(group=USE)
def edit(
    run: Run,
    source: Source,
    *,
    direction: Path,
    strength: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-2..2",
    n: int = 8,
    label: str | None = None,
    out: Path = Path("edited.png"),
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Give examples less and more of an attribute, a row for each example.

    All of the data may be edited unless --split says otherwise.

    Args:
        direction: An .npz file that `musigma direction` wrote.
        strength: Steps along the direction: -2..2 for five, -2..2:9 for nine, or numbers separated
            by commas. A step of 1 leads from examples without the attribute to those with it.
        n: Number of examples.
        label: Class of the examples, by name or number, if the model is conditioned on classes and
            the data have no labels.
        out: A .png grid, or an .npy or .npz array; rows of a table also as .csv or .parquet.
    """
    from musigma import editing

    strengths = _strengths(strength)
    if not direction.is_file():
        raise ValueError(f"direction: there is no file {direction}")
    trained = Trained(run, common)
    trained.check_out(out)
    step = editing.Direction.load(direction)
    x, context = trained.examples(source, options.everything(), n, label)
    trained.write_rows(editing.edit(trained.model, x, step, strengths, context), out)
    answer = {"out": str(out), "n": len(x), "attribute": step.attribute, "strengths": strengths}
    trained.screen.result(
        answer, f"{count(len(x), 'row')}, {step.attribute or 'direction'} {strength}: {out}"
    )


@app.command(group=USE)
def mix(
    run: Run,
    source: Source,
    *,
    levels: str = "0",
    n: int = 6,
    out: Path = Path("mixed.png"),
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Mix examples: some latents from one example, the rest from another.

    The left column shows the first n examples, the top row the next n. Each picture takes the
    chosen latents from the top row and all others from the left column. The model needs several
    latents.

    Args:
        levels: Latents from the top row, as numbers from 0, the topmost: 0,1.
        n: Number of examples in the column and in the row.
        out: A .png grid; or the mixtures alone as an .npy or .npz array, those of a table also as
            .csv or .parquet.
    """
    import torch

    from musigma import context as contexts
    from musigma import editing

    at_least_one(n=n)
    trained, numbers = Trained(run, common), latent_numbers(levels) or []
    trained.check_out(out)
    x, context = trained.examples(source, options, 2 * n)
    half = len(x) // 2
    if not half:
        raise ValueError(f"data: {source} holds {len(x)} examples; a mixture needs two")
    left, top = slice(half), slice(half, 2 * half)
    ends = (contexts.rows(context, part) for part in (left, top))
    mixed = editing.mix(trained.model, x[left], x[top], numbers, *ends)
    if out.suffix == ".png":
        sheet = torch.cat([x[left].unsqueeze(1), mixed], 1).flatten(0, 1)
        blank = torch.zeros_like(x[:1])
        trained.write(torch.cat([blank, x[top], sheet]), out, columns=half + 1)
    else:
        trained.write_rows(mixed, out)
    trained.screen.result(
        {"out": str(out), "n": half, "levels": numbers}, f"{count(half * half, 'mixture')}: {out}"
    )


def _strengths(text: str) -> list[float]:
    """Steps along a direction: -2..2, -2..2:9 or -1,0,0.5."""
    expected = f"strength: expected -2..2, -2..2:9 or -1,0,0.5; got {text!r}"
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
        raise ValueError(expected) from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError(expected)
    return values
