"""Typed tables: what each column is taken for, and rows as numbers and back."""

import datetime
import decimal
import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import musigma
from musigma.cli import main
from musigma.data import decode
from musigma.data.readers import arrow


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


def test_rows_with_missing_values_of_any_sign_are_equal():
    values, nan = np.arange(40) / 8, float("nan")
    values[::3] = np.where(np.arange(14) // 2 % 2, nan, np.copysign(nan, -1))
    data = musigma.data.load(pa.table({"a": values, "b": np.arange(40) % 2 / 2}), schema="infer")
    assert len(np.unique(data.content()[np.isnan(data.x[:, 0])])) == 2


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


def test_files_of_a_table_may_have_other_types(tmp_path):
    parts = [
        {"a": [1, 2], "b": [1, 2], "c": ["u", "v"]},
        {"a": [0.5, 1], "b": ["x", "y"], "c": ["u", "u"]},
    ]
    paths = [tmp_path / f"{i}.parquet" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        parquet.write_table(pa.table({name: 4 * values for name, values in part.items()}), path)
    data = musigma.data.load(paths, schema="infer")
    a, b, _ = data.schema.columns
    assert (a.kind, a.storage, b.kind, b.levels) == (
        "continuous",
        "float64",
        "category",
        tuple("12xy"),
    )
    assert decode(data.x, data.schema)["b"].to_pylist() == 4 * ["1", "2"] + 4 * ["x", "y"]


def test_columns_are_found_by_name_and_missing_ones_are_named():
    table = people()
    data = musigma.data.load(table, schema="infer")
    order = table.column_names[::-1]
    again = musigma.data.load(table.select(order), schema=data.schema)
    np.testing.assert_array_equal(again.x, data.x)
    with pytest.raises(musigma.data.DataError, match="no column 'age', 'city', which"):
        musigma.data.load(table.drop_columns(["age", "city"]), schema=data.schema)


def test_columns_of_another_type_are_refused_when_a_model_is_used():
    table = people()
    schema = musigma.data.load(table, schema="infer").schema
    other = table.set_column(0, "age", table["seen"]).set_column(1, "price", table["paid"])
    with pytest.raises(musigma.data.DataError, match="column 'price' holds text among numbers"):
        musigma.data.load(other, schema=schema)
    with pytest.raises(
        musigma.data.DataError, match=r"'age' is timestamp.*no number \(200 rows\)"
    ):
        musigma.data.load(other.set_column(1, "price", table["price"]), schema=schema)
    shouted = table.set_column(4, "paid", pa.array(["YES", "No"] * 100))
    x = musigma.data.load(shouted, schema=schema).x
    assert x[:, 4].tolist() == [1, 0] * 100


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
    again = {"day": ["04.01.2026 00:00:00", "2026"], "x": [0.5, 1]}
    with pytest.raises(musigma.data.DataError, match="'2026', not a date like 31"):
        musigma.data.load(again, schema=data.schema)
    again["day"][1] = "07.01.2026"
    later = musigma.data.load(again, schema=data.schema)
    assert (later.x[:, 0] == np.asarray(data.x)[1:3, 0]).all()
    again["day"][0] = "04.01.2026 10:00:00"
    with pytest.raises(musigma.data.DataError, match="has a time of day"):
        musigma.data.load(again, schema=data.schema)


WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
TYPES = [*WHOLE, "float", "double", "grid", "short", "decimal", "bool", "string", "large_string"]
TYPES += [
    "string_view",
    "date text",
    "time text",
    "dictionary",
    "ordered",
    "numbers",
    "date32",
    "date64",
    "zone",
]
TYPES += ["time s", "time ms", "time us", "time ns"]
INSTANTS = st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1))
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=5)


