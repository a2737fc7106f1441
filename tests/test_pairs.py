"""Pairs (theta, x): which columns are modeled, which are given, and what cannot be used."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from musigma import checkpoint
from musigma.cli import main
from musigma.data import load
from test_data import GRAY, fails, save_folder

N = 60
QUICK = "--steps 3 --batch-size 16 --evaluations 1 --device cpu"


def simulations(n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of a simulator: x = theta + noise, a setting, and columns about the runs."""
    random = np.random.default_rng(seed)
    theta = random.uniform(-1, 1, (n, 3))
    x = theta @ random.normal(size=(3, 2)) + 0.1 * random.normal(size=(n, 2))
    return {
        "run_id": np.arange(n) + 100,
        "theta_0": theta[:, 0],
        "x_0": x[:, 0],
        "seconds": random.exponential(size=n),
        "theta_1": theta[:, 1],
        "setting": np.array(["low", "high"])[random.integers(0, 2, n)],
        "x_1": x[:, 1],
        "theta_2": theta[:, 2],
        "y": random.integers(0, 2, n),
    }


def write(path: str | Path, columns: dict) -> str:
    """Columns as a .csv or .parquet file."""
    if str(path).endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)
        return str(path)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


def read(path: str | Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def call(words: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main(words.split())
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def run(capsys):
    """Run a command that succeeds; its JSON answer, with what it printed beside it as `notes`."""

    def ok(words: str) -> dict:
        capsys.readouterr()
        code = call(f"{words} --json")
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return ok


@pytest.fixture
def said(capsys):
    """Run a command that succeeds; what it printed, without line breaks of the terminal."""

    def ok(words: str) -> str:
        capsys.readouterr()
        code = call(words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return " ".join(f"{out} {err}".split())

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
        return err

    return no


# The columns that are modeled -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_some_columns_are_modeled_and_some_are_given(tmp_path, suffix):
    columns = simulations()
    path = write(tmp_path / f"sims.{suffix}", columns)
    data = load(path, of="theta_*", given=["x_*", "setting"])
    assert data.columns == ("theta_0", "theta_1", "theta_2")
    assert list(data.given) == ["x_0", "x_1", "setting"]
    expected = np.stack([columns[f"theta_{j}"] for j in range(3)], 1).astype(np.float32)
    np.testing.assert_array_equal(data.x, expected)
    np.testing.assert_array_equal(data.given["x_1"].values, columns["x_1"].astype(np.float32))
    assert data.given["setting"].names == ("high", "low")
    assert data.labels is None
    assert data.ids == tuple(map(str, columns["run_id"]))
    (note,) = data.notes
    assert re.search("neither modeled nor given are left out: 'run_id', 'seconds', 'y'$", note)


def test_columns_come_in_the_order_of_the_patterns(tmp_path):
    path = write(tmp_path / "sims.csv", simulations())
    data = load(path, of=["theta_2", "theta_*"])
    assert data.columns == ("theta_2", "theta_0", "theta_1")
    assert not data.given
    assert load(path, of="y", given="x_*").columns == ("y",)


def test_typed_columns_are_chosen_too(tmp_path):
    path = write(tmp_path / "sims.csv", simulations())
    data = load(path, of=["setting", "theta_*"], given="x_*", schema="infer")
    assert data.schema is not None
    assert data.schema.names == ("setting", "theta_0", "theta_1", "theta_2")
    assert list(data.given) == ["x_0", "x_1"]
    assert len(data.notes) == 1
    data = load(path, of="theta_*", schema={"theta_1": {"kind": "continuous"}, "y": {}})
    assert data.schema is not None
    assert data.schema.names == ("theta_0", "theta_1", "theta_2")
    with fails("column 'run_id' is different in every row: it names rows"):
        load(path, of=["run_id", "theta_*"], schema="infer")


def test_names_with_brackets_need_no_escape(tmp_path):
    columns = {f"{name}[{i}]": np.random.normal(size=9) for name in "ax" for i in range(2)}
    data = load(write(tmp_path / "sims.csv", columns), of=["a[0]", "a[1]"], given="x[[]*")
    assert (data.columns, list(data.given)) == (("a[0]", "a[1]"), ["x[0]", "x[1]"])


def test_all_faults_of_a_choice_are_named(tmp_path):
    path = write(tmp_path / "sims.csv", simulations())
    with fails("sims.csv: no column matches 'phi_.': give one of run_id, theta_0, x_0"):
        load(path, of="phi_?", given="x_*")
    with fails(
        "sims.csv: columns cannot be chosen so:",
        "of: 'theta_.*' is given twice",
        "no column matches 'phi': give one of",
        "no column matches 'z': give one of",
        "'x_0', 'x_1' are both modeled .of. and given: choose one of the two",
    ):
        load(path, of=["theta_*", "x_*", "phi", "theta_*"], given=["x_*", "z"])
    columns = simulations() | {"theta_3": np.full(N, np.nan)}
    for schema in (None, "infer"):
        with fails("theta_3.*empty"):
            load(write(tmp_path / "gap.csv", columns), of="theta_*", schema=schema)
    with fails("column 'setting' holds text"):
        load(path, of=["setting", "theta_*"])


def test_data_without_names_have_no_columns_to_choose(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY)
    with fails("of: 'theta_.*' names columns, and these are images, which have none: leave it"):
        load(folder, of="theta_*")
    np.save(tmp_path / "x.npy", np.random.normal(size=(9, 2)))
    with fails("of: its columns have no names"):
        load(tmp_path / "x.npy", of="theta_*")
    with fails("of: its columns cannot be chosen: give a table"):
        load("two-moons", of="x1")


@pytest.mark.parametrize(
    "name",
    [
        "nsf --depth 1 --hidden 8",
        "maf --depth 1 --hidden 8",
        "realnvp --depth 1 --hidden 8",
        "vae --latents 2 --width 8",
        "mlp_vae --latents 2 --hidden 8",
        "table --hidden 16 --blocks 1",
    ],
)
def test_a_run_knows_its_columns(tmp_path, monkeypatch, run, name):
    monkeypatch.chdir(tmp_path)
    columns = simulations()
    write("sims.csv", columns)
    more = dict(reversed(simulations(20, seed=1).items())) | {"x_9": np.full(20, np.nan)}
    write("test.csv", more)
    given = "" if name.startswith("mlp_vae") else "--given x_* --given setting"
    answer = run(
        f"train {name} sims.csv --of theta_* {given} {QUICK} --out run".replace("  ", " ")
    )
    assert sum("left out" in note for note in answer["notes"]) == 1
    spec = checkpoint.load("run/model.safetensors").spec
    assert spec.columns == ("theta_0", "theta_1", "theta_2")
    assert run("evaluate run sims.csv")["split"] == "held-out"
    assert run("evaluate run test.csv")["n"] == 20
    run("score run test.csv --out a.csv")
    write("ordered.csv", {name: more[name] for name in columns})
    run("score run ordered.csv --out b.csv")
    scores = [[float(row["nats"]) for row in read(name)] for name in ("a.csv", "b.csv")]
    if name.startswith(("nsf", "maf", "realnvp", "table")):
        assert scores[0] == pytest.approx(scores[1])


def test_a_choice_of_columns_is_kept(tmp_path, monkeypatch, run, refused):
    monkeypatch.chdir(tmp_path)
    write("sims.csv", simulations())
    words = f"train maf sims.csv --depth 1 --hidden 8 {QUICK} --out run --auto-resume --given x_*"
    run(f"{words} --of theta_*")
    assert json.loads(Path("run/config.json").read_text())["data"]["of"] == ["theta_*"]
    run(f"{words} --of theta_*")
    run("train --resume run --device cpu")
    assert "began with of ['theta_*'], not ['theta_0']" in refused(f"{words} --of theta_0")
    run(f"finetune run sims.csv {QUICK} --out further")
    assert run("evaluate further sims.csv")["split"] == "held-out"
    message = refused(f"train maf sims.csv --of x_* --of w --given x_0 {QUICK} --out other")
    assert "no column matches 'w'" in message
    assert "'x_0' is both modeled (of) and given" in message
