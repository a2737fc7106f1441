"""Data beyond memory: the same examples as in memory, from disk, shards, tables and URLs."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from musigma.data import Dataset, Preprocess, cache, digest, identity, load, raw, readers
from musigma.data.readers import LazyImages
from test_data import fails, pack, save_folder, save_image

RNG = np.random.default_rng(11)
GRAY = RNG.integers(0, 256, (9, 1, 6, 8), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (9, 3, 6, 8), dtype=np.uint8)
PARTS = ("train", "validation", "held-out")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path / "cache" / "musigma"


def same(one: Dataset, two: Dataset) -> None:
    """Two data sets give the same results for every query."""
    assert (one.shape, one.bits, one.ids, one.label_names) == (
        *(two.shape, two.bits, two.ids, two.label_names),
    )
    np.testing.assert_array_equal(one.x, two.x, strict=True)
    for name in ("labels", "official_test"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        assert a is None or a.tolist() == b.tolist()
    assert one.skipped == two.skipped
    assert digest(one) == digest(two)
    for part in PARTS:
        assert one.split(part).ids == two.split(part).ids
        np.testing.assert_array_equal(one.split(part).x, two.split(part).x)


def tar(path: Path, files: dict[str, bytes], kind: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def png(example: np.ndarray) -> bytes:
    file = io.BytesIO()
    pixels = example[0] if len(example) == 1 else np.moveaxis(example, 0, -1)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def count_decoded(monkeypatch) -> list[int]:
    """A list to which an entry is added whenever an image is decoded from its place."""
    seen: list[int] = []
    decode = LazyImages.decode

    def counted(self, row):
        seen.append(row)
        return decode(self, row)

    monkeypatch.setattr(LazyImages, "decode", counted)
    return seen


# Images on disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "deflated", "shards", "pattern"])
@pytest.mark.parametrize("size", [None, 4, (4, 5)])
def test_images_on_disk_are_those_in_memory(tmp_path, kind, size):
    folder = save_folder(tmp_path / "images" / "train", COLOR[:6], "{k}/{i}.png")
    save_folder(tmp_path / "images" / "test", COLOR[6:], "{k}/{i}.png")
    save_image(folder / "b" / "gray.png", GRAY[0])
    folder, source = folder.parent, folder.parent
    if kind in ("tar", "zip"):
        source = pack(folder, tmp_path / f"x.{kind}")
    elif kind == "deflated":
        source = tmp_path / "x.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, file.relative_to(folder))
    elif kind in ("shards", "pattern"):
        files = sorted(folder.rglob("*.png"))
        for i in range(3):
            inner = {str(f.relative_to(folder)): f.read_bytes() for f in files[i::3]}
            tar(tmp_path / "shards" / f"s-{i:02}.tar", inner)
        source = tmp_path / "shards" if kind == "shards" else tmp_path / "shards/s-{00..02}.tar"
    treat = Preprocess(size=size, bits=3)
    there = load(source, preprocess=treat, in_memory=False)
    here = load(source, preprocess=treat, in_memory=True)
    assert isinstance(there.array, LazyImages)
    assert isinstance(here.array, np.ndarray)
    assert there.shape == (3, *(treat.pixels or (6, 8)))
    assert there.label_names == ("a", "b")
    assert there.official_test is not None
    assert there.official_test.sum() == 3
    same(there, here)
    same(load(source, preprocess=treat, in_memory=False), here)  # by the index that is there now
    np.testing.assert_array_equal(np.asarray(there.array), here.array)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_it_is_indexed_like_an_array(data):
    folder = Path(os.environ["XDG_CACHE_HOME"]).parent / "few"
    if not folder.exists():
        save_folder(folder, GRAY)
    images = load(folder, in_memory=False).array
    n = len(GRAY)
    key = data.draw(
        st.one_of(
            st.integers(-n, n - 1),
            st.slices(n),
            st.lists(st.integers(-n, n - 1), max_size=5).map(lambda v: np.array(v, np.int64)),
            st.lists(st.booleans(), min_size=n, max_size=n).map(lambda v: np.array(v, bool)),
        )
    )
    np.testing.assert_array_equal(images[key], GRAY[key], strict=True)
    for wrong in (n, -n - 1, np.array([0, n]), np.array([True]), 0.5, "a"):
        with pytest.raises(IndexError):
            images[wrong]


def test_what_fits_is_read_into_memory(tmp_path, monkeypatch, home):
    folder = save_folder(tmp_path / "images", GRAY)
    assert isinstance(load(folder).array, np.ndarray)
    assert not home.exists()  # and nothing is kept of it
    assert isinstance(load(folder, in_memory=False).array, LazyImages)
    assert isinstance(load(folder).array, np.ndarray)  # whether there is an index or not
    for limit, kind in ((GRAY.nbytes, np.ndarray), (GRAY.nbytes - 1, LazyImages)):
        monkeypatch.setattr(raw, "memory_limit", lambda limit=limit: limit)
        assert isinstance(load(folder).array, kind)


def test_memory_is_shared_by_the_processes_of_a_machine(tmp_path, monkeypatch):
    alone = raw.memory_limit()
    assert 1 << 20 < alone <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert raw.memory_limit() == alone // 4
    (tmp_path / "max").write_text("4000000\n")
    monkeypatch.setattr(raw, "CGROUP", (tmp_path / "none", tmp_path / "max"))
    assert raw.memory_limit() == 250_000
    (tmp_path / "max").write_text("max\n")
    assert raw.memory_limit() == alone // 4


def test_an_index_is_made_once_and_again_for_what_changed(tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "images", GRAY)
    seen = count_decoded(monkeypatch)
    calls = []
    load(folder, in_memory=False, progress=lambda *done: calls.append(done))
    assert calls == [(i, 9) for i in range(1, 10)]
    assert len(seen) == 9
    seen.clear()
    for part in PARTS:  # nothing is decoded to split, or to know the data again
        digest(load(folder, in_memory=False).split(part))
    assert not seen
    save_image(folder / "2.png", GRAY[3])
    save_image(folder / "new.png", GRAY[4])
    (folder / "7.png").unlink()
    same(load(folder, in_memory=False), load(folder, in_memory=True))
    assert sorted(set(seen[:2])) == [2, 8]  # the two that are new
    seen.clear()
    save_image(folder / "color.png", COLOR[0])  # the others mean something else now
    load(folder, in_memory=False)
    assert len(seen) == 10


@pytest.mark.parametrize("harm", ["empty", "truncated", "flipped", "foreign", "pickle", "text"])
def test_an_invalid_index_is_not_used(tmp_path, home, harm, monkeypatch):
    folder, other = (save_folder(tmp_path / n, x) for n, x in (("x", GRAY), ("y", GRAY[::-1])))
    expected = load(folder, in_memory=True)
    load(folder, in_memory=False)
    (index,) = (home / "index").glob("*.npz")
    whole = index.read_bytes()
    if harm == "foreign":
        load(other, in_memory=False)
        (foreign,) = set((home / "index").glob("*.npz")) - {index}
        shutil.copy(foreign, index)
    elif harm == "pickle":
        np.savez(index, header=np.array([{}], object))
    else:
        middle = whole.index(GRAY_HASH := int(expected.content()[4]).to_bytes(8, "little"))
        index.write_bytes(
            {
                "empty": b"",
                "truncated": whole[: len(whole) // 2],
                "flipped": whole.replace(GRAY_HASH, bytes(8)),
                "text": b"PK" + b"x" * 400,
            }[harm]
        )
        assert middle
    seen = count_decoded(monkeypatch)
    same(load(folder, in_memory=False), expected)
    assert len(seen) > 9
    assert index.stat().st_size == len(whole)  # and a good one is there again


def test_files_that_changed_since_are_named(tmp_path):
    folder = save_folder(tmp_path / "images", GRAY)
    data = load(folder, in_memory=False)
    (folder / "3.png").unlink()
    save_image(folder / "5.png", GRAY[5, :, :4])
    data.take([0, 1, 2, 4])
    for row, name in ((3, "3.png"), (5, "5.png")):
        with fails(f"images: {name} has changed .*run the command again"):
            data.take([row])
    archive = tar(tmp_path / "x.tar", {f"{i}.png": png(x) for i, x in enumerate(GRAY)})
    data = load(archive, in_memory=False)
    with archive.open("ab") as file:
        file.write(b"more")
    with fails("x.tar: 0.png has changed .*size or date"):
        data.take([0])
    with fails("x.tar: is damaged.*more follows its end"):
        load(archive, in_memory=False)


def test_results_are_kept_when_indexing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("musigma.data.readers.image_sets.WORTH_STORING", 3)
    folder = save_folder(tmp_path / "images", GRAY)
    whole = (folder / "6.png").read_bytes()
    (folder / "6.png").write_bytes(whole[:70])
    seen = count_decoded(monkeypatch)
    with fails("6.png is not a readable image"):
        load(folder, in_memory=False)
    (folder / "6.png").write_bytes(whole)
    seen.clear()
    assert len(load(folder, in_memory=False)) == 9
    assert seen == [6]


def test_an_index_that_was_interrupted_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("musigma.data.readers.image_sets.WORTH_STORING", 3)
    folder = save_folder(tmp_path / "images", GRAY)

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, in_memory=False, progress=stop)
    seen = count_decoded(monkeypatch)
    assert len(load(folder, in_memory=False)) == 9
    assert seen == [6, 7, 8]


@pytest.mark.parametrize("in_memory", [True, False])
def test_unusable_images_are_skipped_and_named(tmp_path, in_memory):
    folder = save_folder(tmp_path / "images", COLOR, "{k}/{i}.png")
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 900
    Image.fromarray(deep).save(folder / "a" / "deep.png")
    Image.new("RGBA", (8, 6), (10, 20, 30, 128)).save(folder / "b" / "clear.png")
    (folder / "a" / "half.png").write_bytes((folder / "a" / "0.png").read_bytes()[:80])
    (folder / "b" / "none.png").symlink_to("nowhere.png")
    bad = ("a/deep.png", "a/half.png", "b/clear.png", "b/none.png")
    faults = [
        "deep.png has 16-bit",
        "half.png is not",
        "clear.png has transp",
        "none.png is a link",
    ]
    with fails("4 of 13 images cannot be used", *faults):
        load(folder, in_memory=in_memory)
    for _ in range(2):
        data = load(folder, in_memory=in_memory, skip_bad=True)
        assert tuple(data.skipped) == bad
        assert len(data) == 9
        np.testing.assert_array_equal(data.x[:5], COLOR[::2])
    with fails("4 of 13 images", *faults):
        load(folder, in_memory=in_memory)
    for name in ("a/deep.png", "b/none.png"):
        (folder / name).unlink()
    with fails("2 of 11 images", *faults[1:3]):
        load(folder, in_memory=in_memory)


def test_names_of_all_kinds(tmp_path):
    folder = tmp_path / "images"
    names = ["a\nb.png", os.fsdecode(b"caf\xe9.png"), "ünï cödé.png", "it's {0..3}.png"]
    for i, name in enumerate(sorted(names)):
        save_image(folder / "x" / name, GRAY[i])
        save_image(folder / os.fsdecode(b"\xff") / name, GRAY[i + 4])
    (folder / "loop.png").symlink_to(folder)
    (folder / "x" / "self.png").symlink_to("self.png")
    with fails("x/self.png is not a readable image"):
        load(folder, in_memory=False)
    (folder / "x" / "self.png").unlink()
    data = load(folder, in_memory=False)
    same(data, load(folder))
    same(load(pack(folder, tmp_path / "x.tar"), in_memory=False), data)
    assert data.ids is not None
    assert data.ids[:2] == ("x/a\\nb.png", "x/caf\\xe9.png")
    assert data.label_names == ("\\xff", "x")
    json.dumps(data.ids).encode()
    np.testing.assert_array_equal(data.subset([0]).x, GRAY[:1])


def test_data_load_without_an_index_that_cannot_be_written(tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "images", GRAY)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load(folder, in_memory=False)
    assert isinstance(data.array, LazyImages)
    assert len(data.notes) == 1
    assert "file/musigma cannot be written (Not a directory)" in data.notes[0]
    same(data, load(folder, in_memory=True))
    np.save(tmp_path / "x.npy", RNG.normal(size=(50, 3)))
    with fails("x.npy: needs 0.0 GiB in the cache .*Not a directory.: make room.*XDG_CACHE_HOME"):
        load(tmp_path / "x.npy", in_memory=False)


def test_processes_that_index_at_once_agree(tmp_path, home):
    folder = save_folder(tmp_path / "images", RNG.integers(0, 256, (120, 3, 24, 24), np.uint8))
    code = (
        "import sys, musigma.data as d; x = d.load(sys.argv[1], in_memory=False);"
        "print(d.digest(x), len(x.split('train')), x.notes)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=60)[0] for process in running}
    here = load(folder, in_memory=True)
    assert said == {f"{digest(here)} {len(here.split('train'))} ()\n"}
    (index,) = (home / "index").glob("*.npz")
    assert cache.read(index) is not None
    assert {path.suffix for path in (home / "index").iterdir()} == {".npz", ".lock"}


# Shards --------------------------------------------------------------------------------------


def test_labels_beside_images(tmp_path):
    def load_shards(**files) -> Dataset:
        for i in range(2):
            inner = {}
            for j in range(4):
                inner[f"s{j}.png"] = png(GRAY[4 * i + j])
                for suffix, text in files.items():
                    if text[4 * i + j]:
                        inner[f"s{j}.{suffix}"] = text[4 * i + j].encode()
            tar(tmp_path / "shards" / f"{i}.tar", inner)
        both = [load(tmp_path / "shards", in_memory=in_memory) for in_memory in (True, False)]
        same(*both)
        return both[1]

    data = load_shards(cls=["3\n", "0", "1", "1"] * 2)
    assert data.labels is not None
    assert data.labels.tolist() == [3, 0, 1, 1] * 2
    assert data.label_names == tuple("0123")
    assert data.ids is not None
    assert data.ids[:2] == ("0.tar/s0.png", "0.tar/s1.png")
    words = [json.dumps({"label": word, "id": i}) for i, word in enumerate(["cat", "dog"] * 4)]
    data = load_shards(json=words, txt=["a photo"] * 8)
    assert data.label_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1] * 4
    assert load_shards(txt=["cat", "dog"] * 4).label_names == ("cat", "dog")
    assert load_shards(txt=[f"photo {i}" for i in range(8)]).labels is None  # captions
    assert load_shards(json=["[1]"] * 8).labels is None
    assert load_shards(cls=["--5", "-5"] * 4).label_names == ("--5", "-5")
    assert load_shards(cls=["-7", "-5"] * 4).label_names == ("-7", "-5")
    with fails(r"shards: 1.tar/s3.png has no label in a .cls file beside it"):
        load_shards(cls=["1", "0"] * 3 + ["1", ""])
    some = load(tmp_path / "shards", skip_bad=True, in_memory=False)
    assert list(some.skipped) == ["1.tar/s3.png"]
    assert len(some) == 7


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("json", b'{"cls": 1', "Expecting ',' delimiter"),
        ("json", b"", "Expecting value"),
        ("json", b"[" * 100_000, "recursion"),
        ("cls", b" \n", "it is empty"),
        ("cls", b"\xff", "can't decode byte"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, name, text, reason):
    good = {"json": b'{"cls": 1}', "cls": b"1"}[name]
    for broken in ((2, 3), range(4)):
        inner = {f"{i}.png": png(GRAY[i]) for i in range(4)}
        inner |= {f"{i}.{name}": text if i in broken else good for i in range(4)}
        archive = tar(tmp_path / "x.tar", inner)
        first = min(broken)
        says = [f"{i}.png has a label that cannot be read .{i}.{name}: .*{reason}" for i in broken]
        for in_memory in (True, False):
            with fails(f"{len(broken)} of 4 images" if first else "no image can be used", *says):
                load(archive, in_memory=in_memory)
            if first:
                some = load(archive, skip_bad=True, in_memory=in_memory)
                assert (list(some.skipped), len(some)) == (["2.png", "3.png"], 2)
    with fails("no image can be used", *says):
        load(archive, skip_bad=True)


def test_shards_of_parts_and_classes(tmp_path):
    for part, x in (("train", GRAY[:4]), ("val", GRAY[4:])):
        inner = {f"./{'ab'[i % 2]}/{i}.png": png(example) for i, example in enumerate(x)}
        tar(tmp_path / "set" / part / "00.tar", inner)
    data = load(tmp_path / "set", in_memory=False)
    assert data.label_names == ("a", "b")
    np.testing.assert_array_equal(np.sort(data.split("held-out").x, 0), np.sort(GRAY[4:], 0))
    with fails("9 of 10 files do not exist, such as .*01.tar: give a range"):
        load(tmp_path / "set" / "train" / "{00..09}.tar")
    with fails("matches 0 files"):
        load(tmp_path / "set" / "{9..3}.tar")


def test_compressed_shards_are_for_memory(tmp_path):
    inner = {f"{i}.png": png(x) for i, x in enumerate(GRAY)}
    archive = tar(tmp_path / "x.tar.gz", inner, "gz")
    np.testing.assert_array_equal(load(archive).x, GRAY)
    with fails("x.tar.gz: decodes to 0.0 GiB.*lies in a compressed archive.*gunzip"):
        load(archive, in_memory=False)
    os.rename(archive, tmp_path / "y.tar")  # whatever it is called
    with fails("y.tar: decodes .* compressed archive"):
        load(tmp_path / "y.tar", in_memory=False)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("0.png", inner["0.png"])
    with fails("x.zip: decodes .* compressed archive"):
        load(tmp_path / "x.zip", in_memory=False)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("harm", ["header", "zeros", "cut", "cut header", "pixels"])
def test_damage_in_the_middle_of_a_shard(tmp_path, in_memory, harm):
    big = RNG.integers(0, 256, (9, 3, 20, 20), np.uint8)
    for i in range(3):
        tar(tmp_path / f"{i}.tar", {f"{j}.png": png(big[3 * i + j]) for j in range(3)})
    content = bytearray((tmp_path / "1.tar").read_bytes())
    header = content.index(b"1.png")
    if harm == "header":
        content[header + 150] ^= 1  # its checksum
    elif harm == "zeros":
        content[header : header + 1024] = bytes(1024)
    elif harm == "pixels":
        content[header + 512 + 700] ^= 255
    else:
        del content[header + (900 if harm == "cut" else 200) :]
    (tmp_path / "1.tar").write_bytes(content)
    expected = "1.tar/1.png is not a readable image" if harm == "pixels" else "1.tar: is damaged"
    with fails(expected):
        load(tmp_path, in_memory=in_memory)
    if harm == "pixels":
        assert load(tmp_path, in_memory=in_memory, skip_bad=True).skipped == {"1.tar/1.png": ANY}
    else:
        with fails(expected):
            load(tmp_path, in_memory=in_memory, skip_bad=True)


@pytest.mark.parametrize("in_memory", [True, False])
def test_damage_in_a_zip(tmp_path, in_memory):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, example in enumerate(GRAY):
            archive.writestr(f"{i}.png", png(example))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(b"4.png") + 30] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    for skip_bad in (False, True):
        with fails("x.zip: is damaged"):
            load(tmp_path / "x.zip", in_memory=in_memory, skip_bad=skip_bad)


# Arrays and tables ---------------------------------------------------------------------------

WITHIN_250_MIB = """
import resource, sys
import numpy as np
import musigma.data as data

