"""Folders of images to .mus files and back, and the commands that do it."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from musigma import checkpoint, coding
from musigma.cli import main
from musigma.coding import Archive, Batch, DamagedFile, Examples, compress, extract, images
from musigma.coding.container import Writer
from musigma.coding.reader import Reader
from musigma.data import Preprocess, load
from musigma.zoo import build


def save_image(path, x, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(x)
    image.convert(mode, dither=Image.Dither.NONE).save(path, **options)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def gray():
    torch.manual_seed(0)
    return build("vae", (1, 4, 4), bits=8, net="mlp", width=8, latents=2)


@pytest.fixture(scope="module")
def black():
    torch.manual_seed(0)
    return build("vae", (1, 4, 4), bits=1, net="mlp", width=8, latents=2)


@pytest.fixture(scope="module")
def color():
    torch.manual_seed(0)
    return build("vae", (3, 4, 4), bits=8, net="mlp", width=8, latents=2)


def through(model, examples, out):
    """Compress, open, extract."""
    file = io.BytesIO()
    compress(model, examples, file, about=examples.about, workers=1)
    archive = Archive(file, model, workers=1)
    batches = [(e.first, archive.chunk(i)) for i, e in enumerate(archive.reader.entries)]
    return extract(batches, archive, out)


def pixels(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with Image.open(path) as image:
                found[path.relative_to(folder).as_posix()] = (image.mode, np.array(image).tolist())
    return found


def test_a_folder_comes_back_with_its_names_and_modes(gray, tmp_path):
    source = tmp_path / "in"
    save_image(source / "a.png", noise(0, 4, 4))
    save_image(source / "cat" / "b.PNG", noise(1, 4, 4))
    save_image(source / "cat" / "deep" / "c.bmp", noise(2, 4, 4))
    save_image(source / "dog" / "d.TIF", noise(3, 4, 4))
    save_image(source / "dog" / "e.pgm", noise(4, 4, 4), format="PPM")
    save_image(source / "dog" / "one.png", noise(5, 4, 4), mode="1")
    data = load(source)
    assert through(gray, Examples(data, folder=source), tmp_path / "out") == 6
    assert pixels(tmp_path / "out") == pixels(source)
    for path in source.rglob("*.*"):
        with Image.open(path) as a, Image.open(tmp_path / "out" / path.relative_to(source)) as b:
            assert a.format == b.format


def test_colors_and_names_of_lossy_files(color, tmp_path):
    source = tmp_path / "in"
    save_image(source / "a.jpg", noise(0, 4, 4, 3), mode="RGB")
    save_image(source / "b.png", noise(1, 4, 4, 3), mode="RGB")
    save_image(source / "g.png", noise(2, 4, 4))
    through(color, Examples(load(source), folder=source), tmp_path / "out")
    before, after = pixels(source), pixels(tmp_path / "out")
    assert sorted(after) == ["a.jpg.png", "b.png", "g.png"]
    assert after == {"a.jpg.png": before["a.jpg"]} | {n: before[n] for n in ("b.png", "g.png")}
    save_image(source / "a.jpg.png", noise(3, 4, 4, 3), mode="RGB")
    with pytest.raises(ValueError, match="occurs twice"):
        Examples(load(source), folder=source)


def test_levels_are_converted_back(black, tmp_path):
    source = tmp_path / "in"
    for i in range(9):
        save_image(source / f"{i}.png", (noise(i, 4, 4) // 128 * 255).astype(np.uint8))
    data = load(source, preprocess=Preprocess(binarize="threshold"))
    examples = Examples(data, folder=source)
    assert examples.about["levels"] == [0, 255]
    through(black, examples, tmp_path / "out")
    assert pixels(tmp_path / "out") == pixels(source)
    save_image(source / "9.png", noise(0, 4, 4))
    data = load(source, preprocess=Preprocess(binarize="threshold"))
    with pytest.raises(ValueError, match="holds more than the model sees"):
        Examples(data, folder=source)
    through(black, Examples(data, folder=source, prepared=True), tmp_path / "prepared")
    found = {v for _, rows in pixels(tmp_path / "prepared").values() for v in np.ravel(rows)}
    assert found == {0, 255}


def test_any_slice_of_examples_is_that_of_the_whole(tmp_path):
    for i in range(9):
        save_image(tmp_path / f"{i}.png", noise(i, 4, 4))
    data = load(tmp_path, preprocess=Preprocess(binarize="dynamic"))
    examples = Examples(data, folder=tmp_path, prepared=True)
    whole = examples[:]
    for rows in (slice(3, 7), slice(-2, None), slice(4, 100)):
        assert (examples[rows].levels == whole.levels[rows]).all()
        assert examples[rows].about["names"] == whole.about["names"][rows]


def test_images_of_another_size_are_refused(gray, tmp_path):
    save_image(tmp_path / "in" / "a.png", noise(0, 8, 8))
    data = load(tmp_path / "in", preprocess=Preprocess(size=4))
    with pytest.raises(ValueError, match="is 8 x 8, and the model sees 4 x 4"):
        Examples(data, folder=tmp_path / "in")
    examples = Examples(data, folder=tmp_path / "in", prepared=True)
    assert through(gray, examples, tmp_path / "out") == 1


def test_resized_archives_and_converted_colors_are_refused(gray, color, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        save_image(tmp_path / "in" / "a.png", noise(0, 8, 8))
        archive.add(tmp_path / "in", "in")
    data = load(tmp_path / "x.tar", preprocess=Preprocess(size=4))
    with pytest.raises(ValueError, match="was resized to 4 x 4 pixels"):
        Examples(data)
    assert through(gray, Examples(data, prepared=True), tmp_path / "out") == 1
    (tmp_path / "inks").mkdir()
    Image.fromarray(noise(1, 4, 4, 4), mode="CMYK").save(tmp_path / "inks" / "a.tif")
    data = load(tmp_path / "inks")
    with pytest.raises(ValueError, match="has mode CMYK"):
        Examples(data, folder=tmp_path / "inks")
    (tmp_path / "few").mkdir()
    Image.fromarray(noise(2, 4, 4, 3)).quantize(4).save(tmp_path / "few" / "a.png")
    through(color, Examples(load(tmp_path / "few"), folder=tmp_path / "few"), tmp_path / "drawn")
    with (
        Image.open(tmp_path / "few" / "a.png") as a,
        Image.open(tmp_path / "drawn" / "a.png") as b,
    ):
        assert (a.mode, b.mode) == ("P", "RGB")
        assert (np.array(a.convert("RGB")) == np.array(b)).all()


def test_a_model_without_a_rule_is_refused_before_data_are_read(tmp_path, capsys):
    model = build("vae", (1, 4, 4), net="mlp", width=8, latents=2, likelihood="beta-binomial")
    checkpoint.save(model, tmp_path / "m.safetensors")
    code, _, err = call(f"compress {tmp_path}/m.safetensors nowhere {tmp_path}/x.mus", capsys)
    assert (code, "FactorizedBetaBinomial has no coding rule" in err) == (2, True)


class Named:
    """Two images with any names."""

    def __init__(self, names, modes=("L", "L")):
        self.about = {"label_names": []}
        self.names, self.modes = list(names), list(modes)

    def __len__(self):
        return 2

    def __getitem__(self, rows):
        about = {"names": self.names[rows], "modes": self.modes[rows]}
        return Batch(noise(0, 2, 1, 4, 4).astype(np.int64)[rows], about)


HOSTILE = {
    "up": "../x.png",
    "within": "a/../../x.png",
    "absolute": "/tmp/x.png",
    "drive": "C:x.png",
    "backslash": "a\\x.png",
    "dot": "./x.png",
    "empty part": "a//x.png",
    "reserved": "con.png",
    "reserved folder": "NUL/x.png",
    "dot at the end": "a./x.png",
    "control": "a\x07.png",
    "null": "a\0.png",
    "mark": "a\u202e.png",
    "surrogate": "\ud800.png",
    "long": "a" * 252 + ".png",
    "long in all": "/".join(["b" * 200] * 9) + ".png",
    "deep": "d/" * 40 + "x.png",
    "no text": 7,
    "list": ["x.png"],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_names_write_nothing(gray, tmp_path, what):
    (tmp_path / "a").mkdir()
    with pytest.raises(DamagedFile, match="cannot be written"):
        through(gray, Named(["fine.png", HOSTILE[what]]), tmp_path / "a" / "out")
    assert not list((tmp_path / "a").iterdir())
    assert len(list(tmp_path.iterdir())) == 1


PAIRS = [
    ("a.png", "A.PNG"),
    ("a.png", "a.png"),
    ("é.png", "e\u0301.png"),
    ("a.png", "a.png/b.png"),
    ("a.png/b.png", "A.png"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_names_that_are_equal_on_some_systems(gray, tmp_path, pair):
    with pytest.raises(DamagedFile, match=r"occurs twice|names a file as a folder"):
        through(gray, Named(pair), tmp_path / "out")
    for modes in (["L", "P"], ["L", 1], ["L", []]):
        with pytest.raises(DamagedFile, match=r"with name .* and mode .* cannot"):
            through(gray, Named(["a.png", "b.png"], modes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Fake:
    """The attributes of an archive that `extract` reads."""

    bits, shape = 8, (1, 4, 4)

    def __init__(self, about):
        self.about = about


ABOUTS = [
    {"levels": 3},
    {"levels": []},
    {"levels": [0, [1]]},
    {"levels": [0, 300]},
    {"levels": [0, -1]},
    {"levels": [True, False]},
]


@pytest.mark.parametrize("about", ABOUTS)
def test_invalid_tables_of_levels(about, tmp_path):
    batch = Batch(np.ones((1, 1, 4, 4), np.int64))
    for out in ("x", "x.npz"):
        with pytest.raises(DamagedFile, match="what each level stands for"):
            extract([(0, batch)], Fake(about), tmp_path / out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("about", [{"preprocess": 7}, {"preprocess": {"bits": 10**12}}])
def test_an_invalid_preprocess_is_ignored(about, tmp_path):
    batch = Batch(np.ones((1, 1, 4, 4), np.int64))
    assert extract([(0, batch)], Fake(about), tmp_path / "out") == 1


def test_a_full_disk_leaves_no_partial_folder(tmp_path, monkeypatch):
    batch = Batch(np.ones((3, 1, 4, 4), np.int64))
    saved = []

    def full(self, file, *rest, **more):
        saved.append(file)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        extract([(0, batch)], Fake({}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_vectors_are_not_images(tmp_path):
    batch = Batch(np.ones((3, 4), np.int64))
    with pytest.raises(ValueError, match="are not images"):
        extract([(0, batch)], Fake({}), tmp_path / "out")
    assert extract([(0, batch)], Fake({}), tmp_path / "out.npy") == 3
    assert np.load(tmp_path / "out.npy").tolist() == np.ones((3, 4)).tolist()


@pytest.mark.parametrize("name", ["COM1", "lpt9.png", "aux.tar.gz", "a ", "a.", "..", "a:b"])
def test_names_that_are_invalid_on_some_systems(name):
    with pytest.raises(ValueError, match="names: "):
        images.check_names([name])
    images.check_names(["command.png", "a.b.png", "c/d.png", "c/e.png", "ß.png", "日本.png"])


# -- the commands


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Models of the digits, other models, and a compressed file."""
    here = tmp_path_factory.mktemp("shelf")
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = build("vae", (1, 8, 8), bits=8, net="mlp", width=8, latents=2)
        checkpoint.save(model, here / f"{name}.safetensors")
    words = f"compress {here}/model.safetensors digits {here}/d.mus --chunk 600 --embed"
    assert call(words)[0] == 0
    return here


