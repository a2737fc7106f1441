"""One HTML page of run folders: figures, curves, pictures and accounts, with nothing outside it."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from musigma import figures
from musigma.files import replacing

__all__ = ["write"]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2730; --pale: #66727d; --line: #d9dee3;
  --paper: #fbfbfa; --card: #ffffff; --accent: #2b5f8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --pale: #98a4ae; --line: #343c43;
  --paper: #15191c; --card: #1c2125; --accent: #8db9dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem; } h2 { font-size: 1.2rem; margin: 0; }
h3 { font-size: .8rem; margin: 1.6rem 0 .5rem; color: var(--pale); font-weight: 600; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.5rem; margin: 0 0 1.5rem; }
.figure { font-size: 2.4rem; font-weight: 650; color: var(--accent); line-height: 1.2;
  font-variant-numeric: tabular-nums; margin-top: .6rem; }
.figure small { font-size: 1rem; font-weight: 400; color: var(--pale); }
.note { color: var(--pale); font-size: .92rem; margin: .1rem 0; }
img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
img.pixels { image-rendering: pixelated; } img.curve { background: #fff; padding: .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; } tr.sum td { font-weight: 650; border-bottom: 0; }
details { margin-top: 1.4rem; } summary { cursor: pointer; color: var(--pale); }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); padding: .8rem;
  border-radius: 6px; font-size: .85rem; }
"""

PICTURES = {
    "samples": "Samples: new examples that the model draws",
    "reconstructions": "Reconstructions: held-out originals above, what the latents know below",
    "interpolations": "Interpolations: from one held-out example to another through the latents",
}


def write(path: str | Path, runs: Sequence[str | Path], *, title: str = "musigma") -> Path:
    """Write one page for run folders; whatever a run lacks is left out.

    Args:
        path: The .html file.
        runs: Folders as ``musigma train`` leaves them.
        title: Of the page.

    Raises:
        ValueError: If there are no runs, or a folder holds no ``config.json``.
    """
    path = Path(path)
    if not runs:
        raise ValueError("runs: expected at least one run folder")
    parts = [_run(Path(run)) for run in runs]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _run(run: Path) -> str:
    config = _json(run / "config.json")
    if config is None:
        raise ValueError(f"runs: {run} holds no config.json, so it is no run folder")
    model, data = config["model"], config["data"]
    shape = " × ".join(map(str, model["shape"]))
    parts = [
        f"<section><h2>{escape(model['architecture'])} on {escape(Path(data['source']).name)}</h2>",
        f'<p class="note">{data.get("train", 0):,} training examples of shape {shape}</p>',
        _figure(_json(run / "evaluation.json")),
        '<div class="pair">',
        _picture(run, "samples"),
        _curve(run / "metrics.jsonl"),
        "</div>",
        _picture(run, "reconstructions"),
        _picture(run, "interpolations"),
        _ledger(_json(run / "ledger.json")),
        "<details><summary>Configuration, and how to go on</summary>",
        f"<pre>{escape(_commands(run))}</pre><pre>{escape(json.dumps(config, indent=2))}</pre>",
        "</details></section>",
    ]
    return "\n".join(part for part in parts if part)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    kinds = {"exact": "exact", "elbo": "an upper bound: one draw of the ELBO"}
    kind = kinds.get(figure["bound"], f"an upper bound: {figure['bound']}")
    error = figure.get("standard_error")
    spread = "" if error is None else f" ± {error:.4f}"
    return (
        f'<div class="figure">{figure["bits_per_dim"]:.4f} <small>{spread} bits per dimension'
        f"</small></div>\n"
        f'<p class="note">{figure["nats"]:.2f} nats per example; {escape(kind)}; '
        f"{figure['n']:,} held-out examples</p>"
    )


def _image(data: bytes, text: str, kind: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img class="{kind}" alt="{escape(text)}" src="data:image/png;base64,{encoded}">'


def _picture(run: Path, name: str) -> str:
    path = run / "samples" / f"{name}.png"
    if not path.is_file():
        return ""
    text = PICTURES[name]
    return f"<div><h3>{escape(text)}</h3>{_image(path.read_bytes(), text, 'pixels')}</div>"


def _curve(path: Path) -> str:
    if not path.is_file():
        return ""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "curve.png"
        figures.curves(rows, drawn)
        image = _image(drawn.read_bytes(), "bits per dimension over training steps", "curve")
    return f"<div><h3>Training</h3>{image}</div>"


def _ledger(rows: list[dict[str, Any]] | None) -> str:
    """The account, with the terms of one kind of layer added up."""
    if not rows:
        return ""
    sums: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["kind"], row["term"])
        sums[key] = sums.get(key, 0.0) + row["bits_per_dim"]
    lines = [
        f'<tr><td>{escape(kind)}</td><td>{escape(term)}</td><td class="number">{bits:+.4f}</td></tr>'
        for (kind, term), bits in sums.items()
    ]
    total = sum(sums.values())
    return (
        "<details><summary>The account of these bits</summary><table><tr><th>layer</th>"
        f"<th>term</th><th>bits/dim</th></tr>{''.join(lines)}"
        f'<tr class="sum"><td>sum</td><td></td><td class="number">{total:.4f}</td></tr></table>'
        '<p class="note">Of at most 512 held-out examples; each layer by itself: musigma info '
        "RUN --ledger</p></details>"
    )


def _commands(run: Path) -> str:
    return "\n".join(
        f"musigma {line}"
        for line in (
            f"sample {run} --n 64 --out samples.png",
            f"score {run} DATA --out scores.csv",
            f"info {run} --ledger",
            f"train --resume {run}",
        )
    )
