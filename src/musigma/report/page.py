"""A page of runs: figures and where they come from, curves, pictures, next commands.

Further sections, which other commands and scripts wrote as JSON, may follow the runs.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from musigma.files import number, replacing, row_of
from musigma.report import figures
from musigma.report.html import render
from musigma.spec import bits_per_dim

__all__ = ["write"]

PICTURES = {
    "samples": "Samples: new examples drawn from the model",
    "reconstructions": "Reconstructions: originals above, decoded from their latents below",
    "interpolations": "Interpolations: from one example to another through latent space",
}
PANELS: dict[figures.Panel, str] = {
    "figure": "Training and validation figures over training steps",
    "latents": "Cost of each latent over training steps",
}
TERMS = {"log_p": "−log p", "log_q": "log q", "log_det": "−log |det|", "kl": "KL"}


def write(
    path: str | Path,
    runs: Sequence[str | Path],
    *,
    title: str = "musigma",
    sections: Sequence[str | Path] = (),
) -> Path:
    """Write a page of runs.

    Each folder must hold ``config.json``. The page also shows ``evaluation.json``,
    ``metrics.jsonl``, ``ledger.json`` and, in ``samples/``, ``samples.png``,
    ``reconstructions.png`` and ``interpolations.png``, where they exist.

    Args:
        path: The .html file.
        runs: Run folders, in the order of the page.
        title: Title of the page.
        sections: JSON files of further sections, as `Section.read` takes them; they follow the
            runs in this order.

    Returns:
        The path.

    Raises:
        ValueError: If there are no runs, a run has no ``config.json``, or one of its files is
            damaged.
    """
    path = Path(path)
    further = [Section.read(Path(section)) for section in sections]
    if not runs:
        raise ValueError("runs: expected at least one run folder; got none")
    loaded = [_read(Path(run)) for run in runs]
    names = Counter(run.name for run in loaded)
    for run in loaded:
        run.name = run.name if names[run.name] == 1 else str(run.path)
    text = render("runs.html.jinja", title=title, runs=loaded, sections=further)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


# --- what a template shows ---------------------------------------------------------------------


class Figure(NamedTuple):
    """The figure of a run: its value and what it is.

    Attributes:
        value: None if it is not finite.
        error: Its standard error, if known.
        unit: "bits/dim" or "nats per example".
        kind: What it is, in a word or two.
        about: What it is, in a sentence.
        bound: As `musigma.evaluation.bound` names it.
        n: Number of examples, if known.
    """

    value: float | None
    error: float | None
    unit: str
    kind: str
    about: str
    bound: str
    n: int | None

    @property
    def text(self) -> str:
        """The value, to two digits of its standard error.

        >>> Figure(1.23388, 0.00287, "bits/dim", "", "", "", None).text
        '1.2339 ± 0.0029'
        >>> Figure(None, None, "bits/dim", "", "", "", None).text
        'not finite'
        """
        if self.value is None:
            return "not finite"
        if not self.error:
            return f"{self.value:,.4f}"
        digits = min(6, max(0, 1 - math.floor(math.log10(self.error))))
        return f"{self.value:,.{digits}f} ± {self.error:,.{digits}f}"


class Picture(NamedTuple):
    """An image as a data URL, for light and for dark pages."""

    alt: str
    light: str
    dark: str | None
    width: int
    height: int


class Table(NamedTuple):
    """A table of texts and numbers."""

    head: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A section of the page that is not a run."""

    title: str
    text: list[str]
    tables: list[Table]
    pictures: list[Picture]

    @classmethod
    def read(cls, path: Path) -> Section:
        """A section from a JSON object.

        Its keys are `title`, a text; `text`, a list of paragraphs; `tables`, a list of objects
        with `head`, a list of names, and `rows`, a list of lists of texts and numbers; and
        `pictures`, an object of PNG files, relative to the JSON file, and their captions. All but
        `title` may be left out.

        Raises:
            ValueError: If the file is missing or holds anything else.
        """
        if not path.is_file():
            raise ValueError(f"sections: there is no file {path}")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            tables = [
                Table(
                    [str(name) for name in table["head"]],
                    [list(map(_plain, r)) for r in table["rows"]],
                )
                for table in value.get("tables", [])
            ]
            files = {path.parent / name: alt for name, alt in value.get("pictures", {}).items()}
            pictures = [_picture(file, str(alt), density=2) for file, alt in files.items()]
            return cls(
                str(value["title"]), list(map(str, value.get("text", []))), tables, pictures
            )
        except (AttributeError, KeyError, TypeError, OSError, ValueError) as error:
            raise ValueError(
                f"sections: {path}: expected an object with title, and text, tables and pictures "
                f"where there are any; got {type(error).__name__}: {error}"
            ) from error


class Row(NamedTuple):
    """A row of a table of bits per dimension."""

    name: str
    kind: str
    detail: str
    bits: float


