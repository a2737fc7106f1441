"""Typed tables: what each column is taken for, and rows as numbers and back."""

import datetime
import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import musigma
from musigma.cli import main
from musigma.data import decode


def people(n=200, seed=0):
    """Columns of every kind, as an Arrow table."""
    random = np.random.default_rng(seed)
    day = np.datetime64("2026-01-01")
    hours = random.integers(0, 10_000, n)
    nothing = random.random(n) < 0.1
    return pa.table(
        {
            "age": pa.array(random.integers(0, 90, n), pa.int16()),
            "price": pa.array(random.normal(10, 3, n).round(2), mask=nothing),
            "weight": pa.array(random.normal(size=n).astype("f4")),
            "member": pa.array(random.random(n) < 0.5),
            "paid": pa.array(random.choice(["yes", "no"], n)),
            "city": pa.array(random.choice(["Oslo", "Rome", "Bonn"], n), mask=nothing),
            "size": pa.DictionaryArray.from_arrays(
                pa.array(random.integers(0, 3, n), pa.int8()), ["S", "M", "L"], ordered=True
            ),
            "birth": pa.array(day - random.integers(0, 9_000, n), pa.date32()),
            "seen": pa.array(day.astype("M8[us]") + hours * 3_600_000_000),
        }
    )


KINDS = ["count", "continuous", "continuous", "boolean", "boolean", "category", "ordinal"]
KINDS += ["date", "datetime"]


def test_every_kind_is_found_and_decoded_as_it_was():
    table = people()
    data = musigma.data.load(table, schema="infer")
    assert [column.kind for column in data.schema.columns] == KINDS
    assert data.array.dtype == np.float64
    assert decode(data.x, data.schema).equals(table)
    assert [c.missing for c in data.schema.columns] == [n in (1, 5) for n in range(len(KINDS))]
    assert data.schema.columns[1].step == 0.01
    assert data.schema.columns[8].step == 3600
    assert np.isnan(data.x).any(0).tolist() == [n in (1, 5) for n in range(len(KINDS))]


def test_the_spec_has_a_schema_measured_on_the_training_part():
    data = musigma.data.load(people(), schema="infer")
    spec = data.spec()
    train = data.split("train")
    for column, values in zip(spec.schema.columns, train.x.T, strict=True):
        assert column.measured.rows == len(train)
        assert column.measured.missing == np.isnan(values).sum()
    assert musigma.Spec.from_json(spec.to_json()) == spec


def test_files_and_frames_give_the_same_rows(tmp_path):
    table = people()
    data = musigma.data.load(table, schema="infer")
    parquet.write_table(table.slice(0, 120), tmp_path / "a.parquet")
    parquet.write_table(table.slice(120), tmp_path / "b.parquet")
    with pa.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    table.to_pandas().to_csv(tmp_path / "d.csv", index=False)
    parts = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    for source in (parts, tmp_path / "c.arrow", tmp_path / "d.csv", table.to_pandas()):
        again = musigma.data.load(source, schema=data.schema)
        np.testing.assert_allclose(again.x, data.x, rtol=1e-15)


def test_columns_are_found_by_name_and_missing_ones_are_named():
    table = people()
    data = musigma.data.load(table, schema="infer")
    order = table.column_names[::-1]
    again = musigma.data.load(table.select(order), schema=data.schema)
    np.testing.assert_array_equal(again.x, data.x)
    with pytest.raises(musigma.data.DataError, match="no column 'age', 'city', which"):
        musigma.data.load(table.drop_columns(["age", "city"]), schema=data.schema)


def test_unknown_categories_are_refused_or_counted():
    schema = musigma.data.load(people(), schema="infer").schema
    table = people(20, seed=1).to_pandas()
    table.loc[7, "city"] = "Lima"
    with pytest.raises(musigma.data.DataError, match=r"row 7 .*column 'city' is 'Lima'"):
        musigma.data.load(table, schema=schema)
    x = musigma.data.load(table, schema=schema, unseen="probability").x
    assert x[7, 5] == len(schema.columns[5].levels) == 3


def test_dates_keep_their_format(tmp_path):
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(3 * i) for i in range(40)]
    text = "\n".join(["day,x", *(f"{day:%d.%m.%Y},{day.day / 8}" for day in days)])
    (tmp_path / "days.csv").write_text(text)
    data = musigma.data.load(tmp_path / "days.csv", schema="infer")
    assert data.schema.columns[0].kind == "date"
    written = decode(data.x, data.schema).column("day").to_pylist()
    assert written == [f"{day:%d.%m.%Y}" for day in days]


# Schema files ------------------------------------------------------------------------------------


