"""A run folder or a checkpoint file, opened for use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli.devices import device_named
from musigma.cli.options import Common, DataOptions, Reading, at_least_one, image_size
from musigma.cli.outputs import check_out, rows_file
from musigma.cli.screen import Screen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from musigma.data import Dataset, Preprocess
    from musigma.spec import Spec

TABLES = (".csv", ".parquet")


def read_data(
    source: str,
    preprocess: Preprocess,
    reading: Reading,
    screen: Screen,
    *,
    allow_constant: bool = False,
) -> Dataset:
    """Read a data set, with progress, and print what was left out and what else is of note."""
    from musigma import data

    with screen.progress("reading") as progress:
        found = data.load(
            source,
            preprocess=preprocess,
            skip_bad=reading.skip_bad,
            in_memory=reading.in_memory,
            allow_constant=allow_constant,
            progress=progress,
        )
    for name, reason in found.skipped.items():
        screen.note(f"left out: {name} {reason}")
    for note in found.notes:
        screen.note(note)
    return found


class Trained:
    """A trained model, with what its checkpoint says about its data.

    Attributes:
        model: The model, on the device that was asked for, in evaluation mode.
        extra: What else the checkpoint holds.
        folder: The run folder; None for a checkpoint file.
        part: The part of the data that `data` returned last.

    Raises:
        ValueError: If there is no such run, or the device or the plugin cannot be used.
    """

    def __init__(self, run: str, common: Common):
        import torch

        from musigma import checkpoint

        self.device = device_named(common.device)
        register_plugin(common)
        path = Path(run)
        self.folder, self.part = path if path.is_dir() else None, "all"
        if self.folder and not (path / "model.safetensors").is_file():
            raise ValueError(
                f"RUN: the folder {run} holds no model.safetensors; train a model into it first"
            )
        if not path.exists():
            raise ValueError(f"RUN: there is no run folder or checkpoint file {run}")
        if path.suffix == ".mus":
            raise ValueError(f"RUN: {run} holds data, not a model; see `musigma inspect {run}`")
        self.path = path / "model.safetensors" if self.folder else path
        self.model, self.extra = checkpoint.read(self.path)
        self.model.to(self.device)
        self.common = common
        torch.manual_seed(common.seed)

    @property
    def about_data(self) -> dict[str, Any]:
        """What the checkpoint says about the data that the model was trained on."""
        return self.extra.get("data") or {}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.spec.shape

    @property
    def is_image(self) -> bool:
        """Whether examples are images, and not vectors."""
        return len(self.shape) == 3

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return next(t.dtype for t in tensors if t.is_floating_point())

    @property
    def spec(self) -> Spec:
        """What the model is a model of."""
        assert self.model.spec is not None  # every model from the zoo has one
        return self.model.spec

    @property
    def bits(self) -> int | None:
        """Bits of each element; None for continuous data."""
        return self.spec.bits

    @property
    def levels(self) -> int:
        """Number of levels of each element in a picture."""
        return 2 ** (self.bits or 8)

    def data(
        self, source: str, options: DataOptions, screen: Screen, label: str | None = None
    ) -> Dataset:
        """Data prepared as in training, of the part asked for; all of class `label` if given."""
        import numpy as np

        from musigma import data
        from musigma.evaluation import check

        saved = self.about_data
        preprocess = data.Preprocess.from_json(saved.get("preprocess", {}))
        if options.size is not None:
            preprocess = dataclasses.replace(preprocess, size=image_size(options.size))
        loaded = read_data(source, preprocess, options.reading, screen, allow_constant=True)
        names = saved.get("label_names")
        found = loaded
        if label is not None:
            classes = self._classes()
            number = np.full(len(found), class_number(label, names or [], classes), np.int64)
            known = tuple(names or map(str, range(classes)))
            found = dataclasses.replace(found, labels=number, label_names=known)
        check(self.model, found)
        same = data.digest(loaded) == saved.get("digest")
        here, there = data.identity(source), saved.get("source")
        seen = same or (there is not None and Path(here).is_relative_to(there))
        if here == there and not same and saved.get("digest"):
            screen.note(f"{source} has changed since this model was trained on it")
        self.part = options.split or ("held-out" if seen else "all")
        return found.split(self.part)

    def examples(
        self,
        source: str,
        options: DataOptions,
        screen: Screen,
        n: int,
        label: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The first n examples of the data, with their context."""
        import numpy as np

        from musigma.evaluation import batch

        at_least_one(n=n)
        found = self.data(source, options, screen, label)
        return batch(found, np.arange(min(n, len(found))), self.model, seed=self.common.seed)

    def context(self, n: int, label: str | None) -> Tensor | None:
        """One-hot rows for n samples of a class, or of all classes in turn; None without any."""
        import torch

        from musigma.evaluation import context_size

        if label is None and not context_size(self.model):
            return None
        classes = self._classes()
        if label is None:
            which = torch.arange(n) % classes
        else:
            names = self.about_data.get("label_names") or []
            which = torch.full((n,), class_number(label, names, classes))
        return torch.nn.functional.one_hot(which, classes).to(self.device, self.dtype)

    def latents(self) -> list[Tensor]:
        """The latents of no examples, top first: tensors of shapes (0, *s)."""
        import torch

        blank = torch.zeros(1, *self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return [z[:0] for z in self.model.encode(blank, self.context(1, None))]

    def _classes(self) -> int:
        """The number of classes that the model is conditioned on."""
        from musigma.evaluation import context_size

        classes = context_size(self.model)
        if not classes:
            raise ValueError("label: this model is not conditioned on classes; leave it out")
        return classes

    def check_out(self, out: Path) -> None:
        """Refuse a file that `write` could not write, before anything is computed for it."""
        if self.is_image:
            check_out(out, ".png", ".npy", ".npz")
        else:
            check_out(out, ".png", ".npy", ".npz", *TABLES)
            if out.suffix == ".png" and self.shape != (2,):
                raise ValueError(
                    f"out: examples of shape {self.shape} are not pictures; name a .csv, "
                    ".parquet, .npy or .npz file"
                )

    def write_rows(self, rows: Tensor, out: Path) -> None:
        """Rows of examples (R, C, *event), as a picture with C columns, a table or an array."""
        if out.suffix == ".png" or out.suffix in TABLES:
            self.write(rows.flatten(0, 1), out, columns=rows.shape[1])
        else:
            self.write(rows, out)

    def write(self, x: Tensor, out: Path, columns: int | None = None) -> None:
        """Examples as a picture, a table or an array, by the suffix of the file."""
        import numpy as np

        from musigma.files import replacing
        from musigma.report import figures

        self.check_out(out)
        values = as_array(x)
        one = math.prod(values.shape[1:])
        if bad := int((~np.isfinite(values.reshape(len(values), one)).all(1)).sum()):
            raise ValueError(
                f"out: {bad} of {len(values)} examples are not finite, so nothing is written; a "
                "lower --temperature (of edit: a smaller --strength) may help"
            )
        if self.bits is not None:
            values = values.astype(np.uint8)
        if out.suffix in TABLES:
            with rows_file(out) as add:
                add({name: values[:, i] for i, name in enumerate(self.column_names())})
        elif out.suffix == ".png" and self.is_image:
            figures.grid(values, out, levels=self.levels, columns=columns)
        elif out.suffix == ".png":
            figures.points(values, out)
        else:
            with replacing(out) as draft, draft.open("wb") as file:
                if out.suffix == ".npy":
                    np.save(file, values)
                else:
                    np.savez_compressed(file, x=values)

    def column_names(self) -> list[str]:
        """Names of the elements of a vector: those of the table that the model was trained on."""
        return list(self.spec.columns) or [f"x{i}" for i in range(self.shape[0])]


def register_plugin(common: Common) -> None:
    """Make the architecture of `--plugin` known."""
    if common.plugin:
        from musigma import plugins

        plugins.register_architecture(common.plugin)


def class_number(label: str, names: Sequence[str], classes: int) -> int:
    """The number of a class that is given by its name or its number; the name takes precedence."""
    if label in names:
        return list(names).index(label)
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f", or one of {', '.join(names)}" if names else ""
    raise ValueError(f"label: expected 0 to {classes - 1}{known}; got {label!r}")


def as_array(x: Tensor) -> np.ndarray:
    """A tensor as an array on the CPU."""
    return x.detach().cpu().numpy()
