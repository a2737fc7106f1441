"""Records: a figure of a model on data, and all that it depends on, as one JSON file.

A record also holds the nats of every example, so `musigma.evaluation.paired` can compare those of
several models on the same examples in pairs.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from musigma import __version__, checkpoint
from musigma.data import Dataset
from musigma.distributions import are_counted
from musigma.evaluation.annealing import Annealing
from musigma.evaluation.bounds import draws_of
from musigma.evaluation.figures import mean, scores
from musigma.files import finite, write_json
from musigma.model import Model
from musigma.spec import bits_per_dim

__all__ = ["Record", "record"]

FORMAT = "musigma-figure/1"

UNITS = {
    "bits/dim": ("bits_per_dim", "standard_error"),
    "nats per example": ("nats", "standard_error_nats"),
}
"""The fields of the figure and its standard error in each unit."""

FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("bound", "unit", "measure", "split", "version", "date"), str),
    **dict.fromkeys(("n", "k", "seed", "batch_size"), int),
    **dict.fromkeys(("data.source", "data.digest", "weights.digest"), str),
    **dict.fromkeys(("data.preprocess", "context", "model"), dict),
    **{"data.shape": list, "data.seen": bool},
    **{"annealing": (dict, type(None)), "dequantization": (str, type(None))},
}
"""What every record has, beside the figure itself, and its type."""


@dataclass(frozen=True, eq=False)
class Record:
    """A figure, what it is a figure of, and the scores that it is the mean of.

    Attributes:
        fields: JSON values: the figure, as `evaluate` returns it, and what `record` adds.
        nats: -log p of every example, or its bound, float64 (N,).
    """

    fields: Mapping[str, Any]
    nats: np.ndarray

    @property
    def value(self) -> tuple[float | None, float | None]:
        """The figure in the unit of the record, and its standard error; None if not finite."""
        value, error = (self.fields[name] for name in UNITS[self.fields["unit"]])
        return value, error

    @property
    def scores(self) -> np.ndarray:
        """The figure of every example in the unit of the record, (N,)."""
        dims = math.prod(self.fields["data"]["shape"])
        return bits_per_dim(self.nats, dims) if self.fields["unit"] == "bits/dim" else self.nats

    def with_fields(self, **more: Any) -> Record:
        """The same record with further fields, which are JSON values."""
        return replace(self, fields={**self.fields, **finite(more)})

    def write(self, path: str | Path) -> None:
        """Write a .json file, completely or not at all.

        Raises:
            OSError: If it cannot be written; an existing file does not change.
        """
        packed = base64.b64encode(self.nats.astype("<f8").tobytes()).decode()
        fields = {**self.fields, "scores": packed}
        write_json(path, {**fields, "digest": checkpoint.digest(fields, {})})

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """The record in a file, or that of the held-out data in a run folder.

        Raises:
            ValueError: If there is none, it was changed or damaged, or it is of another format.
        """
        path = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a whole JSON file ({error}); copy it again") from error
        form = fields.get("format") if isinstance(fields, dict) else None
        if form != FORMAT:
            raise ValueError(
                f"{path}: expected a record of format {FORMAT}, which `musigma evaluate RUN DATA "
                f"--out {path.name}` writes; got {'no record' if form is None else repr(form)}"
            )
        if fields.pop("digest", None) != checkpoint.digest(fields, {}):
            raise ValueError(
                f"{path}: its content does not match its digest, so it was changed or damaged "
                "after it was written; copy it again, or evaluate again"
            )
        wrong = [name for name, kind in FIELDS.items() if not isinstance(_at(fields, name), kind)]
        wrong += [name for name in UNITS.get(fields["unit"], ()) if name not in fields]
        wrong += ["unit"] if fields["unit"] not in UNITS else []
        packed = base64.b64decode(str(fields.pop("scores", "")))
        nats = np.frombuffer(packed, "<f8").astype(np.float64)
        wrong += ["scores"] if not wrong and len(nats) != fields["n"] else []
        if wrong:
            raise ValueError(f"{path}: a record without usable {', '.join(wrong)}")
        return cls(fields, nats)


def _at(fields: Any, name: str) -> Any:
    """The value of a dotted name; None if there is none."""
    step = lambda found, key: found.get(key) if isinstance(found, dict) else None  # noqa: E731
    return reduce(step, name.split("."), fields)


def record(
    model: Model,
    data: Dataset,
    *,
    k: int | Sequence[int] = 1,
    annealing: Annealing | None = None,
    seed: int = 0,
    batch_size: int = 64,
    split: str = "all",
    seen: bool = False,
    weights: Mapping[str, Any] | None = None,
    **how: Any,
) -> Record:
    """Evaluate a model, and record what the figure is a figure of.

    Args:
        model: The model. It is set to evaluation mode during the call.
        data: The examples to evaluate.
        k: Draws per example, as in `score`; of several numbers the largest is recorded.
        annealing: How draws are annealed to the posterior, as in `score`.
        seed: Random seed of the draws.
        batch_size: Examples per batch, on which draws depend.
        split: The part of their source that the data are.
        seen: Whether the model was trained on some of them, or its weights chosen by them.
        weights: What is known of the weights; a checkpoint of `fit` says how they were averaged,
            after which step, and whether validation data chose them.
        **how: `progress` and `processes`, as in `score`.

    Returns:
        The figure, as `evaluate` returns it, and in `fields`: its `unit`; `measure`, the
        probability or density whose logarithm it is; `data`, with a digest of the examples, their
        shape and preprocessing; `dequantization`; the digest of every variable of the `context`;
        digests of the model's configuration and weights; the arguments, version and date.

    Raises:
        ValueError: As `evaluate`.

    Example:
        >>> from musigma.distributions import StandardNormal
        >>> from musigma.model import Prior
        >>> found = record(Prior(StandardNormal((2,))), Dataset(np.zeros((5, 2), np.float32)))
        >>> found.fields["bound"], found.fields["measure"], round(found.value[0], 4)
        ('exact', 'density', 1.8379)
    """
    how |= {"k": k, "annealing": annealing, "seed": seed, "batch_size": batch_size}
    table = scores(model, data, **how)
    variables = () if model.spec is None else model.spec.context
    preprocess = {} if data.bits is None else data.preprocess.to_json()
    if data.preprocess.is_drawn:
        preprocess |= {"seed": seed, "batch_size": batch_size}  # other draws are other examples
    fields = {
        "format": FORMAT,
        **mean(model, table, k, annealing),
        "unit": "nats per example" if data.bits is None else "bits/dim",
        "measure": _measure(model, data),
        "k": 1 if model.exact else draws_of(k)[-1],
        "annealing": None if annealing is None else asdict(annealing),
        "seed": seed,
        "batch_size": batch_size,
        "split": split,
        "data": {
            "source": Path(data.name).name
            or data.name,  # not where it lies, as records are shared
            "digest": _hash(data.content().astype("<u8").tobytes()),
            "shape": data.shape,
            "preprocess": preprocess,
            "seen": seen,
        },
        "dequantization": _dequantization(model),
        "context": {v.name: _hash(_content(data, v.name)) for v in variables},
        "model": {
            "architecture": model.config.get("architecture"),
            "digest": checkpoint.digest(model.config, {}),
        },
        "weights": {"digest": checkpoint.digest({}, model.state_dict()), **(weights or {})},
        "version": __version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    return Record(json.loads(json.dumps(finite(fields))), table["nats"])


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _content(data: Dataset, name: str) -> bytes:
    """The bytes of a variable of the context."""
    if name == "label" and data.labels is not None:
        names = "\0".join([*data.label_names, ""]).encode()
        return names + data.labels.astype("<i8").tobytes()
    return data.given[name].content()


def _measure(model: Model, data: Dataset) -> str:
    """Whether log p of a row is that of a probability, of a density, or of both."""
    if data.bits is not None or are_counted(model):
        return "probability"
    columns = () if data.schema is None else data.schema.columns
    discrete = [column.name for column in columns if column.is_discrete]
    if not discrete:
        return "density"
    if len(discrete) == len(columns):
        return "probability"
    return f"probability of {', '.join(discrete)}, density of the other columns"


def _dequantization(model: Model) -> str | None:
    """The noise that a model adds to what has a probability; None if it adds none."""
    for layer in model.modules():
        noise: Any = getattr(layer, "noise", None)
        if getattr(layer, "is_preprocessing", False) and not layer.exact:
            learned = any(True for _ in noise.parameters())
            return "learned noise" if learned else "uniform noise"
    return None
