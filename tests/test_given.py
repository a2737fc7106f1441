"""The context of each example: validated, kept with its rows, part of the data's identity."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musigma.data import Dataset, Given, attach, describe, digest, given_rows, load, summary
from musigma.data.batches import stream
from musigma.data.readers import LazyImages
from musigma.spec import Spec, Variable
from test_data import COLOR, GRAY, fails, save_folder

N = 12
ROWS = np.arange(N)
RANDOM = np.random.default_rng(3).normal(size=(N, 3)).astype(np.float32)
POINTS = RANDOM[:, :2]


def conditioned(masks=None) -> Dataset:
    """A data set whose context tells the row of each example, in every kind that there is."""
    images = np.broadcast_to(ROWS.astype(np.uint8)[:, None, None, None], (N, 1, 2, 3))
    return Dataset(
        POINTS,
        labels=ROWS % 2,
        label_names=("even", "odd"),
        given={
            "row": Given(ROWS.astype(np.float32)),
            "pair": Given(np.stack([ROWS, -ROWS], 1).astype(np.float32)),
            "name": Given(ROWS, names=tuple("abcdefghijkl")),
            "mask": Given(images if masks is None else masks),
        },
    )


def row_of(data: Dataset, i: int) -> set[int]:
    """The row that example i has in each part of the data: one, if all were kept together."""
    values = {name: np.asarray(given.values[i]) for name, given in data.given.items()}
    found = {int(np.flatnonzero((data.x[i] == POINTS).all(1))[0])}
    found |= {int(values["row"]), int(values["pair"][0]), -int(values["pair"][1])}
    return found | {int(values["name"]), *map(int, np.unique(values["mask"]))}


@given(picks=st.lists(st.lists(st.integers(0, 10**6), max_size=9), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_subsets_keep_context_with_its_example(picks):
    data, rows = conditioned(), ROWS
    for pick in picks:
        which = [i % len(rows) for i in pick] if len(rows) else []
        data, rows = data.subset(which), rows[which]
    assert len(data) == len(rows)
    assert all(len(given) == len(rows) for given in data.given.values())
    for i, row in enumerate(rows):
        assert row_of(data, i) == {row}


@pytest.mark.parametrize("part", ["train", "validation", "held-out"])
def test_splits_keep_context_with_its_example(part):
    data = conditioned().split(part)
    for i in range(len(data)):
        assert len(row_of(data, i)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_say_which_rows_they_are(workers):
    data = conditioned()
    for x, rows in stream(data, 5, seed=1, stop=6, workers=workers):
        np.testing.assert_array_equal(x, POINTS[rows], strict=True)
        np.testing.assert_array_equal(data.given["row"].values[rows], rows)


def test_images_on_disk_can_be_given(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = load(save_folder(tmp_path / "masks", COLOR), in_memory=False).array
    assert isinstance(found, LazyImages)
    data = Dataset(GRAY, given={"mask": Given(found)})  # pyright: ignore
    part = data.subset([4, 1, 2]).subset([2, 0])
    np.testing.assert_array_equal(part.given["mask"].values[:], COLOR[[2, 4]], strict=True)
    np.testing.assert_array_equal(part.given["mask"].values, COLOR[[2, 4]])
    here = Dataset(GRAY, given={"mask": Given(COLOR)}).subset([2, 4])
    assert digest(part) == digest(here)


def test_context_is_part_of_the_identity_of_the_data():
    data = conditioned()
    assert digest(data) == digest(conditioned())
    assert digest(replace(data, given={})) != digest(data)
    seen = {digest(data)}
    for name, given_ in data.given.items():
        values = np.array(given_.values)
        values[[3, 5]] = values[[5, 3]]
        changed = {**data.given, name: replace(given_, values=values)}
        seen |= {digest(replace(data, given=changed))}
        others = {key: value for key, value in data.given.items() if key != name}
        seen |= {digest(replace(data, given={**others, f"other {name}": given_}))}
    renamed = Given(ROWS, names=tuple("abcdefghijkm"))
    seen |= {digest(replace(data, given={**data.given, "name": renamed}))}
    assert len(seen) == 10


def test_context_is_described():
    data = conditioned()
    assert json.loads(json.dumps(describe(data)))["given"] == {
        "row": {"shape": [1], "names": []},
        "pair": {"shape": [2], "names": []},
        "name": {"shape": [12], "names": list("abcdefghijkl")},
        "mask": {"shape": [1, 2, 3], "names": []},
    }
    assert data.spec(["mask", "label"]) == Spec(
        (2,),
        context=(
            Variable("mask", (1, 2, 3), levels=256),
            Variable("label", names=("even", "odd")),
        ),
    )
    assert Dataset(GRAY).spec() == Spec((1, 9, 7), 256)
    with fails("context: array has no depth, size: give label, row, pair, name, mask"):
        data.spec(["row", "depth", "size"])
    with fails("array has no label: give none, since it has no labels"):
        Dataset(POINTS).spec(["label"])


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (ROWS, (), r"int64 of shape \(12,\): give float32"),
        (POINTS.astype(np.float64), (), r"float64 of shape \(12, 2\): give float32"),
        (POINTS[None, None], (), r"float32 of shape \(1, 1, 12, 2\)"),
        (GRAY[:, 0], (), r"uint8 of shape \(6, 9, 7\)"),
        (POINTS[:, 0], ("a", "b"), "float32 of shape .* with 2 class names: give int64"),
        (ROWS, ("a", "b"), "run from 0 to 11, and there are 2 class names"),
        (ROWS - 1, tuple("abcdefghijkl"), "run from -1 to 10"),
        (np.where(POINTS > 1, np.nan, POINTS), (), "not finite in . rows, the first of them"),
        (np.array([0, np.inf], np.float32), (), "not finite in 1 rows, the first of them 1"),
    ],
)
def test_context_that_cannot_be_used(values, names, message):
    with fails(message):
        Given(values, names)


def test_context_has_a_row_for_each_example():
    with fails("given: 'row' has 12 rows for 6 examples"):
        Dataset(POINTS[:6], given={"row": Given(ROWS.astype(np.float32))})
    with fails("given: 'label' already names the labels"):
        replace(conditioned(), given={"label": Given(POINTS)})


# Context from the table itself, and from other files ---------------------------------------------


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_columns_of_the_table_are_given(tmp_path):
    rows = "".join(f"{i},{0.5 + i},{'fm'[i % 2]},{i * i},{i / 7}\n" for i in range(12))
    path = write(tmp_path / "x.csv", f"age,x_1,sex,x_2,income\n{rows}")
    data = load(path, given=["x_*", "sex"])
    assert data.columns == ("age", "income")
    assert data.shape == (2,)
    assert list(data.given) == ["x_1", "x_2", "sex"]
    np.testing.assert_array_equal(data.given["x_2"].values, np.arange(12.0) ** 2)
    assert data.given["sex"].names == ("f", "m")
    assert data.given["sex"].values.tolist() == [0, 1] * 6
    with fails(r"x.csv: no column matches 'y_\*': give one of age, x_1, sex"):
        load(path, given="y_*")
    with fails("x.csv: given: it has no labels"):
        load(path, given=["label", "sex"])
    assert load(path, given="sex").columns == ("age", "x_1", "x_2", "income")


def test_parquet_columns_are_given(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = pa.table({"a": POINTS[:, 0], "kind": ["x", "y", "z"] * 4, "b": POINTS[:, 1]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    for in_memory in (True, False):
        data = load(tmp_path / "x.parquet", given=["kind", "b"], in_memory=in_memory)
        np.testing.assert_array_equal(data.x, POINTS[:, :1])
        np.testing.assert_array_equal(data.given["b"].values, POINTS[:, 1])
        assert data.given["kind"].names == ("x", "y", "z")


@pytest.mark.parametrize("form", ["name", "path", "stem"])
def test_rows_are_matched_with_images_by_name(tmp_path, form):
    folder = save_folder(tmp_path / "images", GRAY, "{k}/{i}.png")
    names = {"name": "{i}.png", "path": "{k}/{i}.png", "stem": "{i}"}[form]
    lines = [f"{names.format(i=i, k='ab'[i % 2])},{i * 1.5}" for i in (5, 2, 0, 4, 1, 3)]
    more = "9.png,7.0" if form != "stem" else "9,7.0"  # an example that is not there
    path = write(tmp_path / "age.csv", "\n".join(["file,age", *lines, more]))
    data = load(folder, given=path)
    assert data.ids is not None
    assert data.given["age"].values.tolist() == [1.5 * int(name[2]) for name in data.ids]
    assert "matched with examples by the column 'file'" in data.notes[-1]


def test_rows_without_names_are_taken_in_order(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY)
    path = write(
        tmp_path / "age.csv", "age,sex\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(6))
    )
    data = load(folder, given=path)
    assert data.given["age"].values.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.given["sex"].names == ("a", "b")
    assert data.notes[-1].endswith("age.csv: rows are taken in the order of the examples")
    only = attach(load(folder), path, columns=["sex"])
    assert list(only.given) == ["sex"]
    short = write(tmp_path / "few.csv", "age\n1\n2\n")
    with fails("few.csv: has 2 rows for 6 examples, and no column that names them"):
        load(folder, given=short)
    with fails("age.csv: has no size: give some of age, sex"):
        attach(load(folder), path, columns=["size"])
    with fails("age.csv: the names age, sex are already taken"):
        attach(data, path)


def test_arrays_and_images_are_given(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY, "{k}/{i}.png")
    masks = save_folder(tmp_path / "masks", COLOR[::-1], "{i}.png")
    np.save(tmp_path / "depth.npy", RANDOM[:6, :3])
    np.savez(tmp_path / "more.npz", age=np.arange(6), kind=np.array(list("xyxyzz")))
    sources = [str(masks), str(tmp_path / "depth.npy"), str(tmp_path / "more.npz")]
    data = load(folder, given=sources)
    assert [(name, v.values.dtype) for name, v in data.given.items()] == [
        ("masks", np.uint8),
        ("depth", np.float32),
        ("age", np.float32),
        ("kind", np.int64),
    ]
    order = [int(name[2]) for name in data.ids or ()]
    np.testing.assert_array_equal(data.given["masks"].values, COLOR[::-1][order])
    with fails("given: 'nothing' is not a file, and these are images"):
        load(folder, given="nothing")


def test_all_faults_of_a_context_are_named(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY)
    text = "age,size,kind\n1,2,a\n,2,b\n3,2,a\n4,2,\n5,2,b\nx,2,a\n"
    with fails(
        "3 cells cannot be used",
        "line 3, column 'age' is missing: fill or drop it",
        "line 7, column 'age' is 'x', not a number: fill or drop it",
        "line 5, column 'kind' is missing",
    ):
        load(folder, given=write(tmp_path / "bad.csv", text))
    text = "age,size,kind\n" + "".join(f"{i},2,a\n" for i in range(6))
    with fails(
        "cannot be used",
        "size is constant, so it carries no information: drop it",
        "kind is constant",
    ):
        load(folder, given=write(tmp_path / "same.csv", text))
    text = "age,age\n" + "".join(f"{i},{9 - i}\n" for i in range(6))
    with fails("given: .*twice.csv: several columns are called 'age': give each a name"):
        load(folder, given=write(tmp_path / "twice.csv", text))
    lines = "".join(f"{i}.png,{i}\n" for i in range(5))
    with fails("the column 'file' names examples, and 1 of 6 are missing: 5.png"):
        load(folder, given=write(tmp_path / "lacking.csv", "file,age\n" + lines))
    np.save(tmp_path / "nan.npy", np.where(RANDOM[:6] > 0, np.nan, 1.0))
    with fails("cannot be used", "nan values are not finite in . rows"):
        load(folder, given=str(tmp_path / "nan.npy"))


def test_rows_to_generate_by(tmp_path):
    variables = [Variable("age"), Variable("kind", names=("a", "b"))]
    path = write(tmp_path / "rows.csv", "kind,age,other\na,3,x\nb,3,y\n")
    rows = given_rows([path], variables)
    assert rows["age"].values.tolist() == [3, 3]
    assert [rows["kind"].names[i] for i in rows["kind"].values] == ["a", "b"]
    np.save(tmp_path / "any.npy", RANDOM[:2, :2])
    np.testing.assert_array_equal(
        given_rows([tmp_path / "any.npy"], [Variable("pair", (2,))])["pair"].values, RANDOM[:2, :2]
    )
    with fails("no file holds size: give a column of that name"):
        given_rows([path], [Variable("size")])
    longer = write(tmp_path / "long.csv", "age\n1\n2\n3\n")
    kinds = write(tmp_path / "kinds.csv", "kind\na\nb\n")
    with fails("the numbers of rows differ, 3 of age, 2 of kind"):
        given_rows([longer, kinds], variables)


def test_the_summary_names_the_context_by_kind_and_the_support(tmp_path):
    random = np.random.default_rng(3)
    frame = pd.DataFrame(random.uniform(size=(60, 5)), columns=["a", "b", "x_0", "x_1", "x_2"])
    frame["kind"] = random.choice(["u", "v"], 60)
    data = load(frame, of=["a", "b"], given=["x_*", "kind"], bounds={"bounds": {"a": [0, 2]}})
    lines = summary(data)
    assert "support: a in [0, 2]" in lines
    assert "context: x_0, x_1, x_2 (number); kind (classes u, v)" in lines
