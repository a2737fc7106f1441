"""Pictures have the right pixels, and a page of runs shows what the run folders hold."""

import base64
import builtins
import json
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from musigma import report
from musigma.report import figures

METRICS = [
    {
        "kind": "train",
        "step": step,
        "seconds": step / 10,
        "nats": 40 + 900 / step,
        "bits_per_dim": (40 + 900 / step) / (64 * np.log(2)),
        "kl": [5.0 - 4 / step, 2.0],
        "log_px": -30.0,
    }
    for step in range(1, 200, 3)
]
METRICS += [
    {
        "kind": "evaluation",
        "step": step,
        "bits_per_dim": 1.0 + 9 / step,
        "nats": 44.0,
        "standard_error": 0.02,
        "bound": "elbo",
        "n": 500,
    }
    for step in (50, 100, 150, 199)
]
METRICS += [{"kind": "skipped", "step": 77, "reason": "the gradient"}]


def size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


# --- grids


def test_levels_map_to_pixels():
    one_bit = torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
    image = np.asarray(figures.grid(one_bit, levels=2, scale=1))
    assert image[..., 0].tolist() == [[0, 255], [255, 0]]
    assert (image[..., 1] == 255).all()
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert (figures.pixels(levels)[0, :, :, 0] == levels[0, 0]).all()
    five_bits = np.arange(32).reshape(1, 1, 4, 8)
    assert figures.pixels(five_bits, 32).ravel()[[0, 1, 31]].tolist() == [0, 8, 255]
    assert figures.pixels(np.array([-3.0, 300.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]


@pytest.mark.parametrize(("channels", "shown"), [(1, "LA"), (2, "LA"), (3, "RGBA"), (5, "RGBA")])
def test_channels_map_to_gray_or_color(channels, shown):
    x = np.zeros((2, channels, 4, 4))
    x[:, 0] = 255
    image = figures.grid(x)
    assert image.mode == shown
    assert image.getpixel((0, 0)) == ((255, 255) if shown == "LA" else (255, 0, 0, 255))


def test_cells_are_enlarged_by_an_integer_factor_and_lie_in_reading_order(tmp_path):
    x = np.arange(10).reshape(10, 1, 1, 1) * np.ones((1, 1, 28, 28))
    image = figures.grid(x, tmp_path / "grid.png", levels=10, columns=4)
    assert image.size == size(tmp_path / "grid.png") == (4 * 56 + 3 * 2, 3 * 56 + 2 * 2)
    with Image.open(tmp_path / "grid.png") as again:
        assert (np.asarray(again) == np.asarray(image)).all()
    assert image.getpixel((58, 58)) == (round(5 * 255 / 9), 255)
    assert image.getpixel((57, 57)) == (0, 0)  # a gap
    assert image.getpixel((3 * 58, 2 * 58)) == (0, 0)  # an empty cell
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]  # no drafts


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (10, 5), (12, 4), (64, 8), (72, 9)])
def test_grids_are_about_square(n, columns):
    assert figures.grid(np.zeros((n, 1, 8, 8)), scale=1).width == columns * 10 - 2


def test_rows_show_each_example_in_one_column():
    x = np.stack([np.full((1, 4, 4), i) for i in range(16)])
    image = np.asarray(figures.rows([x, x + 100], scale=1))[..., 0]
    assert image.shape == (2 * (4 + 2 + 4) + 12, 8 * 6 - 2)
    for i in range(16):
        top, left = (i // 8) * 22, (i % 8) * 6
        assert image[top, left] == i
        assert image[top + 6, left] == i + 100
    assert figures.rows([x[:3], x[:3]], scale=1).size == (3 * 6 - 2, 10)
    assert figures.rows([x, x], scale=1, columns=16).size == (16 * 6 - 2, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.grid(np.zeros((4, 8, 8))), r"images: .*\(N, C, H, W\).*\(4, 8, 8\)"),
        (lambda: figures.grid(np.zeros((0, 1, 8, 8))), "images: "),
        (lambda: figures.grid(np.full((2, 1, 2, 2), np.nan)), "2 of 2 .* not finite"),
        (lambda: figures.grid(np.zeros((1, 1, 2, 2)), levels=1), "levels: "),
        (lambda: figures.grid(np.zeros((1, 1, 2, 2)), columns=0), "columns: "),
        (lambda: figures.grid(np.array([["a"]])), "images: expected numbers"),
        (lambda: figures.rows([]), "sets: "),
        (lambda: figures.rows([np.zeros((1, 1, 2, 2)), np.zeros((2, 1, 2, 2))]), "one shape"),
        (lambda: figures.points(np.zeros((4, 3)), "a.png"), r"x: .*\(4, 3\)"),
        (lambda: figures.curves([], "a.png"), "metrics: "),
        (lambda: figures.curves(METRICS, "a.jpg"), "path: "),
        (lambda: figures.comparison({"a": []}, "a.png"), "runs: "),
    ],
)
def test_input_that_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- plots


