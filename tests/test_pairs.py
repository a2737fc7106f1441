"""Pairs (theta, x): which columns are modeled, which are given, and what cannot be used."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from musigma import build, checkpoint
from musigma.data import Dataset, Given, attach, digest, given_rows, load, outside, ranges
from musigma.evaluation import batch, check
from musigma.spec import Spec, Variable
from test_cli_given import call
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
        "sims.csv: columns cannot be chosen:",
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


# What a simulator may do wrong ------------------------------------------------------------------


def faulty() -> dict[str, np.ndarray]:
    """Simulations of which six of sixty failed in several ways."""
    columns = simulations()
    columns["x_0"][[3, 7, 8]] = np.nan
    columns["x_1"][7] = np.inf
    columns["x_1"][20] = 1e39  # too large for float32
    columns["theta_1"][[41, 42]] = -np.inf
    return columns


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_failed_simulations_are_counted_by_column(tmp_path, suffix):
    path = write(tmp_path / f"sims.{suffix}", faulty())
    first = {i: f"line {i + 2}" if suffix == "csv" else f"row {i} .from 0." for i in range(N)}
    with fails(
        "6 of 60 rows cannot be used; repair them, or pass --skip-bad to leave them out:",
        f"column 'theta_1' is infinite or too large in 2 rows, the first of them {first[41]}",
        f"column 'x_0' is NaN or missing in 3 rows, the first of them {first[3]}",
        f"column 'x_1' is infinite or too large in 2 rows, the first of them {first[7]}",
    ):
        load(path, of="theta_*", given="x_*")
    data = load(path, of="theta_*", given="x_*", skip_bad=True)
    kept = np.delete(np.arange(N), [3, 7, 8, 20, 41, 42])
    for j in range(3):
        values = faulty()[f"theta_{j}"][kept].astype(np.float32)
        np.testing.assert_array_equal(data.x[:, j], values)
    np.testing.assert_array_equal(data.given["x_1"].values, faulty()["x_1"][kept].astype("f"))
    assert data.ids == tuple(str(100 + i) for i in kept)
    assert re.search("6 of 60 rows left out: column 'theta_1' is infinite.* in 2", data.notes[-1])
    one = {"theta_0": faulty()["theta_0"], "x_1": faulty()["x_1"]}
    with fails("2 of 60 rows cannot be used", "column 'x_1' is infinite or too large in 2 rows"):
        load(write(path, one), of="theta_*", given="x_*")


def test_failed_simulations_on_disk_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "sims.parquet", faulty())
    how = {"of": "theta_*", "given": "x_*", "skip_bad": True}
    here, there = (load(path, in_memory=in_memory, **how) for in_memory in (True, False))
    assert isinstance(there.array, np.memmap)
    np.testing.assert_array_equal(here.x, there.x)
    for name, given in here.given.items():
        np.testing.assert_array_equal(given.values, there.given[name].values)
    assert digest(here) == digest(there)


def test_typed_simulations_that_failed_are_counted_too(tmp_path):
    path = write(tmp_path / "sims.csv", faulty())
    how = {"of": "theta_*", "given": "x_*", "schema": "infer"}
    with fails("6 of 60 rows", "line 43, column 'theta_1' is infinite", "'x_0' is NaN", "'x_1'"):
        load(path, **how)
    data = load(path, skip_bad=True, **how)
    assert len(data) == len(data.given["x_0"]) == 54


def test_no_row_is_left(tmp_path):
    columns = simulations() | {"x_0": np.full(N, np.inf)}
    with fails("no row can be used:", "column 'x_0' is infinite or too large in 60 rows"):
        load(write(tmp_path / "sims.csv", columns), of="theta_*", given="x_*", skip_bad=True)


@pytest.mark.parametrize("schema", [None, "infer"])
def test_constant_context_is_named(tmp_path, schema):
    columns = simulations() | {"x_2": np.full(N, 1.5), "x_3": np.array(["on"] * N)}
    path = write(tmp_path / "sims.csv", columns)
    how = {"of": "theta_*", "given": "x_*", "schema": schema}
    with fails("context cannot be used:", "x_2 is constant", "x_3 is constant.*pass --skip-bad"):
        load(path, **how)
    data = load(path, skip_bad=True, **how)
    assert list(data.given) == ["x_0", "x_1"]
    assert sum("x_2 is constant" in note and "left out" in note for note in data.notes) == 1
    assert list(load(path, allow_constant=True, **how).given) == ["x_0", "x_1", "x_2", "x_3"]
    with fails("all of the context is constant"):
        load(path, of="theta_*", given=["x_2", "x_3"], skip_bad=True)


def test_rows_of_a_file_that_failed_are_left_out_with_their_examples(tmp_path):
    theta = {name: v for name, v in simulations().items() if name.startswith("theta")}
    path, x = write(tmp_path / "theta.csv", theta), np.random.normal(size=(N, 4))
    x[[5, 30], 1] = np.nan
    x[:, 2] = 7
    np.save(tmp_path / "x.npy", x)
    with fails("cannot be used", "values are not finite in 2 rows, the first of them 5"):
        load(path, given=str(tmp_path / "x.npy"))
    data = load(path, given=str(tmp_path / "x.npy"), skip_bad=True)
    kept = np.delete(np.arange(N), [5, 30])
    np.testing.assert_array_equal(data.given["x"].values, x[kept].astype("f"))
    np.testing.assert_array_equal(data.x[:, 0], theta["theta_0"][kept].astype("f"))
    notes = " ".join(data.notes)
    assert "2 of 60 examples left out: their rows cannot be used" in notes
    assert "is constant in columns 2, so it carries no information there" in notes
    table = {"id": np.arange(N), "x_0": x[:, 1], "x_1": x[:, 3]}
    data = attach(load(path), write(tmp_path / "x.csv", table), skip_bad=True)
    np.testing.assert_array_equal(data.given["x_1"].values, x[kept, 3].astype("f"))
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 1)), b=np.zeros((4, 1)))
    with fails("the numbers of rows differ, 3 of a, 4 of b: make them equal"):
        attach(load(path), tmp_path / "two.npz")


def test_the_command_line_says_what_failed(tmp_path, monkeypatch, run, said, refused):
    monkeypatch.chdir(tmp_path)
    write("sims.csv", faulty() | {"x_2": np.full(N, 1.5)})
    words = f"train nsf sims.csv --of theta_* --given x_* --depth 1 --hidden 8 {QUICK} --out run"
    message = refused(words)
    assert "6 of 60 rows cannot be used" in message
    assert "--skip-bad" in message
    assert "6 of 60 rows left out" in said(f"{words} --skip-bad")
    spec = checkpoint.load("run/model.safetensors").spec
    assert [v.name for v in spec.context] == ["x_0", "x_1"]
    assert run("evaluate run sims.csv --skip-bad")["split"] == "held-out"
    run("train --resume run --device cpu")
    few = {name: values[:19] for name, values in simulations().items()}
    write("few.csv", few)
    few = words.replace("sims", "few").replace("run", "other")
    assert "few.csv holds 19 rows, which are too few" in refused(few)


# Context of another kind ------------------------------------------------------------------------


def test_context_of_another_kind_is_refused_by_name():
    variables = (Variable("x"), Variable("y", (3,)), Variable("kind", names=("a", "b")))
    model = build("maf", Spec((2,), context=variables), depth=1, hidden=8)
    one_hot = torch.eye(2)[[0, 1, 1]]
    good = {"x": torch.randn(3, 1), "y": torch.randn(3, 3), "kind": one_hot}
    theta = torch.randn(3, 2)
    expected = model.log_prob(theta, good)
    torch.testing.assert_close(model.log_prob(theta, good | {"kind": one_hot.long()}), expected)
    hot = torch.nn.functional.one_hot(torch.tensor([0, 1, 2]), 3)
    with pytest.raises(ValueError, match=r"'y' is real: expected floats, not classes; got int64"):
        model.log_prob(theta, good | {"y": hot})
    with pytest.raises(
        ValueError, match=r"'x' is real.*got bool of shape .3, 1.; 'kind' has class"
    ):
        model.sample(3, good | {"x": torch.ones(3, 1, dtype=torch.bool), "kind": torch.arange(3)})
    with pytest.raises(ValueError, match="'x' is real: expected floats"):
        model.as_distribution(good | {"x": torch.ones(3, 1, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"'kind' has classes: expected one-hot rows .n, 2.; got"):
        model.encode(theta, good | {"kind": torch.randn(3, 1)})


def test_files_of_another_kind_are_refused_by_name(tmp_path, monkeypatch, run, refused):
    monkeypatch.chdir(tmp_path)
    write("sims.csv", simulations())
    words = "train maf sims.csv --of theta_* --given x_* --given setting --depth 1 --hidden 8"
    run(f"{words} {QUICK} --out run")
    good = {"x_0": [0.1], "x_1": [0.2], "setting": ["low"]}
    for name, change, message in [
        ("codes", {"setting": [1]}, "classes of 'setting' unknown to the model: 1 (known: high"),
        ("hot", {"x_1": ["low"]}, "conditioned on 'x_1', shape (1,) per example, and in --given"),
    ]:
        write(f"{name}.csv", good | change)
        answer = " ".join(refused(f"sample run --given {name}.csv --out draws.csv").split())
        assert message in answer


# Sequences --------------------------------------------------------------------------------------


def series(n: int = 30, features: int = 2) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.normal(size=(1 + i % 5, features)).astype(np.float32) for i in range(n)]


def padded(rows: list[np.ndarray]) -> np.ndarray:
    most = max(map(len, rows))
    gaps = [np.full((most - len(row), row.shape[1]), np.nan, np.float32) for row in rows]
    return np.stack([np.concatenate(pair) for pair in zip(rows, gaps, strict=True)])


def columns_of_lists() -> dict:
    pa = pytest.importorskip("pyarrow")
    rows = series()
    single = [row[:, 0].tolist() for row in rows]
    pairs = [row.tolist() for row in rows]
    theta = np.random.default_rng(1).normal(size=(2, len(rows)))
    return {
        "a": theta[0],
        "b": theta[1],
        "single": pa.array(single, pa.list_(pa.float64())),
        "large": pa.array(single, pa.large_list(pa.float32())),
        "rows": pa.array(pairs, pa.list_(pa.list_(pa.float64()))),
        "fixed": pa.array(pairs, pa.list_(pa.list_(pa.float32(), 2))),
        "three": pa.array([[i, i + 1, 2 * i] for i in range(len(rows))], pa.list_(pa.int64(), 3)),
    }


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_lists_are_sequences(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    table, path = pa.table(columns_of_lists()), tmp_path / f"sims.{suffix}"
    if suffix == "parquet":
        write(path, columns_of_lists())
    else:
        pytest.importorskip("pyarrow.feather").write_feather(table, path)
    for source in (path, table):
        data = load(source, of=["a", "b"], given=["single", "large", "rows", "fixed", "three"])
        assert {v.name: v.shape for v in data.variables} == {
            "single": (5, 1),
            "large": (5, 1),
            "rows": (5, 2),
            "fixed": (5, 2),
            "three": (3, 1),
        }
        expected = padded(series())
        for name in ("rows", "fixed"):
            np.testing.assert_array_equal(data.given[name].values, expected)
        for name in ("single", "large"):
            np.testing.assert_array_equal(data.given[name].values, expected[..., :1])
        assert data.given["three"].values[4, :, 0].tolist() == [4, 5, 8]
    assert Spec.from_json(json.loads(json.dumps(data.spec(["rows"]).to_json()))).context == (
        Variable("rows", (5, 2)),
    )


def test_sequences_are_carried_with_their_examples(tmp_path):
    data = load(write(tmp_path / "s.parquet", columns_of_lists()), of="[ab]", given="rows")
    part = data.split("train")
    where = [int(np.flatnonzero((data.x == row).all(1))[0]) for row in part.x]
    np.testing.assert_array_equal(part.given["rows"].values, padded(series())[where])
    values = np.array(data.given["rows"].values)
    other = values.copy()
    other[0, :2] = 3.0
    signed = np.where(np.isnan(values), -np.float32(np.nan), values)
    digests = [digest(Dataset(data.x, given={"rows": Given(v)})) for v in (values, signed, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_batch_has_sequences_of_the_length_of_training(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, context):
            return context.nanmean(1)

    from musigma import Conditional

    inner = build("maf", (2,), bits=None, depth=1, hidden=8, context=2)
    model = Conditional(inner, Mean())
    model.spec = Spec((2,), context=(Variable("rows", (5, 2)),))
    theta = np.random.normal(size=(4, 2)).astype(np.float32)
    for most in (3, 8):
        rows = padded(series(4))[:, :3]
        rows = np.concatenate([rows, np.full((4, most - 3, 2), np.nan, np.float32)], 1)
        if most == 8:
            rows[2] = 1.0
        data = Dataset(theta, given={"rows": Given(rows)})
        check(model, data)
        x, context = batch(data, np.array([2, 0]), model)
        assert context.shape == (2, max(5, most), 2)
        np.testing.assert_array_equal(context[:, :most].numpy(), rows[[2, 0]])
        assert context[:, most:].isnan().all()
        assert model.log_prob(x, context).isfinite().all()
    with pytest.raises(ValueError, match=r"conditioned on 'rows', shape .5, 2. .* shape .5, 1."):
        check(model, Dataset(theta, given={"rows": Given(padded(series(5, 1))[:4])}))


def test_faults_of_sequences_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = columns_of_lists()
    rows = [row.tolist() for row in series()]
    rows[3], rows[4], rows[9] = None, [], [[1.0, float("nan")], [2.0, 3.0]]
    rows[11] = [[float("inf"), 0.0]]
    path = write(tmp_path / "s.parquet", columns | {"rows": pa.array(rows)})
    with fails(
        "4 of 30 rows", "'rows' is missing or empty in 2 rows and not finite somewhere in 2 rows"
    ):
        load(path, of=["a", "b"], given="rows")
    data = load(path, of=["a", "b"], given="rows", skip_bad=True)
    kept = np.delete(np.arange(30), [3, 4, 9, 11])
    np.testing.assert_array_equal(data.given["rows"].values, padded(series())[kept])
    rows[3] = [[1.0, 2.0, 3.0]]
    with fails("column 'rows' has lists in which rows differ in their numbers of features"):
        load(write(path, columns | {"rows": pa.array(rows)}), of="[ab]", given="rows")
    with fails("2 columns cannot be used", "give lists as context .--given single", "'large'"):
        load(path, of=["a", "single", "large"])
    with fails("column 'single' is list<.*double>: give lists as context"):
        load(path, of=["a", "single"], schema="infer")
    text = {"a": np.arange(9.0) ** 2, "x": np.array([f"[{i}, 2, 3]" for i in range(9)])}
    csv_file = write(tmp_path / "s.csv", text)
    for how in ({"given": "x"}, {"of": ["a", "x"]}):
        with fails("column 'x' holds text that looks like lists, such as '.0, 2, 3.': .*parquet"):
            load(csv_file, **how)
    with fails("cannot be used", "'x' holds text that looks like lists"):
        attach(Dataset(np.random.normal(size=(9, 1)).astype("f")), csv_file, columns=["x"])


def test_arrays_of_three_axes_are_sequences(tmp_path):
    values = padded(series())
    np.save(tmp_path / "x.npy", values.astype(np.float64))
    np.savez(tmp_path / "x.npz", x=values, more=np.arange(30.0))
    theta = Dataset(np.random.normal(size=(30, 2)).astype(np.float32))
    for name in ("x.npy", "x.npz"):
        data = attach(theta, tmp_path / name)
        np.testing.assert_array_equal(data.given["x"].values, values)
        found = given_rows([tmp_path / name], [Variable("x", (7, 2))])
        np.testing.assert_array_equal(found["x"].values, values)
    values[2, 0, 1] = np.nan
    np.save(tmp_path / "x.npy", values)
    with fails("cannot be used", "x values are not finite, or sequences have no row, in 1 rows"):
        attach(theta, tmp_path / "x.npy")
    assert len(attach(theta, tmp_path / "x.npy", skip_bad=True)) == 29


# The range of training, and draws ---------------------------------------------------------------


def test_values_far_outside_the_range_of_training_are_named():
    random = np.random.default_rng(0)
    data = Dataset(
        random.normal(size=(50, 2)).astype("f"),
        given={
            "x": Given(random.uniform(0, 10, 50).astype("f")),
            "v": Given(random.normal(size=(50, 3)).astype("f")),
            "s": Given(padded(series(50))),
            "kind": Given(np.arange(50) % 2, ("a", "b")),
        },
    )
    known = json.loads(json.dumps(ranges(data)))
    assert list(known) == ["x", "v", "s"]
    values = {"x": data.given["x"].values, "s": np.concatenate(series(50))}
    for name, v in values.items():
        for key, f in {"low": np.min, "high": np.max, "mean": np.mean, "std": np.std}.items():
            np.testing.assert_allclose(np.ravel(known[name][key]), np.ravel(f(v, 0)), rtol=1e-5)
    assert known["s"]["rows"] == [1, 5]
    assert outside(known, data.given) == []
    std, high = known["x"]["std"][0], known["x"]["high"][0]
    near = np.array([high + 0.9 * std, 5], "f")
    assert outside(known, {"x": Given(near)}) == []
    far = np.zeros((1, 3), "f")
    far[0, 2] = known["v"]["low"][2] - 20 * known["v"]["std"][2]
    long = np.zeros((1, 12, 2), "f")
    given = {"x": Given(np.array([high + 3 * std, 5], "f")), "v": Given(far), "s": Given(long)}
    first, second, third = outside(known, given)
    assert re.match(r"v\[2\] = -[\d.]+ lies 20.0 standard deviations outside the training", first)
    assert re.match(r"x = [\d.]+ lies 3.0 .* range \[[\d.e-]+, [\d.]+\] \(1 of 2 rows\)", second)
    assert third == "s has 12 rows, more than the 5 of training"


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    """A trained model of theta given x, whose parameters were moved so that x matters."""
    folder = tmp_path_factory.mktemp("posterior")
    path = write(folder / "sims.csv", simulations())
    words = f"train maf {path} --of theta_* --given x_* --depth 2 --hidden 8 {QUICK}"
    assert call(f"{words} --out {folder / 'run'}") == 0
    model, extra = checkpoint.read(folder / "run/model.safetensors")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoint.save(model, folder / "model.safetensors", extra=extra)
    return folder


def test_draws_of_several_observations_follow_each_other(posterior, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    observed = {"x_1": [0.5, -0.5, 0.5], "x_0": [0.1, 0.2, 0.1]}
    write("observed.csv", observed)
    words = f"sample {posterior / 'model.safetensors'} --given observed.csv"
    assert run(f"{words} --n 5 --out draws.csv")["n"] == 15
    rows = read("draws.csv")
    assert list(rows[0]) == ["observation", "theta_0", "theta_1", "theta_2"]
    assert [int(row["observation"]) for row in rows] == [i for i in range(3) for _ in range(5)]
    run(f"{words} --n 3000 --temperature 0 --out mode.npz")
    with np.load("mode.npz") as file:
        x, which = file["x"], file["observation"]
    assert x.shape == (9000, 3)
    assert (which == np.repeat(np.arange(3), 3000)).all()
    model = checkpoint.load(posterior / "model.safetensors")
    context = {name: torch.tensor(v)[:, None] for name, v in observed.items()}
    expected = model.sample(3, context, temperature=0.0).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    np.testing.assert_allclose(x, expected.repeat(3000, 0), atol=1e-5)
    write("named.csv", {"id": ["a", "c", "b"], **observed})
    run(f"sample {posterior / 'run'} --given named.csv --n 2 --out named.csv.parquet")
    pq = pytest.importorskip("pyarrow.parquet")
    assert pq.read_table("named.csv.parquet")["observation"].to_pylist() == list("aaccbb")


def test_draws_of_one_observation_embed_it_once(posterior, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    from musigma.nets.embed import Embedding

    seen, forward = [], Embedding.forward

    def counted(self, context):
        out = forward(self, context)
        seen.append(len(out))
        return out

    monkeypatch.setattr(Embedding, "forward", counted)
    write("observed.csv", {"x_0": [0.1], "x_1": [0.2]})
    run(f"sample {posterior / 'run'} --given observed.csv --n 10000 --out draws.csv")
    rows = read("draws.csv")
    assert list(rows[0]) == ["theta_0", "theta_1", "theta_2"]
    assert len({row["theta_0"] for row in rows}) > 9900
    assert sum(seen) <= 10
    again = Path("draws.csv").read_text()
    run(f"sample {posterior / 'run'} --given observed.csv --n 10000 --out draws.csv")
    assert Path("draws.csv").read_text() == again


def test_an_observation_far_outside_is_warned_of(posterior, tmp_path, monkeypatch, run, said):
    monkeypatch.chdir(tmp_path)
    write("far.csv", {"x_0": [41.2], "x_1": [0.2]})
    words = f"sample {posterior / 'run'} --given far.csv --n 2 --out draws.csv"
    assert re.search(
        r"extrapolation: x_0 = 41.2 lies [\d.]+ standard dev.* range \[-", said(words)
    )
    assert len(run(words)["extrapolation"]) == 1
    write("near.csv", {"x_0": [0.1], "x_1": [0.2]})
    near = words.replace("far", "near")
    assert "extrapolation" not in said(near)
    assert "extrapolation" not in run(near)
    pairs = simulations(20, seed=1)
    write("near.csv", pairs)
    assert "extrapolation" not in run(f"score {posterior / 'run'} near.csv --out s.csv")
    pairs["x_1"][4] = -100
    write("far.csv", pairs)
    for words in (
        f"score {posterior / 'run'} far.csv --out s.csv",
        f"evaluate {posterior / 'run'} far.csv",
    ):
        assert "(1 of 20 rows)" in run(words)["extrapolation"][0]


def test_pairs_are_scored_in_nats(posterior, tmp_path, monkeypatch, run, said):
    monkeypatch.chdir(tmp_path)
    pairs = simulations(20, seed=1)
    write("pairs.csv", pairs)
    words = f"score {posterior / 'model.safetensors'} pairs.csv --out s.csv"
    answer = run(words)
    scores = np.array([float(row["log_prob"]) for row in read("s.csv")])
    model = checkpoint.load(posterior / "model.safetensors")
    theta = torch.tensor(np.stack([pairs[f"theta_{j}"] for j in range(3)], 1)).float()
    context = {f"x_{j}": torch.tensor(pairs[f"x_{j}"]).float()[:, None] for j in range(2)}
    np.testing.assert_allclose(scores, model.log_prob(theta, context).detach(), rtol=1e-4)
    assert answer["nats"] == pytest.approx(-scores.mean(), rel=1e-5)
    assert f"nats, mean {-scores.mean():.4f} (exact)" in said(words)
    figure = run(f"evaluate {posterior / 'model.safetensors'} pairs.csv")
    error = scores.std(ddof=1) / np.sqrt(20)
    assert figure["standard_error_nats"] == pytest.approx(error, rel=1e-4)
    text = said(f"evaluate {posterior / 'model.safetensors'} pairs.csv")
    assert f"{-scores.mean():.4f} ± {error:.4f} nats per example, " in text


# Arrays by name ---------------------------------------------------------------------------------


def test_arrays_of_pairs_are_read_by_name(tmp_path):
    random = np.random.default_rng(0)
    theta, x = random.normal(size=(30, 2)), random.normal(size=(30, 4))
    arrays = {"x": x, "theta": theta, "s": padded(series()), "w": theta[:, 0] + 1}
    arrays |= {"kind": np.array(["a", "b", "b"] * 10), "other": x}
    np.savez(tmp_path / "sims.npz", **arrays)
    sources = [tmp_path / "sims.npz", arrays, arrays | {"theta": torch.from_numpy(theta)}]
    for source in sources:
        data = load(source, of=["theta", "w"], given=["s", "x", "kind"])
        assert data.columns == ("theta_0", "theta_1", "w")
        expected = np.column_stack([theta, theta[:, 0] + 1]).astype("f")
        np.testing.assert_array_equal(data.x, expected)
        assert [(v.name, v.shape) for v in data.variables] == [
            ("s", (5, 2)),
            ("x", (4,)),
            ("kind", (2,)),
        ]
        np.testing.assert_array_equal(data.given["x"].values, x.astype("f"))
        np.testing.assert_array_equal(data.given["s"].values, padded(series()))
        again = load(source, columns=["theta_1", "w", "theta_0"], of="theta", given="x")
        np.testing.assert_array_equal(again.x, expected[:, [1, 2, 0]])
    theta[3, 1], x[8, 2] = np.nan, np.inf
    with fails(
        "2 of 30 rows cannot be used",
        "column 'theta_1' is NaN or missing in 1 row, row 3 .from 0.",
        "column 'x' is not finite somewhere in 1 row, row 8 .from 0.",
    ):
        load({"x": x, "theta": theta}, of="theta", given="x")
    assert len(load({"x": x, "theta": theta}, of="theta", given="x", skip_bad=True)) == 28
    with fails("no column matches 'phi': give one of x, theta"):
        load({"x": x, "theta": theta}, of="phi")
    with fails("the numbers of rows differ, 30 of x, 9 of theta"):
        load({"x": x, "theta": theta[:9]}, of="theta", given="x")
    with fails("column 's' is float32 of shape .30, 5, 2.: give lists as context"):
        load(arrays, of="s")


def test_a_run_of_arrays_is_used_on_other_arrays(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, n in (("sims", 60), ("test", 9)):
        theta, x = random.normal(size=(n, 2)), random.normal(size=(n, 3))
        np.savez(f"{name}.npz", theta=theta, x=x)
    words = f"train maf sims.npz --of theta --given x --depth 1 --hidden 8 {QUICK} --out run"
    run(words)
    assert run("evaluate run test.npz")["n"] == 9
    assert run("evaluate run sims.npz")["split"] == "held-out"
    np.save("x.npy", random.normal(size=(2, 3)))
    assert run("sample run --given x.npy --n 3 --out draws.csv")["n"] == 6
    assert list(read("draws.csv")[0]) == ["observation", "theta_0", "theta_1"]


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_files_of_observations_are_refused_with_their_faults(tmp_path):
    numbers = [Variable("x_0", (1,)), Variable("x_1", (1,))]
    both = put(tmp_path, "both.csv", "x_0,x_1\n1,2\n")
    other = put(tmp_path, "other.csv", "x_1,x_0\n3,4\n")
    empty = put(tmp_path, "empty.csv", "x_0,x_1\n")
    np.save(tmp_path / "array.npy", np.ones((1, 2)))
    with fails("other.csv: x_0, x_1 are also in a file"):
        given_rows([both, other], numbers)
    with fails("empty.csv: has no rows of x_0, x_1: give one"):
        given_rows([empty], numbers)
    with fails("no.csv: there is no such file"):
        given_rows([tmp_path / "no.csv"], numbers)
    array = tmp_path / "array.npy"
    with fails("array.npy has no names of columns: write a .csv"):
        given_rows([array], numbers)


def test_text_where_a_model_takes_numbers_is_shown(tmp_path):
    rows = given_rows([put(tmp_path, "text.csv", "x_0\nabc\n")], [Variable("x_0", (1,))])
    spec = Spec((2,), context=(Variable("x_0", (1,)),))
    text = Dataset(np.zeros((1, 2), np.float32), given=rows)
    with pytest.raises(ValueError, match=r"in these data it has text \('abc'\): give numbers"):
        check(build("maf", spec), text)