def call(words, capsys=None):
    if capsys:
        capsys.readouterr()
    try:
        main([*words.split(), "--device", "cpu"] if "inspect" not in words else words.split())
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return (code, *capsys.readouterr()) if capsys else (code,)


def test_digits_come_back(shelf, tmp_path, capsys):
    code, out, _ = call(
        f"compress {shelf}/model.safetensors digits {tmp_path}/x.mus --labels --workers 1 --json",
        capsys,
    )
    report = json.loads(out)
    assert code == 0
    assert report["images"] == 1797
    assert report["verified"]
    assert report["data_bytes"] == (tmp_path / "x.mus").stat().st_size
    code, out, _ = call(
        f"decompress {tmp_path}/x.mus {tmp_path}/x.npz --run {shelf}/model.safetensors --json",
        capsys,
    )
    assert code == 0
    assert json.loads(out) == {"out": f"{tmp_path}/x.npz", "images": 1797, "lost": []}
    found, digits = np.load(tmp_path / "x.npz"), load("digits")
    assert (found["x"] == digits.take(np.arange(1797))).all()
    assert (found["labels"] == digits.labels).all()


def test_inspect_and_decompressing_one_image(shelf, tmp_path, capsys):
    code, out, _ = call(f"inspect {shelf}/d.mus --json", capsys)
    found = json.loads(out)
    assert code == 0
    assert (found["images"], found["chunks"], found["whole"]) == (1797, 3, True)
    assert found["file_bytes"] == (shelf / "d.mus").stat().st_size
    assert "1,797 images of 1x8x8" in call(f"inspect {shelf}/d.mus", capsys)[1]
    words = f"decompress {shelf}/d.mus {tmp_path}/one.npy --trust --index 700"
    assert call(words)[0] == 0
    assert (np.load(tmp_path / "one.npy") == load("digits").take(np.array([700]))).all()
    code, _, err = call(words.replace("700", "1797"), capsys)
    assert code == 2
    assert "index: expected 0 to 1796; got 1797" in err