@st.composite
def arrow_columns(draw, n):
    """A column of any Arrow type that has a kind, with missing values."""
    kind = draw(st.sampled_from(TYPES))
    many = dict(min_size=n, max_size=n)

    def some(values):
        return draw(st.lists(st.none() | values, **many))

    if kind in WHOLE:
        bits, low = int(kind.strip("uint")), 0 if kind[0] == "u" else -1
        most = 2 ** min(bits - 1, 53) - 1
        return pa.array(some(st.integers(low * most, most)), kind)
    if kind in ("float", "double"):
        width = 32 if kind == "float" else 64
        values = st.floats(allow_nan=False, allow_infinity=False, width=width)
        return pa.array(some(values), pa.float32() if kind == "float" else pa.float64())
    if kind in ("grid", "short"):
        values = st.integers(-9999, 9999).map(lambda i: i / 100)
        return pa.array(some(values), pa.float32() if kind == "short" else pa.float64())
    if kind == "decimal":
        values = st.integers(-99999, 99999).map(lambda i: decimal.Decimal(i) / 100)
        return pa.array(some(values), pa.decimal128(9, 2))
    if kind == "bool":
        return pa.array(some(st.booleans()), pa.bool_())
    if kind == "numbers":
        return pa.array(some(st.integers(-50, 50).map(str)), pa.string())
    if kind == "date32":
        return pa.array(some(INSTANTS.map(datetime.datetime.date)), pa.date32())
    if kind == "date64":
        return pa.array(some(INSTANTS.map(datetime.datetime.date)), pa.date64())
    if kind.endswith("text"):
        form = "%d.%m.%Y" if kind == "date text" else "%Y-%m-%dT%H:%M:%S.%fZ"
        return pa.array(some(INSTANTS.map(lambda t: t.strftime(form))), pa.string())
    if kind == "zone":
        return pa.array(some(INSTANTS), pa.timestamp("us", "Europe/Rome"))
    if kind.startswith("time "):
        unit = kind.split()[1]
        values = (
            INSTANTS if unit in ("us", "ns") else INSTANTS.map(lambda t: t.replace(microsecond=0))
        )
        return pa.array(some(values), pa.timestamp(unit))
    words = draw(st.lists(WORDS, min_size=1, max_size=6, unique=True))
    found = some(st.sampled_from(words))
    if kind in ("dictionary", "ordered"):
        codes = [None if word is None else words.index(word) for word in found]
        return pa.DictionaryArray.from_arrays(
            pa.array(codes, pa.int16()), pa.array(words), ordered=kind == "ordered"
        )
    return pa.array(found, pa.string()).cast(kind)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_arrow_table_is_decoded_as_it_was(draw):
    n = draw.draw(st.integers(2, 12))
    columns = draw.draw(st.lists(arrow_columns(n), min_size=1, max_size=4))
    table = pa.table({f"c{j}": column for j, column in enumerate(columns)})
    usable = [name for name in table.column_names if table[name].null_count < n]
    table = table.append_column("always", pa.array([False, *[True] * (n - 1)]))
    usable.append("always")
    data = musigma.data.load(table.select(usable), schema="infer", allow_constant=True)
    kept = table.select(data.columns)
    again = decode(data.x, data.schema)
    assert again.schema.types == kept.schema.types
    assert again.to_pydict() == kept.to_pydict()
    noted = {name for name in usable if any(repr(name) in note for note in data.notes)}
    assert {*data.columns} == {*usable} - noted


def test_polars_frames():
    polars = pytest.importorskip("polars")
    sizes = polars.Enum(["S", "M", "L"])
    frame = polars.from_arrow(people()).with_columns(polars.col("size").cast(str).cast(sizes))
    data = musigma.data.load(frame, schema="infer")
    assert [column.kind for column in data.schema.columns] == KINDS
    again = polars.from_arrow(decode(data.x, data.schema))
    assert again.cast({"size": sizes}).equals(frame)
    assert again.drop("size").schema == frame.drop("size").schema


