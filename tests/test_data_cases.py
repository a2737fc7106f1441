"""Inputs that cause trouble elsewhere: each is read correctly or refused with a reason."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import musigma
from musigma import build
from musigma.cli import main
from musigma.data import DataError, Dataset, describe, load, summary
from musigma.data.readers.layout import layout
from musigma.data.sampling import PARTS
from musigma.data.tables import LABEL_NAMES
from musigma.distributions import StandardNormal
from musigma.evaluation import evaluate
from musigma.layers import ActNorm, Standardize, standardizer
from musigma.model import Chain, Prior
from musigma.spec import Spec, Variable
from musigma.testing import check_model, randomized
from musigma.training import TrainConfig, fit
from test_data import COLOR, GRAY, fails, pack, save_csv, save_folder, save_image

RNG = np.random.default_rng(5)


# Tables have units -------------------------------------------------------------------------------

ARCHITECTURES = {
    "maf": {"hidden": 16, "depth": 2},
    "nsf": {"hidden": 16, "depth": 2},
    "realnvp": {"depth": 2},
    "vae": {"latents": 2, "width": 16},
    "mlp_vae": {"latents": 2, "hidden": 16},
}


def everyday() -> tuple[np.ndarray, np.ndarray]:
    """A table in years, euros, a ratio, grams and calendar years; and its columns' std."""
    z = np.random.default_rng(0).normal(size=(600, 5))
    z[:, 1] += 0.8 * z[:, 0]
    scale = np.array([12, 9000, 2e-4, 8e3, 8])
    x = np.array([45, 30000, 1e-3, 7e4, 2005]) + scale * z
    return x, x.std(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_units_change_the_nats_only_by_their_logarithms(name, tmp_path):
    x, std = everyday()
    nats = []
    for i, table in enumerate((x, (x - x.mean(0)) / std)):
        data = Dataset(table.astype(np.float32))
        torch.manual_seed(0)
        model = build(name, data.spec(), standardize=True, **ARCHITECTURES[name])
        parts = data.subset(range(500)), data.subset(range(500, 600))
        run = fit(model, *parts, TrainConfig(steps=15), tmp_path / str(i))
        nats.append(evaluate(run.model, data)["nats"])
    assert nats[0] - nats[1] == pytest.approx(np.log(std).sum(), abs=2e-3)


def test_moments_are_those_of_all_rows_whatever_the_blocks():
    x = (RNG.normal(size=(10_000, 600)) * np.geomspace(1e-3, 1e5, 600) + 1e3).astype(np.float32)
    data = Dataset(x).subset(np.arange(10_000) % 3 > 0)
    mean, std = data.moments()
    wide = data.x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, wide.std(0), rtol=1e-9)
    with fails("holds images, which have no columns"):
        Dataset(np.zeros((2, 1, 2, 2), np.uint8)).moments()


