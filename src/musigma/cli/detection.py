"""Scores that commands compute beside -log p (``--by``), and maps of the strangest images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from musigma.cli.options import OPTIONS, DataOptions
from musigma.cli.screen import count
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    import numpy as np

    from musigma.data import Dataset
    from musigma.detectors import Reference
    from musigma.model import Model
    from musigma.named import Choice

FITTED = 2000
"""Training examples on which statistics are fitted."""
MAPPED = 16
"""Images of which maps are written."""


@Parameter(name="*", group=OPTIONS)
@dataclass(frozen=True, kw_only=True)
class Detection:
    """How anomalies are scored.

    Args:
        by: Scores of anomalies, separated by commas, instead of -log p alone:
            'typicality, complexity, likelihood-regret steps=50'. `musigma list by` shows all of
            them.
        background: A run on perturbed images (`train --perturb`), for likelihood-ratio and maps.
        members: A further run on the same data, from another seed, for ensemble and waic. May be
            given several times.
    """

    by: str | None = None
    background: str | None = None
    members: tuple[str, ...] = ()


class Scores:
    """The scores that a command computes: -log p, or those that `--by` names.

    Args:
        trained: The run.
        how: The options.
        k: Draws per example.
        options: How data are read.
        maps: Whether there are maps, which a background model is for, too.

    Attributes:
        labels: The names of the scores; the first one chooses what maps show.

    Raises:
        ValueError: If there is no such score, one is named twice, a run cannot be opened, or an
            option is for nothing.
    """

    def __init__(
        self, trained: Trained, how: Detection, k: int, options: DataOptions, *, maps: bool = False
    ):
        from musigma.detectors import DETECTORS

        self.trained, self.how, self.k, self.options = trained, how, k, options
        self.named = how.by is not None
        choices = [DETECTORS.choice(text) for text in (how.by or "nats").split(",")]
        self.choices: dict[str, Choice] = {_label(choice): choice for choice in choices}
        if len(self.choices) < len(choices):
            raise ValueError(f"by: expected each score once; got {how.by!r}")
        for name in ("background", "members"):
            if getattr(how, name) and not self.named and not (maps and name == "background"):
                raise ValueError(f"{name}: it is for scores of anomalies; name some (--by)")

    @property
    def labels(self) -> list[str]:
        """The names of the scores, as columns of a table have them."""
        return list(self.choices)

    def of(self, name: str, label: str) -> str:
        """The name of a column that belongs to a score."""
        return f"{name}_{label}" if self.named else name

    @cached_property
    def reference(self) -> Reference:
        """What scores compare examples with."""
        from musigma.detectors import Reference

        trained, how = self.trained, self.how
        return Reference(
            trained.model,
            train=self._training,
            background=None if how.background is None else self._background(how.background),
            members=[self._other("members", run).model for run in how.members],
            k=self.k,
            batch_size=self.options.batch_size,
            seed=trained.common.seed,
            progress=trained.screen.progress,
        )

    def _background(self, run: str) -> Model:
        other = self._other("background", run)
        if not other.preprocess.perturb:
            self.trained.screen.note(
                f"background: {run} was trained on images that were not perturbed; a background "
                "model is one of perturbed images (train --perturb 0.2)"
            )
        return other.model

    def _other(self, name: str, run: str) -> Trained:
        """Another run of the same kind of data."""
        try:
            other = Trained(run, self.trained.common)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        wanted, got = self.trained.spec, other.spec
        if (wanted.shape, wanted.levels, wanted.context) != (got.shape, got.levels, got.context):
            raise ValueError(
                f"{name}: expected a model of the same kind of data, shape {wanted.shape} and "
                f"{wanted.levels or 'continuous'} levels; {run} is of shape {got.shape} and "
                f"{got.levels or 'continuous'} levels, or has another context"
            )
        return other

    def _training(self) -> Dataset:
        """Training examples of the run, as many as suffice: those with the smallest hashes."""
        import numpy as np

        trained = copy.copy(self.trained)  # which data are in use does not change
        origin = trained.about_data.get("source")
        if origin is None:
            raise ValueError(
                "by: the checkpoint does not say what it was trained on, so nothing can be fitted "
                "on training data; choose other scores"
            )
        try:
            found = trained.data(origin, dataclasses.replace(self.options, split="train"))
        except (ValueError, OSError) as error:
            raise ValueError(f"by: the training data cannot be read; {error}") from error
        order = np.argsort(found.content(), kind="stable")
        return found.subset(np.sort(order[:FITTED]))

    def __call__(self, rows: Dataset, nats: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The scores of rows by their names, the strangest highest.

        Args:
            rows: The rows.
            nats: -log p of each, if it is known.
        """
        if nats is not None:
            self.reference.once(lambda: nats, "nats", self.trained.model, rows)
        return {label: choice(self.reference, rows) for label, choice in self.choices.items()}

    def strangest(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scores in which NaN is the strangest, which is said."""
        from musigma import anomaly

        ranked = {}
        for label, values in found.items():
            ranked[label], note = anomaly.nan_as_strangest(values, label)
            if note:
                self.trained.screen.note(note)
        return ranked

    def drift(self, rows: Dataset, calibration: Dataset, found: Any, known: Any) -> dict[str, Any]:
        """By score, whether a batch as a whole has drifted: by the test of the score, if any."""
        from musigma import anomaly

        tests = {}
        for label, choice in self.choices.items():
            own = getattr(choice.function, "drift", None)
            name = label if self.named else "scores"
            if own is not None:
                tests[name] = own(self.reference, rows, calibration)
            else:
                tests[name] = anomaly.score_drift(found[label], known[label])
        return tests


def _label(choice: Choice) -> str:
    """The name of a score, with its options."""
    return " ".join([choice.name, *(f"{key}={value}" for key, value in choice.options.items())])


# --- maps ----------------------------------------------------------------------------------------


def check_maps(folder: Path, trained: Trained) -> None:
    """Refuse a folder that maps cannot be written to, or a model without images."""
    if not trained.is_image:
        raise ValueError("maps: they show images; this is a model of vectors")
    if folder.is_file() or not folder.parent.is_dir():
        reason = "it is a file" if folder.is_file() else f"there is no folder {folder.parent}"
        raise ValueError(f"maps: expected a folder to write; {folder} cannot be one: {reason}")


def write_maps(
    folder: Path, scores: Scores, rows: Dataset, found: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], str]:
    """Write pictures of the strangest images above their maps, and the maps as an array.

    Returns:
        Fields of a JSON answer, and a line.
    """
    import numpy as np

    from musigma.detectors import colored, maps
    from musigma.files import replacing
    from musigma.report import figures

    label, values = next(iter(found.items()))
    chosen = np.argsort(-values, kind="stable")[:MAPPED]
    shown = rows.subset(chosen)
    result = maps(scores.reference, shown)
    folder.mkdir(exist_ok=True)
    images = figures.pixels(shown.x, scores.trained.levels).transpose(0, 3, 1, 2)
    images = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
    for at, image, colors in zip(chosen.tolist(), images, colored(result.nats), strict=True):
        figures.rows([image[None], colors[None]], folder / f"{at:06}.png")
    with replacing(folder / "maps.npz") as draft, draft.open("wb") as file:
        np.savez_compressed(file, index=chosen, nats=result.nats)
    fields = {"folder": str(folder), "index": chosen.tolist(), "by": label, "what": result.what}
    line = f"maps of the {count(len(chosen), 'strangest image')} by {label}: {result.what}"
    return fields, f"{line}: {folder}"
