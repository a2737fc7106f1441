"""The command line: every command, and every mistake."""

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from musigma import checkpoint, evaluation
from musigma.cli import main, scores
from musigma.cli.options import RunOnData
from musigma.data import load
from musigma.objectives import OBJECTIVES
from musigma.zoo import build

TINY = {
    "vae": "--net mlp --width 8 --latents 4",
    "glow": "--levels 2 --depth 1 --hidden 8",
    "realnvp": "--depth 2 --hidden 8",
}
QUICK = "--batch-size 8 --evaluations 1 --evaluate-on 20 --device cpu"
COMMANDS = ["sample", "reconstruct", "interpolate", "encode", "decode"]
COMMANDS += ["score", "evaluate", "inspect", "info", "report", "audit"]


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photos(folder: Path, n: int = 40, shape=(8, 8, 3)) -> Path:
    """Two classes of noise, each around one color."""
    draw = np.random.default_rng(0)
    for i in range(n):
        kind = ("cat", "dog")[i % 2]
        noise = draw.normal(80 + 90 * (i % 2), 30, shape)
        picture(folder / kind / f"{i:02}.png", np.clip(noise, 0, 255).astype(np.uint8))
    return folder


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@contextlib.contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def call(*words: object) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main([w for word in words for w in str(word).split(" ")])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def train(arch: str, data: str, out: str, *more: str, steps: int = 3) -> None:
    words = ("train", arch, data, TINY[arch], QUICK, f"--steps {steps} --out {out} --json")
    with contextlib.redirect_stdout(open(os.devnull, "w")) as null, null:
        assert call(*words, *more) == 0


@pytest.fixture
def run(capsys):
    """Run a command that succeeds; what it printed on standard output."""

    def ok(*words: object) -> str:
        capsys.readouterr()
        code = call(*words)
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "Traceback" not in err
        return out

    return ok


