"""The commands that ask a density of typed columns."""

import csv
import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from musigma import build, checkpoint, questions
from musigma.cli import main
from musigma.conditions import Condition
from musigma.data import load

TABLE = "age,country,joined,height,vip\n"


def people(n: int) -> str:
    """A table of five types of columns, with missing heights."""
    rng = np.random.default_rng(0)
    lines = [TABLE]
    for i in range(n):
        height = "" if i % 6 == 0 else f"{rng.normal(170, 9):.4f}"
        joined = np.datetime64("2020-01-01") + int(rng.integers(0, 900))
        country, vip = ("FR", "DE", "US")[rng.integers(3)], ("no", "yes")[rng.integers(2)]
        lines.append(f"{rng.integers(17, 90)},{country},{joined},{height},{vip}\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of typed columns with random weights, and one of plain numbers."""
    home = tmp_path_factory.mktemp("home")
    (home / "people.csv").write_text(people(500))
    data = load(home / "people.csv", schema="infer")
    generator = torch.Generator().manual_seed(0)
    (home / "classes.csv").write_text(
        "a,b,label\n" + "".join(f"{i % 7},{'xyz'[i % 3]},{'pq'[i % 2]}\n" for i in range(60))
    )
    classes = load(home / "classes.csv", schema="infer", given=["label"])
    for name, model in (
        ("classes", build("table", classes.spec(["label"]), hidden=16, blocks=1)),
        ("run", build("table", data.spec(), hidden=16, blocks=1)),
        ("flow", build("nsf", (2,), bits=None, hidden=8, depth=1)),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        (home / name).mkdir()
        checkpoint.save(model, home / name / "model.safetensors")
    return home


@pytest.fixture
def call(home, tmp_path, monkeypatch, capsys):
    """A function that runs a command beside the runs, and returns its JSON."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        capsys.readouterr()
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_sample_where(call):
    where = 'country in ("FR", "US") and 30 <= age < 40 and vip and joined < "2021-01-01"'
    found = call("sample", "run", "--where", where, "--n", "40", "--out", "x.parquet")
    table = pa.parquet.read_table("x.parquet")
    assert table.column_names == TABLE.strip().split(",")
    assert table.num_rows == found["n"] == 40
    assert table.schema.field("age").type == pa.int64()
    rows = table.to_pylist()
    assert {row["country"] for row in rows} == {"FR", "US"}
    assert all(30 <= row["age"] < 40 and row["vip"] in ("yes", True) for row in rows)
    assert all(str(row["joined"]) < "2021-01-01" for row in rows)
    assert 0 < found["probability"] < 0.1
    assert 0 < found["standard_error"] < found["probability"] / 5
    assert 20 < found["effective"] <= 40
    assert "drawn from the allowed values" in found["how"]
    again = call("sample", "run", "--where", where, "--n", "40", "--out", "y.parquet")
    assert pa.parquet.read_table("y.parquet") == table
    assert again["probability"] == found["probability"]


def test_what_is_said_of_samples(call, capsys):
    where = "height > 170.25 and height < 170.75"
    main(["sample", "run", "--where", where, "--out", "x.csv", "--n", "70"])
    out = capsys.readouterr().out
    assert re.match(r"70 samples; P\(where\) = [\d.e-]+; height first", out)
    assert "all rows have the same weight: x.csv" in out
    schema = checkpoint.load("run/model.safetensors").spec.schema
    assert Condition.parse(where, schema).holds(load("x.csv", schema=schema).array).all()


def test_a_class_is_chosen_beside_a_condition(call):
    found = [
        call("sample", "classes", "--where", "a > 2", "--label", label, "--out", "x.csv")
        for label in "pqp"
    ]
    assert found[0]["probability"] != found[1]["probability"]
    assert found[0]["probability"] == found[2]["probability"]
    with open("x.csv", newline="") as file:
        assert all(int(row["a"]) > 2 and row["b"] in "xyz" for row in csv.DictReader(file))


def test_given_rows_are_completed(call):
    with open("given.csv", "w") as file:
        file.write("vip,id,age\nyes,a1,20\nno,b1,\n,c1,50\n")
    found = call("sample", "run", "--given", "given.csv", "--n", "30", "--out", "x.csv")
    assert (found["n"], found["rows"]) == (90, 3)
    with open("x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90
    assert all(row["vip"] == "yes" and row["age"] == "20" for row in rows[:30])
    assert all(row["vip"] == "no" and 17 <= int(row["age"]) < 90 for row in rows[30:60])
    assert {row["vip"] for row in rows[60:]} == {"yes", "no"}
    assert {row["country"] for row in rows} == {"FR", "DE", "US"}
    assert 0 < sum(row["height"] == "" for row in rows) < 90  # missing as often as in training


def test_impute_writes_draws_that_keep_what_is_known(call):
    found = call(
        *("impute", "run", "people.csv", "--n", "20", "--out", "filled.parquet"),
        *("--summary", "summary.csv"),
    )
    assert found["missing"] == {"height": 84}
    assert (found["rows"], found["draws"]) == (500, 20)
    table = pa.parquet.read_table("filled.parquet")
    assert table.column_names == ["draw", "row", *TABLE.strip().split(",")]
    assert table.num_rows == 20 * 500
    known = pa.csv.read_csv("people.csv")
    drawn = np.array(table["height"].to_numpy()).reshape(20, 500)
    given = known["height"].to_numpy(zero_copy_only=False).astype(float)
    assert np.isfinite(drawn).all()
    holes = np.isnan(given)
    np.testing.assert_array_equal(drawn[:, ~holes], np.tile(given[~holes], (20, 1)))
    assert drawn[:, holes].std(0).min() > 0
    assert table["country"].to_pylist() == known["country"].to_pylist() * 20
    assert table["row"].to_pylist() == list(range(500)) * 20
    with open("summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert [int(cell["row"]) for cell in summary] == np.flatnonzero(holes).tolist()
    means = [float(cell["mean"]) for cell in summary]
    np.testing.assert_allclose(means, drawn[:, holes].mean(0))
    np.testing.assert_allclose(
        [float(cell["q95"]) for cell in summary], np.quantile(drawn[:, holes], 0.95, axis=0)
    )


def test_impute_once_writes_the_table_alone(call):
    with open("holes.csv", "w") as file:
        file.write("age,country,vip\n20,,yes\n,FR,no\n")
    found = call("impute", "run", "holes.csv", "--out", "filled.csv")
    assert found["missing"] == {"age": 1, "country": 1, "joined": 2, "height": 2}
    with open("filled.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [TABLE.strip().split(",")] * 2
    assert all(all(row.values()) for row in rows)
    assert (rows[0]["age"], rows[0]["vip"], rows[1]["country"]) == ("20", "yes", "FR")


def test_impute_keeps_the_names_of_rows(call):
    with open("named.csv", "w") as file:
        file.write("id,age,country,vip\np7,20,,yes\np9,,FR,no\n")
    with open("bad.csv", "w") as file:
        file.write("age,country,vip\n20,,yes\nold,FR,no\n30,FR,no\n")
    for n, source, names in (
        (1, ["named.csv"], ["p7", "p9"]),
        (2, ["named.csv"], ["p7", "p9"] * 2),
        (1, ["bad.csv", "--skip-bad"], ["line 2", "line 4"]),
    ):
        call("impute", "run", *source, "--n", str(n), "--out", "filled.csv")
        with open("filled.csv", newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == names


FAULTS = {
    "unknown": ("sample run --where cuntry=='FR' --out x.csv", "no column 'cuntry'; did you mean"),
    "no mass": ("sample run --where age>200 --out x.csv", "training value satisfies .* 17 to 89"),
    "temperature": ("sample run --where vip --temperature 0.5", "where: it draws from the model"),
    "both": ("sample run --where vip --given people.csv", "give --where or --given, not both"),
    "two files": ("sample run --given a.csv --given b.csv", "expected one table .* got 2"),
    "other model": (
        "sample flow --where vip --out x.csv",
        "where: only models of `musigma train t",
    ),
    "other model 2": ("impute flow people.csv --out x.csv", "impute: only models of `musigma"),
    "no class": ("sample classes --where a>2 --out x.csv", r"where: .*label; choose one class"),
    "conditional": ("impute classes classes.csv --out x.csv", "impute: .* conditioned on label"),
    "no rows": ("impute run people.csv --n 0 --out x.csv", "n: expected 1 or more; got 0"),
    "kind": ("impute run people.csv --out x.npy", r"out: expected a .csv or .parquet file"),
    "summary": ("impute run people.csv --out x.csv --summary s.csv", "summary: it needs several"),
    "no file": ("impute run none.csv --out x.csv", "none.csv"),
    "level": ("impute run bad.csv --out x.csv", "is 'XX', which is not among the levels"),
    "others": ("impute run other.csv --out x.csv", "has no column .*which the schema has"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_explained_and_nothing_is_written(call, capsys, tmp_path, name):
    (tmp_path / "bad.csv").write_text("age,country\n20,XX\n30,FR\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n3,4\n")
    before = set(tmp_path.iterdir())
    command, reason = FAULTS[name]
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert re.search(reason, capsys.readouterr().err)
    assert set(tmp_path.iterdir()) == before


def test_the_library_and_the_commands_agree(call):
    model = checkpoint.load("run/model.safetensors")
    found = call("sample", "run", "--where", "age > 60", "--out", "x.csv")
    assert found["probability"] == pytest.approx(
        questions.sample_where(model, "age > 60", 2).probability
    )
    assert found["standard_error"] == 0
    assert not math.isnan(found["effective"])


def test_training_draws_columns_and_pairs(call):
    pytest.importorskip("matplotlib")
    words = "train table people.csv --steps 4 --hidden 8 --evaluations 1 --batch-size 16 --out new"
    found = call(*words.split())
    names = [f"new/samples/{name}.png" for name in ("marginals", "associations")]
    assert found["pictures"] == names
    call("report", "new", "--out", "report.html")
    with open("report.html") as file:
        page = file.read()
    assert "Columns: shares of held-out rows" in page
    assert "Associations of pairs of columns" in page


def test_latents_of_a_flow_of_typed_rows(call):
    data = load("people.csv", schema="infer")
    checkpoint.save(build("nsf", data.spec(), hidden=8, depth=1), "typed.safetensors")
    call("encode", "typed.safetensors", "people.csv", "--batch-size", "200", "--out", "z.npz")
    assert np.load("z.npz")["z0"].shape == (500, 5)
    call("decode", "typed.safetensors", "z.npz", "--out", "again.csv")
    call("encode", "typed.safetensors", "people.csv", "--batch-size", "200", "--out", "z.parquet")
    assert pyarrow.parquet.read_table("z.parquet").num_rows == 500
    again = load("again.csv", schema=data.schema, partial=True).x
    np.testing.assert_allclose(again[:, :3], np.asarray(data.x)[:, :3])
    found = call("reconstruct", "typed.safetensors", "people.csv", "--out", "r.csv")
    assert found == {"out": "r.csv", "n": 16}


@pytest.mark.parametrize(
    "words", ["encode --out z.npz", "reconstruct --out z.csv", "interpolate --out z.csv"]
)
def test_a_model_without_latents_says_so(call, capsys, words):
    command, *out = words.split()
    with pytest.raises(SystemExit) as caught:
        main([command, "run", "people.csv", *out])
    assert caught.value.code == 2
    assert f"{command}: a `table` model has no latents" in capsys.readouterr().err


def test_typed_columns_are_not_compressed(call, capsys):
    with pytest.raises(SystemExit):
        main(["compress", "run", "people.csv", "--out", "z.mus"])
    assert "model: files hold integer levels, and its data are typed" in capsys.readouterr().err


def test_dates_that_are_times_in_a_frame_are_written_as_dates(call):
    table = pa.csv.read_csv("people.csv")
    at = table.column_names.index("joined")
    table = table.set_column(at, "joined", table["joined"].cast(pa.timestamp("us")))
    data = load(table, schema="infer")
    checkpoint.save(build("table", data.spec(), hidden=8, blocks=1), "times.safetensors")
    call("sample", "times.safetensors", "--n", "3", "--out", "x.csv")
    with open("x.csv", newline="") as file:
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["joined"]) for row in csv.DictReader(file))
