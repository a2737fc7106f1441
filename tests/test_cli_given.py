"""The command line on models that are conditioned on columns, files, images and labels."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from musigma import checkpoint
from musigma.cli import main
from musigma.evaluation import Record

N = 60
QUICK = "--steps 3 --batch-size 8 --evaluations 1 --device cpu"
GLOW = "--levels 2 --depth 1 --hidden 4"


def call(words: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main(words.split())
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def run(capsys):
    """Run a command that succeeds; its JSON answer."""

    def ok(words: str) -> dict:
        capsys.readouterr()
        code = call(f"{words} --json")
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return ok


@pytest.fixture
def refused(capsys):
    """Run a command that is refused; its message. No file is left behind."""

    def no(words: str) -> str:
        before = sorted(map(str, Path.cwd().rglob("*")))
        capsys.readouterr()
        assert call(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert sorted(map(str, Path.cwd().rglob("*"))) == before
        return err.splitlines()[-1]

    return no


def write_table(path: str, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: str) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A table, a folder of images with attributes and masks, and a model of each."""
    folder, before = tmp_path_factory.mktemp("given"), Path.cwd()
    os.chdir(folder)
    random = np.random.default_rng(0)
    table, attributes = [], []
    for i in range(N):
        a, b = random.normal(size=2)
        y = random.normal(size=2) + np.array([5 * a, b])
        kind = "red" if a > 0 else "blue"
        table.append({"x_a": a, "x_b": b, "y1": y[0], "y2": y[1], "kind": kind})
        attributes.append(
            {"file": f"{i:02}.png", "age": 20 + a, "hair": ("dark", "fair")[i % 3 > 0]}
        )
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        for name, image in (("photos", pixels), ("masks", pixels[..., 0])):
            file = Path(name) / ("cat", "dog")[i % 2] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    write_table("table.csv", table)
    write_table("attributes.csv", random.permutation(attributes).tolist())
    assert call(f"train maf table.csv --given x_* --given kind {QUICK} --out columns") == 0
    assert (
        call(f"train glow photos --given attributes.csv {GLOW} {QUICK} --conditional --out rows")
        == 0
    )
    small = "--net mlp --width 8 --latents 2"
    assert call(f"train vae photos --given masks {small} {QUICK} --out images") == 0
    os.chdir(before)
    return folder


@pytest.fixture
def workdir(home, tmp_path, monkeypatch):
    """A working directory with links to all that is in `home`."""
    for item in home.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_columns_of_a_table_condition_the_others(workdir, run):
    spec = checkpoint.load("columns/model.safetensors").spec
    assert spec.columns == ("y1", "y2")
    assert [(v.name, v.classes) for v in spec.context] == [("x_a", 0), ("x_b", 0), ("kind", 2)]
    figure = run("evaluate columns table.csv")
    saved = Record.read("columns").fields
    assert {name: figure[name] for name in saved} == saved
    assert run("score columns table.csv --out s.csv")["n"] == N
    run("inspect columns table.csv --index 3")
    run("interpolate columns table.csv --split all --pairs 2 --steps 3 --out walks.csv")
    run("reconstruct columns table.csv --split all --n 3 --out again.csv")
    for got, expected in zip(read_table("again.csv"), read_table("table.csv"), strict=False):
        assert float(got["y1"]) == pytest.approx(float(expected["y1"]), abs=1e-4)


def test_columns_are_found_by_their_names(workdir, run):
    rows = read_table("table.csv")
    other = ["more", "kind", "y2", "x_b", "y1", "x_a"]
    write_table("other.csv", [{n: row.get(n, i % 7) for n in other} for i, row in enumerate(rows)])
    run("score columns table.csv --out a.csv")
    run("score columns other.csv --out b.csv")
    scores = [[float(row["nats"]) for row in read_table(name)] for name in ("a.csv", "b.csv")]
    assert scores[0] == pytest.approx(scores[1])