def test_pandas_frames_with_an_index_and_numbers_as_names():
    frame = people().to_pandas().rename(columns={"age": 3}).set_index("city")
    data = musigma.data.load(frame, schema="infer")
    assert data.columns == ("3", "price", "weight", "member", "paid", "size", "birth", "seen")
    frame["mixed"] = ["a", 1] * 100
    with pytest.raises(musigma.data.DataError, match="'mixed'"):
        musigma.data.load(frame, schema="infer")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.uint8])
def test_arrays_have_numbered_columns(dtype, tmp_path):
    x = np.random.default_rng(0).normal(30, 9, (50, 3)).astype(dtype)
    data = musigma.data.load(x, schema="infer")
    assert data.columns == ("x0", "x1", "x2")
    np.testing.assert_array_equal(data.x, x)
    assert decode(data.x, data.schema).column(0).to_numpy().dtype == dtype
    np.testing.assert_array_equal(musigma.data.load(x[:1], schema=data.schema).x, x[:1])
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", fmt="%.17g")
    np.testing.assert_array_equal(musigma.data.load(tmp_path / "x.csv", schema=data.schema).x, x)
    with pytest.raises(musigma.data.DataError, match="2 columns without names"):
        musigma.data.load(x[:, :2], schema=data.schema)


# Text --------------------------------------------------------------------------------------------


def load_text(text, path, encoding="utf-8", **how):
    path.write_bytes(text.encode(encoding))
    return musigma.data.load(path, **{"schema": "infer", **how})


ROWS = [(f"Köln {i % 5}", i / 4, "" if i % 7 == 0 else i % 31, f"c{i:03}") for i in range(60)]


@pytest.mark.parametrize(
    ("ending", "separator", "encoding", "decimal"),
    [
        (".csv", ",", "utf-8", "."),
        (".csv", ";", "cp1252", ","),
        (".tsv", "\t", "utf-16", "."),
        (".csv", "|", "utf-8-sig", "."),
    ],
)
def test_dialects_of_text(ending, separator, encoding, decimal, tmp_path):
    lines = [("town", "w", "k", "code"), *ROWS]
    text = "\n".join(separator.join(map(str, line)) for line in lines)
    text = text if decimal == "." else text.replace(".", ",")
    data = load_text(text, tmp_path / f"t{ending}", encoding)
    town, w, k = data.schema.columns
    assert town.levels == tuple(f"Köln {i}" for i in range(5))
    assert (w.kind, w.step, k.kind, k.missing) == ("continuous", 0.01, "count", True)
    assert "'code' is different in every row" in data.notes[-1]
    assert data.ids[3] == "c003"
    np.testing.assert_array_equal(data.x[:, 1], [row[1] for row in ROWS])
    out = decode(data.x, data.schema).to_pydict()
    assert out["town"] == [row[0] for row in ROWS]
    assert out["k"] == [None if row[2] == "" else row[2] for row in ROWS]


def test_words_that_stand_for_missing_values_are_noted(tmp_path):
    text = "\n".join(
        ["x,w", *(f"{i / 4 if i % 5 else 'NA'},{('none', 'a', 'b')[i % 3]}" for i in range(60))]
    )
    data = load_text(text, tmp_path / "t.csv")
    assert data.notes[0].endswith("read as missing values: 'none' (20 cells), 'NA' (12 cells)")
    assert data.schema.columns[1].levels == ("a", "b")
    data = load_text(text, tmp_path / "t.csv", schema={"w": {"levels": ["a", "b", "none"]}})
    assert data.x[:3, 0].tolist() == [2, 0, 1]


def test_digits_that_are_no_numbers_stay_as_they_are(tmp_path):
    text = "\n".join(["zip,x", *(f"{i % 9:05},{i / 4}" for i in range(90))])
    data = load_text(text, tmp_path / "t.csv")
    assert data.schema.columns[0].levels[2] == "00002"