def test_a_column_that_is_constant_where_a_model_trains_is_refused(tmp_path):
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = 5
    x[40:, 1] = 6
    data = Dataset(x, name="x.csv", columns=("a", "b", "c"))
    assert (data.moments()[1] > 0).all()
    with fails("x.csv: column 'b' is constant in the 40 rows to train on"):
        data.subset(range(40)).moments()
    model = build("maf", data.spec(), standardize=True, depth=1, hidden=8)
    with fails("column 'b' is constant in the 40 rows to train on"):
        fit(model, data.subset(range(40)), data, TrainConfig(steps=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_are_standardized_by_all_of_the_training_data(tmp_path):
    x = RNG.normal(5, 3, size=(2000, 2)).astype(np.float32)
    x[:512] += 10  # a first batch that is not like the rest
    data = Dataset(x)
    model = build("nsf", data.spec(), depth=1, hidden=8, standardize=True)
    fit(model, data, data.split("validation"), TrainConfig(steps=1), tmp_path)
    (layer,) = (m for m in model.modules() if isinstance(m, Standardize))
    np.testing.assert_allclose(layer.mean, x.astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.std, x.astype(float).std(0), rtol=1e-6)


def test_standardization_is_set_once_and_only_where_data_enter(tmp_path):
    data = Dataset(RNG.normal(size=(64, 2)).astype(np.float32))
    model = build("maf", (2,), bits=None, depth=1, hidden=8, standardize=True)
    layer = standardizer(model)
    assert layer is not None
    layer.set([1.0, 2.0], [3.0, 4.0])
    fit(model, data, data, TrainConfig(steps=1), tmp_path)
    assert (layer.mean.tolist(), layer.std.tolist()) == ([1, 2], [3, 4])
    given = build("maf", Spec((2,), context=(Variable("age"),)), depth=1, standardize=True)
    assert isinstance(standardizer(given), Standardize)
    inside = Chain([ActNorm(2), Standardize(2)], Prior(StandardNormal((2,))))
    assert standardizer(inside) is None
    assert standardizer(build("vae", (1, 8, 8), latents=2, width=4)) is None
    for mean, std, message in (
        ([0.0], [1.0], "expected shape"),
        ([0.0, 0.0], [1.0, 0.0], r"features \[1\]"),
        ([0.0, np.inf], [1.0, np.nan], r"features \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Standardize(2).set(mean, std)
    for shape, bits in (((1, 8, 8), None), ((3,), 8)):
        with pytest.raises(ValueError, match="standardize: expected continuous vectors"):
            build("realnvp", shape, bits=bits, standardize=True)


def test_an_option_of_its_own_changes_no_older_model():
    assert "standardize" not in build("vae", (1, 8, 8), latents=2, width=4).config["options"]
    plain = build("nsf", (2,), bits=None, depth=1, standardize=True).config["options"]
    assert plain["standardize"] is True


# Training on test data, or on masks --------------------------------------------------------------

SPELLINGS = {
    "train": (
        "train",
        "Train",
        "TRAINING",
        "training_set",
        "train_images",
        "trainset",
        "train2017",
    ),
    "test": ("test", "Test", "testing", "TEST_IMAGES", "test-set", "PrivateTest"),
    "validation": ("val", "valid", "Validation", "dev", "val2017", "evaluation"),
}
BESIDE = {
    "nothing": (),
    "extra": ("extra/{i}.png",),
    "unlabeled": ("unlabeled/x/{i}.png",),
    "ground_truth": ("ground_truth/a/{i}_mask.png",),
    "the Macintosh": ("__MACOSX/train/a/{i}.png",),
    "a stray file": ("{i}.png",),
}


def save(root: Path, *patterns: str, n: int = 6) -> Path:
    for pattern in patterns:
        for i in range(n):
            save_image(root / pattern.format(i=i), RNG.integers(0, 256, (3, 8, 8), np.uint8))
    return root


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("down", ["", "set/images/"])
@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val2017")])
def test_parts_stay_parts_whatever_lies_beside_them(tmp_path, beside, down, train, test):
    inner = [f"{down}{part}/{k}/{{i}}.png" for part in (train, test) for k in "ab"]
    root = save(tmp_path / "d", *inner, *(down + name for name in BESIDE[beside]))
    (root / "empty").mkdir()
    for source in (root, pack(root, tmp_path / "d.tar")):
        data = load(source)
        assert data.label_names == ("a", "b")
        parts = {name: data.split(name).ids or () for name in PARTS}
        assert all(f"{down}{test}/" in name for name in parts["held-out"])
        assert len(parts["held-out"]) == 12
        seen = parts["train"] + parts["validation"]
        assert all(name.startswith(f"{down}{train}/") for name in seen)
        assert len(seen) == 12
        noted = [note for note in data.notes if "6 images are left out" in note]
        assert len(noted) == bool(BESIDE[beside])


@pytest.mark.parametrize(
    ("train", "test", "beside", "classes"),
    [
        (("x_train/a", "x_train/b"), ("x_test/a", "x_test/b"), (), ("a", "b")),
        (("01_train/a", "01_train/b"), ("02_test/b",), (), ("a", "b")),
        (("box_train",), ("box_test",), ("query",), ()),
        (("trainA", "trainB"), ("testA", "testB"), (), ("A", "B")),
        (("train_cat", "train_dog"), ("test_cat",), (), ("cat", "dog")),
        (("train/train",), ("test/test",), (), ()),
        (("s_train/s_train/a", "s_train/s_train/b"), ("s_test/s_test/a",), ("q",), ("a", "b")),
        (("X2018_Training_Input",), ("X2018_Test_Input",), ("X2018_Training_GroundTruth",), ()),
        (("d/train/a", "d/train/b"), ("d/test/a",), ("d/d/train/a", "d/d/test/a"), ("a", "b")),
        (("img8bit/train",), ("img8bit/val",), ("gtFine/train",), ()),
    ],
)  # fmt: skip
def test_parts_are_found_within_names(tmp_path, train, test, beside, classes):
    folders = [f"{name}/{{i}}.png" for name in (*train, *test, *beside)]
    data = load(save(tmp_path / "d", *folders))
    assert {name.rpartition("/")[0] for name in data.split("held-out").ids or ()} == {*test}
    assert {name.rpartition("/")[0] for name in data.ids or ()} == {*train, *test}
    assert data.label_names == classes
    assert len([note for note in data.notes if "left out" in note]) == bool(beside)


def test_words_of_parts_do_not_make_parts(tmp_path):
    data = load(save(tmp_path / "d", "bullet_train/{i}.png", "crash_test/{i}.png"))
    assert data.label_names == ("bullet_train", "crash_test")
    assert data.official_test is None


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_spellings_of_parts(draw):
    names = {part: draw.draw(st.sampled_from(s)) for part, s in SPELLINGS.items()}
    found = layout([f"{name}/{k}/1.png" for name in names.values() for k in "ab"])
    assert found.parts is not None
    assert found.parts.tolist() == [part for part in names for _ in "ab"]


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    data = load(save(tmp_path / "d", "train/{i}.png", "bus/{i}.png", "car/{i}.png"))
    assert data.label_names == ("bus", "car", "train")
    inside = ["cat/train/{i}.png", "cat/test/{i}.png", *(f"{k}/{{i}}.png" for k in "abcd")]
    assert load(save(tmp_path / "e", *inside)).label_names == ("a", "b", "c", "cat", "d")


def test_classes_may_have_parts_inside(tmp_path):
    parts = [f"{k}/{part}/{{i}}.png" for k in ("cat", "dog") for part in ("train", "test")]
    data = load(save(tmp_path / "d", *parts))
    assert data.label_names == ("cat", "dog")
    assert all("/test/" in name for name in data.split("held-out").ids or ())


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("images/{i}.png", "masks/{i}.png"), "lies in masks, a folder of masks"),
        (("train/img/{i}.png", "train/label/{i}.png"), "lies in label, a folder of masks"),
        (("JPEGImages/{i}.png", "SegmentationClass/{i}.png"), "lies in SegmentationClass"),
        (("good/{i}.png", "bad/{i}.png", "ground_truth/{i}.png"), "lies in ground_truth"),
        (("{i}.png", "{i}_mask.png"), "is a mask by its name, beside its image"),
        (("rgb/{i}.png", "depth/{i}.png"), "lies in depth, a folder of masks"),
        (("images/{i}.png", "mask_images/{i}.png"), "lies in mask_images, a folder of masks"),
        (("images/{i}.png", "1st_manual/{i}.png"), "lies in 1st_manual, a folder of masks"),
    ],
)
def test_masks_are_not_trained_on(tmp_path, patterns, left):
    data = load(save(tmp_path / "d", *patterns))
    assert len(data) == 6 * (len(patterns) - 1)
    assert not any("mask" in name or "Seg" in name for name in data.ids or ())
    (note,) = data.notes
    assert f"6 images are left out: each {left}" in note


def test_faces_with_masks_are_a_class(tmp_path):
    data = load(save(tmp_path / "d", "mask/{i}.png", "no_mask/{i}.png"))
    assert data.label_names == ("mask", "no_mask")


def test_files_named_after_parts_are_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("x-train-0", "x-train-1", "x-test-0", "more"):
        save(tmp_path / "images" / name, "{i}.png")
        (tmp_path / "shards").mkdir(exist_ok=True)
        pack(tmp_path / "images" / name, tmp_path / "shards" / f"{name}.tar")
    for in_memory in (True, False):
        data = load(tmp_path / "shards", in_memory=in_memory)
        held_out = data.split("held-out").ids or ()
        assert len(held_out) == 6
        assert all(name.startswith("x-test-0.tar/") for name in held_out)
        assert len(data) == 18
        assert any(
            "6 images are left out: each lies in neither train nor test" in n for n in data.notes
        )
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "table").mkdir()
    for i, name in enumerate(
        ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    ):
        table = pa.table({"a": RNG.normal(size=5), "b": np.full(5, i) + RNG.normal(size=5) / 9})
        parquet.write_table(table, tmp_path / "table" / f"{name}.parquet")
    for in_memory in (True, False):
        data = load(tmp_path / "table", in_memory=in_memory)
        assert np.rint(data.split("held-out").x[:, 1]).tolist() == [2] * 5
        assert len(data.split("train")) + len(data.split("validation")) == 10