def test_samples_are_drawn_for_each_row_of_a_file(workdir, run):
    model = checkpoint.load("columns/model.safetensors")
    with torch.no_grad():
        for p in model.parameters():  # three steps leave the context with little effect
            p.add_(0.05 * torch.randn_like(p))
    checkpoint.save(model, "moved.safetensors")
    one, other = {"kind": "red", "x_b": 0, "x_a": 1}, {"kind": "blue", "x_b": 0, "x_a": -1}
    write_table("observed.csv", [one, other, one])
    words = "sample moved.safetensors --given observed.csv"
    assert run(f"{words} --n 2 --temperature 0 --out a.csv")["n"] == 6
    assert list(read_table("a.csv")[0]) == ["observation", "y1", "y2"]
    y = [float(row["y1"]) for row in read_table("a.csv")]
    assert y == pytest.approx([y[0]] * 2 + [y[2]] * 2 + [y[0]] * 2, rel=1e-3)
    assert abs(y[0] - y[2]) > 1e-2 * abs(y[0])
    run(f"{words} --n 50 --out b.csv")
    assert len({row["y1"] for row in read_table("b.csv")}) == 150


@pytest.mark.parametrize("model", ["columns", "rows", "images"])
def test_latents_keep_their_context(workdir, run, model):
    source = "table.csv" if model == "columns" else "photos"
    answer = run(f"encode {model} {source} --split all --out z.npz")
    run(f"decode {model} z.npz --out x.npy")
    run(f"reconstruct {model} {source} --split all --n {N} --out again.npy")
    np.testing.assert_allclose(np.load("x.npy"), np.load("again.npy"), atol=1e-4)
    spec = checkpoint.load(f"{model}/model.safetensors").spec
    for variable in spec.context:
        if variable.name != "label":
            assert answer["arrays"][f"given_{variable.name}"] == [N, *variable.shape]


def test_rows_of_a_file_are_matched_with_images(workdir, run):
    context = checkpoint.load("rows/model.safetensors").spec.context
    assert [v.name for v in context] == ["label", "age", "hair"]
    figure = run("evaluate rows photos")
    saved = Record.read("rows").fields
    assert {name: figure[name] for name in saved} == saved
    Path("others").symlink_to(Path("photos").resolve())
    words = "evaluate rows others --split held-out --given label --given attributes.csv"
    assert run(words)["bits_per_dim"] == figure["bits_per_dim"]


def test_a_subset_whose_context_is_constant_is_scored(workdir, run):
    rows = [{**row, "hair": "dark"} for row in read_table("attributes.csv")]
    write_table("dark.csv", rows)
    assert run("score rows photos --given dark.csv --given label --out s.csv")["n"] == N


def test_classes_that_are_numbers_are_named_in_a_file(workdir, run):
    for i, name in enumerate(("1", "10", "2")):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 8, 8, 3), np.uint8)
        Path(f"numbers/{name}").mkdir(parents=True)
        for j, image in enumerate(pixels):
            Image.fromarray(image).save(f"numbers/{name}/{j}.png")
    run(f"train glow numbers --conditional {GLOW} {QUICK} --out numbered")
    write_table("classes.csv", [{"label": 10}, {"label": 2}])
    words = "sample numbered --temperature 0 --mode"
    run(f"{words} --given classes.csv --n 1 --out a.npy")
    for i, name in enumerate(("10", "2")):
        run(f"{words} --label {name} --n 1 --out b.npy")
        np.testing.assert_allclose(np.load("a.npy")[i], np.load("b.npy")[0], atol=1)


def test_every_command_works_with_a_context(workdir, run):
    run("score rows photos --out s.csv")
    run("direction rows photos --positive cat --out d.npz")
    run("edit rows photos --direction d.npz --n 2 --out edited.npy")
    run("mix rows photos --n 2 --out mixed.npy")
    run("interpolate rows photos --split all --pairs 2 --out walks.png")
    run("info rows --ledger --n 4")
    write_table("people.csv", [{"age": 20, "hair": "dark"}, {"age": 21, "hair": "fair"}])
    assert run("sample rows --given people.csv --label dog --n 2 --out a.npy")["n"] == 4
    run("sample rows --given people.csv --label dog --n 2 --temperatures 0.5,1 --out t.png")
    run("encode rows photos --out z.npz")
    run("decode rows z.npz --label cat --out x.npy")