def test_plots_are_reproducible_to_the_byte(tmp_path):
    random = np.random.default_rng(0)
    xy = random.normal(size=(50, 2))
    comparison = {"vae": [(60.0, 1.5), (120.0, 1.2)], "_glow $": [(60.0, 1.4), (120.0, np.nan)]}
    draw = {
        "curves": lambda path: figures.curves(METRICS, path, title="a $ title"),
        "dark": lambda path: figures.curves(METRICS, path, dark=True, unit="nats"),
        "latents": lambda path: figures.curves(METRICS, path, panels=["latents"]),
        "points": lambda path: figures.points(torch.tensor(xy) * 9, path, reference=xy),
        "comparison": lambda path: figures.comparison(comparison, path),
    }
    for name, write in draw.items():
        once, twice = tmp_path / f"{name}.png", tmp_path / f"{name}-2.png"
        write(once)
        write(twice)
        assert once.read_bytes() == twice.read_bytes()
        assert min(size(once)) > 400
    assert size(tmp_path / "curves.png")[0] == 2 * size(tmp_path / "latents.png")[0]
    figures.curves(METRICS, tmp_path / "curves.svg")
    assert "</svg>" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_curves_accept_every_row_that_a_log_can_hold(tmp_path):
    one = [METRICS[0]]
    odd = [{**METRICS[0], "nats": None, "kl": [None, float("nan")], "bits_per_dim": None}]
    many = [{**row, "kl": list(range(1, 31))} for row in METRICS if row["kind"] == "train"]
    for rows in (one, odd, one + odd, METRICS[-3:], many):
        figures.curves(rows, tmp_path / "curves.png")
        assert size(tmp_path / "curves.png")[1] > 400


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'musigma\[plots\]'"):
        figures.points(np.zeros((3, 2)), tmp_path / "a.png")
    page = report.write(tmp_path / "a.html", [make_run(tmp_path / "run")])
    assert "No curves" in page.read_text(encoding="utf-8")


# --- the page