class Ledger(NamedTuple):
    """The rows of a ledger, their sums by term, and the figure they should add up to."""

    rows: list[Row]
    sums: list[Row]
    total: float
    figure: float | None

    @property
    def gap(self) -> bool:
        """Whether the rows do not add up to the figure."""
        return self.figure is not None and abs(self.figure - self.total) > 5e-4


@dataclass
class Run:
    """The content of a run folder, as the page shows it."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: Mapping[str, Any]
    entries: list[dict[str, Any]]

    def __post_init__(self):
        self.model: Mapping[str, Any] = self.config.get("model") or {}
        self.data: Mapping[str, Any] = self.config.get("data") or {}
        self.options: Mapping[str, Any] = self.model.get("options") or {}
        self.architecture = str(self.model.get("architecture", ""))
        self.shape = list(self.model.get("shape") or self.data.get("shape") or [])
        self.source = str(self.data.get("source") or "")
        # only the last part of a path, because pages are shared
        self.data_name = Path(self.source).name or self.source
        self.non_finite = self.evaluation.get("non_finite") or 0

    @property
    def discrete(self) -> bool:
        """Whether the data are integer levels."""
        return self.bits is not None

    @property
    def bits(self) -> int | None:
        """Bits of the levels; None for continuous data."""
        return self.data["bits"] if "bits" in self.data else self.options.get("bits", 8)

    @cached_property
    def figure(self) -> Figure | None:
        """The final figure; without one, the last on validation data."""
        row, examples, note = self.evaluation, "held-out", ""
        if not row:
            rows = [r for r in self.metrics if r.get("kind") == "evaluation"]
            if not rows:
                return None
            row, examples = rows[-1], "validation"
            note = f", at step {row.get('step', 0):,}; there is no final evaluation yet"
        bound, n = str(row.get("bound") or ""), row.get("n")
        error = number(row.get("standard_error"))
        if not self.discrete:
            nats = number(row.get("standard_error_nats"))
            if nats is None and error is not None and self.shape:
                nats = error / bits_per_dim(1.0, math.prod(self.shape))
            error = nats
        quantity = "−log₂ p(x) per dimension" if self.discrete else "−log p(x)"
        kind, description = _described(bound, row.get("k"))
        mean = f", mean of {n:,} {examples} examples" if n else ""
        return Figure(
            number(row.get("bits_per_dim" if self.discrete else "nats")),
            error,
            "bits/dim" if self.discrete else "nats per example",
            kind if self.evaluation else f"{kind}, on validation data",
            f"{description} {quantity}{mean}{note}",
            bound,
            n,
        )

    @property
    def subtitle(self) -> str:
        """Model, data and length of training."""
        shape = " × ".join(map(str, self.shape)) + (", " if len(self.shape) > 1 else " ")
        values = f"{self.bits}-bit levels" if self.discrete else "continuous values"
        parts = [self.architecture or "a model", (shape + values).strip()]
        if isinstance(n := self.data.get("train"), int):
            parts.append(f"trained on {n:,} examples of {self.data_name}")
        elif self.source:
            parts.append(self.data_name)
        if steps := [row for row in self.metrics if row.get("kind") == "train"]:
            seconds = number(steps[-1].get("seconds"))
            duration = f" in {_duration(seconds)}" if seconds else ""
            parts.append(f"{steps[-1]['step']:,} steps{duration}")
        return " · ".join(parts)

    @property
    def terms(self) -> list[tuple[str, str]]:
        """Names and values of what the figure consists of."""
        row, terms = self.evaluation, []
        if self.discrete and (nats := number(row.get("nats"))) is not None:
            terms.append(("nats per example", f"{nats:,.2f}"))
        distortion, rate = number(row.get("log_px")), number(row.get("rate"))
        if distortion and rate is not None:
            terms += [("distortion, nats", f"{-distortion:,.2f}"), ("rate, nats", f"{rate:,.2f}")]
            kl = row.get("kl") or []
            if 1 < len(kl) <= 8:
                values = ", ".join(f"{v or 0:.2f}" for v in kl)
                terms.append(("KL of each latent, top first", values))
        return terms

    @cached_property
    def curves(self) -> list[Picture] | str:
        """A picture of each panel; or why there are none."""
        unit, drawn = "bits" if self.discrete else "nats", []
        with tempfile.TemporaryDirectory() as folder:
            light, dark = (Path(folder) / f"{name}.png" for name in ("light", "dark"))
            for panel, alt in PANELS.items():
                try:
                    figures.curves(self.metrics, light, unit=unit, panels=[panel])
                    figures.curves(self.metrics, dark, unit=unit, panels=[panel], dark=True)
                except figures.PlotsMissing as error:
                    return f"No curves: {error}"
                except ValueError:
                    continue  # there are no such rows
                drawn.append(_picture(light, alt, density=2, dark=dark))
        return drawn

    @property
    def pictures(self) -> list[Picture]:
        """Samples, reconstructions and interpolations, where they exist."""
        density = 2 if len(self.shape) == 1 else 1  # a plot, or an image
        files = {self.path / "samples" / f"{name}.png": alt for name, alt in PICTURES.items()}
        return [_picture(f, alt, density=density) for f, alt in files.items() if f.is_file()]

    @cached_property
    def ledger(self) -> Ledger | None:
        """Every term of every layer, and the sums of the terms."""
        rows, terms = [], {}
        for entry in self.entries:
            if (bits := number(entry.get("bits_per_dim"))) is not None:
                term = TERMS.get(str(entry.get("term")), str(entry.get("term")))
                terms.setdefault(term, []).append(bits)
                site, kind = entry.get("site", ""), entry.get("kind") or ""
                rows.append(Row(str(site), str(kind), term, bits))
        sums = [Row(term, "", str(len(bits)), sum(bits)) for term, bits in terms.items()]
        total, figure = sum(row.bits for row in rows), number(self.evaluation.get("bits_per_dim"))
        return Ledger(rows, sums, total, figure) if rows else None

    @property
    def configuration(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The options that are set, of model, data and training, and the versions."""
        data = {k: v for k, v in self.data.items() if k not in ("shape", "source", "digest")}
        preprocess = data.pop("preprocess", None)
        data |= preprocess if isinstance(preprocess, Mapping) else {}
        sections = {
            "Model": {"architecture": self.model.get("architecture"), **self.options},
            "Data": {"source": self.data_name, **data},
            "Training": self.config.get("train") or {},
            "Versions": self.config.get("versions") or {},
        }
        return [
            (name, [(key.replace("_", " "), _plain(value)) for key, value in chosen.items()])
            for name, values in sections.items()
            if (chosen := {k: v for k, v in values.items() if v is not None and v != []})
        ]

    @property
    def commands(self) -> list[str]:
        """What to run next."""
        folder, source = shlex.quote(str(self.path)), shlex.quote(_relative(self.source))
        image = len(self.shape) == 3
        suffix, n = "png" if image or self.shape == [2] else "npy", 64 if image else 1000
        commands = []
        if not self.evaluation and (self.path / "state.safetensors").is_file():
            commands.append(f"musigma train --resume {folder}")
        commands.append(f"musigma sample {folder} --n {n} --out samples.{suffix}")
        if self.source:
            exact = self.figure is not None and self.figure.bound == "exact"
            if image:
                commands.append(f"musigma reconstruct {folder} {source} --out reconstructions.png")
            commands += [
                f"musigma evaluate {folder} {source}{'' if exact else ' --k 16'}",
                f"musigma score {folder} {source} --out scores.csv",
            ]
        return [*commands, f"musigma info {folder} --ledger"]