for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        had = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (had + (250 << 20),) * 2)
images = data.load(sys.argv[1], preprocess=data.Preprocess(bits=5))
table = data.load(sys.argv[2], allow_constant=True)
for x in images, table:
    parts = [x.split(part) for part in ("train", "validation", "held-out")]
    data.digest(x), data.digest(parts[0]), parts[1].take([5, 3])
    print(sum(map(len, parts)))
try:
    np.array(table.array)
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of that kind are Linux'")
@pytest.mark.slow
def test_arrays_of_gigabytes_never_come_into_memory_as_a_whole(tmp_path):
    files = tmp_path / "images.npy", tmp_path / "table.npy"  # sparse: some MB of the disk
    images = np.lib.format.open_memmap(files[0], "w+", np.uint8, (2000, 3, 600, 600))
    images[:, 0, 0, :2] = RNG.integers(0, 256, (2000, 2))
    table = np.lib.format.open_memmap(files[1], "w+", np.float32, (256, 1 << 20))
    table[:, 7] = np.arange(256)
    assert (images.nbytes + table.nbytes) >> 20 > 3000
    command = [sys.executable, "-c", WITHIN_250_MIB, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2000\n256\nthe limit holds\n"


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (GRAY.astype(np.int64), None),
        (GRAY[:, 0].astype(np.float64) / 255, None),
        (GRAY > 99, None),
        (np.moveaxis(COLOR, 1, -1), 4),
        (COLOR.astype(np.float32), (3, 5)),
        (RNG.normal(size=(700, 5)), None),
        (RNG.normal(size=(700, 5)).astype(np.float32), None),
    ],
)
def test_arrays_on_disk_are_those_in_memory(tmp_path, home, array, size, monkeypatch):
    np.save(tmp_path / "x.npy", array)
    treat = Preprocess(size=size)
    there = load(tmp_path / "x.npy", preprocess=treat, in_memory=False)
    here = load(tmp_path / "x.npy", preprocess=treat, in_memory=True)
    assert isinstance(there.array, np.memmap)
    assert not isinstance(here.array, np.memmap)
    same(there, here)
    made = {path: path.stat().st_mtime_ns for path in home.rglob("*.np?")}
    monkeypatch.setattr("musigma.data.cache.content_hashes", None)  # is not called again
    same(load(tmp_path / "x.npy", preprocess=treat, in_memory=False), here)
    assert made == {path: path.stat().st_mtime_ns for path in home.rglob("*.np?")}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent))
    np.save(tmp_path / "x.npy", array[::-1])
    changed = load(tmp_path / "x.npy", preprocess=treat, in_memory=False)
    np.testing.assert_array_equal(changed.x, here.x[::-1])