def test_compressed_files_keep_the_context(workdir, run):
    pytest.importorskip("constriction")
    run("compress rows photos photos.mus")
    run("decompress photos.mus back --run rows")
    for file in sorted(Path("photos").rglob("*.png")):
        with Image.open(file) as a, Image.open(Path("back") / file.relative_to("photos")) as b:
            assert np.array_equal(np.array(a), np.array(b))


def test_images_condition_a_model_of_images(workdir, run):
    (variable,) = checkpoint.load("images/model.safetensors").spec.context
    assert (variable.name, variable.shape, variable.levels) == ("masks", (1, 8, 8), 256)
    run("evaluate images photos")
    assert run("sample images --given masks --n 1 --out a.npy")["n"] == N


def test_a_run_with_a_context_is_continued(workdir, run, refused, capsys):
    words = f"train maf table.csv {QUICK} --out run --auto-resume --given kind"
    run(f"{words} --given x_a")
    data = json.loads(Path("run/config.json").read_text())["data"]
    assert data["given"] == ["kind", "x_a"]
    run(f"{words} --given x_a")
    run("train --resume run --device cpu")
    assert "run began with given ['kind', 'x_a'], not ['kind']" in refused(words)
    run(f"finetune run table.csv {QUICK} --out further")
    run("evaluate further table.csv")


MISTAKES = {
    "unknown column": ("train maf table.csv --given q_*", "no column matches 'q_.'.*x_a, x_b"),
    "no labels": ("train maf table.csv --given label --given kind", "no labels"),
    "no such file": ("train glow photos --given none.csv", "none.csv"),
    "too few rows": ("train glow photos --given few.csv", "3 .* 60"),
    "takes no context": (
        "train autoencoder_kl photos --given label",
        "autoencoder_kl takes no context",
    ),
    "missing variables": ("evaluate rows photos --given label", "'age'.*'hair'"),
    "missing column": ("score columns narrow.csv --out s.csv", "no column.*'?y2"),
    "missing context": ("score columns context.csv --out s.csv", "x_b"),
    "another width": ("sample columns --given wide.npz --n 2", "'x_a'.*shape"),
    "unknown class": ("sample rows --given purple.csv --label cat", "purple .known: dark, fair"),
    "no rows": ("sample columns --n 3", "conditioned on x_a, x_b, kind; give the rows"),
    "no class": ("sample columns --label red --n 3", "conditioned on x_a, x_b, kind"),
    "column missing in rows": ("sample rows --given bald.csv --label cat", "hair"),
    "label missing": ("sample rows --given fine.csv --n 2", "label"),
    "rows for no context": ("sample plain --given fine.csv", "not conditioned on anything"),
    "context of another model": ("decode columns z.npz", "no array given_x_a"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_with_a_context_is_named(workdir, run, refused, what):
    rows = read_table("table.csv")
    names = {
        "narrow.csv": ("x_a", "x_b", "kind", "y1"),
        "context.csv": ("x_a", "kind", "y1", "y2"),
    }
    for name, columns in names.items():
        write_table(name, [{c: row[c] for c in columns} for row in rows])
    write_table("few.csv", [{"age": 1.0 + i} for i in range(3)])
    write_table("purple.csv", [{"age": 1, "hair": "purple"}, {"age": 2, "hair": "dark"}])
    write_table("bald.csv", [{"age": 1}, {"age": 2}])
    write_table("fine.csv", [{"age": 1, "hair": "dark"}, {"age": 2, "hair": "dark"}])
    np.savez("wide.npz", x_a=np.eye(3), x_b=np.arange(3.0), kind=np.array(["red", "red", "blue"]))
    np.savez("z.npz", z0=np.zeros((3, 2), np.float32))
    if what == "rows for no context":
        run(f"train glow photos {GLOW} {QUICK} --out plain")
    words, message = MISTAKES[what]
    words += " --out made" if words.startswith("train ") else ""
    assert re.search(message, refused(words))