def test_all_faults_of_a_table_are_named_at_once(tmp_path):
    lines = ["id,one,none,a,b,when,note,,huge"]
    for i in range(40):
        when = f"2026-01-{i % 28 + 1:02}"
        lines.append(f"{i},7,,{i / 7:.3f},{i % 3},{when},text {i // 2},{i % 2},{2**60 + 3 * i}")
    lines[5] = lines[5].replace("0.571", "inf")
    lines[9] = lines[9].replace("1.143", "oops")
    lines[12] += ",one more"
    with pytest.raises(musigma.data.DataError) as error:
        load_text("\n".join(lines), tmp_path / "t.csv")
    for text in (
        *("line 13 has 10 cells", "column 'one' is constant (7)", "column 'none' is empty"),
        *(
            "line 6, column 'a' is infinite",
            "line 10, column 'a' is 'oops'",
            "column 8 has no name",
        ),
        *("column 'huge' has whole numbers from 2^53", "7 columns or cells"),
    ):
        assert text in str(error.value), error.value
    data = load_text("\n".join(lines), tmp_path / "t.csv", skip_bad=True)
    assert data.columns == ("a", "b", "when")
    assert (len(data), len(data.skipped)) == (37, 3)
    notes = "\n".join(data.notes)
    for name in ("'id'", "'one'", "'none'", "'note' is left out as free text", "'huge'"):
        assert name in notes


def test_other_faults(tmp_path):
    for text, reason in [
        ("a,b\n1,2\n", "a single example"),
        ("a,b\n", "holds no examples"),
        ("a,a\n1,2\n3,4\n", "several columns are called 'a'"),
        ('a,b\n"1,234",2\n"5,678",3\n', "column 'a' is '1,234', and '1,234' may be 1234 or 1.234"),
        ("a,b\n01/02/2026,2\n03/04/2026,3\n04/04/2026,3\n", "two ways"),
    ]:
        with pytest.raises(musigma.data.DataError, match=reason):
            load_text(text, tmp_path / "t.csv")


def test_sources_that_are_no_tables():
    frame = people(30).to_pandas()
    for source in (frame["age"], [[1.5, 2]], None):
        with pytest.raises(
            musigma.data.DataError, match=f"source is of type {type(source).__name__}"
        ):
            musigma.data.load(source, schema="infer")
    with pytest.raises(musigma.data.DataError, match="several columns are called 'age'"):
        musigma.data.load(frame.rename(columns={"city": "age"}), schema="infer")
    with pytest.raises(musigma.data.DataError, match="columns of one length"):
        musigma.data.load({"a": [1, 2, 3], "b": [1, 2]}, schema="infer")
    spans = frame.assign(span=frame["seen"] - frame["seen"].min(), list=[[1]] * 30)
    with pytest.raises(musigma.data.DataError) as error:
        musigma.data.load(spans, schema="infer")
    assert "'span' is duration" in str(error.value)
    assert "'list' is list<" in str(error.value)
    records = frame[["age", "price"]].to_records(index=False)
    assert musigma.data.load(np.asarray(records), schema="infer").columns == ("age", "price")


@pytest.mark.slow
def test_ten_thousand_categories_and_columns():
    random = np.random.default_rng(0)
    words = np.array([f"word {i}" for i in range(10_000)])
    table = pa.table({"w": random.permutation(np.tile(words, 3)), "x": random.normal(size=30_000)})
    data = musigma.data.load(table, schema="infer")
    assert len(data.schema.columns[0].levels) == 10_000
    assert decode(data.x, data.schema).equals(table)
    wide = musigma.data.load(random.normal(size=(20, 10_000)), schema="infer")
    lines = musigma.data.summary(wide)
    assert (len(wide.schema), len(lines)) == (10_000, 103)


def test_labels_are_data_unless_they_are_given(tmp_path):
    text = "\n".join(["x,label,z", *(f"{i / 8},{'ab'[i % 2]},{i % 6}" for i in range(40))])
    data = load_text(text, tmp_path / "t.csv")
    assert data.columns == ("x", "label", "z")
    assert data.labels is None
    data = load_text(text, tmp_path / "t.csv", given="label")
    assert (data.columns, data.label_names) == (("x", "z"), ("a", "b"))
    with pytest.raises(musigma.data.DataError, match="it has no labels"):
        musigma.data.load(data.x, schema="infer", given="label")
    data = load_text(text, tmp_path / "t.csv", given=["label", "z"])
    assert data.spec(["label", "z"]).schema.names == ("x",)