# Silent readings ---------------------------------------------------------------------------------


def test_links_to_folders_are_noted(tmp_path):
    save(tmp_path / "real", "{i}.png")
    save(tmp_path / "d", "a/{i}.png")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "real")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "c").symlink_to(tmp_path / "real")
    (note,) = load(tmp_path / "d").notes
    assert "d: links to folders are not followed: b" in note
    with fails("only: holds no images .links to folders are not followed: c.: give images"):
        load(tmp_path / "only")


def test_the_summary_says_what_is_trained_on(tmp_path):
    folder = save(
        tmp_path / "d", "train/a/{i}.png", "train/b/{i}.png", "test/a/{i}.png", "x/{i}.png"
    )
    (folder / "train" / "b" / "0.png").write_bytes(b"")
    lines = "\n".join(summary(load(folder, skip_bad=True)))
    assert "d: 17 images of 3 x 8 x 8, 8 bits" in lines
    assert re.search(
        r"parts: \d+ train, \d+ validation, 6 held-out .held-out as the source", lines
    )
    assert re.search(
        r"2 classes .train / validation / held-out.: a \d / \d / 6, b \d / \d / 0", lines
    )
    assert "left out: 1 that cannot be used\n  train/b/0.png is empty: remove it" in lines
    assert "6 images are left out: each lies in neither train nor test (x/0.png" in lines
    assert "warning" not in lines


def table_file(tmp_path, x: np.ndarray, header: str, labels=None) -> Path:
    rows = [[*map(repr, row.tolist())] for row in x]
    rows = [[*row, str(y)] for row, y in zip(rows, labels, strict=True)] if labels else rows
    return save_csv(tmp_path / "x.csv", [header.split(","), *rows])


def warnings_of(data: Dataset) -> str:
    return "\n".join(line for line in summary(data) if line.startswith("warning: "))


def test_doubtful_labels_columns_and_levels_cause_warnings(tmp_path):
    x = RNG.normal(size=(60, 2))
    data = load(table_file(tmp_path, x, "u,v,label", range(60)))
    assert (
        "every example has a label of its own (60): these are probably not classes"
        in warnings_of(data)
    )
    assert not warnings_of(load(table_file(tmp_path, x, "u,v,label", list("ab") * 30)))
    nearly = np.column_stack([x, np.where(np.arange(60) == 9, 6.0, 5.0)])
    text = warnings_of(load(table_file(tmp_path, nearly, "u,v,w")))
    assert "column 'w' (5 in " in text
    assert "column 'u'" not in text
    binary = Dataset((RNG.random((20, 1, 8, 8)) > 0.5).astype(np.uint8))
    assert "levels run from 0 to 1 only, and are read as those of 8 bits" in warnings_of(binary)
    images = RNG.integers(0, 256, (20, 3, 8, 8), np.uint8)
    assert not warnings_of(Dataset(images))
    images[:, 2] = 7
    assert "channels without content: 2 (always 7)" in warnings_of(Dataset(images))
    test = np.arange(20) >= 15
    twice = np.concatenate([images[:15], images[:5]])
    data = Dataset(twice, official_test=test, official_validation=np.zeros(20, bool))
    parts = {"train": data.subset(range(15)), "held-out": data.split("held-out")}
    again = "warning: 5 of 5 held-out examples are also in the part to train on"
    assert again in summary(data, parts)


def test_rows_that_repeat_are_counted(tmp_path):
    x = np.repeat(RNG.normal(size=(20, 2)), 3, 0)
    lines = summary(load(table_file(tmp_path, x, "u,v")))
    assert "40 examples are duplicates; equal examples are in the same part" in lines


def test_a_description_counts_the_parts(tmp_path):
    data = load(table_file(tmp_path, RNG.normal(size=(60, 2)), "u,v,label", list("ab") * 30))
    parts = {part: data.split(part) for part in ("train", "validation", "held-out")}
    found = json.loads(json.dumps(describe(data, parts)))
    assert sum(part["n"] for part in found["parts"].values()) == 60
    assert sum(part["labels"]["a"] for part in found["parts"].values()) == 30
    assert found["notes"] == list(data.notes)
    assert found["warnings"] == []


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "id", "PassengerId", "row_number", "user_id"])
@pytest.mark.parametrize("start", [0, 9007199254740993000])
def test_columns_that_name_rows_are_not_data(tmp_path, name, start):
    x = RNG.normal(size=(50, 2))
    rows = [[start + i, *map(repr, row)] for i, row in enumerate(x.tolist())]
    data = load(save_csv(tmp_path / "x.csv", [[name, "u", "v"], *rows]))
    assert data.columns == ("u", "v")
    np.testing.assert_array_equal(data.x, x.astype(np.float32))
    assert data.ids is not None
    assert data.ids[3] == str(start + 3)
    assert "is different in every row: it names rows, and is not data" in data.notes[0]