def damaged(shelf, tmp_path, how):
    data = bytearray((shelf / "d.mus").read_bytes())
    if how == "damaged":
        data[Reader(io.BytesIO(data)).entries[1].end - 9] ^= 1
    elif how == "lost":
        data[Reader(io.BytesIO(data)).entries[1].offset + 9] ^= 1
    elif how == "later":
        data[8] = 9
    elif how == "print":
        reader, file = Reader(io.BytesIO(data)), io.BytesIO()
        header = {**reader.header, "fingerprint": "0"}
        with Writer(file, header, reader.model()) as writer:
            for chunk in reader:
                writer.write(chunk)
        data = file.getvalue()
    (tmp_path / "damaged.mus").write_bytes(data)
    return tmp_path / "damaged.mus"


CODES = {
    "damaged": (3, "--trust", "does not match its checksum"),
    "lost": (3, "--trust", "images are missing: 599 to 1197"),
    "lost one": (3, "--trust --index 800", "image 800: it is lost"),
    "untrusted": (2, "", "--trust"),
    "model": (4, "--run {shelf}/other.safetensors", "another model"),
    "print": (5, "--trust", "arithmetic of this machine differs"),
    "limits": (6, "--trust --max-output 1", None),
    "later": (7, "--trust", "upgrade musigma"),
}


