"""A run folder or a checkpoint file, opened for use."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli.options import Common, DataOptions, Reading, at_least_one, image_size
from musigma.cli.outputs import check_out, rows_file
from musigma.cli.screen import Screen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from musigma.context import Context
    from musigma.data import Dataset, Preprocess
    from musigma.spec import Spec, Variable

TABLES = (".csv", ".parquet")


def read_data(
    source: str, preprocess: Preprocess, reading: Reading, screen: Screen, **how: Any
) -> Dataset:
    """Read a data set with a progress bar; `how` is as `musigma.data.load` takes it."""
    from musigma import data

    with screen.progress("reading") as progress:
        return data.load(
            source,
            preprocess=preprocess,
            skip_bad=reading.skip_bad,
            in_memory=reading.in_memory,
            progress=progress,
            **how,
        )


class Trained:
    """A trained model, with what its checkpoint says about its data.

    Attributes:
        model: The model, on the device that was asked for, in evaluation mode.
        extra: What else the checkpoint holds.
        screen: Where the command prints.
        folder: The run folder; None for a checkpoint file.
        part: The part of the data that `data` returned last.
        given: What those data were given with: items of `--given`.

    Raises:
        ValueError: If there is no such run, or the device or the plugin cannot be used.
    """

    def __init__(self, run: str, common: Common):
        import torch

        from musigma import checkpoint

        self.device = device_named(common.device)
        if common.plugin:
            from musigma import plugins

            plugins.register(common.plugin)
        path = Path(run)
        self.folder, self.part = path if path.is_dir() else None, "all"
        self.given: tuple[str, ...] = ()
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
        self.common, self.screen = common, Screen(common)
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

    def data(self, source: str, options: DataOptions, label: str | None = None) -> Dataset:
        """Data prepared as in training, of the part asked for; all of class `label` if given."""
        from musigma import data
        from musigma.data.attach import is_source
        from musigma.evaluation import check

        saved = self.about_data
        preprocess = data.Preprocess.from_json(saved.get("preprocess", {}))
        if options.size is not None:
            preprocess = dataclasses.replace(preprocess, size=image_size(options.size))
        here, there = data.identity(source), saved.get("source")
        self.given = options.given or tuple(
            item for item in saved.get("given", ()) if here == there or not is_source(item)
        )
        loaded = read_data(
            source,
            preprocess,
            options.reading,
            self.screen,
            given=[item for item in self.given if item != "label" or label is None],
            columns=self.spec.columns or None,
            channels=3 if self.is_image and self.shape[0] == 3 else None,
            allow_constant=True,
        )
        for name, reason in loaded.skipped.items():
            self.screen.note(f"left out: {name} {reason}")
        for note in loaded.notes:
            self.screen.note(note)
        found = loaded if label is None else self._labelled(loaded, label)
        check(self.model, found)
        same = data.digest(loaded) == saved.get("digest")
        seen = same or (there is not None and Path(here).is_relative_to(there))
        if here == there and not same and saved.get("digest"):
            self.screen.note(f"{source} has changed since this model was trained on it")
        self.part = options.split or ("held-out" if seen else "all")
        return found.split(self.part)

    def examples(
        self, source: str, options: DataOptions, n: int, label: str | None = None
    ) -> tuple[Tensor, Context]:
        """The first n examples of the data, with their context."""
        import numpy as np

        from musigma.evaluation import batch

        at_least_one(n=n)
        found = self.data(source, options, label)
        return batch(found, np.arange(min(n, len(found))), self.model, seed=self.common.seed)

    def context(self, n: int, label: str | None = None, given: Sequence[str] = ()) -> Context:
        """What to generate by: n rows of a class, or n for each row of the files in `given`.

        Args:
            n: Number of rows, or of copies of each row.
            label: Class by name or number. By default all classes in turn.
            given: Files with a row for each example to generate.

        Raises:
            ValueError: If the model is conditioned on something that is not given, or on nothing.
        """
        from musigma import context as contexts

        if given:
            return contexts.repeat(self._rows(given, label), n)
        if not self.spec.context and label is None:
            return None
        if self.needs_given:
            names = ", ".join(v.name for v in self.spec.context)
            raise ValueError(
                f"given: the model is conditioned on {names}; give the rows to generate by "
                "(--given FILE)"
            )
        return self.class_rows(n, label)

    @property
    def class_variable(self) -> Variable | None:
        """The classes that `--label` chooses from, if the model is conditioned on any."""
        variables = self.spec.context
        classes = (
            v for v in variables if v.classes and (v.name == "label" or len(variables) == 1)
        )
        return next(classes, None)

    @property
    def needs_given(self) -> bool:
        """Whether samples need rows of `--given`: the context is more than the class."""
        return any(v is not self.class_variable for v in self.spec.context)

    def class_rows(self, n: int, label: str | None) -> Tensor:
        """One-hot rows of a class, or of all classes in turn."""
        import torch

        variable = self._classes()
        if label is None:
            which = torch.arange(n) % variable.classes
        else:
            which = torch.full((n,), class_number(label, variable.names, variable.classes))
        return torch.nn.functional.one_hot(which, variable.classes).to(self.device, self.dtype)

    def _classes(self) -> Variable:
        if self.class_variable is None:
            raise ValueError("label: this model is not conditioned on classes; leave it out")
        return self.class_variable

    def _rows(self, given: Sequence[str], label: str | None) -> Context:
        """The context in files, as the model takes it."""
        import numpy as np

        from musigma import data
        from musigma.evaluation import batch, check

        if not self.spec.context:
            raise ValueError("given: the model is not conditioned on anything; leave it out")
        wanted = [v for v in self.spec.context if v.name != "label" or label is None]
        rows = data.given_rows(given, wanted)
        n = len(next(iter(rows.values())))
        blank = np.zeros((1, *self.shape), np.float32 if self.bits is None else np.uint8)
        preprocess = data.Preprocess.from_json(self.about_data.get("preprocess", {}))
        found = data.Dataset(
            np.broadcast_to(blank, (n, *self.shape)), name="--given", preprocess=preprocess
        )
        found = dataclasses.replace(found, given=rows)
        if label is not None:
            found = self._labelled(found, label)
        check(self.model, found)
        return batch(found, np.arange(n), self.model)[1]

    def _labelled(self, found: Dataset, label: str) -> Dataset:
        """Data whose examples are all of one class."""
        import numpy as np

        variable = self._classes()
        number = class_number(label, variable.names, variable.classes)
        names = variable.names or tuple(map(str, range(variable.classes)))
        labels = np.full(len(found), number, np.int64)
        return dataclasses.replace(found, labels=labels, label_names=names)

    def blank_context(self, n: int) -> Context:
        """A context of n rows of zeros."""
        import torch

        context = {
            v.name: torch.zeros(n, *v.shape, dtype=self.dtype, device=self.device)
            for v in self.spec.context
        }
        return self.as_context(context)

    def named_context(self, context: Context) -> Mapping[str, Tensor]:
        """A context by the names of its variables."""
        if len(self.spec.context) > 1:
            return context  # pyright: ignore[reportReturnType]
        return {v.name: context for v in self.spec.context}  # pyright: ignore[reportReturnType]

    def as_context(self, named: Mapping[str, Tensor]) -> Context:
        """A context by the names of its variables as the model takes it."""
        if len(self.spec.context) > 1:
            return named
        return next(iter(named.values()), None)

    def latents(self) -> list[Tensor]:
        """The latents of no examples, top first: tensors of shapes (0, *s)."""
        import torch

        blank = torch.zeros(1, *self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return [z[:0] for z in self.model.encode(blank, self.blank_context(1))]

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


def portable(item: str) -> str:
    """An item of `--given` that does not depend on the working directory."""
    from musigma import data
    from musigma.data.attach import is_source

    return data.identity(item) if item != "label" and is_source(item) else item


def class_number(label: str, names: Sequence[str], classes: int) -> int:
    """The number of a class that is given by its name, or by its number unless names are numbers.

    >>> class_number("dog", ["cat", "dog"], 2), class_number("0", ["cat", "dog"], 2)
    (1, 0)
    >>> class_number("10", ["1", "10", "2"], 3)
    1
    """
    if label in names:
        return list(names).index(label)
    named_by_numbers = bool(names) and all(name.isdecimal() for name in names)
    if label.isdecimal() and int(label) < classes and not named_by_numbers:
        return int(label)
    expected = [] if named_by_numbers else [f"0 to {classes - 1}"]
    expected += [f"one of {', '.join(names)}"] if names else []
    raise ValueError(f"label: expected {', or '.join(expected)}; got {label!r}")


def as_array(x: Tensor) -> np.ndarray:
    """A tensor as an array on the CPU."""
    return x.detach().cpu().numpy()


def devices() -> list[str]:
    """The devices of this machine, as `--device` takes them; the CPU is last."""
    import torch

    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if gpu is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return [*([gpu.type] if count == 1 else [f"{gpu.type}:{i}" for i in range(count)]), "cpu"]


def device_named(name: str | None) -> torch.device:
    """The device of a name, or the best one.

    Raises:
        ValueError: If this machine has no such device, naming those that it has.
    """
    import torch

    name = name or devices()[0].partition(":")[0]
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and (local := os.environ.get("LOCAL_RANK")):
            device = torch.device("cuda", int(local) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = devices()
        reason = ""
        if name in known or f"{name}:0" in known:
            reason = f" (it is found, but fails: {str(error).splitlines()[0]})"
        raise ValueError(
            f"device: {name!r} cannot be used on this machine{reason}; it has {', '.join(known)}"
        ) from error
    return device