def test_other_whole_numbers_are_data(tmp_path):
    rows = [[i, i % 7, f"{x:.3f}"] for i, x in enumerate(RNG.normal(size=50))]
    data = load(save_csv(tmp_path / "x.csv", [["time", "id", "v"], *rows]))
    assert data.columns == ("time", "id", "v")
    assert "column 'time' counts the rows: drop it, unless it is a measurement" in data.notes[0]


@pytest.mark.parametrize("header", ["0,1", "2019,2020", "2,1"])
def test_numbers_may_be_names_of_columns(tmp_path, header):
    x = RNG.normal(size=(50, 2))
    data = load(save_csv(tmp_path / "x.csv", [header.split(","), *x.tolist()]))
    np.testing.assert_array_equal(data.x, x.astype(np.float32))
    assert f"the first line, {header}, is taken as names of columns" in data.notes[0]
    whole = RNG.integers(0, 9, (50, 2)).tolist()
    assert len(load(save_csv(tmp_path / "y.csv", [[2019, 2020], *whole]))) == 51


@pytest.mark.parametrize(
    ("header", "labeled"),
    [
        ("label,u,v", True),
        ("u,class,v", True),
        ("u,v,Target", True),
        ("u,v,y", True),
        ("y,u,v", False),
        ("u,x,y", False),
        ("u,v,w", False),
    ],
)
def test_the_column_of_labels_is_found_by_its_name(tmp_path, header, labeled):
    names = header.split(",")
    at = next((i for i, name in enumerate(names) if name.lower() in LABEL_NAMES), 2)
    x = RNG.normal(size=(50, 3))
    x[:, at] = np.arange(50) % 3
    rows = [[repr(v) if j != at else str(int(v)) for j, v in enumerate(row)] for row in x.tolist()]
    data = load(save_csv(tmp_path / "x.csv", [names, *rows]))
    assert (data.labels is not None) == labeled
    assert len(data.columns) == 3 - labeled
    assert labeled == any("taken as labels" in note for note in data.notes)
    x[:, at] += 0.5  # fractions are data, whatever they are called
    assert load(save_csv(tmp_path / "x.csv", [names, *x.tolist()])).labels is None


def test_columns_that_repeat_another_are_left_out_or_refused(tmp_path):
    x = RNG.normal(size=(50, 3))
    x[:, 2] = x[:, 0]
    data = load(save_csv(tmp_path / "x.csv", [["u", "v", "w"], *x.tolist()]))
    assert data.columns == ("u", "v")
    assert "column 'w' repeats column 'u', and is left out" in data.notes[0]
    np.save(tmp_path / "x.npy", x)
    with fails(r"column 2 \(from 0\) repeats column 0 \(from 0\), where a density is infinite"):
        load(tmp_path / "x.npy")
    with fails("several columns are called 'u': give each a name of its own"):
        load(save_csv(tmp_path / "x.csv", [["u", "u", "v"], *x.tolist()]))


def read(tmp_path, header, rows, **how):
    """The summary of a table that is written and read."""
    data = load(save_csv(tmp_path / "x.csv", [header.split(","), *rows]), **how)
    return [line for line in summary(data) if line.startswith("warning")]


@pytest.mark.parametrize("code", [-999, 9999, -1e30, 99.99])
@pytest.mark.parametrize("kind", [None, "infer"])
def test_codes_of_missing_values_cause_a_warning(tmp_path, code, kind):
    x = RNG.normal(size=(200, 2)).round(3)
    assert read(tmp_path, "a,b", x.tolist(), schema=kind) == []
    x[::40, 1] = code
    (warning,) = read(tmp_path, "a,b", x.tolist(), schema=kind)
    assert f"stand for missing ones: column 'b' ({code:g} in " in warning
    x[::40, 1] = 4 * np.sign(code)
    assert read(tmp_path, "a,b", x.tolist(), schema=kind) == []


def test_a_row_of_totals_causes_a_warning(tmp_path):
    x = RNG.normal(3, size=(40, 2)).round(3).tolist()
    (warning,) = read(tmp_path, "a,b", [*x, np.sum(x, 0).tolist()], schema="infer")
    assert "the last row is the sum of all others" in warning


def test_columns_that_follow_from_others_cause_a_warning(tmp_path):
    a, b, c = RNG.normal(50, 9, size=(3, 200)).round(2)
    assert read(tmp_path, "a,b,c", np.column_stack([a, b, c]).tolist()) == []
    rows = np.column_stack([a, (a / 2.54).round(5), b, c, (a - c).round(2)]).tolist()
    (warning,) = read(tmp_path, "cm,inch,b,c,rest", rows)
    assert "'inch' from column 'cm'" in warning
    assert "'rest' from column 'cm', column 'c'" in warning


def test_rows_that_are_images_cause_a_warning():
    levels = RNG.integers(0, 256, (60, 3 * 64))
    levels[0, 0] = 255
    for x, looks in ((levels, True), (levels / 255, True), (levels + 0.5, False)):
        lines = summary(Dataset(x.astype(np.float32)))
        assert any("images of 8 x 8" in line for line in lines) == looks


