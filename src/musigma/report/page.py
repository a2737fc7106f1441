"""A page of runs: figures and where they come from, curves, pictures, next commands.

Further sections, which other commands and scripts wrote as JSON, may follow the runs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from musigma.files import number, replacing, row_of
from musigma.report import figures
from musigma.report.axes import PlotsMissing
from musigma.report.html import Picture, picture, render, themed
from musigma.spec import bits_per_dim

__all__ = ["write"]

PICTURES = {
    "samples": "Samples: new examples drawn from the model",
    "reconstructions": "Reconstructions: originals above, decoded from their latents below",
    "interpolations": "Interpolations: from one example to another through latent space",
    "marginals": "Columns: shares of held-out rows (blue) and of samples (red)",
    "associations": "Associations of pairs of columns: of held-out rows, and of samples",
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
        sections: JSON files of further sections, which follow the runs in this order. The keys of
            each are `title`, a text; `text`, a list of paragraphs; `tables`, a list of objects
            with `head`, a list of names, and `rows`, a list of lists of texts and numbers; and
            `pictures`, an object of PNG files, relative to the JSON file, and their captions. All
            but `title` may be left out.

    Returns:
        The path.

    Raises:
        ValueError: If there are no runs, a run has no ``config.json``, or one of its files, or a
            section, is damaged.
    """
    path = Path(path)
    further = [_section(Path(section)) for section in sections]
    if not runs:
        raise ValueError("runs: expected at least one run folder; got none")
    loaded = [Run(Path(run)) for run in runs]
    names = Counter(run.name for run in loaded)
    for run in loaded:
        run.name = run.name if names[run.name] == 1 else str(run.path)
    text = render("runs.html.jinja", title=title, runs=loaded, sections=further)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def _section(path: Path) -> dict[str, Any]:
    """A section that is not a run."""
    if not path.is_file():
        raise ValueError(f"sections: there is no file {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        tables = [
            {"head": list(table["head"]), "rows": [list(row) for row in table["rows"]]}
            for table in value.get("tables", [])
        ]
        pictures = [
            picture(path.parent / name, str(alt), density=2)
            for name, alt in value.get("pictures", {}).items()
        ]
        text = list(value.get("text", []))
        return {"title": value["title"], "text": text, "tables": tables, "pictures": pictures}
    except (AttributeError, KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(
            f"sections: {path}: expected an object with title, and text, tables and pictures "
            f"where there are any; got {type(error).__name__}: {error}"
        ) from error


class Run:
    """The content of a run folder, as the page shows it."""

    def __init__(self, path: Path):
        if not (path / "config.json").is_file():
            raise ValueError(f"runs: {path} is not a run folder: it has no config.json")
        self.path, self.name = path, path.name or path.resolve().name or str(path)
        self.config = _json(path / "config.json", {})
        log = path / "metrics.jsonl"
        lines = log.read_bytes().splitlines() if log.is_file() else []
        self.metrics = [row for line in lines if (row := row_of(line)) is not None]
        self.evaluation = _json(path / "evaluation.json", {})
        self.entries = _json(path / "ledger.json", [])
        self.model: Mapping[str, Any] = self.config.get("model") or {}
        self.data: Mapping[str, Any] = self.config.get("data") or {}
        self.options: Mapping[str, Any] = self.model.get("options") or {}
        self.architecture = str(self.model.get("architecture", ""))
        self.shape = list(self.model.get("shape") or self.data.get("shape") or [])
        self.bits = self.data["bits"] if "bits" in self.data else self.options.get("bits", 8)
        self.discrete = self.bits is not None
        self.source = str(self.data.get("source") or "")
        # only the last part of a path, because pages are shared
        self.data_name = Path(self.source).name or self.source
        self.here = path_from_here(self.source)
        self.steps = [row for row in self.metrics if row.get("kind") == "train"]
        self.resumes = not self.evaluation and (path / "state.safetensors").is_file()

    @cached_property
    def figure(self) -> dict[str, Any] | None:
        """The final figure; without one, the last on validation data.

        Returns:
            `text` and `unit`; `n`, the number of examples; `step`, if it is not the final one;
            `bound`, as `musigma.evaluation.bound` names it, with its `method` and `draws`.
        """
        row, step = self.evaluation, None
        if not row:
            rows = [r for r in self.metrics if r.get("kind") == "evaluation"]
            if not rows:
                return None
            row, step = rows[-1], rows[-1]["step"]
        error = number(row.get("standard_error"))
        if not self.discrete:
            nats = number(row.get("standard_error_nats"))
            if nats is None and error is not None and self.shape:
                nats = error / bits_per_dim(1.0, math.prod(self.shape))
            error = nats
        bound = str(row.get("bound") or "")
        method, _, draws = bound.partition("-")
        return {
            "text": figure_text(
                number(row.get("bits_per_dim" if self.discrete else "nats")), error
            ),
            "unit": "bits/dim" if self.discrete else "nats per example",
            "n": row.get("n"),
            "step": step,
            "bound": bound,
            "method": method,
            "draws": draws or row.get("k"),
        }

    @cached_property
    def curves(self) -> list[Picture] | str:
        """A picture of each panel; or why there are none."""
        unit, drawn = "bits" if self.discrete else "nats", []
        for panel, alt in PANELS.items():

            def draw(path: Path, dark: bool, panel: figures.Panel = panel) -> None:
                figures.curves(self.metrics, path, unit=unit, panels=[panel], dark=dark)

            try:
                drawn.append(themed(draw, alt))
            except PlotsMissing as error:
                return f"No curves: {error}"
            except ValueError:
                continue  # there are no such rows
        return drawn

    @property
    def pictures(self) -> list[Picture]:
        """Samples, reconstructions and interpolations, where they exist."""
        density = 2 if len(self.shape) == 1 else 1  # a plot, or an image
        files = {self.path / "samples" / f"{name}.png": alt for name, alt in PICTURES.items()}
        return [picture(f, alt, density=density) for f, alt in files.items() if f.is_file()]

    @cached_property
    def ledger(self) -> dict[str, Any] | None:
        """Every term of every layer, the sums of the terms, and the total; None without terms."""
        rows, sums = [], {}
        for entry in self.entries:
            if (bits := number(entry.get("bits_per_dim"))) is not None:
                term = TERMS.get(str(entry.get("term")), str(entry.get("term")))
                row = {"name": entry.get("site", ""), "kind": entry.get("kind") or ""}
                rows.append({**row, "detail": term, "bits": bits})
                one = sums.setdefault(term, {"name": term, "kind": "", "detail": 0, "bits": 0.0})
                one["detail"], one["bits"] = one["detail"] + 1, one["bits"] + bits
        total, figure = sum(r["bits"] for r in rows), number(self.evaluation.get("bits_per_dim"))
        found = {"rows": rows, "sums": list(sums.values()), "total": total, "figure": figure}
        found["gap"] = figure is not None and abs(figure - total) > 5e-4
        return found if rows else None

    @property
    def configuration(self) -> dict[str, dict[str, Any]]:
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
        chosen = {
            name: {key.replace("_", " "): v for key, v in values.items() if v not in (None, [])}
            for name, values in sections.items()
        }
        return {name: values for name, values in chosen.items() if values}


# --- reading -----------------------------------------------------------------------------------


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


def path_from_here(path: str) -> str:
    """A path as seen from the working directory, if it lies below it."""
    below = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if below else path


# --- text --------------------------------------------------------------------------------------


def figure_text(value: float | None, error: float | None) -> str:
    """A figure to two digits of its standard error.

    >>> figure_text(1.23388, 0.00287), figure_text(None, None)
    ('1.2339 ± 0.0029', 'not finite')
    """
    if value is None:
        return "not finite"
    if not error:
        return f"{value:,.4f}"
    places = decimals(error)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def decimals(error: float | None) -> int:
    """The number of decimals that shows two digits of a standard error, up to 6.

    >>> decimals(0.00287), decimals(None)
    (4, 4)
    """
    return min(6, max(0, 1 - math.floor(math.log10(error)))) if error else 4