@pytest.fixture
def run_json(run):
    """Run a command with --json; its answer, which is all of its standard output."""

    def ok(*words: object) -> dict:
        answer = json.loads(run(*words, "--json"))
        assert isinstance(answer, dict)
        return answer

    return ok


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images and runs, which tests read and do not change."""
    workdir = tmp_path_factory.mktemp("home")
    photos(workdir / "photos")
    with inside(workdir):
        train("vae", "photos", "vae")
        train("glow", "photos", "glow")
        train("glow", "photos", "conditional", "--conditional")
        train("realnvp", "two-moons", "moons")
    before = listing(workdir)
    yield workdir
    assert listing(workdir) == before


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a digest of its content."""
    return {
        str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def workdir(home, tmp_path, monkeypatch):
    """An empty working directory with links to all that is in `home`."""
    for item in home.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images() -> np.ndarray:
    return load("photos").x


# -- from training to pictures


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_training_leaves_a_run(workdir, arch):
    files = {p.name for p in (workdir / arch).iterdir()}
    assert files >= {
        "config.json",
        "evaluation.json",
        "last.safetensors",
        "ledger.json",
        "metrics.jsonl",
        "model.safetensors",
        "samples",
        "state.safetensors",
    }
    saved = json.loads((workdir / arch / "config.json").read_text())
    assert saved["model"]["architecture"] == arch
    assert saved["model"]["shape"] == [3, 8, 8]
    assert saved["data"]["n"] == 40
    assert saved["train"]["steps"] == 3
    figure = json.loads((workdir / arch / "evaluation.json").read_text())
    assert (figure["bound"], figure["n"]) == ("elbo", len(load("photos").split("held-out")))
    rows = json.loads((workdir / arch / "ledger.json").read_text())
    assert sum(r["bits_per_dim"] for r in rows) == pytest.approx(figure["bits_per_dim"], rel=1e-5)
    drawn = sorted(p.name for p in (workdir / arch / "samples").iterdir())
    assert drawn == ["interpolations.png", "reconstructions.png", "samples.png"]


def test_training_prints_json_or_text_with_the_next_command(workdir, run, run_json):
    answer = run_json("train vae photos", TINY["vae"], QUICK, "--steps 2 --out a")
    assert (answer["run"], answer["steps"], answer["finished"]) == ("a", 2, True)
    assert answer["evaluation"]["bits_per_dim"] > 0
    assert all(Path(p).is_file() for p in answer["pictures"])
    text = run("train vae photos", TINY["vae"], QUICK, "--steps 2 --out b")
    assert "bits/dim" in text
    assert "next: musigma sample b" in text
    assert (workdir / "a/last.safetensors").read_bytes() == (
        workdir / "b/last.safetensors"
    ).read_bytes()


def test_a_run_is_named_after_its_architecture_and_data(workdir, run):
    run("train vae photos", TINY["vae"], QUICK, "--steps 1")
    assert (workdir / "runs/vae-photos/model.safetensors").is_file()


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_sample(workdir, run, run_json, arch):
    run("sample", arch, "--n 6 --out a.png --seed 3")
    assert pixels("a.png").shape[2] >= 3
    run_json("sample", arch, "--n 70 --out a.npy --seed 3")
    run("sample", arch, "--n 70 --out a.npz --seed 3")
    x = np.load("a.npy")
    assert (x.shape, x.dtype) == ((70, 3, 8, 8), np.uint8)
    assert np.array_equal(np.load("a.npz")["x"], x)
    run("sample", arch, "--n 70 --out b.npy --seed 4")
    assert not np.array_equal(np.load("b.npy"), x)
    run("sample", arch, "--n 2")
    assert (workdir / "samples.png").is_file()


def test_sampling_depends_only_on_the_seed(workdir, run):
    for name in "ab":
        run("sample glow --n 4 --out", f"{name}.npy")
        np.random.default_rng().normal()
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()


@pytest.mark.parametrize("temperature", ["0", "0.7", "0.5,1", "1e-1"])
def test_temperature_is_a_number_or_one_for_each_latent(workdir, run, temperature):
    for seed in (1, 2):
        words = f"--temperature {temperature} --seed {seed} --out {seed}.npy"
        run("sample glow --n 3 --mode", words)
    same = np.array_equal(np.load("1.npy"), np.load("2.npy"))
    assert same == (temperature == "0")


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_reconstruct(workdir, run, run_json, arch):
    run("reconstruct", arch, "photos --out a.png --n 4")
    assert pixels("a.png").shape[1] >= 32
    answer = run_json("reconstruct", arch, "photos --split all --n 5 --out a.npy")
    again = np.load("a.npy")
    assert again.shape == (5, 3, 8, 8)
    error = np.abs(again.astype(float) - images()[:5]).mean()
    assert answer == {"out": "a.npy", "n": 5, "mean_absolute_error": pytest.approx(error, abs=1)}
    assert (error == 0) == (arch == "glow")


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_interpolate(workdir, run, run_json, arch):
    run("interpolate", arch, "photos --pairs 2 --steps 4 --split all --out a.png")
    assert Path("a.png").is_file()
    for path in ("spherical", "linear"):
        answer = run_json(
            *("interpolate", arch, "photos --split all --pairs 2 --steps 4"),
            *("--path", path, "--out", f"{path}.npy"),
        )
        assert (answer["pairs"], answer["steps"]) == (2, 4)
        walks = np.load(f"{path}.npy")
        assert walks.shape == (2, 4, 3, 8, 8)
        if arch == "glow":  # a walk ends where it should
            assert np.abs(walks[:, 0].astype(int) - images()[[0, 2]]).max() <= 1
            assert np.abs(walks[:, -1].astype(int) - images()[[1, 3]]).max() <= 1


def test_a_flow_decodes_its_latents_to_the_same_images(workdir, run, run_json):
    for extra in ("", "--whiten", "--draw"):
        answer = run_json("encode glow photos --split all --out z.npz", *extra.split())
        assert answer["arrays"]["z0"][0] == 40
        run("decode glow z.npz --out x.npy")
        assert np.array_equal(np.load("x.npy"), images())
    with np.load("z.npz") as z:
        assert sorted(z.files) == ["labels", "whitened", "z0", "z1"]
        assert z["z0"].shape == (40, 24, 2, 2)
        assert np.array_equal(z["labels"], load("photos").labels)


def test_a_vae_encodes_to_posterior_means_and_decodes_to_centers(workdir, run):
    run("encode vae photos --split all --out z.npz")
    run("decode vae z.npz --out x.npy")
    run("reconstruct vae photos --split all --n 40 --out again.npy")
    assert np.array_equal(np.load("x.npy"), np.load("again.npy"))
    run("encode vae photos --split all --draw --seed 1 --out drawn.npz")
    with np.load("z.npz") as mean, np.load("drawn.npz") as drawn:
        assert mean["z0"].shape == (40, 4)
        assert not np.allclose(mean["z0"], drawn["z0"])


def test_decode_draws_the_latents_that_are_not_given(workdir, run):
    run("encode glow photos --split all --out z.npz")
    with np.load("z.npz") as z:
        np.savez("top.npz", z0=z["z0"])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("decode glow top.npz --seed", seed, "--out", f"{name}.npy")
    a, b, c = (np.load(f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    run("decode glow top.npz --temperature 0.5 --out d.png")
    run("decode glow top.npz")
    assert Path("decoded.png").is_file()


def test_a_missing_pyarrow_is_named_before_anything_is_computed(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(evaluation, "score", None)
    with pytest.raises(ValueError, match="needs pyarrow"):
        scores.score(RunOnData("vae", "photos"), out=Path("s.parquet"))


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_score(workdir, run, run_json, arch):
    pa = pytest.importorskip("pyarrow.parquet")
    answer = run_json("score", arch, "photos --out s.csv")
    run("score", arch, "photos --out s.parquet")
    with open("s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = pa.read_table("s.parquet").to_pydict()
    assert list(rows[0])[:5] == ["index", "id", "label", "bits_per_dim", "nats"]
    assert len(rows) == answer["n"] == 40
    assert [r["id"] for r in rows] == table["id"] == list(load("photos").ids)
    assert [r["label"] for r in rows] == [r["id"][:3] for r in rows]
    bits = [float(r["bits_per_dim"]) for r in rows]
    assert bits == table["bits_per_dim"]
    assert answer["bits_per_dim"] == pytest.approx(np.mean(bits))
    assert (answer["lowest"], answer["highest"]) == (min(bits), max(bits))
    assert answer["bound"] == "elbo"
    assert (
        run_json("score", arch, "photos --k 2 --split held-out --out t.csv")["bound"] == "iwae-2"
    )


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_evaluate(workdir, run, run_json, arch):
    n_held_out = len(load("photos").split("held-out"))
    figure = run_json("evaluate", arch, "photos")
    assert set(figure) >= {"bits_per_dim", "nats", "standard_error", "bound", "n"}
    assert (figure["n"], figure["bound"]) == (n_held_out, "elbo")
    saved = evaluation.Record.read(workdir / arch).fields
    assert {k: figure[k] for k in saved} == saved
    assert saved["weights"]["step"] == 3
    assert run_json("evaluate", arch, "photos --k 3")["bound"] == "iwae-3"
    assert run_json("evaluate", arch, "photos --split all")["n"] == 40
    text = run("evaluate", arch, "photos --k 3")
    assert re.fullmatch(
        r"[\d.]+( ± [\d.]+)? bits/dim, .*upper bound, iwae-3; n = \d+\); held-out of photos\n"
        r"effective sample size [\d.]+, at least [\d.]+\n",
        text,
    )
    assert figure["split"] == "held-out"


def test_evaluate_prints_a_curve_and_both_sides_of_a_bound(workdir, run, run_json):
    figure = run_json("evaluate vae photos --k 1,3 --anneal 2 --gap --out both.json")
    assert json.loads(Path("both.json").read_text())["gap"] == figure["gap"]
    assert [row["k"] for row in figure["curve"]] == [1, 3]
    assert figure["bound"] == "ais-3"
    assert 0 <= figure["acceptance"] <= 1
    assert figure["gap"]["n"] == figure["n"]
    text = run("evaluate vae photos --k 1,3 --gap")
    number = r"-?[\d.]+( ± [\d.]+)?"
    assert re.search(rf"^k = 1: {number} bits/dim\nk = 3: {number} bits/dim\n", text, re.MULTILINE)
    assert re.search(
        rf"^log p\(x\) of \d+ simulated examples?: from {number} to {number} nats, gap {number}$",
        text,
        re.MULTILINE,
    )


def test_other_data_are_evaluated_in_full(workdir, run_json):
    copy = Path(shutil.copytree("photos", "others"))
    n_held_out = len(load("photos").split("held-out"))
    figure = run_json("evaluate vae others")  # the same data by another path are recognized
    assert (figure["n"], figure["split"]) == (n_held_out, "held-out")
    inside = run_json("evaluate vae photos/cat")  # a part of it: what was trained on is left out
    assert inside["split"] == "held-out"
    assert inside["n"] < 20
    next(copy.rglob("*.png")).unlink()
    figure = run_json("evaluate vae others")
    assert (figure["n"], figure["split"]) == (39, "all")


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_inspect(workdir, run, run_json, arch):
    report = run_json("inspect", arch, "photos --index 7")
    assert (report["index"], report["id"]) == (7, "cat/14.png")
    keys = {"vae": {"mean", "std", "variance", "kl", "active"}}
    keys["glow"] = {"prior_mean", "prior_log_std", "noise", "nats"}
    assert len(report["latents"]) == {"vae": 1, "glow": 2}[arch]
    for row in report["latents"]:
        assert set(row) >= keys[arch]
    text = run("inspect", arch, "photos --index 7")
    assert text.startswith("cat/14.png: ")
    for word in {"vae": ("KL", "std", "variance"), "glow": ("prior_mean", "noise")}[arch]:
        assert word in text


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_info(workdir, run, run_json, arch):
    about = run_json("info", arch)
    assert about["model"]["architecture"] == arch
    assert "evaluation" in about
    account = run_json("info", arch, "--ledger")
    total = sum(row["bits_per_dim"] for row in account["ledger"])
    assert total == pytest.approx(account["figure"]["bits_per_dim"], rel=1e-5)
    text = run("info", arch, "--ledger --data photos --split all --n 10")
    assert "n = 10" in text
    shown = [float(m) for m in re.findall(r"^ +(-?\d+\.\d{6})  ", text, re.MULTILINE)]
    *rows, total, figure = shown
    assert sum(rows) == pytest.approx(total, abs=1e-6 * len(shown))
    assert total == pytest.approx(figure, abs=1.5e-6)


def test_report(workdir, run, run_json):
    answer = run_json("report vae glow --out page.html --title Two")
    assert answer == {"out": "page.html", "runs": ["vae", "glow"]}
    assert "Two" in Path("page.html").read_text(encoding="utf-8")
    assert "page.html" in run("report vae --out page.html")


def test_a_checkpoint_file_is_a_run(workdir, run_json):
    shutil.copy("glow/model.safetensors", "mailed.safetensors")
    run_json("sample mailed.safetensors --n 3 --out a.npy")
    run_json("sample glow --n 3 --out b.npy")
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()
    assert run_json("evaluate mailed.safetensors photos")["bits_per_dim"] == pytest.approx(
        run_json("evaluate glow photos")["bits_per_dim"]
    )
    assert "evaluation" not in run_json("info mailed.safetensors --ledger")


def test_commands_work_with_a_float64_model_saved_by_the_library(workdir, run, run_json):
    spec = load("photos").spec(["label"])
    model = build("glow", spec, levels=1, depth=1, hidden=4).double()
    checkpoint.save(model, "mine.safetensors")
    run("sample mine.safetensors --n 3 --out a.npy")
    run("encode mine.safetensors photos --out z.npz")
    run("decode mine.safetensors z.npz --out x.npy")
    assert np.array_equal(np.load("x.npy"), images())
    assert run_json("evaluate mine.safetensors photos")["n"] == 40
    assert "ledger" in run_json("info mine.safetensors --ledger --data photos")
    assert "latents" in run_json("inspect mine.safetensors photos")


# -- vectors, labels, levels, sizes


def test_vectors(workdir, run, run_json):
    assert run_json("evaluate moons two-moons --k 5")["bound"] == "exact"
    run("sample moons --n 5")
    x = np.load("samples.npy")
    assert (x.shape, x.dtype) == ((5, 2), np.float32)
    run("sample moons --n 50 --out points.png")
    assert pixels("points.png").size
    np.save("some.npy", load("two-moons").x[:7])
    run("encode moons some.npy --out z.npz")
    run("decode moons z.npz --out back.npy")
    np.testing.assert_allclose(np.load("back.npy"), np.load("some.npy"), atol=1e-4)
    assert run_json("score moons some.npy --out s.csv")["n"] == 7
    assert run_json("inspect moons some.npy --index 6")["bound"] == "exact"
    run("sample moons --n 5 --out samples.csv --seed 2")
    run("sample moons --n 5 --out again.npy --seed 2")
    text = Path("samples.csv").read_text().splitlines()
    assert text[0] == "x1,x2"
    table = np.array([[float(cell) for cell in line.split(",")] for line in text[1:]])
    assert np.array_equal(table.astype(np.float32), np.load("again.npy"))
    run("interpolate moons some.npy --out walks.npy --steps 3 --pairs 2")
    assert np.load("walks.npy").shape == (2, 3, 2)
    assert "ActNorm" in run("info moons --ledger --n 50")


def test_tables_are_written_with_the_names_of_their_columns(workdir, run):
    parquet = pytest.importorskip("pyarrow.parquet")
    values = np.random.default_rng(0).normal(size=(40, 3))
    lines = [",".join(map(str, row)) for row in values]
    Path("table.csv").write_text("\n".join(["height,age,weight", *lines]))
    train("realnvp", "table.csv", "run")
    run("sample run --n 7 --out a.parquet")
    table = parquet.read_table("a.parquet")
    assert (table.column_names, table.num_rows) == (["height", "age", "weight"], 7)
    run("encode run table.csv --split all --out z.npz")
    run("decode run z.npz --out back.csv")
    with open("back.csv", newline="") as file:
        back = [list(map(float, row.values())) for row in csv.DictReader(file)]
    np.testing.assert_allclose(back, values, atol=1e-3)
    run("reconstruct run table.csv --n 3 --out again.csv")
    run("interpolate run table.csv --split all --pairs 2 --steps 3 --out walks.csv")
    assert len(Path("walks.csv").read_text().splitlines()) == 7


def test_a_conditional_model_draws_its_classes(workdir, run, run_json):
    model = checkpoint.load("conditional/model.safetensors")
    with torch.no_grad():
        for p in model.parameters():  # after three steps it cares little for classes
            p.add_(0.05 * torch.randn_like(p))
    checkpoint.save(model, "moved.safetensors")
    run("sample moved.safetensors --n 4 --label 1 --out a.npy")
    run("sample moved.safetensors --n 4 --out b.npy")  # cats and dogs in turn
    a, b = np.load("a.npy"), np.load("b.npy")
    assert [np.array_equal(*pair) for pair in zip(a, b, strict=True)] == [False, True] * 2
    run("encode conditional photos --split all --out z.npz")
    run("decode conditional z.npz --out x.npy")
    assert np.array_equal(np.load("x.npy"), images())
    run("decode conditional z.npz --label 0 --out y.npy")
    with np.load("z.npz") as z:
        cats = z["labels"] == 0
    assert np.array_equal(np.load("y.npy")[cats], images()[cats])
    assert run_json("evaluate conditional photos")["n"] == run_json("evaluate glow photos")["n"]
    for words in ("interpolate conditional photos --split all", "reconstruct conditional photos"):
        run(words, "--out p.png")


def test_dynamic_binarization(workdir, run, run_json):
    train("vae", "photos", "binary", "--binarize dynamic --likelihood bernoulli")
    config = json.loads(Path("binary/config.json").read_text())
    assert config["model"]["options"]["bits"] == 1
    run("sample binary --n 20 --out a.npy")
    assert set(np.unique(np.load("a.npy"))) == {0, 1}
    run("sample binary --n 20 --out a.png")
    assert set(np.unique(pixels("a.png"))) == {0, 255}
    first, again, other = (run_json("evaluate binary photos --seed", s) for s in (1, 1, 2))
    assert first == again
    assert first["bits_per_dim"] != other["bits_per_dim"]


def test_five_bits(workdir, run, run_json):
    train("glow", "photos", "five", "--bits 5")
    run("sample five --n 20 --out a.npy")
    assert np.load("a.npy").max() < 32
    run("encode five photos --split all --out z.npz")
    run("decode five z.npz --out x.npy")
    assert np.array_equal(np.load("x.npy"), images() >> 3)
    assert run_json("evaluate five photos")["bits_per_dim"] < 9


def test_images_of_many_sizes_are_resized_to_one(workdir, run_json):
    for i, side in enumerate([9, 12, 20, 8] * 5):
        noise = np.random.default_rng(i).integers(0, 256, (side, side + i % 3), dtype=np.uint8)
        picture(workdir / "mixed" / f"{i}.png", noise)
    train("vae", "mixed", "resized", "--size 8")
    assert json.loads(Path("resized/config.json").read_text())["model"]["shape"] == [1, 8, 8]
    assert run_json("evaluate resized mixed --split all")["n"] == 20  # resized as in training
    train("vae", "mixed", "wide", "--size 6x9 --no-in-memory")
    saved = json.loads(Path("wide/config.json").read_text())
    assert (saved["model"]["shape"], saved["data"]["in_memory"]) == ([1, 6, 9], False)
    assert run_json("evaluate wide mixed --split all --in-memory")["n"] == 20


def test_gray_images_are_scored_by_a_model_of_color_images(workdir, run_json, capsys):
    photos(workdir / "gray", 20, (8, 8))
    assert run_json("score glow gray --out s.csv")["n"] == 20
    assert call("evaluate glow gray") == 0
    assert "gray images are made RGB" in capsys.readouterr().err


def test_bad_images_can_be_skipped(workdir, capsys):
    photos(workdir / "some", n=20)
    broken = workdir / "some/cat/00.png"
    broken.write_bytes(broken.read_bytes()[:60])
    train("vae", "some", "run", "--skip-bad")
    assert json.loads(Path("run/config.json").read_text())["data"]["n"] == 19
    capsys.readouterr()
    assert call("evaluate run some --skip-bad --split all") == 0
    out, err = capsys.readouterr()
    assert "n = 19" in out
    assert "left out: cat/00.png is not a readable image" in err
    assert call("evaluate run some") == 2
    assert "--skip-bad" in capsys.readouterr().err


def test_notes_on_the_data_are_in_the_json_answer(workdir, run_json):
    photos(workdir / "some", n=20)
    (workdir / "some/cat/00.png").write_bytes(b"nothing")
    rows = [f"{i % 7},{i % 5},{i % 2}" for i in range(40)]
    (workdir / "table.csv").write_text("\n".join(["a,b,label", *rows]))
    answer = run_json("train vae some", TINY["vae"], QUICK, "--steps 1 --out a --skip-bad")
    assert (answer["left_out"], answer["notes"]) == (["cat/00.png"], [])
    assert answer["data"]["parts"]["train"]["labels"].keys() == {"cat", "dog"}
    answer = run_json("train realnvp table.csv", TINY["realnvp"], QUICK, "--steps 1 --out b")
    assert (answer["left_out"], len(answer["notes"])) == ([], 1)


def test_suggested_commands_are_quoted_for_the_shell(workdir, capsys):
    words = ["train", "vae", "photos", *TINY["vae"].split(), *QUICK.split(), "--steps", "2"]
    main([*words, "--out", "my run"])
    assert "next: musigma sample 'my run' " in capsys.readouterr().out


def test_overwrite_replaces_a_run_and_nothing_else(workdir, run):
    train("vae", "photos", "run")
    first = Path("run/model.safetensors").read_bytes()
    Path("run/stale.txt").touch()
    train("vae", "photos", "run", "--overwrite --seed 1")
    assert Path("run/model.safetensors").read_bytes() != first
    assert not Path("run/stale.txt").exists()
    Path("bare").mkdir()
    train("vae", "photos", "bare")


def test_files_left_by_a_killed_process_do_not_count_as_a_run(workdir):
    Path("run").mkdir()
    Path("run/.config.json.123.tmp").touch()
    Path("run/.lock").touch()
    train("vae", "photos", "run", "--auto-resume")


def test_a_folder_is_trained_into_by_one_process_at_a_time(workdir, capsys):
    train("vae", "photos", "run")
    before = listing(Path("run"))
    code = "import sys, time, pathlib, musigma.files as f\n"
    code += "with f.lock_run(pathlib.Path('run')): print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        again = ["--resume run", f"vae photos {TINY['vae']} {QUICK} --steps 3 --out run"]
        words = [again[0], f"{again[1]} --overwrite", f"{again[1]} --auto-resume"]
        for which in words:
            capsys.readouterr()
            assert call("train", which) == 2
            assert (
                "out: another process is training in run; wait for it" in capsys.readouterr().err
            )
        assert listing(Path("run")) == before
        other.kill()
    for which in words:
        assert call("train", which) == 0


def test_the_run_folder_may_be_a_link(workdir):
    Path("elsewhere").mkdir()
    Path("run").symlink_to("elsewhere")
    train("vae", "photos", "run")
    train("vae", "photos", "run", "--overwrite")
    assert Path("elsewhere/model.safetensors").is_file()


def test_a_command_that_is_refused_replaces_no_run(workdir, capsys):
    train("vae", "photos", "run")
    first = Path("run/model.safetensors").read_bytes()
    for out in ("run --overwrite", "new"):
        assert call(f"train vae photos {TINY['vae']} --memory-budget 1KB --out {out}") == 2
        error = capsys.readouterr().err
        assert re.search(r"memory_budget: weights and one example take [\d.]+MB, more", error)
    assert Path("run/model.safetensors").read_bytes() == first
    assert not Path("new").exists()


# -- architectures from a file


MINE = '''
import os, time
from musigma import GaussianHead, Prior, StandardNormal, VAE, nets

def {name}(shape, *, bits: int | None = 8, hidden: int = 6, deep: bool = False):
    """A VAE of {name}.

    Args:
        shape: Of an example.
        bits: Of an element.
        hidden: Width of its networks.
        deep: Two hidden layers.
    """
    class Slow(nets.MLP):
        def forward(self, *given):
            time.sleep(float(os.environ.get("NAP", "0")))
            return super().forward(*given)

    layers = [hidden] * (2 if deep else 1)
    encoder = GaussianHead(Slow(shape[0], 4, hidden=layers), event_ndims=1)
    decoder = GaussianHead(nets.MLP(2, 2 * shape[0], hidden=layers), event_ndims=1)
    return VAE(encoder, decoder, Prior(StandardNormal((2,))))
'''


def plugin(name: str) -> Path:
    path = Path(f"{name}_file.py")
    path.write_text(MINE.format(name=name))
    np.save("table.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    return path


@pytest.fixture
def new_process():
    """Remove the architectures that a test adds, as a new process would."""
    from musigma.zoo import ARCHITECTURES

    def back() -> None:
        for name in set(ARCHITECTURES) - before:
            del ARCHITECTURES[name]

    before = set(ARCHITECTURES)
    yield back
    back()


def test_an_architecture_from_a_file(workdir, run, run_json, capsys, new_process):
    spec = f"./{plugin('my_vae')}:my_vae"
    run("train", spec, "table.npy --hidden 5 --deep --steps 2 --out run", QUICK)
    options = json.loads(Path("run/config.json").read_text())["model"]["options"]
    assert options == {"bits": None, "hidden": 5, "deep": True}
    run("sample run --n 3 --out a.npy")  # this process knows it by now
    new_process()
    assert call("sample run --n 3 --out b.npy") == 2
    assert "--plugin FILE.py:my_vae" in capsys.readouterr().err
    assert call("train --resume run") == 2
    assert "--plugin FILE.py:my_vae" in capsys.readouterr().err
    run("sample run --n 3 --out b.npy --plugin", spec)
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()
    new_process()
    run("train --resume run --plugin", spec)
    assert run_json("evaluate run table.npy --plugin", spec)["bound"] == "elbo"


def test_help_of_an_architecture_from_a_file(workdir, run, new_process):
    text = run("train", f"{plugin('my_helped')}:my_helped", "--help")
    for word in ("A VAE of my_helped", "--hidden", "Width of its networks", "--deep", "--steps"):
        assert word in text


def test_an_objective_from_a_file(workdir, run, capsys):
    lines = ["from musigma.objectives import OBJECTIVES, objective", "", "@objective"]
    lines += ["def twice_rate(evidence):", "    return 2 * evidence.rate - evidence.log_px"]
    Path("mine.py").write_text("\n".join(lines))
    words = f"train vae photos {TINY['vae']} {QUICK} --steps 2 --out run --objective twice-rate"
    assert call(words) == 2
    assert "objective: there is no 'twice-rate'" in capsys.readouterr().err
    try:
        run(words, "--plugin ./mine.py:twice_rate")
        config = json.loads(Path("run/config.json").read_text())
        assert config["train"]["objective"] == "twice-rate"
        run("train --resume run --plugin mine.py:twice_rate")
        run("sample run")  # needs no objective
    finally:
        OBJECTIVES.pop("twice-rate", None)
    assert call("train --resume run") == 2
    message = capsys.readouterr().err
    assert "has the objective 'twice-rate', which is not built in" in message
    assert "--plugin FILE.py:twice_rate" in message


def test_ctrl_c_stops_a_run_and_resume_ends_in_the_same_bytes(
    workdir, run, run_json, capsys, new_process
):
    spec = f"{plugin('my_slow')}:my_slow"
    words = f"train {spec} table.npy --steps 30 --seed 5 {QUICK} --out"
    going = subprocess.Popen(
        [sys.executable, "-m", "musigma", *words.split(), "stopped"],
        env={**os.environ, "NAP": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = workdir / "stopped/metrics.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < until:
        assert going.poll() is None, going.communicate()
        time.sleep(0.05)
    going.send_signal(signal.SIGINT)
    _, err = going.communicate(timeout=60)
    assert going.returncode == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    assert "continue with: musigma train --resume stopped" in err
    done = log.read_text().count("train")
    assert 2 <= done < 30
    assert not (workdir / "stopped/evaluation.json").exists()
    answer = run_json("train --resume stopped --device cpu --plugin", spec)
    assert (answer["finished"], answer["steps"]) == (True, 30)
    assert run_json(words, "whole")["evaluation"] == answer["evaluation"]
    for file in ("last.safetensors", "model.safetensors", "evaluation.json"):
        assert (workdir / "stopped" / file).read_bytes() == (workdir / "whole" / file).read_bytes()


# -- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options(run, command):
    text = run(command, "--help")
    assert text.startswith(f"Usage: musigma {command}")
    for option in ("--json", "--seed", "--device", "--plugin", "--debug"):
        assert option in text
    options = {
        "sample": "--n --temperature --mode --label --out",
        "reconstruct": "--n --out --split --size --skip-bad --batch-size",
        "interpolate": "--pairs --steps --path --out --split",
        "encode": "--out --draw --whiten --split",
        "decode": "--out --temperature --label",
        "score": "--out --k --split --batch-size",
        "evaluate": "--k --split --size --skip-bad --batch-size",
        "inspect": "--index --split",
        "info": "--ledger --data --n --split",
        "report": "--out --title",
        "audit": "--shape --allow --out --split",
    }
    for option in options[command].split():
        assert re.search(rf"{option}\b", text), option


@pytest.mark.parametrize("arch", ["vae", "ladder", "realnvp", "glow"])
def test_help_of_training_names_model_and_training_options(run, arch):
    text = run("train", arch, "--help")
    common = "--steps --epochs --minutes --batch-size --lr --ema --clip --free-bits --kl-warmup"
    data = "--out --overwrite --size --bits --binarize --skip-bad --conditional --json --seed"
    options = {"vae": "--latents --prior", "ladder": "--levels", "realnvp": "--alpha"}
    options["glow"] = "--coupling --dequantize --permutation"
    for option in f"{common} {data} {options[arch]}".split():
        assert re.search(rf"{option}\b", text), option
    assert "arXiv" in text


def test_help_of_training_starts_with_the_most_used_options(run):
    found = panels(run("train glow --help"))
    assert list(found) == [
        *("Arguments", "Most used", "Model", "Objective", "Budget and optimizer", "Data"),
        *("Hardware", "Output", "Every command"),
    ]
    first = re.findall(r"^│ (--[\w-]+)", found["Most used"], re.MULTILINE)
    assert first == ["--minutes", "--size", "--of", "--given", "--out", "--device"]
    assert "--hidden" in found["Model"]
    assert "--beta" in found["Objective"]
    assert "--lr" in found["Budget and optimizer"]
    assert "--memory" in found["Hardware"]
    assert "Random seed." in found["Budget and optimizer"]


LIGHT = ["--help", "--version", "sampel", "sample --help", "sample --temprature 1", "inspect"]


@pytest.mark.parametrize("words", LIGHT)
def test_what_needs_no_model_does_not_import_torch(words):
    code = "import sys; from musigma.cli import main\n"
    code += f"try: main({words.split()!r})\nexcept SystemExit as end: print(end.code)\n"
    code += "heavy = {'torch', 'numpy', 'accelerate', 'pyarrow'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def panels(text: str) -> dict[str, str]:
    """The headings of a help page with the text under each, in order."""
    return dict(re.findall(r"╭─ ([^─]+) ─+╮\n(.*?)╰─", text, re.DOTALL))


def test_help_of_all_lists_commands_in_groups(run):
    found = panels(run("--help"))
    assert list(found) == [
        *("Train", "Use", "Inspect", "Convert", "Compress", "Audit", "Options"),
    ]
    assert re.findall(r"^│ (\w+)", found["Train"], re.MULTILINE) == ["train", "finetune", "fit"]
    for command in COMMANDS:
        assert re.search(rf"^│ {command}\b", "\n".join(found.values()), re.MULTILINE)
    assert "--resume" in run("train --help")
    from musigma import __version__

    assert run("--version").strip() == __version__


def python(*words: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "musigma", *words], capture_output=True, text=True, **how
    )


def test_it_runs_as_a_program(workdir):
    done = python("sample", "glow", "--n", "2", "--out", "a.npy", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"out": "a.npy", "n": 2, "temperature": "1"}
    failed = python("sample", "none")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "musigma: RUN: there is no run folder or checkpoint file none\n"
    traced = python("sample", "none", "--debug")
    assert traced.returncode != 0
    assert "Traceback (most recent call last)" in traced.stderr
    assert "there is no run folder" in traced.stderr


# -- mistakes


@pytest.fixture(scope="module")
def bad(home, tmp_path_factory):
    """A folder with every kind of fault, and links to all that is in `home`."""
    workdir = tmp_path_factory.mktemp("bad")
    for item in home.iterdir():
        (workdir / item.name).symlink_to(item)
    with inside(workdir):
        Path("empty").mkdir()
        Path("notes").mkdir()
        Path("notes/a.txt").write_text("no image")
        photos(Path("mixed"), 6)
        picture(Path("mixed/cat/large.png"), np.zeros((9, 12, 3), np.uint8))
        photos(Path("truncated"), 20)
        broken = Path("truncated/dog/07.png")
        broken.write_bytes(broken.read_bytes()[:-40])
        photos(Path("gray"), 20, (8, 8))
        photos(Path("large"), 20, (16, 16, 3))
        photos(Path("odd"), 20, (9, 9, 3))
        shutil.copytree("photos/cat", "one-class")
        shutil.copytree("photos", "renamed")
        Path("renamed/dog").rename("renamed/wolf")
        values = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
        np.save("range.npy", values * 300)
        np.save("nan-images.npy", np.where(values > 3, np.nan, 0.5).astype(np.float32))
        table = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
        np.save("table.npy", table)
        table[7, 1] = np.nan
        np.save("nan.npy", table)
        Path("nan.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in table))
        Path("words.csv").write_text("a,b\n1,2\n3,four\n5,6\n")
        Path("hollow").mkdir()
        Path("file").write_text("not a run")
        model = Path("glow/model.safetensors").read_bytes()
        Path("truncated.safetensors").write_bytes(model[: len(model) // 2])
        changed = bytearray(model)
        changed[model.index(b"hidden") + 2] ^= 1
        Path("changed.safetensors").write_bytes(changed)
        shutil.copytree("glow", "damaged")
        Path("damaged/model.safetensors").write_bytes(changed)
        Path("broken.py").write_text("import nothing_of_this_name\n")
        Path("other.py").write_text("def one(shape, *, bits=8):\n    pass\n")
        Path("form.py").write_text("def form(shape, bits, *, depth=3):\n    pass\n")
        Path("vae.py").write_text("def vae(shape, *, bits=8):\n    pass\n")
        Path("taken.py").write_text("def taken(shape, *, bits=8, steps: int = 3):\n    pass\n")
        Path("demanding.py").write_text("def demanding(shape, *, bits=8, k2: int):\n    pass\n")
        z0, z1 = np.zeros((3, 24, 2, 2), np.float32), np.zeros((3, 6, 4, 4), np.float32)
        np.savez("good.npz", z0=z0, z1=z1)
        np.savez("flat.npz", z0=z0.reshape(3, -1))
        np.savez("swapped.npz", z0=z1, z1=z0)
        np.savez("uneven.npz", z0=z0, z1=z1[:2])
        np.savez("gap.npz", z0=z0, z2=z1)
        np.savez("none.npz", x=z0)
        np.savez("no-rows.npz", z0=z0[:0])
        np.savez("scalar.npz", z0=np.float32(1))
        np.savez("nan.npz", z0=z0 * np.nan)
        np.savez("text.npz", z0=np.full((3, 24, 2, 2), "a"))
        np.savez("objects.npz", z0=np.array([None, {}], dtype=object))
        np.savez("labels.npz", z0=z0, labels=np.array([0, 1, 2]))
        np.savez("short.npz", z0=z0, labels=np.array([0, 1]))
        np.save("z.npy", z0)
        whole = Path("good.npz").read_bytes()
        Path("truncated.npz").write_bytes(whole[: len(whole) // 2])
        Path("flipped.npz").write_bytes(whole[:200] + b"\x55" + whole[201:])
        Path("empty.npz").touch()
        for name in ("stateless", "configless", "forged", "untrue"):
            shutil.copytree("vae", name)
        Path("stateless/state.safetensors").unlink()
        Path("configless/config.json").write_text('{"model": {}}')
        Path("forged/config.json").write_text('["no", "object"]')
        Path("untrue/evaluation.json").write_text("{}")
        Path("precious").mkdir()
        Path("precious/letter.txt").write_text("dear")
    return workdir


MISTAKES = {
    # data
    "missing folder": ("train vae none", "none: no such file, folder or built-in set"),
    "misspelt name": ("train vae digit", "did you mean 'digits'"),
    "empty folder": ("train vae empty", "empty: holds no images .*it is empty"),
    "folder without images": ("train vae notes", "notes: holds no images .*1 .txt"),
    "a table for images": (
        "score vae none.csv --out s.csv",
        "DATA: expected images of 3 x 8 x 8, .*none.csv is a table",
    ),
    "mixed sizes": ("train vae mixed", "images differ in size.*--size N"),
    "mixed sizes, later": ("evaluate vae mixed", "images differ in size.*--size N"),
    "truncated image": ("train vae truncated", r"dog/07\.png is not a readable.*--skip-bad"),
    "truncated, later": ("score vae truncated --out s.csv", r"dog/07\.png .*--skip-bad"),
    "wrong size": ("reconstruct glow large", "--size 8 resizes the images"),
    "vectors for images": ("evaluate glow table.npy", r"shape \(3, 8, 8\), and table.npy"),
    "images for vectors": ("evaluate moons photos", r"shape \(2,\), and photos"),
    "out of range": ("train vae range.npy", r"values run from -\d+.* to \d+"),
    "NaN in images": ("train vae nan-images.npy", "image 3 .* not finite"),
    "NaN in a table": ("train realnvp nan.npy", r"row 7 .*column 1 .* is nan"),
    "NaN in a csv": ("train realnvp nan.csv", "line 9, column 'b' is missing"),
    "NaN, later": ("score moons nan.npy --out s.csv", r"row 7 .*column 1 .* is nan"),
    "other columns": ("score moons nan.csv --out s.csv", "no column 'x1', 'x2', which the model"),
    "no number": ("train realnvp words.csv", "column 'b' is 'four', not a number"),
    "no labels": ("train vae one-class --conditional", "no labels: put images into a folder"),
    "labels missing later": (
        "evaluate conditional one-class",
        "no labels: put images into a folder",
    ),
    "other classes": (
        "evaluate conditional renamed",
        "unknown to the model: wolf .known: cat, dog",
    ),
    "size of a table": ("train realnvp table.npy --size 8", "is a table"),
    "bits of a table": ("train realnvp table.npy --bits 5", "is a table"),
    "flow of images for vectors": ("train glow table.npy", "for images"),
    "odd sides": ("train glow odd", "sides of 9x9 cannot be halved"),
    "too many levels": ("train glow photos --levels 4", "sides of 8x8 cannot be halved 4 times"),
    "too many, realnvp": ("train realnvp photos --levels 4", "cannot be halved 4 times"),
    # runs and checkpoints
    "missing run": ("sample none", "there is no run folder or checkpoint file none"),
    "run without a model": ("sample hollow", r"the folder hollow holds no model\.safetensors"),
    "no checkpoint": ("sample file", "file: not a whole safetensors file"),
    "truncated checkpoint": ("sample truncated.safetensors", "cut short or damaged"),
    "changed byte": ("sample changed.safetensors", "changed or damaged"),
    "changed byte in a run": ("evaluate damaged photos", "changed or damaged"),
    "run is there": (
        "train vae photos --out vae",
        "vae already exists; pass --resume vae, --overwr",
    ),
    "file is there": ("train vae photos --out file --overwrite", "file is not a run"),
    "no run to overwrite": (
        "train vae photos --out precious --overwrite",
        "precious is not a run",
    ),
    "changed figure": ("info untrue", r"untrue/evaluation\.json was changed or damaged"),
    "report of nothing": ("report none", "none is not a run folder"),
    "suffix of a report": ("report vae --out a.pdf", r"expected a \.html file"),
    "folder of a report": ("report vae --out none/a.html", "there is no folder none"),
    "no plugin": ("sample glow --plugin none.py:f", "plugin: expected FILE.py:NAME"),
    # options
    "unknown option": ("train glow photos --level 2", "--level. Did you mean --levels"),
    "unknown option of all": ("train vae photos --leanring-rate 1", "Unknown option: --leanring"),
    "option of another": ("train vae photos --coupling affine", "Unknown option: --coupling"),
    "unknown option later": ("sample glow --temprature 1", "Did you mean --temperature"),
    "unknown command": ("sampel glow", "unknown command 'sampel'; did you mean 'sample'"),
    "unknown architecture": ("train glwo photos", "did you mean 'glow'"),
    "nothing to train": ("train", "give an architecture and data"),
    "no data": ("train vae", "(?i)data"),
    "no choice": ("train vae photos --net mpl", r'"mpl" for --net.*Did you mean "mlp"'),
    "no such prior": (
        "train vae photos --prior flwo",
        "prior: there is no .*; did you mean 'flow'",
    ),
    "no number given": ("train vae photos --steps many", "--steps: unable to convert"),
    "no likelihood": ("train vae photos --likelihood logistc", "(?i)logist"),
    "no format": ("train vae photos --format sideways", "(?i)format"),
    "no steps": ("train vae photos --steps 0", "steps: expected 1 or more"),
    "two budgets": (
        "train vae photos --steps 5 --minutes 1",
        "the budget is already given as steps",
    ),
    "no rate": ("train vae photos --lr 0", "lr: expected a positive"),
    "no bits": ("train vae photos --bits 9", "bits is 9: give a whole number from 1 to 8"),
    "no size": ("train vae photos --size 0", "size: expected a side such as 32, or height x"),
    "bits and binarize": ("train vae photos --bits 5 --binarize threshold", "drop one of them"),
    "beta for a flow": ("train glow photos --beta 2", "a flow has none"),
    "free bits for a flow": ("train realnvp table.npy --free-bits 1", "a flow has none"),
    "seed": ("train vae photos --seed 99999999999999999999", "seed: expected 0 to"),
    "no device": ("train vae photos --device gpu0", "device: 'gpu0' .* it has .*cpu"),
    "no device later": ("sample glow --device cuda:99", "device: 'cuda:99' .* has .*cpu"),
    "n": ("sample glow --n 0", "n: expected 1 or more; got 0"),
    "n of reconstruct": ("reconstruct glow photos --n 0", "n: expected 1 or more; got 0"),
    "n of info": ("info glow --ledger --n 0", "n: expected 1 or more; got 0"),
    "batch size": ("evaluate glow photos --batch-size 0", "batch_size: expected 1 or more"),
    "k": ("evaluate vae photos --k 0", "k: expected 1 or more draws; got 0"),
    "several k": ("evaluate vae photos --k 1,x", "k: expected numbers of draws"),
    "anneal": ("evaluate vae photos --anneal 0", "anneal: expected 1 or more steps; got 0"),
    "gap": ("evaluate moons two-moons --gap", "is exact, without a gap"),
    "anneal nothing": (
        "evaluate moons two-moons --anneal 2",
        "annealing: this Chain draws nothing",
    ),
    "k of score": ("score vae photos --k -1 --out s.csv", "k: expected 1 or more draws; got -1"),
    "pairs": ("interpolate glow photos --pairs 0", "pairs, steps: expected"),
    "path": ("interpolate glow photos --path round", 'round" for --path'),
    "index": ("inspect vae photos --index 40", "index: expected 0 to 39; got 40"),
    "index below": ("inspect vae photos --index -1", "index: expected 0 to 39; got -1"),
    "split": ("evaluate vae photos --split test", '"test" for --split'),
    "label": ("sample conditional --label 2", "label: expected 0 to 1, or one of cat, dog; got"),
    "label for none": ("sample glow --label 1", "not conditioned on classes"),
    "hot": ("sample glow --temperature hot", "temperature: expected numbers from 0, such as 0.7"),
    "temperature below": ("sample glow --temperature -1", "temperature: expected"),
    "temperature nan": ("sample glow --temperature nan", "temperature: expected numbers from 0"),
    "temperatures": ("sample glow --temperature 1,2,3", "or 2 numbers, one per latent; got 3"),
    "temperature empty": ("decode glow good.npz --temperature 1,", "temperature: expected"),
    # outputs
    "folder of out": ("sample glow --out none/a.png", "there is no folder none"),
    "folder as out": ("sample glow --out empty.png/..", "out: "),
    "suffix": ("sample glow --out a.gif", r"expected a .* or \.nc file; got a\.gif"),
    "suffix of rows": ("reconstruct vae photos --out a.jpg", r"expected a \.png"),
    "suffix of latents": ("encode vae photos --out z.npy", r"expected a \.npz or \.parquet file"),
    "suffix of scores": ("score vae photos --out s.xlsx", r"expected a \.csv or \.parquet file"),
    "folder of scores": ("score vae photos --out none/s.csv", "there is no folder none"),
    "folder of latents": ("encode vae photos --out none/z.npz", "there is no folder none"),
    "out missing": ("score vae photos", "--out"),
    # plugins
    "plugin fails": ("train broken.py:f photos", "broken.py fails: ModuleNotFoundError: No mod"),
    "plugin without it": ("train other.py:two photos", "defines no 'two'; it has one"),
    "plugin is not there": ("train absent.py:f photos", "expected FILE.py:NAME of a file"),
    "plugin of another form": ("train form.py:form photos", "must have the form"),
    "plugin of a known name": ("train vae.py:vae photos", "the zoo has a 'vae' already"),
    "plugin's option is taken": ("train taken.py:taken photos", "steps: an option of taken"),
    "plugin's option is open": ("train demanding.py:demanding photos", "without a default"),
    "plugin fails later": ("sample vae --plugin broken.py:f", "broken.py fails"),
    # latents
    "latents missing": ("decode glow none", "there is no file none"),
    "latents flat": ("decode glow flat.npz", r"of shapes .*\(24, 2, 2\).*flat\.npz has"),
    "latents swapped": ("decode glow swapped.npz", "of shapes"),
    "latents uneven": ("decode glow uneven.npz", "of shapes"),
    "latents with a gap": ("decode glow gap.npz", r"not an \.npz file of z0, z1"),
    "latents of something else": ("decode glow none.npz", "of shapes"),
    "latents of none": ("decode glow no-rows.npz", "expected finite numbers"),
    "latents scalar": ("decode glow scalar.npz", "of shapes"),
    "latents NaN": ("decode glow nan.npz", "expected finite numbers"),
    "latents text": ("decode glow text.npz", "expected finite numbers"),
    "latents pickled": ("decode glow objects.npz", "allow_pickle=False"),
    "latents npy": ("decode glow z.npy", r"not an \.npz file of z0, z1"),
    "truncated latents": ("decode glow truncated.npz", r"not an \.npz file of z0, z1"),
    "latents changed": ("decode glow flipped.npz", r"not an \.npz file of z0, z1"),
    "latents empty": ("decode glow empty.npz", r"not an \.npz file of z0, z1"),
    "latents of another": ("decode vae good.npz", "of shapes"),
    "latents' labels": ("decode conditional labels.npz", "expected 3 labels from 0 to 1"),
    "latents' labels too few": ("decode conditional short.npz", "expected 3 labels from 0 to 1"),
    # resuming
    "resume nothing": ("train --resume none", "none does not hold a readable config.json"),
    "resume without state": ("train --resume stateless", "stateless holds no state"),
    "resume without config": ("train --resume configless", "configless does not hold a readable"),
    "resume forged": ("train --resume forged", "forged does not hold a readable"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_prints_one_line_and_leaves_no_files(
    bad, monkeypatch, capsys, new_process, what
):
    words, message = MISTAKES[what]
    if words.startswith("train ") and "--out" not in words and "--resume" not in words:
        words += " --out made"
    monkeypatch.chdir(bad)
    before = listing(bad)
    code = call(words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"musigma: [^\n]+\n", err), err
    assert re.search(message, err), err
    assert listing(bad) == before


@pytest.mark.parametrize("what", ["empty folder", "changed byte", "unknown option", "hot"])
def test_a_mistake_shows_its_traceback_on_request(bad, monkeypatch, capsys, what):
    monkeypatch.chdir(bad)
    with pytest.raises(Exception, match=MISTAKES[what][1]):
        main([*MISTAKES[what][0].split(), "--debug"])


@pytest.mark.parametrize("what", ["mixed sizes", "unknown option", "truncated checkpoint"])
def test_a_mistake_in_a_real_process(bad, what):
    before = listing(bad)
    done = python(*MISTAKES[what][0].split(), cwd=bad)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"musigma: [^\n]+\n", done.stderr)
    assert re.search(MISTAKES[what][1], done.stderr)
    assert listing(bad) == before


def test_a_mistake_with_json_leaves_standard_output_empty(bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    assert call("evaluate vae empty --json") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["pixel", "more", "fewer", "labels"])
def test_a_run_is_not_resumed_on_other_data(workdir, run, capsys, change):
    shutil.copytree("photos", "mine")
    train("vae", "mine", "run")
    image = Path("mine/cat/02.png")
    if change == "pixel":
        changed = pixels(image)
        changed[0, 0, 0] ^= 1
        picture(image, changed)
    elif change == "more":
        picture(Path("mine/cat/more.png"), np.zeros((8, 8, 3), np.uint8))
    elif change == "fewer":
        image.unlink()
    else:
        Path("mine/dog").rename("mine/ape")
    before = listing(workdir / "run")
    capsys.readouterr()
    assert call("train --resume run") == 2
    assert re.fullmatch(r"musigma: resume: [^\n]+\n", capsys.readouterr().err)
    assert listing(workdir / "run") == before


CHANGED_OPTIONS = {
    "steps": "--steps 4",
    "size": "--size 16",
    "bits": "--bits 4",
    "binarize": "--binarize dynamic",
    "perturb": "--perturb 0.1",
    "given": "--conditional",
    "skip_bad": "--skip-bad",
    "blocks": "--blocks 2",
}


@pytest.mark.parametrize("option", CHANGED_OPTIONS)
def test_auto_resume_refuses_a_run_with_other_options(workdir, run, capsys, option):
    words = f"train vae photos {TINY['vae']} {QUICK} --out run --auto-resume"
    run(words, "--steps 3")
    before = listing(workdir / "run")
    changed = (
        CHANGED_OPTIONS[option] if option == "steps" else f"--steps 3 {CHANGED_OPTIONS[option]}"
    )
    assert call(words, changed) == 2
    assert f"run began with {option} " in capsys.readouterr().err
    assert listing(workdir / "run") == before
    run(words, "--steps 3")


def test_auto_resume_names_every_option_that_differs_and_knows_defaults(workdir, run, capsys):
    words = f"train vae photos {TINY['vae']} {QUICK} --steps 3 --out run --auto-resume"
    run(words, "--blocks 2 --bits 4")
    assert call(words) == 2
    assert "run began with blocks 2, not 1; bits 4, not 8; pass --over" in capsys.readouterr().err
    config = json.loads(Path("run/config.json").read_text())
    del config["model"]["options"]["prior_depth"]  # as if the option were new
    Path("run/config.json").write_text(json.dumps(config))
    run(words, "--blocks 2 --bits 4")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(workdir, run_json):
    train("vae", "photos", "run")
    before = listing(workdir / "run")
    assert run_json("train --resume run --device cpu")["steps"] == 3
    after = listing(workdir / "run")
    assert set(after) == set(before)
    for file in ("config.json", "evaluation.json", "last.safetensors", "model.safetensors"):
        assert after[file] == before[file]


def test_a_diverged_model_is_still_a_run(workdir, run, run_json):
    words = "--steps 2 --lr 1e30 --warmup 0 --ema 0 --clip 1e9 --out diverged"
    answer = run_json("train glow photos", TINY["glow"], QUICK, words)
    assert answer["evaluation"]["bits_per_dim"] is None
    assert answer["evaluation"]["non_finite"] > 0
    assert answer["pictures"] == []
    for name in ("evaluation.json", "ledger.json"):
        assert "NaN" not in (workdir / "diverged" / name).read_text()  # which is no JSON
    assert "nan bits/dim" in run("info diverged")
    assert run_json("score diverged photos --out s.csv")["bits_per_dim"] is None
    assert call("sample diverged --out a.npy") == 2
    assert not Path("a.npy").exists()


def test_failed_training_prints_one_line(workdir, capsys):
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    words = "--steps 60 --lr 1e30 --warmup 0 --clip 1e9"
    code = call("train vae x.npy --net mlp --out run", QUICK, words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert " steps in a row were skipped" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_units_do_not_matter_to_training(workdir, run_json):
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    nats = []
    for name, unit in (("one", 1.0), ("huge", 2.0**100)):
        np.save(f"{name}.npy", x * np.float32(unit))
        answer = run_json(f"train vae {name}.npy --net mlp --steps 5 --out {name}", QUICK)
        nats.append(answer["evaluation"]["nats"])
    assert nats[1] - nats[0] == pytest.approx(2 * 100 * np.log(2), abs=5)  # other splits


def test_arguments_are_read_where_pydantic_is_loaded(capsys):
    pytest.importorskip("pydantic")
    assert call("train", "vae", "nothing-here") == 2
    assert "no such file" in capsys.readouterr().err
