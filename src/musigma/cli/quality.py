"""The command that compares samples of a model with data, and looks for copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    INSPECT,
    WHAT_DATA,
    Common,
    DataOptions,
    Run,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import count
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from musigma.data import Dataset
    from musigma.evaluation import Memorization, SampleQuality
    from musigma.evaluation.intervals import Interval
    from musigma.report.sections import Document, Table

SHOWN, COLUMNS = 16, 8
"""Samples that are shown above their nearest training examples, and how many in a line."""
SEARCHED = 5
"""Training examples that are searched, at most, for each sample."""
NEAR, FAR = 0.01, 0.99
"""p-values at which samples are said to be nearer, or farther, than held-out examples."""


@app.command(group=INSPECT)
def quality(
    run: Run,
    source: Annotated[str | None, Parameter(name="data", group=ARGUMENTS, help=WHAT_DATA)] = None,
    *,
    features: str | None = None,
    n: int = 10_000,
    k: int = 5,
    out: Path | None = None,
    options: DataOptions = DataOptions(batch_size=256),
    common: Common = Common(),
) -> None:
    """Compare samples with held-out data: FID, KID, precision, recall; and look for copies.

    DATA are by default the held-out part of what the model was trained on. Training examples are
    then compared with them in the same way, as samples of a perfect model would be; and a test
    says whether samples are nearer to training examples than held-out ones are.

    Args:
        features: FILE.py:NAME of a function of images (B, C, H, W) in [0, 1], or of rows (B, D),
            that returns features (B, F). The file is executed. By default the columns,
            standardized; of images the pixels, whose distances say little about what is shown.
        n: Number of samples, and largest number of held-out examples.
        k: Neighbors that define a neighborhood, for precision, recall, density and coverage.
        out: A .html page, its tables as a .md or .tex file, or for images a .png picture: the
            samples that are nearest to training examples, above these.
    """
    from musigma.evaluation import memorization, sample_quality
    from musigma.report.sections import SUFFIXES, Document, Section

    at_least_one(n=n, k=k)
    trained = Trained(run, common)
    if out is not None:
        check_out(out, *SUFFIXES, *([".png"] if trained.is_image else []))
    examples = _Examples(trained, features)
    held_out, train, name = _data(trained, source, options, n)
    if train is None and out is not None and out.suffix == ".png":
        raise ValueError(
            "out: the picture shows training examples, and DATA are not what the model was "
            "trained on; leave out DATA, or name a .html file"
        )
    draws = _Draws(trained, held_out, n, options.batch_size)
    total = len(held_out) + n + len(train or ())
    with trained.screen.progress("computing features") as progress:
        real = examples.features(examples.batches(held_out, draws.size), progress, 0, total)
        new = examples.features(draws, progress, len(real), total)
        known = None
        if train is not None:
            batches = examples.batches(train, draws.size)
            known = examples.features(batches, progress, len(real) + n, total)
    if examples.standardizes:
        mean, std = real.mean(0), real.std(0)
        std[std == 0] = 1
        real, new = (real - mean) / std, (new - mean) / std
        known = None if known is None else (known - mean) / std
    how: dict[str, Any] = {"k": k, "seed": common.seed}
    measured, copies = {}, None
    with trained.screen.progress("comparing"):
        measured["samples"] = sample_quality(real, new, **how)
        if known is not None:
            measured["training examples"] = sample_quality(real, known[:n], **how)
            copies = memorization(known, real, new, seed=common.seed)
    lines = [
        f"{count(n, 'sample')} beside {count(len(real), 'example')}: {name}",
        f"features: {examples.described(new.shape[1])}",
        *(f"warning: {each}" for each in measured["samples"].warnings),
    ]
    sections = [Section("Samples", lines, [_table(measured)])]
    answer: dict[str, Any] = {"data": name, "features": features}
    answer |= {which.split()[0]: one.to_dict() for which, one in measured.items()}
    if copies is None or train is None:
        lines.append("Copies were not looked for: the model was trained on other data.")
    else:
        pictures = _pictures(trained, draws, train, copies)
        sections.append(Section("Memorization", _verdict(copies, len(train)), [], pictures))
        answer["memorization"] = copies.to_dict() | {"training": len(train)}
    found = Document("Samples beside data", sections, "Intervals are of 95 %.")
    text = str(found)
    if out is not None:
        _write(out, found)
        answer["out"], text = str(out), f"{text}\n\n{out.resolve()}"
    trained.screen.result(answer, text)


def _data(
    trained: Trained, source: str | None, options: DataOptions, n: int
) -> tuple[Dataset, Dataset | None, str]:
    """Some held-out examples; some of the training part, if these are from its source; a name."""
    import numpy as np

    from musigma.evaluation.neighbors import LEAST

    source = source or trained.about_data.get("source")
    if source is None:
        raise ValueError(
            "DATA: the checkpoint does not say what it was trained on; give data that it was not "
            "trained on"
        )
    if n < LEAST:
        raise ValueError(f"n: expected {LEAST} or more samples; got {n}")
    held_out, train = trained.data(source, options), None
    if trained.seen and trained.part in ("all", "train"):
        raise ValueError(
            f"split: the model was trained on {source}, so its samples look better there than "
            "they are; leave out --split, to use the held-out part, or give other data"
        )
    if len(held_out) < LEAST:
        raise ValueError(
            f"DATA: expected at least {LEAST} held-out examples; {source} has {len(held_out)}"
        )
    name = source if trained.part == "all" else f"the {trained.part} part of {source}"
    random = np.random.default_rng(trained.common.seed)
    if trained.seen:
        train = trained.data(source, dataclasses.replace(options, split="train"))
        train = train.subset(random.permutation(len(train))[: SEARCHED * n])
    return held_out.subset(random.permutation(len(held_out))[:n]), train, name


class _Examples:
    """Examples of a model as tensors, and their features.

    Args:
        trained: The model.
        target: FILE.py:NAME of a function; by default features are the elements of an example.
    """

    def __init__(self, trained: Trained, target: str | None):
        from musigma import plugins

        self.trained, self.target = trained, target
        self.standardizes = target is None and not trained.is_image
        if target is None and trained.spec.schema is not None:
            raise ValueError(
                "features: the model's columns have types, and no distance; give a function of "
                "rows (--features FILE.py:NAME), or `musigma compare` tables"
            )
        self.function: Callable[[Tensor], Any] = lambda x: x.flatten(1)
        if target is not None:
            self.function = plugins.load(target, argument="features")
        if not callable(self.function):
            raise ValueError(f"features: expected a function; {target} is {self.function!r}")

    def described(self, number: int) -> str:
        """What the features are."""
        if self.target is not None:
            return f"{self.target}, {number:,} numbers"
        if self.standardizes:
            return f"the {number:,} columns, standardized"
        return (
            f"{number:,} pixels. Their distances say little about what images show; give a "
            "network (--features FILE.py:NAME) to compare contents"
        )

    def batches(self, found: Dataset, size: int) -> Iterator[Tensor]:
        """All examples of a data set."""
        import numpy as np
        import torch

        for start in range(0, len(found), size):
            rows = np.arange(start, min(start + size, len(found)))
            yield torch.from_numpy(found.take(rows))

    def features(
        self, batches: Iterable[Tensor], progress: Callable[..., None], done: int, total: int
    ) -> np.ndarray:
        """The features of all batches, (N, F).

        Raises:
            ValueError: If the function returns anything else.
        """
        import numpy as np
        import torch

        top, parts = self.trained.levels - 1, []
        for x in batches:
            x = x.to(self.trained.device)
            if self.trained.is_image:
                x = x.float().clamp(0, top) / top
            with torch.no_grad():
                rows = self.function(x)
            rows = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
            if rows.ndim != 2 or len(rows) != len(x):
                raise ValueError(
                    f"features: expected ({len(x)}, F) for a batch of shape {tuple(x.shape)}; "
                    f"{self.target} returned {rows.shape}"
                )
            parts.append(rows)
            progress(done := done + len(x), total)
        return np.concatenate(parts).astype(np.float64)


class _Draws:
    """Samples in batches, which can be drawn again.

    Args:
        trained: The model.
        held_out: Examples whose context a conditional model draws for, chosen at random.
        n: Number of samples.
        size: Number of samples in a batch.
    """

    def __init__(self, trained: Trained, held_out: Dataset, n: int, size: int):
        import numpy as np

        self.trained, self.held_out, self.n, self.size = trained, held_out, n, size
        self.of = np.random.default_rng(trained.common.seed).integers(len(held_out), size=n)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._batch, range(-(-self.n // self.size)))

    def _batch(self, i: int) -> Tensor:
        from musigma.evaluation import batch, noise

        trained, seed = self.trained, self.trained.common.seed
        of, context = self.of[i * self.size : (i + 1) * self.size], None
        if trained.spec.context:
            context = batch(self.held_out, of, trained.model, seed=seed)[1]
        noise(seed, i)
        return trained.model.sample(len(of), context)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Samples by their numbers, drawn again."""
        import numpy as np

        batches = {i: self._batch(i).cpu() for i in np.unique(numbers // self.size).tolist()}
        return np.stack([batches[i // self.size][i % self.size] for i in numbers.tolist()])


# --- what is printed -----------------------------------------------------------------------------


def _table(measured: dict[str, SampleQuality]) -> Table:
    """A line for each measure, with a column for samples, and one for training examples."""

    def text(interval: Interval) -> str:
        return f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})"

    every, names = measured.values(), ("precision", "recall", "density", "coverage")
    limits = [one.frechet_limit for one in every]
    return ["", *measured], [
        ["Fréchet distance (FID)", *(f"{one.frechet:.4g}" for one in every)],
        ["FID of infinitely many", *("too few" if one is None else text(one) for one in limits)],
        ["kernel distance (KID)", *(text(one.kernel) for one in every)],
        *([name, *(text(getattr(one, name)) for one in every)] for name in names),
    ]


def _verdict(copies: Memorization, training: int) -> list[str]:
    """The memorization test in words."""
    verdict = (
        "nothing suggests that samples are nearer to training examples than held-out ones are"
    )
    if copies.p_value < NEAR:
        verdict = (
            "samples are nearer to training examples than held-out ones are: copies, or too "
            "little variation"
        )
    elif copies.p_value > FAR:
        verdict = "samples are farther from training examples than held-out ones are: a poor fit"
    return [
        f"p = {copies.p_value:.2g}: {verdict}. C_T {copies.statistic:.2f}, in "
        f"{count(copies.cells, 'cell')}, of {count(training, 'training example')}.",
        f"P(a sample is nearer) = {copies.nearer}; 0.5 without copies.",
    ]


def _pictures(
    trained: Trained, draws: _Draws, train: Dataset, copies: Memorization
) -> dict[str, Callable[[Path, bool], None]]:
    """The samples that are nearest to training examples, above these; of images."""
    import numpy as np

    from musigma.report import figures

    if not trained.is_image:
        return {}
    order = np.argsort(copies.distances)[:SHOWN]
    sets = [draws.rows(order), train.take(copies.neighbors[order])]
    title = "the samples that are nearest to training examples, above these"
    return {
        title: lambda path, dark: figures.rows(sets, path, levels=trained.levels, columns=COLUMNS)
    }


def _write(out: Path, found: Document) -> None:
    """The page, its tables, or its picture."""
    if out.suffix == ".png":
        for draw in found.sections[-1].pictures.values():
            draw(out, False)
    else:
        found.write(out)