def test_a_flat_array_is_not_used_after_it_changed(tmp_path, home):
    x = RNG.normal(size=(60, 5))
    np.save(tmp_path / "x.npy", x)
    for harm in (lambda c: c[:-4], lambda c: c[:200] + bytes(40) + c[240:], lambda c: b""):
        load(tmp_path / "x.npy", in_memory=False)
        (flat,) = (home / "arrays").glob("[!.]*.npy")
        draft = flat.with_name(f".{flat.name}.1.tmp")
        draft.write_text("of a process that was killed")
        flat.write_bytes(harm(flat.read_bytes()))
        again = load(tmp_path / "x.npy", in_memory=False)
        np.testing.assert_array_equal(again.x, x.astype(np.float32))
        assert not draft.exists()


def save_parquet(path: Path, columns: dict, rows: int = 7) -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path, rows)
    return path


TABLE = RNG.normal(size=(40, 3))


@pytest.mark.parametrize(
    "last", [None, ["no", "yes"] * 20, [3, 1] * 20, [0.5, 1.0] * 20, ["1.5", "2"] * 20]
)
def test_parquet_beyond_memory(tmp_path, home, last):
    for start, stop in ((0, 15), (15, 40)):
        columns: dict = {name: TABLE[start:stop, i] for i, name in enumerate("abc")}
        if last:
            columns["label"] = last[start:stop]
        save_parquet(tmp_path / "parts" / f"{start:02}.parquet", columns)
    sources = [tmp_path / "parts", tmp_path / "parts" / "00.parquet"]
    for source, n in zip(sources, (40, 15), strict=True):
        here, there = (load(source, in_memory=in_memory) for in_memory in (True, False))
        assert isinstance(there.array, np.memmap)
        assert there.columns == here.columns
        same(there, here)
        same(load(source, in_memory=False), here)
        np.testing.assert_array_equal(here.x[:, :3], TABLE[:n].astype(np.float32))
        names = {("no", "yes"): 2, (3, 1): 4, (0.5, 1.0): 0, ("1.5", "2"): 0}
        assert len(here.label_names) == names.get(tuple(last[:2]) if last else (), 0)
    assert len(list((home / "arrays").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": [np.nan, *range(24)]}, r"row 15 \(from 0\), column 'b' is nan: fill or drop it"),
        (
            {"b": [1e39, *range(24)]},
            "column 'b' is infinite or too large.*: rescale, fill",
        ),
        ({"b": ["x"] * 25}, "column 'b' holds text, such as 'x'"),
        ({"d": [1.0] * 25}, "15.parquet: has the columns a, b, c, d, and 00.parquet has a, b, c"),
        (None, "15.parquet: is damaged"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, home, change, message):
    first = {name: TABLE[:15, i] for i, name in enumerate("abc")}
    save_parquet(tmp_path / "parts" / "00.parquet", first)
    second = {name: TABLE[15:, i] for i, name in enumerate("abc")} | (change or {})
    path = save_parquet(tmp_path / "parts" / "15.parquet", second)
    if change is None:
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes(100) + whole[300:])
    for in_memory in (True, False):
        with fails(message):
            load(tmp_path / "parts", in_memory=in_memory)
    if "fill" not in message:
        assert not list((home / "arrays").glob("*[!k]"))  # nothing but a lock
    constant = save_parquet(tmp_path / "c.parquet", first | {"c": [1.0] * 15})
    with fails("column 'c' is constant"):
        load(constant, in_memory=False)
    assert load(constant, in_memory=False, allow_constant=True).shape == (3,)
    save_parquet(tmp_path / "l.parquet", first | {"label": [None, *"ab" * 7]})
    with fails(
        r"row 0 \(from 0\), column 'label' is missing: fill or drop it; or pass --skip-bad"
    ):
        load(tmp_path / "l.parquet")


def test_a_full_disk_leaves_nothing_behind(tmp_path, home):
    np.save(tmp_path / "x.npy", RNG.normal(size=(20_000, 5)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with fails("x.npy: needs 0.0 GiB in the cache .*File too large.: make room"):
            load(tmp_path / "x.npy", in_memory=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.suffix for path in home.rglob("*") if path.is_file()} == {".lock"}
    assert load(tmp_path / "x.npy", in_memory=False).shape == (5,)


# From afar -----------------------------------------------------------------------------------


def test_a_table_is_mapped_before_another_process_replaces_it(tmp_path, monkeypatch, home):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {name: np.arange(9.0) ** power for power, name in enumerate("abc", 1)}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    locked = cache.locked

    @contextlib.contextmanager
    def then_another(path, **how):
        with locked(path, **how) as held:
            yield held
        monkeypatch.setattr(cache, "locked", locked)
        load(tmp_path / "x.parquet", columns=["b", "c"], in_memory=False)

    monkeypatch.setattr(cache, "locked", then_another)
    data = load(tmp_path / "x.parquet", columns=["a", "b"], in_memory=False)
    np.testing.assert_array_equal(data.x, np.stack([columns["a"], columns["b"]], 1))


@pytest.fixture
def afar():
    """A file system in memory, empty."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        fs.rm("/", recursive=True)
    return fs


def test_a_file_behind_a_url(tmp_path, afar, home):
    np.save(tmp_path / "x.npy", COLOR)
    afar.pipe("/bucket/x.npy", (tmp_path / "x.npy").read_bytes())
    calls = []
    data = load("memory://bucket/x.npy", progress=lambda *done: calls.append(done))
    np.testing.assert_array_equal(data.x, COLOR)
    assert data.name == identity("memory://bucket/x.npy") == "memory://bucket/x.npy"
    (kept,) = (home / "remote").rglob("x.npy")
    before = kept.stat().st_mtime_ns
    load("memory://bucket/x.npy")
    assert kept.stat().st_mtime_ns == before  # is not fetched again
    np.save(tmp_path / "x.npy", COLOR[::-1])  # as large as before
    afar.pipe("/bucket/x.npy", (tmp_path / "x.npy").read_bytes())
    np.testing.assert_array_equal(load("memory://bucket/x.npy").x, COLOR[::-1])
    kept.write_bytes(kept.read_bytes()[:-1])
    np.testing.assert_array_equal(load("memory://bucket/x.npy").x, COLOR[::-1])
    here = load(f"file://{tmp_path}/x.npy")
    assert isinstance(here.array, np.memmap)
    assert Path(str(here.array.filename)) == tmp_path / "x.npy"  # read where it is


def test_shards_behind_a_url(tmp_path, afar, home):
    for i in range(3):
        inner = {f"{'ab'[j % 2]}/{j}.png": png(GRAY[3 * i + j]) for j in range(3)}
        path = tar(tmp_path / "shards" / f"s-{i}.tar", inner)
        afar.pipe(f"/bucket/set/s-{i}.tar", path.read_bytes())
    afar.pipe("/bucket/set/.hidden", b"x")
    here = load(tmp_path / "shards")
    for url in ("memory://bucket/set", "memory://bucket/set/s-{0..2}.tar"):
        same(load(url, in_memory=False), here)
    same(load(f"file://{tmp_path}/shards/s-{{0..2}}.tar"), here)
    afar.rm("/bucket/set/s-1.tar")
    assert len(load("memory://bucket/set", in_memory=False)) == 6
    with fails("memory://bucket/set/s-{0..2}.tar: there is no such file"):
        load("memory://bucket/set/s-{0..2}.tar")


def test_shards_of_one_name_behind_a_url_are_refused(tmp_path, afar, home):
    for i in range(2):
        path = tar(tmp_path / f"{i}" / "s.tar", {f"{i}.png": png(GRAY[i])})
        afar.pipe(f"/bucket/{i}/s.tar", path.read_bytes())
    with fails(
        r"memory://bucket/\{0\.\.1\}/s.tar: several files are called s.tar: give a pattern"
    ):
        load("memory://bucket/{0..1}/s.tar")


def test_what_has_been_fetched_is_noted_if_the_rest_fails(tmp_path, afar, monkeypatch, home):
    for i in range(2):
        afar.pipe(f"/bucket/set/{i}.png", png(GRAY[i]))
    whole, opened = type(afar).open, []

    def fail_at_the_second(self, path, *args, **how):
        opened.append(path)
        if len(opened) == 2:
            raise ConnectionError("no route")
        return whole(self, path, *args, **how)

    monkeypatch.setattr(type(afar), "open", fail_at_the_second)
    with fails("cannot be read"):
        load("memory://bucket/set")
    assert len(load("memory://bucket/set")) == 2
    assert [path[-5:] for path in opened] == ["0.png", "1.png", "1.png"]


def test_a_page_behind_a_url_may_be_that_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "photos").write_text("<html>")
    monkeypatch.setattr(readers, "fetched", lambda url, request: str(tmp_path / "photos"))
    with fails("https://host/photos: is a web page or XML: .*; the URL of a folder ends with /"):
        load("https://host/photos")
    with fails("photos: is a web page or XML: fetch it again"):
        load(tmp_path / "photos")


def test_urls_that_cannot_be_read(tmp_path, afar, monkeypatch, home):
    with fails("memory://bucket/none.npy: there is no such file or folder"):
        load("memory://bucket/none.npy")
    with fails("nope://x: cannot be read .*Protocol not known"):
        load("nope://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with fails("s3://bucket/x.npy: Install s3fs.*: pip install s3fs"):
        load("s3://bucket/x.npy")
    afar.pipe("/bucket/x.npy", b"12345")
    monkeypatch.setattr(
        type(afar), "info", lambda self, path, **kw: {"size": 9, "type": "file", "name": path}
    )
    with fails("x.npy should have 9 bytes, and 5 arrived"):
        load("memory://bucket/x.npy")
    assert not list(home.rglob("*x.npy*"))

    def refuse(self, path, **kw):
        raise ConnectionError(f"no route to {path}") from None

    monkeypatch.setattr(type(afar), "info", refuse)
    with fails(r"memory://bucket/x.npy: cannot be read .*no route to .*x.npy\?\.\.\.\): check"):
        load("memory://bucket/x.npy?token=secret")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with fails(r"https://host/x.npy: reading URLs needs fsspec: pip install 'musigma\[remote\]'"):
        load("https://me:secret@host/x.npy?token=secret")
    assert identity("https://me:secret@host/x.npy?token=secret") == "https://host/x.npy"
    assert identity("simplecache::s3://me@host/x?y") == "simplecache::s3://host/x"