def test_a_schema_file_gives_what_was_inferred(tmp_path, capsys):
    table, path = people(), tmp_path / "people.parquet"
    parquet.write_table(table, path)
    main(["schema", str(path), "--out", str(tmp_path / "schema.toml")])
    assert "9 columns" in capsys.readouterr().out
    data = musigma.data.load(path, schema="infer")
    assert musigma.data.load(path, schema=tmp_path / "schema.toml").schema == data.schema
    assert "city: category" not in (tmp_path / "schema.toml").read_text()
    main(["schema", str(path), "--json"])
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert [c["kind"] for c in columns] == KINDS


def test_a_schema_file_decides_kinds_and_order(tmp_path):
    (tmp_path / "schema.toml").write_text(
        """
        [columns]
        size = {kind = "ordinal", levels = ["S", "M", "L", "XL"]}
        age = {kind = "category"}
        price = {rounded = true, missing = false}
        """
    )
    data = musigma.data.load(people(), schema=tmp_path / "schema.toml")
    size, age, price = data.schema.columns
    assert size.levels == ("S", "M", "L", "XL")
    assert age.levels == tuple(sorted(age.levels, key=int))
    assert (price.rounded, price.step, price.missing) == (True, 0.01, False)
    assert "left out: weight, member" in data.notes[0]
    table, same = decode(data.x, data.schema), people().select(["size", "age", "price"])
    assert table.schema == same.schema
    assert table.to_pydict() == same.to_pydict()


def test_all_faults_of_a_schema_are_named_at_once(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text('[columns]\na = {kind = "float", step = 0}\nb = {levles = []}\nc = 3\n')
    with pytest.raises(musigma.data.DataError) as error:
        musigma.data.load(people(), schema=path)
    for text in ("'a', kind", "'a', step", "'b', levles", "column 'c' is 3", "4 faults"):
        assert text in str(error.value)
    path.write_text(
        """
        [columns]
        nobody = {}
        city = {kind = "count"}
        price = {step = 0.1}
        birth = {kind = "continuous"}
        seen = {kind = "date"}
        weight = {kind = "count"}
        age = {kind = "boolean"}
        paid = {levels = ["yes"]}
        """
    )
    with pytest.raises(musigma.data.DataError) as error:
        musigma.data.load(people(), schema=path)
    for name in ("nobody", "city", "price", "birth", "seen", "weight", "age"):
        assert f"column '{name}' " in str(error.value)
    assert "row 1 (from 0), column 'paid' is 'no'" in str(error.value)


def test_the_metadata_of_sdv_is_a_schema(tmp_path):
    columns = {
        "age": {"sdtype": "numerical"},
        "price": {"sdtype": "numerical", "computer_representation": "Float"},
        "birth": {"sdtype": "datetime", "datetime_format": "%Y-%m-%d"},
        "seen": {"sdtype": "datetime"},
        "member": {"sdtype": "boolean"},
        "city": {"sdtype": "categorical"},
        "paid": {"sdtype": "id"},
    }
    plain = {"tables": {"people": {"columns": columns, "primary_key": "paid"}}}
    (tmp_path / "metadata.json").write_text(json.dumps(plain))
    data = musigma.data.load(people(), schema=tmp_path / "metadata.json")
    kinds = [(c.name, c.kind) for c in data.schema.columns]
    expected = ["count", "continuous", "date", "datetime", "boolean", "category"]
    assert kinds == list(zip(columns, expected, strict=False))


# Data that packages ship -------------------------------------------------------------------------


def test_tables_of_installed_packages(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for package, file, head in [
        ("river", "datasets/shuttle.csv.gz", "f1,f2,anomaly"),
        ("ISLP", "data/Wage.csv", "wage,region,age"),
    ]:
        path = tmp_path / package / file
        path.parent.mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise SystemError('it was imported')")
        rows = random.integers(0, 50, (40, 3)) * ([1, 1, 0] if "river" in package else [1, 0, 1])
        rows[3, 2] = 1
        text = "\n".join([head, *(",".join(map(str, row)) for row in rows.tolist())])
        path.write_bytes(gzip.compress(text.encode()) if file.endswith("gz") else text.encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    data = musigma.data.load("shuttle", schema="infer")
    assert data.columns == ("f1", "f2")
    assert (data.label_names, data.labels.tolist()) == (
        ("normal", "anomaly"),
        [0] * 3 + [1] + [0] * 36,
    )
    assert musigma.data.load("shuttle", schema="infer", given="anomaly").given["anomaly"]
    assert musigma.data.load("shuttle").labels.sum() == 1
    data = musigma.data.load("wage", schema="infer")
    assert data.columns == ("wage", "age")
    assert "'region' is constant" in data.notes[0]


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(musigma.data.DataError, match=r"pip install 'plotnine>=0.15'"):
        musigma.data.load("diamonds", schema="infer")