def test_names_that_differ_in_case_cause_a_warning(tmp_path):
    rows = [[v, ["Yes", "yes", "no"][i % 3]] for i, v in enumerate(RNG.normal(size=60).tolist())]
    (warning,) = read(tmp_path, "a,label", rows)
    assert "classes differ in case or spaces only: 'Yes' and 'yes'" in warning
    (warning,) = read(tmp_path, "a,paid", rows, schema="infer")
    assert "levels of column 'paid' differ in case or spaces only: 'Yes' and 'yes'" in warning


# One fault per run -------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_first_twenty_bad_images_are_named(tmp_path, monkeypatch, in_memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = save(tmp_path / "d", "{i}.png", n=30)
    for i in range(10, 20):
        (root / f"{i}.png").write_bytes(b"")
    for i in range(20, 25):
        (root / f"{i}.png").write_text("<!DOCTYPE html><p>404")
    for i in range(25, 30):
        (root / f"{i}.png").write_bytes((root / f"{i}.png").read_bytes()[:70])
    reasons = ["empty: remove"] * 10 + ["a web page"] * 5 + ["not a readable image"] * 5
    faults = [f"{i}.png is {reason}" for i, reason in enumerate(reasons, 10)]
    with fails("20 of 30 images cannot be used", *faults):
        load(root, in_memory=in_memory)
    (root / "9.png").write_text("x")
    with fails("21 of 30 images cannot be used", *faults, "and 1 more"):
        load(root, in_memory=in_memory)
    data = load(root, in_memory=in_memory, skip_bad=True)
    assert (len(data), len(data.skipped)) == (9, 21)


def test_images_of_other_sizes_and_damaged_ones_are_named_at_once(tmp_path):
    root = save(tmp_path / "d", "{i}.png", n=4)
    save_image(root / "large.png", RNG.integers(0, 256, (3, 64, 64), np.uint8))
    (root / "cut.png").write_bytes((root / "large.png").read_bytes()[:4000])
    (root / "link.png").symlink_to("nothing.png")
    with pytest.raises(DataError) as error:
        load(root)
    for part in (
        "4 of 8 x 8 (such as 0.png), 2 of 64 x 64",
        "pass --size N",
        "2 of 7 images cannot be used",
        "cut.png is not a readable image",
        "link.png is a link to a file that does not exist",
    ):
        assert part in str(error.value)


def test_all_rows_that_are_not_finite_are_named_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = RNG.normal(size=(200, 5))
    clean = x.copy()
    x[7, 2], x[11, 0], x[20, 1] = np.nan, np.inf, 1e39
    np.save(tmp_path / "x.npy", x)
    with np.errstate(over="ignore"):
        np.save(tmp_path / "y.npy", x.astype(np.float32))
    faults = [
        r"row 7 \(from 0\), column 2 .*is nan",
        r"row 11 \(from 0\), column 0 .*is inf",
        r"row 20 \(from 0\), column 1 .*is (1e.39, too large|infinite)",
    ]
    kept = np.setdiff1d(np.arange(200), [7, 11, 20])
    for name in ("x.npy", "y.npy"):
        for in_memory in (None, False):
            with fails("3 of 200 rows cannot be used", *faults):
                load(tmp_path / name, in_memory=in_memory)
            data = load(tmp_path / name, in_memory=in_memory, skip_bad=True)
            np.testing.assert_array_equal(data.x, clean[kept].astype(np.float32))
            assert data.ids == tuple(map(str, kept))
            assert len(data.skipped) == 3
            assert sum(len(data.split(p)) for p in ("train", "validation", "held-out")) == 197


def test_all_cells_that_are_not_numbers_are_named_or_left_out(tmp_path):
    text = "a,b,label\n1.5,2,x\n,3,y\n4,five,x\n6,7\n8,2019-01-01,y\n9,10,\n11,12%,x\n13,14,y\n"
    (tmp_path / "x.csv").write_text(text)
    faults = [
        "line 5 has 2 cells and the first line 3: make them equal",
        "line 3, column 'a' is missing",
        "line 4, column 'b' is 'five', not a number",
        "line 6, column 'b' is '2019-01-01', a date or time",
        "line 7, column 'label' is missing",
        "line 8, column 'b' is '12%', with a unit",
    ]
    with fails("6 of 8 rows cannot be used; repair them, or pass --skip-bad", *faults):
        load(tmp_path / "x.csv")
    data = load(tmp_path / "x.csv", skip_bad=True)
    assert data.x.tolist() == [[1.5, 2], [13, 14]]
    assert data.ids == ("line 2", "line 9")
    assert len(data.skipped) == 6


def test_points_among_decimal_commas_are_named_or_left_out(tmp_path):
    lines = [f"{i},5;{i * i}" for i in range(9)]
    (tmp_path / "x.csv").write_text("\n".join(["a;b", *lines, "9,5;2.25", "10,5;inf"]))
    faults = "line 11, column 'b' is '2.25', not a number", "line 12, column 'b' is 'inf'"
    with fails("2 of 11 rows cannot be used", *faults):
        load(tmp_path / "x.csv")
    data = load(tmp_path / "x.csv", skip_bad=True)
    assert data.x.tolist() == [[i + 0.5, i * i] for i in range(9)]


def test_every_row_that_is_left_out_is_named(tmp_path):
    lines = [f"{i},{'x' if i % 2 else i * i}" for i in range(2400)]
    (tmp_path / "x.csv").write_text("\n".join(["a,b", *lines]))
    data = load(tmp_path / "x.csv", skip_bad=True)
    assert len(data) == len(data.skipped) == 1200
    assert "left out: 1200 that cannot be used" in summary(data)


def test_images_that_are_not_finite_are_named_or_left_out(tmp_path):
    x = np.rint(255 * RNG.random((40, 1, 8, 8))) / 255
    x[3, 0, 1, 1] = np.nan
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 3)
    with fails(r"image 3 \(from 0\) has values that are not finite: .*; or pass --skip-bad"):
        load(tmp_path / "x.npz")
    data = load(tmp_path / "x.npz", skip_bad=True)
    assert data.labels is not None
    assert data.labels.tolist() == [i % 3 for i in range(40) if i != 3]
    assert data.ids == tuple(str(i) for i in range(40) if i != 3)