# --- reading -----------------------------------------------------------------------------------


def _read(path: Path) -> Run:
    """A run folder."""
    if not (path / "config.json").is_file():
        raise ValueError(f"runs: {path} is not a run folder: it has no config.json")
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    return Run(
        path,
        path.name or path.resolve().name or str(path),
        _json(path / "config.json", {}),
        [row for line in lines if (row := row_of(line)) is not None],
        _json(path / "evaluation.json", {}),
        _json(path / "ledger.json", []),
    )


def _json(path: Path, missing: Any) -> Any:
    """The content of a JSON file, of the same type as `missing`, which stands for no file."""
    if not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"runs: {path} is not a JSON file: {error}") from error
    if not isinstance(value, type(missing)):
        raise ValueError(f"runs: {path} holds no {'list' if missing == [] else 'object'}")
    return value


def _picture(png: Path, alt: str, *, density: int, dark: Path | None = None) -> Picture:
    """A PNG file with `density` pixels to one pixel of the page."""
    content = png.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError(f"runs: {png} is not a PNG file")
    width, height = struct.unpack(">II", content[16:24])
    dark_url = None if dark is None else _url(dark.read_bytes())
    return Picture(alt, _url(content), dark_url, round(width / density), round(height / density))


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# --- text --------------------------------------------------------------------------------------


def _described(bound: str, k: Any) -> tuple[str, str]:
    """What a bound is, in a word or two, and as the start of a sentence."""
    if bound == "exact":
        return "exact", "Exact:"
    if bound == "elbo":
        return "upper bound", "Upper bound, by the one-draw ELBO, of"
    name, _, draws = bound.partition("-")
    if name == "iwae":
        return "upper bound", f"Upper bound, importance-weighted with {draws or k} draws, of"
    return bound or "unnamed bound", f"{bound.capitalize() or 'Unnamed bound'} of"


def _duration(seconds: float) -> str:
    """Seconds as text, in suitable units.

    >>> _duration(42.3), _duration(300.5), _duration(8100)
    ('42 s', '5 min', '2 h 15 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _plain(value: Any) -> str:
    """A JSON value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _relative(path: str) -> str:
    """A path as seen from the working directory, if it lies below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