def test_missing_values_are_modeled_or_ignored():
    modeled, ignored = (
        musigma.data.load(people(), schema="infer", missing=how) for how in ("model", "ignore")
    )
    assert [c.missing for c in modeled.schema.columns] == [j in (1, 5) for j in range(9)]
    assert not any(c.missing for c in ignored.schema.columns)
    np.testing.assert_array_equal(modeled.x, ignored.x)


def test_a_parquet_file_is_not_held_as_a_whole_while_it_is_read(tmp_path, monkeypatch):
    path, values = tmp_path / "rows.parquet", np.random.default_rng(0).normal(size=(2, 200_000))
    parquet.write_table(pa.table({"a": values[0], "b": values[1]}), path, row_group_size=10_000)
    taken, numbers = [], arrow._numbers
    before = pa.total_allocated_bytes()

    def counted(column):
        taken.append(pa.total_allocated_bytes() - before)
        return numbers(column)

    monkeypatch.setattr(arrow, "_numbers", counted)
    np.testing.assert_array_equal(musigma.data.load(path).x, values.T.astype(np.float32))
    assert 0 < max(taken) < path.stat().st_size, "bytes in buffers of Arrow"


@pytest.mark.slow
def test_a_million_rows_take_less_than_two_gigabytes(tmp_path):
    random, n = np.random.default_rng(0), 1_000_000
    words = np.array([f"word {i}" for i in range(10_000)])
    columns = {f"x{j}": random.normal(size=n) for j in range(20)}
    columns |= {f"k{j}": random.integers(0, 5000, n) for j in range(6)}
    columns |= {f"w{j}": words[random.integers(0, 10 ** (j + 1), n)] for j in range(4)}
    parquet.write_table(pa.table(columns), tmp_path / "big.parquet")
    code = """
import resource, sys
import musigma
data = musigma.data.load(sys.argv[1], schema="infer")
assert data.spec().schema.columns[0].measured.rows > 800_000
print(data.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "big.parquet")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("(30,)")
    assert float(out.split()[-1]) < 1.2, "GiB"


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
    for text, message in (
        ("", "lists no columns"),
        ('day = {format = "iso"}', "1 fault:\n.*'day', format is 'iso': expected a format such"),
    ):
        path.write_text(f"[columns]\n{text}\n")
        with pytest.raises(musigma.data.DataError, match=message):
            musigma.data.load(people(), schema=path)
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
        member = {step = 1}
        paid = {levels = ["yes"]}
        """
    )
    with pytest.raises(musigma.data.DataError) as error:
        musigma.data.load(people(), schema=path)
    for name in ("nobody", "city", "price", "birth", "seen", "weight", "age", "member"):
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
    assert decode(data.x, data.schema).column("birth").type == pa.date32()
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


def test_unknown_levels_are_counted_in_a_note():
    rows = {"city": ["Oslo", "Rome"] * 20, "age": list(range(20, 60))}
    schema = musigma.data.load(rows, schema="infer").schema
    later = {"city": ["Kyiv", "Rome", "Lima"], "age": [30, 31, 32]}
    data = musigma.data.load(later, schema=schema, unseen="probability")
    assert any("'city': 2 of 3 values are not in the schema (" in note for note in data.notes)
    assert data.array[:, 0].tolist() == [2, 1, 2]


def test_whole_numbers_that_are_not_exact_are_refused_in_later_data():
    schema = musigma.data.load(
        {"n": list(range(40)), "x": np.linspace(0, 1, 40)}, schema="infer"
    ).schema
    with pytest.raises(musigma.data.DataError, match=r"whole numbers from 2\^53 on are not exact"):
        musigma.data.load({"n": [1, 2**53 + 1], "x": [0.1, 0.2]}, schema=schema)