def make_run(folder, *, source="digits", bits=8, shape=(1, 8, 8), **files):
    """A run folder, without the files given as None."""
    folder.mkdir(parents=True)
    options = {"bits": bits, "format": "halves <log_std>"}
    contents = {
        "config": {
            "model": {"architecture": "vae", "shape": list(shape), "options": options},
            "data": {"source": source, "shape": list(shape), "bits": bits, "train": 1500},
            "train": {"minutes": 1.0, "ema": 0.999, "clip": None},
            "versions": {"musigma": "0.1.0"},
        },
        "evaluation": {
            "bits_per_dim": 1.23388,
            "standard_error": 0.00287,
            "nats": 54.7381,
            "standard_error_nats": 0.1273,
            "bound": "elbo",
            "n": 1797,
            "log_px": -50.0,
            "rate": 4.74,
            "kl": [3.0, 1.74],
            "non_finite": 0,
        },
        "ledger": [
            {"site": "likelihood", "kind": "Logistic", "term": "log_p", "bits_per_dim": 1.33388},
            {"site": "flow & co", "kind": "ActNorm", "term": "log_det", "bits_per_dim": -0.1},
        ],
        **files,
    }
    for name, value in contents.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in METRICS)
    (folder / "metrics.jsonl").write_text(lines + '{"kind": "tr', encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The text of a page and its tags; asserts that elements nest."""

    VOID = ("meta", "img", "source")

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()
        assert not self.open
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words.append(data + " ")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_shows_the_content_of_the_run_folder(tmp_path):
    run = make_run(tmp_path / "vae <b>&'")
    (run / "samples").mkdir()
    figures.grid(np.zeros((4, 1, 8, 8)), run / "samples" / "samples.png")
    out = report.write(tmp_path / "page.html", [run], title="Digits <1> & more")
    assert out == tmp_path / "page.html"
    page = Page(out)
    for text in (
        "Digits <1> & more",
        "vae <b>&'",
        "1.2339 bits/dim ± 0.0029",
        "Upper bound, by the one-draw ELBO, of −log₂ p(x) per dimension",
        "mean of 1,797 held-out examples",
        "54.74",
        "halves <log_std>",
        "flow & co ActNorm",
        "−0.1000",
        "musigma sample",
        "Samples",
    ):
        assert text in page.text, text
    assert "<b>&'" not in page.raw
    assert "add up" not in page.text  # because they do
    assert "Interpolations" not in page.text
    images = page.all("img") + page.all("source")
    assert len(images) == 3 + 2  # two panels for light pages and for dark ones, and samples
    for image in images:
        kind, _, content = (image.get("src") or image["srcset"]).partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert all(image["alt"] for image in page.all("img"))


def test_a_page_loads_nothing_from_outside(tmp_path):
    page = Page(report.write(tmp_path / "page.html", [make_run(tmp_path / "run")]))
    assert not re.search(
        r"(https?:)?//[a-z]|url\(|@import|<script|<link", page.raw.split("base64")[0]
    )
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again = report.write(tmp_path / "again.html", [tmp_path / "run"])
    assert again.read_text(encoding="utf-8") == page.raw


def test_every_value_of_a_run_folder_is_escaped(tmp_path):
    bad = "<i>&'\"</i>"
    run = make_run(
        tmp_path / "run",
        config={
            "model": {
                "architecture": bad,
                "shape": [bad, 2],
                "options": {bad: bad, "list": [bad]},
            },
            "data": {"source": bad, "bits": 8, bad: bad, "preprocess": {bad: bad}},
            "train": {bad: bad},
            "versions": {bad: bad},
        },
        evaluation={"bits_per_dim": 1.0, "bound": bad, "n": 3, "k": bad},
        ledger=[{"site": bad, "kind": bad, "term": bad, "bits_per_dim": 1.0}],
    )
    page = Page(report.write(tmp_path / "page.html", [run, run], title=bad))
    assert not page.all("i") or all(set(i) == {"style", "class"} for i in page.all("i"))
    assert page.text.count("<i>&'\"") > 20
    assert page.raw.count("<i>&") == 0


@pytest.mark.parametrize(
    ("evaluation", "text"),
    [
        ({"bound": "exact"}, "Exact: −log₂ p(x)"),
        ({"bound": "iwae-16"}, "importance-weighted with 16 draws"),
        ({"bound": "iwae", "k": 8}, "importance-weighted with 8 draws"),
        ({"bound": "<odd>"}, "<odd> of −log₂ p(x)"),
        ({"bits_per_dim": None, "non_finite": 3}, "3 examples have no finite figure"),
        ({"bits_per_dim": None}, "not finite bits/dim"),
        ({"standard_error": None}, "1.2339 bits/dim Upper"),
    ],
)
def test_a_figure_is_labeled_with_its_bound(tmp_path, evaluation, text):
    whole = {"bits_per_dim": 1.23388, "standard_error": 0.003, "bound": "elbo", "n": 9}
    run = make_run(tmp_path / "run", evaluation={**whole, **evaluation}, ledger=None)
    assert text in Page(report.write(tmp_path / "page.html", [run])).text


def test_figures_of_continuous_data_are_in_nats(tmp_path):
    run = make_run(tmp_path / "moons", bits=None, shape=(2,), source="two-moons", ledger=None)
    page = Page(report.write(tmp_path / "page.html", [run]))
    assert "54.74 nats per example ± 0.13" in page.text
    assert "−log p(x)" in page.text
    assert "vae · 2 continuous values" in page.text
    assert "reconstruct" not in page.text


def test_a_page_takes_further_sections(tmp_path):
    run, bad = make_run(tmp_path / "run"), "<i>&'\"</i>"
    figures.grid(np.zeros((4, 1, 8, 8)), tmp_path / "grid.png")
    file = tmp_path / "section.json"
    table = {"head": ["file", bad], "rows": [["PNG", 117_024], [bad, 1.25]]}
    section = {
        "title": bad,
        "text": [bad, "two"],
        "tables": [table],
        "pictures": {"grid.png": bad},
    }
    file.write_text(json.dumps(section))
    page = Page(report.write(tmp_path / "page.html", [run], sections=[file]))
    assert page.text.count("<i>&'\"") == 5
    assert page.raw.count("<i>&") == 0
    assert "117,024" in page.text
    assert [image["alt"] for image in page.all("img")][-1] == bad
    file.write_text('{"title": "alone"}')
    assert "alone" in Page(report.write(tmp_path / "page.html", [run], sections=[file])).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "sections: there is no file .*section.json"),
        ("{", "sections: .*section.json: expected an object with title"),
        ("[]", "expected an object with title"),
        ('{"text": []}', "KeyError: 'title'"),
        ('{"title": "a", "tables": [{"head": []}]}', "KeyError: 'rows'"),
        ('{"title": "a", "pictures": {"absent.png": "b"}}', "absent.png"),
    ],
)
def test_a_section_that_cannot_be_read_is_refused(tmp_path, text, message):
    run, file = make_run(tmp_path / "run"), tmp_path / "section.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path / "page.html", [run], sections=[file])
    assert not (tmp_path / "page.html").exists()


def test_missing_files_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", evaluation=None, ledger=None)
    page = Page(report.write(tmp_path / "page.html", [run]))
    assert "500 validation examples, at step 199; there is no final evaluation yet" in page.text
    assert "Where the bits go" not in page.text
    (run / "metrics.jsonl").unlink()
    (run / "config.json").write_text("{}")
    page = Page(report.write(tmp_path / "page.html", [run]))
    assert not page.all("img")
    assert "musigma sample" in page.text


def test_a_ledger_that_does_not_add_up_is_reported(tmp_path):
    ledger = [
        {"site": f"layers.{i}", "term": "log_det", "bits_per_dim": -0.125} for i in range(12)
    ]
    run = make_run(tmp_path / "run", ledger=ledger)
    text = Page(report.write(tmp_path / "page.html", [run])).text
    assert "add up to -1.5000, but the figure above is 1.2339" in text.replace("−", "-")
    assert "All 12 rows" in text


def test_several_runs_are_compared_under_distinct_names(tmp_path):
    runs = [make_run(tmp_path / place / "vae") for place in ("a", "b")]
    page = Page(report.write(tmp_path / "page.html", runs))
    assert [a["href"] for a in page.all("a")] == ["#run-1", "#run-2"]
    assert {"run-1", "run-2"} <= {a.get("id") for a in page.all("section")}
    assert str(runs[0]) in page.text
    assert "on validation data" not in page.text
    (runs[0] / "evaluation.json").unlink()
    page = Page(report.write(tmp_path / "page.html", runs))
    assert "upper bound, on validation data" in page.text


def test_data_paths_appear_only_in_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", source=str(tmp_path / "my photos"))
    page = Page(report.write(tmp_path / "page.html", [run.relative_to(tmp_path)]))
    assert "trained on 1,500 examples of my photos" in page.text
    assert "musigma evaluate run 'my photos' --k 16" in page.text
    assert str(tmp_path) not in page.raw


def test_damaged_run_folders_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder: it has no config\.json"):
        report.write(tmp_path / "page.html", [tmp_path / "empty"])
    run = make_run(tmp_path / "run")
    (run / "ledger.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ledger\.json holds no list"):
        report.write(tmp_path / "page.html", [run])
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is not a JSON file"):
        report.write(tmp_path / "page.html", [run])
    with pytest.raises(ValueError, match="runs: "):
        report.write(tmp_path / "page.html", [])
    assert not (tmp_path / "page.html").exists()
