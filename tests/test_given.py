"""What is given with each example: validated, kept with its rows, part of the data's identity."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musigma.data import Dataset, Given, describe, digest, load
from musigma.data.batches import stream
from musigma.data.readers import LazyImages
from musigma.spec import Spec, Variable
from test_data import COLOR, GREY, fails, save_folder

N = 12
ROWS = np.arange(N)
POINTS = np.random.default_rng(3).normal(size=(N, 2)).astype(np.float32)


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
    data = Dataset(GREY, given={"mask": Given(found)})
    part = data.subset([4, 1, 2]).subset([2, 0])
    np.testing.assert_array_equal(part.given["mask"].values[:], COLOR[[2, 4]], strict=True)
    np.testing.assert_array_equal(part.given["mask"].values, COLOR[[2, 4]])
    here = Dataset(GREY, given={"mask": Given(COLOR)}).subset([2, 4])
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
    assert Dataset(GREY).spec() == Spec((1, 9, 7), 256)
    with fails("context: array has no depth, size: give label, row, pair, name, mask"):
        data.spec(["row", "depth", "size"])
    with fails("array has no label: give none, it has no labels"):
        Dataset(POINTS).spec(["label"])


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (ROWS, (), r"int64 of shape \(12,\): give float32"),
        (POINTS.astype(np.float64), (), r"float64 of shape \(12, 2\): give float32"),
        (POINTS[None], (), r"float32 of shape \(1, 12, 2\)"),
        (GREY[:, 0], (), r"uint8 of shape \(6, 9, 7\)"),
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
    with fails("given: 'label' names the labels already"):
        replace(conditioned(), given={"label": Given(POINTS)})