def test_all_columns_of_text_are_named(tmp_path):
    rows = [[f"2019-06-{i % 28 + 1:02}", ["red", "green"][i % 2], i / 3, 7] for i in range(40)]
    path = save_csv(tmp_path / "x.csv", [["day", "hue", "v", "site"], *rows])
    with fails(
        "3 columns cannot be used",
        "column 'day' holds dates or times, such as '2019-06-01': read .* convert it",
        "column 'hue' holds text, such as 'red': read .* name it 'label' .*--given hue",
        r"column 'site' is constant \(7\): drop it",
    ):
        load(path)


# The right refusal, and the right advice ---------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((4, 1, 8, 16, 16), np.uint8),
            r"shape \(4, 1, 8, 16, 16\), like volumes or videos",
        ),
        (
            np.zeros((4, 8, 16, 16), np.uint8),
            r"for volumes, give the slices, x.reshape\(32, 1, 16",
        ),
        (np.cumsum(RNG.random((9, 50, 10)), 1) / 99, r"series .*are a table.*x.reshape\(len\(x\)"),
        (RNG.random((9, 16, 16)) * 1.02, r"overshoot 0..1, clip and round: .*x.clip\(0, 1\)"),
        (RNG.random((9, 16, 16)), r"for images, round: np.rint\(255 \* x\)"),
        (RNG.random((9, 16, 16)) * 254 + 0.5, r"for images, round: np.rint\(x\).astype\(np.uint8"),
        (RNG.normal(size=50), r"a table of one column is x\[:, None\]"),
    ],
)
def test_arrays_are_refused_with_their_cause(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with fails(message):
        load(tmp_path / "x.npy")


X = np.round(np.random.default_rng(4).normal(20, 5, (80, 2)), 2)
WRITTEN = {
    "points": (";", lambda v: f"{v:.2f}", "utf-8"),
    "decimal commas": (";", lambda v: f"{v:.2f}".replace(".", ","), "utf-8"),
    "quoted decimal commas": (",", lambda v: f'"{v:.2f}"'.replace(".", ","), "utf-8"),
    "tabs": ("\t", lambda v: f"{v:.2f}", "utf-8"),
    "spaces": ("  ", lambda v: f"{v:.2f}", "utf-8"),
    "bars": ("|", lambda v: f"{v:.2f}", "utf-8"),
    "a mark of order": (",", lambda v: f"{v:.2f}", "utf-8-sig"),
    "latin-1": (",", lambda v: f"{v:.2f}", "latin-1"),
    "utf-16": ("\t", lambda v: f"{v:.2f}", "utf-16"),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_however_they_are_written(tmp_path, how, header, end):
    separator, number, encoding = WRITTEN[how]
    rows = [separator.join(map(number, row)) for row in X.tolist()]
    first = [separator.join(["Größe", "Länge"])] if header else []
    text = end.join(["# made by a logger", "", *first, *rows, ""])
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    data = load(tmp_path / "x.csv")
    np.testing.assert_array_equal(data.x, X.astype(np.float32))
    assert data.columns == (("Größe", "Länge") if header else ())
    assert any("line 1 is a comment, and is left out" in note for note in data.notes)
    assert ("commas" in how) == any("decimal commas" in note for note in data.notes)
    if header:
        assert (how == "latin-1") == any("read as Windows-1252" in note for note in data.notes)


def test_groups_of_digits(tmp_path):
    for separator, cells in ((",", "{:,.2f}"), (";", "{:,.2f}")):
        rows = [f'"{cells.format(a * 1e6)}"{separator}{b}' for a, b in X.tolist()]
        (tmp_path / "x.csv").write_text("\n".join([f"T{separator}U", *rows]))
        expected = np.column_stack([np.round(X[:, 0] * 1e6, 2), X[:, 1]])
        np.testing.assert_array_equal(load(tmp_path / "x.csv").x, expected.astype(np.float32))
    (tmp_path / "x.csv").write_text("T;U\n1.234,5;2\n99,5;1.000\n3,25;1\n")
    assert load(tmp_path / "x.csv").x.tolist() == [[1234.5, 2], [99.5, 1000], [3.25, 1]]
    (tmp_path / "x.csv").write_text("T;U\n1,234;2\n3,456;1\n")
    doubt = "and '1,234' may be 1234 or 1.234: write numbers with decimal points"
    with fails(
        "2 of 2 rows cannot be used",
        f"line 2, column 'T' is '1,234', {doubt}",
        f"line 3, column 'T' is '3,456', {doubt}",
    ):
        load(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("T;U\n1,5;2\n3.5;1\n2,5;7\n")
    with fails("line 3, column 'T' is '3.5', not a number"):
        load(tmp_path / "x.csv")


def written(line, header="a,b,c", end="\n"):
    """A table of 40 rows, whose lines `line` makes of two numbers and the number of the row."""
    rows = [line(*row, i) for i, row in enumerate(X[:40].tolist())]
    return end.join([header, *rows]) + end


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (written("{:.2f},{:.2f},{}".format, "Station 7\nof 2019\n\na,b,c"), "2 lines are left"),
        (written("{:.2f};{:.2f};{}".format, "by;me\na;b;c"), "1 line is left out before"),
        (written(lambda a, b, i: f'"{i + 1}" {a} {b} {i}', '"a" "b" "c"'), "taken as names of"),
        (written("{},{},{},".format), "column 4, which has no name, is empty"),
        (written("{},{},{}\n,,".format), "40 lines have only empty cells: left out"),
    ],
)  # fmt: skip
def test_lines_around_a_table_are_left_out(tmp_path, text, note):
    (tmp_path / "x.csv").write_text(text)
    for kind in (None, "infer"):
        data = load(tmp_path / "x.csv", schema=kind)
        assert data.columns == ("a", "b", "c")
        np.testing.assert_allclose(data.x[:, :2], X[:40], rtol=1e-6)
        assert data.x[:, 2].tolist() == list(range(40))
        assert any(note in text for text in data.notes) or kind


@pytest.mark.parametrize(
    ("cell", "value"),
    [("−{0}", -1), ("{1}'{2}.5", 1), ("{1} {2},5", 1), ("{1}\u202f{2},5", 1), ("{1} {2}", 1)],
)
def test_signs_between_digits_are_read(tmp_path, cell, value):
    whole = [1000 + 7 * i for i in range(40)]
    rows = [cell.format(w, w // 1000, f"{w % 1000:03}") + f";{i}" for i, w in enumerate(whole)]
    (tmp_path / "x.csv").write_text("\n".join(["a;b", *rows]))
    data = load(tmp_path / "x.csv")
    expected = value * (np.array(whole) + (0.5 if "5" in cell else 0))
    np.testing.assert_array_equal(data.x[:, 0], expected.astype(np.float32))
    assert any("are read as such" in note for note in data.notes)


@pytest.mark.parametrize(
    "cell",
    [
        "{0}%",
        "{0} kg",
        "${0}",
        "({0})",
        "{0}D+02",
        "{0}-",
        "{0}°N",
        "05h12m{0}s",
        "USD {0}",
        "€{0}",
        "{0}±0.5",
    ],
)
@pytest.mark.parametrize("kind", [None, "infer"])
def test_numbers_with_units_are_no_names_of_rows(tmp_path, cell, kind):
    rows = [f"{cell.format(f'{100 + i / 8:.3f}')},{b}" for i, (_, b) in enumerate(X.tolist())]
    (tmp_path / "x.csv").write_text("\n".join(["a,b", *rows]))
    shown = re.escape(repr(cell.format("100.000")))
    with fails(f"column 'a' holds numbers with units or signs, such as {shown}: write plain"):
        load(tmp_path / "x.csv", schema=kind)
    for name in ("S-{0}", "p{0}", "{0}_7", "a-{0}.5.png", "10.0.0.{0}", "1.{0}.7"):
        rows = [f"{name.format(i)},{b}" for i, (_, b) in enumerate(X.tolist())]
        (tmp_path / "x.csv").write_text("\n".join(["a,b", *rows]))
        assert load(tmp_path / "x.csv", schema=kind).columns == ("b",)


def test_lists_are_no_names_of_rows(tmp_path):
    rows = [f'"[{a}, {b}]",{b}' for a, b in X.tolist()]
    (tmp_path / "x.csv").write_text("\n".join(["a,b", *rows]))
    for kind in (None, "infer"):
        with fails(r"column 'a' holds text that looks like lists, such as '\[16.74, 19.13\]'"):
            load(tmp_path / "x.csv", schema=kind)


def test_codes_are_not_read_as_numbers_in_silence(tmp_path):
    (tmp_path / "x.csv").write_text(written("{2:05},{0},{1}".format, "zip,a,b"))
    assert any(
        "'zip' is text, such as '00000', and is read as" in n
        for n in load(tmp_path / "x.csv").notes
    )
    (tmp_path / "x.csv").write_text(written("{2}_1,{0},{1}".format, "plate,a,b"))
    assert load(tmp_path / "x.csv").columns == ("a", "b")  # 12_1 is not 121


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (written("{},{},{}".format, "g,h,h2\na,b,c"), "line 2 holds words where .* remove it"),
        (written("{},{},{}".format, "a,b,c\nm,kg,s"), "line 2 holds words where .* remove it"),
        (written("{},{},{}".format, "a,b"), "the first line has 2 cells and all others 3: give"),
        (written(lambda a, b, i: f'{a},{b},{chr(34) * (i == 20)}x{i % 3}', "a,b,label"),
         'line 22 opens a quotation mark (") that is never closed: close it'),
        ("<!DOCTYPE html><p>404", "is a web page or XML: fetch it again"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
        ('[{"a": 1, "b": 2}]', "is JSON: write the table as .csv"),
        ("PK\3\4 rest", "is a zip archive or an Excel workbook: unpack it"),
        ("\1\2\3\4" * 99, "is no text: give a table of text"),
        (written(lambda a, b, i: f"{a},{b if i else 'x' * 99},{i}"), "is 'x{40}...', not a"),
    ],
)  # fmt: skip
def test_causes_of_tables_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with fails(message.replace("(", r"\(").replace(")", r"\)")):
        load(tmp_path / "x.csv")


def test_utf_16_is_recognized_without_its_mark(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "x.csv").write_bytes(written("{},{},{}".format, "ä,b,c").encode(encoding))
        assert load(tmp_path / "x.csv").columns == ("ä", "b", "c")


def test_dates_of_several_formats_are_no_categories(tmp_path):
    days = [f"2019-06-{i + 1:02}" if i % 2 else f"{i + 1:02}.06.2019" for i in range(28)]
    rows = [f"{days[i % 28]},{a}" for i, (a, _) in enumerate(X.tolist())]
    (tmp_path / "x.csv").write_text("\n".join(["day,a", *rows]))
    with fails("'day' holds dates or times in no format .* such as '01.06.2019' and '2019-06-02'"):
        load(tmp_path / "x.csv", schema="infer")


def test_an_empty_column_at_the_end_is_left_out(tmp_path):
    (tmp_path / "x.csv").write_text("T,U,\n" + "".join(f"{a},{b},\n" for a, b in X.tolist()))
    data = load(tmp_path / "x.csv")
    assert data.columns == ("T", "U")
    assert "column 3, which has no name, is empty, and is left out" in data.notes[0]


# Scoring is not stricter than training -----------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_gray_images_are_read_for_a_model_of_color(tmp_path, monkeypatch, in_memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_folder(tmp_path / "gray", GRAY)
    np.save(tmp_path / "gray.npy", GRAY)
    for source in (folder, tmp_path / "gray.npy"):
        data = load(source, channels=3, in_memory=in_memory)
        np.testing.assert_array_equal(data.x, np.repeat(GRAY, 3, 1))
        assert data.split("train").shape == (3, 9, 7)
        assert "gray images are made RGB, as the model's are" in data.notes[-1]
    mixed = save_folder(tmp_path / "mixed", GRAY)
    save_image(mixed / "z.png", COLOR[0])  # as in training on a folder with both
    np.testing.assert_array_equal(load(mixed).x[:6], np.repeat(GRAY, 3, 1))


def test_the_folder_of_a_single_class_is_that_class(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for pattern in ("new/dog/{i}.png", "down/images/dog/{i}.png"):
        root = save(tmp_path, pattern) / pattern.partition("/")[0]
        for in_memory in (True, False, False):
            data = load(root, given="label", allow_constant=True, in_memory=in_memory)
            assert data.label_names == ("dog",)
            assert data.labels is not None
            assert data.labels.tolist() == [0] * 6
            assert load(root, in_memory=in_memory).labels is None
        with fails("it has no labels: put images into a folder for each class"):
            load(root, given="label")  # one class is no context to train on


def test_other_units_are_noticed_when_a_model_is_used(tmp_path, capsys):
    x = RNG.normal([50, 3], [9, 1], (60, 2))
    path = save_csv(tmp_path / "x.csv", [["age", "dose"], *x.tolist()])
    main(["train", "mlp_vae", str(path), "--steps", "1", "--out", str(tmp_path / "m")])
    for factor in (1, 1000):
        save_csv(path.with_name("y.csv"), [*(x[:9] * [1, factor]).tolist()])
        words = ["score", tmp_path / "m", tmp_path / "y.csv", "--out", tmp_path / "s.csv"]
        main([*map(str, words)])
        said = capsys.readouterr().err
        assert "columns have no names, and are taken in this order: age, dose" in said
        assert ("column 'dose': most values are about" in said) == (factor > 1)
        assert "'age': most" not in said


def test_columns_are_matched_by_name(tmp_path):
    rows = [
        [f"r{i}", *map(repr, row), i % 2]
        for i, row in enumerate(RNG.normal(size=(30, 3)).tolist())
    ]
    path = save_csv(tmp_path / "x.csv", [["name", "c", "a", "b", "label"], *rows])
    data = load(path, columns=("a", "b"))
    assert data.columns == ("a", "b")
    np.testing.assert_array_equal(data.x, np.array([r[2:4] for r in rows], np.float32))
    assert data.labels is not None
    assert any("columns that the model does not know are left out: 'c'" in n for n in data.notes)
    with fails("x.csv: has no column 'size', 'w', which the model needs: its columns are name, c"):
        load(path, columns=("a", "size", "w"))
    one = save_csv(tmp_path / "one.csv", [["a", "b"], [1.0, 2.0]])
    assert load(one, columns=("b", "a"), allow_constant=True).x.tolist() == [[2, 1]]
    bare = save_csv(tmp_path / "bare.csv", [[1.0, 2.0], [3.0, 5.0]])
    assert load(bare, columns=("a", "b"), allow_constant=True).x.tolist() == [[1, 2], [3, 5]]
    with fails("bare.csv: has 2 columns without names, and the model needs 3: a, b, c"):
        load(bare, columns=("a", "b", "c"))


# Classes -----------------------------------------------------------------------------------------


def test_a_class_is_chosen_by_name_and_its_samples_look_like_it(tmp_path):
    brightness = {f"{c}": 18 * c for c in (2, 5, 7, 10, 12)}  # as text, 10 comes before 2
    for name, level in brightness.items():
        for i in range(1 if name == "7" else 25):
            image = RNG.integers(level, level + 20, (1, 8, 8)).astype(np.uint8)
            save_image(tmp_path / "photos" / name / f"{i}.png", image)
    data = load(tmp_path / "photos", given=["label"])
    assert data.label_names == ("10", "12", "2", "5", "7")
    torch.manual_seed(0)
    model = build("vae", data.spec(["label"]), net="mlp", width=64, latents=4, components=2)
    config = TrainConfig(steps=300, batch_size=32, lr=0.01, evaluations=1)
    fit(model, data.split("train"), data.split("validation"), config, tmp_path / "run")
    model = musigma.load(tmp_path / "run" / "model.safetensors")
    for name in ("10", "2", "12"):
        context = torch.eye(5)[[data.label_names.index(name)] * 64]
        samples = model.sample(64, context).double()
        assert float(samples.mean()) == pytest.approx(brightness[name] + 9.5, abs=8)


def test_the_prior_of_a_conditional_vae_depends_on_its_context():
    options = {"bits": None, "latents": 3, "width": 8}
    for kind, moves in {"auto": True, "conditional": True, "flow": True, "normal": False}.items():
        model = randomized(build("vae", (5,), prior=kind, context=2, **options), scale=0.5)
        prior = model.prior.as_distribution(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double())
        scores = prior.log_prob(torch.ones(2, 3).double()).detach()
        assert (abs(float(scores[0] - scores[1])) > 1e-3) == moves
    check_model(build("vae", (5,), context=2, **options), (5,), context=2)
    with pytest.raises(ValueError, match="prior: 'conditional' needs a context"):
        build("vae", (5,), prior="conditional", **options)


def test_an_npy_file_of_two_arrays_is_refused(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 3))
    with (tmp_path / "two.npy").open("wb") as file:
        np.save(file, rows)
        np.save(file, rows[:, 0])
    with pytest.raises(DataError, match=r"two\.npy: bytes follow its array of shape \(20, 3\)"):
        musigma.data.load(tmp_path / "two.npy")
