"""One HTML page of run folders: figures with their account, curves, pictures, what to do next.

The page is one file: its style is inside, its pictures are data, and it runs no script and fetches
nothing, which its content security policy also says.
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
from pathlib import Path
from typing import Any, NamedTuple

from musigma.files import number, replacing, row_of
from musigma.report import figures
from musigma.report.markup import Html, element, join, page, table

__all__ = ["write"]

PICTURES = {
    "samples": "Samples: new examples that the model draws",
    "reconstructions": "Reconstructions: originals above, from their latents below",
    "interpolations": "Interpolations: from one example to another, through the latents",
}
FOOTER = (
    "bits/dim: bits that a lossless code by this model takes for each pixel of each channel, or "
    "an upper bound of it; lower is better. ± is one standard error."
)
TERMS = {"log_p": "−log p", "log_q": "log q", "log_det": "−log |det|", "kl": "KL"}


def write(path: str | Path, runs: Sequence[str | Path], *, title: str = "musigma") -> Path:
    """Write a page of runs.

    Of each folder it shows ``config.json``, which there must be, and of the following what there
    is: ``evaluation.json``, ``metrics.jsonl``, ``ledger.json`` and, in ``samples/``,
    ``samples.png``, ``reconstructions.png`` and ``interpolations.png``.

    Args:
        path: The .html file.
        runs: Run folders, in the order of the page.
        title: Its title.

    Returns:
        The path.

    Raises:
        ValueError: If there are no runs, one has no ``config.json``, or a file of it is broken.
    """
    path = Path(path)
    if not runs:
        raise ValueError("runs: expected one run folder or more; got none")
    read = [_read(Path(run)) for run in runs]
    names = Counter(run.name for run in read)
    read = [r._replace(name=str(r.path)) if names[r.name] > 1 else r for r in read]
    sections = [_section(run, f"run-{i}") for i, run in enumerate(read, 1)]
    content = [_overview(read) if len(read) > 1 else Html(), *sections]
    with replacing(path) as draft:
        draft.write_text(page(title, content, FOOTER), encoding="utf-8")
    return path


# --- a run ---------------------------------------------------------------------------------------


class _Figure(NamedTuple):
    """A figure in its unit, and what it is."""

    value: float | None
    error: float | None
    unit: str
    kind: str
    about: str
    bound: str
    n: int | None


class _Run(NamedTuple):
    """What a run folder holds."""

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: Mapping[str, Any] | None
    ledger: list[dict[str, Any]]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.config.get("model") or {}

    @property
    def data(self) -> Mapping[str, Any]:
        return self.config.get("data") or {}

    @property
    def shape(self) -> list[int]:
        return list(self.model.get("shape") or self.data.get("shape") or [])

    @property
    def bits(self) -> int | None:
        return self.data["bits"] if "bits" in self.data else self.options.get("bits", 8)

    @property
    def options(self) -> Mapping[str, Any]:
        return self.model.get("options") or {}

    @property
    def source(self) -> str:
        return str(self.data.get("source") or "")

    @property
    def data_name(self) -> str:
        """The last part of a path: a page that is sent around should not tell the others."""
        return Path(self.source).name or self.source

    def figure(self) -> _Figure | None:
        """The final figure; before there is one, the last of the validation data."""
        row, whose, note = self.evaluation, "held-out", ""
        if row is None:
            rows = [r for r in self.metrics if r.get("kind") == "evaluation"]
            if not rows:
                return None
            row, whose = rows[-1], "validation"
            note = f", at step {row.get('step', 0):,}; there is no final evaluation yet"
        bound, n, k = str(row.get("bound") or ""), row.get("n"), row.get("k")
        discrete = self.bits is not None
        value = number(row.get("bits_per_dim" if discrete else "nats"))
        error = number(row.get("standard_error" if discrete else "standard_error_nats"))
        bits_error = number(row.get("standard_error"))
        if not discrete and error is None and bits_error is not None and self.shape:
            error = bits_error * math.prod(self.shape) * math.log(2)
        quantity = "−log₂ p(x) per dimension" if discrete else "−log p(x)"
        kind, how = _bound(bound, k)
        kind += "" if row is self.evaluation else ", on validation data"
        about = f"{how} {quantity}".strip() + (f", mean of {n:,} {whose} examples" if n else "")
        return _Figure(
            value,
            error,
            "bits/dim" if discrete else "nats per example",
            kind,
            about + note,
            bound,
            n,
        )


def _bound(bound: str, k: Any) -> tuple[str, str]:
    """What kind of figure it is: in a word, and in words."""
    if bound == "exact":
        return "exact", "Exact:"
    if bound == "elbo":
        return "upper bound", "Upper bound, by the one-draw ELBO, of"
    name, _, draws = bound.partition("-")
    if name == "iwae":
        return "upper bound", f"Upper bound, importance-weighted with {draws or k} draws, of"
    return bound or "unnamed bound", f"{bound.capitalize() or 'Unnamed bound'} of"


def _read(path: Path) -> _Run:
    """What there is in a run folder."""
    if not (path / "config.json").is_file():
        raise ValueError(f"runs: {path} is no run folder: it has no config.json")
    config = _json(path / "config.json", dict)
    metrics: list[dict[str, Any]] = []
    if (path / "metrics.jsonl").is_file():
        lines = (path / "metrics.jsonl").read_bytes().splitlines()
        metrics = [row for line in lines if (row := row_of(line)) is not None]
    evaluation = path / "evaluation.json"
    ledger = path / "ledger.json"
    return _Run(
        path,
        path.name or path.resolve().name or str(path),
        config,
        metrics,
        _json(evaluation, dict) if evaluation.is_file() else None,
        _json(ledger, list) if ledger.is_file() else [],
    )


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"runs: {path} is no JSON file: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"runs: {path} holds no {'object' if kind is dict else 'list'}")
    return value


# --- HTML ----------------------------------------------------------------------------------------


def _picture(png: Path, alt: str, *, dark: Path | None = None, density: int = 1) -> Html:
    """An image as data; with `density` pixels of the file to one of the page."""
    content, width, height = _png(png)
    image = element(
        "img",
        src=content,
        alt=alt,
        width=round(width / density),
        height=round(height / density),
    )
    if dark is None:
        return image
    other = element("source", srcset=_png(dark)[0], media="(prefers-color-scheme: dark)")
    return element("picture", other, image)


def _png(path: Path) -> tuple[str, int, int]:
    """A PNG file as data, its width and its height."""
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError(f"runs: {path} is no PNG file")
    width, height = struct.unpack(">II", content[16:24])
    return "data:image/png;base64," + base64.b64encode(content).decode(), width, height


# --- parts of the page ---------------------------------------------------------------------------


def _overview(runs: Sequence[_Run]) -> Html:
    """All runs in a table."""
    rows = []
    for i, run in enumerate(runs, 1):
        figure = run.figure()
        value = "–"
        if figure:
            value = join([element("b", _rounded(figure)), f" {figure.unit}"])
        rows.append(
            [
                element("a", run.name, href=f"#run-{i}"),
                value,
                str(run.model.get("architecture", "")),
                run.data_name,
                figure.kind if figure else "",
                f"{figure.n:,}" if figure and figure.n else "",
            ]
        )
    head = ("run", "figure", "model", "data", "is", "examples")
    return element("section", table(head, rows), class_="overview")


def _section(run: _Run, anchor: str) -> Html:
    """Everything about a run."""
    parts = [
        element("h2", run.name),
        element("p", _subtitle(run), class_="subtitle"),
        _headline(run),
        _curves(run),
        _pictures(run),
        _account(run),
        _configuration(run),
        _next(run),
    ]
    return element("section", *parts, id=anchor)


def _subtitle(run: _Run) -> str:
    shape = " × ".join(map(str, run.shape))
    what = "continuous values" if run.bits is None else f"{run.bits}-bit levels"
    parts = [
        str(run.model.get("architecture", "a model")),
        f"{shape}{', ' if len(run.shape) > 1 else ' '}{what}".strip(),
    ]
    if isinstance(n := run.data.get("train"), int):
        parts.append(f"trained on {n:,} examples of {run.data_name}")
    elif run.source:
        parts.append(run.data_name)
    steps = [row for row in run.metrics if row.get("kind") == "train"]
    if steps:
        seconds = number(steps[-1].get("seconds"))
        text = f"{steps[-1]['step']:,} steps"
        parts.append(text + (f" in {_duration(seconds)}" if seconds else ""))
    return " · ".join(parts)


def _headline(run: _Run) -> Html:
    """The figure, and what it is."""
    figure = run.figure()
    if figure is None:
        return Html()
    value, _, error = _rounded(figure).partition(" ± ")
    parts = [
        element("span", value, class_="value"),
        element("span", figure.unit, class_="unit"),
    ]
    if error:
        parts.append(element("span", f"± {error}", class_="error"))
    lines = [element("p", *parts, class_="figure"), element("p", figure.about, class_="about")]
    row = run.evaluation or {}
    terms = []
    if figure.unit == "bits/dim" and (nats := number(row.get("nats"))) is not None:
        terms.append(("nats per example", f"{nats:,.2f}"))
    distortion, rate = number(row.get("log_px")), number(row.get("rate"))
    if distortion and rate is not None:
        terms += [("distortion, nats", f"{-distortion:,.2f}"), ("rate, nats", f"{rate:,.2f}")]
        kl = row.get("kl") or []
        if 1 < len(kl) <= 8:
            terms.append(("KL of each latent, top first", ", ".join(f"{v or 0:.2f}" for v in kl)))
    if terms:
        pairs = [element("div", element("dt", name), element("dd", text)) for name, text in terms]
        lines.append(element("dl", *pairs, class_="terms"))
    if bad := row.get("non_finite"):
        lines.append(element("p", f"{bad:,} examples have no finite figure.", class_="warning"))
    return element("div", *lines, class_="headline")


def _curves(run: _Run) -> Html:
    """Each panel for light and for dark pages."""
    unit = "nats" if run.bits is None else "bits"
    panels: dict[figures.Panel, str] = {
        "figure": "Training and validation figures over training steps",
        "latents": "What each latent costs over training steps",
    }
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        for panel, alt in panels.items():
            light, dark = (Path(folder) / f"{panel}-{name}.png" for name in ("light", "dark"))
            try:
                figures.curves(run.metrics, light, unit=unit, panels=[panel])
                figures.curves(run.metrics, dark, unit=unit, panels=[panel], dark=True)
            except figures.PlotsMissing as error:
                return element("p", f"No curves: {error}", class_="note")
            except ValueError:
                continue  # there are no such rows
            drawn.append(
                element("figure", _picture(light, alt, dark=dark, density=2), class_="curve")
            )
    return element("div", *drawn, class_="panels") if drawn else Html()


def _pictures(run: _Run) -> Html:
    shown, plot = [], len(run.shape) == 1
    for name, caption in PICTURES.items():
        file = run.path / "samples" / f"{name}.png"
        if not file.is_file():
            continue
        image = _picture(file, caption, density=2 if plot else 1)
        shown.append(
            element(
                "figure",
                image,
                element("figcaption", caption),
                class_="plot" if plot else "pixels",
            )
        )
    return element("div", *shown, class_="plots" if plot else "pictures") if shown else Html()


def _account(run: _Run) -> Html:
    """The ledger: sums of its terms, and every row; its sum stands against the figure."""
    rows = [(r, v) for r in run.ledger if (v := number(r.get("bits_per_dim"))) is not None]
    if not rows:
        return Html()
    largest = max(abs(v) for _, v in rows) or 1.0
    total, signed = sum(v for _, v in rows), any(v < 0 for _, v in rows)

    def line(row: Mapping[str, Any], value: float, scale: float) -> list[Any]:
        kind = f" {row['kind']}" if row.get("kind") else ""
        site = join([str(row.get("site", "")), element("span", kind, class_="kind")])
        term = TERMS.get(str(row.get("term")), str(row.get("term")))
        return [site, term, _signed(value), _bar(value / scale, signed)]

    head = ("layer", "term", "bits/dim", "")
    foot = ("sum", "", f"{total:.4f}", "")
    full = table(head, [line(row, value, largest) for row, value in rows], foot)
    note = ""
    final = number((run.evaluation or {}).get("bits_per_dim"))
    if final is not None and abs(final - total) > 5e-4:
        note = (
            f"The rows add up to {total:.4f}, and the figure above is {final:.4f}: the account "
            "was drawn up for other examples, or with other draws."
        )
    if len(rows) > 10:
        sums: dict[str, float] = {}
        for row, value in rows:
            sums[str(row.get("term"))] = sums.get(str(row.get("term")), 0.0) + value
        counts = Counter(str(row.get("term")) for row, _ in rows)
        scale = max(map(abs, sums.values())) or 1.0
        body = [
            [TERMS.get(t, t), str(counts[t]), _signed(v), _bar(v / scale, signed)]
            for t, v in sums.items()
        ]
        short = table(("term", "layers", "bits/dim", ""), body, foot)
        every = element("details", element("summary", f"All {len(rows)} rows"), full)
        content = [short, every]
    else:
        content = [full]
    return element(
        "div",
        element("h3", "Where the bits go"),
        *content,
        element("p", note, class_="note") if note else Html(),
        class_="account",
    )


def _bar(share: float, signed: bool) -> Html:
    """A bar; if there are negative ones, from the middle to the right or to the left."""
    room = 50 if signed else 100
    width = f"{room * min(1.0, abs(share)):.2f}%"
    side = "left" if share >= 0 else "right"
    inner = element(
        "i",
        style=f"{side}:{100 - room}%;width:{width}",
        class_="more" if share >= 0 else "less",
    )
    return element("span", inner, class_="bar signed" if signed else "bar", aria_hidden="true")


def _configuration(run: _Run) -> Html:
    """Options of model, data and training that are set, and versions, folded away."""
    data = {k: v for k, v in run.data.items() if k not in ("shape", "source", "digest")}
    preprocess = data.pop("preprocess", None)
    if isinstance(preprocess, Mapping):
        data |= preprocess
    shown = (
        ("Model", {"architecture": run.model.get("architecture"), **run.options}),
        ("Data", {"source": run.data_name, **data}),
        ("Training", run.config.get("train") or {}),
        ("Versions", run.config.get("versions") or {}),
    )
    lists = []
    for name, values in shown:
        pairs = [
            element("div", element("dt", key.replace("_", " ")), element("dd", _plain(value)))
            for key, value in values.items()
            if value is not None and value != []
        ]
        if pairs:
            lists.append(element("div", element("h4", name), element("dl", *pairs)))
    return element(
        "details",
        element("summary", "Configuration"),
        element("div", *lists, class_="configuration"),
    )


def _next(run: _Run) -> Html:
    """Commands to go on with."""
    folder = shlex.quote(str(run.path))
    source = shlex.quote(_near(run.source))
    image = len(run.shape) == 3
    suffix = "png" if image or run.shape == [2] else "npy"
    commands = []
    if run.evaluation is None and (run.path / "state.safetensors").is_file():
        commands.append(f"musigma train --resume {folder}")
    commands.append(f"musigma sample {folder} --n {64 if image else 1000} --out samples.{suffix}")
    if run.source:
        figure = run.figure()
        tighter = "" if figure and figure.bound == "exact" else " --k 16"
        if image:
            commands.append(f"musigma reconstruct {folder} {source} --out reconstructions.png")
        commands += [
            f"musigma evaluate {folder} {source}{tighter}",
            f"musigma score {folder} {source} --out scores.csv",
        ]
    commands.append(f"musigma info {folder} --ledger")
    code = element("pre", element("code", "\n".join(commands)), tabindex="0")
    return element("div", element("h3", "Go on"), code)


# --- text ----------------------------------------------------------------------------------------


def _rounded(figure: _Figure) -> str:
    """A figure to two digits of its standard error.

    >>> _rounded(_Figure(1.23388, 0.00287, "bits/dim", "", "", "", None))
    '1.2339 ± 0.0029'
    >>> _rounded(_Figure(None, None, "bits/dim", "", "", "", None))
    'not finite'
    """
    if figure.value is None:
        return "not finite"
    if not figure.error:
        return f"{figure.value:,.4f}"
    digits = min(6, max(0, 1 - math.floor(math.log10(figure.error))))
    return f"{figure.value:,.{digits}f} ± {figure.error:,.{digits}f}"


def _signed(value: float) -> str:
    """A contribution, with its sign.

    >>> _signed(-0.25)
    '−0.2500'
    """
    return f"{value:+.4f}".replace("-", "−")


def _duration(seconds: float) -> str:
    """As people say it.

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


def _near(source: str) -> str:
    """A path as seen from here, if it lies below."""
    try:
        return str(Path(source).relative_to(Path.cwd()))
    except ValueError:
        return source