@pytest.mark.parametrize("how", CODES)
def test_exit_codes_of_failures(shelf, tmp_path, capsys, how, monkeypatch):
    code, options, said = CODES[how]
    path = damaged(shelf, tmp_path, how.split()[0])
    if how == "limits":
        monkeypatch.setattr(coding, "Limits", lambda total: coding.errors.Limits(total=99))
        said = "the limit is 99"
    words = f"decompress {path} {tmp_path}/out.npy {options.format(shelf=shelf)}"
    found, _, err = call(words.strip(), capsys)
    assert (found, said in err, "Traceback" in err) == (code, True, False), err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("how", ["damaged", "lost"])
def test_keep_going_reads_all_whole_chunks(shelf, tmp_path, capsys, how):
    path = damaged(shelf, tmp_path, how)
    words = f"decompress {path} {tmp_path}/out.npy --trust --keep-going --json"
    code, out, err = call(words, capsys)
    assert code == 3
    assert "599 images are lost" in err
    assert [row[:2] for row in json.loads(out)["lost"]] == [[599, 1198]]
    rest = np.r_[0:599, 1198:1797]
    assert (np.load(tmp_path / "out.npy") == load("digits").take(rest)).all()


def test_images_without_names_are_numbered(tmp_path):
    batch = Batch(np.ones((2, 1, 4, 4), np.int64))
    assert extract([(0, batch), (7, batch)], Fake({}), tmp_path / "out") == 4
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"{i:08}.png" for i in (0, 1, 7, 8)]


def test_outputs_that_exist_or_cannot_be_created(shelf, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    code, _, err = call(f"decompress {shelf}/d.mus {tmp_path}/there --trust", capsys)
    assert (code, "exists" in err) == (2, True)
    code, _, err = call(f"decompress {shelf}/d.mus {tmp_path}/no/out --trust", capsys)
    assert (code, "does not exist" in err) == (2, True)
    code, _, err = call(f"decompress {tmp_path}/no.mus {tmp_path}/out --trust", capsys)
    assert (code, "there is no file" in err) == (2, True)
    code, _, err = call(f"compress {shelf}/model.safetensors digits {tmp_path}/x.zip", capsys)
    assert (code, "expected a .mus file" in err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_a_folder_by_the_commands(tmp_path, capsys, color, gray):
    for i in range(6):
        save_image(tmp_path / "in" / f"{i}.png", noise(i, 4, 4, 3), mode="RGB")
    checkpoint.save(color, tmp_path / "color.safetensors")
    checkpoint.save(gray, tmp_path / "gray.safetensors")
    words = f"compress {tmp_path}/color.safetensors {tmp_path}/in {tmp_path}/x.mus --embed"
    assert call(words)[0] == 0
    assert call(f"decompress {tmp_path}/x.mus {tmp_path}/out --trust")[0] == 0
    assert pixels(tmp_path / "out") == pixels(tmp_path / "in")
    code, _, err = call(words.replace("/color", "/gray"), capsys)
    assert (code, "color" in err) == (2, True)
