"""A run folder or a checkpoint file, opened for use."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli.options import Common, DataOptions, Reading, at_least_one, image_size
from musigma.cli.outputs import check_draws, check_out, write_draws, write_rows, write_table
from musigma.cli.screen import Screen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from musigma.any_order import AnyOrder
    from musigma.context import Context
    from musigma.data import Dataset, Preprocess
    from musigma.spec import Spec, Variable

TABLES = (".csv", ".parquet")
ROWS = 1024  # vectors whose exact density is computed at once, at least
FARTHEST = 10  # variables outside their training range that are named


def read_data(
    source: str, preprocess: Preprocess, reading: Reading, screen: Screen, **how: Any
) -> Dataset:
    """Read a data set with a progress bar; `how` is as `musigma.data.load` takes it."""
    from musigma import data

    how |= dataclasses.asdict(reading)
    with screen.progress("reading") as progress:
        return data.load(source, preprocess=preprocess, progress=progress, **how)


def of_pairs(spec: Spec) -> bool:
    """Whether a model is a density of vectors given a context, whose unit is the nat."""
    return spec.bits is None and len(spec.shape) == 1 and bool(spec.context)


class Trained:
    """A trained model, with what its checkpoint says about its data.

    Attributes:
        model: The model, on the device that was asked for, in evaluation mode.
        extra: Other content of the checkpoint; `about_data` is the part about the data that the
            model was trained on.
        spec: The specification of the model, with `shape` and `bits` of an example; `is_image` if
            an example is an image, not a vector; `levels` of each element in a picture.
        class_variable: The classes that `--label` chooses from, if the model is conditioned on
            any; `needs_given` if the context is more than the class.
        screen: The output of the command.
        folder: The run folder; None for a checkpoint file.
        part: The part of the data that `data` returned last.
        outside: Number of rows of those data that are outside the support of the model.
        extrapolation: Lines about context that is far outside the range of the training data.
        seen: Whether those data are what the model was trained on.
        given: The context of those data: items of `--given`.

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
        self.seen, self.outside = False, 0
        self.extrapolation: list[str] = []
        self.others = 0
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
        self.about_data: dict[str, Any] = self.extra.get("data") or {}
        assert self.model.spec is not None  # every model from the zoo has one
        self.spec = spec = self.model.spec
        self.shape, self.bits, self.levels = spec.shape, spec.bits, 2 ** (spec.bits or 8)
        self.is_image = len(self.shape) == 3
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.dtype = next(t.dtype for t in tensors if t.is_floating_point())
        only = len(spec.context) == 1
        classes = (v for v in spec.context if v.classes and (v.name == "label" or only))
        self.class_variable = next(classes, None)
        self.needs_given = any(v is not self.class_variable for v in spec.context)
        self.common, self.screen = common, Screen(common)
        torch.manual_seed(common.seed)

    @property
    def of_pairs(self) -> bool:
        """Whether the model is a density of vectors given a context, whose unit is the nat."""
        return of_pairs(self.spec)

    # --- inputs of a model ---------------------------------------------------------------------

    def sized(self, options: DataOptions) -> DataOptions:
        """The same options; at least `ROWS` vectors in a batch if their density is exact.

        Nothing is drawn then, so no figure depends on the batch.
        """
        if not self.model.exact or len(self.shape) != 1:
            return options
        return dataclasses.replace(options, batch_size=max(options.batch_size, ROWS))

    @property
    def preprocess(self) -> Preprocess:
        """How the training data were prepared."""
        from musigma import data

        return data.Preprocess.from_json(self.about_data.get("preprocess", {}))

    def data(
        self,
        source: str,
        options: DataOptions,
        label: str | None = None,
        column: str | None = None,
    ) -> Dataset:
        """Data prepared as in training, of the requested part.

        Args:
            source: A path, a URL or a name.
            options: How to read them, and the part.
            label: The class of all examples; by default as in the data.
            column: A column of the table to read beside those of the model: `label`, or another
                one, as a variable of `Dataset.given`.
        """
        from musigma import data
        from musigma.data.attach import is_source
        from musigma.evaluation import check

        saved, preprocess = self.about_data, self.preprocess
        if options.size is not None:
            preprocess = dataclasses.replace(preprocess, size=image_size(options.size))
        if self.is_image and source.endswith((".csv", ".tsv")):
            size = " x ".join(map(str, self.shape))
            raise ValueError(
                f"DATA: expected images of {size}, as in training; {source} is a table"
            )
        here, there = data.identity(source), saved.get("source")
        self.given = options.given or tuple(
            item for item in saved.get("given", ()) if here == there or not is_source(item)
        )
        loaded = read_data(
            source,
            preprocess,
            options.reading,
            self.screen,
            given=[
                *(item for item in self._named(self.given) if item != "label" or label is None),
                *([] if column is None else [glob.escape(column)]),
            ],
            **self._columns(options),
            unlabeled=any(getattr(m, "partly_labeled", False) for m in self.model.modules()),
            channels=3 if self.is_image and self.shape[0] == 3 else None,
            allow_constant=True,
        )
        for name, reason in loaded.skipped.items():
            self.screen.note(f"left out: {name} {reason}")
        for note in loaded.notes:
            self.screen.note(note)
        found = self._labeled(loaded, label)
        check(self.model, found)
        self._note_outside(found)
        plain = loaded
        if column is not None and column not in self.given:  # the run may know its data without
            given = {name: v for name, v in loaded.given.items() if name != column}
            labels = None if column == "label" else loaded.labels
            plain = dataclasses.replace(loaded, given=given, labels=labels)
        digest, n = saved.get("digest"), saved.get("n", len(loaded))
        same = digest is not None and n == len(loaded)  # otherwise no row need be hashed
        same = same and digest in (data.digest(loaded), data.digest(plain))
        seen = self.seen = same or (there is not None and Path(here).is_relative_to(there))
        if not seen:
            self._note_extrapolation(found)
        if here == there and not same and digest and column is None:
            self.screen.note(f"{source} has changed since this model was trained on it")
        self.part = options.split or ("held-out" if seen else "all")
        return found.split(self.part)

    def _named(self, given: Sequence[str]) -> tuple[str, ...]:
        """Items of `--given`, with the columns of the model's context in place of patterns.

        Other data may have more columns that match. They are kept if files are given, too, whose
        variables the model also has.
        """
        from musigma.data.attach import is_source
        from musigma.data.pairs import matching

        patterns = [item for item in given if item != "label"]
        names = [v.name for v in self.spec.context if v.name != "label"]
        if any(is_source(item) for item in patterns) or not patterns:
            return tuple(given)
        known = {names[j] for pattern in patterns for j in matching(names, pattern)}
        if known != set(names):  # as they are given now, which another check compares
            return tuple(given)
        return (*(["label"] if "label" in given else []), *names)

    def _note_outside(self, found: Dataset) -> None:
        """Say which rows are outside the support, where a model has no density."""
        if self.spec.support is None:
            return
        self.outside, faults = found.outside(self.spec.support)
        if bad := self.outside:
            from musigma.data.errors import listing

            self.screen.note(
                f"{bad:,} of {len(found):,} rows are outside the bounds of the model, where the "
                f"log density is -inf:\n{listing(faults)}"
            )

    def _note_extrapolation(self, found: Dataset) -> None:
        """Warn of context, and of columns, that are far outside the range of the training data."""
        from musigma import data

        if lines := data.shifted(self.about_data.get("columns") or {}, found):
            listed = "".join(f"\n  {line}" for line in lines[:FARTHEST])
            self.screen.note(
                "warning: most of these data lie outside the range of what the model was trained "
                f"on; are they in the same units?{listed}"
            )
        known = self.about_data.get("ranges") or {}
        if lines := data.outside(known, found.given):
            self.extrapolation = lines
            more = f"\n  and {len(lines) - FARTHEST} more variables" * (len(lines) > FARTHEST)
            listed = "".join(f"\n  {line}" for line in lines[:FARTHEST])
            self.screen.note(
                "warning: the context is far from what the model was trained on, so its answers "
                f"there are extrapolation:{listed}{more}"
            )

    def _note_others(self, found: Dataset) -> None:
        """Warn of observations other than the one that the model was trained for."""
        from musigma import data

        wanted = self.about_data.get("observed")
        self.others = sum(wanted not in (None, one) for one in data.fingerprints(found.given))
        if self.others:
            self.screen.note(
                "warning: the model was trained for one observation, on simulations that were "
                f"proposed for it (--observed); {self.others:,} of {len(found):,} given here are "
                "others, for which its answers are not valid"
            )

    @property
    def evaluated(self) -> dict[str, Any]:
        """What a record of a figure of those data says, beside the figure."""
        seen = self.seen and self.part != "held-out"
        return {"split": self.part, "seen": seen, "weights": self.extra.get("weights")}

    @property
    def warnings(self) -> dict[str, Any]:
        """Entries of a JSON answer about context that the model was not trained for, if any."""
        found = {"extrapolation": self.extrapolation, "other_observations": self.others}
        return {name: value for name, value in found.items() if value}

    def _columns(self, options: DataOptions) -> dict[str, Any]:
        """The columns of a table to read, with their types if the model has any."""
        how = {"columns": self.spec.columns or None, "of": self.about_data.get("of", ())}
        if self.spec.schema is None:
            return how
        return {**how, "schema": self.spec.schema, "unseen": options.unseen}

    def examples(
        self, source: str, options: DataOptions, n: int, label: str | None = None
    ) -> tuple[Tensor, Context]:
        """The first n examples of the data, with their context."""
        import numpy as np

        from musigma.evaluation import batch

        at_least_one(n=n)
        found = self.data(source, options, label)
        return batch(found, np.arange(min(n, len(found))), self.model, seed=self.common.seed)

    def any_order(self, option: str) -> AnyOrder:
        """The density of typed columns in the model, for an option or a command that needs one."""
        from musigma.any_order import AnyOrder

        inner = getattr(self.model, "model", self.model)
        if not isinstance(inner, AnyOrder):
            raise ValueError(f"{option}: only models of `musigma train table` can do this")
        return inner

    @property
    def mixed(self) -> str:
        """What scores differ between, if the model is a mixture."""
        return "between members" if hasattr(self.model, "members") else "between orders"

    def check_latents(self, command: str) -> None:
        """Refuse a command about latents if the model has none."""
        if reason := self.model.no_latents:
            raise ValueError(f"{command}: {reason}")

    def context(self, n: int, label: str | None = None, given: Sequence[str] = ()) -> Context:
        """The context of generated examples: n rows of a class, or n for each row of `given`.

        Args:
            n: Number of rows, or of copies of each row.
            label: Class by name or number. By default all classes in turn.
            given: Files with a row for each example to generate.

        Raises:
            ValueError: If the model is conditioned on something that is not given, or on nothing.
        """
        from musigma import context as contexts

        if given:
            return contexts.repeat(self.observations(given, label)[0], n)
        if not self.spec.context and label is None:
            return None
        if self.needs_given:
            names = ", ".join(v.name for v in self.spec.context)
            raise ValueError(
                f"given: the model is conditioned on {names}; give the rows to condition on "
                "(--given FILE)"
            )
        return self.class_rows(n, label)

    def class_rows(self, n: int, label: str | None) -> Tensor:
        """One-hot rows of a class, or of all classes in turn."""
        import torch

        variable, number = self._class(label)
        which = torch.arange(n) % variable.classes if number is None else torch.full((n,), number)
        return torch.nn.functional.one_hot(which, variable.classes).to(self.device, self.dtype)

    def _class(self, label: str | None) -> tuple[Variable, int | None]:
        """The variable that `--label` is about, and the number of a class."""
        if (variable := self.class_variable) is None:
            raise ValueError("label: this model is not conditioned on classes; leave it out")
        known = variable.names, variable.classes
        return variable, None if label is None else class_number(label, *known)

    def observations(
        self, given: Sequence[str], label: str | None = None
    ) -> tuple[Context, tuple[str, ...] | None]:
        """The context in files, one row for each observation, and their names, if there are any.

        Warns of rows that are far outside the range of the training data.

        Args:
            given: Files with a row for each observation.
            label: The class of all of them, if it is in no file.
        """
        import numpy as np

        from musigma import data
        from musigma.data.attach import observations
        from musigma.evaluation import batch, check

        if not self.spec.context:
            raise ValueError("given: the model is not conditioned on anything; leave it out")
        wanted = [v for v in self.spec.context if v.name != "label" or label is None]
        rows, names = observations(given, wanted)
        n = len(next(iter(rows.values())))
        blank = np.zeros((1, *self.shape), np.float32 if self.bits is None else np.uint8)
        x = np.broadcast_to(blank, (n, *self.shape))
        found = data.Dataset(x, name="--given", preprocess=self.preprocess, given=rows)
        found = self._labeled(found, label)
        check(self.model, found)
        self._note_extrapolation(found)
        self._note_others(found)
        return batch(found, np.arange(n), self.model)[1], names

    def _labeled(self, found: Dataset, label: str | None) -> Dataset:
        """Data whose examples are all of one class, if it is given."""
        import numpy as np

        if label is None:
            return found
        variable, number = self._class(label)
        names = variable.names or tuple(map(str, range(variable.classes)))
        labels = np.full(len(found), number, np.int64)
        return dataclasses.replace(found, labels=labels, label_names=names)

    def as_context(self, named: Mapping[str, Tensor]) -> Context:
        """The variables of a context by their names, as the model takes them."""
        return named if len(self.spec.context) > 1 else next(iter(named.values()), None)

    def nothing(self) -> tuple[list[Tensor], Context]:
        """Empty latents, top first, of shapes (0, *s), and their empty context."""
        import torch

        from musigma import context as contexts

        def zeros(shape: tuple[int, ...], dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(1, *shape, dtype=dtype, device=self.device)

        context = self.as_context({v.name: zeros(v.shape) for v in self.spec.context})
        with torch.no_grad():
            x = zeros(self.shape, self.dtype if self.spec.schema is None else torch.float64)
            latents = self.model.encode(x, context)
        return [z[:0] for z in latents], contexts.rows(context, slice(0))

    # --- outputs of a model --------------------------------------------------------------------

    def check_out(self, out: Path, *more: str) -> None:
        """Refuse a file that `write` could not write, before anything is computed for it.

        Args:
            out: The file.
            more: Other kinds of files that a command writes.
        """
        check_out(out, ".png", ".npy", ".npz", *(() if self.is_image else TABLES), *more)
        if out.suffix == ".png" and not self.is_image and self.shape != (2,):
            raise ValueError(
                f"out: examples of shape {self.shape} are not pictures; name a .csv, .parquet, "
                ".npy or .npz file"
            )

    def write_rows(self, rows: Tensor, out: Path) -> None:
        """Rows of examples (R, C, *event), as a picture with C columns, a table or an array."""
        if out.suffix == ".png" or out.suffix in TABLES:
            self.write(rows.flatten(0, 1), out, columns=rows.shape[1])
        else:
            self.write(rows, out)

    def write(
        self,
        x: Tensor,
        out: Path,
        columns: int | None = None,
        beside: dict[str, Any] | None = None,
    ) -> None:
        """Examples as a picture, a table or an array, by the suffix of the file.

        Args:
            x: The examples.
            out: The file.
            columns: Columns of a picture.
            beside: First columns of a table, and further arrays of an .npz file, with a row for
                each example.
        """
        import numpy as np

        from musigma.data.columns import decode
        from musigma.files import replacing
        from musigma.report import figures

        self.check_out(out)
        values, schema = self._written(x), self.spec.schema
        if out.suffix in TABLES and schema is not None:
            table = decode(values, schema)
            for name, rows in reversed(list((beside or {}).items())):
                table = table.add_column(0, name, [rows])
            write_table(out, table, schema)
        elif out.suffix in TABLES:  # the columns are those of the table it was trained on
            names = self.spec.columns or [f"x{i}" for i in range(self.shape[0])]
            write_rows(out, [{**(beside or {}), **dict(zip(names, values.T, strict=True))}])
        elif out.suffix == ".png" and self.is_image:
            figures.grid(values, out, levels=self.levels, columns=columns)
        elif out.suffix == ".png":
            figures.points(values, out)
        else:
            with replacing(out) as draft, draft.open("wb") as file:
                if out.suffix == ".npy":
                    np.save(file, values)
                else:
                    np.savez_compressed(file, x=values, **(beside or {}))

    def _written(self, x: Tensor) -> np.ndarray:
        """Examples as they are written.

        Raises:
            ValueError: If some are not finite.
        """
        import numpy as np

        values = x.numpy(force=True)
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        typed = self.spec.schema is not None  # NaN is missing
        good = ~np.isinf(flat) if typed else np.isfinite(flat)
        if bad := int((~good.all(1)).sum()):
            raise ValueError(
                f"out: {bad} of {len(values)} examples are not finite, so nothing is written; a "
                "lower --temperature (for edit, a smaller --strength) may help"
            )
        if self.bits is None:
            return values
        return values.clip(0, 2**self.bits - 1).astype(np.uint8)  # draws of integers have tails

    def check_draws(self, given: Sequence[str], label: str | None) -> None:
        """Refuse draws that a .nc file of ArviZ cannot hold, before any is made."""
        if self.spec.schema is not None:
            raise ValueError("out: write typed columns as a .csv or .parquet file")
        if self.class_variable is not None and label is None and not given:
            raise ValueError(
                "out: a .nc file holds the draws of one class: choose it (--label), give rows "
                "(--given), or name another kind of file"
            )
        check_draws([*self.spec.columns, *(v.name for v in self.spec.context)])

    def write_draws(
        self,
        x: Tensor,
        observed: Context,
        observations: int,
        names: Sequence[str] | None,
        out: Path,
        **about: Any,
    ) -> None:
        """The draws for each observation, one after another, as a .nc file of ArviZ.

        Args:
            x: All draws, those of one observation after another.
            observed: The context of each observation.
            observations: Number of observations.
            names: Their names, if they have any.
            out: The file.
            about: Attributes of the file, beside the model's.
        """
        import numpy as np
        from torch import Tensor

        from musigma import __version__
        from musigma.coding.archive import model_digest

        values = self._written(x)
        n = len(values) // observations
        given = {}
        for v in self.spec.context:
            t: Any = observed if isinstance(observed, Tensor) else (observed or {})[v.name]
            rows = t.numpy(force=True)
            if v.classes:
                rows = np.array(v.names or range(v.classes))[rows.argmax(1)]
            given[v.name] = rows[:, 0] if v.shape == (1,) else rows
        write_draws(
            out,
            values.reshape(observations, n, *values.shape[1:]),
            self.spec.columns,
            given,
            names,
            inference_library="musigma",
            inference_library_version=__version__,
            architecture=self.model.config["architecture"],
            model_digest=model_digest(self.model),
            seed=self.common.seed,
            **about,
        )

    def reconstruct(self, x: Tensor, context: Context, out: Path) -> Tensor:
        """Write reconstructions, in a picture below their originals; returns them."""
        import torch

        from musigma.report import figures

        with torch.no_grad():
            again = self.model.reconstruct(x, context)
        if out.suffix == ".png" and self.is_image:
            both = [t.numpy(force=True) for t in (x, again)]
            figures.rows(both, out, levels=self.levels)
        else:
            self.write(again, out)
        return again

    def interpolate(
        self, x: Tensor, context: Context, out: Path, steps: int = 9, **how: Any
    ) -> int:
        """Write paths from example 0 to 1, from 2 to 3, and so on; returns their number."""
        import torch

        from musigma import context as contexts

        n = len(x) // 2 * 2
        ends = (contexts.rows(context, slice(first, n, 2)) for first in (0, 1))
        with torch.no_grad():
            rows = self.model.interpolate(x[:n:2], x[1:n:2], steps, *ends, **how)
        self.write_rows(rows, out)
        return len(rows)

    def wrote(self, out: Path, what: str, **answer: Any) -> None:
        """Print the answer of a command that wrote a file."""
        self.screen.result({"out": str(out), **answer, **self.warnings}, f"{what}: {out}")


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
        known, reason = devices(), ""
        if name in known or f"{name}:0" in known:
            reason = f" (it is found, but fails: {str(error).splitlines()[0]})"
        raise ValueError(
            f"device: {name!r} cannot be used on this machine{reason}; it has {', '.join(known)}"
        ) from error
    return device
